"""A model while a direction at one of its hooks is changed: added to, clamped, or taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from evals.coding import frame
from evals.lm import check_hook

Mode = Literal["add", "clamp", "ablate"]


@contextlib.contextmanager
def steer(
    model: Model,
    coder: Coder,
    feature: int,
    strength: float | Float[np.ndarray, " b"] = 0.0,
    mode: Mode = "add",
    *,
    hook: str,
) -> Iterator[None]:
    """Steer what a model does inside of a `with`, by one feature of a dictionary.

        add:     x <- x + s u
        clamp:   x <- x + (s - f) u
        ablate:  x <- x - f u

    u is the feature's atom at unit norm in the units of raw activations, f its code times the norm
    that was divided by: strengths are lengths of raw activations, the same in every mode and for
    every dictionary. What the dictionary does not explain stays. It works for forward passes and
    for `model.bridge.generate`, with its cache:

        with steer(model, run.coder, 7, 40.0, hook=run.metadata["hook"]):
            text = model.bridge.generate("I think that", max_new_tokens=50)

    The first position of a prompt is left as it is: models put BOS and an attention sink there, and
    dictionaries are fitted without it. A forward over one position, as generation with a cache does
    it, is steered.

    Arguments:
      strength: s; one number, or one a sequence of the batch; of no use to "ablate".
      hook: where the dictionary's activations come from.

    Raises:
      UserError: there is no such feature, hook or mode, or a strength is not finite.
    """
    check_hook(coder, model, hook)
    atoms = frame(coder)[0]
    if not 0 <= feature < len(atoms):
        raise UserError(f"feature {feature}: the dictionary has features 0 to {len(atoms) - 1}")
    norm = float(np.linalg.norm(atoms[feature]))
    if norm == 0:
        raise UserError(f"feature {feature}: its atom is zero, and points nowhere")
    unit = atoms[feature] / norm
    if mode == "add":
        with adding(model, hook, unit, strength):
            yield
        return
    if mode not in ("clamp", "ablate"):
        raise UserError(f"mode {mode!r}: expected add, clamp or ablate")
    prepared = coder.prepare()
    goal = _column(strength) if mode == "clamp" else torch.zeros(1, 1)

    def change(x: torch.Tensor) -> torch.Tensor:
        b, c, d = x.shape
        codes = prepared.encode(x.reshape(-1, d).float().cpu().numpy())
        own = np.where(np.asarray(codes.indices) == feature, np.asarray(codes.values), 0)
        there = torch.from_numpy(norm * own.sum(axis=1).reshape(b, c)).to(x)
        return x + (goal.to(x) - there)[..., None] * torch.from_numpy(unit).to(x)

    with changing(model, hook, change):
        yield


@contextlib.contextmanager
def adding(
    model: Model,
    hook: str,
    direction: Float[np.ndarray, " d"],
    strength: float | Float[np.ndarray, " b"],
) -> Iterator[None]:
    """x <- x + s v at every position but a prompt's first one; see `steer`."""
    step = _column(strength) * torch.from_numpy(np.asarray(direction))  # [b d] or [1 d]
    with changing(model, hook, lambda x: x + step[:, None].to(x)):
        yield


def _column(strength: float | np.ndarray) -> torch.Tensor:
    """One strength a sequence [b 1], or one for all [1 1]."""
    value = np.atleast_1d(np.asarray(strength, np.float64))
    if not np.isfinite(value).all():
        raise UserError(f"strength {strength}: expected finite numbers")
    return torch.from_numpy(value)[:, None]


@contextlib.contextmanager
def changing(
    model: Model, hook: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Put change(x) [b c d] in the place of what a hook sees behind a prompt's first position."""

    def replace(seen: torch.Tensor, hook: Any) -> torch.Tensor:
        del hook
        x = seen.reshape(*seen.shape[:2], -1)  # heads stand one after another
        first = min(1, x.shape[1] - 1)
        return torch.cat([x[:, :first], change(x[:, first:])], dim=1).reshape(seen.shape)

    with model.bridge.hooks(fwd_hooks=[(hook, replace)]):
        yield
