"""Laws of the moments: one pass over blocks, in any parts and order, is numpy on the whole."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from activations.precision import DTYPES
from activations.statistics import Moments

N, D = 3000, 24


def plain(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((N, D)) * rng.uniform(0.1, 10, D) + rng.standard_normal(D)


def with_carriers(rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((N, D))
    x[:, [3, 11]] *= 20
    return x


def massive_rows(rng: np.random.Generator) -> np.ndarray:
    """As in a language model: the first rows of a block may be the greatest by far."""
    x = rng.standard_normal((N, D))
    x[[0, 1, 700, 2999]] *= 1e4
    return x


def great_mean(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((N, D)) + 6e4


KINDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    kind.__name__: kind for kind in (plain, with_carriers, massive_rows, great_mean)
}


def rows(kind: str, dtype: str = "float32") -> np.ndarray:
    return KINDS[kind](np.random.default_rng(0)).astype(DTYPES[dtype])


def merged(parts: list[np.ndarray]) -> Moments:
    return functools.reduce(operator.add, map(Moments.of, parts))


def split(x: np.ndarray, n_parts: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Parts of unequal sizes, some of them empty."""
    return np.split(x, np.sort(rng.integers(0, len(x) + 1, n_parts - 1)))


def assert_is(moments: Moments, x: np.ndarray, rtol: float) -> None:
    """That these are the moments of `x`, by numpy in a longer type and two passes."""
    exact = x.astype(np.longdouble)
    variance = exact.var(axis=0)
    assert moments.count == len(x)
    atol = rtol * float(np.abs(exact).max())
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0).astype(float), 0, atol)
    np.testing.assert_allclose(moments.variance, variance.astype(float), rtol, 0)
    np.testing.assert_allclose(moments.deviations, len(x) * variance.astype(float), rtol, 0)
    np.testing.assert_allclose(moments.scale, float(np.sqrt(variance.mean())), rtol, 0)
    np.testing.assert_array_equal(moments.carriers, variance > variance.sum() / 10)
    norms = np.sqrt((exact**2).sum(axis=1))
    found = np.sort(np.concatenate(moments.norms))
    np.testing.assert_allclose(found, np.sort(norms).astype(float), 1e-7, 0)
    assert moments.norm_limit == pytest.approx(5 * float(np.median(norms)), rel=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "with_carriers", "massive_rows"])
