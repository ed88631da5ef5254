"""Join what the workers of a parallel harvest wrote:  python -m activations.merge STORE."""

from __future__ import annotations

import argparse
from pathlib import Path

from activations.terminal import run_command
from activations.writer import merge


def main() -> None:
    """Entry of `python -m activations.merge`."""
    parser = argparse.ArgumentParser(prog="python -m activations.merge", description=__doc__)
    parser.add_argument("store", type=Path)
    store = parser.parse_args().store
    manifest = merge(store)
    print(f"{store}: complete, {manifest.n_rows:,} rows in {len(manifest.shards)} shards.")


if __name__ == "__main__":
    run_command(main)
