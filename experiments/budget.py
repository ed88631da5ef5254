"""Quality against what it costs:  python -m experiments.budget SWEEP --system ksvd --epochs 1,4,12.

A system is a dictionary of the sweep. It is fitted to its end for each number of epochs (a schedule
that is cut short tells nothing), an SAE for each learning rate too, at every n_atoms, k and seed of
the sweep. A line a fit goes to PLACE/budget/results.jsonl, PLACE being the sweep's; what has its
line is not done again. The table has, of each system and number of epochs, the learning rate with
the lowest validation fvu_bulk, and its figures on the test rows, coded by the system's own encoder.
Seconds are of the steps alone, and their median over learning rates, whose work is the same.

FLOPs are those of the formulas, an addition and a multiplication being two, and leave out what is
not of the order of m d, m k^2 or k d. Of an SAE, `flops` counts only products with codes that are
not 0 (2 m d + 8 k d a row), as our CPU kernel does, and `flops_dense` all of them (12 m d), as
dense products do; both have Adam's 24 m d a step, and leave AuxK out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from activations.config import read_toml, validate
from activations.terminal import UserError, run_command
from dictlearn.encoders.omp import OMP
from dictlearn.fit import prepare
from dictlearn.loop import DivergedError
from dictlearn.registry import Solver
from dictlearn.solvers.ksvd import KSVD
from dictlearn.solvers.sae import SAE
from dictlearn.solvers.sae_variants import AbsTopK, BatchTopK, TopK
from dictlearn.solvers.untrained import Untrained
from experiments import lines
from experiments.compare.cell import fitted
from experiments.compare.sweep import Cell, Dictionary, Sweep, cells
from experiments.lines import Line
from experiments.tune import best_of

FIGURES = ("fvu_bulk", "fvu", "frac_alive")


def choices(
    sweep: Sweep, system: str, epochs: list[float], rates: list[float], where: str
) -> Iterator[tuple[Line, Cell]]:
    """What is chosen, and the cell that it makes of the sweep's."""
    told = sweep.dictionaries[system]
    axes = {"epochs": epochs}
    if told.solver.get("name") == "sae":
        axes["learning_rate"] = rates
    for values in itertools.product(*axes.values()):
        choice = dict(zip(axes, values, strict=True))
        solver = told.solver | {key: choice[key] for key in choice if key != "epochs"}
        one = Dictionary(solver, told.fit | {"epochs": choice["epochs"]}, told.data)
        name = "-".join(map(str, (system, *values)))
        for cell in cells(dataclasses.replace(sweep, dictionaries={name: one}), where):
            size = {"n_atoms": cell.n_atoms, "k": cell.k, "seed": cell.seed}
            yield {"system": system, **size, **choice}, cell


def flops(solver: Solver, width: int, batch_size: int) -> tuple[float, float]:
    """Of a training row: `flops` and `flops_dense`. Raises UserError where there is no formula."""
    m = solver.n_atoms
    product = 2 * m * width
    match solver:
        case Untrained():
            return 0.0, 0.0
        case KSVD(encoder=OMP(k=int(k))):
            # Correlations; each batch, the Gram matrix and the search for twins; the pursuit's
            # m k^2; residuals and the power step.
            of = product * (1 + 2 * m / batch_size) + m * k**2 + 8 * k * width
            return of, of
        case SAE(variant=TopK(k=k) | AbsTopK(k=k) | BatchTopK(k=k), matryoshka=None):
            adam = 2 * 12 * m * width / batch_size
            return product + 8 * k * width + adam, 6 * product + adam
    raise UserError(
        "--system: FLOPs are known of ksvd by omp, of topk, abs_topk and batch_topk SAEs, and of "
        "untrained dictionaries"
    )


