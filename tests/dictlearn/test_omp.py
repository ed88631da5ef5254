"""OMP against scikit-learn, least squares and its own laws."""

import functools
import os
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import orthogonal_mp

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders import omp, omp_cpu, omp_many
from dictlearn.encoders.omp import OMP
from dictlearn.encoders.pursuit import PreparedPursuit, _encode_tiles

# (rows, m, d, k). Tiles hold 1,024 rows: fewer, one more, and not a multiple.
SHAPES = [(700, 64, 32, 5), (1025, 48, 24, 8), (1100, 128, 16, 3), (200, 20, 20, 10)]
# Of laws that mind no shape: compiled once for all of them.
LAWS = (300, 50, 16)


def rough(prepared: PreparedPursuit) -> PreparedPursuit:
    """As with more atoms than an exact Gram matrix fits for."""
    gram = omp_many.rough_gram(prepared.atoms.unit)
    return eqx.tree_at(lambda p: p.atoms.gram, prepared, gram)


def without_gram(prepared: PreparedPursuit) -> PreparedPursuit:
    """As with more atoms than any Gram matrix fits for."""
    return eqx.tree_at(lambda p: p.atoms.gram, prepared, None)


FORMS: dict[str, Callable[[PreparedPursuit, jax.Array], SparseCodes]] = {
    "one by one": PreparedPursuit.encode,
    "batched": lambda prepared, x: _encode_tiles(prepared, x, None),
    "few at a time": lambda prepared, x: rough(prepared).encode(x),
    "batched, no gram": lambda prepared, x: without_gram(prepared).encode(x),
}


