"""The loop: when it ends, what it keeps, what each solver asks of it, and what it says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import dictlearn
from activations.config import validate
from activations.store import Store
from activations.terminal import UserError
from dictlearn import artifact, heldout, report
from dictlearn.config import FitConfig
from dictlearn.data import split_by_document, statistics
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.nnls import NNLS
from dictlearn.encoders.omp import OMP
from dictlearn.fit import fit, go_on
from dictlearn.loop import Mark, _better
from dictlearn.plan import plan
from dictlearn.solvers import snmf
from dictlearn.solvers.sae import SAE

HOOK = "blocks.0.hook_resid_post"
N, D, M, K = 1200, 12, 16, 2
KSVD: dict[str, Any] = {"name": "ksvd", "n_atoms": M, "encoder": {"name": "omp", "k": K}}
SNMF: dict[str, Any] = {"name": "snmf", "n_atoms": M, "winners": 1.0}


def sae(variant: str = "topk", **settings: Any) -> dict[str, Any]:
    table = {"name": variant, "k": K}
    return {"name": "sae", "n_atoms": M, "variant": table, "learning_rate": 1e-2, **settings}


def rows() -> np.ndarray:
    """Two signed atoms of 16 each, and what they share."""
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((N, M))
    codes[np.argsort(rng.random((N, M)), axis=1) >= K] = 0
    x = codes @ rng.standard_normal((M, D)) + 0.1 * rng.standard_normal((N, D)) + 1
    return x.astype(np.float32)


DOCUMENT = np.arange(N) // 30


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    x = rows()
    return make_store((x[:500], DOCUMENT[:500]), (x[500:], DOCUMENT[500:]))


@pytest.fixture
def with_gradients(make_store: Callable[..., Store]) -> Store:
    x = rows()
    return make_store((x[:500], DOCUMENT[:500]), (x[500:], DOCUMENT[500:]), gradients=True)


def config(store: Store, run: Path, **changes: Any) -> FitConfig:
    table = {
        "name": "small",
        "output": str(run),
        "data": {"store": str(store.path), "hook": HOOK} | changes.pop("data", {}),
        "solver": KSVD,
        "fit": {"batch_size": 150, "epochs": 2},
        **changes,
    }
    return validate(FitConfig, table, "test")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]


def seen(run: Path) -> dict[int, float]:
    """The validation fvu_bulk of each step that has one."""
    key = "validation_fvu_bulk"
    return {line["step"]: line[key] for line in log_of(run) if key in line}


# When it ends

PATIENT = {"batch_size": 150, "epochs": 200, "evaluate_steps": 4, "tolerance": 0.3}


@pytest.mark.parametrize("patience", [2])
def test_patience_ends_a_fit_early_and_keeps_the_best(
    store: Store, tmp_path: Path, patience: int
) -> None:
    """It ends at the first `patience` evaluations in a row that are not better by 30 %."""
    run = fit(config(store, tmp_path / "run", fit=PATIENT | {"patience": patience}))
    scores = seen(run)
    goal, stale = np.inf, 0
    for score in scores.values():
        assert stale < patience, "went on for too long"
        goal, stale = (score, 0) if score < 0.7 * goal else (goal, stale + 1)
    assert stale == patience
    last = log_of(run)[-1]["step"]
    assert last == max(scores) < 100
    best = min(scores, key=scores.__getitem__)
    metrics = dictlearn.load(run).metrics
    assert metrics["best_step"] == best
    # And it is that step's dictionary that was kept.
    coder = dictlearn.load(run).coder
    parts = split_by_document(store, HOOK, validation=0.1, test=0.15, seed=0)
    again = heldout.evaluate(coder, parts["validation"], statistics(parts["train"])[2])
    assert again.fvu_bulk == pytest.approx(scores[best], rel=1e-6)


def test_the_best_may_lie_before_the_end(store: Store, tmp_path: Path) -> None:
    """A learning rate that throws the dictionary about: later steps are worse."""
    solver = sae(learning_rate=1.0, warmup=0.9)
    loop = {"batch_size": 150, "epochs": 2, "evaluate_steps": 1}
    run = fit(config(store, tmp_path / "run", solver=solver, fit=loop))
    scores = seen(run)
    assert dictlearn.load(run).metrics["best_step"] == min(scores, key=scores.__getitem__)
    assert min(scores, key=scores.__getitem__) < max(scores)
    assert min(scores.values()) < list(scores.values())[-1]


def test_a_low_error_bought_with_more_codes_is_not_best(store: Store, tmp_path: Path) -> None:
    """The L1 norm takes a while to keep ReLU's codes at k."""
    settings = {"batch_size": 150, "epochs": 60, "evaluate_steps": 24}
    run = fit(config(store, tmp_path / "run", solver=sae("relu"), fit=settings))
    tried = [line for line in log_of(run) if "validation_l0" in line]
    sparse = [line for line in tried if line["validation_l0"] <= 1.1 * K]
    assert len(sparse) < len(tried)
    best = min(sparse, key=lambda line: line["validation_fvu_bulk"])
    assert artifact.load(run).metrics["best_step"] == best["step"]
    assert min(line["validation_fvu_bulk"] for line in tried) < best["validation_fvu_bulk"]


