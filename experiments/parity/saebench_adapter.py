"""Any dictionary that dictlearn.load reads, as SAEBench's BaseSAE: for SAEBench's own commands.

It runs in SAEBench's environment, with dictlearn's core beside it:

    from experiments.parity.saebench_adapter import CoderSAE
    sae = CoderSAE("runs/quickstart-001", model_name="gemma-3-270m")
    sae_bench.evals.core.main.run_evals(sae, ...)

`encode` is the Coder's own, whatever the encoder; gradients pass through `decode` alone. An encoder
without weights has W_enc = W_dec^T as a stand-in, which only figures about weights look at.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from sae_bench.custom_saes.base_sae import BaseSAE  # pyright: ignore[reportMissingImports]

import dictlearn
from dictlearn.encoders.linear import Linear

# Rows coded at once.
_ROWS = 1024


class CoderSAE(BaseSAE):
    """x [... d] to dense codes [... m] and back.

    Arguments:
      path: a run, or another's dictionary.
      hook: TransformerLens's name; the dictionary's own if left out.
    """

    def __init__(self, path: Path | str, *, model_name: str, hook: str | None = None) -> None:
        run = dictlearn.load(path)
        hook = hook or run.metadata["hook"]
        layer = re.search(r"blocks\.(\d+)\.", str(hook))
        if layer is None:
            raise ValueError(f"hook: {hook!r} has no layer; name one")
        coder = run.coder
        atoms = np.array(coder.atoms * coder.normaliser.scale)
        cpu = torch.device("cpu")
        super().__init__(
            atoms.shape[1], atoms.shape[0], model_name, int(layer[1]), cpu, torch.float32, hook
        )
        self.cfg.architecture_str = "standard"  # core asks for it, CustomSAEConfig has none
        self._prepared = coder.prepare()
        bias = np.array(coder.normaliser.restore(coder.dictionary.bias[None])[0])
        encoder, weight = coder.encoder, atoms
        if isinstance(encoder, Linear) and len(encoder.weight) == len(atoms):
            weight = np.array(encoder.weight / coder.normaliser.scale)
            self.b_enc.data = torch.from_numpy(np.array(encoder.bias))
        self.W_enc.data = torch.from_numpy(np.ascontiguousarray(weight.T))
        self.W_dec.data, self.b_dec.data = torch.from_numpy(atoms), torch.from_numpy(bias)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes by the Coder's encoder."""
        rows = x.detach().float().cpu().numpy().reshape(-1, x.shape[-1])
        codes = [
            np.array(self._prepared.encode(rows[at : at + _ROWS]).dense())
            for at in range(0, len(rows), _ROWS)
        ]
        dense = torch.from_numpy(np.concatenate(codes)).reshape(*x.shape[:-1], -1)
        return dense.to(device=self.device, dtype=self.dtype)

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Raw activations."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x))
