"""A sweep that asks families of evals: figures of each run, and where the report shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.config import validate
from activations.terminal import UserError
from dictlearn.fit import prepare
from experiments.compare import cell as cell_module
from experiments.compare.cell import files, measure
from experiments.compare.report import means, verdicts
from experiments.compare.results import Results
from experiments.compare.shown import ABSORPTION, JUDGED, PLOTS, TABLED
from experiments.compare.sweep import Sweep, cells

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def table(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sweep with a [harvest] table, of the tiny model; its store is made."""
    folder = tmp_path_factory.mktemp("families")
    rng = np.random.default_rng(0)
    for index in range(40):
        words = rng.choice(["fox", "lazy", "dog", "quick", "mind", "the"], 25)
        (folder / f"{index:03}.txt").write_text(f"{index} {' '.join(words)}")
    pursuit = {"name": "omp"}
    fit = {"batch_size": 128, "epochs": 0.5}
    model = f"dir:{tiny_model_dir}"
    biographies = {"kind": "occupations", "n": 40}
    made = {
        "name": "families", "output": str(folder / "out"), "n_atoms": [16], "k": [2],
        "seeds": [0, 1], "evals": ["core"], "encoders": [],
        "data": {"store": str(folder / "store"), "hook": HOOK},
        "harvest": {
            "model": model, "hooks": [HOOK], "context_length": 12,
            "corpus": {"kind": "files", "paths": [str(folder / "*.txt")]},
        },
        "dictionaries": {
            name: {"solver": {"name": "untrained", "atoms": name, "encoder": pursuit}, "fit": fit}
            for name in ("data_rows", "gaussian")
        },
        "settings": {
            "core": {"tokens": 100, "behaviour_tokens": 50, "batch_size": 4},
            "sparse_probing": {
                "sets": [biographies], "max_classes": 2, "epochs": 1, "n_seeds": 1,
                "context_length": 16,
            },
            "steering": {
                "fluency_model": model, "set": biographies, "concepts": ["nurse"], "texts": 10,
                "context_length": 24, "prompts": ["The fox", "The dog"], "samples": 1,
                "new_tokens": 5, "kl": [1e-4], "contexts": 4,
            },
        },
    }  # fmt: skip
    prepare(cells(validate(Sweep, made, "sweep"), "sweep")[0].config, "sweep")
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path / "cache"))


def test_figures_are_those_of_each_run_and_done_once(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = validate(Sweep, table, "sweep")
    every = cells(sweep, "sweep")
    for cell in every:
        measure(sweep, cell)
    results = Results(sweep, every)
    for cell in every:
        envelope = sweep.place / "runs" / cell.name / "evals/core.json"
        told = json.loads(envelope.read_text())["eval_result_metrics"]["headline"]
        for key in ("ce_increase", "kl"):
            (row,) = [
                row for row in results.rows
                if (row["dictionary"], row["seed"]) == (cell.dictionary, cell.seed)
                and row["figure"] == f"headline.{key}"
            ]  # fmt: skip
            assert row["value"] == told[key]
            assert [row["low"], row["high"]] == told[f"{key}_interval"]
        by_seed = results.of(cell.dictionary, 16, 2, "core", "headline.ce_increase")
        one = by_seed[cell.seed]
        assert one.documents is not None
        assert one.drawn is not None
        whole = one.drawn(np.ones((1, len(one.documents))))[0]
        assert whole == pytest.approx(told["ce_increase"])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    for name in ("fit", "go_on"):
        monkeypatch.setattr(cell_module, name, fail)
    monkeypatch.setattr(cell_module.evals_run.core, "run", fail)
    file, _ = files(sweep, every[0])
    before = json.loads(file.read_text())
    file.unlink()  # as if killed after its evals
    measure(sweep, every[0])
    assert json.loads(file.read_text()) == before


def test_what_the_report_shows_is_what_families_give(table: dict[str, Any]) -> None:
    families = ["core", "sparse_probing", "steering"]
    sweep = validate(Sweep, table | {"evals": families, "seeds": [0]}, "sweep")
    cell = cells(sweep, "sweep")[0]
    measure(sweep, cell)
    given = {("fit", row["figure"]) for row in Results(sweep, [cell]).rows}
    for family in families:
        envelope = sweep.place / "runs" / cell.name / f"evals/{family}.json"
        for category, values in json.loads(envelope.read_text())["eval_result_metrics"].items():
            given |= {(family, f"{category}.{key}") for key in values}
    shown = {*JUDGED, *TABLED, *(one for pair in PLOTS for one in pair)} - {*ABSORPTION}
    assert {(one.family, one.figure) for one in shown} <= given


def test_a_familys_figures_are_judged_and_tabled_where_it_was_asked_for(
    table: dict[str, Any], tmp_path: Path
) -> None:
    more = {"seeds": list(range(5)), "evals": ["steering"], "output": str(tmp_path)}
    sweep = validate(Sweep, table | more, "sweep")
    every = cells(sweep, "sweep")
    scores = {"data_rows": [0.1, 0.2, 0.3, 0.4, 0.5], "gaussian": [0.6, 0.8, 0.8, 0.8, 1.0]}
    above = {"data_rows": [0.0] * 5, "gaussian": [-0.2, 0.2, 0.0, 0.1, -0.1]}
    for cell in every:
        told, sums = files(sweep, cell)
        told.parent.mkdir(exist_ok=True)
        values = {
            "feature.score": scores[cell.dictionary][cell.seed],
            "random_feature.feature_above": above[cell.dictionary][cell.seed],
        }
        rows = [
            {"encoder": "own", "family": "steering", "figure": figure, "value": value,
             "low": value - 0.1 - 0.01 * cell.seed, "high": value + 0.1}
            for figure, value in values.items()
        ]  # fmt: skip
        told.write_text(json.dumps({"rows": rows}))
        np.savez(sums, document=np.arange(3))
    results = Results(sweep, every)
    (judged,) = verdicts(results)
    assert judged.heads == ["", "steering score", "score above random feature"]
    ((name, score, apart),) = judged.rows
    assert name == "gaussian"
    # Differences 0.5, 0.6, 0.5, 0.4, 0.5: deviation 0.0707; t of 4 degrees of freedom is 2.776.
    assert score == "better: +0.5000 (+0.4122 to +0.5878)"
    # Deviation 0.158; (2.776 + 0.941) 0.158 / sqrt(5) = 0.263.
    assert apart.startswith("not told apart: +0.0000")
    assert apart.endswith("5 seeds would detect 0.3")
    (tabled,) = means(results)
    assert tabled.heads == judged.heads
    assert tabled.rows[-1] == ["width of a cell's own 95 %", "0.2200", "0.2200"]


def test_a_familys_settings_are_checked_before_any_fit(table: dict[str, Any]) -> None:
    wrong = table | {"settings": {"core": {"tokens": 0}}}
    with pytest.raises(UserError, match=r"settings\.core\.tokens"):
        cells(validate(Sweep, wrong, "sweep"), "sweep")
    hook = table | {"settings": {"core": {"hook": "blocks.0.hook_resid_post"}}}
    with pytest.raises(UserError, match=r"settings\.core\.hook: unknown key"):
        cells(validate(Sweep, hook, "sweep"), "sweep")
