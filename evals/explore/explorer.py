"""A run's features, looked at one by one."""

from __future__ import annotations

import contextlib
import functools
import html
from pathlib import Path

from activations import models
from activations.models import Model
from activations.terminal import UserError
from dictlearn.artifact import Run
from dictlearn.interop import load
from evals.coding import frame
from evals.explore import attribution, find
from evals.explore.activity import Activity, activity
from evals.explore.display import Contexts, Rows, visible
from evals.explore.lens import Lens, lens
from evals.steering import interventions
from evals.steering.interventions import Mode


class Explorer:
    """Look at a run's features; in a notebook, what is returned shows itself.

        look = Explorer("runs/quickstart-001")
        look.card(7)
        look.find_features(["Paris is in France."] * 4, ["Water boils."] * 4)

    The model and the codes of the run's store are brought in when they are first needed.

    Arguments:
      model: where another explorer has it already.
      rows: of the store, at most so many; all, if left out.
    """

    def __init__(
        self, run: Run | Path | str, *, model: Model | None = None, rows: int | None = None
    ) -> None:
        self.run = run if isinstance(run, Run) else load(run)
        self._given, self._rows = model, rows

    @property
    def hook(self) -> str:
        """Whose activations the dictionary codes."""
        hook = self.run.metadata["hook"]
        if hook is None:
            raise UserError(f"{self.run.path}: does not say its hook")
        return hook

    @functools.cached_property
    def model(self) -> Model:
        """The language model."""
        spec = self.run.metadata["model"].get("spec")
        if self._given is None and spec is None:
            raise UserError(
                f"{self.run.path}: does not say its model; pass one: Explorer(run, model=...)"
            )
        return self._given or models.load(spec)

    @functools.cached_property
    def activity(self) -> Activity:
        """Codes of the run's store."""
        return activity(self.run, rows=self._rows)

    def top_contexts(self, feature: int, n: int = 10, *, sign: int = 0) -> Contexts:
        """Where a feature's |code| is greatest, in stretches that do not overlap.

        Arguments:
          sign: +1 or -1 for one tail of a feature with signed codes.
        """
        return Contexts(self.activity.contexts(feature, self.activity.top(feature, n, sign=sign)))

    def random_contexts(self, feature: int, n: int = 10, *, seed: int = 0) -> Contexts:
        """Where a feature fires, drawn: what its top contexts do not tell."""
        rows = self.activity.random(feature, n, seed=seed)
        return Contexts(self.activity.contexts(feature, rows))

    def lens(self, features: list[int], k: int = 10) -> Lens:
        """The logit lens of several features; see evals.explore.lens."""
        self._check(features)
        return lens(self.model, frame(self.run.coder)[0][features], k=k)

    def logit_lens(self, feature: int, k: int = 10) -> Rows:
        """The tokens that a feature's atom promotes and suppresses, by the logit lens."""
        seen = self.lens([feature], k)
        texts = [
            [self._text(i) for i in ids[0]] for ids in (seen.promoted, seen.suppressed)
        ]  # fmt: skip
        rows = [
            [up, f"{a:+.2f}", down, f"{b:+.2f}"]
            for up, a, down, b in zip(texts[0], seen.up[0], texts[1], seen.down[0], strict=True)
        ]
        heads = ["promoted", "logit", "suppressed", "logit"]
        return Rows(f"feature {feature}: logit lens", heads, rows)

    def card(self, feature: int, n: int = 5) -> Card:
        """What there is to see of a feature at once."""
        return Card(self, feature, n)

    def find_features(
        self, positive: list[str], negative: list[str], n: int = 10, *, seed: int = 0
    ) -> Rows:
        """The features that best tell texts from others, with AUROC on texts that did not choose
        them; see evals.explore.find."""
        found = find.find_features(
            self.run.coder, self.model, self.hook, positive, negative, n=n, seed=seed
        )
        rows = [
            [str(one.feature), f"{one.auroc:.3f}", f"{one.chosen_auroc:.3f}"] for one in found
        ]  # fmt: skip
        return Rows(
            "features that tell the texts apart",
            ["feature", "held-out AUROC", "AUROC by which chosen"],
            rows,
        )

    def attribute(self, prompt: str, target: str | None = None, n: int = 15) -> Rows:
        """What features, and what the dictionary does not explain, add to a prediction; see
        evals.explore.attribution."""
        seen = attribution.attribute(self.run.coder, self.model, self.hook, prompt, target)
        tokens = [visible(token) for token in seen.tokens]
        rows = [
            [str(f), f"{tokens[t]} ({t})", f"{code:.4g}", f"{effect:+.4f}"]
            for f, t, code, effect in zip(
                seen.feature[:n], seen.position[:n], seen.code[:n], seen.effect[:n], strict=True
            )
        ]
        rest = float(seen.effect[n:].sum())
        rows.append([f"{max(len(seen.effect) - n, 0)} others", "", "", f"{rest:+.4f}"])
        for name, own in (("error", ~seen.special), ("special tokens", seen.special)):
            rows.append([name, "all", "", f"{float(seen.error[own].sum()):+.4f}"])
        rows.append(["offset", "all", "", f"{float(seen.offset.sum()):+.4f}"])
        title = (
            f"log p({visible(seen.target)!r}) = {seen.log_p:.3f}: effects of the first order, nats"
        )
        return Rows(title, ["feature", "token (position)", "code", "effect"], rows)

    def steer(
        self, feature: int, strength: float = 0.0, mode: Mode = "add"
    ) -> contextlib.AbstractContextManager[None]:
        """Steer the model inside of a `with`; see evals.steering.steer."""
        return interventions.steer(
            self.model, self.run.coder, feature, strength, mode, hook=self.hook
        )

    def _check(self, features: list[int]) -> None:
        n = len(self.run.coder.atoms)
        for feature in features:
            if not 0 <= feature < n:
                raise UserError(f"feature {feature}: the dictionary has features 0 to {n - 1}")

    def _text(self, token: int) -> str:
        return visible(self.model.tokenizer.decode([int(token)]))


