"""Orthogonal matching pursuit: a new token as a sparse combination of shared ones."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from activations.terminal import UserError, progress
from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.omp import OMP
from dictlearn.encoders.pursuit import UnitAtoms, least_squares, unit_atoms
from dictlearn.transplant.problem import Problem

# Rows between two steps of the progress bar; and rows fitted at once when codes are cut.
_ROWS = 4096
_CUT = 256


@dataclasses.dataclass(frozen=True)
class OMPMixing:
    """z = argmin ||t - D^T z|| with at most k nonzeros, found greedily; the new row is B^T z.

    D [a d] are the anchors' rows in the donor's space, t a new token's row there, B [a e] the
    anchors' rows in the base's space. The scale of either space does not matter.

    Attributes:
      k: nonzeros of a token.
      centre: take the anchors' mean out of both spaces first, and put the base's back in.
      normalised: choose by <r, d_i> / ||d_i||, not by <r, d_i> alone.
      whiten: measure by ||r||^2 = r^T S^-1 r, with S the anchors' second moments (their covariance,
        if centred), so that the few directions in which all tokens lie do not count for most.

    Source: "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit"
    (arXiv 2506.06607), section 3; its code neither centres, normalises nor whitens. None of the
    three lowers the bits per byte in both directions between two real models (experiments/LOG.md).
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["omp"] = "omp"
    k: Annotated[int, Field(gt=0)] = 64
    centre: bool = False
    normalised: bool = False
    whiten: bool = False

    def rows(self, problem: Problem, seed: int) -> np.ndarray:
        """The new tokens' rows [n e]."""
        del seed
        return self.mix(problem, self.codes(problem))

    def codes(self, problem: Problem) -> SparseCodes:
        """z [n a] of the new tokens, in the order in which anchors were chosen.

        Raises:
          UserError: k is above the number of anchors.
        """
        if self.k > len(problem.donor):
            raise UserError(
                f"method.k: {self.k} is more than the {len(problem.donor):,} tokens that the "
                "vocabularies share"
            )
        dictionary, targets = self._metric(problem)
        prepared = OMP(k=self.k, normalised=self.normalised).prepare(dictionary)
        # Where no token is new, there are k slots all the same.
        indices, values = [np.empty((0, self.k), np.int32)], []
        with progress(total=len(targets), unit="token", desc="approximating") as bar:
            for start in range(0, len(targets), _ROWS):
                found = prepared.encode(jnp.asarray(targets[start : start + _ROWS]))
                indices.append(np.asarray(found.indices))
                values.append(np.asarray(found.values))
                bar.update(len(indices[-1]))
        return _joined(indices, values, problem)

    def cut(self, problem: Problem, codes: SparseCodes) -> SparseCodes:
        """What `codes` gives for k from its own codes for a greater one: the pursuit is greedy."""
        dictionary, targets = self._metric(problem)
        atoms = unit_atoms(dictionary)
        values = [
            np.asarray(_fit(atoms, jnp.asarray(x), jnp.asarray(chosen)))
            for x, chosen in (
                (targets[at : at + _CUT], codes.indices[at : at + _CUT, : self.k])
                for at in range(0, len(targets), _CUT)
            )
        ]
        return _joined([np.asarray(codes.indices[:, : self.k])], values, problem)

    def mix(self, problem: Problem, codes: SparseCodes) -> np.ndarray:
        """The base's rows [n e] of tokens with these codes."""
        anchors = problem.anchors
        mean = anchors.mean(axis=0) if self.centre else np.zeros(anchors.shape[1], np.float32)
        return np.asarray(codes.decode(jnp.asarray(anchors - mean))) + mean

    def _metric(self, problem: Problem) -> tuple[Dictionary, np.ndarray]:
        """Anchors and new tokens in the space in which residuals are measured."""
        anchors, targets = problem.donor, problem.targets
        if self.centre:
            mean = anchors.mean(axis=0)
            anchors, targets = anchors - mean, targets - mean
        if self.whiten:
            metric = _whitening(anchors)
            anchors, targets = anchors @ metric, targets @ metric
        bias = jnp.zeros(anchors.shape[1], anchors.dtype)
        return Dictionary(jnp.asarray(anchors), bias), targets


def _whitening(x: np.ndarray) -> np.ndarray:
    """S^-1/2 [d d] with S = x^T x / n; directions without variance count for nothing."""
    sizes, directions = np.linalg.eigh(x.T.astype(np.float64) @ x / len(x))
    there = sizes > 1e-9 * sizes.max()
    scale = np.where(there, 1 / np.sqrt(np.where(there, sizes, 1)), 0)
    return ((directions * scale) @ directions.T).astype(np.float32)


@jax.jit
def _fit(atoms: UnitAtoms, x: jax.Array, indices: jax.Array) -> jax.Array:
    values = least_squares(atoms, x, indices, jnp.ones(indices.shape, bool))
    return values / atoms.norms[indices]


def _joined(indices: list[np.ndarray], values: list[np.ndarray], problem: Problem) -> SparseCodes:
    k = indices[0].shape[1]
    return SparseCodes(
        jnp.asarray(np.concatenate(indices)),
        jnp.asarray(np.concatenate([*values, np.empty((0, k), np.float32)])),
        n_atoms=len(problem.donor),
    )
