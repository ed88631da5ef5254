"""What a store holds, for looking:  python -m activations.info STORE.

Statistics are of the whole store, test rows too: a fit computes its own over its training rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from activations.statistics import CARRIER_SHARE, MASSIVE_NORMS, Moments
from activations.store import Shard, Store
from activations.terminal import progress, run_command

# Shards that are worked on at once: while one is read, another is summed up.
_THREADS = 2
# How many tokens are listed.
_HEAD = 6


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` found out about one dataset of rows.

    Attributes:
      massive: how many rows each token has whose norm is over 5 medians.
      massive_share: their share of the variance.
    """

    moments: Moments
    massive: Counter[int]
    massive_share: float


def describe(store: Store, name: str, bar: tqdm | None = None) -> Description:
    """Statistics of one dataset of rows, `activations/<hook>` or `gradients/<hook>`, in one pass.

    Shards are summed up side by side and merged in their order, so that the figures are the same
    each time. Only massive rows are read again.
    """

    def blocks(shard: Shard) -> Iterator[np.ndarray]:
        yield np.empty((0, store.manifest.datasets[name]))
        for x in store.rows(shard, name):
            yield x
            if bar is not None:
                bar.update(x.nbytes)

    shards = store.manifest.shards
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(lambda shard: Moments.over(blocks(shard)), shards))
    moments = functools.reduce(operator.add, parts)
    massive: Counter[int] = Counter()
    spread = 0.0
    for shard, part in zip(shards, parts, strict=True):
        rows = np.flatnonzero(np.concatenate([*part.norms, []]) > moments.norm_limit)
        if not len(rows):
            continue
        massive.update(store.read(shard, "token")[rows].tolist())
        for x in store.rows(shard, name, [(int(row), int(row) + 1) for row in rows]):
            spread += float(((x[0].astype(np.float64) - moments.mean) ** 2).sum())
    total = float(moments.deviations.sum())
    return Description(moments, massive, spread / total if total else 0.0)


def tables(store: Store) -> Iterator[Table]:
    """What `python -m activations.info` prints."""
    manifest, vocabulary = store.manifest, store.vocabulary
    size = sum(shard.bytes for shard in manifest.shards)
    yield _pairs(
        {
            "model": str(manifest.model.get("description")),
            "corpus": ", ".join(f"{key} {value}" for key, value in manifest.corpus.items()),
            "rows": f"{len(store):,} of {manifest.n_documents:,} documents, in "
            f"{manifest.n_sequences:,} sequences of {manifest.context_length}",
            "left out": ", ".join(manifest.dropped_positions),
            "on disk": f"{size / 2**20:,.1f} MiB in {len(manifest.shards)} shards, "
            f"{manifest.dtype}, compression {manifest.compression}",
        }
    )
    with progress(
        total=sum(
            len(store) * width * (4 if manifest.dtype == "float32" else 2)
            for width in manifest.datasets.values()
        ),
        unit="B",
        unit_scale=True,
        desc="info",
        leave=False,
    ) as bar:
        found = {name: describe(store, name, bar) for name in manifest.datasets}
    norms = _table("", "width", "median norm", "greatest", "|mean|", "scale")
    carriers = _table(f"dimensions over {CARRIER_SHARE:.0%} of the variance", "", "share")
    massive = _table(f"rows over {MASSIVE_NORMS} median norms", "rows", "share", "tokens")
    for name, seen in found.items():
        moments = seen.moments
        lengths = np.concatenate([*moments.norms, []])
        sizes = (np.median(lengths), lengths.max(), np.linalg.norm(moments.mean))
        name = name.removeprefix("activations/").replace("gradients/", "grad ")
        norms.add_row(
            name,
            str(len(moments.mean)),
            *(f"{number:.4g}" for number in (*sizes, moments.scale)),
        )
        shares = moments.deviations / max(moments.deviations.sum(), np.finfo(float).tiny)
        for dimension in np.flatnonzero(moments.carriers):
            carriers.add_row(name, str(dimension), f"{shares[dimension]:.1%}")
        if seen.massive:
            tokens = [
                f"{_shown(vocabulary, token)} x {count:,}"
                for token, count in seen.massive.most_common(_HEAD)
            ]
            massive.add_row(
                name,
                f"{seen.massive.total():,}",
                f"{seen.massive_share:.1%}",
                ", ".join(tokens),
            )
    yield norms
    yield from (table for table in (carriers, massive) if table.row_count)
    token, count = np.unique(store.column("token"), return_counts=True)
    most = np.argsort(-count, kind="stable")[:_HEAD]
    frequency = _table(f"most frequent of {len(token):,} tokens", "rows", "share")
    for index in most:
        share = count[index] / count.sum()
        shown = _shown(vocabulary, int(token[index]))
        frequency.add_row(shown, f"{count[index]:,}", f"{share:.1%}")
    yield frequency


def _shown(vocabulary: dict[int, str], token: int) -> str:
    return escape(repr(vocabulary.get(token, f"token {token}")))


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in headings:
        words = heading == "tokens"
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    return table


def _pairs(rows: dict[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, text in rows.items():
        table.add_row(f"[bold]{key}[/bold]", escape(text))
    return table


def main() -> None:
    """Entry of `python -m activations.info`."""
    parser = argparse.ArgumentParser(prog="python -m activations.info", description=__doc__)
    parser.add_argument("store", type=Path)
    store = Store(parser.parse_args().store)
    console = Console(highlight=False)
    for table in tables(store):
        console.print(table, "")


if __name__ == "__main__":
    run_command(main)
