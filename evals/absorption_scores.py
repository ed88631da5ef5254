"""Feature absorption as a pure function: SAEBench 0.6.0's formulas, for signed codes too.

A latent that should tell a word's first letter may stay silent where a narrower one fires, whose
atom holds the letter's direction as well. Per letter, with the direction w of a logistic probe on
the model's activations, u = w / ||w||, and codes f over atoms W, x = offset + f W:

    part_i = f_i <W_i, u>                       what latent i puts along the probe
    p      = <x, u>                             what is there
    main   = the fewest latents that tell the letter (evals.one_vs_rest.main_features)
    m      = sum of part_i over main
    A      = sum of the 3 greatest part_i > 0 of other latents with |cos(W_i, u)| >= 0.1
    fraction = 0 if m >= p or A < 0.4 p;  1 if m <= 0;  else q / (q + m) with q = min(A, p - m)
    full     = all main silent (|f_i| ||W_i|| < 1e-8), p > 0, and the latent with the greatest
               part_i has |cos| >= 0.025 and part_i >= 0.4 p

for each test word of the letter that the probe sees (logit > 0). A letter's scores are the means
over these words, the metrics are means and deviations over the letters whose probe has an F1 above
0.6, and are null with fewer than 20 such letters. "Main" begins with the latents in the order of
the letter's weight in a logistic probe on all latents with an L1 penalty.

Three readings stand side by side, the last two under marked names:

- plain: signed codes. (f_i, W_i) and (-f_i, -W_i) are the same latent, so a score may not depend on
  which was stored. Hence |cos| above, and latents with a negative code count as firing. Main
  latents are those that *predict* the letter by firing: the order is by weight times the sign that
  the latent's codes have, in sum, on the letter's training words. Where no code is negative this
  order is SAEBench's. (So are then the scores, but for a latent that points away from the probe:
  its part is not positive.)
- `_saebench`: SAEBench's own: order by the weight as it is, cos in place of |cos|, silent if
  f_i < 1e-8, so that a negative code is silent.
- `_centred`: plain, with p = <x - offset, u>. SAEBench lets p hold what bias and mean put along u,
  which no latent can explain; where that is large, the 0.4 p above is about the mean, not the word.

Other departures: the seed and the hook are honoured; the parts are measured on the prompts of the
probing, not on prompts drawn anew; atoms need not have unit norm, as SAEBench expects them to; the
probes are trained in JAX; words are a seeded sample, of 4,000 by default. The probe on latents sees
them in the coder's units, not the model's: Adam's steps know no scale, and at Gemma 3's norms of
some 7,000 dead latents come first. Where only a share of the vocabulary is asked for, its batch of
4,096 shrinks by that share: as many steps as the whole would take, where one an epoch are too few.
Without a normaliser's scale, and with all words, both are SAEBench's.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float
from pydantic import Field

from evals import one_vs_rest
from evals.one_vs_rest import Probe

# SAEBench's constants, by their meaning: see the equations above.
MIN_COS, MIN_TOP_COS, MIN_SHARE, MAX_ABSORBERS, SILENT = 0.1, 0.025, 0.4, 3, 1e-8
READINGS = ("", "_saebench", "_centred")
# Rows made dense at once.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; the defaults are SAEBench's, under its names where it has one.

    Attributes:
      hook: where the activations are read.
      seed: of the words, the split, the examples and the probes.
      n_words: a random sample of the vocabulary; None for the whole (hours on 2 cores).
      n_examples: solved lines before the word.
      max_k_value: most main features.
      f1_jump_threshold: what each of them adds to the F1.
      probe_epochs, probe_batch_size, probe_decay: of the probe on activations.
      k_sparse_probe_*: of the probe on latents; l1_decay is of its L1 penalty, batch_size with all
        words (see above).
      min_probe_f1: a letter counts above it (`min_GT_probe_f1`).
      min_feats_for_eval: letters that must count.
      llm_batch_size: prompts a forward pass.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    n_words: Annotated[int, Field(gt=0)] | None = 4000
    n_examples: Annotated[int, Field(ge=0)] = 10
    max_k_value: Annotated[int, Field(gt=0)] = 10
    f1_jump_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.03
    probe_epochs: Annotated[int, Field(gt=0)] = 50
    probe_batch_size: Annotated[int, Field(gt=0)] = 64
    probe_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    k_sparse_probe_l1_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    k_sparse_probe_batch_size: Annotated[int, Field(gt=0)] = 4096
    k_sparse_probe_num_epochs: Annotated[int, Field(gt=0)] = 50
    k_sparse_probe_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    min_probe_f1: Annotated[float, Field(ge=0, lt=1)] = 0.6
    min_feats_for_eval: Annotated[int, Field(gt=0)] = 20
    llm_batch_size: Annotated[int, Field(gt=0)] = 32

    def quick(self) -> Config:
        """A size that ends within 3 minutes for Gemma 3 270M on 2 cores.

        Fewer examples in a prompt, which is what costs, and 10 letters are enough: with so few
        words, the rare letters have no good probe.
        """
        return dataclasses.replace(self, n_words=3000, n_examples=3, min_feats_for_eval=10)


@dataclasses.dataclass(frozen=True, eq=False)
class Half:
    """Rows of one half of the split.

    Attributes:
      x: activations.
      codes: over the atoms [n m].
      y: whether each row is of each class.
    """

    x: Float[np.ndarray, "n d"]
    codes: scipy.sparse.csr_array
    y: Bool[np.ndarray, "n C"]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassScore:
    """One class, a letter say.

    Attributes:
      probe_f1: of the probe on activations, on the test rows.
      reason: why there are no scores, or None.
      rows: test rows of the class with a positive logit [t].
      main, main_f1: for each reading, the main features, and the F1 of the regression on them.
      fraction, full: for each reading, of these rows [t].
    """

    name: str
    probe_f1: float | None
    reason: str | None
    rows: np.ndarray
    main: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    main_f1: dict[str, float] = dataclasses.field(default_factory=dict)
    fraction: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    full: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def table(self) -> dict[str, Any]:
        """SAEBench's row of details for the plain reading, the others beside it."""
        n = len(self.rows)
        row: dict[str, Any] = {"first_letter": self.name}
        for reading in READINGS:
            full = int(self.full[reading].sum())
            row |= {
                f"mean_absorption_fraction{reading}": float(self.fraction[reading].mean()),
                f"full_absorption_rate{reading}": full / n,
                f"num_full_absorption{reading}": full,
                f"num_split_features{reading}": len(self.main[reading]),
                f"main_features{reading}": self.main[reading],
                f"main_features_f1{reading}": self.main_f1[reading],
            }
        return row | {"num_probe_true_positives": n, "probe_f1": self.probe_f1}


