"""What makes sparse codes of a linear encoder's pre-activations.

Each is the proximal step of a sparse coding problem min_z 1/2 ||x - z D||^2 + R(z) from z = 0, with
the learned affine map in the place of D^T (Zhu et al., "AbsTopK" (2025), section 3).
"""

from __future__ import annotations

import abc
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.encoders import activations_cpu


class AbstractActivation(eqx.Module):
    """Pre-activations u to codes."""

    projects: ClassVar[bool] = False  # whether codes may depend on the gradient along the atoms

    @abc.abstractmethod
    def __call__(
        self, u: Float[Array, "n m"], projection: Float[Array, "n m"] | None = None
    ) -> SparseCodes:
        """Codes, by XLA.

        Arguments:
          projection: |<g, d_j>|, how much the loss changes along each unit atom.
        """

    @abc.abstractmethod
    def on_cpu(self, u: np.ndarray, projection: np.ndarray | None) -> SparseCodes:
        """The same by a kernel on the host."""

    def check(self, n_atoms: int) -> None:
        """Whether it suits so many atoms. Raises ValueError naming the field."""
        k = getattr(self, "k", 0)
        if k > n_atoms:
            raise ValueError(
                f"k: {k} is more than n_atoms = {n_atoms}; "
                "a row cannot use more atoms than there are"
            )


class TopK(AbstractActivation):
    """Keep the k largest values of each row, then drop the negative ones among them.

    R forbids negative codes and more than k. Source: Gao et al., "Scaling and evaluating sparse
    autoencoders" (2024), section 2.3.
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    name: Literal["topk"] = eqx.field(static=True, default="topk")

    def __call__(
        self, u: Float[Array, "n m"], projection: Float[Array, "n m"] | None = None
    ) -> SparseCodes:
        """Codes, by XLA."""
        del projection
        values, indices = jax.lax.top_k(u, self.k)
        return SparseCodes(indices, jax.nn.relu(values), n_atoms=u.shape[1])

    def on_cpu(self, u: np.ndarray, projection: np.ndarray | None) -> SparseCodes:
        """The same by a kernel on the host."""
        del projection
        return _sparse(activations_cpu.largest(u, self.k), u)


class AbsTopK(AbstractActivation):
    """Keep the k values of each row that are largest in size, with their signs.

    R forbids more than k codes. Source: "AbsTopK" (arXiv 2510.00404), equation of the same name.
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    name: Literal["abs_topk"] = eqx.field(static=True, default="abs_topk")

    def __call__(
        self, u: Float[Array, "n m"], projection: Float[Array, "n m"] | None = None
    ) -> SparseCodes:
        """Codes, by XLA."""
        del projection
        _, indices = jax.lax.top_k(jnp.abs(u), self.k)
        return SparseCodes(indices, jnp.take_along_axis(u, indices, axis=1), n_atoms=u.shape[1])

    def on_cpu(self, u: np.ndarray, projection: np.ndarray | None) -> SparseCodes:
        """The same by a kernel on the host."""
        del projection
        return _sparse(activations_cpu.largest(u, self.k, signed=True), u)


class ReLU(AbstractActivation):
    """Keep what is above 0. R is the L1 norm, and forbids negative codes."""

    name: Literal["relu"] = eqx.field(static=True, default="relu")

    def __call__(
        self, u: Float[Array, "n m"], projection: Float[Array, "n m"] | None = None
    ) -> SparseCodes:
        """Codes, by XLA; traced, with room for all atoms in each row."""
        del projection
        return _where(u, u > 0)

    def on_cpu(self, u: np.ndarray, projection: np.ndarray | None) -> SparseCodes:
        """The same by a kernel on the host."""
        del projection
        return _above(u, np.zeros(u.shape[1], u.dtype))


class JumpReLU(AbstractActivation):
    """Keep what is above 0 and above the atom's own threshold, whole. R is the L0 norm.

    BatchTopK dictionaries use it too, with one threshold for all atoms. Source: Rajamanoharan et
    al., "Jumping ahead" (2024), equation 3.
    """

    threshold: Float[Array, " m"]
    name: Literal["jumprelu"] = eqx.field(static=True, default="jumprelu")

    def __call__(
        self, u: Float[Array, "n m"], projection: Float[Array, "n m"] | None = None
    ) -> SparseCodes:
        """Codes, by XLA; traced, with room for all atoms in each row."""
        del projection
        return _where(u, (u > 0) & (u > self.threshold[None]))

    def on_cpu(self, u: np.ndarray, projection: np.ndarray | None) -> SparseCodes:
        """The same by a kernel on the host."""
        del projection
        return _above(u, np.asarray(self.threshold))


