"""The other half of saelens.py: dictionaries as SAELens and sparsify write them, and their codes.

Run by the interpreter of their environment, as a script that imports nothing of this project:

    python -I saelens_peer.py FOLDER

For each case it writes FOLDER/<case>/ with random weights by the library's own function (Gemma
Scope's two formats by hand, as they are on the hub), reads them back by its own loader, and puts x
[n d], codes [n m] and x_hat [n d] into FOLDER/<case>.npz. What has no codes is to be refused.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Modules come in by name: type checkers do not have them.
torch = importlib.import_module("torch")
sae_lens = importlib.import_module("sae_lens")
registry = importlib.import_module("sae_lens.registry")
loaders: Any = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
sparsify = importlib.import_module("sparsify")

N, M, D = 512, 256, 64
TOLD = {"model_name": "gpt2", "context_size": 64, "prepend_bos": False}

# Case -> architecture and settings.
SAELENS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "standard, input as it is": ("standard", {"apply_b_dec_to_input": False}),
    "standard, average": ("standard", {"normalize_activations": "expected_average_only_in"}),
    "standard, heads": ("standard", {"reshape_activations": "hook_z"}),
    "standard, bfloat16": ("standard", {"dtype": "bfloat16"}),
    "topk": ("topk", {"k": 9}),
    "topk, rescaled": ("topk", {"k": 9, "rescale_acts_by_decoder_norm": True}),
    "topk, rescaled, input as it is": (
        "topk",
        {"k": 9, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
    ),
    "topk, all, float16": ("topk", {"k": M, "dtype": "float16"}),
    "abstopk": ("abstopk", {"k": 9}),
    "abstopk, rescaled": ("abstopk", {"k": 9, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu, input as it is": ("jumprelu", {"apply_b_dec_to_input": False}),
    "gated": ("gated", {}),
    "gated, input as it is": ("gated", {"apply_b_dec_to_input": False}),
    "matching_pursuit": ("matching_pursuit", {}),
    "matching_pursuit, 12 rounds": (
        "matching_pursuit",
        {"max_iterations": 12, "stop_on_duplicate_support": False, "residual_threshold": 0.0},
    ),
    # Of 300 rounds, the 267th of one row has two correlations that are equal to 1e-7: each library
    # takes its own, and ours is then 2e-2 from theirs.
    "matching_pursuit, to a residual": (
        "matching_pursuit",
        {"max_iterations": 60, "stop_on_duplicate_support": False, "residual_threshold": 2.0},
    ),
    "matching_pursuit, input as it is": (
        "matching_pursuit",
        {"max_iterations": 12, "apply_b_dec_to_input": False},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    f"refused: {name}": (name, {"d_out": D + 1, "apply_b_dec_to_input": False})
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
} | {
    f"refused: {name}": ("standard", {"normalize_activations": name})
    for name in ("layer_norm", "constant_norm_rescale", "covariance_whitening")
}


def rows() -> Any:
    """Rows with a dimension far from 0."""
    return 3 * torch.randn(N, D) + 40 * (torch.arange(D) == 5)


def randomise(sae: Any) -> None:
    """Weights of about unit rows; biases near the rows' mean; every norm its own."""
    with torch.no_grad():
        for name, tensor in sae.named_parameters():
            tensor.copy_(torch.randn(tensor.shape) / (D**0.5 if tensor.ndim == 2 else 2))
            if name == "b_dec":
                tensor[5] += 40
            if name == "W_dec":
                tensor.div_(tensor.norm(dim=1, keepdim=True))
                tensor.mul_(torch.empty(len(tensor), 1).uniform_(0.7, 1.2))
            if name in ("threshold", "log_threshold"):
                tensor.copy_(torch.rand(tensor.shape))


def made(architecture: str, settings: dict[str, Any], hook: str) -> Any:
    """A SAELens dictionary."""
    kind, config = registry.get_sae_class(architecture)
    told = importlib.import_module("sae_lens.saes.sae").SAEMetadata(hook_name=hook, **TOLD)
    sae = kind(config(d_in=D, d_sae=M, metadata=told, **settings))
    randomise(sae)
    return sae


def measured(file: Path, x: Any, sae: Any) -> None:
    """Write what a library's own dictionary makes of rows."""
    with torch.no_grad():
        codes = sae.encode(x)
        x_hat = sae.decode(codes)
    flat = (array.reshape(N, -1).numpy() for array in (x, codes, x_hat))
    np.savez(file, **dict(zip(("x", "codes", "x_hat"), flat, strict=True)))


def write_saelens(folder: Path) -> None:
    """Every architecture; transcoders and the like without codes."""
    for name, (architecture, settings) in (SAELENS | REFUSED).items():
        heads = settings.get("reshape_activations") == "hook_z"
        place = folder / name
        hook = "blocks.0.attn.hook_z" if heads else "blocks.0.hook_resid_post"
        made(architecture, settings, hook).save_model(place)
        if name in SAELENS:
            x = rows().reshape(N, 8, -1) if heads else rows()
            read_back(folder, name, x)


