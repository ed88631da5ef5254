"""Carriers that are kept exactly, massive rows that are left out, and a start from another run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dictlearn
from activations.config import validate
from activations.store import Store
from activations.terminal import UserError
from dictlearn import artifact, heldout
from dictlearn.config import FitConfig
from dictlearn.data import Rows, split_by_document, statistics
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.omp import OMP
from dictlearn.fit import fit

HOOK = "blocks.0.hook_resid_post"
N, D, CARRIER = 1200, 12, 5
MASSIVE = (3, 333, 334, 1199)  # in the first and the last block, and in both shards


def rough_rows() -> np.ndarray:
    """Rows with a carrier in coordinate 5 and four massive ones."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, D))
    x[:, CARRIER] = 30 + 10 * rng.standard_normal(N)
    x[list(MASSIVE)] *= 40
    return x.astype(np.float32)


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    x, document = rough_rows(), np.arange(N) // 20
    return make_store((x[:500], document[:500]), (x[500:], document[500:]))


@pytest.fixture
def rows(store: Store) -> Rows:
    return Rows(store, HOOK, np.arange(N // 20))


def coder_with(carriers: list[int], k: int = 2) -> Coder:
    rng = np.random.default_rng(1)
    normaliser = Normaliser(
        jnp.asarray(rng.standard_normal(D), jnp.float32),
        jnp.float32(2),
        jnp.asarray(carriers, jnp.int32),
    )
    dictionary = Dictionary(
        jnp.asarray(rng.standard_normal((20, D)), jnp.float32)
        .at[:, np.array(carriers, int)]
        .set(0),
        jnp.zeros(D),
    )
    return Coder(normaliser, dictionary, OMP(k=k))


# Carriers


def test_carriers_are_decoded_exactly_and_charged() -> None:
    coder, x = coder_with([5, 2]), rough_rows()[:100]
    codes = coder.encode(x)
    np.testing.assert_allclose(coder.decode(codes)[:, [5, 2]], x[:, [5, 2]], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(codes.l0(), 4)
    assert codes.n_atoms == 22 == len(coder.atoms)
    np.testing.assert_array_equal(codes.indices[:, 2:], np.tile([20, 21], (100, 1)))
    np.testing.assert_array_equal(coder.atoms[20:], np.eye(D)[[5, 2]])
    dense = codes.dense() @ coder.atoms
    np.testing.assert_allclose(
        coder.decode(codes), coder.normaliser.restore(dense), rtol=1e-5, atol=1e-4
    )


def test_the_dictionary_never_sees_carriers() -> None:
    coder, x = coder_with([5]), rough_rows()[:100]
    changed = x.copy()
    changed[:, 5] += 1000
    one, two = (coder.encode(rows) for rows in (x, changed))
    np.testing.assert_array_equal(one.indices, two.indices)
    np.testing.assert_array_equal(one.values[:, :2], two.values[:, :2])
    np.testing.assert_allclose(two.values[:, 2] - one.values[:, 2], 500, rtol=1e-5)


def test_no_carriers_is_as_before() -> None:
    coder, x = coder_with([]), rough_rows()[:50]
    codes = coder.encode(x)
    plain = coder.encoder.prepare(coder.dictionary).encode(
        coder.normaliser.normalise(jnp.asarray(x))
    )
    assert eqx.tree_equal(codes, plain)


def test_carriers_survive_save_and_load(tmp_path: Path) -> None:
    coder = coder_with([5, 2])
    artifact.save(tmp_path, coder, {}, {})
    assert eqx.tree_equal(artifact.load(tmp_path).coder, coder)


def test_an_atom_with_nan_is_told() -> None:
    coder = coder_with([])
    atoms = coder.dictionary.atoms.at[7, 2].set(jnp.nan)
    bad = eqx.tree_at(lambda c: c.dictionary.atoms, coder, atoms)
    with pytest.raises(ValueError, match="dictionary: atom 7 holds NaN"):
        bad.encode(rough_rows())


# Massive rows


def test_massive_rows_are_left_out_of_everything_but_the_bulk(rows: Rows) -> None:
    x = rough_rows()
    fitted, normaliser, bulk = statistics(rows, leave_out_massive=True)
    usual = np.delete(x, MASSIVE, axis=0)
    assert len(fitted) == len(usual) == N - 4
    np.testing.assert_array_equal(np.concatenate([part for part, *_ in fitted.by_shard()]), usual)
    np.testing.assert_allclose(normaliser.mean, usual.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert normaliser.scale == pytest.approx(np.sqrt(usual.var(axis=0).mean()), rel=1e-5)
    assert eqx.tree_equal(np.asarray(bulk.norm_limit), np.asarray(statistics(rows)[2].norm_limit))
    with_all = statistics(rows)
    assert len(with_all[0]) == N
    sampled = {row.tobytes() for row in fitted.sample(N, seed=0)}
    assert sampled == {row.tobytes() for row in usual}


@pytest.mark.parametrize("memory", [2**31, 40_000])
def test_batches_hold_every_usual_row_once_an_epoch(rows: Rows, memory: int) -> None:
    fitted = statistics(dataclasses.replace(rows, memory=memory), leave_out_massive=True)[0]
    batches = fitted.batches(92, seed=0)
    seen = np.concatenate([next(batches) for _ in range(13)])  # 13 * 92 = 1196
    batches.close()
    usual = np.delete(rough_rows(), MASSIVE, axis=0)
    assert {row.tobytes() for row in seen} == {row.tobytes() for row in usual}
    assert len(seen) == len(usual)


def test_scale_is_of_what_the_dictionary_has_to_explain(rows: Rows) -> None:
    x = np.delete(rough_rows(), MASSIVE, axis=0)
    _, normaliser, bulk = statistics(rows, keep_carriers=True, leave_out_massive=True)
    np.testing.assert_array_equal(np.flatnonzero(bulk.carriers), [CARRIER])
    np.testing.assert_array_equal(normaliser.carriers, [CARRIER])
    rest = np.delete(x, CARRIER, axis=1)
    assert normaliser.scale == pytest.approx(np.sqrt(rest.var(axis=0).mean()), rel=1e-5)


# Fits


def config(store: Store, run: Path, **changes: object) -> FitConfig:
    table = {
        "name": "small",
        "output": str(run),
        "data": {"store": str(store.path), "hook": HOOK},
        "solver": {"name": "ksvd", "n_atoms": 30, "encoder": {"name": "omp", "k": 3}},
        "fit": {"batch_size": 200, "epochs": 3},
        **changes,
    }
    return validate(FitConfig, table, "test")


def test_a_fit_keeps_carriers_and_figures_are_of_all_rows(store: Store, tmp_path: Path) -> None:
    data = {"store": str(store.path), "hook": HOOK}
    kept = {**data, "keep_carriers": True, "leave_out_massive": True}
    plain = dictlearn.load(fit(config(store, tmp_path / "plain")))
    run = dictlearn.load(fit(config(store, tmp_path / "kept", data=kept)))
    parts = split_by_document(store, HOOK, validation=0.1, test=0.15, seed=0)
    assert run.metrics["n_tokens"] == plain.metrics["n_tokens"] == len(parts["test"])
    n_massive = len(np.intersect1d(MASSIVE, np.flatnonzero(parts["train"].chosen(
        store.manifest.shards[0], np.arange(N) // 20))))  # fmt: skip
    assert n_massive > 0
    assert run.metadata["n_training_rows"] == plain.metadata["n_training_rows"] - n_massive
    assert run.metrics["l0"] == pytest.approx(4)
    assert run.metrics["control_l0"] == pytest.approx(4)
    assert run.metrics["fvu"] < plain.metrics["fvu"]
    np.testing.assert_array_equal(run.coder.dictionary.atoms[:, CARRIER], 0)


def test_median_error_is_of_the_median_row(rows: Rows) -> None:
    """Against a Coder that reconstructs nothing but the mean: every row's error is 1."""
    _, normaliser, bulk = statistics(rows)
    zero = Coder(normaliser, Dictionary(jnp.zeros((4, D)), jnp.zeros(D)), OMP(k=1))
    seen = heldout.evaluate(zero, rows, bulk)
    np.testing.assert_allclose(seen.errors, 1, rtol=1e-5)
    assert len(seen.errors) == N


@pytest.mark.parametrize("solver", ["ksvd", "sae", "untrained"])
def test_a_fit_begins_with_the_atoms_of_another(store: Store, tmp_path: Path, solver: str) -> None:
    first = dictlearn.load(fit(config(store, tmp_path / "first")))
    tables = {
        "ksvd": {"encoder": {"name": "omp", "k": 3}},
        "sae": {"variant": {"name": "topk", "k": 3}, "learning_rate": 1e-9},
        "untrained": {"encoder": {"name": "omp", "k": 3}, "atoms": "random"},
    }
    table = {"name": solver, "n_atoms": 30, **tables[solver]}
    loop = {"batch_size": 200, "epochs": 0.1}
    second = config(
        store, tmp_path / "second", solver=table, fit=loop, start=str(tmp_path / "first")
    )
    atoms = dictlearn.load(fit(second)).coder.dictionary.atoms
    cosine = jnp.sum(atoms * first.coder.dictionary.atoms, axis=1)
    assert (jnp.sort(cosine)[5:] > 0.9).all()


def test_a_start_of_another_shape_or_none(store: Store, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "first"))
    table = {"name": "ksvd", "n_atoms": 31, "encoder": {"name": "omp", "k": 3}}
    with pytest.raises(UserError, match=r"start: .*first has atoms .*\(30, 12\).*\(31, 12\)"):
        fit(config(store, tmp_path / "second", solver=table, start=str(tmp_path / "first")))
    with pytest.raises(UserError, match="no run there"):
        fit(config(store, tmp_path / "second", start=str(tmp_path / "nothing")))
    assert not (tmp_path / "second").exists()


def test_fewer_rows_than_atoms_unless_they_begin_elsewhere(store: Store, tmp_path: Path) -> None:
    solver = {"name": "ksvd", "n_atoms": 2000, "encoder": {"name": "omp", "k": 3}}
    with pytest.raises(UserError, match=r"solver\.n_atoms: 2,000 atoms .*random"):
        fit(config(store, tmp_path / "run", solver=solver))
    assert not (tmp_path / "run").exists()
    run = fit(config(store, tmp_path / "run", solver=solver | {"start": "random"}))
    atoms = dictlearn.load(run).coder.dictionary.atoms
    np.testing.assert_allclose(jnp.linalg.norm(atoms, axis=1), 1, rtol=1e-5)


def test_random_starts_differ_by_key() -> None:
    from dictlearn.solvers.ksvd import KSVD

    solver = KSVD(5, OMP(k=1), start="random")
    one, two = (
        solver.init(jnp.ones((2, 8)), n_steps=1, key=jax.random.key(seed)).atoms for seed in (0, 1)
    )
    assert not np.allclose(one, two)
