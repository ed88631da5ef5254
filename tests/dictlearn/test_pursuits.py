"""Non-negative OMP, MP, Matryoshka OMP: against plain references a row, SciPy, and their laws."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.matryoshka_omp import MatryoshkaOMP
from dictlearn.encoders.mp import MP
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP


def problem(n: int, m: int, d: int, *, seed: int, coherent: bool = False) -> tuple:
    """Random rows [n d] and unit atoms [m d], in float64; `coherent` atoms share a direction."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d)) + coherent * rng.standard_normal(d)
    return rng.standard_normal((n, d)), atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def encode(encoder: AbstractEncoder, x: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """Codes [n m]."""
    with jax.enable_x64(x.dtype == np.float64):
        dictionary = Dictionary(jnp.asarray(atoms, x.dtype), jnp.zeros(x.shape[1], x.dtype))
        codes = encoder.prepare(dictionary).encode(jnp.asarray(x))
        assert codes.values.dtype == x.dtype
        return np.asarray(codes.dense())


# Non-negative OMP


def lawson_hanson(x: np.ndarray, atoms: np.ndarray, k: int) -> np.ndarray:
    """One row, as the docstring of NonNegativeOMP says; its least squares are SciPy's."""
    z, support = np.zeros(len(atoms)), []
    for _ in range(2 * k):
        correlation = atoms @ (x - z @ atoms)
        correlation[support] = -np.inf
        new = int(np.argmax(correlation))
        if len(support) == k or correlation[new] <= 1e-12 * np.linalg.norm(x):
            break
        support = [*support, new]
        z[:] = 0
        z[support] = scipy.optimize.nnls(atoms[support].T, x)[0]
        support = [i for i in support if z[i] > 0]
    return z


@pytest.mark.parametrize("coherent", [False, True])
@pytest.mark.parametrize(("m", "d", "k"), [(30, 12, 5), (64, 20, 8), (12, 12, 12)])
def test_non_negative_codes_are_those_of_the_rule(m: int, d: int, k: int, coherent: bool) -> None:
    x, atoms = problem(300, m, d, seed=m, coherent=coherent)
    x = x + coherent * 2 * atoms.mean(axis=0)
    ours = encode(NonNegativeOMP(k=k), x, atoms)
    theirs = np.stack([lawson_hanson(row, atoms, k) for row in x])
    assert (ours >= 0).all()
    assert np.isclose(ours, theirs, atol=1e-8).all(axis=1).mean() >= 0.995


def test_without_a_limit_it_is_non_negative_least_squares() -> None:
    x, atoms = problem(200, 15, 15, seed=1)
    ours = encode(NonNegativeOMP(k=15), x, atoms)
    left = np.linalg.norm(x - ours @ atoms, axis=1)
    best = [scipy.optimize.nnls(atoms.T, row)[1] for row in x]
    np.testing.assert_allclose(left, best, rtol=1e-8)


def test_no_positive_correlation_gives_zero_codes() -> None:
    atoms = np.abs(problem(1, 20, 8, seed=2)[1])
    x = -np.abs(problem(50, 1, 8, seed=3)[0])
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(encode(NonNegativeOMP(k=4), x.astype(dtype), atoms), 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_non_negative_fits_are_optimal_on_their_support(dtype: type) -> None:
    """Also with every atom twice, one zero atom, and rows that an atom explains."""
    x, atoms = problem(300, 24, 12, seed=4)
    atoms = np.concatenate([atoms, atoms, np.zeros((1, 12))])
    x[:24] = 3 * atoms[:24]
    x[24] = 0
    x = x.astype(dtype)
    codes = encode(NonNegativeOMP(k=6), x, atoms)
    assert np.isfinite(codes).all()
    assert ((codes != 0).sum(axis=1) <= 6).all()
    residual = x - codes @ atoms
    inner = np.abs(residual @ atoms.T)[codes > 0]
    assert inner.max() < 1e5 * np.finfo(dtype).eps
    np.testing.assert_allclose(residual[:25], 0, atol=1e2 * np.finfo(dtype).eps)
    assert (codes[24] == 0).all()


# MP


def matching_pursuit(x: np.ndarray, atoms: np.ndarray, k: int) -> np.ndarray:
    """One row, as the docstring of MP says."""
    z, r = np.zeros(len(atoms)), x.copy()
    for _ in range(4 * k):
        correlation = atoms @ r
        j = int(np.argmax(np.abs(correlation)))
        if z[j] == 0 and np.count_nonzero(z) == k:
            break
        z[j] += correlation[j]
        r -= correlation[j] * atoms[j]
    return z


@pytest.mark.parametrize(("m", "d", "k"), [(40, 16, 5), (100, 30, 10), (10, 10, 3)])
def test_mp_takes_what_the_rule_takes(m: int, d: int, k: int) -> None:
    x, atoms = problem(500, m, d, seed=m)
    ours = encode(MP(k=k), x, atoms)
    theirs = np.stack([matching_pursuit(row, atoms, k) for row in x])
    assert np.isclose(ours, theirs, atol=1e-9).all(axis=1).mean() >= 0.998
    again = np.stack([matching_pursuit(row, atoms, k) for row in x[:50]]) != 0
    assert (np.abs(atoms @ (x - ours @ atoms).T).T[:50][again] > 1e-6).any()  # not least squares


def test_mp_refitted_is_least_squares_on_the_same_support() -> None:
    x, atoms = problem(300, 60, 20, seed=5)
    plain, refitted = (encode(MP(k=6, refit=refit), x, atoms) for refit in (False, True))
    np.testing.assert_array_equal(plain != 0, refitted != 0)
    for row, codes in zip(x, refitted, strict=True):
        used = codes != 0
        best = np.linalg.lstsq(atoms[used].T, row)[0]
        np.testing.assert_allclose(codes[used], best, rtol=1e-8, atol=1e-10)


def test_mp_of_one_atom_is_omp_of_one_atom() -> None:
    x, atoms = problem(200, 50, 16, seed=6)
    np.testing.assert_allclose(encode(MP(k=1), x, atoms), encode(OMP(k=1), x, atoms), atol=1e-12)


# Both


TOLERANT: dict[str, Callable[..., AbstractEncoder]] = {
    "omp": OMP, "nn_omp": NonNegativeOMP, "mp": MP,
}  # fmt: skip


@pytest.mark.parametrize("make", TOLERANT.values(), ids=TOLERANT)
def test_tolerance(make: Callable[..., AbstractEncoder]) -> None:
    """Rows end where they first are at the tolerance, or at k; whichever comes first."""
    x, atoms = problem(300, 60, 10, seed=7)
    x = np.concatenate([x, np.zeros((1, 10))])
    every = [encode(make(k=k), x, atoms) for k in range(1, 9)]
    left = [np.linalg.norm(x - codes @ atoms, axis=1) for codes in every]
    limit = 0.4 * np.linalg.norm(x, axis=1)
    codes = encode(make(k=8, tolerance=0.4), x, atoms)
    stopped = np.linalg.norm(x - codes @ atoms, axis=1)
    full = (codes != 0).sum(axis=1) == 8
    assert (full | (stopped <= limit * (1 + 1e-12))).all()
    assert (codes[-1] == 0).all()
    assert (stopped <= limit).mean() > 0.5
    if make is OMP:  # greedy: what fewer atoms leave is what it passed on its way
        needed = np.argmax(np.stack(left) <= limit, axis=0)
        reached = (np.stack(left) <= limit).any(axis=0) & (np.arange(len(x)) < 300)
        np.testing.assert_array_equal((codes != 0).sum(axis=1)[reached], needed[reached] + 1)


@pytest.mark.parametrize("make", TOLERANT.values(), ids=TOLERANT)
def test_a_tolerance_alone_needs_no_k(make: Callable[..., AbstractEncoder]) -> None:
    x, atoms = problem(50, 40, 6, seed=8)
    codes = encode(make(tolerance=0.3), np.abs(x), np.abs(atoms))
    assert (codes != 0).sum(axis=1).max() <= 6
    with pytest.raises(ValueError, match=r"^k: neither k nor tolerance"):
        make()


@pytest.mark.parametrize("make", [OMP, NonNegativeOMP, MP])
def test_more_nonzeros_than_atoms_are_refused(make: Callable[..., AbstractEncoder]) -> None:
    dictionary = Dictionary(jnp.eye(4), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"^k: 5 is more than n_atoms = 4"):
        make(k=5).prepare(dictionary)


# Matryoshka


@pytest.mark.parametrize(
    ("k", "smallest", "m", "ends", "shares"),
    [
        (32, 64, 2048, [64, 128, 256, 512, 1024, 2048], [6, 6, 5, 5, 5, 5]),
        (5, 10, 25, [10, 20, 25], [2, 2, 1]),
        (7, 30, 30, [30], [7]),
        (7, 40, 30, [30], [7]),
    ],
)
def test_groups(k: int, smallest: int, m: int, ends: list[int], shares: list[int]) -> None:
    stages = MatryoshkaOMP(k=k, smallest=smallest).stages(m)
    assert [group.stop for group, _ in stages] == ends
    assert [group.start for group, _ in stages] == [0, *ends[:-1]]
    assert [omp.k for _, omp in stages] == shares
    assert sum(shares) == k


def test_each_group_codes_what_those_before_it_left() -> None:
    x, atoms = problem(300, 32, 12, seed=9)
    codes = encode(MatryoshkaOMP(k=5, smallest=8), x, atoms)  # 8, 8, 16 atoms: 2, 2, 1 nonzeros
    left = x
    for group, share in ((slice(0, 8), 2), (slice(8, 16), 2), (slice(16, 32), 1)):
        own = encode(OMP(k=share), left, atoms[group])
        np.testing.assert_allclose(codes[:, group], own, atol=1e-10)
        left = left - own @ atoms[group]


def test_one_group_is_omp() -> None:
    x, atoms = problem(100, 32, 12, seed=10)
    one, two = (encode(e, x, atoms) for e in (MatryoshkaOMP(k=4, smallest=32), OMP(k=4)))
    np.testing.assert_array_equal(one, two)


def test_shares_that_do_not_work_out() -> None:
    with pytest.raises(ValueError, match=r"^k: 2 is fewer than the 3 groups"):
        MatryoshkaOMP(k=2, smallest=8).stages(32)
    with pytest.raises(ValueError, match=r"^k: 30 gives 10 to a group of 8 atoms"):
        MatryoshkaOMP(k=30, smallest=8).stages(32)


def test_matryoshka_takes_the_bias_off_first() -> None:
    x, atoms = problem(40, 32, 12, seed=11)
    bias = jnp.arange(12, dtype=jnp.float32)
    encoder = MatryoshkaOMP(k=4, smallest=16)
    plain = encode(encoder, x.astype(np.float32), atoms)
    shifted = encoder.prepare(Dictionary(jnp.asarray(atoms, jnp.float32), bias))
    codes: SparseCodes = shifted.encode(jnp.asarray(x, jnp.float32) + bias[None])
    np.testing.assert_allclose(codes.dense(), plain, atol=1e-4)
