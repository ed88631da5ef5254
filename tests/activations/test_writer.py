"""Laws of writing a store: however it was interrupted and shared out, the same bytes result."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from activations.files import replace_file, replacing, sha256
from activations.store import (
    MANIFEST,
    SEQUENCES,
    VOCABULARY,
    Manifest,
    Store,
    StoreError,
    read_manifest,
)
from activations.writer import Worker, merge, open_writer, worker_lock, write_store

HOOK = "blocks.0.hook_resid_post"
WIDTH, N_SHARDS = 4, 5
FACTS = {
    "request": {},
    "model": {},
    "corpus": {},
    "forward": {},
    "hooks": {HOOK: WIDTH},
    "context_length": 8,
    "n_documents": 3,
    "shard_sequences": 2,
    "dropped_positions": ("special",),
}
SEQUENCES_OF_TESTS = np.arange(9 * 2 * 8, dtype=np.int32).reshape(9, 2, 8)


def datasets(index: int, rows: int = 40) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(index)
    columns = ("token", "document", "sequence", "position")
    return {
        f"activations/{HOOK}": rng.standard_normal((rows, WIDTH), np.float32),
        **{name: rng.integers(0, 9, rows, np.int32) for name in columns},
    }


def begin(path: Path) -> Manifest:
    """Sequences, vocabulary and the first manifest, as a harvest puts them there."""
    path.mkdir(parents=True, exist_ok=True)
    np.save(path / SEQUENCES, SEQUENCES_OF_TESTS)
    (path / VOCABULARY).write_bytes(b'{\n"1": "one"\n}')
    digests = {name: sha256(path / name) for name in (SEQUENCES, VOCABULARY)}
    manifest = Manifest(n_sequences=9, files=digests, **FACTS)
    replace_file(path / MANIFEST, manifest.to_json().encode())
    return manifest


def work(path: Path, manifest: Manifest, worker: Worker, *, most: int = N_SHARDS) -> None:
    """Write up to `most` of the shards that a worker misses."""
    with worker_lock(path, worker):
        writer = open_writer(path, manifest, worker)
        for index in writer.missing[:most]:
            writer.write_shard(index, datasets(index))


def write(path: Path) -> None:
    """A whole store, or the rest of one."""
    manifest = begun(path) if (path / MANIFEST).exists() else begin(path)
    if not manifest.complete:
        work(path, manifest, Worker())
    merge(path)


def begun(path: Path) -> Manifest:
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name[0] != "."}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted store holds."""
    write(tmp_path / "whole")
    assert len(Store(tmp_path / "whole")) == 40 * N_SHARDS
    return contents(tmp_path / "whole")


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours may catch it and tidy up."""


def fail_at(patch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Let the `call`-th flush, rename or removal of a file raise `error`."""
    calls = itertools.count(1)
    for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        original = getattr(module, name)

        def faulty(*args: object, original: object = original, **options: object) -> object:
            if next(calls) == call:
                raise error
            return original(*args, **options)  # pyright: ignore[reportCallIssue]

        patch.setattr(module, name, faulty)


@pytest.mark.parametrize("kind", [Killed(), OSError(errno.ENOSPC, "full")])
def test_an_end_at_any_moment_is_made_good_to_the_byte(
    whole: dict[str, bytes], tmp_path: Path, kind: BaseException
) -> None:
    for call in itertools.count(1):
        path = tmp_path / str(call)
        manifest = begin(path)
        ended = False
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call, kind)
            try:
                work(path, manifest, Worker())
                merge(path)
            except (Killed, StoreError, OSError):
                ended = True
        if ended and not begun(path).complete:
            with pytest.raises(StoreError, match="unfinished"):
                Store(path)
        write(path)
        assert contents(path) == whole
        if not ended:
            break
    assert call > 6 * N_SHARDS


def test_other_errors_of_the_disk_are_not_called_a_full_one(tmp_path: Path) -> None:
    manifest = begin(tmp_path / "store")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 4, OSError(errno.EIO, "input/output error"))
        with pytest.raises(OSError, match="input/output"):
            work(tmp_path / "store", manifest, Worker())


