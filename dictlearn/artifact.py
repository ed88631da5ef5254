"""Save and load a run: dictionary.safetensors for the arrays, dictionary.json for the rest.

A run directory holds, beside these two, config.toml (every default written out), train.jsonl (a
line a step) and metrics.json (held-out figures). While a fit runs, and after one that was stopped,
it also holds a file UNFINISHED that says how far it came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import filelock
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import jaxtyped

from activations.files import replace_file
from activations.terminal import UserError
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.registry import ENCODERS

SCHEMA = 2
WEIGHTS, METADATA, METRICS = "dictionary.safetensors", "dictionary.json", "metrics.json"
CHECKPOINT, UNFINISHED = "checkpoint.safetensors", "UNFINISHED"


class ArtifactError(UserError):
    """A run that is absent, unfinished or damaged."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      coder: raw activations to codes and back.
      metadata: where it came from (model, hook, store, split, solver, seed, versions).
      metrics: held-out figures.
    """

    path: Path
    coder: Coder
    metadata: dict[str, Any]
    metrics: dict[str, Any]

    def check_weights(self, sha256: str) -> None:
        """Raise UserError where a model's weights are not those that its rows come from."""
        told = self.metadata["model"]
        if sha256 != told["weights_sha256"]:
            raise UserError(f"{self.path}: {told['spec']} holds other weights than at its harvest")

    def check_store(self, path: Path, sha256: str) -> None:
        """Raise UserError where a store's manifest is not that of the run's rows."""
        if sha256 != self.metadata["store"]["manifest_sha256"]:
            raise UserError(f"{self.path}: was fitted on another store than {path} is now")


def check_place(output: Path | None, *, overwrite: bool) -> None:
    """Judge the place that a user named for a run, before anything is begun.

    Raises:
      UserError: it holds a run and may not be overwritten, or it holds something else.
    """
    if overwrite and output is None:
        raise UserError("--overwrite: the config names no output; each run gets a fresh directory")
    if output is None:
        return
    if (old := _aside(output)).exists() and not output.exists():
        old.rename(output)  # a replacement was killed before it began
    if not output.exists():
        return
    ours = any((output / name).exists() for name in (METADATA, UNFINISHED))
    if not output.is_dir() or (any(output.iterdir()) and not ours):
        raise UserError(f"output: {output} is there, and is not a run; name another place")
    if ours and not overwrite:
        unfinished = (output / UNFINISHED).exists()
        state = "an unfinished" if unfinished else "a finished"
        raise UserError(
            f"output: {output} already holds {state} run; "
            "pass --overwrite to replace it, or name another place"
            + (f"; or go on with it: python -m dictlearn.fit {output}" if unfinished else "")
        )


@contextlib.contextmanager
def directory(output: Path | None, name: str, *, overwrite: bool) -> Iterator[Path]:
    """A directory for a run: `output`, or a fresh runs/<name>-NNN. It says UNFINISHED meanwhile.

    A run that it replaces is kept until this one is done. Where the fit fails before its first
    checkpoint, the directory is removed, and what it replaces is put back; later it stays, and the
    fit can go on (`unfinished`).

    Raises:
      UserError: the place cannot be written to, another fit writes there, or the disk is full.
    """
    with contextlib.ExitStack() as stack:
        try:
            run = _fresh(Path("runs"), name) if output is None else output
            stack.enter_context(_locked(run))
            check_place(output, overwrite=overwrite)  # again: nobody else can write now
            old = _put_aside(run) if output is not None else None
            run.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise UserError(f"output: no run can be written there ({error})") from None
        stack.enter_context(_unfinished(run, old))
        yield run


@contextlib.contextmanager
def unfinished(run: Path) -> Iterator[Path]:
    """The directory of a fit that was stopped, to go on with.

    Raises:
      UserError: it holds no unfinished run, or another fit writes there.
    """
    if not (run / UNFINISHED).exists():
        state = "is a finished run" if (run / METADATA).exists() else "holds no run"
        raise UserError(f"{run}: {state}; name a config, or the directory of an unfinished run")
    if not (run / CHECKPOINT).exists():
        raise UserError(f"{run}: has no checkpoint yet; fit {run / 'config.toml'} again")
    old = _aside(run)
    with _locked(run), _unfinished(run, old if old.exists() else None):
        yield run


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Keep other fits away; the lock dies with its holder."""
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_name(f".{run.name}.lock")
    try:
        with filelock.FileLock(file, timeout=0):
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
    except filelock.Timeout:
        raise UserError(f"output: another fit is writing to {run}") from None


def _aside(run: Path) -> Path:
    """Where a run is kept while another takes its place."""
    return run.with_name(f".{run.name}.replaced")


def _put_aside(run: Path) -> Path | None:
    """Move what a run will replace out of its way; what a killed replacement left is sorted out."""
    old = _aside(run)
    if old.exists() and (run / UNFINISHED).exists():
        shutil.rmtree(run)  # what the killed one had begun
    elif run.exists():
        shutil.rmtree(old, ignore_errors=True)
        run.rename(old)
    return old if old.exists() else None


@contextlib.contextmanager
def _unfinished(run: Path, old: Path | None) -> Iterator[None]:
    """Say UNFINISHED until the end; after a failure, leave what `directory` promises."""
    go_on = f"python -m dictlearn.fit {run}"
    try:
        text = f"it is running, or was killed. Go on: {go_on} (after its first checkpoint)."
        replace_file(run / UNFINISHED, text.encode())
        yield
        (run / UNFINISHED).unlink()
    except BaseException as error:
        stays = (run / CHECKPOINT).exists()
        if not stays:
            shutil.rmtree(run)
            if old is not None:
                old.rename(run)
        kept = f"what was fitted is kept. Go on: {go_on}" if stays else "nothing was fitted yet"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{run}: no space left on the device; {kept}") from None
        if isinstance(error, KeyboardInterrupt) and stays:
            raise KeyboardInterrupt(kept) from None
        if isinstance(error, UserError) and stays:
            raise type(error)(f"{error}\n{kept}") from None
        raise
    (run / CHECKPOINT).unlink(missing_ok=True)
    if old is not None:
        shutil.rmtree(old)


def _fresh(folder: Path, name: str) -> Path:
    """runs/<name>-NNN with the next free number, also when two fits ask at once."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [path.name.removeprefix(f"{name}-") for path in folder.glob(f"{name}-*")]
    number = max((int(text) for text in taken if text.isdigit()), default=0)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            (folder / f"{name}-{number:03d}").mkdir()
            return folder / f"{name}-{number:03d}"


