"""Activations against plain definitions, by XLA and on the host; linear encoders; regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.activations import (
    AbsTopK,
    AbstractActivation,
    Gated,
    GradientTopK,
    JumpReLU,
    ReLU,
    TopK,
)
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared
from dictlearn.encoders.linear import TILE, Linear, Tied, regress

N, M = 30, 100  # more atoms than a kernel's buffer holds at small k


def best(score: np.ndarray, k: int) -> np.ndarray:
    """Which entries are among the k greatest of their row; of equals, the first ones."""
    kept = np.zeros(score.shape, bool)
    for row in range(len(score)):
        order = sorted(range(score.shape[1]), key=lambda j: -score[row, j])  # stable
        kept[row, order[:k]] = True
    return kept


def thresholds(dtype: type) -> np.ndarray:
    """Some are below zero, one is out of reach."""
    theta = np.random.default_rng(5).uniform(-1, 1, M).astype(dtype)
    theta[7] = 1e9
    return theta


def gates(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset; some offsets are below zero, so that an open gate may give nothing."""
    rng = np.random.default_rng(7)
    return rng.uniform(0.5, 2, M).astype(dtype), rng.uniform(-1, 1, M).astype(dtype)


def gated(u: np.ndarray, gain: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return (u > 0) * np.maximum(gain * u + offset, 0)


# name -> (k, dtype) -> the activation and, in plain numpy, its dense codes.
Reference = Callable[[np.ndarray], np.ndarray]
KINDS: dict[str, Callable[[int, type], tuple[AbstractActivation, Reference]]] = {
    "topk": lambda k, dtype: (TopK(k), lambda u: np.where(best(u, k) & (u > 0), u, 0)),
    "abs_topk": lambda k, dtype: (AbsTopK(k), lambda u: np.where(best(abs(u), k), u, 0)),
    "relu": lambda k, dtype: (ReLU(), lambda u: np.where(u > 0, u, 0)),
    "jumprelu": lambda k, dtype: (
        JumpReLU(jnp.asarray(thresholds(dtype))),
        lambda u: np.where((u > 0) & (u > thresholds(dtype)), u, 0),
    ),
    "gated": lambda k, dtype: (
        Gated(*map(jnp.asarray, gates(dtype))),
        lambda u: gated(u, *gates(dtype)),
    ),
    "gradient_topk": lambda k, dtype: (
        GradientTopK(k, 1.0, jnp.asarray(2.0, dtype)),
        lambda u: np.where(best(u, k) & (u > 0), u, 0),
    ),
}


def normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, M))


def some_zero() -> np.ndarray:
    u = normal()
    u[::3] = 0
    return u


# Pre-activations that are hard in one way each.
HARD: dict[str, Callable[[], np.ndarray]] = {
    "normal": normal,
    "ties": lambda: np.round(2 * normal()),
    "all equal": lambda: np.ones((N, M)),
    "zero rows": some_zero,
    "all negative": lambda: -np.abs(normal()) - 0.1,
    "one positive": lambda: np.where(np.arange(M)[None] == 71, 1.0, -np.abs(normal())),
    "ascending": lambda: np.tile(np.arange(M, dtype=float), (N, 1)) - 3,
    "great and small": lambda: normal() * 10.0 ** np.linspace(-30, 30, N)[:, None],
}


@pytest.fixture(params=[np.float32, np.float64])
def dtype(request: pytest.FixtureRequest) -> Iterator[type]:
    with jax.enable_x64(request.param is np.float64):
        yield request.param


def dense(codes: SparseCodes) -> np.ndarray:
    """The codes as a matrix, having seen that they are whole."""
    indices, values = np.asarray(codes.indices), np.asarray(codes.values)
    assert indices.shape == values.shape
    assert ((indices >= 0) & (indices < codes.n_atoms)).all()
    for row, used in zip(indices, values != 0, strict=True):
        assert len(set(row[used])) == used.sum()
    out = np.zeros((len(values), codes.n_atoms), values.dtype)
    np.add.at(out, (np.arange(len(values))[:, None], indices), values)
    return out


