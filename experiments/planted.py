"""What solvers recover of planted features:  python -m experiments.planted --out DIR.

For each size and seed, a store of planted activations is made under DIR/stores, every solver is
fitted on it under DIR/runs, and scored by evals.recovery on rows that the store does not hold. A
line a fit goes to DIR/results.jsonl; fits that have their line already are not done again, so that
a run that was killed goes on where it stopped. OMP codes the true directions, in raw and in
centred rows (`oracle`, `oracle-centred`: the ceiling), and random ones (`random`: the floor).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from activations.config import validate
from activations.store import Store
from activations.terminal import UserError, run_command
from dictlearn import artifact
from dictlearn.config import FitConfig
from dictlearn.dictionary import Coder
from dictlearn.encoders.omp import OMP
from dictlearn.fit import fit
from evals import planted, recovery
from evals.planted import PlantedConfig, Sample, Truth
from experiments import lines
from experiments.lines import Line

_QUICK = {"width": 16, "n_features": 40, "mean_active": 2.0, "classes": 8}
_SMALL = {"width": 64, "n_features": 256, "mean_active": 6.0, "classes": 64}
# Like an MLP: more neurons than features, each feature in a twentieth of them, never negative.
_NEURONS = {"width": 256, "n_features": 100, "mean_active": 6.0, "support": 0.05, "signed": 0.0}
# Name: the planted config, rows to fit on, rows to score on.
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "quick": (_QUICK, 4_000, 1_000),
    "small": (_SMALL, 40_000, 10_000),
    "pairs": (_SMALL | {"signed": 0.8}, 40_000, 10_000),
    "neurons": (_NEURONS | {"classes": 64}, 40_000, 10_000),
    "medium": ({"width": 256, "n_features": 2048, "mean_active": 16.0}, 100_000, 20_000),
    "large": ({"width": 768, "n_features": 16384, "mean_active": 32.0}, 200_000, 20_000),
}
# The rough ones have a carrier, half of the variance, and one massive row in a thousand.
_ROUGH = {"carrier": 0.5, "massive": 0.001}
SIZES |= {f"{name}-rough": (table | _ROUGH, n, m) for name, (table, n, m) in SIZES.items()}

# Name: the tables [solver], [fit] and [data]. n_atoms is set to the number of features where it is
# not given, and k, of the solver or of its encoder, to the features that fire in a row on average.
_SHORT = {"batch_size": 4096, "epochs": 0.1}  # for solvers that do not learn
_OMP = {"name": "omp"}


def _ksvd(encoder: str, **data: bool) -> dict[str, Any]:
    solver = {"name": "ksvd", "encoder": {"name": encoder}, "memory": 0.8, "twins": 0.8}
    return {"solver": solver, "fit": {"batch_size": 1024, "epochs": 25}, "data": data}


def _sae(variant: str, learning_rate: float, epochs: int = 25, **more: Any) -> dict[str, Any]:
    solver = {"name": "sae", "variant": {"name": variant}, "learning_rate": learning_rate}
    return {"solver": solver | more, "fit": {"batch_size": 1024, "epochs": epochs}}


def _snmf(winners: float) -> dict[str, Any]:
    fit = {"epochs": 1000, "evaluate_steps": 25, "patience": 3, "tolerance": 1e-3}
    return {"solver": {"name": "snmf", "winners": winners}, "fit": fit, "data": {"centre": False}}


SOLVERS: dict[str, dict[str, Any]] = {
    # At the best of 35 settings on the validation rows of small-0: experiments/planted-ksvd.toml.
    "ksvd": _ksvd("omp"),
    "ksvd-kept": _ksvd("omp", keep_carriers=True, leave_out_massive=True),
    "ksvd-nn": _ksvd("nn_omp"),
    "ksvd-mp": _ksvd("mp"),
    "ksvd-matryoshka": _ksvd("matryoshka_omp"),
    # Each at the best of 5 to 7 learning rates with AuxK and without, on the validation rows of
    # small-0: experiments/planted-sae.toml.
    "topk": _sae("topk", 3e-2),
    "topk-no-aux": _sae("topk", 3e-2, aux_weight=0.0),
    "topk-2m": _sae("topk", 1e-2),
    "topk-long": _sae("topk", 1e-2, epochs=100),
    "abs_topk": _sae("abs_topk", 3e-2),
    "abs_topk-long": _sae("abs_topk", 1e-2, epochs=100),
    "batch_topk": _sae("batch_topk", 3e-2),
    "matryoshka": _sae("batch_topk", 3e-2, matryoshka=32),
    "relu": _sae("relu", 6e-2),
    "jumprelu": _sae("jumprelu", 3e-2),
    "gradient_topk": _sae("gradient_topk", 3e-2),
    # The same, and its codes are told the gradients, which know the labels: no rival of the others.
    "gradient_topk-told": _sae("gradient_topk", 3e-2),
    "snmf": _snmf(1.0),
    "snmf-wta5": _snmf(0.05),
    "snmf-wta10": _snmf(0.10),
    "data_rows": {
        "solver": {"name": "untrained", "atoms": "data_rows", "encoder": _OMP},
        "fit": _SHORT,
    },
    "gaussian": {
        "solver": {"name": "untrained", "atoms": "gaussian", "encoder": _OMP},
        "fit": _SHORT,
    },
}
# For tests; and for KSVD where every step is long.
_SHORTER = {"batch_size": 256, "epochs": 2}
_LARGE = {"batch_size": 8192, "epochs": 2}
REFERENCES = ("oracle", "oracle-centred", "random")

COLUMNS = {
    "f1": "f1", "f1_by_firing": "by firing", "f1_signed": "signed", "recovered_90": "found",
    "recovered_90_by_firing": "by firing", "recovered_90_rare": "rare",
    "recovered_90_signed": "signed", "junk": "junk", "l0": "L0", "fvu_bulk": "fvu_bulk",
    "loss_increase": "loss +", "seconds": "seconds",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the results: what is planted, and what is fitted to it."""

    size: str
    seed: int
    system: str

    @property
    def planted(self) -> PlantedConfig:
        """The config of the truth."""
        return PlantedConfig(**SIZES[self.size][0], seed=self.seed)

    @property
    def k(self) -> int:
        """Features that fire in a row on average."""
        return round(self.planted.mean_active)

    def identity(self) -> dict[str, Any]:
        """What a line must say to be the line of this job."""
        config, rows = dataclasses.asdict(self.planted), list(SIZES[self.size][1:])
        line = dataclasses.asdict(self) | {"planted": config, "rows": rows, "k": self.k}
        if self.system in REFERENCES:
            return line
        return line | lines.settings_of(config_of(self, Path()))

    def tables(self) -> dict[str, Any]:
        """[solver], [fit] and [data] for this size."""
        tables = copy.deepcopy(SOLVERS[self.system])
        atoms = self.planted.n_features * (2 if self.system.endswith("-2m") else 1)
        tables["solver"].setdefault("n_atoms", atoms)
        for part in ("encoder", "variant"):
            tables["solver"].get(part, {}).setdefault("k", self.k)
        loop: dict[str, Any] = tables["fit"]
        size = self.size.removesuffix("-rough")
        large = size == "large" and tables["solver"]["name"] == "ksvd"
        shorter = _SHORTER if size == "quick" else _LARGE if large else loop
        loop["epochs"] = min(shorter["epochs"], loop["epochs"])
        if "batch_size" in loop:
            loop["batch_size"] = shorter["batch_size"]
        return {"data": {}} | tables


