"""The configuration of a fit, as its TOML file has it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dictlearn.registry import Solver


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is fitted.

    Attributes:
      store: directory of the store; made first, where the config has a [harvest] section.
      hook: which of the store's hooks.
      validation, test: share of the rows that is held out, in whole documents.
      memory_mib: of rows held at once for shuffling.
    """

    __pydantic_config__ = {"extra": "forbid"}

    store: Path
    hook: str
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.15
    memory_mib: Annotated[int, Field(gt=0)] = 2048


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, and in what portions.

    Attributes:
      batch_size: rows a step.
      epochs: times that every training row is seen.
    """

    __pydantic_config__ = {"extra": "forbid"}

    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """A whole fit.

    Attributes:
      name: of the run; its directory is a fresh runs/<name>-NNN unless `output` names another.
      harvest: how to make the store where it is missing: the keys of
        activations.harvest.HarvestConfig without `store`.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: DataConfig
    solver: Solver
    fit: LoopConfig
    harvest: dict[str, Any] | None = None
    output: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def check(self) -> None:
        """Rules that join fields. Raises ValueError that begins with the dotted key."""
        if self.data.validation + self.data.test >= 1:
            raise ValueError("data: validation + test leave nothing for training")
        try:
            self.solver.check()
        except ValueError as error:
            raise ValueError(f"solver.{error}") from None
