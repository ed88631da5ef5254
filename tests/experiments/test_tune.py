"""Tuning over a grid, and quality against cost: what is fitted, kept, chosen and told."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomli_w

from activations.config import validate
from activations.terminal import UserError
from dictlearn import load
from dictlearn.encoders.omp import OMP
from dictlearn.loop import DivergedError
from dictlearn.solvers.ksvd import KSVD
from dictlearn.solvers.sae import SAE
from dictlearn.solvers.sae_variants import TopK
from evals import planted
from evals.planted import PlantedConfig
from experiments import budget, tune
from experiments.compare.sweep import Sweep
from experiments.lines import Line


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of a TopK SAE on 8,000 planted rows of width 16."""
    folder = tmp_path_factory.mktemp("tune")
    truth = planted.plant(PlantedConfig(width=16, n_features=40, mean_active=2.0))
    planted.store(folder / "store", truth, 8_000)
    table = {
        "name": "tuned",
        "data": {"store": str(folder / "store"), "hook": planted.HOOK},
        "solver": {"name": "sae", "n_atoms": 40, "variant": {"name": "topk", "k": 2}},
        "fit": {"batch_size": 256, "epochs": 1},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(table))
    return folder / "config.toml"


def no_fit(*arguments: object, **settings: object) -> Path:
    raise AssertionError("fitted again")


def test_every_point_is_fitted_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, grid = tmp_path / "lines.jsonl", ["solver.learning_rate=1e-3,1e-2"]
    found = tune.run(config, [], grid, file)
    assert [line["solver"]["learning_rate"] for line in found] == [1e-3, 1e-2]
    assert found[1]["validation_fvu_bulk"] < found[0]["validation_fvu_bulk"]
    assert all(line["l0"] == 2 and 0 < line["at"] <= 1 for line in found)
    monkeypatch.setattr(tune, "fit", no_fit)
    assert tune.run(config, [], grid, file) == found
    other = config.with_name("other.toml")
    other.write_text(config.read_text().replace("epochs = 1", "epochs = 2"))
    other.replace(config)  # under the same name
    with pytest.raises(AssertionError, match="fitted again"):
        tune.run(config, [], grid, file)


def test_a_fit_that_diverges_is_a_result(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*arguments: object, **settings: object) -> Path:
        raise DivergedError("step 3: the objective is nan")

    monkeypatch.setattr(tune, "fit", diverges)
    (line,) = tune.run(config, [], ["solver.learning_rate=0.5"], tmp_path / "lines.jsonl")
    assert "step 3: the objective is nan" in line["failed"]
    assert "solver.learning_rate=0.5" in line["failed"]


