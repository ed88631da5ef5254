"""Indirect object identification (IOI): a dictionary beside one that was told the attributes.

    When Mary and John went to the store, John gave a drink to      -> " Mary"

At each position that is read, the supervised dictionary writes the activation of a prompt as

    a ~ mean + v[io = who] + v[s = who] + v[order = which],    v[attribute = value] [d],

and it is the measure of any other in three things, on prompts with contexts that it has not seen:

- approximation: activations are replaced by what a dictionary makes of them. Of the logit
  difference ld = logit(IO) - logit(S) is kept (ld - ld of the mean) / (ld of the model - ld of the
  mean), of means over prompts; and the KL divergence from the model's distribution, in nats.
- control: one attribute is edited to another value. Supervised: a - v[old] + v[new]. A dictionary:
  at most n codes at each position are swapped for those of the counterfactual prompt's activation
  a', chosen greedily for the least ||a' - a - sum_i (f'_i - f_i) atom_i||; what it does not explain
  of a stays. Success: the model names whom it names with a' in the place of a (greatest logit of
  all names), among the edits where that is another than before (`_changed` is their share).
- interpretability: F1 of "a latent fires" for "attribute = value": the best latent, at the best
  position, on the prompts for training, read on those for testing, as a mean over values.

Controls: the mean in the activation's place (`mean_`); dictionaries with atoms exchanged at random,
codes to swap and latents drawn at random (`random_`); labels that were shuffled (`shuffled_`);
coordinates of the activations, either side of their mean (`llm_`). In interpretability
`supervised_` is a linear discriminant, whose class means are the supervised dictionary's.

Source: Makelov, Lange and Nanda, arXiv 2405.08366. Where this departs: they read heads of GPT-2
small's known circuit, this any hook at the tokens S2 and the last, because there a model has worked
out what the names before them are to each other; activations of IO and S1 hold little else than
their own names. Editing a code that both prompts have counts once, not as one out and one in.
Edits on which the counterfactual's activation changes nothing are left out: doing nothing would
succeed there. Intervals are 95 %, by bootstrap over the prompts for testing.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import numpy as np
import scipy.sparse
from jaxtyping import Float
from pydantic import Field
from scipy.special import log_softmax

from activations.models import Model
from activations.terminal import progress
from dictlearn.dictionary import Coder
from dictlearn.metrics import bootstrap_mean
from evals.coding import coded, frame
from evals.ioi.interpretability import interpretability
from evals.ioi.prompts import ATTRIBUTES, Role, Rows, Task, Values, X, batches, prepare
from evals.lm import check_hook, check_width
from evals.results import Metrics, Result

FAMILY = "ioi"
# Share of prompts on which IO must be above S; half of them would be by chance.
LEAST_RIGHT = 0.8
# Edits that change the answer, for a share of them to be told.
LEAST_EDITS = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      hook: where activations are read.
      positions: the tokens where they are; all of them are replaced or edited together.
      fit: of the supervised dictionary: v = mean of a where the attribute has the value - mean of
        all, or least squares of all attributes at once.
      n_names: of which prompts are made.
      n_train, n_test: prompts.
      n_latents: whose codes are swapped at each position.
      seed: of prompts, controls and intervals.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    positions: Annotated[tuple[Role, ...], Field(min_length=1)] = ("s2", "end")
    fit: Literal["means", "lstsq"] = "means"
    n_names: Annotated[int, Field(ge=3, le=40)] = 20
    n_train: Annotated[int, Field(ge=20)] = 1000
    n_test: Annotated[int, Field(ge=20)] = 200
    n_latents: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (
        1,
        2,
        4,
        8,
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def quick(self) -> Config:
        """Ten names, 380 prompts, one number of latents."""
        return dataclasses.replace(self, n_names=10, n_train=320, n_test=60, n_latents=(4,))


@dataclasses.dataclass(frozen=True, eq=False)
class Supervised:
    """mean [r d] and v [V r d] of each attribute; a ~ rebuild(its values)."""

    mean: Float[np.ndarray, "r d"]
    v: tuple[Float[np.ndarray, "V r d"], ...]

    def rebuild(self, value: Values) -> X:
        """mean + sum of v[attribute = value]."""
        return self.mean + sum(v[own] for v, own in zip(self.v, value.T, strict=True))


def supervise(rows: Rows, n_names: int, fit: str) -> Supervised:
    """Fit the supervised dictionary, see `Config.fit`.

    Conditional means count what IO tells of S, which is never the same name; least squares, of the
    least norm, does not, but tells v only up to a constant an attribute, which edits do not see.
    """
    x = rows.x.astype(np.float64)
    mean, sizes = x.mean(axis=0), (n_names, n_names, 2)
    hot = [own[:, None] == np.arange(size) for own, size in zip(rows.value.T, sizes, strict=True)]
    centred = (x - mean).reshape(len(x), -1)  # [n r*d]
    if fit == "lstsq":
        v = np.linalg.lstsq(np.concatenate(hot, axis=1).astype(np.float64), centred)[0]
    else:
        v = np.concatenate([(one / one.sum(axis=0)).T @ centred for one in hot])
    parts = np.split(v.reshape(-1, *mean.shape), np.cumsum(sizes)[:-1])
    return Supervised(mean, tuple(parts))


def measure(coder: Coder, task: Task, cfg: Config) -> Result:
    """A dictionary's scores, on what was read before.

    Raises:
      UserError: the dictionary is of another width than the hook.
    """
    check_width(coder, cfg.hook, task.test.x.shape[-1])
    clean = names(task, task.test.x)
    metrics: Metrics = {"task": ability(task, clean, cfg)}
    null: dict[str, str] = {}
    if metrics["task"]["io_over_s"] < LEAST_RIGHT:
        reason = (
            f"the model has IO above S on {metrics['task']['io_over_s']:.1%} of the prompts, "
            f"expected {LEAST_RIGHT:.0%}: it does not do this task"
        )
        metrics |= {
            "approximation": dict.fromkeys(("sae_kept", "sae_kl")),
            "control": {f"{a}_sae_{n}_success": None for a in ATTRIBUTES for n in cfg.n_latents},
            "interpretability": {f"{a}_sae_f1": None for a in ATTRIBUTES},
        }
        null = {f"{c}.{key}": reason for c in list(metrics)[1:] for key in metrics[c]}
        return Result(FAMILY, dataclasses.asdict(cfg), metrics, null=null)
    told = supervise(task.train, len(task.name_id), cfg.fit)
    metrics["approximation"], unstable = approximation(coder, task, told, cfg)
    metrics["control"], reasons = control(coder, task, told, clean, cfg)
    metrics["interpretability"] = interpretability(coder, task, seed=cfg.seed)
    null |= {f"approximation.{key}": reason for key, reason in unstable.items()}
    null |= {f"control.{key}": reason for key, reason in reasons.items()}
    return Result(FAMILY, dataclasses.asdict(cfg), metrics, null=null)


def run(coder: Coder, model: Model, cfg: Config) -> Result:
    """Measure a dictionary of a model's activations at `cfg.hook`.

    A model that does not do the task gives a result whose figures are None, with the reason.

    Raises:
      UserError: as `prepare`; the dictionary does not fit the hook.
    """
    check_hook(coder, model, cfg.hook)  # before the model runs for minutes
    task = prepare(
        model, cfg.hook, cfg.positions, n_names=cfg.n_names, n_train=cfg.n_train,
        n_test=cfg.n_test, seed=cfg.seed,
    )  # fmt: skip
    return measure(coder, task, cfg)


def names(task: Task, x: X) -> Float[np.ndarray, "n m"]:
    """Logits of the names at the end of the prompts for testing, with x put in."""
    return np.concatenate([task.answer(b, x[b])[:, task.name_id] for b in batches(len(x))])


def difference(task: Task, logits: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " n"]:
    """logit(IO) - logit(S)."""
    io, s = np.take_along_axis(logits, task.test.value[:, :2], axis=1).astype(np.float64).T
    return io - s


def ability(task: Task, clean: Float[np.ndarray, "n m"], cfg: Config) -> dict[str, Any]:
    """How well the model itself does: IO above S, and above all names."""
    right = {
        "io_over_s": difference(task, clean) > 0,
        "io_first": clean.argmax(axis=1) == task.test.value[:, 0],
        "logit_difference": difference(task, clean),
    }
    return _means(right, cfg)


def approximation(
    coder: Coder, task: Task, told: Supervised, cfg: Config
) -> tuple[dict[str, Any], dict[str, str]]:
    """What is kept of the logit difference, KL(model || with x_hat) in nats, and why any is None.

    Where the mean loses nothing that can be told from 0, no share of it is kept.
    """
    x = task.test.x
    put = {
        "sae": coded(coder, x.reshape(-1, x.shape[-1]))[1].reshape(x.shape),
        "random": _exchanged(coder, x, cfg),
        "supervised": told.rebuild(task.test.value),
        "mean": np.broadcast_to(told.mean, x.shape),
    }
    parts: dict[str, list[np.ndarray]] = {key: [] for key in ("clean", *put)}
    kl: dict[str, list[np.ndarray]] = {key: [] for key in put}
    for rows in progress(iterable=batches(len(x)), desc="IOI approximation", delay=3):
        clean = log_softmax(task.answer(rows, x[rows]).astype(np.float64), axis=1)  # [b v]
        parts["clean"].append(clean[:, task.name_id])
        for key, own in put.items():
            other = log_softmax(task.answer(rows, own[rows]), axis=1)
            parts[key].append(other[:, task.name_id])
            kl[key].append((np.exp(clean) * (clean - other)).sum(axis=1))
    ld = {key: difference(task, np.concatenate(own)) for key, own in parts.items()}
    lost = ld["clean"] - ld["mean"]
    found = _means({f"{key}_logit_difference": ld[key] for key in ("clean", "mean")}, cfg)
    null: dict[str, str] = {}
    low, high = bootstrap_mean(lost, np.ones(len(lost)), seed=cfg.seed)
    for key in ("sae", "random", "supervised"):
        if low <= 0 <= high:
            found |= {f"{key}_kept": None, f"{key}_kept_interval": None}
            null[f"{key}_kept"] = (
                f"with the mean in its place the activation loses {lost.mean():.3f} of the logit "
                f"difference ({low:.3f} to {high:.3f}): the task does not pass here"
            )
            continue
        kept = ld[key] - ld["mean"]
        found[f"{key}_kept"] = float(kept.mean() / lost.mean())
        found[f"{key}_kept_interval"] = bootstrap_mean(kept, lost, seed=cfg.seed)
    found |= _means({f"{key}_kl": np.concatenate(own) for key, own in kl.items()}, cfg)
    return found, null


def _exchanged(coder: Coder, x: X, cfg: Config) -> X:
    """Reconstructions by codes whose atoms were exchanged at random; carriers stay."""
    (codes, _), (atoms, offset) = coded(coder, x.reshape(-1, x.shape[-1])), frame(coder)
    order = np.random.default_rng(cfg.seed).permutation(len(coder.dictionary.atoms))
    order = np.concatenate([order, np.arange(len(order), len(atoms))])
    return (codes @ atoms[order] + offset).reshape(x.shape)


def control(
    coder: Coder, task: Task, told: Supervised, clean: Float[np.ndarray, "n m"], cfg: Config
) -> tuple[dict[str, Any], dict[str, str]]:
    """Success of edits of each attribute, their size, and why any figure is None.

    An edit's size is its norm by that of a - mean, over all positions: the mean is left out, as a
    few coordinates of it can be greater than all that prompts differ in.
    """
    x, found, null = task.test.x, {}, {}
    before, absent = (
        own.argmax(axis=1) for own in (clean, names(task, np.broadcast_to(told.mean, x.shape)))
    )
    for attribute, other in task.counterfactual.items():
        goal = names(task, other.x).argmax(axis=1)
        there = goal != before
        found |= _means({f"{attribute}_changed": there}, cfg)
        step = told.rebuild(other.value) - told.rebuild(task.test.value)
        edits = {"patched": other.x - x, "supervised": step} | swaps(coder, x, other.x, cfg)
        if there.sum() < LEAST_EDITS:
            keys = [f"{attribute}_{name}_success" for name in (*list(edits)[1:], "mean")]
            found |= dict.fromkeys(keys)
            null |= dict.fromkeys(
                keys,
                f"with the counterfactual's activation the model answers otherwise on "
                f"{there.sum()} prompts, expected {LEAST_EDITS}: at these positions of this hook "
                "the attribute has no effect",
            )
            continue
        found |= _means({f"{attribute}_mean_success": (absent == goal)[there]}, cfg)
        for name, edit in progress(
            iterable=edits.items(), desc=f"IOI edits of {attribute}", delay=3
        ):
            size = np.linalg.norm(edit, axis=(1, 2)) / np.linalg.norm(x - told.mean, axis=(1, 2))
            told_of = {"size": size[there]}
            if name != "patched":  # 1 by definition
                told_of["success"] = (names(task, x + edit).argmax(axis=1) == goal)[there]
            found |= _means({f"{attribute}_{name}_{key}": own for key, own in told_of.items()}, cfg)
    return found, null


def swaps(coder: Coder, x: X, other: X, cfg: Config) -> dict[str, X]:
    """Edits x -> x + edit, each by at most n codes at a position that become the other prompt's.

    Returns:
      For each n "sae_n", chosen greedily for the least ||other - x - edit||, and "random_n".
    """
    (here, _), (there, _) = (coded(coder, one.reshape(-1, x.shape[-1])) for one in (x, other))
    atoms, change = frame(coder)[0], scipy.sparse.csr_array(there - here)
    change.eliminate_zeros()
    goal = (other - x).reshape(-1, x.shape[-1])
    rng = np.random.default_rng(cfg.seed)
    edits = {
        f"{name}_{n}": np.zeros(goal.shape) for n in cfg.n_latents for name in ("sae", "random")
    }
    for i, (first, last) in enumerate(zip(change.indptr[:-1], change.indptr[1:], strict=True)):
        parts = change.data[first:last, None] * atoms[change.indices[first:last]]  # [c d]
        orders = {
            "sae": greedy(parts, goal[i], max(cfg.n_latents)), "random": rng.permutation(len(parts))
        }  # fmt: skip
        for n in cfg.n_latents:
            for name, order in orders.items():
                edits[f"{name}_{n}"][i] = parts[order[:n]].sum(axis=0)
    return {key: edit.reshape(x.shape) for key, edit in edits.items()}


def greedy(parts: Float[np.ndarray, "c d"], goal: Float[np.ndarray, " d"], most: int) -> list[int]:
    """Which parts to add up for the least ||goal - sum||, each the best after those before it.

    Ends where no part that is left lowers it.
    """
    gram, inner = parts @ parts.T, parts @ goal
    chosen: list[int] = []
    while len(chosen) < min(most, len(parts)):
        # ||rest||^2 - ||rest - part||^2
        gain = 2 * inner - gram.diagonal()
        gain[chosen] = 0
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        chosen.append(best)
        inner = inner - gram[best]
    return chosen


def _means(values: dict[str, np.ndarray], cfg: Config) -> dict[str, Any]:
    """The mean of each over prompts, with its interval."""
    found: dict[str, Any] = {}
    for key, own in values.items():
        found[key] = float(np.mean(own))
        found[f"{key}_interval"] = bootstrap_mean(own, np.ones(len(own)), seed=cfg.seed)
    return found
