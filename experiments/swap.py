"""Dictionaries, each coded by several encoders:  python -m experiments.swap --store DIR --out DIR.

Rows are dictionaries, columns encoders: down a column atoms are compared and nothing else, along a
row encoders. Each dictionary is fitted once for each m, k and seed, under OUT/runs, and measured on
its test rows with each encoder; the seed decides split, start and batches, the same for all. A line
a cell goes to OUT/results.jsonl. What has its line, or its run, is not done again, so that an
experiment that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from activations.config import read_toml, validate
from activations.store import Store
from activations.terminal import UserError, run_command
from dictlearn import artifact, fit_encoder, recode
from dictlearn.checkpoint import CheckpointError
from dictlearn.config import FitConfig, resolved
from dictlearn.encoders import activations
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.linear import Tied
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP
from dictlearn.fit import fit, go_on
from dictlearn.solvers.sae_variants import AbsTopK
from experiments import lines, swap_tables
from experiments.lines import Line

LEARNING_RATE = {"topk": 6e-3, "abs_topk": 1e-2, "batch_topk": 1e-2, "matryoshka": 1e-2}
# Of the encoder that is distilled onto a dictionary.
DISTILLED = {"learning_rate": 3e-3, "epochs": 10.0}

# Name: the tables [solver], [fit] and [data]. n_atoms, k (of the encoder or the variant), and an
# SAE's epochs are set by the options.
_OMP = {"name": "omp"}
_KSVD = {"name": "ksvd", "twins": 0.99}  # the best of 1, 0.99, 0.9 and 0.8 on validation rows
_LONG = {"batch_size": 4096, "epochs": 4}
_SHORT = {"batch_size": 4096, "epochs": 0.1}  # steps only measure
_SMALLEST = 64
_SNMF_LOOP = {"epochs": 400, "evaluate_steps": 25, "patience": 3, "tolerance": 1e-3}


def _sae(name: str, variant: str, **more: Any) -> dict[str, Any]:
    rate = {"learning_rate": LEARNING_RATE[name]}
    solver = {"name": "sae", "variant": {"name": variant}} | rate | more
    return {"solver": solver, "fit": {"batch_size": 1024}}


def _snmf(winners: float, *, centre: bool) -> dict[str, Any]:
    solver = {"name": "snmf", "winners": winners}
    return {"solver": solver, "fit": _SNMF_LOOP, "data": {"centre": centre}}


DICTIONARIES: dict[str, dict[str, Any]] = {
    "ksvd": {"solver": _KSVD | {"encoder": _OMP}, "fit": _LONG},
    "ksvd-matryoshka": {
        "solver": _KSVD | {"encoder": {"name": "matryoshka_omp", "smallest": _SMALLEST}},
        "fit": _LONG,
    },
    "topk": _sae("topk", "topk"),
    "abs_topk": _sae("abs_topk", "abs_topk"),
    "batch_topk": _sae("batch_topk", "batch_topk"),
    "matryoshka": _sae("matryoshka", "batch_topk", matryoshka=_SMALLEST),
    "data_rows": {
        "solver": {"name": "untrained", "atoms": "data_rows", "encoder": _OMP},
        "fit": _SHORT,
    },
    "gaussian": {
        "solver": {"name": "untrained", "atoms": "gaussian", "encoder": _OMP},
        "fit": _SHORT,
    },
}
NEURONS: dict[str, dict[str, Any]] = {
    "snmf": _snmf(0.01, centre=False),
    "snmf-all": _snmf(1.0, centre=False),
    "snmf-centred": _snmf(0.01, centre=True),
}
# Name: the dictionaries, and how many atoms they have unless --n-atoms says otherwise.
TABLES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "resid": (DICTIONARIES, "2048"),
    "mlp": (DICTIONARIES | NEURONS, "100,400"),
}
ENCODERS = ("own", "omp", "nn_omp", "tied", "distilled")

_KEPT = (*swap_tables.FIGURES, "fvu_interval", "fvu_bulk_interval")


@dataclasses.dataclass(frozen=True)
class Place:
    """What all cells share: the rows, and where results go."""

    table: str
    store: Path
    hook: str
    epochs: float  # of an SAE
    out: Path


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the results."""

    dictionary: str
    encoder: str
    n_atoms: int
    k: int
    seed: int


def config_of(cell: Cell, place: Place) -> FitConfig:
    """How the dictionary is fitted, and where to."""
    tables = copy.deepcopy(TABLES[place.table][0][cell.dictionary])
    solver: dict[str, Any] = tables["solver"]
    solver["n_atoms"] = cell.n_atoms
    for part in ("encoder", "variant"):
        if part in solver:
            solver[part]["k"] = cell.k
    if solver["name"] == "sae":
        tables["fit"] |= {"epochs": place.epochs}
    name = f"{place.table}-{cell.dictionary}-m{cell.n_atoms}-k{cell.k}-s{cell.seed}"
    table = tables | {
        "name": name,
        "seed": cell.seed,
        "data": tables.get("data", {}) | {"store": str(place.store), "hook": place.hook},
        "output": str(place.out / "runs" / name),
    }
    return validate(FitConfig, table, f"{place.table} table, {cell.dictionary}")


def identity(cell: Cell, place: Place, sha256: str) -> Line:
    """What a line must say to be the line of this cell; `sha256` is of the store's manifest."""
    line = {"table": place.table, "store": sha256} | dataclasses.asdict(cell)
    line |= lines.settings_of(config_of(cell, place))
    return line | ({"distilled": DISTILLED} if cell.encoder == "distilled" else {})


