"""One cell of a sweep, in a process of its own:  python -m experiments.compare.cell FILE CELL.

Fits the dictionary, or goes on with it; codes the test rows by each encoder; asks the families of
evals. PLACE/cells/CELL.json has the figures, CELL.npz the sums over each document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from activations.config import read_toml, validate
from activations.files import replace_file, replacing
from activations.store import Store
from activations.terminal import UserError, run_command
from dictlearn import artifact, fit_encoder, heldout
from dictlearn.artifact import Run, finite
from dictlearn.checkpoint import CheckpointError
from dictlearn.config import FitConfig, recipe_of, resolved
from dictlearn.encoders import activations
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.linear import Tied
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP
from dictlearn.fit import fit, go_on
from dictlearn.solvers.sae_variants import AbsTopK
from dictlearn.swap import job_of
from evals import run as evals_run
from evals.run import Subject
from experiments import lines
from experiments.compare.sweep import Cell, EncoderName, Sweep, cells

# Of the encoder that is distilled onto a dictionary.
DISTILLED = {"learning_rate": 3e-3, "epochs": 10.0}
# Of the fit, in the table; of other encoders the first ones.
_CODED = ("fvu", "fvu_bulk", "l0", "median_error", "cosine", "frac_alive")
FIT = (*_CODED, "twins", "coherence", "seconds")


def identity(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """All that a cell's figures depend on."""
    settings = {name: getattr(sweep.settings, name) for name in sweep.evals}
    told = {
        "store": Store(cell.config.data.store).manifest.sha256(),
        "n_atoms": cell.n_atoms,
        "k": _k_of(sweep, cell),
        "encoders": list(sweep.encoders),
        "evals": settings,
    }
    if "distilled" in sweep.encoders:
        told["distilled"] = DISTILLED
    return json.loads(json.dumps(told | lines.settings_of(cell.config), default=str))


def _k_of(sweep: Sweep, cell: Cell) -> int | None:
    """At most so many codes a row by other encoders: the cell's k, or the only one of the sweep."""
    return sweep.k[0] if cell.k is None and len(sweep.k) == 1 else cell.k


def files(sweep: Sweep, cell: Cell) -> tuple[Path, Path]:
    """Where a cell's figures and sums are."""
    folder = sweep.place / "cells"
    return folder / f"{cell.name}.json", folder / f"{cell.name}.npz"


def done(sweep: Sweep, cell: Cell) -> bool:
    """Whether a cell's figures are there, of the same settings and store."""
    told, sums = files(sweep, cell)
    try:
        return sums.exists() and json.loads(told.read_text())["identity"] == identity(sweep, cell)
    except (OSError, ValueError, KeyError):
        return False


def measure(sweep: Sweep, cell: Cell) -> None:
    """Do a cell, and write what came out."""
    own = identity(sweep, cell)
    run = fitted(cell.config, own["store"])
    rows, sums = _coded(sweep, cell, run)
    subject = Subject(run, sweep.settings)
    for family in sweep.evals:
        found = _evaluated(subject, family, run.path / "evals")
        for category, values in found["eval_result_metrics"].items():
            for key, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    interval = values.get(f"{key}_interval") or (None, None)
                    rows.append(_row("own", family, f"{category}.{key}", value, interval))
        if family == "core":
            by = found["eval_result_unstructured"]["by_document"]
            sums |= {f"ce_{key}": np.array(values) for key, values in by.items()}
    told, array = files(sweep, cell)
    told.parent.mkdir(parents=True, exist_ok=True)
    with replacing(array) as file:
        np.savez(file, **sums)  # pyright: ignore
    text = json.dumps(finite({"identity": own, "rows": rows}), indent=1, allow_nan=False)
    replace_file(told, text.encode())


def fitted(config: FitConfig, sha256: str) -> Run:
    """The run of a config: as it stands there, or gone on with, or fitted anew.

    Arguments:
      sha256: of the store's manifest.
    """
    output = config.output
    assert output is not None
    wanted = resolved(config, recipe_of(config, config.name))
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


def encoder_of(name: EncoderName, run: Run, k: int) -> AbstractEncoder:
    """An encoder by its name. A distilled one is fitted, unless its run stands there already."""
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


def _coded(
    sweep: Sweep, cell: Cell, run: Run
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Figures of the test rows by each encoder, and the sums over their documents."""
    job = job_of(run)
    rows: list[dict[str, Any]] = []
    sums: dict[str, np.ndarray] = {"document": job.parts["test"].documents}
    k = _k_of(sweep, cell)
    others = () if k is None else sweep.encoders
    for name in dict.fromkeys(("own", *others)):
        encoder = encoder_of(name, run, k or 1)
        coder = eqx.tree_at(lambda coder: coder.encoder, run.coder, encoder)
        seen = heldout.evaluate(coder, job.parts["test"], job.bulk)
        figures = heldout.figures(coder, seen, seed=cell.seed) | {"seconds": run.metrics["seconds"]}
        for key in FIT if name == "own" else _CODED:
            interval = figures.get(f"{key}_interval", (None, None))
            rows.append(_row(name, "fit", key, figures[key], interval))
        for kind, of in (("fvu", seen.raw), ("fvu_bulk", seen.bulk)):
            shared = {"count": of.count, "square": of.square, "total": of.total}
            sums |= {f"{kind}_{key}": values for key, values in shared.items()}
            sums[f"{kind}_error_{name}"] = of.error
    return rows, sums


def _row(
    encoder: str, family: str, figure: str, value: float, interval: tuple[Any, Any]
) -> dict[str, Any]:
    low, high = interval
    told = {"encoder": encoder, "family": family, "figure": figure, "value": float(value)}
    return told | {"low": low, "high": high}


def _evaluated(subject: Subject, family: str, out: Path) -> dict[str, Any]:
    """A family's envelope; what is there of other settings is replaced."""
    try:
        found, failed = evals_run.evaluate(subject, [family], out, quick=False, overwrite=False)
    except UserError:
        found, failed = evals_run.evaluate(subject, [family], out, quick=False, overwrite=True)
    if failed:
        raise UserError(f"{family}: {failed[family]}")
    return found[family]


def main() -> None:
    """Entry of `python -m experiments.compare.cell`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare.cell", description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("cell")
    arguments = parser.parse_args()
    where = str(arguments.sweep)
    sweep = validate(Sweep, json.loads(arguments.sweep.read_text()), where)
    found = {cell.name: cell for cell in cells(sweep, where)}
    if arguments.cell not in found:
        raise UserError(f"{where}: no cell {arguments.cell!r} among {', '.join(found)}")
    measure(sweep, found[arguments.cell])


if __name__ == "__main__":
    run_command(main)
