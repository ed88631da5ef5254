"""Cells that are done, as one tidy table and as differences between dictionaries.

A row of the table is one figure of one cell and encoder: dictionary, control, n_atoms, k, seed,
encoder, family ("fit", or of evals), figure, value, and the figure's own 95 % interval, if any.

Differences are paired by seed, whose split, start and batches are the same for all dictionaries.
Their 95 % interval is the wider one of two, end by end:

- Student's t over the seeds' differences: how the figure varies with start and split;
- of figures that are sums over documents (fvu, fvu_bulk, CE), the bootstrap over documents of the
  mean over seeds, a document being drawn for all seeds and both dictionaries at once: how it varies
  with the text. Seeds split the same documents, so that the first alone would be too narrow.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import scipy.stats

from activations.files import replacing
from dictlearn.metrics import Sums
from experiments.compare.cell import files
from experiments.compare.sweep import Cell, Sweep

Row = dict[str, Any]
_SCHEMA = pa.schema(
    [
        ("dictionary", pa.string()), ("control", pa.bool_()), ("n_atoms", pa.int64()),
        ("k", pa.int64()), ("seed", pa.int64()), ("encoder", pa.string()),
        ("family", pa.string()), ("figure", pa.string()), ("value", pa.float64()),
        ("low", pa.float64()), ("high", pa.float64()),
    ]
)  # fmt: skip
_DRAWS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """A figure of one cell.

    Attributes:
      value: of all documents.
      documents: ids; None where it is not of documents.
      drawn: its values [b] for weights of the documents [b D].
    """

    value: float
    documents: np.ndarray | None = None
    drawn: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds, or of differences; NaN ends of a single seed without documents.

    Attributes:
      least: what as many seeds would detect, twosided at 5 % in 80 % of trials:
        (t_0.975 + t_0.8) s / sqrt(n), s being the deviation over the seeds. NaN of one seed.
    """

    mean: float
    low: float
    high: float
    n: int
    least: float

    @property
    def told_apart(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


class Results:
    """What the cells of a sweep gave.

    Attributes:
      rows: the tidy table.
      cells: those that are done.
    """

    def __init__(self, sweep: Sweep, cells: list[Cell]) -> None:
        self.sweep, self.cells = sweep, cells
        self.rows: list[Row] = []
        self._sums: dict[str, dict[str, np.ndarray]] = {}
        for cell in cells:
            told, sums = files(sweep, cell)
            with np.load(sums) as arrays:
                self._sums[cell.name] = dict(arrays)
            own = {
                "dictionary": cell.dictionary,
                "control": sweep.dictionaries[cell.dictionary].control,
                "n_atoms": cell.n_atoms, "k": cell.k, "seed": cell.seed,
            }  # fmt: skip
            self.rows += [own | row for row in json.loads(told.read_text())["rows"]]

    def write(self, folder: Path) -> None:
        """cells.csv and cells.parquet, whole or not at all."""
        table = pa.Table.from_pylist(self.rows, _SCHEMA)
        for name, write in (
            ("cells.csv", pyarrow.csv.write_csv), ("cells.parquet", pyarrow.parquet.write_table),
        ):  # fmt: skip
            with replacing(folder / name) as file:
                write(table, pa.PythonFile(file, mode="w"))

    @functools.cached_property
    def _values(self) -> dict[tuple[Any, ...], float]:
        keys = ("dictionary", "n_atoms", "k", "seed", "encoder", "family", "figure")
        return {tuple(row[key] for key in keys): row["value"] for row in self.rows
                if row["value"] is not None}  # fmt: skip

    def of(
        self,
        dictionary: str,
        n_atoms: int,
        k: int | None,
        family: str,
        figure: str,
        encoder: str = "own",
    ) -> dict[int, Figure]:
        """A figure by seed; those that are there."""
        found = {}
        for cell in self.cells:
            if (cell.dictionary, cell.n_atoms, cell.k) == (dictionary, n_atoms, k):
                key = (dictionary, n_atoms, k, cell.seed, encoder, family, figure)
                if key in self._values:
                    found[cell.seed] = self._figure(cell, family, figure, encoder, key)
        return found

    def _figure(
        self, cell: Cell, family: str, figure: str, encoder: str, key: tuple[Any, ...]
    ) -> Figure:
        value, arrays = self._values[key], self._sums[cell.name]
        if family == "fit" and figure in ("fvu", "fvu_bulk"):
            parts = (arrays[f"{figure}_{name}"] for name in ("square", "total"))
            error = arrays[f"{figure}_error_{encoder}"]
            sums = Sums(arrays[f"{figure}_count"], error, *parts)
            return Figure(value, arrays["document"], sums.fvu)
        if (family, figure) == ("core", "headline.ce_increase"):
            rise, count = arrays["ce_ce_increase"], arrays["ce_n_tokens"]
            return Figure(value, arrays["ce_document"], lambda w: (w @ rise) / (w @ count))
        return Figure(value)


def mean(figures: Mapping[int, Figure]) -> Interval:
    """Over seeds."""
    values = [figure.value for figure in figures.values()]
    drawn = _drawn([(figure, 1.0) for figure in figures.values()], len(figures))
    return _interval(values, drawn)


def difference(figures: Mapping[int, Figure], against: Mapping[int, Figure]) -> Interval:
    """The first less the second, paired by seed."""
    seeds = [seed for seed in figures if seed in against]
    values = [figures[seed].value - against[seed].value for seed in seeds]
    signed = [pair for seed in seeds for pair in ((figures[seed], 1.0), (against[seed], -1.0))]
    return _interval(values, _drawn(signed, len(seeds)))


def _drawn(signed: list[tuple[Figure, float]], n: int) -> np.ndarray | None:
    """sum of sign * figure / n, for each draw of the documents; None where there are none."""
    if not signed or any(figure.drawn is None for figure, _ in signed):
        return None
    every = np.unique(np.concatenate([figure.documents for figure, _ in signed]))  # pyright: ignore
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(every), np.full(len(every), 1 / len(every)), size=_DRAWS)
    total = np.zeros(_DRAWS)
    with np.errstate(divide="ignore", invalid="ignore"):
        for figure, sign in signed:
            own = weights[:, np.searchsorted(every, figure.documents)]  # pyright: ignore
            total += sign * figure.drawn(own.astype(float)) / n  # pyright: ignore
    return total[np.isfinite(total)]


def _interval(values: list[float], drawn: np.ndarray | None) -> Interval:
    n = len(values)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0, math.nan)
    middle = statistics.fmean(values)
    lows, highs, least = [], [], math.nan
    if n > 1:
        error = statistics.stdev(values) / math.sqrt(n)
        t = scipy.stats.t.ppf([0.975, 0.8], n - 1)
        lows.append(middle - float(t[0]) * error)
        highs.append(middle + float(t[0]) * error)
        least = float(t.sum()) * error
    if drawn is not None and len(drawn):
        low, high = np.quantile(drawn, [0.025, 0.975])
        lows.append(float(low))
        highs.append(float(high))
    if not lows:
        return Interval(middle, math.nan, math.nan, n, least)
    return Interval(middle, min(lows), max(highs), n, least)
