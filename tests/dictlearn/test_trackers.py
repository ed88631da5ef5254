"""Lines of a fit elsewhere: TensorBoard's files, W&B's calls, and the same dictionary."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from activations.config import validate
from activations.terminal import UserError
from dictlearn import trackers
from dictlearn.config import FitConfig
from dictlearn.fit import fit
from dictlearn.trackers import tracking
from evals import planted
from evals.planted import PlantedConfig


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    truth = planted.plant(PlantedConfig(width=16, n_features=40, mean_active=2.0))
    planted.store(folder / "store", truth, 4_000)
    return folder / "store"


def config(store: Path, output: Path, **loop: Any) -> FitConfig:
    table = {
        "name": "tracked", "output": str(output),
        "data": {"store": str(store), "hook": planted.HOOK},
        "solver": {"name": "ksvd", "n_atoms": 32, "encoder": {"name": "omp", "k": 2}},
        "fit": {"batch_size": 512, "epochs": 1} | loop,
    }  # fmt: skip
    return validate(FitConfig, table, "test")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's files hold: length, its checksum, event, its checksum, and so on."""
    from tensorboardX.proto.event_pb2 import Event

    found = defaultdict(list)
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
    return found


def test_tensorboard_has_the_lines_and_the_dictionary_is_the_same(
    store: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX", reason="the [tensorboard] extra is not installed")
    plain = fit(config(store, tmp_path / "plain"))
    run = fit(config(store, tmp_path / "run", track=["tensorboard"]))
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    found = scalars(run / "tensorboard")
    assert [step for step, _ in found["objective"]] == [line["step"] for line in lines]
    for (_, value), line in zip(found["objective"], lines, strict=True):
        assert value == pytest.approx(line["objective"], rel=1e-6)
    assert len(found["validation_fvu_bulk"]) == 1
    weights = "dictionary.safetensors"
    assert (run / weights).read_bytes() == (plain / weights).read_bytes()


class Tracked:
    """What wandb was told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, Any]]] = []

    @contextlib.contextmanager
    def init(self, **told: Any) -> Iterator[Tracked]:
        self.begun.append(told)
        yield self

    def log(self, line: dict[str, Any], step: int) -> None:
        self.lines.append((step, line))


def test_wandb_is_told_once_a_line_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Tracked()
    module = types.ModuleType("wandb")
    vars(module)["init"] = seen.init
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (0, 1):
        with tracking(("wandb",), tmp_path / "run", {"seed": 3}, step) as tell:
            tell({"step": step + 1, "objective": 0.5, "validation_fvu": None})
    assert seen.lines == [
        (1, {"objective": 0.5, "validation_fvu": None}),
        (2, {"objective": 0.5, "validation_fvu": None}),
    ]
    one, other = seen.begun
    assert one == other  # the same id: what was stopped goes on in the same place
    assert (one["project"], one["name"], one["resume"]) == ("dictlearn", "run", "allow")
    assert one["config"] == {"seed": 3}


def test_a_process_that_writes_no_run_tells_nothing() -> None:
    with tracking(("wandb",), None, {}, 0) as tell:
        tell({"step": 1})


def test_a_missing_package_is_told_before_anything_begins(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"fit.track: wandb needs .*dictlearn-interp\[wandb\]"):
        fit(config(store, tmp_path / "run", track=["wandb"]))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"fit\.track"):
        config(store, tmp_path / "run", track=["mlflow"])
