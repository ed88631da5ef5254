"""Laws of the store: what was written is read, and nothing else ever looks whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from activations.store import (
    COLUMNS,
    MANIFEST,
    Manifest,
    Store,
    StoreError,
    StoreWriter,
    open_writer,
)
from activations.terminal import UserError

HOOK = "blocks.0.hook_resid_post"
WIDTH, CONTEXT, PER_SHARD, N_SHARDS = 4, 5, 2, 3
MANIFEST_OF_TESTS = Manifest(
    request={"model": "dir:none"},
    model={"spec": "dir:none"},
    corpus={},
    forward={"threads": 1},
    hooks={HOOK: WIDTH},
    context_length=CONTEXT,
    n_sequences=PER_SHARD * N_SHARDS,
    dropped_positions=("special",),
)


def shard_data(index: int) -> dict[str, np.ndarray]:
    """What shard `index` holds: every position but the first of its sequences."""
    rng = np.random.default_rng(index)
    sequences = rng.integers(0, 99, (PER_SHARD, CONTEXT), np.int32)
    kept = np.arange(CONTEXT) > 0
    rows = PER_SHARD * (CONTEXT - 1)
    return {
        f"activations/{HOOK}": rng.standard_normal((rows, WIDTH), np.float32),
        "token": sequences[:, kept].ravel(),
        "document": np.full(rows, index, np.int32),
        "sequence": np.repeat(np.arange(PER_SHARD, dtype=np.int32) + PER_SHARD * index, 4),
        "position": np.tile(np.arange(1, CONTEXT, dtype=np.int32), PER_SHARD),
        "sequences/token": sequences,
        "sequences/document": np.where(kept, np.int32(index), np.int32(-1))
        * np.ones_like(sequences),
    }


def write_rest(writer: StoreWriter) -> None:
    for index in range(writer.sequences_done // PER_SHARD, N_SHARDS):
        writer.write_shard(shard_data(index))
    writer.finish()


def write(path: Path, manifest: Manifest = MANIFEST_OF_TESTS) -> None:
    with open_writer(path, manifest) as writer:
        write_rest(writer)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished store."""
    write(tmp_path / "store")
    return tmp_path / "store"


class Killed(BaseException):
    """No handler of ordinary errors stops it."""


def fail_at(
    monkeypatch: pytest.MonkeyPatch, moment: int, error: Callable[[], BaseException]
) -> Callable[[], int]:
    """Raise `error` at the moment-th flush or rename; the result counts the calls so far."""
    calls = 0

    def failing(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise error()
            real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    return lambda: calls


def moments() -> range:
    """Each flush (of file and folder) and rename of: manifest, (shard, manifest) x n, manifest."""
    return range(1, 3 * (2 * N_SHARDS + 2) + 1)


def test_what_was_written_is_read(path: Path) -> None:
    store = Store(path)
    assert len(store) == PER_SHARD * N_SHARDS * (CONTEXT - 1)
    assert store.width(HOOK) == WIDTH
    for index, shard in enumerate(store.manifest.shards):
        data = shard_data(index)
        np.testing.assert_array_equal(store.activations(shard, HOOK), data[f"activations/{HOOK}"])
        for name, values in data.items():
            read = store.read(shard, name)
            assert read.dtype == values.dtype
            np.testing.assert_array_equal(read, values)
    for name in COLUMNS:
        wanted = np.concatenate([shard_data(index)[name] for index in range(N_SHARDS)])
        np.testing.assert_array_equal(store.column(name), wanted)


def test_a_manifest_file_reads_back_as_itself_and_names_the_store(path: Path) -> None:
    manifest = Store(path).manifest
    assert (path / MANIFEST).read_text() == manifest.to_json()
    other = dataclasses.replace(manifest, shards=manifest.shards[:-1])
    assert other.sha256() != manifest.sha256()


def test_float32_survives_to_the_bit(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (8, WIDTH), np.uint32)
    bits[0] = [0x80000000, 0x00000001, 0x7F7FFFFF, 0xFF7FFFFF]  # -0, subnormal, both ends
    x = bits.view(np.float32)
    x[~np.isfinite(x)] = 1
    with open_writer(tmp_path / "store", MANIFEST_OF_TESTS) as writer:
        writer.write_shard(shard_data(0) | {f"activations/{HOOK}": x})
        writer.finish()
    store = Store(tmp_path / "store")
    assert store.activations(store.manifest.shards[0], HOOK).tobytes() == x.tobytes()


def test_a_kill_at_any_moment_is_made_good_to_the_byte(path: Path, tmp_path: Path) -> None:
    whole = contents(path)
    for moment in moments():
        target = tmp_path / f"{moment}"
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, moment, Killed)
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # the dead tidy nothing
            with pytest.raises(Killed):
                write(target)
        for torn in target.glob("*.partial"):
            torn.write_bytes(torn.read_bytes()[:-7])
        if contents(target).get(MANIFEST) != whole[MANIFEST]:
            with pytest.raises(StoreError, match=r"unfinished|no store"):
                Store(target)
        write(target)
        assert contents(target) == whole


