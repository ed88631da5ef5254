"""Dictionary, Normaliser, and the Coder that joins them with an encoder."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dictlearn.codes import SparseCodes
from dictlearn.encoders.base import AbstractEncoder


class Dictionary(eqx.Module):
    """x_hat = codes @ atoms + bias."""

    atoms: Float[Array, "m d"]
    bias: Float[Array, " d"]

    def decode(self, codes: SparseCodes) -> Float[Array, "n d"]:
        """The rows that the codes stand for."""
        return codes.decode(self.atoms) + self.bias[None]


class Normaliser(eqx.Module):
    """x' = (x - mean) / scale. A gradient with respect to x becomes scale * gradient."""

    mean: Float[Array, " d"]
    scale: Float[Array, ""]

    def normalise(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Raw activations to the units that solvers and encoders see."""
        return (x - self.mean[None]) / self.scale

    def restore(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """The inverse of `normalise`."""
        return x * self.scale + self.mean[None]


class Coder(eqx.Module):
    """Raw activations to codes and back: normaliser + dictionary + encoder, one pytree.

    Any encoder can be put on any dictionary:

        eqx.tree_at(lambda coder: coder.encoder, coder, OMP(k=32))
    """

    normaliser: Normaliser
    dictionary: Dictionary
    encoder: AbstractEncoder

    def encode(
        self,
        x: Float[Array | np.ndarray, "n d"],
        *,
        gradient: Float[Array | np.ndarray, "n d"] | None = None,
    ) -> SparseCodes:
        """Codes of raw activations."""
        if gradient is not None:
            gradient = self.normaliser.scale * jnp.asarray(gradient)
        x = self.normaliser.normalise(jnp.asarray(x))
        return self.encoder.prepare(self.dictionary).encode(x, gradient=gradient)

    def decode(self, codes: SparseCodes) -> Float[Array, "n d"]:
        """Raw activations from codes."""
        return self.normaliser.restore(self.dictionary.decode(codes))
