"""Tokens of every kind of tokenizer as bytes: the same text is the same bytes in all of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activations.terminal import UserError
from dictlearn.transplant.vocabulary import Vocabulary, read_vocabulary

Write = Callable[..., Path]
KINDS = ["byte-level", "sentencepiece", "unigram", "wordpiece", "tiktoken"]
WORDS = [" the", " café", "ing", " ключ", "12", "日本"]
SPECIAL = ("<unk>", "<s>", "</s>")
# Letters of bytes as GPT-2 writes them, from its own table.
LETTERS = {
    "Ġ": b" ",
    "Ċ": b"\n",
    "ĉ": b"\t",
    "Ã": b"\xc3",
    "Ã©": "é".encode(),
    "âĤ": b"\xe2\x82",
    "Ģ": b"\x80",
    "ÿ": b"\xff",
    "Ń": b"\xad",
    "ł": b"\xa0",
}


def changed(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same directory with another tokenizer.json."""
    file = directory / "tokenizer.json"
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))
    return directory


def joined(vocabulary: Vocabulary, text: str) -> bytes:
    return b"".join(vocabulary.bytes_of(token) for token in vocabulary.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_has_the_same_bytes_in_every_kind(
    kind: str, tmp_path: Path, write_tokenizer: Write
) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, kind, WORDS, SPECIAL))
    assert read.kind == ("sentencepiece" if kind == "unigram" else kind)
    assert {word.encode() for word in WORDS} <= {*read.tokens.values()}
    assert {*read.special.values()} == {*SPECIAL}
    assert not read.tokens.keys() & read.special.keys()
    assert len(read) == len(read.tokens) + len(read.special)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("text", [" the café", "ключ\n\t12", "日本語 €🙂", "\xa0\xadé", "a  b"])
def test_the_tokens_of_a_text_are_together_its_bytes(
    kind: str, text: str, tmp_path: Path, write_tokenizer: Write
) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, kind, WORDS, SPECIAL))
    assert joined(read, text) == text.encode()


def test_a_word_of_wordpiece_begins_with_a_space_and_its_parts_do_not(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, "wordpiece", [" the", "ing"], SPECIAL))
    assert joined(read, "the thing the") == b" the thing the"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram"])
def test_a_token_is_what_its_tokenizer_decodes_it_to(
    kind: str, tmp_path: Path, write_tokenizer: Write
) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, kind, WORDS, SPECIAL))
    for token, content in read.tokens.items():
        assert read.tokenizer.decode([token]) == content.decode("utf-8", "replace")


def test_letters_of_byte_level_tokens_are_bytes_also_where_they_are_no_whole_text(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, "byte-level", ["é", "€"]))
    ids = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert {text: read.tokens[ids[text]] for text in LETTERS} == LETTERS
    single = sorted(content for content in read.tokens.values() if len(content) == 1)
    assert single == [bytes([byte]) for byte in range(256)]
    assert not read.fallback


def test_bytes_of_sentencepiece_stand_in_and_are_marked(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, "sentencepiece", [" a"], SPECIAL))
    assert sorted(read.tokens[token] for token in read.fallback) == [
        bytes([byte]) for byte in range(256)
    ]
    a = [token for token, content in read.tokens.items() if content == b"a"]
    assert len(a) == 2
    assert len(read.fallback & {*a}) == 1


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_added_tokens_are_text_and_special_only_if_they_are_marked(
    kind: str, tmp_path: Path, write_tokenizer: Write
) -> None:
    added = ("<tool>", "é\n", "Ġx")
    read = read_vocabulary(write_tokenizer(tmp_path, kind, WORDS, SPECIAL, plain=added))
    for text in added:
        token = read.by_text[text]
        assert read.tokens[token] == text.encode()
        assert token not in read.special
        assert token == read.tokenizer.token_to_id(text)
    assert {read.text(token) for token in read.added} == {*added}


