"""Results of an experiment: a JSON line each, so that one that was killed goes on where it was.

Without a file nothing is found, and nothing written.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from dictlearn.artifact import finite
from dictlearn.config import FitConfig, resolved

Line = dict[str, Any]


def settings_of(config: FitConfig) -> Line:
    """All that decides what a fit gives, but for the rows; defaults are written out."""
    table = resolved(config, None)
    data = {key: value for key, value in table["data"].items() if key not in ("store", "hook")}
    own = {key: table[key] for key in ("seed", "solver", "fit")}
    return own | {"hook": config.data.hook, "data": data}


def all_of(wanted: Line, file: Path | None) -> list[Line]:
    """Every line that says all of `wanted`, oldest first. A line that a kill has cut is no line."""
    found = []
    for text in file.read_text().splitlines() if file and file.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if wanted.items() <= line.items():
                found.append(line)
    return found


def find(wanted: Line, file: Path | None) -> Line | None:
    """The newest of them, if any."""
    return next(reversed(all_of(wanted, file)), None)


def add(line: Line, file: Path | None) -> Line:
    """Write a line, NaN as null; the line as it is read again."""
    text = json.dumps(finite(line), allow_nan=False)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+") as lines:
            lines.seek(0)
            cut = not ("\n" + lines.read()).endswith("\n")  # by a kill: begin a line of our own
            lines.write("\n" * cut + text + "\n")
    return json.loads(text)
