"""TopK sparse autoencoder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.linear import Linear, TopK
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.base import AbstractSolver, Batch, Info, unit_rows

_Parameters = tuple[Dictionary, Linear]


class _SAEState(eqx.Module):
    parameters: _Parameters
    optimiser: optax.OptState
    n_steps: Int[Array, ""]
    rows_since_used: Int[Array, " m"]


class TopKSAE(AbstractSolver[_SAEState]):
    """An affine encoder and a dictionary, trained together by Adam.

        u = (x - b) W^T + c,    z = ReLU(TopK(u)),    x_hat = z D + b
        loss = mean ||x - x_hat||^2 / mean ||x - mean x||^2 + aux_weight * AuxK

    AuxK lets the `aux_k` largest latents among the dead reconstruct what the others left over: the
    mean squared error of that, over the mean square of what was left; 0 while none is dead.

    Rows of D have unit norm: the part of a gradient along its row is removed, and rows are put back
    to unit norm after each update. D starts from random data rows, W from a D with the a that
    reconstructs best, b and c from 0 (the Normaliser has taken the mean). The learning rate rises
    linearly over the first `warmup` of the steps and falls to 0 along a cosine; gradients are
    clipped to a global norm of 1.

    Arguments:
      n_atoms: m.
      k: nonzeros a row.
      dead_after: rows for which a latent is not used before it counts as dead.

    Source: Gao et al., "Scaling and evaluating sparse autoencoders" (2024), sections 2.3 and 2.4
    and appendix A. Departures: the cosine decay; the start from data rows (theirs is random) and
    its scale a, without which rows that share a direction overshoot many times over; a small
    `dead_after` that suits small corpora (theirs is 10 million tokens).
    """

    __pydantic_config__ = {"extra": "forbid"}

    n_atoms: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    k: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = eqx.field(
        static=True, default=1e-3
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = eqx.field(static=True, default=0.05)
    aux_k: Annotated[int, Field(gt=0)] = eqx.field(static=True, default=256)
    aux_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = eqx.field(
        static=True, default=1 / 32
    )
    dead_after: Annotated[int, Field(gt=0, lt=2**30)] = eqx.field(static=True, default=50_000)
    name: Literal["topk_sae"] = eqx.field(static=True, default="topk_sae")

    def __check_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Rules that join hyperparameters. Raises ValueError naming the field."""
        if self.k > self.n_atoms:
            raise ValueError(
                f"k: {self.k} is more than n_atoms = {self.n_atoms}; "
                "a row cannot use more atoms than there are"
            )

    @property
    def control(self) -> AbstractEncoder:
        """What codes the control."""
        return OMP(k=self.k)

    def init(
        self,
        sample: Float[Array, "n d"],
        *,
        n_steps: int,
        key: Key[Array, ""],
        start: Dictionary | None = None,
    ) -> _SAEState:
        """Atoms and encoder weights = `start` or random rows of the sample, at unit norm."""
        atoms = self.data_rows(sample, key=key) if start is None else unit_rows(start.atoms)
        dictionary = Dictionary(atoms, jnp.zeros(atoms.shape[1], atoms.dtype))
        encoder = Linear(atoms, jnp.zeros(self.n_atoms, atoms.dtype), TopK(self.k))
        weight = atoms * _best_scale(dictionary, encoder, sample[:_SCALE_ROWS])
        parameters = (dictionary, eqx.tree_at(lambda linear: linear.weight, encoder, weight))
        return _SAEState(
            parameters=parameters,
            optimiser=_OPTIMISER.init(parameters),  # pyright: ignore[reportArgumentType]
            n_steps=jnp.array(n_steps, jnp.int32),
            rows_since_used=jnp.zeros(self.n_atoms, jnp.int32),
        )

    def step(
        self, state: _SAEState, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[_SAEState, Info]:
        """One update by Adam."""
        del key
        return _step(self, state, batch.x)

    def result(self, state: _SAEState) -> tuple[Dictionary, AbstractEncoder]:
        """The dictionary, and the encoder trained with it."""
        return state.parameters

    def memory_bytes(self, batch_size: int, width: int) -> int:
        """About how many bytes a step needs at once."""
        # Parameters, gradients and two moments of W and D; u and z with their gradients.
        return 4 * (8 * self.n_atoms * width + 4 * batch_size * (self.n_atoms + width))


# Rows from which the encoder's first scale is estimated: one number.
_SCALE_ROWS = 4096
_OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@eqx.filter_jit
def _step(solver: TopKSAE, state: _SAEState, x: Float[Array, "n d"]) -> tuple[_SAEState, Info]:
    n, _ = x.shape
    dead = state.rows_since_used >= solver.dead_after
    variance = jnp.mean(jnp.sum((x - x.mean(axis=0, keepdims=True)) ** 2, axis=1))

    def loss(parameters: _Parameters) -> tuple[Array, tuple[Array, SparseCodes]]:
        dictionary, encoder = parameters
        u = (x - dictionary.bias[None]) @ encoder.weight.T + encoder.bias[None]
        codes = encoder.activation(u)
        # Dense, since on a CPU at m of a few thousand one product beats k gathers, both ways.
        error = x - (codes.dense() @ dictionary.atoms + dictionary.bias[None])
        objective = jnp.mean(jnp.sum(error**2, axis=1))
        aux = jax.lax.cond(
            dead.any(),
            lambda: _aux(solver, u, jax.lax.stop_gradient(error), dead, dictionary.atoms),
            lambda: jnp.zeros((), x.dtype),
        )
        scaled = objective / jnp.where(variance > 0, variance, 1)
        return scaled + solver.aux_weight * aux, (objective, codes)

    (_, (objective, codes)), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
    gradient = eqx.tree_at(_atoms, gradient, _across(_atoms(gradient), _atoms(state.parameters)))
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        updates, optimiser = _OPTIMISER.update(gradient, state.optimiser)
    rate = _rate(solver, optax.tree.get(optimiser, "count"), state.n_steps).astype(x.dtype)
    parameters = jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates)
    parameters = eqx.tree_at(_atoms, parameters, unit_rows(_atoms(parameters)))

    used = jnp.zeros(solver.n_atoms, bool).at[codes.indices].max(codes.values != 0)
    since = jnp.where(used, 0, state.rows_since_used + n)
    info = Info(
        objective=objective,
        fvu=objective / variance,
        l0=codes.l0().mean(dtype=x.dtype),
        dead=(since >= solver.dead_after).sum(),
    )
    return _SAEState(parameters, optimiser, state.n_steps, since), info


