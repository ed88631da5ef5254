"""The logit lens: which tokens a direction would promote, were it read by the head directly."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int

from activations.models import Model
from activations.terminal import UserError, progress

# Directions at once; their logits are as many as the vocabulary has tokens.
_BLOCK = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Lens:
    """Of each direction [n], the tokens with the greatest and the smallest logits.

    Attributes:
      promoted, suppressed: ids, the strongest first.
      up, down: their logits.
    """

    promoted: Int[np.ndarray, "n k"]
    up: Float[np.ndarray, "n k"]
    suppressed: Int[np.ndarray, "n k"]
    down: Float[np.ndarray, "n k"]


@torch.inference_mode()
def lens(model: Model, directions: Float[np.ndarray, "n d"], *, k: int = 10) -> Lens:
    """Logits of directions of the residual stream.

        logits(u) = head(norm(sqrt(d) u / ||u||)) - head(norm(0)),

    norm being the model's last one: what layers between do to u is left out, as are biases. A zero
    direction has logits of 0. Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).

    Raises:
      UserError: the directions are not as wide as the residual stream.
    """
    bridge = model.bridge
    width = bridge.cfg.d_model
    if directions.shape[1] != width:
        raise UserError(
            f"logit lens: directions have {directions.shape[1]} entries, but the residual stream "
            f"has {width}: it is for hooks on that stream"
        )
    size = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = np.divide(directions, size, out=np.zeros(directions.shape), where=size > 0)
    rows = torch.from_numpy((unit * width**0.5).astype(np.float32)).to(bridge.cfg.device)
    zero = bridge.unembed(bridge.ln_final(torch.zeros_like(rows[:1])[None]))[0]
    parts = []
    starts = range(0, len(rows), _BLOCK)
    for at in progress(iterable=starts, desc="logit lens", unit="block", delay=3):
        logits = bridge.unembed(bridge.ln_final(rows[None, at : at + _BLOCK]))[0] - zero  # [b v]
        most = min(k, logits.shape[1])
        ends = logits.topk(most), (-logits).topk(most)
        (up, promoted), (down, suppressed) = ends
        parts.append([part.cpu().numpy() for part in (promoted, up, suppressed, -down)])
    return Lens(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
