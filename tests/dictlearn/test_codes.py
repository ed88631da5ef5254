"""SparseCodes against plain matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from dictlearn.codes import SparseCodes


@pytest.fixture
def codes() -> tuple[SparseCodes, np.ndarray]:
    """Random signed codes [40 11] with unused slots, and the same as a plain matrix."""
    rng = np.random.default_rng(0)
    n, m, k = 40, 11, 4
    indices = np.argsort(rng.random((n, m)), axis=1)[:, :k]  # distinct in a row
    values = rng.standard_normal((n, k)).astype(np.float32)
    unused = rng.random((n, k)) < 0.3
    values[unused] = 0
    values[0] = 0
    matrix = np.zeros((n, m), np.float32)
    np.put_along_axis(matrix, indices, values, axis=1)
    indices[unused] = 0  # an unused slot may point anywhere, also at an atom in use
    indices[1], values[1] = 5, [0, -2, 0, 0]
    matrix[1] = -2 * np.eye(m)[5]
    return SparseCodes(jnp.asarray(indices), jnp.asarray(values), n_atoms=m), matrix


def test_dense(codes: tuple[SparseCodes, np.ndarray]) -> None:
    sparse, matrix = codes
    np.testing.assert_array_equal(sparse.dense(), matrix)


def test_decode_is_the_product_with_the_atoms(codes: tuple[SparseCodes, np.ndarray]) -> None:
    sparse, matrix = codes
    atoms = np.random.default_rng(1).standard_normal((11, 6)).astype(np.float32)
    np.testing.assert_allclose(sparse.decode(jnp.asarray(atoms)), matrix @ atoms, atol=1e-6)


def test_l0_counts_negative_values(codes: tuple[SparseCodes, np.ndarray]) -> None:
    sparse, matrix = codes
    assert (matrix < 0).any()
    np.testing.assert_array_equal(sparse.l0(), (matrix != 0).sum(axis=1))
