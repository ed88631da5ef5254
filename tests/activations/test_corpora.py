"""Laws of reading and packing text: nothing lost, nothing twice, every token with its document."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import transformers

from activations.corpora import Files, HubDataset, Packed, PythonDocs, pack
from activations.terminal import UserError

WORDS = ["the", "a", "lazy", "quick", "fox", "dog", "jumps", "mind,", "then;", "naïve", "雨"]


@pytest.fixture(params=["bos", "eos only", "neither"])
def tokenizer(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Any:
    """The tiny model's tokenizer: with BOS and EOS, with EOS alone, with neither."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    if request.param != "bos":
        tokenizer.bos_token = tokenizer.pad_token = None
    if request.param == "neither":
        tokenizer.eos_token = None
    return tokenizer


def bos_of(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def files(folder: Path, *documents: str, **options: Any) -> Files:
    """A corpus of one file a document."""
    for index, document in enumerate(documents):
        (folder / f"{index:04d}.txt").write_text(document)
    return Files("files", (str(folder / "*.txt"),), **options)


def random_documents(seed: int, count: int) -> list[str]:
    """Documents of 0 to 40 words; some begin or end with, or hold, special tokens."""
    rng = random.Random(seed)
    marks = ["<s>", "</s>"]
    documents = []
    for index in range(count):
        words = [str(index), *rng.choices(WORDS, k=rng.randrange(40))]
        for _ in range(rng.randrange(3)):
            words.insert(rng.randrange(len(words) + 1), rng.choice(marks))
        documents.append(" ".join(words))
    return documents


def check_packing(
    packed: Packed, documents: list[str], tokenizer: Any, context_length: int
) -> None:
    bos, special = bos_of(tokenizer), tokenizer.all_special_ids
    assert packed.token.shape == packed.document.shape
    assert packed.token.shape[1] == context_length
    assert packed.token.dtype == packed.document.dtype == np.int32
    # Special tokens, and they alone, belong to no document: they give no rows.
    np.testing.assert_array_equal(packed.document == -1, np.isin(packed.token, special))
    if bos is not None:
        assert (packed.token[:, 0] == bos).all()
        # Between two documents in a sequence stands a BOS.
        for token, document in zip(packed.token, packed.document, strict=True):
            kept = np.flatnonzero(document >= 0)
            for left, right in itertools.pairwise(kept):
                if document[left] != document[right]:
                    assert bos in token[left:right]
    # Every token of the text stands there once, in order, under its document's number.
    pairs = [
        (token, index)
        for index, document in enumerate(documents)
        for token in tokenizer(document, add_special_tokens=False)["input_ids"]
        if token not in special
    ]
    kept = packed.document >= 0
    found = list(zip(packed.token[kept].tolist(), packed.document[kept].tolist(), strict=True))
    assert found == pairs[: len(found)]
    assert packed.n_rows == len(found)
    assert packed.n_documents == len({index for _, index in found})
    if packed.exhausted:
        assert len(pairs) - len(found) < context_length


@pytest.mark.parametrize("context_length", [2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(3))
def test_packing_loses_and_doubles_nothing(
    tmp_path: Path, tokenizer: Any, context_length: int, seed: int
) -> None:
    documents = random_documents(seed, 30)
    corpus = files(tmp_path, *documents)
    packed = pack(corpus, tokenizer, context_length=context_length, max_tokens=None)
    assert packed.exhausted
    check_packing(packed, documents, tokenizer, context_length)


@pytest.mark.parametrize("max_tokens", [1, 7, 8, 100, 10**6])
def test_max_tokens_ends_with_the_sequence_that_reaches_it(
    tmp_path: Path, tokenizer: Any, max_tokens: int
) -> None:
    documents = random_documents(0, 30)
    corpus = files(tmp_path, *documents)
    packed = pack(corpus, tokenizer, context_length=8, max_tokens=max_tokens)
    check_packing(packed, documents, tokenizer, 8)
    whole = pack(corpus, tokenizer, context_length=8, max_tokens=None)
    assert packed.exhausted == (whole.n_rows < max_tokens)
    assert packed.exhausted or packed.n_rows >= max_tokens
    if len(packed.token) > 1:
        assert (packed.document[:-1] >= 0).sum() < max_tokens
    np.testing.assert_array_equal(packed.token, whole.token[: len(packed.token)])


def test_the_hash_tells_texts_and_documents_apart(tmp_path: Path, tokenizer: Any) -> None:
    one = Files("files", (str(tmp_path / "0000.txt"),))
    two = files(tmp_path, "a lazy dog " * 9, "a quick fox " * 9)
    first, both, again = (
        pack(corpus, tokenizer, context_length=8, max_tokens=None).sha256()
        for corpus in (one, two, two)
    )
    assert first != both == again


@pytest.mark.parametrize("tokenizer", ["bos"], indirect=True)
def test_a_long_document_is_packed_in_linear_time(tmp_path: Path, tokenizer: Any) -> None:
    corpus = files(tmp_path, "\n".join(map(str, range(100_000))))
    tokenizer("warm")
    start = time.monotonic()
    packed = pack(corpus, tokenizer, context_length=4, max_tokens=None)
    assert len(packed.token) > 100_000
    assert time.monotonic() - start < 20  # seconds; copying the rest for each sequence: minutes


def test_a_corpus_without_text_or_too_short_is_told(tmp_path: Path, tokenizer: Any) -> None:
    for documents, expected in [
        (["", " \n\t"], "holds no text"),
        (["the lazy dog"], "do not fill one sequence of context_length 64"),
        (["</s>" * 640], "do not fill one sequence"),
    ]:
        if "</s>" in documents[0] and bos_of(tokenizer) is None:
            continue  # then it is text
        with pytest.raises(UserError, match=rf"^corpus: .*({expected})"):
            pack(files(tmp_path, *documents), tokenizer, context_length=64, max_tokens=None)


def test_repeated_lines_stand_once_in_the_whole_corpus(tmp_path: Path, tokenizer: Any) -> None:
    corpus = files(
        tmp_path,
        "licence\nfirst fox\nfirst fox\n\n",
        "  licence\t\nsecond dog\nsecond dog lazy\n",
        "licence\nfirst fox\n",
        "third\n",
    )
    kept = ["licence\nfirst fox\n\n", "second dog\nsecond dog lazy\n", "third\n"]
    packed = pack(corpus, tokenizer, context_length=2, max_tokens=None)
    check_packing(packed, kept, tokenizer, 2)
    assert packed.n_documents == 3


# Reading


def read(*paths: Path | str, **options: Any) -> list[str]:
    return list(Files("files", tuple(map(str, paths)), **options).documents())


def test_what_a_document_is_in_a_text_file(tmp_path: Path) -> None:
    text = "one\ntwo\n\n \nthree\n"
    corpus = tmp_path / "a.txt"
    corpus.write_text(text)
    assert read(corpus) == [text]
    assert read(corpus, documents_are="paragraphs") == ["one\ntwo\n", "three\n"]
    lines = read(corpus, documents_are="lines")
    assert [line.strip() for line in lines if line.strip()] == ["one", "two", "three"]


def test_globs_descend_and_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**") == ["a.txt", "b.txt", "deep/a.md", "deep/er/c.txt"]
    assert read(tmp_path / "b.txt", tmp_path / "**/*.md") == ["b.txt", "deep/a.md"]


def test_records_give_their_text_field(tmp_path: Path) -> None:
    texts = ["naïve\nfox", "", "雨", "\U0001f98a"]
    lines = [json.dumps({"body": text, "text": 3}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    pyarrow.parquet.write_table(
        pyarrow.table({"body": texts, "text": [3] * 4}), tmp_path / "a.parquet", row_group_size=3
    )
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name, text_field="body") == texts
        assert read(tmp_path / name, text_field="body", documents_are="lines") == texts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": \n', r"line 2: .*JSONDecodeError"),
        ('{"text": "a"}\n\n{"body": "b"}\n', r"line 3: .*KeyError: 'text'"),
        ('{"text": "a"}\n["b"]\n', r"line 2: expected a JSON object"),
        ('{"text": "a"}\n{"text": null}\n', r"line 2: field 'text' is NoneType, expected text"),
        ('{"text": "\\ud83e"}\n', r"line 1: field 'text' is not text \(surrogates"),
        (b'{"text": "\xff"}\n', r"cannot be read \('utf-8' codec"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(
    tmp_path: Path, content: str | bytes, expected: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"^corpus (file )?{path}.*{expected}"):
        read(path)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    for unit in ("files", "paragraphs", "lines"):
        with pytest.raises(UserError, match=r"a\.txt: cannot be read"):
            read(tmp_path / "a.txt", documents_are=unit)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(UserError, match=r"a\.parquet: is not a parquet file"):
        read(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"body": ["x"], "number": [3]}), tmp_path / "b.parquet"
    )
    with pytest.raises(UserError, match=r"b\.parquet: no column 'text'; it has body, number"):
        read(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"field 'number' is int, expected text"):
        read(tmp_path / "b.parquet", text_field="number")
    with pytest.raises(UserError, match=r"no file matches '.*none\*'"):
        read(tmp_path / "a.txt", tmp_path / "none*")
    with pytest.raises(UserError, match="no file matches"):
        read(tmp_path)  # a folder is no file


def test_the_python_docs_are_there_without_a_download(tiny_model_dir: Path) -> None:
    corpus = PythonDocs("python-docs")
    documents = list(corpus.documents())
    assert len(documents) > 50
    assert documents == list(corpus.documents())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    packed = pack(corpus, tokenizer, context_length=128, max_tokens=2000)
    assert not packed.exhausted
    assert 2000 <= packed.n_rows < 2000 + 128


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set directory with two splits."""
    for split in ("train", "test"):
        records = [{"text": f"{split} {index}", "label": index} for index in range(3)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def test_a_hub_data_set_is_streamed_also_from_a_directory(dataset: Path) -> None:
    hub = HubDataset("hub", str(dataset))
    assert list(hub.documents()) == ["train 0", "train 1", "train 2"]
    hub = HubDataset("hub", str(dataset), split="test")
    assert next(iter(hub.documents())) == "test 0"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "validation"}, "Bad split: validation"),
        ({"config": "de"}, "BuilderConfig 'de' not found"),
        ({"text_field": "body"}, "no field 'body'; it has text, label"),
        ({"text_field": "label"}, "field 'label' is int, expected text"),
    ],
)
def test_a_data_set_that_is_asked_wrongly_says_so(
    dataset: Path, options: dict[str, str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        list(HubDataset("hub", str(dataset), **options).documents())


def test_a_data_set_that_is_torn_is_told_in_one_message(
    dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (dataset / "train.jsonl").write_text('{"text": "a"}\n{bad\n')
    with pytest.raises(UserError, match=r"cannot be read \(.*JSON parse error"):
        list(HubDataset("hub", str(dataset)).documents())
    assert capfd.readouterr().err == ""
