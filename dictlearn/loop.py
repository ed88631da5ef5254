"""The only training loop: batches in, the coder that was best on validation rows out.

It logs each step, saves checkpoints, and goes on from one to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from activations.store import Store
from activations.terminal import UserError, progress
from dictlearn import artifact, devices, heldout
from dictlearn import checkpoint as checkpoints
from dictlearn.config import FitConfig
from dictlearn.data import Batches, Rows, State
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.base import AbstractEncoder
from dictlearn.metrics import Bulk
from dictlearn.plan import n_steps
from dictlearn.solvers.base import AbstractSolver, Batch
from dictlearn.trackers import tracking

# Keys of [fit] that do not change the result begin so.
_NOT_RESULTS = ("checkpoint", "track")
# Rows from which a solver may begin; more would only cost memory.
_INIT_ROWS = 32768


@dataclasses.dataclass(frozen=True)
class Job:
    """A fit that can begin: its data are there, and the config suits them."""

    config: FitConfig
    table: dict[str, Any]  # the config with every default written out
    store: Store
    parts: dict[str, Rows]
    train: Rows
    normaliser: Normaliser
    bulk: Bulk
    batch_size: int

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result to the bit, and so whether a checkpoint belongs here."""
        keys = ("seed", "start", "solver")
        data = {key: value for key, value in self.table["data"].items() if key != "store"}
        loop = {k: v for k, v in self.table["fit"].items() if not k.startswith(_NOT_RESULTS)}
        store = self.store.manifest.sha256()
        loop["batch_size"] = self.batch_size
        return {**{k: self.table.get(k) for k in keys}, "data": data, "fit": loop, "store": store}


