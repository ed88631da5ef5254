"""One config over a grid:  python -m experiments.tune CONFIG --grid KEY=A,B ... --out FILE.

Every point of the grid is fitted, and has a line in FILE (JSON): its settings, the best validation
fvu_bulk, and at which share of the steps that was. The test rows are not looked at: what is chosen
here may be judged by them later. Points that have their line already are not fitted again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from activations.config import read_toml, validate
from activations.terminal import UserError, run_command
from dictlearn import artifact
from dictlearn.config import FitConfig
from dictlearn.fit import fit
from experiments import lines


def best_of(run: Path) -> dict[str, Any]:
    """The step that was best on the validation rows."""
    steps = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    best = steps[artifact.load(run).metrics["best_step"] - 1]
    return {
        "validation_fvu_bulk": best["validation_fvu_bulk"],
        "at": best["step"] / len(steps),
        "l0": best["validation_l0"],
        "dead": best["dead"],
        "seconds": sum(line["seconds"] for line in steps),
    }


def point(config: Path, settings: list[str]) -> dict[str, Any]:
    """Fit one point of the grid."""
    with tempfile.TemporaryDirectory() as folder:
        table = read_toml(config, settings) | {"output": str(Path(folder) / "run")}
        try:
            run = fit(validate(FitConfig, table, str(config)), where=str(config))
            found = best_of(run)
        except UserError as error:  # a learning rate that diverges is a result too
            found = {"failed": str(error).splitlines()[0]}
            shutil.rmtree(Path(folder) / "run", ignore_errors=True)
    return found


def main() -> None:
    """Entry of `python -m experiments.tune`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tune", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="fixed")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=A,B", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    axes = []
    for text in arguments.grid:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--grid {text}: expected key=value,value, e.g. solver.n_atoms=64,128")
        axes.append([f"{key}={value}" for value in values.split(",")])
    for choice in itertools.product(*axes):
        settings = [*arguments.fixed, *choice]
        own = {"config": str(arguments.config), "settings": settings}
        line = lines.find(own, arguments.out)
        line = line or lines.add(own | point(arguments.config, settings), arguments.out)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_command(main)
