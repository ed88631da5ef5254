"""Which features of two dictionaries are the same: cosines of atoms, matched one to one."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float, Int

from activations.terminal import UserError
from dictlearn.artifact import Run
from dictlearn.dictionary import Coder
from evals.coding import frame

# Rows on which codes are tried for a negative one.
_TRIED = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """Pairs of features, the most alike first.

    Attributes:
      a, b: features of the two dictionaries; each at most once.
      cosine: of their atoms; of either sign where both dictionaries have signed codes.
      signed: whether they have: an atom and its negative then say the same.
      control: the mean of |cosine| of pairs when all atoms of b are turned by one random rotation.
    """

    a: Int[np.ndarray, " p"]
    b: Int[np.ndarray, " p"]
    cosine: Float[np.ndarray, " p"]
    signed: bool
    control: float

    @property
    def mean(self) -> float:
        """Of |cosine| over all pairs: 1 where the dictionaries hold the same atoms."""
        return float(np.abs(self.cosine).mean())

    def share(self, least: float = 0.7) -> float:
        """Of pairs that are at least so much alike."""
        return float((np.abs(self.cosine) >= least).mean())

    def __repr__(self) -> str:
        n = len(self.a)
        return (
            f"{n:,} pairs: mean |cosine| {self.mean:.3f} (control {self.control:.3f}), "
            f"{self.share(0.7):.1%} of 0.7 or more, {self.share(0.9):.1%} of 0.9 or more"
        )


def feature_similarity(a: Run | Coder, b: Run | Coder, *, seed: int = 0) -> Similarity:
    """Match the atoms of two dictionaries one to one.

    The pairs are those with the greatest sum of cosines (of |cosines|, where both dictionaries have
    signed codes), by the Hungarian algorithm, whose time grows with the cube of the atoms: some
    seconds for 2,048, ten minutes for 16,384. Between seeds of one method it tells how stable its
    features are.

    Raises:
      UserError: the dictionaries are of rows of different widths.
    """
    one, other = (run.coder if isinstance(run, Run) else run for run in (a, b))
    u, v = (_unit(frame(coder)[0][: len(coder.dictionary.atoms)]) for coder in (one, other))
    if u.shape[1] != v.shape[1]:
        raise UserError(
            f"feature_similarity: rows have {u.shape[1]} entries in one dictionary and "
            f"{v.shape[1]} in the other; they are of different models or hooks"
        )
    signed = _signed(one) and _signed(other)
    left, right, cosine = _matched(u, v, signed=signed)
    turned = v @ scipy.stats.ortho_group.rvs(v.shape[1], random_state=seed)
    control = float(np.abs(_matched(u, turned, signed=signed)[2]).mean())
    order = np.argsort(-np.abs(cosine), kind="stable")
    return Similarity(left[order], right[order], cosine[order], signed, control)


def _unit(atoms: np.ndarray) -> np.ndarray:
    return atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-30)


def _signed(coder: Coder) -> bool:
    """Whether codes are ever negative, by some random rows."""
    d = coder.dictionary.atoms.shape[1]
    rows = np.random.default_rng(0).standard_normal((_TRIED, d)).astype(np.float32)
    codes = coder.encode(coder.normaliser.restore(jnp.asarray(rows)))
    return bool((np.asarray(codes.values) < 0).any())


def _matched(
    u: np.ndarray, v: np.ndarray, *, signed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cosine = u @ v.T
    score = np.abs(cosine) if signed else cosine
    left, right = scipy.optimize.linear_sum_assignment(score, maximize=True)
    return left, right, cosine[left, right]
