"""What a causal language model loses on text: bits per byte, nats per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from activations.terminal import UserError
from dictlearn.metrics import bootstrap, bootstrap_mean


@dataclasses.dataclass(frozen=True)
class Losses:
    """Of every token that was predicted, in all documents.

    Attributes:
      nats: -log p(token | those before it) [n].
      token: ids [n].
      document: which document a token is of [n].
      n_bytes: how many bytes of each document's text were predicted [D].
    """

    nats: np.ndarray
    token: np.ndarray
    document: np.ndarray
    n_bytes: np.ndarray

    def by_document(self) -> dict[str, Any]:
        """Sums over each document [D], of those too in which nothing was predicted."""
        bits = np.bincount(self.document, self.nats / np.log(2), len(self.n_bytes))
        return {"bits": bits.tolist(), "bytes": self.n_bytes.tolist()}

    def bits_per_byte(self, *, seed: int) -> dict[str, Any]:
        """sum nats / (ln 2 * bytes), with a 95 % bootstrap interval over documents."""
        bits, size = (np.array(sums) for sums in self.by_document().values())
        there = size > 0
        return {
            "bits_per_byte": float(bits.sum() / size.sum()),
            "bits_per_byte_interval": bootstrap_mean(bits[there], size[there], seed=seed),
        }

    def of(self, tokens: np.ndarray) -> dict[str, Any]:
        """Mean nats of those tokens, and their share of all; None where there are none."""
        those = np.isin(self.token, tokens)
        mean = float(self.nats[those].mean()) if those.any() else None
        return {"nats": mean, "share": float(those.mean()), "n": int(those.sum())}


def above(one: dict[str, Any], other: dict[str, Any], *, seed: int) -> dict[str, Any]:
    """Bits per byte of one model less those of another, from their `by_document` on one corpus.

    sum b / sum s - sum b' / sum s' over the documents in which both predict something, with a 95 %
    bootstrap interval for which both have the same documents drawn.
    """
    sums = np.array([held[key] for held in (one, other) for key in ("bits", "bytes")], float)
    b, s, b_other, s_other = sums[:, (sums[1] > 0) & (sums[3] > 0)]

    def apart(w: np.ndarray) -> np.ndarray:
        return (w @ b) / (w @ s) - (w @ b_other) / (w @ s_other)

    return {
        "bits_per_byte": float(apart(np.ones(len(b)))),
        "bits_per_byte_interval": bootstrap(apart, len(b), seed=seed),
    }


def losses(
    model: Any,
    texts: list[str],
    encode: Callable[[str], list[int]],
    bytes_of: Callable[[int], bytes],
    *,
    begin: list[int],
) -> Losses:
    """Losses of a Hugging Face model on texts.

    Bytes are those of the text in UTF-8, whatever the tokens stand for: a tokenizer may put a space
    before a text, normalise it, or have no token for a part of it, and yet all of it was told.
    Where nothing stands before a text, its first token is not predicted, nor are that one's bytes.

    Arguments:
      encode: a text's ids, without special tokens.
      bytes_of: what a token stands for.
      begin: ids that stand before every text.

    Raises:
      UserError: there is no text, or none that has a token to predict.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    n_bytes = np.zeros(len(texts), int)
    for document, text in enumerate(texts):
        ids = [*begin, *encode(text)]
        first = max(1, len(begin))
        if len(ids) > first:
            nats = token_nats(model, [ids], [first])[0]
            found.append((nats, np.array(ids[first:]), np.full(len(nats), document)))
            given = b"" if begin else bytes_of(ids[0])
            n_bytes[document] = _behind(text, given)
    if not found:
        raise UserError(
            f"corpus: not one of {len(texts)} texts has a token that can be predicted from those "
            "before it; give more text, or raise characters"
        )
    nats, token, of = (np.concatenate(part) for part in zip(*found, strict=True))
    return Losses(nats, token, of, n_bytes)


def _behind(text: str, first: bytes) -> int:
    """Bytes of a text behind its first token, whose own space is none of the text's."""
    own = first if text.startswith(" ") else first.removeprefix(b" ")
    return max(0, len(text.encode()) - len(own))


@torch.inference_mode()
def token_nats(
    model: Any, sequences: Sequence[list[int]], first: Sequence[int]
) -> list[np.ndarray]:
    """-log p of each sequence's ids from place `first` on, given those before it.

    Shorter sequences are padded behind, where a causal model does not look. The head is given only
    the places that are asked for: the logits of one are as many as the vocabulary has tokens.
    """
    x = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long)
    for row, ids in zip(x, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    x = x.to(model.device)
    sizes = [len(ids) - begin for ids, begin in zip(sequences, first, strict=True)]
    row = torch.repeat_interleave(torch.tensor(sizes)).to(x.device)  # [n]
    place = torch.cat([
        torch.arange(begin, len(ids)) for ids, begin in zip(sequences, first, strict=True)
    ]).to(x.device)  # [n] # fmt: skip
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0][row, place - 1][None],)
    )
    try:
        logits = model(x, use_cache=False).logits[0].float()  # [n v]
    finally:
        hook.remove()
    # Nearer to float64 than log_softmax, whose sum over a large vocabulary is off by 2e-5.
    nats = torch.logsumexp(logits, -1) - logits.gather(-1, x[row, place][:, None])[:, 0]
    return np.split(nats.double().cpu().numpy(), np.cumsum(sizes)[:-1])
