"""Others' dictionaries: their equations in plain numpy, and one message for what cannot be read.

Files are written here as the libraries write them; experiments/parity compares with the libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import dictlearn
from dictlearn import artifact, interop
from dictlearn.artifact import ArtifactError
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.omp import OMP

N, M, D, K = 50, 24, 10, 4
Tensors = dict[str, np.ndarray]


def tensors(*names: str) -> Tensors:
    """Random tensors by SAELens's names; b_dec is far from 0, as a residual stream's mean is."""
    rng = np.random.default_rng(0)
    made = {
        "W_enc": rng.standard_normal((D, M)),
        "W_dec": rng.standard_normal((M, D)) * rng.uniform(0.1, 0.5, (M, 1)),
        "b_dec": rng.standard_normal(D) + 5 * (np.arange(D) == 3),
        **{name: rng.standard_normal(M) / 2 for name in ("b_enc", "b_gate", "b_mag", "r_mag")},
        "threshold": rng.uniform(0, 2, M),
    }
    return {name: made[name].astype(np.float32) for name in names}


def some_rows() -> np.ndarray:
    rows = np.random.default_rng(1).standard_normal((N, D)) * 2 + 5 * (np.arange(D) == 3)
    return rows.astype(np.float32)


def config(architecture: str, **more: Any) -> dict[str, Any]:
    """A cfg.json as SAELens 6 writes it."""
    return {
        "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12", "model_name": "gpt2",
            "hook_name": "blocks.1.hook_resid_pre", "context_size": 128, "prepend_bos": True,
        },
        "architecture": architecture, **more,
    }  # fmt: skip


def write(file: Path, held: Tensors, told: dict[str, Any] | None = None, name: str = "cfg.json"):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npz":
        np.savez(file, **held)
    else:
        file.write_bytes(safetensors.numpy.save(held))
    if told is not None:
        (file.parent / name).write_text(json.dumps(told))
    return file.parent


def write_saelens(folder: Path, held: Tensors, told: dict[str, Any]) -> Path:
    return write(folder / "sae_weights.safetensors", held, told)


# What the libraries compute, in float64: rows as the encoder sees them, tensors -> codes.

BASIC = ("W_enc", "b_enc", "W_dec", "b_dec")
Equation = Callable[[np.ndarray, dict[str, Any]], np.ndarray]


def keep(u: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The K greatest of each row by a score."""
    kept = np.zeros(u.shape, bool)
    np.put_along_axis(kept, np.argsort(-score, axis=1)[:, :K], True, axis=1)
    return np.where(kept, u, 0)


def pre(x: np.ndarray, t: dict[str, Any]) -> np.ndarray:
    return x @ t["W_enc"] + t["b_enc"]


def rescaled(x: np.ndarray, t: dict[str, Any]) -> np.ndarray:
    return pre(x, t) * np.linalg.norm(t["W_dec"], axis=1)


def gated(x: np.ndarray, t: dict[str, Any]) -> np.ndarray:
    magnitude = x @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"]
    return (x @ t["W_enc"] + t["b_gate"] > 0) * np.maximum(magnitude, 0)


def pursuit(x: np.ndarray, t: dict[str, Any]) -> np.ndarray:
    codes = np.zeros((len(x), M))
    for z, r in zip(codes, x.copy(), strict=True):
        for _ in range(3):
            j = np.argmax(t["W_dec"] @ r)
            step = max(t["W_dec"][j] @ r, 0)
            z[j], r[:] = z[j] + step, r - step * t["W_dec"][j]
    return codes


