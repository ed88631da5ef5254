"""Features that tell texts from others."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.stats
from jaxtyping import Bool, Float

from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from evals import cache
from evals.pooled import pool

# Texts of each side, below which half of them chooses nothing.
_LEAST = 4


@dataclasses.dataclass(frozen=True)
class Found:
    """A feature, and how well it tells the two sides apart.

    Attributes:
      auroc: on the texts that it was not chosen by; above 0.5 where it is greater on positive ones.
      chosen_auroc: on those that it was chosen by, which flatter it.
    """

    feature: int
    auroc: float
    chosen_auroc: float


def find_features(
    coder: Coder, model: Model, hook: str, positive: list[str], negative: list[str], *,
    n: int = 10, context_length: int = 128, seed: int = 0,
) -> list[Found]:  # fmt: skip
    """The features whose mean code over a text best tells positive texts from negative ones.

    Half of the texts of each side, drawn by the seed, choose the n features with the greatest
    |AUROC - 0.5|; the other half measures them. Features that are chosen are in the order of the
    choice.

    Raises:
      UserError: a side has fewer than four texts; a text has no token.
    """
    if min(len(positive), len(negative)) < _LEAST:
        raise UserError(
            f"find_features: got {len(positive)} positive and {len(negative)} negative texts, "
            f"expected at least {_LEAST} of each: half choose, the others measure"
        )
    texts = [*positive, *negative]
    codes = pool(coder, cache.read(model, hook, texts, length=context_length)).codes
    y = np.arange(len(texts)) < len(positive)
    rng = np.random.default_rng([0x46494E44, seed])
    chooses = np.zeros(len(texts), bool)
    for side in (np.flatnonzero(y), np.flatnonzero(~y)):
        chooses[rng.permutation(side)[: len(side) // 2]] = True
    alive = np.flatnonzero(abs(codes).sum(axis=0))
    dense = codes[:, alive].toarray()
    chosen = auroc(dense[chooses], y[chooses])
    best = np.argsort(-np.abs(chosen - 0.5), kind="stable")[:n]
    held_out = auroc(dense[~chooses][:, best], y[~chooses])
    return [
        Found(int(alive[i]), float(own), float(chosen[i]))
        for i, own in zip(best, held_out, strict=True)
    ]


def auroc(values: Float[np.ndarray, "n m"], y: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """P(a positive row is above a negative one) + P(they are equal) / 2, of each column."""
    ranks = scipy.stats.rankdata(values, axis=0)
    n, p = len(y), int(y.sum())
    return (ranks[y].sum(axis=0) - p * (p + 1) / 2) / (p * (n - p))
