"""What a language model's hooks see:  python -m activations.hooks MODEL lists them.

Names are TransformerLens's. A row is one vector a position: where a hook sees one a head, as
`blocks.N.attn.hook_z` does, the heads stand one after another.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from activations.terminal import UserError, run_command

# The shape of the batch that is read on trial; 11 is no model's number of heads.
_PROBE = (2, 11)


class HookReader:
    """Runs a TransformerBridge up to the deepest of some hooks, and brings back what they saw.

    Attributes:
      widths: the width of each hook's rows.

    Raises:
      UserError: the model has no such hook or layer (the nearest names are listed), or what the
        hook sees is not one vector a position.
    """

    def __init__(self, bridge: Any, hooks: Iterable[str]) -> None:
        self._torch = importlib.import_module("torch")
        self.bridge = bridge
        self._hooks = tuple(hooks)
        for hook in self._hooks:
            _check_hook(hook, bridge)
        self.stop_at_layer = _stop_at_layer(self._hooks)
        self.widths = {}
        for hook, x in self._run(np.zeros(_PROBE, np.int32)).items():
            if x.ndim < 3 or x.shape[:2] != _PROBE:
                raise UserError(
                    f"hooks: {hook} gives an array of shape {list(x.shape)} for {_PROBE[0]} "
                    f"sequences of {_PROBE[1]} tokens; expected one vector a position, as "
                    "blocks.N.hook_resid_post gives"
                )
            self.widths[hook] = x[0, 0].numel()

    def read(self, token: np.ndarray, position: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """What each hook sees for sequences of tokens [b c]: float32 [b c d].

        Arguments:
          position: of each token in its document [b c]; where it falls back, attention is cut, so
            that documents do not see each other. By default a sequence is one document.
        """
        return {hook: self._rows(x) for hook, x in self._run(token, position).items()}

    def read_gradients(
        self, token: np.ndarray, target: np.ndarray, position: np.ndarray | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What each hook sees, and the gradient of the loss with respect to it, [b c d] each.

        loss = sum of -log p(token[t] | token[:t]) over the t of all sequences that are targets.
        The gradient is the whole one, by every path from the hook to the loss: that of
        `hook_resid_mid` counts what the MLP reads and what passes it by.

        Arguments:
          target: which tokens [b c] count (activations.sequences.targets); never the first.
        """
        torch = self._torch
        seen: dict[str, Any] = {}

        def start(x: Any, hook: Any) -> Any:
            return x.detach().requires_grad_(True)

        def keep(name: str) -> Callable[..., Any]:
            # Given back: where the hook sees a view, the model shall go on with that view.
            return lambda x, hook: seen.setdefault(name, x)

        hooks = [("embed.hook_out", start), *((name, keep(name)) for name in self._hooks)]
        with torch.enable_grad(), self.bridge.hooks(fwd_hooks=hooks):
            logits = self.bridge(
                self._on_device(token),
                return_type="logits",
                use_cache=False,
                **self._positions(position),
            )
            # The loss's gradient at the logits, in closed form, so that no third array of their
            # size is made: softmax - onehot(next token), where there is one to predict.
            at_logits = torch.softmax(logits.detach(), dim=-1)  # [b c v]
            label, counts = np.roll(token, -1, axis=1), np.roll(target, -1, axis=1)
            counts[:, -1] = False  # the last position predicts nothing
            at_logits.scatter_add_(
                2, self._on_device(label)[..., None], at_logits.new_full((*token.shape, 1), -1)
            )
            at_logits *= self._on_device(counts)[..., None]
            gradients = torch.autograd.grad(
                logits, list(seen.values()), at_logits, allow_unused=True
            )
        for name, gradient in zip(seen, gradients, strict=True):
            if gradient is None:
                raise UserError(f"hooks: the loss does not depend on {name}; it has no gradient")
        return (
            {name: self._rows(seen[name].detach()) for name in self._hooks},
            {name: self._rows(g) for name, g in zip(seen, gradients, strict=True)},
        )

    def check_documents(self) -> None:
        """See on trial that this model can keep documents apart.

        Raises:
          UserError: it cannot: what one document holds changes what is seen in the next.
        """
        half = _PROBE[1] // 2
        token = np.ones(_PROBE, np.int32)
        token[1, :half] = 2
        position = np.tile([*range(half), *range(_PROBE[1] - half)], (2, 1))
        try:
            seen = self.read(token, position).values()
        except TypeError as error:
            raise UserError(
                f"cross_document_attention: the model takes no positions ({error})"
            ) from None
        if not all(np.allclose(x[0, half:], x[1, half:], rtol=1e-3, atol=1e-4) for x in seen):
            raise UserError(
                "cross_document_attention: this model's attention cannot be cut between documents; "
                "leave it at true"
            )

    def _run(self, token: np.ndarray, position: np.ndarray | None = None) -> dict[str, Any]:
        """Tensors as the hooks see them."""
        seen: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda x, hook: seen.update({name: x})

        with (
            self._torch.inference_mode(),
            self.bridge.hooks(fwd_hooks=[(name, keep(name)) for name in self._hooks]),
        ):
            self.bridge(
                self._on_device(token),
                stop_at_layer=self.stop_at_layer,
                return_type=None,
                use_cache=False,
                **self._positions(position),
            )
        for name in self._hooks:
            if not isinstance(seen.get(name), self._torch.Tensor):
                raise UserError(
                    f"hooks: {name} saw nothing: the model has this hook, but does not use it"
                )
        return {name: seen[name] for name in self._hooks}

    def _on_device(self, token: np.ndarray) -> Any:
        return self._torch.from_numpy(token.astype(np.int64)).to(self.bridge.cfg.device)

    def _positions(self, position: np.ndarray | None) -> dict[str, Any]:
        return {} if position is None else {"position_ids": self._on_device(position)}

    def _rows(self, x: Any) -> np.ndarray:
        return x.flatten(start_dim=2).to(self._torch.float32).cpu().numpy()  # [b c d]


