"""Rows of a store: the split by document, shuffled batches, training statistics."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activations.precision import DTYPES
from activations.store import Store, StoreError
from activations.terminal import UserError
from dictlearn.data import SPLITS, Batches, Rows, State, split_by_document, statistics

HOOK = "blocks.0.hook_resid_post"
D = 3
MakeStore = Callable[..., Store]


def planted(n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows [n 3] that are numbered by their first two entries, in every type of the store."""
    index = np.arange(n)
    return np.column_stack([index // 256, index % 256, rng.standard_normal(n)]).astype(np.float32)


def number(x: np.ndarray) -> list[int]:
    """Which rows of the store these are."""
    return (x[:, 0] * 256 + x[:, 1]).astype(int).tolist()


def shards(sizes: list[int], n_documents: int, *, seed: int = 0) -> list[tuple]:
    """Numbered rows in documents that cross shards."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    x = planted(n, rng)
    document = np.sort(rng.integers(0, n_documents, n)) * 10  # ids need not be 0, 1, ...
    return [(x[a:b], document[a:b]) for a, b in itertools.pairwise([0, *np.cumsum(sizes)])]


def all_rows(store: Store, *, memory: int = 2**31) -> Rows:
    return Rows(store, HOOK, np.unique(store.column("document")), memory)


def take(rows: Rows, count: int, *, size: int, seed: int, pause: float = 0) -> np.ndarray:
    """The first `count` rows of a stream of batches."""
    with contextlib.closing(rows.batches(size, seed=seed)) as stream:
        taken = []
        for x in itertools.islice(stream, -(-count // size)):
            assert x.shape == (size, rows.store.width(HOOK))
            taken.append(x)
            time.sleep(pause)
    return np.concatenate(taken)[:count]


def through_json(state: State, folder: Path | None = None) -> State:
    text = json.dumps({name: int(value) for name, value in state.items()})
    return {name: np.int64(value) for name, value in json.loads(text).items()}


def through_npz(state: State, folder: Path) -> State:
    np.savez(folder / "state.npz", **state)  # pyright: ignore[reportArgumentType]
    with np.load(folder / "state.npz", allow_pickle=False) as file:
        return {name: file[name][()] for name in file.files}


def through_equinox(state: State, folder: Path) -> State:
    eqx.tree_serialise_leaves(folder / "state.eqx", state)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", {"rows": np.int64(0)})


SAVED = {"json": through_json, "npz": through_npz, "equinox": through_equinox}


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` gives or raises; that it hangs is a failure, not a wait for ever."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"hangs for {seconds} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def drain(stream: Batches, count: int, into: list[np.ndarray]) -> None:
    """Add `count` batches to `into`, or as many as come before an error."""
    for _ in range(count):
        into.append(within(60, lambda: next(stream)))


# Split


@pytest.mark.parametrize("shares", [(0.1, 0.15), (0.3, 0.3), (0.01, 0.5)])
def test_split_is_disjoint_complete_and_keeps_its_shares(
    make_store: MakeStore, shares: tuple[float, float]
) -> None:
    parts_of = shards([400, 300, 500], 60)
    store = make_store(*parts_of)
    validation, test = shares
    parts = split_by_document(store, HOOK, validation=validation, test=test, seed=0)
    assert tuple(parts) == SPLITS
    documents = np.concatenate([parts[name].documents for name in SPLITS])
    np.testing.assert_array_equal(np.sort(documents), np.unique(store.column("document")))
    assert sum(len(part) for part in parts.values()) == len(store) == 1200
    counts = np.unique(store.column("document"), return_counts=True)[1]
    for name, share in (("validation", validation), ("test", test)):
        assert len(parts[name].documents) > 0
        assert len(parts[name]) <= max(share * 1200, counts.min() * 2)
        assert len(parts[name]) >= share * 1200 - counts.max()


def test_rows_are_those_of_their_documents(make_store: MakeStore) -> None:
    parts_of = shards([40, 30, 50], 12)
    x, document = (np.concatenate(column) for column in zip(*parts_of, strict=True))
    parts = split_by_document(make_store(*parts_of), HOOK, validation=0.2, test=0.2, seed=1)
    for rows in parts.values():
        mine = np.isin(document, rows.documents)
        parts = [(x, place) for x, place, _ in rows.by_shard()]
        found, places = (np.concatenate(column) for column in zip(*parts, strict=True))
        np.testing.assert_array_equal(found, x[mine])
        np.testing.assert_array_equal(rows.documents[places], document[mine])


def test_split_is_seeded(make_store: MakeStore) -> None:
    store = make_store(*shards([300], 40))
    one, two, other = (
        split_by_document(store, HOOK, validation=0.1, test=0.15, seed=seed)["test"].documents
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert set(one) != set(other)


def test_a_document_above_every_share_trains(make_store: MakeStore) -> None:
    x = np.zeros((100, D))
    store = make_store((x, np.repeat([0, 1, 2, 3], [91, 4, 3, 2])))
    parts = split_by_document(store, HOOK, validation=0.01, test=0.01, seed=0)
    np.testing.assert_array_equal(parts["test"].documents, [3])  # the smallest will do
    np.testing.assert_array_equal(parts["validation"].documents, [2])
    np.testing.assert_array_equal(parts["train"].documents, [0, 1])


def test_too_few_documents(make_store: MakeStore) -> None:
    store = make_store((np.zeros((10, D)), np.repeat([4, 9], 5)))
    with pytest.raises(UserError, match=r"store: holds 2 document\(s\)"):
        split_by_document(store, HOOK, validation=0.1, test=0.1, seed=0)


def test_nothing_left_for_training(make_store: MakeStore) -> None:
    store = make_store((np.zeros((9, D)), np.repeat([0, 1, 2], 3)))
    with pytest.raises(UserError, match=r"no document is left for training.*data\.validation"):
        split_by_document(store, HOOK, validation=0.2, test=0.7, seed=0)


# Batches: the rows of each epoch

ROW_BYTES = 4 * D
LAYOUTS = {
    "one row": [1],
    "one shard": [700],
    "whole blocks": [512, 256, 768],
    "unequal": [40, 1, 900, 0, 257, 300],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("windows", [0, 1, 2, 99])  # blocks in half of the memory
def test_every_row_once_an_epoch(make_store: MakeStore, layout: str, windows: int) -> None:
    """Also for batches that do not divide, or are larger than a window or an epoch."""
    rows = all_rows(
        make_store(*shards(LAYOUTS[layout], 12)), memory=1 + 2 * windows * 256 * ROW_BYTES
    )
    n = sum(LAYOUTS[layout])
    for size in sorted({1, 7, 256, 600, n, n + 1, 2 * n + 5}):
        if n > 99 and size == 1:
            continue
        seen = number(take(rows, 3 * n + size, size=size, seed=size))
        for epoch in range(3):
            assert sorted(seen[n * epoch : n * (epoch + 1)]) == list(range(n))
        if n > 1:
            assert seen[:n] != seen[n : 2 * n]
            assert seen[:n] != sorted(seen[:n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_store_to_the_bit(make_store: MakeStore, dtype: str) -> None:
    """Partly chosen blocks, and shards (here the second) of which no row is chosen."""
    rng = np.random.default_rng(4)
    sizes = [600, 300, 520]
    x = planted(sum(sizes), rng).astype(DTYPES[dtype])
    document = np.concatenate(
        [rng.choice([1, 2, 3], 600), np.full(300, 9), np.repeat([2, 4], [300, 220])]
    )
    ends = np.cumsum(sizes)[:-1]
    parts = zip(np.split(x, ends), np.split(document, ends), strict=True)
    store = make_store(*parts, dtype=dtype)
    wanted = np.array([1, 3, 4])
    mine = np.isin(document, wanted)
    for memory in (1, 2**31):
        rows = Rows(store, HOOK, wanted, memory)
        assert len(rows) == mine.sum()
        for epoch in take(rows, 2 * len(rows), size=97, seed=0).reshape(2, -1, D):
            assert epoch.dtype == np.float32
            ordered = epoch[np.argsort(number(epoch))]
            np.testing.assert_array_equal(ordered, x[mine].astype(np.float32))


@pytest.mark.parametrize("seed", range(12))
def test_every_row_once_whatever_the_shapes(make_store: MakeStore, seed: int) -> None:
    """Random shards, documents, memory, batches and types, cut and resumed at random places."""
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.integers(0, rng.choice([3, 300, 900]), rng.integers(1, 7))]
    n = sum(sizes) + 1
    store = make_store(
        *shards([*sizes, 1], int(rng.integers(1, 40)), seed=seed),
        dtype=str(rng.choice(list(DTYPES))),
        compression=str(rng.choice(["none", "lzf", "gzip"])),
        gradients=True,
    )
    documents = np.unique(store.column("document"))
    documents = np.sort(rng.choice(documents, int(rng.integers(1, len(documents) + 1)), False))
    wanted = np.flatnonzero(np.isin(store.column("document"), documents)).tolist()
    rows = Rows(store, HOOK, documents, int(rng.choice([1, 2**31, rng.integers(2, 40 * n)])))
    size = int(rng.choice([rng.integers(1, 50), 256, rng.integers(1, 2 * n + 2)]))
    n_batches = -(-3 * len(wanted) // size)
    seen: list[int] = []
    state = None
    while n_batches:
        now = int(rng.integers(1, n_batches + 1))
        n_batches -= now
        with contextlib.closing(rows.batches(size, seed=3, gradients=True, state=state)) as stream:
            for x, gradient in itertools.islice(stream, now):
                assert x.shape == gradient.shape == (size, D)
                np.testing.assert_array_equal(gradient, -x)
                seen += number(x)
            state = through_json(stream.state)
    for epoch in range(3):
        assert sorted(seen[epoch * len(wanted) : (epoch + 1) * len(wanted)]) == wanted


# Batches: their order


def test_order_depends_on_seed_and_memory(make_store: MakeStore) -> None:
    """And not on a stranger's seed, the consumer's speed, or what is read beside the rows."""
    sizes = [700, 300, 512]
    store = make_store(*shards(sizes, 12), gradients=True)
    memory, size, n = 2 * 2 * 256 * ROW_BYTES + 4096, 32, 2 * sum(sizes)
    one = take(all_rows(store, memory=memory), n, size=size, seed=1)
    np.random.seed(0)
    same = take(all_rows(store, memory=memory), n, size=size, seed=1, pause=0.001)
    np.testing.assert_array_equal(one, same)
    assert number(take(all_rows(store, memory=memory), n, size=size, seed=2)) != number(one)
    assert number(take(all_rows(store, memory=memory // 2), n, size=size, seed=1)) != number(one)
    # A row and its gradient take twice the memory: half as many rows fit a window.
    stream = all_rows(store, memory=2 * memory).batches(size, seed=1, gradients=True)
    with contextlib.closing(stream):
        both = np.concatenate([next(stream)[0] for _ in range(-(-n // size))])[:n]
    np.testing.assert_array_equal(both, one)


def test_every_order_is_as_likely(make_store: MakeStore) -> None:
    """Each of 4 rows, in 600 epochs, stands as often at each place: 150 times, give or take 11."""
    rows = all_rows(make_store(*shards([3, 1], 4)))
    order = np.reshape(number(take(rows, 4 * 600, size=400, seed=0)), (600, 4))
    for row in range(4):
        counts = (order == row).sum(axis=0)
        assert np.all(np.abs(counts - 150) < 4 * 11)
    assert len({tuple(epoch) for epoch in order}) == 24


def test_a_window_mixes_rows_of_many_shards(make_store: MakeStore) -> None:
    """Memory for 2 x 8 of 32 blocks, which lie in 8 shards, and a little more."""
    memory = 2 * 8 * 256 * ROW_BYTES + 4096
    rows = all_rows(make_store(*shards([1024] * 8, 50)), memory=memory)
    window = 8 * 256
    seen = np.array(number(take(rows, 8 * window, size=32, seed=0)))
    drawn = seen.reshape(8, window)  # of two epochs
    held = [np.unique(each // 256, return_counts=True) for each in drawn]
    assert all(len(blocks) == 8 and set(counts) == {256} for blocks, counts in held)
    assert all(len(np.unique(each // 1024)) >= 3 for each in drawn)
    # By chance 8 blocks of 32 come from 5.5 of the 8 shards.
    assert np.mean([len(np.unique(each // 1024)) for each in drawn]) > 4.5
    assert len({tuple(blocks) for blocks, _ in held}) == 8  # each epoch draws its own
    # Within a window any row may follow any: of 8 blocks, in one of 8 cases the same one.
    for each in drawn:
        assert 0.09 < np.mean(np.diff(each // 256) == 0) < 0.16
        assert np.mean(np.abs(np.diff(each)) == 1) < 0.01
        for part in each.reshape(4, 512):
            assert np.bincount(np.unique(part // 256, return_inverse=True)[1]).min() > 32


def test_rows_all_in_memory_are_mixed_over_the_whole_store(make_store: MakeStore) -> None:
    rows = all_rows(make_store(*shards([1024] * 4, 50)))
    seen = np.array(number(take(rows, 4096, size=512, seed=0)))
    assert abs(np.corrcoef(seen, np.arange(4096))[0, 1]) < 4 / 64
    for batch in seen.reshape(8, 512):
        np.testing.assert_allclose(np.bincount(batch // 1024, minlength=4), 128, atol=45)


# Batches: their state


@pytest.mark.parametrize("blocks", [0, 2, 99])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("saved", ["json", "npz", "equinox"])
def test_a_resumed_stream_goes_on_to_the_bit(
    make_store: MakeStore, tmp_path: Path, blocks: int, gradients: bool, saved: str
) -> None:
    """Also where an epoch or a window ends, in another process's eyes: a store opened anew."""
    make_store(*shards([700, 1, 300, 512], 12), gradients=gradients, dtype="bfloat16")
    memory = 1 + 2 * blocks * 256 * D * 2 * (1 + gradients)
    size, count = 131, 32  # over 2.7 epochs of 1513 rows

    def stream(state: State | None = None) -> Batches:
        rows = all_rows(Store(tmp_path / "store"), memory=memory)
        return rows.batches(size, seed=5, gradients=gradients, state=state)

    with contextlib.closing(stream()) as whole:
        states, expected = [], []
        for _ in range(count):
            states.append(SAVED[saved](whole.state, tmp_path))
            expected.append(np.asarray(next(whole)))
    cuts = np.random.default_rng(blocks).choice(count - 3, 5, replace=False)
    for cut in (0, 11, *cuts.tolist()):  # 11 * 131 to 12 * 131: the end of the first epoch
        with contextlib.closing(stream(states[cut])) as resumed:
            assert resumed.state == states[cut]
            for batch in expected[cut : cut + 4]:
                np.testing.assert_array_equal(np.asarray(next(resumed)), batch)
            if cut + 4 < count:
                assert resumed.state == states[cut + 4]


def test_state_is_what_was_given_not_what_was_read_ahead(make_store: MakeStore) -> None:
    rows = all_rows(make_store(*shards([700], 12)), memory=1)
    with contextlib.closing(rows.batches(50, seed=0)) as stream:
        for given in range(3):
            time.sleep(0.02)
            assert stream.state == {"rows": 50 * given}
            next(stream)


def test_a_state_far_along_is_small_and_found_at_once(make_store: MakeStore) -> None:
    """2^40 epochs on, which nobody could replay."""
    rows = all_rows(make_store(*shards([700], 12)), memory=1)
    state: State = {"rows": np.int64(700 * 2**40)}
    with contextlib.closing(rows.batches(100, seed=0, state=state)) as stream:
        seen = number(np.concatenate([next(stream) for _ in range(7)]))
        assert sorted(seen) == list(range(700))
        assert stream.state == {"rows": 700 * (2**40 + 1)}
        leaves = jax.tree.leaves(stream.state)
    assert sum(np.asarray(leaf).nbytes for leaf in leaves) <= 64


# Batches: threads


@pytest.mark.parametrize("memory", [1, 2**31])
def test_a_nan_reaches_the_consumer_after_the_rows_before_it(
    make_store: MakeStore, memory: int
) -> None:
    parts = shards([600, 600], 12)
    parts[1][0][300, 2] = np.nan  # in the block of rows 856 to 1111
    rows = all_rows(make_store(*parts), memory=memory)
    got: list[np.ndarray] = []
    with contextlib.closing(rows.batches(50, seed=0)) as stream:
        for _ in range(3):  # once told, it is told again: no batch comes after the error
            with pytest.raises(StoreError, match=r"shard-00001\.h5: row 300 \(token 0\).*NaN"):
                drain(stream, 1200 // 50, got)
            assert stream.state == {"rows": 50 * len(got)}
    seen = number(np.concatenate([np.empty((0, D)), *got]))
    assert len(set(seen)) == len(seen)
    assert not set(seen) & set(range(856, 1112))
    assert (memory == 1) == bool(seen)


@pytest.mark.parametrize("damage", ["removed", "cut", "foreign"])
def test_a_file_lost_after_opening_reaches_the_consumer(make_store: MakeStore, damage: str) -> None:
    store = make_store(*shards([600, 600], 12))
    file = store.path / "shard-00001.h5"
    with contextlib.closing(all_rows(store, memory=1).batches(50, seed=0)) as stream:
        next(stream)
        match damage:
            case "removed":
                file.unlink()
            case "cut":
                os.truncate(file, file.stat().st_size // 2)
            case "foreign":
                file.write_bytes(b"not HDF5")
        with pytest.raises(StoreError, match=r"shard-00001\.h5.*cannot be read"):
            drain(stream, 3 * 1200 // 50, [])


def test_gradients_that_are_not_there(make_store: MakeStore) -> None:
    rows = all_rows(make_store(*shards([30], 3)))
    stream = rows.batches(5, seed=0, gradients=True)
    with contextlib.closing(stream), pytest.raises(StoreError, match="without gradients"):
        drain(stream, 1, [])


def test_an_unknown_hook(make_store: MakeStore) -> None:
    rows = all_rows(make_store(*shards([30], 3)))
    with pytest.raises(StoreError, match=r"no hook 'mlp'; it holds blocks\.0"):
        dataclasses.replace(rows, hook="mlp").batches(5, seed=0)


@pytest.mark.parametrize("taken", [0, 1, 40])
def test_close_ends_the_threads(make_store: MakeStore, taken: int) -> None:
    rows = all_rows(make_store(*shards([600, 600], 12)), memory=1)
    before = set(threading.enumerate())
    stream = rows.batches(50, seed=0)
    for _ in range(taken):
        next(stream)
    assert set(threading.enumerate()) > before
    within(60, stream.close)
    assert set(threading.enumerate()) <= before
    within(60, stream.close)
    assert stream.state == {"rows": 50 * taken}  # a checkpoint may still ask


def test_close_after_an_error_ends_the_threads(make_store: MakeStore) -> None:
    x, document = shards([600], 12)[0]
    x[:] = np.inf
    rows = all_rows(make_store((x, document)), memory=1)
    before = set(threading.enumerate())
    stream = rows.batches(50, seed=0)
    with pytest.raises(StoreError):
        drain(stream, 1, [])
    within(60, stream.close)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_that_is_dropped_is_freed(make_store: MakeStore, closed: bool) -> None:
    """And its windows and threads with it."""
    rows = all_rows(make_store(*shards([600, 600], 12)))
    before = set(threading.enumerate())
    stream = rows.batches(50, seed=0)
    next(stream)
    if closed:
        stream.close()
    freed = weakref.ref(stream)
    del stream
    for _ in range(20):  # a batch may be under way
        gc.collect()
        if freed() is None and set(threading.enumerate()) <= before:
            return
        time.sleep(0.05)
    pytest.fail("is held")


def test_streams_do_not_disturb_each_other(make_store: MakeStore) -> None:
    store = make_store(*shards([700, 300, 512], 12), gradients=True)
    n = 3000
    asked = [(1, 2 * 256 * ROW_BYTES, 64), (2, 1, 50), (1, 2**31, 7), (2, 1, 64)]
    alone = [
        take(all_rows(store, memory=memory), n, size=size, seed=seed)
        for seed, memory, size in asked
    ]
    shared = all_rows(store, memory=1)
    with contextlib.ExitStack() as stack:  # in turns
        streams = [
            stack.enter_context(
                contextlib.closing(
                    dataclasses.replace(shared, memory=memory).batches(size, seed=seed)
                )
            )
            for seed, memory, size in asked
        ]
        parts: list[list[np.ndarray]] = [[] for _ in streams]
        for _ in range(-(-n // min(size for _, _, size in asked))):
            for stream, part in zip(streams, parts, strict=True):
                part.append(next(stream))
    for part, expected in zip(parts, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(part)[:n], expected)
    with ThreadPoolExecutor(2) as pool:  # at the same time, from the same rows
        both = list(pool.map(lambda seed: take(shared, n, size=50, seed=seed), (2, 3)))
    np.testing.assert_array_equal(both[0], alone[1])
    np.testing.assert_array_equal(both[1], take(shared, n, size=50, seed=3))


# Batches: memory


def test_rows_that_fit_the_memory_are_read_once(make_store: MakeStore) -> None:
    """And then stay, for all epochs; with a byte less they are read again."""
    store = make_store(*shards([700, 512], 12))
    n = 1212
    streams = [
        all_rows(store, memory=n * ROW_BYTES - short).batches(50, seed=0) for short in (0, 1)
    ]
    with contextlib.closing(streams[0]) as whole, contextlib.closing(streams[1]) as windows:
        next(whole), next(windows)
        for shard in store.manifest.shards:
            (store.path / shard.file).unlink()
        drain(whole, 3 * n // 50, [])
        with pytest.raises(StoreError, match="cannot be read"):
            drain(windows, 3 * n // 50, [])


@pytest.mark.parametrize("gradients", [False, True])
def test_rows_held_stay_within_the_memory(make_store: MakeStore, gradients: bool) -> None:
    """Of arrays, as numpy tells Python's allocator; a row and its gradient count twice."""
    width, n = 128, 16 * 1024
    x = np.random.default_rng(0).standard_normal((n // 8, width)).astype(np.float32)
    store = make_store(*[(x, np.arange(n // 8))] * 8, gradients=gradients)
    memory = 2**20 * (1 + gradients)
    rows = all_rows(store, memory=memory)
    assert memory * 8 == n * width * 4 * (1 + gradients)
    size = 64
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with contextlib.closing(rows.batches(size, seed=0, gradients=gradients)) as stream:
            for _ in range(2 * n // size):
                next(stream)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    block, batch = 256 * width * 4, size * width * 4 * (1 + gradients)
    assert memory // 2 < peak < memory + 4 * batch + 2 * block + 2**18


READS = """
import contextlib, itertools, json, sys
import numpy as np
from activations.store import Store
from dictlearn.data import Rows

path, memory, gradients = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
store = Store(path)
rows = Rows(store, next(iter(store.manifest.hooks)), np.unique(store.column("document")), memory)
total, size = 0.0, 2048
with contextlib.closing(rows.batches(size, seed=0, gradients=gradients)) as stream:
    for batch in itertools.islice(stream, -(-len(rows) * 5 // 4 // size)):
        total += float((batch[0] if gradients else batch).sum())
# Not ru_maxrss, which begins with the peak of the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps([len(rows), total, int(status["VmHWM"].split()[0]) * 1024]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "gradients"), [("float32", False), ("bfloat16", True)])
def test_a_store_of_ten_times_the_memory(
    make_store: MakeStore, dtype: str, gradients: bool
) -> None:
    """Is read for more than an epoch under the memory and 300 MiB, Python and JAX included."""
    memory, width = 24 * 2**20, 640
    n = memory // (width * DTYPES[dtype].itemsize * (1 + gradients))
    x = np.random.default_rng(0).standard_normal((n, width)).astype(np.float32)
    store = make_store(*[(x, np.arange(n) // 100)] * 10, dtype=dtype, gradients=gradients)
    try:
        assert sum(shard.bytes for shard in store.manifest.shards) >= 10 * memory
        command = [sys.executable, "-c", READS, store.path, str(memory), str(gradients)]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        rows, _, peak = json.loads(done.stdout)
        assert rows == 10 * n
        assert peak < memory + 300 * 2**20
    finally:
        shutil.rmtree(store.path)


# Sample


@pytest.mark.parametrize("held", [1, 10_000])
def test_sample_is_distinct(make_store: MakeStore, held: int) -> None:
    rows = all_rows(make_store(*shards([40, 30, 50], 12)), memory=held * 4 * D)
    sample = number(rows.sample(75, seed=0))
    assert len(set(sample)) == 75
    assert sorted(number(rows.sample(500, seed=0))) == list(range(120))
    assert sample == number(rows.sample(75, seed=0))
    assert sample != number(rows.sample(75, seed=1))


# Statistics


def test_statistics_against_numpy(make_store: MakeStore) -> None:
    """Two shards of very different means, a small spread, a carrier and a massive row."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((600, 40)) + 1e4 * (np.arange(600) >= 250)[:, None] * np.eye(40)[7]
    x[:, 3] *= 1700  # some 8 % of the variance
    x[:, 30] = 5000 + 1e-2 * rng.standard_normal(600)
    x[599] = 1.2e4
    x = x.astype(np.float32)
    document = np.arange(600) // 10
    store = make_store((x[:250], document[:250]), (x[250:], document[250:]))
    trained = Rows(store, HOOK, np.unique(document[document != 3]))
    exact = x[document != 3].astype(np.float64)
    _, normaliser, bulk = statistics(trained)
    np.testing.assert_allclose(normaliser.mean, exact.mean(axis=0), rtol=1e-6)
    assert normaliser.scale == pytest.approx(np.sqrt(exact.var(axis=0).mean()), rel=1e-6)
    share = exact.var(axis=0) / exact.var(axis=0).sum()
    np.testing.assert_array_equal(bulk.carriers, share > 0.1)
    np.testing.assert_array_equal(np.flatnonzero(bulk.carriers), [7])
    assert 0.05 < share[3] < 0.1
    norms = np.linalg.norm(exact, axis=1)
    assert bulk.norm_limit == pytest.approx(5 * np.median(norms), rel=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(~bulk.rows(x)), [599])


def test_spread_does_not_drown_in_a_great_mean(make_store: MakeStore) -> None:
    x = (6e4 + np.random.default_rng(3).integers(-2, 3, (500, D))).astype(np.float32)
    store = make_store((x[:200], np.arange(200)), (x[200:], np.arange(200, 500)))
    scale = statistics(all_rows(store))[1].scale
    assert scale == pytest.approx(np.sqrt(x.astype(np.float64).var(axis=0).mean()), rel=1e-6)


def test_normalised_rows_have_mean_0_and_unit_variance_a_dimension(make_store: MakeStore) -> None:
    rows = all_rows(make_store(*shards([40, 30, 50], 12)))
    _, normaliser, _ = statistics(rows)
    x = jnp.concatenate([x for x, *_ in rows.by_shard()])
    y = np.asarray(normaliser.normalise(x))
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-5)
    assert y.var(axis=0).mean() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(normaliser.restore(normaliser.normalise(x)), x, atol=1e-4)


def test_constant_rows(make_store: MakeStore) -> None:
    store = make_store(*((np.full((20, D), 0.1), np.arange(20) + s) for s in (0, 20)))
    with pytest.raises(UserError, match=f"training rows of {HOOK} are all the same"):
        statistics(all_rows(store))
