"""Sharded HDF5 store of activations: schema, manifest, reader.

A store is a directory:

    manifest.json     what was read from what; each file's checksum, and its own
    sequences.npy     every full sequence, special tokens and padding included, so that it can be
                      replayed: [s 2 c] int32, token and document (see activations.sequences)
    vocabulary.json   the text of each token id that occurs
    shard-00000.h5    activations/<hook> [n d], gradients/<hook> [n d] where they were asked for;
                      token, document, sequence, position [n] int32: where each row comes from

A manifest is written in one way only, and holds the checksum of the rest of itself, so that a bit
that has changed anywhere in a store is found. While a store is being written, its shards stand in
a partial manifest a worker (activations.writer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from pydantic import Field

from activations import precision
from activations.config import validate
from activations.files import sealed, unseal
from activations.precision import Compression, Precision
from activations.terminal import UserError

SCHEMA = 3
MANIFEST = "manifest.json"
SEQUENCES = "sequences.npy"
VOCABULARY = "vocabulary.json"
COLUMNS = ("token", "document", "sequence", "position")
MEND = "Restore the file, or delete the store and harvest again."


class StoreError(UserError):
    """A store that is absent, unfinished, damaged, or not the one that was asked for."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a store. `bytes` and `sha256` are of the whole file."""

    __pydantic_config__ = {"extra": "forbid"}

    index: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)]
    bytes: int
    sha256: str

    @property
    def file(self) -> str:
        """The file's name in the store's directory."""
        return f"shard-{self.index:05d}.h5"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds and where it came from.

    Attributes:
      request: the harvest's configuration, so that a second harvest knows whether it is the same.
      model: identity of the model and tokenizer, with hashes.
      corpus: identity of the text.
      forward: what else rounding depends on (batch size, threads, versions).
      hooks: width of each hook.
      gradients: whether each hook's gradients stand beside its activations.
      dropped_positions: positions of the sequences that have no row.
      n_documents: that have a row.
      n_sequences: of the complete store.
      shard_sequences: sequences a shard, the last one perhaps less.
      files: checksums of sequences.npy and vocabulary.json.
    """

    __pydantic_config__ = {"extra": "forbid"}

    request: dict[str, Any]
    model: dict[str, Any]
    corpus: dict[str, Any]
    forward: dict[str, Any]
    hooks: dict[str, int]
    context_length: int
    n_documents: int
    n_sequences: int
    shard_sequences: Annotated[int, Field(gt=0)]
    dropped_positions: tuple[str, ...]
    files: dict[str, str]
    gradients: bool = False
    dtype: Precision = "float32"
    compression: Compression = "none"
    schema: Literal[3] = SCHEMA
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def n_rows(self) -> int:
        """Rows in the shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def n_shards(self) -> int:
        """Shards of the complete store."""
        return -(-self.n_sequences // self.shard_sequences)

    @property
    def id(self) -> str:
        """What every shard is marked with: a hash of all that is settled before the first one."""
        return dataclasses.replace(self, shards=(), complete=False).sha256()

    @property
    def datasets(self) -> dict[str, int]:
        """The width of each dataset of rows in a shard."""
        kinds = ("activations", "gradients") if self.gradients else ("activations",)
        return {
            f"{kind}/{hook}": width for kind in kinds for hook, width in sorted(self.hooks.items())
        }

    def to_json(self) -> str:
        """What a manifest's file holds, byte for byte."""
        return sealed(dataclasses.asdict(self))

    def sha256(self) -> str:
        """Of the manifest: identity of a complete store, whose checksums stand in it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of the store at `path`, or None where there is no store at all.

    Raises:
      StoreError: something else is there, or the manifest is damaged or of another schema.
    """
    file, taken = path / MANIFEST, False
    try:
        # Looked at first: another process may put its manifest there meanwhile.
        taken = path.is_dir() and any(map(_is_foreign, path.iterdir()))
        text = file.read_bytes().decode()
        table = json.loads(text)
        schema = table.get("schema") if isinstance(table, dict) else None
        if isinstance(schema, int) and schema != SCHEMA:
            newer = "Update dictlearn-interp" if schema > SCHEMA else "Delete the store"
            raise StoreError(
                f"{file}: is of schema {schema}, but this version reads schema {SCHEMA}. "
                f"{newer}, or harvest again into another place."
            )
        table = unseal(text)
    except (FileNotFoundError, NotADirectoryError):
        if taken or path.is_file():
            raise StoreError(
                f"{path}: is there, but is no store (it has no {MANIFEST}). Name another place."
            ) from None
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{file}: cannot be read as a manifest ({error}). {MEND}") from None
    return validate(Manifest, table, str(file))


def _is_foreign(file: Path) -> bool:
    """Whether a file is none of those that stand in a store before its manifest does."""
    early = {f"{name}{end}" for name in (SEQUENCES, VOCABULARY) for end in ("", ".partial")}
    return not file.name.startswith(".") and file.name not in {*early, f"{MANIFEST}.partial"}


def complete_manifest(path: Path) -> Manifest:
    """The manifest of a store that is finished.

    Raises:
      StoreError: there is none, or it is unfinished or damaged.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise StoreError(f"{path}: no store there. Harvest one, or mend the path.")
    if not manifest.complete:
        done = len(list(path.glob("shard-*.h5")))
        raise StoreError(
            f"{path}: the store is unfinished ({done:,} of {manifest.n_shards:,} shards): its "
            "harvest is running or was stopped. Run the same harvest again: it goes on where it "
            f"stopped (several workers are joined by `python -m activations.merge {path}`)."
        )
    return manifest


class Store:
    """A complete store, opened for reading. `len(store)` is its rows.

    Opening is cheap: it checks that every file is there with the right size, and that every shard
    belongs to this store and holds each hook. activations.verify reads everything.

    Raises:
      StoreError: no store, one still being written, or a file that is missing, cut, of another
        store, or not to be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = complete_manifest(self.path)
        for name in self.manifest.files:
            if not (self.path / name).exists():
                raise StoreError(f"{self.path / name}: is missing. {MEND}")
        for shard in self.manifest.shards:
            self._check(shard)

    def __len__(self) -> int:
        return self.manifest.n_rows

    def _check(self, shard: Shard) -> None:
        file = self.path / shard.file
        size = file.stat().st_size if file.exists() else None
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size:,} bytes"
            raise StoreError(f"{file}: {state}, but the manifest tells {shard.bytes:,}. {MEND}")
        with self._open(shard) as opened:
            mark = np.bytes_(self.manifest.id), shard.index
            if (opened.attrs.get("store"), opened.attrs.get("index")) != mark:
                raise StoreError(f"{file}: is a shard of another store, or another shard. {MEND}")
            for name, width in self.manifest.datasets.items():
                there = opened.get(name)
                if not isinstance(there, h5py.Dataset):
                    raise StoreError(f"{file}: holds no {name}. {MEND}")
                seen = (*there.shape, precision.stored_type(there))
                if seen != (shard.rows, width, self.manifest.dtype):
                    raise StoreError(
                        f"{file}: {name} is {seen}, but the manifest tells "
                        f"{(shard.rows, width, self.manifest.dtype)}. {MEND}"
                    )

    @contextlib.contextmanager
    def _open(self, shard: Shard) -> Iterator[h5py.File]:
        """A shard's file; whatever HDF5 cannot read in it is told with the file's name."""
        file = self.path / shard.file
        try:
            with h5py.File(file, "r") as opened:
                yield opened
        except StoreError:
            raise
        except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            raise StoreError(f"{file}: cannot be read ({error}). {MEND}") from None

    def width(self, hook: str) -> int:
        """The width of a hook's rows."""
        try:
            return self.manifest.hooks[hook]
        except KeyError:
            known = ", ".join(self.manifest.hooks)
            raise StoreError(f"{self.path}: holds no hook {hook!r}; it holds {known}") from None

    @property
    def sequences(self) -> np.ndarray:
        """Tokens and documents of every sequence [s 2 c], mapped from the disk."""
        file = self.path / SEQUENCES
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise StoreError(f"{file}: cannot be read ({error}). {MEND}") from None

    @property
    def vocabulary(self) -> dict[int, str]:
        """The text of each token id that occurs."""
        file = self.path / VOCABULARY
        try:
            return {int(key): text for key, text in json.loads(file.read_bytes()).items()}
        except (OSError, ValueError) as error:
            raise StoreError(f"{file}: cannot be read ({error}). {MEND}") from None

    def read(self, shard: Shard, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of one dataset of one shard, in its stored type."""
        with self._open(shard) as opened:
            return precision.read(_dataset(opened, name), start, stop)

    def rows(
        self, shard: Shard, name: str, blocks: list[tuple[int, int]] | None = None
    ) -> Iterator[np.ndarray]:
        """Blocks of rows of one dataset of one shard, from `start` to `stop`, in the stored type.

        Arguments:
          name: `activations/<hook>`, `gradients/<hook>`, or a column.
          blocks: by default the whole shard, in blocks of about 2 MiB.

        Raises:
          StoreError: the store has no such dataset; a row holds NaN or infinity (it is named).
        """
        kind, _, hook = name.partition("/")
        if hook:
            self.width(hook)
        if kind == "gradients" and not self.manifest.gradients:
            raise StoreError(
                f"{self.path}: was harvested without gradients. Set gradients = true in the "
                "harvest's config, and harvest into another place."
            )
        with self._open(shard) as opened:
            dataset = _dataset(opened, name)
            row_bytes = dataset.id.get_type().get_size() * int(np.prod(dataset.shape[1:]))
            for start, stop in blocks or _blocks(shard.rows, max(1, 2**21 // row_bytes)):
                x = precision.read(dataset, start, stop)
                if hook and (bad := precision.not_finite(x)).any():
                    row = start + int(np.argmax(bad))
                    token = _dataset(opened, "token")[row]
                    raise StoreError(
                        f"{self.path / shard.file}: row {row} (token {token}) of {name} holds "
                        "NaN or infinity. Harvest again, or look at the model that made it."
                    )
                yield x

    def activations(self, shard: Shard, hook: str) -> np.ndarray:
        """The rows of one whole shard at one hook [n d], as float32; raises as `rows` does."""
        parts = list(self.rows(shard, f"activations/{hook}"))
        return np.concatenate(parts).astype(np.float32, copy=False)

    def column(self, name: str) -> np.ndarray:
        """One of token, document, sequence, position over all rows [N]."""
        assert name in COLUMNS
        return np.concatenate([self.read(shard, name) for shard in self.manifest.shards])


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    dataset = file[name]
    assert isinstance(dataset, h5py.Dataset)
    return dataset


def _blocks(rows: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, rows)) for start in range(0, max(rows, 1), size)]
