"""Others' files: JSON tables, and weights whose every name, shape and number is looked at."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dictlearn.artifact import ArtifactError

Tensors = dict[str, np.ndarray]


def table(file: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
      ArtifactError: it is missing, is not JSON, or is not a table.
    """
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error})") from None
    if not isinstance(held, dict):
        raise ArtifactError(f"{file}: is not a table")
    return held


def setting(file: Path, config: dict[str, Any], key: str, kind: Any, default: Any = None) -> Any:
    """A setting of a config, or its default where it is left out or null.

    Raises:
      ArtifactError: it is not of its kind, or a whole number below 1.
    """
    value = default if config.get(key) is None else config[key]
    odd = isinstance(value, bool) and kind is not bool
    if odd or not isinstance(value, kind) or (kind is int and value < 1):
        expected = {bool: "true or false", int: "a whole number above 0"}.get(kind, "a number")
        raise ArtifactError(f"{file}: {key} is {value!r}, expected {expected}")
    return value


def tensors(file: Path) -> Tensors:
    """All that a .safetensors or .npz file holds, as it is; nothing is unpickled.

    Raises:
      ArtifactError: it is missing, cut short, or of another kind.
    """
    try:
        if file.suffix == ".safetensors":
            return safetensors.numpy.load_file(file)
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
            return dict(held)
    except (
        OSError, EOFError, KeyError, TypeError, ValueError,
        safetensors.SafetensorError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise ArtifactError(
            f"{file}: is damaged, or holds no tensors ({type(error).__name__}: {error})"
        ) from None


def fitting(file: Path, held: Tensors, shapes: Mapping[str, str], **sizes: int | None) -> Tensors:
    """The tensors of `shapes` in float32: half precision is widened exactly.

    Arguments:
      held: what `file` holds.
      shapes: of each tensor its axes, e.g. {"W_enc": "d m"}. A letter is one size throughout.
      sizes: of letters, where a config tells them.

    Raises:
      ArtifactError: a tensor is missing or not expected, has another shape, is not of floats, or
        holds NaN or infinity.
    """
    if held.keys() != shapes.keys():
        found = [f"missing: {name}" for name in shapes.keys() - held.keys()]
        found += [f"not expected: {name}" for name in held.keys() - shapes.keys()]
        raise ArtifactError(f"{file}: expected {', '.join(shapes)}; {', '.join(sorted(found))}")
    known = {letter: size for letter, size in sizes.items() if size is not None}
    fitted = {}
    for name, letters in shapes.items():
        array, axes = held[name], letters.split()
        if array.ndim == len(axes):
            known = dict(zip(axes, array.shape, strict=True)) | known
        if array.shape != tuple(known.get(letter) for letter in axes):
            wanted = ", ".join(f"{x} = {known[x]}" if x in known else x for x in axes)
            raise ArtifactError(f"{file}: {name} has shape {array.shape}, expected ({wanted})")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ArtifactError(f"{file}: {name} holds {array.dtype}, expected floats")
        with np.errstate(over="ignore"):  # a float64 too great becomes infinite, and is told
            fitted[name] = array.astype(np.float32)
        if not np.isfinite(fitted[name]).all():
            raise ArtifactError(f"{file}: {name} holds NaN or infinity")
    return fitted
