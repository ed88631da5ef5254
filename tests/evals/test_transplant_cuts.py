"""Cuts of texts: the fewest tokens for some bytes, the donor's borders in the base's tokens."""

from __future__ import annotations

import itertools
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dictlearn.transplant.matching import match
from dictlearn.transplant.vocabulary import Vocabulary, read_vocabulary
from evals.cuts import cut_as_donor, fewest


def every_cut(content: bytes, tokens: dict[bytes, int]) -> list[list[int]]:
    """All ways of writing it, by trying all sets of borders."""
    found = []
    inner = range(1, len(content))
    for count in range(len(content)):
        for borders in itertools.combinations(inner, count):
            ends = [0, *borders, len(content)]
            parts = [content[a:b] for a, b in itertools.pairwise(ends)]
            if all(part in tokens for part in parts):
                found.append([tokens[part] for part in parts])
    return found


def test_the_fewest_tokens_are_those_of_a_search_through_all_cuts() -> None:
    rng = np.random.default_rng(0)
    lengths, none = set(), 0
    for _ in range(200):
        content = bytes(rng.integers(97, 99, rng.integers(1, 9)).tolist())
        parts = {content[a:b] for a in range(9) for b in range(a + 1, 9)} - {content, b""}
        kept = [part for part in sorted(parts) if rng.random() < 0.4]
        tokens = {part: int(token) for part, token in zip(kept, rng.permutation(99), strict=False)}
        cuts = every_cut(content, tokens)
        found = fewest(content, tokens)
        if not cuts:
            none += 1
            assert found == []
            continue
        assert found in cuts
        assert (len(found), sum(found)) == min((len(cut), sum(cut)) for cut in cuts)
        lengths.add(len(found))
    assert none > 10
    assert len(lengths) > 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []), (b"x", []), (b"abx", []), (b"ab", [2]), (b"aab", [0, 2]), (b"aba", [2, 0]),
        (b"abcc", [1, 5]),  # not the longest first, "ab", which would leave two
        (b"abb", [4, 1]),  # of "ab" "b" and "a" "bb", whichever was learned first
    ],
)  # fmt: skip
def test_few_tokens_are_better_than_a_long_first_one_and_old_ones_better_than_new(
    content: bytes, expected: list[int]
) -> None:
    tokens = {b"a": 0, b"b": 9, b"ab": 2, b"c": 3, b"bcc": 5, b"bb": 20}
    if content == b"abb":
        tokens |= {b"ab": 4, b"b": 1, b"bb": 6}
    if content == b"abcc":
        tokens |= {b"a": 1}
    assert fewest(content, tokens) == expected


DONOR = {
    1: b"the", 2: b" dog", 3: b"s", 4: b"\xc3", 5: b"\xa9", 6: b"t\xc3", 7: b"<end>", 8: b" caf",
}  # fmt: skip
BASE = {
    10: b"the", 11: b" ", 12: b"d", 13: b"o", 14: b"g", 15: b"s", 16: b"\xc3", 17: b"\xa9",
    18: b"\xc3\xa9", 19: b"t", 20: b" do", 21: b"dog",
}  # fmt: skip


def pair(copied: dict[int, int], ids: list[int], encode: Callable[[str], list[int]]) -> Any:
    """A matching whose donor reads whatever it is given as `ids`."""
    donor = types.SimpleNamespace(encode=lambda _: ids, bytes_of=DONOR.__getitem__)
    base = types.SimpleNamespace(encode=encode, bytes_of=BASE.__getitem__, tokens=BASE)
    return types.SimpleNamespace(donor=donor, base=base, copied=copied)


def letters(text: str) -> list[int]:
    """A base that knows the longest of its tokens from the left."""
    found, content = [], text.encode()
    while content:
        token = max((token for token in BASE if content.startswith(BASE[token])),
                    key=lambda token: len(BASE[token]))  # fmt: skip
        found.append(token)
        content = content[len(BASE[token]) :]
    return found


