"""Quality against what it costs:  python -m experiments.budget --store DIR --hook H --out DIR ...

Every system is fitted to its end for each number of epochs (a schedule that is cut short tells
nothing), an SAE for each learning rate too. A line a fit goes to OUT/results.jsonl; what has its
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
import itertools
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from activations.config import validate
from activations.store import Store
from activations.terminal import UserError, run_command
from dictlearn.config import FitConfig
from dictlearn.loop import DivergedError
from experiments import lines
from experiments.lines import Line
from experiments.swap import DICTIONARIES, check, fitted, numbers
from experiments.tune import best_of

SYSTEMS = ("ksvd", "topk", "abs_topk", "batch_topk", "data_rows", "gaussian")
FIGURES = ("fvu_bulk", "fvu", "frac_alive")


def config_of(arguments: argparse.Namespace, place: Path, choice: dict[str, Any]) -> FitConfig:
    """How a line's dictionary is fitted, and where to."""
    parts = DICTIONARIES[arguments.system]
    solver = parts["solver"] | {"n_atoms": arguments.n_atoms}
    name = "encoder" if "encoder" in solver else "variant"
    solver[name] = solver[name] | {"k": arguments.k}
    if "learning_rate" in choice:
        solver["learning_rate"] = choice["learning_rate"]
    table = {
        "name": "-".join(
            map(str, (arguments.system, arguments.n_atoms, arguments.k, *choice.values()))
        ),
        "seed": choice["seed"],
        "data": {"store": str(arguments.store), "hook": arguments.hook},
        "solver": solver,
        "fit": parts["fit"] | {"epochs": choice["epochs"]},
    }
    table["output"] = str(place / table["name"])
    return validate(FitConfig, table, arguments.system)


def flops(system: str, n_atoms: int, k: int, width: int, batch_size: int) -> tuple[float, float]:
    """Of a training row: `flops` and `flops_dense`."""
    product, codes = 2 * n_atoms * width, 2 * k * width
    if system == "ksvd":
        # Correlations; each batch, the Gram matrix and the search for twins; the pursuit's m k^2;
        # residuals and the power step.
        of = product * (1 + 2 * n_atoms / batch_size) + n_atoms * k**2 + 4 * codes
        return of, of
    if system in ("data_rows", "gaussian"):
        return 0.0, 0.0
    adam = 2 * 12 * n_atoms * width / batch_size
    return product + 4 * codes + adam, 6 * product + adam


def measure(config: FitConfig, arguments: argparse.Namespace, sha256: str) -> Line:
    """Fit, unless that is done; figures of the test rows."""
    try:
        run = fitted(config, sha256)
    except DivergedError as error:
        return {"failed": str(error)}
    n_rows = run.metadata["n_training_rows"]
    seen = n_rows * config.fit.epochs
    width = run.coder.atoms.shape[1]
    batch = config.fit.batch_size or n_rows
    each = flops(arguments.system, arguments.n_atoms, arguments.k, width, batch)
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


def run(arguments: argparse.Namespace) -> list[Line]:
    """Do what is not done yet; every line of the store and hook that the file has."""
    sha256 = Store(arguments.store).manifest.sha256()
    file = arguments.out / "results.jsonl"
    same = {"store": sha256, "hook": arguments.hook}
    if arguments.system:
        axes: dict[str, list[Any]] = {
            "seed": numbers("--seeds", arguments.seeds, least=0),
            "epochs": _floats("--epochs", arguments.epochs),
        }
        if DICTIONARIES[arguments.system]["solver"]["name"] == "sae":
            axes["learning_rate"] = _floats("--learning-rates", arguments.learning_rates)
        for values in itertools.product(*axes.values()):
            choice = dict(zip(axes, values, strict=True))
            of = {"system": arguments.system, "n_atoms": arguments.n_atoms, "k": arguments.k}
            config = config_of(arguments, arguments.out / "runs" / sha256[:8], choice)
            own = same | of | choice | lines.settings_of(config)
            if lines.find(own, file) is None:
                lines.add(own | measure(config, arguments, sha256), file)
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
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--hook", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--system", help=f"{', '.join(SYSTEMS)}; none: only the table")
    parser.add_argument("--n-atoms", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--learning-rates", default="1e-3,3e-3,6e-3,1e-2,2e-2", help="of an SAE")
    parser.add_argument("--seeds", default="0")
    arguments = parser.parse_args()
    check("--system", [arguments.system] if arguments.system else [], SYSTEMS)
    show(run(arguments))


if __name__ == "__main__":
    run_command(main)
