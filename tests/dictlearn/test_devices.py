"""Rows over 8 devices, and over two processes, against one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

import dictlearn
from activations.store import Store

HOOK = "blocks.0.hook_resid_post"
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

# One step from one state, in float64, for each solver and encoder; arrays go to a file.
STEP = """
import sys
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
from dictlearn import devices
from dictlearn.encoders.matryoshka_omp import MatryoshkaOMP
from dictlearn.encoders.mp import MP
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.base import Batch
from dictlearn.solvers.ksvd import KSVD
from dictlearn.solvers.sae import SAE
from dictlearn.solvers import sae_variants as variants
from dictlearn.solvers.untrained import Untrained

rng = np.random.default_rng(0)
x = rng.standard_normal((160, 12))
mesh, key, out = devices.mesh(), jax.random.key(0), {}
assert jax.device_count() == int(sys.argv[2])
for name, solver in {
    "omp": KSVD(24, OMP(k=3), dead_after=100),
    "tolerance": KSVD(24, OMP(k=8, tolerance=0.3)),
    "chunks": KSVD(24, OMP(k=3), chunk_size=5, power_steps=2, memory=0.5, twins=0.7),
    "nn_omp": KSVD(24, NonNegativeOMP(k=3)),
    "mp": KSVD(24, MP(k=3, refit=True)),
    "matryoshka_omp": KSVD(24, MatryoshkaOMP(k=3, smallest=8)),
    "topk": SAE(24, variants.TopK(3), aux_k=4, dead_after=100),
    "abs_topk": SAE(24, variants.AbsTopK(3), matryoshka=8, bias="geometric_median"),
    "batch_topk": SAE(24, variants.BatchTopK(3)),
    "relu": SAE(24, variants.ReLU(3)),
    "jumprelu": SAE(24, variants.JumpReLU(3)),
    "gradient_topk": SAE(24, variants.GradientTopK(3)),
    "untrained": Untrained(24, OMP(k=3), "gaussian"),
}.items():
    state = devices.everywhere(solver.init(jnp.asarray(x), n_steps=5, key=key), mesh)
    batch = Batch(devices.spread(x, mesh))
    if solver.needs:
        batch = Batch(batch.x, -batch.x)
    assert len(batch.x.sharding.device_set) == int(sys.argv[2])
    after, info = solver.step(state, batch, key=key)
    for path, leaf in jax.tree_util.tree_flatten_with_path((after, info))[0]:
        out[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
np.savez(sys.argv[1], **out)
"""


def script(text: str, *arguments: Any, **environment: str) -> None:
    command = [sys.executable, "-c", text, *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_step_is_the_same_on_eight_devices(tmp_path: Path) -> None:
    files = tmp_path / "one.npz", tmp_path / "eight.npz"
    script(STEP, files[0], 1, JAX_ENABLE_X64="1")
    script(STEP, files[1], 8, JAX_ENABLE_X64="1", **EIGHT)
    with np.load(files[0]) as one, np.load(files[1]) as eight:
        assert set(one) == set(eight)
        assert len(one) > 60
        for name in one:
            assert one[name].dtype == eight[name].dtype
            np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=1e-9, err_msg=name)


def test_the_contract_on_eight_devices() -> None:
    """What the contract suite runs through `run` there has its rows on all of them."""
    laws = "(planted_atoms or same_key or save_and_load or info_is or zero_rows)"
    laws += " and not abs_topk and not matryoshka and not gradient"  # the first law is long
    command = [
        sys.executable, "-m", "pytest", "-k", laws, Path(__file__).with_name("test_contract.py"),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | EIGHT, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((2400, 24)) * (rng.random((2400, 24)) < 0.12)
    x = codes @ rng.standard_normal((24, 16)) + 0.1 * rng.standard_normal((2400, 16))
    return make_store((x, np.arange(2400) // 40))


def config(store: Store, name: str, folder: Path, solver: str = "ksvd") -> list[str]:
    """The command that fits into `folder`/`name`."""
    table = {
        "name": "small",
        "output": str(folder / name),
        "data": {"store": str(store.path), "hook": HOOK},
        "solver": {
            "ksvd": {"name": "ksvd", "n_atoms": 24, "encoder": {"name": "omp", "k": 3}},
            "sae": {
                "name": "sae",
                "n_atoms": 24,
                "variant": {"name": "batch_topk", "k": 3},
                "learning_rate": 1e-2,
            },
        }[solver],
        "fit": {"batch_size": 160, "epochs": 4},
    }
    file = folder / f"{name}.toml"
    file.write_text(tomli_w.dumps(table))
    return [sys.executable, "-m", "dictlearn.fit", str(file)]


def run(command: list[str], **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False,
        timeout=280,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("solver", ["ksvd", "sae"])
def test_a_fit_on_eight_devices(store: Store, tmp_path: Path, solver: str) -> None:
    """As good as on one; and with the same bytes when it is done again."""
    for name, environment in (("one", {}), ("eight", EIGHT), ("again", EIGHT)):
        code, errors = run(config(store, name, tmp_path, solver), **environment)
        assert code == 0, errors
    one, eight = (dictlearn.load(tmp_path / name).metrics["fvu"] for name in ("one", "eight"))
    assert eight == pytest.approx(one, rel=0.01)
    same = [
        (tmp_path / name / "dictionary.safetensors").read_bytes() for name in ("eight", "again")
    ]
    assert same[0] == same[1]


def test_a_batch_that_cannot_be_shared_out(store: Store, tmp_path: Path) -> None:
    command = [*config(store, "run", tmp_path), "--set", "fit.batch_size=100"]
    code, errors = run(command, **EIGHT)
    assert code == 2
    assert "fit.batch_size: 100 rows cannot be shared out evenly among 8 devices" in errors
    assert not (tmp_path / "run").exists()


def test_two_processes(store: Store, tmp_path: Path) -> None:
    """Joined by jax.distributed, two devices each: one run, as good as a single process's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = config(store, "both", tmp_path)
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            command, env=environment | {"JAX_PROCESS_ID": str(index)}, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "fvu_bulk" in told[0][0]
    assert "fvu_bulk" not in told[1][0]
    assert run(config(store, "alone", tmp_path))[0] == 0
    both, alone = (dictlearn.load(tmp_path / name).metrics["fvu"] for name in ("both", "alone"))
    assert both == pytest.approx(alone, rel=0.01)
    assert json.loads((tmp_path / "both" / "dictionary.json").read_text())["n_training_rows"] > 0


def test_a_process_without_a_number_is_told(store: Store, tmp_path: Path) -> None:
    command = config(store, "run", tmp_path)
    code, errors = run(command, JAX_COORDINATOR_ADDRESS="localhost:1", JAX_PROCESS_ID="x")
    assert code == 2
    assert "JAX_NUM_PROCESSES and JAX_PROCESS_ID" in errors
