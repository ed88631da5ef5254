"""The configuration of a fit, as its TOML file has it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from activations.config import validate
from activations.store import Store
from activations.terminal import UserError
from dictlearn import artifact
from dictlearn.registry import Solver
from dictlearn.trackers import Tracker

if TYPE_CHECKING:
    from activations.harvest import HarvestConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is fitted.

    Attributes:
      store: directory of the store; made first, where the config has a [harvest] section.
      hook: which of the store's hooks.
      validation, test: share of the rows that is held out, in whole documents.
      memory_mib: of rows held at once for shuffling.
      keep_carriers: keep coordinates that hold over 10 % of the training variance exactly; each is
        one more nonzero of every row. Solver and control never see them.
      leave_out_massive: fit without the rows whose norm is over 5 times the training median;
        figures are of all rows.
      centre: take the training rows' mean out first.
    """

    __pydantic_config__ = {"extra": "forbid"}

    store: Path
    hook: str
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.15
    memory_mib: Annotated[int, Field(gt=0)] = 2048
    keep_carriers: bool = False
    leave_out_massive: bool = False
    centre: bool = True


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, and in what portions.

    Attributes:
      batch_size: rows a step; all training rows where it is left out.
      epochs: times that every training row is seen.
      evaluate_steps: how often the dictionary is tried on the validation rows, from which the best
        is kept; once an epoch where it is left out.
      patience, tolerance: the fit ends when so many evaluations in a row have not brought the
        validation fvu_bulk down by this share of it. Left out: after all epochs.
      checkpoint_minutes, checkpoint_steps: how often the fit is saved, so that it can go on after
        it was stopped; whichever comes first.
      track: where the lines of train.jsonl go too (dictlearn.trackers).
    """

    __pydantic_config__ = {"extra": "forbid"}

    batch_size: Annotated[int, Field(gt=0)] | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    evaluate_steps: Annotated[int, Field(gt=0)] | None = None
    patience: Annotated[int, Field(gt=0)] | None = None
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    checkpoint_steps: Annotated[int, Field(gt=0)] | None = None
    track: tuple[Tracker, ...] | None = None


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """A whole fit.

    Attributes:
      name: of the run; its directory is a fresh runs/<name>-NNN unless `output` names another.
      harvest: how to make the store where it is missing: the keys of
        activations.harvest.HarvestConfig without `store`.
      start: a finished run whose atoms the solver begins with, instead of its own start.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: DataConfig
    solver: Solver
    fit: LoopConfig
    harvest: dict[str, Any] | None = None
    output: Path | None = None
    start: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def check(self) -> None:
        """Rules that join fields. Raises ValueError that begins with the dotted key."""
        if self.data.validation + self.data.test >= 1:
            raise ValueError("data: validation + test leave nothing for training")
        if "all rows" in self.solver.needs and self.fit.batch_size is not None:
            raise ValueError(
                f"fit.batch_size: {self.solver.name} takes all rows in every step; leave it out"
            )
        if getattr(self.solver, "frozen", False) and self.start is None:
            raise ValueError("start: a frozen dictionary is that of a run; name one")
        try:
            self.solver.check()
        except ValueError as error:
            raise ValueError(f"solver.{error}") from None


_GRADIENT = "solver.variant needs the loss gradient at each row"


def check_store(config: FitConfig, store: Store, where: str) -> None:
    """Whether a store holds what the config asks for."""
    store.width(config.data.hook)
    if "gradient" in config.solver.needs and not store.manifest.gradients:
        raise UserError(
            f"{where}:\n  {_GRADIENT}, but the store {store.path} was harvested without gradients. "
            "Harvest it again with gradients = true, into another place"
        )


def check_most(config: FitConfig, rows: int, where: str) -> None:
    """Whether a solver that holds all training rows may hold so many."""
    most = getattr(config.solver, "max_rows", None)
    if most is not None and rows > most:
        raise UserError(
            f"{where}:\n  solver.max_rows: {config.solver.name} holds all training rows at once, "
            f"at most {most:,}, and the store has {rows:,}. Raise it, or harvest less"
        )


def recipe_of(config: FitConfig, where: str) -> HarvestConfig | None:
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
    if "gradient" in config.solver.needs and not recipe.gradients:
        raise UserError(f"{where}:\n  harvest.gradients: {_GRADIENT}; set gradients = true")
    return recipe


def resolved(config: FitConfig, recipe: HarvestConfig | None) -> dict[str, Any]:
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
