"""RAVEL: do some latents hold one attribute of an entity and no other? SAEBench 0.6.0's.

For each attribute A a mask over latents is learned. With codes f of the hook's row x at the last
token of the entity, in a base and in a source prompt, which ask the same of two entities,

    x <- decode((1 - s) f_base + s f_source),    s = sigmoid(theta / T),  theta = 0 at first,

minimises the cross-entropy of the answer's first token: the source's where the prompts ask for A
(cause), the base's where they ask for another attribute (isolation), as many pairs of each. Adam;
T falls from 1 to 1e-4 by a constant factor a step. Then s = (theta > 0), and on other pairs

    cause_score = share of greedy texts that start with the source's answer,
    isolation_score = the same with the base's, where they ask for another attribute,
    disentanglement_score = the mean of both,

each a mean over ordered pairs of attributes; the details tell every pair. `_with_error` keeps the
error, x <- x_base + (s (f_source - f_base)) W, with a mask of its own; it is our own figure.
Controls: `_neurons`, a mask learned on the hook's own coordinates (f = x); `_full_patch`, s = 1;
`_random_mask`, as many random latents as were learned, of those that fire in these prompts.
`_seed_std` is the deviation over seeds (n - 1), each of which draws the split, the pairs and their
order.

A mask of nothing and one of everything have a disentanglement_score of 0.5, the floor to compare
with. Figures depend on `batch_size`, which stands in the settings.

Where this departs from SAEBench 0.6.0:

- The split is by entities: none of them is in both halves. Theirs is by pairs.
- The two answers of a pair differ in their first token. Theirs may share it, and a cause pair is
  then one of isolation, which nothing can fail.
- The target is what the model says of the source's entity behind the base's own template. Theirs is
  its token behind the source's, which may differ in a space.
- Smaller last batches count. An entity must be known in every attribute. An attribute that the
  model does not know (`min_accuracy`) is left out; with fewer than two left, figures are None.

Source: SAEBench 0.6.0, evals/ravel; Huang et al. (arXiv 2402.17700); Karvonen et al. (2503.09532).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
import torch

from activations.models import Model
from activations.terminal import progress
from dictlearn.dictionary import Coder
from evals.coding import coded, frame
from evals.lm import check_width
from evals.ravel.config import Config
from evals.ravel.data import Known, Pairs, ask, pairs, read
from evals.ravel.masks import SCORES, WAYS, Bench, Space, measure
from evals.ravel.patched import Patched
from evals.results import Result
from evals.sparse_probing import spread

FAMILY = "ravel"
# Of entities.
TRAIN_SHARE = 0.7
# Pairs in each half, without which an attribute is left out.
LEAST_PAIRS = 8


def task_accuracy(right: np.ndarray) -> float:
    """Whether a model knows an attribute, from what it answered rightly [t e], best template first.

    Templates are halved, every other one. Of entities that one half has right at least once, the
    share of right answers by the other half; the mean of both ways. The answers for which an entity
    was chosen are thus not those that judge: guessing stays at its rate.

    Arguments:
      right: 1 or 0; NaN where nothing was asked.
    """
    halves = right[::2], right[1::2]
    shares = []
    for one, two in (halves, halves[::-1]):
        told = two[:, (one == 1).any(axis=0)]
        shares.append(np.nansum(told) / max(np.isfinite(told).sum(), 1))
    return float(np.mean(shares))


def select(known: Known, cfg: Config) -> tuple[Known, list[dict[str, Any]], str | None]:
    """The attributes, templates and entities that are kept, and a table of each attribute.

    Returns:
      These, and why there can be no figures, if so.
    """
    best = np.argsort(-known.right.mean(axis=2), axis=1, kind="stable")[:, : cfg.n_templates]
    table, kept = [], []
    for a, name in enumerate(known.attributes):
        there = known.prompt[a, best[a]] >= 0
        right = np.where(there, known.right[a, best[a]], np.nan)[there.any(axis=1)]
        accuracy = task_accuracy(right)
        commonest = np.unique(known.answers[a], return_counts=True)[1].max() / right.shape[1]
        row = {
            "attribute": name,
            "task_accuracy": accuracy,
            "all_accuracy": float(np.nanmean(right)),
            "commonest_answer": float(commonest),
        }
        if accuracy < cfg.min_accuracy:
            row["left_out"] = (
                f"the model answers {accuracy:.3f} of its prompts rightly, expected "
                f"{cfg.min_accuracy} (min_accuracy)"
            )
        else:
            kept.append(a)
        table.append(row)
    told = ", ".join(f"{row['attribute']} {row['task_accuracy']:.3f}" for row in table)
    if len(kept) < 2:
        return known, table, (
            f"the model answers fewer than two attributes well enough: {told}; expected "
            f"{cfg.min_accuracy} (min_accuracy)"
        )  # fmt: skip
    right = np.take_along_axis(known.right[kept], best[kept][:, :, None], axis=1)  # [a t e]
    each = np.flatnonzero(right.any(axis=1).all(axis=0))
    most = each[np.argsort(-right.sum(axis=(0, 1))[each], kind="stable")][: cfg.n_entities]
    if len(most) < cfg.min_entities:
        return known, table, (
            f"the model knows {len(most)} of {len(known.entities)} entities in every attribute, "
            f"expected {cfg.min_entities} (min_entities); task accuracy: {told}"
        )  # fmt: skip
    return known.take(kept, best[kept], most), table, None


def draw(known: Known, cfg: Config, seed: int) -> list[list[tuple[Pairs, Pairs]]]:
    """Split the entities, and pair the prompts of each half.

    Returns:
      Of each attribute, of each half (to train, to test): the pairs as cause, and as isolation.
    """
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(known.entities))
    halves = np.split(order, [int(TRAIN_SHARE * len(order))])
    sizes = round(TRAIN_SHARE * cfg.n_pairs), round((1 - TRAIN_SHARE) * cfg.n_pairs)
    return [[pairs(known, a, part, most, rng) for part, most in zip(halves, sizes, strict=True)]
            for a in range(len(known.attributes))]  # fmt: skip


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Cause and isolation of a dictionary's latents.

    A model that does not know the entities gives figures that are None, with its accuracy.

    Raises:
      UserError: the files are not to be read (`evals.ravel.data.read`), or not those of `sha256`;
        the model has no such hook; the dictionary does not fit it.
    """
    cfg = cfg.pinned()
    facts = read(cfg.data, cfg.entity, cfg.attributes)
    lm = Patched(model, cfg.hook)
    check_width(coder, cfg.hook, lm.width)
    asked = ask(
        lm, facts, n_entities=cfg.n_candidates, n_templates=cfg.n_tried, most=cfg.answer_tokens,
        seed=cfg.seed,
    )  # fmt: skip
    known, table, reason = select(asked, cfg)
    if reason is None:
        known, reason = with_pairs(known, cfg, table)
    keys = [score + way for way in WAYS for score in SCORES]
    metrics: dict[str, float | None] = {
        key + kind: None for key in keys for kind in ("", "_seed_std")
    }
    details = []
    if reason is None:
        by_pair = figures(coder, lm, known, cfg)
        details = [{"cause_attribute": a, "isolated_attribute": b} | spread(own)
                   for (a, b), own in by_pair.items()]  # fmt: skip
        by_seed = [{key: float(np.mean([one[key] for one in own])) for key in keys}
                   for own in zip(*by_pair.values(), strict=True)]  # fmt: skip
        metrics = spread(by_seed)
    return Result(
        FAMILY, dataclasses.asdict(cfg), {"ravel": metrics}, details,
        {"attributes": table, "prompts": len(asked.ids),
         "answered_rightly": float(asked.right[asked.prompt >= 0].mean()),
         "entities": [] if reason else known.entities},
        {f"ravel.{key}": reason or "one seed has no deviation"
         for key, value in metrics.items() if value is None},
    )  # fmt: skip


