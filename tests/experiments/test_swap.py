"""The encoder-swap experiment: its cells, that runs go on, and what its tables say."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from activations.terminal import UserError
from dictlearn import artifact, load
from dictlearn.checkpoint import CheckpointError
from dictlearn.config import FitConfig
from evals import planted
from evals.planted import PlantedConfig
from experiments import swap, swap_tables
from experiments.swap import Cell, Place

NAMES = [("data_rows", "own"), ("data_rows", "omp"), ("topk", "own"), ("topk", "omp")]
CELLS = [Cell(dictionary, encoder, 32, 2, 0) for dictionary, encoder in NAMES]
DISTILLED = Cell("topk", "distilled", 32, 2, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An experiment on 8,000 planted rows of width 16, whose four cells are done."""
    folder = tmp_path_factory.mktemp("swap")
    truth = planted.plant(PlantedConfig(width=16, n_features=40, mean_active=2.0))
    planted.store(folder / "store", truth, 8_000)
    made = Place("resid", folder / "store", planted.HOOK, 0.5, folder / "out")
    swap.run(CELLS, made)
    return made


@pytest.fixture
def no_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise AssertionError("fitted again")

    for name in ("fit", "go_on", "fit_encoder"):
        monkeypatch.setattr(swap, name, fail)


def lines_of(place: Place) -> list[swap.Line]:
    return [json.loads(text) for text in (place.out / "results.jsonl").read_text().splitlines()]


def test_cells_hold_the_figures_of_the_test_rows(place: Place) -> None:
    by_name = {(line["dictionary"], line["encoder"]): line for line in lines_of(place)}
    assert list(by_name) == NAMES
    for name in ("data_rows", "topk"):
        metrics = load(place.out / f"runs/resid-{name}-m32-k2-s0").metrics
        for key in (*swap_tables.FIGURES, "fvu_interval", "fvu_bulk_interval", "seconds"):
            assert by_name[name, "own"][key] == metrics[key]
    rows, sae = by_name["data_rows", "omp"], by_name["topk", "omp"]
    assert rows["fvu"] == by_name["data_rows", "own"]["fvu"]  # its own encoder is OMP
    assert sae["fvu"] < by_name["topk", "own"]["fvu"]
    assert sae["solver"]["learning_rate"] == swap.LEARNING_RATE["topk"]
    assert sae["fit"]["epochs"] == 0.5


@pytest.mark.usefixtures("no_fits")
def test_what_is_done_is_not_done_again(place: Place) -> None:
    file = place.out / "results.jsonl"
    assert swap.run(CELLS, place) == lines_of(place)
    whole = file.read_text()
    file.write_text(whole[: len(whole) - 200])  # a kill: the run stands, its line is cut
    found = swap.run(CELLS, place)
    assert [(line["dictionary"], line["encoder"]) for line in found] == NAMES
    texts = file.read_text().splitlines()
    assert len(texts) == 5
    assert texts[3] in whole
    assert json.loads(texts[4])["fvu"] == json.loads(whole.splitlines()[3])["fvu"]
    file.write_text(whole)


@pytest.mark.usefixtures("no_fits")
def test_another_config_or_store_is_another_fit(place: Place) -> None:
    with pytest.raises(AssertionError, match="fitted again"):
        swap.run(CELLS, dataclasses.replace(place, epochs=0.25))
    config = swap.config_of(CELLS[0], place)
    with pytest.raises(AssertionError, match="fitted again"):
        swap.fitted(config, "another store")


