"""Making a model forget one kind of text by clamping latents (the family `unlearning`)."""

from evals.unlearning.family import FAMILY, Config, run

__all__ = ["FAMILY", "Config", "run"]
