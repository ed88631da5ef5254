"""Which figures a report shows: in its verdicts, its tables and its plots."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shown:
    """A figure that the report shows.

    Attributes:
      better: "lower" or "higher"; "" where neither is.
      encoder: by which the dictionary is coded.
      varies: whether its interval is shown: times vary with the machine.
    """

    title: str
    family: str
    figure: str
    better: str
    encoder: str = "own"
    digits: int = 4
    varies: bool = True


BULK = Shown("fvu_bulk", "fit", "fvu_bulk", "lower")
BULK_OMP = Shown("fvu_bulk, coded by OMP", "fit", "fvu_bulk", "lower", "omp")
FVU = Shown("fvu", "fit", "fvu", "lower")
CE = Shown("CE increase, nats", "core", "headline.ce_increase", "lower")
L0 = Shown("L0", "fit", "l0", "", digits=1)
SECONDS = Shown("seconds of the fit", "fit", "seconds", "lower", digits=0, varies=False)
ALIVE = Shown("alive", "fit", "frac_alive", "higher")
TWINS = Shown("twins", "fit", "twins", "lower")
KL = Shown("KL, nats", "core", "headline.kl", "lower")
PROBING = tuple(
    Shown(f"probing, {k} latent{'s' * (k > 1)}", "sparse_probing",
          f"sae.sae_top_{k}_test_accuracy", "higher")
    for k in (1, 2, 5)
)  # fmt: skip
# The same for all dictionaries, so that it is not judged.
PROBING_MODEL = Shown(
    "probing, the model's own 5", "sparse_probing", "llm.llm_top_5_test_accuracy", ""
)
# Neither is better: atoms that know nothing of letters absorb nothing.
ABSORPTION = (Shown("absorption", "absorption", "mean.mean_absorption_fraction_score", ""),)
STEERING = (
    Shown("steering score", "steering", "feature.score", "higher"),
    Shown("steering effect", "steering", "feature.effect", "higher"),
    Shown("fluent", "steering", "feature.fluent", "higher"),
    Shown("logit shift", "steering", "feature.logit_shift", "higher"),
    Shown("score above difference of means", "steering", "diff_means.feature_above", "higher"),
    Shown("score above random feature", "steering", "random_feature.feature_above", "higher"),
    Shown("antonyms by one sign", "steering", "bidirectionality.separated", "higher"),
)
JUDGED = (BULK, BULK_OMP, FVU, CE, KL, *PROBING, *ABSORPTION, *STEERING)
TABLED = (BULK, FVU, CE, KL, *PROBING, PROBING_MODEL, *ABSORPTION, *STEERING,
          L0, ALIVE, TWINS, SECONDS)  # fmt: skip
# y against x, both with intervals over seeds.
PLOTS = ((BULK, L0), (FVU, L0), (CE, L0), (BULK, SECONDS), (ALIVE, L0),
         *((shown, L0) for shown in (PROBING[0], PROBING[-1], *ABSORPTION, STEERING[0])),
         )  # fmt: skip