class DivergedError(UserError):
    """A step gave NaN or infinity."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """How far a fit is, after a whole step."""

    step: int
    state: Any
    rows: State  # of the stream that it has seen
    best: tuple[Dictionary, AbstractEncoder]
    best_step: int
    best_score: float
    best_dense: bool  # more nonzeros than the solver aims at: whatever comes next is better
    goal: float  # the score that has to be beaten for the fit to go on
    stale: int  # evaluations in a row that did not
    log_bytes: int
    seconds: float

    def save(self, file: Path, of: dict[str, Any]) -> None:
        """Write the checkpoint.

        Raises:
          DivergedError: the state holds NaN: the checkpoint before it is kept.
        """
        _check_finite(self.state, self.step)
        fields = [field.name for field in dataclasses.fields(self)]
        header = {name: getattr(self, name) for name in fields if name not in ("state", "best")}
        checkpoints.save(file, (self.state, self.best), of=of, header=header)

    @staticmethod
    def load(file: Path, like: Mark, of: dict[str, Any]) -> Mark:
        """The mark that `save` wrote; `like` has the same arrays."""
        (state, best), header = checkpoints.load(file, (like.state, like.best), of=of)
        del header["of"]
        return Mark(state=state, best=best, **header)


def train(
    job: Job, mark: Mark, run: Path | None, *, checkpoint: Path | None = None
) -> tuple[Coder, int, float]:
    """Step through the epochs; the coder that was best on validation rows, its step, seconds.

    Arguments:
      mark: where to begin.
      run: where log and checkpoints go; None for a process that only helps.
      checkpoint: where to go on from instead; `mark` tells its shape.
    """
    config, size = job.config, job.batch_size
    mesh, count = devices.mesh(), n_steps(job.config.fit.epochs * len(job.train), size)
    solver = cast(AbstractSolver[Any], config.solver)
    _, step_key = jax.random.split(jax.random.key(config.seed))
    if checkpoint is not None:
        mark = Mark.load(checkpoint, mark, job.identity)
    normaliser = devices.everywhere(job.normaliser, mesh)
    state = devices.everywhere(mark.state, mesh)
    batches = _batches(job, mark, lambda rows: _normalised(normaliser, rows, mesh))
    every = config.fit.evaluate_steps or n_steps(len(job.train), size)
    saved = started = time.monotonic()
    before, saved_step = mark.seconds, mark.step
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        log = stack.enter_context(_log(run, mark.log_bytes))
        tell = stack.enter_context(tracking(config.fit.track or (), run, job.table, mark.step))
        bar = stack.enter_context(
            progress(
                total=count,
                initial=mark.step,
                unit="step",
                desc=f"fit {config.name}",
                disable=run is None,
            )
        )
        try:
            for step in range(mark.step + 1, count + 1):
                if mark.stale == config.fit.patience:
                    break
                begun = time.monotonic()
                rows = next(batches)
                batch = rows if isinstance(rows, Batch) else _normalised(normaliser, rows, mesh)
                state, info = solver.step(state, batch, key=jax.random.fold_in(step_key, step))
                state = devices.everywhere(state, mesh)
                line = {name: value.item() for name, value in vars(info).items()}
                line = {"step": step, **line, "seconds": time.monotonic() - begun}
                if not math.isfinite(line["objective"]):
                    raise DivergedError(_not_finite(job, step, line["objective"], saved_step))
                best = {}
                if step % every == 0 or step == count:
                    _check_finite(state, step)
                    result = devices.here(solver.result(state), mesh)
                    coder = Coder(job.normaliser, *result)
                    seen = heldout.evaluate(coder, job.parts["validation"], job.bulk)
                    line |= {"validation_fvu": seen.fvu, "validation_fvu_bulk": seen.fvu_bulk}
                    line |= {"validation_l0": seen.l0}
                    own = seen.l0 - len(job.normaliser.carriers)
                    dense = solver.aim is not None and own > _DENSE * solver.aim
                    # Where everything is a carrier (very few dimensions), there is no bulk.
                    score = seen.fvu_bulk if math.isfinite(seen.fvu_bulk) else seen.fvu
                    if math.isnan(score) and np.isfinite(seen.raw.error).all():
                        raise UserError(
                            "data.validation: its rows do not vary, so that nothing can be chosen "
                            "by them; take a greater share, or more documents"
                        )
                    scored = step, score, dense
                    best = _better(mark, result, *scored, tolerance=config.fit.tolerance)
                    bar.set_postfix_str(f"validation fvu_bulk {seen.fvu_bulk:.4f}", refresh=False)
                finite = {key: v if math.isfinite(v) else None for key, v in line.items()}
                log.write((json.dumps(finite) + "\n").encode())
                tell(finite)
                seconds = before + time.monotonic() - started
                now = {"step": step, "state": state, "rows": batches.state}
                now |= {"log_bytes": log.tell(), "seconds": seconds}
                mark = dataclasses.replace(mark, **now, **best)
                bar.update()
                due = time.monotonic() - saved >= 60 * config.fit.checkpoint_minutes
                due |= step - saved_step == config.fit.checkpoint_steps
                due |= mark.stale == config.fit.patience
                # At the end too: what comes now, the test and the files, may still be stopped.
                if run is not None and (due or step == count):
                    os.fsync(log.fileno())
                    mark.save(run / artifact.CHECKPOINT, job.identity)
                    saved, saved_step = time.monotonic(), step
        except KeyboardInterrupt:
            if run is not None and mark.step > saved_step:
                mark.save(run / artifact.CHECKPOINT, job.identity)
            raise
    return Coder(job.normaliser, *mark.best), mark.best_step, mark.seconds


def begin(job: Job, where: str) -> Mark:
    """The state before the first step.

    Raises:
      UserError: the solver cannot begin from these rows, or from the run named as a start.
    """
    config = job.config
    solver = cast(AbstractSolver[Any], config.solver)
    key, _ = jax.random.split(jax.random.key(config.seed))
    count = n_steps(config.fit.epochs * len(job.train), job.batch_size)
    if "all rows" in solver.needs:
        sample = job.train.whole()
    else:
        sample = job.train.sample(max(_INIT_ROWS, solver.n_atoms), seed=config.seed)
    start = _start(job, where) if config.start is not None else None
    try:
        state = solver.init(
            job.normaliser.normalise(jnp.asarray(sample)), n_steps=count, key=key, start=start
        )
    except ValueError as error:
        raise UserError(f"{where}:\n  solver.{error}") from None
    return Mark(0, state, {"rows": 0}, solver.result(state), 0, 0.0, False, 0.0, 0, 0, 0.0)


class _SameRows:
    """All rows in every batch, in one order: for solvers whose state belongs to them."""

    def __init__(self, batch: Batch, state: State) -> None:
        self._batch, self.state = batch, state

    def __next__(self) -> Batch:
        self.state = {"rows": self.state["rows"] + len(self._batch.x)}
        return self._batch

    def close(self) -> None:
        """Give the memory back."""
        del self._batch


def _batches(
    job: Job, mark: Mark, normalised: Callable[[np.ndarray], Batch]
) -> Batches | _SameRows:
    """What the solver needs, from where the mark stands; all rows are normalised once for all."""
    needs = job.config.solver.needs
    if "all rows" in needs:
        return _SameRows(normalised(job.train.whole()), mark.rows)
    return job.train.batches(
        job.batch_size, seed=job.config.seed, gradients="gradient" in needs, state=mark.rows
    )


def _normalised(normaliser: Normaliser, rows: Any, mesh: Mesh | None) -> Batch:
    """A batch in the solver's units; `rows` may hold the gradients too."""
    if not isinstance(rows, tuple):
        return Batch(normaliser.normalise(devices.spread(rows, mesh)))
    x, gradient = (devices.spread(part, mesh) for part in rows)
    return Batch(normaliser.normalise(x), normaliser.scale * gradient)