def test_while_all_are_dense_the_newest_is_best() -> None:
    start = Dictionary(jnp.zeros((1, 1)), jnp.zeros(1)), OMP(k=1)
    mark = Mark(0, None, {"rows": 0}, start, 0, 0.0, False, 0.0, 0, 0, 0.0)
    scores = [(0.5, True), (0.8, True), (0.9, False), (0.7, True), (0.6, False)]
    told = []
    for step, (score, dense) in enumerate(scores, 1):
        new = _better(mark, start, step, score, dense, tolerance=0.0)
        mark = dataclasses.replace(mark, **new)
        told.append((mark.best_step, mark.best_score, mark.stale))
    assert told == [(1, 0.5, 0), (2, 0.8, 0), (3, 0.9, 0), (3, 0.9, 1), (5, 0.6, 0)]


@pytest.mark.parametrize(("every", "steps"), [(5, [5, 10, 12]), (99, [12])])
def test_evaluations_stand_where_they_were_asked_for(
    store: Store, tmp_path: Path, every: int, steps: list[int]
) -> None:
    """And at the last step, 2 epochs of 900 rows being 12; nothing ends it before."""
    loop = {"batch_size": 150, "epochs": 2, "evaluate_steps": every, "tolerance": 0.99}
    assert list(seen(fit(config(store, tmp_path / "run", fit=loop)))) == steps


def test_without_evaluate_steps_once_an_epoch(store: Store, tmp_path: Path) -> None:
    assert list(seen(fit(config(store, tmp_path / "run")))) == [6, 12]


def test_without_a_batch_size_an_epoch_is_one_step(store: Store, tmp_path: Path) -> None:
    """The same as naming all training rows."""
    one = fit(config(store, tmp_path / "one", fit={"epochs": 2}))
    two = fit(config(store, tmp_path / "two", fit={"epochs": 2, "batch_size": 900}))
    assert [line["step"] for line in log_of(one)] == [1, 2]
    assert list(seen(one)) == [1, 2]
    assert dictlearn.load(one).metadata["n_training_rows"] == 900
    assert (one / artifact.WEIGHTS).read_bytes() == (two / artifact.WEIGHTS).read_bytes()
    again = fit(validate_run(one, tmp_path / "again"))
    assert (one / artifact.WEIGHTS).read_bytes() == (again / artifact.WEIGHTS).read_bytes()


def validate_run(run: Path, output: Path) -> FitConfig:
    """A run's own config, for another place."""
    table = tomllib.loads((run / "config.toml").read_text())
    return validate(FitConfig, table | {"output": str(output)}, "test")


