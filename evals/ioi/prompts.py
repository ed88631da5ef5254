"""Prompts of indirect object identification (IOI), made by program, and what a model makes of them.

    When Mary and John went to the store, John gave a drink to      -> " Mary"

Two names stand first, the indirect object IO and the subject S; then S again, and the prompt ends
where IO is due. Three attributes tell a prompt within its context (template, place, object): who is
IO, who is S, and the order of the first two, IO first ("ABB") or S first ("BAB"). Names, places and
objects are those that are one token of the model's tokenizer after a space.

Source: the task is Wang et al., arXiv 2211.00593; templates and words are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from activations.models import Model
from activations.terminal import UserError, progress
from evals import cache
from evals.lm import Forward

# Where activations are read: the tokens of the three names, and the last one.
Role = Literal["io", "s1", "s2", "end"]
ROLES: tuple[Role, ...] = ("io", "s1", "s2", "end")
ATTRIBUTES = ("io", "s", "order")
TEMPLATES = (
    "When {first} and {second} went to the {place}, {s} gave a {thing} to",
    "Then, {first} and {second} went to the {place}. {s} gave a {thing} to",
    "After {first} and {second} came back from the {place}, {s} handed a {thing} to",
    "While {first} and {second} were working at the {place}, {s} passed a {thing} to",
    "Yesterday {first} and {second} met at the {place}, and {s} offered a {thing} to",
    "Then, {first} and {second} had a long talk at the {place}. Afterwards {s} gave a {thing} to",
    "As soon as {first} and {second} arrived at the {place}, {s} decided to give a {thing} to",
    "Although {first} and {second} had a quarrel at the {place}, {s} still sold a {thing} to",
)
NAMES = (
    "Mary", "John", "Tom", "James", "Michael", "Sarah", "David", "Anna", "Peter", "Paul", "Mark",
    "Emily", "Laura", "Kate", "Simon", "Daniel", "Robert", "Alice", "Emma", "Jack", "George",
    "Lisa", "Susan", "Karen", "Adam", "Kevin", "Brian", "Jessica", "Rachel", "Rebecca", "Andrew",
    "Matthew", "Thomas", "Richard", "William", "Charles", "Joseph", "Steven", "Henry", "Edward",
    "Elizabeth", "Jennifer", "Amy", "Jane", "Julia", "Martin", "Alex", "Ben", "Sam",
)  # fmt: skip
PLACES = (
    "store", "park", "school", "garden", "station", "office", "house", "restaurant", "hospital",
    "library", "market",
)  # fmt: skip
THINGS = (
    "drink", "book", "ring", "ball", "letter", "gift", "key", "phone", "basket", "computer",
    "ticket",
)  # fmt: skip
# Prompts of a forward pass.
_BATCH = 64

X = Float[np.ndarray, "n r d"]
Values = Int[np.ndarray, "n 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """What prompts of a model are made of: names with their tokens, and contexts.

    Attributes:
      contexts: template, place and object, every combination once, as format strings of the names.
    """

    names: tuple[str, ...]
    name_id: Int[np.ndarray, " m"]
    contexts: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Some prompts.

    Attributes:
      token: [n c], BOS first; shorter ones are filled at their end with their last token, which
        nothing before it sees.
      at: the place of each of ROLES [n 4].
      value: of each of ATTRIBUTES [n 3]: IO and S as indices of names, order 1 where IO is first.
      context: of each, as an index [n].
    """

    text: tuple[str, ...]
    token: Int[np.ndarray, "n c"]
    at: Int[np.ndarray, "n 4"]
    value: Values
    context: Int[np.ndarray, " n"]


def words(model: Model, n_names: int) -> Words:
    """The first names that are one token, and all contexts of such words.

    Raises:
      UserError: the tokenizer has fewer than `n_names` such names, or no such place or object.
    """
    # After a letter, as tokenizers after Llama's put a space of their own before a text.
    before = len(_ids(model, ["a"])[0])

    def single(some: Sequence[str]) -> dict[str, int]:
        ids = _ids(model, [f"a {word}" for word in some])
        return {w: own[-1] for w, own in zip(some, ids, strict=True) if len(own) == before + 1}

    names, places, things = (single(some) for some in (NAMES, PLACES, THINGS))
    if len(names) < n_names or not places or not things:
        raise UserError(
            f"ioi: {len(names)} names, {len(places)} places and {len(things)} objects are one "
            f"token of this model's tokenizer, expected {n_names}, 1 and 1; lower n_names, if "
            "names are what is missing, or take another model"
        )
    contexts = [
        template.format(first="{first}", second="{second}", s="{s}", place=place, thing=thing)
        for template in TEMPLATES
        for place in places
        for thing in things
    ]
    kept = list(names.items())[:n_names]
    return Words(tuple(name for name, _ in kept), np.array([i for _, i in kept]), tuple(contexts))


