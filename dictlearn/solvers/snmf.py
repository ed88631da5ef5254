"""Semi-nonnegative matrix factorisation: signed atoms, non-negative codes."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from pydantic import Field

from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.nnls import NNLS
from dictlearn.solvers.base import AbstractSolver, Batch, Info, unit_rows

# What begins at zero begins at this share of its atom's greatest code: no product moves a zero.
_FLOOR = 1e-3
_LLOYD = 15
# Rows among which k-means++ chooses the first centres, for each centre.
_SEEDS = 20
# A code below this share of its atom's greatest one does not count: none ever becomes zero.
_USED = 1e-6
# Below this share of ||X||^2 the objective is taken from the residual, not from the products.
_CANCELS = 1e-2


class _SNMFState(eqx.Module):
    atoms: Float[Array, "m d"]
    codes: Float[Array, "n m"]  # of the rows of every batch, in their order


class SNMF(AbstractSolver[_SNMFState]):
    """Minimise ||X - Z D||^2 over signed atoms D [m d] and codes Z [n m] >= 0.

    A step solves for the atoms, then moves the codes along. With the columns of Z at unit norm,

        D <- (Z^T Z)^-1 Z^T X,
        D <- of each atom the ceil(winners * d) entries greatest in size, 0 elsewhere,
        Z <- Z * sqrt((P+ + Z Q-) / (P- + Z Q+)),    P = X D^T,  Q = D D^T,  A± = (|A| ± A) / 2.

    The codes are those of the rows it began from: every batch is all of them, in one order. With
    `winners` = 1 the objective never rises, beyond rounding; taking winners makes it rise now and
    then, so that the best step need not be the last one. The result has its atoms at unit norm and
    an encoder that fits any row, NNLS: its codes are the best for these atoms, a little better than
    the step's own.

    Arguments:
      n_atoms: m, at most the number of rows.
      start: "random": codes uniform over (0, 1); "svd": the positive parts of the left singular
        vectors times sqrt(s), each with the sign of its greater part, so that m is at most
        min(n, d); "kmeans": 1 for the row's own cluster.
      winners: the fraction of an atom's entries that it keeps; equals are all kept, so that 1 takes
        none away. The paper's 0.01 is for neurons behind an activation; a residual stream has no
        such basis.
      max_rows: the most rows, which are all held at once.

    Source: Shafran, Geiger and Geva, "Decomposing MLP Activations into Interpretable Features via
    Semi-Nonnegative Matrix Factorization" (arXiv 2506.10920); the updates are those of Ding, Li and
    Jordan, "Convex and Semi-Nonnegative Matrix Factorizations" (2010).
    Departures:
    - The ridge (1e-6, in float32 more; the diagonal of Z^T Z is 1) pulls towards the present atoms
      instead of zero, and the small constant that keeps the fraction finite stands above and below
      and is relative to the row's P: with both, the objective still never rises, at any scale.
    - Z's columns are scaled before D is solved for, not after: the same but for the ridge.
    - Codes that begin at zero are floored at 0.1 % of their atom's greatest one; k-means is the
      plain algorithm from k-means++.
    - An atom that no row has a code for is zero; it counts as dead, and the result has an axis in
      its place.
    """

    __pydantic_config__ = {"extra": "forbid"}
    needs: ClassVar[frozenset[str]] = frozenset({"all rows"})
    usual_hook: ClassVar[str] = ".mlp.hook_post"

    n_atoms: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    start: Literal["random", "svd", "kmeans"] = eqx.field(static=True, default="kmeans")
    winners: Annotated[float, Field(gt=0, le=1)] = eqx.field(static=True, default=0.01)
    max_rows: Annotated[int, Field(gt=0)] = eqx.field(static=True, default=200_000)
    name: Literal["snmf"] = eqx.field(static=True, default="snmf")

    def __check_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Rules that join hyperparameters. Raises ValueError naming the field."""
        if self.max_rows < self.n_atoms:
            raise ValueError(
                f"max_rows: {self.max_rows:,} rows are fewer than n_atoms = {self.n_atoms:,}"
            )

    @property
    def control(self) -> AbstractEncoder:
        """What codes the control."""
        return NNLS()

    def init(
        self,
        sample: Float[Array, "n d"],
        *,
        n_steps: int,
        key: Key[Array, ""],
        start: Dictionary | None = None,
    ) -> _SNMFState:
        """Codes of all rows, and the atoms that suit them; the codes of `start` are NNLS's.

        Raises:
          ValueError: there are fewer rows than atoms, or fewer singular vectors.
        """
        del n_steps
        n, d = sample.shape
        if n < self.n_atoms:
            raise ValueError(
                f"n_atoms: {self.n_atoms:,} atoms need as many training rows, but there are only "
                f"{n:,}. Use fewer atoms, or harvest more text."
            )
        if start is not None:
            plain = Dictionary(start.atoms, jnp.zeros_like(start.bias))
            return _begin(sample, NNLS().prepare(plain).encode(sample).values, self)
        match self.start:
            case "random":
                codes = jax.random.uniform(key, (n, self.n_atoms), sample.dtype)
            case "kmeans":
                codes = _clusters(sample, self.n_atoms, key)
            case "svd":
                if self.n_atoms > d:
                    raise ValueError(
                        f"n_atoms: {self.n_atoms:,} is more than the {d:,} singular vectors of "
                        f'rows of width {d:,}. Use fewer atoms, or start = "kmeans".'
                    )
                codes = _singular(sample, self.n_atoms)
        return _begin(sample, codes, self)

    def step(
        self, state: _SNMFState, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[_SNMFState, Info]:
        """Solve for the atoms, measure, then move the codes once."""
        del key
        if len(batch.x) != len(state.codes):
            raise ValueError(
                f"batch: {len(batch.x):,} rows, but the codes are those of {len(state.codes):,}; "
                "every batch must be all rows"
            )
        return _step(state, batch.x, self)

    def result(self, state: _SNMFState) -> tuple[Dictionary, AbstractEncoder]:
        """The atoms at unit norm, and NNLS."""
        bias = jnp.zeros(state.atoms.shape[1], state.atoms.dtype)
        return Dictionary(unit_rows(state.atoms), bias), NNLS()

    def memory_bytes(self, batch_size: int, width: int) -> int:
        """About how many bytes a step needs at once."""
        m = self.n_atoms
        return 4 * (batch_size * (width + 6 * m) + 4 * m**2 + 4 * m * width)


@eqx.filter_jit
def _begin(x: Float[Array, "n d"], codes: Float[Array, "n m"], solver: SNMF) -> _SNMFState:
    """Positive codes, and atoms for them."""
    greatest = codes.max(axis=0, keepdims=True)
    codes = jnp.maximum(codes, _FLOOR * jnp.where(greatest > 0, greatest, 1))
    zero = jnp.zeros((codes.shape[1], x.shape[1]), x.dtype)
    atoms, codes = _atoms(x, codes, zero)
    return _SNMFState(_winners(atoms, solver.winners), codes)


@eqx.filter_jit
def _step(state: _SNMFState, x: Float[Array, "n d"], solver: SNMF) -> tuple[_SNMFState, Info]:
    """The step."""
    atoms, codes = _atoms(x, state.codes, state.atoms)
    atoms = _winners(atoms, solver.winners)
    inner, square = x @ atoms.T, atoms @ atoms.T  # P [n m], Q [m m]
    plus, minus = codes @ jnp.maximum(square, 0), codes @ jnp.maximum(-square, 0)

    # Within a row first: what is summed over many rows has little left to cancel.
    explained = jnp.mean(jnp.sum(codes * (2 * inner - (plus - minus)), axis=1))
    energy = jnp.mean(jnp.sum(x**2, axis=1))
    objective = jax.lax.cond(
        energy - explained < _CANCELS * energy,
        lambda: jnp.mean(jnp.sum((x - codes @ atoms) ** 2, axis=1)),
        lambda: energy - explained,
    )
    variance = jnp.mean(jnp.sum((x - x.mean(axis=0, keepdims=True)) ** 2, axis=1))
    used = codes > _USED * codes.max(axis=0, keepdims=True)
    l0 = used.sum(axis=1).mean(dtype=x.dtype)
    dead = jnp.sum(~(atoms != 0).any(axis=1))
    info = Info(objective, objective / variance, l0, dead)

    small = jnp.finfo(x.dtype).eps * jnp.abs(inner).max(axis=1, keepdims=True)
    small = small + jnp.finfo(x.dtype).tiny
    up = jnp.maximum(inner, 0) + minus + small
    down = jnp.maximum(-inner, 0) + plus + small
    codes = codes * jnp.sqrt(up / down)
    return _SNMFState(atoms, codes), info


def _atoms(
    x: Float[Array, "n d"], codes: Float[Array, "n m"], atoms: Float[Array, "m d"]
) -> tuple[Float[Array, "m d"], Float[Array, "n m"]]:
    """argmin_D ||X - Z D||^2 + ridge ||D - atoms||^2, with the columns of Z at unit norm; traced.

    An atom that no row has a code for becomes zero.
    """
    norms = jnp.linalg.norm(codes, axis=0)
    codes = codes / jnp.where(norms > 0, norms, 1)[None]
    atoms = atoms * norms[:, None]
    gram = codes.T @ codes
    # Below m eps the factor of a singular matrix need not exist.
    ridge = max(1e-6, 8 * len(gram) * float(jnp.finfo(x.dtype).eps))
    factor = jnp.linalg.cholesky(gram + ridge * jnp.eye(len(gram), dtype=x.dtype))
    left = codes.T @ x - gram @ atoms
    return atoms + jax.scipy.linalg.cho_solve((factor, True), left), codes


def _winners(atoms: Float[Array, "m d"], fraction: float) -> Float[Array, "m d"]:
    """Of each atom the greatest entries, zeros elsewhere; equals of the last one stay."""
    d = atoms.shape[1]
    count = math.ceil(fraction * d - 1e-9)  # 0.07 * 100 is above 7
    if count == d:
        return atoms
    size = jnp.abs(atoms)
    least = jnp.sort(size, axis=1)[:, d - count, None]
    return jnp.where(size >= least, atoms, 0)


@eqx.filter_jit
def _singular(x: Float[Array, "n d"], m: int) -> Float[Array, "n m"]:
    """max(0, U sqrt(S)), from the eigenvectors of the smaller one of X^T X and X X^T."""
    n, d = x.shape
    if n < d:
        values, vectors = jnp.linalg.eigh(x @ x.T)
        left = vectors[:, ::-1][:, :m]
    else:
        values, vectors = jnp.linalg.eigh(x.T @ x)
        left = x @ vectors[:, ::-1][:, :m]
        norms = jnp.linalg.norm(left, axis=0, keepdims=True)
        left = left / jnp.where(norms > 0, norms, 1)
    scale = jnp.maximum(values[::-1][:m], 0) ** 0.25  # sqrt(s): these are s^2
    up, down = jnp.maximum(left, 0), jnp.maximum(-left, 0)
    greater = jnp.sum(up**2, axis=0) >= jnp.sum(down**2, axis=0)
    return jnp.where(greater[None], up, down) * scale[None]


@eqx.filter_jit
def _clusters(x: Float[Array, "n d"], m: int, key: Key[Array, ""]) -> Float[Array, "n m"]:
    """1 for each row's cluster: Lloyd's algorithm from greedy k-means++ over some of the rows."""
    key, first = jax.random.split(key)
    some = x[jax.random.permutation(first, len(x))[: _SEEDS * m]]
    size = jnp.sum(some**2, axis=1)
    tries = 2 + int(math.log(m))  # as many as scikit-learn's: the best of them becomes a centre

    def distances(centres: Array) -> Array:
        squares = jnp.sum(centres**2, axis=1)
        return jnp.maximum(size[:, None] - 2 * (some @ centres.T) + squares[None], 0)

    def choose(nearest: Array, key: Array) -> tuple[Array, Array]:
        drawn = some[jax.random.categorical(key, jnp.log(nearest), shape=(tries,))]
        left = jnp.minimum(nearest[:, None], distances(drawn))
        best = jnp.argmin(left.sum(axis=0))
        return left[:, best], drawn[best]

    nearest = distances(some[:1])[:, 0]
    _, others = jax.lax.scan(choose, nearest, jax.random.split(key, m - 1))
    centres = jnp.concatenate([some[:1], others])

    def assign(centres: Array) -> Array:
        half = jnp.sum(centres**2, axis=1)[None] / 2
        return jax.nn.one_hot(jnp.argmax(x @ centres.T - half, axis=1), m, dtype=x.dtype)

    def lloyd(_: Array, centres: Array) -> Array:
        own = assign(centres)
        count = own.sum(axis=0)[:, None]
        return jnp.where(count > 0, own.T @ x / jnp.where(count > 0, count, 1), centres)

    return assign(jax.lax.fori_loop(0, _LLOYD, lloyd, centres))
