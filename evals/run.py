"""Any dictionary to numbers:  python -m evals.run RUN_OR_SAE [--evals core,...] [--quick].

Every family writes OUT/<family>.json in SAEBench's envelope (evals.results). What is there already,
of the same dictionary and settings, is not done again. A run of ours is measured on the test
documents of its store; another's dictionary on the corpus that the config names.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from activations import models, sequences
from activations.config import read_toml, validate
from activations.corpora import Corpus, PythonDocs
from activations.files import sha256
from activations.models import Model
from activations.store import SEQUENCES, Store
from activations.terminal import UserError, run_command
from dictlearn.artifact import Run
from dictlearn.interop import load
from evals import (
    absorption,
    autointerp,
    core,
    ioi,
    ravel,
    results,
    sae_probes,
    scr,
    sparse_probing,
    steering,
    tpp,
    unlearning,
)
from evals.results import Result
from evals.summary import show


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured where; every part can be left out for a run of ours.

    Attributes:
      model, hook: the run's own, if left out.
      corpus: text of a dictionary that is not ours; the Python docs, if left out.
      context_length: of its sequences.
      core, ...: settings of these families, without the hook (their modules' Config).
    """

    __pydantic_config__ = {"extra": "forbid"}

    model: str | None = None
    hook: str | None = None
    corpus: Corpus | None = None
    context_length: int | None = None
    core: dict[str, Any] = dataclasses.field(default_factory=dict)
    sparse_probing: dict[str, Any] = dataclasses.field(default_factory=dict)
    sparse_probing_sae_probes: dict[str, Any] = dataclasses.field(default_factory=dict)
    absorption: dict[str, Any] = dataclasses.field(default_factory=dict)
    scr: dict[str, Any] = dataclasses.field(default_factory=dict)
    tpp: dict[str, Any] = dataclasses.field(default_factory=dict)
    steering: dict[str, Any] = dataclasses.field(default_factory=dict)
    ioi: dict[str, Any] = dataclasses.field(default_factory=dict)
    ravel: dict[str, Any] = dataclasses.field(default_factory=dict)
    autointerp: dict[str, Any] = dataclasses.field(default_factory=dict)
    unlearning: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A dictionary, and where its activations come from; the model is loaded when it is needed.

    Attributes:
      loaded: the model, where another dictionary's subject has it already.
    """

    run: Run
    config: EvalConfig
    loaded: Model | None = None

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
        model = self.loaded or models.load(spec)
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


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family is.

    Attributes:
      id: SAEBench's name of it.
      config: its settings.
      measure: what gives the result.
    """

    id: str
    config: Any
    measure: Callable[[Subject, Any], Result]


def _on_text(module: Any, name: str) -> Family:
    """A family that is measured on the dictionary's own text."""

    def measure(subject: Subject, cfg: Any) -> Result:
        token, document = subject.text()
        return module.run(subject.run.coder, subject.model, token, cfg, document)

    return Family(name, module.Config, measure)


def _plain(module: Any, name: str) -> Family:
    return Family(
        name, module.Config, lambda subject, cfg: module.run(subject.run.coder, subject.model, cfg)
    )


FAMILIES = {
    "core": _on_text(core, "core"),
    "sparse_probing": _plain(sparse_probing, "sparse_probing"),
    "sparse_probing_sae_probes": _plain(sae_probes, sae_probes.FAMILY),
    "absorption": _plain(absorption, absorption.FAMILY),
    "scr": _plain(scr, "scr"),
    "tpp": _plain(tpp, "tpp"),
    "steering": _plain(steering, steering.FAMILY),
    "ioi": _plain(ioi, ioi.FAMILY),
    "ravel": _plain(ravel, ravel.FAMILY),
    "autointerp": _on_text(autointerp, autointerp.FAMILY),
    "unlearning": _plain(unlearning, unlearning.FAMILY),
}


# What needs no labelled texts.
ALWAYS = ("core", "absorption", "scr")