class Card:
    """A feature: how often it fires and how, its contexts, its logit lens."""

    def __init__(self, look: Explorer, feature: int, n: int) -> None:
        _, values = look.activity.of(feature)
        self.feature = feature
        n_rows = len(look.activity.place)
        told = [f"fires on {len(values):,} of {n_rows:,} tokens ({len(values) / n_rows:.3%})"]
        if len(values):
            told.append(f"codes {values.min():.4g} to {values.max():.4g}")
            share = float((values > 0).mean())
            if 0 < share < 1:
                told.append(f"{share:.0%} of them positive")
        self.told = "; ".join(told)
        signs = [sign for sign in (1, -1) if (sign * values > 0).any()]
        tails = {1: "positive codes", -1: "negative codes"}
        self.tops = {tails[sign]: look.top_contexts(feature, n, sign=sign) for sign in signs}
        self.random = look.random_contexts(feature, n)
        width = look.run.coder.dictionary.atoms.shape[1]
        residual = width == look.model.bridge.cfg.d_model
        self.lens = look.logit_lens(feature) if residual else None

    def _parts(self) -> dict[str, Contexts]:
        return {f"top: {name}": top for name, top in self.tops.items()} | {"drawn": self.random}

    def __repr__(self) -> str:
        parts = [f"feature {self.feature}: {self.told}"]
        parts += [f"{title}\n{own!r}" for title, own in self._parts().items()]
        return "\n\n".join([*parts, *([repr(self.lens)] if self.lens else [])])

    def _repr_html_(self) -> str:
        parts = [f"<h4>feature {self.feature}</h4><p>{html.escape(self.told)}</p>"]
        for title, own in self._parts().items():
            parts.append(f"<p><b>{html.escape(title)}</b></p>{own._repr_html_()}")
        return "".join([*parts, *([self.lens._repr_html_()] if self.lens else [])])
