"""Linear encoders: an affine map, then an activation that keeps few values."""

from __future__ import annotations

from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.activations import AbsTopK, AbstractActivation, TopK
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared
from dictlearn.encoders.pursuit import on_one_cpu

# Rows whose pre-activations are held at once on a CPU: they should stay within its cache.
TILE = 512
# Rows from which `regress` learns: some pursuits are slow.
REGRESS_ROWS = 16384


class Linear(AbstractEncoder):
    """codes = activation((x - b) @ weight^T + bias), b the dictionary's bias. Learned."""

    weight: Float[Array, "m d"]
    bias: Float[Array, " m"]
    activation: AbstractActivation
    name: Literal["linear"] = eqx.field(static=True, default="linear")

    def prepare(self, dictionary: Dictionary) -> AbstractPrepared:
        """Nothing to prepare but the place of the dictionary's bias.

        Raises:
          ValueError: it was learned for other atoms.
        """
        if self.weight.shape != dictionary.atoms.shape:
            raise ValueError(
                f"encoder: its weight is {self.weight.shape}, but the atoms are "
                f"{dictionary.atoms.shape}; it was learned on another dictionary"
            )
        self.activation.check(len(self.weight))
        return PreparedLinear(self.weight, self.bias, self.activation, dictionary)


class Tied(AbstractEncoder):
    """codes = activation((x - b) @ D^T) over atoms at unit norm: the atoms themselves look for x.

    Array-free, so that it runs on any dictionary, but no fair judge of one: where atoms overlap,
    all of them are found where one is. `dictlearn.fit_encoder` learns a linear encoder instead.
    """

    __pydantic_config__ = {"extra": "forbid"}

    activation: Annotated[TopK | AbsTopK, Field(discriminator="name")]
    name: Literal["tied"] = eqx.field(static=True, default="tied")

    def prepare(self, dictionary: Dictionary) -> AbstractPrepared:
        """Atoms at unit norm. A zero atom stays zero: nothing correlates with it."""
        self.activation.check(len(dictionary.atoms))
        norms = jnp.linalg.norm(dictionary.atoms, axis=1)
        norms = jnp.where(norms > 0, norms, 1)
        unit = dictionary.atoms / norms[:, None]
        zero = jnp.zeros(len(norms), norms.dtype)
        return _PreparedTied(PreparedLinear(unit, zero, self.activation, dictionary), norms)


class PreparedLinear(AbstractPrepared):
    """A linear encoder made ready for one dictionary."""

    weight: Float[Array, "m d"]
    bias: Float[Array, " m"]
    activation: AbstractActivation
    dictionary: Dictionary

    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        """Codes of normalised rows. Only a gradient-aware activation uses the gradient."""
        gradient = gradient if self.activation.projects else None
        if not on_one_cpu(x):
            return self.activation(*self.pre(x, gradient))
        parts = []
        for at in range(0, len(x), TILE):
            own = None if gradient is None else gradient[at : at + TILE]
            u, projection = self.pre(x[at : at + TILE], own)
            projection = None if projection is None else np.asarray(projection)
            parts.append(self.activation.on_cpu(np.asarray(u), projection))
        return _stack(parts)

    def pre(
        self, x: Float[Array, "n d"], gradient: Float[Array, "n d"] | None
    ) -> tuple[Float[Array, "n m"], Float[Array, "n m"] | None]:
        """Pre-activations, and |<g, d_j>| over the atoms."""
        return _pre(self, x, gradient)


class _PreparedTied(AbstractPrepared):
    linear: PreparedLinear
    norms: Float[Array, " m"]

    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        codes = self.linear.encode(x, gradient=gradient)
        return SparseCodes(codes.indices, codes.values / self.norms[codes.indices], codes.n_atoms)


def regress(
    dictionary: Dictionary, x: Float[Array, "n d"], encoder: AbstractEncoder
) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
    """The weight and bias whose pre-activations come closest to an encoder's codes of rows.

    Ridge regression of all codes, zeros included, on x - b, with a thousandth of the mean variance:

        W, c = argmin sum ||z - W (x - b) - c||^2 + n r ||W||^2,    r = 1e-3 tr(cov x) / d
    """
    rows = spread(x, REGRESS_ROWS)
    codes = encoder.prepare(dictionary).encode(rows)
    return _regress(rows - dictionary.bias[None], codes)


def spread(x: Float[Array, "n d"], most: int) -> Float[Array, "r d"]:
    """At most so many rows, evenly from all: samples stand in the order of their documents."""
    return x[:: -(-len(x) // most)]


@jax.jit
def _regress(
    x: Float[Array, "n d"], codes: SparseCodes
) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
    z, mean = codes.dense(), x.mean(axis=0)
    centred = x - mean[None]
    covariance = centred.T @ centred / len(x)
    ridge = 1e-3 * jnp.trace(covariance) / len(mean) + jnp.finfo(x.dtype).tiny
    system = covariance + ridge * jnp.eye(len(mean), dtype=x.dtype)
    weight = jnp.linalg.solve(system, centred.T @ z / len(x)).T
    return weight, z.mean(axis=0) - weight @ mean


@eqx.filter_jit
def _pre(
    prepared: PreparedLinear, x: Float[Array, "n d"], gradient: Float[Array, "n d"] | None
) -> tuple[Float[Array, "n m"], Float[Array, "n m"] | None]:
    u = (x - prepared.dictionary.bias[None]) @ prepared.weight.T + prepared.bias[None]
    if gradient is None:
        return u, None
    return u, jnp.abs(gradient @ prepared.dictionary.atoms.T)


def _stack(parts: list[SparseCodes]) -> SparseCodes:
    """Codes of tiles, one below the other, with room for the fullest."""
    if len(parts) == 1:
        return parts[0]
    room = max(part.values.shape[1] for part in parts)

    def stacked(arrays: list[Array]) -> Array:
        return jnp.concatenate([jnp.pad(a, ((0, 0), (0, room - a.shape[1]))) for a in arrays])

    return SparseCodes(
        stacked([part.indices for part in parts]),
        stacked([part.values for part in parts]),
        n_atoms=parts[0].n_atoms,
    )