def test_one_block_against_numpy(kind: str, dtype: str) -> None:
    x = rows(kind, dtype)
    assert_is(Moments.of(x), x, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_parts", [2, 9, 60, N])
def test_any_partition_gives_the_same(kind: str, n_parts: int) -> None:
    x = rows(kind)
    parts = split(x, n_parts, np.random.default_rng(n_parts))
    # A mean of 6e4 is itself known to 1e-11 of the spread, no better.
    assert_is(merged(parts), x, 1e-11 if kind == "great_mean" else 1e-12)


def test_a_massive_first_row_of_a_block_changes_nothing() -> None:
    x = np.random.default_rng(1).standard_normal((8192, D)).astype(np.float32)
    x[0] = 6e4
    assert_is(Moments.of(x), x, 1e-12)


@pytest.mark.parametrize("kind", ["plain", "with_carriers", "massive_rows"])
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_merging_gives_the_same(kind: str, seed: int) -> None:
    """Random pairs are joined until one is left: a random tree, of random order."""
    rng = np.random.default_rng(seed)
    x = rows(kind)
    parts = [Moments.of(part) for part in split(x, 30, rng)]
    while len(parts) > 1:
        one, two = (parts.pop(int(rng.integers(len(parts)))) for _ in range(2))
        parts.append(one + two)
    assert_is(parts[0], x, 1e-12)


def test_blocks_as_a_store_gives_them_are_no_special_case() -> None:
    """Blocks of 8,192 rows, as the reader has them, and the last one shorter."""
    x = np.random.default_rng(1).standard_normal((20_000, 3)).astype(np.float32)
    assert_is(merged([x[start : start + 8192] for start in range(0, 20_000, 8192)]), x, 1e-12)


def test_a_great_mean_does_not_drown_the_spread() -> None:
    """Rows that differ by 2 and less, 2^23 from zero: a float32 sum of squares would see none."""
    x = (2.0**23 + np.random.default_rng(2).integers(-2, 3, (5000, D))).astype(np.float32)
    for parts in ([x], list(np.array_split(x, 40))):
        exact = (x.astype(np.float64) - 2.0**23).var(axis=0)
        np.testing.assert_allclose(merged(parts).variance, exact, rtol=1e-8)


def test_a_dimension_that_is_constant_has_no_variance() -> None:
    x = rows("massive_rows")
    x[:, 5] = 0.1
    for moments in (Moments.of(x), merged(list(np.array_split(x, 7)))):
        assert moments.deviations[5] == pytest.approx(0, abs=1e-25)
        assert moments.mean[5] == pytest.approx(np.float32(0.1), rel=1e-15)
        assert not moments.carriers[5]
        assert np.all(moments.deviations >= 0)


def test_nothing_changes_by_an_empty_block() -> None:
    x = rows("plain")
    empty, whole = Moments.of(x[:0]), Moments.of(x)
    assert empty.count == 0
    for moments in (empty + whole, whole + empty, empty + empty + whole + empty):
        for name in ("count", "mean", "deviations", "norm_limit", "scale"):
            np.testing.assert_array_equal(getattr(moments, name), getattr(whole, name))
    assert (empty + empty).count == 0


def test_one_row() -> None:
    x = np.array([[3, -4, 0]], np.float32)
    moments = Moments.of(x)
    assert moments.count == 1
    np.testing.assert_array_equal(moments.mean, [3, -4, 0])
    np.testing.assert_array_equal(moments.variance, [0, 0, 0])
    assert moments.scale == 0
    assert moments.norm_limit == 25
    assert not moments.carriers.any()


def test_two_rows_by_hand() -> None:
    for moments in (
        Moments.of(np.array([[1, 0], [5, 0]], np.float32)),
        Moments.of(np.array([[1, 0]], np.float32)) + Moments.of(np.array([[5, 0]], np.float32)),
    ):
        np.testing.assert_array_equal(moments.mean, [3, 0])
        np.testing.assert_array_equal(moments.deviations, [8, 0])
        np.testing.assert_array_equal(moments.variance, [4, 0])
        assert moments.scale == pytest.approx(np.sqrt(2))
        assert moments.norm_limit == 15
        np.testing.assert_array_equal(moments.carriers, [True, False])


def test_bfloat16_is_taken_at_its_value() -> None:
    x = rows("plain", "bfloat16")
    assert x.dtype == ml_dtypes.bfloat16
    one, other = Moments.of(x), Moments.of(x.astype(np.float32))
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.deviations, other.deviations)
    assert one.mean.dtype == one.deviations.dtype == np.float64


def test_the_input_is_left_as_it_is() -> None:
    x = rows("massive_rows")
    before = x.copy()
    Moments.of(x)
    np.testing.assert_array_equal(x, before)
    x64 = before.astype(np.float64)
    Moments.of(x64)
    np.testing.assert_array_equal(x64, before.astype(np.float64))


@pytest.mark.parametrize("block", [1, 100, N])
def test_planted_carriers_are_found(block: int) -> None:
    """Variance of 24 dimensions: 20 of 1, one of 7, one of 13, one of 30, one of no variance.

    The sum is 70, and so a carrier holds more than 7.
    """
    rng = np.random.default_rng(3)
    x = rng.standard_normal((N, D))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    x[:, 2] *= np.sqrt(6.9)
    x[:, 9] *= np.sqrt(13)
    x[:, 17] *= np.sqrt(30)
    x[:, 20] = 500  # great, but the same in every row
    moments = merged([x[start : start + block] for start in range(0, N, block)])
    np.testing.assert_array_equal(np.flatnonzero(moments.carriers), [9, 17])
    x[:, 2] *= np.sqrt(8.5 / 6.9)  # of 71.6
    np.testing.assert_array_equal(np.flatnonzero(Moments.of(x).carriers), [2, 9, 17])


@pytest.mark.parametrize("block", [1, 100, N])
def test_planted_massive_rows_are_found(block: int) -> None:
    """Norms between 1 and 3 with a median of 2; 5 medians are 10."""
    rng = np.random.default_rng(4)
    norms = np.linspace(1, 3, N)
    norms[-3:] = [9.99, 10.01, 700]  # the median is left where it is
    norms = rng.permutation(norms)
    direction = rng.standard_normal((N, D))
    x = norms[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    moments = merged([x[start : start + block] for start in range(0, N, block)])
    massive = np.concatenate(moments.norms) > moments.norm_limit
    np.testing.assert_array_equal(massive, norms > 10)
    assert massive.sum() == 2
