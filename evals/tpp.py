"""Targeted probe perturbation: SAEBench 0.6.0's TPP. See evals.ablation.

Of a set's classes, each with its probe: `intended` is what the class's own probe loses in accuracy
where its n latents are taken out, `unintended` what the other classes' lose, in the mean; `total`
is the difference. Figures are means over classes, sets and seeds; `_seed_std` is the deviation over
seeds.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np
from pydantic import Field

from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from evals.ablation import AblationConfig, Bench, over_seeds, result
from evals.linear_probe import balanced
from evals.results import Result
from evals.sparse_probing import DEFAULT_SETS, prepare
from evals.texts import LabelledSet


@dataclasses.dataclass(frozen=True)
class Config(AblationConfig):
    """Settings.

    Attributes:
      sets: of labelled texts, with three classes or more.
      max_classes: of a set, its most frequent.
    """

    sets: Annotated[tuple[LabelledSet, ...], Field(min_length=1)] = DEFAULT_SETS[:3]
    max_classes: Annotated[int, Field(ge=3)] = 5

    def quick(self) -> Config:
        """The texts of sparse_probing's `quick`."""
        return dataclasses.replace(self, sets=self.sets[:2], max_per_class=200, context_length=64)


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Targeted probe perturbation.

    Raises:
      UserError: the dictionary does not fit the hook; a set is not to be read, too small, or has
        fewer than three classes.
    """
    sets = [one.read() for one in cfg.sets]
    for labelled in sets:
        if len(labelled.classes) < 3:
            raise UserError(f"tpp: {labelled.name} has two classes; expected three or more")
    details = []
    for own in prepare(coder, model, cfg, sets):
        found = over_seeds(
            coder, own.pooled, cfg, f"tpp {own.name}",
            lambda bench, numbers, seed, own=own: perturb(
                bench, own.groups, own.n_train, numbers, seed
            ),
        )  # fmt: skip
        sizes = {"n_train": own.n_train, "n_test": len(own.groups[0]) - own.n_train}
        details.append({"dataset_name": own.name, "classes": own.classes} | sizes | found)
    return result("tpp", cfg, coder, details)


def perturb(
    bench: Bench, groups: list[np.ndarray], n_train: int, numbers: list[int], seed: int
) -> dict[str, float]:
    """A set's figures, of one seed: means over its classes."""
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(group) for group in groups]
    classes = range(len(groups))
    train = [balanced([group[:n_train] for group in shuffled], c, rng) for c in classes]
    test = [balanced([group[n_train:] for group in shuffled], c, rng) for c in classes]
    probes = [bench.train(train[c], test[c], seed) for c in classes]
    clean = [probes[c].right(bench.rows.x[test[c][0]], test[c][1]).mean() for c in classes]
    found: dict[str, list[float]] = {}
    for c in classes:
        effects = bench.effects(probes[c], train[c], "tpp")
        for n in numbers:
            lost = np.array([
                clean[o]
                - probes[o].right(bench.without(effects, n, test[o][0]), test[o][1]).mean()
                for o in classes
            ])  # fmt: skip
            other = np.delete(lost, c).mean()
            name = f"tpp_threshold_{n}"
            for key, value in (("total_metric", lost[c] - other), ("intended_diff_only", lost[c]),
                               ("unintended_diff_only", other)):  # fmt: skip
                found.setdefault(f"{name}_{key}", []).append(float(value))
    return {key: float(np.mean(values)) for key, values in found.items()}
