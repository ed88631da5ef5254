"""Orthogonal matching pursuit, batched."""

from __future__ import annotations

from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared

# Rows coded at once: the correlations [tile m] should stay within a processor's cache.
_TILE = 1024


class OMP(AbstractEncoder):
    """Greedy sparse coding with exact least squares on the support.

    For each row, k times: take the atom most correlated with the residual,

        j = argmax_i |<r, d_i>| / ||d_i||,

    then fit x on all atoms taken so far, z = argmin ||x - sum_i z_i d_i||^2, and r = x - sum z d.

    Codes are signed. Atoms need not have unit norm. An atom that lies in the span of those already
    taken (a duplicate, or k above the rank) is passed over, a zero row or zero atom gives zero
    codes: never NaN.

    Arguments:
      k: nonzeros a row, at most the number of atoms.

    Source: Pati, Rezaiifar and Krishnaprasad (1993). The least squares are solved by a growing
    inverse Cholesky factor of the support's Gram matrix, as in Rubinstein, Zibulevsky and Elad,
    "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching Pursuit"
    (2008); unlike theirs, the correlations are computed anew from the residual in each round, so
    that rounding does not add up.
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    name: Literal["omp"] = eqx.field(static=True, default="omp")

    def prepare(self, dictionary: Dictionary) -> PreparedOMP:
        """Unit atoms and their Gram matrix, at a cost of m^2 d."""
        return _prepare(dictionary, self.k)


class PreparedOMP(AbstractPrepared):
    """OMP made ready for one dictionary."""

    unit: Float[Array, "m d"]
    norms: Float[Array, " m"]
    gram: Float[Array, "m m"]
    bias: Float[Array, " d"]
    k: int = eqx.field(static=True)

    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        """Codes of normalised rows."""
        del gradient
        return _encode(self, x)


@eqx.filter_jit
def _prepare(dictionary: Dictionary, k: int) -> PreparedOMP:
    norms = jnp.linalg.norm(dictionary.atoms, axis=1)
    unit = dictionary.atoms / jnp.where(norms > 0, norms, 1)[:, None]
    return PreparedOMP(unit, norms, unit @ unit.T, dictionary.bias, k)


@eqx.filter_jit
def _encode(prepared: PreparedOMP, x: Float[Array, "n d"]) -> SparseCodes:
    n, d = x.shape
    tile = max(1, min(_TILE, n))
    padded = jnp.pad(x - prepared.bias[None], ((0, -n % tile), (0, 0)))
    indices, values = jax.lax.map(
        lambda rows: _encode_tile(prepared, rows), padded.reshape(-1, tile, d)
    )
    indices = indices.reshape(-1, prepared.k)[:n]
    values = values.reshape(-1, prepared.k)[:n]
    norms = jnp.where(prepared.norms > 0, prepared.norms, 1)
    return SparseCodes(indices, values / norms[indices], n_atoms=len(prepared.unit))


def _encode_tile(
    prepared: PreparedOMP, x: Float[Array, "n d"]
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """OMP of one tile of rows, over unit atoms."""
    n, k = len(x), prepared.k
    rows = jnp.arange(n)
    unit, gram = prepared.unit, prepared.gram
    epsilon = jnp.finfo(x.dtype).eps
    tiny = 8 * epsilon * jnp.linalg.norm(x, axis=1)

    def fit(factor: Array, inner: Array) -> Array:
        projected = jnp.einsum("nij,nj->ni", factor, inner)
        return jnp.einsum("ni,nij->nj", projected, factor)

    def choose(round_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        indices, factor, values, residual, taken = state
        correlation = residual @ unit.T  # [n m]
        size = jnp.where(taken, -1, jnp.abs(correlation))
        new = jnp.argmax(size, axis=1).astype(indices.dtype)
        # q = (d_new - projection on the support) / its norm = factor[round] @ support atoms
        inside = jnp.einsum("nij,nj->ni", factor, gram[new[:, None], indices])
        rest = 1 - jnp.sum(inside**2, axis=1)
        # Atoms within about 3e-3 of the span (in float32) cannot be told from it.
        good = (size[rows, new] > tiny) & (rest > 64 * epsilon)
        scale = jnp.where(good, 1 / jnp.sqrt(jnp.where(good, rest, 1)), 0)
        projection = jnp.einsum("ni,nij->nj", inside, factor)
        factor = factor.at[:, round_].set((-projection).at[:, round_].add(1) * scale[:, None])
        indices = indices.at[:, round_].set(new)
        # The residual is fitted, not x: what rounding left of earlier rounds is put right too.
        values = values + fit(factor, jnp.take_along_axis(correlation, indices, axis=1))
        residual = x - SparseCodes(indices, values, n_atoms=len(unit)).decode(unit)
        return indices, factor, values, residual, taken.at[rows, new].set(True)

    start = (
        jnp.zeros((n, k), jnp.int32),
        jnp.zeros((n, k, k), x.dtype),  # inverse Cholesky factor of the support's Gram matrix
        jnp.zeros((n, k), x.dtype),
        x,
        jnp.zeros((n, len(unit)), bool),
    )
    indices, factor, values, residual, _ = jax.lax.fori_loop(0, k, choose, start)
    inner = jax.lax.map(lambda chosen: jnp.sum(residual * unit[chosen], axis=1), indices.T).T
    return indices, values + fit(factor, inner)
