"""Files that are there whole or not at all, and JSON that knows when a bit of it has changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all, also across a kill or a power cut."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Whole]:
    """A new file, which takes the place of `path` once the block has ended well."""
    temporary = partial(path)
    try:
        with Whole(temporary, "w+b") as file:
            yield file
            file.check()
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


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A place beside `target`, which takes its place once the block has ended well.

    What a killed builder left is swept first: only one may build at a time.
    """
    for left in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.tmp-", dir=target.parent) as folder:
        place = Path(folder) / target.name
        yield place
        os.replace(place, target)


def partial(path: Path) -> Path:
    """Where a file is built before it is renamed."""
    return path.with_name(f"{path.name}.partial")


class Whole(io.FileIO):
    """A file that writes all it is given, and keeps the first failure for `check`.

    HDF5 can write into it: on a full disk it would otherwise leave files that look whole.
    """

    _error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of `data`, however often the system stops short."""
        left = memoryview(data).cast("B")
        size = len(left)
        with self._kept():
            while len(left):
                left = left[super().write(left) :]
        return size

    def truncate(self, size: int | None = None, /) -> int:
        """Cut or extend the file."""
        with self._kept():
            return super().truncate(size)
        return size or 0

    def check(self) -> None:
        """Raise the first OSError that there was."""
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error


def sha256(path: Path, seen: Callable[[int], Any] = lambda count: None) -> str:
    """Of a file's bytes; `seen` is told how many more have been read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(2**20))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            seen(count)
    return digest.hexdigest()


def sealed(table: dict[str, Any]) -> str:
    """The one way in which `table` and its checksum are written down."""
    digest = hashlib.sha256(_canonical(table).encode()).hexdigest()
    return _canonical({**table, "sha256": digest})


def unseal(text: str) -> dict[str, Any]:
    """The table of a `sealed` text.

    Raises:
      ValueError: the text is not, to the byte, what `sealed` wrote.
    """
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError("expected a JSON object")
    table.pop("sha256", None)
    if sealed(table) != text:
        raise ValueError("its checksum does not fit: the file was changed or damaged")
    return table


def _canonical(table: dict[str, Any]) -> str:
    return json.dumps(table, indent=1, sort_keys=True) + "\n"
