"""`python -m activations.info` beside a plain sequential read of the same files from the disk.

    python -m experiments.benchmarks.info [--quick]

Both in MB/s of the store's rows, the system's copies of the files dropped first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from activations.info import tables
from activations.store import Store
from activations.terminal import run_command
from experiments.benchmarks.common import evict, noise_store, paired, plain_read, report


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a store of 256 MiB, 2 rounds")
    mib, rounds = (256, 2) if parser.parse_args().quick else (2048, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        size = sum(shard.bytes for shard in noise_store(path, mib=mib, width=640).manifest.shards)

        def ours() -> float:
            evict(path)
            started = time.perf_counter()
            list(tables(Store(path)))
            return size / 1e6 / (time.perf_counter() - started)

        def peer() -> float:
            evict(path)
            started = time.perf_counter()
            return plain_read(path) / 1e6 / (time.perf_counter() - started)

        report(
            "info",
            paired(ours, peer, rounds),
            shape=f"{mib} MiB of float32, d=640",
            unit="MB/s",
            peer_name="plain sequential read",
        )


if __name__ == "__main__":
    run_command(main)
