"""Laws of reading text: every document once, in order, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from activations.corpora import Files, HubDataset, PythonDocs
from activations.terminal import UserError


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


def test_the_python_docs_are_there_without_a_download() -> None:
    corpus = PythonDocs("python-docs")
    documents = list(corpus.documents())
    assert len(documents) > 50
    assert documents == list(corpus.documents())


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
