"""Where a run's features fire in its own store: codes of every row, and the tokens around them."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from activations.store import Store
from activations.terminal import UserError, progress
from dictlearn.artifact import Run
from evals.coding import coded


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """A stretch of a sequence around one token.

    Attributes:
      tokens: their texts.
      codes: the feature's code at each; 0 where it does not fire, or the token has no row.
      at: the place of the token that was looked for.
      document: of that token.
    """

    tokens: list[str]
    codes: Float[np.ndarray, " c"]
    at: int
    document: int


@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """Codes of a store's rows.

    Attributes:
      token, document: of every sequence [s c].
      place: of each row among the flat tokens [n].
      codes: over atoms as they are [n a].
      vocabulary: the text of each token.
    """

    token: Int[np.ndarray, "s c"]
    document: Int[np.ndarray, "s c"]
    place: Int[np.ndarray, " n"]
    codes: scipy.sparse.csc_array
    vocabulary: dict[int, str]

    def of(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows on which a feature fires, and its codes there.

        Raises:
          UserError: there is no such feature.
        """
        n_features = len(self.codes.indptr) - 1
        if not 0 <= feature < n_features:
            raise UserError(f"feature {feature}: the dictionary has features 0 to {n_features - 1}")
        here = slice(*self.codes.indptr[feature : feature + 2])
        return self.codes.indices[here], self.codes.data[here]

    def contexts(
        self, feature: int, rows: Int[np.ndarray, " r"], *, before: int = 16, after: int = 8
    ) -> list[Context]:
        """The tokens around some rows, and the feature's codes there."""
        fires, values = self.of(feature)
        place = self.place[fires]
        order = np.argsort(place)
        place, values = place[order], values[order]
        found, length = [], self.token.shape[1]
        for at in self.place[rows]:
            begin = at - at % length
            stretch = np.arange(max(begin, at - before), min(begin + length, at + after + 1))
            # Behind the sequence's last document there is padding.
            stretch = stretch[(self.document.flat[stretch] >= 0) | (stretch <= at)]
            index = np.searchsorted(place, stretch)
            index[index == len(place)] = 0
            codes = np.where(place[index] == stretch, values[index], 0) if len(place) else 0.0
            texts = [self.vocabulary.get(int(t), "") for t in self.token.flat[stretch]]
            found.append(
                Context(
                    texts, np.broadcast_to(codes, stretch.shape).astype(float),
                    int(np.flatnonzero(stretch == at)[0]), int(self.document.flat[at]),
                )
            )  # fmt: skip
        return found

    def top(self, feature: int, n: int, *, sign: int = 0) -> Int[np.ndarray, " r"]:
        """Rows of the greatest |code|, whose contexts do not overlap.

        Arguments:
          sign: +1 or -1 for one tail of a feature with signed codes, 0 for both.
        """
        rows, values = self.of(feature)
        size = np.abs(values) if sign == 0 else np.maximum(sign * values, 0)
        rows = rows[np.argsort(-size, kind="stable")][: int((size > 0).sum())]
        return self._apart(rows, n)

    def random(self, feature: int, n: int, *, seed: int = 0) -> Int[np.ndarray, " r"]:
        """Rows on which it fires, drawn, whose contexts do not overlap."""
        rows, _ = self.of(feature)
        return self._apart(np.random.default_rng([seed, feature]).permutation(rows), n)

    def _apart(self, rows: np.ndarray, n: int, least: int = 24) -> np.ndarray:
        kept: list[int] = []
        for row in rows:
            if len(kept) == n:
                break
            if all(abs(self.place[row] - self.place[other]) >= least for other in kept):
                kept.append(row)
        return np.array(kept, int)


def activity(run: Run, *, rows: int | None = None) -> Activity:
    """Code the rows of the store that a run was fitted on.

    Arguments:
      rows: at most so many, from the first on; all, if left out.

    Raises:
      UserError: the run has no store, or it is missing or another one now.
    """
    if "store" not in run.metadata:
        raise UserError(f"{run.path}: names no store, so that there are no contexts to show")
    store = Store(run.metadata["store"]["path"])
    run.check_store(store.path, store.manifest.sha256())
    token, document = np.array(store.sequences).swapaxes(0, 1)
    sequence, position = store.column("sequence"), store.column("position")
    place = (sequence.astype(np.int64) * token.shape[1] + position)[:rows]
    parts, left = [], len(place)
    for shard in progress(iterable=store.manifest.shards, desc="codes", unit="shard", delay=3):
        x = store.activations(shard, run.metadata["hook"])[:left]
        if len(x):
            parts.append(coded(run.coder, x)[0])
        left -= len(x)
    codes = scipy.sparse.csc_array(scipy.sparse.vstack(parts))
    return Activity(token, document, place, codes, store.vocabulary)
