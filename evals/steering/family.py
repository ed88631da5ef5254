"""Steering: does a feature make a model speak of its concept, and still speak well?

For each concept, a class of a labelled set, one feature is chosen by labelled texts, and the model
is steered along it and along what it has to be better than (directions.py; and a prompt that begins
with texts of the concept). Every direction is gone as far as it takes to move the model's
predictions by the same amounts, KL(base || steered) behind random contexts: what moves a model more
always shows more. At each of these,

- effect: P(concept | text) of a classifier of words that has seen no model, less that of the
  model's own texts;
- fluent: share of texts that are as likely under *another* model, and as little repeated, as 95 %
  of the model's own texts are (fluency.py);
- score: the harmonic mean of the two;
- logit_shift: rise of the logits of the concept's words above those of all (after gradient SAE);
- judge_concept, judge_fluency, judge_score: a judge's marks of 0 to 2, if one is named (SNMF).

As AxBench has it, the KL is chosen on half of the prompts, and the figure is of the other half. All
texts of one part only: those that choose a feature, train the classifier, and are measured on do
not meet. `..._interval` is a 95 % bootstrap interval over pairs of concept and prompt;
`feature_above` of a direction is the feature's score less its own, paired. What was said along a
direction is kept (evals.kept): a run that was stopped goes on, and what needs no dictionary is the
same for all dictionaries.

Sources: Shafran et al. 2025 (SNMF, arXiv 2506.10920); Wu et al. 2025 (AxBench, 2501.17148);
Olmo et al. 2024 (gradient SAE, 2411.10397), whose exact logit figure was not to be found.
"""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from activations.models import Model
from activations.terminal import UserError, progress
from dictlearn.dictionary import Coder
from evals import cache, kept
from evals.judges import JudgeConfig
from evals.lm import check_hook
from evals.pooled import pool
from evals.results import Result
from evals.steering.bidirectionality import bidirectionality
from evals.steering.concepts import Concept, WordClassifier, concept, telling_tokens
from evals.steering.directions import detection, directions
from evals.steering.interventions import adding
from evals.steering.matched_kl import Contexts
from evals.steering.sampling import SAMPLING, samples
from evals.steering.scores import OWN, Text, describe, judge_texts, mark, summary
from evals.texts import LabelledSet, Occupations

FAMILY = "steering"
# A classifier that is wrong more often does not judge.
LEAST_ACCURACY = 0.95
# Texts of the model as it is, for each prompt; words of a concept; tokens of a context; texts of
# the concept in the prompt that stands for prompting, and where each is cut.
_OWN, _WORDS, _CONTEXT, _SHOTS, _CUT = 4, 20, 12, 3, 200

