"""How far a direction must be gone to move a model's predictions by a given amount."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int

from activations.models import Model
from evals.lm import Forward

# Of a hook's median row norm: what the search begins and ends with, and how many lie between.
_RANGE, _GRID = (1e-3, 1e2), 8
# Rounds of the search behind the grid, and when KL is near enough to its goal.
_ROUNDS, _NEAR = 8, 0.02
# Positions of one forward pass.
_TOKENS = 2048


class Contexts:
    """Some contexts of one length, and what a model says behind them when a direction is added.

    KL(s) = mean over contexts of sum_t p(t) (log p(t) - log q_s(t)), p being the untouched model's
    distribution of the next token, and q_s that with x + s v in place of x at every position but
    the first, v of unit norm.

    Arguments:
      token: [p c], BOS first.
    """

    token: Int[np.ndarray, "p c"]

    def __init__(self, model: Model, hook: str, token: Int[np.ndarray, "p c"]) -> None:
        self._forward, self.token = Forward(model, hook), token
        self._x = self._forward.read(token)
        self.length = float(np.median(np.linalg.norm(self._x[:, 1:], axis=-1)))
        self._logits = self._forward.logits(token, self._x, last=True)[:, 0].double()  # [p v]

    def _with(self, direction: np.ndarray, strengths: np.ndarray) -> torch.Tensor:
        """Logits [t p v] with each strength."""
        found = []
        p, c, _ = self._x.shape
        size = max(1, _TOKENS // (p * c))
        step = np.zeros((c, 1))
        step[1:] = 1
        for at in range(0, len(strengths), size):
            part = strengths[at : at + size, None, None, None] * step * direction
            x = (self._x[None] + part).reshape(-1, c, self._x.shape[-1])  # [t p c d] -> [tp c d]
            token = np.tile(self.token, (len(part), 1))
            logits = self._forward.logits(token, x, last=True)[:, 0]
            found.append(logits.reshape(len(part), p, -1))
        return torch.cat(found).double()

    def kl(
        self, direction: Float[np.ndarray, " d"], strengths: Float[np.ndarray, " t"]
    ) -> Float[np.ndarray, " t"]:
        """KL(s) in nats; infinite where a strength breaks the model."""
        q = torch.log_softmax(self._with(direction, strengths), -1)
        p = torch.log_softmax(self._logits, -1)
        kl = (p.exp() * (p - q)).sum(-1).mean(-1).cpu().numpy()
        return np.where(np.isfinite(kl), kl, np.inf)

    def logit_shift(
        self,
        direction: Float[np.ndarray, " d"],
        strengths: Float[np.ndarray, " t"],
        tokens: Int[np.ndarray, " n"],
    ) -> Float[np.ndarray, " t"]:
        """By how much the logits of some tokens rise above the mean of all, over the contexts."""
        rise = self._with(direction, strengths) - self._logits  # [t p v]
        shift = rise[..., torch.from_numpy(tokens).to(rise.device)].mean(-1) - rise.mean(-1)
        return shift.mean(-1).cpu().numpy()

    def matched(
        self, direction: Float[np.ndarray, " d"], targets: Float[np.ndarray, " t"]
    ) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """The smallest strengths with these KL, and the KL that they have; NaN where none has it.

        A grid brackets each target, and false position of log KL over log s, of all targets at
        once, comes to 2 % of the target: KL grows about as s^2.

        Departs from SNMF (Shafran et al. 2025), whose tolerance of 0.01 nats is coarse beside its
        least target of 0.025, and whose one context is "I think that".
        """
        grid = self.length * np.geomspace(*_RANGE, _GRID)
        seen = self.kl(direction, grid)
        above = seen[None] >= targets[:, None]  # [t g]
        reached = above.any(axis=1) & ~above[:, 0]
        upper = np.where(reached, above.argmax(axis=1), 1)
        low, high = (np.log(np.stack([grid[of], _positive(seen[of])])) for of in (upper - 1, upper))
        best, got = np.full(len(targets), np.nan), np.full(len(targets), np.nan)
        for _ in range(_ROUNDS):
            share = (np.log(targets) - low[1]) / np.maximum(high[1] - low[1], 1e-12)
            # Neither end may stay for ever, and an infinite one tells nothing.
            share = np.where(np.isfinite(high[1]), np.clip(share, 0.1, 0.9), 0.5)
            middle = low[0] + share * (high[0] - low[0])
            kl = self.kl(direction, np.exp(middle))
            nearer = reached & ~(np.abs(kl - targets) >= np.abs(got - targets))
            best, got = np.where(nearer, np.exp(middle), best), np.where(nearer, kl, got)
            if (np.abs(got - targets) <= _NEAR * targets)[reached].all():
                break
            now = np.stack([middle, np.log(_positive(kl))])
            low, high = np.where(kl < targets, now, low), np.where(kl < targets, high, now)
        finite = np.isfinite(got)
        return np.where(finite, best, np.nan), np.where(finite, got, np.nan)


def _positive(kl: np.ndarray) -> np.ndarray:
    """Rounding may leave a KL of 0 below it."""
    return np.maximum(kl, 1e-12)
