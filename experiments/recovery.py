"""What K-SVD recovers of a random dictionary:  python -m experiments.recovery --out FILE.

The synthetic experiment of Aharon, Elad and Bruckstein, "K-SVD" (IEEE TSP 54, 2006), section V.A:
50 random unit atoms in 20 dimensions; 1500 signals, each of 3 of them at random with i.i.d.
coefficients, and white noise; 80 iterations from signals as atoms, with OMP of 3 atoms; 50 trials.
An atom d counts as recovered when 1 - |<d, d'>| < 0.01 for a learned atom d'.

The paper's coefficients are uniform; those of its authors' toolbox are Gaussian (--coefficients).
In a trial all systems have the same signals and the same start. A line a trial, noise and system
goes to FILE; what has its line already is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from activations.terminal import UserError, run_command
from dictlearn import artifact
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.base import Batch
from dictlearn.solvers.ksvd import KSVD
from experiments import lines
from experiments.lines import Line

M, D, N, K, STEPS = 50, 20, 1500, 3, 80
CLOSE = 0.01  # 1 - |cos| below which an atom counts as recovered

# Settings of our KSVD, by the name of the system; a batch is all signals where none is given.
OURS: dict[str, dict[str, Any]] = {
    "ksvd": {},
    "ksvd, twins stay": {"twins": 1.0},
    "ksvd, chunks of 1": {"chunk_size": 1},
    "ksvd, batches of 250": {"batch_size": 250},
    "ksvd, batches of 250, twins 0.99": {"batch_size": 250, "twins": 0.99},
    "ksvd, batches of 250, no memory": {"batch_size": 250, "memory": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is planted, and where all systems begin.

    Attributes:
      atoms: the truth [m d], unit norm.
      x: signals [n d].
      start: distinct signals at unit norm [m d].
    """

    atoms: np.ndarray
    x: np.ndarray
    start: np.ndarray