def absorbed(
    codes: scipy.sparse.csr_array,
    atoms: Float[np.ndarray, "m d"],
    x: Float[np.ndarray, "n d"],
    direction: Float[np.ndarray, " d"],
    main: list[int],
    *,
    signed: bool = True,
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Fraction and full absorption of each row, by the equations at the top of this file.

    Arguments:
      x: what p is measured on; without the offset for the centred reading.
      direction: of the probe, of any norm but 0.
      main: features; the others may absorb them.
      signed: the plain reading; False for SAEBench's.
    """
    unit = np.asarray(direction, np.float64) / np.linalg.norm(direction)
    atoms = np.asarray(atoms, np.float64)
    norm, along = np.linalg.norm(atoms, axis=1), atoms @ unit
    cos = np.divide(along, norm, out=np.zeros_like(along), where=norm > 0)
    aligned = np.abs(cos) if signed else cos
    may_absorb = aligned >= MIN_COS
    may_absorb[main] = False
    p = np.asarray(x, np.float64) @ unit
    fraction, full = np.zeros(len(p)), np.zeros(len(p), bool)
    for first in range(0, len(p), _BLOCK):
        rows = slice(first, first + _BLOCK)
        f, there = codes[rows].toarray().astype(np.float64), p[rows]
        part = f * along[None]
        m = part[:, main].sum(axis=1)
        others = np.maximum(part, 0) * may_absorb[None]
        greatest = np.sort(others, axis=1)[:, -MAX_ABSORBERS:].sum(axis=1)
        # Where nothing lies along the probe (p <= 0), nothing is absorbed.
        some = (m < there) & (greatest >= MIN_SHARE * there) & (there > 0)
        q = np.minimum(greatest, there - m)
        share = np.divide(q, q + m, out=np.ones_like(q), where=m > 0)
        fraction[rows] = np.where(some, share, 0)

        firing = f[:, main] * norm[None, main]
        silent = ((np.abs(firing) if signed else firing) < SILENT).all(axis=1)
        top = part.argmax(axis=1)
        told = part[np.arange(len(top)), top] >= MIN_SHARE * there
        full[rows] = silent & (aligned[top] >= MIN_TOP_COS) & (there > 0) & told
    return fraction, full


def score(
    train: Half,
    test: Half,
    atoms: Float[np.ndarray, "m d"],
    offset: Float[np.ndarray, " d"],
    probe: Probe,
    names: list[str],
    cfg: Config,
    *,
    unit: float = 1.0,
) -> list[ClassScore]:
    """Every class's scores: rows, codes, atoms and probe in, no model; x is about offset + f W.

    A class whose probe is too weak, or without training or test rows, has a reason in place of
    scores. Deterministic given `cfg.seed`.

    Arguments:
      atoms: W, in the units of x.
      unit: f ||W|| is divided by it for the probes on latents.
    """
    norm = np.linalg.norm(np.asarray(atoms, np.float64), axis=1)
    # Latents over atoms of unit norm, as SAEBench's are.
    train_f, test_f = (
        scipy.sparse.csr_array(half.codes.multiply(norm[None] / unit)) for half in (train, test)
    )
    ranking = one_vs_rest.fit(
        train_f, train.y, batch_size=cfg.k_sparse_probe_batch_size,
        epochs=cfg.k_sparse_probe_num_epochs, decay=cfg.k_sparse_probe_decay,
        l1=cfg.k_sparse_probe_l1_decay, seed=cfg.seed,
    ).weight  # fmt: skip
    told = probe.logits(test.x) > 0
    scores = []
    for c, name in enumerate(names):
        y, unseen = train.y[:, c], test.y[:, c]
        f1 = one_vs_rest.f1(unseen, told[:, c]) if unseen.any() else None
        reason = _reason(int(y.sum()), len(y), f1, cfg)
        rows = np.flatnonzero(unseen & told[:, c])
        one = ClassScore(name, f1, reason, rows)
        scores.append(one)
        if reason is not None:
            continue
        main = _main(ranking[c], (train_f, y), (test_f, unseen), cfg)
        for reading in READINGS:
            signed = reading != "_saebench"
            x = test.x[rows] - offset[None] if reading == "_centred" else test.x[rows]
            chosen, one.main_f1[reading] = main[signed]
            one.main[reading] = chosen
            one.fraction[reading], one.full[reading] = absorbed(
                test.codes[rows], atoms, x, probe.weight[c], chosen, signed=signed
            )
    return scores


def _main(
    weight: Float[np.ndarray, " m"],
    train: tuple[scipy.sparse.csr_array, Bool[np.ndarray, " n"]],
    test: tuple[scipy.sparse.csr_array, Bool[np.ndarray, " n"]],
    cfg: Config,
) -> dict[bool, tuple[list[int], float]]:
    """A class's main features and their F1: for signed codes (True), and as SAEBench finds them."""
    codes, y = train
    total = np.asarray(codes[y].sum(axis=0)).ravel()
    found: dict[tuple[int, ...], tuple[list[int], float]] = {}
    main = {}
    for signed in (True, False):
        toward = weight * np.where(signed & (total < 0), -1, 1)
        order = tuple(np.argsort(-toward, kind="stable")[: cfg.max_k_value].tolist())
        if order not in found:
            features, scores = one_vs_rest.main_features(
                order, train, test, jump=cfg.f1_jump_threshold
            )
            found[order] = features, scores[len(features) - 1]
        main[signed] = found[order]
    return main


def _reason(n_positive: int, n: int, f1: float | None, cfg: Config) -> str | None:
    """Why a class has no scores."""
    if n_positive == 0:
        return "no training word"
    if n_positive == n:
        return "every training word is of it"
    if f1 is None:
        return "no test word"
    if f1 <= cfg.min_probe_f1:
        return f"the probe's F1 is {f1:.2f}, not above {cfg.min_probe_f1}"
    return None