def test_the_moments_of_the_kill_are_all_there_are(path: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        count = fail_at(patch, 0, Killed)
        write(tmp_path / "counted")
    assert count() == len(moments())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_finished_shards(path: Path, tmp_path: Path, code: int) -> None:
    whole = contents(path)
    for moment in moments():
        target = tmp_path / f"{moment}"
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, moment, lambda: OSError(code, os.strerror(code)))
            with pytest.raises(StoreError, match=r"no space left.*goes on where it stopped"):
                write(target)
        if target.exists():  # else nothing had been written yet
            assert not list(target.glob("*.partial"))
            for shard in json.loads((target / MANIFEST).read_text())["shards"]:
                assert (target / shard["file"]).read_bytes() == whole[shard["file"]]
        write(target)
        assert contents(target) == whole


def test_other_errors_of_the_disk_are_not_called_a_full_one(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 4, lambda: OSError(errno.EIO, "input/output error"))
        with pytest.raises(OSError, match="input/output"):
            write(tmp_path / "store")


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


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes (the kernel answers EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_really_full(path: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small") as disk:
        hog = disk / "hog"
        page, size = 4096, (path / "shard-00000.h5").stat().st_size
        room = 2 * page + -(-size // page) * page  # the manifest twice, one shard
        hog.write_bytes(bytes(256 * 1024 - room))
        with pytest.raises(StoreError, match=r"after 1 finished shards, which are kept"):
            write(disk / "store")
        assert not list((disk / "store").glob("*.partial"))
        hog.unlink()
        write(disk / "store")
        assert contents(disk / "store") == contents(path)


def test_a_file_that_the_system_refuses_to_grow(path: Path, tmp_path: Path) -> None:
    size = (path / "shard-00000.h5").stat().st_size
    with small_files(size - 1), pytest.raises(StoreError, match="no space left"):
        write(tmp_path / "second")
    assert set(contents(tmp_path / "second")) == {MANIFEST}
    write(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(path)


def test_a_failure_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_writer(tmp_path / "store", MANIFEST_OF_TESTS):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_second_writer_is_refused(path: Path) -> None:
    before = contents(path)
    with (
        open_writer(path, MANIFEST_OF_TESTS),
        pytest.raises(StoreError, match="another process is writing this store"),
        open_writer(path, MANIFEST_OF_TESTS),
    ):
        pass
    assert contents(path) == before
    with open_writer(path, MANIFEST_OF_TESTS) as writer:  # the lock died with its holder
        assert writer.sequences_done == PER_SHARD * N_SHARDS


def test_what_killed_writers_left_is_swept(path: Path) -> None:
    whole = contents(path)
    (path / "shard-00001.h5.partial").write_bytes(b"half")
    write(path)
    assert contents(path) == whole


def test_a_store_begun_with_other_settings_is_refused(path: Path) -> None:
    before = contents(path)
    other = dataclasses.replace(
        MANIFEST_OF_TESTS, forward={"threads": 2}, request={"model": "dir:none", "new": 1}
    )
    with pytest.raises(StoreError, match=r"forward\.threads: there 1, asked 2\n") as caught:
        write(path, other)
    assert "request.new: there None, asked 1" in str(caught.value)
    assert contents(path) == before


def test_a_shard_that_is_cut_or_gone_is_named_on_opening(path: Path) -> None:
    file = path / "shard-00001.h5"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=r"shard-00001\.h5: has [\d,]+ bytes, but the manifest"):
        Store(path)
    file.unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.h5: is missing"):
        Store(path)
    file.write_bytes(bytes(len(whole)))  # the right size, but no HDF5
    store = Store(path)
    with pytest.raises(StoreError, match=r"shard-00001\.h5: token cannot be read"):
        store.column("token")


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]])
def test_a_row_that_is_not_finite_is_named(tmp_path: Path, values: list[float]) -> None:
    data = shard_data(1)
    row = 5
    data[f"activations/{HOOK}"][row, : len(values)] = values
    with open_writer(tmp_path / "store", MANIFEST_OF_TESTS) as writer:
        writer.write_shard(shard_data(0))
        writer.write_shard(data)
        writer.finish()
    store = Store(tmp_path / "store")
    sound, ill = store.manifest.shards
    assert np.isfinite(store.activations(sound, HOOK)).all()
    with pytest.raises(
        StoreError, match=rf"shard-00001\.h5: row {row} \(token {data['token'][row]}\) at {HOOK}"
    ):
        store.activations(ill, HOOK)


