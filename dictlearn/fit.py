"""Activations on disk -> dictionary:  python -m dictlearn.fit config.toml.

The only training loop: it makes the store where the config says how, splits it by document, feeds
the solver, keeps the state that is best on validation rows, reads the test rows once, at the end,
and writes the run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import tomli_w

from activations.config import read_toml, validate
from activations.files import replace_file
from activations.precision import DTYPES
from activations.store import Store
from activations.terminal import UserError, progress, run_command
from activations.verify import verify as verify_store
from dictlearn import artifact, heldout, report
from dictlearn.config import FitConfig
from dictlearn.data import Rows, split_by_document, statistics
from dictlearn.dictionary import Coder, Normaliser
from dictlearn.metrics import Bulk
from dictlearn.solvers.base import AbstractSolver, Batch

if TYPE_CHECKING:
    from activations.harvest import HarvestConfig

# Rows from which a solver may begin; more would only cost memory.
_INIT_ROWS = 32768


def fit(
    config: FitConfig, *, where: str = "config", overwrite: bool = False, verify: bool = False
) -> Path:
    """Fit a dictionary as `config` says, and return the run's directory.

    Arguments:
      where: what messages call the config.
      overwrite: replace the run at `config.output`.
      verify: read the whole store first, and compare its checksums.

    Raises:
      UserError: the config, the store or the output cannot be used; a step gave NaN.
    """
    artifact.check_place(config.output, overwrite=overwrite)
    recipe = _recipe(config, where)
    if recipe is not None:
        _make_store(recipe)
    if verify:
        verify_store(config.data.store)
    store = Store(config.data.store)
    store.width(config.data.hook)
    parts = split_by_document(
        store,
        config.data.hook,
        validation=config.data.validation,
        test=config.data.test,
        seed=config.seed,
        memory=config.data.memory_mib * 2**20,
    )
    n_train = len(parts["train"])
    if config.fit.batch_size > n_train:
        raise UserError(
            f"{where}:\n  fit.batch_size: {config.fit.batch_size:,} is more than the {n_train:,} "
            "training rows"
        )
    if config.solver.n_atoms > n_train:
        raise UserError(
            f"{where}:\n  solver.n_atoms: {config.solver.n_atoms:,} atoms are begun from as many "
            f"rows, but there are only {n_train:,} training rows. Use fewer, or harvest more text."
        )
    if steps(config.fit.epochs * n_train, config.fit.batch_size) >= 2**31:
        raise UserError(
            f"{where}:\n  fit.epochs: {config.fit.epochs} is more steps than can be counted"
        )
    normaliser, bulk = statistics(parts["train"])
    with artifact.directory(config.output, config.name, overwrite=overwrite) as run:
        replace_file(run / "config.toml", tomli_w.dumps(_resolved(config, recipe)).encode())
        started = time.monotonic()
        coder, step = _train(config, parts, normaliser, bulk, run)
        seconds = time.monotonic() - started
        metrics = _measure(config, coder, parts, bulk)
        metrics |= {"seconds": seconds, "best_step": step}
        artifact.save(run, coder, _metadata(config, store, parts), metrics)
    return run


def _train(
    config: FitConfig, parts: dict[str, Rows], normaliser: Normaliser, bulk: Bulk, run: Path
) -> tuple[Coder, int]:
    """Step through the epochs; the coder that was best on validation rows, and its step."""
    size = config.fit.batch_size
    solver = cast(AbstractSolver[Any], config.solver)
    n_train = len(parts["train"])
    n_steps, per_epoch = steps(config.fit.epochs * n_train, size), steps(n_train, size)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    sample = parts["train"].sample(max(_INIT_ROWS, solver.n_atoms), seed=config.seed)
    state = solver.init(normaliser.normalise(jnp.asarray(sample)), n_steps=n_steps, key=init_key)
    batches = parts["train"].batches(size, seed=config.seed)

    best: tuple[float, Coder, int] | None = None
    step = 0
    try:
        with (
            contextlib.closing(batches),
            (run / "train.jsonl").open("w", buffering=1) as log,
            progress(total=n_steps, unit="step", desc=f"fit {config.solver.name}") as bar,
        ):
            for step in range(1, n_steps + 1):
                before = time.monotonic()
                batch = Batch(normaliser.normalise(jnp.asarray(next(batches))))
                state, info = solver.step(state, batch, key=jax.random.fold_in(step_key, step))
                line = {name: value.item() for name, value in vars(info).items()}
                line = {"step": step, **line, "seconds": time.monotonic() - before}
                if not math.isfinite(line["objective"]):
                    raise UserError(
                        f"step {step}: the objective is {line['objective']}. For an SAE, lower "
                        "solver.learning_rate; otherwise look for rows of great norm."
                    )
                if step % per_epoch == 0 or step == n_steps:
                    coder = Coder(normaliser, *solver.result(state))
                    seen = heldout.evaluate(coder, parts["validation"], bulk)
                    line |= {"validation_fvu": seen.fvu, "validation_fvu_bulk": seen.fvu_bulk}
                    # Where everything is a carrier (very few dimensions), there is no bulk.
                    score = seen.fvu_bulk if math.isfinite(seen.fvu_bulk) else seen.fvu
                    if best is None or score < best[0]:
                        best = (score, coder, step)
                    bar.set_postfix_str(f"validation fvu_bulk {seen.fvu_bulk:.4f}", refresh=False)
                finite = {key: v if math.isfinite(v) else None for key, v in line.items()}
                log.write(json.dumps(finite) + "\n")
                bar.update()
    except KeyboardInterrupt:
        text = f"interrupted at step {step} of {n_steps}; nothing was saved. Fit again."
        replace_file(run / artifact.UNFINISHED, text.encode())
        raise
    assert best is not None
    return best[1], best[2]


def steps(rows: int | float, size: int) -> int:
    """How many batches see so many rows."""
    return max(1, math.ceil(rows / size))


def _measure(config: FitConfig, coder: Coder, parts: dict[str, Rows], bulk: Bulk) -> dict[str, Any]:
    """The test rows' figures, for the fit and for its control. The test is read here alone."""
    untrained = heldout.control(
        parts["train"],
        coder.normaliser,
        config.solver.control,
        n_atoms=config.solver.n_atoms,
        seed=config.seed,
    )
    return heldout.figures(
        coder,
        heldout.evaluate(coder, parts["test"], bulk),
        heldout.evaluate(untrained, parts["test"], bulk),
        seed=config.seed,
    )


