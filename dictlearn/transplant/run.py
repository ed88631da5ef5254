"""Two models to one: the base's body with the donor's tokenizer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from activations.config import validate
from activations.files import building
from activations.terminal import UserError
from dictlearn.interop.files import table
from dictlearn.transplant import digits
from dictlearn.transplant.config import TransplantConfig
from dictlearn.transplant.conventions import Conventions
from dictlearn.transplant.matching import Matching, match
from dictlearn.transplant.problem import Problem
from dictlearn.transplant.undertrained import never_seen
from dictlearn.transplant.vocabulary import Vocabulary, read_vocabulary
from dictlearn.transplant.weights import Weights

REPORT = "transplant.json"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A base model, a donor, and which of their tokens are the same.

    Attributes:
      undertrained: as in TransplantConfig.
    """

    base: Weights
    donor: Weights
    matching: Matching
    undertrained: float

    @property
    def rows(self) -> int:
        """Of the new vocabulary's matrices: as many as the donor's, padding included."""
        return max(self.donor.rows, len(self.matching.donor))

    def problem(self, *, head: bool) -> Problem:
        """The rows wanted in the base's embedding, or in its head.

        Where the donor has one matrix, the base's head stands beside its embedding: what makes up
        the one makes up the other.
        """
        matching, donor, base = self.matching, self.matching.donor, self.matching.base
        name = self.donor.head if head and self.donor.head else self.donor.embed
        space = _finite(self.donor, name, donor)
        rows = np.concatenate(
            [_finite(self.base, name, base) for name in self.names(head=head)], axis=1
        )
        own, other = matching.anchors.T
        unseen = never_seen(space, own, donor, self.undertrained)
        unseen |= never_seen(rows, other, base, self.undertrained)
        own, other = own[~unseen], other[~unseen]
        if not len(own):
            raise UserError("undertrained: no shared token is left; choose a greater limit")
        return Problem(
            donor=space[own],
            base=rows,
            places=other,
            targets=space[matching.new],
            anchor_bytes=[donor.tokens[token] for token in own],
            new_bytes=[
                donor.tokens.get(token, donor.text(token).encode())
                for token in matching.new.tolist()
            ],
            split=base.encode,
            pieces=lambda text: [donor.bytes_of(token) for token in donor.encode(text)],
            tokens=base.tokens,
        )

    def names(self, *, head: bool) -> list[str]:
        """The base's tensors that a problem is about."""
        joined = self.base.head is None or self.donor.head is None
        heads = [name for name in (self.base.head, self.base.bias) if name is not None]
        if head:
            return [] if joined else heads
        return [self.base.embed, *(heads if joined else [])]

    def problems(self) -> list[Problem]:
        """What is wanted: of the embedding, and of the head where it is a problem of its own."""
        return [self.problem(head=head) for head in (False, True) if self.names(head=head)]

    def tensors(self, problems: list[Problem], made: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The base's tensors with the new vocabulary's rows, by name, from those made up."""
        new: dict[str, np.ndarray] = {}
        for head, problem, rows in zip((False, True), problems, made, strict=False):
            whole, at = self._assembled(problem, rows), 0
            for name in self.names(head=head):
                shape = self.base.shape(name)
                width = shape[1] if len(shape) == 2 else 1
                new[name] = whole[:, at : at + width].reshape(-1, *shape[1:])
                at += width
        return new

    def _assembled(self, problem: Problem, made: np.ndarray) -> np.ndarray:
        """The new vocabulary's rows [v e]: those of the base's, those made up, and padding.

        Ids without a token get the anchors' mean: its logit is the mean of theirs, never the
        greatest; that of zeros could be.
        """
        rows = np.tile(problem.anchors.mean(axis=0), (self.rows, 1))
        copied = self.matching.copied
        rows[[*copied]] = problem.base[[*copied.values()]]
        rows[self.matching.new] = made
        return rows


def read_pair(
    base: Path, donor: Path, overrides: dict[str, str], undertrained: float = 0.5
) -> Pair:
    """Two models and their tokens side by side; see TransplantConfig.

    Raises:
      UserError: one cannot be read; a token has no row; they share no tokens; the base has rows for
        its tokens that cannot be made for others.
    """
    for role, directory in (("base", base), ("donor", donor)):
        if not directory.is_dir():
            raise UserError(
                f"{role}: {directory} is no directory. `python -m activations.models export SPEC "
                "DIR` makes one of any model, e.g. of hf:NAME or gguf:FILE"
            )
    own, other = Weights(base), Weights(donor)
    if name := own.beyond():
        raise UserError(
            f"{own.file(name)}: {name} holds something for every token, too, and only embedding "
            "and output head can be remade for other tokens. Take another base"
        )
    known = read_vocabulary(base)
    _check_rows(known, own, [*known.tokens])
    # Special tokens may be listed that the weights never had a row for.
    special = {token: text for token, text in known.special.items() if token < own.rows}
    roles = {role: token for role, token in known.roles.items() if token in special}
    wanted = read_vocabulary(donor)
    matching = match(wanted, dataclasses.replace(known, special=special, roles=roles), overrides)
    _check_rows(wanted, other, [*wanted.tokens, *matching.new.tolist()])
    return Pair(own, other, matching, undertrained)


def read_transplant(output: Path) -> tuple[Pair, TransplantConfig]:
    """What `transplant` made a directory of, and how.

    Raises:
      UserError: it is none of ours, or a plain copy; as `read_pair`.
    """
    told = table(output / REPORT)
    if told.get("identical"):
        raise UserError(
            f"{output}: is a plain copy of its base model; the tokenizers were the same"
        )
    keys = {field.name for field in dataclasses.fields(TransplantConfig)}
    settings = {key: told[key] for key in keys & told.keys()} | {"output": str(output)}
    config = validate(TransplantConfig, settings, str(output / REPORT))
    return read_pair(config.base, config.donor, config.overrides, config.undertrained), config


def _finite(weights: Weights, name: str, vocabulary: Vocabulary) -> np.ndarray:
    """A tensor with a row [v e] or a number [v 1] for each token.

    Raises:
      UserError: it holds NaN or infinity.
    """
    rows = weights.read(name).reshape(weights.rows, -1)  # [v] -> [v 1]
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise UserError(
            f"{weights.file(name)}: {name} holds NaN or infinity in {len(bad):,} of {len(rows):,} "
            f"rows, first in row {bad[0]} (token {vocabulary.text(int(bad[0]))!r}). Fetch or "
            "convert the model again"
        )
    return rows


def _check_rows(vocabulary: Vocabulary, weights: Weights, tokens: list[int]) -> None:
    if missing := sorted(token for token in {*tokens} if token >= weights.rows):
        texts = ", ".join(repr(vocabulary.text(token)) for token in missing[:5])
        raise UserError(
            f"{vocabulary.directory}: the tokenizer has {len(vocabulary):,} tokens, and the "
            f"embedding {weights.embed} {weights.rows:,} rows: {len(missing):,} tokens have none "
            f"({texts}{', ...' if len(missing) > 5 else ''}). Are tokenizer and weights of one "
            "model? A special token can be given a row of the base's under [overrides]"
        )


def transplant(config: TransplantConfig) -> dict[str, Any]:
    """Make `config.output`; what was done, as it stands in its transplant.json.

    Raises:
      UserError: a model cannot be read, the place is in use, or cannot be written.
    """
    output = config.output
    if output.exists():
        raise UserError(f"output: {output} is there already; name another place, or remove it")
    pair = read_pair(config.base, config.donor, config.overrides, config.undertrained)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
        with lock, building(output) as place:
            return _fill(place, pair, config)
    except filelock.Timeout:
        raise UserError(f"output: another transplant is writing {output}") from None
    except OSError as error:
        # copytree tells of every file that it could not copy; one is enough.
        why = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
        raise UserError(f"output: {output} cannot be written ({why}); nothing is left") from None


def warnings(matching: Matching) -> list[str]:
    """What to know of two tokenizers before anything is made."""
    if matching.identical:
        return ["the tokenizers are the same: the output is a plain copy of the base model"]
    return digits.warnings(digits.schemes(matching.donor, matching.base))


def _fill(place: Path, pair: Pair, config: TransplantConfig) -> dict[str, Any]:
    """Write everything into `place`."""
    matching = pair.matching
    told: dict[str, Any] = {
        "base": str(config.base.absolute()),
        "donor": str(config.donor.absolute()),
        "method": dataclasses.asdict(config.method),
        "undertrained": config.undertrained,
        "overrides": config.overrides,
        "seed": config.seed,
        "identical": matching.identical,
        "warnings": [],
    }
    place.mkdir()
    if matching.identical:
        # The output may lie inside of the base.
        ours = shutil.ignore_patterns(f"{place.name}.tmp-*", f".{place.name}.lock")
        shutil.copytree(config.base, place, ignore=ours, dirs_exist_ok=True)
        told["warnings"] = warnings(matching)
    else:
        conventions = Conventions(matching)
        conventions.write(place, pair.rows)
        told["matching"] = matching.report()
        told["digits"] = digits.schemes(matching.donor, matching.base)
        told["warnings"] = [*conventions.warnings, *warnings(matching)]
        problems = pair.problems()
        made = [config.method.rows(problem, config.seed) for problem in problems]
        pair.base.write(place, pair.tensors(problems, made))
        told["matching"]["undertrained"] = len(matching.anchors) - len(problems[0].places)
    report = json.dumps(told, indent=1, default=str, ensure_ascii=False)
    (place / REPORT).write_text(report + "\n", encoding="utf-8")
    return told
