"""Size, write and read speed of a store's rows under each type and compression.

    python -m experiments.benchmarks.compression STORE [HOOK]

One JSON line a combination, `size` as a share of float32 without compression. Written and read
through memory, so that the disk is not part of it; MB are of float32. `ratio` is the read speed
beside float32 without compression.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import h5py
import numpy as np

from activations import precision
from activations.precision import Compression
from activations.store import Store
from activations.terminal import run_command
from experiments.benchmarks.common import report

ROUNDS = 5
COMPRESSIONS: tuple[Compression, ...] = ("none", "lzf", "gzip")


def main() -> None:
    """Print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("hook", nargs="?")
    arguments = parser.parse_args()
    store = Store(arguments.store)
    hook = arguments.hook or next(iter(store.manifest.hooks))
    x = store.activations(store.manifest.shards[0], hook)
    _, _, baseline = measure(x, "none")
    for dtype in precision.DTYPES.values():
        for compression in COMPRESSIONS:
            size, write, read = measure(x.astype(dtype), compression)
            scale = 4 / dtype.itemsize
            report(
                "compression",
                [(ours * scale, theirs) for ours, theirs in zip(read, baseline, strict=True)],
                shape=f"{dtype.name}, {compression}, {hook}, {x.shape}",
                unit="MB/s read",
                peer_name="float32, none",
                size=round(size / x.nbytes, 4),
                write=round(statistics.median(write) * scale, 1),
            )


def measure(x: np.ndarray, compression: Compression) -> tuple[int, list[float], list[float]]:
    """Bytes stored, and MB/s of each round's write and read."""
    write, read, size = [], [], 0
    for _ in range(ROUNDS):
        with h5py.File("memory.h5", "w", driver="core", backing_store=False) as file:
            started = time.perf_counter()
            precision.write(file, "x", x, compression)
            file.flush()
            write.append(x.nbytes / 1e6 / (time.perf_counter() - started))
            dataset = file["x"]
            assert isinstance(dataset, h5py.Dataset)
            size = dataset.id.get_storage_size()
            started = time.perf_counter()
            y = precision.read(dataset)
            read.append(x.nbytes / 1e6 / (time.perf_counter() - started))
            assert y.tobytes() == x.tobytes()
    return size, write, read


if __name__ == "__main__":
    run_command(main)
