"""Dictionary, Normaliser, and the Coder that joins them with an encoder."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from dictlearn.codes import SparseCodes
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared


class Dictionary(eqx.Module):
    """x_hat = codes @ atoms + bias."""

    atoms: Float[Array, "m d"]
    bias: Float[Array, " d"]

    def decode(self, codes: SparseCodes) -> Float[Array, "n d"]:
        """The rows that the codes stand for."""
        return codes.decode(self.atoms) + self.bias[None]


class Normaliser(eqx.Module):
    """x' = (x - mean) / scale, and 0 in the carriers. A gradient becomes scale * gradient.

    *Carriers* are coordinates that no dictionary has to explain: their values are kept exactly, at
    a price of one nonzero each. None by default.
    """

    mean: Float[Array, " d"]
    scale: Float[Array, ""]
    carriers: Int[Array, " c"] = eqx.field(default_factory=lambda: jnp.zeros(0, jnp.int32))

    def normalise(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Raw activations to the units that solvers and encoders see."""
        return self._centred(x).at[:, self.carriers].set(0)

    def kept(self, x: Float[Array, "n d"]) -> Float[Array, "n c"]:
        """What `normalise` takes away."""
        return self._centred(x)[:, self.carriers]

    def restore(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """The inverse of `normalise`, carriers apart."""
        return x * self.scale + self.mean[None]

    def _centred(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return (x - self.mean[None]) / self.scale


class Coder(eqx.Module):
    """Raw activations to codes and back: normaliser + dictionary + encoder, one pytree.

    Codes are over m + c atoms: the dictionary's, then the normaliser's carriers in their order,
    which every row uses. Any encoder can be put on any dictionary:

        eqx.tree_at(lambda coder: coder.encoder, coder, OMP(k=32))
    """

    normaliser: Normaliser
    dictionary: Dictionary
    encoder: AbstractEncoder

    def prepare(self) -> PreparedCoder:
        """Do once what does not depend on the rows.

        Raises:
          ValueError: an atom holds NaN or infinity.
        """
        bad = ~jnp.isfinite(self.dictionary.atoms).all(axis=1)
        if not isinstance(bad, Tracer) and bad.any():
            raise ValueError(f"dictionary: atom {int(jnp.argmax(bad))} holds NaN or infinity")
        return PreparedCoder(self.normaliser, self.encoder.prepare(self.dictionary))

    def encode(
        self,
        x: Float[Array | np.ndarray, "n d"],
        *,
        gradient: Float[Array | np.ndarray, "n d"] | None = None,
    ) -> SparseCodes:
        """Codes of raw activations."""
        return self.prepare().encode(x, gradient=gradient)

    def decode(self, codes: SparseCodes) -> Float[Array, "n d"]:
        """Raw activations from codes."""
        bias = self.dictionary.bias[None]
        return self.normaliser.restore(codes.decode(self.atoms) + bias)

    @property
    def atoms(self) -> Float[Array, "a d"]:
        """What codes stand for: the dictionary's atoms, then the axes of the carriers."""
        atoms, carriers = self.dictionary.atoms, self.normaliser.carriers
        axes = jnp.zeros((len(carriers), atoms.shape[1]), atoms.dtype)
        return jnp.concatenate([atoms, axes.at[jnp.arange(len(carriers)), carriers].set(1)])


class PreparedCoder(eqx.Module):
    """A Coder made ready for many rows."""

    normaliser: Normaliser
    encoder: AbstractPrepared

    def encode(
        self,
        x: Float[Array | np.ndarray, "n d"],
        *,
        gradient: Float[Array | np.ndarray, "n d"] | None = None,
    ) -> SparseCodes:
        """Codes of raw activations."""
        x = jnp.asarray(x)
        if gradient is not None:
            gradient = self.normaliser.scale * jnp.asarray(gradient)
        codes = self.encoder.encode(self.normaliser.normalise(x), gradient=gradient)
        kept = self.normaliser.kept(x)
        n, count = kept.shape
        place = jnp.broadcast_to(codes.n_atoms + jnp.arange(count, dtype=jnp.int32), (n, count))
        return SparseCodes(
            jnp.concatenate([codes.indices, place], axis=1),
            jnp.concatenate([codes.values, kept], axis=1),
            n_atoms=codes.n_atoms + count,
        )
