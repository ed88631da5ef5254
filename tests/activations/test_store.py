"""Laws of the store: what was written is read, and nothing that has changed looks whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from activations.files import sealed, sha256
from activations.precision import DTYPES
from activations.store import COLUMNS, MANIFEST, SEQUENCES, VOCABULARY, Manifest, Store, StoreError
from activations.terminal import UserError
from activations.verify import verify as verify_store
from activations.writer import write_store

HOOKS = {"blocks.0.hook_resid_post": 4, "blocks.1.mlp.hook_post": 6}
HOOK = next(iter(HOOKS))
ROWS = (50, 1, 300)
Command = Callable[..., tuple[int, str, str]]


def datasets(index: int, dtype: str = "float32", *, gradients: bool = True) -> dict[str, Any]:
    """What shard `index` holds."""
    rng = np.random.default_rng(index)
    kinds = ("activations", "gradients") if gradients else ("activations",)
    return {
        **{
            f"{kind}/{hook}": rng.standard_normal((ROWS[index], width)).astype(DTYPES[dtype])
            for kind in kinds
            for hook, width in HOOKS.items()
        },
        **{name: rng.integers(0, 99, ROWS[index], np.int32) for name in COLUMNS},
    }


SEQUENCES_OF_TESTS = np.random.default_rng(0).integers(0, 99, (3, 2, 5), np.int32)


def write(path: Path, dtype: str = "float32", *, gradients: bool = True, **settings: Any) -> Path:
    facts: dict[str, Any] = {
        "request": {"model": "dir:none"},
        "model": {"spec": "dir:none"},
        "corpus": {},
        "forward": {"threads": 1},
        "hooks": HOOKS,
        "context_length": 5,
        "n_documents": 3,
        "shard_sequences": 1,
        "dropped_positions": ("special",),
        "dtype": dtype,
        "gradients": gradients,
    }
    write_store(
        path,
        (datasets(index, dtype, gradients=gradients) for index in range(len(ROWS))),
        sequences=SEQUENCES_OF_TESTS,
        vocabulary={7: " the", 8: "é\n"},
        **facts | settings,
    )
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished store."""
    return write(tmp_path / "store")


def rewrite(path: Path, **changes: Any) -> None:
    """Change a manifest, and seal it as if it had been written so."""
    table = dataclasses.asdict(Store(path).manifest) | changes
    (path / MANIFEST).write_text(sealed(json.loads(json.dumps(table))))


# What was written is read


@pytest.mark.parametrize("compression", ["none", "lzf", "gzip"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradients", [False, True])
def test_what_was_written_is_read_to_the_bit(
    tmp_path: Path, dtype: str, compression: str, gradients: bool
) -> None:
    store = Store(write(tmp_path / "s", dtype, gradients=gradients, compression=compression))
    assert len(store) == sum(ROWS)
    for index, shard in enumerate(store.manifest.shards):
        written = datasets(index, dtype, gradients=gradients)
        for name, values in written.items():
            read = store.read(shard, name)
            assert read.dtype == values.dtype
            assert read.tobytes() == values.tobytes()
            assert store.read(shard, name, 20, 40).tobytes() == values[20:40].tobytes()
            blocks = [(0, 3), (17, 30), (299, 999)]
            parts = list(store.rows(shard, name, blocks))
            for (start, stop), part in zip(blocks, parts, strict=True):
                assert part.tobytes() == values[start:stop].tobytes()
            assert np.concatenate(list(store.rows(shard, name))).tobytes() == values.tobytes()
        for hook in HOOKS:
            x = store.activations(shard, hook)
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, written[f"activations/{hook}"].astype(np.float32))
    every = [datasets(index, gradients=gradients) for index in range(len(ROWS))]
    for name in COLUMNS:
        np.testing.assert_array_equal(
            store.column(name), np.concatenate([shard[name] for shard in every])
        )
    np.testing.assert_array_equal(store.sequences, SEQUENCES_OF_TESTS)
    assert store.vocabulary == {7: " the", 8: "é\n"}
    assert {hook: store.width(hook) for hook in HOOKS} == HOOKS


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_h5py_reads_the_same_values(tmp_path: Path, dtype: str) -> None:
    path = write(tmp_path / "store", dtype)
    for index in range(len(ROWS)):
        with h5py.File(path / f"shard-{index:05d}.h5") as file:
            for name, values in datasets(index, dtype).items():
                plain = file[name]
                assert isinstance(plain, h5py.Dataset)
                np.testing.assert_array_equal(plain[...], values.astype(plain.dtype))
                if name.startswith("activations"):
                    assert plain.dtype == (np.float16 if dtype == "float16" else np.float32)


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.inf, -np.inf]])
@pytest.mark.parametrize("kind", ["activations", "gradients"])
def test_a_row_that_is_not_finite_is_named(tmp_path: Path, kind: str, bad: list[float]) -> None:
    def poisoned(index: int) -> dict[str, Any]:
        data = datasets(index)
        if index == 2:
            data[f"{kind}/{HOOK}"][271, : len(bad)] = bad
        return data

    store = Store(write(tmp_path / "whole"))
    manifest = store.manifest
    facts = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(Manifest)
        if field.name not in ("n_sequences", "files", "shards", "complete", "schema")
    }
    write_store(
        tmp_path / "bad", map(poisoned, range(3)), sequences=SEQUENCES_OF_TESTS, vocabulary={},
        **facts,
    )  # fmt: skip
    store = Store(tmp_path / "bad")
    token = datasets(2)["token"][271]
    with pytest.raises(StoreError, match=rf"shard-00002\.h5: row 271 \(token {token}\) of {kind}/"):
        list(store.rows(store.manifest.shards[2], f"{kind}/{HOOK}"))
    assert list(store.rows(store.manifest.shards[2], f"{kind}/{HOOK}", [(0, 271), (272, 300)]))


