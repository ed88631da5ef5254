"""Learn sparse dictionaries of transformer activations, and find out whether they are any good."""

from dictlearn.artifact import Run
from dictlearn.interop import load
from dictlearn.swap import fit_encoder, recode

__all__ = ["Run", "fit_encoder", "load", "recode"]