def draw(n: int, n_names: int, rng: np.random.Generator) -> Values:
    """Values of the attributes of n prompts.

    Among every `n_names` prompts in turn each name is IO once and S once; of the two orders there
    are as many, or one more.
    """
    rounds = [rng.permutation(n_names) for _ in range(-(-n // n_names))]
    # Each is S to the one before it in a random ring of all: never to itself.
    pairs = np.concatenate([np.stack([ring, np.roll(ring, 1)], axis=1) for ring in rounds])[:n]
    return np.column_stack([pairs, rng.permutation(n) % 2])


def edited(value: Values, attribute: str, n_names: int, rng: np.random.Generator) -> Values:
    """The same prompts with another value of one attribute: a name that is neither IO nor S."""
    found = value.copy()
    if attribute == "order":
        found[:, 2] = 1 - value[:, 2]
        return found
    low, high = np.sort(value[:, :2], axis=1).T
    other = rng.integers(n_names - 2, size=len(value))  # passes over the lower, then the higher
    other += other >= low
    other += other >= high
    found[:, ATTRIBUTES.index(attribute)] = other
    return found


def write(model: Model, known: Words, value: Values, context: Int[np.ndarray, " n"]) -> Prompts:
    """The prompts of these values and contexts.

    Raises:
      UserError: the tokenizer cuts a name in a prompt otherwise than alone.
    """
    texts = []
    for (io, s, order), place in zip(value, context, strict=True):
        io, s = known.names[io], known.names[s]
        first, second = (io, s) if order else (s, io)
        texts.append(known.contexts[place].format(first=first, second=second, s=s))
    ids = cache.tokens(model, texts, length=128)
    width = max(map(len, ids))
    token = np.stack([np.pad(own, (0, width - len(own)), mode="edge") for own in ids])
    at = np.empty((len(ids), len(ROLES)), np.int64)
    for i, own in enumerate(ids):
        io, s = (np.flatnonzero(own == known.name_id[value[i, j]]) for j in (0, 1))
        if (len(io), len(s)) != (1, 2):
            raise UserError(f"ioi: the tokenizer does not keep the names whole in {texts[i]!r}")
        at[i] = (*io, *s, len(own) - 1)
    return Prompts(tuple(texts), token, at, value, context)


def _ids(model: Model, texts: list[str]) -> list[list[int]]:
    return model.tokenizer(texts, add_special_tokens=False)["input_ids"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Activations of prompts at r positions, with the values of their attributes."""

    x: X
    value: Values


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What does not depend on the dictionary.

    Attributes:
      train, test: prompts of different contexts.
      counterfactual: of the prompts for testing, with another value of an attribute.
      answer: logits [b v] at the end of some prompts for testing, with x [b r d] put in.
      name_id: the names' tokens [m], in the order of values.
    """

    train: Rows
    test: Rows
    counterfactual: dict[str, Rows]
    answer: Callable[[Int[np.ndarray, " b"], X], Float[np.ndarray, "b v"]]
    name_id: Int[np.ndarray, " m"]


def prepare(
    model: Model, hook: str, positions: tuple[Role, ...], *, n_names: int, n_train: int,
    n_test: int, seed: int,
) -> Task:  # fmt: skip
    """Make the prompts and run the model: once for all dictionaries of a hook.

    Raises:
      UserError: the model has no such hook or too few names; a name has no prompt.
    """
    if min(n_train, n_test) < n_names:
        raise UserError(
            f"ioi: {n_train} prompts for training and {n_test} for testing do not have each of "
            f"{n_names} names; raise n_train and n_test, or lower n_names"
        )
    forward, known = Forward(model, hook), words(model, n_names)
    rng = np.random.default_rng([0x494F49, seed])
    contexts = rng.permutation(len(known.contexts))
    cut = len(contexts) * 4 // 5
    train, test = [
        write(model, known, draw(n, n_names, rng), rng.choice(own, n))
        for n, own in ((n_train, contexts[:cut]), (n_test, contexts[cut:]))
    ]
    counterfactual = {}
    for attribute in ATTRIBUTES:
        value = edited(test.value, attribute, n_names, rng)
        other = write(model, known, value, test.context)
        counterfactual[attribute] = _rows(forward, other, positions)
    return Task(
        _rows(forward, train, positions), _rows(forward, test, positions), counterfactual,
        _answers(forward, test, positions), known.name_id,
    )  # fmt: skip


def batches(n: int) -> list[Int[np.ndarray, " b"]]:
    """Rows 0 to n - 1, those of a forward pass at a time."""
    return np.split(np.arange(n), range(_BATCH, n, _BATCH))


def _places(prompts: Prompts, positions: tuple[Role, ...]) -> Int[np.ndarray, "n r"]:
    return prompts.at[:, [ROLES.index(role) for role in positions]]


def _rows(forward: Forward, prompts: Prompts, positions: tuple[Role, ...]) -> Rows:
    """What the hook sees at the positions."""
    at, parts = _places(prompts, positions), []
    for rows in progress(iterable=batches(len(at)), desc="IOI prompts", delay=3):
        x = forward.read(prompts.token[rows])
        parts.append(np.take_along_axis(x, at[rows][..., None], axis=1))
    return Rows(np.concatenate(parts), prompts.value)


def _answers(
    forward: Forward, prompts: Prompts, positions: tuple[Role, ...]
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """See `Task.answer`. Only the last position's logits are made: a vocabulary can be large."""
    at, end = _places(prompts, positions), torch.from_numpy(prompts.at[:, ROLES.index("end")])
    clean = np.concatenate([forward.read(prompts.token[rows]) for rows in batches(len(at))])

    def answer(rows: np.ndarray, put: np.ndarray) -> np.ndarray:
        x = clean[rows]
        np.put_along_axis(x, at[rows][..., None], put.astype(np.float32), axis=1)

        def last(seen: torch.Tensor, hook: Any) -> torch.Tensor:
            del hook
            return seen[torch.arange(len(rows)), end[torch.from_numpy(rows)]][:, None]

        with forward.bridge.hooks(fwd_hooks=[("unembed.hook_in", last)]):
            logits = forward.logits(prompts.token[rows], x)
        return logits[:, 0].float().cpu().numpy()

    return answer
