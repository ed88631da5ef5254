"""Masks over latents that swap one attribute of an entity, and their controls."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
import torch

from evals.ravel.config import Config
from evals.ravel.data import Known, Pairs
from evals.ravel.patched import Patched

SCORES = ("cause_score", "isolation_score", "disentanglement_score")
# The dictionary's own figures, and the controls'.
WAYS = ("", "_with_error", "_neurons", "_full_patch", "_random_mask")


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """Codes [n a] of the prompts' rows [n d], and decode(f) = offset + f atoms."""

    x: torch.Tensor
    codes: scipy.sparse.csr_array
    atoms: torch.Tensor
    offset: torch.Tensor

    def mixed(self, own: Pairs, mask: torch.Tensor, *, with_error: bool) -> torch.Tensor:
        """Rows [n d] to put in, for a mask [a]."""
        base, source = (
            torch.from_numpy(self.codes[rows].toarray()).to(self.atoms)
            for rows in (own.base, own.source)
        )
        rows = self.offset + ((1 - mask) * base + mask * source) @ self.atoms
        if with_error:
            rows = rows + self.x[own.base] - (self.offset + base @ self.atoms)
        return rows


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """A model, the prompts it knows, and what their hooks see."""

    lm: Patched
    known: Known
    seen: Any
    cfg: Config

    def of(self, index: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, Any]:
        """Tokens, places and what the hook saw, of prompts."""
        seen = None if self.seen is None else [self.seen[i] for i in index]
        return [self.known.ids[i] for i in index], self.known.place[index], seen

    def learn(
        self, space: Space, own: Pairs, rng: np.random.Generator, *, with_error: bool
    ) -> torch.Tensor:
        """The mask [a] of an attribute: 0 and 1."""
        cfg, device = self.cfg, space.atoms.device
        theta = torch.zeros(len(space.atoms), device=device, requires_grad=True)
        adam = torch.optim.Adam([theta], lr=cfg.learning_rate)
        size = cfg.batch_size
        batches = [order[at : at + size] for order in (rng.permutation(len(own))
                   for _ in range(cfg.epochs)) for at in range(0, len(own), size)]  # fmt: skip
        for part, heat in zip(batches, np.geomspace(1, 1e-4, len(batches)), strict=True):
            here = own[part]
            with torch.enable_grad():
                rows = space.mixed(here, torch.sigmoid(theta / heat), with_error=with_error)
                ids, place, seen = self.of(here.base)
                logits = self.lm.logits(ids, place, rows, seen)
                target = torch.from_numpy(here.target).to(device)
                loss = torch.nn.functional.cross_entropy(logits, target)
                # Of the mask alone: the model's weights get none.
                (theta.grad,) = torch.autograd.grad(loss, theta)
            adam.step()
        return (theta.detach() > 0).float()

    def share(self, space: Space, own: Pairs, mask: torch.Tensor, *, with_error: bool) -> float:
        """Of pairs after which the wanted answer comes."""
        right = []
        for part in np.array_split(np.arange(len(own)), -(-len(own) // 256)):
            here = own[part]
            ids, place, seen = self.of(here.base)
            rows = space.mixed(here, mask, with_error=with_error)
            most = self.cfg.answer_tokens
            right.append(self.lm.answer(ids, place, list(here.wanted), rows, seen, most=most)[0])
        return float(np.concatenate(right).mean())


def measure(
    bench: Bench, drawn: list[list[tuple[Pairs, Pairs]]], a: int, space: Space, neurons: Space,
    seed: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Figures of one attribute as cause, of one seed, with each of the others isolated."""
    rng = np.random.default_rng([seed, 1, a])
    names = bench.known.attributes
    others = [b for b in range(len(names)) if b != a]
    (cause, _), (tested, _) = drawn[a]
    away = Pairs.join([drawn[b][0][1] for b in others])
    n = min(len(cause), len(away))
    train = Pairs.join([cause[:n], away[rng.permutation(len(away))[:n]]])

    masks = {way: bench.learn(neurons if way == "_neurons" else space, train, rng,
                              with_error=way == "_with_error") for way in WAYS[:3]}  # fmt: skip
    masks["_full_patch"] = torch.ones_like(masks[""])
    fires = np.flatnonzero(np.bincount(space.codes.indices, minlength=len(masks[""])))
    masks["_random_mask"] = torch.zeros_like(masks[""])
    masks["_random_mask"][rng.permutation(fires)[: int(masks[""].sum())]] = 1

    found: dict[str, dict[str, float]] = {names[b]: {} for b in others}
    for way, mask in masks.items():
        here = neurons if way == "_neurons" else space
        told = {"with_error": way == "_with_error"}
        moved = bench.share(here, tested, mask, **told)
        for b in others:
            kept = bench.share(here, drawn[b][1][1], mask, **told)
            scores = zip(SCORES, (moved, kept, (moved + kept) / 2), strict=True)
            found[names[b]] |= {name + way: value for name, value in scores}
            found[names[b]][f"n_latents{way}"] = float(mask.sum())
    return found
