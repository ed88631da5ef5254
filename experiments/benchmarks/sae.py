"""TopK autoencoder: tokens of training a second beside PyTorch, at equal FVU.

    python -m experiments.benchmarks.sae --peers .peers/bin/python [--rounds 5] [--quick]
        [--only dense gathered ...] [--peak-tflops 495]

How to make the peers' environment stands in peers.py; without `--peers` PyTorch is taken from this
one. Rows are planted. Both begin from the same parameters, see the same rows, and follow the same
schedule; a round is 10 steps after one that is not counted. The FVU of each step must be the same,
but for rounding; the line has the last one, and the pair of each round: PyTorch's threads wait for
each other after every operation, so that cores that others use too cost it several times as much.

PyTorch's step is ours in peers.py: with dense codes, as most write it, and with a decoder that
gathers the k atoms of each row; each as it is and by torch.compile, which needs a C++ compiler (a
GPU: Triton).

On a GPU a larger shape joins. With `--peak-tflops` the lines have the fraction of this peak that a
dense step of 12 d m FLOPs a token would take (two products forward, four backward), which is not
what a sparse one does.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from activations.terminal import run_command
from dictlearn.encoders.linear import Linear
from dictlearn.solvers.base import Batch
from dictlearn.solvers.sae import SAE
from dictlearn.solvers.sae_variants import TopK
from experiments.benchmarks.common import paired, report
from experiments.benchmarks.omp import device, planted
from experiments.benchmarks.peers import Peers

KEY = jax.random.key(0)
# (batch, d, m, k)
Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((2048, 640, 5120, 32), (1024, 640, 2048, 32))
GPU_SHAPES: tuple[Shape, ...] = (*SHAPES, (8192, 2304, 16384, 64))
BATCHES = 4  # that differ
TOOLS = {
    "dense": {"gathered": False, "compiled": False},
    "gathered": {"gathered": True, "compiled": False},
    "dense_compiled": {"gathered": False, "compiled": True},
    "gathered_compiled": {"gathered": True, "compiled": True},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Seconds of all steps but the first, and each step's FVU, before its update."""

    name: str
    seconds: float
    fvu: list[float]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows in batches, and what learns from them in so many steps."""

    batches: list[jax.Array]
    solver: SAE
    n_steps: int

    @classmethod
    def of(cls, shape: Shape, n_steps: int) -> Problem:
        """Planted rows of mean square 1; no atom is ever dead, as the peer has no AuxK."""
        n, d, m, k = shape
        x, _ = planted(BATCHES * n, d, m, seed=0)
        batches = list(jnp.split(x / jnp.sqrt(jnp.mean(x**2)), BATCHES))
        return cls(batches, SAE(m, TopK(k=k), dead_after=2**30 - 1), n_steps)

    def ours(self) -> Run:
        """Our steps."""
        state = self.solver.init(jnp.concatenate(self.batches), n_steps=self.n_steps, key=KEY)
        infos, started = [], 0.0
        for at in range(self.n_steps):
            batch = Batch(self.batches[at % BATCHES])
            state, info = self.solver.step(state, batch, key=jax.random.fold_in(KEY, at))
            infos.append(info.fvu)
            if at == 0:
                jax.block_until_ready((state, infos))
                started = time.perf_counter()
        jax.block_until_ready((state, infos))
        return Run("ours", time.perf_counter() - started, [float(value) for value in infos])

    def peer(self, peers: Peers, tool: str) -> Run:
        """The peer's steps, from the parameters that ours begin from."""
        x = jnp.concatenate(self.batches)
        state = self.solver.init(x, n_steps=self.n_steps, key=KEY)
        dictionary, encoder = self.solver.result(state)
        assert isinstance(encoder, Linear)
        given = {
            "x": x,
            "atoms": dictionary.atoms,
            "centre": dictionary.bias,
            "weight": encoder.weight,
            "bias": encoder.bias,
            "rates": self.rates(),
        }
        told, _ = peers.call(
            "torch_sae",
            {name: np.asarray(array) for name, array in given.items()},
            k=self.solver.variant.k,
            batch=len(self.batches[0]),
            **TOOLS[tool],
        )
        return Run(told["name"], told["seconds"], told["fvu"])

    def rates(self) -> np.ndarray:
        """The solver's schedule: linear warm-up, then a cosine towards 0."""
        warm, step = self.solver.warmup * self.n_steps, np.arange(1, self.n_steps + 1)
        done = np.clip((step - 1 - warm) / (self.n_steps - warm), 0, 1)
        rise, fall = step / max(warm, 1), (1 + np.cos(np.pi * done)) / 2
        return self.solver.learning_rate * np.minimum(rise, fall)


def main() -> None:
    """Print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default=sys.executable, help="the Python of an environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--peak-tflops", type=float, help="of the device")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 3 steps")
    arguments = parser.parse_args()
    rounds, steps = (2, 3) if arguments.quick else (arguments.rounds, 10)
    with Peers(arguments.peers) as peers:
        for shape in GPU_SHAPES if device() else SHAPES:
            problem = Problem.of(shape, steps + 1)
            for tool in arguments.only:
                measure(problem, peers, tool, rounds, arguments.peak_tflops)


def measure(
    problem: Problem, peers: Peers, tool: str, rounds: int, peak_tflops: float | None
) -> None:
    """Print the line of one peer at one shape."""
    n, d = problem.batches[0].shape
    m, k = problem.solver.n_atoms, problem.solver.variant.k
    runs: dict[str, Run] = {}

    def tokens(run: Run) -> float:
        return (problem.n_steps - 1) * n / run.seconds

    def ours() -> float:
        runs["ours"] = problem.ours()
        return tokens(runs["ours"])

    def peer() -> float:
        runs["peer"] = problem.peer(peers, tool)
        return tokens(runs["peer"])

    pairs = paired(ours, peer, rounds)
    mine, theirs = runs["ours"].fvu, runs["peer"].fvu
    # On a GPU products are rounded to TF32.
    if not np.allclose(mine, theirs, rtol=1e-2 if device() else 1e-3):
        raise SystemExit(f"{runs['peer'].name} did not learn the same: FVU {theirs}, ours {mine}")
    more: dict[str, float] = {}
    if peak_tflops:
        share = 12 * d * m / (peak_tflops * 1e12)
        ours_median, peer_median = np.median(pairs, axis=0)
        more = {
            "of_peak": round(share * ours_median, 4),
            "peer_of_peak": round(share * peer_median, 4),
        }
    report(
        "sae",
        pairs,
        shape=f"batch={n}, d={d}, m={m}, k={k}, float32",
        unit="tokens/s",
        peer_name=runs["peer"].name,
        device=device(),
        first_fvu=round(mine[0], 5),
        fvu=round(mine[-1], 5),
        peer_fvu=round(theirs[-1], 5),
        rounds=[[round(value) for value in pair] for pair in pairs],
        **more,
    )


if __name__ == "__main__":
    run_command(main)