def _recipe(config: FitConfig, where: str) -> HarvestConfig | None:
    """The [harvest] section, typed; `store` comes from [data]."""
    if config.harvest is None:
        return None
    # The harvester is known only to configs that ask for it; it brings in no torch by itself.
    from activations.harvest import HarvestConfig

    if "store" in config.harvest:
        raise UserError(f"{where}:\n  harvest.store: unknown key; the store is data.store")
    table = {**config.harvest, "store": str(config.data.store)}
    recipe = validate(HarvestConfig, table, where, "harvest.")
    if config.data.hook not in recipe.hooks:
        raise UserError(
            f"{where}:\n  data.hook: {config.data.hook!r} is not among harvest.hooks "
            f"({', '.join(recipe.hooks)})"
        )
    return recipe


def _make_store(recipe: HarvestConfig) -> None:
    from activations import harvest

    if harvest.found(recipe):
        report.say(f"store {recipe.store}: found, nothing to harvest")
    else:
        harvest.harvest(recipe)


def _resolved(config: FitConfig, recipe: HarvestConfig | None) -> dict[str, Any]:
    """The config with every default written out, as TOML can hold it."""
    table = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    table["output"] = None  # so that the same config can be fitted again
    table["data"] = dataclasses.asdict(config.data)
    table["fit"] = dataclasses.asdict(config.fit)
    table["solver"] = artifact.hyperparameters(config.solver)
    table["harvest"] = recipe and recipe.request
    return json.loads(json.dumps(_without_none(table), default=str))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


