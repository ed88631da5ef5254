"""How good is a transplanted tokenizer:  python -m evals.transplant OUT [--methods omp,mean,...].

OUT is what `python -m dictlearn.transplant` made. Its base model, the donor, OUT itself and, where
they are named, other methods in its place are measured on the same texts and questions. A JSON file
holds all figures, a Markdown file the table. What was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import Field, TypeAdapter
from rich.console import Console

from activations.config import read_toml, validate
from activations.corpora import Corpus, PythonDocs
from activations.files import replace_file, sha256
from activations.terminal import UserError, run_command
from dictlearn.interop.files import table
from dictlearn.transplant.config import Method
from dictlearn.transplant.matching import Matching
from dictlearn.transplant.methods.focus import Focus
from dictlearn.transplant.methods.wechsel import Wechsel
from dictlearn.transplant.run import REPORT, Pair, read_transplant
from evals.cuts import cut_as_donor
from evals.heldout_anchors import held_out, score
from evals.multiple_choice import accuracy, read_questions
from evals.speaker import Speaker
from evals.token_losses import Losses, above, losses
from evals.transplant_rows import Rows, label
from evals.transplant_table import markdown

_METHODS = {
    kind.__dataclass_fields__["name"].default: kind for kind in get_args(get_args(Method)[0])
}
_JSON, _MARKDOWN = "transplant.json", "transplant.md"
_CUT = "base, cut as OUT"
_FIGURES = 2  # those of another number are not comparable


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured.

    Attributes:
      corpus: text for bits per byte; the Python docs, if left out.
      documents, characters: how many of its documents are drawn, and where each is cut.
      zero_shot: jsonl files of multiple-choice questions (`query`, `choices`, `gold`).
      questions: how many are drawn of each.
      held_out: shared tokens that are treated as new.
      prompts: begins of texts that are gone on with, greedily, by `new_tokens` tokens.
      methods: others to measure in OUT's place.
    """

    __pydantic_config__ = {"extra": "forbid"}

    corpus: Corpus | None = None
    documents: Annotated[int, Field(gt=0)] = 40
    characters: Annotated[int, Field(gt=0)] = 1000
    zero_shot: tuple[Path, ...] = ()
    questions: Annotated[int, Field(gt=0)] = 200
    held_out: Annotated[int, Field(gt=0)] = 1000
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = (
        "The capital of France is",
        "Once upon a time, there was",
    )
    new_tokens: Annotated[int, Field(gt=0)] = 20
    methods: tuple[Method, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def check(self) -> None:
        """Rules that join fields. Raises ValueError that begins with the dotted key."""
        if len({file.stem for file in self.zero_shot}) < len(self.zero_shot):
            raise ValueError("zero_shot: two files have one name, and results go by it")
        for method in self.methods:
            if isinstance(method, (Focus, Wechsel)):
                try:
                    method.check()
                except ValueError as error:
                    raise ValueError(f"methods.{error}") from None

    def texts(self) -> list[str]:
        """The documents drawn, each cut and without white space around it."""
        corpus = self.corpus or PythonDocs(kind="python-docs")
        every = list(dict.fromkeys(filter(None, (text.strip() for text in corpus.documents()))))
        drawn = np.random.default_rng(self.seed).permutation(len(every))[: self.documents]
        return [every[place][: self.characters].strip() for place in sorted(drawn)]


def measure(speaker: Speaker, cfg: EvalConfig, name: str, kinds: dict[str, Any]) -> dict[str, Any]:
    """Figures that a model has by itself; `kinds` are ids whose losses are told apart."""
    vocabulary = speaker.vocabulary
    found = losses(
        speaker.model, cfg.texts(), vocabulary.encode, vocabulary.bytes_of, begin=speaker.begin
    )
    told = _bits(found, cfg)
    told["tokens"] = {kind: found.of(ids) for kind, ids in kinds.items()}
    told["zero_shot"] = {
        file.stem: accuracy(
            speaker.model, read_questions(file, cfg.questions, seed=cfg.seed), vocabulary.encode,
            begin=speaker.begin, name=f"{name}, {file.stem}",
        )
        for file in cfg.zero_shot
    }  # fmt: skip
    told["samples"] = {prompt: speaker.go_on(prompt, cfg.new_tokens) for prompt in cfg.prompts}
    return told


def measure_cut(speaker: Speaker, cfg: EvalConfig, matching: Matching) -> dict[str, Any]:
    """Bits per byte of the base, reading what OUT reads: tells what is lost to its cuts alone."""
    bytes_of = speaker.vocabulary.bytes_of
    encode = cut_as_donor(matching)
    found = losses(speaker.model, cfg.texts(), encode, bytes_of, begin=speaker.begin)
    return _bits(found, cfg)


def _bits(found: Losses, cfg: EvalConfig) -> dict[str, Any]:
    return found.bits_per_byte(seed=cfg.seed) | {"by_document": found.by_document()}


def _required(kind: Any) -> list[str]:
    """Settings of a method that have no default."""
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    ]


