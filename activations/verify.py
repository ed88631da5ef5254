"""Read every file of a store and compare its checksum:  python -m activations.verify STORE."""

from __future__ import annotations

import argparse
from pathlib import Path

from activations.store import verify
from activations.terminal import run_command


def main() -> None:
    """Entry of `python -m activations.verify`."""
    parser = argparse.ArgumentParser(prog="python -m activations.verify", description=__doc__)
    parser.add_argument("store", type=Path)
    store = parser.parse_args().store
    manifest = verify(store)
    print(f"{store}: the checksums of all {len(manifest.shards)} shards and the manifest fit.")


if __name__ == "__main__":
    run_command(main)
