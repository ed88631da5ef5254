"""Sparse autoencoders: what the whole family shares."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders import activations
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.linear import Linear, regress, spread
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP
from dictlearn.encoders.pursuit import on_one_cpu
from dictlearn.solvers import sae_cpu
from dictlearn.solvers.base import AbstractSolver, Batch, Info, unit_rows
from dictlearn.solvers.sae_variants import (
    AbsTopK,
    BatchTopK,
    GradientTopK,
    Inputs,
    JumpReLU,
    Parameters,
    ReLU,
    Seen,
    Told,
    TopK,
)

Variant = Annotated[
    TopK | AbsTopK | BatchTopK | ReLU | JumpReLU | GradientTopK, Field(discriminator="name")
]


class _SAEState(eqx.Module):
    parameters: Parameters
    optimiser: optax.OptState
    running: Float[Array, ""]  # of the variant
    n_steps: Int[Array, ""]
    rows_since_used: Int[Array, " m"]


class SAE(AbstractSolver[_SAEState]):
    """An affine encoder and a dictionary, trained together by Adam.

        u = (x - b) W^T + c,    z = activation(u),    x_hat = z D + b
        loss = mean ||x - x_hat||^2 / mean ||x - mean x||^2 + penalty + aux_weight AuxK

    `variant` gives the activation and the penalty (dictlearn.solvers.sae_variants).

    AuxK lets the `aux_k` largest latents among the dead (largest in size where codes are signed)
    reconstruct what the others left over: the mean squared error of that, over the mean square of
    what was left; 0 while none is dead.

    Rows of D have unit norm: the part of a gradient along its row is removed, and rows are put back
    to unit norm after each update. D starts from random data rows, W from a D with the a that
    reconstructs best, b from the rows' mean or geometric median, c from 0. The learning rate rises
    linearly over the first `warmup` of the steps and falls to 0 along a cosine; gradients are
    clipped to a global norm of 1. Adam's betas are 0.9 and 0.999, epsilon is 1e-8. Parameters have
    the type of the rows, float32.

    Arguments:
      n_atoms: m.
      matryoshka: the first so many atoms, twice as many, and so on up to all, reconstruct the rows
        by themselves too; the loss is the mean over these prefixes.
      frozen: D and b stay as they were given; only the encoder learns, from the least squares fit
        of the codes that a pursuit finds (dictlearn.fit_encoder).
      aux_k: d / 2 where it is left out.
      dead_after: rows for which a latent is not used before it counts as dead.

    On one CPU the variants that keep few entries of u go by a kernel (dictlearn.solvers.sae_cpu)
    whose work beside one dense product is that of the nonzeros. Elsewhere XLA differentiates dense
    codes. Both do the same but for rounding.

    Source: Gao et al., "Scaling and evaluating sparse autoencoders" (2024), sections 2.3 and 2.4
    and appendix A; Bussmann et al., "Learning multi-level features with Matryoshka sparse
    autoencoders" (2025), for the prefixes. Departures: prefixes that double; the cosine decay; the
    start from data rows (theirs is random) and its scale a, without which rows that share a
    direction overshoot many times over; a small `dead_after` that suits small corpora (theirs is 10
    million tokens).
    """

    __pydantic_config__ = {"extra": "forbid"}

    n_atoms: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    variant: Variant
    matryoshka: Annotated[int, Field(gt=0)] | None = eqx.field(static=True, default=None)
    frozen: bool = eqx.field(static=True, default=False)
    bias: Literal["mean", "geometric_median"] = eqx.field(static=True, default="mean")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = eqx.field(
        static=True, default=1e-3
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = eqx.field(static=True, default=0.05)
    aux_k: Annotated[int, Field(gt=0)] | None = eqx.field(static=True, default=None)
    aux_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = eqx.field(
        static=True, default=1 / 32
    )
    dead_after: Annotated[int, Field(gt=0, lt=2**30)] = eqx.field(static=True, default=50_000)
    name: Literal["sae"] = eqx.field(static=True, default="sae")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What batches must hold."""
        return self.variant.needs

    def __check_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Rules that join hyperparameters. Raises ValueError naming the field."""
        if self.variant.k > self.n_atoms:
            raise ValueError(
                f"variant.k: {self.variant.k} is more than n_atoms = {self.n_atoms}; "
                "a row cannot use more atoms than there are"
            )
        if self.matryoshka is not None and self.matryoshka > self.n_atoms:
            raise ValueError(
                f"matryoshka: {self.matryoshka} is more than n_atoms = {self.n_atoms}; "
                "the smallest dictionary is a part of the whole"
            )

    @property
    def aim(self) -> int:
        """Nonzeros a row that codes should come to."""
        return self.variant.k

    @property
    def control(self) -> AbstractEncoder:
        """What codes the control."""
        return OMP(k=self.variant.k)

    @property
    def groups(self) -> list[int]:
        """Where groups of atoms end; each prefix of them reconstructs by itself."""
        size = self.matryoshka or self.n_atoms
        ends = [size * 2**i for i in range((self.n_atoms // size).bit_length())]
        return ends if ends[-1] == self.n_atoms else [*ends, self.n_atoms]

    def auxiliary(self, width: int) -> int:
        """How many dead latents reconstruct what is left."""
        return min(self.aux_k or max(width // 2, 1), self.n_atoms)

    def init(
        self,
        sample: Float[Array, "n d"],
        *,
        n_steps: int,
        key: Key[Array, ""],
        start: Dictionary | None = None,
    ) -> _SAEState:
        """Atoms and encoder weights = those of `start` or random rows of the sample, unit norm.

        Raises:
          ValueError: there are fewer rows than atoms; nothing is given that could be frozen.
        """
        if start is None:
            if self.frozen:
                raise ValueError("frozen: no atoms are given; name a run as the config's `start`")
            bias = sample.mean(axis=0)
            if self.bias == "geometric_median":
                bias = geometric_median(sample)
            start = Dictionary(self.data_rows(sample - bias[None], key=key), bias)
        elif not self.frozen:
            start = Dictionary(unit_rows(start.atoms), start.bias)
        rows = spread(sample, _SCALE_ROWS)
        weight, bias = start.atoms, jnp.zeros(self.n_atoms, sample.dtype)
        if self.frozen:
            weight, bias = regress(start, sample, self._pursuit())
        kind = activations.AbsTopK if self.variant.signed else activations.TopK
        first = Linear(weight, bias, kind(self.variant.k))
        scale = _best_scale(start, rows, first.prepare(start).encode(rows))
        weight, bias = scale * weight, scale * bias
        u = (rows - start.bias[None]) @ weight.T + bias[None]
        bias = bias - self.variant.threshold(u)
        parameters = Parameters(start, weight, bias, self.variant.learned(u))
        return _SAEState(
            parameters=parameters,
            optimiser=_OPTIMISER.init(parameters),  # pyright: ignore[reportArgumentType]
            running=jnp.asarray(self.variant.begins, sample.dtype),
            n_steps=jnp.array(n_steps, jnp.int32),
            rows_since_used=jnp.zeros(self.n_atoms, jnp.int32),
        )

    def _pursuit(self) -> OMP | NonNegativeOMP:
        return (OMP if self.variant.signed else NonNegativeOMP)(k=self.variant.k)

    def step(
        self, state: _SAEState, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[_SAEState, Info]:
        """One update by Adam."""
        del key
        dead = state.rows_since_used >= self.dead_after
        slope = None
        if on_one_cpu(batch.x):
            slope = sae_cpu.slope(self, state.parameters, state.running, dead, batch)
        if slope is None:
            slope = _slope(self, state.parameters, state.running, dead, batch)
        return _update(self, state, *slope, len(batch.x))

    def result(self, state: _SAEState) -> tuple[Dictionary, AbstractEncoder]:
        """The dictionary, and the encoder trained with it."""
        own = state.parameters
        activation = self.variant.activation(own.learned, state.running, self.n_atoms)
        return own.dictionary, Linear(own.weight, own.bias, activation)

    def memory_bytes(self, batch_size: int, width: int) -> int:
        """About how many bytes a step needs at once."""
        # Parameters, gradients and two moments of W and D; u and z with their gradients.
        return 4 * (8 * self.n_atoms * width + 4 * batch_size * (self.n_atoms + width))


# Rows from which the encoder's first scale is estimated: one number.
_SCALE_ROWS = 4096
_OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@eqx.filter_jit
def _slope(
    solver: SAE,
    parameters: Parameters,
    running: Float[Array, ""],
    dead: Bool[Array, " m"],
    batch: Batch,
) -> tuple[Parameters, Told]:
    """The gradient of the loss, by XLA over dense codes: on a GPU a product beats k gathers."""
    x = batch.x
    variance = jnp.mean(jnp.sum((x - x.mean(axis=0, keepdims=True)) ** 2, axis=1))
    safe = jnp.where(variance > 0, variance, 1)

    def loss(own: Parameters) -> tuple[Array, Told]:
        atoms, bias = own.dictionary.atoms, own.dictionary.bias
        u = (x - bias[None]) @ own.weight.T + own.bias[None]
        projection = None
        if batch.gradient is not None:
            projection = jnp.abs(batch.gradient @ jax.lax.stop_gradient(atoms).T)
        inputs = Inputs(u, projection, own.learned, running)
        z = solver.variant.codes(inputs)
        errors, left, first = [], x - bias[None], 0
        for last in solver.groups:
            left = left - z[:, first:last] @ atoms[first:last]
            errors.append(jnp.mean(jnp.sum(left**2, axis=1)))
            first = last
        aux = jax.lax.cond(
            dead.any() & (solver.aux_weight > 0),
            lambda: _aux(solver, u, jax.lax.stop_gradient(left), dead, atoms),
            lambda: jnp.zeros((), x.dtype),
        )
        penalty = solver.variant.penalty(inputs, z, jnp.sqrt(safe))
        scaled = jnp.mean(jnp.stack(errors)) / safe
        size = jax.lax.stop_gradient(jnp.abs(z))
        seen = Seen(
            l0=jnp.sum(size > 0, axis=1).mean(dtype=x.dtype),
            least=jnp.where(size > 0, size, jnp.inf).min(),
            projection=jnp.zeros((), x.dtype) if projection is None else projection.mean(),
        )
        told = Told(errors[-1], variance, seen, jnp.any(size > 0, axis=0))
        return scaled + penalty + solver.aux_weight * aux, told

    (_, told), slope = jax.value_and_grad(loss, has_aux=True)(parameters)
    return slope, told


def _aux(
    solver: SAE,
    u: Float[Array, "n m"],
    error: Float[Array, "n d"],
    dead: Bool[Array, " m"],
    atoms: Float[Array, "m d"],
) -> Float[Array, ""]:
    """How well the dead latents reconstruct the error, as a fraction of its square."""
    kind = activations.AbsTopK if solver.variant.signed else activations.TopK
    codes = kind(solver.auxiliary(error.shape[1]))(jnp.where(dead[None], u, 0)).dense()
    square = jnp.mean(error**2)
    return jnp.mean((error - codes @ atoms) ** 2) / jnp.where(square > 0, square, 1)


@eqx.filter_jit
def _update(
    solver: SAE, state: _SAEState, slope: Parameters, told: Told, n: int
) -> tuple[_SAEState, Info]:
    """One step of Adam, and what it leaves of the state."""
    across = _across(_atoms(slope), _atoms(state.parameters))
    slope = eqx.tree_at(_atoms, slope, across)
    if solver.frozen:
        still = jax.tree.map(jnp.zeros_like, slope.dictionary)
        slope = eqx.tree_at(lambda own: own.dictionary, slope, still)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        updates, optimiser = _OPTIMISER.update(slope, state.optimiser)  # pyright: ignore[reportArgumentType]
    rate = _rate(solver, optax.tree.get(optimiser, "count"), state.n_steps)
    rate = rate.astype(told.objective.dtype)
    parameters = jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates)
    if not solver.frozen:
        parameters = eqx.tree_at(_atoms, parameters, unit_rows(_atoms(parameters)))
    running = solver.variant.follow(state.running, told.seen)
    since = jnp.where(told.used, 0, state.rows_since_used + n)
    since = jnp.minimum(since, solver.dead_after)  # it would overflow in the end
    info = Info(
        objective=told.objective,
        fvu=told.objective / told.variance,
        l0=told.seen.l0,
        dead=(since >= solver.dead_after).sum(),
    )
    return _SAEState(parameters, optimiser, running, state.n_steps, since), info


@eqx.filter_jit
def _best_scale(
    dictionary: Dictionary, x: Float[Array, "n d"], codes: SparseCodes
) -> Float[Array, ""]:
    """argmin_a ||x - b - a z D||^2; 1 where z D is 0."""
    x_hat = codes.decode(dictionary.atoms)
    square = jnp.vdot(x_hat, x_hat)
    x = x - dictionary.bias[None]
    return jnp.where(square > 0, jnp.vdot(x, x_hat) / jnp.where(square > 0, square, 1), 1)


def _atoms(parameters: Parameters) -> Any:  # not Array: tree_at asks with markers in its place
    return parameters.dictionary.atoms


def _across(slope: Float[Array, "m d"], atoms: Float[Array, "m d"]) -> Float[Array, "m d"]:
    """The gradient without its part along the (unit) atoms."""
    return slope - jnp.sum(slope * atoms, axis=1, keepdims=True) * atoms


def _rate(solver: SAE, count: Int[Array, ""], n_steps: Int[Array, ""]) -> Float[Array, ""]:
    """Learning rate of update `count` (from 1): linear warm-up, then a cosine towards 0."""
    total = n_steps.astype(jnp.float32)
    warm = solver.warmup * total
    step = count.astype(jnp.float32)
    done = jnp.clip((step - 1 - warm) / (total - warm), 0, 1)  # the last update still moves
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
    return solver.learning_rate * jnp.minimum(step / jnp.maximum(warm, 1), cosine)


@jax.jit
def geometric_median(x: Float[Array, "n d"]) -> Float[Array, " d"]:
    """argmin_b sum ||x - b||, by 100 steps of Weiszfeld's iteration from the mean."""
    tiny = jnp.finfo(x.dtype).eps * (jnp.abs(x).max() + jnp.finfo(x.dtype).tiny)

    def step(_: Array, b: Array) -> Array:
        weight = 1 / (jnp.linalg.norm(x - b[None], axis=1, keepdims=True) + tiny)
        return jnp.sum(weight * x, axis=0) / jnp.sum(weight)

    return jax.lax.fori_loop(0, 100, step, x.mean(axis=0))
