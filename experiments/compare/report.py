"""A sweep's results for people: report.html, self-contained, and report.md with figures/*.svg."""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Canvas

from activations.files import replace_file
from experiments.compare.results import Interval, Results, difference, mean
from experiments.compare.shown import BULK, JUDGED, L0, PLOTS, TABLED, Shown

# Below it nothing is called better or worse.
LEAST_SEEDS = 5
# L0 that differ by more are told beside a verdict.
_SAME_L0 = 0.05
_OWN_WIDTH = "width of a cell's own 95 %"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table: a title, heads, and rows of text."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def write_report(results: Results, place: Path, *, n_cells: int) -> None:
    """Write both reports and their figures, each file whole or not at all."""
    folder = place / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    for y, x in PLOTS:
        drawn = plot(results, y, x)
        if drawn is not None:
            name = f"{y.figure}-{x.figure}".replace(".", "-")
            replace_file(folder / f"{name}.svg", drawn.encode())
            plots.append((f"{y.title} against {x.title}", name, drawn[drawn.index("<svg") :]))
    sweep = results.sweep
    tables = [*verdicts(results), *means(results), *swaps(results)]
    n_judged = _n_judged(results)
    told = {
        "name": sweep.name, "hook": sweep.data.hook, "store": str(sweep.data.store),
        "seeds": len(sweep.seeds), "base": sweep.base, "n_cells": n_cells,
        "n_done": len(results.cells), "comparisons": n_judged,
        "expected": round(0.05 * n_judged, 1),
        "tables": tables, "plots": plots,
        "dictionaries": {
            name: json.dumps({"solver": one.solver, "fit": one.fit} | (
                {"data": one.data} if one.data else {}))
            for name, one in sweep.dictionaries.items()
        },
    }  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.jinja").render(told)
        replace_file(place / name, text.encode())


def sizes(results: Results) -> list[tuple[int, int]]:
    """Every n_atoms and k, of which a table each is made."""
    sweep = results.sweep
    return [(n_atoms, k) for n_atoms in sweep.n_atoms for k in sweep.k]


def _of(results: Results, name: str, n_atoms: int, k: int, shown: Shown) -> dict[int, Any]:
    """A figure by seed; of a dictionary without k, the one that there is."""
    for own in (k, None):
        found = results.of(name, n_atoms, own, shown.family, shown.figure, shown.encoder)
        if found:
            return found
    return {}


def _there(results: Results, shown: tuple[Shown, ...]) -> list[Shown]:
    """Those that a cell has."""
    keys = {(row["family"], row["figure"], row["encoder"]) for row in results.rows}
    return [one for one in shown if (one.family, one.figure, one.encoder) in keys]


def verdicts(results: Results) -> list[Grid]:
    """What the intervals support, in words: each dictionary against the base."""
    base, found = results.sweep.base, []
    columns = _there(results, JUDGED)
    for n_atoms, k in sizes(results):
        rows = []
        for name in results.sweep.dictionaries:
            if name == base:
                continue
            row = [name]
            for shown in columns:
                own, other = (_of(results, one, n_atoms, k, shown) for one in (name, base))
                l0 = [mean(_of(results, one, n_atoms, k, L0)).mean for one in (name, base)]
                row.append(verdict(difference(own, other), shown, l0))
            rows.append(row)
        found.append(
            Grid(
                f"Against {base}: m = {n_atoms}, k = {k}",
                ["", *(shown.title for shown in columns)],
                rows,
            )
        )
    return found


def verdict(apart: Interval, shown: Shown, l0: list[float]) -> str:
    """What a difference supports: better or worse, not told apart, or too few seeds."""
    if not apart.n:
        return ""
    told = f"{apart.mean:+.{shown.digits}f}"
    if np.isfinite(apart.low):
        told += f" ({apart.low:+.{shown.digits}f} to {apart.high:+.{shown.digits}f})"
    if apart.n < LEAST_SEEDS:
        said = f"{told}; no verdict of {apart.n} seed{'s' * (apart.n > 1)}"
    elif not apart.told_apart:
        said = f"not told apart: {told}; {apart.n} seeds would detect {apart.least:.1g}"
    else:
        way = "lower" if apart.mean < 0 else "higher"
        word = {"": way, way: "better"}.get(shown.better, "worse")
        said = f"{word}: {told}"
    if abs(l0[0] - l0[1]) > _SAME_L0 * l0[1]:
        said += f"; L0 {l0[0]:.1f} beside {l0[1]:.1f}"
    return said


def _n_judged(results: Results) -> int:
    """How many verdicts there are: pairs of as many seeds as a verdict takes."""
    base = results.sweep.base
    return sum(
        len(_of(results, name, *size, shown).keys() & _of(results, base, *size, shown).keys())
        >= LEAST_SEEDS
        for size in sizes(results)
        for name in results.sweep.dictionaries if name != base
        for shown in _there(results, JUDGED)
    )  # fmt: skip


