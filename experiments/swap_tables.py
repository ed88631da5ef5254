"""Tables of the encoder-swap experiment: means over seeds, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import scipy.stats
from rich.console import Console
from rich.table import Table

from experiments.lines import Line

FIGURES = ("fvu_bulk", "fvu", "l0", "frac_alive", "twins", "median_error")
# Of each dictionary with its own encoder.
COLUMNS = {"frac_alive": "alive", "twins": "twins", "l0": "L0", "seconds": "seconds of the fit"}

Grid = tuple[str, list[str], list[list[str]]]  # title, heads, rows


def grids(lines: list[Line], figure: str, against: str | None) -> list[Grid]:
    """The tables of one m and k.

    Arguments:
      lines: of the results; all of one m and k.
      figure: what the cells show.
      against: a row or a column; a further table has what the others have more of the figure.
    """
    of = {(line["dictionary"], line["encoder"], line["seed"]): line for line in lines}
    rows, columns = (list(dict.fromkeys(line[key] for line in lines)) for key in _AXES)
    size = f"m = {lines[0]['n_atoms']}, k = {lines[0]['k']}"

    def values(row: str, column: str, key: str) -> dict[int, float]:
        """By seed; what was no number is left out."""
        own = {seed: line[key] for (r, c, seed), line in of.items() if (r, c) == (row, column)}
        return {seed: value for seed, value in own.items() if value is not None}

    def mean(row: str, column: str) -> str:
        return shown_mean(list(values(row, column, figure).values()), figure)

    def difference(row: str, column: str) -> str:
        other = (against, column) if against in rows else (row, str(against))
        mine, theirs = values(row, column, figure), values(str(other[0]), other[1], figure)
        return shown_difference(
            [mine[seed] - theirs[seed] for seed in mine if seed in theirs], figure
        )

    def own(row: str, key: str) -> str:
        return shown_mean(list(values(row, "own", key).values()), key)

    made = [_grid(f"{figure}, {size}", rows, columns, mean)]
    if "own" in columns:
        title, heads, body = _grid(f"with their own encoders, {size}", rows, list(COLUMNS), own)
        made.append((title, ["", *(COLUMNS[head] for head in heads[1:])], body))
    if against is not None:
        title = f"{figure} less that of {against}, paired by seed, {size}"
        rows_left, columns_left = (
            [name for name in names if name != against] for names in (rows, columns)
        )
        made.append(_grid(title, rows_left, columns_left, difference))
    return made


_AXES = ("dictionary", "encoder")


def _grid(title: str, rows: list[str], columns: list[str], cell: Callable[[str, str], str]) -> Grid:
    return (
        title,
        ["", *columns],
        [[row, *(cell(row, column) for column in columns)] for row in rows],
    )


def _digits(figure: str) -> int:
    return 1 if figure in ("l0", "seconds") else 4


def shown_mean(values: Sequence[float], figure: str) -> str:
    """Mean, and standard deviation where there are several."""
    digits = _digits(figure)
    mean = f"{statistics.fmean(values):.{digits}f}" if values else ""
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def shown_difference(values: Sequence[float], figure: str) -> str:
    """Mean, its standard error, and the 95 % interval of Student's t, where there are several.

    Seeds split the same documents anew, so that their figures are not independent: the interval
    tells how seeds vary, and is too narrow for other text.
    """
    digits = _digits(figure)
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error
    low, high = (f"{end:+.{digits}f}" for end in (mean - half, mean + half))
    return f"{mean:+.{digits}f} ± {error:.{digits}f} ({low} to {high})"


def show(grid: Grid, *, markdown: bool) -> None:
    """Print a table in the terminal, or as LOG.md has it."""
    title, heads, rows = grid
    if markdown:
        print(f"\n{title}\n")
        for row in (heads, ["---"] * len(heads), *rows):
            print(f"| {' | '.join(row)} |")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, width=200)
    console.print(f"\n{title}")
    console.print(table)
