"""Controls: dictionaries that have learned nothing, or next to nothing."""

from __future__ import annotations

from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.solvers.base import (
    AbstractSolver,
    Batch,
    Info,
    Pursuit,
    check_pursuit,
    measure,
    unit_rows,
)


class _UntrainedState(eqx.Module):
    atoms: Float[Array, "m d"]
    rows_since_used: Int[Array, " m"]


class Untrained(AbstractSolver[_UntrainedState]):
    """Unit atoms that are made once, from a sample of the training rows, and then left alone.

    `atoms` says how:

        data_rows  rows of the data
        gaussian   normal with the data's covariance: what its second moments alone give
        pca        the principal directions, the greatest variance first; at most d of them
        random     directions without preference: a frozen random decoder

    What a solver does not do better than these, it has not learned. Steps only measure.

    Arguments:
      n_atoms: m.
      encoder: codes the batches, and is the encoder of the result.
    """

    __pydantic_config__ = {"extra": "forbid"}

    n_atoms: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    encoder: Pursuit
    atoms: Literal["data_rows", "gaussian", "pca", "random"] = eqx.field(static=True)
    dead_after: Annotated[int, Field(gt=0, lt=2**30)] = eqx.field(static=True, default=100_000)
    name: Literal["untrained"] = eqx.field(static=True, default="untrained")

    def __check_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Rules that join hyperparameters. Raises ValueError naming the field."""
        check_pursuit(self.encoder, self.n_atoms)

    @property
    def control(self) -> AbstractEncoder:
        """What codes the control."""
        return self.encoder

    def init(
        self,
        sample: Float[Array, "n d"],
        *,
        n_steps: int,
        key: Key[Array, ""],
        start: Dictionary | None = None,
    ) -> _UntrainedState:
        """The atoms, from the sample; or those of `start`, as they are but for their norms.

        Raises:
          ValueError: there are fewer rows than atoms, or fewer principal directions.
        """
        del n_steps
        atoms = self._atoms(sample, key) if start is None else start.atoms
        return _UntrainedState(unit_rows(atoms), jnp.zeros(self.n_atoms, jnp.int32))

    def _atoms(self, sample: Float[Array, "n d"], key: Key[Array, ""]) -> Float[Array, "m d"]:
        shape = self.n_atoms, sample.shape[1]
        match self.atoms:
            case "data_rows":
                return self.data_rows(sample, key=key)
            case "random":
                return jax.random.normal(key, shape, sample.dtype)
            case "gaussian":
                variance, directions = _principal(sample)
                normal = jax.random.normal(key, shape, sample.dtype)
                return (normal * jnp.sqrt(variance)[None]) @ directions
            case "pca":
                most = min(sample.shape)
                if self.n_atoms > most:
                    raise ValueError(
                        f"n_atoms: {self.n_atoms:,} is more than the {most:,} principal directions "
                        f"of {len(sample):,} rows of width {sample.shape[1]:,}"
                    )
                return _principal(sample)[1][: self.n_atoms]

    def step(
        self, state: _UntrainedState, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[_UntrainedState, Info]:
        """Code the batch, and say how well that went."""
        del key
        dictionary, encoder = self.result(state)
        codes = encoder.prepare(dictionary).encode(batch.x)
        info, energy = measure(batch.x, codes, state.atoms)
        since = jnp.where(energy > 0, 0, state.rows_since_used + len(batch.x))
        since = jnp.minimum(since, self.dead_after)  # it would overflow in the end
        info = eqx.tree_at(lambda info: info.dead, info, jnp.sum(since >= self.dead_after))
        return _UntrainedState(state.atoms, since), info

    def result(self, state: _UntrainedState) -> tuple[Dictionary, AbstractEncoder]:
        """The atoms, and the encoder that was asked for."""
        bias = jnp.zeros(state.atoms.shape[1], state.atoms.dtype)
        return Dictionary(state.atoms, bias), self.encoder

    def memory_bytes(self, batch_size: int, width: int) -> int:
        """About how many bytes a step needs at once."""
        return 4 * (3 * batch_size * width + self.n_atoms**2)


@jax.jit
def _principal(
    sample: Float[Array, "n d"],
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Variances, greatest first, and their directions as rows."""
    centred = sample - sample.mean(axis=0, keepdims=True)
    variance, directions = jnp.linalg.eigh(centred.T @ centred / len(sample))
    return jnp.maximum(variance[::-1], 0), directions.T[::-1]
