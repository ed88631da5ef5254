"""Downstream loss: what is replaced, what is counted, and the ends of its scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from activations import models
from activations.config import validate
from activations.harvest import HarvestConfig, harvest
from activations.store import Store
from activations.terminal import UserError
from dictlearn import artifact
from dictlearn.artifact import Run
from dictlearn.config import FitConfig
from dictlearn.fit import fit
from dictlearn.swap import job_of
from experiments import downstream, replay

HOOK, NEXT = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
D = 16
SOLVERS: dict[str, dict[str, Any]] = {
    # As many atoms as dimensions, and OMP takes them all: x_hat = x.
    "whole": {"name": "untrained", "atoms": "pca", "encoder": {"name": "omp", "k": D}},
    "gradient": {"name": "sae", "variant": {"name": "gradient_topk", "k": 2, "beta": 30.0}},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Store:
    """Some 600 rows with gradients; sequences hold parts of several documents."""
    folder = tmp_path_factory.mktemp("downstream")
    rng = np.random.default_rng(0)
    for index in range(12):
        words = rng.choice(["fox", "lazy", "dog", "quick", "mind", "the", "</s>"], 25)
        (folder / f"{index:02}.txt").write_text(f"{index} {' '.join(words)}")
    table = {
        "store": str(folder / "store"),
        "model": f"dir:{tiny_model_dir}",
        "hooks": [HOOK],
        "gradients": True,
        "context_length": 12,
        "corpus": {"kind": "files", "paths": [str(folder / "*.txt")]},
    }
    harvest(validate(HarvestConfig, table, "test"))
    return Store(table["store"])


@pytest.fixture(scope="module")
def runs(store: Store) -> dict[str, Run]:
    """A run of each solver."""
    found = {}
    for name, solver in SOLVERS.items():
        table = {
            "name": name,
            "data": {"store": str(store.path), "hook": HOOK},
            "solver": solver | {"n_atoms": D},
            "fit": {"batch_size": 64, "epochs": 1},
            "output": str(store.path.parent / name),
        }
        found[name] = artifact.load(fit(validate(FitConfig, table, "test")))
    return found


@pytest.fixture(scope="module")
def bridge(tiny_model_dir: Path) -> Any:
    return models.load(f"dir:{tiny_model_dir}").bridge


@pytest.fixture(scope="module")
def where(bridge: Any, runs: dict[str, Run]) -> downstream.Place:
    """All test documents."""
    return downstream.place(bridge, job_of(runs["whole"]), 10**6, gradients=True)


def test_the_clean_replay_is_the_harvest(store: Store, where: downstream.Place) -> None:
    # Activations and gradients of the rows that stand in the store.
    assert set(where.clean.error) == {"activations", "gradients"}
    assert max(where.clean.error.values()) < 1e-3
    assert where.clean.counted.sum() == sum(
        np.isin(store.read(shard, "document"), where.clean.documents).sum()
        for shard in store.manifest.shards
    )


def test_the_clean_loss_is_that_of_transformers(
    where: downstream.Place, tiny_model_dir: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    clean = where.clean
    with torch.inference_mode():
        logits = model(torch.from_numpy(clean.token.astype(np.int64))).logits
    log_p = torch.log_softmax(logits, dim=-1).numpy()
    sequence, position = np.nonzero(clean.counted)
    expected = -log_p[sequence, position, clean.token[sequence, position + 1]]
    np.testing.assert_allclose(
        replay.losses(where.bridge, HOOK, clean), expected, rtol=1e-4, atol=1e-5
    )


def test_a_coder_without_error_costs_nothing(runs: dict[str, Run], where: downstream.Place) -> None:
    run = runs["whole"]
    line = downstream.measure(run.coder, job_of(run), where, "plain")
    assert line["fvu_bulk"] < 1e-8
    assert line["ce_increase"] == pytest.approx(0, abs=1e-5)
    assert line["loss_recovered"] == pytest.approx(1, abs=1e-2)
    assert line["l0"] == pytest.approx(D, abs=0.1)
    assert abs(line["ce_zero"] - line["ce_model"]) > 1e-3
    low, high = line["ce_increase_interval"]
    assert low <= line["ce_increase"] + 1e-9
    assert line["ce_increase"] <= high + 1e-9


def test_a_coder_of_the_mean_costs_what_the_mean_costs(
    runs: dict[str, Run], where: downstream.Place
) -> None:
    run = runs["whole"]
    atoms = jnp.zeros_like(run.coder.dictionary.atoms)
    empty = eqx.tree_at(lambda coder: coder.dictionary.atoms, run.coder, atoms)
    line = downstream.measure(empty, job_of(run), where, "plain")
    assert line["l0"] == 0
    assert line["ce_hat"] == pytest.approx(line["ce_mean"], abs=1e-6)
    assert line["ce_increase"] != 0


def test_other_documents_and_special_tokens_are_left_alone(
    store: Store, where: downstream.Place
) -> None:
    clean, seen = where.clean, []
    rows = np.full((clean.replaced.sum(), D), 7.0)
    where.bridge.add_hook(NEXT, lambda x, hook: seen.append(x.numpy().copy()))
    try:
        replay.losses(where.bridge, HOOK, clean, rows)
    finally:
        where.bridge.reset_hooks()
    x = np.concatenate(seen)
    np.testing.assert_array_equal(x[clean.replaced], 7)
    others = ~clean.replaced
    assert others.sum() > 2 * len(others)  # BOS of each sequence, and what is not for testing
    np.testing.assert_allclose(x[others], clean.x[others], rtol=1e-5, atol=1e-6)
    assert set(np.flatnonzero(np.isin(clean.token, (0, 1)))) <= set(np.flatnonzero(others))


def test_each_mode_is_measured_once(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines.jsonl"
    modes = downstream.MODES
    lines = downstream.measure_all(list(runs.values()), modes, 20, file)
    own = [(Path(line["run"]).name, line["mode"]) for line in lines]
    assert own == [("whole", "plain"), ("gradient", "plain"), ("gradient", "gradient")]
    # The two modes keep other atoms; both are of the same text.
    plain, informed = lines[1:]
    assert plain["ce_model"] == informed["ce_model"]
    assert plain["ce_hat"] != informed["ce_hat"]
    assert plain["fvu_bulk"] < informed["fvu_bulk"]
    assert 20 <= plain["n_tokens"] < 32
    with file.open("a") as out:
        out.write('{"run": "who')  # a kill
    monkeypatch.setattr(downstream, "measure", lambda *_: pytest.fail("measured again"))
    assert downstream.measure_all(list(runs.values()), modes, 20, file) == json.loads(
        json.dumps(lines)
    )
    downstream.show(lines)


def test_another_model_is_told(store: Store, runs: dict[str, Run], bridge: Any) -> None:
    documents = job_of(runs["whole"]).parts["test"].documents
    name, weights = next(iter(bridge.named_parameters()))
    with torch.no_grad():
        before = weights.clone()
        weights *= 1.5
        try:
            with pytest.raises(UserError, match="differ by"):
                replay.replay(bridge, store, HOOK, documents, 50, gradients=False)
        finally:
            weights.copy_(before)
    assert "embed" in name
