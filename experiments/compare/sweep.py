"""A sweep as its TOML file has it, and the cells that it stands for."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from activations.config import validate
from activations.terminal import UserError
from dictlearn.config import DataConfig, FitConfig
from evals.run import FAMILIES, EvalConfig, configured

EncoderName = Literal["own", "omp", "nn_omp", "tied", "distilled"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Number = Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """What is fitted, without n_atoms and k, which the sweep gives.

    Attributes:
      solver, fit, data: as in a fit's config; `data` without store and hook.
      control: whether it is what the others have to beat.
    """

    __pydantic_config__ = {"extra": "forbid"}

    solver: dict[str, Any]
    fit: dict[str, Any]
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    control: bool = False


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Dictionaries x n_atoms x k x seeds, on one store.

    Attributes:
      data: as in a fit's config.
      dictionaries: by their names.
      k: of solver.encoder or solver.variant; a solver that has neither is fitted once for all.
      seeds: each decides split, start and batches, the same for all dictionaries.
      harvest: how to make the store where it is missing.
      against: the dictionary that the others are compared with; the first, if left out.
      encoders: by which every dictionary is coded beside its own.
      evals: families of `evals.run`, with their settings.
      output: runs/<name>, if left out.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Name
    data: DataConfig
    dictionaries: Annotated[dict[Name, Dictionary], Field(min_length=1)]
    n_atoms: Annotated[tuple[_Number, ...], Field(min_length=1)]
    k: Annotated[tuple[_Number, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = (
        0, 1, 2, 3, 4,
    )  # fmt: skip
    harvest: dict[str, Any] | None = None
    against: str | None = None
    encoders: tuple[EncoderName, ...] = ("omp",)
    evals: tuple[str, ...] = ("core",)
    settings: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    output: Path | None = None

    def check(self) -> None:
        """Rules that join fields. Raises ValueError that begins with the dotted key."""
        if self.against is not None and self.against not in self.dictionaries:
            raise ValueError(f"against: no {self.against!r} among {', '.join(self.dictionaries)}")
        if unknown := [name for name in self.evals if name not in FAMILIES]:
            raise ValueError(f"evals: no {unknown[0]!r} among {', '.join(FAMILIES)}")

    @property
    def place(self) -> Path:
        """Where everything goes."""
        return self.output or Path("runs") / self.name

    @property
    def base(self) -> str:
        """The dictionary that the others are compared with."""
        return self.against or next(iter(self.dictionaries))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One dictionary of one size and seed.

    Attributes:
      k: None of a solver that has none.
      config: of its fit.
    """

    dictionary: str
    n_atoms: int
    k: int | None
    seed: int
    config: FitConfig

    @property
    def name(self) -> str:
        """Also that of its run and files."""
        return self.config.name


def cells(sweep: Sweep, where: str) -> list[Cell]:
    """All of them, the seeds outermost, so that tables are whole early.

    Raises:
      UserError: one of them cannot be fitted, and the message names it; settings of a family are
        wrong.
    """
    for family in sweep.evals:
        hook = sweep.settings.hook or sweep.data.hook
        configured(sweep.settings, family, hook, where, "settings.")
    found = []
    grid = itertools.product(sweep.seeds, sweep.n_atoms, sweep.k, sweep.dictionaries)
    for seed, n_atoms, k, dictionary in grid:
        has_k = bool(sweep.dictionaries[dictionary].solver.keys() & {"encoder", "variant"})
        if has_k or k == sweep.k[0]:
            found.append(_cell(sweep, dictionary, n_atoms, k if has_k else None, seed, where))
    return found


def _cell(
    sweep: Sweep, dictionary: str, n_atoms: int, k: int | None, seed: int, where: str
) -> Cell:
    told = sweep.dictionaries[dictionary]
    solver = copy.deepcopy(told.solver)
    for key in ("encoder", "variant"):
        if key in solver:
            if not isinstance(solver[key], dict) or "k" in solver[key]:
                raise UserError(
                    f"{where}:\n  dictionaries.{dictionary}.solver.{key}: expected a table without "
                    "k, which the sweep gives"
                )
            solver[key]["k"] = k
    if "n_atoms" in solver:
        raise UserError(
            f"{where}:\n  dictionaries.{dictionary}.solver.n_atoms: stands at the sweep's top"
        )
    size = f"m{n_atoms}" if k is None else f"m{n_atoms}-k{k}"
    name = f"{dictionary}-{size}-s{seed}"
    data = dataclasses.asdict(sweep.data) | {"store": str(sweep.data.store)} | told.data
    table = {
        "name": name,
        "seed": seed,
        "solver": solver | {"n_atoms": n_atoms},
        "fit": told.fit,
        "data": data,
        "output": str(sweep.place / "runs" / name),
    }
    if sweep.harvest is not None:
        table["harvest"] = sweep.harvest
    return Cell(dictionary, n_atoms, k, seed, validate(FitConfig, table, f"{where}, cell {name}"))
