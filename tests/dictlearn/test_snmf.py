"""SNMF: its laws, its starts against scikit-learn, planted atoms, and rows that are hard."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from sklearn.cluster import KMeans

from dictlearn.dictionary import Dictionary
from dictlearn.encoders.nnls import NNLS
from dictlearn.solvers import snmf
from dictlearn.solvers.base import Batch, Info
from dictlearn.solvers.snmf import SNMF

KEY = jax.random.key(0)
N, M, D = 120, 8, 20
STARTS = ["random", "svd", "kmeans"]


def planted(
    n: int, m: int, d: int, *, share: float, seed: int, k: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n d] of k atoms each, weights of 1 to 2, and unit atoms with ceil(share d) entries."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d))
    atoms *= np.argsort(rng.random((m, d)), axis=1) < math.ceil(share * d)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = rng.uniform(1, 2, (n, m)) * (np.argsort(rng.random((n, m)), axis=1) < k)
    return codes @ atoms + 0.02 * rng.standard_normal((n, d)), atoms


def run(solver: SNMF, x: jax.Array, steps: int) -> tuple[Any, list[Info]]:
    state = solver.init(x, n_steps=steps, key=KEY)
    infos = []
    for _ in range(steps):
        state, info = solver.step(state, Batch(x), key=KEY)
        infos.append(info)
    return state, infos


def share_found(solver: SNMF, state: Any, atoms: np.ndarray) -> float:
    cosine = np.abs(atoms @ np.asarray(solver.result(state)[0].atoms).T).max(axis=1)
    return float((cosine > 0.99).mean())


HARD = {
    "plain": lambda x: x,
    "zero rows": lambda x: x * (np.arange(N) % 2)[:, None],
    "all rows zero": np.zeros_like,
    "duplicate rows": lambda x: np.tile(x[: N // 10], (10, 1)),
    "constant batch": lambda x: np.tile(x[:1], (N, 1)),
    "rows of rank one": lambda x: x[:, :1] * x[:1],
    "great rows": lambda x: x * np.where(np.arange(N) < 2, 1e4, 1)[:, None],
    "small": lambda x: 1e-3 * x,
    "great": lambda x: 1e4 * x,
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hard", HARD)
def test_without_winners_the_objective_never_rises(hard: str, dtype: type, start: Any) -> None:
    """Nor does it fall below zero, or leave the finite."""
    rows = HARD[hard](planted(N, M + 4, D, share=1, seed=0)[0])
    rounding = 10 * float(np.finfo(dtype).eps) * (rows**2).sum(axis=1).mean()
    with jax.enable_x64(dtype is np.float64):
        x = jnp.asarray(rows.astype(dtype))
        state, infos = run(SNMF(M, start, winners=1.0), x, 25)
        objective = np.array([float(info.objective) for info in infos])
        assert eqx.tree_equal(state, jax.tree.map(jnp.nan_to_num, state))
    assert np.diff(objective).max() <= rounding
    assert objective.min() >= 0
    if hard == "plain":
        assert objective[-1] < 0.7 * objective[0]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("hard", HARD)
def test_with_winners_it_stays_finite(hard: str, start: Any) -> None:
    x = jnp.asarray(HARD[hard](planted(N, M, D, share=0.2, seed=1)[0]), jnp.float32)
    solver = SNMF(M, start, winners=0.2)
    state, infos = run(solver, x, 20)
    for leaf in jax.tree.leaves((state, [(info.objective, info.l0) for info in infos])):
        assert np.isfinite(leaf).all()
    assert (state.codes >= 0).all()
    dictionary, encoder = solver.result(state)
    np.testing.assert_allclose(np.linalg.norm(dictionary.atoms, axis=1), 1, atol=1e-5)
    codes = encoder.prepare(dictionary).encode(x)
    assert np.isfinite(codes.values).all()


def test_the_step_is_that_of_the_equations() -> None:
    """Written out in NumPy, with the atoms by lstsq."""
    rows = planted(N, M, D, share=1, seed=2)[0]
    with jax.enable_x64(True):
        x = jnp.asarray(rows)
        solver = SNMF(M, "random", winners=0.3)
        state, _ = run(solver, x, 3)
        after, info = solver.step(state, Batch(x), key=KEY)
    z = np.array(state.codes)
    z /= np.linalg.norm(z, axis=0)
    atoms = np.linalg.lstsq(z, rows, rcond=None)[0]
    for atom in atoms:
        atom[np.argsort(np.abs(atom))[: D - math.ceil(0.3 * D)]] = 0
    np.testing.assert_allclose(after.atoms, atoms, rtol=1e-5, atol=1e-7)
    p, q = rows @ atoms.T, atoms @ atoms.T
    up = np.maximum(p, 0) + z @ np.maximum(-q, 0)
    down = np.maximum(-p, 0) + z @ np.maximum(q, 0)
    np.testing.assert_allclose(after.codes, z * np.sqrt(up / down), rtol=1e-4)
    error = ((rows - z @ atoms) ** 2).sum(axis=1).mean()
    variance = ((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert float(info.objective) == pytest.approx(error, rel=1e-5)
    assert float(info.fvu) == pytest.approx(error / variance, rel=1e-5)
    assert float(info.l0) == (z > 1e-6 * z.max(axis=0)).sum(axis=1).mean()
    assert int(info.dead) == 0


@pytest.mark.parametrize("noise", [0.3, 1e-2, 1e-4])
def test_a_small_objective_does_not_cancel(noise: float) -> None:
    """Rows explained but for 1e-6 of their energy: in float32 the products alone say less."""
    rng = np.random.default_rng(3)
    codes, atoms = rng.uniform(1, 2, (N, M)), rng.standard_normal((M, D))
    x = jnp.asarray(codes @ atoms + noise * rng.standard_normal((N, D)), jnp.float32)
    solver = SNMF(M, winners=1.0)
    state = eqx.tree_at(lambda s: s.codes, run(solver, x, 1)[0], jnp.asarray(codes, jnp.float32))
    for _ in range(3):  # at codes that explain the rows, and stay there
        state = eqx.tree_at(lambda s: s.codes, state, jnp.asarray(codes, jnp.float32))
        state, info = solver.step(state, Batch(x), key=KEY)
    z, rows = np.asarray(codes, np.float64), np.asarray(x, np.float64)
    z /= np.linalg.norm(z, axis=0)
    error = ((rows - z @ np.asarray(state.atoms, np.float64)) ** 2).sum(axis=1).mean()
    assert error < max(1.2 * D * noise**2, 1e-6 * (rows**2).sum(axis=1).mean())
    assert float(info.objective) == pytest.approx(error, rel=2e-2)


def test_codes_that_are_dependent_or_dead() -> None:
    """Two equal columns, one zero: atoms stay finite, fit as well as can be, and one is dead."""
    x = jnp.asarray(planted(N, M, D, share=1, seed=4)[0], jnp.float32)
    solver = SNMF(M, winners=1.0)
    state = run(solver, x, 2)[0]
    codes = state.codes.at[:, 1].set(state.codes[:, 0]).at[:, 2].set(0)
    state, info = solver.step(eqx.tree_at(lambda s: s.codes, state, codes), Batch(x), key=KEY)
    best = np.linalg.lstsq(np.asarray(codes, np.float64), np.asarray(x, np.float64), rcond=None)[0]
    error = ((x - np.asarray(codes) @ best) ** 2).sum(axis=1).mean()
    assert float(info.objective) == pytest.approx(float(error), rel=1e-3)
    assert int(info.dead) == 1
    np.testing.assert_array_equal(state.atoms[2], 0)
    np.testing.assert_array_equal(state.codes[:, 2], 0)
    assert float(info.l0) < M


def test_winners() -> None:
    atoms = jnp.array([[3.0, -1.0, 2.0, 0.5], [1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, -2.0]])
    np.testing.assert_array_equal(
        snmf._winners(atoms, 0.5),
        [[3, 0, 2, 0], [1, -1, 1, 0], [0, 0, 0, -2]],  # equals all stay
    )
    np.testing.assert_array_equal(snmf._winners(atoms, 0.26), snmf._winners(atoms, 0.5))
    np.testing.assert_array_equal(snmf._winners(atoms, 1.0), atoms)
    assert ((snmf._winners(atoms[:1], 1e-9) != 0).sum(axis=1) == 1).all()


def test_winners_find_planted_sparse_atoms() -> None:
    """Without them the same data has many factorisations as good."""
    rows, atoms = planted(800, 20, 60, share=0.1, seed=2)
    x = jnp.asarray(rows, jnp.float32)
    found = {}
    for winners in (0.1, 1.0):
        solver = SNMF(20, "random", winners)
        assert share_found(solver, solver.init(x, n_steps=1, key=KEY), atoms) < 0.2
        state, infos = run(solver, x, 250)
        assert infos[-1].fvu < 0.1
        found[winners] = share_found(solver, state, atoms)
    assert found[0.1] >= 0.8
    assert found[1.0] < 0.2


def test_kmeans_finds_planted_dense_atoms() -> None:
    rows, atoms = planted(1000, 24, 40, share=1, seed=6)
    x = jnp.asarray(rows, jnp.float32)
    solver = SNMF(24, "kmeans", winners=1.0)
    assert share_found(solver, solver.init(x, n_steps=1, key=KEY), atoms) < 0.1
    assert share_found(solver, run(solver, x, 150)[0], atoms) >= 0.4


def test_clusters_are_as_good_as_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(7)
    rows = 2 * rng.standard_normal((12, 10))[rng.integers(12, size=900)]
    rows += rng.standard_normal(rows.shape)
    own = np.asarray(snmf._clusters(jnp.asarray(rows, jnp.float32), 12, KEY))
    np.testing.assert_array_equal(own.sum(axis=1), 1)
    inertia = sum(
        ((rows[mine == 1] - rows[mine == 1].mean(axis=0)) ** 2).sum()
        for mine in own.T
        if mine.any()
    )
    theirs = [
        KMeans(12, n_init=1, max_iter=15, random_state=seed).fit(rows).inertia_
        for seed in range(10)
    ]
    assert inertia <= np.max(theirs)
    shuffled = rng.permutation(own)
    assert inertia < 0.7 * sum(
        ((rows[mine == 1] - rows[mine == 1].mean(axis=0)) ** 2).sum() for mine in shuffled.T
    )


@pytest.mark.parametrize(("n", "d"), [(50, 12), (12, 50)])
def test_singular_codes_are_those_of_the_svd(n: int, d: int) -> None:
    rows = np.random.default_rng(8).standard_normal((n, d)) + 0.5
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    left = u[:, :6] * np.sqrt(s[:6])
    greater = (np.maximum(left, 0) ** 2).sum(axis=0) >= (np.maximum(-left, 0) ** 2).sum(axis=0)
    expected = np.maximum(np.where(greater, left, -left), 0)
    with jax.enable_x64(True):
        np.testing.assert_allclose(snmf._singular(jnp.asarray(rows), 6), expected, atol=1e-8)


def test_starts_from_a_dictionary() -> None:
    """One that explains the rows does so at once; and one with a zero atom, and other norms."""
    rows, atoms = planted(N, M, D, share=1, seed=9)
    given = atoms * np.arange(1, M + 1)[:, None]
    bias = jnp.full(D, 7.0)  # another's bias says nothing about these rows
    x = jnp.asarray(rows, jnp.float32)
    solver = SNMF(M, winners=1.0)
    start = Dictionary(jnp.asarray(given, jnp.float32), bias)
    state = solver.init(x, n_steps=1, key=KEY, start=start)
    assert share_found(solver, state, atoms) == 1
    assert (state.codes > 0).all()
    _, info = solver.step(state, Batch(x), key=KEY)
    assert info.fvu < 0.01 < run(solver, x, 1)[1][0].fvu
    broken = Dictionary(start.atoms.at[0].set(0), bias)
    state = solver.init(x, n_steps=1, key=KEY, start=broken)
    assert np.isfinite(state.atoms).all()


@pytest.mark.parametrize("start", STARTS)
def test_the_key_alone_decides(start: Any) -> None:
    x = jnp.asarray(planted(N, M, D, share=1, seed=10)[0], jnp.float32)
    solver = SNMF(M, start)
    one, two, other = (solver.init(x, n_steps=1, key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert eqx.tree_equal(one, two)
    assert eqx.tree_equal(one, other) == (start == "svd")  # which draws nothing


def test_fewer_rows_than_atoms() -> None:
    solver = SNMF(M)
    with pytest.raises(ValueError, match=f"^n_atoms: {M} .* only {M - 1}"):
        solver.init(jnp.ones((M - 1, D)), n_steps=1, key=KEY)
    solver.init(jnp.ones((M, D)), n_steps=1, key=KEY)


def test_only_so_many_singular_vectors() -> None:
    with pytest.raises(ValueError, match=f"^n_atoms: {D + 1} is more than the {D} singular"):
        SNMF(D + 1, "svd").init(jnp.ones((N, D)), n_steps=1, key=KEY)


def test_another_batch() -> None:
    x = jnp.ones((N, D))
    solver = SNMF(M)
    state = solver.init(x, n_steps=1, key=KEY)
    with pytest.raises(ValueError, match=f"^batch: {N - 1} rows, but the codes .* {N};"):
        solver.step(state, Batch(x[1:]), key=KEY)


def test_fewer_rows_allowed_than_atoms() -> None:
    with pytest.raises(ValueError, match=r"^max_rows: 7 rows are fewer than n_atoms = 8"):
        SNMF(8, max_rows=7)


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ({"n_atoms": 0}, "n_atoms"),
        ({"start": "nndsvd"}, "start"),
        ({"winners": 0.0}, "winners"),
        ({"winners": 1.5}, "winners"),
        ({"max_rows": 0}, "max_rows"),
        ({"k": 3}, "k"),
    ],
)
def test_bad_settings(setting: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as error:
        TypeAdapter(SNMF).validate_json(json.dumps({"n_atoms": 8} | setting), strict=True)
    assert [problem["loc"] for problem in error.value.errors()] == [(place,)]


def test_result_and_control() -> None:
    solver = SNMF(M)
    x = jnp.asarray(planted(N, M, D, share=1, seed=11)[0], jnp.float32)
    dictionary, encoder = solver.result(run(solver, x, 1)[0])
    np.testing.assert_array_equal(dictionary.bias, 0)
    assert encoder == solver.control == NNLS()
    assert "all rows" in SNMF.needs
    assert SNMF(2 * M).memory_bytes(N, D) > solver.memory_bytes(N, D) > 4 * N * (D + M)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from dictlearn import devices
from dictlearn.solvers.base import Batch
from dictlearn.solvers.snmf import SNMF
x = np.random.default_rng(0).standard_normal((160, 12))  # more than atoms: one best code
key, solver, ends = jax.random.key(0), SNMF(8, winners=0.5), []
for mesh in (None, devices.mesh()):
    state = devices.everywhere(solver.init(jnp.asarray(x), n_steps=5, key=key), mesh)
    batch = Batch(devices.spread(x, mesh))
    for _ in range(5):
        state, info = solver.step(state, batch, key=key)
    dictionary, encoder = solver.result(state)
    codes = encoder.prepare(dictionary).encode(batch.x)
    ends.append((state, info, codes.values))
assert len(state.codes.sharding.device_set) == 4
assert state.codes.addressable_shards[0].data.shape == (40, 8)
for one, four in zip(*map(jax.tree.leaves, ends), strict=True):
    np.testing.assert_allclose(four, one, rtol=0, atol=1e-9)
"""


def test_the_same_over_four_devices() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=os.environ | flags, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fraction", "d", "count"), [(0.07, 100, 7), (0.14, 50, 7), (0.01, 640, 7)]
)
def test_how_many_winners(fraction: float, d: int, count: int) -> None:
    atoms = jnp.asarray(np.random.default_rng(0).standard_normal((3, d)), jnp.float32)
    assert ((snmf._winners(atoms, fraction) != 0).sum(axis=1) == count).all()