@pytest.mark.parametrize(
    ("ids", "copied", "expected"),
    [
        ([1, 2, 3], {1: 10, 3: 15}, [10, 20, 14, 15]),
        ([1, 2, 3], {1: 10, 2: 14, 3: 15}, [10, 14, 15]),  # a row is OUT's, whatever its bytes
        ([4, 5], {}, [18]),  # no text by themselves, and one together
        ([4, 5], {4: 16}, [18]),
        ([4, 5, 3], {4: 16, 5: 17, 3: 15}, [16, 17, 15]),  # OUT reads the base's own two rows
        ([3, 6, 5, 2], {3: 15, 5: 17}, [15, 19, 18, 20, 14]),
    ],
)
def test_a_shared_token_is_one_token_and_others_are_cut_by_the_base_alone(
    ids: list[int], copied: dict[int, int], expected: list[int]
) -> None:
    assert cut_as_donor(pair(copied, ids, letters))("whatever") == expected


def test_a_space_that_the_base_puts_before_a_text_does_not_stand_between_pieces() -> None:
    def spaced(text: str) -> list[int]:
        return letters(text if text.startswith(" ") else f" {text}")

    assert letters(" dogs") == [20, 14, 15]
    DONOR[9] = b"dogs"
    assert spaced("dogs") == [20, 14, 15]
    assert cut_as_donor(pair({1: 10}, [1, 9], spaced))("") == [10, 21, 15]
    assert cut_as_donor(pair({1: 10}, [1, 2], spaced))("") == [10, 20, 14]


LETTERS = "一丁七万丈三上下不丐丑专且世丘丙业丛东丝"  # three bytes, the first two the same
TEXT = f"A café, déjà vu! {LETTERS[3:9]} und 한국, \U0001f600 12 345; the cat's hat.\n\tжд"


def saved(directory: Path, held: dict[str, Any]) -> Vocabulary:
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(held), encoding="utf-8")
    return read_vocabulary(directory)


def byte_level(directory: Path, size: int, text: str) -> Vocabulary:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text] * 3,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    return saved(directory, json.loads(bpe.to_str()))


def sentencepiece(directory: Path, text: str, *, begins_with_space: bool) -> Vocabulary:
    """A BPE with bytes for letters that it does not know, which are all but Latin ones."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps: list[Any] = [normalizers.Prepend("▁")] if begins_with_space else []
    bpe.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    bpe.train_from_iterator(
        [one for one in text.split() if one.isascii()],
        trainers.BpeTrainer(
            vocab_size=310, special_tokens=["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁"],
            show_progress=False,
        ),
    )  # fmt: skip
    held = json.loads(bpe.to_str())
    return saved(directory, held | {"added_tokens": held["added_tokens"][:1]})


def whole(content: bytes) -> bool:
    return content.decode("utf-8", "ignore").encode() == content


@pytest.mark.parametrize("kind", ["byte-level", "spaces", "spaces, one before every text"])
def test_no_byte_of_a_text_is_dropped_and_no_border_of_the_donor_is_crossed(
    tmp_path: Path, kind: str
) -> None:
    donor = byte_level(tmp_path / "donor", 300, f"{LETTERS} the that dé dà v und cat's ")
    if kind == "byte-level":
        base = byte_level(tmp_path / "base", 300, "café déjà vu this und 한국 345 the, 이")
    else:
        base = sentencepiece(tmp_path / "base", TEXT, begins_with_space="before" in kind)
    matching = match(donor, base, {})
    contents = [base.bytes_of(token) for token in cut_as_donor(matching)(TEXT)]
    assert b"".join(contents) == TEXT.encode()
    ids = donor.encode(TEXT)
    own = [donor.tokens[token] for token in ids]
    new = {*matching.new.tolist()}
    assert any(token in new and not whole(donor.tokens[token]) for token in ids)
    assert any(token in new and whole(donor.tokens[token]) for token in ids)
    assert any(len(donor.tokens[token]) > 1 for token in ids if token not in new)
    borders = {*itertools.accumulate(map(len, contents))}
    expected = {*itertools.accumulate(map(len, own))}
    assert {at for at in expected if whole(TEXT.encode()[:at])} <= borders


def test_a_text_cut_by_its_own_tokenizer_is_cut_as_ever(tmp_path: Path) -> None:
    one = byte_level(tmp_path / "one", 350, TEXT)
    assert cut_as_donor(match(one, one, {}))(TEXT) == one.encode(TEXT)
