"""Taking latents out, for SCR and TPP: probes, the latents that feed them, rows without these.

A linear probe w reads a concept from the mean of a text's activations. With mean codes f over atoms
W, and Delta_j = mean f_j over texts of the concept - mean over the others, latents are chosen by

    SCR: |Delta_j (w . W_j)|,    TPP: Delta_j (w . W_j) of latents that fire more with the concept,

and the n greatest, S, are taken out: x' = x - sum_{j in S} f_j W_j. Probes stay as they are.

SAEBench's figures stand beside ours with the suffix `_saebench060`. Where ours depart from it:

- A probe's epoch is chosen by a fifth of the training texts, not by the test texts.
- Latents that fire at x = 0 are not taken out of special tokens and padding, as SAEBench does.
- TPP: latents fire more by mean |f|, so that (f, W) and (-f, -W) are one latent; theirs by mean f.
- A class's texts of the other classes are drawn once a seed. Codes are over atoms of unit norm.

Source: SAEBench 0.6.0, `scr_and_tpp`; Karvonen et al., "Evaluating sparse autoencoders on targeted
concept erasure tasks" (arXiv 2411.18895).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from activations.terminal import progress
from dictlearn.dictionary import Coder
from evals.coding import frame, norms
from evals.linear_probe import LinearProbe, adamw, mean_difference
from evals.pooled import Pooled, at_zero
from evals.results import Result
from evals.sparse_probing import spread

CAVEAT = (
    "an audit of SAEBench (arXiv 2605.18229) finds SCR and TPP unreliable at these settings: "
    "look at the spread over seeds, and rest no verdict on them alone"
)
THEIRS = "_saebench060"
# Indices of texts, and which of them are of the concept.
Texts = tuple[np.ndarray, Bool[np.ndarray, " r"]]


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Settings that both share; numbers that are not told are SAEBench's.

    Attributes:
      hook: where activations are read.
      train_per_class, test_per_class: texts; left out: what there is, 4 to 1, up to max_per_class.
      context_length: tokens of a text, BOS included.
      n_values: how many latents are taken out.
      epochs, batch_size, learning_rate, l1: of the probes. The batch size decides how far a probe
        learns the spurious correlation.
      seed, n_seeds: the texts are drawn by the first, seed to seed + n_seeds - 1 do the rest.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    train_per_class: Annotated[int, Field(ge=10)] | None = None
    test_per_class: Annotated[int, Field(ge=2)] | None = None
    max_per_class: Annotated[int, Field(ge=10)] = 2500
    context_length: Annotated[int, Field(ge=2)] = 128
    n_values: tuple[Annotated[int, Field(ge=1)], ...] = (2, 5, 10, 20, 50, 100, 500)
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 16
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    n_seeds: Annotated[int, Field(ge=1)] = 3


class Bench:
    """Rows and a dictionary: trains probes, chooses latents, takes them out.

    Arguments:
      rows: of all texts.
      atoms: of unit norm in the units of the codes, [a d].
      padded: tokens of a text with its padding.
      zero: codes of the row 0 [a], over the same atoms.
      saebench: do all as SAEBench does.
    """

    def __init__(
        self,
        rows: Pooled,
        atoms: Float[np.ndarray, "a d"],
        cfg: AblationConfig,
        *,
        padded: int | None = None,
        zero: Float[np.ndarray, " a"] | None = None,
        saebench: bool = False,
    ) -> None:
        self.rows, self.atoms, self.cfg, self.saebench = rows, atoms, cfg, saebench
        self._leak = None
        if saebench and zero is not None and padded is not None and zero.any():
            self._leak = (padded / rows.n_tokens - 1)[:, None], zero

    def train(self, halves: Texts, test: Texts, seed: int) -> LinearProbe:
        """A probe on mean activations: indices, and which of them are of the concept."""
        cfg, (index, y) = self.cfg, halves
        chosen_by = test
        if not self.saebench:
            fifth = -(-len(index) // 5)
            chosen_by = index[:fifth], y[:fifth]
            index, y = index[fifth:], y[fifth:]
        return adamw(
            self.rows.x[index], y, (self.rows.x[chosen_by[0]], chosen_by[1]),
            learning_rate=cfg.learning_rate, batch_size=cfg.batch_size, epochs=cfg.epochs,
            patience=cfg.epochs, l1=cfg.l1, seed=seed,
        )  # fmt: skip

    def effects(
        self, probe: LinearProbe, halves: Texts, kind: Literal["scr", "tpp"]
    ) -> Float[np.ndarray, " a"]:
        """By how much each latent puts the concept into the probe."""
        index, y = halves
        codes = self.rows.codes[index]
        difference = mean_difference(codes, y)
        along = self.atoms @ probe.weight
        if kind == "scr":
            return np.abs(difference * along)
        more = difference if self.saebench else mean_difference(abs(codes), y)
        return np.where(more > 0, difference * along, 0)

    def without(
        self, effects: Float[np.ndarray, " a"], n: int, index: np.ndarray
    ) -> Float[np.ndarray, "r d"]:
        """Rows with the n latents of greatest effect taken out; of those whose effect is not 0."""
        chosen = np.argsort(-effects, kind="stable")
        chosen = chosen[effects[chosen] != 0][:n]
        codes = self.rows.codes[:, chosen][index].toarray().astype(np.float64)
        if self._leak is not None:
            share, zero = self._leak
            codes = codes + share[index] * zero[chosen][None]
        return self.rows.x[index] - codes @ self.atoms[chosen]


def benches(coder: Coder, rows: Pooled, cfg: AblationConfig) -> dict[str, Bench]:
    """Ours, and SAEBench's by its suffix."""
    atoms = frame(coder)[0]
    norm = norms(coder)
    unit = atoms / np.where(norm > 0, norm, 1)[:, None]
    settings: dict[str, Any] = {"padded": cfg.context_length, "zero": at_zero(coder)}
    return {
        suffix: Bench(rows, unit, cfg, saebench=bool(suffix), **settings) for suffix in ("", THEIRS)
    }


