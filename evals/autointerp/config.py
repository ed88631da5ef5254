"""Settings of `autointerp`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

from evals.judges import JudgeConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; numbers are SAEBench's but for `tokens` (theirs: 2 million) and `n_latents` (1000).

    Attributes:
      hook: where activations are read.
      judge: who explains and rates; no default, since asking may cost money.
      tokens: that are read, of those that count.
      n_latents: drawn at random, of those that fire often enough.
      window: tokens of an excerpt, odd.
      explain_top, explain_sampled: windows that an explanation is made from.
      judge_top, judge_sampled, n_random: windows that are rated.
      seed: of latents, windows and the bootstrap.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    judge: JudgeConfig
    tokens: Annotated[int, Field(ge=1)] = 262_144
    n_latents: Annotated[int, Field(ge=2)] = 100
    window: Annotated[int, Field(ge=1)] = 21
    explain_top: Annotated[int, Field(ge=1)] = 10
    explain_sampled: Annotated[int, Field(ge=0)] = 5
    judge_top: Annotated[int, Field(ge=1)] = 2
    judge_sampled: Annotated[int, Field(ge=0)] = 2
    n_random: Annotated[int, Field(ge=1)] = 10
    seed: Annotated[int, Field(ge=0)] = 42

    def quick(self) -> Config:
        """20 latents, of 65,536 tokens."""
        return dataclasses.replace(self, tokens=min(self.tokens, 65_536), n_latents=20)
