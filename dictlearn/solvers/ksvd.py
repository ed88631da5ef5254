"""Double-batch KSVD: batches of samples x chunks of atoms."""

from __future__ import annotations

from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.base import AbstractSolver, Batch, Info, unit_rows


class _KSVDState(eqx.Module):
    atoms: Float[Array, "m d"]
    rows_since_used: Int[Array, " m"]


class KSVD(AbstractSolver[_KSVDState]):
    """Minimise ||X - Z D||^2 over unit atoms D and codes Z with at most k nonzeros a row.

    A step codes its batch once, then walks over the atoms in random chunks. For every atom j of a
    chunk, with w the rows that use it, residual R = X - Z D and coefficients z_j, the best rank-one
    fit of E = R_w + z_j d_j is approached by power steps from the present atom:

        d_j <- E^T z_j / ||E^T z_j||,    z_j <- E d_j   on w.

    The atoms of a chunk move together, from one residual, which is then updated exactly. Where they
    share rows their joint move may overshoot, so each half step (atoms, then coefficients) is
    scaled to the exact minimum along its direction, at most to its full length. The objective
    therefore never rises from one chunk to the next, beyond rounding.

    Atoms that no row has used for `dead_after` rows become the worst residuals of the batch.
    Atoms have unit norm.

    Arguments:
      n_atoms: m.
      encoder: codes the batches, and is the encoder of the result.
      chunk_size: atoms that move together. Small means fewer shared rows and longer strides.
      power_steps: a chunk; one is the approximate K-SVD of Rubinstein et al. (2008).
      dead_after: rows.

    Memory: a step holds its codes as a dense matrix, m times the batch.

    Source: "DB-KSVD" (arXiv 2505.18441) for the double batching; Aharon, Elad and Bruckstein,
    "K-SVD" (2006) for the atom update. Departures from the former: an atom absent from one batch
    is not reset, the residual is kept and not recomputed for each atom, power steps replace the
    Arnoldi SVD, the step is checked, and the batch is coded by OMP, not by matching pursuit.
    """

    __pydantic_config__ = {"extra": "forbid"}

    n_atoms: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    encoder: OMP
    chunk_size: Annotated[int, Field(gt=0)] = eqx.field(static=True, default=16)
    power_steps: Annotated[int, Field(gt=0)] = eqx.field(static=True, default=1)
    dead_after: Annotated[int, Field(gt=0, lt=2**30)] = eqx.field(static=True, default=100_000)
    name: Literal["ksvd"] = eqx.field(static=True, default="ksvd")

    def __check_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Rules that join hyperparameters. Raises ValueError naming the field."""
        if self.encoder.k > self.n_atoms:
            raise ValueError(
                f"encoder.k: {self.encoder.k} is more than n_atoms = {self.n_atoms}; "
                "a row cannot use more atoms than there are"
            )

    @property
    def sparsity(self) -> int:
        """The most nonzeros a row may have."""
        return self.encoder.k

    def init(self, sample: Float[Array, "n d"], *, n_steps: int, key: Key[Array, ""]) -> _KSVDState:
        """Atoms = random rows of the sample, at unit norm."""
        del n_steps
        return _KSVDState(
            atoms=self.data_rows(sample, key=key),
            rows_since_used=jnp.zeros(self.n_atoms, jnp.int32),
        )

    def step(
        self, state: _KSVDState, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[_KSVDState, Info]:
        """Code the batch, then update every atom once."""
        dictionary, encoder = self.result(state)
        codes = encoder.prepare(dictionary).encode(batch.x)
        return _update(self, state, batch.x, codes, key)

    def result(self, state: _KSVDState) -> tuple[Dictionary, AbstractEncoder]:
        """The atoms, and the encoder they were trained with."""
        bias = jnp.zeros(state.atoms.shape[1], state.atoms.dtype)
        return Dictionary(state.atoms, bias), self.encoder

    def memory(self, batch_size: int, width: int) -> int:
        """About how many bytes a step needs at once."""
        return 4 * (2 * batch_size * self.n_atoms + 4 * batch_size * width + self.n_atoms**2)


@eqx.filter_jit
def _update(
    solver: KSVD,
    state: _KSVDState,
    x: Float[Array, "n d"],
    codes: SparseCodes,
    key: Key[Array, ""],
) -> tuple[_KSVDState, Info]:
    n, _ = x.shape
    m = solver.n_atoms
    residual = x - codes.decode(state.atoms)
    objective = jnp.mean(jnp.sum(residual**2, axis=1))
    transposed = codes.dense().T  # [m n]: a chunk's coefficients lie together

    # The last chunk is filled up with atom m, which does not exist: reads 0, is not written.
    size = min(solver.chunk_size, m)
    order = jnp.pad(jax.random.permutation(key, m), (0, -m % size), constant_values=m)
    atoms, residual = jax.lax.scan(
        lambda carry, chunk: (_update_chunk(solver.power_steps, transposed, *carry, chunk), None),
        (state.atoms, residual),
        order.reshape(-1, size),
    )[0]

    used = (transposed != 0).any(axis=1)
    since = jnp.where(used, 0, state.rows_since_used + n)
    dead = since >= solver.dead_after
    atoms, since = _replace_dead(atoms, since, dead, residual)
    info = Info(
        objective=objective,
        fvu=objective / jnp.mean(jnp.sum((x - x.mean(axis=0, keepdims=True)) ** 2, axis=1)),
        l0=codes.l0().mean(dtype=x.dtype),
        dead=dead.sum(),
    )
    return _KSVDState(atoms, since), info


def _update_chunk(
    power_steps: int,
    transposed: Float[Array, "m n"],
    atoms: Float[Array, "m d"],
    residual: Float[Array, "n d"],
    chunk: Int[Array, " b"],
) -> tuple[Float[Array, "m d"], Float[Array, "n d"]]:
    """Move the atoms of one chunk, and their coefficients, from one residual."""
    d = atoms.at[chunk].get(mode="fill", fill_value=0)  # [b d]
    z = transposed.at[chunk].get(mode="fill", fill_value=0)  # [b n]
    for _ in range(power_steps):
        energy = jnp.sum(z**2, axis=1, keepdims=True)
        gradient = z @ residual  # [b d]
        move = gradient / jnp.where(energy > 0, energy, 1)
        # <R, dR> and ||dR||^2 for dR = -z^T move, without forming dR [n d]
        gain = jnp.vdot(gradient, move)
        alpha = _step_length(gain, jnp.vdot(z @ z.T, move @ move.T))
        moved = d + alpha * move
        norm = jnp.linalg.norm(moved, axis=1, keepdims=True)
        ok = (energy > 0) & (norm > 0)
        new_d = jnp.where(ok, moved / jnp.where(ok, norm, 1), d)
        scaled = jnp.where(ok, z * norm, z)  # new_d, scaled: the same product as moved, z

        # The residual after the move, seen only through the new atoms.
        fit = new_d @ residual.T - alpha * (new_d @ move.T) @ z  # [b n]
        fit = jnp.where(z != 0, fit, 0)
        alpha = _step_length(jnp.vdot(fit, fit), jnp.vdot(fit @ fit.T, new_d @ new_d.T))
        new_z = scaled + alpha * fit
        change = jnp.concatenate([z, -new_z]).T @ jnp.concatenate([d, new_d])
        residual = residual + change
        d, z = new_d, new_z
    return atoms.at[chunk].set(d, mode="drop"), residual


def _step_length(gain: Float[Array, ""], size: Float[Array, ""]) -> Float[Array, ""]:
    """The minimum of ||R||^2 - 2 a gain + a^2 size over 0 <= a <= 1."""
    return jnp.where(size > 0, jnp.clip(gain / jnp.where(size > 0, size, 1), 0, 1), 0)


def _replace_dead(
    atoms: Float[Array, "m d"],
    since: Int[Array, " m"],
    dead: Array,
    residual: Float[Array, "n d"],
) -> tuple[Float[Array, "m d"], Int[Array, " m"]]:
    """Dead atoms become the residuals of the worst rows, each row once."""
    errors = jnp.sum(residual**2, axis=1)
    count = min(len(atoms), len(residual))
    worst = jax.lax.top_k(errors, count)[1]
    rank = jnp.cumsum(dead) - 1  # the i-th dead atom takes the i-th worst row
    take = dead & (rank < count)
    row = worst[jnp.clip(rank, 0, count - 1)]
    take = take & (errors[row] > 0)
    fresh = unit_rows(residual[row])
    return jnp.where(take[:, None], fresh, atoms), jnp.where(take, 0, since)
