"""Unlearning: whether clamping a few latents makes a model forget one kind of text, and only that.

After SAEBench 0.6.0's `unlearning`, on corpora and questions of the user's. Latents whose density
on the retain corpus is below a threshold are taken, of them the n with the greatest density on the
forget corpus, S. Where a latent of S fires, its code is clamped; the dictionary's error stays:

    x' = x + sum_{j in S, f_j != 0} (-multiplier sign_j - f_j) u_j,

u_j is the atom at unit norm in raw units, f_j the code times the norm that was divided by, so that
multipliers are lengths of raw activations; sign_j is that of the mean of f_j on the forget corpus.
SAEBench's reading, under `_saebench060`, has f_j > 0 for "fires" and sign_j = 1; without negative
codes the two are one. BOS and other special tokens neither count nor change.

    unlearning_score = 1 - min accuracy on the forget questions, over the settings (threshold, n,
                       multiplier) with an accuracy on the retain questions of 0.99 or more,

of questions that the model answers right by itself. Where this departs from SAEBench: the setting
is chosen on half of the questions and the score read on the other; `_saebench060` has both on all,
and 0 where no setting qualifies, where ours is None. Letters are asked for as SAEBench does it
without a chat format, without its headline, which names the subject.

Beside it stands what the model's loss on held-out documents rises by (nats a token), with the
setting of the greatest rise on the forget corpus for which base loss / loss is 0.99 or more on the
retain corpus, chosen on other documents. `_random` are figures of latents drawn from those of
neighbouring forget density. A document is read up to `context_length`.

Source: SAEBench 0.6.0, evals/unlearning; Farrell et al. (arXiv 2410.19278).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from activations.corpora import Corpus
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from evals.results import Result
from evals.unlearning.bank import Hooked, documents, firing
from evals.unlearning.figures import SIDES, Trial, by_losses, loss_figures, question_figures
from evals.unlearning.latents import settings
from evals.unlearning.questions import Scoring, read

FAMILY = "unlearning"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; thresholds, numbers of latents and multipliers are SAEBench's.

    Attributes:
      hook: where latents are clamped.
      forget, retain: text; half of the documents choose, the others are held out for the losses.
      forget_questions, retain_questions: jsonl with query, choices and gold; None of both: losses
        alone.
      scoring: "letters": the likeliest of A, B, ... after a listing, of questions answered right
        in all orders of the choices (24 at most); "likelihood": the likeliest choice's text.
      questions: of a file, at most.
      context_length: tokens of a document, BOS included.
      tokens: of each corpus, for densities.
      loss_tokens: of each corpus's halves, for losses.
      retain_thresholds, n_latents, multipliers: the settings that are tried.
      seed: draws questions and their halves; random latents are of seed to seed + n_seeds - 1.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    forget: Corpus
    retain: Corpus
    forget_questions: Path | None = None
    retain_questions: tuple[Path, ...] = ()
    scoring: Scoring = "letters"
    questions: Annotated[int, Field(ge=2)] = 200
    context_length: Annotated[int, Field(ge=3)] = 128
    tokens: Annotated[int, Field(ge=1)] = 65_536
    loss_tokens: Annotated[int, Field(ge=1)] = 4_096
    retain_thresholds: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)
    ] = (0.001, 0.01)
    n_latents: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (10, 20)
    multipliers: Annotated[
        tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], Field(min_length=1)
    ] = (25.0, 50.0, 100.0, 200.0)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    n_seeds: Annotated[int, Field(ge=1)] = 3

    def quick(self) -> Config:
        """Fewer tokens, questions and settings."""
        return dataclasses.replace(
            self, tokens=16_384, loss_tokens=1_024, questions=40, n_latents=self.n_latents[:1]
        )


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Make a model forget by a dictionary.

    Raises:
      UserError: the dictionary does not fit the hook; a corpus has fewer than two documents, or
        both have one in common; questions of one side alone, or a bad file of them.
    """
    if (cfg.forget_questions is None) == bool(cfg.retain_questions):
        raise UserError("unlearning: forget_questions and retain_questions: give both or neither")
    hooked = Hooked(coder, model, cfg.hook)
    files = [(cfg.forget_questions,) if cfg.forget_questions else (), cfg.retain_questions]
    asked = [read(hooked, own, cfg.scoring, cfg.questions, seed=cfg.seed) for own in files]
    sides = [
        documents(
            hooked, getattr(cfg, side), side, length=cfg.context_length,
            tokens=(cfg.tokens, cfg.loss_tokens),
        )
        for side in SIDES
    ]  # fmt: skip
    if shared := sides[0][2] & sides[1][2]:
        raise UserError(
            f"unlearning: forget and retain share {len(shared)} documents, e.g. "
            f"{min(shared)[:60]!r}; leave them out of one"
        )
    chosen, held, _ = zip(*sides, strict=True)
    dense = [firing(hooked, own) for own in chosen]
    lists = cfg.retain_thresholds, cfg.n_latents, cfg.multipliers
    ours, theirs = (settings(dense[0], dense[1], *lists, positive=p) for p in (False, True))
    trial = Trial(dense[0], ours, theirs, cfg.seed, cfg.n_seeds)
    details = by_losses(hooked, chosen, trial, cfg.loss_tokens)
    losses, null, told = loss_figures(hooked, held, trial, details, cfg.loss_tokens)
    scores, reasons, more = question_figures(
        hooked, asked, trial, details, signed=any(one.signed for one in dense)
    )
    told["documents"] = {
        side: [len(own) for own in halves[:2]] for side, halves in zip(SIDES, sides, strict=True)
    }
    return Result(
        FAMILY, dataclasses.asdict(cfg), {"unlearning": scores | losses}, details, told | more,
        {f"unlearning.{key}": reason for key, reason in (null | reasons).items()},
    )  # fmt: skip
