"""Orthogonal matching pursuit."""

from __future__ import annotations

import functools
import os
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.encoders import omp_cpu, omp_many
from dictlearn.encoders.pursuit import (
    AbstractPursuit,
    Choice,
    UnitAtoms,
    exact_gram,
    on_one_cpu,
)

# Bytes of an exact Gram matrix, at most: that of 23,170 atoms in float32.
_GRAM = 2**31


class OMP(AbstractPursuit):
    """Greedy sparse coding with exact least squares on the support.

    For each row, k times: take the atom most correlated with the residual,

        j = argmax_i |<r, d_i>| / ||d_i||,

    then fit x on all atoms taken so far, z = argmin ||x - sum_i z_i d_i||^2, and r = x - sum z d.

    Codes are signed. Atoms need not have unit norm. An atom that lies in the span of those already
    taken (a duplicate, or k above the rank) is passed over, a zero row or zero atom gives zero
    codes: never NaN.

    On one CPU device a kernel goes through the rows one by one (dictlearn.encoders.omp_cpu);
    elsewhere they are coded in batches. Both make the same choices but where rounding decides.
    Over more than 23,170 atoms (float32) another kernel (omp_many) now and then takes an atom that
    is not quite the best; it needs 2 m^2 bytes, and where that is over half of the memory the rows
    are coded in batches.

    Arguments:
      k: nonzeros a row, at most the number of atoms; None for as many as `tolerance` takes.
      normalised: False to choose by |<r, d_i>| alone, so that long atoms come first.
      tolerance: a row is done when ||r|| <= tolerance * ||x||, both without the dictionary's bias.

    Source: Pati, Rezaiifar and Krishnaprasad (1993). The least squares are solved by a growing
    inverse Cholesky factor of the support's Gram matrix, as in Rubinstein, Zibulevsky and Elad,
    "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching Pursuit"
    (2008); unlike theirs, the batched form computes the correlations anew from the residual in each
    round, so that rounding does not add up.
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: Annotated[int, Field(gt=0)] | None = eqx.field(static=True, default=None)
    tolerance: Annotated[float, Field(ge=0, lt=1)] = eqx.field(static=True, default=0.0)
    normalised: bool = eqx.field(static=True, default=True)  # pyright: ignore
    name: Literal["omp"] = eqx.field(static=True, default="omp")
    not_negative: ClassVar[bool] = False

    def __check_init__(self) -> None:
        self.check()

    def on_cpu(self, atoms: UnitAtoms, x: Float[Array, "n d"]) -> Choice | None:
        """The kernel of dictlearn.encoders.omp_cpu, or that of omp_many."""
        if atoms.gram is None:
            return None
        coder = omp_cpu.code_part
        if atoms.gram.dtype == jnp.int16:
            lengths = np.linalg.norm(np.asarray(atoms.unit), axis=1)
            coder = functools.partial(omp_many.code_part, lengths)
        return omp_cpu.encode(coder, atoms, x, self.capacity(*atoms.unit.shape), self.tolerance)

    def gram(self, unit: Float[Array, "m d"]) -> Array | None:
        """Exact up to _GRAM bytes; on one CPU in 16 bits up to half of the memory."""
        if len(unit) ** 2 * unit.dtype.itemsize <= _GRAM:
            return exact_gram(unit)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if on_one_cpu(unit) and len(unit) ** 2 * 2 <= memory / 2:
            return omp_many.rough_gram(unit)
        return None

    def tile(self, atoms: UnitAtoms, x: Float[Array, "n d"]) -> Choice:
        """Indices and values over unit atoms for some rows without the bias; traced."""
        unit = atoms.unit
        square = jnp.sum(unit**2, axis=1)  # all 1, or 0, if normalised
        n, k = len(x), self.capacity(*unit.shape)
        rows = jnp.arange(n)
        epsilon = jnp.finfo(x.dtype).eps
        norm = jnp.linalg.norm(x, axis=1)

        def fit(factor: Array, inner: Array) -> Array:
            projected = jnp.einsum("nij,nj->ni", factor, inner)
            return jnp.einsum("ni,nij->nj", projected, factor)

        def choose(round_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            indices, factor, values, residual, taken = state
            correlation = residual @ unit.T  # [n m]
            size = jnp.where(taken, -1, jnp.abs(correlation))
            new = jnp.argmax(size, axis=1).astype(indices.dtype)
            # q = (d_new - projection on the support) / its norm = factor[round] @ support atoms
            inside = jnp.einsum("nij,nj->ni", factor, atoms.inner(new, indices))
            rest = square[new] - jnp.sum(inside**2, axis=1)
            # Atoms within about 3e-3 of the span (in float32) cannot be told from it.
            good = size[rows, new] > 8 * epsilon * norm * jnp.sqrt(square[new])
            good &= rest > 64 * epsilon * square[new]
            good &= jnp.linalg.norm(residual, axis=1) > self.tolerance * norm
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
