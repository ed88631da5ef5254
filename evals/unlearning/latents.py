"""Which latents are clamped, and which random ones they have to be better than."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np

from evals.unlearning.bank import Change, Firing

# Ranks of forget density, on both sides, that a random latent may be away.
_NEAR = 20


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is tried: n latents of a threshold, clamped to -multiplier."""

    threshold: float
    n: int
    multiplier: float
    change: Change


def choose(
    forget: Firing, retain: Firing, threshold: float, n: int, *, positive: bool
) -> np.ndarray:
    """The n latents of greatest forget density, of those that fire there, and on less than
    `threshold` of the retain corpus."""
    dense, held = (one.positive if positive else one.fires for one in (forget, retain))
    order = np.argsort(-dense, kind="stable")
    return order[(held[order] < threshold) & (dense[order] > 0)][:n]


def settings(
    forget: Firing, retain: Firing, thresholds: Iterable[float], counts: Iterable[int],
    multipliers: tuple[float, ...], *, positive: bool,
) -> list[Setting]:  # fmt: skip
    """All in which a latent is clamped; the same latents are tried once."""
    found, seen = [], set[tuple[int, ...]]()
    for threshold, n in itertools.product(thresholds, counts):
        latents = choose(forget, retain, threshold, n, positive=positive)
        if len(latents) == 0 or tuple(latents.tolist()) in seen:
            continue
        seen.add(tuple(latents.tolist()))
        sign = np.ones(len(latents)) if positive else forget.sign(latents)
        for multiplier in multipliers:
            change = Change(latents, -multiplier * sign, positive)
            found.append(Setting(threshold, n, multiplier, change))
    return found


def random_change(forget: Firing, setting: Setting, *, seed: int) -> Change | None:
    """A setting with other latents: for each, one that is drawn from those of the nearest ranks of
    forget density; None where too few fire on the forget corpus."""
    rng = np.random.default_rng(seed)
    order = np.argsort(-forget.fires, kind="stable")
    order = order[forget.fires[order] > 0]
    rank = {int(j): i for i, j in enumerate(order)}
    free = order[~np.isin(order, setting.change.latents)]
    found = []
    for latent in setting.change.latents:
        if len(free) == 0:
            return None
        away = np.array([abs(rank[int(j)] - rank[int(latent)]) for j in free])
        near = free[np.argsort(away, kind="stable")[: 2 * _NEAR]]
        found.append(int(rng.choice(near)))
        free = free[free != found[-1]]
    latents = np.array(found)
    return Change(latents, -setting.multiplier * forget.sign(latents))
