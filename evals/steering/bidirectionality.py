"""Whether one latent's two signs stand for opposites.

Signed codes (KSVD, AbsTopK) can say "hot" by f > 0 and "cold" by f < 0 of one latent; a one-sided
dictionary needs two latents, and may have learned them as antipodal atoms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from activations.models import Model
from dictlearn.dictionary import Coder
from dictlearn.metrics import bootstrap
from evals import cache
from evals.coding import coded, frame

PAIRS = (
    ("hot", "cold"), ("big", "small"), ("good", "bad"), ("happy", "sad"), ("light", "dark"),
    ("fast", "slow"), ("high", "low"), ("young", "old"), ("rich", "poor"), ("strong", "weak"),
    ("hard", "soft"), ("early", "late"), ("long", "short"), ("wet", "dry"), ("clean", "dirty"),
    ("up", "down"), ("left", "right"), ("open", "closed"), ("full", "empty"), ("near", "far"),
    ("love", "hate"), ("win", "lose"), ("buy", "sell"), ("push", "pull"), ("begin", "end"),
    ("true", "false"), ("alive", "dead"), ("loud", "quiet"), ("thick", "thin"),
    ("safe", "dangerous"), ("man", "woman"), ("king", "queen"), ("boy", "girl"),
    ("husband", "wife"), ("brother", "sister"), ("father", "mother"), ("summer", "winter"),
    ("day", "night"), ("north", "south"), ("friend", "enemy"),
)  # fmt: skip
_TEMPLATES = (
    "The word is {}", "She wrote {}", "They said {}", "It means {}", "He thought of {}",
    "My answer is {}",
)  # fmt: skip
# Of two unit atoms, that count as opposite.
_ANTIPODAL = -0.9


def bidirectionality(coder: Coder, model: Model, hook: str, *, seed: int) -> dict[str, Any]:
    """How many pairs of antonyms one latent tells apart by its sign, and antipodal atoms.

    Every word stands at the end of six short texts, where the hook is read. Of a pair, on three of
    the texts, that latent is chosen whose codes of the two words have the most opposite signs, and
    the greatest |mean difference| among these; `separated` is the share of pairs whose codes of the
    one word are > 0 and of the other < 0 in all of the other three. `separated_antipodal` lets a
    pair of latents with cos < -0.9 do it: one fires on one word, the other on the other. The
    control joins words of different pairs at random.

    Returns:
      Figures, with 95 % bootstrap intervals over the pairs; `antipodal_atoms` is the share of atoms
      that have an opposite.
    """
    words = [word for pair in PAIRS for word in pair]
    texts = [template.format(word) for word in words for template in _TEMPLATES]
    blocks = list(cache.read(model, hook, texts, length=32, keep="last"))
    codes = coded(coder, np.concatenate([np.asarray(block.x) for block in blocks]))[0]
    value = codes.toarray().reshape(len(PAIRS), 2, len(_TEMPLATES), -1)
    sign = np.sign(value).astype(np.int8)
    opposite = _opposites(frame(coder)[0])
    other = np.random.default_rng([0x424944, seed]).permutation(len(PAIRS))
    other = np.where(other == np.arange(len(PAIRS)), np.roll(other, 1), other)
    swapped = [np.stack([of[:, 0], of[other, 1]], axis=1) for of in (sign, value)]
    found: dict[str, Any] = {
        "antonym_pairs": len(PAIRS),
        "antipodal_atoms": float((opposite >= 0).mean()),
        "negative_codes": float((codes.data < 0).mean()) if codes.nnz else None,
    }
    for suffix, (s, v) in {"": (sign, value), "_control": swapped}.items():
        for name, told in {
            "separated": [_one(*pair) for pair in zip(s, v, strict=True)],
            "separated_antipodal": [_two(*pair, opposite) for pair in zip(s, v, strict=True)],
        }.items():
            share = np.array(told, float)
            found[f"{name}{suffix}"] = float(share.mean())
            found[f"{name}{suffix}_interval"] = bootstrap(
                lambda w, share=share: w @ share / len(share), len(share), seed=seed
            )
    return found


def _halves(sign: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signs [2 t a] to choose by, their mean codes' difference [a], and signs to score by."""
    half = sign.shape[1] // 2
    mean = value[:, :half].mean(axis=1)
    return sign[:, :half], np.abs(mean[0] - mean[1]), sign[:, half:]


def _one(sign: np.ndarray, value: np.ndarray) -> bool:
    """Whether one latent has opposite signs for the two words."""
    seen, size, unseen = _halves(sign, value)
    agree = np.abs(seen.sum(axis=1, dtype=int)).sum(axis=0)
    against = (np.sign(seen.sum(axis=1, dtype=int)).prod(axis=0) < 0) * agree
    if not against.any():
        return False
    best = np.lexsort((size, against))[-1]
    own = unseen[:, :, best]
    return bool(abs(own[0].sum()) == abs(own[1].sum()) == own.shape[1] and own[0, 0] != own[1, 0])


def _two(sign: np.ndarray, value: np.ndarray, opposite: np.ndarray) -> bool:
    """Whether a latent fires for the one word alone, and its antipode for the other alone."""
    seen, size, unseen = _halves(np.abs(sign), value)
    there = np.flatnonzero(opposite >= 0)
    if not len(there):
        return False
    fires = seen.sum(axis=1, dtype=int)
    score = fires[0, there] + fires[1, opposite[there]]
    score -= fires[1, there] + fires[0, opposite[there]]
    place = there[np.lexsort((size[there], score))[-1]]
    a, b = unseen[:, :, place], unseen[:, :, opposite[place]]
    return bool(a[0].all() and b[1].all() and not a[1].any() and not b[0].any())


def _opposites(atoms: Float[np.ndarray, "a d"]) -> np.ndarray:
    """Of each atom its most opposite one, if their cosine is under -0.9, else -1 [a]."""
    unit = atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-30)
    found = np.full(len(unit), -1)
    for first in range(0, len(unit), 1024):
        cosine = unit[first : first + 1024] @ unit.T
        place = cosine.argmin(axis=1)
        least = cosine[np.arange(len(place)), place]
        found[first : first + 1024] = np.where(least < _ANTIPODAL, place, -1)
    return found
