"""The figures of an evaluated transplant as a Markdown table."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(held: dict[str, Any]) -> str:
    """A row a model; a cell is empty where there is no such figure.

    Arguments:
      held: what `evals.transplant` writes as JSON.
    """
    sets = [Path(file).stem for file in held["settings"]["zero_shot"]]
    head = [
        "", "bits per byte", "95 %", "above OUT", "nats, new", "nats, shared", "held-out cosine",
        "error",
    ]  # fmt: skip
    lines = [[*head, *sets], ["---"] * (len(head) + len(sets))]
    for name, told in held["models"].items():
        kinds = [told.get("tokens", {}).get(kind, {}) for kind in ("new", "shared")]
        hidden = told.get("held_out", [{}])[0]
        zero_shot = [told.get("zero_shot", {}).get(one, {}) for one in sets]
        lines.append([
            name, _number(told["bits_per_byte"]), _range(told["bits_per_byte_interval"]),
            _above(told.get("above_out")), *(_number(kind.get("nats")) for kind in kinds),
            _number(hidden.get("cosine")), _number(hidden.get("error")),
            *(_number(one.get("acc_norm")) for one in zero_shot),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _range(interval: list[float] | tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _above(told: dict[str, Any] | None) -> str:
    if told is None:
        return ""
    return f"{told['bits_per_byte']:+.3f} ({_range(told['bits_per_byte_interval'])})"