_BIOGRAPHIES = Occupations("occupations")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      hook: where the model is steered.
      fluency_model: another model, that says how likely texts are.
      set: of labelled texts.
      concepts: its classes that are steered to; its most frequent, if left out.
      max_concepts: of these.
      texts: of each side of a concept, in each part (evals.steering.concepts.concept).
      context_length: tokens of a labelled text, BOS included.
      prompts: that are gone on with; the KL is chosen on the first half of them.
      samples: of each prompt and KL.
      new_tokens: of a sample.
      kl: nats.
      contexts: behind which KL and logits are measured.
      judge: see evals.judges.
      seed: of all that is drawn.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    fluency_model: str
    set: LabelledSet = _BIOGRAPHIES
    concepts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    max_concepts: Annotated[int, Field(ge=1)] = 4
    texts: Annotated[int, Field(ge=10)] = 100
    context_length: Annotated[int, Field(ge=4)] = 64
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)] = (
        "I think that", "It was the", "She said that", "There is a", "The man was", "We went to",
        "This is a", "People often say",
    )  # fmt: skip
    samples: Annotated[int, Field(ge=1)] = 2
    new_tokens: Annotated[int, Field(ge=1)] = 50
    kl: Annotated[tuple[Annotated[float, Field(gt=0, le=20)], ...], Field(min_length=1)] = (
        0.1, 0.25, 0.5, 1.0, 2.0,
    )  # fmt: skip
    contexts: Annotated[int, Field(ge=2)] = 16
    judge: JudgeConfig | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    def quick(self) -> Config:
        """One concept, 8 samples at each KL."""
        few = {"max_concepts": 1, "texts": 40, "samples": 1, "contexts": 8}
        return dataclasses.replace(self, **few, concepts=self.concepts and self.concepts[:1])


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Steer a model by a dictionary.

    Raises:
      UserError: the dictionary does not fit the hook; a concept has too few texts; a strength
        breaks the model.
    """
    check_hook(coder, model, cfg.hook)
    judge = cfg.judge.open() if cfg.judge else None
    labelled = cfg.set.read()
    names = [*(cfg.concepts or labelled.classes[: cfg.max_concepts])]
    concepts = [concept(labelled, name, cfg.texts, seed=cfg.seed) for name in names]
    classifiers = {one.name: WordClassifier(one) for one in concepts}
    texts = _unsteered(model, cfg, Text("", OWN, 0, 0, "", ""), _OWN)
    details: list[dict[str, Any]] = []
    for one in progress(iterable=concepts, desc="steering", unit="concept"):
        said, told = _steer_to(one, coder, model, cfg)
        texts += said
        details += told
    marked = mark(texts, classifiers, LEAST_ACCURACY, cfg.fluency_model)
    null = judge_texts(judge, marked, concepts, seed=cfg.seed) if judge else {}
    methods = list(dict.fromkeys(row["method"] for row in details))
    metrics, why = summary(marked, methods, names, len(cfg.kl), len(cfg.prompts), seed=cfg.seed)
    for key in ("s_cd", "logit_shift"):
        for method in methods:
            of = [row[key] for row in details if row["method"] == method and row[key] is not None]
            metrics[method][key] = float(np.mean(of)) if of else None
            if not of:
                why[f"{method}.{key}"] = "is not defined for any concept"
    describe(details, marked)
    accuracy = {name: one.accuracy for name, one in classifiers.items()}
    two_sided = bidirectionality(coder, model, cfg.hook, seed=cfg.seed)
    return Result(
        FAMILY, dataclasses.asdict(cfg), metrics | {"bidirectionality": two_sided},
        details, {"classifier_accuracy": accuracy, "judge": judge and judge.name}, why | null,
    )  # fmt: skip


def _places(strength: np.ndarray, cfg: Config) -> list[tuple[int, int]]:
    """KL and prompt of each text, of the strengths that are numbers."""
    return [
        (int(goal), prompt)
        for goal in np.flatnonzero(~np.isnan(strength))
        for prompt in range(len(cfg.prompts))
        for _ in range(cfg.samples)
    ]


def _said(
    model: Model, cfg: Config, vector: np.ndarray | None, strength: np.ndarray, prefix: str = ""
) -> list[str]:
    """What is said at each of the places."""

    def no_change(_: np.ndarray) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    places = _places(strength, cfg)
    return samples(
        model, [cfg.prompts[prompt] for _, prompt in places],
        np.array([strength[goal] for goal, _ in places]),
        partial(adding, model, cfg.hook, vector) if vector is not None else no_change,
        new_tokens=cfg.new_tokens, seed=cfg.seed, prefix=prefix,
    )  # fmt: skip


def _unsteered(model: Model, cfg: Config, of: Text, times: int, prefix: str = "") -> list[Text]:
    """The model's own texts behind the prompts; kept."""
    strength = np.zeros(times)
    file = kept.place("steering", [*_key(model, cfg), times, prefix])
    said = kept.kept(file, lambda: {"said": _said(model, cfg, None, strength, prefix)})["said"]
    return _texts(said, of, strength, cfg)


def _texts(said: list[str], of: Text, strength: np.ndarray, cfg: Config) -> list[Text]:
    return [
        dataclasses.replace(of, goal=goal, prompt=prompt, begin=cfg.prompts[prompt], said=text)
        for (goal, prompt), text in zip(_places(strength, cfg), said, strict=True)
    ]


def _key(model: Model, cfg: Config) -> list[Any]:
    """All that texts depend on, but for what the model is steered by."""
    own = model.identity
    drawn = [cfg.prompts, cfg.samples, cfg.new_tokens, cfg.seed, *SAMPLING]
    return [own.weights_sha256, own.tokenizer_sha256, cfg.hook, *drawn]


