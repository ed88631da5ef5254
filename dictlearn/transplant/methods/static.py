"""Static embeddings of words or tokens: from a file, or learned from text on the spot."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from pydantic import Field

from activations.terminal import UserError, progress

# Rows mixed at once: a batch holds their cosines with every source, 46,000 or 260,000 of them.
_ROWS = 256
# What the files of fastText itself begin with.
_FASTTEXT = (793712314).to_bytes(4, "little")


@dataclasses.dataclass(frozen=True)
class Static:
    """Where static embeddings come from: `vectors`, or fastText's CBOW learned from `text`.

    Learning needs about 8 MB a dimension beside the text: n-grams of letters share 2,000,000 rows.

    Attributes:
      vectors: a file in word2vec's format (text, or binary if it is called .bin) or fastText's.
        WECHSEL looks words up in it; FOCUS tokens, written as `written` does.
      text: UTF-8 files to learn from, a document a line.
      dimensions: of what is learned.
      epochs: passes over the text.
      min_count: words that occur less often are not learned; n-grams of letters stand in for them.

    Source: Bojanowski et al., "Enriching Word Vectors with Subword Information" (2017); epochs,
    min_count and 10 negatives as in FOCUS. One thread, so that a seed has one result.
    """

    __pydantic_config__ = {"extra": "forbid"}

    vectors: Path | None = None
    text: tuple[Path, ...] = ()
    dimensions: Annotated[int, Field(gt=0)] = 300
    epochs: Annotated[int, Field(gt=0)] = 3
    min_count: Annotated[int, Field(gt=0)] = 10

    def check(self) -> None:
        """Raise ValueError unless there is one source of embeddings."""
        if (self.vectors is None) == (not self.text):
            raise ValueError("static: give either vectors (a file) or text (files to learn from)")

    def load(self, split: Callable[[str], list[str]], seed: int) -> Any:
        """gensim's KeyedVectors, with `expandos["count"]`: how often each word occurs.

        A file in word2vec's format has its words by falling frequency, without saying it: there
        1 / rank stands in for it (Zipf's law).

        Arguments:
          split: a line of the text -> its words, without white space in them.
          seed: of learning.

        Raises:
          UserError: gensim is missing, a file cannot be read, or there is too little text.
        """
        self.check()
        return _read(self.vectors) if self.vectors else self._learn(split, seed)

    def _learn(self, split: Callable[[str], list[str]], seed: int) -> Any:
        fasttext, word2vec = _gensim("gensim.models.fasttext"), _gensim("gensim.models.word2vec")
        counts = collections.Counter()
        with tempfile.TemporaryDirectory() as directory:
            corpus = Path(directory) / "corpus"
            with corpus.open("w", encoding="utf-8") as out:
                for line in progress(iterable=self._lines(), unit="line", desc="splitting text"):
                    words = split(line)
                    counts.update(words)
                    out.write(" ".join(words) + "\n")
            if sum(count >= self.min_count for count in counts.values()) < 2:
                raise UserError(
                    f"{', '.join(map(str, self.text))}: fewer than 2 words occur {self.min_count} "
                    "times, too little to learn from. Give more text, or lower static.min_count"
                )
            return fasttext.FastText(
                word2vec.LineSentence(str(corpus)),
                vector_size=self.dimensions,
                epochs=self.epochs,
                min_count=self.min_count,
                negative=10,
                alpha=0.05,  # fastText's own rate; gensim's default is word2vec's
                workers=1,
                seed=seed,
                hashfxn=lambda word: zlib.crc32(word.encode()),  # Python's is each process's own
            ).wv

    def _lines(self) -> Iterator[str]:
        for path in self.text:
            try:
                with path.open(encoding="utf-8") as file:
                    for line in file:
                        yield line.rstrip("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def mixed(
    weigh: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    targets: np.ndarray,
    rows: np.ndarray,
    places: np.ndarray,
) -> np.ndarray:
    """sum_j w_ij s_ij [n e] for targets [n f] and sources s = rows[places] [s e].

    `weigh` says for some targets [r f] which sources they are made of, and the weights: both [r k].
    """
    made = np.empty((len(targets), rows.shape[1]), np.float32)
    with progress(total=len(targets), unit="token", desc="mixing") as bar:
        for at in range(0, len(targets), _ROWS):
            weights, chosen = map(np.asarray, weigh(jnp.asarray(targets[at : at + _ROWS])))
            # Most weights of a sparsemax are 0: a product with a sparse matrix skips them.
            row, slot = weights.nonzero()
            sparse = scipy.sparse.csr_array(
                (weights[row, slot], (row, places[chosen[row, slot]])),
                shape=(len(weights), len(rows)),
            )
            made[at : at + _ROWS] = sparse @ rows
            bar.update(len(weights))
    return made


def drawn(n: int, like: np.ndarray, seed: int) -> np.ndarray:
    """Normal rows [n e], each dimension with its mean and variance in `like` [b e]."""
    noise = np.random.default_rng(seed).standard_normal((n, like.shape[1]), np.float32)
    return like.mean(axis=0) + like.std(axis=0) * noise


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of zeros stay."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


def _read(path: Path) -> Any:
    models, facebook = _gensim("gensim.models"), _gensim("gensim.models.fasttext")
    try:
        with path.open("rb") as file:
            native = file.read(4) == _FASTTEXT
        if native:
            found = facebook.load_facebook_vectors(str(path))
        else:
            binary = ".bin" in path.suffixes
            found = models.KeyedVectors.load_word2vec_format(str(path), binary=binary)
            # A word that stands twice is read once, and leaves an empty place at the end.
            n = len(found.key_to_index)
            found.index_to_key, found.vectors = found.index_to_key[:n], found.vectors[:n]
            found.expandos["count"] = 1 / np.arange(1, n + 1)
    except Exception as error:  # gensim raises nothing narrower for a damaged file
        raise UserError(f"{path}: cannot be read as word vectors ({error})") from None
    if not len(found) or not np.isfinite(found.vectors).all():
        raise UserError(f"{path}: holds no word vectors, or some that are not finite")
    return found


def _gensim(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError:
        raise UserError(
            "static embeddings need gensim: pip install 'dictlearn-interp[transplant]'"
        ) from None
