"""NNLS against SciPy's, and on dictionaries and rows that are awkward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from pydantic import TypeAdapter, ValidationError

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.nnls import NNLS

DTYPES = [np.float32, np.float64]


def encode(nnls: NNLS, atoms: np.ndarray, x: np.ndarray, bias: np.ndarray) -> SparseCodes:
    dictionary = Dictionary(jnp.asarray(atoms), jnp.asarray(bias))
    return nnls.prepare(dictionary).encode(jnp.asarray(x))


def problem(m: int, d: int, dtype: type, *, n: int = 40) -> tuple[np.ndarray, ...]:
    """Atoms, rows and a bias."""
    rng = np.random.default_rng(m)
    shapes = (m, d), (n, d), (d,)
    atoms, x, bias = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return atoms, x, bias


def violation(atoms: np.ndarray, x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How far coordinates over unit atoms would move, of the greatest correlation, for each row."""
    atoms, x, values = (array.astype(np.float64) for array in (atoms, x, values))
    norms = np.linalg.norm(atoms, axis=1)
    unit = atoms / np.where(norms > 0, norms, 1)[:, None]
    z, gradient = values * norms, (values @ atoms - x) @ unit.T
    moves = np.abs(z - np.maximum(z - gradient, 0)).max(axis=1)
    return moves / np.maximum((x @ unit.T).max(axis=1), 1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d"), [(1, 5), (10, 30), (33, 40), (50, 20)])
def test_as_good_as_scipy(m: int, d: int, dtype: type) -> None:
    atoms, x, bias = problem(m, d, dtype)
    tolerance = 1e-5 if dtype is np.float32 else 1e-10
    with jax.enable_x64(dtype is np.float64):
        codes = encode(NNLS(tolerance=tolerance), atoms, x, bias)
    values = np.asarray(codes.values)
    assert values.dtype == dtype
    assert (values >= 0).all()
    for row, ours in zip(x - bias, values, strict=True):
        theirs, error = scipy.optimize.nnls(atoms.T.astype(np.float64), row.astype(np.float64))
        # Where m > d the error may be 0, and the codes need not be the only ones.
        size = np.linalg.norm(row)
        ours_error = np.linalg.norm(row - ours @ atoms)
        np.testing.assert_allclose(ours_error, error, atol=100 * tolerance * size)
        if m < d:
            np.testing.assert_allclose(ours, theirs, atol=200 * tolerance * size)
            np.testing.assert_array_equal(ours[theirs == 0], 0)


def test_zeros_are_exact_and_every_atom_has_its_slot() -> None:
    codes = encode(NNLS(), *problem(20, 30, np.float32))
    np.testing.assert_array_equal(codes.indices, np.tile(np.arange(20), (40, 1)))
    np.testing.assert_array_equal(codes.dense(), codes.values)
    l0 = np.asarray(codes.l0())
    assert 0 < l0.min() <= l0.max() < 20


def awkward() -> tuple[np.ndarray, ...]:
    """Atoms of many norms, more than dimensions, two equal, two opposite, one zero."""
    atoms, x, bias = problem(30, 16, np.float32)
    atoms *= 10 ** np.random.default_rng(1).uniform(-4, 4, (30, 1)).astype(np.float32)
    atoms[3] = 0
    atoms[5], atoms[6] = atoms[4], -atoms[4]
    x[::4] = bias  # rows at the bias
    x[1] = bias + 1e-3 * x[2]
    x[5] = bias + 1e4 * x[2]
    return atoms, x, bias


def test_awkward_atoms_and_rows() -> None:
    atoms, x, bias = awkward()
    values = np.asarray(encode(NNLS(max_sweeps=100_000), atoms, x, bias).values)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[::4], 0)
    np.testing.assert_array_equal(values[:, 3], 0)
    assert (values.max(axis=1) > 0).sum() == 30  # all other rows
    assert violation(atoms, x - bias, values).max() < 3e-4
    for row, ours in zip(x - bias, values.astype(np.float64), strict=True):
        _, error = scipy.optimize.nnls(atoms.T.astype(np.float64), row.astype(np.float64))
        assert np.linalg.norm(row - ours @ atoms) <= error + 1e-2 * np.linalg.norm(row)
    # Scaled rows have scaled codes.
    np.testing.assert_allclose(values[5], 1e7 * values[1], rtol=0.05, atol=1e-2 * values[5].max())


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_tolerance_is_kept_and_used(tolerance: float) -> None:
    """On atoms that all resemble each other, for which few sweeps do not suffice."""
    atoms, x, bias = problem(60, 80, np.float32)
    atoms += 2
    done = np.asarray(encode(NNLS(tolerance=tolerance, max_sweeps=10_000), atoms, x, bias).values)
    assert violation(atoms, x - bias, done).max() <= 1.05 * tolerance
    short = np.asarray(encode(NNLS(tolerance=tolerance, max_sweeps=3), atoms, x, bias).values)
    assert violation(atoms, x - bias, short).max() > tolerance


def test_a_row_has_its_codes_whoever_stands_beside_it() -> None:
    """Among enough rows for several tiles, and at a tolerance that rows reach one after another."""
    atoms, x, bias = problem(24, 30, np.float64, n=700)
    with jax.enable_x64(True):
        nnls = NNLS(tolerance=0.03)
        many, few = encode(nnls, atoms, x, bias).values, encode(nnls, atoms, x[600:], bias).values
        np.testing.assert_allclose(many[600:], few, atol=1e-10)
        np.testing.assert_array_equal(many, encode(nnls, atoms, x, bias).values)


def test_no_rows() -> None:
    atoms, x, bias = problem(4, 3, np.float32)
    assert encode(NNLS(), atoms, x[:0], bias).values.shape == (0, 4)


def test_a_seen_shape_compiles_nothing(compiled: list[str]) -> None:
    one, two = problem(7, 9, np.float32, n=57), problem(7, 9, np.float32, n=57)
    jax.block_until_ready(encode(NNLS(), *one))
    assert compiled
    compiled.clear()
    jax.block_until_ready(encode(NNLS(), -two[0], two[1], two[2]))
    assert not compiled


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"max_sweeps": 0}, "max_sweeps"),
        ({"k": 3}, "k"),
    ],
)
def test_bad_settings(setting: dict[str, float], place: str) -> None:
    with pytest.raises(ValidationError) as error:
        TypeAdapter(NNLS).validate_python(setting)
    assert [problem["loc"] for problem in error.value.errors()] == [(place,)]
