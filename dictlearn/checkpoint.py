"""What it takes to go on with a fit to the bit: one file, whole or not at all.

checkpoint.safetensors holds every array of the solver's state and of the best coder so far, by its
path in the tree, and in its header what fit.py needs beside them: the step, the place in the data,
and of which config and store they are. A checksum covers all of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from activations.files import replace_file
from activations.terminal import UserError

_MEND = "Delete the run, and fit again."

Tree = TypeVar("Tree")


class CheckpointError(UserError):
    """A checkpoint that is damaged, or of another fit."""


def save(file: Path, tree: Any, *, of: dict[str, Any], header: dict[str, Any]) -> None:
    """Replace the checkpoint at `file`.

    Arguments:
      tree: any pytree; its arrays are saved, all else must follow from the config.
      of: what the fit is, by which `load` knows it again.
      header: what else there is to know, as JSON can hold it.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in _named(tree)}
    text = json.dumps({"of": of, **header}, allow_nan=False)
    metadata = {"header": text, "sha256": _checksum(arrays, text)}
    replace_file(file, safetensors.numpy.save(arrays, metadata))


def load(file: Path, like: Tree, *, of: dict[str, Any]) -> tuple[Tree, dict[str, Any]]:
    """A tree as `save` had it, shaped `like` this one, and the header.

    Raises:
      CheckpointError: the file is cut or damaged, or of another fit.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with safetensors.safe_open(file, "np") as opened:  # pyright: ignore
            metadata = opened.metadata()
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = json.loads(metadata["header"])
        whole = metadata["sha256"] == _checksum(arrays, metadata["header"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a checkpoint ({type(error).__name__}: {error}). {_MEND}"
        ) from None
    if not whole:
        raise CheckpointError(f"{file}: is damaged (its checksum is wrong). {_MEND}")
    if others := _differences(header["of"], json.loads(json.dumps(of))):
        raise CheckpointError(
            f"{file}: belongs to another fit; it has {'; '.join(others)}. Fit the config that it "
            "belongs to, or begin a new run."
        )
    wanted = _named(like)
    if {name: (leaf.shape, leaf.dtype) for name, leaf in wanted} != {
        name: (array.shape, array.dtype) for name, array in arrays.items()
    }:
        raise CheckpointError(f"{file}: holds another state than this version makes. {_MEND}")
    leaves = iter(jnp.asarray(arrays[name]) for name, _ in wanted)
    return jax.tree.map(lambda leaf: next(leaves) if eqx.is_array(leaf) else leaf, like), header


def _differences(one: Any, other: Any, key: str = "") -> list[str]:
    """E.g. ["seed = 1 (now 0)"]."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for name in sorted({*one, *other})
            for line in _differences(one.get(name), other.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if one == other else [f"{key} = {one} (now {other})"]


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if eqx.is_array(leaf)]


def _checksum(arrays: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
