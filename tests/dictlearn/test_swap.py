"""Another encoder on a run's dictionary: the same figures with its own, and fair linear ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dictlearn
from activations.config import validate
from activations.store import Store
from activations.terminal import UserError
from activations.writer import write_store
from dictlearn import artifact
from dictlearn.artifact import Run
from dictlearn.config import FitConfig
from dictlearn.data import Rows
from dictlearn.encoders.activations import AbsTopK
from dictlearn.encoders.linear import Linear, Tied
from dictlearn.encoders.omp import OMP
from dictlearn.fit import fit
from dictlearn.solvers import sae_variants as variants
from dictlearn.swap import fit_encoder, job_of, recode

HOOK = "blocks.0.hook_resid_post"
N, D, M, K = 1600, 16, 24, 3
SOLVERS: dict[str, dict[str, Any]] = {
    "ksvd": {"encoder": {"name": "omp", "k": K}},
    "sae": {"variant": {"name": "topk", "k": K}, "learning_rate": 1e-2},
    "batch_topk": {
        "name": "sae",
        "variant": {"name": "batch_topk", "k": K},
        "learning_rate": 1e-2,
    },
}


def write(path: Path, seed: int = 0) -> Path:
    """Rows of 3 signed atoms of 24, in 40 documents; they share a direction."""
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((N, M))
    codes[np.argsort(rng.random((N, M)), axis=1) >= K] = 0
    x = codes @ rng.standard_normal((M, D)) + 0.05 * rng.standard_normal((N, D)) + 2
    column = np.zeros(N, np.int32)
    document = (np.arange(N) // 40).astype(np.int32)
    datasets = {f"activations/{HOOK}": x.astype(np.float32), "document": document}
    write_store(
        path,
        [datasets | dict.fromkeys(("token", "sequence", "position"), column)],
        sequences=np.zeros((1, 2, 8)),
        vocabulary={},
        request={},
        model={},
        corpus={},
        forward={},
        hooks={HOOK: D},
        context_length=8,
        n_documents=40,
        shard_sequences=1,
        dropped_positions=("special",),
    )
    return path


def fitted(folder: Path, solver: str, **data: Any) -> Run:
    table = {
        "name": "small",
        "output": str(folder / solver),
        "data": {"store": str(folder / "store"), "hook": HOOK, **data},
        "solver": {"name": solver, "n_atoms": M} | SOLVERS[solver],
        "fit": {"batch_size": 200, "epochs": 6},
    }
    return dictlearn.load(fit(validate(FitConfig, table, "test")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swap")
    write(folder / "store")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    return {solver: fitted(folder, solver) for solver in SOLVERS}


@pytest.fixture(scope="module")
def ksvd(runs: dict[str, Run]) -> Run:
    return runs["ksvd"]


# recode


@pytest.mark.parametrize("solver", SOLVERS)
def test_its_own_encoder_has_its_own_figures(runs: dict[str, Run], solver: str) -> None:
    run = runs[solver]
    again = recode(run, run.coder.encoder)
    figures = json.loads(json.dumps(again.metrics))
    assert figures == {key: run.metrics[key] for key in figures}
    others = {"seconds", "best_step", "gain_bulk", "gain_bulk_interval"}
    rest = set(run.metrics) - set(figures)
    assert {key for key in rest if not key.startswith("control_")} == others
    assert eqx.tree_equal(again.coder, run.coder)
    assert again.path == run.path


def test_a_run_may_be_named_by_its_path(ksvd: Run) -> None:
    one, two, three = (recode(of, OMP(k=1)) for of in (ksvd, ksvd.path, str(ksvd.path)))
    assert one.metrics == two.metrics == three.metrics
    assert 0.9 < one.metrics["l0"] <= 1


@pytest.mark.parametrize("solver", ["sae", "batch_topk"])
def test_omp_lowers_an_autoencoders_error(runs: dict[str, Run], solver: str) -> None:
    run = runs[solver]
    before = (run.path / artifact.WEIGHTS).read_bytes()
    better = recode(run, OMP(k=K))
    assert better.metrics["fvu"] < 0.95 * run.metrics["fvu"]
    assert better.metrics["l0"] <= K
    assert isinstance(better.coder.encoder, OMP)
    assert eqx.tree_equal(better.coder.dictionary, run.coder.dictionary)
    assert not isinstance(run.coder.encoder, OMP)  # the run is what it was
    assert (run.path / artifact.WEIGHTS).read_bytes() == before
    more = recode(run, OMP(k=K + 2))
    assert more.metrics["fvu"] < better.metrics["fvu"]


@pytest.mark.parametrize("part", ["test", "validation"])
def test_figures_are_of_the_part_that_was_asked_for(ksvd: Run, part: Any) -> None:
    """Against sums over the rows that the run's split names."""
    again = recode(ksvd, OMP(k=2), part=part)
    rows = Rows(Store(ksvd.metadata["store"]["path"]), HOOK, np.array(ksvd.metadata["split"][part]))
    x = rows.whole().astype(np.float64)
    codes = again.coder.encode(x.astype(np.float32))
    x_hat = np.asarray(again.coder.decode(codes), np.float64)
    share = ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert again.metrics["fvu"] == pytest.approx(share, rel=1e-4)
    assert again.metrics["n_tokens"] == len(x)
    assert again.metrics["l0"] == pytest.approx(float(codes.l0().mean()), rel=1e-6)