def _aux(
    solver: TopKSAE,
    u: Float[Array, "n m"],
    error: Float[Array, "n d"],
    dead: Array,
    atoms: Float[Array, "m d"],
) -> Float[Array, ""]:
    """How well the dead latents reconstruct the error, as a fraction of its square."""
    top = TopK(min(solver.aux_k, solver.n_atoms))
    codes = top(jnp.where(dead[None], u, -jnp.inf))
    left = error - codes.dense() @ atoms
    square = jnp.mean(error**2)
    return jnp.mean(left**2) / jnp.where(square > 0, square, 1)


@eqx.filter_jit
def _best_scale(
    dictionary: Dictionary, encoder: Linear, x: Float[Array, "n d"]
) -> Float[Array, ""]:
    """argmin_a ||x - a x_hat||^2 for the encoder's reconstruction x_hat; 1 where that is 0."""
    x_hat = dictionary.decode(encoder.prepare(dictionary).encode(x))
    square = jnp.vdot(x_hat, x_hat)
    return jnp.where(square > 0, jnp.vdot(x, x_hat) / jnp.where(square > 0, square, 1), 1)


def _atoms(parameters: _Parameters) -> Any:  # not Array: tree_at asks with markers in its place
    return parameters[0].atoms


def _across(gradient: Float[Array, "m d"], atoms: Float[Array, "m d"]) -> Float[Array, "m d"]:
    """The gradient without its part along the (unit) atoms."""
    return gradient - jnp.sum(gradient * atoms, axis=1, keepdims=True) * atoms


def _rate(solver: TopKSAE, count: Int[Array, ""], n_steps: Int[Array, ""]) -> Float[Array, ""]:
    """Learning rate of update `count` (from 1): linear warm-up, then a cosine towards 0."""
    total = n_steps.astype(jnp.float32)
    warm = solver.warmup * total
    step = count.astype(jnp.float32)
    done = jnp.clip((step - 1 - warm) / (total - warm), 0, 1)  # the last update still moves
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
    return solver.learning_rate * jnp.minimum(step / jnp.maximum(warm, 1), cosine)