def configured(config: EvalConfig, name: str, hook: str, where: str, prefix: str = "") -> Any:
    """A family's settings at a hook, as a config has them.

    Arguments:
      where, prefix: what a message begins with, and the key under which the config stands there.

    Raises:
      UserError: a setting is unknown or out of range.
    """
    table = getattr(config, name)
    if "hook" in table:
        raise UserError(f"{prefix}{name}.hook: unknown key; the hook stands at the top")
    return validate(FAMILIES[name].config, table | {"hook": hook}, where, f"{prefix}{name}.")


def settings_of(subject: Subject, name: str, *, quick: bool) -> Any:
    """A family's settings; files of labelled texts with their hash.

    Raises:
      UserError: a setting is unknown or out of range; a file is missing.
    """
    cfg = configured(subject.config, name, subject.hook, "evals")
    if sets := getattr(cfg, "sets", ()):
        cfg = dataclasses.replace(cfg, sets=tuple(one.pinned() for one in sets))
    if one := getattr(cfg, "set", None):
        cfg = dataclasses.replace(cfg, set=one.pinned())
    if hasattr(cfg, "pinned"):
        cfg = cfg.pinned()
    return cfg.quick() if quick else cfg


def evaluate(
    subject: Subject, families: list[str], out: Path, *, quick: bool, overwrite: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Do what is not done yet.

    Returns:
      The envelope of every family that could be measured, and of the others why not.

    Raises:
      UserError: a file holds results of other settings; settings are wrong.
    """
    told = subject.told()
    planned = {name: settings_of(subject, name, quick=quick) for name in families}
    for name, cfg in planned.items():  # before any work
        _check_place(out / f"{name}.json", name, cfg, told, overwrite=overwrite)
    found, failed = {}, {}
    for name, cfg in planned.items():
        file = out / f"{name}.json"
        if overwrite or not file.exists():
            try:
                results.write(file, FAMILIES[name].measure(subject, cfg), told)
            except UserError as error:
                failed[name] = str(error)
                continue
        found[name] = results.read(file)
    return found, failed


def _check_place(
    file: Path, family: str, cfg: Any, told: dict[str, Any], *, overwrite: bool
) -> None:
    if overwrite or not file.exists():
        return
    there = results.read(file)["eval_id"]
    if there != Result(FAMILIES[family].id, dataclasses.asdict(cfg), {}).id(told):
        raise UserError(
            f"{file}: holds results of another dictionary, text or settings; "
            "pass --overwrite to replace them, or --out to keep both"
        )


def main() -> None:
    """Entry of `python -m evals.run`."""
    parser = argparse.ArgumentParser(prog="python -m evals.run", description=__doc__)
    parser.add_argument("dictionary", type=Path, help="a run, or another's dictionary")
    parser.add_argument(
        "--evals", metavar="FAMILY,...",
        help=f"of {', '.join(FAMILIES)}; default: {', '.join(ALWAYS)}, and what has settings",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="default: RUN/evals; for others runs/NAME-evals")
    parser.add_argument("--quick", action="store_true", help="within three minutes on two cores")
    parser.add_argument("--overwrite", action="store_true", help="measure again what is there")
    arguments = parser.parse_args()
    table = read_toml(arguments.config or Path("/dev/null"), arguments.set)
    families = [name for name in FAMILIES if name in ALWAYS or name in table]
    if arguments.evals is not None:
        families = arguments.evals.split(",")
    if unknown := [name for name in families if name not in FAMILIES]:
        raise UserError(f"--evals: no {unknown[0]!r} among {', '.join(FAMILIES)}")
    config = validate(EvalConfig, table, str(arguments.config or "--set"))
    subject = Subject(load(arguments.dictionary), config)
    path = subject.run.path
    own = path / "evals" if subject.ours else Path("runs") / f"{path.absolute().name}-evals"
    out = arguments.out or own
    found, failed = evaluate(
        subject, families, out, quick=arguments.quick, overwrite=arguments.overwrite
    )
    show(found)
    if found:
        Console(highlight=False).print(f"\nresults in {out}")
    if failed:
        raise UserError("; ".join(f"{name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    run_command(main)
