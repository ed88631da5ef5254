"""Activations on disk -> dictionary:  python -m dictlearn.fit config.toml.

Makes the store where the config says how, splits it by document, fits (dictlearn.loop), reads the
test rows once, at the end, and writes the run. Given the directory of a run that was stopped, it
goes on with that one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import tomli_w

from activations.config import read_toml, validate
from activations.files import replace_file
from activations.store import Store
from activations.terminal import UserError, run_command
from activations.verify import verify as verify_store
from dictlearn import artifact, devices, heldout, report, runs, trackers
from dictlearn.config import FitConfig, check_most, check_store, recipe_of, resolved
from dictlearn.data import Rows, split_by_document, statistics
from dictlearn.dictionary import Coder
from dictlearn.loop import Job, begin, train
from dictlearn.metrics import Bulk
from dictlearn.plan import n_steps, plan

if TYPE_CHECKING:
    from activations.harvest import HarvestConfig


def fit(
    config: FitConfig, *, where: str = "config", overwrite: bool = False, verify: bool = False
) -> Path:
    """Fit a dictionary as `config` says, and return the run's directory.

    Of several processes (dictlearn.devices) the first one writes the run; the others return when
    they are no longer needed.

    Arguments:
      where: what messages call the config.
      overwrite: replace the run at `config.output`.
      verify: read the whole store first, and compare its checksums.

    Raises:
      UserError: the config, the store or the output cannot be used; a step gave NaN.
    """
    if devices.leads():
        artifact.check_place(config.output, overwrite=overwrite)
    if config.start is not None:
        artifact.read_metadata(config.start)  # a mistake shows before the store is made
    job = prepare(config, where, verify=verify)
    _check_batches(job, where)
    first = begin(job, where)
    if not devices.leads():
        train(job, first, None)
        return config.output or Path("runs")
    usual = config.solver.usual_hook
    if not config.data.hook.endswith(usual):
        report.say(
            f"{config.solver.name} of {config.data.hook}: allowed, but unusual; it is meant for "
            f"hooks such as blocks.N{usual}"
        )
    with artifact.directory(config.output, config.name, overwrite=overwrite) as run:
        replace_file(run / "config.toml", tomli_w.dumps(job.table).encode())
        _finish(job, run, train(job, first, run))
    return run


def go_on(run: Path, settings: list[str] | None = None, *, verify: bool = False) -> Path:
    """Go on with the fit in `run` after its last checkpoint, and end with the same bytes.

    Arguments:
      settings: changes of the config that do not change the result, e.g. fit.checkpoint_minutes=1.

    Raises:
      UserError: there is nothing to go on with; the checkpoint is damaged, or of another config or
        store; as `fit`.
    """
    where = str(run / "config.toml")
    with artifact.unfinished(run) if devices.leads() else contextlib.nullcontext():
        job = prepare(
            validate(FitConfig, read_toml(run / "config.toml", settings or []), where),
            where,
            verify=verify,
        )
        _check_batches(job, where)
        writes = run if devices.leads() else None
        trained = train(job, begin(job, where), writes, checkpoint=run / artifact.CHECKPOINT)
        if devices.leads():
            _finish(job, run, trained)
    return run


def prepare(config: FitConfig, where: str, *, verify: bool = False) -> Job:
    """Have the store made where it is missing, split it, and see that the config suits it."""
    trackers.check(config.fit.track or ())
    recipe = recipe_of(config, where)
    if recipe is not None and devices.leads():
        _make_store(recipe)
    devices.wait("store")
    if verify and devices.leads():
        verify_store(config.data.store)
    store = Store(config.data.store)
    check_store(config, store, where)
    parts = split_by_document(
        store,
        config.data.hook,
        validation=config.data.validation,
        test=config.data.test,
        seed=config.seed,
        memory=config.data.memory_mib * 2**20,
    )
    fitted, normaliser, bulk = statistics(
        parts["train"],
        keep_carriers=config.data.keep_carriers,
        leave_out_massive=config.data.leave_out_massive,
        centre=config.data.centre,
    )
    check_most(config, len(fitted), where)
    size = config.fit.batch_size or len(fitted)
    table = resolved(config, recipe)
    return Job(config, table, store, parts, fitted, normaliser, bulk, size)


def _check_batches(job: Job, where: str) -> None:
    """Whether rows can be shared out as the config and the devices want it."""
    config, size, rows = job.config, job.batch_size, len(job.train)
    if size > rows:
        raise UserError(
            f"{where}:\n  fit.batch_size: {size:,} is more than the {rows:,} training rows"
        )
    if size % jax.device_count():
        mend = "" if config.fit.batch_size else f"; {config.solver.name} takes all, use one device"
        raise UserError(
            f"{where}:\n  fit.batch_size: {size:,} rows cannot be shared out evenly among "
            f"{jax.device_count()} devices{mend}"
        )
    if n_steps(config.fit.epochs * rows, size) >= 2**31:
        raise UserError(
            f"{where}:\n  fit.epochs: {config.fit.epochs} is more steps than can be counted"
        )


def _finish(job: Job, run: Path, trained: tuple[Coder, int, float]) -> None:
    """Read the test rows, and save the run."""
    coder, step, seconds = trained
    metrics = _measure(job.config, coder, job.parts, job.bulk)
    metrics |= {"seconds": seconds, "best_step": step}
    artifact.save(run, coder, _metadata(job), metrics)


def _measure(config: FitConfig, coder: Coder, parts: dict[str, Rows], bulk: Bulk) -> dict[str, Any]:
    """The test rows' figures, for the fit and for its control. The test is read here alone."""
    untrained = heldout.control(
        parts["train"],
        coder.normaliser,
        config.solver.control,
        n_atoms=config.solver.n_atoms,
        seed=config.seed,
    )
    seen = heldout.evaluate(coder, parts["test"], bulk)
    beside = heldout.evaluate(untrained, parts["test"], bulk)
    figures = heldout.figures(coder, seen, seed=config.seed)
    figures |= heldout.against(seen, beside, seed=config.seed)
    if "gradient" in config.solver.needs:
        # The other mode of inference: it knows the next token, and is no rival of the others.
        seen = heldout.evaluate(coder, parts["test"], bulk, gradients=True)
        figures["with_gradient"] = {"fvu": seen.fvu, "fvu_bulk": seen.fvu_bulk, "l0": seen.l0}
    return figures