def means(results: Results) -> list[Grid]:
    """Every dictionary's figures, and how wide a cell's own intervals are."""
    columns = _there(results, TABLED)
    found = []
    for size in sizes(results):
        grid = _grid(
            results, f"Means: m = {size[0]}, k = {size[1]}", [shown.title for shown in columns],
            lambda name, column, size=size: _shown(
                mean(_of(results, name, *size, columns[column])), columns[column]
            ),
        )  # fmt: skip
        widths = [_width(results, *size, shown) for shown in columns]
        found.append(dataclasses.replace(grid, rows=[*grid.rows, [_OWN_WIDTH, *widths]]))
    return found


def _width(results: Results, n_atoms: int, k: int, shown: Shown) -> str:
    """Median over cells. Seeds share texts and prompts: their spread alone is too narrow."""
    wanted = (shown.family, shown.figure, shown.encoder, n_atoms)
    keys = ("family", "figure", "encoder", "n_atoms")
    widths = [
        row["high"] - row["low"] for row in results.rows
        if tuple(row[key] for key in keys) == wanted and row["k"] in (k, None)
        and None not in (row["low"], row["high"])
    ]  # fmt: skip
    return f"{statistics.median(widths):.{shown.digits}f}" if widths else ""


def swaps(results: Results) -> list[Grid]:
    """fvu_bulk of every dictionary by every encoder."""
    encoders: list[str] = list(dict.fromkeys(("own", *results.sweep.encoders)))
    if len(encoders) < 2:
        return []
    return [
        _grid(
            results, f"fvu_bulk by encoder: m = {n_atoms}, k = {k}", encoders,
            lambda name, column, size=(n_atoms, k): _shown(
                mean(
                    _of(results, name, *size, dataclasses.replace(BULK, encoder=encoders[column]))
                ), BULK,
            ),
        )
        for n_atoms, k in sizes(results)
    ]  # fmt: skip


def _grid(results: Results, title: str, heads: list[str], cell: Callable[[str, int], str]) -> Grid:
    rows = [
        [name, *(cell(name, column) for column in range(len(heads)))]
        for name in results.sweep.dictionaries
    ]
    return Grid(title, ["", *heads], rows)


def _shown(of: Interval, shown: Shown) -> str:
    if not of.n:
        return ""
    digits = shown.digits
    told = f"{of.mean:.{digits}f}"
    if not shown.varies or not np.isfinite(of.low):
        return told
    return f"{told} ({of.low:.{digits}f} to {of.high:.{digits}f})"


def plot(results: Results, y: Shown, x: Shown) -> str | None:
    """y against x, a panel for each n_atoms, a line for each dictionary over k; None without y."""
    if not _there(results, (y,)):
        return None
    sweep = results.sweep
    with mpl.rc_context({"svg.hashsalt": "0", "font.size": 10, "axes.grid": True,
                         "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False}):  # fmt: skip
        canvas = Canvas(figsize=(1.6 + 4.4 * len(sweep.n_atoms), 3.6), layout="constrained")
        panels = canvas.subplots(1, len(sweep.n_atoms), sharey=True, squeeze=False)[0]
        for panel, n_atoms in zip(panels, sweep.n_atoms, strict=True):
            for name, style in zip(sweep.dictionaries, _styles(results), strict=True):
                own = [[mean(_of(results, name, n_atoms, k, of)) for of in (x, y)] for k in sweep.k]
                there = [point for point in own if point[0].n and point[1].n]
                _draw(panel, name, there, style, [x.varies, y.varies])
            panel.set_xlabel(x.title)
            if len(sweep.n_atoms) > 1:
                panel.set_title(f"m = {n_atoms}")
        panels[0].set_ylabel(y.title)
        handles, labels = panels[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside right upper", frameon=False)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _styles(results: Results) -> list[dict[str, Any]]:
    """Of each dictionary; controls are grey and dashed."""
    styles, count, greys = [], 0, 0
    for one in results.sweep.dictionaries.values():
        if one.control:
            styles.append(
                {"color": str(0.35 + 0.2 * (greys % 3)), "linestyle": "--", "marker": "s"}
            )
            greys += 1
        else:
            colour = _COLOURS[count % len(_COLOURS)]
            styles.append({"color": colour, "linestyle": "-", "marker": "o"})
            count += 1
    return styles


def _draw(
    panel: Any, name: str, points: list[list[Interval]], style: dict[str, Any], varies: list[bool]
) -> None:
    """A line over points of x and y, with the intervals of those that vary."""
    if not points:
        return
    middle = np.array([[one.mean for one in point] for point in points]).T  # [2 k]
    low, high = (
        np.array([[getattr(one, end) for one in point] for point in points]).T
        for end in ("low", "high")
    )
    bars = [own * np.nan_to_num([middle[i] - low[i], high[i] - middle[i]])
            for i, own in enumerate(varies)]  # fmt: skip
    panel.errorbar(
        *middle, xerr=bars[0], yerr=bars[1], label=name, capsize=2, markersize=4, **style
    )
