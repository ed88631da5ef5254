"""Indirect object identification (the family `ioi`): a dictionary beside a supervised one."""

from evals.ioi.family import FAMILY, Config, run

__all__ = ["FAMILY", "Config", "run"]
