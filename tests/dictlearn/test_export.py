"""Runs as SAELens directories: read back they give the same codes, and what cannot be is told.

experiments/parity/saelens_export.py compares with SAELens itself.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from activations.terminal import UserError
from dictlearn import interop
from dictlearn.artifact import Run
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders import activations
from dictlearn.encoders.linear import Linear, Tied
from dictlearn.encoders.mp_sae import MPSAE
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.nnls import NNLS
from dictlearn.encoders.omp import OMP
from dictlearn.interop.export import PLUGIN, export

N, M, D, K = 200, 24, 10, 4
TOLD = {
    "hook": "blocks.1.hook_resid_pre", "context_length": 64, "harvest": {"marks": "bos"},
    "model": {"spec": "hf:openai-community/gpt2@main", "description": "GPT-2"},
}  # fmt: skip
RNG = np.random.default_rng(0)


def array(*shape: int) -> jnp.ndarray:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


WEIGHT, OFFSET = array(M, D) / 3, array(M) / 3
ACTIVATIONS = {
    "topk": activations.TopK(K),
    "abstopk": activations.AbsTopK(K),
    "standard": activations.ReLU(),
    "jumprelu": activations.JumpReLU(jnp.abs(array(M))),
    "gated": activations.Gated(jnp.exp(array(M)), array(M) / 3),
}


def run_of(encoder: Any, *, atoms: Any = None) -> Run:
    """A run whose rows are off centre, and neither they nor the atoms of unit scale."""
    mean = array(D).at[3].add(40.0)
    atoms = array(M, D) / 2 if atoms is None else atoms
    coder = Coder(Normaliser(mean, jnp.asarray(7.0)), Dictionary(atoms, array(D) / 5), encoder)
    return Run(Path("run"), coder, TOLD, {})


def rows(run: Run) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)
    return np.asarray(run.coder.normaliser.restore(jnp.asarray(x)))


def same(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    one, other = np.asarray(one), np.asarray(other)
    assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_linear_run_keeps_its_codes(name: str, tmp_path: Path) -> None:
    run = run_of(Linear(WEIGHT, OFFSET, ACTIVATIONS[name]))
    export(run, tmp_path / "out")
    back = interop.load(tmp_path / "out")
    assert back.metadata["source config"]["architecture"] == name
    x = rows(run)
    codes = run.coder.encode(x)
    same(back.coder.encode(x).dense(), codes.dense())
    same(back.coder.decode(back.coder.encode(x)), run.coder.decode(codes))


def test_a_batch_topk_threshold_is_a_constant_one(tmp_path: Path) -> None:
    threshold = jnp.full(M, 0.7)
    run = run_of(Linear(WEIGHT, OFFSET, activations.JumpReLU(threshold)))
    export(run, tmp_path / "out")
    held = safetensors.numpy.load_file(tmp_path / "out/sae_weights.safetensors")
    np.testing.assert_array_equal(held["threshold"], threshold)
    assert set(held) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


@pytest.mark.parametrize("activation", [activations.TopK(K), activations.AbsTopK(K)])
def test_a_tied_run_has_codes_over_unit_atoms(activation: Any, tmp_path: Path) -> None:
    run = run_of(Tied(activation))
    export(run, tmp_path / "out")
    back = interop.load(tmp_path / "out")
    x = rows(run)
    codes = run.coder.encode(x)
    norms = np.linalg.norm(run.coder.atoms, axis=1)
    same(back.coder.encode(x).dense(), np.asarray(codes.dense()) * norms)
    same(back.coder.decode(back.coder.encode(x)), run.coder.decode(codes))


def test_a_pursuit_becomes_matching_pursuit_over_both_signs(tmp_path: Path) -> None:
    run = run_of(OMP(k=K))
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out/cfg.json").read_text())
    told = {"max_iterations": K, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    assert told.items() <= config.items()
    assert config["d_sae"] == 2 * M
    held = safetensors.numpy.load_file(tmp_path / "out/sae_weights.safetensors")
    assert set(held) == {"W_dec", "b_dec"}
    back = interop.load(tmp_path / "out")
    x = rows(run)
    dense = np.asarray(back.coder.encode(x).dense())
    # Matching pursuit in plain numpy.
    atoms = np.asarray(run.coder.atoms, np.float64)
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    centre = np.asarray(run.coder.normaliser.restore(run.coder.dictionary.bias[None]))[0]
    wanted, left = np.zeros((N, M)), x.astype(np.float64) - centre
    for _ in range(K):
        inner = left @ unit.T
        best = np.abs(inner).argmax(axis=1)
        step = inner[np.arange(N), best]
        wanted[np.arange(N), best] += step
        left -= step[:, None] * unit[best]
    same(dense[:, :M] - dense[:, M:], wanted)
    one_sided = run_of(NonNegativeOMP(k=K))
    export(one_sided, tmp_path / "one")
    assert json.loads((tmp_path / "one/cfg.json").read_text())["d_sae"] == M


def test_a_saelens_pursuit_goes_back_as_it_came(tmp_path: Path) -> None:
    atoms = array(M, D) / 3
    encoder = MPSAE(atoms, rounds=6, threshold=0.05, stop_on_repeat=True)
    run = run_of(encoder, atoms=atoms)
    export(run, tmp_path / "out")
    x = rows(run)
    back = interop.load(tmp_path / "out")
    same(back.coder.encode(x).dense(), 7.0 * run.coder.encode(x).dense())
    same(back.coder.decode(back.coder.encode(x)), run.coder.decode(run.coder.encode(x)))


def test_the_plugin_is_omp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the [lm] extra is not installed")
    registered: dict[str, Any] = {}
    for name, held in {
        "sae_lens": {}, "sae_lens.saes": {},
        "sae_lens.registry": {
            "SAE_CLASS_REGISTRY": registered,
            "register_sae_class": lambda name, *of: registered.update({name: of}),
        },
        "sae_lens.saes.matching_pursuit_sae": {
            "MatchingPursuitSAE": object, "MatchingPursuitSAEConfig": object,
        },
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    run = run_of(OMP(k=K))
    export(run, tmp_path / "out", omp=True)
    assert (tmp_path / "out/omp.py").read_bytes() == PLUGIN.read_bytes()
    plugin = runpy.run_path(str(tmp_path / "out/omp.py"))
    runpy.run_path(str(tmp_path / "out/omp.py"))  # twice does no harm
    assert set(registered) == {"omp"}
    held = safetensors.numpy.load_file(tmp_path / "out/sae_weights.safetensors")
    x = rows(run).copy()
    x[3] = held["b_dec"]  # nothing to code
    left = torch.from_numpy(x.astype(np.float64) - held["b_dec"])
    codes = plugin["omp"](left, torch.from_numpy(held["W_dec"]).double(), K).numpy()
    wanted = run.coder.encode(x)
    norms = 7.0 * np.linalg.norm(run.coder.atoms, axis=1)
    same(codes, np.asarray(wanted.dense()) * norms)
    assert not codes[3].any()
    same(codes @ held["W_dec"] + held["b_dec"], run.coder.decode(wanted))


def test_what_is_known_of_the_model_goes_with_it(tmp_path: Path) -> None:
    export(run_of(OMP(k=K)), tmp_path / "out")
    told = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert told == {
        "model_name": "openai-community/gpt2", "hook_name": "blocks.1.hook_resid_pre",
        "context_size": 64, "prepend_bos": True, "sae_lens_version": "6.54.12",
    }  # fmt: skip
    bare = dataclasses.replace(run_of(OMP(k=K)), metadata={"hook": "blocks.0.attn.hook_z"})
    export(bare, tmp_path / "bare")
    config = json.loads((tmp_path / "bare/cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    assert interop.load(tmp_path / "bare").metadata["hook"] == "blocks.0.attn.hook_z"


@pytest.mark.parametrize(
    ("encoder", "omp", "message"),
    [
        (NNLS(), False, "nothing like nnls"),
        (OMP(k=K, tolerance=0.1), False, "relative tolerance"),
        (OMP(tolerance=0.1), False, "relative tolerance"),
        (NonNegativeOMP(k=K), True, "--omp is for runs coded by omp, not by nn_omp"),
        (MPSAE(WEIGHT, rounds=3, threshold=0.0, stop_on_repeat=False), False, "are not the"),
    ],
)
def test_what_saelens_cannot_have_is_told(
    encoder: Any, omp: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(run_of(encoder), tmp_path / "out", omp=omp)
    assert not list(tmp_path.iterdir())


def test_carriers_and_a_place_that_is_taken_are_told(tmp_path: Path) -> None:
    run = run_of(OMP(k=K))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export(run, tmp_path / "out")
    kept = eqx.tree_at(lambda r: r.normaliser.carriers, run.coder, jnp.array([3]))
    with pytest.raises(UserError, match="keep_carriers"):
        export(dataclasses.replace(run, coder=kept), tmp_path / "other")
