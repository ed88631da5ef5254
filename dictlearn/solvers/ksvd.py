"""Double-batch KSVD: batches of samples x chunks of atoms."""

from __future__ import annotations

from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.pursuit import on_one_cpu
from dictlearn.solvers import ksvd_cpu
from dictlearn.solvers.base import (
    AbstractSolver,
    Batch,
    Info,
    Pursuit,
    check_pursuit,
    measure,
    unit_rows,
)


class _KSVDState(eqx.Module):
    atoms: Float[Array, "m d"]
    history: Float[Array, " m"]  # energy of each atom's coefficients in earlier batches
    rows_since_used: Int[Array, " m"]


class KSVD(AbstractSolver[_KSVDState]):
    """Minimise ||X - Z D||^2 over unit atoms D and codes Z with at most k nonzeros a row.

    A step codes its batch once, then walks over the atoms in random chunks. In a chunk, first every
    atom, then every coefficient moves to where the objective is least given all others (exact block
    coordinate descent: each sees what those before it have changed). With w the rows that use atom
    j, z_j their coefficients and R = X - Z D,

        d_j <- d_j + R_w^T z_j / (||z_j||^2 + h_j),  scaled to unit norm, z_j by the inverse,
        z_j <- z_j + R_w d_j   on w  (not below 0 where the encoder's codes are not negative).

    With chunks of one atom and h = 0 this is a power step of K-SVD from the present atom. The
    objective never rises from one chunk to the next, beyond rounding, however many rows the atoms
    of a chunk share. h_j is what earlier batches weigh: the energy ||z_j||^2 that they had,
    discounted by `memory` a batch, as if they were content with the atom as it stands; rare atoms
    are then not made of a few rows.

    Atoms that no row has used for `dead_after` rows become the worst residuals of the batch, and so
    does the less used one of two atoms with |cos| > `twins`. Atoms have unit norm.

    With a Matryoshka encoder each group of atoms is fitted to what the groups before it leave.

    Arguments:
      n_atoms: m.
      encoder: codes the batches, and is the encoder of the result.
      start: atoms begin as rows of the data, or as random directions.
      chunk_size: atoms that move together.
      power_steps: a chunk.
      memory: weight of earlier batches; 0 is none.
      twins: 1 lets all atoms be.
      dead_after: rows.

    On one CPU a kernel goes through the codes one by one (dictlearn.solvers.ksvd_cpu). Elsewhere
    a chunk moves by matrix products, and a step holds its codes as a dense matrix, m times the
    batch. Both do the same but for rounding.

    Source: "DB-KSVD" (arXiv 2505.18441) for the double batching; Aharon, Elad and Bruckstein,
    "K-SVD" (2006) for the atom update, and for replacing twins; Rubinstein, Zibulevsky and Elad
    (2008) for the single power step. Departures from the first: an atom absent from one batch is
    not reset, the residual is kept and not recomputed for each atom, power steps replace the
    Arnoldi SVD, atoms of a chunk see each other's moves, and each batch is coded once.
    """

    __pydantic_config__ = {"extra": "forbid"}

    n_atoms: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    encoder: Pursuit
    start: Literal["data", "random"] = eqx.field(static=True, default="data")
    chunk_size: Annotated[int, Field(gt=0)] = eqx.field(static=True, default=64)
    power_steps: Annotated[int, Field(gt=0)] = eqx.field(static=True, default=1)
    memory: Annotated[float, Field(ge=0, lt=1)] = eqx.field(static=True, default=0.5)
    twins: Annotated[float, Field(gt=0, le=1)] = eqx.field(static=True, default=0.9)
    dead_after: Annotated[int, Field(gt=0, lt=2**30)] = eqx.field(static=True, default=100_000)
    name: Literal["ksvd"] = eqx.field(static=True, default="ksvd")

    def __check_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Rules that join hyperparameters. Raises ValueError naming the field."""
        check_pursuit(self.encoder, self.n_atoms)

    @property
    def control(self) -> AbstractEncoder:
        """What codes the control."""
        return self.encoder

    def init(
        self,
        sample: Float[Array, "n d"],
        *,
        n_steps: int,
        key: Key[Array, ""],
        start: Dictionary | None = None,
    ) -> _KSVDState:
        """Atoms = those of `start`, random rows of the sample, or random directions; unit norm."""
        del n_steps
        if start is not None:
            atoms = start.atoms
        elif self.start == "data":
            atoms = self.data_rows(sample, key=key)
        else:
            atoms = jax.random.normal(key, (self.n_atoms, sample.shape[1]), sample.dtype)
        return _KSVDState(
            atoms=unit_rows(atoms),
            history=jnp.zeros(self.n_atoms, atoms.dtype),
            rows_since_used=jnp.zeros(self.n_atoms, jnp.int32),
        )

    def step(
        self, state: _KSVDState, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[_KSVDState, Info]:
        """Code the batch, then update every atom once."""
        dictionary, encoder = self.result(state)
        codes = encoder.prepare(dictionary).encode(batch.x)
        info, used = measure(batch.x, codes, state.atoms)
        sweep = ksvd_cpu.sweep if on_one_cpu(batch.x) else _sweep
        atoms, residual = state.atoms, batch.x
        for group in self.encoder.groups(self.n_atoms):
            residual = _subtract(residual, codes, atoms, group.start, group.stop)
            order = jax.random.permutation(key, jnp.arange(group.start, group.stop))
            atoms, residual = sweep(self, atoms, residual, codes, state.history, order)
        return _end(self, state, atoms, residual, used, info)

    def result(self, state: _KSVDState) -> tuple[Dictionary, AbstractEncoder]:
        """The atoms, and the encoder they were trained with."""
        bias = jnp.zeros(state.atoms.shape[1], state.atoms.dtype)
        return Dictionary(state.atoms, bias), self.encoder

    def memory_bytes(self, batch_size: int, width: int) -> int:
        """About how many bytes a step needs at once."""
        k = self.encoder.capacity(self.n_atoms, width)
        codes = 4 * batch_size * k
        if jax.default_backend() != "cpu" or jax.device_count() > 1:
            codes = batch_size * self.n_atoms
        return 4 * (2 * codes + 4 * batch_size * width + self.n_atoms**2)


@eqx.filter_jit
def _subtract(
    x: Float[Array, "n d"], codes: SparseCodes, atoms: Float[Array, "m d"], start: int, stop: int
) -> Float[Array, "n d"]:
    """What is left of rows without the part that the atoms from `start` to `stop` explain."""
    own = (codes.indices >= start) & (codes.indices < stop)
    return x - SparseCodes(codes.indices, jnp.where(own, codes.values, 0), n_atoms=0).decode(atoms)


@eqx.filter_jit
def _sweep(
    solver: KSVD,
    atoms: Float[Array, "m d"],
    residual: Float[Array, "n d"],
    codes: SparseCodes,
    history: Float[Array, " m"],
    order: Int[Array, " g"],
) -> tuple[Float[Array, "m d"], Float[Array, "n d"]]:
    """Move the atoms of `order`, and their coefficients, a chunk after another."""
    m, size = len(atoms), min(solver.chunk_size, len(order))
    transposed = codes.dense().T  # [m n]: a chunk's coefficients lie together
    # The last chunk is filled up with atom m, which does not exist: reads 0, is not written.
    chunks = jnp.pad(order, (0, -len(order) % size), constant_values=m).reshape(-1, size)

    def update(carry: tuple[Array, Array], chunk: Array) -> tuple[tuple[Array, Array], None]:
        atoms, residual = carry
        d = atoms.at[chunk].get(mode="fill", fill_value=0)  # [b d]
        z = transposed.at[chunk].get(mode="fill", fill_value=0)  # [b n]
        h = history.at[chunk].get(mode="fill", fill_value=0)

        used = z != 0

        def power(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            return _move(*state, used, h, solver.encoder.not_negative)

        d, z, residual = jax.lax.fori_loop(0, solver.power_steps, power, (d, z, residual))
        return (atoms.at[chunk].set(d, mode="drop"), residual), None

    return jax.lax.scan(update, (atoms, residual), chunks)[0]


def _move(
    d: Float[Array, "b d"],
    z: Float[Array, "b n"],
    residual: Float[Array, "n d"],
    used: Bool[Array, "b n"],
    history: Float[Array, " b"],
    not_negative: bool,
) -> tuple[Float[Array, "b d"], Float[Array, "b n"], Float[Array, "n d"]]:
    """One power step of a chunk: its atoms in turn, then its coefficients in turn."""
    overlap = z @ z.T
    energy = jnp.diagonal(overlap)
    # In turn: move_j = (R^T z_j - sum_{l<j} overlap_jl move_l) / (energy_j + h_j).
    weight = jnp.where(energy > 0, energy + history, 1)
    system = jnp.tril(overlap, -1) + jnp.diag(weight)
    move = jax.scipy.linalg.solve_triangular(system, z @ residual, lower=True)
    moved = d + move
    norm = jnp.linalg.norm(moved, axis=1, keepdims=True)
    ok = (energy > 0)[:, None] & (norm > 0)
    residual = residual - z.T @ jnp.where(ok, move, 0)
    d = jnp.where(ok, moved / jnp.where(ok, norm, 1), d)
    z = jnp.where(ok, z * norm, z)  # the same products as with the atoms before scaling

    fit, overlap = d @ residual.T, d @ d.T  # [b n], [b b]

    def one(j: Array, change: Array) -> Array:
        own = fit[j] - overlap[j] @ change  # rows of `change` from j on are 0
        own = jnp.maximum(own, -z[j]) if not_negative else own
        return change.at[j].set(jnp.where(used[j], own, 0))

    change = jax.lax.fori_loop(0, len(d), one, jnp.zeros_like(z))
    return d, z + change, residual - change.T @ d


@eqx.filter_jit
def _end(
    solver: KSVD,
    state: _KSVDState,
    atoms: Float[Array, "m d"],
    residual: Float[Array, "n d"],
    energy: Float[Array, " m"],
    info: Info,
) -> tuple[_KSVDState, Info]:
    """Count what was used, and replace atoms that were not, or that stand beside another."""
    since = jnp.where(energy > 0, 0, state.rows_since_used + len(residual))
    since = jnp.minimum(since, solver.dead_after)  # it would overflow in the end
    history = solver.memory * (state.history + energy)
    dead = since >= solver.dead_after
    out = dead | _twins(atoms, history + energy, solver.twins) if solver.twins < 1 else dead
    fresh, taken = _worst(out, residual)
    after = _KSVDState(
        atoms=jnp.where(taken[:, None], fresh, atoms),
        history=jnp.where(taken, 0, history),
        rows_since_used=jnp.where(taken, 0, since),
    )
    return after, eqx.tree_at(lambda info: info.dead, info, dead.sum())


def _twins(
    atoms: Float[Array, "m d"], weight: Float[Array, " m"], above: float
) -> Bool[Array, " m"]:
    """Which atoms have |cos| > `above` with one that weighs more (of equals: that comes first)."""
    m = len(atoms)
    rank = jnp.zeros(m, jnp.int32).at[jnp.argsort(-weight, stable=True)].set(jnp.arange(m))

    def of_atom(j: Array) -> Array:
        return jnp.any((jnp.abs(atoms @ atoms[j]) > above) & (rank < rank[j]))

    return jax.lax.map(of_atom, jnp.arange(m), batch_size=256)


def _worst(
    out: Bool[Array, " m"], residual: Float[Array, "n d"]
) -> tuple[Float[Array, "m d"], Bool[Array, " m"]]:
    """The residuals of the worst rows at unit norm, each row once, for the atoms that are out."""
    errors = jnp.sum(residual**2, axis=1)
    count = min(len(out), len(residual))
    worst = jax.lax.top_k(errors, count)[1]
    rank = jnp.cumsum(out) - 1  # the i-th of these atoms takes the i-th worst row
    row = worst[jnp.clip(rank, 0, count - 1)]
    taken = out & (rank < count) & (errors[row] > 0)
    return unit_rows(residual[row]), taken