def save(path: Path, coder: Coder, metadata: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Write a run's dictionary and figures into its directory, each file whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    encoder = _take_apart(coder.encoder, "encoder.", arrays)
    for part in ("dictionary", "normaliser"):
        _take_apart(getattr(coder, part), f"{part}.", arrays)
    table = {"schema": SCHEMA, "encoder": encoder, **metadata}
    replace_file(path / WEIGHTS, safetensors.numpy.save(arrays))
    replace_file(path / METADATA, _json(table))
    replace_file(path / METRICS, _json(metrics))


def load(path: Path | str) -> Run:
    """Load a finished run.

    Raises:
      ArtifactError: there is no run, it is unfinished, or a file in it is damaged.
    """
    path = Path(path)
    metadata, metrics = read_metadata(path)
    file = path / WEIGHTS
    try:
        arrays = safetensors.numpy.load_file(file)
        coder = Coder(
            normaliser=Normaliser(*_arrays(arrays, "normaliser.", "mean", "scale", "carriers")),
            dictionary=Dictionary(*_arrays(arrays, "dictionary.", "atoms", "bias")),
            encoder=_put_together(metadata["encoder"], "encoder.", arrays),
        )
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file}: is not a dictionary that this version can read "
            f"({type(error).__name__}: {error})"
        ) from None
    with jaxtyped("context"):  # m and d are the same throughout
        if not all(isinstance(array, hint) for array, hint in _declared(coder)):
            raise ArtifactError(f"{file}: its arrays do not fit together, or hold no floats")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ArtifactError(f"{file}: holds NaN or infinity")
    return Run(path, coder, metadata, metrics)


def read_metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A finished run's metadata and metrics, without its arrays. Errors as `load`."""
    if (path / UNFINISHED).exists():
        raise ArtifactError(f"{path}: the run is unfinished: {(path / UNFINISHED).read_text()}")
    if not (path / METADATA).exists():
        raise ArtifactError(f"{path}: no run there (it has no {METADATA})")
    tables = []
    for name in (METADATA, METRICS):
        try:
            table = json.loads((path / name).read_text())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path / name}: cannot be read ({error})") from None
        if not isinstance(table, dict):
            raise ArtifactError(f"{path / name}: is not a table")
        tables.append(table)
    if tables[0].get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path / METADATA}: schema {tables[0].get('schema')!r}, but this version reads schema "
            f"{SCHEMA}; update dictlearn-interp"
        )
    return tables[0], tables[1]


def hyperparameters(module: eqx.Module) -> dict[str, Any]:
    """A module's fields that are not arrays, as a table; modules inside become tables inside."""
    return _take_apart(module, "", {})


def _take_apart(module: Any, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if isinstance(value, eqx.Module):
            table[field.name] = _take_apart(value, f"{prefix}{field.name}.", arrays)
        elif isinstance(value, jax.Array):
            arrays[prefix + field.name] = np.asarray(value, order="C")
        else:
            table[field.name] = value
    return table


def _put_together(table: dict[str, Any], prefix: str, arrays: dict[str, np.ndarray]) -> Any:
    """The inverse of `_take_apart`, for a module whose `name` stands in the registry."""
    kind = ENCODERS[table["name"]]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if prefix + field.name in arrays:
            values[field.name] = jnp.asarray(arrays[prefix + field.name])
        elif isinstance(table[field.name], dict):
            values[field.name] = _put_together(table[field.name], f"{prefix}{field.name}.", arrays)
        else:
            values[field.name] = table[field.name]
    return kind(**values)


def _declared(module: Any) -> Iterator[tuple[jax.Array, Any]]:
    """Every array of a module and of those inside, with its field's annotation."""
    for name, hint in typing.get_type_hints(type(module)).items():
        value = getattr(module, name)
        if isinstance(value, eqx.Module):
            yield from _declared(value)
        elif isinstance(value, jax.Array):
            yield value, hint


def _arrays(arrays: dict[str, np.ndarray], prefix: str, *names: str) -> list[jax.Array]:
    return [jnp.asarray(arrays[prefix + name]) for name in names]


def _json(table: dict[str, Any]) -> bytes:
    return (json.dumps(finite(table), indent=1, default=str, allow_nan=False) + "\n").encode()


def finite(value: Any) -> Any:
    """The same with null for every number that is not finite: JSON has none of those."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