class Gated(AbstractActivation):
    """One map says which atoms are used, a shifted and stretched copy of it how much of each:

        z_j = ReLU(gain_j u_j + offset_j)  where u_j > 0, else 0.

    With the paper's weights, u = W_gate (x - b) + b_gate, gain = exp(r_mag) and
    offset = b_mag - exp(r_mag) b_gate. Source: Rajamanoharan et al., "Improving dictionary learning
    with gated sparse autoencoders" (2024), section 3.2, the form whose two maps share weights.
    """

    gain: Float[Array, " m"]  # above 0
    offset: Float[Array, " m"]
    name: Literal["gated"] = eqx.field(static=True, default="gated")

    def __call__(
        self, u: Float[Array, "n m"], projection: Float[Array, "n m"] | None = None
    ) -> SparseCodes:
        """Codes, by XLA; traced, with room for all atoms in each row."""
        del projection
        z = self.gain[None] * u + self.offset[None]
        return _where(z, (u > 0) & (z > 0))

    def on_cpu(self, u: np.ndarray, projection: np.ndarray | None) -> SparseCodes:
        """The same by a kernel on the host."""
        del projection
        z = np.asarray(self.gain) * u + np.asarray(self.offset)
        z[u <= 0] = 0
        return _above(z, np.zeros(u.shape[1], u.dtype))


class GradientTopK(AbstractActivation):
    """Keep the k codes z = ReLU(u) with the largest z_j (1 + beta |<g, d_j>| / scale).

    g is the gradient of the summed next-token loss, so that z_j |<g, d_j>| is, to first order, what
    the loss gains or loses by atom j. It knows the next token: without a gradient (the other mode
    of inference) this is TopK, beta = 0. Source: Olmo et al., "Features that make a difference"
    (arXiv 2411.10397); `scale`, the mean |<g, d_j>| in training, makes beta free of units, and is
    ours.
    """

    projects: ClassVar[bool] = True

    k: int = eqx.field(static=True)
    beta: float = eqx.field(static=True)
    scale: Float[Array, ""]
    name: Literal["gradient_topk"] = eqx.field(static=True, default="gradient_topk")

    def __call__(
        self, u: Float[Array, "n m"], projection: Float[Array, "n m"] | None = None
    ) -> SparseCodes:
        """Codes, by XLA."""
        z = jax.nn.relu(u)
        score = z if projection is None else z * (1 + self._weight() * projection)
        _, indices = jax.lax.top_k(score, self.k)
        return SparseCodes(indices, jnp.take_along_axis(z, indices, axis=1), n_atoms=u.shape[1])

    def on_cpu(self, u: np.ndarray, projection: np.ndarray | None) -> SparseCodes:
        """The same by a kernel on the host."""
        return _sparse(self.largest(u, projection), u)

    def largest(
        self, u: np.ndarray, projection: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values, on the host."""
        if projection is None:
            return activations_cpu.largest(u, self.k)
        weight = np.asarray(self._weight(), u.dtype)
        return activations_cpu.largest(u, self.k, score=u * (1 + weight * projection))

    def _weight(self) -> Float[Array, ""]:
        return jnp.where(self.scale > 0, self.beta / jnp.where(self.scale > 0, self.scale, 1), 0)


def _sparse(codes: tuple[np.ndarray, np.ndarray], u: np.ndarray) -> SparseCodes:
    return SparseCodes(*map(jnp.asarray, codes), n_atoms=u.shape[1])


def _above(u: np.ndarray, threshold: np.ndarray) -> SparseCodes:
    """Codes of what is above a threshold, with room for the fullest row."""
    start, index, value = activations_cpu.above(u, threshold)
    count = np.diff(start)
    shape = len(u), _room(int(count.max(initial=0)), u.shape[1])
    indices, values = np.zeros(shape, np.int32), np.zeros(shape, u.dtype)
    row = np.repeat(np.arange(len(u)), count)
    slot = np.arange(len(index)) - np.repeat(start[:-1], count)
    indices[row, slot], values[row, slot] = index, value
    return _sparse((indices, values), u)


def _where(u: Float[Array, "n m"], kept: Bool[Array, "n m"]) -> SparseCodes:
    """The same by XLA."""
    m = u.shape[1]
    room = m if isinstance(kept, Tracer) else _room(int(kept.sum(axis=1).max()), m)
    values, indices = jax.lax.top_k(jnp.where(kept, u, 0), room)
    return SparseCodes(indices, values, n_atoms=m)


def _room(count: int, n_atoms: int) -> int:
    """Powers of 2, so that few shapes come about."""
    return min(1 << max(count - 1, 0).bit_length(), n_atoms)
