"""The lines of train.jsonl for TensorBoard or Weights & Biases too, where a config asks for it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from activations.terminal import UserError

Tracker = Literal["tensorboard", "wandb"]
# The package that each needs, which is the extra's name too.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(names: tuple[Tracker, ...]) -> None:
    """Raise UserError where a package is missing, before anything is begun."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"fit.track: {name} needs another package: pip install 'dictlearn-interp[{name}]'"
            )


@contextlib.contextmanager
def tracking(
    names: tuple[Tracker, ...], run: Path | None, table: dict[str, Any], step: int
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What a line goes to as well; nothing, for a process that writes no run.

    TensorBoard's files lie in the run, under tensorboard/. Weights & Biases' project is
    "dictlearn"; its own environment variables (WANDB_PROJECT, WANDB_MODE=offline, ...) hold.

    Arguments:
      table: the config with every default written out.
      step: after which the fit goes on: what is told of later ones is replaced.
    """
    with contextlib.ExitStack() as stack:
        told: list[Callable[[dict[str, Any]], None]] = []
        for name in names if run is not None else ():
            assert run is not None
            open_ = _tensorboard if name == "tensorboard" else _wandb
            told.append(stack.enter_context(open_(run, table, step)))

        def tell(line: dict[str, Any]) -> None:
            for one in told:
                one(line)

        yield tell


@contextlib.contextmanager
def _tensorboard(
    run: Path, table: dict[str, Any], step: int
) -> Iterator[Callable[[dict[str, Any]], None]]:
    from tensorboardX import SummaryWriter

    del table
    with SummaryWriter(str(run / "tensorboard"), purge_step=step + 1) as writer:

        def tell(line: dict[str, Any]) -> None:
            for key, value in line.items():
                if key != "step" and value is not None:
                    writer.add_scalar(key, value, line["step"])

        yield tell


@contextlib.contextmanager
def _wandb(
    run: Path, table: dict[str, Any], step: int
) -> Iterator[Callable[[dict[str, Any]], None]]:
    import os

    import wandb

    del step  # it takes no step twice
    own = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
    project = os.environ.get("WANDB_PROJECT", "dictlearn")
    with wandb.init(
        project=project, name=run.name, id=own, resume="allow", dir=str(run), config=table
    ) as tracked:
        yield lambda line: tracked.log(
            {key: value for key, value in line.items() if key != "step"}, step=line["step"]
        )
