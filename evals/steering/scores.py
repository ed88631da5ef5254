"""Steered texts to figures: marks a text, the KL chosen on half of the prompts, the other half."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dictlearn.metrics import bootstrap
from evals.judges import Judge
from evals.steering.concepts import Concept, WordClassifier
from evals.steering.fluency import Fluency, bits_per_byte, distinct_2
from evals.steering.rating import concept_marks, doubt, fluency_marks, harmonic

OWN = "own"
# Labelled texts that a judge is tried on.
_TRIED = 40


@dataclasses.dataclass(frozen=True)
class Text:
    """A continuation.

    Attributes:
      concept: that it was steered to; "" of the model's own.
      method: the direction, or `OWN`.
      goal: the place of its KL; 0 where there is one strength alone.
      prompt: its place.
      begin, said: the prompt and what follows.
    """

    concept: str
    method: str
    goal: int
    prompt: int
    begin: str
    said: str


@dataclasses.dataclass(frozen=True, eq=False)
class Marked:
    """Texts and what each is worth.

    Attributes:
      effect: P(concept) less the mean of the model's own texts [n]; NaN of those, and of concepts
        whose classifier is not to be believed.
      fluent: 0 or 1 [n].
      bits, distinct: see evals.steering.fluency [n].
      judged: the judge's marks for concept and fluency [2 n]; NaN where it gave none.
    """

    text: list[Text]
    effect: np.ndarray
    fluent: np.ndarray
    bits: np.ndarray
    distinct: np.ndarray
    judged: np.ndarray

    def of(self, concept: str) -> np.ndarray:
        """Places of the texts that were steered to a concept."""
        return np.flatnonzero([one.concept == concept for one in self.text])


def mark(
    texts: list[Text], classifiers: dict[str, WordClassifier], least: float, fluency_model: str
) -> Marked:
    """Effect and fluency of every text.

    Arguments:
      least: accuracy of a classifier that is believed.
    """
    whole = [one.begin + one.said for one in texts]
    said = [one.said for one in texts]
    own = np.array([one.method == OWN for one in texts])
    effect = np.full(len(texts), np.nan)
    for name, classifier in classifiers.items():
        if classifier.accuracy >= least:
            here = np.array([one.concept == name for one in texts])
            before = classifier.probability([said[i] for i in np.flatnonzero(own)]).mean()
            if here.any():
                there = np.flatnonzero(here)
                effect[there] = classifier.probability([said[i] for i in there]) - before
    bits = bits_per_byte(fluency_model, whole)
    distinct = np.array([distinct_2(one) for one in said])
    fluent = Fluency.of(bits[own], distinct[own]).of_texts(bits, distinct)
    fluent &= np.array([bool(one.strip()) for one in said])
    nothing = np.full((2, len(texts)), np.nan)
    return Marked(texts, effect, fluent.astype(float), bits, distinct, nothing)


def judge_texts(
    judge: Judge, marked: Marked, concepts: list[Concept], *, seed: int
) -> dict[str, str]:
    """Put a judge's marks of all steered texts into `marked.judged`; why it is not believed."""
    doubts = {}
    for one in concepts:
        own, others = np.flatnonzero(one.detect.y), np.flatnonzero(~one.detect.y)
        tried = one.detect.some(np.concatenate([own[: _TRIED // 2], others[: _TRIED // 2]]))
        if why := doubt(judge, one.name, tried, seed=seed):
            doubts[f"steering.judge, {one.name}"] = why
            continue
        here = marked.of(one.name)
        said = [marked.text[i].begin + marked.text[i].said for i in here]
        marked.judged[0, here] = concept_marks(judge, one.name, said)
        marked.judged[1, here] = fluency_marks(judge, said)
    return doubts


def summary(
    marked: Marked, methods: list[str], concepts: list[str], n_goals: int, n_prompts: int, *,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:  # fmt: skip
    """The figures of each method, the feature first, and why some are null."""
    found: dict[str, dict[str, Any]] = {method: {} for method in methods}
    null: dict[str, str] = {}
    shape = (len(concepts), len(methods), n_goals, n_prompts)
    place = np.array([
        (concepts.index(one.concept), methods.index(one.method), one.goal, one.prompt)
        if one.method != OWN else (-1, 0, 0, 0)
        for one in marked.text
    ])  # [n 4] # fmt: skip
    for kind, marks, most in (
        ("", (marked.effect, marked.fluent), 1.0), ("judge_", tuple(marked.judged), 2.0),
    ):  # fmt: skip
        names = ("judge_concept", "judge_fluency") if kind else ("effect", "fluent")
        above = f"{kind}feature_above"
        a, b = (_means(values, place, shape) for values in marks)
        judged = ~np.isnan(a).all(axis=(1, 2, 3))  # [c]
        if not judged.any():
            why = "no concept has a classifier that is right often enough"
            if kind:
                why = "no judge is named, or none of its marks is to be believed"
            for method in methods:
                null[f"{method}.{kind}score"] = why
                found[method] |= dict.fromkeys((f"{kind}score", *names, above))
            continue
        units = _scored(np.stack([a, b], axis=-1)[judged], most)  # [m u 2]
        for method, own in zip(methods, units, strict=True):
            found[method] |= _figure(f"{kind}score", partial(_score, own), len(own), seed)
            means = most * own.mean(axis=0)
            found[method] |= dict(zip(names, map(float, means), strict=True))
            apart = partial(_apart, units[0], own)
            found[method] |= _figure(above, apart, len(own), seed)
        found[methods[0]] |= {above: None, f"{above}_interval": None}
        null[f"{methods[0]}.{above}"] = "is the feature's difference from itself"
    return found, null


def _figure(
    key: str, statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int
) -> dict[str, Any]:
    """A statistic over weighted units with its interval."""
    interval = bootstrap(statistic, n, seed=seed)
    return {key: float(statistic(np.ones(n))), f"{key}_interval": interval}


def _means(values: np.ndarray, place: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Means of each concept, method, KL and prompt [c m g p]; NaN where there is none."""
    there = (place[:, 0] >= 0) & ~np.isnan(values)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, tuple(place[there].T), values[there])
    np.add.at(counts, tuple(place[there].T), 1)
    return np.divide(sums, counts, out=np.full(shape, np.nan), where=counts > 0)


def _scored(marks: np.ndarray, most: float) -> np.ndarray:
    """Marks of the prompts that are scored, at the KL that the others chose: [m u 2] in [0, 1].

    A direction that reaches no KL has no effect, and is fluent.

    Arguments:
      marks: [c m g p 2].
    """
    marks = np.where(np.isnan(marks).all(axis=2, keepdims=True), [0, most], marks) / most
    half = marks.shape[3] // 2
    score = harmonic(*np.moveaxis(marks[..., :half, :].mean(axis=3), -1, 0))  # [c m g]
    best = np.where(np.isnan(score), -1, score).argmax(axis=2)[:, :, None, None, None]
    own = np.take_along_axis(marks[..., half:, :], best, axis=2)[:, :, 0]  # [c m h 2]
    return own.swapaxes(0, 1).reshape(marks.shape[1], -1, 2)


def _score(marks: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The harmonic mean of both means, weights [.. u] over units [u 2]."""
    return harmonic(*(np.moveaxis(w @ marks, -1, 0) / w.sum(axis=-1)))


def _apart(marks: np.ndarray, other: np.ndarray, w: np.ndarray) -> np.ndarray:
    return _score(marks, w) - _score(other, w)


def describe(details: list[dict[str, Any]], marked: Marked) -> None:
    """Add the means of its texts to each row of a concept, method and KL, and one text."""
    for row in details:
        keys = (row["concept"], row["method"], row["goal"])
        own = [
            i for i, one in enumerate(marked.text) if (one.concept, one.method, one.goal) == keys
        ]
        columns = {
            "effect": marked.effect, "fluent": marked.fluent, "bits_per_byte": marked.bits,
            "distinct_2": marked.distinct, "judge_concept": marked.judged[0],
            "judge_fluency": marked.judged[1],
        }  # fmt: skip
        for key, values in columns.items():
            there = values[own][~np.isnan(values[own])]
            row[key] = float(there.mean()) if len(there) else None
        row["text"] = marked.text[own[0]].begin + marked.text[own[0]].said if own else None