def problem(n: int, m: int, d: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows [n d] and unit atoms [m d]."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d))
    return rng.standard_normal((n, d)), atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def dense(codes: SparseCodes) -> np.ndarray:
    """As `codes.dense`, which compiles a dozen programs for every shape."""
    out = np.zeros((len(codes.values), codes.n_atoms), codes.values.dtype)
    np.add.at(out, (np.arange(len(out))[:, None], np.asarray(codes.indices)), codes.values)
    return out


Encode = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def encoding(form: str) -> Encode:
    def encode(x: np.ndarray, atoms: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes [n m] and residuals [n d], in the precision of x."""
        dictionary = Dictionary(jnp.asarray(atoms, x.dtype), jnp.zeros(x.shape[1], x.dtype))
        codes = FORMS[form](OMP(k=k).prepare(dictionary), jnp.asarray(x))
        assert codes.values.dtype == x.dtype
        return dense(codes), x - np.asarray(dictionary.decode(codes))

    return encode


@pytest.fixture(params=FORMS)
def encode(request: pytest.FixtureRequest) -> Encode:
    return encoding(request.param)


def least_squares(x: np.ndarray, atoms: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Norms [n] of what is left of each row by the best fit on its support, in float64."""
    left = []
    for row, used in zip(x.astype(np.float64), codes != 0, strict=True):
        support = atoms[used].astype(np.float64).T
        left.append(row - support @ np.linalg.lstsq(support, row, rcond=1e-10)[0])
    return np.linalg.norm(left, axis=1)


# 10,000 problems: (rows, m, d, k, share of a common direction in the atoms).
MANY = [
    (3000, 64, 32, 5, 0.0), (1025, 48, 24, 8, 0.0), (3000, 128, 16, 3, 0.0),
    (475, 20, 20, 10, 0.0), (1500, 100, 30, 6, 0.5), (1000, 1500, 40, 10, 0.0),
]  # fmt: skip


@functools.cache
def of_scikit_learn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, atoms and codes of one of MANY."""
    n, m, d, k, common = MANY[seed]
    x, atoms = problem(n, m, d, seed=seed)
    atoms = atoms + common * atoms[0]
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return x, atoms, orthogonal_mp(atoms.T, x.T, n_nonzero_coefs=k).T


@pytest.mark.parametrize("form", FORMS)
def test_float64_equals_scikit_learn_on_10_000_problems(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(omp_many, "_FEW", 1500)  # then nothing is left out
    rows = same = 0
    for seed, (n, _, _, k, _) in enumerate(MANY):
        x, atoms, theirs = of_scikit_learn(seed)
        with jax.enable_x64(True):
            ours = encoding(form)(x, atoms, k)[0]
        rows += n
        same += np.isclose(ours, theirs, rtol=1e-9, atol=1e-11).all(axis=1).sum()
    assert rows == 10_000
    # With 16 bits to choose by, atoms that correlate alike may change places.
    assert same / rows >= (0.998 if form == "few at a time" else 0.999)


@pytest.mark.parametrize(("n", "m"), [(1, 511), (63, 1024), (65, 1025), (1023, 2100), (1025, 1023)])
def test_kernels_and_batches_agree(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows fill a tile or a thread's part, and atoms a block."""
    monkeypatch.setattr(omp_many, "_FEW", m)
    x, atoms = problem(n, m, 40, seed=m)
    with jax.enable_x64(True):
        first, *others = (encoding(form)(x, atoms, 6)[0] for form in FORMS)
    for form, other in zip([*FORMS][1:], others, strict=True):
        same = np.isclose(first, other, rtol=1e-7, atol=1e-10).all(axis=1).mean()
        # With 16 bits to choose by, atoms that correlate alike may change places.
        assert same > 0.995 if form == "few at a time" else same == 1, form


@pytest.mark.parametrize("normalised", [True, False])
def test_many_atoms_leave_hardly_more_than_all_looked_at_in_every_round(
    *, normalised: bool
) -> None:
    """4,000 atoms with a common direction and 64 dimensions, 384 of them at hand."""
    x, atoms = problem(600, 4000, 64, seed=30)
    norms = np.random.default_rng(31).uniform(0.5, 2, (4000, 1))
    x, atoms = (x + 2 * atoms[0]).astype(np.float32), (norms * (atoms + 0.5 * atoms[0]))
    dictionary = Dictionary(jnp.asarray(atoms, jnp.float32), jnp.zeros(64))
    prepared = OMP(k=16, normalised=normalised).prepare(dictionary)
    every, few = (FORMS[form](prepared, jnp.asarray(x)) for form in ("batched", "few at a time"))
    left = [np.linalg.norm(x - dictionary.decode(c), axis=1) for c in (every, few)]
    assert left[1].mean() == pytest.approx(left[0].mean(), rel=5e-3)
    same = (np.asarray(every.indices) == np.asarray(few.indices)).mean(axis=0)
    assert same[0] == 1  # all atoms are looked at first
    assert same[1] > 0.9


def test_many_equal_atoms_beside_the_best() -> None:
    """More than a row works on, all as good as each other, and one a little better."""
    rng = np.random.default_rng(32)
    x, better = rng.standard_normal((2, 1, 32)).astype(np.float32)
    atoms = np.repeat(rng.standard_normal((1, 32)).astype(np.float32), 3000, axis=0)
    atoms[1700] = 3 * x[0] + better[0]
    dictionary = Dictionary(jnp.asarray(atoms), jnp.zeros(32))
    codes = rough(OMP(k=3).prepare(dictionary)).encode(jnp.asarray(x))
    assert codes.indices[0, 0] == 1700
    assert int(codes.l0()[0]) == 2  # the copies count once


def test_without_norms_the_longest_correlate_most() -> None:
    """The textbook's rounds with raw correlations, in float64."""
    x, atoms = problem(200, 80, 24, seed=33)
    atoms = atoms * np.random.default_rng(34).uniform(0.2, 3, (80, 1))
    supports, values = np.zeros((200, 5), int), np.zeros((200, 5))
    for row, support, z in zip(x, supports, values, strict=True):
        left = row
        for count in range(1, 6):
            support[count - 1] = np.abs(atoms @ left).argmax()
            chosen = atoms[support[:count]]
            z[:count] = np.linalg.lstsq(chosen.T, row, rcond=None)[0]
            left = row - z[:count] @ chosen
    dictionary = Dictionary(jnp.asarray(atoms, jnp.float32), jnp.zeros(24))
    for form in FORMS.values():
        codes = form(OMP(k=5, normalised=False).prepare(dictionary), jnp.asarray(x, jnp.float32))
        np.testing.assert_array_equal(codes.indices, supports)
        np.testing.assert_allclose(codes.values, values, rtol=1e-3, atol=1e-4)


def test_gram_matrices_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, atoms = problem(50, 40, 16, seed=35)
    dictionary = Dictionary(jnp.asarray(atoms, jnp.float32), jnp.zeros(16))
    with_gram = OMP(k=4).prepare(dictionary)
    monkeypatch.setattr(omp, "_GRAM", 40 * 40 * 4 - 1)
    in_16_bits = OMP(k=4).prepare(dictionary)
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 40 * 40)
    without = OMP(k=4).prepare(dictionary)
    assert with_gram.atoms.gram is not None
    assert with_gram.atoms.gram.dtype == jnp.float32
    assert in_16_bits.atoms.gram is not None
    assert in_16_bits.atoms.gram.dtype == jnp.int16
    assert without.atoms.gram is None
    rows = jnp.asarray(x, jnp.float32)
    for other in (in_16_bits, without):
        np.testing.assert_allclose(
            dense(with_gram.encode(rows)), dense(other.encode(rows)), atol=1e-4
        )


@pytest.mark.parametrize("m", [1, 100, 511, 512, 1025])
def test_a_gram_matrix_in_16_bits_is_that_of_the_atoms(m: int) -> None:
    _, atoms = problem(1, m, 30, seed=36)
    unit = jnp.asarray(atoms / np.linalg.norm(atoms, axis=1, keepdims=True), jnp.float32)
    rough = np.asarray(omp_many.rough_gram(unit)) / 32767
    np.testing.assert_allclose(rough, np.asarray(unit) @ np.asarray(unit).T, atol=2e-5)


def test_the_number_of_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, atoms = problem(700, 100, 24, seed=20)
    codes = []
    for count in (1, 2, 5):
        monkeypatch.setattr(omp_cpu, "threads_at_hand", lambda count=count: count)
        forms = ("one by one", "few at a time")
        codes.append([encoding(form)(x.astype(np.float32), atoms, 7)[0] for form in forms])
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[0], codes[2])


