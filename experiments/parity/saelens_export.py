"""Dictionaries of ours as SAELens directories, coded by SAELens itself.

    python -m venv .saelens
    .saelens/bin/pip install -r experiments/parity/requirements-saelens.txt
    python -m experiments.parity.saelens_export --peer .saelens/bin/python [RUN ...]

Writes dictionaries with random weights for every encoder that can be exported, and the runs named
(with rows of their stores); saelens_export_peer.py, run there, loads each by SAE.load_from_disk and
codes its rows. A JSON line a dictionary says in how many `rows` of how many it uses another atom (a
step, or a choice, between numbers that are equal in float32), and how far codes and reconstructions
of the others are from ours, as the greatest difference over our greatest value.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from activations.terminal import UserError, run_command
from dictlearn import load
from dictlearn.artifact import Run, hyperparameters
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders import activations
from dictlearn.encoders.linear import Linear, Tied
from dictlearn.encoders.mp_sae import MPSAE
from dictlearn.encoders.omp import OMP
from dictlearn.interop.export import export
from dictlearn.swap import job_of
from evals.coding import frame

GOAL = 1e-5
# Share of rows that may use another atom.
TIES = 0.01
N, M, D, K = 512, 256, 64, 9


def made() -> dict[str, Run]:
    """A dictionary for each encoder; rows are off centre, atoms of unit norm."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    weight, offset = array(M, D) / 8, array(M) / 4
    atoms = array(M, D)
    atoms = atoms / jnp.linalg.norm(atoms, axis=1, keepdims=True)
    encoders = {
        "topk": Linear(weight, offset, activations.TopK(K)),
        "abstopk": Linear(weight, offset, activations.AbsTopK(K)),
        "standard": Linear(weight, offset, activations.ReLU()),
        "jumprelu": Linear(weight, offset, activations.JumpReLU(jnp.abs(array(M)))),
        "gated": Linear(weight, offset, activations.Gated(jnp.exp(array(M)), array(M) / 3)),
        "tied topk": Tied(activations.TopK(K)),
        "tied abstopk": Tied(activations.AbsTopK(K)),
        "omp by the plugin": OMP(k=K),
        "mp_sae": MPSAE(atoms, rounds=K, threshold=0.0, stop_on_repeat=False),
    }
    mean = array(D).at[5].add(40.0)
    told = {"hook": "blocks.0.hook_resid_post", "model": {"name": "gpt2"}}
    return {
        name: Run(
            Path(name), Coder(Normaliser(mean, jnp.asarray(3.0)), Dictionary(atoms, array(D) / 5),
                              encoder), told, {},
        )
        for name, encoder in encoders.items()
    }  # fmt: skip


def rows_of(run: Run) -> np.ndarray:
    """Test rows of a run's store; of one without, random ones."""
    if "store" in run.metadata:
        shards = job_of(run).parts["test"].by_shard()
        return next(x for x, _, _ in shards if len(x))[:N]
    x = np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)
    return np.array(run.coder.normaliser.restore(jnp.asarray(x)))


def expected(coder: Coder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as SAELens's should be, and reconstructions."""
    codes = coder.encode(x)
    dense = np.asarray(codes.dense())
    if not isinstance(coder.encoder, (Linear, Tied)):  # lengths of raw rows; unit atoms
        dense = dense * np.linalg.norm(frame(coder)[0], axis=1)
    return dense, np.asarray(coder.decode(codes))


def run_all(peer: str, folder: Path, runs: dict[str, Run]) -> list[dict[str, Any]]:
    """Write them here, code them there, compare."""
    for name, run in runs.items():
        place = folder / name
        plugin = isinstance(run.coder.encoder, OMP)
        export(run, place, omp=plugin)
        np.save(folder / f"{name}.npy", rows_of(run))
    script = Path(__file__).with_name("saelens_export_peer.py")
    done = subprocess.run([peer, "-I", str(script), str(folder)], stdout=sys.stderr, check=False)
    if done.returncode:
        raise UserError(f"--peer: {peer} ended with exit code {done.returncode}; see above")
    lines = []
    for name, run in runs.items():
        theirs = np.load(folder / f"{name}.npz")
        codes, x_hat = expected(run.coder, np.load(folder / f"{name}.npy"))
        line: dict[str, Any] = {"name": name, "encoder": hyperparameters(run.coder.encoder)["name"]}
        same = ((codes != 0) == (theirs["codes"] != 0)).all(axis=1)
        line |= {"rows": int((~same).sum()), "of": len(same)}
        for key, own in (("codes", codes), ("x_hat", x_hat)):
            line[key] = float(np.abs(own - theirs[key])[same].max() / np.abs(own).max())
        lines.append(line)
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--peer", required=True, help="the interpreter of SAELens's environment")
    arguments = parser.parse_args()
    runs = made() | {path.name: load(path) for path in arguments.runs}
    with tempfile.TemporaryDirectory() as folder:
        lines = run_all(arguments.peer, Path(folder), runs)
    for line in lines:
        print(json.dumps(line))
    far = [
        line["name"] for line in lines
        if max(line["codes"], line["x_hat"]) > GOAL or line["rows"] > TIES * line["of"]
    ]  # fmt: skip
    if far:
        raise UserError(f"further off than {GOAL:g}, or in more rows: {', '.join(far)}")


if __name__ == "__main__":
    run_command(main)
