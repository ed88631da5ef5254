"""RAVEL's files, what a model answers to their prompts, and pairs of prompts it answers rightly.

A folder holds, for an entity type such as "city", two of RAVEL's files (Huang et al., arXiv
2402.17700): `ravel_city_attribute_to_prompts.json`, attribute to templates with one %s, and
`ravel_city_entity_attributes.json`, entity to attribute to answer.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from activations.files import sha256
from activations.terminal import UserError, progress
from evals.ravel.patched import Patched


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the files hold of some attributes.

    Attributes:
      templates: attribute to templates.
      answers: entity to attribute to answer.
    """

    templates: dict[str, list[str]]
    answers: dict[str, dict[str, str]]


def hashes(folder: Path, entity: str) -> dict[str, str]:
    """SHA-256 of the two files, by their names.

    Raises:
      UserError: a file is missing.
    """
    found = {}
    for file in _files(folder, entity):
        try:
            found[file.name] = sha256(file)
        except OSError as error:
            raise _unreadable(file, error) from None
    return found


def read(folder: Path, entity: str, attributes: tuple[str, ...]) -> Facts:
    """Read them; entities without an answer to one of the attributes are passed over.

    Raises:
      UserError: a file is missing or damaged; an attribute is unknown or named twice.
    """
    where, whose = _files(folder, entity)
    prompts, entities = _table(where), _table(whose)
    if len(set(attributes)) < len(attributes):
        raise UserError(f"ravel.attributes: names one twice: {', '.join(attributes)}")
    for name in attributes:
        templates = prompts.get(name)
        if templates is None:
            raise UserError(
                f"ravel.attributes: {where} has no attribute {name!r}; it has {', '.join(prompts)}"
            )
        if not isinstance(templates, list) or len(templates) < 2:
            raise UserError(f"{where}: {name}: expected a list of two templates or more")
        for one in templates:
            if not isinstance(one, str) or one.count("%s") != 1:
                raise UserError(f"{where}: {name}: {one!r} is no template with one %s")
    answers = {}
    for name, own in entities.items():
        if not isinstance(own, dict):
            raise UserError(f"{whose}: {name}: expected a table of answers")
        told = {key: str(own.get(key) or "").strip() for key in attributes}
        if name.strip() and all(told.values()):
            answers[name] = told
    if not answers:
        raise UserError(f"{whose}: no entity has an answer to each of {', '.join(attributes)}")
    return Facts({name: prompts[name] for name in attributes}, answers)


def _files(folder: Path, entity: str) -> tuple[Path, Path]:
    """Templates, and answers."""
    start = f"ravel_{entity}_"
    return folder / f"{start}attribute_to_prompts.json", folder / f"{start}entity_attributes.json"


def _table(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(file, error) from None
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error})") from None
    if not isinstance(table, dict):
        raise UserError(f"{file}: expected a JSON object")
    return table


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(
        f"ravel.data: {file}: cannot be read ({error.strerror}); expected RAVEL's file of this "
        "name: set `data` to its folder and `entity` to a type that is there"
    )


def tokens(tokenizer: Any, texts: list[tuple[str, str]]) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens of each (template, entity), BOS first, and the place of the entity's last token.

    That is the one with the entity's last character, though it may reach beyond it.

    Raises:
      UserError: the tokenizer is not one of the fast ones, which tell a token's place in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("ravel: needs a fast tokenizer (tokenizers library), got a slow one")
    coded = tokenizer(
        [template.replace("%s", entity) for template, entity in texts],
        add_special_tokens=False, return_offsets_mapping=True,
    )  # fmt: skip
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    ids = [np.array([*start, *own], np.int32) for own in coded["input_ids"]]
    place = np.empty(len(texts), int)
    for n, ((template, entity), spans) in enumerate(
        zip(texts, coded["offset_mapping"], strict=True)
    ):
        last = template.index("%s") + len(entity) - 1
        place[n] = len(start) + max(i for i, (a, b) in enumerate(spans) if a <= last < b)
    return ids, place


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """Prompts [A T E]: attributes, templates and entities; and what the model answers.

    Attributes:
      ids, place: of prompts, see `tokens`.
      prompt: the index of each among them, -1 where there is none [A T E].
      right: whether it is answered rightly [A T E].
      first: the answer's first token [A T E].
      answers: the right ones [A E].
    """

    attributes: list[str]
    entities: list[str]
    ids: list[np.ndarray]
    place: np.ndarray
    prompt: Int[np.ndarray, "A T E"]
    right: Bool[np.ndarray, "A T E"]
    first: Int[np.ndarray, "A T E"]
    answers: np.ndarray

    def take(self, attributes: list[int], templates: np.ndarray, entities: np.ndarray) -> Known:
        """A part, and its rightly answered prompts alone; templates are of each attribute [a t]."""
        at = np.array(attributes)[:, None, None], templates[:, :, None], entities[None, None]
        right, prompt = self.right[at], self.prompt[at]
        used = np.unique(prompt[right])
        return Known(
            [self.attributes[a] for a in attributes], [self.entities[e] for e in entities],
            [self.ids[i] for i in used], self.place[used],
            np.where(right, np.searchsorted(used, prompt), -1), right, self.first[at],
            self.answers[attributes][:, entities],
        )  # fmt: skip