def read_back(folder: Path, name: str, x: Any, **settings: Any) -> None:
    """Load by SAELens, and write its codes."""
    place = folder / name
    settings.setdefault("dtype", "float32")
    measured(folder / f"{name}.npz", x, sae_lens.SAE.load_from_disk(place, **settings))


def write_trained(folder: Path) -> None:
    """A training dictionary, saved for use; configs as they were before version 6."""
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=M, k=9)
    sae = sae_lens.BatchTopKTrainingSAE(config)
    randomise(sae)
    with torch.no_grad():
        sae.topk_threshold.fill_(0.8)
    sae.save_inference_model(folder / "batchtopk")
    read_back(folder, "batchtopk", rows())
    old = {
        "hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2-small", "d_in": D, "d_sae": M,
        "dtype": "torch.float32", "normalize_activations": False, "context_size": 128,
    }  # fmt: skip
    topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}
    for name, more in (("before 6: standard", {}), ("before 6: topk", topk)):
        place = folder / name
        made("standard", {}, "blocks.0.hook_resid_post").save_model(place)
        (place / "cfg.json").write_text(json.dumps(old | more))
        read_back(folder, name, rows())


def write_gemma_scope(folder: Path) -> None:
    """Both formats in their releases' directories; SAELens's loaders find them instead of a hub."""
    lens = made("jumprelu", {"apply_b_dec_to_input": False}, "")
    tensors = {name: tensor.detach() for name, tensor in lens.named_parameters()}

    def at(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        file = folder / repo_id.removeprefix("google/") / (subfolder or "") / filename
        if not file.exists():
            raise loaders.EntryNotFoundError(f"{file}: absent")
        return str(file)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        held = loaders.load_safetensors_weights(at(repo_id, filename))
        return {name: list(tensor.shape) for name, tensor in held.items()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = at, shapes
    told = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt"}
    told |= {"hf_hook_point_in": "model.layers.12.output"}
    for repo, inner, config in (
        ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", None),
        ("gemma-scope-9b-it-att", "layer_3/width_16k/average_l0_8", None),
        ("gemma-scope-2-270m-pt", "resid_post/layer_12_width_16k_l0_medium", told),
        ("gemma-scope-2-1b-it", "mlp_out_all/layer_7_width_16k_l0_small", None),
    ):
        place = folder / repo / inner
        place.mkdir(parents=True)
        if "scope-2-" in repo:
            lower = {name.lower(): tensor.contiguous() for name, tensor in tensors.items()}
            importlib.import_module("safetensors.torch").save_file(
                lower, place / "params.safetensors"
            )
            loader = loaders.gemma_3_sae_huggingface_loader
        else:
            np.savez(place / "params.npz", **{k: v.numpy() for k, v in tensors.items()})
            loader = loaders.gemma_2_sae_huggingface_loader
        if config:
            (place / "config.json").write_text(json.dumps(config))
        x = rows().reshape(N, 8, -1) if "-att" in repo else rows()
        read_back(folder, f"{repo}/{inner}", x, converter=_from_hub(loader, repo, inner))


def _from_hub(loader: Callable[..., Any], repo: str, inner: str) -> Callable[..., Any]:
    def convert(path: Path, device: str, cfg_overrides: dict[str, Any] | None) -> Any:
        del path
        sizes = {"d_in": D, "d_sae": M} | (cfg_overrides or {})
        return loader(f"google/{repo}", inner, device, cfg_overrides=sizes)[:2]

    return convert


def write_sparsify(folder: Path) -> None:
    """By sparsify, not by SAELens's loader of it, which turns W_dec over."""
    for name, kind in (("layers.4", torch.float32), ("layers.5", torch.bfloat16)):
        config = sparsify.SparseCoderConfig(k=11, num_latents=M)
        sparsify_made = sparsify.SparseCoder(D, config, dtype=kind)
        randomise(sparsify_made)
        sparsify_made.save_to_disk(folder / "sparsify" / name)
        sae = sparsify.SparseCoder.load_from_disk(folder / "sparsify" / name).float()
        x = rows()
        with torch.no_grad():
            values, indices, _ = sae.encode(x)
            x_hat = sae.decode(values, indices)
        codes = np.zeros((N, M), np.float32)
        np.put_along_axis(codes, indices.numpy(), values.numpy(), axis=1)
        np.savez(folder / f"sparsify/{name}.npz", x=x.numpy(), codes=codes, x_hat=x_hat.numpy())
    for key in ("transcode", "skip_connection"):
        config = sparsify.SparseCoderConfig(k=11, num_latents=M, **{key: True})
        sparsify.SparseCoder(D, config).save_to_disk(folder / f"refused: sparsify, {key}")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for write in (write_saelens, write_trained, write_gemma_scope, write_sparsify):
        write(Path(sys.argv[1]))
