"""Automatic interpretation (the family `autointerp`): explanations of latents, put to the test."""

from evals.autointerp.config import Config
from evals.autointerp.family import FAMILY, run

__all__ = ["FAMILY", "Config", "run"]