def ask(
    lm: Patched, facts: Facts, *, n_entities: int, n_templates: int, most: int, seed: int
) -> Known:
    """Ask a model for some entities' attributes, by some templates of each.

    A prompt whose template has the entity in an example is not asked.

    Arguments:
      n_entities, n_templates: random ones; of templates, as many of each attribute.
      most: tokens of an answer.
    """
    rng = np.random.default_rng([0x524156454C, seed])
    names = list(facts.answers)
    entities = [names[i] for i in rng.permutation(len(names))[:n_entities]]
    chosen = [[own[i] for i in rng.permutation(len(own))[:n_templates]]
              for own in facts.templates.values()]  # fmt: skip
    prompt = np.full((len(chosen), max(map(len, chosen)), len(entities)), -1)
    texts, wanted = [], []
    for a, (attribute, templates) in enumerate(zip(facts.templates, chosen, strict=True)):
        for t, template in enumerate(templates):
            for e, entity in enumerate(entities):
                if entity not in template:
                    prompt[a, t, e] = len(texts)
                    texts.append((template, entity))
                    wanted.append(facts.answers[entity][attribute])
    ids, place = tokens(lm.tokenizer, texts) if texts else ([], np.zeros(0, int))
    right, first = np.zeros(len(texts), bool), np.zeros(len(texts), int)
    with progress(total=len(texts), unit="prompt", desc="ravel: what is known", delay=3) as bar:
        for part in np.array_split(np.arange(len(texts)), -(-len(texts) // 512) or 1):
            own = [ids[i] for i in part], place[part], [wanted[i] for i in part]
            right[part], first[part] = lm.answer(*own, most=most)
            bar.update(len(part))
    there = prompt >= 0
    table = [np.zeros(prompt.shape, column.dtype) for column in (right, first)]
    for grid, column in zip(table, (right, first), strict=True):
        grid[there] = column[prompt[there]]
    answers = [[facts.answers[e][attribute] for e in entities] for attribute in facts.templates]
    return Known(
        list(facts.templates), entities, ids, place, prompt, table[0], table[1], np.array(answers)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Base and source prompts [n], by their index.

    Attributes:
      target: the first token that is to follow the base.
      wanted: the answer that it belongs to.
    """

    base: np.ndarray
    source: np.ndarray
    target: np.ndarray
    wanted: np.ndarray

    def __getitem__(self, part: Any) -> Pairs:
        return Pairs(*(column[part] for column in self._columns))

    def __len__(self) -> int:
        return len(self.base)

    @property
    def _columns(self) -> list[np.ndarray]:
        return [self.base, self.source, self.target, self.wanted]

    @staticmethod
    def join(parts: list[Pairs]) -> Pairs:
        """All of them."""
        return Pairs(*map(np.concatenate, zip(*(own._columns for own in parts), strict=True)))


def pairs(
    known: Known, attribute: int, entities: np.ndarray, most: int, rng: np.random.Generator
) -> tuple[Pairs, Pairs]:
    """Random pairs of an attribute's prompts among some entities: as cause, and as isolation.

    Both prompts ask for the attribute. The base's template is answered rightly for both entities,
    with other first tokens, so that no answer is right for both; any template that is answered
    rightly gives the source. To follow is the source's answer (cause) or the base's (isolation), as
    the model itself begins it behind the base's template.
    """
    right, first = known.right[attribute], known.first[attribute]
    answers = known.answers[attribute]
    inside = np.zeros(len(known.entities), bool)
    inside[entities] = True
    own = right & inside  # [T E]
    fits = own[:, :, None] & own[:, None] & (first[:, :, None] != first[:, None])
    fits &= answers[:, None] != answers
    found = np.argwhere(fits)
    t, base, source = found[rng.permutation(len(found))[:most]].T
    other = np.array([rng.choice(np.flatnonzero(own[:, s])) for s in source], int)
    prompt = known.prompt[attribute]
    both = prompt[t, base], prompt[other, source]
    return (Pairs(*both, first[t, source], answers[source]),
            Pairs(*both, first[t, base], answers[base]))  # fmt: skip
