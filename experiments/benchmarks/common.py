"""What benchmarks share: the JSON line, cold files, and a store of noise."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from activations.precision import DTYPES, Precision
from activations.store import Store
from activations.writer import write_store

HOOK = "blocks.0.hook_resid_post"


def report(
    name: str,
    pairs: list[tuple[float, float]],
    *,
    shape: str,
    unit: str,
    peer_name: str,
    device: str | None = None,
    **more: Any,
) -> None:
    """Print the line: medians of ours and the peer's, and of the ratio within each round."""
    line = {
        "name": name,
        "shape": shape,
        "device": device or f"cpu x{len(os.sched_getaffinity(0))}",
        "unit": unit,
        "ours": round(statistics.median(pair[0] for pair in pairs), 1),
        "peer": round(statistics.median(pair[1] for pair in pairs), 1),
        "peer_name": peer_name,
        "ratio": round(statistics.median(pair[0] / pair[1] for pair in pairs), 4),
    }
    print(json.dumps(line | more), flush=True)


def paired(
    ours: Callable[[], float], peer: Callable[[], float], rounds: int
) -> list[tuple[float, float]]:
    """Both once unmeasured, then by turns."""
    ours()
    peer()
    return [(ours(), peer()) for _ in range(rounds)]


def evict(path: Path) -> None:
    """Have the system forget the files under `path`, so that they are read from the disk."""
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(path: Path) -> int:
    """Read every shard from its first byte to its last; how many bytes that was."""
    buffer = memoryview(bytearray(2**22))
    total = 0
    for file in sorted(path.glob("shard-*.h5")):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total


def noise_store(
    path: Path, *, mib: int, width: int, shard_rows: int = 16384, dtype: Precision = "float32"
) -> Store:
    """A store of normal noise, about `mib` large, a document a thousand rows."""
    n_shards = max(1, round(mib * 2**20 / (shard_rows * width * DTYPES[dtype].itemsize)))
    rng = np.random.default_rng(0)

    def datasets(index: int) -> dict[str, np.ndarray]:
        row = np.arange(index * shard_rows, (index + 1) * shard_rows, dtype=np.int32)
        x = rng.standard_normal((shard_rows, width), np.float32).astype(DTYPES[dtype])
        zero = np.zeros(shard_rows, np.int32)
        return {
            f"activations/{HOOK}": x,
            "token": row % 997,
            "document": row // 1000,
            "sequence": zero,
            "position": zero,
        }

    write_store(
        path, map(datasets, range(n_shards)), sequences=np.zeros((n_shards, 2, 8)), vocabulary={},
        request={}, model={"description": "noise"}, corpus={}, forward={}, hooks={HOOK: width},
        context_length=8, n_documents=n_shards * shard_rows // 1000, shard_sequences=1,
        dropped_positions=(), dtype=dtype,
    )  # fmt: skip
    return Store(path)
