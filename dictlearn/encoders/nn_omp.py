"""Non-negative orthogonal matching pursuit."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.encoders.pursuit import AbstractPursuit, Choice, UnitAtoms, least_squares


class NonNegativeOMP(AbstractPursuit):
    """Greedy sparse coding with non-negative least squares on the support.

    In each round, for each row, the atom of greatest *positive* correlation with the residual,

        j = argmax_i <r, d_i> / ||d_i||,

    joins the support S, and z = argmin_{z >= 0} ||x - sum_{i in S} z_i d_i||^2, where atoms whose
    coefficient becomes 0 leave S. A row is done when S has k atoms, when no correlation is positive
    (a row that no atom correlates with has zero codes), or after 2 k rounds.

    Arguments:
      k: nonzeros a row, at most the number of atoms; None for as many as `tolerance` takes.
      tolerance: a row is done when ||r|| <= tolerance * ||x||, both without the dictionary's bias.

    Source: Bruckstein, Elad and Zibulevsky, "On the uniqueness of nonnegative sparse solutions to
    underdetermined systems of equations" (2008), section V; the least squares are those of Lawson
    and Hanson, "Solving Least Squares Problems" (1974), algorithm 23.10, which without the limit k
    makes the same choices.
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: Annotated[int, Field(gt=0)] | None = eqx.field(static=True, default=None)
    tolerance: Annotated[float, Field(ge=0, lt=1)] = eqx.field(static=True, default=0.0)
    name: Literal["nn_omp"] = eqx.field(static=True, default="nn_omp")
    not_negative: ClassVar[bool] = True

    def __check_init__(self) -> None:
        self.check()

    def tile(self, atoms: UnitAtoms, x: Float[Array, "n d"]) -> Choice:
        """Indices and values over unit atoms for some rows without the bias; traced."""
        n, k = len(x), self.capacity(*atoms.unit.shape)
        rows = jnp.arange(n)
        epsilon = jnp.finfo(x.dtype).eps
        norm = jnp.linalg.norm(x, axis=1)

        def choose(state: tuple[Array, ...]) -> tuple[Array, ...]:
            round_, indices, values, residual, barred, active = state
            used = values > 0
            correlation = residual @ atoms.unit.T  # [n m]
            taken = barred.at[rows[:, None], indices].max(used)
            new = jnp.argmax(jnp.where(taken, -jnp.inf, correlation), axis=1).astype(jnp.int32)
            active &= jnp.linalg.norm(residual, axis=1) > self.tolerance * norm
            active &= (correlation[rows, new] > 8 * epsilon * norm) & ~used.all(axis=1)
            slot = jnp.argmin(used, axis=1)  # the first free one
            tried = indices.at[rows, slot].set(jnp.where(active, new, indices[rows, slot]))
            support = used.at[rows, slot].max(active)
            fitted = _fit(atoms, x, tried, support, values)
            # An atom that does not stay would be chosen again for ever.
            stays = fitted[rows, slot] > 0
            barred = barred.at[rows, new].max(active & ~stays)
            left = x - SparseCodes(tried, fitted, n_atoms=len(atoms.unit)).decode(atoms.unit)
            better = active & (jnp.sum(left**2, axis=1) < jnp.sum(residual**2, axis=1))
            return (
                round_ + 1,
                jnp.where(better[:, None], tried, indices),
                jnp.where(better[:, None], fitted, values),
                jnp.where(better[:, None], left, residual),
                barred.at[rows, new].max(active & ~better),
                active,
            )

        start = (
            jnp.zeros((), jnp.int32),
            jnp.zeros((n, k), jnp.int32),
            jnp.zeros((n, k), x.dtype),
            x,
            jnp.zeros((n, len(atoms.unit)), bool),
            jnp.ones(n, bool),
        )
        state = jax.lax.while_loop(
            lambda state: (state[0] < 2 * k) & state[-1].any(), choose, start
        )
        return state[1], state[2]


def _fit(atoms: UnitAtoms, x: Array, indices: Array, support: Array, values: Array) -> Array:
    """Non-negative least squares on a support, from values >= 0 that are 0 outside it."""

    def leave(state: tuple[Array, ...]) -> tuple[Array, ...]:
        values, support, _, _ = state
        free = least_squares(atoms, x, indices, support)
        out = support & (free <= 0)
        # As far towards the free minimum as all stay >= 0; those that bind leave.
        step = jnp.where(out, values / jnp.where(out, values - free, 1), jnp.inf)
        step = jnp.where(jnp.isnan(step), 0, step)
        length = jnp.minimum(step.min(axis=1, keepdims=True), 1)
        moved = jnp.maximum(values + length * (free - values), 0)
        support &= ~(out & (step <= length))
        negative = out.any(axis=1)
        new = jnp.where(negative[:, None], moved, free)
        return jnp.where(support, new, 0), support, negative, state[3] + 1

    start = (values, support, jnp.ones(len(x), bool), jnp.zeros((), jnp.int32))
    most = indices.shape[1] + 1  # each round but the last one takes an atom away
    return jax.lax.while_loop(lambda state: state[2].any() & (state[3] < most), leave, start)[0]
