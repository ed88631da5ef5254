"""Which tokens of two vocabularies are the same, and how tokenizers split numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.terminal import UserError
from dictlearn.transplant import digits
from dictlearn.transplant.conventions import Conventions
from dictlearn.transplant.matching import Matching, match
from dictlearn.transplant.vocabulary import Vocabulary, read_vocabulary

Write = Callable[..., Path]
KINDS = ["byte-level", "sentencepiece", "unigram", "wordpiece", "tiktoken"]
WORDS = [" the", " café", " ключ", "ing", " quick"]
SPECIAL = ("<unk>", "<s>", "</s>")


def vocabulary(
    tokens: str | list[bytes], special: str = "", fallback: int = 0, **roles: str
) -> Vocabulary:
    """Special tokens first, both in words; the last `fallback` tokens stand in for bytes."""
    texts = special.split()
    contents = tokens if isinstance(tokens, list) else [word.encode() for word in tokens.split()]
    ids = range(len(texts), len(texts) + len(contents))
    return Vocabulary(
        Path("made/by/hand"),
        "byte-level",
        dict(zip(ids, contents, strict=True)),
        dict(enumerate(texts)),
        frozenset([*ids][len(ids) - fallback :]),
        {role: texts.index(text) for role, text in roles.items()},
    )


def pairs(matching: Matching, how: str) -> dict[str, str]:
    donor, base = matching.donor, matching.base
    return {
        donor.text(own): base.text(other)
        for own, other in matching.copied.items()
        if matching.how[own] == how
    }


def check_whole(matching: Matching) -> None:
    """Every token of the donor is copied or new, once; anchors are shared tokens."""
    told = matching.report()
    counts = [told[kind]["count"] for kind in ("shared", "role", "special", "override")]
    every = {*matching.donor.tokens, *matching.donor.special}
    assert sum(counts) + told["approximated"]["count"] == len(every)
    assert {*matching.copied} | {*matching.new.tolist()} == every
    assert {*matching.copied}.isdisjoint(matching.new.tolist())
    assert matching.how.keys() == matching.copied.keys()
    lost = {*matching.base.tokens} - {*matching.copied.values()}
    assert told["lost"]["count"] == len(lost)
    assert told["anchors"] == len(matching.anchors) <= told["shared"]["count"]
    for own, other in matching.anchors.tolist():
        assert matching.copied[own] == other
        assert matching.how[own] == "shared"
        assert matching.donor.tokens[own] == matching.base.tokens[other]


@pytest.mark.parametrize(("donor", "base"), [*itertools.permutations(KINDS, 2)])
def test_words_are_the_same_across_kinds(
    donor: str, base: str, tmp_path: Path, write_tokenizer: Write
) -> None:
    read = [
        read_vocabulary(write_tokenizer(tmp_path / kind, kind, words, SPECIAL))
        for kind, words in ((donor, [*WORDS, " jumped"]), (base, [*WORDS, " lazy"]))
    ]
    found = match(*read, {})
    check_whole(found)
    shared = pairs(found, "shared")
    assert {word: shared.get(word) for word in WORDS} == {word: word for word in WORDS}
    assert " jumped" in {found.donor.text(token) for token in found.new.tolist()}
    assert pairs(found, "special") == {text: text for text in SPECIAL}
    for own, other in found.copied.items():
        assert found.donor.bytes_of(own) == found.base.bytes_of(other)


def test_single_bytes_of_two_sentencepiece_models_go_together_and_so_do_their_letters(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    one, two = (
        read_vocabulary(write_tokenizer(tmp_path / name, "sentencepiece", words, SPECIAL))
        for name, words in (("one", [" a b c"]), ("two", [" c b a"]))
    )
    found = match(one, two, {})
    check_whole(found)
    for own, other in found.copied.items():
        assert (own in one.fallback) == (other in two.fallback)
    assert not one.fallback & {*found.anchors[:, 0].tolist()}


def test_bytes_that_stand_in_match_bytes_and_are_no_anchors() -> None:
    donor = vocabulary([b"a", b"\xc3", b"\n", b" the"])
    base = vocabulary([b" the", b"a", b"a", b"\xc3", b"\n"], fallback=3)
    found = match(donor, base, {})
    check_whole(found)
    assert found.copied == {0: 1, 1: 3, 2: 4, 3: 0}  # b"a" has a token that does not stand in
    assert found.anchors.tolist() == [[0, 1], [3, 0]]
    back = match(base, donor, {})
    check_whole(back)
    assert back.copied == {0: 3, 1: 0, 3: 1, 4: 2}
    assert back.new.tolist() == [2]  # beside a b"a" that does not stand in
    assert back.anchors.tolist() == [[0, 3], [1, 0]]


def test_roles_go_before_texts() -> None:
    donor = vocabulary("a b", "<begin> </s> <s>", bos="<begin>", eos="</s>")
    base = vocabulary("a b", "<s> <end>", bos="<s>", eos="<end>")
    found = match(donor, base, {})
    check_whole(found)
    assert pairs(found, "role") == {"<begin>": "<s>", "</s>": "<end>"}
    assert pairs(found, "special") == {"<s>": "<s>"}


@pytest.mark.parametrize(
    ("donor", "base", "expected"),
    [
        # The base pads with its end of text: the donor's padding is not given that row.
        (
            {"eos": "<end>", "pad": "<pad>"},
            {"eos": "</s>", "pad": "</s>"},
            {"<end>": "</s>"},
        ),
        # The donor pads with its end of text: that has one row, of the base's end of text.
        (
            {"eos": "<end>", "pad": "<end>"},
            {"eos": "</s>", "pad": "<p>"},
            {"<end>": "</s>"},
        ),
        # The donor begins texts with what ends them.
        (
            {"bos": "<end>", "eos": "<end>"},
            {"bos": "<s>", "eos": "</s>"},
            {"<end>": "<s>"},
        ),
        # The base begins texts with what ends them.
        (
            {"bos": "<begin>", "eos": "<end>"},
            {"bos": "</s>", "eos": "</s>"},
            {"<begin>": "</s>"},
        ),
        ({"bos": "<begin>"}, {"eos": "</s>"}, {}),
    ],
)
def test_a_row_goes_to_one_token_by_its_role(
    donor: dict[str, str], base: dict[str, str], expected: dict[str, str]
) -> None:
    found = match(
        vocabulary("a b", "<begin> <end> <pad>", **donor),
        vocabulary("a b", "<s> </s> <p>", **base),
        {},
    )
    check_whole(found)
    assert pairs(found, "role") == expected


def test_every_special_token_of_both_keeps_a_row_of_its_own() -> None:
    texts = [f"<|tool_{i}|>" for i in range(5)]
    donor = vocabulary("a b", f"<pad> </s> {' '.join(texts)}", eos="</s>", pad="<pad>")
    base = vocabulary("b a", f"<s> </s> {' '.join(reversed(texts))}", bos="<s>", eos="</s>")
    found = match(donor, base, {})
    check_whole(found)
    assert pairs(found, "special") == {text: text for text in texts}
    assert len({*found.copied.values()}) == len(found.copied)
    assert [donor.text(token) for token in found.new.tolist()] == ["<pad>"]


def test_special_tokens_are_not_matched_with_plain_ones_and_are_no_anchors() -> None:
    found = match(vocabulary("a </x>", "<y>"), vocabulary("a <y>", "</x>"), {})
    check_whole(found)
    assert pairs(found, "shared") == {"a": "a"}
    assert not pairs(found, "special")


def test_overrides_go_before_everything_else() -> None:
    donor = vocabulary("a b c", "<end> <turn>", eos="<end>")
    base = vocabulary("a b c", "</s> <turn>", eos="</s>")
    found = match(donor, base, {"<turn>": "</s>", "c": "b"})
    check_whole(found)
    assert pairs(found, "override") == {"<turn>": "</s>", "c": "b"}
    # By its role <end> would have the row that the config gave away.
    assert pairs(found, "role") == {}
    assert pairs(found, "shared") == {"a": "a", "b": "b"}
    assert [donor.text(token) for token in found.new.tolist()] == ["<end>"]
    assert found.anchors.tolist() == [[2, 2], [3, 3]]


@pytest.mark.parametrize("overrides", [{"<none>": "a"}, {"a": "<none>"}, {"": "a"}])
def test_overrides_of_unknown_tokens_are_told(overrides: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"overrides: made/by/hand has no token '(<none>)?'"):
        match(vocabulary("a"), vocabulary("a"), overrides)


@pytest.mark.parametrize(
    ("donor", "base"),
    [
        (vocabulary("a b"), vocabulary("c d")),
        (vocabulary("a b", "</s>"), vocabulary("c d", "</s>")),  # one special token is no anchor
        (vocabulary("a"), vocabulary("a", fallback=1)),  # nor is a byte that stands in
        (vocabulary("a"), vocabulary("")),
    ],
)
def test_vocabularies_that_share_no_tokens_are_told(donor: Vocabulary, base: Vocabulary) -> None:
    with pytest.raises(UserError, match="share no tokens"):
        match(donor, base, {})


def test_vocabularies_are_identical_only_with_the_same_ids_texts_and_roles() -> None:
    one = vocabulary("a b", "<s> </s>", bos="<s>")
    assert match(one, vocabulary("a b", "<s> </s>", bos="<s>"), {}).identical
    for other in (
        vocabulary("b a", "<s> </s>", bos="<s>"),
        vocabulary("a b", "<s> </s>", bos="</s>"),
        vocabulary("a b", "<s> <x>", bos="<s>"),
        vocabulary("a b c", "<s> </s>", bos="<s>"),
    ):
        assert not match(one, other, {}).identical
        assert not match(other, one, {}).identical


def test_examples_are_spread_over_all_and_are_never_more_than_asked_for() -> None:
    words = [f"w{i}" for i in range(100)]
    found = match(vocabulary(" ".join(words)), vocabulary(" ".join(words[:50])), {})
    told = found.report(examples=5)
    assert told["shared"]["examples"] == words[:50:10]
    assert told["approximated"]["examples"] == words[50::10]


def test_conventions_know_every_new_id_of_a_row_that_an_override_or_role_names() -> None:
    donor = vocabulary("a <x>", "<end> <turn>", eos="<end>")
    base = vocabulary("a <x>", "</s> <other>", eos="</s>")
    assert Conventions(match(donor, base, {})).ids[0] == [0]
    assert Conventions(match(donor, base, {"<turn>": "</s>"})).ids[0] == [1]
    assert Conventions(match(donor, base, {"<turn>": "</s>", "<end>": "</s>"})).ids[0] == [1, 0]


# How numbers are split.

NUMBERS = [f"{i:0{n}d}" for n in (2, 3) for i in range(10**n)]
LEFT, RIGHT = r"\p{N}{1,3}", r"\p{N}{1,3}(?=(\p{N}{3})*(\P{N}|$))"


def splitting(pattern: str | None) -> Callable[[Any], None]:
    """A change to a tokenizer: it splits texts by a regular expression, bytes aside."""

    def change(made: Any) -> None:
        import tokenizers

        steps = tokenizers.pre_tokenizers
        pieces = [steps.ByteLevel(add_prefix_space=False, use_regex=False)]
        if pattern is not None:
            pieces.insert(0, steps.Split(tokenizers.Regex(pattern), "isolated"))
        made.pre_tokenizer = steps.Sequence(pieces)

    return change


@pytest.fixture(scope="module")
def schemes(
    tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Write
) -> dict[str, Vocabulary]:
    folder = tmp_path_factory.mktemp("digits")

    def made(name: str, words: list[str], *pattern: str | None) -> Vocabulary:
        return read_vocabulary(
            write_tokenizer(folder / name, "byte-level", words, change=splitting(*pattern))
        )

    return {
        "single digits": made("single", NUMBERS, r"\p{N}"),
        "groups of up to 3 from the left": made("left", NUMBERS, LEFT),
        "groups of up to 3 from the right": made("right", NUMBERS, RIGHT),
        "groups of up to 2 from the left": made("two", NUMBERS, r"\p{N}{1,2}"),
        "irregular": made("irregular", ["98", "1984", "2025"], None),
    }


@pytest.mark.parametrize(
    "name",
    [
        "single digits",
        "groups of up to 3 from the left",
        "groups of up to 3 from the right",
        "groups of up to 2 from the left",
        "irregular",
    ],
)
def test_the_way_in_which_numbers_are_split_is_named(
    name: str, schemes: dict[str, Vocabulary]
) -> None:
    assert digits.scheme(schemes[name]).startswith(name)


def test_regular_expressions_of_the_tests_split_from_their_sides(
    schemes: dict[str, Vocabulary],
) -> None:
    def pieces(name: str) -> list[str]:
        one = schemes[name]
        return [one.text(token) for token in one.encode("20250607")]

    assert pieces("groups of up to 3 from the left") == ["202", "506", "07"]
    assert pieces("groups of up to 3 from the right") == ["20", "250", "607"]


def test_single_digits_are_told_of_a_sentencepiece_model_with_a_space_before_each_text(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    def prepend(made: Any) -> None:
        import tokenizers

        made.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.Prepend("▁"),
                tokenizers.normalizers.Replace(" ", "▁"),
            ]
        )

    directory = write_tokenizer(tmp_path, "sentencepiece", ["0 1 2 3 4 5 6 7 8 9"], change=prepend)
    assert digits.scheme(read_vocabulary(directory)) == "single digits"


def test_a_warning_is_given_only_of_schemes_that_are_known_to_differ(
    schemes: dict[str, Vocabulary], tmp_path: Path, write_tokenizer: Write
) -> None:
    left, single = schemes["groups of up to 3 from the left"], schemes["single digits"]
    unknown = read_vocabulary(write_tokenizer(tmp_path, "tiktoken", WORDS))
    assert digits.schemes(left, unknown)["base"] == "unknown"
    for same in ((left, left), (single, single), (unknown, single), (left, unknown)):
        assert digits.warnings(digits.schemes(*same)) == []
    for donor, base in ((left, single), (single, left)):
        (warning,) = digits.warnings(digits.schemes(donor, base))
        assert f"{digits.scheme(donor)} (donor) and {digits.scheme(base)} (base)" in warning


def test_a_tokenizer_that_has_no_digits_has_no_scheme(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, "wordpiece", WORDS, SPECIAL))
    assert not np.isin([*b"0123456789"], [*b"".join(read.tokens.values())]).any()
    assert digits.scheme(read) == "unknown"
