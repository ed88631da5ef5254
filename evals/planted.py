"""Planted truth: activations with known features in superposition.

`plant` draws the features, `rows` gives any range of the rows they make, and `store` writes rows as
an activation store for `dictlearn.fit`. What a dictionary recovers is told by evals.recovery.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy.sparse
import scipy.special
from jaxtyping import Bool, Float32, Float64, Int
from pydantic import Field

from activations.store import Store
from activations.writer import write_store

HOOK = "planted"
# Rows drawn at once; also a document, so that a fit splits between draws.
BLOCK = 200
_SHARD_BLOCKS = 100
# Norm of a class's row of the readout.
_GAIN = 4.0
# Keeps the draws apart from those of anyone who uses the same seed, e.g. for random atoms.
_SEED_TAG = 0x504C414E

_Share = Annotated[float, Field(ge=0, lt=1)]


@dataclasses.dataclass(frozen=True)
class PlantedConfig:
    """What is planted. Shares of features are rounded to whole features or groups.

    Attributes:
      width: d.
      n_features: F; features are numbered by how often they fire, the most common first.
      mean_active: features that fire in a row, on average.
      zipf: the probability of feature i is proportional to (i + 1)^-zipf, up to `most_common`.
      most_common: the greatest probability of a feature.
      grouped: share of the features that fire in groups: the group is awake in a row with a
        probability of its own, and only then do its members fire, independently.
      group_size: features a group, near one another in frequency.
      cofire: probability of a group's most common member while the group is awake.
      children: share of the features that fire only where their parent does.
      signed: share of the features whose value is + or - with equal chance, as the two ends of an
        antonym pair; the others fire with positive values alone.
      magnitude_sigma: |value| is lognormal with this sigma, and its mean square is 1.
      noise: variance of isotropic Gaussian noise, relative to the features' part of x.
      carrier: share of the variance of one coordinate, which Gaussian values in it alone lift so
        far; massive rows do not count. 0: there is none.
      support: share of the coordinates in which a direction lies; the others are 0.
      massive: share of rows that are massive: a fixed direction is added to them.
      massive_factor: its norm, relative to the root mean square norm of other rows.
      classes: of a linear readout of the rows, whose loss has a gradient; 0: there is none.
    """

    __pydantic_config__ = {"extra": "forbid"}

    width: Annotated[int, Field(gt=3)]
    n_features: Annotated[int, Field(gt=1)]
    mean_active: Annotated[float, Field(gt=0)]
    zipf: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    most_common: Annotated[float, Field(gt=0, lt=1)] = 0.3
    grouped: _Share = 0.2
    group_size: Annotated[int, Field(gt=1)] = 8
    cofire: Annotated[float, Field(gt=0, lt=1)] = 0.5
    children: _Share = 0.2
    signed: _Share = 0.1
    magnitude_sigma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    carrier: _Share = 0.0
    support: Annotated[float, Field(gt=0, le=1)] = 1.0
    massive: _Share = 0.0
    massive_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0
    classes: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def check(self) -> None:
        """Rules that join fields. Raises ValueError that begins with the field."""
        if self.mean_active > self.most_common * self.n_features:
            raise ValueError("mean_active: is more than most_common * n_features")
        rate = self.rates()
        if np.sum(rate <= rate[0] / 2) < round(self.children * self.n_features):
            raise ValueError(
                "children: too few features fire half as often as the most common one; "
                "lower children, or raise zipf"
            )
        if self.grouped + self.children >= 1:
            raise ValueError("grouped: with children, leaves no feature to be a parent")

    def rates(self) -> Float64[np.ndarray, " F"]:
        """Each feature's probability, min(most_common, c (i + 1)^-zipf); mean_active in sum."""
        power = np.arange(1, self.n_features + 1) ** -self.zipf
        low, high = 0.0, self.most_common / power[-1]
        for _ in range(200):  # bisection of c
            middle = (low + high) / 2
            few = np.minimum(self.most_common, middle * power).sum() < self.mean_active
            low, high = (middle, high) if few else (low, middle)
        return np.minimum(self.most_common, high * power)


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """Planted features and the law of the rows: x = codes @ directions + background + noise.

    In a row, each *source* is awake with its probability, independently of the others, and each of
    its members fires with a probability of its own. A source is a feature with its children (the
    feature itself fires with probability 1), or a group.

    Attributes:
      directions: of unit norm, random.
      rate: probability of firing.
      parent, group: of each feature, -1 where it has none. A parent is neither child nor grouped.
      signed: fires with both signs.
      source_rate: probability of each source.
      members: [S F], the probability of each member while its source is awake.
      noise_std: of each coordinate.
      carrier: the coordinate; carrier_std: of what is added there.
      massive: what is added to massive rows, times a normal factor of mean 1 and deviation 0.1.
      readout: [C d]; a row's label is drawn from softmax(readout x). Each class reads 4 features,
        so that some matter to the loss, and most do not.
    """

    config: PlantedConfig
    directions: Float32[np.ndarray, "F d"]
    rate: Float64[np.ndarray, " F"]
    parent: Int[np.ndarray, " F"]
    group: Int[np.ndarray, " F"]
    signed: Bool[np.ndarray, " F"]
    source_rate: Float64[np.ndarray, " S"]
    members: scipy.sparse.csr_array
    noise_std: float
    carrier: int
    carrier_std: float
    massive: Float32[np.ndarray, " d"]
    readout: Float32[np.ndarray, "C d"]

    @property
    def background(self) -> Float32[np.ndarray, "b d"]:
        """Unit directions that are no features: the carrier's and the massive rows', if any."""
        axis = np.eye(1, len(self.massive), self.carrier, dtype=np.float32)
        massive = self.massive[None] / max(float(np.linalg.norm(self.massive)), 1e-30)
        there = [self.carrier_std > 0, self.config.massive > 0]
        return np.concatenate([axis, massive])[there]


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Rows, their true codes (float32 [n F]), which are massive, and labels (0 without readout)."""

    x: Float32[np.ndarray, "n d"]
    codes: scipy.sparse.csr_array
    massive: Bool[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]


def plant(config: PlantedConfig) -> Truth:
    """Draw the features.

    Raises:
      ValueError: the config breaks a rule of its `check`; too few features are rare enough for the
        groups; every coordinate has more than the carrier's share without it.
    """
    config.check()
    n, d = config.n_features, config.width
    rng = np.random.default_rng([_SEED_TAG, config.seed, 0])
    directions = rng.standard_normal((n, d), np.float32)
    if config.support < 1:
        own = np.random.default_rng([_SEED_TAG, config.seed, 3]).random((n, d)).argsort(axis=1)
        directions[own >= max(round(config.support * d), 1)] = 0
    directions = unit(directions)
    signed = np.zeros(n, bool)
    signed[rng.choice(n, round(config.signed * n), replace=False)] = True
    rate = config.rates()

    parent, group = np.full(n, -1), np.full(n, -1)
    child = _some(rng, rate <= rate[0] / 2, round(config.children * n))
    # The most common feature is kept for parents; a group that is awake half the time is no group.
    free = (rate <= config.cofire / 2) & (np.arange(n) > 0)
    free[child] = False
    n_groups = round(config.grouped * n) // config.group_size
    if free.sum() < n_groups * config.group_size:
        raise ValueError("grouped: too few features fire in less than cofire / 2 of the rows")
    grouped = _some(rng, free, n_groups * config.group_size).reshape(n_groups, config.group_size)
    group[grouped] = np.arange(n_groups)[:, None]
    plain = np.setdiff1d(np.arange(n), np.concatenate([child, grouped.ravel()]))
    # A child fires in 10 to 60 % of its parent's rows, or as near as there is a parent for it.
    wanted = np.minimum(rate[child] / rng.uniform(0.1, 0.6, len(child)), rate[0])
    parent[child] = plain[np.searchsorted(-rate[plain], -wanted, side="right") - 1]

    awake = rate[grouped].max(axis=1, initial=0) / config.cofire
    source_rate = np.concatenate([rate[plain], awake])
    source = np.full(n, -1)
    source[plain] = np.arange(len(plain))
    source[child] = source[parent[child]]
    source[grouped] = len(plain) + np.arange(n_groups)[:, None]
    shape = (len(source_rate), n)
    members = scipy.sparse.csr_array((rate / source_rate[source], (source, np.arange(n))), shape)

    variance, mean = _moments(config, directions, rate, signed, source_rate, members)
    noise = config.noise * variance.sum() / d
    carrier = int(rng.integers(d))
    total = variance.sum() + d * noise
    own = variance[carrier] + noise
    lift = (config.carrier * total - own) / (1 - config.carrier) if config.carrier else 0.0
    if lift < 0:
        raise ValueError(f"carrier: every coordinate has a share of about {own / total:.3f} anyway")
    # Massive activations stand in a few fixed coordinates: Sun et al., "Massive Activations in
    # Large Language Models" (2024).
    massive = np.zeros(d, np.float32)
    massive[rng.choice(d, 3, replace=False)] = rng.choice([-1, 1], 3) / np.sqrt(3)
    massive *= config.massive_factor * np.sqrt(total + lift + (mean**2).sum())
    return Truth(
        config, directions, rate, parent, group, signed, source_rate, members,
        float(np.sqrt(noise)), carrier, float(np.sqrt(lift)), massive, _readout(config, directions),
    )  # fmt: skip


def _readout(config: PlantedConfig, directions: np.ndarray) -> np.ndarray:
    """A row [d] a class, along the sum or difference of 4 features."""
    rng = np.random.default_rng([_SEED_TAG, config.seed, 2])
    feature = rng.integers(len(directions), size=(config.classes, 4))
    sign = rng.choice(np.array([-1, 1], np.float32), size=feature.shape)
    return np.float32(_GAIN) * unit(np.einsum("cs,csd->cd", sign, directions[feature]))


def loss(
    truth: Truth, x: np.ndarray, label: np.ndarray
) -> tuple[Float64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
    """Cross-entropy of the labels in nats, and its gradient by each row [d].

    -log p_y and (p - e_y) readout, with p = softmax(readout x).
    """
    logits = np.float64(x) @ truth.readout.T
    p = scipy.special.softmax(logits, axis=1)
    value = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(x)), label]
    p[np.arange(len(x)), label] -= 1
    return value, (p @ truth.readout).astype(np.float32)


def _some(rng: np.random.Generator, among: np.ndarray, count: int) -> np.ndarray:
    """`count` of the features that are marked, ascending."""
    return np.sort(rng.choice(np.flatnonzero(among), count, replace=False))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at unit norm, zero rows left as they are."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _moments(
    config: PlantedConfig,
    directions: np.ndarray,
    rate: np.ndarray,
    signed: np.ndarray,
    source_rate: np.ndarray,
    members: scipy.sparse.csr_array,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact variance and mean [d] of codes @ directions.

    With a the mean of |value|, q the members' probabilities and pi the source's: var(z_i) = p_i -
    (a p_i)^2 where the feature is not signed, and cov(z_i, z_j) = a^2 (pi - pi^2) q_i q_j within a
    source; all other covariances are 0.
    """
    positive = np.where(signed, 0, np.exp(-(config.magnitude_sigma**2) / 2))
    square = np.float64(directions) ** 2
    joint = members * positive  # [S F]
    inside = (joint @ np.float64(directions)) ** 2 - joint**2 @ square
    variance = (rate - (positive * rate) ** 2) @ square
    return variance + (source_rate - source_rate**2) @ inside, (positive * rate) @ directions


