"""The mean of the rows of the tokens that the base's tokenizer makes of a new token's text."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from dictlearn.transplant.problem import Problem


@dataclasses.dataclass(frozen=True)
class Subwords:
    """The mean row of the base's own tokens for the same text; the anchors' mean where it has none.

    Bytes that are no whole text are split without what is broken of them.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["subword_mean"] = "subword_mean"

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e]."""
        del seed
        rows = np.tile(problem.anchors.mean(axis=0), (len(problem.targets), 1))
        for row, content in zip(rows, problem.new_bytes, strict=True):
            if tokens := problem.split(content.decode("utf-8", "ignore")):
                row[:] = problem.base[tokens].mean(axis=0)
        return rows