def over_seeds(
    coder: Coder,
    rows: Pooled,
    cfg: AblationConfig,
    name: str,
    measure: Callable[[Bench, list[int], int], dict[str, float]],
) -> dict[str, float | None]:
    """What `measure` says of a bench, numbers of latents and a seed: means and deviations over the
    seeds, of ours and of SAEBench's by its suffix."""
    found, both = [], benches(coder, rows, cfg)
    seeds = range(cfg.seed, cfg.seed + cfg.n_seeds)
    for seed in progress(iterable=seeds, desc=name, unit="seed", delay=3):
        found.append({})
        for suffix, bench in both.items():
            told = measure(bench, n_values(coder, cfg), seed)
            found[-1] |= {f"{key}{suffix}": value for key, value in told.items()}
    return spread(found)


def n_values(coder: Coder, cfg: AblationConfig) -> list[int]:
    """Those that the dictionary has latents for."""
    return [n for n in cfg.n_values if n <= len(coder.atoms)]


def result(family: str, cfg: AblationConfig, coder: Coder, details: list[dict[str, Any]]) -> Result:
    """Means over the data sets; a figure that all leave out is None."""
    found: dict[str, float | None] = {}
    null = {}
    category = f"{family}_metrics"
    for key in details[0]:
        if not key.startswith(f"{family}_"):
            continue
        values = np.array([row[key] for row in details], float)
        values = values[~np.isnan(values)]
        found[key] = None
        if len(values):
            found[key] = float(values.mean())
            if key.endswith("_seed_std"):  # of the mean over the sets
                found[key] = float(np.sqrt((values**2).sum()) / len(values))
        elif key.endswith("_seed_std"):
            null[f"{category}.{key}"] = "fewer than two seeds have a score"
        else:
            null[f"{category}.{key}"] = "the biased probe is as good as the clean one"
    there = n_values(coder, cfg)
    for n in set(cfg.n_values) - set(there):
        for key in list(found):
            name, count = re.subn(rf"_threshold_{there[0]}(?=_|$)", f"_threshold_{n}", key)
            if count:
                found[name] = None
                null[f"{category}.{name}"] = f"the dictionary has {len(coder.atoms)} latents"
    return Result(
        family, dataclasses.asdict(cfg), {category: found}, details, {"caveat": CAVEAT}, null
    )
