"""Sparse probing at the last token: the protocol of `sae-probes`, as SAEBench 0.6.0 wraps it.

A text is the code of its last token (of at most 1024, cut at the beginning). One class stands
against as many texts of the others; of m texts, min(m - 100, 1024) train the probes and the rest
test them. The k latents with the greatest |mean difference| are chosen, each latent divided by its
mean |code| where it is not 0; then a logistic regression with an L1 penalty reads them,
and beside it, as the baseline, one with an L2 penalty the model's own activations. Its C, among ten
from 1e5 to 1e-5, is the one with the best AUC on the last min(20 %, 100) training texts (below 128
training texts: by six folds); then it is fitted again on all of them.

Accuracy, AUC and F1 (weighted by class) are means over classes, data sets and seeds;
`_seed_std` is the deviation over the seeds.

Where this departs from sae-probes: sets of more than two classes are probed too, each class against
the others; so are sets of one's own; repeated texts count once, which its sets hold (see
evals.texts). Codes are over atoms of unit norm.

Source: Kantamneni et al., "Are sparse autoencoders useful? A case study in sparse probing" (2025);
sae-probes 0.4.2.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from activations.models import Model
from activations.terminal import UserError, progress
from dictlearn.dictionary import Coder
from evals import cache
from evals.linear_probe import dense, mean_difference
from evals.lm import check_hook
from evals.pooled import Pooled, pool
from evals.results import Result
from evals.sparse_probing import DEFAULT_SETS, categories, spread
from evals.texts import Labelled, LabelledSet

FAMILY = "sparse_probing_sae_probes"
_C = np.logspace(5, -5, 10)
# Test texts that are left at least, training texts for one validation part, and at least.
_TEST, _ONE_PART, _LEAST = 100, 128, 28


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; numbers that are not told are sae-probes's.

    Attributes:
      hook: where activations are read.
      sets: of labelled texts.
      max_classes: of a set, its most frequent.
      max_texts: of a class against the others, both together.
      context_length: tokens of a text, BOS included.
      ks: numbers of latents.
      seed, n_seeds: seed to seed + n_seeds - 1, each with texts and a split of its own.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    sets: Annotated[tuple[LabelledSet, ...], Field(min_length=1)] = DEFAULT_SETS
    max_classes: Annotated[int, Field(ge=2)] = 5
    max_texts: Annotated[int, Field(ge=_TEST + _LEAST)] = 5000
    context_length: Annotated[int, Field(ge=2)] = 1024
    ks: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 5)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    n_seeds: Annotated[int, Field(ge=1)] = 3

    def quick(self) -> Config:
        """Two sets of two classes, 300 texts, of 128 tokens."""
        return dataclasses.replace(
            self, sets=self.sets[:2], max_classes=2, max_texts=300, context_length=128
        )


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Probe a dictionary.

    Raises:
      UserError: the dictionary does not fit the hook; a set is not to be read, or too small.
    """
    check_hook(coder, model, cfg.hook)
    sets = [one.read() for one in cfg.sets]
    drawn = [_draw(labelled, cfg) for labelled in sets]  # before the model runs for minutes
    details = []
    for labelled, (classes, texts) in zip(sets, drawn, strict=True):
        blocks = cache.read(
            model, cfg.hook, [labelled.text[i] for i in texts], length=cfg.context_length,
            keep="last",
        )  # fmt: skip
        rows, label = pool(coder, blocks), labelled.label[texts]
        seeds = range(cfg.seed, cfg.seed + cfg.n_seeds)
        found = [_measure(labelled.name, rows, label, classes, cfg, seed) for seed in seeds]
        details.append({"dataset_name": labelled.name, "n_classes": len(classes)} | spread(found))
    return Result(FAMILY, dataclasses.asdict(cfg), categories(details), details)


