"""Store -> training statistics and shuffled batches; the split by document."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from activations.store import Shard, Store
from activations.terminal import UserError
from dictlearn.dictionary import Normaliser
from dictlearn.metrics import Bulk
from dictlearn.metrics import norms as row_norms

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of some documents at one hook of a store.

    Attributes:
      documents: their ids, ascending.
      memory: bytes of rows that may be held at once.
    """

    store: Store
    hook: str
    documents: np.ndarray
    memory: int = 2**31

    def __len__(self) -> int:
        return int(sum(self._chosen(shard).sum() for shard in self.store.manifest.shards))

    def _chosen(self, shard: Shard) -> np.ndarray:
        return np.isin(self.store.read(shard, "document"), self.documents)

    def of_shard(self, shard: Shard) -> np.ndarray:
        """This shard's share of the rows, in the store's order [n d]."""
        return self.store.activations(shard, self.hook)[self._chosen(shard)]

    def by_shard(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every shard's rows [n d] with the place of their document in `documents` [n]."""
        for shard in self.store.manifest.shards:
            document = self.store.read(shard, "document")
            chosen = np.isin(document, self.documents)
            x = self.store.activations(shard, self.hook)[chosen]
            yield x, np.searchsorted(self.documents, document[chosen])

    def batches(self, size: int, *, seed: int) -> Iterator[np.ndarray]:
        """An endless stream of shuffled batches [size d], every row once an epoch.

        Shards are drawn in random order, as many at a time as `memory` holds, and their rows
        shuffled together; what does not fill a batch goes into the next one, across epochs too.
        """
        rng = np.random.default_rng(seed)
        shards = self.store.manifest.shards
        width = self.store.width(self.hook)
        largest = max(shard.rows for shard in shards)
        window = max(1, self.memory // (4 * width * largest))
        whole = self._load(shards) if window >= len(shards) else None
        left = np.empty((0, width), np.float32)
        while True:
            order = rng.permutation(len(shards))
            for first in range(0, len(shards), window):
                chosen = [shards[i] for i in sorted(order[first : first + window])]
                x = self._load(tuple(chosen)) if whole is None else whole
                shuffled = rng.permutation(len(x))
                start = 0
                if len(left):
                    start = min(size - len(left), len(x))
                    left = np.concatenate([left, x[shuffled[:start]]])
                    if len(left) < size:
                        continue
                    yield left
                end = start + (len(x) - start) // size * size
                for at in range(start, end, size):
                    yield x[shuffled[at : at + size]]
                left = x[shuffled[end:]]

    def sample(self, count: int, *, seed: int) -> np.ndarray:
        """`count` distinct random rows, each as likely (all, where there are fewer) [count d]."""
        n = len(self)
        chosen = np.random.default_rng(seed).choice(n, min(count, n), replace=False)
        parts, first = [], 0
        for x, _ in self.by_shard():
            parts.append(x[chosen[(chosen >= first) & (chosen < first + len(x))] - first])
            first += len(x)
        return np.concatenate(parts)

    def _load(self, shards: tuple[Shard, ...]) -> np.ndarray:
        return np.concatenate([self.of_shard(shard) for shard in shards])


def split_by_document(
    store: Store, hook: str, *, validation: float, test: float, seed: int, memory: int = 2**31
) -> dict[str, Rows]:
    """Train, validation and test rows, no document in two of them.

    Documents are taken in random order, first for test, then for validation; one that would take
    more than the rest of the share is left for training.

    Raises:
      UserError: there are too few documents, or they are too unequal, for three parts.
    """
    ids, counts = np.unique(store.column("document"), return_counts=True)
    if len(ids) < 3:
        raise UserError(
            f"{store.path}: holds {len(ids)} document(s); a split into {', '.join(SPLITS)} needs "
            'at least 3. For a text file, set documents_are = "paragraphs" or "lines".'
        )
    free = np.random.default_rng(seed).permutation(len(ids))
    parts = {}
    for name, share in (("test", test), ("validation", validation)):
        room = share * counts.sum()
        taken: list[int] = []
        for index in free:
            if counts[index] <= room:
                taken.append(int(index))
                room -= counts[index]
        if not taken:  # every document is greater than the share: the smallest will do
            taken = [int(free[np.argmin(counts[free])])]
        parts[name] = taken
        free = free[~np.isin(free, taken)]
    parts["train"] = list(free)
    if not parts["train"]:
        raise UserError(
            f"{store.path}: no document is left for training; make data.validation and data.test "
            "smaller, or harvest more text"
        )
    return {name: Rows(store, hook, np.sort(ids[parts[name]]), memory) for name in SPLITS}


def statistics(rows: Rows) -> tuple[Normaliser, Bulk]:
    """Mean and scale of the rows, and what their bulk leaves out, in one pass and float64.

    The scale is the root mean square of the centred rows' entries, so that x' has on average one
    unit of variance a dimension.
    """
    count, norms = 0, []
    width = rows.store.width(rows.hook)
    mean, spread = np.zeros(width), np.zeros(width)
    for x, _ in rows.by_shard():
        if not len(x):
            continue
        norms.append(row_norms(x))
        here = x.mean(axis=0, dtype=np.float64)
        delta = here - mean
        total = count + len(x)
        # Chan's update: exact for parts of any size, and without the cancellation of E[x^2]-E[x]^2
        spread += ((x - here) ** 2).sum(axis=0) + delta**2 * (count * len(x) / total)
        mean += delta * (len(x) / total)
        count = total
    variance = spread / count
    if not variance.sum() > 0:
        raise UserError(f"{rows.store.path}: the training rows of {rows.hook} are all the same")
    scale = np.sqrt(variance.mean())
    normaliser = Normaliser(jnp.asarray(mean, jnp.float32), jnp.asarray(scale, jnp.float32))
    bulk = Bulk(
        carriers=variance > 0.1 * variance.sum(),
        norm_limit=float(5 * np.median(np.concatenate(norms))),
    )
    return normaliser, bulk
