"""Answers that are dear to come by, kept on disk as JSON, so that what was stopped goes on.

They lie in the cache folder (`DICTLEARN_CACHE`, or the platform's own place for caches), a file
each, by a hash of all that they depend on. Any of them may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from activations.files import replace_file, sealed, unseal
from activations.gguf import cache_folder
from activations.terminal import UserError


def place(kind: str, key: Any) -> Path:
    """Where the answer to a key, anything that JSON can hold, is kept."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return cache_folder() / kind / f"{name}.json"


def read(file: Path) -> dict[str, Any] | None:
    """What is kept there, if it is there, whole."""
    try:
        return unseal(file.read_text())
    except (OSError, ValueError):
        return None


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is kept there; made, and kept, where another process was not faster.

    Raises:
      UserError: the folder is not to be written.
    """
    if (found := read(file)) is not None:
        return found
    lock = filelock.FileLock(file.with_suffix(".lock"))
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        found = read(file)
        if found is None:
            found = make()  # whose own errors are not the folder's
            with _writing(file):
                replace_file(file, sealed(found).encode())
        return found
    finally:
        lock.release()


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file.parent}: answers cannot be kept ({error.strerror or error}); name a folder "
            "with room in the environment variable DICTLEARN_CACHE"
        ) from None
