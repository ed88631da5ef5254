"""Which tokens of two vocabularies are the same: by bytes, special ones by their role.

A token of the donor's vocabulary gets a row of the base model's as it is

    override   if the config says so,
    role       if it is the donor's bos, eos, unk, ... token and the base has one,
    special    if both have a special token with that text,
    shared     if both have a token with these bytes.

Others are *new*: their rows have to be made up. A row goes to one special token by its role (of two
tokens with one row a greedy model says the one with the lower id, whichever it is).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from activations.terminal import UserError
from dictlearn.transplant.vocabulary import ROLES, Vocabulary


@dataclasses.dataclass(frozen=True)
class Matching:
    """Tokens of a donor's vocabulary beside those of a base model's.

    Attributes:
      copied: the base's token for each of the donor's that has one; `how` says why.
      anchors: [a 2] ids (donor, base) of shared tokens that both models have seen used: bytes that
        stand for a token where no other one does are left out.
      new: [n] ids of the donor's tokens that have none.
    """

    donor: Vocabulary
    base: Vocabulary
    copied: dict[int, int]
    how: dict[int, str]
    anchors: np.ndarray
    new: np.ndarray

    @property
    def identical(self) -> bool:
        """Whether both vocabularies have the same tokens under the same ids."""
        donor, base = self.donor, self.base
        return (donor.tokens, donor.special, donor.roles) == (base.tokens, base.special, base.roles)

    def report(self, examples: int = 8) -> dict[str, Any]:
        """Counts with examples: of each kind of match, of new tokens, and of those `lost`."""
        kinds = Counter(self.how.values())
        taken = {*self.copied.values()}
        lost = [token for token in self.base.tokens if token not in taken]
        named: dict[str, Any] = {"kinds": {"donor": self.donor.kind, "base": self.base.kind}}
        for kind in ("shared", "role", "special", "override"):
            those = [token for token in self.copied if self.how[token] == kind]
            pairs = [
                [self.donor.text(token), self.base.text(self.copied[token])]
                for token in _spread(those, examples)
            ]
            told = [donor for donor, _ in pairs] if kind == "shared" else pairs
            named[kind] = {"count": kinds[kind], "examples": told}
        new = [self.donor.text(token) for token in _spread(self.new.tolist(), examples)]
        named["approximated"] = {"count": len(self.new), "examples": new}
        gone = [self.base.text(token) for token in _spread(lost, examples)]
        named["lost"] = {"count": len(lost), "examples": gone}
        return named | {"anchors": len(self.anchors)}


def match(donor: Vocabulary, base: Vocabulary, overrides: dict[str, str]) -> Matching:
    """Match every token of `donor`.

    Arguments:
      overrides: texts of tokens, the donor's to the base's.

    Raises:
      UserError: an override names no token; not one token is shared.
    """
    copied: dict[int, int] = {}
    how: dict[int, str] = {}
    for kind, pairs in (
        ("override", _overridden(donor, base, overrides)),
        ("role", _by_role(donor, base)),
        ("special", _by_text(donor, base)),
        ("shared", _by_bytes(donor, base)),
    ):
        for own, other in pairs:
            if own in copied or (kind == "role" and other in copied.values()):
                continue
            copied[own], how[own] = other, kind
    anchors = [
        (own, other)
        for own, other in copied.items()
        if how[own] == "shared" and own not in donor.fallback and other not in base.fallback
    ]
    if not anchors:
        raise UserError(
            f"{donor.directory} ({donor.kind}, {len(donor.tokens):,} tokens) and {base.directory} "
            f"({base.kind}, {len(base.tokens):,} tokens) share no tokens; there is nothing to "
            "write new tokens as combinations of"
        )
    new = [token for token in sorted({*donor.tokens, *donor.special}) if token not in copied]
    return Matching(donor, base, copied, how, np.array(sorted(anchors)), np.array(new, np.int64))


_Pairs = Iterator[tuple[int, int]]


def _overridden(donor: Vocabulary, base: Vocabulary, overrides: dict[str, str]) -> _Pairs:
    for own, other in overrides.items():
        for text, vocabulary in ((own, donor), (other, base)):
            if text not in vocabulary.by_text:
                raise UserError(f"overrides: {vocabulary.directory} has no token {text!r}")
        yield donor.by_text[own], base.by_text[other]


def _by_role(donor: Vocabulary, base: Vocabulary) -> _Pairs:
    for role in ROLES:
        if role in donor.roles and role in base.roles:
            yield donor.roles[role], base.roles[role]


def _by_text(donor: Vocabulary, base: Vocabulary) -> _Pairs:
    ids = {text: token for token, text in base.special.items()}
    yield from ((token, ids[text]) for token, text in donor.special.items() if text in ids)


def _by_bytes(donor: Vocabulary, base: Vocabulary) -> _Pairs:
    """Single bytes go together with single bytes where both write them so.

    A byte that stands in, beside a token that is that byte, takes no row of the base's from it: no
    text holds it, and of two tokens with one row a greedy model says the one with the lower id.
    """
    plain, bytes_ = (
        {
            content: token
            for token, content in reversed(base.tokens.items())
            if (token in base.fallback) == fallback
        }
        for fallback in (False, True)
    )
    own = {content for token, content in donor.tokens.items() if token not in donor.fallback}
    for token, content in donor.tokens.items():
        first, second = (bytes_, plain) if token in donor.fallback else (plain, bytes_)
        found = first.get(content)
        if found is None and not (token in donor.fallback and content in own):
            found = second.get(content)
        if found is not None:
            yield token, found


def _spread(tokens: list[int], count: int) -> list[int]:
    """Some of many, evenly over the list."""
    step = max(1, len(tokens) // count)
    return tokens[::step][:count]
