"""The SAE family: both ways to its gradient, each variant's own law, and what training comes to."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.solvers import sae_cpu
from dictlearn.solvers.base import Batch, Info
from dictlearn.solvers.sae import SAE, _aux, _SAEState, _slope, geometric_median
from dictlearn.solvers.sae_thresholds import batch_top, batch_top_on_cpu
from dictlearn.solvers.sae_variants import (
    AbsTopK,
    AbstractVariant,
    BatchTopK,
    GradientTopK,
    Inputs,
    JumpReLU,
    Parameters,
    ReLU,
    Seen,
    Told,
    TopK,
)

KEY = jax.random.key(0)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# The kernel on the host beside XLA

N, M, D, K, AUX_K = 700, 60, 10, 4, 3
KERNELS: dict[str, AbstractVariant] = {
    "topk": TopK(K),
    "abs_topk": AbsTopK(K),
    "batch_topk": BatchTopK(K),
    "gradient_topk": GradientTopK(K, beta=2.0),
}


def some_parameters(seed: int = 1) -> Parameters:
    rng = np.random.default_rng(seed)
    return Parameters(
        Dictionary(
            jnp.asarray(unit(rng.standard_normal((M, D)))),
            jnp.asarray(0.2 * rng.standard_normal(D)),
        ),
        jnp.asarray(0.5 * rng.standard_normal((M, D))),
        jnp.asarray(0.3 * rng.standard_normal(M)),
        None,
    )


def some_batch(variant: AbstractVariant, n: int = N, seed: int = 2) -> Batch:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((n, D)) + 0.5)
    gradient = jnp.asarray(rng.standard_normal((n, D))) if "gradient" in variant.needs else None
    return Batch(x, gradient)


def assert_same(ours: tuple[Parameters, Told], theirs: tuple[Parameters, Told]) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        size = np.abs(np.asarray(other, np.float64)).max()
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("dead", [0, 2, 20])
@pytest.mark.parametrize("matryoshka", [None, 10])
@pytest.mark.parametrize("name", KERNELS)
def test_both_ways_to_the_gradient_agree(name: str, matryoshka: int | None, dead: int) -> None:
    """Over two tiles, the last one uneven, with rows that have no code and one of zeros."""
    variant = KERNELS[name]
    with jax.enable_x64(True):
        solver = SAE(M, variant, matryoshka=matryoshka, aux_k=AUX_K)
        own, batch = some_parameters(), some_batch(variant)
        no_code = -np.linalg.lstsq(np.asarray(own.weight), np.full(M, 1.0), rcond=None)[0]
        batch = eqx.tree_at(lambda b: b.x, batch, batch.x.at[3].set(no_code).at[5].set(0))
        out = jnp.asarray(np.random.default_rng(3).permutation(M) < dead)
        answers = []
        for running in (0.0, 0.3, 1e3):
            now = jnp.asarray(running)
            ours = sae_cpu.slope(solver, own, now, out, batch)
            assert ours is not None
            theirs = _slope(solver, own, now, out, batch)
            assert_same(ours, theirs)
            answers.append(theirs[1])
    assert np.isfinite(answers[0].objective)
    same = answers[0].objective == answers[1].objective
    assert same == (name != "gradient_topk")  # its running number weighs the gradient


@pytest.mark.parametrize("name", KERNELS)
def test_dead_latents_change_the_gradient(name: str) -> None:
    """So that the test above sees AuxK."""
    variant = KERNELS[name]
    with jax.enable_x64(True):
        solver = SAE(M, variant, aux_k=AUX_K)
        own, batch = some_parameters(), some_batch(variant)
        slopes = []
        for dead in (0, 20):
            answer = sae_cpu.slope(solver, own, jnp.asarray(0.0), jnp.arange(M) < dead, batch)
            assert answer is not None
            slopes.append(answer[0])
    changed = np.abs(slopes[0].weight - slopes[1].weight).max(axis=1) > 1e-9
    assert changed[:20].any()
    assert not changed[20:].any()


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_that_were_given_out_stay_as_they_are(name: str) -> None:
    """The kernel keeps memory from one call to the next."""
    variant = KERNELS[name]
    solver = SAE(M, variant, matryoshka=10)
    own = jax.tree.map(lambda a: a.astype(jnp.float32), some_parameters())
    none = jnp.zeros(M, bool)

    def slope(seed: int) -> Any:
        batch = jax.tree.map(lambda a: a.astype(jnp.float32), some_batch(variant, seed=seed))
        return sae_cpu.slope(solver, own, jnp.float32(0), none, batch)

    first = slope(4)
    before = jax.tree.map(np.array, first)
    second = slope(5)
    assert eqx.tree_equal(before, jax.tree.map(np.array, first))
    assert eqx.tree_equal(before, jax.tree.map(np.array, slope(4)))
    assert not eqx.tree_equal(before, jax.tree.map(np.array, second))


def test_relu_and_jumprelu_have_no_kernel() -> None:
    for variant in (ReLU(K), JumpReLU(K)):
        solver = SAE(M, variant)
        none = jnp.zeros(M, bool)
        batch = some_batch(variant)
        assert sae_cpu.slope(solver, some_parameters(), jnp.float32(1), none, batch) is None


# BatchTopK


def largest_of_batch(u: np.ndarray, k: int) -> np.ndarray:
    """By sorting."""
    positive = np.sort(u[u > 0])[::-1]
    count = min(k * len(u), len(positive))
    return np.where((u > 0) & (u >= positive[count - 1]), u, 0) if count else np.zeros_like(u)


BATCHES = {
    "normal": lambda rng: rng.standard_normal((9, 31)),
    "ties": lambda rng: np.round(rng.standard_normal((9, 31))),
    "few positive": lambda rng: rng.standard_normal((9, 31)) - 2.5,
    "none positive": lambda rng: -np.abs(rng.standard_normal((9, 31))),
    "zeros": lambda rng: np.zeros((9, 31)),
    "many sizes": lambda rng: rng.standard_normal((9, 31)) * 10 ** rng.uniform(-25, 25, (9, 31)),
    "one row": lambda rng: rng.standard_normal((1, 31)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 4, 31])
@pytest.mark.parametrize("name", BATCHES)
def test_batch_topk_keeps_the_largest_of_the_batch(name: str, k: int, dtype: type) -> None:
    with jax.enable_x64(dtype is np.float64):
        u = BATCHES[name](np.random.default_rng(4)).astype(dtype)
        expected = largest_of_batch(u, k)
        z = np.asarray(batch_top(jnp.asarray(u), k))
        assert z.dtype == dtype
        np.testing.assert_array_equal(z, expected)
        least = expected[expected > 0].min(initial=1.0)
        for running in (0.0, 0.5 * least, least, 100 * least):

            def tiles() -> Any:
                return iter([(u[:4], None), (u[4:], None)] if len(u) > 4 else [(u, None)])

            start, index, value = batch_top_on_cpu(tiles, k * len(u), float(running))
            on_host = np.zeros_like(u)
            on_host[np.repeat(np.arange(len(u)), np.diff(start)), index] = value
            np.testing.assert_array_equal(on_host, expected)


def test_batch_topk_of_one_row_is_topk() -> None:
    u = jnp.asarray(np.random.default_rng(5).standard_normal((1, 31)), jnp.float32)
    inputs = Inputs(u, None, None, jnp.float32(0))
    np.testing.assert_array_equal(BatchTopK(5).codes(inputs), TopK(5).codes(inputs))


def test_the_running_threshold_follows_the_least_code() -> None:
    """A mean that forgets, from the first value on; a batch without codes does not count."""
    running, expected = jnp.float32(0), None
    for least in (2.0, 3.0, np.inf, 1.0):
        seen = Seen(jnp.float32(1), jnp.float32(least), jnp.float32(7))
        running = BatchTopK(K).follow(running, seen)
        if np.isfinite(least):
            expected = least if expected is None else 0.99 * expected + 0.01 * least
        assert running == pytest.approx(expected, rel=1e-6)
    activation = BatchTopK(K).activation(None, running, 6)
    np.testing.assert_allclose(activation.threshold, np.full(6, expected), rtol=1e-6)


# The formulas of ReLU and JumpReLU


def slope_by_hand(
    variant: ReLU | JumpReLU, own: Parameters, x: np.ndarray, running: float
) -> tuple[dict[str, np.ndarray], float]:
    """The gradient, term by term: of z, of x_hat, of the penalty; and the mean L0."""
    atoms, b = np.asarray(own.dictionary.atoms), np.asarray(own.dictionary.bias)
    weight, c = np.asarray(own.weight), np.asarray(own.bias)
    n, variance = len(x), ((x - x.mean(axis=0)) ** 2).sum(axis=1).mean()
    u = (x - b) @ weight.T + c
    theta = 0.0 if isinstance(variant, ReLU) else np.exp(np.asarray(own.learned))
    z = np.where(u > theta, u, 0)
    e = x - z @ atoms - b
    d_hat = -2 / (n * variance) * e
    dz = d_hat @ atoms.T
    learned = None
    if isinstance(variant, ReLU):
        dz = dz + running / (n * np.sqrt(variance))
    else:
        width = variant.bandwidth * theta  # the ramp about theta
        near = np.abs(u - theta) < width / 2
        count = (z != 0).sum(axis=1).mean()
        by_count = 2 * variant.weight * (count / variant.k - 1) / variant.k
        d_theta = (-theta / width * near * dz).sum(axis=0)  # z falls by theta within `width`
        d_theta += by_count * (-1 / width * near).sum(axis=0) / n  # and the count by 1
        learned = d_theta * theta  # by log theta
    du = dz * (u > theta)
    slopes = {
        "atoms": z.T @ d_hat,
        "dictionary bias": d_hat.sum(axis=0) - du.sum(axis=0) @ weight,
        "weight": du.T @ (x - b),
        "bias": du.sum(axis=0),
    }
    if learned is not None:
        slopes["learned"] = learned
    return slopes, (z != 0).sum(axis=1).mean()


@pytest.mark.parametrize(
    "variant", [ReLU(K), JumpReLU(K, bandwidth=0.4, weight=3.0)], ids=["relu", "jumprelu"]
)
def test_gradient_is_the_written_one(variant: ReLU | JumpReLU) -> None:
    with jax.enable_x64(True):
        own = some_parameters()
        if isinstance(variant, JumpReLU):
            theta = np.random.default_rng(6).uniform(0.3, 1.5, M)
            own = eqx.tree_at(
                lambda p: p.learned, own, jnp.log(theta), is_leaf=lambda leaf: leaf is None
            )
        batch = some_batch(variant, 60)
        running, none = jnp.asarray(0.2), jnp.zeros(M, bool)
        slope, told = _slope(SAE(M, variant), own, running, none, batch)
        expected, l0 = slope_by_hand(variant, own, np.asarray(batch.x), 0.2)
        got = {
            "atoms": slope.dictionary.atoms,
            "dictionary bias": slope.dictionary.bias,
            "weight": slope.weight,
            "bias": slope.bias,
            "learned": slope.learned,
        }
        assert told.seen.l0 == pytest.approx(l0)
        for name, values in expected.items():
            assert np.abs(values).max() > 1e-4
            np.testing.assert_allclose(got[name], values, rtol=1e-9, atol=1e-12)


def test_far_from_the_threshold_there_is_no_slope() -> None:
    with jax.enable_x64(True):
        log_theta = jnp.zeros(4)
        u = jnp.asarray([[0.94, 0.96, 1.04, 1.06]])

        def total(log_theta: jax.Array, variant: JumpReLU) -> jax.Array:
            inputs = Inputs(u, None, log_theta, jnp.asarray(0.0))
            return jnp.sum(variant.codes(inputs))

        slope = jax.grad(total)(log_theta, JumpReLU(1, bandwidth=0.1))
    np.testing.assert_allclose(slope, [0, -10, -10, 0])


def test_jumprelu_begins_with_k_nonzeros() -> None:
    u = np.random.default_rng(7).standard_normal((500, M)).astype(np.float32)
    theta = np.exp(JumpReLU(K).learned(jnp.asarray(u)))
    np.testing.assert_allclose(theta, np.sort(u, axis=1)[:, -K].mean(), rtol=1e-5)
    assert (u > theta).sum(axis=1).mean() == pytest.approx(K, rel=0.15)
    nothing = np.exp(JumpReLU(K).learned(-jnp.ones((5, M))))
    assert (nothing > 0).all()


def test_lambda_grows_while_there_are_too_many_codes() -> None:
    running = jnp.float32(0.5)

    def next_one(l0: float) -> float:
        return float(ReLU(10).follow(running, Seen(jnp.float32(l0), running, running)))

    assert next_one(10) == pytest.approx(0.5)
    assert next_one(15) == pytest.approx(0.5 * 1.5**0.01)
    assert next_one(1000) == pytest.approx(0.5 * np.exp(0.01))
    assert next_one(0) == pytest.approx(0.5 * np.exp(-0.01))


# Training on planted rows

WIDTH, ATOMS, USED = 24, 40, 4


def planted_atoms(m: int = ATOMS) -> np.ndarray:
    return unit(np.random.default_rng(8).standard_normal((m, WIDTH)))


def planted(n: int, *, seed: int, signed: bool = False, m: int = ATOMS) -> jax.Array:
    """Each atom with the same chance, `USED` a row on average, with weights of 1 to 2."""
    rng = np.random.default_rng(seed)
    codes = rng.uniform(1, 2, (n, m)) * (rng.random((n, m)) < USED / m)
    codes *= rng.choice([-1, 1], (n, m)) if signed else 1
    noise = 0.02 * rng.standard_normal((n, WIDTH))
    return jnp.asarray(codes @ planted_atoms(m) + noise, jnp.float32)


def train(
    solver: SAE, x: jax.Array, *, steps: int, size: int = 256, start: Dictionary | None = None
) -> tuple[_SAEState, list[Info]]:
    state = solver.init(x, n_steps=steps, key=KEY, start=start)
    infos = []
    for step in range(steps):
        rows = x[step * size % len(x) :][:size]
        gradient = jnp.ones_like(rows) if "gradient" in solver.needs else None
        state, info = solver.step(state, Batch(rows, gradient), key=KEY)
        infos.append(info)
    return state, infos


def fvu(dictionary: Dictionary, encoder: AbstractEncoder, x: jax.Array) -> float:
    x_hat = dictionary.decode(encoder.prepare(dictionary).encode(x))
    return float(((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)[None]) ** 2).sum())


@functools.cache
def trained(name: str) -> tuple[Any, _SAEState]:
    """Runs that several tests look at."""
    variant: Any = {"batch_topk": BatchTopK, "relu": ReLU, "jumprelu": JumpReLU}[name](USED)
    solver = SAE(ATOMS, variant, learning_rate=2e-2, dead_after=4096)
    steps = 400 if name == "relu" else 250  # its lambda takes a while
    return solver, train(solver, planted(8192, seed=9), steps=steps)[0]


@pytest.mark.parametrize("name", ["batch_topk", "relu", "jumprelu"])
def test_new_rows_have_about_k_codes(name: str) -> None:
    solver, state = trained(name)
    x = planted(2000, seed=10)
    dictionary, encoder = solver.result(state)
    codes = encoder.prepare(dictionary).encode(x)
    assert float(codes.l0().mean()) == pytest.approx(USED, rel=0.15)
    assert float(codes.l0().std()) > 0.5  # rows differ in what they take
    assert (codes.values >= 0).all()
    if name != "relu":  # the L1 norm shrinks codes
        assert fvu(dictionary, encoder, x) < 0.25


def test_a_finished_batch_topk_codes_a_row_whatever_stands_beside_it() -> None:
    solver, state = trained("batch_topk")
    dictionary, encoder = solver.result(state)
    x = planted(64, seed=11)
    prepared = encoder.prepare(dictionary)
    together = np.asarray(prepared.encode(x).dense())
    alone = np.concatenate([np.asarray(prepared.encode(row[None]).dense()) for row in x])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_prefixes_of_a_matryoshka_reconstruct_by_themselves() -> None:
    x, new = planted(8192, seed=12), planted(2000, seed=13)
    errors = {}
    for matryoshka in (None, 10):
        solver = SAE(ATOMS, BatchTopK(USED), matryoshka=matryoshka, learning_rate=2e-2)
        dictionary, encoder = solver.result(train(solver, x, steps=150)[0])
        z = np.asarray(encoder.prepare(dictionary).encode(new).dense())
        atoms, bias = np.asarray(dictionary.atoms), np.asarray(dictionary.bias)
        errors[matryoshka] = [
            float(((np.asarray(new) - z[:, :end] @ atoms[:end] - bias) ** 2).sum(axis=1).mean())
            for end in (10, 20, 40)
        ]
    assert errors[10][0] < 0.8 * errors[None][0]
    assert errors[10][1] < 0.8 * errors[None][1]
    assert errors[10][0] > errors[10][1] > errors[10][2]


@pytest.mark.parametrize(
    ("m", "first", "ends"),
    [
        (60, None, [60]),
        (60, 60, [60]),
        (60, 59, [59, 60]),
        (60, 10, [10, 20, 40, 60]),
        (64, 8, [8, 16, 32, 64]),
        (7, 1, [1, 2, 4, 7]),
        (1, 1, [1]),
        (65, 32, [32, 64, 65]),
    ],
)
def test_groups(m: int, first: int | None, ends: list[int]) -> None:
    assert SAE(m, TopK(1), matryoshka=first).groups == ends


def test_signed_codes_need_half_the_latents() -> None:
    """Rows of two +-d_j: an atom is one latent with signs, two without."""
    m, d, k = 12, 16, 2
    rng = np.random.default_rng(14)
    atoms = unit(rng.standard_normal((m, d)))
    codes = np.zeros((5096, m))
    support = np.argsort(rng.random(codes.shape), axis=1)[:, :k]
    values = rng.uniform(1, 2, support.shape) * rng.choice([-1, 1], support.shape)
    np.put_along_axis(codes, support, values, axis=1)
    x, new = jnp.split(jnp.asarray(codes @ atoms, jnp.float32), [4096])
    either, both, error = {}, {}, {}
    for name, n_atoms, variant in (
        ("signed", m, AbsTopK(k)),
        ("half", m, TopK(k)),
        ("pairs", 2 * m, TopK(k)),
    ):
        solver = SAE(n_atoms, variant, learning_rate=2e-2, dead_after=2048)
        dictionary, encoder = solver.result(train(solver, x, steps=200)[0])
        cosine = np.asarray(dictionary.atoms) @ atoms.T
        either[name] = (np.abs(cosine).max(axis=0) > 0.95).mean()
        both[name] = (np.minimum(cosine.max(axis=0), -cosine.min(axis=0)) > 0.95).mean()
        error[name] = fvu(dictionary, encoder, new)
    assert either["signed"] >= 0.7
    assert either["pairs"] >= 0.7
    assert both["pairs"] >= 0.5
    assert either["half"] <= 0.5
    assert error["signed"] < 0.4 * error["half"]
    assert error["pairs"] < 0.5 * error["half"]


# Frozen dictionaries


@pytest.mark.parametrize("variant", [AbsTopK(USED), BatchTopK(USED), JumpReLU(USED)])
def test_a_frozen_dictionary_stays_bit_for_bit(variant: Any) -> None:
    """Atoms of norms that are not 1 too; its encoder learns."""
    norms = np.random.default_rng(16).uniform(0.5, 2, (ATOMS, 1))
    start = Dictionary(jnp.asarray(norms * planted_atoms(), jnp.float32), jnp.full(WIDTH, 0.1))
    x = planted(4096, seed=17)
    solver = SAE(ATOMS, variant, frozen=True, aux_weight=0.0, dead_after=1024)
    before = solver.init(x, n_steps=30, key=KEY, start=start)
    after, infos = train(solver, x, steps=30, start=start)
    for state in (before, after):
        assert eqx.tree_equal(solver.result(state)[0], start)
    moved = np.abs(np.asarray(after.parameters.weight - before.parameters.weight))
    assert (moved.max(axis=1) > 0).all()
    if not isinstance(variant, JumpReLU):  # its sparsity moves with it
        assert np.mean([i.objective for i in infos[-4:]]) < infos[0].objective


def test_frozen_needs_a_start() -> None:
    with pytest.raises(ValueError, match=r"^frozen: no atoms are given"):
        SAE(ATOMS, TopK(1), frozen=True).init(planted(100, seed=18), n_steps=1, key=KEY)


# The geometric median


def test_geometric_median_is_the_least_sum_of_distances() -> None:
    """At the minimum the unit vectors to all rows cancel; no step away is any better."""
    rng = np.random.default_rng(19)
    x = rng.standard_normal((201, 7)) * rng.uniform(0.1, 3, 7) + rng.exponential(2, (201, 7))
    with jax.enable_x64(True):
        b = np.asarray(geometric_median(jnp.asarray(x)))
    assert np.abs(unit(x - b).sum(axis=0)).max() < 1e-6

    def distances(at: np.ndarray) -> float:
        return float(np.linalg.norm(x - at, axis=1).sum())

    for _ in range(20):
        assert distances(b) < distances(b + 1e-3 * rng.standard_normal(7))
    assert distances(b) < 0.999 * distances(x.mean(axis=0))


def test_geometric_median_is_robust_and_finite() -> None:
    rng = np.random.default_rng(20)
    x = rng.standard_normal((300, 5)).astype(np.float32)
    rough = x.copy()
    rough[:30] = 1e4
    clean, b = (np.asarray(geometric_median(jnp.asarray(rows))) for rows in (x, rough))
    assert np.linalg.norm(b - clean) < 0.5
    assert np.linalg.norm(rough.mean(axis=0)) > 1000
    for rows in (np.ones((4, 5)), np.r_[np.eye(5), -np.eye(5), np.zeros((1, 5))]):  # at a row
        middle = np.asarray(geometric_median(jnp.asarray(rows, jnp.float32)))
        np.testing.assert_allclose(middle, rows.mean(axis=0), atol=1e-6)


def test_the_bias_begins_where_it_was_asked_to() -> None:
    x = planted(200, seed=21)
    for bias, expected in (("mean", x.mean(axis=0)), ("geometric_median", geometric_median(x))):
        state = SAE(ATOMS, TopK(2), bias=bias).init(x, n_steps=1, key=KEY)
        np.testing.assert_allclose(state.parameters.dictionary.bias, expected, atol=1e-6)


# AuxK


@pytest.mark.parametrize(
    "variant", [TopK(K), AbsTopK(K), JumpReLU(K)], ids=lambda variant: variant.name
)
def test_auxk_changes_nothing_while_none_is_dead(variant: Any) -> None:
    batch = jax.tree.map(lambda a: a.astype(jnp.float32), some_batch(variant))
    states = []
    for weight in (0.0, 10.0):
        solver = SAE(M, variant, aux_weight=weight, dead_after=10_000)
        state = solver.init(batch.x, n_steps=2, key=KEY)
        for _ in range(2):
            state, _ = solver.step(state, batch, key=KEY)
        states.append(state)
    assert eqx.tree_equal(*states)


def test_auxk_of_signed_codes_uses_both_signs() -> None:
    """What dead latents can explain only with a minus; unsigned ones cannot."""
    error = np.zeros((20, D), np.float32)
    error[:, :2] = -np.abs(np.random.default_rng(22).standard_normal((20, 2)))
    left, dead, atoms = jnp.asarray(error), jnp.arange(D) < 2, jnp.eye(D)
    signed, plain = (SAE(D, variant, aux_k=2) for variant in (AbsTopK(1), TopK(1)))
    assert _aux(signed, left, left, dead, atoms) == pytest.approx(0, abs=1e-6)
    assert _aux(plain, left, left, dead, atoms) == pytest.approx(1, abs=1e-6)
    assert _aux(signed, left, left, ~dead, atoms) == pytest.approx(1, abs=1e-6)
    one = SAE(D, AbsTopK(1), aux_k=1)
    least = np.sort(np.abs(error[:, :2]), axis=1)[:, 0]
    share = (least**2).sum() / (error**2).sum()
    assert _aux(one, left, left, dead, atoms) == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize(
    ("m", "aux_k", "width", "count"),
    [(60, None, 20, 10), (60, 7, 20, 7), (6, None, 20, 6), (6, 9, 20, 6), (60, None, 1, 1)],
)
def test_how_many_dead_latents_help(m: int, aux_k: int | None, width: int, count: int) -> None:
    assert SAE(m, TopK(1), aux_k=aux_k).auxiliary(width) == count


# Messages


@pytest.mark.parametrize("variant", [TopK, AbsTopK, BatchTopK, ReLU, JumpReLU, GradientTopK])
def test_more_codes_than_atoms(variant: Any) -> None:
    with pytest.raises(ValueError, match=r"^variant\.k: 9 is more than n_atoms = 8"):
        SAE(8, variant(9))
    assert SAE(8, variant(8)).n_atoms == 8


def test_a_first_prefix_of_more_atoms_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"^matryoshka: 9 is more than n_atoms = 8"):
        SAE(8, TopK(1), matryoshka=9)
    assert SAE(8, TopK(1), matryoshka=8).groups == [8]
