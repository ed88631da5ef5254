"""Laws of packing: nothing lost, nothing twice, every token with its document."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import processors

from activations.corpora import Files
from activations.sequences import PADDING, Marks, Written, has_row, positions, targets, write
from activations.store import SEQUENCES, VOCABULARY
from activations.terminal import UserError

WORDS = ["the", "a", "lazy", "quick", "fox", "dog", "jumps", "mind,", "then;", "naïve", "雨"]
KINDS = ("bos and eos", "bos is eos", "eos only", "neither")
MARKS: tuple[Marks, ...] = ("bos", "eos", "none")


def make_tokenizer(kind: str, directory: Path) -> Any:
    """The tiny model's tokenizer with these marks, and no padding of its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = None
    if kind == "bos is eos":
        tokenizer.bos_token = tokenizer.eos_token
    if kind in ("eos only", "neither"):
        tokenizer.bos_token = None
    if kind == "neither":
        tokenizer.eos_token = None
    return tokenizer


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Any:
    return make_tokenizer(request.param, tiny_model_dir)


def corpus(folder: Path, *documents: str) -> Files:
    """One file a document."""
    folder.mkdir(exist_ok=True)
    for index, document in enumerate(documents):
        (folder / f"{index:04d}.txt").write_text(document)
    return Files("files", (str(folder / "*.txt"),))


def random_documents(seed: int, count: int) -> list[str]:
    """Documents of 0 to 40 words; some begin or end with, or hold, special tokens."""
    rng = random.Random(seed)
    documents = []
    for index in range(count):
        words = [str(index), *rng.choices(WORDS, k=rng.randrange(40))]
        for _ in range(rng.randrange(3)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(["<s>", "</s>"]))
        documents.append(" ".join(words))
    return documents


def packed(
    folder: Path, documents: list[str], tokenizer: Any, context_length: int, **options: Any
) -> tuple[Written, np.ndarray, np.ndarray]:
    """What `write` says it wrote; tokens; documents."""
    written = write(
        folder, corpus(folder / "text", *documents), tokenizer, context_length=context_length,
        **options,
    )  # fmt: skip
    sequences = np.load(folder / SEQUENCES)
    assert sequences.shape == (written.n_sequences, 2, context_length)
    assert sequences.dtype == np.dtype("<i4")
    assert set(written.files) == {SEQUENCES, VOCABULARY}
    return written, sequences[:, 0], sequences[:, 1]


