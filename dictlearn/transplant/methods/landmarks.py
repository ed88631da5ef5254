"""One rotation of the donor's space onto the base's, learned from the shared tokens."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from dictlearn.transplant.problem import Problem


@dataclasses.dataclass(frozen=True)
class Landmarks:
    """b = mean_b + s (t - mean_d) P_d R P_b^T.

    P_d [d r] and P_b [e r] are the anchors' principal directions in each space, r = min(d, e).
    R and s are the rotation and the scale that bring their coordinates together:
    min ||s A R - B|| over orthogonal R, with A [a r] the donor's and B [a r] the base's.

    Source: Schoenemann, "A generalized solution of the orthogonal Procrustes problem" (1966).
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["landmarks"] = "landmarks"

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e]."""
        del seed
        donor, base = problem.donor, problem.anchors
        mean_d, mean_b = donor.mean(axis=0), base.mean(axis=0)
        rank = min(donor.shape[1], base.shape[1])
        from_d, from_b = _directions(donor - mean_d, rank), _directions(base - mean_b, rank)
        a, b = (donor - mean_d) @ from_d, (base - mean_b) @ from_b  # [a r]
        left, sizes, right = np.linalg.svd(a.T @ b)
        scale = sizes.sum() / max(np.square(a, dtype=np.float64).sum(), 1e-30)
        turn = np.float32(scale) * (left @ right)
        return mean_b + (problem.targets - mean_d) @ (from_d @ turn @ from_b.T)


def _directions(centred: np.ndarray, rank: int) -> np.ndarray:
    """The first principal directions [d r]."""
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return vectors[:, ::-1][:, :rank]
