"""A sweep: its cells, that it goes on, its tidy table, its intervals, and what its report says."""

from __future__ import annotations

import copy
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from activations.config import validate
from activations.terminal import UserError
from dictlearn import load
from evals import planted
from evals.planted import PlantedConfig
from experiments.compare import __main__ as command
from experiments.compare import cell as cell_module
from experiments.compare.cell import measure
from experiments.compare.report import verdict, write_report
from experiments.compare.results import Interval, Results
from experiments.compare.shown import BULK, Shown
from experiments.compare.sweep import Sweep, cells

PURSUIT = {"name": "omp"}
SHORT = {"batch_size": 1024, "epochs": 0.2}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep over planted rows, as its TOML file would have it."""
    folder = tmp_path_factory.mktemp("compare")
    truth = planted.plant(PlantedConfig(width=16, n_features=40, mean_active=2.0))
    planted.store(folder / "store", truth, 8_000)
    rows = {"name": "untrained", "atoms": "data_rows", "encoder": PURSUIT}
    sae = {"name": "sae", "variant": {"name": "topk"}, "learning_rate": 1e-2}
    return {
        "name": "toy", "output": str(folder / "out"), "n_atoms": [32], "k": [2, 3],
        "seeds": [0, 1], "evals": [], "against": "topk",
        "data": {"store": str(folder / "store"), "hook": planted.HOOK},
        "dictionaries": {
            "rows": {"solver": rows, "fit": SHORT, "control": True},
            "topk": {"solver": sae, "fit": SHORT},
        },
    }  # fmt: skip


def sweep_of(table: dict[str, Any]) -> Sweep:
    return validate(Sweep, table, "sweep")


@pytest.fixture(scope="module")
def results(table: dict[str, Any]) -> Results:
    """All eight cells, done in this process."""
    sweep = sweep_of(table)
    every = cells(sweep, "sweep")
    for cell in every:
        measure(sweep, cell)
    return Results(sweep, every)


def run(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], folder: Path, *more: str) -> None:
    """The command, with cells in this process."""
    file = folder / "sweep.toml"
    file.write_text("")
    monkeypatch.setattr(command, "read_toml", lambda *_: copy.deepcopy(table))
    monkeypatch.setattr(sys, "argv", ["compare", str(file), *more])
    command.main()


def in_process(cell: cell_module.Cell, file: Path, logs: Path) -> str | None:
    del logs
    try:
        measure(sweep_of(json.loads(file.read_text())), cell)
    except UserError as error:
        return str(error)
    return None


# Cells.


def test_cells_are_the_whole_grid(table: dict[str, Any]) -> None:
    names = [cell.name for cell in cells(sweep_of(table), "sweep")]
    assert len(set(names)) == len(names) == 8
    assert names[:3] == ["rows-m32-k2-s0", "topk-m32-k2-s0", "rows-m32-k3-s0"]
    snmf = {"solver": {"name": "snmf"}, "fit": {"epochs": 5}, "data": {"centre": False}}
    more = table | {"dictionaries": table["dictionaries"] | {"snmf": snmf}}
    own = [cell for cell in cells(sweep_of(more), "sweep") if cell.dictionary == "snmf"]
    assert [(cell.k, cell.seed, cell.config.data.centre) for cell in own] == [
        (None, 0, False), (None, 1, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": [2, 40]}, r"cell rows-m32-k40-s0:\n  solver"),
        ({"against": "ksvd"}, "against: no 'ksvd' among rows, topk"),
        ({"evals": ["cores"]}, "evals: no 'cores'"),
        ({"encoders": ["lasso"]}, "encoders"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any], message: str,
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=message):
        run(monkeypatch, table | change | {"output": str(tmp_path / "out")}, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["k", "n_atoms"])
def test_the_sweep_alone_gives_sizes(table: dict[str, Any], key: str) -> None:
    more = copy.deepcopy(table)
    solver = more["dictionaries"]["topk"]["solver"]
    (solver["variant"] if key == "k" else solver)[key] = 2
    with pytest.raises(UserError, match=rf"dictionaries\.topk\.solver.*{key}"):
        cells(sweep_of(more), "sweep")


# The command.


def test_a_cell_runs_in_a_process_of_its_own(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    one = table | {"seeds": [0], "k": [2], "output": str(tmp_path / "out")}
    one["dictionaries"] = {"rows": table["dictionaries"]["rows"]}
    one["against"] = "rows"
    run(monkeypatch, one, tmp_path, "--dry-run")
    assert capsys.readouterr().out.splitlines()[-1] == "  rows-m32-k2-s0"
    assert not (tmp_path / "out").exists()
    run(monkeypatch, one, tmp_path, "--workers", "1")
    assert load(tmp_path / "out/runs/rows-m32-k2-s0").metrics["fvu"] < 1
    assert (tmp_path / "out/report.html").exists()


def test_what_is_done_is_not_done_again(
    table: dict[str, Any], results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(command, "_one", lambda *_: pytest.fail("done again"))
    run(monkeypatch, table, tmp_path)
    assert "8 cells, 8 done" in capsys.readouterr().out
    sums = results.sweep.place / "cells/topk-m32-k2-s0.npz"
    whole = sums.read_bytes()
    sums.unlink()
    run(monkeypatch, table, tmp_path, "--dry-run")
    assert capsys.readouterr().out.splitlines()[-1] == "  topk-m32-k2-s0"
    sums.write_bytes(whole)
    run(monkeypatch, table | {"encoders": ["tied"]}, tmp_path, "--dry-run")
    assert "8 cells, 0 done" in capsys.readouterr().out


def test_a_cell_that_fails_leaves_the_others(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy.deepcopy(table) | {"output": str(tmp_path / "out"), "seeds": [0], "k": [2]}
    broken["dictionaries"]["nan"] = copy.deepcopy(broken["dictionaries"]["topk"])
    broken["dictionaries"]["nan"]["solver"]["learning_rate"] = 1e38
    monkeypatch.setattr(command, "_one", in_process)
    with pytest.raises(UserError, match=r"1 of 3 cells are not done.*\n  nan-m32-k2-s0: "):
        run(monkeypatch, broken, tmp_path, "--workers", "1")
    page = (tmp_path / "out/report.html").read_text()
    assert "2 of 3 cells are done" in page


def test_a_killed_sweep_goes_on(
    table: dict[str, Any], results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = table | {"output": str(tmp_path / "out"), "seeds": [0], "k": [2, 3]}
    started: list[str] = []

    def killed(cell: cell_module.Cell, file: Path, logs: Path) -> str | None:
        started.append(cell.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return in_process(cell, file, logs)

    monkeypatch.setattr(command, "_one", killed)
    with pytest.raises(UserError, match="of 4 cells are not done; the same command goes on"):
        run(monkeypatch, some, tmp_path, "--workers", "1")
    first = {file.stem for file in (tmp_path / "out/cells").glob("*.json")}
    assert started[0] in first
    assert started[1] not in first
    again: list[str] = []

    def counted(cell: cell_module.Cell, file: Path, logs: Path) -> str | None:
        again.append(cell.name)
        return in_process(cell, file, logs)

    monkeypatch.setattr(command, "_one", counted)
    run(monkeypatch, some, tmp_path, "--workers", "1")
    sweep = sweep_of(some)
    every = cells(sweep, "sweep")
    assert {*again} == {cell.name for cell in every} - first
    for k in (2, 3):
        one, other = (of.of("topk", 32, k, "fit", "fvu_bulk")[0].value
                      for of in (Results(sweep, every), results))  # fmt: skip
        assert one == other


# The table.


def test_the_table_has_the_figures_of_every_run(results: Results) -> None:
    place = results.sweep.place
    results.write(place)
    parquet = pyarrow.parquet.read_table(place / "cells.parquet").to_pylist()
    with (place / "cells.csv").open() as file:
        plain = list(csv.DictReader(file))
    assert len(parquet) == len(plain) == len(results.rows)
    for row, text in zip(parquet, plain, strict=True):
        assert {key: str(row[key]) for key in ("dictionary", "encoder", "figure")} == {
            key: text[key] for key in ("dictionary", "encoder", "figure")
        }
        assert float(text["value"]) == row["value"]
    metrics = load(place / "runs/topk-m32-k3-s1").metrics
    own = {
        row["figure"]: row for row in parquet
        if (row["dictionary"], row["k"], row["seed"], row["encoder"]) == ("topk", 3, 1, "own")
    }  # fmt: skip
    for key in ("fvu", "fvu_bulk", "l0", "frac_alive", "twins", "seconds"):
        assert own[key]["value"] == metrics[key]
    assert [own["fvu"]["low"], own["fvu"]["high"]] == metrics["fvu_interval"]
    assert {row["control"] for row in parquet if row["dictionary"] == "rows"} == {True}


def test_sums_over_documents_give_the_figure(results: Results) -> None:
    for figure in ("fvu", "fvu_bulk"):
        for encoder in ("own", "omp"):
            for one in results.of("topk", 32, 3, "fit", figure, encoder).values():
                assert one.documents is not None
                assert one.drawn is not None
                whole = one.drawn(np.ones((1, len(one.documents))))[0]
                assert whole == pytest.approx(one.value, rel=1e-12)


# The report.


@pytest.mark.parametrize(
    ("apart", "shown", "said"),
    [
        (Interval(-0.1, -0.2, -0.05, 5, 0.1), BULK, "better: -0.1000 (-0.2000 to -0.0500)"),
        (Interval(0.1, 0.05, 0.2, 5, 0.1), BULK, "worse: +0.1"),
        (Interval(0.1, 0.05, 0.2, 5, 0.1), Shown("", "", "", "higher"), "better: +0.1"),
        (Interval(0.1, 0.05, 0.2, 5, 0.1), Shown("", "", "", ""), "higher: +0.1"),
        (Interval(0.1, -0.05, 0.2, 5, 0.12), BULK, "not told apart: +0.1000"),
        (Interval(0.1, 0.05, 0.2, 4, 0.1), BULK, "no verdict of 4 seeds"),
        (Interval(math.nan, math.nan, math.nan, 0, math.nan), BULK, ""),
    ],
)
def test_a_verdict_says_what_the_interval_supports(
    apart: Interval, shown: Shown, said: str
) -> None:
    assert said in verdict(apart, shown, [32.0, 32.5])
    assert "L0" not in verdict(apart, shown, [32.0, 32.5])
    if apart.n:
        assert verdict(apart, shown, [40.0, 32.0]).endswith("; L0 40.0 beside 32.0")


def test_the_report_shows_controls_and_no_verdict_of_two_seeds(
    results: Results, tmp_path: Path
) -> None:
    write_report(results, tmp_path, n_cells=8)
    page, plain = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert page.count("<svg") == 4  # no model, so no CE
    assert page.count("no verdict of 2 seeds") == plain.count("no verdict of 2 seeds") == 6
    assert "better:" not in page
    for title in ("Against topk: m = 32, k = 2", "fvu_bulk by encoder: m = 32, k = 3"):
        assert title in page
        assert title in plain
    for file in tmp_path.glob("figures/*.svg"):
        assert ">rows<" in file.read_text() or "rows" in file.read_text()
    assert len(list(tmp_path.glob("figures/*.svg"))) == 4


def test_markup_is_shown_and_not_executed(table: dict[str, Any], tmp_path: Path) -> None:
    odd = copy.deepcopy(table)
    odd["data"]["hook"] = "<script>alert(1)</script>"
    write_report(Results(sweep_of(odd), []), tmp_path, n_cells=8)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
