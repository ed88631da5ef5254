"""Any dictionary to numbers:  python -m evals.run RUN_OR_SAE [--evals core,...] [--quick].

Every family writes OUT/<family>.json in SAEBench's envelope (evals.results). What is there already,
of the same dictionary and settings, is not done again. A run of ours is measured on the test
documents of its store; another's dictionary on the corpus that the config names.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from activations import models, sequences
from activations.config import read_toml, validate
from activations.corpora import Corpus, PythonDocs
from activations.files import sha256
from activations.models import Model
from activations.store import SEQUENCES, Store
from activations.terminal import UserError, run_command
from dictlearn.artifact import Run
from dictlearn.interop import load
from evals import absorption, core, results
from evals.results import Result


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured where; every part can be left out for a run of ours.

    Attributes:
      model, hook: the run's own, if left out.
      corpus: text of a dictionary that is not ours; the Python docs, if left out.
      context_length: of its sequences.
      core, absorption: settings of these families, without the hook (their modules' Config).
    """

    __pydantic_config__ = {"extra": "forbid"}

    model: str | None = None
    hook: str | None = None
    corpus: Corpus | None = None
    context_length: int | None = None
    core: dict[str, Any] = dataclasses.field(default_factory=dict)
    absorption: dict[str, Any] = dataclasses.field(default_factory=dict)


_WEIGHTS = (".safetensors", ".npz")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A dictionary, and where its activations come from; the model is loaded when it is needed."""

    run: Run
    config: EvalConfig

    @property
    def ours(self) -> bool:
        """Whether it is a run of ours, with a store."""
        return "store" in self.run.metadata

    @property
    def hook(self) -> str:
        """The hook whose activations it codes."""
        hook = self.config.hook or self.run.metadata["hook"]
        if hook is None:
            raise UserError(f"{self.run.path}: does not say its hook; name one with --set hook=...")
        return hook

    @functools.cached_property
    def model(self) -> Model:
        """The language model."""
        told = self.run.metadata["model"]
        spec = self.config.model or told.get("spec")
        if spec is None:
            name = told.get("name") or "of its own"
            raise UserError(
                f"{self.run.path}: is of the model {name}; name it with --set model=..., "
                f"e.g. {models.KINDS['hf']}"
            )
        model = models.load(spec)
        if self.ours:
            self.run.check_weights(model.identity.weights_sha256)
        return model

    def text(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and documents of sequences [s c]; negative where a token does not count."""
        if self.ours and self.config.corpus is None:
            store = Store(self.run.metadata["store"]["path"])
            self.run.check_store(store.path, store.manifest.sha256())
            token, document = np.array(store.sequences).swapaxes(0, 1)
            test = np.isin(document, self.run.metadata["split"]["test"])
            document = np.where(test, document, -1)
            some = test.any(axis=1)
            return token[some], document[some]
        length = self.config.context_length or self.run.metadata.get("context_length") or 128
        with tempfile.TemporaryDirectory() as folder:
            corpus = self.config.corpus or PythonDocs(kind="python-docs")
            sequences.write(
                Path(folder), corpus, self.model.tokenizer, context_length=min(length, 128)
            )
            return tuple(np.load(Path(folder) / SEQUENCES).swapaxes(0, 1))

    def told(self) -> dict[str, Any]:
        """What results say of it."""
        run = self.run
        keys = ("solver", "encoder", "seed", "format", "source config", "model", "commit")
        own = {key: run.metadata[key] for key in keys if key in run.metadata}
        files = sorted(
            file for file in run.path.iterdir() if file.suffix in (".safetensors", ".npz")
        )
        settings = dataclasses.asdict(self.config)
        text = {key: settings[key] for key in ("corpus", "context_length", "model")}
        return {
            "id": run.path.absolute().name,
            "release": run.metadata.get("format", "dictlearn"),
            "commit": run.metadata.get("commit"),
            "config": own | {"hook": self.hook, "text": text}
            | {"sha256": {file.name: sha256(file) for file in files}},
        }  # fmt: skip


def _core(subject: Subject, *, quick: bool) -> tuple[Any, Callable[[], Result]]:
    cfg = _settings(core.Config, subject, "core", quick=quick)

    def measure() -> Result:
        token, document = subject.text()
        return core.run(subject.run.coder, subject.model, token, cfg, document)

    return cfg, measure


