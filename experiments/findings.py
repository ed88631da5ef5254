"""Dictionaries by what a model makes of them:  python -m experiments.findings --store DIR ...

Fits what experiments.swap fits (the same runs, under OUT/runs), measures each by families of
`evals.run`, or by experiments.downstream, which is the cheaper way to the CE, and prints a table a
family: means over the seeds, and for each figure the differences from one dictionary, paired by
seed, with

- the 95 % interval of Student's t over the seeds, and the smallest difference that as many seeds
  would detect: (t_0.975 + t_0.8) s / sqrt(n), s being the deviation of the paired differences;
- the width of a run's own interval (over documents, or concepts and prompts), where it has one.

What is done is not done again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import scipy.stats

from activations.config import read_toml, validate
from activations.store import Store
from activations.terminal import UserError, run_command
from dictlearn.artifact import Run
from evals import run as evals_run
from evals.run import EvalConfig, Subject
from experiments import downstream, swap, swap_tables
from experiments.swap import Cell, Place
from experiments.swap_tables import Grid

# Of each family what stands in the table: category and figure.
FIGURES = {
    "downstream": (
        ("plain", "ce_increase"), ("plain", "loss_recovered"), ("plain", "fvu_bulk"),
        ("plain", "l0"),
    ),
    "core": (
        ("headline", "ce_increase"), ("headline", "kl"), ("headline", "fvu_bulk"),
        ("sparsity", "l0"), ("misc_metrics", "frac_alive"),
    ),
    "sparse_probing": (
        ("sae", "sae_top_1_test_accuracy"), ("sae", "sae_top_2_test_accuracy"),
        ("sae", "sae_top_5_test_accuracy"), ("llm", "llm_top_5_test_accuracy"),
    ),
    "steering": (
        ("feature", "score"), ("feature", "effect"), ("feature", "fluent"),
        ("feature", "logit_shift"), ("diff_means", "feature_above"),
        ("random_feature", "feature_above"), ("bidirectionality", "separated"),
    ),
}  # fmt: skip

# Tokens whose next one is predicted, of each split.
_TOKENS = 2000

# dictionary, seed -> figure -> (value, the width of its own interval or None)
Values = dict[tuple[str, int], dict[str, tuple[float, float | None]]]


def measure(
    cells: list[Cell], place: Place, families: list[str], config: EvalConfig, *, quick: bool
) -> dict[str, Values]:
    """Every family's figures of every cell; one that is null is left out."""
    sha256 = Store(place.store).manifest.sha256()
    found: dict[str, Values] = {family: {} for family in families}
    model = None
    runs = [swap.fitted(swap.config_of(cell, place), sha256) for cell in cells]
    if "downstream" in families:
        found["downstream"] = _downstream(cells, runs, place)
        families = [family for family in families if family != "downstream"]
    for cell, run in zip(cells, runs, strict=True) if families else ():
        subject = Subject(run, config, model)
        told, failed = evals_run.evaluate(
            subject, families, run.path / "evals", quick=quick, overwrite=False
        )
        model = vars(subject).get("model")  # where it was needed
        if failed:
            raise UserError("; ".join(f"{run.path}, {name}: {why}" for name, why in failed.items()))
        for family, envelope in told.items():
            metrics = envelope["eval_result_metrics"]
            found[family][cell.dictionary, cell.seed] = {
                f"{category}.{key}": (
                    metrics[category][key],
                    _width(metrics[category].get(f"{key}_interval")),
                )
                for category, key in FIGURES[family]
                if metrics[category].get(key) is not None
            }
    return found


def _downstream(cells: list[Cell], runs: list[Run], place: Place) -> Values:
    """What the model loses, by experiments.downstream; lines go to OUT/downstream.jsonl."""
    file = place.out / "downstream.jsonl"
    lines = downstream.measure_all(runs, ("plain",), _TOKENS, file)
    of = {line["run"]: line for line in lines}
    return {
        (cell.dictionary, cell.seed): {
            f"{category}.{key}": (
                of[str(run.path)][key],
                _width(of[str(run.path)].get(f"{key}_interval")),
            )
            for category, key in FIGURES["downstream"]
        }
        for cell, run in zip(cells, runs, strict=True)
    }


