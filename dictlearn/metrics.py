"""How good a dictionary is without a language model: pure functions of rows, codes and atoms.

Sums are taken in float64 on the host, document by document, so that every figure over rows can
carry a bootstrap interval over documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TWIN = 0.95


@dataclasses.dataclass(frozen=True)
class Bulk:
    """What `fvu_bulk` leaves out, judged on the training rows.

    Attributes:
      carriers: dimensions [d] that hold over 10 % of the training variance each.
      norm_limit: rows of a greater norm are massive; 5 times the median norm of training rows.
    """

    carriers: np.ndarray
    norm_limit: float

    def rows(self, x: np.ndarray) -> np.ndarray:
        """Which of the raw rows [n d] are not massive."""
        return norms(x) <= self.norm_limit


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the rows of each document, enough for the FVU of any choice of documents.

    count, error (sum ||x - x_hat||^2), square (sum ||x||^2): [documents]; total (sum x):
    [documents d].
    """

    count: np.ndarray
    error: np.ndarray
    square: np.ndarray
    total: np.ndarray

    @staticmethod
    def of(x: np.ndarray, x_hat: np.ndarray, document: np.ndarray, n_documents: int) -> Sums:
        """The sums of rows [n d] whose documents [n] are numbered from 0."""
        x = x.astype(np.float64)
        order = np.argsort(document, kind="stable")
        present, starts = np.unique(document[order], return_index=True)

        def by_document(values: np.ndarray) -> np.ndarray:
            sums = np.zeros((n_documents, *values.shape[1:]))
            if len(present):
                sums[present] = np.add.reduceat(values[order], starts, axis=0)
            return sums

        return Sums(
            count=np.bincount(document, minlength=n_documents).astype(np.float64),
            error=by_document(((x - x_hat) ** 2).sum(axis=1)),
            square=by_document((x**2).sum(axis=1)),
            total=by_document(x),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            *(
                getattr(self, field.name) + getattr(other, field.name)
                for field in dataclasses.fields(self)
            )
        )

    def spread(self, place: np.ndarray, n_documents: int) -> Sums:
        """The same among more documents: the i-th becomes number place[i]."""

        def moved(values: np.ndarray) -> np.ndarray:
            wide = np.zeros((n_documents, *values.shape[1:]))
            wide[place] = values
            return wide

        return Sums(*(moved(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def fvu(self, weights: np.ndarray | None = None) -> np.ndarray:
        """sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, for each row of document weights [b, D].

        NaN where the rows do not vary.
        """
        if weights is None:
            weights = np.ones((1, len(self.count)))
        n = weights @ self.count
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_square = ((weights @ self.total) ** 2).sum(axis=1) / n
            variance = weights @ self.square - mean_square
            return np.where(variance > 0, (weights @ self.error) / variance, np.nan)


def fvu(x: np.ndarray, x_hat: np.ndarray) -> float:
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean(x)||^2."""
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    return float(((x - x_hat.astype(np.float64)) ** 2).sum() / (centred**2).sum())


def fvu_bulk(x: np.ndarray, x_hat: np.ndarray, bulk: Bulk) -> float:
    """`fvu` over the rows that are not massive and the dimensions that are not carriers."""
    rows = bulk.rows(x)
    return fvu(x[rows][:, ~bulk.carriers], x_hat[rows][:, ~bulk.carriers])


def norms(x: np.ndarray) -> np.ndarray:
    """Norm of each row [n], in float64: the squares of float32 overflow beyond 1e19."""
    return np.linalg.norm(x.astype(np.float64), axis=1)


def cosine(x: np.ndarray, x_hat: np.ndarray) -> np.ndarray:
    """Cosine of each row with its reconstruction [n]; 0 where either is zero."""
    inner = (x.astype(np.float64) * x_hat).sum(axis=1)
    size = norms(x) * norms(x_hat)
    return np.divide(inner, size, out=np.zeros_like(inner), where=size > 0)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    n_documents: int,
    *,
    seed: int,
    n_draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic over documents drawn with replacement.

    Arguments:
      statistic: document weights [draws documents] -> its values [draws].
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=n_draws)
    values = statistic(weights.astype(np.float64))
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_mean(sums: np.ndarray, count: np.ndarray, *, seed: int) -> tuple[float, float]:
    """95 % of a mean over tokens, from each document's sum [D] and number of tokens [D]."""
    return bootstrap(lambda w: (w @ sums) / (w @ count), len(count), seed=seed)


def nearest_cosine(atoms: Float[Array, "m d"]) -> Float[Array, " m"]:
    """Each atom's greatest |cos| with another atom. Zero atoms have cosine 0 with all."""
    if len(atoms) < 2:
        return jnp.zeros(len(atoms))
    return _nearest_cosine(atoms)


@jax.jit
def _nearest_cosine(atoms: Float[Array, "m d"]) -> Float[Array, " m"]:
    norms = jnp.linalg.norm(atoms, axis=1, keepdims=True)
    unit = atoms / jnp.where(norms > 0, norms, 1)

    def of_row(index: Array) -> Array:
        return jnp.abs(unit @ unit[index]).at[index].set(0).max()

    return jax.lax.map(of_row, jnp.arange(len(atoms)), batch_size=256)


def coherence(atoms: Float[Array, "m d"]) -> float:
    """The greatest |cos| between two atoms (mutual coherence)."""
    return float(nearest_cosine(atoms).max())


def twins(atoms: Float[Array, "m d"]) -> float:
    """Share of the atoms that have a near twin: |cos| > 0.95 with another atom."""
    return float((nearest_cosine(atoms) > TWIN).mean())
