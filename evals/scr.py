"""Spurious correlation removal: SAEBench 0.6.0's SCR. See evals.ablation.

Of two labels A and B, a probe is trained on texts where they always go together. On texts where
they do not, tested for A with B's latents taken out (dir1), or for B without A's (dir2),

    score = (ablated - biased) / (clean - biased),

clean being the accuracy of a probe that was trained without the correlation. `scr_metric` is of the
direction with the lower biased accuracy. Figures are means over pairs and seeds; `_seed_std` is the
deviation over seeds. Where clean - biased < 0.001 a score is left out, and SAEBench's is 0; where
both directions are biased alike the metric is their mean, and SAEBench's is missing.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from evals import cache
from evals.ablation import AblationConfig, Bench, over_seeds, result
from evals.linear_probe import LinearProbe
from evals.lm import check_hook
from evals.pooled import pool
from evals.results import Result
from evals.texts import Labelled, LabelledSet, Occupations

_SMALL = 1e-3


@dataclasses.dataclass(frozen=True)
class Config(AblationConfig):
    """Settings; `..._per_class` are of a pair's labels, in even numbers.

    Attributes:
      sets: with a second label, whose two most frequent values are taken; biographies made by
        program if left out (evals.occupations).
      pairs: of labels, in each set; left out: its labels two by two, in their order.
      max_pairs: of these.
    """

    sets: Annotated[tuple[LabelledSet, ...], Field(min_length=1)] = (Occupations("occupations"),)
    pairs: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)] | None = None
    max_pairs: Annotated[int, Field(ge=1)] = 4

    def quick(self) -> Config:
        """One pair, with 200 texts a class, of 64 tokens."""
        return dataclasses.replace(
            self, sets=self.sets[:1], max_pairs=1, max_per_class=200, context_length=64
        )


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Spurious correlation removal.

    Raises:
      UserError: the dictionary does not fit the hook; a set is not to be read, has no second label,
        or too few texts of one of the four combinations.
    """
    check_hook(coder, model, cfg.hook)
    drawn = [own for one in cfg.sets for own in pairs_of(one.read(), cfg)]
    details = []
    for own in drawn:
        rows = pool(coder, cache.read(model, cfg.hook, own.text, length=cfg.context_length))
        found = over_seeds(
            coder, rows, cfg, f"scr {own.name}",
            lambda bench, numbers, seed, own=own: remove(
                bench, own.corners, own.n_train, numbers, seed
            ),
        )  # fmt: skip
        n_test = len(own.corners["+-"]) - own.n_train
        sizes = {"n_train": 2 * own.n_train, "n_test": 2 * n_test}
        details.append({"dataset_name": own.name} | sizes | found)
    return result("scr", cfg, coder, details)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Texts with two labels.

    Attributes:
      corners: indices of texts by their two labels, "++", "+-", "-+" and "--"; of the first and the
        last twice as many, for the biased probe.
      n_train: how many of each, and twice as many of these two, train.
    """

    name: str
    text: list[str]
    corners: dict[str, np.ndarray]
    n_train: int


def copies(corner: str) -> int:
    """How many times as many texts there are of a corner as of "+-"."""
    return 2 if corner[0] == corner[1] else 1


def pairs_of(labelled: Labelled, cfg: Config) -> list[Pair]:
    """The pairs of a set."""
    if labelled.second is None:
        raise UserError(
            f"scr: {labelled.name} has no second label; name its field (second = ...), or another "
            "of sae-probes' sets on the same texts (other = ...)"
        )
    names, count = np.unique(labelled.second, return_counts=True)
    plus, minus = sorted(map(str, names[np.argsort(-count, kind="stable")[:2]]))
    classes = labelled.classes
    pairs = cfg.pairs or tuple(zip(classes[::2], classes[1::2], strict=False))
    found = []
    for a, b in pairs[: cfg.max_pairs]:
        all_ = {
            s + t: np.flatnonzero((labelled.label == x) & (labelled.second == y))
            for s, x in (("+", a), ("-", b))
            for t, y in (("+", plus), ("-", minus))
        }
        name = f"{labelled.name}: {a} / {b}, {plus} / {minus}"
        halved = [group[: len(group) // copies(key)] for key, group in all_.items()]
        half = {"n_train": cfg.train_per_class, "n_test": cfg.test_per_class}
        told = {key: None if n is None else n // 2 for key, n in half.items()}
        try:
            drawn, n_train = labelled.draw(
                halved, **told, seed=cfg.seed, most=cfg.max_per_class // 2
            )
        except UserError as error:
            sizes = ", ".join(f"{key} {len(group)}" for key, group in all_.items())
            raise UserError(f"scr: {name} ({sizes}): {error}") from None
        rng = np.random.default_rng(cfg.seed)
        each = len(drawn[0])
        chosen = {key: rng.permutation(group)[: each * copies(key)] for key, group in all_.items()}
        at = np.cumsum([0, *(len(group) for group in chosen.values())])
        corners = {key: np.arange(*at[i : i + 2]) for i, key in enumerate(chosen)}
        text = [labelled.text[i] for group in chosen.values() for i in group]
        found.append(Pair(name, text, corners, n_train))
    return found


def remove(
    bench: Bench, corners: dict[str, np.ndarray], n_train: int, numbers: list[int], seed: int
) -> dict[str, float]:
    """A pair's figures, of one seed; NaN where a score is left out."""
    rng = np.random.default_rng(seed)
    n_test = len(corners["+-"]) - n_train
    train_rows, test_rows = {}, {}
    for key, group in corners.items():
        size = n_train * copies(key)
        train_rows[key], test_rows[key] = np.split(rng.permutation(group), [size])

    def texts(rows: dict[str, np.ndarray], plus: list[str], minus: list[str], n: int) -> Any:
        groups = [np.concatenate([rows[key][:n] for key in of]) for of in (plus, minus)]
        index = np.concatenate(groups)
        order = rng.permutation(len(index))
        return index[order], (np.arange(len(index)) < len(groups[0]))[order]

    concepts = {"a": (["++", "+-"], ["-+", "--"]), "b": (["++", "-+"], ["+-", "--"])}
    train = {key: texts(train_rows, *of, n_train) for key, of in concepts.items()}
    test = {key: texts(test_rows, *of, n_test) for key, of in concepts.items()}
    # The rows of the corners that always go together, and no others.
    biased_train = texts(train_rows, ["++"], ["--"], 2 * n_train)
    biased_test = texts(test_rows, ["++"], ["--"], 2 * n_test)
    own = {key: bench.train(train[key], test[key], seed) for key in concepts}
    biased = bench.train(biased_train, biased_test, seed)

    def accuracy(probe: LinearProbe, key: str, effects: np.ndarray | None, n: int = 0) -> float:
        index, y = test[key]
        x = bench.rows.x[index] if effects is None else bench.without(effects, n, index)
        return float(probe.right(x, y).mean())

    before = {key: accuracy(biased, key, None) for key in concepts}
    found = {}
    for n_latents in numbers:
        scores = {}
        for direction, tested, ablated in (("dir1", "a", "b"), ("dir2", "b", "a")):
            effects = bench.effects(own[ablated], train[ablated], "scr")
            gap = accuracy(own[tested], tested, None) - before[tested]
            gain = accuracy(biased, tested, effects, n_latents) - before[tested]
            small = 0.0 if bench.saebench else float("nan")
            scores[direction] = gain / gap if gap >= _SMALL else small
            found[f"scr_{direction}_threshold_{n_latents}"] = scores[direction]
        if before["a"] == before["b"]:
            both = np.mean(list(scores.values()))
            metric = float("nan") if bench.saebench else float(both)
        else:
            metric = scores["dir1" if before["a"] < before["b"] else "dir2"]
        found[f"scr_metric_threshold_{n_latents}"] = metric
    return found