def _width(interval: list[float] | None) -> float | None:
    return None if not interval or None in interval else interval[1] - interval[0]


def smallest(differences: list[float]) -> float:
    """The smallest mean difference that as many pairs detect: by 5 % twosided, in 80 % of trials.

    (t_0.975 + t_0.8) s / sqrt(n), with n - 1 degrees of freedom; NaN of fewer than two.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    quantiles = scipy.stats.t.ppf([0.975, 0.8], n - 1)
    return float(quantiles.sum()) * statistics.stdev(differences) / math.sqrt(n)


def grids(family: str, values: Values, against: str) -> list[Grid]:
    """The means, and the differences from one dictionary, of a family."""
    rows = list(dict.fromkeys(dictionary for dictionary, _ in values))
    keys = [f"{category}.{key}" for category, key in FIGURES[family]]

    def of(row: str, key: str) -> dict[int, float]:
        found = {}
        for (dictionary, seed), own in values.items():
            if dictionary == row and key in own:
                found[seed] = own[key][0]
        return found

    means = [[row, *(swap_tables.shown_mean(list(of(row, key).values()), key) for key in keys)]
             for row in rows]  # fmt: skip
    widths = [[own[key][1] for own in values.values() if key in own] for key in keys]
    means.append(["width of a run's own 95 %", *(_median(width) for width in widths)])
    apart = []
    for row in rows:
        if row != against:
            pairs = [
                [of(row, key)[seed] - of(against, key)[seed]
                 for seed in of(row, key) if seed in of(against, key)]
                for key in keys
            ]  # fmt: skip
            apart.append([row, *(_told(own, key) for own, key in zip(pairs, keys, strict=True))])
    return [
        (f"{family}, mean ± deviation over seeds", ["", *keys], means),
        (f"{family} less that of {against}, paired by seed; [smallest detectable]",
         ["", *keys], apart),
    ]  # fmt: skip


def _median(widths: list[float | None]) -> str:
    there = [width for width in widths if width is not None]
    return f"{statistics.median(there):.4f}" if there else ""


def _told(differences: list[float], key: str) -> str:
    told = swap_tables.shown_difference(differences, key)
    least = smallest(differences)
    return told if math.isnan(least) else f"{told} [{least:.4f}]"


def main() -> None:
    """Entry of `python -m experiments.findings`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.findings", description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--hook", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", default="resid", help=", ".join(swap.TABLES))
    parser.add_argument("--dictionaries", help="default: all of the table")
    parser.add_argument("--n-atoms", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--epochs", type=float, default=25.0, help="of an SAE")
    parser.add_argument("--evals", default="core,sparse_probing,steering", help=", ".join(FIGURES))
    parser.add_argument("--config", type=Path, help="settings of the families, as evals.run has")
    parser.add_argument("--quick", action="store_true", help="the families' quick sizes")
    parser.add_argument("--against", default="ksvd")
    parser.add_argument("--markdown", action="store_true", help="tables as LOG.md has them")
    arguments = parser.parse_args()
    swap.check("--table", [arguments.table], swap.TABLES)
    made = swap.TABLES[arguments.table][0]
    dictionaries = (arguments.dictionaries or ",".join(made)).split(",")
    families = arguments.evals.split(",")
    swap.check("--dictionaries", dictionaries, made)
    swap.check("--evals", families, FIGURES)
    swap.check("--against", [arguments.against], dictionaries)
    seeds = swap.numbers("--seeds", arguments.seeds, least=0)
    config = EvalConfig()
    if arguments.config:
        config = validate(EvalConfig, read_toml(arguments.config, []), str(arguments.config))
    place = Place(arguments.table, arguments.store, arguments.hook, arguments.epochs, arguments.out)
    size: dict[str, Any] = {"n_atoms": arguments.n_atoms, "k": arguments.k}
    cells = [Cell(dictionary, "own", seed=seed, **size)
             for seed, dictionary in itertools.product(seeds, dictionaries)]  # fmt: skip
    found = measure(cells, place, families, config, quick=arguments.quick)
    for family, values in found.items():
        for grid in grids(family, values, arguments.against):
            swap_tables.show(grid, markdown=arguments.markdown)


if __name__ == "__main__":
    run_command(main)
