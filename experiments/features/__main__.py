"""A static site of a run's features:  python -m experiments.features RUN [--out DIR].

DIR/index.html sorts and searches them; a page a feature shows where it fires, how often and how
much, what the logit lens says, its nearest atoms, what fires together with it, and the effect of
steering where `evals.run --evals steering` has measured it. No server and no network are needed.
What a missing store or model would tell is left out, and said so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from activations.terminal import UserError, run_command
from evals.explore import Explorer
from experiments.features.site import write


def main() -> None:
    """Entry of `python -m experiments.features`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.features", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="a run, or another's dictionary")
    parser.add_argument(
        "--out", type=Path, help="default: RUN/features; of others runs/NAME-features"
    )
    parser.add_argument("--rows", type=int, help="of the store, at most so many; default: all")
    parser.add_argument("--overwrite", action="store_true", help="replace the site that is there")
    arguments = parser.parse_args()
    if arguments.rows is not None and arguments.rows < 1:
        raise UserError(f"--rows: expected at least 1, got {arguments.rows}")
    look = Explorer(arguments.run, rows=arguments.rows)
    path = look.run.path
    own = path / "features"
    if "store" not in look.run.metadata:
        own = Path("runs") / f"{path.absolute().name}-features"
    out = arguments.out or own
    write(look, out, overwrite=arguments.overwrite)
    print(f"{out / 'index.html'}: {len(look.run.coder.dictionary.atoms):,} features")


if __name__ == "__main__":
    run_command(main)
