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
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from activations import models, precision, sequences
from activations.config import read_toml, validate
from activations.corpora import Corpus
from activations.files import replace_file, sha256
from activations.hooks import HookReader
from activations.precision import Compression, Precision
from activations.sequences import Marks, has_row, positions, targets
from activations.store import (
    MANIFEST,
    MEND,
    SEQUENCES,
    Manifest,
    Store,
    StoreError,
    read_manifest,
)
from activations.terminal import UserError, progress, run_command
from activations.writer import (
    StoreWriter,
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
        with open_writer(config.store, manifest, worker) as writer:
            try:
                write(config, reader, writer)
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


def write(config: HarvestConfig, reader: HookReader, writer: StoreWriter) -> None:
    """Run the model over the sequences of the shards that `writer` misses.

    Where the model runs on a GPU, a thread takes the rows out, checks, converts, hashes and writes
    them meanwhile. On a CPU it would only hold up the threads of the forward pass.
    """
    store = np.load(config.store / SEQUENCES, mmap_mode="r")
    mine, size = writer.worker.shards(writer.manifest), writer.manifest.shard_sequences
    in_range = store[mine.start * size : mine.stop * size, 0].size
    done = (writer.missing.start - mine.start) * size * config.context_length
    with (
        _Here() if str(reader.bridge.cfg.device) == "cpu" else ThreadPoolExecutor(1) as thread,
        progress(
            total=in_range,
            initial=min(done, in_range),
            unit="tok",
            unit_scale=True,
            desc=f"harvest {writer.manifest.model['description']}",
        ) as bar,
    ):
        waiting: list[Future[None]] = []
        for index in list(writer.missing):
            chosen = np.array(store[index * size : (index + 1) * size])
            shard = _ShardBuilder(config, writer, index, chosen)
            for batch in shard.batches():
                seen = _read(config, reader, chosen[batch])
                waiting.append(thread.submit(shard.add, batch, seen))
                bar.update(chosen[batch, 0].size)
                while len(waiting) > 2:
                    waiting.pop(0).result()
            waiting.append(thread.submit(shard.finish))
        for future in waiting:
            future.result()


def _read(config: HarvestConfig, reader: HookReader, batch: np.ndarray) -> dict[str, np.ndarray]:
    """The datasets of a batch of sequences [b 2 c], not yet without the tokens that get no row."""
    token, document = batch[:, 0], batch[:, 1]
    position = None if config.cross_document_attention else positions(document)
    if not config.gradients:
        seen, gradients = reader.read(token, position), {}
    else:
        seen, gradients = reader.read_gradients(token, targets(document), position)
    return {
        **{f"activations/{hook}": x for hook, x in seen.items()},
        **{f"gradients/{hook}": x for hook, x in gradients.items()},
    }


class _Here(Executor):
    """Runs what is submitted at once, in the caller's thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _ShardBuilder:
    """One shard in memory, filled batch after batch."""

    def __init__(
        self, config: HarvestConfig, writer: StoreWriter, index: int, chosen: np.ndarray
    ) -> None:
        self._writer = writer
        self._index = index
        self._batch_size = config.batch_size
        self._precision: Precision = config.dtype
        token, document = chosen[:, 0], chosen[:, 1]
        self._kept = has_row(document, predicting=config.gradients)
        sequence, position = np.nonzero(self._kept)
        self._columns = {
            "token": token[self._kept],
            "document": document[self._kept],
            "sequence": (sequence + index * writer.manifest.shard_sequences).astype(np.int32),
            "position": position.astype(np.int32),
        }
        rows, dtype = len(sequence), precision.DTYPES[config.dtype]
        self._data = {
            name: np.empty((rows, width), dtype) for name, width in writer.manifest.datasets.items()
        }
        self._filled = 0

    def batches(self) -> Iterator[slice]:
        """The sequences of each forward pass."""
        for first in range(0, len(self._kept), self._batch_size):
            yield slice(first, first + self._batch_size)

    def add(self, batch: slice, seen: dict[str, np.ndarray]) -> None:
        """Take over the rows of one batch."""
        kept = self._kept[batch]
        end = self._filled + int(kept.sum())
        token = self._columns["token"][self._filled : end]
        for name, x in seen.items():
            rows = _converted(name, x[kept], token, self._precision)  # [b c d] -> [n d]
            self._data[name][self._filled : end] = rows
        self._filled = end

    def finish(self) -> None:
        """Write it."""
        if self._filled != len(self._columns["token"]):
            raise ValueError(f"shard {self._index}: a batch before was refused")
        self._writer.write_shard(self._index, {**self._data, **self._columns})


def _converted(name: str, x: np.ndarray, token: np.ndarray, kind: Precision) -> np.ndarray:
    """Rows [n d] as they stand on disk.

    Raises:
      UserError: a value is NaN or infinite, or `kind` cannot hold it.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        stored = x.astype(precision.DTYPES[kind], copy=False)
    if (bad := precision.not_finite(stored)).any():
        row = int(np.argmax(bad))
        what, hook = name.split("/", 1)
        if not np.isfinite(x[row]).all():
            raise UserError(
                f"{hook}: the model gave NaN or infinity at token {token[row]} ({what}); nothing "
                "of this shard was written"
            )
        raise UserError(
            f"{hook}: {kind} cannot hold {x[row][np.argmax(abs(x[row]))]:,.0f}, seen at token "
            f'{token[row]} ({what}). Set dtype = "bfloat16" (or "float32"), and '
            "name another store if this one has finished shards."
        )
    if (small := precision.too_small(x, kind)).any():
        row = int(np.argmax(small))
        what, hook = name.split("/", 1)
        raise UserError(
            f"{hook}: {kind} cannot hold the {what} at token {token[row]}: none of them is over "
            f'{abs(x[row]).max():.1e}. Set dtype = "bfloat16" (or "float32"), and '
            "name another store if this one has finished shards."
        )
    return stored


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
