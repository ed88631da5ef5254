"""A model's answers, with another row at one position of a hook."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from activations.hooks import HookReader
from activations.models import Model
from evals.lm import Behind, next_block

# Tokens of a forward pass without gradients.
_TOKENS = 2048


class Patched:
    """A model's next token, with another row at one position of a hook.

    Of hooks on the residual stream only the blocks behind the hook run again, where it is told what
    the hook saw; the head reads the last position alone.

    Raises:
      UserError: the model has no such hook.
    """

    def __init__(self, model: Model, hook: str) -> None:
        self.bridge, self.tokenizer, self.hook = model.bridge, model.tokenizer, hook
        self._reader = HookReader(model.bridge, (hook,))
        self.width = self._reader.widths[hook]
        first = next_block(hook, self.bridge.cfg.n_layers)
        self._behind = None if first is None else Behind(self.bridge, first)
        self.device = self.bridge.cfg.device

    def read(self, ids: list[np.ndarray], place: np.ndarray) -> tuple[np.ndarray, Any]:
        """Rows at the places [n d], and, of residual hooks, what each prompt shows [t d]."""
        rows = np.empty((len(ids), self.width), np.float32)
        seen: list[np.ndarray] = [np.empty(0)] * len(ids)
        for part in _parts([len(own) for own in ids]):
            for i, x in zip(part, self._reader.read(_stack(ids, part))[self.hook], strict=True):
                rows[i], seen[i] = x[place[i]], x[: len(ids[i])].copy()
        return rows, seen if self._behind is not None else None

    def logits(
        self, ids: list[np.ndarray], place: np.ndarray, put: torch.Tensor | None, seen: Any = None
    ) -> torch.Tensor:
        """Of the token behind each prompt [b v], with rows [b d] put in at the places."""
        row = torch.arange(len(ids), device=self.device)
        last = torch.tensor([len(own) - 1 for own in ids], device=self.device)
        at = torch.from_numpy(place).to(self.device)
        hooks: list[Any] = []
        behind = None
        if self._behind is not None and put is not None and seen is not None:
            behind = self._behind
            x = torch.zeros((len(ids), int(last.max()) + 1, self.width))
            for own, held in zip(x, seen, strict=True):
                own[: len(held)] = torch.from_numpy(held)
            given = x.to(self.device).index_put((row, at), put)
        else:
            given = torch.from_numpy(_stack(ids, range(len(ids))).astype(np.int64)).to(self.device)
            if put is not None:

                def patch(x: torch.Tensor, hook: Any) -> torch.Tensor:
                    del hook
                    return x.flatten(2).index_put((row, at), put.to(x)).reshape(x.shape)

                hooks.append((self.hook, patch))
        cut = "ln_final.hook_in" in self.bridge.hook_dict
        if cut:
            hooks.append(("ln_final.hook_in", lambda x, hook: x[row, last][:, None]))
        with self.bridge.hooks(fwd_hooks=hooks):
            if behind is not None:
                logits = behind(given)
            else:
                logits = self.bridge(given, return_type="logits", use_cache=False)
        return logits[:, 0] if cut else logits[row, last]

    @torch.inference_mode()
    def answer(
        self, ids: list[np.ndarray], place: np.ndarray, wanted: list[str],
        put: torch.Tensor | None = None, seen: Any = None, *, most: int,
    ) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"]]:  # fmt: skip
        """Whether the greedy text starts with what is wanted, and its first token.

        Spaces before it and capitals do not count. A text ends as soon as that is decided.

        Arguments:
          most: tokens of the text.
        """
        right, first = np.zeros(len(ids), bool), np.zeros(len(ids), int)
        texts, undecided = list(ids), np.arange(len(ids))
        for step in range(most):
            for part in _parts([len(texts[i]) for i in undecided]):
                here = undecided[part]
                rows = None if put is None else put[torch.from_numpy(here)]
                held = None if seen is None or step else [seen[i] for i in here]
                logits = self.logits([texts[i] for i in here], place[here], rows, held)
                for i, token in zip(here, logits.argmax(dim=1).tolist(), strict=True):
                    texts[i] = np.append(texts[i], np.int32(token))
            left = []
            for i in undecided:
                new = texts[i][len(ids[i]) :]
                if not step:
                    first[i] = new[0]
                # A token may end within a letter.
                said = self.tokenizer.decode(new.tolist()).lstrip().lower().rstrip("\ufffd")
                right[i] = said.startswith(wanted[i].lower())
                if not right[i] and wanted[i].lower().startswith(said):
                    left.append(i)
            undecided = np.array(left, int)
        return right, first


def _stack(ids: list[np.ndarray], part: Any) -> np.ndarray:
    """As long as the longest [b t]: what follows a text does not change it."""
    width = max(len(ids[i]) for i in part)
    return np.stack([np.pad(ids[i], (0, width - len(ids[i])), mode="edge") for i in part])


def _parts(lengths: list[int]) -> list[np.ndarray]:
    """Which run at once: those of about one length, the longest first."""
    order = np.argsort(lengths, kind="stable")[::-1]
    parts, at = [], 0
    while at < len(order):
        size = max(1, _TOKENS // lengths[order[at]])
        parts.append(order[at : at + size])
        at += size
    return parts
