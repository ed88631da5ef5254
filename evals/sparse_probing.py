"""Sparse probing: how few latents tell the class of a text. SAEBench 0.6.0's `sparse_probing`.

A text is the mean of its codes over its tokens (not over special ones), of at most 128. Each class
stands against as many texts of the others. Two kinds of probe, on the codes (`sae_...`) and, as the
baseline, on the model's own activations (`llm_...`):

- top k: a logistic regression on the k features with the greatest |mean difference|;
- full: a linear probe on all of them, by AdamW (evals.linear_probe).

Accuracies on test texts are means over classes, data sets and seeds; each seed draws split,
negatives and starts anew, and `_seed_std` is the deviation of a figure over the seeds.

Where this departs from SAEBench: a full probe's epoch is chosen by a fifth of the training texts;
the figure of SAEBench, which lets the test texts choose, stands beside it as `_saebench060`. The
data sets are the user's, or sae-probes'. Codes are over atoms of unit norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from activations.models import Model
from activations.terminal import progress
from dictlearn.dictionary import Coder
from evals import cache
from evals.linear_probe import Rows, adamw, balanced, dense, top_k_accuracy
from evals.lm import check_hook
from evals.pooled import Pooled, pool
from evals.results import Metrics, Result
from evals.texts import Labelled, LabelledSet, SaeProbes

DEFAULT_SETS = tuple(
    SaeProbes("sae-probes", name)
    for name in ("97_news_class", "103_it_tick", "99_sci_cat", "92_glue_sst2")
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; numbers that are not told are SAEBench's.

    Attributes:
      hook: where activations are read.
      sets: of labelled texts.
      max_classes: of a set, its most frequent.
      train_per_class, test_per_class: texts; left out: what the set has, 4 to 1, up to
        max_per_class.
      context_length: tokens of a text, BOS included.
      k_values: numbers of features.
      epochs, batch_size, learning_rate, patience: of full probes.
      seed, n_seeds: the texts are drawn by the first, seed to seed + n_seeds - 1 do the rest.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    sets: Annotated[tuple[LabelledSet, ...], Field(min_length=1)] = DEFAULT_SETS
    max_classes: Annotated[int, Field(ge=2)] = 5
    train_per_class: Annotated[int, Field(ge=5)] | None = None
    test_per_class: Annotated[int, Field(ge=1)] | None = None
    max_per_class: Annotated[int, Field(ge=5)] = 2500
    context_length: Annotated[int, Field(ge=2)] = 128
    k_values: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 5)
    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 250
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-2
    patience: Annotated[int, Field(ge=1)] = 10
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    n_seeds: Annotated[int, Field(ge=1)] = 3

    def quick(self) -> Config:
        """Two sets, 200 texts a class, of 64 tokens."""
        return dataclasses.replace(self, sets=self.sets[:2], max_per_class=200, context_length=64)


@dataclasses.dataclass(frozen=True, eq=False)
class Rowed:
    """A set's texts as rows: `groups` are the rows of each class, of which n_train are to train."""

    name: str
    classes: list[str]
    groups: list[np.ndarray]
    n_train: int
    pooled: Pooled


