"""Where torch meets JAX: a language model with other activations at a hook, a Coder as a module."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from activations.hooks import HookReader
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from dictlearn.encoders.linear import Linear, Tied

# Bytes of logits that are held at once, of one forward.
_LOGITS = 2**26


class Behind:
    """The last blocks of a model: the residual stream in front of one of them to logits.

    The blocks before it hand on what they get. TransformerLens 4.3 alone would run them, and throw
    away what they give. Where a model does not bear it (tried on a few rows), they do run.

    Arguments:
      first: the first block that counts.
    """

    def __init__(self, bridge: Any, first: int) -> None:
        self._bridge, self.first, self._skips = bridge, first, False
        rows = torch.linspace(-1, 1, 6 * bridge.cfg.d_model, device=bridge.cfg.device)
        rows = rows.reshape(2, 3, -1)
        with torch.inference_mode():
            whole = self(rows)
            self._skips = True
            try:
                self._skips = torch.equal(self(rows), whole)
            except Exception:  # whatever a model's own code raises
                self._skips = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [b c v] of x [b c d]."""
        blocks = [block.original_component for block in self._bridge.blocks[: self.first]]
        blocks = blocks if self._skips else []
        try:
            for block in blocks:
                block.forward = lambda hidden_states, *_, **__: hidden_states
            return self._bridge(x, return_type="logits", start_at_layer=self.first, use_cache=False)
        finally:
            for block in blocks:
                del block.forward


class Forward:
    """A model's forward with activations at a hook put in.

    Of hooks on the residual stream only the blocks behind the hook run again: what stands before
    them does not depend on what is put in.

    Raises:
      UserError: the model has no such hook.
    """

    def __init__(self, model: Model, hook: str) -> None:
        self.bridge, self.hook = model.bridge, hook
        self._reader = HookReader(self.bridge, (hook,))
        self.width = self._reader.widths[hook]
        config: Any = self.bridge.cfg
        first = next_block(hook, config.n_layers)
        self._behind = None if first is None else Behind(self.bridge, first)
        self._rows = max(1, _LOGITS // (4 * config.d_vocab))

    @property
    def residual(self) -> bool:
        """Whether the blocks behind the hook see nothing but what stands there."""
        return self._behind is not None

    def read(self, token: np.ndarray) -> np.ndarray:
        """What the hook sees for sequences [b c]: float32 [b c d]."""
        return self._reader.read(token)[self.hook]

    def parts(self, token: np.ndarray) -> list[slice]:
        """Sequences [b c], as many at once as logits can be held of."""
        size = max(1, self._rows // token.shape[1])
        return [slice(at, at + size) for at in range(0, len(token), size)]

    @torch.inference_mode()
    def logits(self, token: np.ndarray, x: np.ndarray, *, last: bool = False) -> torch.Tensor:
        """Logits [b c v] with x [b c d] in the place of what the hook sees.

        Arguments:
          last: of the last position alone, [b 1 v]: the head costs most in a large vocabulary.
        """
        if last:
            with self.bridge.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, -1:])]):
                return self.logits(token, x)
        device = self.bridge.cfg.device
        put = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)
        if self._behind is not None:
            return self._behind(put)

        def replace(seen: torch.Tensor, hook: Any) -> torch.Tensor:
            del hook
            return put.to(seen).reshape(seen.shape)

        ids = torch.from_numpy(token.astype(np.int64)).to(device)
        with self.bridge.hooks(fwd_hooks=[(self.hook, replace)]):
            return self.bridge(ids, return_type="logits", use_cache=False)

    @torch.inference_mode()
    def normed(self, x: np.ndarray) -> np.ndarray | None:
        """Rows [n d] after the next block's first norm; None where the hook is no residual one."""
        if self._behind is None:
            return None
        norm = self.bridge.blocks[self._behind.first].ln1
        put = torch.from_numpy(np.array(x, np.float32)).to(self.bridge.cfg.device)
        return norm(put[None])[0].float().cpu().numpy()


def next_block(hook: str, n_layers: int) -> int | None:
    """The first block that reads the residual stream at a hook; None where it is another hook."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    if found is None:
        return None
    block = int(found[1]) + (found[2] == "post")
    return block if block < n_layers else None


def check_width(coder: Coder, hook: str, width: int) -> None:
    """Raise UserError where a dictionary's rows are not as wide as what a hook sees."""
    own = coder.dictionary.atoms.shape[1]
    if own != width:
        raise UserError(
            f"the dictionary's rows have {own} entries, but {hook} of this model has {width}: "
            "it is of another model or hook"
        )


def check_hook(coder: Coder, model: Model, hook: str) -> None:
    """The same for a model's hook, before it runs for minutes; and UserError where it has none."""
    check_width(coder, hook, HookReader(model.bridge, (hook,)).widths[hook])


class CoderModule(torch.nn.Module):
    """A Coder in torch: x [... d] to codes [... a] to x_hat [... d], for users' own hooks.

    `decode` is a product and an addition in torch, with gradients to codes, `W_dec` [a d] and
    `b_dec` [d]. `encode` calls JAX. Its codes have gradients to x where the encoder is linear: with
    those that are 0 kept at 0, and thresholds as they are. Of other encoders' codes a backward pass
    raises RuntimeError.
    """

    def __init__(self, coder: Coder) -> None:
        super().__init__()
        self._coder, self._prepared = coder, coder.prepare()
        scale = coder.normaliser.scale
        decoder = np.array(coder.atoms * scale)
        bias = np.array(coder.normaliser.restore(coder.dictionary.bias[None])[0])
        self.W_dec = torch.nn.Parameter(torch.from_numpy(decoder))
        self.b_dec = torch.nn.Parameter(torch.from_numpy(bias))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of raw activations, dense."""
        rows = x.reshape(-1, x.shape[-1])
        codes: Any = _Encode.apply(rows, self)
        return codes.reshape(*x.shape[:-1], codes.shape[-1])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Raw activations from dense codes."""
        return codes @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """decode(encode(x))."""
        return self.decode(self.encode(x))


class _Encode(torch.autograd.Function):
    """The Coder's encode, with the gradient of linear encoders."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: CoderModule) -> torch.Tensor:  # pyright: ignore
        codes = module._prepared.encode(x.detach().float().cpu().numpy())
        ctx.module = module
        ctx.save_for_backward(x)
        return torch.from_numpy(np.array(codes.dense())).to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        prepared = ctx.module._prepared
        encoder = ctx.module._coder.encoder
        if not isinstance(encoder, (Linear, Tied)):
            raise RuntimeError(f"codes of {encoder.name} have no gradient: {encoder.name} chooses")
        (x,) = ctx.saved_tensors
        rows = jnp.asarray(x.detach().float().cpu().numpy())
        _, back = jax.vjp(jax.jit(lambda rows: prepared.encode(rows).dense()), rows)
        (slope,) = back(jnp.asarray(gradients[0].float().cpu().numpy()))
        return torch.from_numpy(np.array(slope)).to(x), None
