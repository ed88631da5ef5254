"""Automatic interpretation: does an explanation of a latent tell where it fires?

Of each latent windows of tokens are drawn, apart from each other, around

- top: the tokens where it fires most;
- sampled: others where it fires, drawn in proportion to f^2;
- random: any tokens; and quiet: as many random ones as it takes for `n_random` without a firing.

A judge (evals.judges) explains the latent from top and sampled windows with the firing tokens
marked. Then it rates other windows of all kinds, unmarked and shuffled, from 0 to 10 by that
explanation. With the windows around firings as positives, and those without any as negatives,

    autointerp_score = mean over latents of the AUROC of the ratings,

and `balanced_accuracy` the mean of both classes' shares of right ratings (5 and more: it fires).
The same judge rates the same windows by the explanation of another latent (`shuffled`) and by none
(`empty`); `gain_...` are the differences, latent by latent. `_interval` is 95 % by bootstrap over
latents. A latent counts where all of its ratings could be read.

Where this departs from SAEBench 0.6.0, whose figure stands beside it as `_saebench060`: theirs is
the accuracy, random windows counting as inactive whether the latent fires in them or not, so that
"none of them" has 10/14 (`always_none_saebench060`). Theirs asks for the numbers of windows instead
of ratings. Theirs knows f > 0 only; here a latent's tail with the greater sum of |f| is explained,
`_saebench060` being of the latents where that is the positive one. Prompts are our own.

Sources: Paulo et al. (arXiv 2410.13928); Karvonen et al. (arXiv 2503.09532), section 4.4.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from activations.models import Model
from activations.terminal import UserError
from dictlearn import metrics
from dictlearn.dictionary import Coder
from evals.autointerp.config import Config
from evals.autointerp.windows import Case, Text, draw_all, read
from evals.judges import Judge
from evals.results import Result

FAMILY = "autointerp"
ARMS = ("own", "shuffled", "empty")
_FIRES = 5  # the rating that says so
_UNREAD = 0.2
_NOTHING = "(unknown)"
_EXPLANATION, _RATING = 100, 8  # tokens of an explanation, and of a window's rating

_EXPLAIN = """\
A neuron reads text token by token. Below are excerpts in which it is active, one a line. The tokens
on which it is active stand between << and >>.

{windows}

What do the marked tokens, and what stands around them, have in common? Answer with one short
sentence and nothing else."""
_RATE = """\
A neuron reads text token by token. It is active on: {explanation}

Rate for each of these {n} excerpts how likely the neuron is active in it, from 0 (certainly not) to
10 (certainly).

{windows}

