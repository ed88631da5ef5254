"""Read every file of a store and compare its checksum:  python -m activations.verify STORE."""

from __future__ import annotations

import argparse
from pathlib import Path

from activations.files import sha256
from activations.store import MEND, Manifest, StoreError, complete_manifest
from activations.terminal import progress, run_command


def verify(path: Path) -> Manifest:
    """Read every file of a finished store and compare its checksum, with a progress bar.

    Raises:
      StoreError: names every file that is not as it was written.
    """
    manifest = complete_manifest(path)
    sums = {shard.file: shard.sha256 for shard in manifest.shards} | manifest.files
    sizes = {name: (path / name).stat().st_size for name in sums if (path / name).exists()}
    damaged = [f"{name}: is missing" for name in sums if name not in sizes]
    with progress(total=sum(sizes.values()), unit="B", unit_scale=True, desc="verify") as bar:
        for name in sizes:
            try:
                if sha256(path / name, bar.update) != sums[name]:
                    damaged.append(f"{name}: is damaged (its checksum does not fit)")
            except OSError as error:
                damaged.append(f"{name}: cannot be read ({error.strerror})")
    if damaged:
        raise StoreError(
            f"{path}: {len(damaged)} of {len(sums)} files are not as they were "
            "written:\n  " + "\n  ".join(damaged) + f"\n{MEND}"
        )
    return manifest


def main() -> None:
    """Entry of `python -m activations.verify`."""
    parser = argparse.ArgumentParser(prog="python -m activations.verify", description=__doc__)
    parser.add_argument("store", type=Path)
    store = parser.parse_args().store
    manifest = verify(store)
    print(f"{store}: the checksums of all {len(manifest.shards)} shards and the manifest fit.")


if __name__ == "__main__":
    run_command(main)