def coder_of(job: Job, truth: Truth, out: Path) -> tuple[Coder, dict[str, Any]]:
    """What is to be scored, and how long it took to fit."""
    encoder = OMP(k=job.k)
    if job.system == "oracle":
        return recovery.oracle(truth, encoder), {}
    if job.system == "oracle-centred":
        return recovery.oracle(truth, encoder, mean=planted.rows(truth, 20_000).x.mean(axis=0)), {}
    if job.system == "random":
        rng = np.random.default_rng(job.seed)
        return recovery.plain_coder(rng.standard_normal(truth.directions.shape), encoder), {}
    config = config_of(job, out)
    make_store(config.data.store, truth, SIZES[job.size][1])
    run = artifact.load(fit(config, overwrite=True))
    return run.coder, {"seconds": run.metrics["seconds"]}


def config_of(job: Job, out: Path) -> FitConfig:
    """How a solver is fitted, and where to."""
    tables, name = job.tables(), f"{job.size}-{job.seed}"
    store = {"store": str(out / "stores" / name), "hook": planted.HOOK}
    table = tables | {
        "name": f"planted-{job.system}",
        "seed": job.seed,
        "data": tables["data"] | store,
        "output": str(out / "runs" / f"{name}-{job.system}"),
    }
    return validate(FitConfig, table, f"SOLVERS[{job.system!r}]")


