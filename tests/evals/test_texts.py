"""Labelled texts: both kinds of file, the sets of a package, biographies, draws, and mistakes."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.terminal import UserError
from evals.texts import Labelled, Occupations, SaeProbes, TextFile

ROWS = [
    {"text": "a dog, at last", "label": "dog", "place": "in"},
    {"text": 'two\nlines of "cat"', "label": "cat", "place": "out"},
    {"text": "a bird", "label": "bird", "place": "in"},
    {"text": "another dög", "label": "dog", "place": "out"},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, list(rows[0]))
        lines.writeheader()
        lines.writerows(rows)
    return path


def labelled(count: dict[str, int]) -> Labelled:
    label = np.repeat(list(count), list(count.values()))
    return Labelled("set", [f"text {i}" for i in range(len(label))], label, None)


# Files.


@pytest.mark.parametrize("write", [jsonl, as_csv])
def test_both_kinds_of_file_give_their_rows(write: Any, tmp_path: Path) -> None:
    path = write(tmp_path / f"animals.{write.__name__.removeprefix('as_')}", ROWS)
    found = TextFile("file", path, second="place").read()
    assert found.name == "animals"
    assert found.text == [row["text"] for row in ROWS]
    assert found.label.tolist() == [row["label"] for row in ROWS]
    assert found.second is not None
    assert found.second.tolist() == [row["place"] for row in ROWS]


def test_fields_are_those_that_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.JSONL", [{"t": "one", "l": 1}, {"t": "two", "l": 2}])
    found = TextFile("file", path, text="t", label="l").read()
    assert found.text == ["one", "two"]
    assert found.label.tolist() == ["1", "2"]
    assert found.second is None


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\n\n".join(lines), encoding="utf-8-sig")
    assert TextFile("file", path).read().text == [row["text"] for row in ROWS]


def test_a_repeated_text_counts_once_with_its_first_labels(tmp_path: Path) -> None:
    again = {"text": ROWS[0]["text"], "label": "fish", "place": "out"}
    path = jsonl(tmp_path / "a.jsonl", [*ROWS, again, ROWS[1]])
    found = TextFile("file", path, second="place").read()
    assert found.text == [row["text"] for row in ROWS]
    assert found.label[0] == "dog"
    assert found.second is not None
    assert found.second[0] == "in"


def test_classes_are_ordered_by_frequency_then_by_name() -> None:
    count = {"z": 3, "b": 1, "c": 5, "a": 3, "d": 1}
    assert labelled(count).classes == ["c", "a", "z", "b", "d"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}', "one class, 'x'"),
        ("", "no text"),
        ('{"text": "a", "label": "x"}\n\n{"text": " ", "label": "y"}', "line 3: the text is empty"),
        ('{"text": "a", "lable": "x"}', "line 1: .*no field 'label'; it has 'text', 'lable'"),
        ('{"text": "a", "label": "x"}\n{"text": ', "line 2: is not JSON"),
        ('{"text": "a", "label": "x"}\n["b", "y"]', "line 2: expected a JSON object"),
    ],
)
def test_bad_jsonl_is_told(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{told}"):
        TextFile("file", path).read()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,label\na,x\nb,x\n", "one class, 'x'"),
        ("text,label\n", "no text"),
        ("text,label\na,x\n,y\n", "line 3: the text is empty"),
        ("text,lable\na,x\n", "line 2: .*no field 'label'; it has 'text', 'lable'"),
    ],
)
def test_bad_csv_is_told(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{told}"):
        TextFile("file", path).read()


def test_a_second_label_of_one_class_or_none_is_told(tmp_path: Path) -> None:
    alike = jsonl(tmp_path / "a.jsonl", [row | {"place": "in"} for row in ROWS])
    with pytest.raises(UserError, match="one class, 'in'"):
        TextFile("file", alike, second="place").read()
    assert TextFile("file", alike).read().second is None
    with pytest.raises(UserError, match="no field 'size'; it has 'text', 'label', 'place'"):
        TextFile("file", alike, second="size").read()


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    wrong = jsonl(tmp_path / "a.txt", ROWS)
    with pytest.raises(UserError, match=r"a\.txt: expected a \.jsonl or a \.csv file"):
        TextFile("file", wrong).read()
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        TextFile("file", tmp_path / "none.csv").read()
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\ndög,x\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.csv: cannot be read"):
        TextFile("file", latin).read()


def test_a_file_is_pinned_by_its_hash(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = TextFile("file", path, second="place").pinned()
    assert pinned == TextFile("file", path, second="place", sha256=own)
    assert pinned.pinned() == pinned
    jsonl(path, ROWS[:2])
    with pytest.raises(UserError, match=rf"a\.jsonl: has sha256 (?!{own}).*, expected {own}"):
        pinned.pinned()


# The package sae-probes.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package sae_probes with two sets that share most of their texts."""
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path / "sae_probes" / "data" / "cleaned_data"
    folder.mkdir(parents=True)
    (tmp_path / "sae_probes" / "__init__.py").touch()
    sets = {
        "1_first": [("one", "0"), ("two", "1"), ("", "1"), ("three", "0"), ("one", "1")],
        "2_second": [("three", "x"), ("two", "y"), ("one", "x"), ("four", "y")],
    }
    for name, rows in sets.items():
        table = [{"prompt": prompt, "target": target} for prompt, target in rows]
        plain = as_csv(tmp_path / "plain.csv", table).read_bytes()
        (folder / f"{name}.csv.zst").write_bytes(zstandard.ZstdCompressor().compress(plain))
    monkeypatch.delitem(sys.modules, "sae_probes", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.usefixtures("package")
def test_a_set_of_the_package_has_no_repeats_and_no_rows_without_text() -> None:
    found = SaeProbes("sae-probes", "1_first").read()
    assert found.name == "1_first"
    assert dict(zip(found.text, found.label, strict=True)) == {"one": "0", "two": "1", "three": "0"}
    assert found.second is None


@pytest.mark.usefixtures("package")
def test_another_set_gives_the_second_labels_of_the_texts_both_have() -> None:
    found = SaeProbes("sae-probes", "2_second", other="1_first").read()
    assert found.name == "2_second+1_first"
    assert found.second is not None
    told = zip(found.text, found.label, found.second, strict=True)
    assert {text: labels for text, *labels in told if text != "one"} == {
        "three": ["x", "0"], "two": ["y", "1"],
    }  # fmt: skip
    assert len(found.text) == 3


def test_a_set_that_the_package_has_not_is_told(package: Path) -> None:
    with pytest.raises(UserError, match=f"no set '3_third'; it has 1_first, 2_second.*{package}"):
        SaeProbes("sae-probes", "3_third").read()


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="sae-probes, with the set 1_first, is not installed; pip"):
        SaeProbes("sae-probes", "1_first").read()


