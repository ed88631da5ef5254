"""What a model makes of passages: log p of tokens, with latents clamped or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Float32, Int

from activations.corpora import Corpus
from activations.models import Model
from activations.terminal import UserError, progress
from dictlearn.dictionary import Coder
from evals.coding import coded, frame
from evals.lm import Forward, check_width

# Tokens of a forward pass, and bytes of its logits.
_TOKENS, _LOGITS = 2048, 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class Passage:
    """Tokens, and what is asked of them.

    Attributes:
      ids: BOS included [c].
      first: a place, 1 or later.
      targets: log p of targets[i] [p k] is asked at place first + i, given what stands before it.
    """

    ids: Int[np.ndarray, " c"]
    first: int
    targets: Int[np.ndarray, "p k"]


def continuation(ids: np.ndarray, first: int) -> Passage:
    """In which all tokens from a place on are asked for."""
    return Passage(ids, first, ids[first:, None])


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Passages of about one length.

    Attributes:
      index: which passages they are.
      token: theirs, padded behind, where a causal model does not look.
      x: what the hook sees.
      kept: which tokens are neither special nor padding.
    """

    index: list[int]
    token: Int[np.ndarray, "b c"]
    x: Float32[np.ndarray, "b c d"]
    kept: Bool[np.ndarray, "b c"]


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """Latents [n] clamped to goals [n], lengths of raw activations, where they fire.

    Attributes:
      positive: whether a latent fires where its code is > 0, and not != 0.
    """

    latents: np.ndarray
    goal: np.ndarray
    positive: bool = False

    def step(
        self, codes: scipy.sparse.csr_array, atoms: Float[np.ndarray, "a d"]
    ) -> Float[np.ndarray, "r d"]:
        """What is added to rows, from their codes [r a] and atoms in raw units."""
        norm = np.linalg.norm(atoms[self.latents], axis=1)
        f = codes[:, self.latents].toarray() * norm
        fires = f > 0 if self.positive else f != 0
        unit = atoms[self.latents] / np.where(norm > 0, norm, 1)[:, None]
        return np.where(fires, self.goal - f, 0) @ unit


class Hooked:
    """A model, and a dictionary of what one of its hooks sees.

    Raises:
      UserError: the model has no such hook; the dictionary does not fit it.
    """

    def __init__(self, coder: Coder, model: Model, hook: str) -> None:
        self._forward, self._coder = Forward(model, hook), coder
        check_width(coder, hook, self._forward.width)
        self.atoms = frame(coder)[0]
        self._tokenizer: Any = model.tokenizer
        config: Any = model.bridge.cfg
        self._rows = _LOGITS // (4 * config.d_vocab)
        start = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        self.begin = [i for i in start if i is not None][:1]

    def encode(self, text: str) -> list[int]:
        """A text's ids, without special tokens."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def codes(self, x: Float[np.ndarray, "n d"]) -> scipy.sparse.csr_array:
        """Codes [n a] of rows."""
        return coded(self._coder, x)[0]

    def batches(self, passages: list[Passage]) -> Iterator[Batch]:
        """All passages, the longest first."""
        order = sorted(range(len(passages)), key=lambda i: -len(passages[i].ids))
        most = max((len(one.targets) for one in passages), default=1)
        while order:
            width = len(passages[order[0]].ids)
            size = max(1, min(_TOKENS // width, self._rows // most))
            index, order = order[:size], order[size:]
            ids = [passages[i].ids for i in index]
            token = np.stack([np.pad(one, (0, width - len(one)), mode="edge") for one in ids])
            there = np.arange(width) < np.array([len(one) for one in ids])[:, None]
            kept = there & ~np.isin(token, self._tokenizer.all_special_ids)
            yield Batch(index, token, self._forward.read(token), kept)

    @torch.inference_mode()
    def log_p(
        self, passages: list[Passage], token: np.ndarray, x: np.ndarray
    ) -> list[Float[np.ndarray, "p k"]]:
        """log p of each passage's targets with x [b c d] at the hook; the head sees those places
        alone."""
        count = [len(one.targets) for one in passages]
        row = np.repeat(np.arange(len(passages)), count)
        place = np.concatenate([
            one.first - 1 + np.arange(n) for one, n in zip(passages, count, strict=True)
        ])  # fmt: skip
        with self._forward.bridge.hooks(
            fwd_hooks=[("unembed.hook_in", lambda seen, hook: seen[row, place][None])]
        ):
            logits = self._forward.logits(token, x)[0].float()  # [n v]
        target = np.concatenate([one.targets for one in passages]).astype(np.int64)
        told = logits.gather(1, torch.from_numpy(target).to(logits.device))
        told = told - logits.logsumexp(dim=1, keepdim=True)
        return np.split(told.double().cpu().numpy(), np.cumsum(count)[:-1])

    def base(self, passages: list[Passage]) -> list[np.ndarray]:
        """log p of each passage's targets [p k] in the model as it is."""
        found = [np.zeros(0)] * len(passages)
        for batch in self.batches(passages):
            own = self.log_p([passages[i] for i in batch.index], batch.token, batch.x)
            for i, values in zip(batch.index, own, strict=True):
                found[i] = values
        return found


