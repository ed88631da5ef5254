"""Half of experiments.parity.saebench: SAEBench's own core, run in SAEBench's environment.

    python -m experiments.parity.saebench_peer FOLDER

FOLDER/request.json names a model directory, a hook, dictionaries, the batch size and the special
tokens; FOLDER/tokens.npy are sequences. What SAEBench's functions return goes to FOLDER/core.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_bench.evals.core import main as core  # pyright: ignore[reportMissingImports]
from sae_bench.evals.core.eval_config import CoreEvalConfig  # pyright: ignore
from transformer_lens.model_bridge import TransformerBridge

from experiments.parity.saebench_adapter import CoderSAE


class Sequences:
    """What SAEBench asks of its activation store."""

    def __init__(self, tokens: np.ndarray, batch_size: int) -> None:
        self._tokens = torch.from_numpy(tokens.astype(np.int64))
        self.context_size, self.store_batch_size_prompts = tokens.shape[1], batch_size
        self._at = 0

    def get_batch_tokens(self, count: int) -> torch.Tensor:
        """The next sequences."""
        self._at += count
        return self._tokens[self._at - count : self._at]

    def reset_input_dataset(self) -> None:
        """Begin anew."""
        self._at = 0


def measure(path: str, request: dict[str, Any], bridge: Any, tokens: np.ndarray) -> dict[str, Any]:
    """SAEBench's metrics and features of one dictionary."""
    sae = CoderSAE(path, model_name="local", hook=request["hook"])
    size = request["batch_size"]
    config = CoreEvalConfig(
        model_name="local", batch_size_prompts=size, compute_kl=True, compute_ce_loss=True,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
        n_eval_reconstruction_batches=len(tokens) // size,
        n_eval_sparsity_variance_batches=len(tokens) // size,
        exclude_special_tokens_from_reconstruction=True,
    )  # fmt: skip
    with torch.no_grad():
        found, features = core.run_evals(
            sae, Sequences(tokens, size), bridge, config, ignore_tokens=set(request["special"])
        )
    found["misc_metrics"] = core.calculate_misc_metrics(features)
    lists = {key: np.asarray(values, float).tolist() for key, values in features.items()}
    return {"metrics": found, "features": lists}


def main() -> None:
    """Measure every dictionary of the request."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    bridge = TransformerBridge.boot_transformers(request["model"], device="cpu")
    tokens = np.load(folder / "tokens.npy")
    found = {path: measure(path, request, bridge, tokens) for path in request["dictionaries"]}
    (folder / "core.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
