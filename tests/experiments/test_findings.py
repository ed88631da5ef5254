"""Findings: each run's figures, differences paired by seed, and what could have been seen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from activations.config import validate
from activations.harvest import HarvestConfig, harvest
from activations.terminal import UserError
from evals.run import EvalConfig
from experiments import findings, swap
from experiments.swap import Cell, Place

HOOK = "blocks.1.hook_resid_post"
CONFIG = EvalConfig(core={"tokens": 100, "behaviour_tokens": 50, "batch_size": 4})
CELLS = [Cell(name, "own", 16, 2, seed) for seed in (0, 1) for name in ("data_rows", "gaussian")]


@pytest.fixture(scope="module")
def place(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("findings")
    rng = np.random.default_rng(0)
    for index in range(220):  # a batch of 4,096 rows is wanted
        words = rng.choice(["fox", "lazy", "dog", "quick", "mind", "the"], 25)
        (folder / f"{index:03}.txt").write_text(f"{index} {' '.join(words)}")
    table = {
        "store": str(folder / "store"), "model": f"dir:{tiny_model_dir}", "hooks": [HOOK],
        "context_length": 12, "corpus": {"kind": "files", "paths": [str(folder / "*.txt")]},
    }  # fmt: skip
    harvest(validate(HarvestConfig, table, "test"))
    return Place("resid", folder / "store", HOOK, 0.5, folder / "out")


def test_figures_are_those_of_each_run_and_done_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings.measure(CELLS, place, ["core"], CONFIG, quick=False)
    assert [*found["core"]] == [(cell.dictionary, cell.seed) for cell in CELLS]
    for cell in CELLS:
        run = place.out / f"runs/resid-{cell.dictionary}-m16-k2-s{cell.seed}"
        told = json.loads((run / "evals" / "core.json").read_text())["eval_result_metrics"]
        own = found["core"][cell.dictionary, cell.seed]
        low, high = told["headline"]["ce_increase_interval"]
        assert own["headline.ce_increase"] == (told["headline"]["ce_increase"], high - low)
        assert own["sparsity.l0"] == (told["sparsity"]["l0"], None)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(swap, "fit", fail)
    monkeypatch.setattr(findings.evals_run.core, "run", fail)
    assert findings.measure(CELLS, place, ["core"], CONFIG, quick=False) == found


def test_what_the_model_loses_is_that_of_the_replay(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "_TOKENS", 50)
    found = findings.measure(CELLS[:2], place, ["downstream"], CONFIG, quick=False)["downstream"]
    lines = [
        json.loads(line) for line in (place.out / "downstream.jsonl").read_text().split("\n")[:2]
    ]
    for line in lines:
        name = "gaussian" if "gaussian" in line["run"] else "data_rows"
        low, high = line["ce_increase_interval"]
        assert found[name, 0]["plain.ce_increase"] == (line["ce_increase"], high - low)


def test_differences_are_paired_and_the_smallest_is_detected_in_80_percent_of_trials() -> None:
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(4000):
        sample = rng.standard_normal(5)
        # A shift by the smallest difference of the true deviation.
        least = (scipy.stats.t.ppf(0.975, 4) + scipy.stats.t.ppf(0.8, 4)) / np.sqrt(5)
        seen += scipy.stats.ttest_1samp(sample + least, 0).pvalue < 0.05
    assert seen / 4000 == pytest.approx(0.8, abs=0.05)
    unit = np.array([-1.0, 1, -1, 1, 0])
    assert findings.smallest(list(unit / unit.std(ddof=1))) == pytest.approx(least)
    assert np.isnan(findings.smallest([1.0]))


def test_the_table_pairs_by_seed_and_tells_what_is_missing() -> None:
    rows = {
        ("ksvd", 0): {"headline.kl": (1.0, 0.2)}, ("topk", 0): {"headline.kl": (1.5, 0.4)},
        ("ksvd", 1): {"headline.kl": (3.0, 0.2)}, ("topk", 1): {"headline.kl": (3.7, 0.4)},
        ("topk", 2): {"headline.kl": (9.0, None)},
    }  # fmt: skip
    means, apart = findings.grids("core", rows, "ksvd")
    column = means[1].index("headline.kl")
    assert means[2][0][column].startswith("2.0000 ± 1.4142")
    assert means[2][2][column] == "0.3000"
    assert [row[0] for row in apart[2]] == ["topk"]
    assert apart[2][0][column].startswith("+0.6000 ± 0.1000")
    assert apart[2][0][column].endswith(f"[{findings.smallest([0.5, 0.7]):.4f}]")
    assert apart[2][0][means[1].index("headline.ce_increase")] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--evals", "cores"],
            "--evals: no 'cores' among downstream, core, sparse_probing, steering",
        ),
        (["--dictionaries", "topk"], "--against: no 'ksvd' among topk"),
        (["--seeds", "a"], "--seeds: expected numbers"),
    ],
)
def test_mistakes_show_before_any_work(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["findings", "--store", "none", "--hook", HOOK, "--out", "none", *options]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=message):
        findings.main()
