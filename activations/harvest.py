"""Model + corpus -> store:  python -m activations.harvest config.toml.

The forward pass stops after the deepest hook asked for, and no logits are computed. Rows are the
positions that are not special tokens. A harvest that was stopped goes on after its last finished
shard; one that is complete is found and left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import importlib.metadata
import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from tqdm import tqdm

from activations import models
from activations.config import read_toml, validate
from activations.corpora import Corpus, Packed, pack
from activations.store import (
    Manifest,
    Store,
    StoreError,
    StoreWriter,
    differences,
    open_writer,
    read_manifest,
)
from activations.terminal import UserError, progress, run_command


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """What to harvest, and where to.

    Attributes:
      store: directory of the store.
      model: see activations.models, e.g. "hf:openai-community/gpt2".
      hooks: TransformerLens names, e.g. "blocks.9.hook_resid_post".
      max_tokens: enough rows; None for the whole corpus.
      batch_size: sequences a forward pass.
      shard_tokens: tokens a shard, rounded up to whole batches.
    """

    __pydantic_config__ = {"extra": "forbid"}

    store: Path
    model: Annotated[str, Field(min_length=1)]
    hooks: Annotated[tuple[str, ...], Field(min_length=1)]
    corpus: Corpus
    context_length: Annotated[int, Field(ge=2)] = 128
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    shard_tokens: Annotated[int, Field(ge=1)] = 16384

    def check(self) -> None:
        """Rules that no single field's type can hold. Raises ValueError: a hook is named twice."""
        if len(set(self.hooks)) < len(self.hooks):
            raise ValueError(f"hooks: a hook is named twice in {list(self.hooks)}")

    @property
    def request(self) -> dict[str, Any]:
        """What the store's content depends on: everything but its place."""
        table = dataclasses.asdict(self)
        del table["store"]
        return table


def found(config: HarvestConfig) -> bool:
    """Whether the store that `config` asks for is already there, complete.

    A model named by a path is compared by its weights; text is not read again, so that files
    changed under the same names are not noticed.

    Raises:
      StoreError: another store is there (the differing keys are named).
    """
    manifest = read_manifest(config.store)
    if manifest is None:
        return False
    if differing := differences(manifest.request, config.request):
        raise StoreError(
            f"{config.store}: holds a store of another harvest:\n  "
            + "\n  ".join(differing)
            + "\nName another store, mend the config, or delete the store."
        )
    now, then = models.weights_now(config.model), manifest.model.get("weights_sha256")
    if now is not None and now != then:
        raise StoreError(
            f"{config.store}: was made by other weights than {config.model} holds now "
            f"(sha256 {str(then)[:12]}, now {now[:12]}). Name another store, or delete this one."
        )
    if manifest.complete:
        Store(config.store)  # every shard is there, and whole
    return manifest.complete


def tokenise(config: HarvestConfig) -> Packed:
    """The corpus as the harvest will read it."""
    tokenizer = models.load_tokenizer(config.model)
    packed = pack(
        config.corpus,
        tokenizer,
        context_length=config.context_length,
        max_tokens=config.max_tokens,
    )
    if packed.exhausted and config.max_tokens is not None:
        print(f"the corpus ends at {packed.n_rows:,} tokens, before max_tokens", flush=True)
    return packed


def harvest(config: HarvestConfig, packed: Packed | None = None) -> None:
    """Make the store that `config` describes, or finish it.

    Arguments:
      packed: the result of `tokenise(config)`, where the caller has it already.

    Raises:
      UserError: the model, a hook or the corpus is not usable; the disk is full; a value is not
        finite.
    """
    if found(config):
        return
    if packed is None:
        packed = tokenise(config)
    if (begun := read_manifest(config.store)) is not None:
        # Rounding depends on the threads: a store is finished as it was begun.
        importlib.import_module("torch").set_num_threads(begun.forward["threads"])
    model = models.load(config.model)
    limit = model.bridge.cfg.n_ctx
    if config.context_length > limit:
        raise UserError(
            f"context_length: {config.context_length} is more than the {limit} positions of "
            f"{model.identity.description}"
        )
    reader = HookReader(model.bridge, config.hooks)
    manifest = Manifest(
        request=config.request,
        model=dataclasses.asdict(model.identity),
        corpus={
            **dataclasses.asdict(config.corpus),
            **config.corpus.identity(),
            "tokens_sha256": packed.sha256(),
            "n_documents": packed.n_documents,
        },
        forward=_forward_facts(config),
        hooks=reader.widths,
        context_length=config.context_length,
        n_sequences=len(packed.token),
        dropped_positions=("special",),
    )
    with (
        open_writer(config.store, manifest) as writer,
        progress(
            total=packed.token.size,
            initial=writer.sequences_done * config.context_length,
            unit="tok",
            unit_scale=True,
            desc=f"harvest {model.identity.description}",
        ) as bar,
    ):
        write(config, packed, reader, writer, bar)


