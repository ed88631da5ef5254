"""Zero-shot accuracy on multiple-choice questions: the choice that the model finds likeliest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from activations.terminal import UserError, progress
from evals.token_losses import token_nats

# Read at once: tokens, and those of them whose logits are wanted (256 MiB of a vocabulary of 2^18).
_TOKENS, _WANTED = 1024, 256


def read_questions(file: Path, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Some documents of a jsonl file with `query`, `choices` and `gold`, drawn without repeats.

    Raises:
      UserError: the file is missing, or a line of it is no such document.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold other separators
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            held = json.loads(line)
            query, choices, gold = held["query"], held["choices"], held["gold"]
            fits = isinstance(query, str) and isinstance(choices, list) and type(gold) is int
            fits = fits and all(isinstance(one, str) and one for one in choices)
            if not fits or not 0 <= gold < len(choices):
                raise ValueError("its gold is none of its choices, or a choice is empty")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: line {number} is no document with query, choices and gold ({error})"
            ) from None
        questions.append({"query": query, "choices": choices, "gold": gold})
    if not questions:
        raise UserError(f"{file}: holds no documents")
    drawn = np.random.default_rng(seed).permutation(len(questions))[:count]
    return [questions[place] for place in sorted(drawn)]


def accuracy(
    model: Any,
    questions: list[dict[str, Any]],
    encode: Callable[[str], list[int]],
    *,
    begin: list[int],
    name: str = "",
) -> dict[str, Any]:
    """Shares of questions whose right choice has the greatest log-likelihood, [0, 1].

    A choice's is sum log p of its tokens behind "query choice"; `acc` compares the sums, `acc_norm`
    the sums over the choices' bytes. Both with their standard error, as lm-evaluation-harness has
    them. `right` and `right_norm` say it question by question, for paired comparisons.

    Raises:
      UserError: a choice has nothing before it to be predicted from.
    """
    asked = [pair for one in questions for pair in _asked(one, encode, begin)]
    sums = np.zeros(len(asked))
    with progress(total=len(asked), unit="choice", desc=name or "questions") as bar:
        for batch in _batches(asked):
            sequences, first = zip(*(asked[one] for one in batch), strict=True)
            sums[batch] = [-nats.sum() for nats in token_nats(model, sequences, first)]
            bar.update(len(batch))
    right: list[list[bool]] = []
    ends = np.cumsum([len(one["choices"]) for one in questions])
    for one, own in zip(questions, np.split(sums, ends[:-1]), strict=True):
        sizes = np.array([len(choice.encode()) for choice in one["choices"]])
        right.append([own.argmax() == one["gold"], (own / sizes).argmax() == one["gold"]])
    table = np.array(right, float)
    mean = table.mean(axis=0)
    error = np.sqrt(mean * (1 - mean) / max(len(table) - 1, 1))
    return {
        "acc": float(mean[0]), "acc_stderr": float(error[0]),
        "acc_norm": float(mean[1]), "acc_norm_stderr": float(error[1]),
        "n": len(table),
        "right": [int(one) for one in table[:, 0]], "right_norm": [int(one) for one in table[:, 1]],
    }  # fmt: skip


def with_choices(
    query: str, choices: list[str], encode: Callable[[str], list[int]], begin: list[int]
) -> list[tuple[list[int], int]]:
    """Ids of the query with each choice, and at which of them the choice begins.

    A token that reaches over both is the choice's.
    """
    before = encode(query)
    asked = []
    for choice in choices:
        whole = encode(f"{query} {choice}")
        pairs = enumerate(zip(before, whole, strict=False))
        same = next((place for place, (a, b) in pairs if a != b), len(before))
        asked.append(([*begin, *whole], len(begin) + min(same, len(whole) - 1)))
    return asked


def _asked(
    one: dict[str, Any], encode: Callable[[str], list[int]], begin: list[int]
) -> list[tuple[list[int], int]]:
    """As `with_choices`, of a document; refused where nothing stands before a choice."""
    asked = with_choices(one["query"], one["choices"], encode, begin)
    if any(first == 0 for _, first in asked):
        raise UserError(
            f"zero_shot: the query {one['query']!r} leaves no token before {one['choices']!r}, and "
            "the model's tokenizer puts none before a text; give longer queries"
        )
    return asked


def _batches(asked: list[tuple[list[int], int]]) -> Iterator[list[int]]:
    """Which are read at once: those of about one length, the longest first."""
    batch: list[int] = []
    wanted = longest = 0
    for one in sorted(range(len(asked)), key=lambda one: -len(asked[one][0])):
        ids, first = asked[one]
        own = len(ids) - first
        if batch and ((len(batch) + 1) * longest > _TOKENS or wanted + own > _WANTED):
            yield batch
            batch, wanted = [], 0
        longest = longest if batch else len(ids)
        batch.append(one)
        wanted += own
    yield batch
