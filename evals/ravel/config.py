"""Settings of `ravel`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from activations.terminal import UserError
from evals.ravel.data import hashes


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      hook: TransformerLens's name.
      data: the folder of RAVEL's files, see evals.ravel.data.
      entity: the type of entity, a part of their names.
      attributes: of it.
      n_candidates: random entities that are asked about.
      n_tried: random templates of each attribute by which they are.
      n_templates: of these, that are answered best, are kept.
      n_entities: with the most right answers are kept, of those that have one in every attribute.
      min_entities: below which there are no figures.
      min_accuracy: of an attribute, see `task_accuracy`.
      n_pairs: of an attribute as cause, and as many of isolation, in both halves together.
      epochs, learning_rate: of the mask.
      batch_size: of the mask's training; its figures depend on it.
      answer_tokens: of a greedy text, at most.
      seed, n_seeds: candidates and templates are drawn by the first; seed to seed + n_seeds - 1 do
        the rest.
      sha256: what the two files must hold, by their names, if it is told; results tell it.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    data: Path
    entity: str = "city"
    attributes: Annotated[tuple[str, ...], Field(min_length=2)] = (
        "Country", "Continent", "Language",
    )  # fmt: skip
    n_candidates: Annotated[int, Field(ge=2)] = 1000
    n_tried: Annotated[int, Field(ge=2)] = 12
    n_templates: Annotated[int, Field(ge=2)] = 4
    n_entities: Annotated[int, Field(ge=2)] = 500
    min_entities: Annotated[int, Field(ge=4)] = 20
    min_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.8
    n_pairs: Annotated[int, Field(ge=27)] = 5000  # LEAST_PAIRS to test
    epochs: Annotated[int, Field(ge=1)] = 2
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    batch_size: Annotated[int, Field(ge=1)] = 16
    answer_tokens: Annotated[int, Field(ge=1)] = 6
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    n_seeds: Annotated[int, Field(ge=1)] = 3
    sha256: dict[str, str] | None = None

    @property
    def seeds(self) -> range:
        """What draws splits, pairs and their order."""
        return range(self.seed, self.seed + self.n_seeds)

    def pinned(self) -> Config:
        """With the hashes of the files.

        Raises:
          UserError: they are not those that are told; a file is missing.
        """
        own = hashes(self.data, self.entity)
        if self.sha256 not in (None, own):
            raise UserError(f"ravel.sha256: {self.data} has {own}, expected {self.sha256}")
        return dataclasses.replace(self, sha256=own)

    def quick(self) -> Config:
        """Two attributes, 120 entities by three templates each, 40 pairs, two seeds."""
        return dataclasses.replace(
            self, attributes=self.attributes[:2], n_candidates=120, n_tried=3, n_templates=2,
            n_pairs=40, n_seeds=2, answer_tokens=4,
        )  # fmt: skip