def test_a_distilled_encoder_is_kept_beside_its_dictionary(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(swap.DISTILLED, "epochs", 0.5)
    (line,) = swap.run([DISTILLED], place)
    assert line["distilled"] == {"learning_rate": 3e-3, "epochs": 0.5}
    run = load(place.out / "runs/resid-topk-m32-k2-s0")
    kept = load(place.out / "runs/resid-topk-m32-k2-s0-encoder")
    assert artifact.hyperparameters(kept.coder.encoder)["activation"]["name"] == "abs_topk"

    def fail(*arguments: object, **settings: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(swap, "fit_encoder", fail)
    again = swap.encoder_of("distilled", run, 2)
    assert (again.weight == kept.coder.encoder.weight).all()  # pyright: ignore
    with pytest.raises(AssertionError, match="fitted again"):
        swap.encoder_of("distilled", run, 3)


def test_a_killed_fit_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def stand_in(name: str) -> Callable[..., Path]:
        def done(*arguments: object, **settings: object) -> Path:
            calls.append(name)
            return place.out / "runs/resid-topk-m32-k2-s0"

        return done

    monkeypatch.setattr(swap, "fit", stand_in("fit"))
    monkeypatch.setattr(swap, "go_on", stand_in("go_on"))
    config = swap.config_of(CELLS[2], dataclasses.replace(place, out=tmp_path))
    run = config.output
    assert run is not None
    shutil.copytree(place.out / "runs" / run.name, run)
    swap._encoder_place(run).mkdir()
    (run / artifact.UNFINISHED).write_text("killed before its first checkpoint")
    swap.fitted(config, "")
    (run / artifact.CHECKPOINT).write_text("")
    swap.fitted(config, "")
    swap.fitted(dataclasses.replace(config, seed=1), "")
    assert calls == ["fit", "go_on", "fit"]

    def refuses(*arguments: object, **settings: object) -> Path:
        calls.append("refused")
        raise CheckpointError("of another store")

    monkeypatch.setattr(swap, "go_on", refuses)
    swap.fitted(config, "")
    assert calls[3:] == ["refused", "fit"]
    assert not swap._encoder_place(run).exists()  # of atoms that are no more


@pytest.mark.parametrize("table", swap.TABLES)
def test_every_dictionary_has_a_config(place: Place, table: str) -> None:
    here = dataclasses.replace(place, table=table)
    dictionaries, sizes = swap.TABLES[table]
    for name in dictionaries:
        for size in map(int, sizes.split(",")):
            config = swap.config_of(Cell(name, "own", size, 16, 3), here)
            assert isinstance(config, FitConfig)
            assert config.solver.n_atoms == size
            assert config.seed == 3
            assert getattr(config.solver.control, "k", None) == (None if "snmf" in name else 16)


def test_tables_show_means_and_paired_differences(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"n_atoms": 8, "k": 2, "l0": 2.0, "frac_alive": 1.0, "twins": None, "seconds": 1.0}
    values = {"ksvd": (0.1, 0.2, 0.3), "topk": (0.2, 0.25, 0.45)}
    lines = [
        figures | {"dictionary": name, "encoder": "own", "seed": seed, "fvu_bulk": value}
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]
    mean, own, paired = swap_tables.grids(lines, "fvu_bulk", "ksvd")
    assert mean[1:] == (["", "own"], [["ksvd", "0.2000 ± 0.1000"], ["topk", "0.3000 ± 0.1323"]])
    assert own[2][0] == ["ksvd", "1.0000 ± 0.0000", "", "2.0 ± 0.0", "1.0 ± 0.0"]
    # Differences 0.1, 0.05, 0.15: deviation 0.05; t of 2 degrees of freedom is 4.303.
    assert paired[2] == [["topk", "+0.1000 ± 0.0289 (-0.0242 to +0.2242)"]]
    swap_tables.show(mean, markdown=True)
    assert "| topk | 0.3000 ± 0.1323 |" in capsys.readouterr().out
    swap_tables.show(paired, markdown=False)
    assert "fvu_bulk less that of ksvd" in capsys.readouterr().out


def test_a_column_can_be_compared_too() -> None:
    lines = [
        {"dictionary": "topk", "encoder": name, "seed": 0, "n_atoms": 8, "k": 2, "fvu": value}
        for name, value in (("omp", 0.1), ("tied", 0.3), ("nn_omp", None))
    ]
    assert swap_tables.grids(lines, "fvu", "omp")[1][1:] == (
        ["", "tied", "nn_omp"],
        [["topk", "+0.2000", ""]],
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--table", "resid,mlp", "--table: no 'resid,mlp' among resid, mlp"),
        ("--dictionaries", "ksvd,snmf", "--dictionaries: no 'snmf' among ksvd"),
        ("--encoders", "lasso", "--encoders: no 'lasso' among own"),
        ("--against", "gaussian", "--against: no 'gaussian' among data_rows"),
        ("--figure", "loss", "--figure: no 'loss' among fvu_bulk"),
        ("--seeds", "0,x", "--seeds: expected numbers"),
        ("--k", "0", "--k: expected numbers"),
        ("--k", "64", "--k: 64 is more than --n-atoms has: 32"),
        ("--epochs", "0", "fit.epochs"),
        ("--hook", "blocks.7.hook", "blocks.7.hook"),
    ],
)
def test_mistakes_are_told(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    message: str,
) -> None:
    options = {
        "--store": str(place.store),
        "--hook": place.hook,
        "--out": str(tmp_path),
        "--dictionaries": "data_rows,topk",
        "--n-atoms": "32",
        "--k": "2",
    }
    arguments = [text for pair in (options | {option: value}).items() for text in pair]
    monkeypatch.setattr(sys, "argv", ["swap", *arguments])
    with pytest.raises(UserError, match=message):
        swap.main()
    assert not (tmp_path / "runs").exists() or option == "--hook"
