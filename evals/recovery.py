"""What a dictionary recovers of planted features: its atoms and codes against the truth.

Reconstruction is reported beside it, but decides nothing: a code can lower the error by fitting
the superposition of features without finding any.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Float64, Int
from scipy.optimize import linear_sum_assignment

from dictlearn import metrics
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.base import AbstractEncoder
from evals import planted
from evals.coding import coded
from evals.planted import Sample, Truth, unit


def plain_coder(
    atoms: np.ndarray, encoder: AbstractEncoder, *, mean: np.ndarray | None = None
) -> Coder:
    """A Coder of atoms [m d] without scaling or bias; centred, if it is told a mean [d]."""
    zero = jnp.zeros(atoms.shape[1])
    normaliser = Normaliser(zero if mean is None else jnp.asarray(mean), jnp.ones(()))
    return Coder(normaliser, Dictionary(jnp.asarray(atoms, jnp.float32), zero), encoder)


def oracle(truth: Truth, encoder: AbstractEncoder, *, mean: np.ndarray | None = None) -> Coder:
    """The true directions, then those of the background, as atoms: what the encoder makes of them.

    In rows that are not centred, codes that a row does not need are false alarms of rare features
    and lower `f1`; in centred rows they are spent on the mean, as false alarms of common features,
    and lower `f1_by_firing`. A fit is to be compared with an oracle of the same centring.
    """
    atoms = np.concatenate([truth.directions, truth.background])
    return plain_coder(atoms, encoder, mean=mean)


def match(
    atoms: np.ndarray, directions: np.ndarray, *, exact: int = 4096
) -> tuple[Int[np.ndarray, " F"], Float64[np.ndarray, " F"]]:
    """Match atoms [m d] one to one with directions [F d], for the greatest sum of |cos|.

    Up to `exact` atoms and directions the Hungarian method solves this. Beyond, the match is
    greedy: every direction names its 16 nearest atoms, and the pairs are taken in order of |cos|
    where both are still free; this is repeated among those that stay free. For pairs that stand
    out, both give the same.

    Returns:
      Each direction's atom, -1 where there are too few, and its cosine with it, 0 there.
    """
    atoms, directions = unit(atoms), unit(directions)
    chosen = np.full(len(directions), -1)
    if max(len(atoms), len(directions)) <= exact:
        pairs = linear_sum_assignment(np.abs(directions @ atoms.T), maximize=True)
        chosen[pairs[0]] = pairs[1]
    else:
        _match_greedily(atoms, directions, chosen)
    found = chosen >= 0
    cosine = np.zeros(len(directions))
    cosine[found] = (np.float64(directions[found]) * atoms[chosen[found]]).sum(axis=1)
    return chosen, cosine


def _match_greedily(atoms: np.ndarray, directions: np.ndarray, chosen: np.ndarray) -> None:
    """Fill `chosen`, as `match` says."""
    free_atoms, free = np.arange(len(atoms)), np.arange(len(directions))
    while len(free_atoms) and len(free):
        pairs = []
        for part in np.array_split(free, -(-len(free) // 1024)):
            size = np.abs(directions[part] @ atoms[free_atoms].T)
            near = np.argpartition(-size, min(16, size.shape[1]) - 1, axis=1)[:, :16]
            size = np.take_along_axis(size, near, axis=1)
            pairs.append((np.repeat(part, near.shape[1]), free_atoms[near].ravel(), size.ravel()))
        of, atom, size = (np.concatenate(column) for column in zip(*pairs, strict=True))
        taken = np.zeros(len(atoms), bool)
        for pair in np.argsort(-size, kind="stable"):
            if chosen[of[pair]] < 0 and not taken[atom[pair]]:
                chosen[of[pair]] = atom[pair]
                taken[atom[pair]] = True
        free_atoms, free = free_atoms[~taken[free_atoms]], free[chosen[free] < 0]


def score(
    coder: Coder,
    truth: Truth,
    sample: Sample,
    *,
    gradients: bool = False,
    min_firings: int = 10,
    exact: int = 4096,
) -> dict[str, float]:
    """How much of the truth a coder recovers, on rows that it was not fitted on.

    The normaliser shifts and scales by one number, so that directions in its units are those of the
    truth. Each feature i has at most one atom, its `match` j(i), with the sign s_i of their cosine.
    With codes z and true codes t, firing is compared by

        hits_i = #{rows: s_i z_j(i) t_i > 0},  precision_i = hits_i / #{z_j(i) != 0},
        recall_i = hits_i / #{t_i != 0},       f1_i = 2 hits_i / (#{z_j(i) != 0} + #{t_i != 0}).

    A code of the wrong sign is thus a false alarm, and a miss where the feature fires. An encoder
    without negative codes can hold a signed feature only by two atoms, one of which counts.

    Arguments:
      gradients: the encoder is told those of the truth's readout. They know the labels.
      min_firings: in the sample, of a feature that enters the means of precision, recall and f1.
      exact: see `match`.

    Returns:
      Means over features, `cosine` (|cos| with the matched atom), `recovered_90` and `_95` (share
        with |cos| above 0.9 and 0.95), also `_by_firing` (weighted by probability), of the
        `_common`, `_middle` and `_rare` third, and of features `_signed`, `_children`, `_grouped`;
        `precision`, `recall` and `f1`, also `_by_firing` and of these three kinds, over `n_scored`
        features.
      Means over atoms: `atom_cosine` (greatest |cos| with a feature), `junk` (share with less than
        half of their square along any one feature or background direction), `duplicates` (share
        with a feature above 0.9 that has a better atom).
      Over rows: `fvu`, `fvu_bulk` (without massive rows and the carrier), `l0`; with a readout,
        `loss_increase`: its cross-entropy at x_hat less that at x, in nats.
      NaN where there is nothing to take a mean over.
    """
    atoms = np.asarray(coder.dictionary.atoms)
    chosen, cosine = match(atoms, truth.directions, exact=exact)
    size, nearest = np.abs(cosine), _nearest(atoms, truth.directions)
    third = np.arange(len(size)) * 3 // len(size)
    parts = {
        "": np.ones(len(size), bool),
        "_signed": truth.signed,
        "_children": truth.parent >= 0,
        "_grouped": truth.group >= 0,
    }
    thirds = {f"_{name}": third == i for i, name in enumerate(("common", "middle", "rare"))}
    figures = {"cosine": float(size.mean())}
    for name, limit in (("recovered_90", 0.9), ("recovered_95", 0.95)):
        figures |= {name + kind: _mean(size[of] > limit) for kind, of in (parts | thirds).items()}
        figures[f"{name}_by_firing"] = _mean(size > limit, truth.rate)
    known = np.maximum(nearest, _nearest(atoms, truth.background))
    figures |= {
        "atom_cosine": float(nearest.mean()),
        "junk": _mean(known**2 < 0.5),
        "duplicates": float(((nearest > 0.9).sum() - (size > 0.9).sum()) / len(atoms)),
    }
    before, slope = (None, None)
    if len(truth.readout):
        before, slope = planted.loss(truth, sample.x, sample.label)
    codes, x_hat = coded(coder, sample.x, gradient=slope if gradients else None)
    sign = np.where(chosen >= 0, np.sign(cosine), 0)
    learned = _signs(codes[:, np.maximum(chosen, 0)].multiply(sign[None]))  # [n F]
    true = _signs(sample.codes)
    # The product is 1 for a hit, -1 for the wrong sign; absolute values count what is not 0.
    product = learned.multiply(true)
    alarms, fired, both = (abs(signs).sum(axis=0) for signs in (learned, true, product))
    hits = (both + product.sum(axis=0)) / 2
    counted = fired >= min_firings
    ratios = {
        "precision": hits / np.maximum(alarms, 1),
        "recall": hits / np.maximum(fired, 1),
        "f1": 2 * hits / np.maximum(alarms + fired, 1),
    }
    for name, ratio in ratios.items():
        figures |= {name + kind: _mean(ratio[of & counted]) for kind, of in parts.items()}
        figures[f"{name}_by_firing"] = _mean(ratio[counted], truth.rate[counted])
    carriers = np.arange(sample.x.shape[1]) == (truth.carrier if truth.carrier_std else -1)
    usual = ~sample.massive
    if before is not None:
        after = planted.loss(truth, x_hat, sample.label)[0]
        figures["loss_increase"] = float((after - before).mean())
    return figures | {
        "n_scored": int(counted.sum()),
        "fvu": metrics.fvu(sample.x, x_hat),
        "fvu_bulk": metrics.fvu(sample.x[usual][:, ~carriers], x_hat[usual][:, ~carriers]),
        "l0": codes.nnz / len(sample.x),
    }


def _signs(codes: scipy.sparse.sparray) -> scipy.sparse.csr_array:
    """The sign of each entry."""
    codes = scipy.sparse.csr_array(codes)
    return scipy.sparse.csr_array((np.sign(codes.data), codes.indices, codes.indptr), codes.shape)


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The mean, NaN for none."""
    return float(np.average(values, weights=weights)) if len(values) else float("nan")


def _nearest(atoms: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Greatest |cos| of each atom with a direction [m]; 0 where there is none."""
    atoms = unit(atoms)
    parts = (atoms[first : first + 1024] for first in range(0, len(atoms), 1024))
    return np.concatenate([np.abs(part @ directions.T).max(axis=1, initial=0) for part in parts])