def _absorption(subject: Subject, *, quick: bool) -> tuple[Any, Callable[[], Result]]:
    cfg = _settings(absorption.Config, subject, "absorption", quick=quick)
    return cfg, lambda: absorption.run(subject.run.coder, subject.model, cfg)


def _settings(kind: Any, subject: Subject, family: str, *, quick: bool) -> Any:
    table = getattr(subject.config, family)
    if "hook" in table:
        raise UserError(f"{family}.hook: unknown key; the hook stands at the top")
    cfg = validate(kind, table | {"hook": subject.hook}, "evals", f"{family}.")
    return cfg.quick() if quick else cfg


# Name: settings, and what measures with them.
FAMILIES: dict[str, Callable[..., tuple[Any, Callable[[], Result]]]] = {
    "core": _core,
    "absorption": _absorption,
}


def evaluate(
    subject: Subject, families: list[str], out: Path, *, quick: bool, overwrite: bool
) -> dict[str, dict[str, Any]]:
    """Do what is not done yet; the envelope of every family.

    Raises:
      UserError: a file holds results of other settings; as the families.
    """
    told = subject.told()
    planned = {name: FAMILIES[name](subject, quick=quick) for name in families}
    for name, (cfg, _) in planned.items():  # before any work
        _check_place(out / f"{name}.json", name, cfg, told, overwrite=overwrite)
    found = {}
    for name, (_, measure) in planned.items():
        file = out / f"{name}.json"
        if overwrite or not file.exists():
            results.write(file, measure(), told)
        found[name] = results.read(file)
    return found


# SAEBench's names of families, where they are longer.
_IDS = {"absorption": absorption.FAMILY}


def _check_place(
    file: Path, family: str, cfg: Any, told: dict[str, Any], *, overwrite: bool
) -> None:
    if overwrite or not file.exists():
        return
    there = results.read(file)["eval_id"]
    if there != Result(_IDS.get(family, family), dataclasses.asdict(cfg), {}).id(told):
        raise UserError(
            f"{file}: holds results of another dictionary, text or settings; "
            "pass --overwrite to replace them, or --out to keep both"
        )


def show(found: dict[str, dict[str, Any]]) -> None:
    """The headline of every family."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("family", "figure", "value", "95 %"):
        table.add_column(title, no_wrap=True)
    for name, envelope in found.items():
        for category, values in envelope["eval_result_metrics"].items():
            for key, value in values.items():
                if not re.search("_interval$|_saebench060$", key):
                    ends = values.get(f"{key}_interval")
                    told = "" if not ends or None in ends else f"{ends[0]:.4g} to {ends[1]:.4g}"
                    shown = "null" if value is None else f"{value:.5g}"
                    table.add_row(name, f"{category}.{key}", shown, told)
    Console(highlight=False, width=110).print(table)


def main() -> None:
    """Entry of `python -m evals.run`."""
    parser = argparse.ArgumentParser(prog="python -m evals.run", description=__doc__)
    parser.add_argument("dictionary", type=Path, help="a run, or another's dictionary")
    parser.add_argument("--evals", default=",".join(FAMILIES), help=", ".join(FAMILIES))
    parser.add_argument("--config", type=Path, help="a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="default: RUN/evals; for others runs/NAME-evals")
    parser.add_argument("--quick", action="store_true", help="within three minutes on two cores")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is there")
    arguments = parser.parse_args()
    families = arguments.evals.split(",")
    if unknown := [name for name in families if name not in FAMILIES]:
        raise UserError(f"--evals: no {unknown[0]!r} among {', '.join(FAMILIES)}")
    table = read_toml(arguments.config or Path("/dev/null"), arguments.set)
    config = validate(EvalConfig, table, str(arguments.config or "--set"))
    subject = Subject(load(arguments.dictionary), config)
    path = subject.run.path
    own = path / "evals" if subject.ours else Path("runs") / f"{path.absolute().name}-evals"
    out = arguments.out or own
    show(evaluate(subject, families, out, quick=arguments.quick, overwrite=arguments.overwrite))
    Console(highlight=False).print(f"\nresults in {out}")


if __name__ == "__main__":
    run_command(main)
