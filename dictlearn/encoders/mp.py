"""Matching pursuit."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from dictlearn.encoders.pursuit import AbstractPursuit, Choice, UnitAtoms, least_squares


class MP(AbstractPursuit):
    """Greedy sparse coding, one coefficient at a time.

    In each round, for each row, the atom most correlated with the residual takes what it can:

        j = argmax_i |<r, d_i>| / ||d_i||,    a = <r, d_j> / ||d_j||^2,    z_j <- z_j + a,
        r <- r - a d_j.

    Unlike in OMP an atom may be taken again. A row is done when it would need a (k+1)-th atom,
    after 4 k rounds, or at the tolerance. Codes are signed. KSVD.jl trains with this; here for
    comparison.

    Arguments:
      k: nonzeros a row, at most the number of atoms; None for as many as `tolerance` takes.
      tolerance: a row is done when ||r|| <= tolerance * ||x||, both without the dictionary's bias.
      refit: end with least squares on the support.

    Source: Mallat and Zhang, "Matching pursuits with time-frequency dictionaries" (1993). KSVD.jl
    codes one atom more and drops the smallest; its tolerance is 0.05.
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: Annotated[int, Field(gt=0)] | None = eqx.field(static=True, default=None)
    tolerance: Annotated[float, Field(ge=0, lt=1)] = eqx.field(static=True, default=0.0)
    refit: bool = eqx.field(static=True, default=False)
    name: Literal["mp"] = eqx.field(static=True, default="mp")
    not_negative: ClassVar[bool] = False

    def __check_init__(self) -> None:
        self.check()

    def tile(self, atoms: UnitAtoms, x: Float[Array, "n d"]) -> Choice:
        """Indices and values over unit atoms for some rows without the bias; traced."""
        n, k = len(x), self.capacity(*atoms.unit.shape)
        rows, slots = jnp.arange(n), jnp.arange(k, dtype=jnp.int32)[None]
        epsilon = jnp.finfo(x.dtype).eps
        square = jnp.sum(x**2, axis=1)

        def choose(state: tuple[Array, ...]) -> tuple[Array, ...]:
            round_, indices, values, count, correlation, energy, active = state
            new = jnp.argmax(jnp.abs(correlation), axis=1).astype(jnp.int32)
            move = correlation[rows, new]
            again = (indices == new[:, None]) & (slots < count[:, None])
            active &= (jnp.abs(move) > 8 * epsilon * jnp.sqrt(square)) & (
                (energy > self.tolerance**2 * square) & (again.any(axis=1) | (count < k))
            )
            slot = jnp.where(
                again.any(axis=1),
                jnp.argmax(again, axis=1).astype(jnp.int32),
                jnp.minimum(count, k - 1),
            )
            move = jnp.where(active, move, 0)
            return (
                round_ + 1,
                indices.at[rows, slot].set(jnp.where(active, new, indices[rows, slot])),
                values.at[rows, slot].add(move),
                count + (active & ~again.any(axis=1)).astype(count.dtype),
                correlation - move[:, None] * atoms.products[new],
                energy - move**2,
                active,
            )

        start = (
            jnp.zeros((), jnp.int32),
            jnp.zeros((n, k), jnp.int32),
            jnp.zeros((n, k), x.dtype),
            jnp.zeros(n, jnp.int32),
            x @ atoms.unit.T,
            square,
            jnp.ones(n, bool),
        )
        _, indices, values, count, *_ = jax.lax.while_loop(
            lambda state: (state[0] < 4 * k) & state[-1].any(), choose, start
        )
        if self.refit:
            values = least_squares(atoms, x, indices, slots < count[:, None])
        return indices, values