def rows(truth: Truth, n: int, *, first: int = 0) -> Sample:
    """Rows `first` to `first + n`, at least one, of the endless stream that a truth makes.

    Any row is the same to the bit whatever range it is asked for in: rows are drawn in blocks of
    200, each from a seed of its own. Rows that a store does not hold serve to score a fit on it.
    """
    parts = []
    for number in range(first // BLOCK, -(-(first + n) // BLOCK)):
        start = number * BLOCK
        here = slice(max(first - start, 0), first + n - start)
        block = _block(truth, number)
        parts.append(
            Sample(block.x[here], block.codes[here], block.massive[here], block.label[here])
        )
    return Sample(
        np.concatenate([part.x for part in parts]),
        scipy.sparse.csr_array(scipy.sparse.vstack([part.codes for part in parts])),
        np.concatenate([part.massive for part in parts]),
        np.concatenate([part.label for part in parts]),
    )


def _block(truth: Truth, number: int) -> Sample:
    """The rows of one block."""
    config = truth.config
    rng = np.random.default_rng([_SEED_TAG, config.seed, 1, number])
    row, feature = _firing(truth, rng)
    sigma = config.magnitude_sigma
    value = np.exp(sigma * rng.standard_normal(len(row)) - sigma**2)
    value[truth.signed[feature] & (rng.random(len(row)) < 0.5)] *= -1
    shape = (BLOCK, config.n_features)
    codes = scipy.sparse.csr_array((value.astype(np.float32), (row, feature)), shape)
    x = codes @ truth.directions
    x += np.float32(truth.noise_std) * rng.standard_normal(x.shape, np.float32)
    x[:, truth.carrier] += np.float32(truth.carrier_std) * rng.standard_normal(BLOCK, np.float32)
    massive = rng.random(BLOCK) < config.massive
    size = 1 + 0.1 * rng.standard_normal(BLOCK, np.float32)
    x[massive] += size[massive, None] * truth.massive
    label = np.zeros(BLOCK, int)
    if config.classes:
        draw = rng.random((BLOCK, 1))
        p = scipy.special.softmax(np.float64(x) @ truth.readout.T, axis=1)
        label = np.minimum((np.cumsum(p, axis=1) < draw).sum(axis=1), config.classes - 1)
    return Sample(x, codes, massive, label)


def _firing(truth: Truth, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(row, feature) of every firing in a block, at a cost of the firings and not of the features.

    A source is awake in a row where a Poisson variable of mean -log(1 - rate) is not 0: all these
    variables are one Poisson number of points, dropped on the pairs of row and source.
    """
    intensity = np.cumsum(-np.log1p(-truth.source_rate))
    n_points = rng.poisson(BLOCK * intensity[-1])
    source = np.searchsorted(intensity, intensity[-1] * rng.random(n_points), side="right")
    source = np.minimum(source, len(intensity) - 1)  # a product rounded up to the last one
    pairs = np.unique(rng.integers(BLOCK, size=n_points) * len(intensity) + source)
    row, source = np.divmod(pairs, len(intensity))
    start, stop = truth.members.indptr[source], truth.members.indptr[source + 1]
    count = stop - start
    place = np.arange(count.sum()) + np.repeat(start - np.cumsum(count) + count, count)
    fires = rng.random(len(place)) < truth.members.data[place]
    return np.repeat(row, count)[fires], truth.members.indices[place][fires]


def store(path: Path, truth: Truth, n_rows: int) -> Store:
    """Write the first rows of a truth as a float32 store with one hook, a document a block.

    With a readout the gradients of its loss stand beside the rows.

    Raises:
      StoreError: a store is there already; the disk is full.
    """
    config = truth.config
    n_documents = -(-n_rows // BLOCK)

    def shards() -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, n_rows, _SHARD_BLOCKS * BLOCK):
            row = np.arange(first, min(first + _SHARD_BLOCKS * BLOCK, n_rows), dtype=np.int32)
            sample = rows(truth, len(row), first=first)
            slope = {}
            if config.classes:
                slope[f"gradients/{HOOK}"] = loss(truth, sample.x, sample.label)[1]
            yield slope | {
                f"activations/{HOOK}": sample.x,
                "token": np.zeros_like(row),
                "document": row // BLOCK,
                "sequence": row // BLOCK,
                "position": row % BLOCK,
            }

    sequences = np.zeros((n_documents, 2, BLOCK), np.int32)
    sequences[:, 1] = np.arange(n_documents)[:, None]
    write_store(
        path, shards(), sequences=sequences, vocabulary={0: ""},
        request={"planted": dataclasses.asdict(config), "n_rows": n_rows},
        model={"description": "planted features"}, corpus={}, forward={},
        hooks={HOOK: config.width}, context_length=BLOCK, n_documents=n_documents,
        shard_sequences=_SHARD_BLOCKS, dropped_positions=(), gradients=config.classes > 0,
    )  # fmt: skip
    return Store(path)