def with_pairs(known: Known, cfg: Config, table: list[dict[str, Any]]) -> tuple[Known, str | None]:
    """Without attributes that have too few pairs, which the table then tells; or why there are no
    figures."""
    drawn = [draw(known, cfg, seed) for seed in cfg.seeds]
    rows, kept = {row["attribute"]: row for row in table}, []
    for a, name in enumerate(known.attributes):
        least = min(len(cause) for own in drawn for cause, _ in own[a])
        rows[name] |= {"pairs": least, "answers": len(np.unique(known.answers[a]))}
        if least < LEAST_PAIRS:
            rows[name]["left_out"] = (
                f"{least} pairs of known answers that differ in their first token, expected "
                f"{LEAST_PAIRS} in each half"
            )
        else:
            kept.append(a)
    if len(kept) < 2:
        told = "; ".join(f"{row['attribute']} (task accuracy {row['task_accuracy']:.3f}): "
                         f"{row['left_out']}" for row in table if "left_out" in row)  # fmt: skip
        return known, f"fewer than two attributes can be paired: {told}"
    every = np.tile(np.arange(known.right.shape[1]), (len(kept), 1))
    return known.take(kept, every, np.arange(len(known.entities))), None


def figures(
    coder: Coder, lm: Patched, known: Known, cfg: Config
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Of each ordered pair of attributes, each seed's."""
    x, seen = lm.read(known.ids, known.place)
    rows = torch.from_numpy(x).to(lm.device)
    atoms, offset = (torch.tensor(part).to(rows) for part in frame(coder))
    space = Space(rows, coded(coder, x)[0], atoms, offset)
    eye = torch.eye(lm.width).to(rows)
    neurons = Space(rows, scipy.sparse.csr_array(x), eye, torch.zeros_like(eye[0]))
    bench = Bench(lm, known, seen, cfg)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    total = cfg.n_seeds * len(known.attributes)
    with progress(total=total, desc="ravel: masks", delay=3) as bar:
        for seed in cfg.seeds:
            drawn = draw(known, cfg, seed)
            for a, name in enumerate(known.attributes):
                for other, own in measure(bench, drawn, a, space, neurons, seed).items():
                    found.setdefault((name, other), []).append(own)
                bar.update(1)
    return found
