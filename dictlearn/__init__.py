"""Learn sparse dictionaries of transformer activations, and find out whether they are any good."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dictlearn.artifact import Run
    from dictlearn.interop import load
    from dictlearn.swap import fit_encoder, recode

__all__ = ["Run", "fit_encoder", "load", "recode"]

# Brought in when first asked for: JAX takes seconds.
_PLACES = {"Run": "artifact", "fit_encoder": "swap", "load": "interop", "recode": "swap"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
