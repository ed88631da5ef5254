"""Results in the terminal: the figures of every family, and why some are null."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table

# Of the figures that are null for one reason.
_NAMED = 3


def show(found: dict[str, dict[str, Any]]) -> None:
    """The headline of every family."""
    console = Console(highlight=False, width=120)
    table = _table("family", "figure", "value", "95 %, or +- over seeds")
    for name, envelope in found.items():
        alike = _alike(envelope["eval_result_metrics"])
        for category, values in envelope["eval_result_metrics"].items():
            for key in _figures(values) if category not in alike else ():
                ends, std = values.get(f"{key}_interval"), values.get(f"{key}_seed_std")
                told = "" if not ends or None in ends else f"{ends[0]:.4g} to {ends[1]:.4g}"
                told = told if std is None else f"+- {std:.2g}"
                table.add_row(name, f"{category}.{key}", _number(values[key], 5), told)
    console.print(table)
    for name, envelope in found.items():
        metrics = envelope["eval_result_metrics"]
        if alike := _alike(metrics):
            keys = [key for key in _figures(metrics[alike[0]])
                    if any(metrics[one][key] is not None for one in alike)]  # fmt: skip
            table = _table(name, *keys)
            for one in alike:
                table.add_row(one, *(_cell(metrics[one], key) for key in keys))
            console.print()
            console.print(table)
        told = envelope["eval_result_unstructured"]
        for why, keys in _reasons(told.get("null", {})).items():
            more = f" and {len(keys) - _NAMED} others" if len(keys) > _NAMED else ""
            console.print(f"\n{name}: {', '.join(keys[:_NAMED])}{more} null: {why}", markup=False)
        if caveat := told.get("caveat"):
            console.print(f"\n{name}: {caveat}")


def _reasons(null: dict[str, str]) -> dict[str, list[str]]:
    """Why figures are null, and which."""
    found: dict[str, list[str]] = {}
    for key, why in null.items():
        found.setdefault(why, []).append(key)
    return found


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def _alike(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Categories that hold the same figures, of a family that compares three or more of them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for category, values in metrics.items():
        groups.setdefault(tuple(_figures(values)), []).append(category)
    return next((group for group in groups.values() if len(group) > 2), [])


def _figures(values: dict[str, Any]) -> list[str]:
    """Keys of the headline: not those of an interval, a deviation, or SAEBench's own."""
    return [
        key for key in values
        if not re.search("_interval$|_seed_std$|_saebench(060)?$", key)
    ]  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "null" if value is None else f"{value:.{digits}g}"


def _cell(values: dict[str, Any], key: str) -> str:
    """A figure with its interval."""
    ends = values.get(f"{key}_interval")
    told = "" if not ends or None in ends else f" ({ends[0]:.2f} to {ends[1]:.2f})"
    return f"{_number(values[key], 3)}{told}"
