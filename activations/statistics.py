"""Mean, variance and norms of rows in one pass over any number of blocks, in float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable

import numpy as np

# A dimension that holds more than this share of the variance is a carrier.
CARRIER_SHARE = 0.1
# A row whose norm is over so many medians is massive.
MASSIVE_NORMS = 5
# Rows that are worked on at once: as float64 they stay in the processor's cache.
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of rows x [n d]: count, mean [d], sum of squared deviations [d], norms [n] (in parts)."""

    count: int
    mean: np.ndarray
    deviations: np.ndarray
    norms: tuple[np.ndarray, ...]

    @staticmethod
    def of(x: np.ndarray) -> Moments:
        """Of one block of rows [n d], in any floating type."""
        norms = np.empty(len(x), np.float32)
        moments = Moments(0, np.zeros(x.shape[1]), np.zeros(x.shape[1]), ())
        # Each part about its own mean: neither a great mean nor a massive row cancels anything.
        for start in range(0, len(x), _BLOCK):
            y = x[start : start + _BLOCK].astype(np.float64)
            norms[start : start + _BLOCK] = np.sqrt(np.einsum("nd,nd->n", y, y))
            mean = y.mean(axis=0)
            y -= mean
            moments += Moments(len(y), mean, np.einsum("nd,nd->d", y, y), ())
        return dataclasses.replace(moments, norms=(norms,))

    @staticmethod
    def over(blocks: Iterable[np.ndarray]) -> Moments:
        """Of all blocks of rows together, merged in their order."""
        parts, groups = map(Moments.of, blocks), []
        while group := list(itertools.islice(parts, 1024)):  # norms are joined once a group
            groups.append(functools.reduce(operator.add, group))
        return functools.reduce(operator.add, groups)

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of rows. Chan, Golub and LeVeque (1979), for parts of any size."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.deviations + other.deviations + delta**2 * (self.count * other.count / count),
            (*self.norms, *other.norms),
        )

    @property
    def variance(self) -> np.ndarray:
        """Of each dimension [d]."""
        return self.deviations / self.count

    @property
    def scale(self) -> float:
        """Root mean square of the centred rows' entries."""
        return float(np.sqrt(self.variance.mean()))

    @property
    def carriers(self) -> np.ndarray:
        """Which dimensions [d] hold more than a tenth of the variance each."""
        return self.deviations > CARRIER_SHARE * self.deviations.sum()

    @property
    def norm_limit(self) -> float:
        """Rows of a greater norm are massive."""
        return float(MASSIVE_NORMS * np.median(np.concatenate(self.norms)))