def test_an_added_token_that_sentencepiece_has_itself_is_read_as_its_own(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    """As Gemma's runs of spaces: pieces of its model that are listed as added tokens, too."""
    read = read_vocabulary(
        write_tokenizer(tmp_path, "sentencepiece", ["    "], SPECIAL, plain=("▁▁",))
    )
    token = read.tokenizer.token_to_id("▁▁")
    assert read.tokenizer.decode([token]) == "  "
    assert read.tokens[token] == b"  "


@pytest.mark.parametrize("told", [str, lambda text: {"content": text, "lstrip": False}])
def test_roles_are_read_from_texts_and_from_tables(
    told: Callable[[str], Any], tmp_path: Path, write_tokenizer: Write
) -> None:
    config = {"bos_token": told("<s>"), "eos_token": told("</s>"), "pad_token": told("</s>")}
    config |= {"unk_token": None, "mask_token": told("<nowhere>")}
    read = read_vocabulary(write_tokenizer(tmp_path, "byte-level", [], SPECIAL, config=config))
    assert read.roles == {"bos": 1, "eos": 2, "pad": 2}


@pytest.mark.parametrize("told", [str, lambda text: {"content": text}])
def test_roles_are_read_from_the_special_tokens_map_of_older_models(
    told: Callable[[str], Any], tmp_path: Path, write_tokenizer: Write
) -> None:
    config = {"eos_token": None, "model_max_length": 7}
    write_tokenizer(tmp_path, "byte-level", [], SPECIAL, config=config)
    map_ = {"bos_token": told("<s>"), "eos_token": told("</s>")}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(map_))
    # What tokenizer_config.json says itself goes first, also where it says that there is none.
    assert read_vocabulary(tmp_path).roles == {"bos": 1}


def test_a_tokenizer_without_a_tokenizer_config_has_no_roles(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    write_tokenizer(tmp_path, "byte-level", WORDS, SPECIAL)
    (tmp_path / "tokenizer_config.json").unlink()
    read = read_vocabulary(tmp_path)
    assert read.roles == {}
    assert {*read.special.values()} == {*SPECIAL}


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODEL, ALL = {"config.json": IDS}, {"bos": 1, "eos": 2, "pad": 0}


@pytest.mark.parametrize(
    ("files", "named", "expected"),
    [
        (MODEL, {}, ALL),
        ({"config.json": {"text_config": IDS}}, {}, ALL),
        ({"generation_config.json": {"eos_token_id": 2}}, {}, {"eos": 2}),
        # Of several the first; the model's own config goes before that of generation.
        ({"config.json": {"eos_token_id": [2, 0]}}, {}, {"eos": 2}),
        (MODEL | {"generation_config.json": {"eos_token_id": 0}}, {}, ALL),
        # As GPT-2's, whose tokenizer names none: one token does all.
        ({"config.json": {"bos_token_id": 2, "eos_token_id": 2}}, {}, {"bos": 2, "eos": 2}),
        # What the tokenizer names goes first, also where it names nothing.
        (MODEL, {"eos_token": "<unk>"}, {"bos": 1, "eos": 0, "pad": 0}),
        (MODEL, {"bos_token": None}, {"eos": 2, "pad": 0}),
        # A token that the tokenizer ends texts with does not begin them by a config's word.
        ({"config.json": {"bos_token_id": 2}}, {"eos_token": "</s>"}, {"eos": 2}),
        # No special tokens: an ordinary one, one that is not there, none, and nonsense.
        ({"config.json": {"eos_token_id": 5, "bos_token_id": 10**6}}, {}, {}),
        ({"config.json": {"eos_token_id": None, "bos_token_id": []}}, {}, {}),
        ({"config.json": {"eos_token_id": "</s>", "text_config": None}}, {}, {}),
    ],
    ids=str,
)
def test_roles_that_a_tokenizer_does_not_name_are_read_from_the_models_configs(
    files: dict[str, Any], named: dict[str, Any], expected: dict[str, int],
    tmp_path: Path, write_tokenizer: Write,
) -> None:  # fmt: skip
    write_tokenizer(tmp_path, "byte-level", WORDS, SPECIAL, config=named)
    for name, held in files.items():
        (tmp_path / name).write_text(json.dumps(held))
    assert read_vocabulary(tmp_path).roles == expected


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram", "wordpiece"])
def test_a_model_that_does_not_name_its_type_is_read_all_the_same(
    kind: str, tmp_path: Path, write_tokenizer: Write
) -> None:
    """As in GPT-2's own tokenizer.json, which is older than the key."""
    write_tokenizer(tmp_path, kind, WORDS, SPECIAL)
    told = read_vocabulary(tmp_path)
    read = read_vocabulary(changed(tmp_path, lambda held: held["model"].pop("type")))
    assert read.tokenizer.get_vocab_size() == len(told)  # the library reads it, too
    assert (read.kind, read.tokens, read.fallback) == (told.kind, told.tokens, told.fallback)


@pytest.mark.parametrize("last", [False, True])
def test_spaces_are_found_whatever_else_is_replaced(
    last: bool, tmp_path: Path, write_tokenizer: Write
) -> None:
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    steps.insert(0 if last else 1, {"type": "Replace", "pattern": {"Regex": "x+"}, "content": "x"})
    write_tokenizer(tmp_path, "sentencepiece", [" the"], SPECIAL)

    def change(held: dict[str, Any]) -> None:
        held["normalizer"] = {"type": "Sequence", "normalizers": steps}
        held["decoder"] = None
        held["model"]["byte_fallback"] = False

    read = read_vocabulary(changed(tmp_path, change))
    assert b" the" in read.tokens.values()


def test_texts_of_tokens_lead_back_to_their_ids_special_ones_first(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, "byte-level", WORDS, SPECIAL))
    for token in [*read.tokens, *read.special]:
        found = read.by_text[read.text(token)]
        assert read.text(found) == read.text(token)
    assert [read.by_text[text] for text in SPECIAL] == [0, 1, 2]
    assert read.by_text[" café"] == read.encode(" café")[0]