def write(
    config: HarvestConfig, packed: Packed, reader: HookReader, writer: StoreWriter, bar: tqdm
) -> None:
    """Run the model over the sequences that `writer` does not have yet, shard after shard."""
    # A shard holds whole forward batches, so that a resumed store equals an uninterrupted one.
    per_batch = config.batch_size * config.context_length
    per_shard = config.batch_size * -(-config.shard_tokens // per_batch)
    for first in range(writer.sequences_done, len(packed.token), per_shard):
        chosen = slice(first, first + per_shard)
        token, document = packed.token[chosen], packed.document[chosen]
        kept = document >= 0
        parts: dict[str, list[np.ndarray]] = {hook: [] for hook in config.hooks}
        for batch in range(0, len(token), config.batch_size):
            rows = slice(batch, batch + config.batch_size)
            for hook, x in reader.read(token[rows]).items():
                parts[hook].append(x[kept[rows]])  # [b c d] -> [n d]
            bar.update(token[rows].size)
        sequence, position = np.nonzero(kept)
        activations = {hook: np.concatenate(parts.pop(hook)) for hook in config.hooks}
        for hook, x in activations.items():
            _check_finite(hook, x, token[kept])
        writer.write_shard(
            {
                **{f"activations/{hook}": x for hook, x in activations.items()},
                "token": token[kept],
                "document": document[kept],
                "sequence": (sequence + first).astype(np.int32),
                "position": position.astype(np.int32),
                "sequences/token": token,
                "sequences/document": document,
            }
        )
    writer.finish()


def _check_finite(hook: str, x: np.ndarray, token: np.ndarray) -> None:
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{hook}: the model gave NaN or infinity at token {token[np.argmin(finite)]}; "
            "nothing of this shard was written"
        )


class HookReader:
    """Runs a TransformerBridge up to the deepest of some hooks, and brings back what they saw.

    Attributes:
      widths: the width of each hook's rows.

    Raises:
      UserError: the model has no such hook or layer (the nearest names are listed), or what the
        hook sees is not one vector a position.
    """

    def __init__(self, bridge: Any, hooks: tuple[str, ...]) -> None:
        self._torch = importlib.import_module("torch")
        self._bridge = bridge
        self._hooks = hooks
        for hook in hooks:
            _check_hook(hook, bridge.hook_dict, bridge.cfg.n_layers)
        self.stop_at_layer = _stop_at_layer(hooks)
        with warnings.catch_warnings():  # TransformerLens's about silent hooks; ours says more
            warnings.simplefilter("ignore", UserWarning)
            probe = self.read(np.zeros((2, 3), np.int32))
        for hook, x in probe.items():
            if x.ndim != 3 or x.shape[:2] != (2, 3):
                raise UserError(
                    f"hooks: {hook} gives an array of shape {list(x.shape)} for 2 sequences of 3 "
                    "tokens; expected one vector a position, as blocks.N.hook_resid_post gives"
                )
        self.widths = {hook: x.shape[2] for hook, x in probe.items()}

    def read(self, token: np.ndarray) -> dict[str, np.ndarray]:
        """What each hook sees for sequences of tokens [b c]: float32 [b c d]."""
        torch = self._torch
        with torch.inference_mode():
            _, cache = self._bridge.run_with_cache(
                torch.from_numpy(token.astype(np.int64)).to(self._bridge.cfg.device),
                names_filter=list(self._hooks),
                stop_at_layer=self.stop_at_layer,
                return_type=None,
            )
        try:
            seen = {hook: cache[hook] for hook in self._hooks}
        except KeyError as error:
            raise UserError(
                f"hooks: {error.args[0]} saw nothing: the model has this hook, but does not use it"
            ) from None
        return {hook: x.to(torch.float32).cpu().numpy() for hook, x in seen.items()}


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


def _check_hook(hook: str, known: Any, n_layers: int) -> None:
    if hook in known:
        return
    if (match := re.match(r"blocks\.(\d+)\.", hook)) and int(match[1]) >= n_layers:
        raise UserError(
            f"hooks: {hook}: layer {match[1]} is out of range; the model has layers 0 to "
            f"{n_layers - 1}"
        )
    near = difflib.get_close_matches(hook, known, n=3, cutoff=0.3) or ["blocks.0.hook_resid_post"]
    raise UserError(f"hooks: the model has no hook {hook!r}; the nearest are {', '.join(near)}")


def _forward_facts(config: HarvestConfig) -> dict[str, Any]:
    """What the rounding of a forward pass depends on."""
    torch = importlib.import_module("torch")
    return {
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        **{
            name.replace("-", "_"): importlib.metadata.version(name)
            for name in ("torch", "transformers", "transformer-lens")
        },
    }


def main() -> None:
    """Entry of `python -m activations.harvest`."""
    parser = argparse.ArgumentParser(prog="python -m activations.harvest", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    table = read_toml(arguments.config, arguments.set)
    config = validate(HarvestConfig, table, str(arguments.config))
    if found(config):
        print(f"{config.store} is complete: nothing to harvest.")
        return
    harvest(config)
    manifest = read_manifest(config.store)
    assert manifest is not None
    print(
        f"{config.store}: {manifest.n_rows:,} rows of {', '.join(config.hooks)} "
        f"from {manifest.model['description']} in {len(manifest.shards)} shards."
    )


if __name__ == "__main__":
    run_command(main)
