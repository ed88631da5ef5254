"""Sharded HDF5 store of activations: schema, writer, reader, manifest.

A store is a directory:

    manifest.json     what was read from what, each shard's rows, bytes and checksum
    shard-00000.h5    activations/<hook> [n d] float32
                      token, document, sequence, position [n] int32: where each row comes from
                      sequences/token, sequences/document [s c] int32: every full sequence,
                      special tokens included (their document is -1), so that it can be replayed

A shard is built in memory, written under a temporary name, flushed to disk and renamed; then the
manifest is replaced in the same way. A kill at any moment loses at most the shard in progress.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import filelock
import h5py
import numpy as np

from activations.config import validate
from activations.terminal import UserError

SCHEMA = 1
MANIFEST = "manifest.json"
COLUMNS = ("token", "document", "sequence", "position")


class StoreError(UserError):
    """A store that is absent, unfinished, damaged, or not the one that was asked for."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a store. `bytes` and `sha256` are of the whole file."""

    __pydantic_config__ = {"extra": "forbid"}

    file: str
    rows: int
    sequences: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds and where it came from.

    Attributes:
      request: the harvest's configuration, so that a second harvest knows whether it is the same.
      model: identity of the model and tokenizer, with hashes.
      corpus: identity of the text as tokenised, with hash.
      forward: what else rounding depends on (batch size, threads, versions).
      hooks: width of each hook.
      dropped_positions: positions of the sequences that have no row.
      n_sequences: of the complete store.
    """

    __pydantic_config__ = {"extra": "forbid"}

    request: dict[str, Any]
    model: dict[str, Any]
    corpus: dict[str, Any]
    forward: dict[str, Any]
    hooks: dict[str, int]
    context_length: int
    n_sequences: int
    dropped_positions: tuple[str, ...]
    dtype: Literal["float32"] = "float32"
    schema: Literal[1] = SCHEMA
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def n_rows(self) -> int:
        """Rows in the shards written so far."""
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> str:
        """The canonical form: what a manifest file holds, byte for byte."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    def sha256(self) -> str:
        """Identity of the store: its shards' checksums stand in the manifest."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of the store at `path`, or None where there is no store at all."""
    file = path / MANIFEST
    try:
        table = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if path.exists() and (not path.is_dir() or any(map(_is_foreign, path.iterdir()))):
            raise StoreError(
                f"{path}: is there, but is no store (it has no {MANIFEST}). Name another place."
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: cannot be read as a manifest ({error})") from None
    if isinstance(table, dict) and table.get("schema") != SCHEMA:
        raise StoreError(
            f"{file}: schema {table.get('schema')!r}, but this version reads schema {SCHEMA}. "
            "Update dictlearn-interp, or harvest again."
        )
    return validate(Manifest, table, str(file))


def _is_foreign(file: Path) -> bool:
    """Whether a file is none of those that stand in a store before its manifest does."""
    return not file.name.startswith(".") and file.name != f"{MANIFEST}.partial"


class Store:
    """A complete store, opened for reading. `len(store)` is its rows.

    Opening checks, cheaply, that every shard is there with the size that the manifest tells.

    Raises:
      StoreError: no store, one still being written, or a shard that is missing or truncated.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise StoreError(f"{self.path}: no store there. Harvest one, or mend the path.")
        if not manifest.complete:
            done = sum(shard.sequences for shard in manifest.shards)
            raise StoreError(
                f"{self.path}: the store is unfinished ({done:,} of {manifest.n_sequences:,} "
                "sequences). Run its harvest again: it goes on where it stopped."
            )
        self.manifest = manifest
        for shard in manifest.shards:
            self._check_size(shard)

    def __len__(self) -> int:
        return self.manifest.n_rows

    def _check_size(self, shard: Shard) -> None:
        file = self.path / shard.file
        size = file.stat().st_size if file.exists() else None
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size:,} bytes"
            raise StoreError(
                f"{file}: {state}, but the manifest tells {shard.bytes:,}. "
                "Restore the file, or delete the store and harvest again."
            )

    def width(self, hook: str) -> int:
        """The width of a hook's rows."""
        try:
            return self.manifest.hooks[hook]
        except KeyError:
            known = ", ".join(self.manifest.hooks)
            raise StoreError(f"{self.path}: holds no hook {hook!r}; it holds {known}") from None

    def read(self, shard: Shard, name: str) -> np.ndarray:
        """One dataset of one shard, whole: a column, `activations/<hook>`, `sequences/token`."""
        file = self.path / shard.file
        try:
            with h5py.File(file, "r") as opened:
                dataset = opened[name]
                assert isinstance(dataset, h5py.Dataset)
                return dataset[...]
        except (OSError, KeyError) as error:
            raise StoreError(
                f"{file}: {name} cannot be read ({error}). "
                "Restore the file, or delete the store and harvest again."
            ) from None

    def activations(self, shard: Shard, hook: str) -> np.ndarray:
        """The rows of one shard at one hook [n d].

        Raises:
          StoreError: a row holds NaN or infinity; the shard and the row are named.
        """
        self.width(hook)
        x = self.read(shard, f"activations/{hook}")
        with np.errstate(invalid="ignore"):  # inf - inf
            total = x.sum(dtype=np.float64)  # one pass, and no array of flags
        if not np.isfinite(total):
            finite = np.isfinite(x).all(axis=1)
            if not finite.all():
                row = int(np.argmin(finite))
                token = self.read(shard, "token")[row]
                raise StoreError(
                    f"{self.path / shard.file}: row {row} (token {token}) at {hook} holds NaN or "
                    "infinity. Harvest again, or look at the model with which it was made."
                )
        return x

    def column(self, name: str) -> np.ndarray:
        """One of token, document, sequence, position over all rows [N]."""
        assert name in COLUMNS
        return np.concatenate([self.read(shard, name) for shard in self.manifest.shards])


class StoreWriter:
    """Writes a store shard by shard; opened over an unfinished one, it goes on after its shards.

    Made by `open_writer`, which holds the store's lock.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def sequences_done(self) -> int:
        """How many sequences stand in finished shards."""
        return sum(shard.sequences for shard in self.manifest.shards)

    def write_shard(self, datasets: Mapping[str, np.ndarray]) -> None:
        """Write one shard (the names of the module's docstring) and enter it in the manifest.

        Raises:
          StoreError: the disk is full; what is finished stays, and the harvest can go on later.
        """
        name = f"shard-{len(self.manifest.shards):05d}.h5"
        # Built in memory: HDF5 on a full disk leaves files that look whole, plain writes do not.
        with h5py.File(name, "w", driver="core", backing_store=False) as file:
            for key, values in datasets.items():
                file.create_dataset(key, data=values)
            file.flush()
            image = file.id.get_file_image()
        shard = Shard(
            file=name,
            rows=len(datasets["token"]),
            sequences=len(datasets["sequences/token"]),
            bytes=len(image),
            sha256=hashlib.sha256(image).hexdigest(),
        )
        with self._room():
            if not self.manifest.shards:  # from here on the directory is a store, whatever happens
                self._save(self.manifest)
            replace_file(self.path / name, image)
            self._save(dataclasses.replace(self.manifest, shards=(*self.manifest.shards, shard)))

    def finish(self) -> None:
        """Mark the store complete."""
        with self._room():
            self._save(dataclasses.replace(self.manifest, complete=True))

    def _save(self, manifest: Manifest) -> None:
        replace_file(self.path / MANIFEST, manifest.to_json().encode())
        self.manifest = manifest

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise StoreError(
                f"{self.path}: no space left on the device after {len(self.manifest.shards)} "
                "finished shards, which are kept. Free some space and run the same command: it "
                "goes on where it stopped."
            ) from None


@contextlib.contextmanager
def open_writer(path: Path, manifest: Manifest) -> Iterator[StoreWriter]:
    """Begin the store that `manifest` describes, or go on with it where it was left.

    Raises:
      StoreError: another process writes it, or what lies there was begun with other settings.
    """
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise StoreError(f"{path}: another process is writing this store") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be made into a store ({error})") from None
    try:
        begun = read_manifest(path)
        if begun is not None:
            bare = dataclasses.replace(begun, shards=(), complete=False)
            if differing := differences(dataclasses.asdict(bare), dataclasses.asdict(manifest)):
                raise StoreError(
                    f"{path}: was begun with other settings:\n  "
                    + "\n  ".join(differing)
                    + "\nName another store, or delete this one."
                )
        writer = StoreWriter(path, begun or manifest)
        for left in path.glob("*.partial"):
            left.unlink()
        yield writer
    finally:
        lock.release()
        if made and not (path / MANIFEST).exists():  # nothing was written: leave nothing
            (path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.rmdir()


def differences(there: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line for each key in which what is there differs from what was asked."""
    lines = []
    for key in sorted({*there, *asked}):
        old, new = there.get(key), asked.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif json.dumps(old, default=str) != json.dumps(new, default=str):
            lines.append(f"{prefix}{key}: there {old!r}, asked {new!r}")
    return lines


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all, also across a kill or a power cut."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
