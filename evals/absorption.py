"""Feature absorption by first letters: SAEBench 0.6.0's `absorption_first_letter`.

    found = absorption.prepare(model, cfg)          # the model runs once
    result = absorption.measure(coder, found, cfg)  # for each dictionary

or both by `run`. The formulas, the readings of signed codes and where this departs from SAEBench
are told in evals.absorption_scores; the prompts in evals.spelling; a hierarchy whose absorption is
known by construction is in evals.hierarchy.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from activations.models import Model
from dictlearn.dictionary import Coder
from evals import one_vs_rest, spelling
from evals.absorption_scores import READINGS, ClassScore, Config, Half, score
from evals.coding import coded, frame
from evals.lm import check_hook, check_width
from evals.one_vs_rest import Probe
from evals.results import Result

FAMILY = "absorption_first_letter"


def summary(
    scores: list[ClassScore], cfg: Config
) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    """The category "mean" of the metrics, and why any of them is None.

    Deviations are over letters, with n - 1 below.
    """
    counted = [one for one in scores if one.reason is None]
    metrics: dict[str, float | None] = {}
    null = {}
    for reading in READINGS:
        columns = {
            "absorption_fraction_score": [one.fraction[reading].mean() for one in counted],
            "full_absorption_score": [one.full[reading].mean() for one in counted],
            "num_split_features": [len(one.main[reading]) for one in counted],
        }
        for name, values in columns.items():
            for kind, least in (("mean", 1), ("std_dev", 2)):
                key = f"{kind}_{name}{reading}"
                enough = len(values) >= max(least, cfg.min_feats_for_eval)
                deviation = kind == "std_dev"
                metrics[key] = None
                if enough:
                    metrics[key] = float(np.std(values, ddof=1) if deviation else np.mean(values))
                else:
                    null[f"mean.{key}"] = (
                        f"{len(values)} letters have a probe with an F1 above {cfg.min_probe_f1}, "
                        f"expected {max(least, cfg.min_feats_for_eval)}"
                    )
    return {"mean": metrics}, null


@dataclasses.dataclass(frozen=True, eq=False)
class Spelling:
    """What does not depend on the dictionary: words, activations [n d], and their probe."""

    asked: spelling.Prompts
    x: Float[np.ndarray, "n d"]
    probe: Probe

    @property
    def y(self) -> Bool[np.ndarray, "n 26"]:
        """Whether each word begins with each letter."""
        return self.asked.letter[:, None] == np.arange(len(spelling.LETTERS))[None]


def prepare(model: Model, cfg: Config) -> Spelling:
    """Run the model and train its probe: once for all dictionaries of a hook.

    Raises:
      TooFewWordsError: see `evals.spelling.prompts`.
      UserError: the model has no such hook; its tokenizer is a slow one.
    """
    asked = spelling.prompts(
        model.tokenizer, n_words=cfg.n_words, n_examples=cfg.n_examples, seed=cfg.seed
    )
    x = spelling.read(model, cfg.hook, asked, batch_size=cfg.llm_batch_size)
    found = Spelling(asked, x, Probe(np.zeros((26, x.shape[1])), np.zeros(26)))
    train = slice(asked.n_train)
    probe = one_vs_rest.fit(
        x[train], found.y[train], batch_size=cfg.probe_batch_size, epochs=cfg.probe_epochs,
        decay=cfg.probe_decay, seed=cfg.seed,
    )  # fmt: skip
    return dataclasses.replace(found, probe=probe)


def measure(coder: Coder, found: Spelling, cfg: Config) -> Result:
    """A dictionary's absorption, on activations that were read before.

    Raises:
      UserError: the dictionary is of another width than the hook.
    """
    check_width(coder, cfg.hook, found.x.shape[1])
    atoms, offset = frame(coder)
    (codes, _), n = coded(coder, found.x), found.asked.n_train
    train, test = (
        Half(found.x[part], codes[part], found.y[part]) for part in (slice(n), slice(n, None))
    )
    batch = max(round(cfg.k_sparse_probe_batch_size * found.asked.share), 1)
    scores = score(
        train, test, atoms, offset, found.probe, list(spelling.LETTERS),
        dataclasses.replace(cfg, k_sparse_probe_batch_size=batch),
        unit=float(coder.normaliser.scale),
    )  # fmt: skip
    metrics, null = summary(scores, cfg)
    return Result(
        FAMILY,
        dataclasses.asdict(cfg),
        metrics,
        details=[one.table() for one in scores if one.reason is None],
        unstructured={
            "letters_left_out": {one.name: one.reason for one in scores if one.reason},
            "probe_f1": {one.name: one.probe_f1 for one in scores},
            "words": found.asked.counts | {"train": n, "test": len(found.x) - n},
            "k_sparse_probe_batch_size": batch,
            "negative_codes": float((codes.data < 0).mean()) if codes.nnz else 0.0,
        },
        null=null,
    )


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Absorption of a dictionary of a model's activations at `cfg.hook`.

    A tokenizer with too few words gives a result whose metrics are None, with the reason.

    Raises:
      UserError: the model has no such hook; the dictionary does not fit it.
    """
    # Before the model runs for minutes.
    check_hook(coder, model, cfg.hook)
    try:
        found = prepare(model, cfg)
    except spelling.TooFewWordsError as error:
        metrics, null = summary([], cfg)
        return Result(
            FAMILY, dataclasses.asdict(cfg), metrics, null=dict.fromkeys(null, str(error))
        )
    return measure(coder, found, cfg)
