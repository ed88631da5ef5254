"""Runs on disk: exact round trips, and one clear message for whatever is not a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dictlearn
from dictlearn import artifact
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.activations import AbstractActivation, Gated, TopK
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.encoders.linear import Linear
from dictlearn.encoders.mp_sae import MPSAE
from dictlearn.encoders.omp import OMP

M, D, K = 6, 4, 2
METADATA = {
    "name": "mine",
    "solver": {"name": "sae", "n_atoms": M, "variant": {"name": "topk", "k": K}},
    "hook": "blocks.0.hook_resid_post",
    "model": {"description": "a model", "spec": "hf:a/model"},
    "store": {"path": "stores/mine", "manifest_sha256": "0" * 64},
    "split": {"train": [0], "validation": [1], "test": [2]},
    "n_training_rows": 100,
}
METRICS = {
    f"{prefix}{name}": value
    for prefix in ("", "control_")
    for name, value in {
        "fvu": 0.1,
        "fvu_interval": [0.05, 0.15],
        "fvu_bulk": 0.2,
        "fvu_bulk_interval": [0.1, 0.3],
        "l0": 2.0,
        "frac_alive": 1.0,
    }.items()
} | {
    "gain_bulk": 0.5,
    "gain_bulk_interval": [0.4, 0.6],
    "twins": 0.0,
    "seconds": 1.5,
    "n_tokens": 10,
    "n_documents": 2,
}


def linear(activation: AbstractActivation = TopK(K)) -> Linear:  # noqa: B008
    weight, bias = jax.random.normal(jax.random.key(0), (M, D)), jnp.arange(M) / 7
    return Linear(weight, bias, activation)


ENCODERS = {
    "omp": OMP(k=K),
    "linear": linear(),
    "gated": linear(Gated(jnp.arange(1.0, M + 1), jnp.arange(M) / 3 - 1)),
    "mp_sae": MPSAE(linear().weight, rounds=3, threshold=0.5, stop_on_repeat=True),
}


def coder(encoder: AbstractEncoder) -> Coder:
    keys = jax.random.split(jax.random.key(1), 3)
    return Coder(
        Normaliser(jax.random.normal(keys[0], (D,)), jnp.float32(1 / 3)),
        Dictionary(jax.random.normal(keys[1], (M, D)), jax.random.normal(keys[2], (D,))),
        encoder,
    )


def write_run(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    artifact.save(path, coder(linear()), METADATA, METRICS)
    return path


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_round_trip_is_exact(encoder: AbstractEncoder, tmp_path: Path) -> None:
    before = coder(encoder)
    artifact.save(tmp_path, before, METADATA, METRICS)
    run = dictlearn.load(str(tmp_path))
    assert eqx.tree_equal(run.coder, before)
    x = jax.random.normal(jax.random.key(2), (50, D))
    assert eqx.tree_equal(run.coder.encode(x), before.encode(x))
    assert {**run.metadata, **METADATA} == run.metadata
    assert run.metrics == METRICS
    assert run.path == tmp_path


def test_a_second_save_writes_the_same_bytes(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), tmp_path / "two"
    run = dictlearn.load(one)
    two.mkdir()
    artifact.save(two, run.coder, METADATA, run.metrics)
    for name in (artifact.WEIGHTS, artifact.METADATA, artifact.METRICS):
        assert (one / name).read_bytes() == (two / name).read_bytes()


# What is not a run: how it comes about, and what the message must say.


def arrays(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Any]:
    """Damage of the arrays."""

    def damage(run: Path) -> None:
        file = run / artifact.WEIGHTS
        held = safetensors.numpy.load_file(file)
        change(held)
        file.write_bytes(safetensors.numpy.save(held))

    return damage


def table(name: str, **changes: Any) -> Callable[[Path], Any]:
    """Damage of a JSON file: keys set, or taken away where the value is None."""

    def damage(run: Path) -> None:
        held = json.loads((run / name).read_text()) | changes
        kept = {key: value for key, value in held.items() if value is not None}
        (run / name).write_text(json.dumps(kept))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda run: (run / name).write_bytes(content)


def truncate(run: Path) -> None:
    file = run / artifact.WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])


W, J, R = artifact.WEIGHTS, artifact.METADATA, artifact.METRICS
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty directory": (lambda run: [file.unlink() for file in run.iterdir()], "no run there"),
    "unfinished": (write("UNFINISHED", b"stopped at step 7"), "unfinished: stopped at step 7"),
    "weights garbage": (write(W, b"\x93garbage" * 99), W),
    "weights empty": (write(W, b""), W),
    "weights cut": (truncate, W),
    "weights gone": (lambda run: (run / W).unlink(), W),
    "tensors of another kind": (write(W, safetensors.numpy.save({"a": np.zeros(3)})), W),
    "a tensor gone": (arrays(lambda a: a.pop("encoder.weight")), W),
    "NaN": (arrays(lambda a: a["dictionary.atoms"].__setitem__((1, 2), np.nan)), f"{W}: holds NaN"),
    "infinity": (arrays(lambda a: a["encoder.bias"].__setitem__(0, np.inf)), f"{W}: holds NaN or"),
    "atoms flat": (arrays(lambda a: a.update({"dictionary.atoms": np.zeros(M, "f4")})), W),
    "bias too long": (arrays(lambda a: a.update({"dictionary.bias": np.zeros(D + 1, "f4")})), W),
    "mean too short": (arrays(lambda a: a.update({"normaliser.mean": np.zeros(D - 1, "f4")})), W),
    "scale a row": (arrays(lambda a: a.update({"normaliser.scale": np.zeros(1, "f4")})), W),
    "encoder of other size": (
        arrays(lambda a: a.update({"encoder.weight": np.zeros((M + 1, D), "f4")})),
        W,
    ),
    "whole numbers": (arrays(lambda a: a.update({"dictionary.atoms": np.zeros((M, D), "i4")})), W),
    "metadata garbage": (write(J, b"\xff\xfe{"), J),
    "metadata a list": (write(J, b"[]"), f"{J}: is not a table"),
    "metadata without encoder": (table(J, encoder=None), "encoder"),
    "encoder unknown": (table(J, encoder={"name": "telepathy"}), "telepathy"),
    "encoder a list": (table(J, encoder=[1]), W),
    "newer schema": (table(J, schema=3), "schema 3, but this version reads schema 2"),
    "no schema": (table(J, schema=None), "schema None"),
    "metrics gone": (lambda run: (run / R).unlink(), R),
    "metrics garbage": (write(R, b"{"), R),
}

# Reports of many runs in one process, and one without the tests' run-time type checks.
REPORT_ALL = """
import contextlib, io, json, sys
from activations.terminal import run_command
from dictlearn import report
answers = {}
for path in sys.argv[1:]:
    sys.argv, error = ["report", path], io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            run_command(report.main)
        except SystemExit as stop:
            answers[path] = stop.code, error.getvalue()
