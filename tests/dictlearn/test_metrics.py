"""Metrics against plain numpy, scikit-learn and cases with a known answer."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import r2_score

from dictlearn.metrics import (
    Bulk,
    Sums,
    bootstrap,
    coherence,
    cosine,
    fvu,
    fvu_bulk,
    nearest_cosine,
    twins,
)

D = 5


def rows(n: int = 300, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows far from the origin, and reconstructions of them."""
    rng = np.random.default_rng(seed)
    x = 100 + rng.standard_normal((n, D)) * np.arange(1, D + 1)
    return x.astype(np.float32), (x + 0.3 * rng.standard_normal((n, D))).astype(np.float32)


def test_fvu_is_one_less_r2() -> None:
    x, x_hat = rows()
    r2 = r2_score(np.float64(x), np.float64(x_hat), multioutput="variance_weighted")
    assert fvu(x, x_hat) == pytest.approx(1 - r2, rel=1e-9)
    assert fvu(x, x) == 0
    assert fvu(x, np.broadcast_to(x.mean(axis=0), x.shape)) == pytest.approx(1, rel=1e-6)


def test_fvu_bulk_leaves_out_massive_rows_and_carriers() -> None:
    x, x_hat = rows()
    bulk = Bulk(carriers=np.arange(D) == 2, norm_limit=5 * float(np.median(np.abs(x))) * D)
    x[7] *= 1e4
    x_hat[:, 2] = 0
    rest = np.delete(np.arange(len(x)), 7)
    expected = fvu(np.delete(x[rest], 2, 1), np.delete(x_hat[rest], 2, 1))
    assert fvu_bulk(x, x_hat, bulk) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(np.flatnonzero(~bulk.rows(x)), [7])


def test_sums_give_the_fvu_and_add_up() -> None:
    x, x_hat = rows()
    document = np.random.default_rng(1).choice([0, 1, 3, 6], len(x))  # 2, 4 and 5 have no rows
    whole = Sums.of(x, x_hat, document, 7)
    assert whole.fvu()[0] == pytest.approx(fvu(x, x_hat), rel=1e-6)
    parts = [slice(0, 10), slice(10, 10), slice(10, None)]
    a, b, c = (Sums.of(x[p], x_hat[p], document[p], 7) for p in parts)
    for name in ("count", "error", "square", "total"):
        np.testing.assert_allclose(getattr(a + b + c, name), getattr(whole, name), rtol=1e-12)
    np.testing.assert_array_equal(whole.count, np.bincount(document, minlength=7))


def test_weights_choose_documents() -> None:
    x, x_hat = rows()
    document = np.arange(len(x)) % 4
    sums = Sums.of(x, x_hat, document, 4)
    twice = np.concatenate([np.flatnonzero(document == 1)] * 2 + [np.flatnonzero(document == 3)])
    values = sums.fvu(np.array([[0.0, 2, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert values[0] == pytest.approx(fvu(x[twice], x_hat[twice]), rel=1e-6)
    assert values[1] == pytest.approx(fvu(x, x_hat), rel=1e-6)
    assert np.isnan(values[2])


def test_cosine() -> None:
    x, x_hat = rows(20)
    x_hat[3] = 0
    x[4] = 0
    x_hat[5] = -x[5]
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1)
    expected = np.einsum("nd,nd->n", x, x_hat) / np.maximum(size, 1)
    np.testing.assert_allclose(cosine(x, x_hat), expected, atol=1e-6)
    np.testing.assert_allclose(cosine(x, x_hat)[3:6], [0, 0, -1], atol=1e-6)


@pytest.mark.parametrize("m", [2, 40, 300])  # 300: more than one batch of rows
def test_nearest_cosine_against_numpy(m: int) -> None:
    atoms = np.random.default_rng(2).standard_normal((m, D)).astype(np.float32)
    atoms *= np.geomspace(1e-3, 1e3, m, dtype=np.float32)[:, None]
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    expected = np.abs(unit @ unit.T)
    np.fill_diagonal(expected, 0)
    nearest = nearest_cosine(jnp.asarray(atoms))
    np.testing.assert_allclose(nearest, expected.max(axis=1), atol=1e-5)
    assert coherence(jnp.asarray(atoms)) == pytest.approx(expected.max(), abs=1e-5)
    assert twins(jnp.asarray(atoms)) == pytest.approx((expected.max(axis=1) > 0.95).mean())


def test_twins_are_found_whatever_their_sign_and_norm() -> None:
    atoms = jnp.eye(6).at[1].set(-3 * jnp.eye(6)[0]).at[5].set(0)
    np.testing.assert_allclose(nearest_cosine(atoms), [1, 1, 0, 0, 0, 0], atol=1e-6)
    assert twins(atoms) == pytest.approx(2 / 6)
    assert coherence(atoms) == pytest.approx(1)
    assert coherence(atoms[:1]) == 0


def mean_of(values: np.ndarray) -> tuple[float, float]:
    return bootstrap(lambda w: w @ values / w.sum(axis=1), len(values), seed=0)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    """Means of 50 normals: 95 % +- 4 standard errors over 400 draws, less the bootstrap's bias."""
    rng = np.random.default_rng(3)
    intervals = np.array([mean_of(rng.standard_normal(50)) for _ in range(400)])
    covered = ((intervals[:, 0] < 0) & (intervals[:, 1] > 0)).mean()
    assert 0.90 < covered < 0.98
    width = np.mean(intervals[:, 1] - intervals[:, 0])
    assert width == pytest.approx(2 * 1.96 / np.sqrt(50), rel=0.05)


def test_bootstrap_of_equal_documents_has_no_width() -> None:
    x, x_hat = rows(30)
    repeated = Sums.of(np.tile(x, (8, 1)), np.tile(x_hat, (8, 1)), np.repeat(np.arange(8), 30), 8)
    low, high = bootstrap(repeated.fvu, 8, seed=0)
    assert low == pytest.approx(fvu(x, x_hat), rel=1e-6)
    assert high - low < 1e-9


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(4).standard_normal(30)
    one, two, other = (
        bootstrap(lambda w: w @ values, 30, seed=seed, n_draws=100) for seed in (1, 1, 2)
    )
    assert one == two
    assert one != other
    wide = bootstrap(lambda w: w @ values, 30, seed=1, n_draws=100, level=0.99)
    assert wide[0] < one[0] < one[1] < wide[1]
