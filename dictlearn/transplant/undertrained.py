"""Tokens that a model has hardly seen: their rows say nothing of what they stand for."""

from __future__ import annotations

import numpy as np

from dictlearn.transplant.vocabulary import Vocabulary

# Bytes that no UTF-8 text holds.
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}


def never_seen(
    rows: np.ndarray, tokens: np.ndarray, vocabulary: Vocabulary, limit: float
) -> np.ndarray:
    """Which tokens [a] have rows in an embedding [v e] where those lie of tokens no text holds [a].

    These are tokens of single bytes that UTF-8 does not use, and the rows that pad the matrix; a
    row is like them if its cosine with their mean is above `limit`, both without the mean row of
    all. In a vocabulary without such tokens none is known to be, and a limit of 1 keeps all.

    Source: the reference tokens of Land and Bartolo, "Fishing for Magikarp" (arXiv 2405.05417),
    section 3; they take the distances of output rows without the first principal direction.
    """
    never = [
        token
        for token, content in vocabulary.tokens.items()
        if len(content) == 1 and content[0] in _NEVER
    ]
    never += range(len(vocabulary), len(rows))
    if not never or limit == 1:
        return np.zeros(len(tokens), bool)
    mean = rows.mean(axis=0)
    reference = rows[never].mean(axis=0) - mean
    centred = rows[tokens] - mean
    norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(reference)
    return centred @ reference > limit * norms
