"""Vectors coded a second by orthogonal matching pursuit beside other tools, all at equal FVU.

    python -m experiments.benchmarks.omp --peers .peers/bin/python [--quick] [--rounds 5]

How to make the peers' environment stands in peers.py. Rows are planted: 64 atoms each, with weights
that fall off, and noise. Two lines a shape and peer: with the Gram matrix given, and with the time
to make it, which weighs more where a slow tool gets fewer rows (ours then gets as few). SPAMS takes
no Gram matrix; its first line is an estimate, see peers.py.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from activations.terminal import run_command
from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.omp import OMP
from experiments.benchmarks.common import paired, report
from experiments.benchmarks.peers import Peers

# (n, d, m, k): the quickstart's, and DB-KSVD's (arXiv 2505.18441).
SHAPES = ((4096, 640, 2560, 32), (4096, 2304, 4096, 20))
# Rows for each tool.
PEERS = {"spams_omp": 4096, "index_omp": 2048, "sklearn_omp": 512}


def device() -> str | None:
    """What `report` calls the device; None is the CPU."""
    first = jax.devices()[0]
    return None if first.platform == "cpu" else first.device_kind


def planted(n: int, d: int, m: int, *, seed: int, active: int = 64) -> tuple[jax.Array, jax.Array]:
    """Rows [n d] = weighted sums of `active` random atoms + 5 % noise; the unit atoms [m d]."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d), np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    indices = rng.integers(m, size=(n, active), dtype=np.int32)
    weights = rng.standard_normal((n, active), np.float32)
    weights /= np.sqrt(np.arange(1, active + 1, dtype=np.float32))
    noise = rng.standard_normal((n, d), np.float32)
    noise *= np.sqrt(0.05 * np.mean(np.sum(weights**2, axis=1)) / d)
    codes = SparseCodes(jnp.asarray(indices), jnp.asarray(weights), n_atoms=m)
    unit = jnp.asarray(atoms)
    return jax.jit(SparseCodes.decode)(codes, unit) + jnp.asarray(noise), unit


def fvu(x: np.ndarray, x_hat: np.ndarray) -> float:
    """sum ||x - x_hat||^2 / sum ||x - mean||^2."""
    deviation = x - x.mean(axis=0, dtype=np.float64)
    return float(np.square(x - x_hat, dtype=np.float64).sum() / np.square(deviation).sum())


def main() -> None:
    """Print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True, help="the Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 rounds, an eighth of the rows")
    arguments = parser.parse_args()
    rounds, share = (2, 8) if arguments.quick else (arguments.rounds, 1)
    with Peers(arguments.peers) as peers:
        for shape in SHAPES:
            for tool, most in PEERS.items():
                measure(peers, tool, (min(shape[0], most) // share, *shape[1:]), rounds)


def measure(peers: Peers, tool: str, shape: tuple[int, int, int, int], rounds: int) -> None:
    """Print the lines of one peer at one shape."""
    n, d, m, k = shape
    x, atoms = planted(n, d, m, seed=0)
    dictionary, encoder = Dictionary(atoms, jnp.zeros(d)), OMP(k=k)
    rows = {"x": np.asarray(x), "atoms": np.asarray(atoms)}
    reached, names = {}, set()
    coding: list[list[float]] = [[], []]

    def ours() -> float:
        started = time.perf_counter()
        prepared = jax.block_until_ready(encoder.prepare(dictionary))
        middle = time.perf_counter()
        codes = jax.block_until_ready(prepared.encode(x))
        ended = time.perf_counter()
        coding[0].append(n / (ended - middle))
        reached["fvu"] = round(fvu(rows["x"], np.asarray(dictionary.decode(codes))), 5)
        return n / (ended - started)

    def peer() -> float:
        told, given = peers.call(tool, rows, k=k)
        coding[1].append(n / (told["seconds"] - told["seconds_gram"]))
        reached["peer_fvu"] = round(fvu(rows["x"], given["x_hat"]), 5)
        names.add(told["name"])
        return n / told["seconds"]

    whole = paired(ours, peer, rounds)
    after_warm_up = list(zip(*coding, strict=True))[1:]
    for name, pairs in (("omp", after_warm_up), ("omp and its Gram matrix", whole)):
        report(
            name,
            pairs,
            shape=f"n={n}, d={d}, m={m}, k={k}, float32",
            unit="vectors/s",
            peer_name=min(names),
            device=device(),
            **reached,
        )


if __name__ == "__main__":
    run_command(main)
