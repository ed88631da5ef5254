"""How fluent a text is: its likelihood under another model, and how little it repeats itself.

Loops please the model that said them, and other models too; so both are asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from activations import models
from activations.terminal import progress
from evals import kept
from evals.speaker import Speaker
from evals.token_losses import token_nats

# Texts read at once.
_BATCH = 8


def bits_per_byte(spec: str, texts: list[str]) -> Float[np.ndarray, " n"]:
    """-log2 p(text) / bytes of each text under a model; NaN of an empty text. Kept on disk.

    Raises:
      UserError: the model cannot be loaded.
    """
    directory = models.fetch(spec)
    own = models.identify(spec, directory)
    speaker: Speaker | None = None

    def read(part: list[str]) -> dict[str, Any]:
        nonlocal speaker
        speaker = speaker or Speaker.load(directory)
        return {"bits": _bits(speaker, part)}

    found = []
    with progress(total=len(texts), desc="fluency", unit="text", delay=3) as bar:
        for part in (texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH)):
            file = kept.place("fluency", [own.weights_sha256, own.tokenizer_sha256, part])
            found += kept.kept(file, partial(read, part))["bits"]
            bar.update(len(part))
    return np.array(found)


def _bits(speaker: Speaker, texts: list[str]) -> list[float]:
    roles = speaker.vocabulary.roles
    begin = speaker.begin or [roles[role] for role in ("bos", "eos") if role in roles][:1]
    ids = [[*begin, *speaker.vocabulary.encode(text)] for text in texts]
    first = max(1, len(begin))
    there = [i for i in range(len(ids)) if len(ids[i]) > first]
    found = [np.nan] * len(texts)
    if there:
        nats = token_nats(speaker.model, [ids[i] for i in there], [first] * len(there))
        for i, own in zip(there, nats, strict=True):
            found[i] = float(own.sum() / np.log(2) / len(texts[i].encode()))
    return found


def distinct_2(text: str) -> float:
    """Share of a text's pairs of neighbouring words that are distinct; 1 of fewer than two."""
    words = text.lower().split()
    pairs = list(itertools.pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


@dataclasses.dataclass(frozen=True)
class Fluency:
    """What is fluent, by texts of the model as it is.

    A text is fluent if its bits per byte are at most the 95 % quantile of the model's own texts',
    and its share of distinct pairs of words at least their 5 % quantile.

    Attributes:
      most_bits, least_distinct: the two.
    """

    most_bits: float
    least_distinct: float

    @classmethod
    def of(cls, bits: Float[np.ndarray, " n"], distinct: Float[np.ndarray, " n"]) -> Fluency:
        """From those of the model's own texts."""
        return cls(float(np.nanquantile(bits, 0.95)), float(np.quantile(distinct, 0.05)))

    def of_texts(
        self, bits: Float[np.ndarray, " n"], distinct: Float[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """Which texts are fluent; an empty one is not."""
        return (np.nan_to_num(bits, nan=np.inf) <= self.most_bits) & (
            distinct >= self.least_distinct
        )
