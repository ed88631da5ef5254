"""One config over a grid:  python -m experiments.tune CONFIG --grid KEY=A,B ... --out FILE.

Every point of the grid is fitted, and has a line in FILE (JSON): its settings, the best validation
fvu_bulk, at which share of the steps that was, and the seconds of the steps alone. The test rows
are not looked at: what is chosen here may be judged by them later. Points that have their line
already are not fitted again; a fit that diverged is a result too.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from activations.config import read_toml, validate
from activations.terminal import UserError, run_command
from dictlearn import artifact
from dictlearn.config import FitConfig
from dictlearn.fit import fit, prepare
from dictlearn.loop import DivergedError
from experiments import lines
from experiments.lines import Line


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


def point(config: FitConfig, where: str) -> dict[str, Any]:
    """Fit one point of the grid."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return best_of(fit(dataclasses.replace(config, output=Path(folder) / "run")))
        except DivergedError as error:
            return {"failed": f"{where}: {error}"}


def axis(text: str) -> list[str]:
    """KEY=A,B as KEY=A and KEY=B; commas inside of brackets stay."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise UserError(f"--grid {text}: expected key=value,value, e.g. solver.n_atoms=64,128")
    return [f"{key}={value}" for value in re.split(r",(?![^{\[]*[}\]])", values)]


def run(config: Path, fixed: list[str], grid: list[str], file: Path) -> list[Line]:
    """Do what is not done yet; the line of every point."""
    choices = [[*fixed, *choice] for choice in itertools.product(*map(axis, grid))]
    where = [" ".join([str(config), *settings]) for settings in choices]
    configs = [
        validate(FitConfig, read_toml(config, settings), name)
        for settings, name in zip(choices, where, strict=True)
    ]
    found = []
    for settings, one, name in zip(choices, configs, where, strict=True):
        store = prepare(one, name).store.manifest.sha256()
        own = {"config": str(config), "settings": settings, "store": store}
        own |= lines.settings_of(one)
        line = lines.find(own, file) or lines.add(own | point(one, name), file)
        shown = {key: line[key] for key in line if key not in own}
        print(*settings, json.dumps(shown), flush=True)
        found.append(line)
    return found


def main() -> None:
    """Entry of `python -m experiments.tune`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tune", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="fixed")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=A,B", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run(arguments.config, arguments.fixed, arguments.grid, arguments.out)


if __name__ == "__main__":
    run_command(main)
