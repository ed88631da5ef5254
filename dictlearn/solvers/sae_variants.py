"""What a sparse autoencoder of the family has of its own: its activation and its loss.

dictlearn.solvers.sae trains them all. u [n m] are pre-activations, z [n m] codes; `learned` are
parameters of the activation's own, `running` one number that follows the batches.
"""

from __future__ import annotations

import abc
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from pydantic import Field

from dictlearn.dictionary import Dictionary
from dictlearn.encoders import activations, activations_cpu
from dictlearn.solvers.sae_thresholds import (
    Rows,
    Tiles,
    above,
    batch_top,
    batch_top_on_cpu,
    jump,
    least,
    rows_of,
)

# What a batch counts for in a running mean.
_NEW = 0.01

_K = Annotated[int, Field(gt=0)]


class Seen(eqx.Module):
    """What a batch's codes tell: nonzeros a row, the least one in size, the mean |<g, d_j>|."""

    l0: Float[Array, ""]
    least: Float[Array, ""]
    projection: Float[Array, ""]


class Parameters(eqx.Module):
    """What an autoencoder learns; `learned` is of its activation."""

    dictionary: Dictionary
    weight: Float[Array, "m d"]
    bias: Float[Array, " m"]
    learned: Float[Array, " m"] | None


class Told(eqx.Module):
    """What a batch tells: means over rows of ||x - x_hat||^2 and ||x - mean||^2; atoms used."""

    objective: Float[Array, ""]
    variance: Float[Array, ""]
    seen: Seen
    used: Bool[Array, " m"]


class Inputs(eqx.Module):
    """What codes are made of.

    Attributes:
      projection: |<g, d_j>|, where the variant needs the gradient.
    """

    u: Float[Array, "n m"]
    projection: Float[Array, "n m"] | None
    learned: Float[Array, " m"] | None
    running: Float[Array, ""]


class AbstractVariant(eqx.Module):
    """An activation in training, and what it adds to the loss."""

    k: eqx.AbstractVar[int]
    signed: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def begins(self) -> float:
        """`running` before the first batch."""
        return 0.0

    @abc.abstractmethod
    def codes(self, inputs: Inputs) -> Float[Array, "n m"]:
        """z, to be differentiated by u and by what is learned."""

    @abc.abstractmethod
    def activation(
        self, learned: Float[Array, " m"] | None, running: Float[Array, ""], n_atoms: int
    ) -> activations.AbstractActivation:
        """What the finished encoder has."""

    def learned(self, u: Float[Array, "n m"]) -> Float[Array, " m"] | None:
        """Parameters of the activation's own, from the first pre-activations."""
        del u

    def threshold(self, u: Float[Array, "n m"]) -> Float[Array, ""]:
        """What the encoder's bias begins below, from the first pre-activations."""
        return jnp.zeros((), u.dtype)

    def follow(self, running: Float[Array, ""], seen: Seen) -> Float[Array, ""]:
        """`running` after a batch."""
        del seen
        return running

    def penalty(
        self, inputs: Inputs, z: Float[Array, "n m"], scale: Float[Array, ""]
    ) -> Float[Array, ""]:
        """What is added to the loss; `scale` is the root of the rows' variance."""
        del z, scale
        return jnp.zeros((), inputs.u.dtype)

    def on_cpu(self, tiles: Tiles, n_rows: int, running: float) -> Rows | None:
        """Codes by a kernel on the host, where their gradient by u is 1; None: there is none."""
        del tiles, n_rows, running
        return None


class _Largest(AbstractVariant):
    def codes(self, inputs: Inputs) -> Float[Array, "n m"]:
        """z, to be differentiated by u."""
        return self._kind(inputs.u).dense()

    def on_cpu(self, tiles: Tiles, n_rows: int, running: float) -> Rows:
        """The same by a kernel on the host."""
        del n_rows, running
        return rows_of([activations_cpu.largest(u, self.k, signed=self.signed) for u, _ in tiles()])

    def activation(
        self, learned: Float[Array, " m"] | None, running: Float[Array, ""], n_atoms: int
    ) -> activations.AbstractActivation:
        """What the finished encoder has."""
        del learned, running, n_atoms
        return self._kind

    @property
    def _kind(self) -> activations.AbstractActivation:
        return (activations.AbsTopK if self.signed else activations.TopK)(self.k)


