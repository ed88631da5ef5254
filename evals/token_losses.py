"""What a causal language model loses on text: bits per byte, nats per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from activations.terminal import UserError
from dictlearn.metrics import bootstrap_mean


@dataclasses.dataclass(frozen=True)
class Losses:
    """Of every token that was predicted, in all documents.

    Attributes:
      nats: -log p(token | those before it) [n].
      token: ids [n].
      document: which document a token is of [n].
      n_bytes: what the token stands for, in bytes [n].
    """

    nats: np.ndarray
    token: np.ndarray
    document: np.ndarray
    n_bytes: np.ndarray

    def bits_per_byte(self, *, seed: int) -> dict[str, Any]:
        """sum nats / (ln 2 * bytes), with a 95 % bootstrap interval over documents."""
        _, of = np.unique(self.document, return_inverse=True)
        bits, size = (np.bincount(of, x) for x in (self.nats / np.log(2), self.n_bytes))
        return {
            "bits_per_byte": float(bits.sum() / size.sum()),
            "bits_per_byte_interval": bootstrap_mean(bits, size, seed=seed),
        }

    def of(self, tokens: np.ndarray) -> dict[str, Any]:
        """Mean nats of those tokens, and their share of all; None where there are none."""
        those = np.isin(self.token, tokens)
        mean = float(self.nats[those].mean()) if those.any() else None
        return {"nats": mean, "share": float(those.mean()), "n": int(those.sum())}


def losses(
    model: Any,
    texts: list[str],
    encode: Callable[[str], list[int]],
    n_bytes: Callable[[int], int],
    *,
    begin: list[int],
) -> Losses:
    """Losses of a Hugging Face model on texts.

    Arguments:
      encode: a text's ids, without special tokens.
      n_bytes: how many bytes a token stands for.
      begin: ids that stand before every text; without any a text's first token is not predicted.

    Raises:
      UserError: there is no text, or none that has a token to predict.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for document, text in enumerate(texts):
        ids = [*begin, *encode(text)]
        first = max(1, len(begin))
        if len(ids) > first:
            nats = token_nats(model, [ids], [first])[0]
            found.append((nats, np.array(ids[first:]), np.full(len(nats), document)))
    if not found:
        raise UserError(
            f"corpus: not one of {len(texts)} texts has a token that can be predicted from those "
            "before it; give more text, or raise characters"
        )
    nats, token, of = (np.concatenate(part) for part in zip(*found, strict=True))
    return Losses(nats, token, of, np.array([n_bytes(one) for one in token.tolist()]))


@torch.inference_mode()
def token_nats(model: Any, sequences: list[list[int]], first: list[int]) -> list[np.ndarray]:
    """-log p of each sequence's ids from place `first` on, given those before it.

    Shorter sequences are padded behind, where a causal model does not look.
    """
    length = max(map(len, sequences))
    x = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, ids in zip(x, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    x = x.to(model.device)
    start = min(first) - 1
    kept = torch.arange(start, length - 1, device=x.device)
    logits = model(x, logits_to_keep=kept, use_cache=False).logits.float()
    target = x[:, start + 1 :, None]
    nats = torch.logsumexp(logits, -1) - logits.gather(-1, target)[:, :, 0]
    return [
        row[begin - 1 - start : len(ids) - 1 - start].double().cpu().numpy()
        for row, begin, ids in zip(nats, first, sequences, strict=True)
    ]
