"""Another model's tokenizer for a model:  python -m dictlearn.transplant config.toml."""

from __future__ import annotations

import argparse
from pathlib import Path

from activations.config import read_toml, validate
from activations.terminal import run_command
from dictlearn.transplant import report
from dictlearn.transplant.config import TransplantConfig
from dictlearn.transplant.run import read_pair, transplant, warnings


def main() -> None:
    """Entry of `python -m dictlearn.transplant`."""
    parser = argparse.ArgumentParser(prog="python -m dictlearn.transplant", description=__doc__)
    parser.add_argument("config", type=Path, help="a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="say which tokens match, and stop")
    arguments = parser.parse_args()
    table = read_toml(arguments.config, arguments.set)
    config = validate(TransplantConfig, table, str(arguments.config))
    if arguments.dry_run:
        matching = read_pair(config.base, config.donor, config.overrides).matching
        report.show_matching(matching.report())
        report.show_warnings(warnings(matching))
        return
    report.show(config.output, transplant(config))


if __name__ == "__main__":
    run_command(main)
