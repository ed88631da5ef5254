"""Others' dictionaries, coded by us and by their own libraries: SAELens, Gemma Scope, sparsify.

    python -m venv .saelens
    .saelens/bin/pip install -r experiments/parity/requirements-saelens.txt
    python -m experiments.parity.saelens --peer .saelens/bin/python

saelens_peer.py, run there, writes dictionaries of every kind with random weights, and the codes and
reconstructions that their own libraries make of 512 rows. A JSON line a dictionary says how far
ours are from them: the greatest difference, and the same over the greatest of theirs; `rows` are
those in which another atom is used. A line a dictionary that must be refused says how it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from activations.terminal import UserError, run_command
from dictlearn import interop

GOAL = 1e-5


def compared(place: Path, folder: Path) -> dict[str, Any]:
    """How far our codes and reconstructions are from theirs."""
    theirs = np.load(f"{place}.npz")
    run = interop.load(place)
    codes = run.coder.encode(theirs["x"])
    line: dict[str, Any] = {"name": str(place.relative_to(folder))}
    line |= {key: run.metadata[key] for key in ("format", "hook")}
    dense = np.asarray(codes.dense())
    line["l0"] = float(codes.l0().mean())
    line["rows"] = int(((dense != 0) != (theirs["codes"] != 0)).any(axis=1).sum())
    for key, ours in (("codes", dense), ("x_hat", np.asarray(run.coder.decode(codes)))):
        worst = float(np.abs(ours - theirs[key]).max())
        line |= {key: worst, f"{key}_relative": worst / float(np.abs(theirs[key]).max())}
    return line


def refused(place: Path, folder: Path) -> dict[str, Any]:
    """What we say of a dictionary that has no codes of one hook; null if we read it."""
    said = None
    try:
        interop.load(place)
    except UserError as error:
        said = str(error).replace(f"{folder}/", "")
    return {"name": place.name, "said": said}


def run(peer: str, folder: Path) -> list[dict[str, Any]]:
    """Write them there, read them here."""
    script = Path(__file__).with_name("saelens_peer.py")
    done = subprocess.run([peer, "-I", str(script), str(folder)], stdout=sys.stderr, check=False)
    if done.returncode:
        raise UserError(f"--peer: {peer} ended with exit code {done.returncode}; see above")
    places = [file.with_suffix("") for file in sorted(folder.rglob("*.npz"))]
    lines = [compared(place, folder) for place in places if place.is_dir()]
    return lines + [refused(place, folder) for place in sorted(folder.glob("refused: *"))]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Parity with SAELens and sparsify.")
    parser.add_argument("--peer", required=True, help="the interpreter of the others' environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = run(arguments.peer, Path(folder))
    for line in lines:
        print(json.dumps(line))
    far = [
        line["name"]
        for line in lines
        if max(line.get("codes_relative", 0), line.get("x_hat_relative", 0)) > GOAL
        or line.get("said", "") is None
    ]
    if far:
        raise UserError(f"further off than {GOAL:g}, or not refused: {', '.join(far)}")


if __name__ == "__main__":
    run_command(main)
