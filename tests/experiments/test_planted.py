"""The planted-truth experiment: every system can be fitted, and is not fitted twice."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from experiments import planted
from experiments.planted import SIZES, SOLVERS, Job


def test_every_system_has_a_config(tmp_path: Path) -> None:
    for size, system in itertools.product(SIZES, SOLVERS):
        config = planted.config_of(Job(size, 0, system), tmp_path)
        features = SIZES[size][0]["n_features"]
        assert config.solver.n_atoms == features * (2 if system == "topk-2m" else 1)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("quick", 1, system) for system in ("topk", "gradient_topk-told", "oracle")]
    found = planted.run(jobs, tmp_path)
    assert [line["system"] for line in found] == [job.system for job in jobs]
    assert found[2]["f1"] > found[0]["f1"] > 0
    assert all(line["loss_increase"] > 0 for line in found)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"size": "quick", "seed": 1')  # cut by a kill
    monkeypatch.delattr(planted, "fit")
    assert planted.run(jobs, tmp_path) == found
    planted.show(found)
