"""Shuffled batches from a store larger than the memory allowed, as arrays on the JAX device.

    python -m experiments.benchmarks.read [--quick]

Two lines. MB/s beside a plain sequential read of the same files, both from the disk (the system's
copies are dropped first) and, for the stream, with a tenth of the store's size as memory. And steps
of a TopK SAE fed by the stream beside steps on one batch that lies ready: `ratio` is the share of
speed that is left. `peak_mib` is the peak resident memory of a process that only reads.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from activations.store import Store
from activations.terminal import run_command
from dictlearn.data import Rows
from dictlearn.solvers.base import Batch
from dictlearn.solvers.sae import SAE
from dictlearn.solvers.sae_variants import TopK
from experiments.benchmarks.common import HOOK, evict, noise_store, paired, plain_read, report

WIDTH, BATCH, ATOMS, K = 640, 2048, 5120, 32


def all_rows(path: Path, memory: int) -> Rows:
    """Every row of a store, under a budget of memory."""
    store = Store(path)
    return Rows(store, HOOK, np.unique(store.column("document")), memory)


def stream(path: Path, memory: int) -> float:
    """MB/s of one epoch of shuffled batches, each waited for on the device."""
    rows = all_rows(path, memory)
    evict(path)
    started = time.perf_counter()
    count = len(rows) // BATCH
    with contextlib.closing(rows.batches(BATCH, seed=0)) as batches:
        for x in itertools.islice(batches, count):
            jnp.asarray(x).block_until_ready()
    return count * BATCH * WIDTH * 4 / 1e6 / (time.perf_counter() - started)


def sequential(path: Path) -> float:
    """MB/s of the plain read."""
    evict(path)
    started = time.perf_counter()
    return plain_read(path) / 1e6 / (time.perf_counter() - started)


def main() -> None:
    """Print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a store of 256 MiB, 2 rounds")
    parser.add_argument("--only-read", nargs=2, help=argparse.SUPPRESS)  # the child process
    arguments = parser.parse_args()
    if arguments.only_read:
        path, memory = arguments.only_read
        speed = stream(Path(path), int(memory))
        # Of this process alone: what getrusage tells begins with its parent's.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert peak
        print(json.dumps([speed, int(peak[1]) / 2**10]))
        return
    mib, rounds, n_steps = (256, 2, 4) if arguments.quick else (2048, 5, 20)
    with tempfile.TemporaryDirectory() as folder:
        path, memory = Path(folder) / "store", mib * 2**20 // 10
        noise_store(path, mib=mib, width=WIDTH)
        shape = f"{mib} MiB of float32, d={WIDTH}, batches of {BATCH}, memory {memory >> 20} MiB"
        command = [sys.executable, "-m", "experiments.benchmarks.read", "--only-read"]
        child = subprocess.check_output([*command, path, str(memory)], text=True)
        report(
            "read",
            paired(lambda: stream(path, memory), lambda: sequential(path), rounds),
            shape=shape,
            unit="MB/s",
            peer_name="plain sequential read",
            peak_mib=round(json.loads(child)[1]),
        )
        steps(path, memory, rounds, n_steps)


def steps(path: Path, memory: int, rounds: int, n_steps: int) -> None:
    """Print the line of the SAE's steps."""
    solver = SAE(n_atoms=ATOMS, variant=TopK(K), learning_rate=1e-3)
    rows = all_rows(path, memory)
    key = jax.random.key(0)
    with contextlib.closing(rows.batches(BATCH, seed=0)) as batches:
        ready = Batch(jnp.asarray(next(batches)))
        sample = jnp.asarray(rows.sample(8192, seed=0))
        state = solver.init(sample, n_steps=10**6, key=key)

        def run(*, fed: bool) -> float:
            nonlocal state
            started = time.perf_counter()
            for _ in range(n_steps):
                batch = Batch(jnp.asarray(next(batches))) if fed else ready
                state, info = solver.step(state, batch, key=key)
                info.objective.block_until_ready()
            return n_steps / (time.perf_counter() - started)

        pairs = paired(lambda: run(fed=True), lambda: run(fed=False), rounds)
    report(
        "read beside a TopK SAE",
        [(100 * fed, 100 * ready) for fed, ready in pairs],
        shape=f"batches of {BATCH}, d={WIDTH}, m={ATOMS}, k={K}, memory {memory >> 20} MiB",
        unit="steps/100 s",
        peer_name="steps on one batch that lies ready",
    )


if __name__ == "__main__":
    run_command(main)
