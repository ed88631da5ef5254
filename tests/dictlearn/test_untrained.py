"""Controls: where their atoms come from, and that they stay there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dictlearn.dictionary import Dictionary
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.base import Batch
from dictlearn.solvers.untrained import Untrained

KEY = jax.random.key(0)
N, D = 5000, 12


@pytest.fixture
def sample() -> jax.Array:
    """Rows whose covariance prefers some directions by far."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((D, D)) * 2.0 ** -np.arange(D)[:, None]
    return jnp.asarray(rng.standard_normal((N, D)) @ mixing, jnp.float32)


def atoms(kind: str, m: int, sample: jax.Array) -> np.ndarray:
    solver = Untrained(m, OMP(k=1), kind)
    state = solver.init(sample, n_steps=1, key=KEY)
    after, _ = solver.step(state, Batch(sample), key=KEY)
    np.testing.assert_array_equal(after.atoms, state.atoms)
    return np.asarray(solver.result(after)[0].atoms)


def test_data_rows_are_distinct_rows(sample: jax.Array) -> None:
    rows = np.asarray(sample) / np.linalg.norm(sample, axis=1, keepdims=True)
    cosine = atoms("data_rows", 100, sample) @ rows.T
    np.testing.assert_allclose(cosine.max(axis=1), 1, atol=1e-5)
    assert len(set(cosine.argmax(axis=1))) == 100


def test_gaussian_atoms_have_the_covariance_of_the_data(sample: jax.Array) -> None:
    """Directions of normal vectors: compared with directions of vectors drawn by NumPy."""
    ours = atoms("gaussian", 40_000, sample)
    covariance = np.cov(np.asarray(sample, np.float64).T)
    theirs = np.random.default_rng(1).multivariate_normal(np.zeros(D), covariance, 40_000)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    one, other = (rows.T @ rows / len(rows) for rows in (ours, theirs))
    np.testing.assert_allclose(one, other, atol=0.02)
    np.testing.assert_allclose(ours.mean(axis=0), 0, atol=0.02)


def test_random_atoms_prefer_no_direction(sample: jax.Array) -> None:
    ours = atoms("random", 40_000, sample)
    np.testing.assert_allclose(ours.T @ ours / len(ours), np.eye(D) / D, atol=0.005)


def test_principal_directions_are_those_of_the_svd(sample: jax.Array) -> None:
    ours = atoms("pca", 5, sample + 3)
    centred = np.asarray(sample, np.float64) - np.asarray(sample, np.float64).mean(axis=0)
    theirs = np.linalg.svd(centred, full_matrices=False)[2][:5]
    np.testing.assert_allclose(np.abs(np.sum(ours * theirs, axis=1)), 1, atol=1e-4)


def test_only_so_many_principal_directions(sample: jax.Array) -> None:
    solver = Untrained(D + 1, OMP(k=1), "pca")
    with pytest.raises(ValueError, match=f"^n_atoms: {D + 1} is more than the {D} principal"):
        solver.init(sample, n_steps=1, key=KEY)


def test_given_atoms_are_kept_but_for_their_norms(sample: jax.Array) -> None:
    solver = Untrained(3, OMP(k=1), "random")
    given = 5 * jnp.eye(3, D)
    state = solver.init(sample, n_steps=1, key=KEY, start=Dictionary(given, jnp.zeros(D)))
    np.testing.assert_array_equal(state.atoms, jnp.eye(3, D))
