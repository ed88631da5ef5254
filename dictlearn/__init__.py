"""Learn sparse dictionaries of transformer activations, and find out whether they are any good."""

from dictlearn.artifact import Run, load

__all__ = ["Run", "load"]
