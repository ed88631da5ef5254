"""What is kept on disk: made once, whole, and whose errors are whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from activations.terminal import UserError
from evals import kept


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))
    return kept.place("kind", {"a": 1})


def test_it_is_made_once(file: Path) -> None:
    asked = []

    def make() -> dict[str, Any]:
        asked.append(1)
        return {"answer": 1.5}

    assert kept.kept(file, make) == kept.kept(file, make) == {"answer": 1.5}
    assert len(asked) == 1


def test_what_is_damaged_is_made_again(file: Path) -> None:
    kept.kept(file, lambda: {"answer": 1})
    file.write_text(file.read_text().replace("1", "2"))
    assert kept.kept(file, lambda: {"answer": 3}) == {"answer": 3}


def test_errors_of_making_are_not_the_folders(file: Path) -> None:
    def make() -> dict[str, Any]:
        raise FileNotFoundError(2, "No such file", "weights.bin")

    with pytest.raises(FileNotFoundError, match=r"weights\.bin"):
        kept.kept(file, make)
    assert kept.kept(file, lambda: {"answer": 1}) == {"answer": 1}  # nothing stays locked


def test_a_folder_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="DICTLEARN_CACHE"):
        kept.kept(kept.place("kind", 1), lambda: {})
