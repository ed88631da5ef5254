"""Texts cut into tokens as no tokenizer does by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dictlearn.transplant.matching import Matching


def fewest(content: bytes, tokens: Mapping[bytes, int]) -> list[int]:
    """The fewest tokens that together stand for `content`; none, if no tokens do.

    Of cuts into equally many it is the one with the least sum of ids: a tokenizer numbers tokens as
    it learns them, and joins first what it has learned first.
    """
    best: list[list[int] | None] = [*([None] * len(content)), []]
    for start in reversed(range(len(content))):
        cuts = []
        for end in range(len(content), start, -1):
            rest, token = best[end], tokens.get(content[start:end])
            if rest is not None and token is not None:
                cuts.append([token, *rest])
        best[start] = min(cuts, key=lambda cut: (len(cut), sum(cut)), default=None)
    return best[0] or []


def cut_as_donor(matching: Matching) -> Callable[[str], list[int]]:
    """A text -> ids of the base's tokens, none of which reaches over a border of the donor's.

    A shared token is the base's own one; another token's text is given to the base's tokenizer by
    itself. Tokens that are no whole UTF-8 text alone are joined with the next ones until they are.
    """
    donor, base = matching.donor, matching.base
    by_bytes = {content: token for token, content in base.tokens.items()}

    def alone(content: bytes) -> list[int]:
        ids = base.encode(content.decode())
        if b"".join(map(base.bytes_of, ids)) == content:
            return ids
        return fewest(content, by_bytes) or ids  # the tokenizer puts a space before every text

    def encode(text: str) -> list[int]:
        found: list[int] = []
        piece: list[int] = []
        for token in donor.encode(text):
            piece.append(token)
            content = b"".join(map(donor.bytes_of, piece))
            if not _whole(content):
                continue
            shared = [matching.copied[one] for one in piece if one in matching.copied]
            found += shared if len(shared) == len(piece) else alone(content)
            piece = []
        return found

    return encode


def _whole(content: bytes) -> bool:
    """Whether bytes are a UTF-8 text."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
