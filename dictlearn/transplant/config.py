"""The configuration of a transplant, as its TOML file has it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dictlearn.transplant.methods.focus import Focus
from dictlearn.transplant.methods.landmarks import Landmarks
from dictlearn.transplant.methods.neighbours import Neighbours
from dictlearn.transplant.methods.omp import OMPMixing
from dictlearn.transplant.methods.plain import Mean, Random, Zero
from dictlearn.transplant.methods.subwords import Subwords
from dictlearn.transplant.methods.wechsel import Wechsel

Method = Annotated[
    OMPMixing | Zero | Mean | Random | Subwords | Neighbours | Landmarks | Focus | Wechsel,
    Field(discriminator="name"),
]


@dataclasses.dataclass(frozen=True)
class TransplantConfig:
    """A whole transplant.

    Attributes:
      base: directory of the model that is given another tokenizer.
      donor: directory of the model whose tokenizer it is given.
      output: directory that is made.
      method: how rows of new tokens are made up.
      undertrained: shared tokens do not serve as anchors if a model's row of theirs has a greater
        cosine with those of tokens that no text holds; 1 keeps all.
      overrides: texts of tokens, the donor's to the base's: the donor's get the base's rows.
      seed: of methods that draw or train something.
    """

    __pydantic_config__ = {"extra": "forbid"}

    base: Path
    donor: Path
    output: Path
    method: Method = dataclasses.field(default_factory=OMPMixing)
    undertrained: Annotated[float, Field(gt=0, le=1)] = 0.5
    overrides: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def check(self) -> None:
        """Rules that join fields. Raises ValueError that begins with the dotted key."""
        if isinstance(self.method, (Focus, Wechsel)):
            try:
                self.method.static.check()
            except ValueError as error:
                raise ValueError(f"method.{error}") from None
