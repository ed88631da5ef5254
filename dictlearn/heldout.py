"""Held-out figures of a Coder, with intervals, beside the control that has learned nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from dictlearn import metrics
from dictlearn.data import Rows
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.base import AbstractEncoder

# Rows coded at once: one shape, so one trace.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What `evaluate` saw, before it is turned into figures.

    Attributes:
      raw, bulk: sums by document for `fvu` and `fvu_bulk`.
      l0, cosine: means over the rows.
      errors: ||x - x_hat||^2 / ||x - mean||^2 of each row, mean being the training rows'.
      frac_alive: share of the atoms that at least one row uses.
    """

    raw: metrics.Sums
    bulk: metrics.Sums
    l0: float
    cosine: float
    frac_alive: float
    errors: np.ndarray

    @property
    def fvu(self) -> float:
        """Over all rows and dimensions."""
        return float(self.raw.fvu()[0])

    @property
    def fvu_bulk(self) -> float:
        """Without massive rows and carrier dimensions."""
        return float(self.bulk.fvu()[0])


def evaluate(coder: Coder, rows: Rows, bulk: metrics.Bulk, *, gradients: bool = False) -> HeldOut:
    """Code rows, with their gradients or without, and compare them with their reconstructions."""
    raw = kept = None
    n = nonzeros = cosines = 0
    errors = []
    mean = np.asarray(coder.normaliser.mean, np.float64)
    used = np.zeros(len(coder.dictionary.atoms), bool)
    prepared = coder.prepare()
    for shard_x, shard_document, shard_gradient in rows.by_shard(gradients=gradients):
        for first in range(0, len(shard_x), _BLOCK):
            x, document = (a[first : first + _BLOCK] for a in (shard_x, shard_document))
            filled = ((0, _BLOCK - len(x)), (0, 0))
            gradient = None
            if shard_gradient is not None:
                gradient = np.pad(shard_gradient[first : first + _BLOCK], filled)
            codes = prepared.encode(np.pad(x, filled), gradient=gradient)
            x_hat = np.asarray(coder.decode(codes))[: len(x)]
            values, indices = (np.asarray(a)[: len(x)] for a in (codes.values, codes.indices))
            features = indices[values != 0]
            used[features[features < len(used)]] = True  # the others are carriers
            n += len(x)
            nonzeros += int((values != 0).sum())
            cosines += float(metrics.cosine(x, x_hat).sum())
            with np.errstate(divide="ignore", invalid="ignore"):
                square = metrics.norms(x.astype(np.float64) - x_hat) ** 2
                errors.append(square / metrics.norms(x - mean) ** 2)
            usual, free = bulk.rows(x), ~bulk.carriers
            count = len(rows.documents)
            here = metrics.Sums.of(x, x_hat, document, count)
            there = metrics.Sums.of(
                x[usual][:, free], x_hat[usual][:, free], document[usual], count
            )
            raw, kept = (here, there) if raw is None or kept is None else (raw + here, kept + there)
    assert raw is not None
    assert kept is not None
    return HeldOut(raw, kept, nonzeros / n, cosines / n, float(used.mean()), np.concatenate(errors))


def control(
    rows: Rows, normaliser: Normaliser, encoder: AbstractEncoder, *, n_atoms: int, seed: int
) -> Coder:
    """Untrained rows of the data as atoms: what any dictionary has to beat."""
    atoms = normaliser.normalise(jnp.asarray(rows.sample(n_atoms, seed=seed)))
    return Coder(normaliser, Dictionary(atoms, jnp.zeros(atoms.shape[1])), encoder)


def figures(coder: Coder, seen: HeldOut, *, seed: int) -> dict[str, Any]:
    """The figures of metrics.json. Intervals are 95 %, by bootstrap over documents."""
    nearest = np.asarray(metrics.nearest_cosine(coder.dictionary.atoms))
    return {
        **_errors(seen, seed),
        "cosine": seen.cosine,
        "coherence": float(nearest.max()),
        "twins": float((nearest > metrics.TWIN).mean()),
        "n_tokens": int(seen.raw.count.sum()),
        "n_documents": len(seen.raw.count),
    }


def against(seen: HeldOut, untrained: HeldOut, *, seed: int) -> dict[str, Any]:
    """The control's figures, and `gain_bulk`, the part of its fvu_bulk that the fit removes.

    The interval of the gain draws the same documents for both.
    """
    n_documents = len(seen.raw.count)

    def gain(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return 1 - seen.bulk.fvu(weights) / untrained.bulk.fvu(weights)

    return {
        **{f"control_{key}": value for key, value in _errors(untrained, seed).items()},
        "gain_bulk": float(gain(np.ones((1, n_documents)))[0]),
        "gain_bulk_interval": metrics.bootstrap(gain, n_documents, seed=seed),
    }


def _errors(seen: HeldOut, seed: int) -> dict[str, Any]:
    n_documents = len(seen.raw.count)
    return {
        "fvu": seen.fvu,
        "fvu_interval": metrics.bootstrap(seen.raw.fvu, n_documents, seed=seed),
        "fvu_bulk": seen.fvu_bulk,
        "fvu_bulk_interval": metrics.bootstrap(seen.bulk.fvu, n_documents, seed=seed),
        "median_error": float(np.nanmedian(seen.errors)),
        "l0": seen.l0,
        "frac_alive": seen.frac_alive,
    }
