"""Model + corpus -> store:  python -m activations.harvest config.toml [--worker 2/3].

One forward pass, which stops after the deepest hook, fills all hooks; with gradients it goes on to
the loss and back. The corpus is tokenised once, to disk; then the model runs over the sequences,
shard after shard. A harvest that was stopped goes on after its last finished shard; one that is
complete is found and left alone. Several workers, wherever they run, take ranges of shards; then
`python -m activations.merge STORE` makes their work the store that one worker would have made.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from activations import models, sequences, shards
from activations.config import read_toml, validate
from activations.corpora import Corpus
from activations.files import replace_file, sha256
from activations.hooks import HookReader
from activations.precision import Compression, Precision
from activations.sequences import Marks
from activations.store import MANIFEST, MEND, Manifest, Store, StoreError, read_manifest
from activations.terminal import UserError, run_command
from activations.writer import (
    Worker,
    begin_lock,
    differences,
    disk_full_told,
    merge,
    open_writer,
    worker_lock,
)


@dataclasses.dataclass(frozen=True)
class HarvestConfig:
    """What to harvest, and where to.

    Attributes:
      store: directory of the store.
      model: see activations.models, e.g. "hf:openai-community/gpt2".
      hooks: TransformerLens names, e.g. "blocks.9.hook_resid_post"; see activations.hooks.
      gradients: also store, at each hook, the gradient of the summed next-token cross-entropy.
        Rows that predict nothing, the last of each sequence among them, are then left out.
      max_tokens: enough rows; None for the whole corpus.
      marks: what parts documents: "bos", "eos" or "none" (activations.sequences.write).
      cross_document_attention: whether a token sees the documents before its own in its sequence.
      dtype: of the rows on disk. A value that float16 cannot hold stops the harvest.
      compression: of the rows on disk.
      batch_size: sequences a forward pass.
      shard_tokens: tokens a shard, rounded up to whole batches.
    """

    __pydantic_config__ = {"extra": "forbid"}

    store: Path
    model: Annotated[str, Field(min_length=1)]
    hooks: Annotated[tuple[str, ...], Field(min_length=1)]
    corpus: Corpus
    gradients: bool = False
    context_length: Annotated[int, Field(ge=2)] = 128
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    marks: Marks = "bos"
    cross_document_attention: bool = True
    dtype: Precision = "float32"
    compression: Compression = "none"
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

    @property
    def shard_sequences(self) -> int:
        """Sequences a shard: whole batches, so that any worker runs the same forward passes."""
        per_batch = self.batch_size * self.context_length
        return self.batch_size * -(-self.shard_tokens // per_batch)


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
        merge(config.store)  # whose last step, deleting partial manifests, a kill may have cut off
    return manifest.complete


def harvest(config: HarvestConfig, worker: Worker = Worker()) -> None:  # noqa: B008
    """Make the store that `config` describes, or a worker's share of it, or finish either.

    Raises:
      UserError: the model, a hook or the corpus is not usable; the disk is full; a value is not
        finite, or not one that `config.dtype` holds; another process is this worker.
    """
    if found(config):
        return
    with worker_lock(config.store, worker):
        if found(config):  # another process finished it in the meantime
            return
        reader, manifest = begin(config)
        writer = open_writer(config.store, manifest, worker)
        try:
            shards.write(config, reader, writer)
        except UserError as error:
            # Nothing that was written shall forbid a mended config.
            none = worker.count == 1 and not writer.part.shards
            if none and not isinstance(error, StoreError):
                (config.store / MANIFEST).unlink()
            raise
        if worker.count == 1:
            merge(config.store)


def begin(config: HarvestConfig) -> tuple[HookReader, Manifest]:
    """Load the model; tokenise the corpus and write the first manifest, unless they are there."""
    with begin_lock(config.store):
        begun = read_manifest(config.store)
        if begun is None:
            tokenizer = models.load_tokenizer(config.model)
            with disk_full_told(config.store):
                written = sequences.write(
                    config.store,
                    config.corpus,
                    tokenizer,
                    context_length=config.context_length,
                    max_tokens=config.max_tokens,
                    marks=config.marks,
                    predicting=config.gradients,
                )
            if written.exhausted and config.max_tokens is not None:
                print(f"the corpus ends at {written.n_rows:,} tokens, before max_tokens")
            reader, facts = _load(config)
            manifest = Manifest(
                **facts,
                corpus={**dataclasses.asdict(config.corpus), **config.corpus.identity()},
                n_documents=written.n_documents,
                n_sequences=written.n_sequences,
                files=written.files,
            )
            with disk_full_told(config.store):
                replace_file(config.store / MANIFEST, manifest.to_json().encode())
            return reader, manifest
    # Rounding depends on the threads: a store is finished as it was begun.
    importlib.import_module("torch").set_num_threads(begun.forward["threads"])
    reader, facts = _load(config)
    there = {name: getattr(begun, name) for name in facts}
    if differing := differences(there, facts):
        raise StoreError(
            f"{config.store}: was begun with other settings:\n  "
            + "\n  ".join(differing)
            + "\nName another store, or delete this one."
        )
    for name, digest in begun.files.items():
        file = config.store / name
        if not file.exists() or sha256(file) != digest:
            raise StoreError(f"{file}: is missing or damaged. {MEND}")
    return reader, begun


def _load(config: HarvestConfig) -> tuple[HookReader, dict[str, Any]]:
    """The model at its hooks, and the part of the manifest that does not ask for the text."""
    model = models.load(config.model)
    limit = model.bridge.cfg.n_ctx
    if config.context_length > limit:
        raise UserError(
            f"context_length: {config.context_length} is more than the {limit} positions of "
            f"{model.identity.description}"
        )
    reader = HookReader(model.bridge, config.hooks)
    if not config.cross_document_attention:
        reader.check_documents()
    torch = importlib.import_module("torch")
    return reader, {
        "request": config.request,
        "model": dataclasses.asdict(model.identity),
        "forward": {  # what the rounding of a forward pass depends on
            "batch_size": config.batch_size,
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            **{
                name.replace("-", "_"): importlib.metadata.version(name)
                for name in ("torch", "transformers", "transformer-lens")
            },
        },
        "hooks": reader.widths,
        "context_length": config.context_length,
        "shard_sequences": config.shard_sequences,
        "dropped_positions": ("special", *(("not predicting",) if config.gradients else ())),
        "gradients": config.gradients,
        "dtype": config.dtype,
        "compression": config.compression,
    }


def _worker(text: str) -> Worker:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--worker {text}: expected i/n with i from 1 to n, e.g. 2/3")
    return Worker(int(match[1]), int(match[2]))


def main() -> None:
    """Entry of `python -m activations.harvest`."""
    parser = argparse.ArgumentParser(prog="python -m activations.harvest", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--worker", default="1/1", metavar="I/N", help="take share I of N, counted from 1"
    )
    arguments = parser.parse_args()
    table = read_toml(arguments.config, arguments.set)
    config = validate(HarvestConfig, table, str(arguments.config))
    worker = _worker(arguments.worker)
    if found(config):
        print(f"{config.store} is complete: nothing to harvest.")
        return
    harvest(config, worker)
    if worker.count > 1:
        print(
            f"{config.store}: worker {worker} is done. When all are: "
            f"python -m activations.merge {config.store}"
        )
        return
    manifest = Store(config.store).manifest
    print(
        f"{config.store}: {manifest.n_rows:,} rows of {', '.join(config.hooks)} "
        f"from {manifest.model['description']} in {len(manifest.shards)} shards."
    )


if __name__ == "__main__":
    run_command(main)
