"""What a person sees of a run in the terminal:  python -m dictlearn.report RUN."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from activations.terminal import run_command
from dictlearn import artifact

_CONSOLE = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line."""
    _CONSOLE.print(line, markup=False)


def show_plan(lines: dict[str, str]) -> None:
    """What a dry run found."""
    say("dry run: nothing is read from a model, nothing is written")
    for key, value in lines.items():
        say(f"  {key:15} {value}")


def show(path: Path) -> None:
    """A finished run: its figures beside its control's and its sibling's, and what to try next."""
    metadata, metrics = artifact.read_metadata(path)
    if missing := {"model", "hook", "solver", "split", "store"} - metadata.keys():
        raise artifact.ArtifactError(f"{path}: its metadata lack {', '.join(sorted(missing))}")
    sibling = _sibling(path, metadata)
    say("")
    say(f"{path}: {describe(metadata)}")
    say(f"  model   {metadata['model'].get('description', 'not named')}")
    say(f"  hook    {metadata['hook']}, {metadata['n_training_rows']:,} training rows")
    say(
        f"  test    {metrics['n_tokens']:,} tokens of {metrics['n_documents']} documents "
        "that neither fit nor selection saw"
    )
    say("")
    _CONSOLE.print(_table(metadata, metrics, sibling), soft_wrap=False)
    say("")
    if metrics["gain_bulk"] is not None:
        low, high = metrics["gain_bulk_interval"]
        say(
            f"fvu_bulk against the control's: {_signed(-metrics['gain_bulk'])} "
            f"(95 % interval {_signed(-high)} to {_signed(-low)})."
        )
    say(f"control: untrained rows of the data as atoms, coded by {_control(metadata)}.")
    say("fvu: variance unexplained, lower is better. fvu_bulk: without the few")
    say("dimensions and rows that hold most of it. Lower error is not truer features.")
    say("")
    say("Try next:")
    for line in _next(path, metadata, sibling):
        say(f"  {line}")


def describe(metadata: dict[str, Any]) -> str:
    """E.g. "ksvd, 2,048 atoms, at most 32 a token"."""
    solver = metadata["solver"]
    _, k = sparsity(solver)
    most = "at most" if solver.get("variant", {}).get("name") not in _ON_AVERAGE else "about"
    free = "the tolerance takes" if "encoder" in solver else "lower the error"
    text = f"{most} {k} a token" if k else f"as many a token as {free}"
    return f"{label(solver)}, {solver['n_atoms']:,} atoms, {text}"


# SAE variants whose k is a mean over rows.
_ON_AVERAGE = ("batch_topk", "relu", "jumprelu")


def label(solver: dict[str, Any]) -> str:
    """What tells one solver from another, e.g. "ksvd", "topk sae", "matryoshka batch_topk sae"."""
    words = ["frozen"] if solver.get("frozen") else []
    words += ["matryoshka"] if solver.get("matryoshka") else []
    words += [solver["variant"]["name"]] if "variant" in solver else []
    return " ".join([*words, solver["name"]])


def _control(metadata: dict[str, Any]) -> str:
    """What codes the control: a pursuit codes its own; an SAE's is OMP with the same k."""
    encoder = metadata["encoder"]["name"]
    if encoder not in ("omp", "linear"):
        return encoder
    return f"OMP with the same {'k' if sparsity(metadata['solver'])[1] else 'tolerance'}"


def sparsity(solver: dict[str, Any]) -> tuple[str | None, int | None]:
    """Where k stands in the solver's table, and what it is."""
    for part in ("encoder", "variant"):
        if part in solver:
            return f"solver.{part}.k", solver[part].get("k")
    return None, None


def _table(
    metadata: dict[str, Any],
    metrics: dict[str, Any],
    sibling: tuple[Path, dict[str, Any], dict[str, Any]] | None,
) -> Table:
    systems = [
        (label(metadata["solver"]), metrics, ""),
        ("control", metrics, "control_"),
    ]
    if sibling is not None:
        systems.append((f"{label(sibling[1]['solver'])} ({sibling[0].name})", sibling[2], ""))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("", *(name for name, _, _ in systems)):
        table.add_column(title)

    def row(title: str, key: str, show: Callable[[Any], str]) -> None:
        figures = [of.get(prefix + key) for _, of, prefix in systems]
        table.add_row(title, *("" if value is None else show(value) for value in figures))

    row("fvu_bulk", "fvu_bulk", "{:.4f}".format)
    row("  95 %", "fvu_bulk_interval", _interval)
    row("fvu", "fvu", "{:.4f}".format)
    row("  95 %", "fvu_interval", _interval)
    row("median error", "median_error", "{:.4f}".format)
    row("L0", "l0", "{:.1f}".format)
    row("alive", "frac_alive", _percent)
    row("with a twin", "twins", _percent)
    row("fitted in", "seconds", "{:.0f} s".format)
    return table


def _interval(pair: list[float | None]) -> str:
    return "" if None in pair else f"{pair[0]:.3f} to {pair[1]:.3f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _sibling(
    path: Path, metadata: dict[str, Any]
) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """The newest finished run beside this one that differs in its solver alone.

    One that learned nothing but an encoder on another's dictionary is none.
    """

    def place(of: dict[str, Any]) -> tuple[Any, ...]:
        store, solver = of["store"]["manifest_sha256"], of["solver"]
        frozen = solver.get("frozen", False)
        settings = of["hook"], of["split"], of["data"], of["start"], frozen
        return store, *settings, solver["n_atoms"], sparsity(solver)[1]

    finished = path.parent.glob(f"[!.]*/{artifact.METADATA}")
    for file in sorted(finished, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            other, metrics = artifact.read_metadata(file.parent)
            same = place(other) == place(metadata)
        except (artifact.ArtifactError, KeyError):
            continue
        if same and label(other["solver"]) != label(metadata["solver"]):
            return file.parent, other, metrics
    return None


def _next(
    path: Path,
    metadata: dict[str, Any],
    sibling: tuple[Path, dict[str, Any], dict[str, Any]] | None,
) -> list[str]:
    key, k = sparsity(metadata["solver"])
    half = f" --set {key}={max(1, (k or 64) // 2)}" if key else " --set seed=1"
    lines = [f"python -m dictlearn.fit {path / 'config.toml'}{half}"]
    if sibling is None and metadata["name"] == "quickstart":
        lines.insert(0, "python -m dictlearn.fit experiments/quickstart-sae.toml")
    lines.append(f'dictlearn.load("{path}"), see "Look at features" in README.md')
    return lines


def main() -> None:
    """Entry of `python -m dictlearn.report`."""
    parser = argparse.ArgumentParser(prog="python -m dictlearn.report", description=__doc__)
    parser.add_argument("run", type=Path)
    path = parser.parse_args().run
    artifact.load(path)  # not for the figures: a damaged dictionary should not be shown as whole
    try:
        show(path)
    except (KeyError, TypeError, ValueError) as error:
        raise artifact.ArtifactError(
            f"{path}: {artifact.METADATA} or {artifact.METRICS} is damaged "
            f"({type(error).__name__}: {error})"
        ) from None


if __name__ == "__main__":
    run_command(main)
