"""Docstrings are plain text; the pages' generator reads them as Markdown. This stands between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

# "validation, test: share of ..." in a list of arguments or attributes.
_NAMES = re.compile(r"^ +(?:[\w*]+|\.{3})(?:, (?:[\w*]+|\.{3}))+:(?= |$)")
# <r, d_i> and <name>, which Markdown would take for tags; what stands in backticks is safe.
_TAG = re.compile(r"(`[^`]*`)|<(?=[A-Za-z/])")


class PlainText(griffe.Extension):
    """Escapes what Markdown would swallow, and joins several names of one line.

    Names are joined by no-break spaces: after a plain one the parser expects a type.
    """

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object, before its docstring is parsed."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(_lines(obj.docstring.value))


def _lines(text: str) -> Iterator[str]:
    """Equations, which stand indented behind an empty line, are left alone."""
    before, equation = "", False
    for line in text.split("\n"):
        equation = line.startswith("    ") and (equation or not before.strip())
        if not equation:
            line = _NAMES.sub(lambda found: found[0].replace(", ", ",\u00a0"), line)
            line = _TAG.sub(lambda found: found[1] or "&lt;", line)
        yield line
        before = line