Answer with {n} lines and nothing else: the excerpt's number, a colon, the rating. For example:
1: 0"""


def shown(
    text: Text, tokenizer: Any, centre: int, half: int, marked: np.ndarray | None = None
) -> str:
    """A window on one line; its tokens that are marked between << and >>."""
    token = text.token.ravel()[centre - half : centre + half + 1]
    on = np.zeros(len(token), bool) if marked is None else marked
    runs = np.split(np.arange(len(token)), np.flatnonzero(np.diff(on)) + 1)
    words = [(tokenizer.decode(token[run]), on[run[0]]) for run in runs]
    line = "".join(f"<<{word}>>" if mark else word for word, mark in words)
    return re.sub(r"\s*[\r\n]+", " ↵", line)


def explain_prompt(text: Text, tokenizer: Any, case: Case, half: int) -> str:
    """What asks for an explanation."""
    windows = zip(case.shown, case.marked, strict=True)
    lines = [shown(text, tokenizer, centre, half, marked) for centre, marked in windows]
    return _EXPLAIN.format(windows="\n".join(f"- {line}" for line in lines))


def rate_prompt(text: Text, tokenizer: Any, case: Case, half: int, explanation: str) -> str:
    """What asks for ratings."""
    lines = [shown(text, tokenizer, centre, half) for centre in case.rated]
    return _RATE.format(
        explanation=explanation, n=len(lines),
        windows="\n".join(f"{i}: {line}" for i, line in enumerate(lines, 1)),
    )  # fmt: skip


def ratings(answer: str, n: int) -> np.ndarray | None:
    """The n ratings in an answer; None where it does not rate each window once, from 0 to 10."""
    found = re.findall(r"\b(\d+)\W{0,3}[:=][^\w.-]{0,3}(\d+(?:\.\d+)?)", answer)
    if [int(i) for i, _ in found] != list(range(1, n + 1)):
        return None
    rated = np.array([float(rating) for _, rating in found])
    return rated if (rated <= 10).all() else None


def run(
    coder: Coder, model: Model, token: np.ndarray, cfg: Config, document: np.ndarray | None = None
) -> Result:
    """Interpret a dictionary's latents on sequences.

    Arguments:
      token: [s c], with their special tokens.
      document: of each token [s c]; negative where a token does not count. Left out: what the
        tokenizer calls special does not count.

    Raises:
      UserError: as `read` and `evals.judges`; the window is even.
    """
    if cfg.window % 2 == 0:
        raise UserError(f"autointerp.window: expected an odd number, got {cfg.window}")
    judge = cfg.judge.open()  # a missing key is told before the model runs for minutes
    if document is None:
        document = np.where(np.isin(token, model.tokenizer.all_special_ids), -1, 0)
    text = read(coder, model, token, cfg, document)
    cases, passed_over = draw_all(text, cfg)
    if len(cases) < 2:  # one has no other's explanation, and asking may cost money
        cases = []
    explanations, rated = _ask(judge, text, model.tokenizer, cases, cfg)
    return _result(judge, cfg, cases, passed_over, explanations, rated)


def _ask(
    judge: Judge, text: Text, tokenizer: Any, cases: list[Case], cfg: Config
) -> tuple[list[str], list[list[np.ndarray | None]]]:
    """Explanations, and each latent's ratings by each of ARMS; None where there are none."""
    half = cfg.window // 2
    most = _RATING * (cfg.judge_top + cfg.judge_sampled + 2 * cfg.n_random) + 16
    asked = [explain_prompt(text, tokenizer, case, half) for case in cases]
    guesses = [f"{arm}{'.' * 4 * _EXPLANATION}" for arm in ARMS]
    later = [rate_prompt(text, tokenizer, case, half, told) for case in cases for told in guesses]
    print(
        f"{judge.name}: {judge.estimate(asked, _EXPLANATION)}, for explanations; "
        f"{judge.estimate(later, most)}, for ratings by {len(ARMS)} of them",
        file=sys.stderr,
    )
    told = judge.ask(asked, max_tokens=_EXPLANATION)
    explanations = [" ".join(answer.split()) for answer in told]
    # The latents stand in random order, so the next one's is another's at random.
    others = explanations[1:] + explanations[:1]
    place, prompts = [], []
    for i, case in enumerate(cases):
        for arm, explanation in enumerate((explanations[i], others[i], _NOTHING)):
            if explanation:
                place.append((i, arm))
                prompts.append(rate_prompt(text, tokenizer, case, half, explanation))
    found: list[list[np.ndarray | None]] = [[None] * len(ARMS) for _ in cases]
    for (i, arm), answer in zip(place, judge.ask(prompts, max_tokens=most), strict=True):
        found[i][arm] = ratings(answer, len(cases[i].rated))
    return explanations, found


def scores(case: Case, rated: np.ndarray) -> dict[str, float]:
    """AUROC, balanced accuracy, and SAEBench's accuracy, of one latent's ratings."""
    ours, theirs = case.active | ~case.fires, case.kind != "quiet"
    says = rated >= _FIRES
    return {
        "score": float(roc_auc_score(case.active[ours], rated[ours])),
        "balanced_accuracy": float(balanced_accuracy_score(case.active[ours], says[ours])),
        "accuracy_saebench060": float((case.active == says)[theirs].mean()),
    }