def test_what_the_store_does_not_hold_is_told(tmp_path: Path) -> None:
    store = Store(write(tmp_path / "store", gradients=False))
    shard = store.manifest.shards[0]
    for use in (store.width, lambda hook: list(store.rows(shard, f"activations/{hook}"))):
        with pytest.raises(StoreError, match=f"no hook 'blocks.9.x'; it holds {HOOK}, blocks"):
            use("blocks.9.x")
    with pytest.raises(StoreError, match="without gradients"):
        list(store.rows(shard, f"gradients/{HOOK}"))


# Nothing that has changed looks whole


def test_a_flipped_bit_anywhere_is_found(path: Path) -> None:
    """200 random ones over all bytes of all files, each put back before the next."""
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    assert len(files) == len(ROWS) + 3
    rng = np.random.default_rng(0)
    verify_store(path)
    for _ in range(200):
        file = files[rng.integers(len(files))]  # each file as often, however small
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        with pytest.raises(UserError, match=file.name):
            verify_store(path)
        file.write_bytes(good)
    verify_store(path)


def test_opening_a_damaged_shard_ends(path: Path) -> None:
    """HDF5 checks no sums of its own here; a process of its own, since a hang stays in its C code.

    The bits are of what HDF5 reads to open the file: everything that is not rows or columns.
    """
    script = """
import sys
import numpy as np
from pathlib import Path
from activations.store import Store, StoreError
path = Path(sys.argv[1])
file = path / "shard-00000.h5"
good = file.read_bytes()
rng = np.random.default_rng(0)
places = np.flatnonzero(np.frombuffer(good, np.uint8))
for place in rng.choice(places[(places < 4096) | (places > len(good) - 4096)], 400):
    bad = bytearray(good)
    bad[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(bad)
    try:
        Store(path)
    except StoreError:
        pass
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=120)


@pytest.mark.parametrize("end", ["\n", " ", "{}", "\x00"])
def test_a_manifest_has_one_form_only(path: Path, end: str) -> None:
    file = path / MANIFEST
    text = file.read_text()
    assert Store(path).manifest.to_json() == text
    file.write_text(text + end)
    with pytest.raises(StoreError, match=r"manifest\.json: cannot be read"):
        Store(path)
    file.write_text(json.dumps(json.loads(text)))
    with pytest.raises(StoreError, match="checksum does not fit"):
        Store(path)


def test_verify_names_every_file(path: Path, run_command: Command) -> None:
    code, out, err = run_command("activations.verify", path)
    assert (code, out) == (0, f"{path}: the checksums of all 3 shards and the manifest fit.\n")
    (path / "shard-00000.h5").unlink()
    for name in ("shard-00002.h5", SEQUENCES):
        with (path / name).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 128]))
    code, out, err = run_command("activations.verify", path)
    assert (code, out) == (2, "")
    message = err[err.index("error: ") :]
    assert "3 of 5 files are not as they were written" in message
    assert "shard-00000.h5: is missing" in message
    for name in ("shard-00002.h5", SEQUENCES):
        assert f"{name}: is damaged" in message
    assert "shard-00001.h5" not in message
    assert VOCABULARY not in message
    assert "Traceback" not in err


def test_a_shard_that_is_cut_or_gone_is_named_on_opening(path: Path) -> None:
    file = path / "shard-00001.h5"
    content = file.read_bytes()
    for cut in (0, 10, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(StoreError, match=r"shard-00001\.h5: has [\d,]+ bytes"):
            Store(path)
    file.unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.h5: is missing"):
        Store(path)
    file.write_bytes(bytes(len(content)))
    with pytest.raises(StoreError, match=r"shard-00001\.h5: cannot be read"):
        Store(path)
    file.write_bytes(content)
    for name in (SEQUENCES, VOCABULARY):
        (path / name).rename(path / "away")
        with pytest.raises(StoreError, match=f"{name}: is missing"):
            Store(path)
        (path / "away").rename(path / name)
    Store(path)


def test_a_shard_of_another_store_is_told(path: Path, tmp_path: Path) -> None:
    """Of the same size and shape: only its mark tells."""
    other = write(tmp_path / "other", model={"spec": "dir:some"})
    name = "shard-00001.h5"
    assert (other / name).stat().st_size == (path / name).stat().st_size
    shutil.copy(other / name, path / name)
    with pytest.raises(StoreError, match=r"shard-00001\.h5: is a shard of another store"):
        Store(path)


def test_swapped_shards_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "store")
    first, last = path / "shard-00000.h5", path / "shard-00002.h5"
    manifest = Store(path).manifest
    first.rename(path / "away")
    last.rename(first)
    (path / "away").rename(last)
    shards = [dataclasses.asdict(shard) for shard in manifest.shards]
    for one, other in ((0, 2), (2, 0)):
        twin = manifest.shards[other]
        shards[one] |= {"rows": twin.rows, "bytes": twin.bytes, "sha256": twin.sha256}
    table = dataclasses.asdict(manifest) | {"shards": shards}
    (path / MANIFEST).write_text(sealed(json.loads(json.dumps(table))))
    verify_store(path)  # every checksum fits
    with pytest.raises(StoreError, match=r"shard-00000\.h5: is a shard .* or another shard"):
        Store(path)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (f"activations/{HOOK}", "delete", f"holds no activations/{HOOK}"),
        (f"gradients/{HOOK}", "delete", f"holds no gradients/{HOOK}"),
        (f"activations/{HOOK}", "cut", r"is \(1, 3, 'float32'\), but the manifest tells"),
        (f"activations/{HOOK}", "narrow", r"is \(1, 4, 'float16'\), but the manifest tells"),
    ],
)
def test_a_hook_that_some_shard_lacks_is_told(
    path: Path, name: str, change: str, expected: str
) -> None:
    manifest = Store(path).manifest
    file = path / "shard-00001.h5"
    with h5py.File(file, "r+") as opened:
        values = datasets(1)[name]
        del opened[name]
        if change == "cut":
            opened[name] = values[:, :3]
        if change == "narrow":
            opened[name] = values.astype(np.float16)
    shards = [dataclasses.asdict(shard) for shard in manifest.shards]
    shards[1] |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    table = dataclasses.asdict(manifest) | {"shards": shards}
    (path / MANIFEST).write_text(sealed(json.loads(json.dumps(table))))
    with pytest.raises(StoreError, match=rf"shard-00001\.h5: .*{expected}"):
        Store(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 4}, "schema 4, but this version reads schema 3. Update"),
        ({"schema": 2}, "schema 2, but this version reads schema 3. Delete"),
        ({"schema": None}, "schema"),
        ({"complete": "yes"}, "complete: expected a valid boolean"),
        ({"complete": False}, r"unfinished \(3 of 3 shards\)"),
        ({"shards": [{"index": 0}]}, r"shards\.0\.rows: missing"),
        ({"dtype": "int8"}, "dtype"),
        ({"colour": "red"}, "colour: unknown key"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    path: Path, change: dict[str, Any], expected: str
) -> None:
    rewrite(path, **change)
    with pytest.raises(UserError, match=expected):
        Store(path)
    with pytest.raises(UserError, match=expected):
        verify_store(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '"manifest"', "[" * 10**5, "\x00" * 9])
def test_a_manifest_that_is_torn_is_refused(path: Path, text: str) -> None:
    (path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=MANIFEST):
        Store(path)


def test_what_is_no_store_is_told_and_never_written_over(tmp_path: Path) -> None:
    for place in (tmp_path / "absent", tmp_path):
        with pytest.raises(StoreError, match="no store there"):
            Store(place)
    mine = tmp_path / "film.partial"
    mine.write_text("a download of the user's own")
    for place in (tmp_path, mine):
        for use in (Store, verify_store, write):
            with pytest.raises(StoreError, match=r"is no store|cannot be made into a store"):
                use(place)
    assert [file.name for file in tmp_path.iterdir() if file.name[0] != "."] == ["film.partial"]
    assert mine.read_text() == "a download of the user's own"


@contextlib.contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Root may read everything: be somebody else for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", [MANIFEST, "shard-00001.h5", SEQUENCES])
def test_a_file_that_may_not_be_read_is_told(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "store")
        for place in (Path(folder), path):
            place.chmod(0o755)
        for file in path.iterdir():
            file.chmod(0o644)
        with an_ordinary_user():
            verify_store(path)
        (path / name).chmod(0)
        with an_ordinary_user():
            with pytest.raises(StoreError, match=f"{name}: cannot be read .*ermission denied"):
                verify_store(path)
            if name != SEQUENCES:
                with pytest.raises(StoreError, match=f"{name}: cannot be read .*ermission denied"):
                    Store(path)