def text_tokens(documents: list[str], tokenizer: Any) -> list[tuple[int, int]]:
    """Each token that is not special, with the number of its document."""
    special = tokenizer.all_special_ids
    return [
        (token, index)
        for index, document in enumerate(documents)
        for token in tokenizer(document, add_special_tokens=False)["input_ids"]
        if token not in special
    ]


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("context_length", [2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(2))
def test_packing_loses_and_doubles_nothing(
    tmp_path: Path, tokenizer: Any, marks: Marks, context_length: int, seed: int
) -> None:
    documents = random_documents(seed, 30)
    if marks == "eos" and tokenizer.eos_token_id is None:
        with pytest.raises(UserError, match="the tokenizer has no EOS"):
            packed(tmp_path, documents, tokenizer, context_length, marks=marks)
        return
    written, token, document = packed(tmp_path, documents, tokenizer, context_length, marks=marks)
    rows = document >= 0
    found = list(zip(token[rows].tolist(), document[rows].tolist(), strict=True))
    assert found == text_tokens(documents, tokenizer)
    assert (written.n_rows, written.exhausted) == (len(found), True)
    assert written.n_documents == len({index for _, index in found})
    # What has no row is special, or padding: at the end of the last sequence, and nowhere else.
    padding = document == PADDING
    assert not padding[:-1].any()
    last = np.flatnonzero(padding[-1])
    np.testing.assert_array_equal(last, np.arange(context_length - len(last), context_length))
    assert np.isin(token[~rows & ~padding], tokenizer.all_special_ids).all()
    assert not np.isin(token[rows], tokenizer.all_special_ids).any()
    # A special token belongs to the document in which it stands: owners never fall back.
    owner = np.where(document < 0, ~document, document)[~padding]
    assert (np.diff(owner) >= 0).all()
    check_marks(token, document, tokenizer, marks)


def check_marks(token: np.ndarray, document: np.ndarray, tokenizer: Any, marks: Marks) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = {"bos": eos if bos is None else bos, "eos": bos, "none": None}[marks]
    if begin is not None:
        assert (token[:, 0] == begin).all()
    for ids, owners in zip(token, np.where(document < 0, ~document, document), strict=True):
        for at in range(1, len(ids)):
            if owners[at] == owners[at - 1] or owners[at] == ~PADDING:
                continue
            if marks == "bos" and begin is not None:
                assert ids[at] == begin
            if marks == "eos":
                assert ids[at - 1] == eos


def test_no_mark_is_set_twice(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Not before a text that begins with BOS, nor where a document begins a sequence."""
    tokenizer = make_tokenizer("bos and eos", tiny_model_dir)
    bos = tokenizer.bos_token_id
    letters = ["abc", "<s>def", "ghi"]
    _, token, document = packed(tmp_path, letters, tokenizer, 4)
    assert (token == bos).sum() == 3
    np.testing.assert_array_equal(token[:, 0], bos)
    np.testing.assert_array_equal(document, [[~i, i, i, i] for i in range(3)])


def test_a_sequence_that_begins_within_a_document_is_marked(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    tokenizer = make_tokenizer("bos and eos", tiny_model_dir)
    _, token, document = packed(tmp_path, ["abcdefgh"], tokenizer, 4)
    a, bos, eos = tokenizer("a").input_ids[-1], tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = eos  # the tokenizer has no padding of its own
    expected = [[bos, a, a + 1, a + 2], [bos, a + 3, a + 4, a + 5], [bos, a + 6, a + 7, pad]]
    np.testing.assert_array_equal(token, expected)
    np.testing.assert_array_equal(document, [[~0, 0, 0, 0]] * 2 + [[~0, 0, 0, PADDING]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<s>", "</s>", "!"])
def test_padding_is_on_the_right_whatever_the_tokenizer_prefers(
    tmp_path: Path, tiny_model_dir: Path, side: str, pad: str
) -> None:
    tokenizer = make_tokenizer("bos and eos", tiny_model_dir)
    _, plain, plain_document = packed(tmp_path, ["the lazy dog"], tokenizer, 64)
    tokenizer.pad_token, tokenizer.padding_side = pad, side
    _, token, document = packed(tmp_path, ["the lazy dog"], tokenizer, 64)
    np.testing.assert_array_equal(document, plain_document)
    np.testing.assert_array_equal(token[document != PADDING], plain[document != PADDING])
    assert set(token[document == PADDING]) == {tokenizer.pad_token_id}


def test_a_tokenizer_that_adds_its_own_marks_does_not_double_them(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    tokenizer = make_tokenizer("bos and eos", tiny_model_dir)
    _, plain, _ = packed(tmp_path, random_documents(0, 9), tokenizer, 8)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert tokenizer("fox").input_ids[0] == bos
    _, token, _ = packed(tmp_path, random_documents(0, 9), tokenizer, 8)
    np.testing.assert_array_equal(token, plain)


@pytest.mark.parametrize("predicting", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 7, 8, 100, 10**6])
def test_max_tokens_ends_with_the_sequence_that_reaches_it(
    tmp_path: Path, tokenizer: Any, max_tokens: int, predicting: bool
) -> None:
    documents = random_documents(0, 30)
    _, whole, documents_of_whole = packed(tmp_path, documents, tokenizer, 8)
    written, token, document = packed(
        tmp_path, documents, tokenizer, 8, max_tokens=max_tokens, predicting=predicting
    )
    np.testing.assert_array_equal(token, whole[: len(token)])
    np.testing.assert_array_equal(document, documents_of_whole[: len(token)])
    rows = has_row(document, predicting=predicting).sum(axis=1)
    assert written.n_rows == rows.sum()
    assert written.n_documents == len(np.unique(document[has_row(document, predicting=predicting)]))
    every = has_row(documents_of_whole, predicting=predicting).sum()
    assert written.exhausted == (every < max_tokens)
    assert written.exhausted or rows.sum() >= max_tokens
    assert rows[:-1].sum() < max_tokens


def test_repeated_lines_stand_once_in_the_whole_corpus(tmp_path: Path, tokenizer: Any) -> None:
    documents = [
        "licence\nfirst fox\nfirst fox\n\n",
        "  licence\t\nsecond dog\nsecond dog lazy\n",
        "licence\nfirst fox\n",
        "third\n",
    ]
    kept = ["licence\nfirst fox\n\n", "second dog\nsecond dog lazy\n", "third\n"]
    written, token, document = packed(tmp_path, documents, tokenizer, 5)
    rows = document >= 0
    found = list(zip(token[rows].tolist(), document[rows].tolist(), strict=True))
    assert found == text_tokens(kept, tokenizer)
    assert written.n_documents == 3


def test_a_corpus_without_rows_is_told(tmp_path: Path, tiny_model_dir: Path) -> None:
    tokenizer = make_tokenizer("bos and eos", tiny_model_dir)
    cases: list[tuple[list[str], bool, str]] = [
        (["", " \n\t"], False, "holds no text"),
        (["</s>" * 640], False, "no token gets a row"),
        (["a", "b", "c"], True, "no token gets a row"),
    ]
    for number, (documents, predicting, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=rf"^corpus: {expected}"):
            packed(folder, documents, tokenizer, 64, predicting=predicting)
        assert [path.name for path in folder.iterdir()] == ["text"]


def test_the_vocabulary_holds_what_occurs_as_the_tokenizer_writes_it(
    tmp_path: Path, tokenizer: Any
) -> None:
    _, token, _ = packed(tmp_path, random_documents(1, 20), tokenizer, 16)
    table = json.loads((tmp_path / VOCABULARY).read_text())
    assert {int(key) for key in table} == set(token.ravel().tolist())
    assert all(text == tokenizer.decode([int(key)]) for key, text in table.items())


def test_a_long_corpus_is_never_held_whole(tmp_path: Path, tiny_model_dir: Path) -> None:
    class Endless(Files):
        def documents(self) -> Iterator[str]:
            return (f"{number} the lazy dog " * 20 for number in itertools.count())

    tokenizer = make_tokenizer("bos and eos", tiny_model_dir)
    peaks = []
    for max_tokens in (150_000, 600_000):
        tracemalloc.start()
        written = write(
            tmp_path, Endless("files", ("x",)), tokenizer, context_length=64, max_tokens=max_tokens
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = (tmp_path / SEQUENCES).stat().st_size
    assert size > written.n_rows * 8 > 4_500_000
    # Beside the batch in hand, only the digests of lines grow with the text.
    assert peaks[1] - peaks[0] < size / 3


# Which tokens count


@pytest.mark.parametrize("seed", range(20))
def test_rows_targets_and_positions_are_what_a_loop_would_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    owner = np.sort(rng.integers(0, 4, (5, 12)), axis=1).astype(np.int32)
    document = np.where(rng.random((5, 12)) < 0.3, ~owner, owner).astype(np.int32)
    document[-1, 9:] = PADDING
    rows, predicting = has_row(document, predicting=False), has_row(document, predicting=True)
    target, position = targets(document), positions(document)
    for s, t in np.ndindex(document.shape):
        here = document[s, t]
        mine = here if here >= 0 else ~here
        before = document[s, t - 1] if t else None
        begins = before is None or (before if before >= 0 else ~before) != mine
        assert rows[s, t] == (here >= 0)
        after = document[s, t + 1] if t + 1 < 12 else None
        assert predicting[s, t] == (here >= 0 and after == here)
        assert target[s, t] == (here >= 0 and not begins)
        assert position[s, t] == (0 if begins else position[s, t - 1] + 1)
    # Where a token predicts the next one, the next one is a target.
    assert (target[:, 1:] >= predicting[:, :-1]).all()
