"""Writing a store: one worker or several, killed at any moment, resumed to the same bytes.

Each worker owns a range of shards, and enters those it has finished in a partial manifest of its
own, `worker-2-of-3.json`, so that workers never meet. `merge` joins the partial manifests into
`manifest.json`; a single worker does so itself when it has finished.

A shard is written under a temporary name, flushed to disk and renamed; then the partial manifest is
replaced in the same way. A kill loses at most the shard in progress. The locks are the operating
system's: they end with the process that holds them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import h5py
import numpy as np

from activations import precision
from activations.config import validate
from activations.files import partial, replace_file, replacing, sealed, sha256, unseal
from activations.store import (
    MANIFEST,
    MEND,
    SEQUENCES,
    VOCABULARY,
    Manifest,
    Shard,
    StoreError,
    read_manifest,
)

BEGIN_LOCK = ".begin.lock"


@dataclasses.dataclass(frozen=True)
class Worker:
    """Worker `number` of `count`, counted from 1: the owner of one range of shards."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def shards(self, manifest: Manifest) -> range:
        """The indices of the shards that this worker writes."""
        ends = [manifest.n_shards * i // self.count for i in (self.number - 1, self.number)]
        return range(*ends)

    @property
    def file(self) -> str:
        """The name of its partial manifest."""
        return f"worker-{self.number}-of-{self.count}.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """A partial manifest: the shards that one worker has finished, of which store."""

    __pydantic_config__ = {"extra": "forbid"}

    store: str
    shards: tuple[Shard, ...] = ()


class StoreWriter:
    """Writes one worker's shards; made by `open_writer`."""

    def __init__(self, path: Path, manifest: Manifest, worker: Worker, part: Part) -> None:
        self.path = path
        self.manifest = manifest
        self.worker = worker
        self.part = part

    @property
    def missing(self) -> range:
        """The indices of the shards that this worker has yet to write, in order."""
        return self.worker.shards(self.manifest)[len(self.part.shards) :]

    def write_shard(self, index: int, datasets: Mapping[str, np.ndarray]) -> None:
        """Write shard `index`, the next one (the datasets of activations.store), and enter it.

        Raises:
          StoreError: the disk is full; what is finished stays, and the harvest can go on later.
        """
        if index != self.missing[0]:
            raise ValueError(f"shard {index} is not the next one, {self.missing[0]}")
        path = self.path / Shard(index, 0, 0, "").file
        with disk_full_told(self.path):
            with replacing(path) as out:
                with h5py.File(out, "w") as file:
                    # Fixed length: HDF5 can hang on a heap of variable strings that is damaged.
                    file.attrs["store"] = np.bytes_(self.manifest.id)
                    file.attrs["index"] = index
                    for name, values in datasets.items():
                        rows = name in self.manifest.datasets
                        compression = self.manifest.compression if rows else "none"
                        precision.write(file, name, values, compression)
                out.check()
                out.seek(0)
                digest = hashlib.file_digest(out, "sha256").hexdigest()
                shard = Shard(index, len(datasets["token"]), out.tell(), digest)
            part = dataclasses.replace(self.part, shards=(*self.part.shards, shard))
            save_part(self.path / self.worker.file, part)
        self.part = part


def open_writer(path: Path, manifest: Manifest, worker: Worker) -> StoreWriter:
    """Begin or go on with a worker's share of the store that stands begun at `path`.

    Call it inside `worker_lock`, and use what it gives there.

    Raises:
      StoreError: the store was begun with another number of workers; a partial manifest is damaged.
    """
    for file in path.glob("worker-*-of-*.json"):
        if not file.name.endswith(f"-of-{worker.count}.json"):
            raise StoreError(
                f"{path}: was begun by {file.stem.rsplit('-', 1)[1]} worker(s), not by "
                f"{worker.count}. Go on with as many, or delete the store."
            )
    part = read_part(path / worker.file, manifest)
    writer = StoreWriter(path, manifest, worker, part or Part(manifest.id))
    for index in writer.missing:  # what a killed worker left; the others' files are left alone
        partial(path / Shard(index, 0, 0, "").file).unlink(missing_ok=True)
    if part is None:
        with disk_full_told(path):
            save_part(path / worker.file, writer.part)
    return writer


def write_store(
    path: Path,
    shards: Iterable[Mapping[str, np.ndarray]],
    *,
    sequences: np.ndarray,
    vocabulary: Mapping[int, str],
    **facts: Any,
) -> None:
    """Make a whole store of arrays that come from elsewhere than a harvest.

    Arguments:
      shards: the datasets of each shard, as activations.store describes them.
      sequences, vocabulary: as there; `shard_sequences` of the facts tells how many belong to each
        shard.
      facts: what else a Manifest asks for.

    Raises:
      StoreError: a store is there already; the disk is full.
    """
    with worker_lock(path, Worker()), disk_full_told(path):
        if read_manifest(path) is not None:
            raise StoreError(f"{path}: holds a store already. Name another place.")
        with replacing(path / SEQUENCES) as out:
            np.save(out, sequences.astype(np.int32))
        table = {str(token): text for token, text in vocabulary.items()}
        replace_file(path / VOCABULARY, json.dumps(table, indent=0).encode())
        manifest = Manifest(
            n_sequences=len(sequences),
            files={name: sha256(path / name) for name in (SEQUENCES, VOCABULARY)},
            **facts,
        )
        replace_file(path / MANIFEST, manifest.to_json().encode())
        writer = open_writer(path, manifest, Worker())
        for index, datasets in zip(writer.missing, shards, strict=True):
            writer.write_shard(index, datasets)
        merge(path)


def read_part(file: Path, manifest: Manifest) -> Part | None:
    """A worker's partial manifest, or None where it has not begun."""
    try:
        part = validate(Part, unseal(file.read_bytes().decode()), str(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: cannot be read as a partial manifest ({error})") from None
    if part.store != manifest.id:
        raise StoreError(f"{file}: belongs to another store. {MEND}")
    return part


def save_part(file: Path, part: Part) -> None:
    """Replace a partial manifest."""
    replace_file(file, sealed(dataclasses.asdict(part)).encode())


def merge(path: Path) -> Manifest:
    """Join the partial manifests of the store at `path` into its manifest, and delete them.

    Raises:
      StoreError: no store, a worker has not finished, or a shard is missing.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise StoreError(f"{path}: no store there")
    if not manifest.complete:
        with begin_lock(path):
            manifest = _joined(path, manifest)
            with disk_full_told(path):
                replace_file(path / MANIFEST, manifest.to_json().encode())
    for file in path.glob("worker-*-of-*.json"):
        file.unlink(missing_ok=True)
    return manifest


def _joined(path: Path, manifest: Manifest) -> Manifest:
    """The manifest with the shards of all partial ones."""
    shards: dict[int, Shard] = {}
    files = sorted(path.glob("worker-*-of-*.json"))
    for file in files:
        part = read_part(file, manifest)
        shards |= {shard.index: shard for shard in (part.shards if part else ())}
    missing = [index for index in range(manifest.n_shards) if index not in shards]
    if missing:
        raise StoreError(
            f"{path}: {len(missing):,} of {manifest.n_shards:,} shards are not written yet, "
            f"shard {missing[0]} the first. Partial manifests: "
            f"{', '.join(file.name for file in files) or 'none'}. Finish every worker first."
        )
    for shard in shards.values():
        file = path / shard.file
        if not file.exists() or file.stat().st_size != shard.bytes:
            raise StoreError(f"{file}: is missing or cut. {MEND}")
    in_order = tuple(shards[index] for index in sorted(shards))
    return dataclasses.replace(manifest, shards=in_order, complete=True)


@contextlib.contextmanager
def worker_lock(path: Path, worker: Worker) -> Iterator[None]:
    """Be the only process that is this worker of the store at `path`.

    Where a single worker has not begun the store when this ends, nothing is left at `path`.

    Raises:
      StoreError: another process is; or `path` cannot be made a directory.
    """
    made = not path.exists()
    name = f".{worker.file.removesuffix('.json')}.lock"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / name, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise StoreError(
            f"{path}: another process is writing this store as worker {worker}"
        ) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be made into a store ({error})") from None
    try:
        yield
    finally:
        if worker.count == 1 and not (path / MANIFEST).exists():
            made_here = (path / left for left in (SEQUENCES, VOCABULARY, MANIFEST, worker.file))
            files = [each for file in made_here for each in (file, partial(file))]
            for left in (*files, path / BEGIN_LOCK, path / name):  # the lock is held until then
                left.unlink(missing_ok=True)
            lock.release()
            if made:
                with contextlib.suppress(OSError):
                    path.rmdir()
        lock.release()


@contextlib.contextmanager
def begin_lock(path: Path) -> Iterator[None]:
    """Held while a store is begun: other workers wait until its sequences are on the disk."""
    lock = filelock.FileLock(path / BEGIN_LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print("waiting for another process, which begins this store ...", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def disk_full_told(path: Path) -> Iterator[None]:
    """Turn a full disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(
            f"{path}: no space left on the device. The finished shards are kept. Free some space "
            "and run the same command: it goes on where it stopped."
        ) from None


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