def _gone(
    vector: np.ndarray, contexts: Contexts, words: np.ndarray, model: Model, cfg: Config
) -> dict[str, Any]:
    """How far a direction is gone for each KL, and what comes of it; kept.

    Directions that do not come from a dictionary are the same for all, and cost nothing again.
    """
    arrays = [vector.astype(np.float32).tolist(), contexts.token.tolist(), words.tolist()]

    def make() -> dict[str, Any]:
        strength, kl = contexts.matched(vector, np.array(cfg.kl))
        shift = contexts.logit_shift(vector, np.nan_to_num(strength), words)
        numbers = {"strength": strength.tolist(), "kl": kl.tolist(), "logit_shift": shift.tolist()}
        return numbers | {"said": _said(model, cfg, vector, strength)}

    return kept.kept(kept.place("steering", [*_key(model, cfg), cfg.kl, arrays]), make)


def _steer_to(
    one: Concept, coder: Coder, model: Model, cfg: Config
) -> tuple[list[Text], list[dict[str, Any]]]:
    """Texts of every direction and of prompting, and a row for each direction and KL."""
    settings: dict[str, Any] = {"length": cfg.context_length}
    rows = pool(coder, cache.read(model, cfg.hook, one.choose.text, **settings))
    unseen = list(cache.read(model, cfg.hook, one.detect.text, **settings))
    x = np.concatenate([np.asarray(block.x) for block in unseen])
    start = np.concatenate([[0], *(np.diff(block.start) for block in unseen)]).cumsum()
    ids = cache.tokens(model, one.choose.text, **settings)
    words = telling_tokens(
        [row[~np.isin(row, model.tokenizer.all_special_ids)] for row in ids], one.choose.y,
        _WORDS, model.bridge.cfg.d_vocab,
    )  # fmt: skip
    contexts = Contexts(model, cfg.hook, _contexts(one, model, cfg))
    texts, told = [], []
    for method, direction in directions(coder, rows, one.choose.y, seed=cfg.seed).items():
        gone = _gone(direction.vector, contexts, words, model, cfg)
        strength, kl, shift = (np.array(gone[key]) for key in ("strength", "kl", "logit_shift"))
        texts += _texts(gone["said"], Text(one.name, method, 0, 0, "", ""), strength, cfg)
        s_cd = detection(direction.vector, x, start, one.detect.y)
        for goal, target in enumerate(cfg.kl):
            reached = bool(np.isfinite(strength[goal]))
            told.append(
                {"concept": one.name, "method": method, "goal": goal, "kl_goal": target,
                 "feature": direction.feature, "n_labels": direction.n_labels, "s_cd": s_cd}
                | {"strength": float(strength[goal]) if reached else None,
                   "kl": float(kl[goal]) if reached else None,
                   "logit_shift": float(shift[goal]) if reached else None}
            )  # fmt: skip
    shots = [text[:_CUT] for text, own in zip(one.choose.text, one.choose.y, strict=True) if own]
    prefix = "".join(f"{text}\n\n" for text in shots[:_SHOTS])
    texts += _unsteered(model, cfg, Text(one.name, "prompt", 0, 0, "", ""), 1, prefix)
    told.append(
        {"concept": one.name, "method": "prompt", "goal": 0, "kl_goal": None, "feature": None,
         "n_labels": _SHOTS, "s_cd": None, "strength": None, "kl": None, "logit_shift": None}
    )  # fmt: skip
    return texts, told


def _contexts(one: Concept, model: Model, cfg: Config) -> np.ndarray:
    """Begins of texts that are not of the concept, of one length [p c].

    Raises:
      UserError: too few texts are long enough.
    """
    others = [text for text, own in zip(one.learn.text, one.learn.y, strict=True) if not own]
    ids = cache.tokens(model, others, length=_CONTEXT)
    found = [row for row in ids if len(row) == _CONTEXT][: cfg.contexts]
    if len(found) < cfg.contexts:
        raise UserError(
            f"{one.name}: {len(found)} texts of other classes have {_CONTEXT} tokens, expected "
            f"{cfg.contexts}; lower `contexts`, or give longer texts"
        )
    return np.stack(found)