def test_a_row_of_nan_spoils_no_other(encode: Encode) -> None:
    x, atoms = problem(*LAWS, seed=21)
    x = x.astype(np.float32)
    good = encode(x, atoms, 4)[0]
    x[7] = np.nan
    np.testing.assert_array_equal(np.delete(encode(x, atoms, 4)[0], 7, 0), np.delete(good, 7, 0))


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_of_rows_does_not_matter(encode: Encode, scale: float) -> None:
    x, atoms = problem(*LAWS, seed=22)
    x = x.astype(np.float32)
    codes = encode((scale * x).astype(np.float32), atoms, 4)[0]
    np.testing.assert_allclose(codes / scale, encode(x, atoms, 4)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n", "m", "d", "k"), SHAPES)
def test_float32_leaves_as_much_as_scikit_learn(
    encode: Encode, n: int, m: int, d: int, k: int
) -> None:
    x, atoms = problem(n, m, d, seed=5)
    theirs = np.sum((x - orthogonal_mp(atoms.T, x.T, n_nonzero_coefs=k).T @ atoms) ** 2)
    residual = encode(x.astype(np.float32), atoms, k)[1]
    assert np.sum(residual.astype(np.float64) ** 2) == pytest.approx(theirs, rel=1e-4)


def test_residual_is_orthogonal_to_the_support(encode: Encode) -> None:
    x, atoms = problem(*LAWS, seed=6)
    codes, residual = encode(x.astype(np.float32), atoms, 5)
    used = codes != 0
    cosine = residual @ atoms.T / np.linalg.norm(residual, axis=1, keepdims=True)
    assert np.abs(cosine[used]).max() < 1e-5
    assert np.abs(cosine[~used]).max() > 0.1


def test_one_more_nonzero_keeps_the_support(encode: Encode) -> None:
    """Greedy: the first k choices do not depend on how many follow."""
    x, atoms = problem(*LAWS, seed=7)
    few, many = (encode(x.astype(np.float32), atoms, k)[0] != 0 for k in (4, 5))
    assert not (few & ~many).any()
    assert (many.sum(axis=1) == 5).all()


@pytest.mark.parametrize("k", [1, 4])
def test_norms_of_atoms_do_not_matter(encode: Encode, k: int) -> None:
    """Powers of two scale exactly, so the same atoms are chosen."""
    x, atoms = problem(*LAWS, seed=8)
    norms = 2.0 ** np.random.default_rng(9).integers(-8, 9, (50, 1))
    x = x.astype(np.float32)
    (unit, residual), (scaled, other) = encode(x, atoms, k), encode(x, atoms * norms, k)
    np.testing.assert_allclose(scaled * norms.T, unit, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(residual, other, atol=1e-5)


def duplicates(x: np.ndarray, atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x, np.repeat(atoms[: len(atoms) // 2], 2, axis=0)


def low_rank(x: np.ndarray, atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Atoms that span 3 dimensions."""
    return x, atoms[:, :3] @ np.random.default_rng(10).standard_normal((3, x.shape[1]))


@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("hard", [duplicates, low_rank])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dependent_atoms_leave_as_little_as_least_squares(
    encode: Encode,
    hard: Callable[..., tuple[np.ndarray, np.ndarray]],
    k: int,
    dtype: type[np.floating],
) -> None:
    x, atoms = hard(*problem(200, 32, 16, seed=11))
    x, atoms = x.astype(dtype), atoms.astype(dtype)
    with jax.enable_x64(dtype is np.float64):
        codes, residual = encode(x, atoms, k)
    assert np.isfinite(codes).all()
    slack = 20 * np.finfo(dtype).eps * np.linalg.norm(x, axis=1)
    assert (np.linalg.norm(residual, axis=1) <= least_squares(x, atoms, codes) + slack).all()


@pytest.mark.parametrize("angle", [0, 1e-8, 1e-5, 1e-3, 5e-3, 1e-2, 0.1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_near_parallel_atoms(encode: Encode, dtype: type[np.floating], angle: float) -> None:
    """Rows in the plane of two atoms, half along their difference.

    The Gram matrix tells the angle's square to a relative eps / angle^2; refitting the residual
    squares that error. Atoms too close for it are not both taken.
    """
    n, d = 100, 256
    u, v = np.linalg.qr(np.random.default_rng(14).standard_normal((d, 2)))[0].T
    atoms = np.stack([u, np.cos(angle) * u + np.sin(angle) * v]).astype(dtype)
    x = (np.linspace(1, 2, n)[:, None] * (u + v)).astype(dtype)
    with jax.enable_x64(dtype is np.float64):
        codes, residual = encode(x, atoms, 2)
    assert np.isfinite(codes).all()
    epsilon = np.finfo(dtype).eps
    both = (codes != 0).all(axis=1)
    assert both.all() if angle**2 > 100 * epsilon else not both.any()
    slack = 20 * epsilon
    if both.any():  # codes are as great as 1 / angle
        slack = slack / angle + 100 * (epsilon / angle**2) ** 2
    left = np.linalg.norm(residual, axis=1) - least_squares(x, atoms, codes)
    assert (left <= slack * np.linalg.norm(x, axis=1)).all()


def test_more_nonzeros_than_the_rank_reach_the_projection(encode: Encode) -> None:
    x, atoms = low_rank(*problem(200, 32, 16, seed=12))
    codes, residual = encode(x.astype(np.float32), atoms.astype(np.float32), 8)
    projection = np.linalg.pinv(atoms) @ atoms
    np.testing.assert_allclose(residual, x - x @ projection, atol=1e-3)
    assert ((codes != 0).sum(axis=1) <= 4).all()  # 3 dimensions, and one for what rounding leaves


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_that_is_explained_takes_no_more_atoms(
    encode: Encode, dtype: type[np.floating]
) -> None:
    atoms = problem(1, 32, 16, seed=15)[1]
    x = np.linspace(-1000, 1000, 32)[:, None] * atoms
    with jax.enable_x64(dtype is np.float64):
        codes, _ = encode(x.astype(dtype), atoms.astype(dtype), 5)
    np.testing.assert_array_equal(codes != 0, np.eye(32, dtype=bool))


def test_bias_is_taken_off_first(encode: Encode) -> None:
    x, atoms = problem(*LAWS, seed=13)
    bias = jnp.arange(16, dtype=jnp.float32)
    plain = encode(x.astype(np.float32), atoms, 4)[0]
    shifted = OMP(k=4).prepare(Dictionary(jnp.asarray(atoms, jnp.float32), bias))
    codes = shifted.encode(jnp.asarray(x, jnp.float32) + bias[None])
    np.testing.assert_allclose(dense(codes), plain, atol=1e-4)
