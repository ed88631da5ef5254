"""What an encoder is."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import equinox as eqx
from jaxtyping import Array, Float

from dictlearn.codes import SparseCodes

if TYPE_CHECKING:
    from dictlearn.dictionary import Dictionary


class AbstractPrepared(eqx.Module):
    """An encoder made ready for one dictionary."""

    @abc.abstractmethod
    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        """Codes of normalised rows. Encoders that use no gradient ignore it."""


class AbstractEncoder(eqx.Module):
    """Rows to codes. *Array-free* ones run on any dictionary; a config can name the pursuits."""

    @abc.abstractmethod
    def prepare(self, dictionary: Dictionary) -> AbstractPrepared:
        """Do once what does not depend on the rows (unit atoms, the Gram matrix)."""