print("ANSWERS", json.dumps(answers))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What `python -m dictlearn.report` says of each damaged run: exit code, standard error."""
    runs = {name: write_run(tmp_path_factory.mktemp("runs") / "run") for name in ["none", *DAMAGE]}
    for name, (damage, _) in DAMAGE.items():
        damage(runs[name])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REPORT_ALL, *map(str, runs.values())],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answers = json.loads(done.stdout.rpartition("ANSWERS")[2])
    return {name: answers[str(path)] for name, path in runs.items()}


def test_a_whole_run_is_reported(reports: dict[str, tuple[int, str]]) -> None:
    assert reports["none"] == [0, ""]


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_a_run(name: str, reports: dict[str, tuple[int, str]], tmp_path: Path) -> None:
    damage, says = DAMAGE[name]
    run = write_run(tmp_path / "run")
    damage(run)
    with pytest.raises(artifact.ArtifactError) as caught:
        artifact.load(run)
    assert says in str(caught.value)
    assert str(run) in str(caught.value)
    code, error = reports[name]
    assert code == 2
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1


def test_the_command_itself(
    run_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, error = run_command("dictlearn.report", tmp_path / "absent")
    assert code == 2
    assert error == f"error: {tmp_path / 'absent'}: no run there (it has no dictionary.json)\n"
