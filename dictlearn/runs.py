"""The runs in a folder, with their key figures:  python -m dictlearn.runs [DIR]."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from activations.terminal import UserError, run_command
from dictlearn import artifact
from dictlearn.report import label, sparsity

COLUMNS = (
    "run",
    "solver",
    "m",
    "k",
    "hook",
    "fvu_bulk",
    "control",
    "fvu",
    "L0",
    "alive",
    "seconds",
)


def runs(folder: Path) -> list[list[str]]:
    """A row for each run in a folder and the folders in it, by their paths.

    Of a run that is unfinished or damaged the second column says so.

    Raises:
      UserError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = (artifact.METADATA, artifact.UNFINISHED)
    places = {file.parent for name in names for file in folder.rglob(name)}
    shown = sorted(place for place in places if not place.name.startswith("."))
    if not shown:
        raise UserError(f"{folder}: holds no run")
    return [_row(place) for place in shown]


def _row(place: Path) -> list[str]:
    if (place / artifact.UNFINISHED).exists():
        return [str(place), "unfinished"]
    try:
        told, figures = artifact.read_metadata(place)
        numbers = [
            "" if figures.get(key) is None else form.format(figures[key])
            for key, form in (
                ("fvu_bulk", "{:.4f}"), ("control_fvu_bulk", "{:.4f}"), ("fvu", "{:.4f}"),
                ("l0", "{:.1f}"), ("frac_alive", "{:.1%}"), ("seconds", "{:.0f}"),
            )
        ]  # fmt: skip
        solver = told["solver"]
        size = [str(solver["n_atoms"]), str(sparsity(solver)[1] or "")]
        return [str(place), label(solver), *size, str(told["hook"]), *numbers]
    except (artifact.ArtifactError, KeyError, TypeError, ValueError):
        return [str(place), "damaged"]


def main() -> None:
    """Entry of `python -m dictlearn.runs`."""
    parser = argparse.ArgumentParser(prog="python -m dictlearn.runs", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    for row in runs(parser.parse_args().folder):
        table.add_row(*row)
    Console(highlight=False, width=200).print(table)  # a line a run, however narrow the terminal


if __name__ == "__main__":
    run_command(main)
