"""What methods make up for a transplant, and what they are called in results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dictlearn.codes import SparseCodes
from dictlearn.transplant.config import Method
from dictlearn.transplant.methods.omp import OMPMixing
from dictlearn.transplant.problem import Problem


class Rows:
    """What methods make up; a pursuit serves all that differ from it in k alone."""

    def __init__(self, problems: list[Problem], methods: tuple[Method, ...], seed: int) -> None:
        self.problems = problems
        self._methods, self._seed = methods, seed
        self._codes: dict[OMPMixing, list[SparseCodes]] = {}

    def made(self, method: Method) -> list[np.ndarray]:
        """A method's rows for each problem."""
        if not isinstance(method, OMPMixing):
            return [method.rows(problem, self._seed) for problem in self.problems]
        alike = [
            other.k
            for other in self._methods
            if isinstance(other, OMPMixing) and dataclasses.replace(other, k=method.k) == method
        ]
        longest = dataclasses.replace(method, k=max(alike, default=method.k))
        if longest not in self._codes:
            self._codes[longest] = [longest.codes(problem) for problem in self.problems]
        return [
            method.mix(problem, codes if method == longest else method.cut(problem, codes))
            for problem, codes in zip(self.problems, self._codes[longest], strict=True)
        ]


def label(method: Method) -> str:
    """A method's name, with what is not as usual."""
    return " ".join([method.name, *_unusual(method)])


def _unusual(settings: Any) -> Iterator[str]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _unusual(value)
        elif field.name == "k" or value != field.default:
            told = ",".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"{field.name}={told}"
