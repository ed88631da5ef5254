"""Steering a model by a feature (`steer`), and how well that works (the family `steering`)."""

from evals.steering.family import FAMILY, Config, run
from evals.steering.interventions import steer

__all__ = ["FAMILY", "Config", "run", "steer"]
