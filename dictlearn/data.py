"""Store -> training statistics and shuffled batches; the split by document."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

from activations.precision import CHUNK_ROWS, DTYPES
from activations.statistics import Moments
from activations.store import Shard, Store
from activations.terminal import UserError
from dictlearn.dictionary import Normaliser
from dictlearn.metrics import Bulk

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of some documents at one hook of a store.

    Attributes:
      documents: their ids, ascending.
      memory: bytes of rows that may be held at once.
      left_out: single rows of theirs that do not count, ascending, by the index of their shard.
    """

    store: Store
    hook: str
    documents: np.ndarray
    memory: int = 2**31
    left_out: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.blocks.count.sum())

    @functools.cached_property
    def blocks(self) -> Blocks:
        """Where the rows lie."""
        parts = []
        for index, shard in enumerate(self.store.manifest.shards):
            start = np.arange(0, shard.rows, CHUNK_ROWS)
            if len(start):
                chosen = self.chosen(shard, self.store.read(shard, "document"))
                count = np.add.reduceat(chosen.astype(np.int64), start)
                parts.append(np.stack([np.full(len(start), index), start, count]))
        shard, start, count = np.concatenate([*parts, np.empty((3, 0), np.int64)], axis=1)
        return Blocks(*(column[count > 0] for column in (shard, start, count)))

    def chosen(self, shard: Shard, document: np.ndarray, start: int = 0) -> np.ndarray:
        """Which rows of a shard from `start` on are among these, given the document of each."""
        # np.isin would go through all documents each time.
        place = np.searchsorted(self.documents, document)
        chosen = self.documents[np.minimum(place, len(self.documents) - 1)] == document
        out = self.left_out.get(shard.index, np.zeros(0, np.int64)) - start
        chosen[out[(out >= 0) & (out < len(chosen))]] = False
        return chosen

    def without_massive(self, norms: np.ndarray, limit: float) -> Rows:
        """These rows without those whose norm, in the order of `by_shard`, is above a limit."""
        left_out, first = {}, 0
        for shard in self.store.manifest.shards:
            rows = np.flatnonzero(self.chosen(shard, self.store.read(shard, "document")))
            massive = rows[norms[first : first + len(rows)] > limit]
            if len(massive):
                left_out[shard.index] = massive
            first += len(rows)
        return dataclasses.replace(self, left_out=left_out)

    def by_shard(
        self, *, gradients: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """All rows in the store's order, a part of a shard at a time.

        Yields:
          x [n d] float32, the place of each row's document in `documents` [n], and its gradient
          [n d] where that was asked for.
        """
        for shard in self.store.manifest.shards:
            document = self.store.read(shard, "document")
            chosen = self.chosen(shard, document)
            if not chosen.any():
                continue
            place = np.searchsorted(self.documents, document)
            start = 0
            parts = self.store.rows(shard, f"activations/{self.hook}")
            along = itertools.repeat(None)
            if gradients:
                along = self.store.rows(shard, f"gradients/{self.hook}")
            for x, gradient in zip(parts, along, strict=False):
                here = slice(start, start + len(x))
                kept = chosen[here]
                if gradient is not None:
                    gradient = gradient[kept].astype(np.float32, copy=False)
                yield x[kept].astype(np.float32, copy=False), place[here][kept], gradient
                start += len(x)

    def batches(
        self, size: int, *, seed: int, gradients: bool = False, state: State | None = None
    ) -> Batches:
        """An endless stream of shuffled batches, every row once an epoch; see `Batches`."""
        return Batches(self, size, seed=seed, gradients=gradients, state=state)

    def whole(self) -> np.ndarray:
        """All rows in the store's order [n d]."""
        x = np.empty((len(self), self.store.width(self.hook)), np.float32)
        first = 0
        for part, _, _ in self.by_shard():
            x[first : first + len(part)] = part
            first += len(part)
        return x

    def sample(self, count: int, *, seed: int) -> np.ndarray:
        """`count` distinct random rows, each as likely (all, where there are fewer) [count d]."""
        n = len(self)
        chosen = np.random.default_rng(seed).choice(n, min(count, n), replace=False)
        parts, first = [], 0
        for x, _, _ in self.by_shard():
            parts.append(x[chosen[(chosen >= first) & (chosen < first + len(x))] - first])
            first += len(x)
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Neighbouring rows that are read at once: their shard, first row, and how many are chosen."""

    shard: np.ndarray
    start: np.ndarray
    count: np.ndarray


# How far a stream is: the rows that it has given. A checkpoint holds it, beside the config.
State = dict[str, Any]

# Batches that may be on their way at once, here and on the device: they too take memory.
_FLYING = 8


class Batches:
    """Shuffled batches x [size d], or (x, gradient), as float32; endless, seeded, resumable.

    Blocks of 256 neighbouring rows are drawn in random order from all shards. As many as half of
    the memory holds (less the batches on their way) make a window, whose rows are shuffled together
    while a thread reads the next one. Where the memory holds all rows, they are read once. What
    does not fill a batch goes into the next one, across windows and epochs. The order depends on
    nothing but the rows, the memory and these arguments, and any batch is found without those
    before it, so that the state is one number.

    Raises:
      UserError: there are no rows; from `next`: a file of the store cannot be read.
    """

    def __init__(
        self, rows: Rows, size: int, *, seed: int, gradients: bool, state: State | None
    ) -> None:
        self._rows, self._size, self._seed = rows, size, seed
        kinds = ("activations", "gradients") if gradients else ("activations",)
        self._names = [f"{kind}/{rows.hook}" for kind in kinds]
        self._dtype = DTYPES[rows.store.manifest.dtype]
        self._width = rows.store.width(rows.hook)
        row_bytes = len(kinds) * self._width * self._dtype.itemsize
        n_blocks = len(rows.blocks.count)
        if not n_blocks:
            raise UserError(f"{rows.store.path}: holds no row of {rows.hook} in these documents")
        flying = _FLYING * len(kinds) * self._width * 4 * size
        room = rows.memory - min(flying, rows.memory // 2)
        self._per_window = max(1, room // 2 // (CHUNK_ROWS * row_bytes))
        if len(rows) * row_bytes <= rows.memory:
            self._per_window = n_blocks
        self._done = int(state["rows"]) if state else 0
        # Two windows take turns in memory that is asked for once: new pages are slow to come by.
        most = min(self._per_window * CHUNK_ROWS, len(rows))
        self._buffers = [
            [np.empty((most, self._width), self._dtype) for _ in self._names]
            for _ in range(1 if self._per_window >= n_blocks else 2)
        ]
        self._reader = ThreadPoolExecutor(1, "read")
        self._mixer = ThreadPoolExecutor(1, "mix")
        self._stream = self._from(self._done)
        self._next = self._mixer.submit(next, self._stream)

    @property
    def state(self) -> State:
        """What `Rows.batches` needs, with the same arguments, to go on from here to the bit."""
        return {"rows": self._done}

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        batch = self._next.result()
        self._done += self._size
        self._next = self._mixer.submit(next, self._stream)
        return tuple(batch) if len(batch) > 1 else batch[0]

    def close(self) -> None:
        """Stop reading ahead, and give the memory back."""
        for pool in (self._mixer, self._reader):
            pool.shutdown(wait=True, cancel_futures=True)
        self._stream.close()
        self._buffers.clear()

    def _from(self, done: int) -> Generator[list[np.ndarray], None, None]:
        """The batches from row `done` of the stream on; on the mixer's thread."""
        plan, buffers = self._plan(done), itertools.cycle(self._buffers)
        own, order = next(plan)
        window = self._reader.submit(self._read, own, next(buffers))
        parts: list[list[np.ndarray]] = []
        missing = self._size
        while True:
            held = window.result()
            own, following = next(plan)
            if len(self._buffers) > 1:  # else all rows are held already
                window = self._reader.submit(self._read, own, next(buffers))
            while len(order):
                chosen, order = order[:missing], order[missing:]
                parts.append([x[chosen].astype(np.float32, copy=False) for x in held])
                missing -= len(chosen)
                if not missing:
                    yield [
                        x[0] if len(x) == 1 else np.concatenate(x) for x in zip(*parts, strict=True)
                    ]
                    parts, missing = [], self._size
            order = following

    def _plan(self, done: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each window from row `done` of the stream on: its blocks, the order of its rows."""
        count = self._rows.blocks.count
        first, row = divmod(done, len(self._rows))
        for epoch in itertools.count(first):
            drawn = np.random.default_rng([self._seed, epoch]).permutation(len(count))
            for window, start in enumerate(range(0, len(count), self._per_window)):
                own = np.sort(drawn[start : start + self._per_window])
                rows = int(count[own].sum())
                if row < rows:
                    random = np.random.default_rng([self._seed, epoch, window + 1])
                    yield own, random.permutation(rows)[row:]
                row = max(0, row - rows)

    def _read(self, own: np.ndarray, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Read a window's blocks into `arrays`, shard after shard; on the reader's thread."""
        filled = 0
        for shard, where in self._by_shard(own):
            documents = self._rows.store.rows(shard, "document", where)
            kept = [
                self._rows.chosen(shard, document, start)
                for document, (start, _) in zip(documents, where, strict=True)
            ]
            for array, name in zip(arrays, self._names, strict=True):
                at = filled
                for x, chosen in zip(self._rows.store.rows(shard, name, where), kept, strict=True):
                    count = int(chosen.sum())
                    array[at : at + count] = x if count == len(x) else x[chosen]
                    at += count
            filled += sum(int(chosen.sum()) for chosen in kept)
        return arrays

    def _by_shard(self, own: np.ndarray) -> Iterator[tuple[Shard, list[tuple[int, int]]]]:
        """The blocks of each shard, as first and last row."""
        blocks, shards = self._rows.blocks, self._rows.store.manifest.shards
        for index in np.unique(blocks.shard[own]):
            start = blocks.start[own[blocks.shard[own] == index]]
            yield shards[index], [(int(at), int(at) + CHUNK_ROWS) for at in start]


def split_by_document(
    store: Store, hook: str, *, validation: float, test: float, seed: int, memory: int = 2**31
) -> dict[str, Rows]:
    """Train, validation and test rows, no document in two of them.

    Documents are taken in random order, first for test, then for validation; one that would take
    more than the rest of the share is left for training.

    Raises:
      UserError: there are too few documents, or they are too unequal, for three parts.
    """
    counts = np.zeros(0, np.int64)
    for shard in store.manifest.shards:
        here = np.bincount(store.read(shard, "document"), minlength=len(counts))
        here[: len(counts)] += counts
        counts = here
    ids = np.flatnonzero(counts)
    counts = counts[ids]
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


def statistics(
    rows: Rows,
    *,
    keep_carriers: bool = False,
    leave_out_massive: bool = False,
    centre: bool = True,
) -> tuple[Rows, Normaliser, Bulk]:
    """The rows to fit, their mean and scale, and what the bulk of the training rows leaves out.

    In float64. The scale is the root mean square of the centred rows' entries, carriers that are
    kept apart, so that x' has on average one unit of variance a dimension. Without `centre` the
    mean counts as 0. What is a carrier or a massive row is judged on all training rows.
    """
    moments = Moments.over(x for x, *_ in rows.by_shard())
    bulk = Bulk(carriers=moments.carriers, norm_limit=moments.norm_limit)
    if leave_out_massive:
        rows = rows.without_massive(np.concatenate(moments.norms), bulk.norm_limit)
        if rows.left_out:
            moments = Moments.over(x for x, *_ in rows.by_shard())
    carriers = np.flatnonzero(bulk.carriers & keep_carriers).astype(np.int32)
    square = moments.variance if centre else moments.variance + moments.mean**2
    scale = float(np.sqrt(np.delete(square, carriers).mean()))
    if not scale > 0:
        raise UserError(f"{rows.store.path}: the training rows of {rows.hook} are all the same")
    mean = jnp.asarray(moments.mean * centre, jnp.float32)
    return rows, Normaliser(mean, jnp.asarray(scale, jnp.float32), jnp.asarray(carriers)), bulk