# Times the nonzeros that a solver aims at, beyond which a low error is bought with them.
_DENSE = 1.1


def _better(
    mark: Mark, result: Any, step: int, score: float, dense: bool, *, tolerance: float
) -> dict[str, Any]:
    """What an evaluation changes in the mark."""
    first = mark.best_step == 0 or mark.best_dense
    can_be = first or not dense
    goes_on = first or (can_be and score < (1 - tolerance) * mark.goal)
    new: dict[str, Any] = {"goal": score, "stale": 0} if goes_on else {"stale": mark.stale + 1}
    if first or (can_be and score < mark.best_score):
        new |= {"best": result, "best_step": step, "best_score": score, "best_dense": dense}
    return new


def _start(job: Job, where: str) -> Dictionary:
    """The dictionary of the run that the config names as a start."""
    assert job.config.start is not None
    coder = artifact.load(job.config.start).coder
    wanted = (job.config.solver.n_atoms, job.store.width(job.config.data.hook))
    if coder.dictionary.atoms.shape != wanted:
        raise UserError(
            f"{where}:\n  start: {job.config.start} has atoms of shape "
            f"{coder.dictionary.atoms.shape}, but this fit needs {wanted}"
        )
    atoms = coder.dictionary.atoms.at[:, job.normaliser.carriers].set(0)
    bias = coder.normaliser.restore(coder.dictionary.bias[None])
    return Dictionary(atoms, job.normaliser.normalise(bias)[0])


def _check_finite(state: Any, step: int) -> None:
    floats = jax.tree.leaves(eqx.filter(state, eqx.is_inexact_array))
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in floats):
        raise DivergedError(f"step {step}: the solver's state holds NaN or infinity")


def _not_finite(job: Job, step: int, objective: float, saved_step: int) -> str:
    size = job.batch_size
    first = (step - 1) * size
    last = (
        f"the last good checkpoint is of step {saved_step}" if saved_step else "no checkpoint yet"
    )
    return (
        f"step {step}: the objective is {objective}, on rows {first:,} to {first + size:,} of the "
        f"stream (epoch {1 + first // len(job.train)}); {last}. For an SAE, lower "
        "solver.learning_rate; otherwise look for rows of great norm (data.leave_out_massive)."
    )


@contextlib.contextmanager
def _log(run: Path | None, size: int) -> Iterator[IO[bytes]]:
    """train.jsonl, cut to what the checkpoint knows of it."""
    if run is None:
        with open(os.devnull, "wb") as log:
            yield log
        return
    with (run / "train.jsonl").open("ab", buffering=0) as log:
        log.truncate(size)
        log.seek(0, os.SEEK_END)
        yield log