def prepare(coder: Coder, model: Model, cfg: Any, sets: list[Labelled]) -> Iterator[Rowed]:
    """Each set of a family's settings, one after another; the texts are the same for a seed.

    Raises:
      UserError: the dictionary does not fit the hook; a set is too small.
    """
    check_hook(coder, model, cfg.hook)
    drawn = []
    for labelled in sets:  # all of them, before the model runs for minutes
        classes = labelled.classes[: cfg.max_classes]
        groups = [np.flatnonzero(labelled.label == name) for name in classes]
        chosen, n_train = labelled.draw(
            groups, cfg.train_per_class, cfg.test_per_class, cfg.seed, most=cfg.max_per_class
        )
        drawn.append((labelled, classes, chosen, n_train))
    for labelled, classes, chosen, n_train in drawn:
        texts = [labelled.text[i] for group in chosen for i in group]
        blocks = cache.read(model, cfg.hook, texts, length=cfg.context_length)
        rows = np.arange(len(texts)).reshape(len(chosen), -1)
        yield Rowed(labelled.name, classes, list(rows), n_train, pool(coder, blocks))


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Probe a dictionary.

    Raises:
      UserError: as `prepare`; a set is not to be read.
    """
    details, by_class = [], {}
    for own in prepare(coder, model, cfg, [one.read() for one in cfg.sets]):
        found = [measure(own, cfg, seed) for seed in range(cfg.seed, cfg.seed + cfg.n_seeds)]
        by_class[own.name] = dict(zip(own.classes, _by_class(found), strict=True))
        details.append(
            {"dataset_name": own.name, "n_classes": len(own.classes), "n_train": own.n_train,
             "n_test": len(own.groups[0]) - own.n_train}
            | spread([{key: float(np.mean(of)) for key, of in one.items()} for one in found])
        )  # fmt: skip
    return Result(
        "sparse_probing", dataclasses.asdict(cfg), categories(details), details,
        {"by_class": by_class},
    )  # fmt: skip


def spread(by_seed: list[dict[str, float]]) -> dict[str, float | None]:
    """The mean of each figure over the seeds, and its deviation (n - 1); None of too few."""
    found: dict[str, float | None] = {}
    for key in by_seed[0]:
        values = [one[key] for one in by_seed if not np.isnan(one[key])]
        found[key] = float(np.mean(values)) if values else None
        found[f"{key}_seed_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found


def categories(details: list[dict[str, Any]]) -> Metrics:
    """Means over data sets, by the figures' first word. Deviations are of that mean: root mean
    square over the sets, divided by the root of their number."""
    found: Metrics = {}
    for key in details[0]:
        category = key.split("_")[0]
        if category not in ("llm", "sae"):
            continue
        values = [row[key] for row in details]
        told = None
        if None not in values:
            told = float(np.mean(values))
            if key.endswith("_seed_std"):
                told = float(np.sqrt(np.sum(np.square(values))) / len(values))
        found.setdefault(category, {})[key] = told
    return found


def _by_class(found: list[dict[str, list[float]]]) -> list[dict[str, float]]:
    """Each class's figures, as means over the seeds."""
    n = len(next(iter(found[0].values())))
    return [{key: float(np.mean([one[key][c] for one in found])) for key in found[0]}
            for c in range(n)]  # fmt: skip


def measure(own: Rowed, cfg: Config, seed: int) -> dict[str, list[float]]:
    """Test accuracies of each class's probes, of one seed."""
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(group) for group in own.groups]
    train = [group[: own.n_train] for group in shuffled]
    test = [group[own.n_train :] for group in shuffled]
    found: dict[str, list[float]] = {}
    for c in progress(iterable=range(len(own.classes)), desc=f"{own.name}, seed {seed}", delay=3):
        seen, y = balanced(train, c, rng)
        unseen, truth = balanced(test, c, rng)
        for prefix, x in (("llm", own.pooled.x), ("sae", own.pooled.codes)):
            halves = (x[seen], y), (x[unseen], truth)
            for key, value in _accuracies(*halves, cfg, seed).items():
                found.setdefault(f"{prefix}_{key}", []).append(value)
    return found


def _accuracies(
    train: tuple[Rows, np.ndarray], test: tuple[Rows, np.ndarray], cfg: Config, seed: int
) -> dict[str, float]:
    """Of the full probes, and of those on few features."""
    settings = {
        "learning_rate": cfg.learning_rate, "batch_size": cfg.batch_size, "epochs": cfg.epochs,
        "patience": cfg.patience, "seed": seed,
    }  # fmt: skip
    (x, y), (unseen, truth) = ((dense(rows), labels) for rows, labels in (train, test))
    fifth = -(-len(x) // 5)  # they stand in random order
    probe = adamw(x[fifth:], y[fifth:], (x[:fifth], y[:fifth]), **settings)
    found = {
        "test_accuracy": float(probe.right(unseen, truth).mean()),
        "test_accuracy_saebench060": adamw(x, y, (unseen, truth), **settings).accuracy,
    }
    for k in cfg.k_values:
        found[f"top_{k}_test_accuracy"] = top_k_accuracy(train, test, k)
    return found