class Bank:
    """Passages of which activations, codes and log p are kept, for many changes.

    Attributes:
      base: log p of each passage's targets [p k] in the model as it is.
      signed: whether a code is negative.
    """

    def __init__(self, hooked: Hooked, passages: list[Passage]) -> None:
        self._hooked, self._passages = hooked, passages
        self._batches = [(one, hooked.codes(one.x[one.kept])) for one in hooked.batches(passages)]
        self.signed = any(bool((codes.data < 0).any()) for _, codes in self._batches)
        self.base = [np.zeros(0)] * len(passages)
        for batch, _ in self._batches:
            self._put(self.base, batch, batch.x, np.arange(len(batch.index)))

    def log_p(self, change: Change) -> list[np.ndarray]:
        """The same as `base` under a change; only passages that it touches run again."""
        found = list(self.base)
        for batch, codes in self._batches:
            step = np.zeros_like(batch.x)
            step[batch.kept] = change.step(codes, self._hooked.atoms)
            touched = np.flatnonzero(step.any(axis=(1, 2)))
            if len(touched):
                self._put(found, batch, batch.x + step, touched)
        return found

    def _put(self, found: list[np.ndarray], batch: Batch, x: np.ndarray, rows: np.ndarray) -> None:
        """log p of some rows of a batch, each in its passage's place."""
        index = [batch.index[i] for i in rows]
        own = self._hooked.log_p([self._passages[i] for i in index], batch.token[rows], x[rows])
        for i, values in zip(index, own, strict=True):
            found[i] = values


@dataclasses.dataclass(frozen=True, eq=False)
class Firing:
    """Of each latent [a] on a corpus: shares of tokens with f != 0 and f > 0, and the mean of f."""

    fires: np.ndarray
    positive: np.ndarray
    mean: np.ndarray

    @property
    def signed(self) -> bool:
        """Whether a code is negative."""
        return bool((self.fires != self.positive).any())

    def sign(self, latents: np.ndarray) -> np.ndarray:
        """Of the mean of f."""
        return np.where(self.mean[latents] < 0, -1.0, 1.0)


def firing(hooked: Hooked, passages: list[Passage]) -> Firing:
    """Over all tokens that are not special."""
    n_latents = len(hooked.atoms)
    sums, n = np.zeros((3, n_latents)), 0
    with progress(total=len(passages), desc="densities", unit="passage", delay=3) as bar:
        for batch in hooked.batches(passages):
            codes: Any = hooked.codes(batch.x[batch.kept])
            sums += [
                np.bincount(codes.indices, minlength=n_latents),
                np.bincount(codes.indices[codes.data > 0], minlength=n_latents),
                np.bincount(codes.indices, codes.data, minlength=n_latents),
            ]
            n += int(batch.kept.sum())
            bar.update(len(batch.index))
    return Firing(*sums / max(n, 1))


def documents(
    hooked: Hooked, corpus: Corpus, name: str, *, length: int, tokens: tuple[int, int]
) -> tuple[list[Passage], list[Passage], set[str]]:
    """Two parts of a corpus, of so many tokens each, and all their texts.

    Documents go to the parts in turn; a repeated one counts once, one of a single token not at all.

    Arguments:
      length: of a passage, at most, BOS included.

    Raises:
      UserError: there are fewer than two.
    """
    parts: tuple[list[Passage], list[Passage]] = ([], [])
    left, seen = list(tokens), set[str]()
    for text in corpus.documents():
        ids = np.array([*hooked.begin, *hooked.encode(text)][:length])
        if text.strip() in seen or len(ids) < len(hooked.begin) + 2:
            continue
        part = len(seen) % 2
        part = part if left[part] > 0 else 1 - part
        seen.add(text.strip())
        parts[part].append(continuation(ids, max(len(hooked.begin), 1)))
        left[part] -= len(ids) - len(hooked.begin)
        if max(left) <= 0:
            break
    if not all(parts):
        raise UserError(
            f"unlearning.{name}: the corpus has {len(seen)} different documents of two tokens or "
            "more, expected at least 2 (one to choose by, one held out); give more, or have "
            "documents_are = 'paragraphs' or 'lines'"
        )
    return *parts, seen