class TopK(_Largest):
    """The k largest of each row, where they are above 0."""

    __pydantic_config__ = {"extra": "forbid"}

    k: _K = eqx.field(static=True)
    name: Literal["topk"] = eqx.field(static=True, default="topk")


class AbsTopK(_Largest):
    """The k of each row that are largest in size, with their signs.

    Source: "AbsTopK" (arXiv 2510.00404), which does not tell whether atoms have unit norm or dead
    latents an extra loss; here they have both, as all of the family.
    """

    __pydantic_config__ = {"extra": "forbid"}

    signed: ClassVar[bool] = True

    k: _K = eqx.field(static=True)
    name: Literal["abs_topk"] = eqx.field(static=True, default="abs_topk")


class BatchTopK(AbstractVariant):
    """The k n largest of a batch of n rows, where they are above 0; rows share them out.

    The finished encoder keeps what is above one threshold, the running mean of the least code that
    a batch kept, so that a row's codes do not depend on other rows; k is then their mean number.

    Source: Bussmann et al., "BatchTopK sparse autoencoders" (2024).
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: _K = eqx.field(static=True)
    name: Literal["batch_topk"] = eqx.field(static=True, default="batch_topk")

    def codes(self, inputs: Inputs) -> Float[Array, "n m"]:
        """z, to be differentiated by u."""
        return batch_top(inputs.u, self.k)

    def on_cpu(self, tiles: Tiles, n_rows: int, running: float) -> Rows:
        """The same by a kernel on the host."""
        return batch_top_on_cpu(tiles, self.k * n_rows, running)

    def follow(self, running: Float[Array, ""], seen: Seen) -> Float[Array, ""]:
        """The running mean of the least code."""
        return _mean(running, seen.least)

    def activation(
        self, learned: Float[Array, " m"] | None, running: Float[Array, ""], n_atoms: int
    ) -> activations.AbstractActivation:
        """What the finished encoder has."""
        return activations.JumpReLU(jnp.full(n_atoms, running))


class ReLU(AbstractVariant):
    """All that is above 0, with the L1 norm of the codes as a penalty.

        loss += lambda mean_n ||z_n||_1 / scale

    The bias c begins where about k a row are above 0, and lambda follows the batches so that it
    keeps k on average: it is multiplied by (nonzeros / k)^0.01 after each, at most by a factor of
    e^0.01. Departure: elsewhere lambda is fixed, and a number of nonzeros found by trying.
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: _K = eqx.field(static=True)
    name: Literal["relu"] = eqx.field(static=True, default="relu")

    def threshold(self, u: Float[Array, "n m"]) -> Float[Array, ""]:
        """What the encoder's bias begins below."""
        return least(u, self.k)

    def codes(self, inputs: Inputs) -> Float[Array, "n m"]:
        """z, to be differentiated by u."""
        return jax.nn.relu(inputs.u)

    def penalty(
        self, inputs: Inputs, z: Float[Array, "n m"], scale: Float[Array, ""]
    ) -> Float[Array, ""]:
        """lambda times the mean L1 norm; atoms have unit norm."""
        return inputs.running * z.sum(axis=1).mean() / scale

    @property
    def begins(self) -> float:
        """The first lambda: 1/2 of a code where k equal ones make up the scale."""
        return 0.5 / self.k**0.5

    def follow(self, running: Float[Array, ""], seen: Seen) -> Float[Array, ""]:
        """The next lambda."""
        return running * jnp.exp(0.01 * jnp.clip(jnp.log(seen.l0 / self.k), -1, 1))

    def activation(
        self, learned: Float[Array, " m"] | None, running: Float[Array, ""], n_atoms: int
    ) -> activations.AbstractActivation:
        """What the finished encoder has."""
        return activations.ReLU()


