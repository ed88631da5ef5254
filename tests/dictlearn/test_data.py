"""Rows of a store: the split by document, shuffled batches, training statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from activations.store import Store
from activations.terminal import UserError
from dictlearn.data import SPLITS, Rows, split_by_document, statistics

HOOK = "blocks.0.hook_resid_post"
D = 3
MakeStore = Callable[..., Store]


def shards(sizes: list[int], n_documents: int, *, seed: int = 0) -> list[tuple]:
    """Rows whose first entry counts them through the store, in documents that cross shards."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    x = np.column_stack([np.arange(n), rng.standard_normal((n, D - 1))]).astype(np.float32)
    document = np.sort(rng.integers(0, n_documents, n)) * 10  # ids need not be 0, 1, ...
    return [(x[a:b], document[a:b]) for a, b in itertools.pairwise([0, *np.cumsum(sizes)])]


def number(x: np.ndarray) -> list[int]:
    """Which rows of the store these are."""
    return x[:, 0].astype(int).tolist()


def all_rows(store: Store, *, memory: int = 2**31) -> Rows:
    return Rows(store, HOOK, np.unique(store.column("document")), memory)


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
        found, places = (np.concatenate(column) for column in zip(*rows.by_shard(), strict=True))
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


# Batches


@pytest.mark.parametrize("size", [1, 7, 60, 61, 119, 120])
@pytest.mark.parametrize("held", [1, 55, 110, 10_000])  # rows; shards have at most 50
def test_every_row_once_an_epoch(make_store: MakeStore, size: int, held: int) -> None:
    store = make_store(*shards([40, 30, 50], 12))
    batches = all_rows(store, memory=held * 4 * D).batches(size, seed=0)
    epochs = 3
    taken = list(itertools.islice(batches, -(-120 * epochs // size)))
    assert all(x.shape == (size, D) for x in taken)
    seen = number(np.concatenate(taken))
    for epoch in range(epochs):
        here = seen[120 * epoch : 120 * (epoch + 1)]
        assert sorted(here) == list(range(120))
        assert here != sorted(here)
    assert seen[:120] != seen[120:240]


def test_memory_bounds_the_shards_that_are_mixed(make_store: MakeStore) -> None:
    store = make_store(*shards([40, 40, 40, 40], 12))
    batches = all_rows(store, memory=2 * 40 * 4 * D).batches(80, seed=0)
    windows = [{row // 40 for row in number(next(batches))} for _ in range(20)]
    assert all(len(window) == 2 for window in windows)
    assert len({tuple(sorted(window)) for window in windows}) > 2  # drawn anew each epoch


def test_some_documents_only(make_store: MakeStore) -> None:
    """Also where whole shards, here the second, hold none of them."""
    x = np.column_stack([np.arange(90), np.zeros((90, 2))])
    store = make_store(*((x[s : s + 30], np.full(30, s)) for s in (0, 30, 60)))
    rows = Rows(store, HOOK, np.array([0, 60]), memory=1)
    assert len(rows) == 60
    seen = number(np.concatenate(list(itertools.islice(rows.batches(8, seed=0), 15))))
    expected = [*range(30), *range(60, 90)]
    assert sorted(seen[:60]) == expected
    assert sorted(seen[60:]) == expected


def test_batches_are_seeded(make_store: MakeStore) -> None:
    rows = all_rows(make_store(*shards([40, 30, 50], 12)), memory=50 * 4 * D)
    one, two, other = (
        np.concatenate(list(itertools.islice(rows.batches(32, seed=seed), 9))) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


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
    normaliser, bulk = statistics(trained)
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
    scale = statistics(all_rows(store))[0].scale
    assert scale == pytest.approx(np.sqrt(x.astype(np.float64).var(axis=0).mean()), rel=1e-6)


def test_normalised_rows_have_mean_0_and_unit_variance_a_dimension(make_store: MakeStore) -> None:
    rows = all_rows(make_store(*shards([40, 30, 50], 12)))
    normaliser, _ = statistics(rows)
    x = jnp.concatenate([x for x, _ in rows.by_shard()])
    y = np.asarray(normaliser.normalise(x))
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-5)
    assert y.var(axis=0).mean() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(normaliser.restore(normaliser.normalise(x)), x, atol=1e-4)


def test_constant_rows(make_store: MakeStore) -> None:
    store = make_store(*((np.full((20, D), 0.1), np.arange(20) + s) for s in (0, 20)))
    with pytest.raises(UserError, match=f"training rows of {HOOK} are all the same"):
        statistics(all_rows(store))