@pytest.mark.parametrize(
    ("fixed", "grid", "message"),
    [
        ([], "solver.learing_rate=1e-3,1e-2", "learing_rate"),
        (['data.store="nowhere"'], "seed=1,2", "nowhere"),
        ([], "seed", "expected key=value"),
    ],
)
def test_a_mistake_is_no_result(
    config: Path, tmp_path: Path, fixed: list[str], grid: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tune.run(config, fixed, [grid], tmp_path / "lines.jsonl")
    assert not (tmp_path / "lines.jsonl").exists()


def test_an_axis_of_tables() -> None:
    text = 'solver.variant={name="topk",k=2},{name="relu",k=2}'
    assert tune.axis(text) == [
        'solver.variant={name="topk",k=2}',
        'solver.variant={name="relu",k=2}',
    ]
    assert tune.axis("seed=0,1") == ["seed=0", "seed=1"]


@pytest.fixture
def sweep(config: Path, tmp_path: Path) -> Sweep:
    """Dictionaries of the same rows, one seed."""
    pursuit = {"name": "omp"}
    fit = {"batch_size": 256}
    ksvd = {"name": "ksvd", "encoder": pursuit}
    nested = {"name": "ksvd", "encoder": {"name": "matryoshka_omp", "smallest": 20}}
    table = {
        "name": "budget", "output": str(tmp_path), "n_atoms": [40], "k": [2], "seeds": [0],
        "data": {"store": str(config.parent / "store"), "hook": planted.HOOK},
        "dictionaries": {
            "topk": {"solver": {"name": "sae", "variant": {"name": "topk"}}, "fit": fit},
            "ksvd": {"solver": ksvd, "fit": fit},
            "nested": {"solver": nested, "fit": fit},
        },
    }  # fmt: skip
    return validate(Sweep, table, "sweep")


def asked(sweep: Sweep, system: str = "topk", rates: Sequence[float] = (1e-3, 1e-2)) -> list[Line]:
    return budget.run(sweep, system, [0.5], list(rates), "sweep")


def test_budget_keeps_systems_apart_and_fits_once(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(asked(sweep)) == 2
    assert len(asked(dataclasses.replace(sweep, k=(4,)), rates=[1e-2])) == 3
    found = asked(sweep, "ksvd")
    assert [(line["system"], line["k"]) for line in found] == [
        ("topk", 2), ("topk", 2), ("topk", 4), ("ksvd", 2),
    ]  # fmt: skip
    for line in found:
        choice = [line[key] for key in ("system", "epochs", "learning_rate") if key in line]
        name = f"{'-'.join(map(str, choice))}-m40-k{line['k']}-s0"
        run = load(sweep.place / "budget" / line["store"][:8] / "runs" / name)
        assert line["fvu_bulk"] == run.metrics["fvu_bulk"]
    monkeypatch.setattr(budget, "fitted", no_fit)
    assert asked(sweep) == found
    with pytest.raises(AssertionError, match="fitted again"):
        asked(dataclasses.replace(sweep, seeds=(1,)))
    budget.show(found)
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[:5] for row in rows] == [
        ["topk", "40", "2", "0.5", "0.01"],  # the better rate on validation rows
        ["topk", "40", "4", "0.5", "0.01"],
        ["ksvd", "40", "2", "0.5", "1"],  # no rate; then the number of seeds
    ]


def test_budget_goes_on_after_a_rate_that_diverges(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*arguments: object, **settings: object) -> Path:
        raise DivergedError("step 3")

    monkeypatch.setattr(budget, "fitted", diverges)
    assert asked(sweep) == []
    text = (sweep.place / "budget/results.jsonl").read_text()
    assert [json.loads(line)["failed"] for line in text.splitlines()] == ["step 3", "step 3"]


def test_flops() -> None:
    m, k, d, b = 2048, 32, 640, 4096
    sae, dense = budget.flops(SAE(n_atoms=m, variant=TopK(k=k)), d, b)
    adam = 24 * m * d / b
    assert sae == 2 * m * d + 8 * k * d + adam
    assert dense == 12 * m * d + adam
    # Of a batch: correlations, Gram matrix, twins, pursuit; residual and power step of each code.
    whole = 2 * b * m * d + 4 * m * m * d + b * (m * k**2 + 8 * k * d)
    ksvd = KSVD(n_atoms=m, encoder=OMP(k=k))
    assert budget.flops(ksvd, d, b)[0] == pytest.approx(whole / b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "4,x"], "--epochs: expected numbers"),
        (["--epochs", "0"], r"cell ksvd-0\.0-m40-k2-s0:\n  fit\.epochs"),
        (["--system", "gaussian"], "--system: no 'gaussian' among topk, ksvd, nested"),
        (["--system", "nested"], "--system: FLOPs are known of"),
    ],
)
def test_budget_tells_mistakes_before_any_fit(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    table = json.loads(json.dumps(dataclasses.asdict(sweep), default=str))
    table = {key: value for key, value in table.items() if value is not None}
    monkeypatch.setattr(budget, "read_toml", lambda *_: table)
    monkeypatch.setattr(budget, "fitted", no_fit)
    monkeypatch.setattr(sys, "argv", ["budget", "sweep.toml", "--system", "ksvd", *options])
    with pytest.raises(UserError, match=message):
        budget.main()