class JumpReLU(AbstractVariant):
    """All that is above 0 and above its atom's threshold theta, which is learned.

        loss += weight (mean_n ||z_n||_0 / k - 1)^2

    Neither the jump of z nor that of the L0 norm has a slope at theta; both get that of a ramp of
    width `bandwidth` theta about it (straight-through). The parameter is log theta, and begins
    where about k of a row's first codes are above it.

    Source: Rajamanoharan et al., "Jumping ahead" (2024), section 3 and, for the aim at k, its
    appendix. Departure: the bandwidth is relative to theta, and so free of units.
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: _K = eqx.field(static=True)
    bandwidth: Annotated[float, Field(gt=0, allow_inf_nan=False)] = eqx.field(
        static=True, default=0.1
    )
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = eqx.field(static=True, default=1.0)
    name: Literal["jumprelu"] = eqx.field(static=True, default="jumprelu")

    def learned(self, u: Float[Array, "n m"]) -> Float[Array, " m"]:
        """log theta: the same for all atoms."""
        return jnp.full(u.shape[1], jnp.log(least(u, self.k)))

    def codes(self, inputs: Inputs) -> Float[Array, "n m"]:
        """z, to be differentiated by u and theta."""
        assert inputs.learned is not None
        return jump(inputs.u, inputs.learned, self.bandwidth)

    def penalty(
        self, inputs: Inputs, z: Float[Array, "n m"], scale: Float[Array, ""]
    ) -> Float[Array, ""]:
        """How far the nonzeros are from k."""
        assert inputs.learned is not None
        nonzero = above(inputs.u, inputs.learned, self.bandwidth)
        count = jnp.sum(nonzero, axis=1)  # pyright: ignore[reportArgumentType]
        return self.weight * (count.mean() / self.k - 1) ** 2

    def activation(
        self, learned: Float[Array, " m"] | None, running: Float[Array, ""], n_atoms: int
    ) -> activations.AbstractActivation:
        """What the finished encoder has."""
        assert learned is not None
        return activations.JumpReLU(jnp.exp(learned))


class GradientTopK(AbstractVariant):
    """The k codes of a row that matter most to the loss (activations.GradientTopK).

    The running number is the mean |<g, d_j>|. Selection alone knows the gradient; the loss, and
    AuxK's choice among the dead, do not. Source: Olmo et al. (arXiv 2411.10397), which leaves beta,
    the scale of g and AuxK open: they are ours.
    """

    __pydantic_config__ = {"extra": "forbid"}

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    k: _K = eqx.field(static=True)
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = eqx.field(static=True, default=1.0)
    name: Literal["gradient_topk"] = eqx.field(static=True, default="gradient_topk")

    def codes(self, inputs: Inputs) -> Float[Array, "n m"]:
        """z, to be differentiated by u."""
        assert inputs.projection is not None
        scale = jnp.where(inputs.running > 0, inputs.running, inputs.projection.mean())
        activation = activations.GradientTopK(self.k, self.beta, scale)
        return activation(inputs.u, inputs.projection).dense()

    def on_cpu(self, tiles: Tiles, n_rows: int, running: float) -> Rows:
        """The same by a kernel on the host."""
        if not running > 0:
            sums = [float(np.sum(projection)) / u.shape[1] for u, projection in tiles()]  # pyright: ignore
            running = sum(sums) / n_rows
        activation = activations.GradientTopK(self.k, self.beta, jnp.asarray(running))
        return rows_of([activation.largest(u, projection) for u, projection in tiles()])

    def follow(self, running: Float[Array, ""], seen: Seen) -> Float[Array, ""]:
        """The running mean |<g, d_j>|."""
        return _mean(running, seen.projection)

    def activation(
        self, learned: Float[Array, " m"] | None, running: Float[Array, ""], n_atoms: int
    ) -> activations.AbstractActivation:
        """What the finished encoder has."""
        return activations.GradientTopK(self.k, self.beta, running)


def _mean(running: Float[Array, ""], value: Float[Array, ""]) -> Float[Array, ""]:
    """The running mean after another value, if there is one; 0 before the first."""
    new = jnp.where(running > 0, (1 - _NEW) * running + _NEW * value, value)
    return jnp.where(jnp.isfinite(value), new, running)