def fitted(config: FitConfig, sha256: str) -> artifact.Run:
    """The run of a config: as it stands there, or gone on with, or fitted anew."""
    output = config.output
    assert output is not None
    wanted = resolved(config, None)
    if _stands(output) and read_toml(output / "config.toml", []) == wanted:
        run = artifact.load(output)
        if run.metadata["store"]["manifest_sha256"] == sha256:
            return run
    shutil.rmtree(_encoder_place(output), ignore_errors=True)  # it was of other atoms
    begun = (output / artifact.UNFINISHED).exists() and (output / artifact.CHECKPOINT).exists()
    if begun and read_toml(output / "config.toml", []) == wanted:
        with contextlib.suppress(CheckpointError):  # damaged, or of another store
            return artifact.load(go_on(output))
    return artifact.load(fit(config, where=config.name, overwrite=True))


def _stands(run: Path) -> bool:
    return (run / artifact.METADATA).exists() and not (run / artifact.UNFINISHED).exists()


def _encoder_place(run: Path) -> Path:
    return run.with_name(f"{run.name}-encoder")


def encoder_of(name: str, run: artifact.Run, k: int) -> AbstractEncoder:
    """The encoder of a column. A distilled one is fitted, unless its run stands there already."""
    match name:
        case "own":
            return run.coder.encoder
        case "omp":
            return OMP(k=k)
        case "nn_omp":
            return NonNegativeOMP(k=k)
        case "tied":
            return Tied(activations.AbsTopK(k))
    output, variant = _encoder_place(run.path), AbsTopK(k=k)
    if _stands(output):
        table = read_toml(output / "config.toml", [])
        there = {
            "learning_rate": table["solver"]["learning_rate"],
            "epochs": table["fit"]["epochs"],
        }
        if there == DISTILLED and table["solver"]["variant"] == artifact.hyperparameters(variant):
            return artifact.load(output).coder.encoder
    rate, epochs = DISTILLED["learning_rate"], DISTILLED["epochs"]
    return fit_encoder(
        run, variant, learning_rate=rate, epochs=epochs, output=output, overwrite=True
    )


def measure(cell: Cell, place: Place, sha256: str) -> Line:
    """Figures of the test rows, and seconds of the fit."""
    run = fitted(config_of(cell, place), sha256)
    seen = recode(run, encoder_of(cell.encoder, run, cell.k)).metrics
    return {key: seen[key] for key in _KEPT} | {"seconds": run.metrics["seconds"]}


def run(cells: list[Cell], place: Place) -> list[Line]:
    """Do what is not done yet; the line of every cell."""
    sha256 = Store(place.store).manifest.sha256()
    file = place.out / "results.jsonl"
    wanted = [identity(cell, place, sha256) for cell in cells]  # mistakes show before any fit
    found: list[Line] = []
    for cell, own in zip(cells, wanted, strict=True):
        there = lines.find(own, file)
        found.append(there or lines.add(own | measure(cell, place, sha256), file))
    return found


def numbers(option: str, text: str, *, least: int) -> list[int]:
    """Numbers such as 0,1,2. Raises UserError where one is none, or is below `least`."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{option}: expected numbers from {least} on such as 1,2,3, got {text!r}")
    return list(map(int, parts))


def check(option: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError where a name is not known."""
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"{option}: no {unknown[0]!r} among {', '.join(known)}")


def main() -> None:
    """Entry of `python -m experiments.swap`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.swap", description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--hook", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", default="resid", help=", ".join(TABLES))
    parser.add_argument("--dictionaries", help="default: all of the table")
    parser.add_argument("--encoders", default=",".join(ENCODERS))
    parser.add_argument("--n-atoms", help="2048 for resid, 100,400 for mlp")
    parser.add_argument("--k", default="32")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--epochs", type=float, default=25.0, help="of an SAE")
    parser.add_argument("--figure", default="fvu_bulk", help=", ".join(swap_tables.FIGURES))
    parser.add_argument("--against", help="a dictionary or an encoder: differences from it")
    parser.add_argument("--markdown", action="store_true", help="tables as LOG.md has them")
    arguments = parser.parse_args()
    table, figure, against = arguments.table, arguments.figure, arguments.against
    check("--table", [table], TABLES)
    made, usual = TABLES[table]
    dictionaries = (arguments.dictionaries or ",".join(made)).split(",")
    encoders = arguments.encoders.split(",")
    check("--dictionaries", dictionaries, made)
    check("--encoders", encoders, ENCODERS)
    check("--figure", [figure], swap_tables.FIGURES)
    check("--against", [against] if against else [], [*dictionaries, *encoders])
    sizes = numbers("--n-atoms", arguments.n_atoms or usual, least=1)
    nonzeros = numbers("--k", arguments.k, least=1)
    seeds = numbers("--seeds", arguments.seeds, least=0)
    if max(nonzeros) > min(sizes):
        raise UserError(f"--k: {max(nonzeros)} is more than --n-atoms has: {min(sizes)}")
    place = Place(table, arguments.store, arguments.hook, arguments.epochs, arguments.out)
    cells = [  # seeds first: tables are whole early
        Cell(dictionary, encoder, m, k, seed)
        for seed, m, k in itertools.product(seeds, sizes, nonzeros)
        for dictionary, encoder in itertools.product(dictionaries, encoders)
    ]
    found = run(cells, place)
    for m, k in itertools.product(sizes, nonzeros):
        own = [line for line in found if (line["n_atoms"], line["k"]) == (m, k)]
        for grid in swap_tables.grids(own, figure, against):
            swap_tables.show(grid, markdown=arguments.markdown)


if __name__ == "__main__":
    run_command(main)