def both(
    activation: AbstractActivation, u: np.ndarray, projection: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Dense codes by XLA and by the host."""
    along = None if projection is None else jnp.asarray(projection)
    by_xla = activation(jnp.asarray(u), along)
    on_host = activation.on_cpu(u, projection)
    assert by_xla.n_atoms == on_host.n_atoms == u.shape[1]
    assert by_xla.values.dtype == on_host.values.dtype == u.dtype
    return dense(by_xla), dense(on_host)


@pytest.mark.parametrize("k", [1, 5, M])
@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_definition(kind: str, hard: str, k: int, dtype: type) -> None:
    u = HARD[hard]().astype(dtype)
    activation, reference = KINDS[kind](k, dtype)
    for codes in both(activation, u):
        np.testing.assert_array_equal(codes, reference(u))


@pytest.mark.parametrize("kind", ["topk", "abs_topk", "gradient_topk"])
def test_capacity_is_k(kind: str) -> None:
    activation, _ = KINDS[kind](7, np.float32)
    u = normal().astype(np.float32)
    assert activation(jnp.asarray(u)).values.shape == (N, 7)
    assert activation.on_cpu(u, None).values.shape == (N, 7)


def test_a_gate_opens_by_u_and_gives_by_both(dtype: type) -> None:
    """Closed; open, with and without something behind it; and what a shut one would have given."""
    u = np.array([[-1, 0, 1, 1, -1]], dtype)
    gain, offset = (np.array(array, dtype) for array in ([2, 2, 2, 2, -9], [5, 5, 1, -3, 0]))
    for codes in both(Gated(jnp.asarray(gain), jnp.asarray(offset)), u):
        np.testing.assert_array_equal(codes, [[0, 0, 3, 0, 0]])


def with_positives(counts: list[int]) -> np.ndarray:
    """Rows with so many entries above 0."""
    rng = np.random.default_rng(1)
    u = -rng.uniform(0.1, 1, (len(counts), M))
    for row, count in enumerate(counts):
        u[row, rng.permutation(M)[:count]] *= -1
    return u.astype(np.float32)


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [3, 9], [64, 65], [M, 2], [M, M]])
@pytest.mark.parametrize("jump", [False, True])
def test_no_row_is_ever_cut(jump: bool, counts: list[int]) -> None:
    """Room for the fullest row, less than twice what it needs; the parts of a fit may differ."""
    u = with_positives(counts)
    activation = JumpReLU(jnp.full(M, 0.05)) if jump else ReLU()
    most = max(counts)
    for codes in (activation(jnp.asarray(u)), activation.on_cpu(u, None)):
        np.testing.assert_array_equal(codes.l0(), counts)
        room = codes.values.shape[1]
        assert most <= room <= max(1, min(2 * most - 1, M))


@pytest.mark.parametrize("jump", [False, True])
def test_traced_there_is_room_for_all(jump: bool) -> None:
    activation = JumpReLU(jnp.full(M, 0.05)) if jump else ReLU()
    traced = jax.jit(lambda u: activation(u))
    codes = traced(jnp.asarray(with_positives([0, 3])))
    assert codes.values.shape == (2, M)
    u = with_positives([M, 40])
    np.testing.assert_array_equal(dense(traced(jnp.asarray(u))), np.maximum(u, 0))


# GradientTopK


def projections() -> np.ndarray:
    return np.abs(np.random.default_rng(2).standard_normal((N, M)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 100.0])
@pytest.mark.parametrize("k", [1, 6, M])
def test_gradient_chooses_by_what_the_loss_gains(k: int, beta: float, dtype: type) -> None:
    u, projection = normal().astype(dtype), projections().astype(dtype)
    activation = GradientTopK(k, beta, jnp.asarray(0.8, dtype))
    z = np.maximum(u, 0)
    score = z.astype(np.float64) * (1 + beta * projection.astype(np.float64) / 0.8)
    expected = np.where(best(score, k), z, 0)
    for codes in both(activation, u, projection):
        np.testing.assert_array_equal(codes, expected)
    plain = both(TopK(k), u)[0]
    assert (expected == plain).all() == (beta == 0 or k == M)
    np.testing.assert_array_equal(both(activation, u)[0], plain)  # without a gradient


def test_a_gradient_along_an_atom_picks_it() -> None:
    """Whatever its code, if only it is above 0."""
    u = with_positives([M - 1] * 4)
    small = u.shape[1] - 1
    u[:, small] = [1e-3, 1e-3, 0, -1]
    projection = np.zeros_like(u)
    projection[:, small] = 1
    activation = GradientTopK(2, 1e5, jnp.float32(1))
    for codes in both(activation, u, projection):
        np.testing.assert_array_equal(codes[:, small] != 0, [True, True, False, False])
        np.testing.assert_array_equal(codes[codes != 0], u[codes != 0])


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("along", [0.0, 1.0])
def test_no_gradient_or_no_scale_is_topk(along: float, scale: float, dtype: type) -> None:
    """And a gradient that is the same along all atoms too."""
    u = normal().astype(dtype)
    projection = np.full(u.shape, along, dtype)
    activation = GradientTopK(5, 1.0, jnp.asarray(scale, dtype))
    expected = both(TopK(5), u)[0]
    for codes in both(activation, u, projection):
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("kind", ["topk", "abs_topk", "gradient_topk"])
def test_k_above_the_atoms_is_told(kind: str) -> None:
    activation, _ = KINDS[kind](M + 1, np.float32)
    with pytest.raises(ValueError, match=f"^k: {M + 1} is more than n_atoms = {M}"):
        activation.check(M)


# Linear encoders

D = 12


def some_dictionary(m: int = 30, *, seed: int = 3) -> Dictionary:
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return Dictionary(
        jnp.asarray(atoms, jnp.float32), jnp.asarray(0.3 * rng.standard_normal(D), jnp.float32)
    )


def some_rows(n: int, *, seed: int = 4) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((n, D)), jnp.float32)


def learned(activation: AbstractActivation, m: int = 30) -> Linear:
    rng = np.random.default_rng(6)
    return Linear(
        jnp.asarray(rng.standard_normal((m, D)), jnp.float32),
        jnp.asarray(0.5 * rng.standard_normal(m), jnp.float32),
        activation,
    )


ACTIVATIONS = {
    "topk": TopK(4),
    "abs_topk": AbsTopK(4),
    "relu": ReLU(),
    "jumprelu": JumpReLU(jnp.full(30, 0.5)),
    "gated": Gated(jnp.linspace(0.5, 2, 30), jnp.linspace(-1, 1, 30)),
    "gradient_topk": GradientTopK(4, 1.0, jnp.float32(1)),
}


@pytest.mark.parametrize("n", [1, TILE, 2 * TILE + 77])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linear_is_its_equation_tile_by_tile(name: str, n: int) -> None:
    """The last tile begins with rows of few codes, so that tiles may differ in their room."""
    activation, dictionary = ACTIVATIONS[name], some_dictionary()
    encoder = learned(activation)
    x, gradient = some_rows(n).at[-5:].multiply(0.01), some_rows(n, seed=8)
    u = (np.asarray(x) - np.asarray(dictionary.bias)) @ np.asarray(encoder.weight).T + np.asarray(
        encoder.bias
    )
    projection = np.abs(np.asarray(gradient) @ np.asarray(dictionary.atoms).T)
    expected = both(activation, u, projection if name == "gradient_topk" else None)[0]
    prepared = encoder.prepare(dictionary)
    by_tiles = prepared.encode(x, gradient=gradient)
    assert by_tiles.n_atoms == 30
    np.testing.assert_allclose(dense(by_tiles), expected, atol=1e-5)
    at_once = jax.jit(lambda x, gradient: prepared.encode(x, gradient=gradient))(x, gradient)
    np.testing.assert_allclose(dense(at_once), expected, atol=1e-5)


@pytest.mark.parametrize("activation", [TopK(3), AbsTopK(3)])
def test_tied_does_not_depend_on_norms(activation: TopK | AbsTopK) -> None:
    unit, x = some_dictionary(), some_rows(50)
    norms = 10 ** np.random.default_rng(7).uniform(-3, 3, 30)
    rough = Dictionary(unit.atoms * jnp.asarray(norms, jnp.float32)[:, None], unit.bias)
    one, two = (Tied(activation).prepare(of).encode(x) for of in (unit, rough))
    np.testing.assert_array_equal(dense(one) != 0, dense(two) != 0)
    np.testing.assert_allclose(unit.decode(one), rough.decode(two), atol=1e-5)
    np.testing.assert_allclose(dense(two) * norms, dense(one), rtol=1e-4, atol=1e-6)


def test_tied_finds_orthogonal_atoms_exactly() -> None:
    axes = np.linalg.qr(np.random.default_rng(8).standard_normal((D, D)))[0]
    dictionary = Dictionary(jnp.asarray(2 * axes, jnp.float32), jnp.full(D, 0.7))
    codes = np.zeros((20, D))
    rng = np.random.default_rng(9)
    for row in codes:
        row[rng.permutation(D)[:3]] = rng.uniform(1, 2, 3) * rng.choice([-1, 1], 3)
    x = jnp.asarray(codes @ (2 * axes) + 0.7, jnp.float32)
    found = Tied(AbsTopK(3)).prepare(dictionary).encode(x)
    np.testing.assert_allclose(dense(found), codes, atol=1e-5)


class _Planted(AbstractEncoder, AbstractPrepared):
    """Every atom's code is an affine function of the row."""

    weight: jax.Array
    bias: jax.Array

    def prepare(self, dictionary: Dictionary) -> AbstractPrepared:
        return self

    def encode(self, x: jax.Array, *, gradient: jax.Array | None = None) -> SparseCodes:
        values = x @ self.weight.T + self.bias[None]
        m = len(self.bias)
        return SparseCodes(jnp.tile(jnp.arange(m)[None], (len(x), 1)), values, m)


def test_regression_finds_a_planted_map() -> None:
    """z = W (x - b) + c, but for the ridge's thousandth; the bias is shrunk by nothing."""
    dictionary = some_dictionary()
    rng = np.random.default_rng(10)
    weight, bias = rng.standard_normal((30, D)), rng.standard_normal(30)
    inner = bias - weight @ np.asarray(dictionary.bias)
    encoder = _Planted(jnp.asarray(weight, jnp.float32), jnp.asarray(inner, jnp.float32))
    x = some_rows(2000) * 5 + 3
    found, offset = regress(dictionary, x, encoder)
    np.testing.assert_allclose(found, weight, rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(offset, bias, atol=0.05)


def test_regression_is_the_ridge_regression() -> None:
    """Against the solution of the written problem, of codes that no linear map gives."""
    dictionary, x = some_dictionary(), some_rows(300) * jnp.linspace(0.1, 3, D)[None] + 1
    encoder = Tied(AbsTopK(3))
    weight, bias = regress(dictionary, x, encoder)
    z = dense(encoder.prepare(dictionary).encode(x)).astype(np.float64)
    rows = np.asarray(x, np.float64) - np.asarray(dictionary.bias, np.float64)
    ridge = 1e-3 * np.trace(np.cov(rows.T, bias=True)) / D
    # ||z - W r - c||^2 + n ridge ||W||^2 as one least squares problem.
    design = np.concatenate([np.c_[rows, np.ones(300)], np.c_[np.eye(D), np.zeros(D)]])
    design[300:] *= np.sqrt(300 * ridge)
    solved = np.linalg.lstsq(design, np.concatenate([z, np.zeros((D, 30))]), rcond=None)[0]
    np.testing.assert_allclose(weight, solved[:D].T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(bias, solved[D], rtol=1e-3, atol=1e-4)


def test_regression_of_rows_that_do_not_vary_is_finite() -> None:
    dictionary = some_dictionary()
    weight, bias = regress(dictionary, jnp.ones((50, D)), Tied(TopK(2)))
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()


def test_the_scale_of_gradients_does_not_widen_the_kernels_scores() -> None:
    rng = np.random.default_rng(0)
    u, projection = (rng.standard_normal((6, 40)).astype(np.float32) for _ in range(2))
    with jax.enable_x64(True):
        wide = GradientTopK(4, 0.7, jnp.asarray(0.5, jnp.float64))
        found = wide.largest(u, np.abs(projection))
    narrow = GradientTopK(4, 0.7, jnp.asarray(0.5, jnp.float32)).largest(u, np.abs(projection))
    np.testing.assert_array_equal(found[0], narrow[0])
    np.testing.assert_array_equal(found[1], narrow[1])
