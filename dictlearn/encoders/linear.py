"""Learned linear encoders: an affine map, then an activation that keeps few values."""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared


class TopK(eqx.Module):
    """Keep the k largest values of each row, then drop the negative ones among them.

    Source: Gao et al., "Scaling and evaluating sparse autoencoders" (2024), section 2.3.
    """

    k: int = eqx.field(static=True)
    name: Literal["topk"] = eqx.field(static=True, default="topk")

    def __call__(self, u: Float[Array, "n m"]) -> SparseCodes:
        """Codes of pre-activations."""
        values, indices = jax.lax.top_k(u, self.k)
        return SparseCodes(indices, jax.nn.relu(values), n_atoms=u.shape[1])


class Linear(AbstractEncoder):
    """codes = activation((x - b) @ weight^T + bias), b the dictionary's bias."""

    weight: Float[Array, "m d"]
    bias: Float[Array, " m"]
    activation: TopK
    name: Literal["linear"] = eqx.field(static=True, default="linear")

    def prepare(self, dictionary: Dictionary) -> AbstractPrepared:
        """Nothing to prepare but the place of the dictionary's bias."""
        return _PreparedLinear(self.weight, self.bias, self.activation, dictionary.bias)


class _PreparedLinear(AbstractPrepared):
    weight: Float[Array, "m d"]
    bias: Float[Array, " m"]
    activation: TopK
    centre: Float[Array, " d"]

    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        del gradient
        return _encode(self, x)


@eqx.filter_jit
def _encode(prepared: _PreparedLinear, x: Float[Array, "n d"]) -> SparseCodes:
    u = jnp.matmul(x - prepared.centre[None], prepared.weight.T) + prepared.bias[None]
    return prepared.activation(u)