def _draw(labelled: Labelled, cfg: Config) -> tuple[list[str], np.ndarray]:
    """The classes that are probed, and the texts that can be asked for."""
    names = labelled.classes[: cfg.max_classes]
    # Of two classes one probe is enough: of the one that comes second by name, as in sae-probes.
    classes = [max(names)] if len(names) == 2 else names
    kept = np.flatnonzero(np.isin(labelled.label, names))
    for name in classes:
        own = int((labelled.label[kept] == name).sum())
        most = 2 * min(own, len(kept) - own)
        if most < _TEST + _LEAST:
            raise UserError(
                f"{labelled.name}: {most // 2} texts of {name!r} that are not repeats, and as many "
                f"others, are fewer than the {(_TEST + _LEAST) // 2} that this protocol needs"
            )
    rng = np.random.default_rng(cfg.seed)
    most = cfg.max_texts // 2
    chosen = [rng.permutation(kept[labelled.label[kept] == name])[:most] for name in names]
    return classes, np.sort(np.concatenate(chosen))


def _measure(
    name: str, rows: Pooled, label: np.ndarray, classes: list[str], cfg: Config, seed: int
) -> dict[str, float]:
    """Means over the classes."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for one in progress(iterable=classes, desc=f"{name}, seed {seed}", delay=3):
        y = label == one
        m = min(2 * min(int(y.sum()), int((~y).sum())), cfg.max_texts // 2 * 2)
        chosen = [rng.permutation(np.flatnonzero(of))[: m // 2] for of in (y, ~y)]
        n = min(m - _TEST, 1024) // 2
        train, test = (
            rng.permutation(np.concatenate([group[part] for group in chosen]))
            for part in (slice(n), slice(n, None))
        )
        for key, value in probe(rows, y, train, test, cfg.ks, seed).items():
            found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def probe(
    rows: Pooled, y: Bool[np.ndarray, " n"], train: np.ndarray, test: np.ndarray,
    ks: tuple[int, ...], seed: int,
) -> dict[str, float]:  # fmt: skip
    """A class's figures. `train` and `test` are indices, in random order."""
    found = {}
    codes: Any = rows.codes  # scipy's types think that rows of it may be missing
    order = ranking(codes[train], y[train])
    told = {f"sae_top_{k}": (dense(codes, order[:k]), "l1") for k in ks}
    for prefix, (x, penalty) in ({"llm": (rows.x, "l2")} | told).items():
        names = "test_accuracy", "test_auc", "test_f1"
        values = regression((x[train], y[train]), (x[test], y[test]), penalty, seed)
        found |= {f"{prefix}_{name}": value for name, value in zip(names, values, strict=True)}
    return found


def ranking(codes: Any, y: Bool[np.ndarray, " n"]) -> np.ndarray:
    """Latents by |mean difference| of codes over their mean |code| where not 0, greatest first.

    Arguments:
      codes: [n a], sparse.
    """
    size = np.asarray(abs(codes).sum(axis=0, dtype=np.float64)).ravel()
    mean = size / (np.bincount(codes.indices, codes.data != 0, codes.shape[1]) + 1e-6)
    return np.argsort(-np.abs(mean_difference(codes, y) / (mean + 1e-6)), kind="stable")


def regression(
    train: tuple[Float[np.ndarray, "n k"], Bool[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m k"], Bool[np.ndarray, " m"]],
    penalty: str,
    seed: int,
) -> tuple[float, float, float]:
    """Test accuracy, AUC and weighted F1 of the regression with the best C."""
    (x, y), (unseen, truth) = train, test
    n = len(y)
    if n >= _ONE_PART:
        last = min(n // 5, 100)
        folds = [(np.arange(n - last), np.arange(n - last, n))]
    else:
        folds = list(StratifiedKFold(6, shuffle=True, random_state=seed).split(x, y))
    folds = [fold for fold in folds if len(np.unique(y[fold[1]])) == 2]

    def fitted(c: float, rows: np.ndarray) -> LogisticRegression:
        settings = {"solver": "saga", "l1_ratio": 1} if penalty == "l1" else {}
        model = LogisticRegression(C=c, max_iter=1000, random_state=seed, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # as in the original
            return model.fit(x[rows], y[rows])

    def auc(c: float) -> float:
        return float(np.mean([
            roc_auc_score(y[held], fitted(c, rest).predict_proba(x[held])[:, 1])
            for rest, held in folds
        ]))  # fmt: skip

    best = fitted(_C[int(np.argmax([auc(c) for c in _C]))], np.arange(n))
    answer = np.asarray(best.predict(unseen))
    return (
        float(np.mean(answer == truth)),
        float(roc_auc_score(truth, best.predict_proba(unseen)[:, 1])),
        float(f1_score(truth, answer, average="weighted")),
    )
