"""Hugging Face's hub, directories and libraries: their noise off, their errors made ours."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from activations.terminal import UserError

WEIGHT_FILES = ("*.safetensors", "*.bin")


def from_hub(name: str) -> Path:
    """The snapshot of a hub model: the local cache first, then one look at the hub, no retries."""
    hub, errors = quiet_import("huggingface_hub"), quiet_import("huggingface_hub.errors")
    repo, _, revision = name.partition("@")

    def snapshot(**where: Any) -> Path:
        with quiet():
            path = hub.snapshot_download(repo, revision=revision or None, **where)
        return checked_directory(Path(path))

    try:
        return snapshot(local_files_only=True)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, UserError):
        pass  # not here, or only in part: ask the hub
    try:
        # One short question, so that a machine without a network does not wait for retries.
        info = hub.HfApi().model_info(repo, revision=revision or None, timeout=5)
        names = [file.rfilename for file in info.siblings or ()]
        weights = WEIGHT_FILES[0 if any(name.endswith(".safetensors") for name in names) else 1]
        return snapshot(allow_patterns=["*.json", "*.txt", "tokenizer.model", weights])
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


def checked_directory(directory: Path) -> Path:
    """The same directory, once it is seen to hold a config and weights."""
    if not directory.is_dir():
        raise UserError(f"model dir:{directory}: no such directory")
    if not (directory / "config.json").exists():
        raise UserError(f"model dir:{directory}: holds no config.json; is it a model's directory?")
    if not any(any(directory.glob(glob)) for glob in WEIGHT_FILES):
        raise UserError(f"model dir:{directory}: holds no weights ({' or '.join(WEIGHT_FILES)})")
    return directory


def float32_weights(spec: str, directory: Path, **options: Any) -> Any:
    """The model with float32 weights, all of them from the files."""
    model, info = quiet_import("transformers").AutoModelForCausalLM.from_pretrained(
        directory, dtype=quiet_import("torch").float32, output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):  # transformers would leave them random
        raise UserError(
            f"model {spec}: the weights lack {len(missing)} of the tensors that config.json asks "
            f"for, {missing[0]} the first; are they of another model, or of a part of it?"
        )
    return model


def files_sha256(*paths: Path) -> str:
    """Of a file's bytes; of the files' digests in order, where there are several."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def need_extra() -> None:
    """Raise a UserError that names the extra, where reading language models is not installed."""
    for name in ("torch", "transformers", "transformer_lens", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"reading a language model needs {name}: pip install 'dictlearn-interp[lm]'"
            )


def quiet_import(name: str) -> Any:
    """A library, imported when it is needed and without what it says on import."""
    with quiet():
        return importlib.import_module(name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
def our_errors(spec: str) -> Iterator[None]:
    """A file that the libraries cannot read is the user's to mend, not ours to trace back."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors, tokenizers and transformers raise kinds of their own
        first = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {first[:300]}"  # one of them lists all it knows
        raise UserError(f"model {spec}: cannot be loaded ({reason})") from error
