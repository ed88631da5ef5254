"""Run the model over the sequences of a store's shards, and fill the shards with what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from activations import precision
from activations.hooks import HookReader
from activations.precision import Precision
from activations.sequences import has_row, positions, targets
from activations.store import SEQUENCES
from activations.terminal import UserError, progress
from activations.writer import StoreWriter

if TYPE_CHECKING:
    from activations.harvest import HarvestConfig


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
