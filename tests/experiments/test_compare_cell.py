"""A sweep's cell: its run is fitted once, goes on, or is fitted anew; so is a distilled encoder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from activations.config import validate
from dictlearn import artifact, checkpoint, load
from dictlearn.config import FitConfig
from evals import planted
from evals.planted import PlantedConfig
from experiments.compare import cell as cell_module
from experiments.compare.cell import DISTILLED, done, encoder_of, files, fitted, identity, measure
from experiments.compare.sweep import Cell, Dictionary, Sweep, cells


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """A TopK SAE of 8,000 planted rows, coded by a distilled encoder too; it is measured."""
    folder = tmp_path_factory.mktemp("cell")
    truth = planted.plant(PlantedConfig(width=16, n_features=40, mean_active=2.0))
    planted.store(folder / "store", truth, 8_000)
    sae = {"name": "sae", "variant": {"name": "topk"}, "learning_rate": 1e-2}
    fit = {"batch_size": 512, "epochs": 0.5, "checkpoint_steps": 2}
    table = {
        "name": "toy", "output": str(folder / "out"), "n_atoms": [32], "k": [2], "seeds": [0],
        "evals": [], "encoders": ["distilled"],
        "data": {"store": str(folder / "store"), "hook": planted.HOOK},
        "dictionaries": {"topk": {"solver": sae, "fit": fit}},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DISTILLED, "epochs", 0.5)
        made = validate(Sweep, table, "sweep")
        measure(made, only(made))
        yield made


def only(sweep: Sweep) -> Cell:
    return cells(sweep, "sweep")[0]


def place_of(config: FitConfig) -> Path:
    assert config.output is not None
    return config.output


def store_of(sweep: Sweep) -> str:
    return identity(sweep, only(sweep))["store"]


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise AssertionError("fitted again")

    for name in names:
        monkeypatch.setattr(cell_module, name, fail)


def test_a_run_that_stands_is_taken(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "fit", "go_on", "fit_encoder")
    figures, _ = files(sweep, only(sweep))
    before = json.loads(figures.read_text())
    measure(sweep, only(sweep))
    assert json.loads(figures.read_text()) == before
    shutil.copytree(place_of(only(sweep).config), tmp_path / "run")
    config = dataclasses.replace(only(sweep).config, output=tmp_path / "run")
    fitted(config, store_of(sweep))
    with pytest.raises(AssertionError, match="fitted again"):
        fitted(dataclasses.replace(config, seed=1), store_of(sweep))
    with pytest.raises(AssertionError, match="fitted again"):
        fitted(config, "another store")


@pytest.fixture
def killed(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FitConfig:
    """The same fit elsewhere, stopped at its first checkpoint; an encoder of older atoms beside."""
    config = dataclasses.replace(only(sweep).config, output=tmp_path / "run")
    save = checkpoint.save

    def stops(*arguments: object, **settings: object) -> None:
        monkeypatch.setattr(checkpoint, "save", save)
        save(*arguments, **settings)  # pyright: ignore
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stops)
    with pytest.raises(KeyboardInterrupt):
        fitted(config, store_of(sweep))
    (tmp_path / "run-encoder").mkdir()
    return config


def same(sweep: Sweep, config: FitConfig) -> None:
    runs = place_of(only(sweep).config), place_of(config)
    whole, own = ((run / artifact.WEIGHTS).read_bytes() for run in runs)
    assert own == whole
    assert not (runs[1] / artifact.UNFINISHED).exists()
    assert not runs[1].with_name("run-encoder").exists()


def test_a_killed_fit_goes_on(
    sweep: Sweep, killed: FitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "fit")
    fitted(killed, store_of(sweep))
    same(sweep, killed)


def test_a_damaged_checkpoint_is_fitted_anew(sweep: Sweep, killed: FitConfig) -> None:
    file = place_of(killed) / artifact.CHECKPOINT
    file.write_bytes(file.read_bytes()[:-100])
    fitted(killed, store_of(sweep))
    same(sweep, killed)


def test_a_fit_killed_before_its_first_checkpoint_is_fitted_anew(
    sweep: Sweep, killed: FitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place_of(killed) / artifact.CHECKPOINT).unlink()
    forbid(monkeypatch, "go_on")
    fitted(killed, store_of(sweep))
    same(sweep, killed)


def test_a_distilled_encoder_is_fitted_once_and_found_again(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(place_of(only(sweep).config))
    kept = load(run.path.with_name(f"{run.path.name}-encoder"))
    assert artifact.hyperparameters(kept.coder.encoder)["activation"]["name"] == "abs_topk"
    assert (kept.coder.atoms == run.coder.atoms).all()
    rows = json.loads(files(sweep, only(sweep))[0].read_text())["rows"]
    by_encoder = {row["encoder"]: row["value"] for row in rows if row["figure"] == "fvu"}
    assert by_encoder["distilled"] == pytest.approx(kept.metrics["fvu"], rel=1e-5)
    assert by_encoder["own"] == run.metrics["fvu"]
    forbid(monkeypatch, "fit_encoder")
    again = encoder_of("distilled", run, 2)
    assert (again.weight == kept.coder.encoder.weight).all()  # pyright: ignore
    with pytest.raises(AssertionError, match="fitted again"):
        encoder_of("distilled", run, 3)
    assert done(sweep, only(sweep))
    monkeypatch.setitem(DISTILLED, "epochs", 1.0)
    assert not done(sweep, only(sweep))
    with pytest.raises(AssertionError, match="fitted again"):
        encoder_of("distilled", run, 2)


def test_a_dictionary_without_k_is_coded_at_the_sweeps_only_one(sweep: Sweep) -> None:
    snmf = Dictionary({"name": "snmf"}, {"epochs": 5}, {"centre": False})
    few = dataclasses.replace(
        sweep,
        n_atoms=(8,),
        dictionaries={"snmf": snmf},
        encoders=("omp",),
        output=sweep.place / "n",
    )
    measure(few, only(few))
    rows = json.loads(files(few, only(few))[0].read_text())["rows"]
    l0 = {row["encoder"]: row["value"] for row in rows if row["figure"] == "l0"}
    assert l0["omp"] == pytest.approx(2, rel=0.01)
    both = dataclasses.replace(few, k=(2, 3))
    assert only(both).k is None
    assert not done(both, only(both))  # at which of the two?
