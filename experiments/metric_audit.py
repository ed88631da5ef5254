"""Do metrics rank dictionaries of known quality right?

    python -m experiments.metric_audit experiments/metric-audit.toml --out FILE

Planted features (evals.planted) are the truth. Dictionaries are made from their true atoms, worse
and worse by levels:

- noise: a random direction of that norm is added to each atom;
- shuffled: that share of the atoms is replaced by random directions;
- merged: of that share, in pairs (a, b), a becomes a + b, and b a random direction;
- split: of that share, in pairs, a and b become a + c and a - c with a random c of norm 1/2, so
  that a has two atoms, and b none;
- absorbed: each child's atom gets that much of its parent's.

Beside them stand the true atoms, random ones, and untrained rows. Quality is the mean |cos| of each
true atom with its match. The Spearman correlation of a metric with it, signed so that 1 is a
perfect ranking, is taken over all dictionaries of a seed and encoder, and over the levels of each
kind. A dictionary's line goes to FILE; what has its line already is not done again.

Concepts of the probes are features: of sparse probing, sae-probes and TPP, five features of which
one fires in the row; of SCR, two that fire independently; of absorption, parents with children.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.sparse
from pydantic import Field
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from activations.config import read_toml, validate
from activations.terminal import progress, run_command
from dictlearn import metrics
from dictlearn.dictionary import Coder
from dictlearn.encoders.linear import Tied
from dictlearn.encoders.omp import OMP
from evals import absorption_scores, planted, recovery, sae_probes, scr, sparse_probing, tpp
from evals.ablation import Bench
from evals.absorption_scores import Half
from evals.coding import coded
from evals.one_vs_rest import Probe
from evals.planted import PlantedConfig, Sample, Truth, unit
from evals.pooled import Pooled
from evals.sparse_probing import Rowed
from experiments import lines
from experiments.lines import Line

# Each metric, and whether more of it is said to be better.
METRICS = {
    "fvu": -1, "cossim": 1, "l1": -1, "frac_alive": 1, "max_decoder_cosine": -1,
    "loss_increase": -1, "probing_full": 1, "probing_top_1": 1, "probing_top_2": 1,
    "probing_top_5": 1, "sae_probes_top_1": 1, "sae_probes_top_5": 1, "tpp_1": 1, "tpp_5": 1,
    "scr_1": 1, "scr_5": 1, "absorption_fraction": -1, "full_absorption": -1,
    "split_features": -1,
}  # fmt: skip
N_CLASSES, N_TRAIN, N_TEST = 5, 160, 60
_TAG = 0x41554449


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """What is planted, what is done to it, and by which encoders it is read.

    Attributes:
      rows, fit_rows: that are measured; that untrained atoms are drawn from.
      levels: of each kind, ascending.
    """

    __pydantic_config__ = {"extra": "forbid"}

    planted: PlantedConfig
    encoders: tuple[Annotated[OMP | Tied, Field(discriminator="name")], ...]
    levels: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    rows: Annotated[int, Field(ge=2000)]
    fit_rows: Annotated[int, Field(ge=1000)]


def spoil(truth: Truth, kind: str, level: float, rng: np.random.Generator) -> np.ndarray:
    """The true atoms, made worse; unit norm [F d]."""
    atoms = truth.directions.astype(np.float64)
    n = len(atoms)
    other = unit(rng.standard_normal(atoms.shape))
    pairs = rng.permutation(n)[: 2 * (round(level * n) // 2)].reshape(2, -1)
    match kind:
        case "noise":
            atoms = atoms + level * other
        case "shuffled":
            hit = rng.permutation(n)[: round(level * n)]
            atoms[hit] = other[hit]
        case "merged":
            atoms[pairs[0]] += atoms[pairs[1]]
            atoms[pairs[1]] = other[pairs[1]]
        case "split":
            atoms[pairs[1]] = atoms[pairs[0]] - other[pairs[0]] / 2
            atoms[pairs[0]] += other[pairs[0]] / 2
        case "absorbed":
            child = np.flatnonzero(truth.parent >= 0)
            atoms[child] += level * atoms[truth.parent[child]]
        case _:
            raise ValueError(f"levels: unknown kind {kind!r}")
    return unit(atoms).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Concepts:
    """Rows with labels: indices into a sample.

    Attributes:
      classes: rows in which one of five features fires, and none of the others.
      corners: rows by whether two features fire, as evals.scr has them.
      parents: features with children.
    """

    classes: list[np.ndarray]
    corners: dict[str, np.ndarray]
    parents: np.ndarray


def concepts(truth: Truth, sample: Sample, rng: np.random.Generator) -> Concepts:
    """Features that fire often enough, without children or parents."""
    fires = sample.codes.toarray() != 0
    plain = (truth.parent < 0) & ~np.isin(np.arange(len(truth.rate)), truth.parent)
    size = N_TRAIN + N_TEST
    often = np.flatnonzero(plain & (fires.sum(axis=0) >= 2 * size))
    chosen = rng.choice(often, N_CLASSES, replace=False)
    alone = fires[:, chosen] & (fires[:, chosen].sum(axis=1) == 1)[:, None]
    classes = [rng.permutation(np.flatnonzero(alone[:, c]))[:size] for c in range(N_CLASSES)]
    a, b = fires[:, often[:2]].T  # the most common
    corners = {
        s + t: rng.permutation(np.flatnonzero((a == (s == "+")) & (b == (t == "+"))))
        for s in "+-" for t in "+-"
    }  # fmt: skip
    least = min(len(of) // scr.copies(key) for key, of in corners.items())
    corners = {key: of[: least * scr.copies(key)] for key, of in corners.items()}
    children = np.bincount(truth.parent[truth.parent >= 0], minlength=len(truth.rate))
    return Concepts(classes, corners, np.argsort(-children, kind="stable")[:4])


def measure(
    coder: Coder, truth: Truth, sample: Sample, about: Concepts, seed: int
) -> dict[str, float | None]:
    """Every metric of a dictionary."""
    codes, x_hat = coded(coder, sample.x)
    atoms = np.asarray(coder.atoms, np.float64)
    before, after = (planted.loss(truth, x, sample.label)[0] for x in (sample.x, x_hat))
    cosines = np.abs(unit(atoms) @ unit(atoms).T) - np.eye(len(atoms))
    found: dict[str, float | None] = {
        "fvu": metrics.fvu(sample.x, x_hat),
        "cossim": float(metrics.cosine(sample.x, x_hat).mean()),
        "l1": float(abs(codes).sum() / len(sample.x)),
        "frac_alive": len(np.unique(codes.indices)) / len(atoms),
        "max_decoder_cosine": float(cosines.max(axis=1).mean()),
        "loss_increase": float((after - before).mean()),
    }
    pooled = Pooled(sample.x, codes, np.ones(len(sample.x), int))
    own = Rowed("planted", list("abcde"), about.classes, N_TRAIN, pooled)
    probing = sparse_probing.measure(own, sparse_probing.Config("planted"), seed)
    found["probing_full"] = float(np.mean(probing["sae_test_accuracy"]))
    for k in (1, 2, 5):
        found[f"probing_top_{k}"] = float(np.mean(probing[f"sae_top_{k}_test_accuracy"]))
    rng = np.random.default_rng(seed)
    one, *rest = about.classes
    others = rng.permutation(np.concatenate(rest))[: len(one)]
    index = rng.permutation(np.concatenate([one, others]))
    train, test = index[: 2 * N_TRAIN], index[2 * N_TRAIN :]
    y = np.isin(np.arange(len(sample.x)), one)
    last = sae_probes.probe(pooled, y, train, test, (1, 5), seed)
    found |= {f"sae_probes_top_{k}": last[f"sae_top_{k}_test_auc"] for k in (1, 5)}
    numbers = [1, 5]
    bench = Bench(pooled, atoms, tpp.Config("planted"))
    told = tpp.perturb(bench, about.classes, N_TRAIN, numbers, seed)
    found |= {f"tpp_{n}": told[f"tpp_threshold_{n}_total_metric"] for n in numbers}
    bench = Bench(pooled, atoms, scr.Config("planted"))
    n_train = len(about.corners["+-"]) * 3 // 4
    told = scr.remove(bench, about.corners, n_train, numbers, seed)
    found |= {f"scr_{n}": told[f"scr_metric_threshold_{n}"] for n in numbers}
    return found | _absorption(codes, atoms, truth, sample, about.parents, seed)


def _absorption(
    codes: scipy.sparse.csr_array, atoms: np.ndarray, truth: Truth, sample: Sample,
    parents: np.ndarray, seed: int,
) -> dict[str, float | None]:  # fmt: skip
    """Of the parents, by their true directions as probes."""
    y = sample.codes[:, parents].toarray() != 0
    half = len(y) // 2
    halves = [Half(sample.x[of], codes[of], y[of]) for of in (slice(half), slice(half, None))]
    cfg = absorption_scores.Config(
        "planted", seed=seed, min_probe_f1=0.0, k_sparse_probe_num_epochs=10
    )
    probe = Probe(truth.directions[parents].astype(np.float64), np.full(len(parents), -0.4))
    names, none = [str(parent) for parent in parents], np.zeros(atoms.shape[1])
    scores = absorption_scores.score(halves[0], halves[1], atoms, none, probe, names, cfg)
    counted = [one for one in scores if one.reason is None]
    if not counted:
        return dict.fromkeys(("absorption_fraction", "full_absorption", "split_features"))
    return {
        "absorption_fraction": float(np.mean([one.fraction[""].mean() for one in counted])),
        "full_absorption": float(np.mean([one.full[""].mean() for one in counted])),
        "split_features": float(np.mean([len(one.main[""]) for one in counted])),
    }


def run(config: AuditConfig, file: Path) -> list[Line]:
    """Measure what has no line yet; the line of every dictionary."""
    kinds = [("true", 0.0), ("random", 0.0), ("data rows", 0.0)]
    kinds += [(kind, level) for kind, levels in config.levels.items() for level in levels]
    found = []
    jobs = [(s, e, *k) for s in config.seeds for e in range(len(config.encoders)) for k in kinds]
    seen: tuple[int, Truth, Sample, Concepts] | None = None
    for seed, e, kind, level in progress(iterable=jobs, desc="audit", unit="dictionary"):
        wanted = {
            "seed": seed, "encoder": repr(config.encoders[e]), "kind": kind, "level": level,
            "planted": dataclasses.asdict(config.planted), "rows": config.rows,
        }  # fmt: skip
        line = lines.find(wanted, file)
        if line is None:
            if seen is None or seen[0] != seed:
                truth = planted.plant(dataclasses.replace(config.planted, seed=seed))
                sample = planted.rows(truth, config.rows, first=config.fit_rows)
                about = concepts(truth, sample, np.random.default_rng([_TAG, seed]))
                seen = seed, truth, sample, about
            _, truth, sample, about = seen
            rng = np.random.default_rng([_TAG, seed, 1])
            if kind == "data rows":
                x = planted.rows(truth, config.fit_rows).x
                atoms = unit(x[rng.permutation(len(x))[: len(truth.directions)]])
            else:
                spoiled = "shuffled" if kind == "random" else "noise" if kind == "true" else kind
                atoms = spoil(truth, spoiled, 1.0 if kind == "random" else level, rng)
            coder = recovery.plain_coder(atoms, config.encoders[e])
            _, cosine = recovery.match(atoms, truth.directions)
            own = measure(coder, truth, sample, about, seed)
            line = lines.add(wanted | {"quality": float(np.abs(cosine).mean())} | own, file)
        found.append(line)
    return found


def ranks(found: list[Line], metric: str, kind: str | None) -> list[float]:
    """The correlation with the quality in each seed and encoder; of one kind, with its levels."""
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in found:
        if kind in (None, line["kind"]) or (kind and line["kind"] == "true"):
            groups.setdefault((line["seed"], line["encoder"]), []).append(line)
    values = []
    for group in groups.values():
        pairs = [
            (METRICS[metric] * line[metric], line["quality"] if kind is None else -line["level"])
            for line in group
            if line[metric] is not None
        ]
        if len(pairs) > 2:
            a, b = np.array(pairs).T
            # A metric that says the same of all ranks none.
            told: Any = spearmanr(a, b) if np.ptp(a) > 0 else None
            values.append(float(told.statistic) if told else 0.0)
    return values


def show(found: list[Line], config: AuditConfig) -> None:
    """A row a metric: mean and worst correlation over seeds, for each encoder; then by kind."""
    console = Console(highlight=False, width=150)
    for encoder in config.encoders:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=encoder.name)
        for title in ("metric", "all", "worst seed", *config.levels):
            table.add_column(title, no_wrap=True)
        own = [line for line in found if line["encoder"] == repr(encoder)]
        for metric in METRICS:
            over = ranks(own, metric, None)
            kinds = [np.mean(ranks(own, metric, kind)) for kind in config.levels]
            table.add_row(
                metric, f"{np.mean(over):+.2f}", f"{min(over):+.2f}", *(f"{k:+.2f}" for k in kinds)
            )
        console.print(table)
    n = sum(line["seed"] == config.seeds[0] for line in found) // len(config.encoders)
    console.print(f"{n} dictionaries, {len(config.seeds)} seeds")


def main() -> None:
    """Entry of `python -m experiments.metric_audit`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.metric_audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    table = read_toml(arguments.config, arguments.set)
    config = validate(AuditConfig, table, str(arguments.config))
    show(run(config, arguments.out), config)


if __name__ == "__main__":
    run_command(main)
