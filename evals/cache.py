"""Activations of texts, kept on disk, so that the model is run once for all who ask for them.

They lie under `activations/` in the cache folder (`DICTLEARN_CACHE`, or the platform's own place
for caches), a file for each 256 texts, by a hash of the model's weights, the hook, the tokens, the
length, which positions were kept, and the dtype. Any of them may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
from jaxtyping import Float32, Int

from activations.files import replacing
from activations.gguf import cache_folder
from activations.hooks import HookReader
from activations.models import Model
from activations.terminal import UserError, progress

# Texts a file; what a kill loses of the model's work.
_TEXTS = 256
# Tokens of a forward pass.
_TOKENS = 2048
Keep = Literal["text", "last"]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """What a hook sees in some texts.

    Attributes:
      x: of the positions that are kept, text after text.
      start: x[start[i] : start[i + 1]] is of text i.
    """

    x: Float32[np.ndarray, "t d"]
    start: Int[np.ndarray, " n"]


def tokens(model: Model, texts: list[str], *, length: int, left: bool = False) -> list[np.ndarray]:
    """Tokens of each text, BOS first, cut to a length at the end, or at the beginning."""
    tokenizer = model.tokenizer
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    room = length - len(start)
    found = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        cut = ids[max(len(ids) - room, 0) :] if left else ids[:room]
        found.append(np.array([*start, *cut], np.int32))
    return found


def read(
    model: Model, hook: str, texts: list[str], *, length: int, keep: Keep = "text"
) -> Iterator[Block]:
    """What a hook sees in texts, some texts at a time, in their order.

    Arguments:
      length: in tokens, BOS included.
      keep: "text": every token that is not special, of texts cut at their end; "last": the last
        token, of texts cut at their beginning.

    Raises:
      UserError: the model has no such hook; a text has no token to keep; the cache is not to be
        written.
    """
    reader: HookReader | None = None
    special = model.tokenizer.all_special_ids
    with progress(total=len(texts), desc="activations", unit="text", delay=3) as bar:
        for first in range(0, len(texts), _TEXTS):
            part = texts[first : first + _TEXTS]
            ids = tokens(model, part, length=length, left=keep == "last")
            kept = [~np.isin(one, special) for one in ids]
            if keep == "last":
                kept = [np.arange(len(one)) == len(one) - 1 for one in ids]
            for text, own in zip(part, kept, strict=True):
                if not own.any():
                    raise UserError(f"the text {text[:60]!r} has no token that is not special")
            start = np.cumsum([0, *(own.sum() for own in kept)])
            file = _file(model, hook, ids, length, keep)
            x = _load(file, int(start[-1]))
            if x is None:
                reader = reader or HookReader(model.bridge, (hook,))
                x = _make(file, int(start[-1]), reader, hook, ids, kept)
            yield Block(x, start)
            bar.update(len(part))


def _file(model: Model, hook: str, ids: list[np.ndarray], length: int, keep: Keep) -> Path:
    own = hashlib.sha256()
    for one in ids:
        own.update(len(one).to_bytes(4, "little") + one.astype("<i4").tobytes())
    key = [model.identity.weights_sha256, hook, own.hexdigest(), length, keep, "float32"]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return cache_folder() / "activations" / f"{name}.npy"


def _load(file: Path, n: int) -> np.ndarray | None:
    """The rows, if they are there, whole."""
    try:
        x = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError):  # none, or damaged
        return None
    return x if x.ndim == 2 and len(x) == n and x.dtype == np.float32 else None


def _make(
    file: Path, n: int, reader: HookReader, hook: str, ids: list[np.ndarray],
    kept: list[np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Run the model, and keep what it gives."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(file.with_suffix(".lock")):  # another process may be at it
            x = _load(file, n)
            if x is None:
                x = _run(reader, hook, ids, kept)
                with replacing(file) as target:
                    np.save(target, x)
            return x
    except OSError as error:
        raise UserError(
            f"{file.parent}: activations cannot be kept ({error.strerror or error}); name a folder "
            "with room in the environment variable DICTLEARN_CACHE"
        ) from None


def _run(
    reader: HookReader, hook: str, ids: list[np.ndarray], kept: list[np.ndarray]
) -> np.ndarray:
    """Texts of about one length share a forward pass: what follows a text does not change it."""
    order = np.argsort([len(one) for one in ids], kind="stable")[::-1]
    found: dict[int, np.ndarray] = {}
    at = 0
    while at < len(order):
        width = len(ids[order[at]])
        here = order[at : at + max(1, _TOKENS // width)]
        at += len(here)
        batch = np.stack([np.pad(ids[i], (0, width - len(ids[i])), mode="edge") for i in here])
        for i, x in zip(here, reader.read(batch)[hook], strict=True):
            found[int(i)] = x[: len(ids[i])][kept[i]]
    return np.concatenate([found[i] for i in range(len(ids))])
