"""Beside mergekit's own transplant:  python -m experiments.parity.tokensurgeon OURS THEIRS.

    python -m venv .mergekit && .mergekit/bin/pip install torch==2.13.0 mergekit==0.1.5
    .mergekit/bin/mergekit-tokensurgeon BASE DONOR THEIRS --approximation-method omp -k 64

Both have the same base, donor and k. Prints one JSON object: how many rows the two copy from the
base and which they make up, how alike those are, and bits per byte of both on the same text: as
each directory begins a text, and both with what the base begins one with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from activations.config import read_toml, validate
from activations.terminal import run_command
from dictlearn.transplant.run import read_transplant
from dictlearn.transplant.weights import Weights
from evals.speaker import Speaker
from evals.token_losses import losses
from evals.transplant import EvalConfig


def rows_beside(ours: Path, theirs: Path) -> dict[str, Any]:
    """What either made of the embedding."""
    pair, _ = read_transplant(ours)
    own, other, base = (
        weights.read(weights.embed) for weights in (Weights(ours), Weights(theirs), pair.base)
    )
    copied = pair.matching.copied
    donor, source = np.array([*copied]), np.array([*copied.values()])
    inside = donor < len(other)
    same = (other[donor[inside]] == base[source[inside]]).all(axis=1)
    new = pair.matching.new[pair.matching.new < len(other)]
    norms = [np.linalg.norm(rows[new], axis=1) for rows in (own, other)]
    cosine = np.einsum("nd,nd->n", own[new], other[new]) / np.maximum(norms[0] * norms[1], 1e-12)
    return {
        "rows": {"ours": len(own), "theirs": len(other)},
        "copied": {"ours": len(copied), "of those by theirs": int(same.sum())},
        "made_up": {"both": len(new), "cosine": float(np.median(cosine))},
        "zero_rows": {
            "ours": int((~own.any(axis=1)).sum()), "theirs": int((~other.any(axis=1)).sum())
        },
    }  # fmt: skip


def bits(directory: Path, cfg: EvalConfig, begin: list[int] | None) -> dict[str, Any]:
    """Bits per byte; the directory's own start of a text, if None is given."""
    speaker = Speaker.load(directory)
    vocabulary = speaker.vocabulary
    found = losses(
        speaker.model, cfg.texts(), vocabulary.encode, vocabulary.bytes_of,
        begin=speaker.begin if begin is None else begin,
    )  # fmt: skip
    return found.bits_per_byte(seed=cfg.seed) | {"begin": speaker.begin if begin is None else begin}


def main() -> None:
    """Print the object."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.parity.tokensurgeon",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--config", type=Path, help="as for evals.transplant: text and seed")
    arguments = parser.parse_args()
    settings = read_toml(arguments.config or Path("/dev/null"), [])
    cfg = validate(EvalConfig, settings, str(arguments.config))
    cfg = dataclasses.replace(cfg, zero_shot=(), prompts=())
    begin = Speaker.load(arguments.ours).begin
    told = rows_beside(arguments.ours, arguments.theirs)
    told["ours"] = bits(arguments.ours, cfg, None)
    told["theirs, as it is"] = bits(arguments.theirs, cfg, None)
    told["theirs, begun as ours"] = bits(arguments.theirs, cfg, begin)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    run_command(main)
