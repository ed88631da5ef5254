"""WECHSEL: the base's tokens that stand in similar words."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Iterable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from pydantic import Field

from activations.terminal import UserError, progress
from dictlearn.transplant.methods.static import Static, drawn, mixed, unit
from dictlearn.transplant.problem import Problem


@dataclasses.dataclass(frozen=True)
class Wechsel:
    """sum_j w_j b_j over the k nearest tokens j of the base, w = softmax_j(cos(u, u_j) / tau).

    u_x = sum_v f_v e_v / sum_v f_v [f] over the words v in whose tokens x is, with f_v how often a
    word occurs and e_v its static embedding: for a new token by the donor's tokenizer, for a token
    of the base by the base's; b_j [e] is the row of the latter. Words are split with a space before
    them and without. A token that is in no word is drawn: each dimension normal, with the base's
    mean and variance.

    Departures: both vocabularies are of one language, so that there is one space of words and
    nothing to align; and u_x is a mean of words, which the paper has for embeddings without
    n-grams, for fastText as well.

    Attributes:
      static: the embeddings, of words.
      k: tokens of the base that a new one is made of.
      temperature: tau.

    Source: Minixhofer, Paischer and Rekabsaz, "WECHSEL: Effective initialization of subword
    embeddings for cross-lingual transfer of monolingual language models" (2022; arXiv 2112.06598),
    section 3.
    """

    __pydantic_config__ = {"extra": "forbid"}

    static: Static
    name: Literal["wechsel"] = "wechsel"
    k: Annotated[int, Field(gt=0)] = 10
    temperature: Annotated[float, Field(gt=0)] = 0.1

    def check(self) -> None:
        """Raise ValueError unless there is one source of embeddings."""
        self.static.check()

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e].

        Raises:
          UserError: there are no embeddings, or none of a token of the base.
        """
        vectors = self.static.load(_words, seed)
        places, sources = _embedded(vectors, problem.split, range(len(problem.base)))
        if not len(places):
            raise UserError("static: no token of the base is in a word that has an embedding")
        reached, targets = _embedded(vectors, problem.pieces, problem.new_bytes)
        weigh = functools.partial(
            _weights,
            sources=jnp.asarray(sources),
            k=min(self.k, len(sources)),
            temperature=self.temperature,
        )
        made = drawn(len(problem.new_bytes), problem.base, seed)
        made[reached] = mixed(weigh, targets, problem.base, places)
        return made


@jax.jit(static_argnames=("k", "temperature"))
def _weights(
    x: jax.Array, sources: jax.Array, k: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    cosines, places = jax.lax.top_k(x @ sources.T, k)
    return jax.nn.softmax(cosines / temperature, axis=1), places


def _words(text: str) -> list[str]:
    """Runs of letters and digits, and runs of what is neither."""
    return re.findall(r"\w+|[^\w\s]+", text)


def _embedded(
    vectors: Any, tokens_of: Callable[[str], Iterable[Hashable]], wanted: Iterable[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the wanted tokens are in words [m], and u of these [m f], of length 1."""
    rows = {token: row for row, token in enumerate(wanted)}
    words = vectors.index_to_key
    of_token, of_word = [], []
    for place, word in enumerate(progress(iterable=words, unit="word", desc="splitting words")):
        # A dict, not a set: the order of sums is that of the tokens in every process.
        for token in dict.fromkeys([*tokens_of(f" {word}"), *tokens_of(word)]):
            if token in rows:
                of_token.append(rows[token])
                of_word.append(place)
    counts = np.asarray(vectors.expandos["count"], np.float32)[of_word]
    # A mean up to its length, which no cosine depends on.
    sums = scipy.sparse.csr_array(
        (counts, (of_token, of_word)), shape=(len(rows), len(words))
    ) @ np.asarray(vectors.vectors, np.float32)
    found = np.flatnonzero(sums.any(axis=1))
    return found, unit(sums[found])