@contextlib.contextmanager
def tmpfs(folder: Path) -> Iterator[Path]:
    """A file system of 256 KiB at `folder`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(whole: dict[str, bytes], tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small") as disk:
        path, hog = disk / "store", disk / "hog"
        manifest = begin(path)
        work(path, manifest, Worker(), most=2)
        hog.write_bytes(b"")
        with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
        with pytest.raises(StoreError, match=r"no space left .* finished shards are kept"):
            work(path, manifest, Worker())
        assert not list(path.glob("*.partial"))
        hog.unlink()
        write(path)
        assert contents(path) == whole


def test_a_file_that_the_system_refuses_to_grow(whole: dict[str, bytes], tmp_path: Path) -> None:
    """The kernel answers EFBIG, in the middle of what HDF5 writes."""
    path = tmp_path / "store"
    manifest = begin(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["shard-00000.h5"]) - 1, before[1]))
    try:
        with pytest.raises(StoreError, match="no space left"):
            work(path, manifest, Worker())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert set(contents(path)) == {MANIFEST, SEQUENCES, VOCABULARY, "worker-1-of-1.json"}
    write(path)
    assert contents(path) == whole


def test_a_failure_before_the_store_has_begun_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), worker_lock(tmp_path / "store", Worker()):
        (tmp_path / "store" / SEQUENCES).write_bytes(b"half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_a_store_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(StoreError, match="cannot be made into a store"),
            worker_lock(place, Worker()),
        ):
            pass
    assert contents(tmp_path) == {"file": b"mine"}


# Locks


def test_a_worker_is_one_process(tmp_path: Path) -> None:
    path = tmp_path / "store"
    begin(path)
    with worker_lock(path, Worker(1, 2)), worker_lock(path, Worker(2, 2)):
        for worker in (Worker(1, 2), Worker(2, 2)):
            with (
                pytest.raises(StoreError, match=f"another process .* as worker {worker}"),
                worker_lock(path, worker),
            ):
                pass
    with worker_lock(path, Worker(1, 2)):  # the lock ended with its holder
        pass


def test_a_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    path = tmp_path / "store"
    begin(path)
    program = (
        "import sys, time; from pathlib import Path; from activations.writer import *\n"
        "with worker_lock(Path(sys.argv[1]), Worker()): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(StoreError, match="another process is writing"),
            worker_lock(path, Worker()),
        ):
            pass
        process.kill()
    assert (path / ".worker-1-of-1.lock").exists()
    with worker_lock(path, Worker()):
        pass


# Workers


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_workers_share_the_shards_out(tmp_path: Path, count: int) -> None:
    manifest = begin(tmp_path / "store")
    shares = [Worker(number, count).shards(manifest) for number in range(1, count + 1)]
    assert [index for share in shares for index in share] == list(range(N_SHARDS))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 3))))
def test_workers_in_any_order_make_what_one_makes(
    whole: dict[str, bytes], tmp_path: Path, order: tuple[int, ...]
) -> None:
    path = tmp_path / "store"
    manifest = begin(path)
    for number in order:
        work(path, manifest, Worker(number, 3), most=1)
    with pytest.raises(StoreError, match=r"shards are not written yet, shard \d the first"):
        merge(path)
    for number in order:
        work(path, manifest, Worker(number, 3))
    merge(path)
    assert contents(path) == whole
    merge(path)  # again, to no effect
    assert contents(path) == whole


def test_what_a_killed_worker_left_is_swept_by_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    manifest = begin(path)
    for index in range(N_SHARDS):
        (path / f"shard-{index:05d}.h5.partial").write_bytes(b"half")
    work(path, manifest, Worker(2, 3), most=0)
    left = {int(file.name[6:11]) for file in path.glob("*.partial")}
    assert left == set(range(N_SHARDS)) - set(Worker(2, 3).shards(manifest))


def test_going_on_with_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    manifest = begin(path)
    work(path, manifest, Worker(1, 3), most=1)
    for worker in (Worker(), Worker(1, 2)):
        with pytest.raises(StoreError, match=r"was begun by 3 worker\(s\)"):
            work(path, manifest, worker)


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    path, other = tmp_path / "store", tmp_path / "other"
    manifest = begin(path)
    work(path, manifest, Worker())
    part = path / "worker-1-of-1.json"
    good = part.read_bytes()
    for index in (0, len(good) // 2, len(good) - 2):
        bad = bytearray(good)
        bad[index] ^= 1
        part.write_bytes(bad)
        with pytest.raises(StoreError, match=r"worker-1-of-1\.json: cannot be read"):
            merge(path)
    part.write_bytes(good)
    (path / "shard-00003.h5").rename(tmp_path / "away")
    with pytest.raises(StoreError, match=r"shard-00003\.h5: is missing or cut"):
        merge(path)
    (tmp_path / "away").rename(path / "shard-00003.h5")
    begin(other)
    strange = Manifest(n_sequences=9, files={}, **FACTS | {"model": {"spec": "another"}})
    replace_file(other / MANIFEST, strange.to_json().encode())
    (other / part.name).write_bytes(good)
    with pytest.raises(StoreError, match="belongs to another store"):
        merge(other)
    with pytest.raises(StoreError, match="no store there"):
        merge(tmp_path / "absent")
    merge(path)
    Store(path)


def test_shards_are_written_in_order(tmp_path: Path) -> None:
    path = tmp_path / "store"
    manifest = begin(path)
    with pytest.raises(ValueError, match="shard 1 is not the next one, 0"):
        open_writer(path, manifest, Worker()).write_shard(1, datasets(1))


def test_arrays_of_ones_own_make_the_same_store(whole: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "store"
    shards = map(datasets, range(N_SHARDS))
    write_store(path, shards, sequences=SEQUENCES_OF_TESTS, vocabulary={1: "one"}, **FACTS)
    assert contents(path) == whole
    with pytest.raises(StoreError, match="holds a store already"):
        write_store(path, [], sequences=SEQUENCES_OF_TESTS, vocabulary={}, **FACTS)
    assert contents(path) == whole


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    replace_file(file, b"old")
    with contextlib.suppress(ZeroDivisionError), replacing(file) as out:
        out.write(b"half")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"file": b"old"}
    with replacing(file) as out:
        out.write(memoryview(np.arange(3, dtype=np.int32)))
        assert file.read_bytes() == b"old"
    assert contents(tmp_path) == {"file": np.arange(3, dtype=np.int32).tobytes()}


@pytest.mark.slow
def test_a_write_that_stops_short_goes_on(tmp_path: Path) -> None:
    """Linux writes at most 2^31 - 4096 bytes at once."""
    size = 2**31 + 10
    with replacing(tmp_path / "large") as out:
        assert out.write(np.zeros(size, np.uint8)) == size
    assert (tmp_path / "large").stat().st_size == size
    (tmp_path / "large").unlink()
