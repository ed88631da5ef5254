"""A draft's tokens beside what the target says: counts by hand, and the controls."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from activations import terminal
from experiments import speculative
from experiments.speculative import drafted

BEGIN = [90, 91]


class Draft:
    """Says the next words of a text of its own, wherever the target is."""

    device = torch.device("cpu")

    def __init__(self, words: list[int]) -> None:
        self.words = words
        self.asked: list[tuple[list[int], int]] = []

    def generate(self, x: torch.Tensor, *, max_new_tokens: int, **_: Any) -> torch.Tensor:
        ids = x[0].tolist()
        self.asked.append((ids, max_new_tokens))
        place = len(ids) - len(BEGIN)
        return torch.tensor([[*ids, *self.words[place : place + max_new_tokens]]])


TARGET = [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("words", "ahead", "expected", "places"),
    [
        # (kept, drafted, forwards), and where the draft is asked.
        (TARGET, 2, (5, 5, 3), [0, 3, 6]),  # each time two and the target's own; then the last
        (TARGET, 3, (6, 6, 2), [0, 4]),
        (TARGET, 99, (7, 7, 1), [0]),
        ([0] * 7, 2, (0, 13, 7), [*range(7)]),
        ([0] * 7, 1, (0, 7, 7), [*range(7)]),
        ([1, 0, 3, 4, 5, 6, 7], 3, (1 + 3 + 1, 3 + 3 + 1, 3), [0, 2, 6]),
        ([1, 2, 3, 4, 5, 6, 0], 4, (4 + 1, 4 + 2, 2), [0, 5]),
        ([0, 2, 0, 4, 0, 6, 0], 2, (0 + 1 + 1 + 1, 2 + 2 + 2 + 2, 4), [0, 1, 3, 5]),
    ],
)
def test_kept_and_drafted_tokens_and_forwards_are_those_of_a_count_by_hand(
    words: list[int], ahead: int, expected: tuple[int, int, int], places: list[int]
) -> None:
    draft = Draft(words)
    assert drafted(TARGET, draft, BEGIN, ahead) == expected
    assert [ids for ids, _ in draft.asked] == [[*BEGIN, *TARGET[:place]] for place in places]
    assert [count for _, count in draft.asked] == [min(ahead, 7 - place) for place in places]


def test_nothing_said_is_nothing_drafted() -> None:
    assert drafted([], Draft([]), BEGIN, 4) == (0, 0, 0)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["experiments.speculative", *map(str, arguments)])
    try:
        terminal.run_command(speculative.main)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The quick fox.\n\nA lazy dog jumps over\nthe fox.\n\nThe dog does not mind.\n")
    return file


def test_a_target_is_its_own_best_draft_and_another_model_a_worse_one(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    lm: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.nn.init.normal_(lm.get_output_embeddings().weight)
    lm.save_pretrained(other)
    assert command(
        monkeypatch, tiny_model_dir, tiny_model_dir, other, "--text", text, "--tokens", "9",
        "--ahead", "2", "--texts", "3",
    ) == 0  # fmt: skip
    own, worse = map(json.loads, capsys.readouterr().out.splitlines())
    assert (own["target"], own["draft"]) == (tiny_model_dir.name,) * 2
    assert own["acceptance"] == 1
    assert own["acceptance_interval"] == [1, 1]
    assert own["per_forward"] == 3  # two drafted and one of its own
    assert (own["texts"], own["tokens"], own["ahead"]) == (3, 27, 2)
    assert worse["draft"] == "other"
    assert worse["tokens"] == 27
    assert worse["acceptance"] < 0.5
    assert 1 <= worse["per_forward"] < 2


def test_a_draft_with_other_tokens_is_refused(
    tiny_model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two tokens have changed places."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    held = json.loads((other / "tokenizer.json").read_text())
    words = held["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(held))
    arguments = (tiny_model_dir, other, "--text", text, "--tokens", "1", "--texts", "1")
    assert command(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert f"{other}: has another vocabulary than {tiny_model_dir}" in said.err
    assert not said.out