def plant(trial: int, snr: float, coefficients: str) -> Trial:
    """The atoms, codes, start and direction of the noise depend on `trial` alone; snr is in dB."""
    rng = np.random.default_rng([2006, trial])
    atoms = rng.standard_normal((M, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((N, M))
    support = np.argsort(rng.random((N, M)), axis=1)[:, :K]
    if coefficients == "gaussian":
        values = rng.standard_normal((N, K))
    else:
        values = rng.uniform(-1, 1, (N, K))
    np.put_along_axis(codes, support, values, axis=1)
    x = codes @ atoms
    noise = rng.standard_normal(x.shape)
    x += noise * math.sqrt((x**2).mean() / (noise**2).mean() * 10 ** (-snr / 10))
    start = x[rng.permutation(N)[:M]]
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    return Trial(*(array.astype(np.float32) for array in (atoms, x, start)))


def recovered(atoms: np.ndarray, learned: np.ndarray) -> int:
    """How many atoms have a learned one close by."""
    return int((1 - np.abs(atoms @ learned.T).max(axis=1) < CLOSE).sum())


def ours(trial: Trial, start: np.ndarray, seed: int, settings: dict[str, Any]) -> np.ndarray:
    """Atoms that our KSVD learns; in batches, it sees each signal as often."""
    settings = dict(settings)
    size = settings.pop("batch_size", N)
    solver, key = KSVD(M, OMP(k=K), **settings), jax.random.key(seed)
    rng = np.random.default_rng([seed, size])
    begun = Dictionary(jnp.asarray(start), jnp.zeros(D))
    state = solver.init(jnp.asarray(trial.x), n_steps=STEPS * N // size, key=key, start=begun)
    for epoch in range(STEPS):
        for part, rows in enumerate(np.split(rng.permutation(N), N // size)):
            turn = jax.random.fold_in(key, epoch * (N // size) + part)
            state, _ = solver.step(state, Batch(jnp.asarray(trial.x[rows])), key=turn)
    return np.asarray(state.atoms)


def textbook(trial: Trial, *, clean: bool) -> np.ndarray:
    """Atoms that K-SVD learns as in its paper: a whole SVD an atom, one atom after another.

    Cleaning is that of the authors' toolbox: after each iteration an atom that at most 3 signals
    use, or with |cos| > 0.99 to another, becomes the worst represented signal.
    """
    d, x = trial.start.copy(), trial.x
    for _ in range(STEPS):
        dictionary = Dictionary(jnp.asarray(d), jnp.zeros(D))
        z = np.array(OMP(k=K).prepare(dictionary).encode(jnp.asarray(x)).dense())
        left = x - z @ d
        for j in range(M):
            rows = np.flatnonzero(z[:, j])
            if len(rows):
                error = left[rows] + np.outer(z[rows, j], d[j])
                u, s, v = np.linalg.svd(error, full_matrices=False)
                d[j], z[rows, j] = v[0], u[:, 0] * s[0]
                left[rows] = error - np.outer(z[rows, j], d[j])
        if clean:
            _clean(d, z, x, (left**2).sum(axis=1))
    return d


def _clean(d: np.ndarray, z: np.ndarray, x: np.ndarray, error: np.ndarray) -> None:
    """Replace rare atoms and twins in place, in turn."""
    for j in range(M):
        cosine = np.abs(d @ d[j])
        cosine[j] = 0
        if cosine.max() > 0.99 or np.count_nonzero(np.abs(z[:, j]) > 1e-7) <= 3:
            worst = error.argmax()
            error[worst] = 0
            d[j] = x[worst] / np.linalg.norm(x[worst])


def _settings(system: str) -> dict[str, Any] | None:
    """Of one of ours, defaults written out."""
    if system not in OURS:
        return None
    settings = dict(OURS[system])
    size = {"batch_size": settings.pop("batch_size", N)}
    return size | artifact.hyperparameters(KSVD(M, OMP(k=K), **settings))


System = Callable[[Trial, int], np.ndarray]


def _ours(settings: dict[str, Any]) -> System:
    return lambda trial, seed: ours(trial, trial.start, seed, settings)


SYSTEMS: dict[str, System] = {name: _ours(settings) for name, settings in OURS.items()} | {
    "textbook": lambda trial, seed: textbook(trial, clean=False),
    "textbook, cleaned": lambda trial, seed: textbook(trial, clean=True),
    # What noise and OMP leave to be found: our KSVD from the true atoms.
    "from the truth": lambda trial, seed: ours(trial, trial.atoms, seed, {"chunk_size": 1}),
}

DEFAULT = ["ksvd", "ksvd, batches of 250", "textbook", "textbook, cleaned"]


def run(
    systems: list[str], snrs: list[float], trials: int, coefficients: str, file: Path | None
) -> list[Line]:
    """Do what is not done yet; the line of every trial, noise and system."""
    found = []
    for number in range(trials):
        for snr in snrs:
            trial = plant(number, snr, coefficients)
            for system in systems:
                identity = {
                    "system": system,
                    "snr": None if math.isinf(snr) else snr,
                    "trial": number,
                    "coefficients": coefficients,
                    "settings": _settings(system),
                }
                line = lines.find(identity, file)
                if line is None:
                    began = time.perf_counter()
                    count = recovered(trial.atoms, SYSTEMS[system](trial, number))
                    seconds = round(time.perf_counter() - began, 3)
                    told = identity | {"recovered": count, "seconds": seconds}
                    line = lines.add(told, file)
                found.append(line)
    return found


def show(found: list[Line]) -> None:
    """Recovered atoms of 50 over the trials."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("system", "snr", "trials", "mean", "s.e.", "percent", "quantiles", "seconds"):
        table.add_column(title, no_wrap=True, justify="left" if title == "system" else "right")
    for system, snr in dict.fromkeys((line["system"], line["snr"]) for line in found):
        own = [line for line in found if (line["system"], line["snr"]) == (system, snr)]
        count = np.array([line["recovered"] for line in own])
        error = count.std(ddof=1) / math.sqrt(len(count)) if len(count) > 1 else math.nan
        quantiles = np.quantile(count, [0, 0.25, 0.5, 0.75, 1])
        table.add_row(
            system, "none" if snr is None else f"{snr:g}", str(len(own)), f"{count.mean():.2f}",
            f"{error:.2f}", f"{100 * count.mean() / M:.1f}", " ".join(f"{q:g}" for q in quantiles),
            f"{np.median([line['seconds'] for line in own]):.2f}",
        )  # fmt: skip
    Console(highlight=False, width=120).print(table)


def main() -> None:
    """Entry of `python -m experiments.recovery`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.recovery", description=__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--snr", type=float, nargs="+", default=[10.0, 20.0, 30.0, math.inf])
    parser.add_argument("--coefficients", choices=["uniform", "gaussian"], default="uniform")
    parser.add_argument("--systems", nargs="+", default=DEFAULT, help=", ".join(SYSTEMS))
    parser.add_argument("--out", type=Path, help="a file of JSON lines, added to")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.systems if name not in SYSTEMS]:
        raise UserError(f"--systems: no {unknown[0]!r} among {', '.join(SYSTEMS)}")
    if arguments.trials < 1:
        raise UserError(f"--trials: expected at least 1, got {arguments.trials}")
    show(
        run(
            arguments.systems, arguments.snr, arguments.trials, arguments.coefficients,
            arguments.out,
        )
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