def measure(cell: Cell, sha256: str) -> Line:
    """Fit, unless that is done; figures of the test rows."""
    config = cell.config
    try:
        run = fitted(config, sha256)
    except DivergedError as error:
        return {"failed": str(error)}
    n_rows = run.metadata["n_training_rows"]
    seen = n_rows * config.fit.epochs
    each = flops(config.solver, run.coder.atoms.shape[1], config.fit.batch_size or n_rows)
    best = best_of(run.path)
    keys = ("fvu", "fvu_bulk", "fvu_interval", "fvu_bulk_interval", "frac_alive", "l0")
    return {key: run.metrics[key] for key in keys} | {
        "validation_fvu_bulk": best["validation_fvu_bulk"],
        "best_at": best["at"],
        "seconds": best["seconds"],
        "n_train": n_rows,
        "flops": each[0] * seen,
        "flops_dense": each[1] * seen,
    }


def run(
    sweep: Sweep, system: str | None, epochs: list[float], rates: list[float], where: str
) -> list[Line]:
    """Do what is not done yet; every line of the store and hook that the file has."""
    if system is not None and system not in sweep.dictionaries:
        raise UserError(f"--system: no {system!r} among {', '.join(sweep.dictionaries)}")
    place = sweep.place / "budget"
    first = cells(sweep, where)[0].config
    sha256 = prepare(first, where).store.manifest.sha256()
    file, same = place / "results.jsonl", {"store": sha256, "hook": sweep.data.hook}
    if system is not None:
        own_place = dataclasses.replace(sweep, output=place / sha256[:8])
        tasks = list(choices(own_place, system, epochs, rates, where))
        flops(tasks[0][1].config.solver, 1, 1)  # one that has no formula shows before any fit
        for choice, cell in tasks:
            own = same | choice | lines.settings_of(cell.config)
            if lines.find(own, file) is None:
                lines.add(own | measure(cell, sha256), file)
    return [line for line in lines.all_of(same, file) if "failed" not in line]


def _floats(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: expected numbers such as 0.5,4, got {text!r}") from None


def show(found: list[Line]) -> None:
    """Means over seeds, and standard deviations where there are several."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    named = ("system", "m", "k", "epochs", "rate", "seeds", "validation")
    for title in (*named, *FIGURES, "seconds", "TFLOPs", "dense"):
        table.add_column(title, no_wrap=True)
    key = ("system", "n_atoms", "k", "epochs")
    for group in dict.fromkeys(tuple(line[name] for name in key) for line in found):
        own = [line for line in found if tuple(line[name] for name in key) == group]
        by_rate = {
            rate: [line for line in own if line.get("learning_rate") == rate]
            for rate in dict.fromkeys(line.get("learning_rate") for line in own)
        }
        most = max(map(len, by_rate.values()))  # rates are compared over the same seeds
        rate, best = min(
            (item for item in by_rate.items() if len(item[1]) == most),
            key=lambda item: _mean(item[1], "validation_fvu_bulk"),
        )
        table.add_row(
            *map(str, group[:3]), f"{group[3]:g}", "" if rate is None else f"{rate:g}",
            str(len(best)), *(_cell(best, name) for name in ("validation_fvu_bulk", *FIGURES)),
            f"{statistics.median(line['seconds'] for line in own):.0f}",
            f"{_mean(best, 'flops') / 1e12:.3g}", f"{_mean(best, 'flops_dense') / 1e12:.3g}",
        )  # fmt: skip
    Console(highlight=False, width=180).print(table)


def _mean(own: list[Line], key: str) -> float:
    return statistics.fmean(line[key] for line in own)


def _cell(own: list[Line], key: str) -> str:
    mean = f"{_mean(own, key):.4f}"
    return mean if len(own) < 2 else f"{mean} ±{statistics.stdev(line[key] for line in own):.4f}"


def main() -> None:
    """Entry of `python -m experiments.budget`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.budget", description=__doc__)
    parser.add_argument("sweep", type=Path, help="a TOML file, e.g. experiments/swap.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--system", help="a dictionary of the sweep; none: only the table")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--learning-rates", default="1e-3,3e-3,6e-3,1e-2,2e-2", help="of an SAE")
    arguments = parser.parse_args()
    where = str(arguments.sweep)
    sweep = validate(Sweep, read_toml(arguments.sweep, arguments.set), where)
    epochs = _floats("--epochs", arguments.epochs)
    rates = _floats("--learning-rates", arguments.learning_rates)
    show(run(sweep, arguments.system, epochs, rates, where))


if __name__ == "__main__":
    run_command(main)