GATED = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
LOOSE = {"max_iterations": 3, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
SCALED = {"k": K, "rescale_acts_by_decoder_norm": True}
# Name -> architecture, further settings, tensors, equation.
SAELENS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], Equation]] = {
    "standard": ("standard", {}, BASIC, lambda x, t: np.maximum(pre(x, t), 0)),
    "topk": ("topk", {"k": K}, BASIC, lambda x, t: np.maximum(keep(pre(x, t), pre(x, t)), 0)),
    "topk rescaled": (
        "topk", SCALED, BASIC, lambda x, t: np.maximum(keep(rescaled(x, t), rescaled(x, t)), 0),
    ),
    "abstopk": ("abstopk", {"k": K}, BASIC, lambda x, t: keep(pre(x, t), np.abs(pre(x, t)))),
    "abstopk rescaled": (
        "abstopk", SCALED, BASIC, lambda x, t: keep(rescaled(x, t), np.abs(rescaled(x, t))),
    ),
    "jumprelu": (
        "jumprelu", {}, (*BASIC, "threshold"),
        lambda x, t: pre(x, t) * (pre(x, t) > t["threshold"]),
    ),
    "gated": ("gated", {}, GATED, gated),
    "matching_pursuit": ("matching_pursuit", LOOSE, ("W_dec", "b_dec"), pursuit),
}  # fmt: skip