@pytest.mark.parametrize("at", [5, 12])
def test_a_patient_fit_that_was_stopped_ends_the_same(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Byte for byte, wherever it was stopped; the count of vain evaluations is kept."""
    loop = {"batch_size": 150, "epochs": 200, "evaluate_steps": 3, "tolerance": 0.1}
    loop |= {"patience": 2, "checkpoint_steps": 4}
    changes: dict[str, Any] = {"solver": sae(warmup=0.0, learning_rate=2e-2), "fit": loop}
    whole = fit(config(store, tmp_path / "whole", **changes))
    last = log_of(whole)[-1]["step"]
    assert 12 < last < 200
    original, calls = SAE.step, [0]

    def step(self: SAE, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(SAE, "step", step)
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run", **changes))
    monkeypatch.undo()
    assert_same_run(whole, go_on(tmp_path / "run"))


def test_stopped_after_patience_ended_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the test rows are read: no further step is made."""
    changes: dict[str, Any] = {"fit": PATIENT | {"patience": 1}}
    whole = fit(config(store, tmp_path / "whole", **changes))

    def stop(*arguments: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(heldout, "control", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run", **changes))
    monkeypatch.undo()
    assert_same_run(whole, go_on(tmp_path / "run"))


def assert_same_run(one: Path, other: Path) -> None:
    """Byte for byte, but for times."""
    assert (one / artifact.WEIGHTS).read_bytes() == (other / artifact.WEIGHTS).read_bytes()
    logs = [[line | {"seconds": 0} for line in log_of(run)] for run in (one, other)]
    assert logs[0] == logs[1]
    metrics = [dictlearn.load(run).metrics | {"seconds": 0} for run in (one, other)]
    assert metrics[0] == metrics[1]
    assert not (other / artifact.CHECKPOINT).exists()


# All rows in every batch


def test_snmf_end_to_end(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"centre": False}
    run = fit(config(store, tmp_path / "run", solver=SNMF, data=data, fit={"epochs": 9}))
    said = capsys.readouterr().out
    assert f"snmf of {HOOK}: allowed, but unusual" in said
    assert "blocks.N.mlp.hook_post" in said
    log, loaded = log_of(run), dictlearn.load(run)
    objectives = [line["objective"] for line in log]
    assert len(log) == 9
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(objectives))
    assert isinstance(loaded.coder.encoder, NNLS)
    np.testing.assert_array_equal(loaded.coder.normaliser.mean, 0)
    np.testing.assert_array_equal(loaded.coder.dictionary.bias, 0)
    assert np.isfinite(loaded.metrics["fvu"])
    assert loaded.metrics["fvu"] < loaded.metrics["control_fvu"]
    codes = loaded.coder.encode(rows())
    assert (codes.values >= 0).all()
    report.show(run)
    shown = capsys.readouterr().out
    assert "snmf, 16 atoms" in shown
    assert "coded by nnls" in shown


def test_without_centre_the_scale_is_about_zero(store: Store) -> None:
    parts = split_by_document(store, HOOK, validation=0.1, test=0.15, seed=0)
    x = parts["train"].whole().astype(np.float64)
    _, normaliser, bulk = statistics(parts["train"], centre=False)
    np.testing.assert_array_equal(normaliser.mean, np.zeros(D))
    assert float(normaliser.scale) == pytest.approx(np.sqrt((x**2).mean()), rel=1e-6)
    _, centred, same = statistics(parts["train"])
    assert float(centred.scale) == pytest.approx(np.sqrt(x.var(axis=0).mean()), rel=1e-6)
    np.testing.assert_array_equal(bulk.carriers, same.carriers)
    assert bulk.norm_limit == same.norm_limit


def test_whole_is_all_rows_in_the_stores_order(store: Store) -> None:
    parts = split_by_document(store, HOOK, validation=0.1, test=0.15, seed=0)
    for part in parts.values():
        expected = rows()[np.isin(DOCUMENT, part.documents)]
        np.testing.assert_array_equal(part.whole(), expected)


def test_snmf_takes_no_batches(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fit\.batch_size: snmf takes all rows in every step"):
        config(store, tmp_path / "run", solver=SNMF, fit={"batch_size": 900, "epochs": 1})


def test_snmf_of_more_rows_than_it_may_hold(store: Store, tmp_path: Path) -> None:
    few = SNMF | {"max_rows": 899}
    with pytest.raises(UserError, match=r"solver\.max_rows: snmf .* 899, and the store has 900"):
        fit(config(store, tmp_path / "run", solver=few, fit={"epochs": 1}))
    assert not (tmp_path / "run").exists()
    fewer = config(store, tmp_path / "run", solver=SNMF | {"max_rows": 100}, fit={"epochs": 1})
    with pytest.raises(UserError, match=r"solver\.max_rows"):  # about so many rows, in a dry run
        plan(fewer, "test", overwrite=False)
    fit(config(store, tmp_path / "run", solver=SNMF | {"max_rows": 900}, fit={"epochs": 1}))


def test_snmf_that_was_stopped_ends_the_same(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"solver": SNMF, "fit": {"epochs": 9, "checkpoint_steps": 2}}
    whole = fit(config(store, tmp_path / "whole", **changes))
    original, calls = snmf.SNMF.step, [0]

    def step(self: snmf.SNMF, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(snmf.SNMF, "step", step)
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run", **changes))
    monkeypatch.undo()
    assert_same_run(whole, go_on(tmp_path / "run"))


# Gradients


def test_gradients_that_are_not_there(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"harvested without gradients.*gradients = true"):
        fit(config(store, tmp_path / "run", solver=sae("gradient_topk")))
    with pytest.raises(UserError, match="harvested without gradients"):
        plan(config(store, tmp_path / "run", solver=sae("gradient_topk")), "x", overwrite=False)
    assert not (tmp_path / "run").exists()


def test_a_fit_with_gradients(
    with_gradients: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures are of codes without the gradient; `with_gradient` of the other ones."""
    run = fit(config(with_gradients, tmp_path / "run", solver=sae("gradient_topk")))
    loaded = dictlearn.load(run)
    figures = loaded.metrics["with_gradient"]
    assert set(figures) == {"fvu", "fvu_bulk", "l0"}
    assert all(np.isfinite(value) for value in figures.values())
    parts = split_by_document(with_gradients, HOOK, validation=0.1, test=0.15, seed=0)
    x = parts["test"].whole()
    for gradient, expected in ((None, loaded.metrics["fvu"]), (-x, figures["fvu"])):
        x_hat = np.asarray(loaded.coder.decode(loaded.coder.encode(x, gradient=gradient)))
        centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
        share = ((x.astype(np.float64) - x_hat) ** 2).sum() / (centred**2).sum()
        assert expected == pytest.approx(share, rel=1e-4)
    assert loaded.metrics["fvu"] != figures["fvu"]
    report.show(run)
    assert "gradient_topk sae, 16 atoms" in capsys.readouterr().out


def test_the_scale_is_the_mean_projection_in_the_solvers_units(
    with_gradients: Store, tmp_path: Path
) -> None:
    """|<s g, d_j>|, of gradients -x; the atoms hardly move."""
    solver = sae("gradient_topk", learning_rate=1e-9)
    loop = {"epochs": 1}
    coder = dictlearn.load(
        fit(config(with_gradients, tmp_path / "run", solver=solver, fit=loop))
    ).coder
    x = split_by_document(with_gradients, HOOK, validation=0.1, test=0.15, seed=0)["train"].whole()
    along = np.abs(float(coder.normaliser.scale) * x @ np.asarray(coder.dictionary.atoms).T)
    assert float(coder.encoder.activation.scale) == pytest.approx(along.mean(), rel=1e-4)


def test_rows_with_their_gradients_by_shard(with_gradients: Store) -> None:
    rows_of = split_by_document(with_gradients, HOOK, validation=0.1, test=0.15, seed=0)["train"]
    n = 0
    for x, _, gradient in rows_of.by_shard(gradients=True):
        np.testing.assert_array_equal(gradient, -x)
        n += len(x)
    assert n == len(rows_of)
    assert all(gradient is None for *_, gradient in rows_of.by_shard())


def test_a_variant_without_gradients_ignores_them(with_gradients: Store, tmp_path: Path) -> None:
    run = fit(config(with_gradients, tmp_path / "run", solver=sae()))
    assert "with_gradient" not in dictlearn.load(run).metrics


# The family


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (sae("relu"), "relu sae, 16 atoms, about 2 a token"),
        (sae("jumprelu"), "jumprelu sae, 16 atoms, about 2 a token"),
        (sae("batch_topk"), "batch_topk sae, 16 atoms, about 2 a token"),
        (sae("batch_topk", matryoshka=4), "matryoshka batch_topk sae, 16 atoms, about 2 a token"),
        (sae("abs_topk", bias="geometric_median"), "abs_topk sae, 16 atoms, at most 2 a token"),
    ],
)
def test_fits_of_the_family(
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    solver: dict[str, Any],
    words: str,
) -> None:
    run = fit(config(store, tmp_path / "run", solver=solver))
    loaded = dictlearn.load(run)
    assert np.isfinite(loaded.metrics["fvu"])
    assert 0 < loaded.metrics["fvu"] < 1
    assert 0 < loaded.metrics["l0"] < M
    assert loaded.metadata["solver"] == artifact.hyperparameters(
        config(store, tmp_path / "run", solver=solver).solver
    )
    np.testing.assert_allclose(jnp.linalg.norm(loaded.coder.dictionary.atoms, axis=1), 1, rtol=1e-5)
    report.show(run)
    shown = capsys.readouterr().out
    assert words in shown
    assert "OMP with the same k" in shown


def test_batch_topk_of_one_row_a_batch(store: Store, tmp_path: Path) -> None:
    solver, loop = sae("batch_topk"), {"batch_size": 1, "epochs": 0.05}
    run = fit(config(store, tmp_path / "run", solver=solver, fit=loop))
    assert [line["l0"] for line in log_of(run)] == [K] * 45
    assert 0 < dictlearn.load(run).metrics["l0"] < M


# What it says


@pytest.mark.parametrize(("variant", "every"), [("topk", None), ("topk", 1), ("jumprelu", None)])
def test_a_learning_rate_that_diverges(
    store: Store, tmp_path: Path, variant: str, every: int | None
) -> None:
    loop = {"batch_size": 150, "epochs": 5} | ({"evaluate_steps": every} if every else {})
    solver = sae(variant, learning_rate=1e30)
    message = r"step \d+: the objective is (nan|inf).*lower solver\.learning_rate"
    with pytest.raises(UserError, match=message):
        fit(config(store, tmp_path / "run", solver=solver, fit=loop))
    assert not (tmp_path / "run").exists()


def test_a_start_that_vanished_does_not_keep_a_run_from_being_measured(
    store: Store, tmp_path: Path
) -> None:
    first = fit(config(store, tmp_path / "first"))
    second = fit(config(store, tmp_path / "second", start=str(first)))
    shutil.rmtree(first)
    again = dictlearn.recode(second, dictlearn.load(second).coder.encoder)
    assert again.metrics["fvu"] == dictlearn.load(second).metrics["fvu"]


def test_carriers_are_no_nonzeros_of_the_solver(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    x = rows()
    x[:, 3] = 100 * np.random.default_rng(1).standard_normal(N)
    store = make_store((x, DOCUMENT))
    loop = {"batch_size": 150, "epochs": 40, "evaluate_steps": 6, "patience": 2, "tolerance": 0.3}
    data = {"keep_carriers": True}
    run = fit(config(store, tmp_path / "run", solver=sae(), fit=loop, data=data))
    log = log_of(run)
    assert log[-1]["validation_l0"] == K + 1
    assert len(log) < 100  # it is not dense, so that patience ends the fit


def test_validation_rows_that_do_not_vary(make_store: Callable[..., Store], tmp_path: Path) -> None:
    x = np.ones((N, D), np.float32)
    x[:30] = rows()[:30]
    store = make_store((x, DOCUMENT))
    splits = (split_by_document(store, HOOK, validation=0.1, test=0.1, seed=s) for s in range(20))
    seed = next(s for s, parts in enumerate(splits) if 0 in parts["train"].documents)
    with pytest.raises(UserError, match=r"data\.validation: its rows do not vary"):
        fit(config(store, tmp_path / "run", seed=seed, data={"validation": 0.1, "test": 0.1}))


def test_all_rows_that_no_two_devices_share(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(config(store, tmp_path / "run", solver=SNMF, fit={"epochs": 2}))
    monkeypatch.setattr("dictlearn.fit.jax.device_count", lambda: 7)
    with pytest.raises(UserError, match="among 7 devices; snmf takes all, use one device"):
        fit(config(store, tmp_path / "other", solver=SNMF, fit={"epochs": 2}))
    assert dictlearn.recode(run, NNLS()).metrics["fvu"] > 0  # steps nothing


def test_frozen_needs_a_start(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start: a frozen dictionary is that of a run"):
        config(store, tmp_path / "run", solver=sae(frozen=True))
    with pytest.raises(UserError, match="no run there"):
        plan(config(store, tmp_path / "run", start=str(tmp_path / "x")), "c", overwrite=False)


def test_an_encoder_alone_is_no_rival(store: Store, tmp_path: Path) -> None:
    first = fit(config(store, tmp_path / "first"))
    frozen = sae(frozen=True)
    fit(config(store, tmp_path / "encoder", solver=frozen, start=str(first)))
    assert report._sibling(first, artifact.read_metadata(first)[0]) is None
    rival = fit(config(store, tmp_path / "rival", solver=sae()))
    found = report._sibling(first, artifact.read_metadata(first)[0])
    assert found is not None
    assert found[0] == rival
