"""A fit that is stopped, however and whenever, goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import tomli_w

import dictlearn
from activations import files
from activations.config import validate
from activations.store import Store
from activations.terminal import UserError
from dictlearn import artifact, checkpoint, heldout
from dictlearn.config import FitConfig
from dictlearn.fit import fit, go_on
from dictlearn.solvers.ksvd import KSVD

HOOK = "blocks.0.hook_resid_post"
N, D = 2400, 16
SOLVERS: dict[str, dict[str, Any]] = {
    "ksvd": {"name": "ksvd", "n_atoms": 24, "encoder": {"name": "omp", "k": 3}},
    "sae": {
        "name": "sae",
        "n_atoms": 24,
        "variant": {"name": "topk", "k": 3},
        "aux_k": 4,
        "dead_after": 500,
    },
}


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((N, 24)) * (rng.random((N, 24)) < 0.12)
    x = codes @ rng.standard_normal((24, D)) + 0.1 * rng.standard_normal((N, D))
    x[:, 0] += 20 * rng.standard_normal(N)
    document = np.arange(N) // 40
    return make_store((x[:1000], document[:1000]), (x[1000:], document[1000:]))


def table(store: Store, run: Path, solver: str = "ksvd", **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "output": str(run),
        "data": {"store": str(store.path), "hook": HOOK},
        "solver": SOLVERS[solver],
        "fit": {"batch_size": 150, "epochs": 4, "checkpoint_steps": 3},
        **changes,
    }


def config(*arguments: Any, **changes: Any) -> FitConfig:
    return validate(FitConfig, table(*arguments, **changes), "test")


def same_run(one: Path, other: Path) -> None:
    """Byte for byte, but for times."""
    weights = [(run / artifact.WEIGHTS).read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    logs = [
        [
            json.loads(line) | {"seconds": 0}
            for line in (run / "train.jsonl").read_text().splitlines()
        ]
        for run in (one, other)
    ]
    assert logs[0] == logs[1]
    metrics = [dictlearn.load(run).metrics | {"seconds": 0} for run in (one, other)]
    assert metrics[0] == metrics[1]
    assert not (other / artifact.CHECKPOINT).exists()
    assert not (other / artifact.UNFINISHED).exists()


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`stop_at(step, error)`: KSVD's step raises at its so many-th call, once."""
    original, calls = KSVD.step, [0]

    def stop(at: int, error: BaseException) -> None:
        calls[0] = 0

        def step(self: KSVD, *arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise error
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(KSVD, "step", step)

    return stop


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_killed_at_random_moments(store: Store, tmp_path: Path, solver: str) -> None:
    """`kill -9` ten times for K-SVD, five for the SAE; with carriers and few rows in memory."""
    changes = {
        "data": table(store, tmp_path)["data"]
        | {"keep_carriers": True, "leave_out_massive": True, "memory_mib": 1},
        "fit": {"batch_size": 50, "epochs": 20, "checkpoint_steps": 5},
    }
    whole = fit(config(store, tmp_path / "whole", solver, **changes))
    run, file = tmp_path / "killed", tmp_path / "config.toml"
    file.write_text(tomli_w.dumps(table(store, run, solver, **changes)))
    rng = np.random.default_rng(0)
    kills = 0
    while not (run / artifact.METADATA).exists():
        begun = (run / artifact.CHECKPOINT).exists()
        more = [] if begun or not run.exists() else ["--overwrite"]
        process = subprocess.Popen(
            [sys.executable, "-m", "dictlearn.fit", str(run if begun else file), *more],
            stderr=subprocess.PIPE,
        )
        log = run / "train.jsonl"
        before = log.stat().st_size if begun else 0
        while process.poll() is None and not (log.exists() and log.stat().st_size > before):
            time.sleep(0.01)
        if kills < (10 if solver == "ksvd" else 5):
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
            kills += process.wait(timeout=60) == -signal.SIGKILL
        else:
            assert process.wait(timeout=120) == 0, process.stderr
        process.stderr.close()  # pyright: ignore[reportOptionalMemberAccess]
    assert kills >= 5
    same_run(whole, run)


@pytest.mark.parametrize("at", [2, 3, 4, 30, 40])
def test_interrupted_and_gone_on(
    store: Store, tmp_path: Path, stop_at: Callable[..., None], at: int
) -> None:
    """Before the first checkpoint too: Ctrl-C writes one."""
    whole = fit(config(store, tmp_path / "whole"))
    stop_at(at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"kept\. Go on: python -m dictlearn\.fit"):
        fit(config(store, tmp_path / "run"))
    with pytest.raises(artifact.ArtifactError, match="unfinished"):
        dictlearn.load(tmp_path / "run")
    go_on(tmp_path / "run", ["fit.checkpoint_minutes=1", "fit.checkpoint_steps=7"])
    same_run(whole, tmp_path / "run")


def test_interrupted_before_any_step(
    store: Store, tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    stop_at(1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def stopped(store: Store, tmp_path: Path, stop_at: Callable[..., None]) -> Path:
    """A run that was stopped after step 11; its checkpoint is of that step."""
    stop_at(12, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=5", r"seed = 0 \(now 5\)"),
        ("solver.encoder.k=1", r"solver.encoder.k = 3 \(now 1\)"),
        ("solver.n_atoms=10", r"solver.n_atoms = 24 \(now 10\)"),
        ("fit.batch_size=100", r"fit.batch_size = 150 \(now 100\)"),
        ("data.memory_mib=1", r"data.memory_mib = 2048 \(now 1\)"),
        ("data.keep_carriers=true", "data.keep_carriers = False"),
    ],
)
def test_a_checkpoint_of_another_config(stopped: Path, setting: str, message: str) -> None:
    before = (stopped / artifact.CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match=f"belongs to another fit; it has .*{message}"):
        go_on(stopped, [setting])
    assert (stopped / artifact.CHECKPOINT).read_bytes() == before
    go_on(stopped)


def test_a_checkpoint_of_another_store(
    stopped: Path, store: Store, make_store: Callable[..., Store]
) -> None:
    store.path.rename(store.path.with_name("away"))
    x = np.random.default_rng(1).standard_normal((N, D))
    make_store((x, np.arange(N) // 40))
    with pytest.raises(UserError, match="belongs to another fit; it has store = "):
        go_on(stopped)


@pytest.mark.parametrize("harm", ["cut", "empty", "garbage", "flipped"])
def test_a_damaged_checkpoint(stopped: Path, harm: str) -> None:
    file = stopped / artifact.CHECKPOINT
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) - 100] ^= 1
    bad = {"cut": good[:-50], "empty": b"", "garbage": b"\xff" * 99, "flipped": bytes(flipped)}
    file.write_bytes(bad[harm])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: (cannot be read|is damaged)"):
        go_on(stopped)
    assert file.read_bytes() == bad[harm]
    file.write_bytes(good)
    go_on(stopped)


def test_nothing_to_go_on_with(store: Store, tmp_path: Path, stopped: Path) -> None:
    whole = fit(config(store, tmp_path / "whole"))
    with pytest.raises(UserError, match="is a finished run"):
        go_on(whole)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        go_on(tmp_path / "empty")
    (stopped / artifact.CHECKPOINT).unlink()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        go_on(stopped)


def test_the_command_goes_on(stopped: Path, store: Store, tmp_path: Path) -> None:
    whole = fit(config(store, tmp_path / "whole"))
    command = [sys.executable, "-m", "dictlearn.fit", str(stopped)]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False)
    assert (done.returncode, "need a config" in done.stderr) == (2, True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fvu_bulk" in done.stdout
    same_run(whole, stopped)


def test_nan_stops_with_the_last_good_checkpoint(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = KSVD.step, [0]

    def step(self: KSVD, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        state, info = original(self, *arguments, **keywords)
        if calls[0] == 8:
            info = eqx.tree_at(lambda info: info.objective, info, jnp.float32(np.nan))
        return state, info

    monkeypatch.setattr(KSVD, "step", step)
    message = r"step 8: the objective is nan, on rows 1,050 to 1,200 .* checkpoint is of step 6"
    with pytest.raises(UserError, match=message):
        fit(config(store, tmp_path / "run"))
    monkeypatch.undo()
    whole = fit(config(store, tmp_path / "whole"))
    go_on(tmp_path / "run")
    same_run(whole, tmp_path / "run")


def test_a_state_with_nan_is_never_saved(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = KSVD.step, [0]

    def step(self: KSVD, *arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        state, info = original(self, *arguments, **keywords)
        if calls[0] == 6:  # a checkpoint is due
            state = eqx.tree_at(lambda s: s.atoms, state, state.atoms.at[0, 0].set(jnp.nan))
        return state, info

    monkeypatch.setattr(KSVD, "step", step)
    with pytest.raises(UserError, match="step 6: the solver's state holds NaN"):
        fit(config(store, tmp_path / "run"))
    monkeypatch.undo()
    whole = fit(config(store, tmp_path / "whole"))
    go_on(tmp_path / "run")
    same_run(whole, tmp_path / "run")


def test_a_full_disk_keeps_the_checkpoint_before(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, writes = files.Whole.write, [0]

    def write(self: files.Whole, data: Any, /) -> int:
        writes[0] += Path(str(self.name)).name.startswith(artifact.CHECKPOINT)
        if writes[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, data)

    monkeypatch.setattr(files.Whole, "write", write)
    with pytest.raises(UserError, match=r"no space left .* kept\. Go on"):
        fit(config(store, tmp_path / "run"))
    monkeypatch.undo()
    whole = fit(config(store, tmp_path / "whole"))
    go_on(tmp_path / "run")
    same_run(whole, tmp_path / "run")


def test_what_a_fit_replaces_is_kept_until_it_is_done(
    store: Store, tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    run = fit(config(store, tmp_path / "run", "sae"))
    before = (run / artifact.WEIGHTS).read_bytes()
    stop_at(9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, run), overwrite=True)
    assert (tmp_path / ".run.replaced" / artifact.WEIGHTS).read_bytes() == before
    go_on(run)
    assert dictlearn.load(run).metadata["solver"]["name"] == "ksvd"
    assert [path.name for path in tmp_path.iterdir() if "run" in path.name] == ["run"]


def test_stopped_while_the_test_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last step, and before anything is saved."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    loop = {"batch_size": 150, "epochs": 4}  # no checkpoint falls due
    whole = fit(config(store, tmp_path / "whole", fit=loop))
    monkeypatch.setattr(heldout, "figures", interrupted)
    with pytest.raises(KeyboardInterrupt, match="kept"):
        fit(config(store, tmp_path / "run", fit=loop))
    monkeypatch.undo()
    go_on(tmp_path / "run")
    same_run(whole, tmp_path / "run")


def test_two_cannot_go_on_with_one_run(stopped: Path) -> None:
    with artifact.unfinished(stopped), pytest.raises(UserError, match="another fit is writing"):
        go_on(stopped)


# The file


TREE = {
    "state": [jnp.arange(6, dtype=jnp.float32).reshape(2, 3), jnp.array(3, jnp.int32)],
    "flags": jnp.array([True, False]),
    "none": jnp.zeros((0, 4)),
    "name": "kept from the template",
}


def test_a_tree_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    checkpoint.save(file, TREE, of={"a": {"b": 1}}, header={"step": 7})
    like = eqx.tree_at(lambda t: t["state"][0], TREE, jnp.ones((2, 3)))
    tree, header = checkpoint.load(file, like, of={"a": {"b": 1}})
    assert eqx.tree_equal(tree, TREE)
    assert header["step"] == 7
    with pytest.raises(UserError, match="holds another state"):
        checkpoint.load(file, TREE | {"more": jnp.ones(1)}, of={"a": {"b": 1}})
    with pytest.raises(UserError, match=r"a\.b = 1 \(now 2\); a\.c = None \(now 3\)"):
        checkpoint.load(file, TREE, of={"a": {"b": 2, "c": 3}})


def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    checkpoint.save(file, TREE, of={"a": 1}, header={"step": 7})
    good = file.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        file.write_bytes(bad)
        with pytest.raises(UserError):
            checkpoint.load(file, TREE, of={"a": 1})