def evaluate(out: Path, cfg: EvalConfig, results: Path) -> dict[str, Any]:
    """Measure what is not measured yet, and write it down after each model.

    Raises:
      UserError: OUT is no transplant; `results` holds those of other settings.
    """
    pair, made = read_transplant(out)
    for file in cfg.zero_shot:  # a damaged one is told before anything is measured
        read_questions(file, cfg.questions, seed=cfg.seed)
    settings = json.loads(
        json.dumps(dataclasses.asdict(dataclasses.replace(cfg, methods=())), default=str)
    ) | {
        "figures": _FIGURES,
        "transplant": table(out / REPORT),
        "files": {str(file): sha256(file) for file in cfg.zero_shot},
    }
    held = table(results / _JSON) if (results / _JSON).exists() else {"settings": settings}
    if held.get("settings") != settings:
        raise UserError(
            f"{results}: holds results of other settings; remove it, or name another --out"
        )
    rows = held.setdefault("models", {})
    for name, told in _models(out, cfg, pair, made.method, rows):
        rows[name] = told
        if own := rows.get(label(made.method)):
            for other in rows.values():
                if other is not own:
                    apart = above(other["by_document"], own["by_document"], seed=cfg.seed)
                    other["above_out"] = apart
        results.mkdir(parents=True, exist_ok=True)
        replace_file(results / _JSON, (json.dumps(held, indent=1) + "\n").encode())
    replace_file(results / _MARKDOWN, markdown(held).encode())
    return held


def _models(
    out: Path, cfg: EvalConfig, pair: Pair, own: Method, done: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of the models that are not done: base, donor, OUT, then the other methods."""
    base, donor = pair.base.directory, pair.donor.directory
    if "base" not in done:
        yield "base", measure(Speaker.load(base), cfg, "base", {})
    if _CUT not in done:
        yield _CUT, measure_cut(Speaker.load(base), cfg, pair.matching)
    if "donor" not in done:
        yield "donor", measure(Speaker.load(donor), cfg, "donor", {})
    methods = tuple(dict.fromkeys((own, *cfg.methods)))
    left = [method for method in methods if label(method) not in done]
    if not left:
        return
    kinds = {"new": pair.matching.new, "shared": np.array([*pair.matching.copied])}
    speaker = Speaker.load(out)
    problems = pair.problems()
    apart = [held_out(problem, cfg.held_out, seed=cfg.seed) for problem in problems]
    every, hidden = (
        Rows(those, methods, cfg.seed) for those in (problems, [one for one, _ in apart])
    )
    for method in left:
        if method != own:
            speaker.put(pair, pair.tensors(problems, every.made(method)))
        try:
            guesses = hidden.made(method)
        except UserError as error:
            raise UserError(f"{label(method)}, with shared tokens held out: {error}") from None
        told = measure(speaker, cfg, label(method), kinds)
        told["held_out"] = [
            score(guess, true, one.anchors.mean(axis=0), seed=cfg.seed)
            for guess, (one, true) in zip(guesses, apart, strict=True)
        ]
        yield label(method), told


def main() -> None:
    """Entry of `python -m evals.transplant`."""
    parser = argparse.ArgumentParser(prog="python -m evals.transplant", description=__doc__)
    parser.add_argument("transplant", type=Path, metavar="OUT", help="a transplanted model")
    parser.add_argument("--methods", default="", help=f"of {', '.join(_METHODS)}; or all")
    parser.add_argument("--config", type=Path, help="a TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="default: runs/OUT-evals")
    arguments = parser.parse_args()
    table_ = read_toml(arguments.config or Path("/dev/null"), arguments.set)
    cfg = validate(EvalConfig, table_, str(arguments.config or "--set"))
    names = arguments.methods.split(",") if arguments.methods else []
    if names == ["all"]:
        names = [name for name, kind in _METHODS.items() if not _required(kind)]
    more = []
    for name in names:
        if name not in _METHODS:
            raise UserError(f"--methods: no {name!r} among {', '.join(_METHODS)}")
        if needed := _required(_METHODS[name]):
            raise UserError(
                f"--methods: {name} needs {', '.join(needed)}: write it in --config, [[methods]]"
            )
        more.append(TypeAdapter(Method).validate_python({"name": name}))
    cfg = dataclasses.replace(cfg, methods=(*cfg.methods, *more))
    results = arguments.out or Path("runs") / f"{arguments.transplant.absolute().name}-evals"
    held = evaluate(arguments.transplant, cfg, results)
    console = Console(highlight=False, soft_wrap=True)
    console.print(markdown(held), markup=False)
    for name, told in held["models"].items():
        for prompt, said in told.get("samples", {}).items():
            console.print(f"{name}: {prompt!r} -> {said!r}", markup=False)
    console.print(f"\nresults in {results}", markup=False)


if __name__ == "__main__":
    run_command(main)
