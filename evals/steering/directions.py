"""Directions to steer by: a dictionary's feature, and what it has to be better than."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression

from activations.terminal import UserError
from dictlearn.dictionary import Coder
from evals.coding import frame
from evals.linear_probe import mean_difference
from evals.pooled import Pooled


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A direction in raw activations, pointing to the concept.

    Attributes:
      vector: of unit norm.
      n_labels: labelled texts that it was made from.
      feature: of the dictionary, if it is one's.
    """

    vector: Float[np.ndarray, " d"]
    n_labels: int
    feature: int | None = None


def directions(
    coder: Coder, rows: Pooled, y: Bool[np.ndarray, " n"], *, seed: int
) -> dict[str, Direction]:
    """One feature of a dictionary, two supervised directions, and three controls.

    - feature: the latent of greatest |mean code of the concept - mean code of others|, over atoms
      of unit norm, in the sense of that difference;
    - diff_means: mean activation of the concept - that of others;
    - probe: the weights of a logistic regression (scikit-learn's, C = 1, standardised rows);
    - pca: the first principal direction of the same rows, in the sense of diff_means;
    - random_feature: a latent that fires on these texts, drawn, in a sense that is drawn too;
    - random_direction: a normal one.

    Arguments:
      rows: mean activations and codes of the texts [n].

    Raises:
      UserError: no latent fires on these texts.
    """
    rng = np.random.default_rng([0x444952, seed])
    atoms = frame(coder)[0]
    unit = atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-30)
    difference = mean_difference(rows.codes, y)
    alive = np.flatnonzero(abs(rows.codes).sum(axis=0))
    if not len(alive):
        raise UserError("steering: no latent of the dictionary fires on these texts")
    best = int(np.abs(difference).argmax())
    drawn = int(rng.choice(alive))
    x = np.asarray(rows.x, np.float64)
    means = x[y].mean(axis=0) - x[~y].mean(axis=0)
    deviation = np.maximum(x.std(axis=0), 1e-30)
    scaled = (x - x.mean(axis=0)) / deviation
    weights = LogisticRegression(max_iter=1000).fit(scaled, y).coef_[0] / deviation
    first = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][0]
    sense = np.sign(first @ means) or 1.0
    return {
        "feature": Direction(np.sign(difference[best]) * unit[best], len(y), best),
        "diff_means": Direction(_unit(means), len(y)),
        "probe": Direction(_unit(weights), len(y)),
        "pca": Direction(sense * first, len(y)),
        "random_feature": Direction(rng.choice([-1, 1]) * unit[drawn], 0, drawn),
        "random_direction": Direction(_unit(rng.standard_normal(x.shape[1])), 0),
    }


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def detection(
    direction: Float[np.ndarray, " d"],
    x: Float[np.ndarray, "t d"],
    start: np.ndarray,
    y: Bool[np.ndarray, " n"],
) -> float | None:
    """SNMF's concept detection score S_CD.

        S_CD = log(mean over the concept's texts of a / mean over others of a)
        a = max over a text's tokens of cos(x, v)

    None where a mean is not positive. Texts are labelled ones, where the paper lets a language
    model write ten. Source: Shafran et al., arXiv 2506.10920, section 4.1.

    Arguments:
      x, start: tokens of the texts, as evals.cache.Block has them.
      y: of each text.
    """
    cosine = (x @ direction) / np.maximum(np.linalg.norm(x, axis=1), 1e-30)
    greatest = np.maximum.reduceat(cosine, start[:-1])
    own, others = greatest[y].mean(), greatest[~y].mean()
    return float(np.log(own / others)) if own > 0 and others > 0 else None
