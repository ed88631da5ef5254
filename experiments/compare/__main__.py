"""Dictionaries x n_atoms x k x seeds, compared:  python -m experiments.compare SWEEP.

Each cell is fitted and measured in a process of its own, several at once where there are cores.
What is done is not done again; a cell that fails is told at the end, and the others go on. PLACE
(the sweep's `output`, or runs/<name>) then has

    cells.csv, cells.parquet   every figure of every cell, a row each
    report.html, report.md     what they say: figures, tables, and verdicts in words
    figures/                   the report's figures
    runs/, cells/, logs/       of each cell: its run, its figures, what it printed
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import queue
import subprocess
import sys
from pathlib import Path

from activations.config import read_toml, validate
from activations.files import replace_file
from activations.terminal import UserError, progress, run_command
from dictlearn.fit import prepare
from experiments.compare.cell import done
from experiments.compare.report import write_report
from experiments.compare.results import Results
from experiments.compare.sweep import Cell, Sweep, cells

# Lines of a failed cell's log that the message shows.
_SHOWN = 3


def run(missing: list[Cell], file: Path, logs: Path, workers: int) -> dict[str, str]:
    """Do cells, some at once; why those that failed did.

    Arguments:
      file: the sweep, as the processes read it.
    """
    share = queue.SimpleQueue[set[int]]()
    for own in _shares(workers):
        share.put(own)

    def pin() -> None:
        own = share.get()
        if own:  # of this thread, and of the processes that it starts
            os.sched_setaffinity(0, own)

    failed: dict[str, str] = {}
    logs.mkdir(parents=True, exist_ok=True)
    pool = concurrent.futures.ThreadPoolExecutor(workers, initializer=pin)
    try:
        asked = {pool.submit(_one, cell, file, logs): cell for cell in missing}
        with progress(total=len(missing), desc="compare", unit="cell") as bar:
            for future in concurrent.futures.as_completed(asked):
                if why := future.result():
                    failed[asked[future].name] = why
                bar.set_postfix_str(asked[future].name, refresh=False)
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def _shares(workers: int) -> list[set[int]]:
    """Each worker's cores; empty sets where processes cannot be kept to some."""
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * workers
    every = sorted(os.sched_getaffinity(0))
    return [set(every[number::workers] or every) for number in range(workers)]


def _one(cell: Cell, file: Path, logs: Path) -> str | None:
    """Do a cell; why it failed, if it did."""
    log = logs / f"{cell.name}.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "experiments.compare.cell", str(file), cell.name]
        code = subprocess.run(command, stdout=out, stderr=out, check=False).returncode
    if code == 0:
        return None
    last = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-_SHOWN:]
    return f"exit code {code} ({log}):\n    " + "\n    ".join(last)


def main() -> None:
    """Entry of `python -m experiments.compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("sweep", type=Path, help="a TOML file, e.g. experiments/ksvd-vs-sae.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int, help="cells at once; default: a core each, up to 8")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    arguments = parser.parse_args()
    workers = arguments.workers
    if workers is None:
        workers = min(len(_shares(1)[0]) or os.cpu_count() or 1, 8)
    if workers < 1:
        raise UserError(f"--workers: expected at least 1, got {workers}")
    where = str(arguments.sweep)
    table = read_toml(arguments.sweep, arguments.set)
    sweep = validate(Sweep, table, where)
    every = cells(sweep, where)
    place = sweep.place
    there = every[0].config.data.store.exists()
    missing = [cell for cell in every if not there or not done(sweep, cell)]
    print(f"{place}: {len(every)} cells, {len(every) - len(missing)} done")
    if arguments.dry_run:
        for cell in missing:
            print(f"  {cell.name}")
        return
    failed: dict[str, str] = {}
    if missing:
        place.mkdir(parents=True, exist_ok=True)
        prepare(every[0].config, where)  # the store, before several ask for it
        own = place / "sweep.json"
        replace_file(own, json.dumps(table, indent=1, default=str).encode())
        with contextlib.suppress(KeyboardInterrupt):
            failed = run(missing, own, place / "logs", workers)
    finished = [cell for cell in every if cell not in missing or done(sweep, cell)]
    if finished:
        found = Results(sweep, finished)
        found.write(place)
        write_report(found, place, n_cells=len(every))
        print(f"report: {place / 'report.html'}")
    if len(finished) < len(every):
        why = "".join(f"\n  {name}: {told}" for name, told in failed.items())
        raise UserError(
            f"{len(every) - len(finished)} of {len(every)} cells are not done; the same command "
            f"goes on{why}"
        )


if __name__ == "__main__":
    run_command(main)
