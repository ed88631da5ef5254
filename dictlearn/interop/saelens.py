"""SAELens directories: cfg.json and sae_weights.safetensors, of SAELens 6 and of those before it.

    codes = activation((x - [apply_b_dec_to_input] b_dec) W_enc + b_enc),
    x_hat = codes W_dec + b_dec

W_enc [d m], b_enc [m], W_dec [m d], b_dec [d], with d = d_in and m = d_sae of the config, and

    standard           ReLU
    topk, abstopk      the k largest above 0; the k largest in size. With
                       rescale_acts_by_decoder_norm, of codes times the norms of W_dec's rows, by
                       which x_hat divides them again
    jumprelu           threshold [m], or log_threshold
    gated              b_gate, b_mag, r_mag [m] in the place of b_enc (activations.Gated)
    matching_pursuit   W_dec and b_dec alone (encoders.mp_sae); without apply_b_dec_to_input b_dec
                       counts nowhere

With `reshape_activations = "hook_z"` rows are heads one after another, as our stores have them.
`expected_average_only_in` says how the dictionary was trained: finished ones have that scale in
their weights, and SAELens's load_from_disk does nothing about it; nor is anything done here.

Source: sae_lens 6.54.12, saes/*.py, and loading/pretrained_sae_loaders.py for configs before 6.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dictlearn.artifact import ArtifactError, Run
from dictlearn.dictionary import Coder
from dictlearn.encoders.activations import AbsTopK, AbstractActivation, Gated, JumpReLU, ReLU, TopK
from dictlearn.encoders.mp_sae import MPSAE
from dictlearn.interop import assemble, files
from dictlearn.interop.files import Tensors

_MATRICES = {"W_enc": "d m", "W_dec": "m d", "b_dec": "d"}
SHAPES: dict[str, dict[str, str]] = {
    "standard": _MATRICES | {"b_enc": "m"},
    "topk": _MATRICES | {"b_enc": "m"},
    "abstopk": _MATRICES | {"b_enc": "m"},
    "jumprelu": _MATRICES | {"b_enc": "m", "threshold": "m"},
    "gated": _MATRICES | {"b_gate": "m", "b_mag": "m", "r_mag": "m"},
    "matching_pursuit": {"W_dec": "m d", "b_dec": "d"},
}
Table = dict[str, Any]


def read(file: Path) -> Run:
    """The dictionary in sae_weights.safetensors, with the cfg.json beside it.

    Raises:
      ArtifactError: a file is missing or damaged; the architecture is none of `SHAPES` (a
        transcoder, for instance); a setting cannot be followed exactly; a tensor does not fit.
    """
    place = file.with_name("cfg.json")
    source = files.table(place)
    config, told = _current(place, source)
    _check(place, config)
    held = files.fitting(
        file,
        _current_tensors(file, files.tensors(file)),
        SHAPES[config["architecture"]],
        d=config.get("d_in"),
        m=config.get("d_sae"),
    )
    return assemble.run(
        file,
        _coder(place, config, held),
        format="saelens",
        config=source,
        hook=told.get("hook_name"),
        model=told.get("model_name"),
        context_length=told.get("context_size"),
        prepend_bos=told.get("prepend_bos"),
    )


def _current(place: Path, source: Table) -> tuple[Table, Table]:
    """A config as SAELens 6 writes it, and its metadata. Before, all stood at the top level."""
    told = source.get("metadata") or {}
    if not isinstance(told, dict):
        raise ArtifactError(f"{place}: metadata is not a table")
    version = str(source.get("sae_lens_version") or told.get("sae_lens_version")).split(".")[0]
    if version.isdigit() and int(version) >= 6:
        return source, told
    config = {"architecture": "standard"} | source
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk":
        more = config.get("activation_fn_kwargs")
        config |= {"architecture": "topk"} | (more if isinstance(more, dict) else {})
    elif activation != "relu":
        raise ArtifactError(f"{place}: activation_fn is {activation!r}; relu and topk can be read")
    if isinstance(scaled := config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    return config, {"hook_name": config.get("hook_point"), "prepend_bos": True} | source | told


def _check(place: Path, config: Table) -> None:
    """Raise ArtifactError for what cannot be read, or not exactly."""
    architecture = config.get("architecture")
    if "transcoder" in str(architecture):
        raise ArtifactError(
            f"{place}: architecture is {architecture!r}, which gives another hook's activations "
            "than it reads; a dictionary has one hook"
        )
    if architecture not in SHAPES:
        raise ArtifactError(
            f"{place}: architecture is {architecture!r}; can be read: {', '.join(SHAPES)}"
        )
    scaled = config.get("normalize_activations") or "none"
    if scaled in ("layer_norm", "constant_norm_rescale"):
        raise ArtifactError(
            f"{place}: normalize_activations is {scaled!r}: each row is divided by a number of its "
            "own, so that codes alone do not give activations back"
        )
    if scaled not in ("none", "expected_average_only_in"):
        raise ArtifactError(
            f"{place}: normalize_activations is {scaled!r}, and the files do not hold what it "
            "needs; a finished dictionary has it in its weights, and says 'none'"
        )
    if (shape := config.get("reshape_activations") or "none") not in ("none", "hook_z"):
        raise ArtifactError(f"{place}: reshape_activations is {shape!r}; expected none or hook_z")


def _current_tensors(file: Path, held: Tensors) -> Tensors:
    """Tensors as SAELens 6 writes them."""
    if (factor := held.pop("scaling_factor", None)) is not None and not (factor == 1).all():
        raise ArtifactError(f"{file}: scaling_factor is not 1: finetuned scales cannot be read")
    if "log_threshold" in held:
        held["threshold"] = np.exp(held.pop("log_threshold").astype(np.float32))
    return held


def _coder(place: Path, config: Table, held: Tensors) -> Coder:
    architecture, setting = config["architecture"], partial(files.setting, place, config)
    centred = setting("apply_b_dec_to_input", bool, True)
    w_dec, b_dec = held["W_dec"], held["b_dec"]
    if architecture == "matching_pursuit":
        encoder = MPSAE(
            jnp.asarray(w_dec),
            rounds=setting("max_iterations", int, len(b_dec)),
            threshold=float(setting("residual_threshold", (int, float), 1e-2)),
            stop_on_repeat=setting("stop_on_duplicate_support", bool, True),
        )
        return assemble.raw(w_dec, b_dec * centred, encoder)
    w_enc, b_enc = held["W_enc"], held["b_gate" if architecture == "gated" else "b_enc"]
    if architecture in ("topk", "abstopk") and setting("rescale_acts_by_decoder_norm", bool, False):
        norms = np.linalg.norm(w_dec, axis=1)
        norms[norms == 0] = 1  # SAELens divides by 0 there
        w_enc, b_enc, w_dec = w_enc * norms, b_enc * norms, w_dec / norms[:, None]
    return assemble.linear(
        w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, centred=centred,
        activation=_activation(place, config, held),
    )  # fmt: skip


def _activation(place: Path, config: Table, held: Tensors) -> AbstractActivation:
    match config["architecture"]:
        case "standard":
            return ReLU()
        case "jumprelu":
            return JumpReLU(jnp.asarray(held["threshold"]))
        case "gated":
            gain = np.exp(held["r_mag"])
            return Gated(jnp.asarray(gain), jnp.asarray(held["b_mag"] - gain * held["b_gate"]))
        case kind:
            return (TopK if kind == "topk" else AbsTopK)(files.setting(place, config, "k", int))
