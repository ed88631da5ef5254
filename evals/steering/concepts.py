"""Labelled texts of a concept in parts that do not meet, and a classifier that sees words alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline, make_union

from activations.terminal import UserError
from evals.texts import Labelled


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Texts, and which of them are of the concept."""

    text: list[str]
    y: Bool[np.ndarray, " n"]

    def some(self, index: np.ndarray) -> Part:
        """Those of them."""
        return Part([self.text[i] for i in index], self.y[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Concept:
    """A class of a labelled set against its others, as many texts of each side in every part.

    Attributes:
      choose: chooses features, and trains directions.
      learn, held_out: of the classifier.
      detect: what is left to look at once.
    """

    name: str
    choose: Part
    learn: Part
    held_out: Part
    detect: Part


def concept(labelled: Labelled, name: str, n: int, *, seed: int) -> Concept:
    """Draw the parts: n texts of each side to choose by, n to detect, n held out; the rest learn.

    Raises:
      UserError: there is no such class, or it has too few texts.
    """
    if name not in labelled.classes:
        raise UserError(f"{labelled.name}: has no class {name!r}; it has {labelled.classes}")
    rng = np.random.default_rng([0x434F4E, seed])
    sides = [rng.permutation(np.flatnonzero((labelled.label == name) == own)) for own in (1, 0)]
    least = min(map(len, sides))
    if least < 4 * n:
        raise UserError(
            f"{labelled.name}: {name!r} has {least} texts that are not repeats, expected at least "
            f"{4 * n} (4 times `texts`); lower `texts`, or give more"
        )
    most = min(least, 3 * n + 1000)
    parts = {}
    for part, here in {
        "choose": slice(0, n), "detect": slice(n, 2 * n), "held_out": slice(2 * n, 3 * n),
        "learn": slice(3 * n, most),
    }.items():  # fmt: skip
        own, others = (side[here] for side in sides)
        index = np.concatenate([own, others])
        text = [labelled.text[i] for i in index]
        parts[part] = Part(text, np.arange(len(index)) < len(own))
    return Concept(name, **parts)


class WordClassifier:
    """P(concept | text) by words and letters: TF-IDF and a logistic regression of scikit-learn.

    It has seen no language model, and none of the texts that chose a feature.

    Attributes:
      accuracy: balanced, on held-out texts.
    """

    def __init__(self, of: Concept) -> None:
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
        words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+")
        fit: Any = make_pipeline(
            make_union(letters, words), LogisticRegression(C=10, max_iter=1000)
        )
        self._fit = fit.fit(of.learn.text, of.learn.y)
        said = self._fit.predict(of.held_out.text)
        self.accuracy = float(balanced_accuracy_score(of.held_out.y, said))

    def probability(self, texts: list[str]) -> Float[np.ndarray, " n"]:
        """Of the concept, for each text."""
        return self._fit.predict_proba(texts)[:, 1]


def telling_tokens(
    ids: list[np.ndarray], y: Bool[np.ndarray, " n"], n: int, n_vocabulary: int
) -> Int[np.ndarray, " n"]:
    """The n tokens that tell a concept's texts from others, by log odds ratio over its deviation.

        z_t = (log odds_t(concept) - log odds_t(others)) / sqrt(1 / a_t + 1 / b_t)

    a and b being the counts of both sides plus the prior 0.01 + their share of 500 drawn from all.
    Source: Monroe, Colaresi and Quinn, "Fightin' words" (2008), eqs. 15, 16, 19, 22.
    """
    counts = np.zeros((2, n_vocabulary))
    for one, own in zip(ids, y, strict=True):
        np.add.at(counts[0 if own else 1], one, 1)
    both = counts.sum(axis=0)
    counts += 0.01 + 500 * both / both.sum()
    odds = np.log(counts / (counts.sum(axis=1, keepdims=True) - counts))
    z = (odds[0] - odds[1]) / np.sqrt((1 / counts).sum(axis=0))
    z[both == 0] = -np.inf
    return np.argsort(-z, kind="stable")[:n]
