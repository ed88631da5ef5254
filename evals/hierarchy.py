"""A hierarchy whose absorption is known by construction: the check without a language model.

    x = sum_i s_i (parent_i + child_i) + noise

Parents fire independently; with a parent fires one of its children, or none; a child has its
parent's size s_i in the row. All directions are orthonormal. The parents are the true probes.

`atoms(truth, share)` is a dictionary in which each child's atom holds that share of its parent:

    atoms = [parent; (child + share parent) / norm],  codes of a row: the child's s norm, and of the
    parent (1 - share) s where a child fires, s where none does.

With share 0 nothing is absorbed; with 1 the parent is silent wherever a child fires; between them
that share of the parent's projection is in the child, in the rows where one fires. SAEBench counts
a share from 0.4 on. There is no other loss: every dictionary explains the rows but for the noise.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np
import scipy.sparse
from jaxtyping import Float, Float32, Int
from pydantic import Field

from dictlearn.dictionary import Coder
from dictlearn.encoders.omp import OMP
from evals.absorption_scores import READINGS, ClassScore, Config, Half, score
from evals.coding import coded, frame
from evals.one_vs_rest import Probe
from evals.recovery import plain_coder

_SEED_TAG = 0x48494552
# Sizes of parents; the probe says yes above half of the smallest.
_SMALLEST, _GREATEST = 0.75, 1.25


@dataclasses.dataclass(frozen=True)
class HierarchyConfig:
    """What is planted.

    Attributes:
      width: d, at least parents * (1 + children).
      children: of each parent. A child must be rare among its parent's rows (some 2 % at most), or
        it is a main feature itself, and absorbs nothing.
      parent_rate, child_rate: probability of a parent, and of a child where its parent fires.
      noise: standard deviation of each coordinate.
    """

    __pydantic_config__ = {"extra": "forbid"}

    width: Annotated[int, Field(gt=1)] = 256
    parents: Annotated[int, Field(gt=0)] = 8
    children: Annotated[int, Field(gt=0)] = 30
    parent_rate: Annotated[float, Field(gt=0, lt=1)] = 0.2
    child_rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.001
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def check(self) -> None:
        """Raises ValueError that begins with the field: the directions are more than the width."""
        if self.parents * (1 + self.children) > self.width:
            raise ValueError("width: is less than parents * (1 + children)")


@dataclasses.dataclass(frozen=True, eq=False)
class Hierarchy:
    """Orthonormal directions; child j of parent i is children[i, j]."""

    config: HierarchyConfig
    parents: Float[np.ndarray, "P d"]
    children: Float[np.ndarray, "P c d"]


@dataclasses.dataclass(frozen=True, eq=False)
class HierarchyRows:
    """Rows, each parent's size in them (0: silent), and which of its children fires (-1: none)."""

    x: Float32[np.ndarray, "n d"]
    size: Float[np.ndarray, "n P"]
    child: Int[np.ndarray, "n P"]


def plant(config: HierarchyConfig) -> Hierarchy:
    """Draw the directions.

    Raises:
      ValueError: see `HierarchyConfig.check`.
    """
    config.check()
    n, d = config.parents * (1 + config.children), config.width
    rng = np.random.default_rng([_SEED_TAG, config.seed, 0])
    directions = np.linalg.qr(rng.standard_normal((d, n)))[0].T
    return Hierarchy(
        config,
        directions[: config.parents],
        directions[config.parents :].reshape(config.parents, config.children, d),
    )


def rows(truth: Hierarchy, n: int, *, draw: int) -> HierarchyRows:
    """`n` rows; another `draw` gives others, independent of them."""
    config = truth.config
    rng = np.random.default_rng([_SEED_TAG, config.seed, 1, draw])
    shape = (n, config.parents)
    size = rng.uniform(_SMALLEST, _GREATEST, shape) * (rng.random(shape) < config.parent_rate)
    child = rng.integers(config.children, size=shape)
    child[(size == 0) | (rng.random(shape) >= config.child_rate)] = -1
    x = size @ truth.parents
    row, parent = np.nonzero(child >= 0)
    # A row may have several children.
    np.add.at(x, row, size[row, parent, None] * truth.children[parent, child[row, parent]])
    x += config.noise * rng.standard_normal(x.shape)
    return HierarchyRows(x.astype(np.float32), size, child)


def atoms(truth: Hierarchy, share: float) -> Float[np.ndarray, "m d"]:
    """Unit atoms: the parents, then their children, each with a share of its parent."""
    children = truth.children + share * truth.parents[:, None]
    return np.concatenate(
        [truth.parents, children.reshape(-1, truth.config.width) / np.hypot(1, share)]
    )