@pytest.mark.parametrize("encoder", [OMP(k=M + 1), Tied(AbsTopK(M + 1))])
def test_more_codes_than_atoms(ksvd: Run, encoder: Any) -> None:
    with pytest.raises(ValueError, match=rf"k: {M + 1} is more than n_atoms = {M}"):
        recode(ksvd, encoder)


def test_a_store_that_is_gone_or_another(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    run = fitted(tmp_path, "ksvd")
    shutil.rmtree(store)
    with pytest.raises(UserError, match=str(store)):
        recode(run, OMP(k=1))
    write(store, seed=1)  # the same shapes, other rows
    with pytest.raises(UserError, match=r"was fitted on another store than .*store is now"):
        recode(run, OMP(k=1))
    with pytest.raises(UserError, match="was fitted on another store"):
        fit_encoder(run, variants.TopK(1), epochs=0.0)
    shutil.rmtree(store)
    write(store)  # as it was
    assert recode(run, run.coder.encoder).metrics["fvu"] == run.metrics["fvu"]


def test_carriers_and_centre_are_the_runs_own(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    run = fitted(tmp_path, "ksvd", centre=False, validation=0.2, test=0.3)
    np.testing.assert_array_equal(run.coder.normaliser.mean, 0)
    assert recode(run, run.coder.encoder).metrics["fvu"] == run.metrics["fvu"]
    job = job_of(run)
    assert eqx.tree_equal(job.normaliser, run.coder.normaliser)
    assert {name: rows.documents.tolist() for name, rows in job.parts.items()} == (
        run.metadata["split"]
    )


# fit_encoder


@pytest.fixture(scope="module")
def learned(ksvd: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Where its fit lies, the regression alone, and the trained encoder."""
    here = tmp_path_factory.mktemp("encoders") / "mine"
    regression = fit_encoder(ksvd, variants.AbsTopK(K), epochs=0.0)
    return here, regression, fit_encoder(
        ksvd, variants.AbsTopK(K), epochs=3.0, batch_size=100, learning_rate=1e-2, output=here
    )  # fmt: skip


def test_a_learned_encoder_beats_the_atoms_themselves(
    ksvd: Run, learned: tuple[Path, Any, Any]
) -> None:
    _, regression, trained = learned
    tied, by_regression, by_training, own = (
        recode(ksvd, encoder, part="validation").metrics["fvu"]
        for encoder in (Tied(AbsTopK(K)), regression, trained, ksvd.coder.encoder)
    )
    assert by_training <= by_regression < tied
    assert own < by_training  # what the atoms allow
    assert recode(ksvd, trained).metrics["l0"] == pytest.approx(K)


def test_the_dictionary_is_not_touched(ksvd: Run, learned: tuple[Path, Any, Any]) -> None:
    here, regression, trained = learned
    for encoder in (regression, trained):
        assert isinstance(encoder, Linear)
        assert encoder.weight.shape == (M, D)
        assert encoder.activation == AbsTopK(K)
    assert not np.allclose(regression.weight, trained.weight, rtol=1e-3)
    run = dictlearn.load(here)
    assert eqx.tree_equal(run.coder.encoder, trained)
    assert eqx.tree_equal(run.coder.dictionary.atoms, ksvd.coder.dictionary.atoms)
    np.testing.assert_allclose(run.coder.dictionary.bias, ksvd.coder.dictionary.bias, atol=1e-6)
    assert run.metadata["solver"]["frozen"] is True
    assert run.metadata["split"] == ksvd.metadata["split"]
    assert run.metrics["fvu"] == pytest.approx(recode(ksvd, trained).metrics["fvu"], rel=1e-5)


def test_the_regression_alone_is_that_of_the_pursuits_codes(
    ksvd: Run, learned: tuple[Path, Any, Any]
) -> None:
    """But for one scale, by numpy."""
    rows = job_of(ksvd).train.whole()
    x = ksvd.coder.normaliser.normalise(jnp.asarray(rows))
    z = OMP(k=K).prepare(ksvd.coder.dictionary).encode(x).dense()
    z, x = np.asarray(z, np.float64), np.asarray(x, np.float64)
    centred = x - x.mean(axis=0)
    system = centred.T @ centred / len(x)
    system += 1e-3 * np.trace(system) / D * np.eye(D)
    weight = np.linalg.solve(system, centred.T @ z / len(x)).T
    found = np.asarray(learned[1].weight)
    scale = (found * weight).sum() / (weight**2).sum()
    assert 0.5 < scale < 5
    np.testing.assert_allclose(found, scale * weight, atol=1e-3 * np.abs(found).max())


@pytest.mark.parametrize("variant", [variants.TopK(K), variants.JumpReLU(K)])
def test_codes_without_signs_are_not_negative(ksvd: Run, variant: Any) -> None:
    encoder = fit_encoder(ksvd, variant, epochs=0.0)
    run = recode(ksvd, encoder)
    rows = job_of(ksvd).parts["test"].whole()
    assert (run.coder.encode(rows).values >= 0).all()
    assert run.metrics["fvu"] < 1
    assert run.metrics["l0"] == pytest.approx(K, rel=0.3)


def test_where_the_encoders_fit_lies(
    ksvd: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh place each time, or the one that was named, which is replaced where that is asked."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"epochs": 1.0, "batch_size": 400}
    first = fit_encoder(ksvd, variants.TopK(1), **settings)
    second = fit_encoder(ksvd, variants.TopK(1), **settings)
    assert eqx.tree_equal(first, second)
    names = [path.name for path in sorted((tmp_path / "runs").iterdir())]
    assert names == ["small-encoder-001", "small-encoder-002"]
    for k in (1, 2):  # the second replaces the first
        mine = {"output": tmp_path / "mine", "overwrite": k == 2}
        fit_encoder(ksvd, variants.TopK(k), **settings, **mine)
        assert dictlearn.load(tmp_path / "mine").metadata["solver"]["variant"]["k"] == k
    with pytest.raises(UserError, match="already holds a finished run"):
        fit_encoder(ksvd, variants.TopK(1), **settings, output=tmp_path / "mine")
    with pytest.raises(UserError, match="whose dictionary is to be kept"):
        fit_encoder(ksvd, variants.TopK(1), output=ksvd.path, overwrite=True)
    assert dictlearn.load(ksvd.path).metadata["solver"]["name"] == "ksvd"
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_an_encoder_that_cannot_be_fitted(ksvd: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^variant\.k: {M + 1} is more than n_atoms = {M}"):
        fit_encoder(ksvd, variants.TopK(M + 1))
    with pytest.raises(UserError, match="gradient"):
        fit_encoder(ksvd, variants.GradientTopK(K), output=tmp_path / "run")
    with pytest.raises(UserError, match=r"fit\.batch_size"):
        fit_encoder(ksvd, variants.TopK(K), batch_size=10**6, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for variant in (variants.BatchTopK(K), variants.GradientTopK(K)):
        with pytest.raises(ValueError, match="is made by batches"):
            fit_encoder(ksvd, variant, epochs=0.0)


def test_an_encoder_of_another_dictionary(ksvd: Run) -> None:
    encoder = fit_encoder(ksvd, variants.TopK(K), epochs=0.0)
    wide = jax.tree.map(lambda a: jnp.concatenate([a, a]), encoder)
    with pytest.raises(ValueError, match="learned on another dictionary"):
        dictlearn.recode(ksvd, wide)


def test_the_same_rows_give_the_same_encoder(ksvd: Run) -> None:
    one, two = (fit_encoder(ksvd, variants.AbsTopK(K), epochs=0.0) for _ in range(2))
    assert eqx.tree_equal(one, two)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
