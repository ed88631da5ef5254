"""Labelled texts as one row each: means of activations and codes over a text's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Float, Float32, Int

from dictlearn.dictionary import Coder
from evals.cache import Block
from evals.coding import coded, norms


@dataclasses.dataclass(frozen=True, eq=False)
class Pooled:
    """Rows of texts.

    Attributes:
      x: mean activations.
      codes: mean codes over atoms of unit norm, as SAEBench's dictionaries have them.
      n_tokens: that the means are over.
    """

    x: Float32[np.ndarray, "n d"]
    codes: scipy.sparse.csr_array
    n_tokens: Int[np.ndarray, " n"]


def pool(coder: Coder, blocks: Iterable[Block]) -> Pooled:
    """Means over each text's tokens; of "last" blocks, the one token's."""
    x, codes, count = [], [], []
    norm = norms(coder)
    for block in blocks:
        n = np.diff(block.start)
        mean = scipy.sparse.csr_array(
            (np.repeat(1 / n, n), np.arange(n.sum()), block.start), (len(n), int(n.sum()))
        )
        rows = np.asarray(block.x)
        x.append((mean @ rows).astype(np.float32))
        codes.append(scipy.sparse.csr_array(mean @ coded(coder, rows)[0]).multiply(norm[None]))
        count.append(n)
    stacked = scipy.sparse.csr_array(scipy.sparse.vstack(codes))
    return Pooled(np.concatenate(x), stacked, np.concatenate(count))


def at_zero(coder: Coder) -> Float[np.ndarray, " a"]:
    """Codes of the row 0, over atoms of unit norm: what SAEBench's masked tokens are."""
    width = coder.dictionary.atoms.shape[1]
    codes = coder.encode(jnp.zeros((1, width))).dense()[0]
    return np.asarray(codes, np.float64) * norms(coder)