def shapes(bridge: Any) -> dict[str, tuple[int, ...]]:
    """What each hook of a model sees in one forward pass of `_PROBE`; unused hooks are left out."""
    torch = importlib.import_module("torch")
    seen: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda x, hook: seen.update({name: tuple(getattr(x, "shape", ()))})

    names = [name for name, point in bridge.hook_dict.items() if not _gated(bridge, name, point)]
    with torch.inference_mode(), bridge.hooks(fwd_hooks=[(name, keep(name)) for name in names]):
        bridge(torch.zeros(_PROBE, dtype=torch.long, device=bridge.cfg.device), use_cache=False)
    return seen


def _gated(bridge: Any, name: str, point: Any) -> bool:
    """Whether a hook sees nothing because TransformerLens has it switched off."""
    try:
        bridge.check_hooks_to_add(point, name, None)
    except ValueError:
        return True
    return False


def _stop_at_layer(hooks: tuple[str, ...]) -> int | None:
    """The first layer that need not run; None where a hook lies after the last one."""
    layers = [re.match(r"blocks\.(\d+)\.", hook) for hook in hooks]
    if all(layers):
        return max(int(match[1]) for match in layers if match) + 1
    before_blocks = ("embed.", "hook_embed", "hook_pos_embed")
    if all(
        match or hook.startswith(before_blocks) for match, hook in zip(layers, hooks, strict=True)
    ):
        return max((int(match[1]) + 1 for match in layers if match), default=1)
    return None


def _check_hook(hook: str, bridge: Any) -> None:
    known, n_layers = bridge.hook_dict, bridge.cfg.n_layers
    if hook in known:
        if _gated(bridge, hook, known[hook]):
            raise UserError(
                f"hooks: {hook} saw nothing: the model has this hook, but does not use it"
            )
        return
    if (match := re.match(r"blocks\.(\d+)\.", hook)) and int(match[1]) >= n_layers:
        raise UserError(
            f"hooks: {hook}: layer {match[1]} is out of range; the model has layers 0 to "
            f"{n_layers - 1}"
        )
    near = difflib.get_close_matches(hook, known, n=3, cutoff=0.3) or ["blocks.0.hook_resid_post"]
    raise UserError(f"hooks: the model has no hook {hook!r}; the nearest are {', '.join(near)}")


def main() -> None:
    """Entry of `python -m activations.hooks`."""
    from activations import models

    parser = argparse.ArgumentParser(prog="python -m activations.hooks", description=__doc__)
    parser.add_argument("model", help="e.g. " + ", ".join(models.KINDS.values()))
    model = models.load(parser.parse_args().model)
    n_layers = model.bridge.cfg.n_layers
    table = Table(box=None, header_style="bold", title_justify="left")
    for heading in ("hook", "what it sees", "a row"):
        table.add_column(heading, overflow="fold")
    for name, shape in shapes(model.bridge).items():
        if re.match(r"blocks\.(?!0\.)", name):  # the other layers are alike
            continue
        axes = ["token" if size == _PROBE[1] else f"{size}" for size in shape]
        axes[:1] = ["batch" if size == _PROBE[0] else f"{size}" for size in shape[:1]]
        row = f"{int(np.prod(shape[2:])):,}" if len(shape) > 2 and shape[:2] == _PROBE else "-"
        name = re.sub(r"^blocks\.0\.", "blocks.N.", name)
        table.add_row(name, f"({', '.join(axes)})", row)
    console = Console(highlight=False)
    console.print(table)
    print(
        f"{model.identity.description} ({model.identity.architecture}): N is 0 to {n_layers - 1}. "
        'A hook with "-" gives no vector a token and cannot be harvested.'
    )


if __name__ == "__main__":
    run_command(main)