def _result(
    judge: Judge, cfg: Config, cases: list[Case], passed_over: Counter[str],
    explanations: list[str], rated: list[list[np.ndarray | None]],
) -> Result:  # fmt: skip
    found: list[dict[str, dict[str, float]] | None] = []
    details: list[dict[str, Any]] = []
    for case, explanation, own in zip(cases, explanations, rated, strict=True):
        by_arm = {
            arm: scores(case, one) for arm, one in zip(ARMS, own, strict=True) if one is not None
        }
        found.append(by_arm if len(by_arm) == len(ARMS) else None)
        details.append(
            {"latent": case.latent, "tail": case.tail, "tail_share": case.share,
             "n_active": case.n_active, "explanation": explanation, "n_rated": len(case.rated)}
            | {f"{arm}_{key}": value for arm, of in by_arm.items() for key, value in of.items()}
        )  # fmt: skip
    missing = [one is None for own in rated for one in own]
    unread = float(np.mean(missing)) if missing else None
    read = [(case, one) for case, one in zip(cases, found, strict=True) if one is not None]
    why = None
    if not cases:
        why = f"fewer than 2 latents have windows enough ({dict(passed_over)})"
    elif unread is not None and unread > _UNREAD:
        why = f"{unread:.0%} of {judge.name}'s answers cannot be read, at most {_UNREAD:.0%} may"
    elif len(read) < 2:
        why = f"of {len(read)} latents all answers can be read, expected at least 2"
    figures, null = _figures([] if why else read, cfg)
    counted = {"n_latents": len(read), "unread_share": unread}
    return Result(
        FAMILY, dataclasses.asdict(cfg), {FAMILY: figures | counted}, details,
        {"judge": judge.name, "answers": dict(judge.states), "passed_over": dict(passed_over)},
        {f"{FAMILY}.{name}": why or reason for name, reason in null.items()}
        | ({} if missing else {f"{FAMILY}.unread_share": str(why)}),
    )  # fmt: skip


def _figures(
    read: list[tuple[Case, dict[str, dict[str, float]]]], cfg: Config
) -> tuple[dict[str, Any], dict[str, str]]:
    """Means over latents and their intervals, and which of them are None."""
    by_arm = {arm: [one[arm] for _, one in read] for arm in ARMS}
    auroc = {arm: np.array([one["score"] for one in of]) for arm, of in by_arm.items()}
    balanced = {arm: [one["balanced_accuracy"] for one in of] for arm, of in by_arm.items()}
    columns: dict[str, list[float]] = {
        "autointerp_score": list(auroc["own"]),
        "balanced_accuracy": balanced["own"],
        "autointerp_score_saebench060": [
            one["own"]["accuracy_saebench060"] for case, one in read if case.tail > 0
        ],
    }
    for arm in ARMS[1:]:
        columns[f"{arm}_score"] = list(auroc[arm])
        columns[f"gain_over_{arm}"] = list(auroc["own"] - auroc[arm])
        columns[f"{arm}_balanced_accuracy"] = balanced[arm]
    figures: dict[str, Any] = {}
    for name, values in columns.items():
        told: list[Any] = [None, None, None]
        if len(values) > 1:
            ends = metrics.bootstrap_mean(np.array(values), np.ones(len(values)), seed=cfg.seed)
            told = [float(np.mean(values)), list(ends), float(np.std(values, ddof=1))]
        figures[name], figures[f"{name}_interval"] = told[:2]
        if name.startswith("autointerp_score"):
            figures[name.replace("score", "std_dev")] = told[2]
    null = {name: "fewer than 2 latents" for name, value in figures.items() if value is None}
    n_active = cfg.judge_top + cfg.judge_sampled
    figures["always_none_saebench060"] = cfg.n_random / (cfg.n_random + n_active)
    return figures, null
