"""Multiple-choice questions as passages, and those that a model knows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from activations.terminal import UserError, progress
from evals.multiple_choice import read_questions, with_choices
from evals.unlearning.bank import Hooked, Passage, continuation

Scoring = Literal["letters", "likelihood"]
_PERMUTATIONS = 24
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A question as passages: one that compares letters, or one for each choice."""

    passages: list[Passage]
    gold: int

    @property
    def chance(self) -> float:
        """One over the number of choices."""
        return 1 / max(len(self.passages), self.passages[0].targets.shape[1])

    def right(self, log_p: list[np.ndarray]) -> bool:
        """Whether the right choice is the likeliest."""
        scores = log_p[0][0] if len(log_p) == 1 else [one.sum() for one in log_p]
        return int(np.argmax(scores)) == self.gold


def answers(asked: list[Asked], log_p: list[np.ndarray]) -> np.ndarray:
    """Which questions are right [q], from log p of all their passages."""
    ends = np.cumsum([0, *(len(one.passages) for one in asked)]).tolist()
    pairs = zip(asked, itertools.pairwise(ends), strict=True)
    return np.array([one.right(log_p[a:b]) for one, (a, b) in pairs], bool)


def passages_of(asked: list[Asked]) -> list[Passage]:
    """Of all questions, one after another."""
    return [passage for one in asked for passage in one.passages]


def letters(hooked: Hooked, query: str, choices: list[str], gold: int) -> Asked:
    """The likeliest letter behind "query / A. choice / B. choice / Answer:".

    A letter's token is the last of "Answer: A".

    Raises:
      UserError: letters share a token.
    """
    listed = "".join(f"\n{a}. {choice}" for a, choice in zip(_LETTERS, choices, strict=False))
    ids = np.array([*hooked.begin, *hooked.encode(f"{query}{listed}\nAnswer:")])
    token = [hooked.encode(f"Answer: {a}")[-1] for a in _LETTERS[: len(choices)]]
    if len(set(token)) < len(token):
        raise UserError(
            "unlearning.scoring: this tokenizer has no token of its own for each letter; have "
            "scoring = 'likelihood'"
        )
    return Asked([Passage(ids, len(ids), np.array([token]))], gold)


def likelihood(hooked: Hooked, query: str, choices: list[str], gold: int) -> Asked:
    """The likeliest text behind the query; a token that reaches over both is the choice's.

    Raises:
      UserError: nothing stands before a choice.
    """
    asked = with_choices(query, choices, hooked.encode, hooked.begin)
    if any(first == 0 for _, first in asked):
        raise UserError(f"unlearning: {query[:60]!r} has no token before its choices")
    return Asked([continuation(np.array(ids), first) for ids, first in asked], gold)


def in_orders(hooked: Hooked, one: dict[str, Any], scoring: Scoring) -> list[Asked]:
    """A question with its choices in all orders, 24 at most, the file's own first; likelihoods do
    not depend on the order."""
    query, choices, gold = one["query"], one["choices"], one["gold"]
    if not 2 <= len(choices) <= len(_LETTERS):
        raise UserError(
            f"unlearning: the question {query[:60]!r} has {len(choices)} choices, expected 2-26"
        )
    if scoring == "likelihood":
        return [likelihood(hooked, query, choices, gold)]
    orders = [tuple(range(len(choices)))]
    if math.factorial(len(choices)) <= _PERMUTATIONS:
        orders = list(itertools.permutations(orders[0]))
    else:
        rng = np.random.default_rng(len(choices))
        orders += [tuple(rng.permutation(len(choices))) for _ in range(_PERMUTATIONS - 1)]
    return [
        letters(hooked, query, [choices[i] for i in order], order.index(gold)) for order in orders
    ]


def read(
    hooked: Hooked, files: tuple[Path, ...], scoring: Scoring, count: int, *, seed: int
) -> list[list[Asked]]:
    """Questions of files, each in all orders.

    Arguments:
      count: of a file, at most, drawn by the seed.

    Raises:
      UserError: a file is no such file; a question is not to be asked.
    """
    every = [one for file in files for one in read_questions(file, count, seed=seed)]
    return [in_orders(hooked, one, scoring) for one in every]


def known(
    hooked: Hooked, asked: list[list[Asked]], name: str
) -> tuple[list[Asked], dict[str, Any], str | None]:
    """Questions that the model answers right in all orders; what it does on all, in the files'
    own order; and why that is too little, if it is.

    Too little is an accuracy that is not above chance by two standard errors, or one question.
    """
    own = [one[0] for one in asked]
    right = answers(own, hooked.base(passages_of(own)))
    kept = []
    for i in progress(iterable=np.flatnonzero(right), desc=name, unit="question", delay=3):
        others = asked[i][1:]
        if answers(others, hooked.base(passages_of(others))).all():
            kept.append(own[i])
    n, accuracy = len(asked), float(right.mean())
    chance = float(np.mean([one.chance for one in own]))
    error = math.sqrt(chance * (1 - chance) / n)
    told = {"n": n, "n_known": len(kept), "accuracy": accuracy, "chance": chance}
    why = None
    if accuracy <= chance + 2 * error:
        why = (
            f"the model answers {accuracy:.3f} of the {name} right, which is not above chance "
            f"({chance:.3f}) by two standard errors ({2 * error:.3f})"
        )
    elif len(kept) < 2:
        why = (
            f"the model answers {len(kept)} of {n} {name} right in all orders (accuracy "
            f"{accuracy:.3f}), expected at least 2"
        )
    return kept, told, why
