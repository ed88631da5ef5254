"""Gemma Scope 1 (params.npz) and Gemma Scope 2 (params.safetensors, lower-case names).

    codes = JumpReLU(x W_enc + b_enc),    x_hat = codes W_dec + b_dec

W_enc [d m], b_enc [m], threshold [m], W_dec [m d], b_dec [d]: b_dec is not taken off the input.
Model and hook come from the config.json beside the file, where there is one, or from the names of
the directories, where those are the release's,

    gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz
    gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium/params.safetensors

also inside a Hugging Face cache. Dictionaries of embeddings are in units of embeddings as they are
stored, which no hook of ours has: their hook is None.

Source: Lieberum et al., "Gemma Scope" (arXiv 2408.05147); names, context length and BOS as in the
loaders of sae_lens 6.54.12.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dictlearn.artifact import ArtifactError, Run
from dictlearn.encoders.activations import JumpReLU
from dictlearn.interop import assemble, files

SHAPES = {"W_enc": "d m", "b_enc": "m", "threshold": "m", "W_dec": "m d", "b_dec": "d"}
# Where activations are taken: the directories of both releases, and what config.json calls them.
HOOKS = {
    "hook_resid_post": ("res", "resid_post", "output"),
    "attn.hook_z": ("att", "attn_out", "self_attn.o_proj.input"),
    "hook_mlp_out": ("mlp", "mlp_out", "post_feedforward_layernorm.output"),
}
_FIRST = re.compile(
    r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|att|mlp)(?:-canonical)?/(?:snapshots/\w+/)?layer_(\d+)/"
)
_SECOND = re.compile(r"(resid_post|attn_out|mlp_out)(?:_all)?/layer_(\d+)_")
_MODEL = re.compile(r"gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it)")
_TRANSCODER = re.compile(r"gemma-scope-\w+-pt-transcoders/|/transcoder(?:_all)?/layer_")
_POINT = re.compile(r"layers\.(\d+)\.(.+)")


def read(file: Path) -> Run:
    """The dictionary in params.npz or params.safetensors.

    Raises:
      ArtifactError: a file is missing or damaged; it holds a transcoder; a tensor does not fit.
    """
    place = file.with_name("config.json")
    config = files.table(place) if place.exists() else {}
    folders = f"{file.parent.absolute().as_posix()}/"
    if (kind := config.get("architecture", "jump_relu")) != "jump_relu":
        raise ArtifactError(f"{place}: architecture is {kind!r}; can be read: jump_relu")
    held = files.tensors(file)
    outward = config.get("hf_hook_point_out", config.get("hf_hook_point_in"))
    if (
        "affine_skip_connection" in held
        or outward != config.get("hf_hook_point_in")
        or _TRANSCODER.search(folders)
    ):
        raise ArtifactError(
            f"{file}: is a transcoder, which gives another hook's activations than it reads; "
            "a dictionary has one hook"
        )
    lower = "w_enc" in held
    names = {name: name.lower() if lower else name for name in SHAPES}
    shapes = {names[name]: axes for name, axes in SHAPES.items()}
    fitted = files.fitting(file, held, shapes)
    w_enc, b_enc, threshold, w_dec, b_dec = (fitted[names[name]] for name in SHAPES)
    coder = assemble.linear(
        w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, centred=False,
        activation=JumpReLU(jnp.asarray(threshold)),
    )  # fmt: skip
    model, hook = _origin(config, folders)
    return assemble.run(
        file,
        coder,
        format=f"gemma-scope-{2 if lower else 1}",
        config=config,
        hook=hook,
        model=model,
        context_length=1024 if model else None,
        prepend_bos=True if model else None,
    )


def _origin(config: dict[str, Any], folders: str) -> tuple[str | None, str | None]:
    """Model and hook, as far as config or directories tell them."""
    if found := _FIRST.search(folders):
        size, tuned, site, layer = found.groups()
        return f"google/gemma-2-{size}{'-it' * (tuned == 'it')}", _hook(layer, site)
    model, hook = config.get("model_name"), None
    if model is None and (found := _MODEL.search(folders)):
        model = found[0].replace("gemma-scope-2", "gemma-3")
    if model is not None:
        model = "google/" + str(model).removeprefix("google/").replace("gemma-v3", "gemma-3")
        model = model.replace("-270m-pt", "-270m")  # the one without a suffix at its publisher
    if found := _POINT.search(str(config.get("hf_hook_point_in"))):
        hook = _hook(found[1], found[2])
    elif found := _SECOND.search(folders):
        hook = _hook(found[2], found[1])
    return model, hook


def _hook(layer: str, site: str) -> str | None:
    """TransformerLens's name."""
    return next((f"blocks.{layer}.{hook}" for hook, names in HOOKS.items() if site in names), None)