def codes(truth: Hierarchy, here: HierarchyRows, share: float) -> scipy.sparse.csr_array:
    """The codes over `atoms(truth, share)` that give the rows without their noise."""
    n, n_parents = here.size.shape
    row, parent = np.nonzero(here.child >= 0)
    size = here.size[row, parent]
    place = n_parents + parent * truth.config.children + here.child[row, parent]
    children = scipy.sparse.csr_array(
        (size * np.hypot(1, share), (row, place)), (n, n_parents * (1 + truth.config.children))
    )
    left = here.size * np.where(here.child >= 0, 1 - share, 1)
    parents = scipy.sparse.csr_array(left)
    parents.resize(children.shape)
    found = scipy.sparse.csr_array(parents + children)
    found.eliminate_zeros()
    return found


def coder(truth: Hierarchy, share: float) -> Coder:
    """`atoms(truth, share)` under OMP, which stops at the noise and finds these codes."""
    noise = truth.config.noise * np.sqrt(truth.config.width)
    return plain_coder(atoms(truth, share), OMP(tolerance=float(min(2 * noise + 1e-5, 0.5))))


def probe(truth: Hierarchy) -> Probe:
    """The true one: yes where a parent's size is over half of the smallest."""
    return Probe(truth.parents, np.full(len(truth.parents), -_SMALLEST / 2))


def score_synthetic(
    coder: Coder, truth: Hierarchy, *, n_train: int = 8000, n_test: int = 4000, seed: int = 0
) -> dict[str, float | int | None]:
    """Absorption of the parents in a dictionary that was fitted on rows of this hierarchy.

    Arguments:
      seed: of the rows, and of the probe on latents.

    Returns:
      See `figures`.
    """
    train, test = (rows(truth, n, draw=2 * seed + i) for i, n in enumerate((n_train, n_test)))
    w, offset = frame(coder)
    codes = [coded(coder, here.x)[0] for here in (train, test)]
    scale = float(coder.normaliser.scale)
    return figures(truth, train, test, codes, w, offset, unit=scale, seed=seed)


def figures(
    truth: Hierarchy,
    train: HierarchyRows,
    test: HierarchyRows,
    coded: list[scipy.sparse.csr_array],
    atoms: Float[np.ndarray, "m d"],
    offset: Float[np.ndarray, " d"],
    *,
    unit: float = 1.0,
    seed: int = 0,
) -> dict[str, float | int | None]:
    """What `score_synthetic` tells, of codes of the two halves that are given.

    Returns:
      For each reading, as means over parents: `absorption_fraction`, `full_absorption`, the same
      `_where_children_fire` (by construction the share; 1 or 0), and `num_split_features`. Over
      all rows `absorption_fraction` is about child_rate times the share. `n_parents` are counted;
      None where there is none.
    """
    halves = [Half(here.x, f, here.size > 0) for here, f in zip((train, test), coded, strict=True)]
    names = [str(i) for i in range(truth.config.parents)]
    cfg = Config("planted", seed=seed, min_feats_for_eval=1, k_sparse_probe_batch_size=256)
    scores = score(halves[0], halves[1], atoms, offset, probe(truth), names, cfg, unit=unit)
    counted = [one for one in scores if one.reason is None]
    told: dict[str, float | int | None] = {"n_parents": len(counted)}
    for reading in READINGS:
        for where in ("", "_where_children_fire"):
            of = {one.name: _rows_of(one, test, bool(where)) for one in counted}
            fraction = [one.fraction[reading][of[one.name]] for one in counted]
            full = [one.full[reading][of[one.name]] for one in counted]
            told[f"absorption_fraction{where}{reading}"] = _mean_of_means(fraction)
            told[f"full_absorption{where}{reading}"] = _mean_of_means(full)
        splits = [np.array([len(one.main[reading])]) for one in counted]
        told[f"num_split_features{reading}"] = _mean_of_means(splits)
    return told


def _rows_of(one: ClassScore, test: HierarchyRows, with_child: bool) -> np.ndarray:
    """Which of a parent's counted rows are meant."""
    fires = test.child[one.rows, int(one.name)] >= 0
    return fires if with_child else np.ones_like(fires)


def _mean_of_means(values: list[np.ndarray]) -> float | None:
    """Over parents that have rows; None where none has."""
    means = [one.mean() for one in values if len(one)]
    return float(np.mean(means)) if means else None
