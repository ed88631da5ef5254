"""A Hugging Face directory's weights: its embedding matrices read, the rest streamed past."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from activations.files import replacing
from activations.terminal import UserError, progress
from dictlearn.interop.files import table

INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F64": np.float64,
}
_EMBED = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_BIAS = re.compile(_HEAD.pattern.replace("weight", "bias"))
# What else holds a row or a number for every token, by its name; positions and layers aside.
_ROWS = re.compile(r"^(?!.*(pos|rotary)).*(emb|wte|head|logit|vocab)", re.IGNORECASE)
_NUMBERS = re.compile(r"^(?!.*(\.\d+\.|norm|ln_)).*bias$", re.IGNORECASE)
_PIECE = 2**26  # bytes copied at once


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: bytes [begin, end) of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Weights:
    """The weights of a causal language model, on disk.

    Attributes:
      embed, head: names of the embedding's and the output head's matrices; `head` is None where the
        embedding is the head, too.
      bias: the name of the head's bias, if it has one (also where the embedding is the head).
      rows: of the embedding matrix: the vocabulary, and what it is padded to.

    Raises:
      UserError: there are no weights that can be read so, one of their files is cut short, the
        embedding cannot be told, or the head has other rows.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = table(directory / "config.json")
        self._tensors = {
            name: tensor for file in _files(directory) for name, tensor in _header(file).items()
        }
        self.embed = self._only(_EMBED, "the embedding")
        self.rows = self._tensors[self.embed].shape[0]
        self.head = None if self._tied() else self._only(_HEAD, "the output head")
        if self.head is not None and self.shape(self.head)[0] != self.rows:
            raise UserError(
                f"{directory}: {self.embed} has {self.rows:,} rows and {self.head} "
                f"{self.shape(self.head)[0]:,}; expected as many"
            )
        self.bias = next((name for name in self._tensors if self._is_bias(name)), None)

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json that is about the language model."""
        return self.config.get("text_config") or self.config

    def beyond(self) -> str | None:
        """A tensor with something for every token that is neither embedding nor head, if any."""
        known = {self.embed, self.bias, *self._twice()}
        sizes = {self.rows} | {
            size for key, size in self.text_config.items() if key.startswith("vocab_size")
        }
        for name, tensor in self._tensors.items():
            pattern = _NUMBERS if len(tensor.shape) == 1 else _ROWS
            if name not in known and {*tensor.shape[:1]} & sizes and pattern.match(name):
                return name
        return None

    def file(self, name: str) -> Path:
        """Where a tensor lies."""
        return self._tensors[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        tensor = self._tensors[name]
        if tensor.dtype not in _DTYPES:
            raise UserError(
                f"{tensor.file}: {name} holds {tensor.dtype}; expected one of "
                f"{', '.join(_DTYPES)}. Export the model without quantisation"
            )
        with tensor.file.open("rb") as file:
            file.seek(tensor.begin)
            held = np.fromfile(
                file, _DTYPES[tensor.dtype], (tensor.end - tensor.begin) // _size(tensor)
            )
        with np.errstate(over="ignore"):  # of a float64: becomes infinite
            return held.reshape(tensor.shape).astype(np.float32, copy=False)

    def write(self, out: Path, new: dict[str, np.ndarray]) -> None:
        """The same files in `out` with other matrices, in the types that theirs had."""
        twice = {*self._twice()} if self.head is None else set()
        total = sum(t.end - t.begin for name, t in self._tensors.items() if name not in twice)
        with progress(total=total, unit="B", unit_scale=True, desc="writing") as bar:
            for file in sorted({tensor.file for tensor in self._tensors.values()}):
                there = {
                    name: tensor
                    for name, tensor in self._tensors.items()
                    if tensor.file == file and name not in twice
                }
                _write(out / file.name, there, new, bar.update)
        index = self.directory / INDEX
        if index.exists():
            held = table(index)
            held["weight_map"] = {k: v for k, v in held["weight_map"].items() if k not in twice}
            held.get("metadata", {}).pop("total_size", None)
            (out / INDEX).write_text(json.dumps(held, indent=1))

    def _tied(self) -> bool:
        """Whether the embedding is the output head.

        Raises:
          UserError: the config says so, but the files hold another head.
        """
        told = self.config.get("tie_word_embeddings")
        told = self.text_config.get("tie_word_embeddings", told)
        own = self._twice()
        if told is None:
            return not own
        if told and own and not np.array_equal(self.read(own[0]), self.read(self.embed)):
            raise UserError(
                f"{self.directory}: config.json says tie_word_embeddings, but {own[0]} is not "
                f"{self.embed}. Set it to false, or take {own[0]} out of the weights"
            )
        return bool(told)

    def _is_bias(self, name: str) -> bool:
        return bool(_BIAS.search(name)) and self.shape(name) == (self.rows,)

    def _twice(self) -> list[str]:
        """Names of output heads."""
        return [name for name in self._tensors if _HEAD.search(name)]

    def _only(self, pattern: re.Pattern[str], what: str) -> str:
        found = [name for name in self._tensors if pattern.search(name)]
        if len(found) == 1 and len(self._tensors[found[0]].shape) == 2:
            return found[0]
        raise UserError(
            f"{self.directory}: {what} cannot be told among the weights "
            f"({', '.join(found) or 'no name that is known'}); expected one matrix that is called "
            f"as in {pattern.pattern}"
        )


def _size(tensor: _Tensor) -> int:
    return np.dtype(_DTYPES[tensor.dtype]).itemsize


def _files(directory: Path) -> list[Path]:
    """The files of weights that the model is loaded from."""
    index = directory / INDEX
    if index.exists():
        files = {directory / name for name in table(index).get("weight_map", {}).values()}
    else:
        files = {directory / "model.safetensors"}
    if missing := sorted(file for file in files if not file.exists()):
        other = sorted(directory.glob("*.bin"))
        mend = (
            f"python -m activations.models export dir:{directory} DIR makes a directory that has"
            if other
            else "is it a model's directory, and whole?"
        )
        raise UserError(f"{directory}: has no {missing[0].name}; {mend}")
    return sorted(files)


def _header(file: Path) -> dict[str, _Tensor]:
    """What a safetensors file says it holds; see the format's page, "Format".

    Raises:
      UserError: it is cut short, or no such file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            held = json.loads(opened.read(length))
        held.pop("__metadata__", None)
        tensors = {
            name: _Tensor(
                file, entry["dtype"], tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in held.items()
        }  # fmt: skip
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error})") from None
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise UserError(f"{file}: is {size:,} bytes long, and should have {end:,}; fetch it again")
    return tensors


def _write(file: Path, tensors: dict[str, _Tensor], new: dict[str, np.ndarray], seen: Any) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        shape, size = tensor.shape, tensor.end - tensor.begin
        if name in new:
            shape = new[name].shape
            size = new[name].size * _size(tensor)
        header[name] = {
            "dtype": tensor.dtype, "shape": shape, "data_offsets": [place, place + size],
        }  # fmt: skip
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with replacing(file) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            if name in new:
                step = max(1, _PIECE // (4 * max(1, new[name][0].size)))
                for at in range(0, len(new[name]), step):
                    with np.errstate(over="ignore"):  # told below
                        rows = new[name][at : at + step].astype(_DTYPES[tensor.dtype])
                    if not np.isfinite(rows).all():
                        raise UserError(
                            f"{name}: a row that was made up is no number in {tensor.dtype}, the "
                            "base's type. Take another method, or a base in BF16 or F32"
                        )
                    out.write(rows.tobytes())
                seen(tensor.end - tensor.begin)
                continue
            with tensor.file.open("rb") as source:
                source.seek(tensor.begin)
                for at in range(tensor.begin, tensor.end, _PIECE):
                    piece = source.read(min(_PIECE, tensor.end - at))
                    out.write(piece)
                    seen(len(piece))
