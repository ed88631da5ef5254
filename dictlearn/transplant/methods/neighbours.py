"""A weighted mean of the nearest shared tokens."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from dictlearn.transplant.problem import Problem

_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """sum_i w_i b_i / sum_i w_i over the k anchors that are nearest in the donor's space.

    Attributes:
      k: neighbours of a token.
      by: "distance" takes the least Euclidean distances, w = 1 / distance; "cosine" the greatest
        cosines, w = max(cosine, 0).
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["neighbours"] = "neighbours"
    k: Annotated[int, Field(gt=0)] = 8
    by: Literal["distance", "cosine"] = "distance"

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e]."""
        del seed
        anchors = jnp.asarray(problem.anchors)
        k = min(self.k, len(anchors))
        donor, targets = problem.donor, problem.targets
        if self.by == "cosine":
            donor, targets = _unit(donor), _unit(targets)
        there = jnp.asarray(donor)
        found = [
            np.asarray(_mean(jnp.asarray(targets[at : at + _ROWS]), there, anchors, k, self.by))
            for at in range(0, len(targets), _ROWS)
        ]
        return np.concatenate([*found, np.empty((0, anchors.shape[1]), np.float32)])


@jax.jit(static_argnames=("k", "by"))
def _mean(targets: jax.Array, donor: jax.Array, anchors: jax.Array, k: int, by: str) -> jax.Array:
    inner = targets @ donor.T
    if by == "cosine":
        cosine, nearest = jax.lax.top_k(inner, k)
        weights = jnp.maximum(cosine, 0)
    else:
        squares = jnp.sum(donor**2, axis=1)[None] - 2 * inner
        _, nearest = jax.lax.top_k(-squares, k)
        distance = jnp.linalg.norm(targets[:, None] - donor[nearest], axis=-1)
        weights = 1 / jnp.maximum(distance, jnp.finfo(distance.dtype).tiny ** 0.5)
    weights /= jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(weights.dtype).tiny)
    return jnp.einsum("nk,nke->ne", weights, anchors[nearest])


def _unit(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)
