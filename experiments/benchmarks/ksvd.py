"""K-SVD: time to a held-out FVU beside other tools, a step's phases beside the machine's limits.

    python -m experiments.benchmarks.ksvd --peers .peers/bin/python [--store PATH --hook NAME]
        [--batch 5000 20000] [--rounds 1] [--quick]
    python -m experiments.benchmarks.ksvd --block [--rounds 3] [--quick]

How to make the peers' environment stands in peers.py. Without `--store` the rows are planted.

`--peers`: all learn from the same rows and begin from the same atoms. Held-out rows are coded by
our OMP on anyone's atoms, outside the time. F is the FVU where the peer ends; `ours` and `peer` are
3600 over the seconds to the first checkpoint at F or below (0 where there is none), so that `ratio`
is the peer's time over ours. The curves are lists of (seconds, FVU), the last round's.

`--block`: a step at DB-KSVD's shape. For each phase `ours` is its GFLOP/s and `peer` what a machine
would reach that does nothing but these FLOPs and the traffic that no order of work avoids (each
array read or written once), at the speeds measured in the same round for a large matrix product and
for reading and writing a large array.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from activations.store import Store
from activations.terminal import run_command
from dictlearn.data import split_by_document, statistics
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.base import Batch
from dictlearn.solvers.ksvd import KSVD
from experiments.benchmarks.common import report
from experiments.benchmarks.omp import device, fvu, planted
from experiments.benchmarks.peers import Peers

T = TypeVar("T")
KEY = jax.random.key(0)

# Seconds so far and held-out FVU.
Curve = list[tuple[float, float]]


def main() -> None:
    """Print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="the Python of the peers' environment")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--hook", help="of the store; its first where not given")
    parser.add_argument("--batch", type=int, nargs="+", default=[5000, 20000])
    parser.add_argument("--passes", type=int, default=4, help="ours makes over the rows")
    parser.add_argument("--only", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--block", action="store_true", help="a step's phases instead")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="fewer rows, and --peers fewer atoms")
    arguments = parser.parse_args()
    if arguments.block:
        block(4096 if arguments.quick else 65536, arguments.rounds or 3)
    elif arguments.peers:
        beside_peers(arguments)
    else:
        parser.error("--peers or --block is missing")


# Beside the peers

# Name here -> name there and settings. The first is the one that counts. scikit-learn's alpha makes
# 20 to 40 nonzeros a row of the quickstart's.
TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "aksvd": ("index_fit", {"algorithm": "aksvd", "iterations": 3}),
    "sgk": ("index_fit", {"algorithm": "sgk", "iterations": 3}),
    "mod": ("index_fit", {"algorithm": "mod", "iterations": 3}),
    "minibatch": ("sklearn_fit", {"alpha": 1.0, "batch_size": 256, "limit": 120.0}),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Normalised training rows and held-out rows, and the atoms that all begin from."""

    name: str
    x: jax.Array
    held: np.ndarray
    start: np.ndarray
    solver: KSVD
    k: int

    def fvu(self, atoms: np.ndarray | jax.Array) -> float:
        """Of the held-out rows on these atoms."""
        dictionary = Dictionary(jnp.asarray(atoms, self.x.dtype), jnp.zeros(self.x.shape[1]))
        codes = OMP(k=self.k).prepare(dictionary).encode(jnp.asarray(self.held))
        return fvu(self.held, np.asarray(dictionary.decode(codes)))

    def ours(self, size: int, passes: int) -> Curve:
        """Our curve with batches of this size, a point a step."""
        starts = range(0, len(self.x) - size + 1, size)
        state = self.solver.init(self.x, n_steps=passes * len(starts), key=KEY)
        seconds, curve = 0.0, []
        for step in range(passes * len(starts)):
            batch = Batch(self.x[starts[step % len(starts)] :][:size])
            key = jax.random.fold_in(KEY, step)
            now, (state, _) = timed(lambda: self.solver.step(state, batch, key=key))  # noqa: B023
            seconds += now
            curve.append((seconds, self.fvu(self.solver.result(state)[0].atoms)))
        return curve

    def peer(self, peers: Peers, tool: str) -> tuple[str, Curve]:
        """A peer's name and its curve."""
        called, settings = TOOLS[tool]
        rows = {"x": np.asarray(self.x), "atoms": self.start}
        told, given = peers.call(called, rows, k=self.k, **settings)
        curve = [(s, self.fvu(a)) for s, a in zip(told["seconds"], given["atoms"], strict=True)]
        return told["name"], curve


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds until the result is there, and the result."""
    started = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - started, result


def beside_peers(arguments: argparse.Namespace) -> None:
    """Print a line a peer and batch size."""
    n, n_held, m, k = (3000, 1000, 512, 32) if arguments.quick else (20000, 4000, 2560, 32)
    name, x, held = rows(arguments.store, arguments.hook, n, n_held, m)
    solver = KSVD(m, OMP(k=k))
    start = np.asarray(solver.result(solver.init(x, n_steps=1, key=KEY))[0].atoms)
    problem = Problem(f"{name}, {x.shape}, m={m}, k={k}", x, held, start, solver, k)
    sizes = list(dict.fromkeys(min(size, n) for size in arguments.batch))
    with Peers(arguments.peers) as peers:
        for tool in arguments.only:
            measure(problem, peers, tool, sizes, arguments)


def measure(
    problem: Problem, peers: Peers, tool: str, sizes: list[int], arguments: argparse.Namespace
) -> None:
    """Print a line a batch size beside one peer."""
    # What is compiled or loaded before the time runs: our shapes, and the peer's in float64.
    for size in sizes:
        dataclasses.replace(problem, x=problem.x[: max(size, problem.solver.n_atoms)]).ours(size, 1)
    small = dataclasses.replace(problem, x=problem.x[:256], start=problem.start[:64])
    small.peer(peers, tool)

    name, theirs, mine = "", [], []
    for round_ in range(arguments.rounds or 1):
        for turn in range(2):
            if turn == round_ % 2:
                name, curve = problem.peer(peers, tool)
                theirs.append(curve)
            else:
                mine.append({size: problem.ours(size, arguments.passes) for size in sizes})
    for size in sizes:
        pairs = [
            (3600 / reached(curves[size], curve[-1][1]), 3600 / reached(curve, curve[-1][1]))
            for curves, curve in zip(mine, theirs, strict=True)
        ]
        report(
            "ksvd",
            pairs,
            shape=f"{problem.name}, batches of {size}",
            unit="1/h",
            peer_name=f"{name} to held-out FVU {theirs[-1][-1][1]:.4f}",
            device=device(),
            ours_curve=rounded(mine[-1][size]),
            peer_curve=rounded(theirs[-1]),
        )


def reached(curve: Curve, goal: float) -> float:
    """Seconds to the first point at the goal or below."""
    return next((seconds for seconds, value in curve if value <= goal), math.inf)


def rounded(curve: Curve) -> Curve:
    """As it is printed."""
    return [(round(seconds, 2), round(value, 5)) for seconds, value in curve]


def rows(
    path: Path | None, hook: str | None, n: int, n_held: int, m: int
) -> tuple[str, jax.Array, np.ndarray]:
    """A name, and normalised training and held-out rows."""
    if path is None:
        x, _ = planted(n + n_held, 640, m, seed=0, active=16)
        x /= jnp.sqrt(jnp.mean(x**2))
        return "planted", x[:n], np.asarray(x[n:])
    store = Store(path)
    hook = hook or next(iter(store.manifest.hooks))
    parts = split_by_document(store, hook, validation=0.1, test=0.1, seed=0)
    _, normaliser, _ = statistics(parts["train"])
    x = np.random.default_rng(0).permutation(parts["train"].sample(n, seed=0))
    held = normaliser.normalise(jnp.asarray(parts["test"].sample(n_held, seed=0)))
    return f"{path.name} {hook}", normaliser.normalise(jnp.asarray(x)), np.asarray(held)


# The phases of a step


def block(n: int, rounds: int) -> None:
    """Print a line a phase."""
    d, m, k = 2304, 4096, 20
    x, _ = planted(n, d, m, seed=0)
    solver = KSVD(m, OMP(k=k))
    state = solver.init(x, n_steps=1, key=KEY)
    dictionary, encoder = solver.result(state)
    phases = work(n, d, m, k)
    pairs: dict[str, list[tuple[float, float]]] = {phase: [] for phase in phases}
    details: dict[str, dict[str, float]] = {}
    for round_ in range(rounds + 1):
        flops_speed, bytes_speed = machine()
        preparing, prepared = timed(lambda: encoder.prepare(dictionary))
        coding, _ = timed(lambda: prepared.encode(x))  # noqa: B023
        step, _ = timed(lambda: solver.step(state, Batch(x), key=KEY))
        seconds = {"preparing": preparing, "coding": coding, "step": step}
        seconds["update"] = step - preparing - coding
        if not round_:
            continue  # compiles
        for phase, (flops, size) in phases.items():
            least = max(flops / flops_speed, size / bytes_speed)
            pairs[phase].append((flops / seconds[phase] / 1e9, flops / least / 1e9))
            details[phase] = {
                "seconds": round(seconds[phase], 3),
                "seconds_least": round(least, 3),
                "gflop": round(flops / 1e9, 1),
                "gbyte": round(size / 1e9, 3),
                "machine_gflops": round(flops_speed / 1e9, 1),
                "machine_gbytes": round(bytes_speed / 1e9, 1),
            }
    for phase, measured in pairs.items():
        report(
            f"ksvd block: {phase}",
            measured,
            shape=f"n={n}, d={d}, m={m}, k={k}, float32",
            unit="GFLOP/s",
            peer_name="roofline",
            device=device(),
            **details[phase],  # of the last round
        )


def work(n: int, d: int, m: int, k: int) -> dict[str, tuple[float, float]]:
    """FLOPs and least bytes of each phase, in float32."""
    phases = {
        "preparing": (2 * m * m * d, 4 * (m * d + m * m)),
        # Correlations with the rows once; in round t, t + 1 vectors of m are weighed and added,
        # and the largest is looked for.
        "coding": (n * (2 * d * m + m * k * (k + 2)), 4 * (n * d + m * d + m * m + 2 * n * k)),
        # For each nonzero, of 2 d each: taking it off x, E^T z, E d, and the residual's old and
        # new part.
        "update": (10 * n * k * d, 4 * (2 * n * d + 2 * m * d + 2 * n * k)),
    }
    # As one: the codes, the Gram matrix and the atoms stay where they are, x is read again.
    phases["step"] = (
        sum(flops for flops, _ in phases.values()),
        4 * (3 * n * d + 2 * m * d),
    )
    return {phase: (float(flops), float(size)) for phase, (flops, size) in phases.items()}


def machine() -> tuple[float, float]:
    """FLOP/s of large float32 products, and bytes/s of reading and writing a large array."""
    product = jax.jit(jnp.matmul)
    add = jax.jit(lambda v: v + 1, donate_argnums=0)  # in place: new pages are slow to come by
    vector, multiply, move = jnp.zeros(2**27), [], []
    for repeat in range(6):
        for side in (2048, 4096):
            matrix = jnp.ones((side, side))
            seconds, _ = timed(lambda: product(matrix, matrix))  # noqa: B023
            multiply += [2 * side**3 / seconds] * (repeat > 0)  # the first time compiles
        seconds, vector = timed(lambda: add(vector))  # noqa: B023
        move += [2 * vector.nbytes / seconds] * (repeat > 0)
    return max(multiply), max(move)


if __name__ == "__main__":
    run_command(main)
