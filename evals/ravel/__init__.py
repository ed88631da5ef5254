"""RAVEL (the family `ravel`): latents that hold one attribute of an entity and no other."""

from evals.ravel.config import Config
from evals.ravel.family import FAMILY, run

__all__ = ["FAMILY", "Config", "run"]