@pytest.mark.usefixtures("package")
def test_a_missing_decompressor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # What Python has for a module that is not to be imported.
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="zstandard is not installed; pip"):
        SaeProbes("sae-probes", "1_first").read()


# Biographies.


def test_biographies_are_distinct_and_as_many_of_each_kind() -> None:
    found = Occupations("occupations", n=25).read()
    assert found.second is not None
    assert len(set(found.text)) == len(found.text) == 16 * 25
    kinds, count = np.unique(np.stack([found.label, found.second]), axis=1, return_counts=True)
    assert kinds.shape == (2, 16)
    assert set(count) == {25}
    assert len(found.classes) == 8


def test_pronouns_fit_the_gender() -> None:
    found = Occupations("occupations", n=25).read()
    pronouns = {"female": {"she", "her", "herself"}, "male": {"he", "his", "himself"}}
    assert found.second is not None
    for text, gender in zip(found.text, found.second, strict=True):
        own = pronouns[str(gender)]
        others = set.union(*pronouns.values()) - own
        words = set(re.findall(r"\w+", text.lower()))
        assert words & own
        assert not words & others


def test_biographies_tell_no_label_by_its_name() -> None:
    found = Occupations("occupations", n=25).read()
    for text, label in zip(found.text, found.label, strict=True):
        assert label not in text.lower()
        assert "{" not in text


# Draws.


def groups_of(own: Labelled) -> list[np.ndarray]:
    return [np.flatnonzero(own.label == name) for name in own.classes]


@pytest.mark.parametrize(
    ("least", "n_train", "n_test"),
    [(10, 8, 2), (2400, 1920, 480), (2500, 2000, 500), (4000, 2000, 500), (2, 1, 1), (7, 5, 2)],
)
def test_sizes_that_are_left_out_are_four_to_one_up_to_a_cap(
    least: int, n_train: int, n_test: int
) -> None:
    own = labelled({"a": least + 3, "b": least})
    chosen, told = own.draw(groups_of(own), None, None, seed=0)
    assert told == n_train
    assert [len(group) for group in chosen] == [n_train + n_test] * 2


def test_one_size_gives_the_other() -> None:
    own = labelled({"a": 50, "b": 50})
    for asked, total in (((20, None), (20, 25)), ((None, 4), (16, 20)), ((20, 7), (20, 27))):
        chosen, n_train = own.draw(groups_of(own), *asked, seed=0)
        assert (n_train, len(chosen[0])) == total


def test_a_draw_holds_no_text_twice_and_keeps_the_groups_apart() -> None:
    own = labelled({"a": 30, "b": 20, "c": 25})
    groups = groups_of(own)
    chosen, _ = own.draw(groups, 12, 8, seed=3)
    for drawn, group in zip(chosen, groups, strict=True):
        assert len(set(drawn)) == len(drawn) == 20
        assert set(drawn) <= set(group)


def test_a_draw_is_that_of_its_seed() -> None:
    own = labelled({"a": 30, "b": 30})
    one, again, other = (own.draw(groups_of(own), 8, 4, seed)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert set(one[0]) != set(other[0])


@pytest.mark.parametrize(
    ("count", "asked", "needed"),
    [(9, (8, 2), 10), (9, (8, None), 10), (9, (None, 2), 10), (1, (None, None), 2)],
)
def test_fewer_texts_than_asked_for_are_told_with_the_numbers(
    count: int, asked: tuple[int | None, int | None], needed: int
) -> None:
    own = labelled({"a": 30, "b": count})
    with pytest.raises(UserError, match=f"set: has {count} texts .* at least {needed} "):
        own.draw(groups_of(own), *asked, seed=0)


def test_a_line_ends_where_jsonl_says(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [("one\u2028two", "x"), ("three\x85four", "y")]
    lines = [json.dumps({"text": t, "label": v}, ensure_ascii=False) for t, v in rows]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert TextFile("file", path).read().text == [text for text, _ in rows]


@pytest.mark.parametrize(("least", "want"), [(300, (160, 40)), (50, (40, 10)), (3, (2, 1))])
def test_no_more_are_drawn_than_the_most(least: int, want: tuple[int, int]) -> None:
    label = np.repeat(["a", "b"], [least, 400])
    own = Labelled("set", [str(i) for i in range(len(label))], label, None)
    groups = [np.flatnonzero(label == name) for name in "ab"]
    chosen, n_train = own.draw(groups, None, None, seed=0, most=200)
    assert (n_train, len(chosen[0]) - n_train) == want
    assert len(chosen[0]) == len(chosen[1])
