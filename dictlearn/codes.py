"""Sparse codes: which atoms a row uses, and how much of each."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class SparseCodes(eqx.Module):
    """Codes [n m] with at most k nonzeros a row, held as indices and values.

    A slot whose value is 0 is unused, whatever its index. An atom stands at most once in a row.
    Values may be negative: count nonzeros by `!= 0`.
    """

    indices: Int[Array, "n k"]
    values: Float[Array, "n k"]
    n_atoms: int = eqx.field(static=True)

    def dense(self) -> Float[Array, "n m"]:
        """The codes as a plain matrix."""
        n, _ = self.values.shape
        rows = jnp.arange(n)[:, None]
        zeros = jnp.zeros((n, self.n_atoms), self.values.dtype)
        return zeros.at[rows, self.indices].add(self.values)  # add: unused slots share indices

    @jax.jit  # a loop outside of jit would be compiled at every call, and kept
    def decode(self, atoms: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """codes @ atoms, at a cost of n k d."""

        def add_slot(slot: Array, total: Float[Array, "n d"]) -> Float[Array, "n d"]:
            return total + self.values[:, slot, None] * atoms[self.indices[:, slot]]

        n, k = self.values.shape
        return jax.lax.fori_loop(0, k, add_slot, jnp.zeros((n, atoms.shape[1]), atoms.dtype))

    def l0(self) -> Int[Array, " n"]:
        """Nonzeros of each row."""
        return (self.values != 0).sum(axis=1)