def word_level(held: dict[str, Any]) -> None:
    vocab = dict.fromkeys(["a", "b"], 0) | {"b": 1}
    held["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}


@pytest.mark.parametrize(
    "change",
    [
        word_level,
        lambda held: held["model"].update(end_of_word_suffix="</w>"),
        lambda held: held.update(pre_tokenizer=None, decoder=None),  # BPE of plain letters
    ],
)
def test_kinds_that_are_not_understood_are_named_with_those_that_are(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path, write_tokenizer: Write
) -> None:
    write_tokenizer(tmp_path, "byte-level", WORDS)
    with pytest.raises(UserError) as caught:
        read_vocabulary(changed(tmp_path, change))
    said = str(caught.value)
    assert str(tmp_path / "tokenizer.json") in said
    kind = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"]
    assert kind in said
    assert "not understood" in said
    assert "Name another model" in said
    assert "WordPiece" in said


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"model": {"type": "BPE", "vo'),
        ("tokenizer.json", "[1, 2]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("tokenizer.json", '{"model": null}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": [1]}, "decoder": 3}'),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": {"a": 1}}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}}, "added_tokens": [{"id": 1}]}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '"text"'),
        ("x.tiktoken", "YQ== 0\nYg==\n"),
        ("x.tiktoken", "YQ== 0\n*** 1\n"),
        ("x.tiktoken", "YQ== zero\n"),
        ("x.tiktoken", "YQ== 0 1\n"),
        ("tokenizer.model", "\x0a\x0e\x0a\x05<unk>\x15\x00"),  # SentencePiece's own format
    ],
)
def test_a_damaged_file_is_named(
    file: str, text: str, tmp_path: Path, write_tokenizer: Write
) -> None:
    kind = "tiktoken" if file in ("x.tiktoken", "tokenizer.model") else "byte-level"
    write_tokenizer(tmp_path, kind, WORDS)
    (tmp_path / "own.tiktoken").unlink(missing_ok=True)
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_vocabulary(tmp_path)
    assert str(tmp_path / file) in str(caught.value)


def test_a_directory_without_a_tokenizer_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"save_pretrained") as caught:
        read_vocabulary(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tiktoken_file_is_read_whatever_it_is_called(
    tmp_path: Path, write_tokenizer: Write
) -> None:
    """Llama 3 calls its own tokenizer.model; blank lines and the order do not matter."""
    lines = [(b"a", 1), (b"\xff\xfe", 0), (b" the", 5)]
    text = "\n\n".join(f"{base64.b64encode(content).decode()} {rank}" for content, rank in lines)
    (tmp_path / "tokenizer.model").write_text(text)
    read = read_vocabulary(tmp_path)
    assert read.tokens == {rank: content for content, rank in lines}
    assert len(read) == 6


def test_encoding_needs_a_tokenizer_json(tmp_path: Path, write_tokenizer: Write) -> None:
    read = read_vocabulary(write_tokenizer(tmp_path, "tiktoken", WORDS))
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        read.encode("a")