def test_an_unknown_hook_is_told_with_those_there_are(path: Path) -> None:
    store = Store(path)
    for ask in (store.width, lambda hook: store.activations(store.manifest.shards[0], hook)):
        with pytest.raises(StoreError, match=rf"no hook 'blocks\.9'; it holds {HOOK}"):
            ask("blocks.9")


def test_what_is_no_store_is_told_and_never_written_over(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store there"):
        Store(tmp_path / "absent")
    with pytest.raises(StoreError, match="no store there"):
        Store(tmp_path)
    mine = tmp_path / "film.partial"
    mine.write_text("a download of the user's own")
    for place in (tmp_path, mine):
        for use in (Store, write):
            with pytest.raises(StoreError, match=r"is no store|cannot be made into a store"):
                use(place)
    with pytest.raises(StoreError, match="cannot be made into a store"):
        write(mine / "below")
    assert contents(tmp_path) == {"film.partial": b"a download of the user's own"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, "schema 2, but this version reads schema 1"),
        ({"schema": None}, "schema None"),
        ({"complete": "yes"}, "complete: expected a valid boolean"),
        ({"shards": [{"file": "x"}]}, r"shards\.0\.rows: missing"),
        ({"colour": "red"}, "colour: unknown key"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    path: Path, change: dict[str, object], expected: str
) -> None:
    table = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(table | change))
    with pytest.raises(UserError, match=expected):  # validate() raises UserError
        Store(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '"manifest"'])
def test_a_manifest_that_is_torn_is_refused(path: Path, text: str) -> None:
    (path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=MANIFEST):
        Store(path)


def test_an_unfinished_store_tells_how_far_it_is(tmp_path: Path) -> None:
    with open_writer(tmp_path / "store", MANIFEST_OF_TESTS) as writer:
        writer.write_shard(shard_data(0))
    with pytest.raises(StoreError, match=r"unfinished \(2 of 6 sequences\)"):
        Store(tmp_path / "store")


def test_a_shard_is_plain_hdf5_as_documented(path: Path) -> None:
    with h5py.File(path / "shard-00000.h5") as file:
        for name in shard_data(0):
            assert isinstance(file[name], h5py.Dataset)
        assert file[f"activations/{HOOK}"].dtype == np.float32