def _make_store(recipe: HarvestConfig) -> None:
    from activations import harvest

    if harvest.found(recipe):
        report.say(f"store {recipe.store}: found, nothing to harvest")
    else:
        harvest.harvest(recipe)


def _metadata(job: Job) -> dict[str, Any]:
    """What it takes to know this dictionary, and to find the same place in the model again."""
    config, store, parts = job.config, job.store, job.parts
    manifest = store.manifest
    return {
        "name": config.name,
        "solver": artifact.hyperparameters(config.solver),
        "seed": config.seed,
        "start": config.start and str(config.start),
        "hook": config.data.hook,
        "data": {
            name: getattr(config.data, name)
            for name in ("keep_carriers", "leave_out_massive", "centre")
        },
        "model": manifest.model,
        "corpus": manifest.corpus,
        "harvest": manifest.request,
        "context_length": manifest.context_length,
        "dropped_positions": manifest.dropped_positions,
        "store": {"path": str(store.path), "manifest_sha256": manifest.sha256()},
        "split": {name: rows.documents.tolist() for name, rows in parts.items()},
        "n_training_rows": len(job.train),
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


def main() -> None:
    """Entry of `python -m dictlearn.fit`."""
    parser = argparse.ArgumentParser(prog="python -m dictlearn.fit", description=__doc__)
    parser.add_argument(
        "config", type=Path, help="e.g. experiments/quickstart.toml; or a run that was stopped"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. fit.epochs=2"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, do nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the run at `output`")
    parser.add_argument("--verify", action="store_true", help="compare the store's checksums first")
    arguments = parser.parse_args()
    devices.join()
    if arguments.config.is_dir():
        if arguments.dry_run or arguments.overwrite:
            raise UserError(
                f"{arguments.config}: is a run; --dry-run and --overwrite need a config"
            )
        run = go_on(arguments.config, arguments.set, verify=arguments.verify)
    else:
        where = str(arguments.config)
        config = validate(FitConfig, read_toml(arguments.config, arguments.set), where)
        if arguments.dry_run:
            report.show_plan(plan(config, where, overwrite=arguments.overwrite))
            return
        run = fit(config, where=where, overwrite=arguments.overwrite, verify=arguments.verify)
    if devices.leads():
        report.show(run)


def command() -> None:
    """Entry of the console script: `dictlearn CONFIG` fits, `dictlearn runs [DIR]` lists runs."""
    if sys.argv[1:2] == ["runs"]:
        del sys.argv[1]
        run_command(runs.main)
    run_command(main)


if __name__ == "__main__":
    command()
