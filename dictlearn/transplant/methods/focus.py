"""FOCUS: a few similar shared tokens, similar in static embeddings of the new vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from activations.terminal import UserError
from dictlearn.transplant.methods.static import Static, drawn, mixed, unit
from dictlearn.transplant.problem import Problem

# Cosines that sparsemax is given at first. It keeps a few dozen of them as a rule.
_NEAREST = 1024
# Bytes that cannot be seen, white space among them, become the letters from 256 on.
_HIDDEN = {
    byte: 256 + place for place, byte in enumerate([*range(33), *range(127, 161), 173])
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Focus:
    """sum_i w_i b_i over the anchors i, w = sparsemax_i(cos(u, u_i)).

    u [f] is a new token's static embedding, u_i that of an anchor; b_i [e] the anchor's row in the
    base's space. The embeddings are fastText's of the text as the donor's tokenizer splits it;
    tokens that were not learned have those of their n-grams. A token without any is drawn: each
    dimension normal, with the anchors' mean and variance.

    The fastText here reads a token's bytes as letters (see `written`), whatever the tokenizer's own
    way of writing it down, so that n-grams of texts beyond ASCII are n-grams of bytes.

    Attributes:
      static: the embeddings, of tokens.

    Source: Dobler and de Melo, "FOCUS: Effective Embedding Initialization for Monolingual
    Specialization of Multilingual Models" (2023; arXiv 2305.14481), section 2.
    """

    __pydantic_config__ = {"extra": "forbid"}

    static: Static
    name: Literal["focus"] = "focus"

    def check(self) -> None:
        """Raise ValueError unless there is one source of embeddings."""
        self.static.check()

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e].

        Raises:
          UserError: there are no embeddings, or none of an anchor.
        """
        vectors = self.static.load(lambda text: [*map(written, problem.pieces(text))], seed)
        known, sources = _embedded(vectors, problem.anchor_bytes)
        if not len(known):
            raise UserError(
                "static.vectors: not one of the tokens that the vocabularies share has a vector. "
                "Tokens are written in GPT-2's letters for bytes: ' the' is 'Ġthe'"
            )
        there, places = jnp.asarray(sources), problem.places[known]
        reached, targets = _embedded(vectors, problem.new_bytes)
        made = drawn(len(problem.new_bytes), problem.anchors, seed)
        made[reached] = mixed(lambda x: _weights(x, there), targets, problem.base, places)
        return made


def written(token: bytes) -> str:
    """Bytes as a word that can be seen, one letter a byte, in GPT-2's alphabet: b" a" is "Ġa"."""
    return token.decode("latin-1").translate(_HIDDEN)


def sparsemax(z: jax.Array) -> jax.Array:
    """argmin ||w - z|| over w >= 0 with sum w = 1, along the last axis: w = max(z - tau, 0).

    With z sorted downwards, tau = (z_1 + ... + z_s - 1) / s for the greatest s at which
    1 + s z_s > z_1 + ... + z_s.

    Source: Martins and Astudillo, "From Softmax to Sparsemax" (2016), algorithm 1.
    """
    z = z - z.max(axis=-1, keepdims=True)  # the same w, and sums that lose no digits
    falling = jnp.sort(z, axis=-1, descending=True)
    excess = jnp.cumsum(falling, axis=-1) - 1
    count = 1 + jax.lax.broadcasted_iota(z.dtype, z.shape, z.ndim - 1)
    size = jnp.sum(count * falling > excess, axis=-1, keepdims=True)
    tau = jnp.take_along_axis(excess, size - 1, axis=-1) / size.astype(z.dtype)
    return jnp.maximum(z - tau, 0)


def _weights(x: jax.Array, sources: jax.Array, k: int = _NEAREST) -> tuple[jax.Array, jax.Array]:
    """Weights and places [r k] of the sources that have any, for targets x [r f]."""
    weights, places = _of_nearest(x, sources, min(k, len(sources)))
    # The least cosine has no weight: tau is above it, and above all that were left out.
    if k >= len(sources) or not (weights[:, -1] > 0).any():
        return weights, places
    return _weights(x, sources, 4 * k)


@jax.jit(static_argnames="k")
def _of_nearest(x: jax.Array, sources: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    cosines, places = jax.lax.top_k(x @ sources.T, k)
    return sparsemax(cosines), places


def _embedded(vectors: Any, tokens: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens have an embedding [m], and theirs [m f], of length 1."""
    words = [written(token) for token in tokens]
    found = np.zeros((len(words), vectors.vector_size), np.float32)
    for row, word in zip(found, words, strict=True):
        if word and word in vectors:
            row[:] = vectors[word]
    known = np.flatnonzero(found.any(axis=1))
    return known, unit(found[known])
