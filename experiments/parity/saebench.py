"""Our core beside SAEBench 0.6.0's own, on the same dictionaries, model and tokens.

    python -m venv .saebench
    .saebench/bin/pip install -r experiments/parity/requirements-saelens.txt
    .saebench/bin/pip install --no-deps -r experiments/parity/requirements-saebench.txt
    python -m experiments.parity.saebench DICTIONARY [...] --peer .saebench/bin/python

The whole pipeline runs on both sides (TransformerBridge of TransformerLens 3 there, of 4 here), on
sequences of the first dictionary's store. A JSON line a dictionary and figure says how far apart
they are, relative to theirs; where SAEBench has a bug, with ours of the suffix `_saebench060`.
Figures of features are compared by their greatest difference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from activations import models
from activations.store import Store
from activations.terminal import UserError, run_command
from dictlearn.interop import load
from evals import core

GOAL = 1e-4


def run_peer(peer: str, module: str, folder: Path) -> None:
    """Run the other half in SAEBench's environment; what it prints goes to stderr."""
    root = Path(__file__).parents[2]
    # SAEBench's own shape checks fail with a jaxtyping as new as dictlearn's.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "JAXTYPING_DISABLE": "1"}
    command = [peer, "-m", f"experiments.parity.{module}", str(folder)]
    done = subprocess.run(command, cwd=root, env=environment, check=False, stdout=sys.stderr)
    if done.returncode:
        raise UserError(f"--peer: {peer} ended with {done.returncode}; see above")


def apart(ours: Any, theirs: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A line a figure."""
    found = []
    for category, values in theirs["metrics"].items():
        own = ours.metrics[category]
        for key, value in values.items():
            if category != "token_stats":  # theirs count special tokens
                mine = own.get(f"{key}_saebench060", own[key])
                found.append((f"{category}.{key}", mine, value))
    lines = [
        {"name": name, "figure": figure, "ours": mine, "theirs": value,
         "relative": None if mine is None else abs(mine - value) / max(abs(value), 1e-12)}
        for figure, mine, value in found
    ]  # fmt: skip
    for key in theirs["features"]:
        pairs = [
            (row.get(f"{key}_saebench060", row.get(key)), value)
            for row, value in zip(ours.details, theirs["features"][key], strict=True)
        ]
        differences = [abs(a - b) for a, b in pairs if a is not None and not math.isnan(b)]
        if differences:
            lines.append({"name": name, "figure": f"features.{key}", "greatest": max(differences)})
    return lines


def run(paths: list[Path], peer: str, n_sequences: int, batch_size: int) -> list[dict[str, Any]]:
    """Measure there and here."""
    runs = [load(path) for path in paths]
    told = runs[0].metadata
    if "store" not in told:
        raise UserError(f"{paths[0]}: the first one must be a run of ours, whose store is read")
    tokens = np.array(Store(told["store"]["path"]).sequences[:n_sequences, 0])
    model = models.load(told["model"]["spec"])
    special = model.tokenizer.all_special_ids
    document = np.where(np.isin(tokens, special), -1, np.arange(len(tokens))[:, None])
    request = {
        "model": str(models.fetch(told["model"]["spec"])), "hook": told["hook"],
        "dictionaries": [str(path.absolute()) for path in paths], "batch_size": batch_size,
        "special": special,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "tokens.npy", tokens)
        (folder / "request.json").write_text(json.dumps(request))
        run_peer(peer, "saebench_peer", folder)
        theirs = json.loads((folder / "core.json").read_text())
    cfg = core.Config(told["hook"], tokens.size, tokens.size, batch_size)
    lines = []
    for path, one in zip(paths, runs, strict=True):
        ours = core.run(one.coder, model, tokens, cfg, document)
        lines += apart(ours, theirs[str(path.absolute())], path.name)
    return lines


def main() -> None:
    """Entry of `python -m experiments.parity.saebench`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.parity.saebench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dictionaries", type=Path, nargs="+", metavar="DICTIONARY")
    parser.add_argument("--peer", required=True, help="the Python of SAEBench's environment")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.sequences % arguments.batch_size:
        raise UserError("--sequences: must be whole batches")
    lines = run(arguments.dictionaries, arguments.peer, arguments.sequences, arguments.batch_size)
    for line in lines:
        print(json.dumps(line))
    if any((line.get("relative") or 0) > GOAL for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
