"""Labelled texts: files, sets that the package `sae-probes` ships, biographies by program.

A repeated text counts once, with its first label, so that no text stands in both parts of a split.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from activations.files import sha256
from activations.terminal import UserError
from evals.occupations import biographies

csv.field_size_limit(2**31 - 1)


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of texts and labels, `.jsonl` (an object a line) or `.csv` (with a header).

    Attributes:
      path: of the file.
      text, label: the names of its fields.
      second: the field of a second label, which `scr` needs.
      sha256: what the file must hold, if it is told; results tell it.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["file"]
    path: Path
    text: str = "text"
    label: str = "label"
    second: str | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What results call it."""
        return self.path.stem

    def pinned(self) -> TextFile:
        """With the hash of the file.

        Raises:
          UserError: it is not the one that is told; the file is missing.
        """
        try:
            own = sha256(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        if self.sha256 not in (None, own):
            raise UserError(f"{self.path}: has sha256 {own}, expected {self.sha256}")
        return dataclasses.replace(self, sha256=own)

    def read(self) -> Labelled:
        """The texts.

        Raises:
          UserError: a line is damaged, a field is missing, a text is empty, there is one class.
        """
        suffix = self.path.suffix.lower()
        if suffix not in (".jsonl", ".csv"):
            raise UserError(f"{self.path}: expected a .jsonl or a .csv file")
        try:
            content = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from None
        rows = _jsonl(content, self.path) if suffix == ".jsonl" else _csv(content)
        fields = [self.text, self.label, *([self.second] if self.second else [])]
        return _labelled(self.name, str(self.path), rows, fields)


@dataclasses.dataclass(frozen=True)
class SaeProbes:
    """A set of the package `sae-probes` (pip install --no-deps sae-probes zstandard).

    Attributes:
      set: its name there, e.g. "97_news_class".
      other: a set with the same texts, whose labels are the second ones, which `scr` needs.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["sae-probes"]
    set: str
    other: str | None = None

    @property
    def name(self) -> str:
        """What results call it."""
        return self.set if self.other is None else f"{self.set}+{self.other}"

    def pinned(self) -> SaeProbes:
        """Itself: the package does not change."""
        return self

    def read(self) -> Labelled:
        """The texts.

        Raises:
          UserError: the package is missing, or has no such set; as `TextFile.read`.
        """
        rows = list(_sae_probes(self.set))
        fields = ["prompt", "target"]
        if self.other is not None:
            other: dict[str, str] = {}
            for _, row in _sae_probes(self.other):
                other.setdefault(row["prompt"], row["target"])
            rows = [
                (line, row | {"second": other[row["prompt"]]})
                for line, row in rows
                if row["prompt"] in other
            ]
            fields.append("second")
        return _labelled(self.name, f"sae-probes {self.name}", iter(rows), fields)


@dataclasses.dataclass(frozen=True)
class Occupations:
    """Biographies made by program: an occupation, and a gender as the second label.

    Attributes:
      n: of each of the 16.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["occupations"]
    n: Annotated[int, Field(ge=10, le=20_000)] = 600

    @property
    def name(self) -> str:
        """What results call it."""
        return self.kind

    def pinned(self) -> Occupations:
        """Itself: they are always the same."""
        return self

    def read(self) -> Labelled:
        """The texts."""
        found = biographies(self.n)
        label, second = np.array(list(found.values())).T
        return Labelled(self.name, list(found), label, second)


LabelledSet = Annotated[TextFile | SaeProbes | Occupations, Field(discriminator="kind")]


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Texts with a label each, and a second one where the set has it.

    Attributes:
      name: of the set.
      text: [n].
      label, second: [n] of str.
    """

    name: str
    text: list[str]
    label: np.ndarray
    second: np.ndarray | None

    @property
    def classes(self) -> list[str]:
        """Labels, the most frequent first, then by name."""
        names, count = np.unique(self.label, return_counts=True)
        return [str(names[i]) for i in np.lexsort((names, -count))]

    def draw(
        self,
        groups: list[np.ndarray],
        n_train: int | None,
        n_test: int | None,
        seed: int,
        *,
        most: int = 2500,
    ) -> tuple[list[np.ndarray], int]:
        """As many random texts of each group, and how many of them are for training.

        Arguments:
          groups: indices of texts, a class each.
          n_train, n_test: of each group; None for what the smallest group has, 4 to 1.
          most: of each group, if neither is told.

        Raises:
          UserError: a group has fewer than were asked for.
        """
        least = min(map(len, groups))
        asked = (n_train or 0) + (n_test or 0)
        if n_train is None and n_test is None:
            n_train = min(least, most) * 4 // 5
            n_test = min(least, most) - n_train
        else:
            n_train = n_train if n_train is not None else 4 * (n_test or 0)
            n_test = n_test if n_test is not None else max(n_train // 4, 1)
            asked = n_train + n_test
        if least < max(asked, 2) or not n_train or not n_test:
            raise UserError(
                f"{self.name}: has {least} texts of its rarest class that are not repeats, "
                f"expected at least {max(asked, 2)} (train_per_class + test_per_class)"
            )
        rng = np.random.default_rng(seed)
        return [rng.permutation(group)[: n_train + n_test] for group in groups], n_train


def _jsonl(content: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.split("\n"), start=1):  # others may stand in a text
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
            yield number, row


def _csv(content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = csv.DictReader(io.StringIO(content, newline=""))
    for row in lines:
        yield lines.line_num, row


def _sae_probes(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    advice = "pip install --no-deps sae-probes zstandard, or name files of your own under `sets`"
    spec = importlib.util.find_spec("sae_probes")
    if spec is None or spec.origin is None:
        raise UserError(f"the package sae-probes, with the set {name}, is not installed; {advice}")
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise UserError(f"the package zstandard is not installed; {advice}") from None
    folder = Path(spec.origin).parent / "data" / "cleaned_data"
    file = folder / f"{name}.csv.zst"
    if not file.is_file():
        near = ", ".join(sorted(p.name.removesuffix(".csv.zst") for p in folder.glob("*.zst"))[:5])
        raise UserError(f"sae-probes has no set {name!r}; it has {near}, ... (see {folder})")
    with file.open("rb") as packed:
        content = zstandard.ZstdDecompressor().stream_reader(packed).read().decode()
    # A few sets have rows without a text.
    return ((line, row) for line, row in _csv(content) if row.get("prompt", "").strip())


def _labelled(
    name: str, where: str, rows: Iterator[tuple[int, dict[str, Any]]], fields: list[str]
) -> Labelled:
    found: dict[str, tuple[str, ...]] = {}
    for number, row in rows:
        values = []
        for field in fields:
            if row.get(field) is None:
                there = ", ".join(map(repr, row))
                what = "an empty field" if field in row else "no field"
                raise UserError(f"{where}, line {number}: has {what} {field!r}; it has {there}")
            values.append(str(row[field]))
        if not values[0].strip():
            raise UserError(f"{where}, line {number}: the text is empty")
        found.setdefault(values[0], tuple(values[1:]))
    labels = np.array(list(found.values()), dtype=str).reshape(len(found), len(fields) - 1)
    second = labels[:, 1] if len(fields) > 2 else None
    for column in labels.T:
        if len(np.unique(column)) < 2:
            told = f"one class, {str(column[0])!r}" if len(column) else "no text"
            raise UserError(f"{where}: has {told}; expected two or more")
    return Labelled(name, list(found), labels[:, 0], second)
