"""The other half of saelens_export.py: SAELens loads what we wrote, and codes rows.

Run by the interpreter of its environment, as a script that imports nothing of this project:

    python -I saelens_export_peer.py FOLDER

For each FOLDER/<name>/ with rows in FOLDER/<name>.npy, codes and x_hat go to FOLDER/<name>.npz.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import numpy as np

# Modules come in by name: type checkers do not have them.
torch = importlib.import_module("torch")
sae_lens = importlib.import_module("sae_lens")


def main(folder: Path) -> None:
    """Every directory."""
    for file in sorted(folder.glob("*.npy")):
        place = file.with_suffix("")
        if (place / "omp.py").exists():
            runpy.run_path(str(place / "omp.py"))
        sae = sae_lens.SAE.load_from_disk(place)
        with torch.no_grad():
            codes = sae.encode(torch.from_numpy(np.load(file)))
            x_hat = sae.decode(codes)
        np.savez(place.with_suffix(".npz"), codes=codes.numpy(), x_hat=x_hat.numpy())
        print(place.name, sae.cfg.architecture(), sae.cfg.metadata.hook_name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
