"""What a fit would do, for `--dry-run`: nothing is loaded, fetched, converted or written."""

from __future__ import annotations

import math

from activations.precision import DTYPES
from activations.store import Store
from dictlearn import artifact
from dictlearn.config import FitConfig, check_most, check_store, recipe_of


def n_steps(rows: int | float, size: int) -> int:
    """How many batches see so many rows."""
    return max(1, math.ceil(rows / size))


def plan(config: FitConfig, where: str, *, overwrite: bool) -> dict[str, str]:
    """A line a thing that would be done, or that it would take."""
    artifact.check_place(config.output, overwrite=overwrite)
    if config.start is not None:
        artifact.read_metadata(config.start)
    recipe = recipe_of(config, where)
    unknown = "unknown before the model and the corpus are read"
    lines = {"store": str(config.data.store), "harvest": "nothing: the store is there"}
    missing = None
    if recipe is not None:
        from activations import harvest, models

        if not harvest.found(recipe):
            missing = recipe.max_tokens, models.width(recipe.model)
    if recipe is not None and missing is not None:
        lines["harvest"] = f"from {recipe.model}"
        (rows, width), about, total = missing, "at most about ", None
        if rows is not None and width is not None:
            datasets = len(recipe.hooks) * (2 if recipe.gradients else 1)
            item = DTYPES[recipe.dtype].itemsize
            total = rows * (item * width * datasets + 24)  # rows, columns, sequences
    else:
        store = Store(config.data.store)
        check_store(config, store, where)
        rows, width = len(store), store.width(config.data.hook)
        about, total = "", sum(shard.bytes for shard in store.manifest.shards)
    lines["tokens"] = f"{about}{rows:,}" if rows is not None else unknown
    lines["bytes on disk"] = f"{about}{total:,}" if total is not None else unknown
    lines["steps"] = lines["memory"] = unknown
    if rows is not None:
        train = (1 - config.data.validation - config.data.test) * rows
        check_most(config, int(train), where)
        size = config.fit.batch_size or math.ceil(train)
        count = n_steps(config.fit.epochs * train, size)
        lines["steps"] = f"about {count:,} of {size:,} rows"
        if width is not None:
            held = min(4 * width * train, config.data.memory_mib * 2**20)
            need = held + config.solver.memory_bytes(size, width)
            lines["memory"] = f"about {need / 2**30:.1f} GiB for rows and solver"
    lines["run"] = str(config.output or f"runs/{config.name}-NNN")
    return lines