def make_store(path: Path, truth: Truth, n_rows: int) -> None:
    """The store at `path`, made where it is missing; what a kill left is begun anew."""
    if not path.exists():
        begun = path.with_name(f".{path.name}.partial")
        shutil.rmtree(begun, ignore_errors=True)
        planted.store(begun, truth, n_rows)
        begun.rename(path)
    there = Store(path).manifest.request
    if there != {"planted": dataclasses.asdict(truth.config), "n_rows": n_rows}:
        raise UserError(f"{path}: holds other planted rows. Delete it, or name another --out.")


def run(jobs: list[Job], out: Path) -> list[Line]:
    """Do what is not done yet; the line of every job."""
    file = out / "results.jsonl"
    done: list[Line] = []
    held: tuple[PlantedConfig, Truth, Sample] | None = None
    for job in jobs:
        if line := lines.find(job.identity(), file):
            done.append(line)
            continue
        if held is None or held[0] != job.planted:
            _, n_rows, n_scored = SIZES[job.size]
            truth = planted.plant(job.planted)
            held = job.planted, truth, planted.rows(truth, n_scored, first=n_rows)
        coder, more = coder_of(job, held[1], out)
        told = job.system.endswith("-told")
        figures = recovery.score(coder, held[1], held[2], gradients=told)
        done.append(lines.add(job.identity() | figures | more, file))
    return done


def show(found: list[Line]) -> None:
    """Mean over seeds, and their standard deviation where there are several."""

    def cell(values: list[float]) -> str:
        mean = f"{statistics.fmean(values):.3f}" if values else ""
        return mean if len(values) < 2 else f"{mean} ±{statistics.stdev(values):.3f}"

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("size", "system", *COLUMNS.values()):
        table.add_column(title, no_wrap=True)
    for size, system in dict.fromkeys((line["size"], line["system"]) for line in found):
        own = [line for line in found if (line["size"], line["system"]) == (size, system)]
        values = ([line[key] for line in own if line.get(key) is not None] for key in COLUMNS)
        table.add_row(size, system, *map(cell, values))
    Console(highlight=False, width=220).print(table)


def main() -> None:
    """Entry of `python -m experiments.planted`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.planted", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny size, short fits")
    parser.add_argument("--sizes", default="small", help=", ".join(SIZES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--solvers", default=",".join(SOLVERS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sizes = ["quick"] if arguments.quick else arguments.sizes.split(",")
    solvers, seeds = arguments.solvers.split(","), arguments.seeds.split(",")
    for option, asked, names in (("sizes", sizes, SIZES), ("solvers", solvers, SOLVERS)):
        if unknown := [name for name in asked if name not in names]:
            raise UserError(f"--{option}: no {unknown[0]!r} among {', '.join(names)}")
    if not all(map(str.isdecimal, seeds)):
        raise UserError(f"--seeds: expected numbers such as 0,1,2, got {arguments.seeds!r}")
    jobs = itertools.product(sizes, map(int, seeds), [*solvers, *REFERENCES])
    show(run([Job(*names) for names in jobs], arguments.out))


if __name__ == "__main__":
    run_command(main)
