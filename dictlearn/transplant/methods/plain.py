"""Baselines that do not look at the token: nothing, the mean, and chance."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from dictlearn.transplant.problem import Problem


@dataclasses.dataclass(frozen=True)
class Zero:
    """Zeros. In an output head a zero row has a logit of 0, whatever the text."""

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["zero"] = "zero"

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e]."""
        del seed
        return np.zeros((len(problem.targets), problem.base.shape[1]), np.float32)


@dataclasses.dataclass(frozen=True)
class Mean:
    """The anchors' mean row: a logit that is the mean of theirs."""

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["mean"] = "mean"

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e]."""
        del seed
        return np.tile(problem.anchors.mean(axis=0), (len(problem.targets), 1))


@dataclasses.dataclass(frozen=True)
class Random:
    """Normal with the anchors' mean and covariance.

    Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021).
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["random"] = "random"

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e]."""
        anchors = problem.anchors
        mean = anchors.mean(axis=0)
        # Normal weights over the centred rows have their covariance, at any rank.
        factor = np.linalg.qr(anchors - mean, mode="r") / np.sqrt(np.float32(len(anchors)))
        noise = np.random.default_rng(seed).standard_normal(
            (len(problem.targets), len(factor)), np.float32
        )
        return mean + noise @ factor
