"""What a person sees of a transplant in the terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Letters of the examples of one kind.
_EXAMPLES = 60
_CONSOLE = Console(highlight=False, soft_wrap=True, width=100)
_TOLD = {
    "shared": "the same bytes",
    "role": "the same role",
    "special": "the same special token",
    "override": "as the config says",
    "approximated": "made up",
    "lost": "only the base has",
}


def show(output: Path, told: dict[str, Any]) -> None:
    """What `transplant` gave."""
    if not told["identical"]:
        show_matching(told["matching"])
        method = {key: value for key, value in told["method"].items() if key != "name"}
        settings = ", ".join(f"{key} = {value}" for key, value in method.items())
        _say(f"\nmethod   {told['method']['name']}{f' ({settings})' if settings else ''}")
    show_warnings(told["warnings"])
    _say(f"\n{output} loads with AutoModelForCausalLM and AutoTokenizer.")
    if not told["identical"]:
        _say(f"How good is it?\n  python -m evals.transplant {shlex.quote(str(output))}")


def show_warnings(warnings: list[str]) -> None:
    """A line each."""
    for warning in warnings:
        _say(f"warning: {warning}")


def show_matching(told: dict[str, Any]) -> None:
    """Which tokens match: a matching's report."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("tokens", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("for example", no_wrap=True)
    for kind, words in _TOLD.items():
        if told[kind]["count"]:
            examples = escape(_examples(told[kind]["examples"]))
            table.add_row(words, f"{told[kind]['count']:,}", examples)
    kinds = told["kinds"]
    _say(f"tokenizers   {kinds['donor']} (donor), {kinds['base']} (base)")
    _CONSOLE.print(table, soft_wrap=False)


def _examples(examples: list[Any]) -> str:
    """Those that fit into the line, each whole."""
    line = ""
    for one in examples:
        told = " -> ".join(map(repr, one)) if isinstance(one, list) else repr(one)
        longer = f"{line}, {told}" if line else told
        line = longer if len(longer) <= _EXAMPLES else line
    return line


def _say(line: str) -> None:
    _CONSOLE.print(line, markup=False)