def assert_same(coder: Coder, x: np.ndarray, codes: np.ndarray, x_hat: np.ndarray) -> None:
    found = coder.encode(x)
    dense = np.asarray(found.dense())
    assert (codes != 0).any()
    assert (codes == 0).any()
    np.testing.assert_array_equal(dense != 0, codes != 0)
    np.testing.assert_allclose(dense, codes, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(coder.decode(found), x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", SAELENS)
def test_saelens_codes_are_those_of_its_equation(name: str, centred: bool, tmp_path: Path) -> None:
    architecture, more, names, equation = SAELENS[name]
    held, x = tensors(*names), some_rows()
    told = config(architecture, **more) | {"apply_b_dec_to_input": centred}
    t = {key: array.astype(np.float64) for key, array in held.items()}
    codes = equation(x - t["b_dec"] * centred, t)
    decoded = codes
    if more.get("rescale_acts_by_decoder_norm"):
        decoded = codes / np.linalg.norm(t["W_dec"], axis=1)
    bias = t["b_dec"] * (centred or architecture != "matching_pursuit")
    coder = interop.load(write_saelens(tmp_path, held, told)).coder
    assert_same(coder, x, codes, decoded @ t["W_dec"] + bias)


def test_saelens_settings_matter() -> None:
    """Else the test above could not tell that one was ignored."""
    t = {k: v.astype(np.float64) for k, v in tensors(*BASIC, *GATED, "threshold").items()}
    x = some_rows().astype(np.float64)
    for name in SAELENS:
        one, other = (SAELENS[name][3](rows, t) for rows in (x, x - t["b_dec"]))
        assert ((one != 0) != (other != 0)).any()
    for kind in ("topk", "abstopk"):
        one, other = (SAELENS[name][3](x, t) for name in (kind, f"{kind} rescaled"))
        assert ((one != 0) != (other != 0)).any()


def test_saelens_pursuit_has_its_defaults(tmp_path: Path) -> None:
    """d_in rounds, ||r|| below 0.01, done on a repeat."""
    told = config("matching_pursuit", max_iterations=None)
    encoder = interop.load(write_saelens(tmp_path, tensors("W_dec", "b_dec"), told)).coder.encoder
    assert artifact.hyperparameters(encoder) == {
        "rounds": D, "threshold": 1e-2, "stop_on_repeat": True, "name": "mp_sae",
    }  # fmt: skip


def test_saelens_metadata(tmp_path: Path) -> None:
    told = config("standard")
    run = dictlearn.load(str(write_saelens(tmp_path / "sae", tensors(*BASIC), told)))
    assert run.path == tmp_path / "sae"
    assert run.metrics == {}
    assert run.metadata == {
        "format": "saelens", "hook": "blocks.1.hook_resid_pre", "model": {"name": "gpt2"},
        "context_length": 128, "prepend_bos": True, "source config": told,
    }  # fmt: skip


def test_what_saelens_ignores_is_ignored(tmp_path: Path) -> None:
    """A scale of training; the shape of hook_z, which our rows have not; further keys."""
    told = config(
        "standard", normalize_activations="expected_average_only_in", reshape_activations="hook_z",
        something=1,
    )  # fmt: skip
    one = interop.load(write_saelens(tmp_path / "one", tensors(*BASIC), told))
    two = interop.load(write_saelens(tmp_path / "two", tensors(*BASIC), config("standard")))
    assert eqx.tree_equal(one.coder, two.coder)


@pytest.mark.parametrize("nested", [False, True])
def test_saelens_before_version_6(nested: bool, tmp_path: Path) -> None:
    """Settings at the top level, architectures by their activation; nested metadata count too."""
    told: dict[str, Any] = {
        "d_in": D, "d_sae": M, "dtype": "torch.float32", "normalize_activations": True,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "context_size": 64,
    }  # fmt: skip
    names = {"hook_name": "blocks.5.hook_resid_post", "model_name": "gpt2-small"}
    told |= {"metadata": names} if nested else names
    held = tensors(*BASIC) | {"scaling_factor": np.ones(M, np.float32)}
    run = interop.load(write_saelens(tmp_path / "topk", held, told))
    now = interop.load(write_saelens(tmp_path / "now", tensors(*BASIC), config("topk", k=K)))
    assert eqx.tree_equal(run.coder, now.coder)
    assert run.metadata["hook"] == "blocks.5.hook_resid_post"
    assert run.metadata["model"] == {"name": "gpt2-small"}
    assert run.metadata["context_length"] == 64
    assert run.metadata["prepend_bos"] is True
    told = {"hook_point": "blocks.2.hook_mlp_out", "sae_lens_version": "5.1.0"}
    run = interop.load(write_saelens(tmp_path / "standard", tensors(*BASIC), told))
    now = interop.load(write_saelens(tmp_path / "now", tensors(*BASIC), config("standard")))
    assert eqx.tree_equal(run.coder, now.coder)
    assert run.metadata["hook"] == "blocks.2.hook_mlp_out"


def test_saelens_log_threshold(tmp_path: Path) -> None:
    held = tensors(*BASIC, "threshold")
    one = interop.load(write_saelens(tmp_path / "one", held, config("jumprelu")))
    held["log_threshold"] = np.log(held.pop("threshold"))
    two = interop.load(write_saelens(tmp_path / "two", held, config("jumprelu")))
    one, two = (run.coder.encoder.activation.threshold for run in (one, two))  # type: ignore
    np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_weights_become_float32(dtype: type, tmp_path: Path) -> None:
    """Half precision exactly."""
    held = {name: array.astype(dtype) for name, array in tensors(*BASIC).items()}
    coder = interop.load(write_saelens(tmp_path, held, config("standard"))).coder
    assert {leaf.dtype.name for leaf in jax.tree.leaves(coder) if leaf.dtype != jnp.int32} == {
        "float32"
    }
    atoms = np.asarray(coder.dictionary.atoms)
    np.testing.assert_array_equal(atoms, held["W_dec"].astype(np.float32))
    if dtype is not np.float64:
        assert (atoms != tensors(*BASIC)["W_dec"]).any()


# Gemma Scope

SCOPE = (*BASIC, "threshold")


def lower(held: Tensors) -> Tensors:
    return {name.lower(): array for name, array in held.items()}


FIRST, SECOND = "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "gemma-scope-2-270m-pt"


def write_scope(folder: Path, *, second: bool, told: dict[str, Any] | None = None) -> Path:
    held = tensors(*SCOPE)
    if second:
        return write(folder / "params.safetensors", lower(held), told, "config.json")
    return write(folder / "params.npz", held)


@pytest.mark.parametrize("second", [False, True])
def test_gemma_scope_does_not_take_b_dec_off(second: bool, tmp_path: Path) -> None:
    t = {key: array.astype(np.float64) for key, array in tensors(*SCOPE).items()}
    x = some_rows()
    codes = pre(x, t) * (pre(x, t) > t["threshold"])
    run = interop.load(write_scope(tmp_path, second=second))
    assert_same(run.coder, x, codes, codes @ t["W_dec"] + t["b_dec"])
    assert run.metadata == {
        "format": f"gemma-scope-{1 + second}", "hook": None, "model": {"name": None},
        "context_length": None, "prepend_bos": None, "source config": {},
    }  # fmt: skip


CACHE = "models--google--gemma-scope-9b-it-att/snapshots/0a1b"
PLACES = {
    FIRST: ("google/gemma-2-2b", "blocks.12.hook_resid_post"),
    "gemma-scope-27b-pt-res-canonical/layer_3/width_131k/canonical": (
        "google/gemma-2-27b", "blocks.3.hook_resid_post",
    ),
    f"{CACHE}/layer_9/width_16k/average_l0_8": ("google/gemma-2-9b-it", "blocks.9.attn.hook_z"),
    "gemma-scope-2b-pt-mlp/layer_0/width_16k/average_l0_7": (
        "google/gemma-2-2b", "blocks.0.hook_mlp_out",
    ),
    "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": (None, None),
    f"{SECOND}/resid_post/layer_12_width_16k_l0_medium": (
        "google/gemma-3-270m", "blocks.12.hook_resid_post",
    ),
    "gemma-scope-2-1b-pt/attn_out_all/layer_7_width_16k_l0_small": (
        "google/gemma-3-1b-pt", "blocks.7.attn.hook_z",
    ),
    "gemma-scope-2-27b-it/mlp_out/layer_40_width_262k_l0_big": (
        "google/gemma-3-27b-it", "blocks.40.hook_mlp_out",
    ),
    "elsewhere/attn_out/layer_1_width_16k_l0_big": (None, "blocks.1.attn.hook_z"),
    "elsewhere/layer_1": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_gemma_scope_is_known_by_its_directories(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hook = PLACES[place]
    folder = write_scope(tmp_path / place, second="_width" in place)
    monkeypatch.chdir(folder)  # the names are in none of the paths that a user gives
    for path in (folder, Path(), next(folder.relative_to(folder).glob("params.*"))):
        told = interop.load(path).metadata
        assert (told["model"]["name"], told["hook"]) == (model, hook)
        assert told["context_length"] == (1024 if model else None)
        assert told["prepend_bos"] == (True if model else None)


@pytest.mark.parametrize(
    ("point", "hook"),
    [
        ("model.layers.12.output", "blocks.12.hook_resid_post"),
        ("model.language_model.layers.3.self_attn.o_proj.input", "blocks.3.attn.hook_z"),
        ("model.layers.0.post_feedforward_layernorm.output", "blocks.0.hook_mlp_out"),
        ("model.layers.0.mlp.gate", None),
    ],
)
def test_gemma_scope_is_known_by_its_config(point: str, hook: str | None, tmp_path: Path) -> None:
    told = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-it"}
    told["hf_hook_point_in"] = point
    run = interop.load(write_scope(tmp_path / "elsewhere", second=True, told=told))
    assert run.metadata["model"] == {"name": "google/gemma-3-270m-it"}
    assert run.metadata["hook"] == hook
    assert run.metadata["source config"] == told


# sparsify

SPARSIFY = {
    "activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": M,
    "k": K, "multi_topk": True, "skip_connection": False, "transcode": False, "d_in": D,
}  # fmt: skip


def sparsify_tensors() -> Tensors:
    held = tensors(*BASIC)
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    held["W_enc"] = np.ascontiguousarray(held["W_enc"].T)
    return {names.get(name, name): array for name, array in held.items()}


def write_sparsify(folder: Path, **changes: Any) -> Path:
    return write(folder / "sae.safetensors", sparsify_tensors(), SPARSIFY | changes)


@pytest.mark.parametrize("signed", [False, True])
def test_sparsify_codes_are_those_of_its_equation(signed: bool, tmp_path: Path) -> None:
    t = {key: array.astype(np.float64) for key, array in tensors(*BASIC).items()}
    x = some_rows()
    u = pre(x - t["b_dec"], t)
    codes = keep(u, np.abs(u)) if signed else keep(np.maximum(u, 0), np.maximum(u, 0))
    run = interop.load(write_sparsify(tmp_path, **({"signed": True} if signed else {})))
    assert_same(run.coder, x, codes, codes @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("layers.7", "blocks.7.hook_resid_post"),
        ("transformer.h.3", "blocks.3.hook_resid_post"),
        ("layers.7.mlp", None),
        ("final", None),
    ],
)
def test_sparsify_is_known_by_its_directories(name: str, hook: str | None, tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path / "run" / name, num_latents=0)
    run = interop.load(folder)
    assert run.metadata == {
        "format": "sparsify", "hook": hook, "model": {"name": None}, "context_length": None,
        "prepend_bos": None, "source config": SPARSIFY | {"num_latents": 0},
    }  # fmt: skip
    (tmp_path / "run" / "config.json").write_text('{"model": "a/model", "ctx_len": 2048}')
    told = interop.load(folder).metadata
    assert (told["model"], told["context_length"]) == ({"name": "a/model"}, 2048)


# Which format, and ours

WRITERS: dict[str, Callable[[Path], Path]] = {
    **{
        f"saelens {name}": lambda folder, name=name: write_saelens(
            folder, tensors(*SAELENS[name][2]), config(SAELENS[name][0], **SAELENS[name][1])
        )
        for name in SAELENS
    },
    "gemma-scope-1": lambda folder: write_scope(folder, second=False),
    "gemma-scope-2": lambda folder: write_scope(folder, second=True),
    "sparsify": write_sparsify,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_foreign_dictionary_is_saved_as_a_run(name: str, tmp_path: Path) -> None:
    run = dictlearn.load(WRITERS[name](tmp_path / "theirs"))
    assert run.metadata["format"] == name.split()[0]
    (tmp_path / "ours").mkdir()
    artifact.save(tmp_path / "ours", run.coder, run.metadata, run.metrics)
    again = dictlearn.load(tmp_path / "ours")
    assert eqx.tree_equal(again.coder, run.coder)
    assert run.metadata.items() <= again.metadata.items()
    x = jnp.asarray(some_rows())
    assert eqx.tree_equal(again.coder.encode(x), run.coder.encode(x))


@pytest.mark.parametrize("name", WRITERS)
def test_any_file_of_a_directory_names_it(name: str, tmp_path: Path) -> None:
    folder = WRITERS[name](tmp_path)
    coder = interop.load(folder).coder
    for file in folder.iterdir():
        run = interop.load(file)
        assert run.path == folder
        assert eqx.tree_equal(run.coder, coder)


def test_ours_comes_first_and_files_by_name(tmp_path: Path) -> None:
    folder = write_scope(tmp_path, second=False)
    write_sparsify(tmp_path)
    with pytest.raises(ArtifactError, match=r"several .*: params\.npz, sae\.safetensors$"):
        dictlearn.load(folder)
    assert dictlearn.load(folder / "sae.safetensors").metadata["format"] == "sparsify"
    ours = Coder(
        Normaliser(jnp.zeros(D), jnp.float32(2)), Dictionary(jnp.eye(M, D), jnp.ones(D)), OMP(k=2)
    )
    artifact.save(folder, ours, {"name": "ours"}, {"fvu": 0.5})
    for path in (folder, folder / artifact.WEIGHTS):
        run = dictlearn.load(path)
        assert run.metrics == {"fvu": 0.5}
        assert eqx.tree_equal(run.coder, ours)
    (folder / artifact.UNFINISHED).write_text("stopped at step 3")
    with pytest.raises(ArtifactError, match="stopped at step 3"):
        dictlearn.load(folder)


@pytest.mark.parametrize("path", ["empty", "absent", "absent/params.npz", "empty/notes.txt"])
def test_no_dictionary(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(ArtifactError) as caught:
        dictlearn.load(tmp_path / path)
    assert str(caught.value).startswith(f"{tmp_path / path}: no run there")
    assert all(name in str(caught.value) for name in interop.FORMATS)


# What cannot be read: how it comes about, and what the message must say, after the file's name.

S, C = "sae_weights.safetensors", "cfg.json"


def changed(**changes: Any) -> Callable[[Path], Path]:
    """A SAELens directory with other settings; None takes one away."""

    def make(folder: Path) -> Path:
        told = config("topk", k=K) | changes
        return write_saelens(
            folder, tensors(*BASIC), {k: v for k, v in told.items() if v is not None}
        )

    return make


def held(**changes: Any) -> Callable[[Path], Path]:
    """A SAELens directory with other tensors; None takes one away."""

    def make(folder: Path) -> Path:
        new = tensors(*BASIC) | changes
        kept = {name: array for name, array in new.items() if array is not None}
        return write_saelens(folder, kept, config("topk", k=K))

    return make


def after(make: Callable[[Path], Path], damage: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A directory in which something is done then."""

    def both(folder: Path) -> Path:
        damage(make(folder))
        return folder

    return both


def put(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30])


def spoilt(name: str, value: float) -> np.ndarray:
    array = tensors(name)[name]
    array.flat[7] = value
    return array


def scope(place: str = "", **more: np.ndarray) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / place / "params.safetensors", lower(tensors(*SCOPE)) | more)
        return folder / place

    return make


def told_scope(**told: Any) -> Callable[[Path], Path]:
    return lambda folder: write_scope(folder, second=True, told=told)


P, G, T = "params.safetensors", "params.npz", "sae.safetensors"
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown architecture": (
        changed(architecture="temporal"),
        f"{C}: architecture is 'temporal'; can be read: standard, topk, abstopk, jumprelu, gated, "
        "matching_pursuit",
    ),
    "no architecture": (changed(architecture=None), f"{C}: architecture is None; can be read"),
    "transcoder": (changed(architecture="skip_transcoder"), f"{C}: architecture is 'skip_trans"),
    "layer_norm": (changed(normalize_activations="layer_norm"), "'layer_norm': each row is"),
    "constant norm": (
        changed(normalize_activations="constant_norm_rescale"),
        f"{C}: normalize_activations is 'constant_norm_rescale': each row is divided",
    ),
    "whitening": (
        changed(normalize_activations="covariance_whitening"),
        f"{C}: normalize_activations is 'covariance_whitening', and the files do not hold",
    ),
    "reshaped": (
        changed(reshape_activations="flat"),
        f"{C}: reshape_activations is 'flat'; expected none or hook_z",
    ),
    "no k": (changed(k=None), f"{C}: k is None, expected a whole number above 0"),
    "k is 0": (changed(k=0), f"{C}: k is 0, expected a whole number above 0"),
    "k is true": (changed(k=True), f"{C}: k is True, expected a whole number"),
    "k above the atoms": (changed(k=M + 1), f"{S}: k: {M + 1} is more than n_atoms = {M}"),
    "a switch that is none": (
        changed(apply_b_dec_to_input="yes"),
        f"{C}: apply_b_dec_to_input is 'yes', expected true or false",
    ),
    "metadata a list": (changed(metadata=[1]), f"{C}: metadata is not a table"),
    "before 6, another activation": (
        changed(metadata={}, architecture=None, activation_fn="tanh-relu"),
        f"{C}: activation_fn is 'tanh-relu'; relu and topk can be read",
    ),
    "no config": (after(changed(), lambda folder: (folder / C).unlink()), f"{C}: cannot be read"),
    "config garbage": (after(changed(), put(C, b"\xff{")), f"{C}: cannot be read"),
    "config a list": (after(changed(), put(C, b"[]")), f"{C}: is not a table"),
    "d_in": (changed(d_in=D + 1), f"{S}: W_enc has shape ({D}, {M}), expected (d = 11, m = {M})"),
    "d_sae": (changed(d_sae=M - 1), f"{S}: W_enc has shape ({D}, {M}), expected (d = {D}, m = 23)"),
    "a tensor missing": (
        held(b_enc=None),
        f"{S}: expected W_enc, W_dec, b_dec, b_enc; missing: b_enc",
    ),
    "a tensor too many": (held(counts=np.zeros(M)), "b_enc; not expected: counts"),
    "another architecture's": (
        held(b_enc=None, b_gate=np.zeros(M, np.float32)),
        "missing: b_enc, not expected: b_gate",
    ),
    "a bias too long": (
        held(b_enc=np.zeros(M + 1, np.float32)),
        f"{S}: b_enc has shape ({M + 1},), expected (m = {M})",
    ),
    "a matrix flat": (
        held(W_dec=np.zeros(M * D, np.float32)),
        f"{S}: W_dec has shape ({M * D},), expected (m = {M}, d = {D})",
    ),
    "whole numbers": (held(b_enc=np.zeros(M, np.int32)), f"{S}: b_enc holds int32, expected flo"),
    "NaN": (held(W_dec=spoilt("W_dec", np.nan)), f"{S}: W_dec holds NaN or infinity"),
    "infinity": (held(b_enc=spoilt("b_enc", np.inf)), f"{S}: b_enc holds NaN or infinity"),
    "too great": (held(b_dec=np.full(D, 1e300)), f"{S}: b_dec holds NaN or infinity"),
    "finetuned": (held(scaling_factor=np.full(M, 2.0)), f"{S}: scaling_factor is not 1"),
    "cut short": (after(held(), cut(S)), f"{S}: is damaged, or holds no tensors"),
    "empty": (after(held(), put(S, b"")), f"{S}: is damaged, or holds no tensors"),
    "gemma scope, cut": (
        after(lambda folder: write_scope(folder, second=False), cut(G)),
        f"{G}: is damaged, or holds no tensors",
    ),
    "gemma scope, pickled": (
        lambda folder: write(folder / G, {"W_enc": np.array([{}], dtype=object)}),
        f"{G}: is damaged, or holds no tensors (ValueError",
    ),
    "gemma scope, one array": (
        lambda folder: after(lambda f: write_scope(f, second=False), put(G, b"\x93NUMPY"))(folder),
        f"{G}: is damaged, or holds no tensors",
    ),
    "gemma scope, a tensor missing": (
        lambda folder: write(folder / G, tensors(*BASIC)),
        f"{G}: expected W_enc, b_enc, threshold, W_dec, b_dec; missing: threshold",
    ),
    "gemma scope, by lower names": (
        lambda folder: write(folder / P, lower(tensors(*BASIC))),
        f"{P}: expected w_enc, b_enc, threshold, w_dec, b_dec; missing: threshold",
    ),
    "gemma scope, affine": (
        scope(affine_skip_connection=np.zeros((D, D), np.float32)),
        f"{P}: is a transcoder",
    ),
    "gemma scope, transcoder's directory": (
        scope(f"{SECOND}/transcoder_all/layer_1_width_16k_l0_big"),
        f"{P}: is a transcoder",
    ),
    "gemma scope 1, transcoder's directory": (
        lambda folder: write_scope(
            folder / "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_9", second=False
        ),
        f"{G}: is a transcoder",
    ),
    "gemma scope, transcoder's config": (
        told_scope(hf_hook_point_in="model.layers.1.a", hf_hook_point_out="model.layers.1.b"),
        f"{P}: is a transcoder",
    ),
    "gemma scope, another architecture": (
        told_scope(architecture="topk"),
        "config.json: architecture is 'topk'; can be read: jump_relu",
    ),
    "sparsify, groupmax": (
        lambda folder: write_sparsify(folder, activation="groupmax"),
        f"{C}: activation is 'groupmax'; can be read: topk",
    ),
    "sparsify, transcoder": (
        lambda folder: write_sparsify(folder, transcode=True),
        f"{C}: transcode is set",
    ),
    "sparsify, skip connection": (
        lambda folder: write_sparsify(folder, skip_connection=True),
        f"{C}: skip_connection is set",
    ),
    "sparsify, no k": (lambda folder: write_sparsify(folder, k=None), f"{C}: k is None"),
    "sparsify, k": (lambda folder: write_sparsify(folder, k=99), f"{T}: k: 99 is more than"),
    "sparsify, sizes": (
        lambda folder: write_sparsify(folder, num_latents=M + 1),
        f"{T}: encoder.weight has shape ({M}, {D}), expected (m = {M + 1}, d = {D})",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read(name: str, tmp_path: Path) -> None:
    make, says = REFUSED[name]
    folder = make(tmp_path / "theirs")
    with pytest.raises(ArtifactError) as caught:
        dictlearn.load(folder)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{folder}/")
    assert "\n" not in str(caught.value)