def _metadata(config: FitConfig, store: Store, parts: dict[str, Rows]) -> dict[str, Any]:
    """What it takes to know this dictionary, and to find the same place in the model again."""
    manifest = store.manifest
    return {
        "name": config.name,
        "solver": artifact.hyperparameters(config.solver),
        "seed": config.seed,
        "hook": config.data.hook,
        "model": manifest.model,
        "corpus": manifest.corpus,
        "harvest": manifest.request,
        "context_length": manifest.context_length,
        "dropped_positions": manifest.dropped_positions,
        "store": {"path": str(store.path), "manifest_sha256": manifest.sha256()},
        "split": {name: rows.documents.tolist() for name, rows in parts.items()},
        "n_training_rows": len(parts["train"]),
        "commit": _commit(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("dictlearn-interp", "jax", "jaxlib", "equinox", "optax", "numpy")
        },
        "device": jax.devices()[0].device_kind,
    }


def _commit() -> str | None:
    """The commit of dictlearn's own checkout, where it runs from one."""
    here = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            answer = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def plan(config: FitConfig, where: str, *, overwrite: bool) -> dict[str, str]:
    """What a fit would do, for `--dry-run`: nothing is loaded, fetched, converted or written."""
    artifact.check_place(config.output, overwrite=overwrite)
    recipe = _recipe(config, where)
    unknown = "unknown before the model and the corpus are read"
    lines = {"store": str(config.data.store), "harvest": "nothing: the store is there"}
    missing = None
    if recipe is not None:
        from activations import harvest, models

        if not harvest.found(recipe):
            missing = recipe.max_tokens, models.width(recipe.model)
    if recipe is not None and missing is not None:
        lines["harvest"] = f"from {recipe.model}"
        (rows, width), about, size = missing, "at most about ", None
        if rows is not None and width is not None:
            datasets = len(recipe.hooks) * (2 if recipe.gradients else 1)
            item = DTYPES[recipe.dtype].itemsize
            size = rows * (item * width * datasets + 24)  # rows, columns, sequences
    else:
        store = Store(config.data.store)
        rows, width = len(store), store.width(config.data.hook)
        about, size = "", sum(shard.bytes for shard in store.manifest.shards)
    lines["tokens"] = f"{about}{rows:,}" if rows is not None else unknown
    lines["bytes on disk"] = f"{about}{size:,}" if size is not None else unknown
    lines["steps"] = lines["memory"] = unknown
    if rows is not None:
        train = (1 - config.data.validation - config.data.test) * rows
        n_steps = steps(config.fit.epochs * train, config.fit.batch_size)
        lines["steps"] = f"about {n_steps:,} of {config.fit.batch_size:,} rows"
        if width is not None:
            held = min(4 * width * train, config.data.memory_mib * 2**20)
            need = held + config.solver.memory_bytes(config.fit.batch_size, width)
            lines["memory"] = f"about {need / 2**30:.1f} GiB for rows and solver"
    lines["run"] = str(config.output or f"runs/{config.name}-NNN")
    return lines


def main() -> None:
    """Entry of `python -m dictlearn.fit`."""
    parser = argparse.ArgumentParser(prog="python -m dictlearn.fit", description=__doc__)
    parser.add_argument("config", type=Path, help="e.g. experiments/quickstart.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. fit.epochs=2"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, do nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the run at `output`")
    parser.add_argument("--verify", action="store_true", help="compare the store's checksums first")
    arguments = parser.parse_args()
    where = str(arguments.config)
    config = validate(FitConfig, read_toml(arguments.config, arguments.set), where)
    if arguments.dry_run:
        report.show_plan(plan(config, where, overwrite=arguments.overwrite))
        return
    run = fit(config, where=where, overwrite=arguments.overwrite, verify=arguments.verify)
    report.show(run)


def command() -> None:
    """Entry of the console script `dictlearn`."""
    run_command(main)


if __name__ == "__main__":
    command()
