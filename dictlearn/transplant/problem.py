"""What a method is given: tokens in two spaces, and others in one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows of new tokens are wanted in the base model's space.

    Arrays are float32 on the host. Where a model has an output head of its own, `base` may hold
    rows of both matrices side by side: methods that mix rows treat both alike.

    Attributes:
      donor: the anchors' rows in the donor's space [a d].
      base: all rows of the base's space [b e].
      places: where in `base` the anchors' rows are [a].
      targets: the new tokens' rows in the donor's space [n d].
      anchor_bytes: what the anchors stand for, [a].
      new_bytes: what the new tokens stand for, [n]; a special token's is its text.
      split: the base's tokenizer: a text -> its tokens' places in `base`.
      pieces: the donor's tokenizer: a text -> its tokens as bytes.
      tokens: what each token of the base stands for, by its place in `base`.
    """

    donor: np.ndarray
    base: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    anchor_bytes: list[bytes]
    new_bytes: list[bytes]
    split: Callable[[str], list[int]]
    pieces: Callable[[str], list[bytes]]
    tokens: dict[int, bytes] = dataclasses.field(default_factory=dict)

    @property
    def anchors(self) -> np.ndarray:
        """The anchors' rows in the base's space [a e]."""
        return self.base[self.places]
