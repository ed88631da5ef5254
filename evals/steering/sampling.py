"""Continuations of prompts, sampled in batches with the key-value cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from activations.huggingface import quiet
from activations.models import Model
from activations.terminal import UserError
from evals.cache import tokens

# SNMF's sampling (Shafran et al. 2025): top k, top p.
SAMPLING = 30, 0.3
# Sequences that are gone on with at once.
_BATCH = 64


def samples(
    model: Model,
    prompts: list[str],
    strengths: np.ndarray,
    steered: Callable[[np.ndarray], AbstractContextManager[Any]],
    *,
    new_tokens: int,
    seed: int,
    prefix: str = "",
) -> list[str]:
    """What a model says behind each prompt, without it: top-k 30, top-p 0.3, temperature 1.

    Texts end where the model ends them, else after `new_tokens`.

    Arguments:
      prompts: [n]; those of one length share a batch.
      strengths: of each prompt [n].
      steered: the context that a batch with these strengths runs in.
      prefix: stands before each prompt.

    Raises:
      UserError: a strength breaks the model: its logits are not finite.
    """
    if not prompts:
        return []
    ids = tokens(model, [prefix + prompt for prompt in prompts], length=2**31)
    lengths = np.array([len(one) for one in ids])
    said = [""] * len(prompts)
    for length in np.unique(lengths):
        own = np.flatnonzero(lengths == length)
        for first in range(0, len(own), _BATCH):
            batch = own[first : first + _BATCH]
            token = torch.from_numpy(np.stack([ids[i] for i in batch]).astype(np.int64))
            with steered(strengths[batch]):
                made = _continued(model, token, new_tokens, seed=seed)
            for i, row in zip(batch, made, strict=True):
                said[i] = model.tokenizer.decode(row, skip_special_tokens=True)
    return said


def _continued(model: Model, token: torch.Tensor, count: int, *, seed: int) -> list[list[int]]:
    """New ids of each sequence [b c], up to the model's own end."""
    device = model.bridge.cfg.device
    with torch.random.fork_rng(), torch.inference_mode(), quiet():
        torch.manual_seed(seed)
        try:
            top_k, top_p = SAMPLING
            made = model.bridge.generate(
                token.to(device), max_new_tokens=count, stop_at_eos=False, do_sample=True,
                top_k=top_k, top_p=top_p, verbose=False, return_type="tokens",
            )  # fmt: skip
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError("steering: a strength breaks the model: its logits are NaN") from None
    end = model.tokenizer.eos_token_id
    rows = made[:, token.shape[1] :].cpu().tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
