"""The list of runs: figures of finished ones, a word for the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from activations.terminal import UserError
from dictlearn import artifact, fit, runs


def finished(place: Path, fvu: float) -> None:
    place.mkdir(parents=True)
    solver = {"name": "ksvd", "n_atoms": 2048, "encoder": {"name": "omp", "k": 32}}
    told = {"schema": artifact.SCHEMA, "solver": solver, "hook": "blocks.9.hook_resid_post"}
    (place / artifact.METADATA).write_text(json.dumps(told))
    figures = {"fvu": fvu, "fvu_bulk": 2 * fvu, "l0": 31.96, "frac_alive": 1.0, "seconds": 19.2}
    (place / artifact.METRICS).write_text(json.dumps(figures))


def test_every_run_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path / "a", 0.0601)
    finished(tmp_path / "sweep/runs/b", 0.05)
    for name, file in (("c", artifact.UNFINISHED), ("d", artifact.METADATA)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{")
    finished(tmp_path / ".a.replaced", 0.1)
    rows = runs.runs(tmp_path)
    assert [Path(row[0]).name for row in rows] == ["a", "c", "d", "b"]
    assert rows[0][1:] == [
        "ksvd", "2048", "32", "blocks.9.hook_resid_post",
        "0.1202", "", "0.0601", "32.0", "100.0%", "19",
    ]  # fmt: skip
    assert [rows[1][1], rows[2][1]] == ["unfinished", "damaged"]
    monkeypatch.setattr(sys, "argv", ["dictlearn", "runs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        fit.command()
    assert ended.value.code == 0
    assert "unfinished" in capsys.readouterr().out


def test_a_folder_without_runs_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        runs.runs(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        runs.runs(tmp_path / "none")
