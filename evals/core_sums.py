"""What `core` sums up over the rows that it reads: rows against reconstructions, and features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dictlearn import metrics
from dictlearn.metrics import Bulk, Sums

# SAEBench divides by the norm of a row, or by 1 where it is below this.
_SMALL = 1e-4


class Rows:
    """Rows x and reconstructions x_hat, batch by batch.

    Arguments:
      first: rows that tell carriers and the usual norm for `fvu_bulk`.
    """

    def __init__(self, first: np.ndarray, seed: int) -> None:
        self._seed = seed
        variance = first.var(axis=0, dtype=np.float64)
        norms = metrics.norms(first)
        self.bulk = Bulk(variance > 0.1 * variance.sum(), 5 * float(np.median(norms)))
        self._mean = first.mean(axis=0, dtype=np.float64)
        self.n = 0
        self._parts: dict[str, list[np.ndarray]] = {}
        self._batches: dict[str, list[float]] = {}
        self._raw: list[tuple[Sums, np.ndarray]] = []
        self._kept: list[tuple[Sums, np.ndarray]] = []
        self._normed: list[tuple[Sums, np.ndarray]] = []

    def add(
        self,
        x: np.ndarray,
        x_hat: np.ndarray,
        document: np.ndarray,
        normed: Callable[[np.ndarray], np.ndarray | None],
    ) -> None:
        """A batch [n d], and the document of each row [n]."""
        if not len(x):
            return
        self.n += len(x)
        wide, wide_hat = x.astype(np.float64), x_hat.astype(np.float64)
        square, square_hat = (wide**2).sum(axis=1), (wide_hat**2).sum(axis=1)
        error = ((wide - wide_hat) ** 2).sum(axis=1)
        spread = ((wide - wide.mean(axis=0)) ** 2).sum(axis=1)
        norm, norm_hat = np.sqrt(square), np.sqrt(square_hat)
        inner = (wide * wide_hat).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            self._put(
                error=error, mse060=error / len(x), cosine=inner / (norm * norm_hat),
                legacy=1 - error / spread, norm=norm, norm_hat=norm_hat,
                ratio=norm_hat / np.where(norm < _SMALL, 1, norm),
                relative=error / ((wide - self._mean) ** 2).sum(axis=1),
            )  # fmt: skip
            bias = float(square_hat.mean() / inner.mean())
        batch = {"square": square.mean(), "error": error.mean(), "bias": bias}
        batch["entry"] = (wide**2).mean()
        for name, value in batch.items():
            self._batches.setdefault(name, []).append(float(value))
        usual, free = self.bulk.rows(x), ~self.bulk.carriers
        self._raw.append(_sums(x, x_hat, document))
        self._kept.append(_sums(x[usual][:, free], x_hat[usual][:, free], document[usual]))
        after = normed(x), normed(x_hat)
        if after[0] is not None and after[1] is not None:
            self._normed.append(_sums(after[0], after[1], document))

    def _put(self, **values: np.ndarray) -> None:
        for name, value in values.items():
            self._parts.setdefault(name, []).append(value)

    def figures(self) -> dict[str, dict[str, Any]]:
        """Reconstruction, shrinkage, and ours under `headline`."""
        of = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        batch = {name: np.array(values) for name, values in self._batches.items()}
        width = len(self._mean)
        square, error, entry = (float(batch[name].mean()) for name in ("square", "error", "entry"))
        found: dict[str, Any] = {}
        for name, parts in (("fvu", self._raw), ("fvu_bulk", self._kept)):
            found[name], found[f"{name}_interval"] = _fvu(parts, self._seed)
        found["fvu_after_norm"], found["fvu_after_norm_interval"] = _fvu(self._normed, self._seed)
        found["median_error"] = float(np.median(of["relative"]))
        return {
            "headline": found,
            "reconstruction_quality": {
                "explained_variance": 1 - found["fvu"],
                "explained_variance_legacy": float(of["legacy"].mean()),
                "explained_variance_saebench060": 1 - error / (square - entry**2),
                "mse": float(of["error"].mean()) / width,
                "mse_saebench060": float(of["mse060"].mean()),
                "cossim": float(of["cosine"].mean()),
            },
            "shrinkage": {
                "l2_norm_in": float(of["norm"].mean()),
                "l2_norm_out": float(of["norm_hat"].mean()),
                "l2_ratio": float(of["ratio"].mean()),
                "relative_reconstruction_bias": float(batch["bias"].mean()),
            },
        }


def _sums(x: np.ndarray, x_hat: np.ndarray, document: np.ndarray) -> tuple[Sums, np.ndarray]:
    """Sums by document, and which documents these are."""
    present, place = np.unique(document, return_inverse=True)
    return Sums.of(x, x_hat, place, len(present)), present


def _fvu(parts: list[tuple[Sums, np.ndarray]], seed: int) -> tuple[float, tuple[float, float]]:
    """The fraction over all batches, and its interval by bootstrap over documents."""
    if not parts or not sum(len(present) for _, present in parts):
        return float("nan"), (float("nan"), float("nan"))
    documents = np.unique(np.concatenate([present for _, present in parts]))
    total: Sums | None = None
    for sums, present in parts:
        wide = sums.spread(np.searchsorted(documents, present), len(documents))
        total = wide if total is None else total + wide
    assert total is not None
    return float(total.fvu()[0]), metrics.bootstrap(total.fvu, len(documents), seed=seed)


class Features:
    """How often features fire, how strongly, and in how many sequences."""

    def __init__(self, n_features: int) -> None:
        self._fired = np.zeros(n_features, np.int64)
        self._positive = np.zeros(n_features, np.int64)
        self._prompts = np.zeros(n_features, np.int64)
        self._prompts_positive = np.zeros(n_features, np.int64)
        self._size = self._sum = 0.0

    def add(self, indices: np.ndarray, values: np.ndarray, owner: np.ndarray) -> None:
        """Codes [n k] of rows, and the sequence of each row [n]; a sequence is in one batch."""
        n = len(self._fired)
        row, slot = np.nonzero(values)
        feature, value = indices[row, slot], values[row, slot].astype(np.float64)
        place = owner[row].astype(np.int64) * n + feature
        above = value > 0
        self._fired += np.bincount(feature, minlength=n)
        self._positive += np.bincount(feature[above], minlength=n)
        self._prompts += np.bincount(np.unique(place) % n, minlength=n)
        self._prompts_positive += np.bincount(np.unique(place[above]) % n, minlength=n)
        self._size += float(np.abs(value).sum())
        self._sum += float(value.sum())

    def sparsity(self, n: int) -> dict[str, float]:
        """Means over n rows."""
        return {
            "l0": float(self._fired.sum() / n),
            "l1": self._size / n,
            "l1_saebench060": self._sum / n,
        }

    def misc(self, n: int) -> dict[str, float]:
        """Shares of the features by how often they fire."""
        found = {}
        for suffix, fired in (("", self._fired), ("_saebench060", self._positive)):
            density = fired / n
            for percent in (1, 10):
                often = density > percent / 100
                share = density[often].sum() / density.sum() if density.any() else np.nan
                found[f"freq_over_{percent}_percent{suffix}"] = float(often.mean())
                found[f"normalized_freq_over_{percent}_percent{suffix}"] = float(share)
            found[f"frac_alive{suffix}"] = float((density > 0).mean())
        return found

    def details(self, n: int) -> list[dict[str, Any]]:
        """A row a feature."""
        columns = {
            "feature_density": self._fired / n,
            "feature_density_saebench060": self._positive / n,
            "consistent_activation_heuristic": self._fired / np.maximum(self._prompts, 1),
            "consistent_activation_heuristic_saebench060": (
                self._positive / np.maximum(self._prompts_positive, 1)
            ),
        }
        return [
            {"index": index} | {name: float(values[index]) for name, values in columns.items()}
            for index in range(len(self._fired))
        ]
