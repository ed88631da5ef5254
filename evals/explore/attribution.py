"""What features, and what the dictionary does not explain, add to a prediction."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from evals import cache
from evals.coding import coded, frame
from evals.lm import check_hook


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """Parts of a prediction, in nats.

    Attributes:
      tokens: of the prompt.
      target: the token that is predicted.
      log_p: log p(target | prompt).
      position, feature, code, effect: of every code that is not 0, the greatest |effect| first.
      error, offset: of each position: of what the dictionary does not explain, and of its bias and
        the normaliser's mean.
      special: whether a position holds a special token, such as BOS. Dictionaries are fitted
        without them: they have no codes here, and what they say is in `error`.
    """

    tokens: list[str]
    target: str
    log_p: float
    position: Int[np.ndarray, " n"]
    feature: Int[np.ndarray, " n"]
    code: Float[np.ndarray, " n"]
    effect: Float[np.ndarray, " n"]
    error: Float[np.ndarray, " c"]
    offset: Float[np.ndarray, " c"]
    special: Bool[np.ndarray, " c"]


def attribute(
    coder: Coder, model: Model, hook: str, prompt: str, target: str | None = None
) -> Attribution:
    """Effects of the first order of a hook's parts on log p(target | prompt).

        x_t = sum_i f_ti u_i + offset + error_t,    effect_ti = f_ti u_i . g_t,
        g_t = d log p(target | prompt) / d x_t

    An effect is what the prediction would fall by if the part were taken out, were the model linear
    behind the hook: for whole features it is a guess, tested by `steer(..., mode="ablate")`.

    Arguments:
      target: a text of one token or more, of which the first counts; the likeliest, if left out.

    Raises:
      UserError: the dictionary does not fit the hook; the prompt or the target is empty.
    """
    check_hook(coder, model, hook)
    tokenizer: Any = model.tokenizer
    if not prompt:
        raise UserError("attribute: the prompt is empty")
    (ids,) = cache.tokens(model, [prompt], length=2**31)
    wanted = None
    if target is not None:
        own = tokenizer(target, add_special_tokens=False)["input_ids"]
        if not own:
            raise UserError("attribute: the target is empty")
        wanted = own[0]
    seen: list[torch.Tensor] = []

    def leaf(x: torch.Tensor, hook: Any) -> torch.Tensor:
        del hook
        seen.append(x.detach().requires_grad_(True))
        return seen[0]

    token = torch.from_numpy(ids[None].astype(np.int64)).to(model.bridge.cfg.device)
    with torch.enable_grad(), model.bridge.hooks(fwd_hooks=[(hook, leaf)]):
        logits = model.bridge(token, return_type="logits", use_cache=False)[0, -1].float()
        if wanted is None:
            wanted = int(logits.argmax())
        log_p = logits.log_softmax(-1)[wanted]
        (slope,) = torch.autograd.grad(log_p, seen[0])
    x, g = (a[0].detach().flatten(1).float().cpu().numpy() for a in (seen[0], slope))
    codes, x_hat = coded(coder, x)
    atoms, offset = frame(coder)
    special = np.isin(ids, tokenizer.all_special_ids)
    x_hat = np.where(special[:, None], offset.astype(x_hat.dtype), x_hat)
    codes = codes.multiply(~special[:, None]).tocoo()
    codes.eliminate_zeros()
    effect = codes.data * np.einsum("nd,nd->n", atoms[codes.col], g[codes.row].astype(np.float64))
    order = np.argsort(-np.abs(effect), kind="stable")
    return Attribution(
        [tokenizer.decode([int(i)]) for i in ids], tokenizer.decode([wanted]),
        float(log_p.detach()),
        codes.row[order], codes.col[order], codes.data[order].astype(float), effect[order],
        ((x - x_hat) * g).sum(axis=1, dtype=np.float64), g.astype(np.float64) @ offset,
        special,
    )  # fmt: skip
