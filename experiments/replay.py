"""A model run again over sequences of a store, with other rows in the place of some at a hook."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from activations.hooks import HookReader
from activations.sequences import has_row, positions, targets
from activations.store import Store
from activations.terminal import UserError, progress

# Sequences a forward pass: logits are some 100 MB each where there are 262,144 tokens.
BATCH = 2
# By which share of its norm a replayed row may differ from the stored one.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Replay:
    """Sequences and what the hook sees in a clean forward.

    Attributes:
      token: [s c].
      position: of each token in its document [s c], where attention is cut between documents.
      replaced: the test documents' tokens [s c].
      counted: those among them whose next token is of the same document [s c].
      x, gradient: activation, and gradient of the summed CE, at each token [s c d].
      owner: the place in `documents` of each counted token, in the order of the sequences [n].
      documents: ids of the test documents that have a counted token, ascending.
      error: greatest distance of a replayed row from the stored one, as a share of its norm.
    """

    token: np.ndarray
    position: np.ndarray | None
    replaced: np.ndarray
    counted: np.ndarray
    x: np.ndarray
    gradient: np.ndarray | None
    owner: np.ndarray
    documents: np.ndarray
    error: dict[str, float]

    def by_document(self, values: np.ndarray) -> np.ndarray:
        """Sums of values of the counted tokens [n] over each document [D]."""
        return np.bincount(self.owner, values, minlength=len(self.documents))


def choose(store: Store, documents: np.ndarray, n_tokens: int) -> np.ndarray:
    """Random sequences, the same for the same documents, that hold `n_tokens` to be counted."""
    document = np.array(store.sequences[:, 1])
    count = (has_row(document, predicting=True) & np.isin(document, documents)).sum(axis=1)
    order = np.random.default_rng(0).permutation(np.flatnonzero(count))
    enough = int(np.searchsorted(np.cumsum(count[order]), n_tokens)) + 1
    return np.sort(order[:enough])


def replay(
    bridge: Any, store: Store, hook: str, documents: np.ndarray, n_tokens: int, *, gradients: bool
) -> Replay:
    """Run the clean model over some sequences that hold tokens of `documents`.

    Raises:
      UserError: none does; what the model gives is not what the store holds.
    """
    chosen = choose(store, documents, n_tokens)
    if not len(chosen):
        raise UserError(f"{store.path}: no token of a test document has a next one")
    token, document = np.array(store.sequences[chosen]).swapaxes(0, 1)
    cut = not store.manifest.request.get("cross_document_attention", True)
    position = positions(document) if cut else None
    reader = HookReader(bridge, (hook,))
    parts: list[tuple[np.ndarray, ...]] = []
    for here in _batches(len(token), "clean forward"):
        at = None if position is None else position[here]
        if gradients:
            seen = reader.read_gradients(token[here], targets(document[here]), at)
            parts.append(tuple(found[hook] for found in seen))
        else:
            parts.append((reader.read(token[here], at)[hook],))
    x, *gradient = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    test = np.isin(document, documents)
    counted = test & has_row(document, predicting=True)
    ids, owner = np.unique(document[counted], return_inverse=True)
    error = {"activations": _error(store, f"activations/{hook}", chosen, x)}
    if gradient and store.manifest.gradients:
        error["gradients"] = _error(store, f"gradients/{hook}", chosen, gradient[0])
    return Replay(
        token, position, test, counted, x, gradient[0] if gradient else None, owner, ids, error
    )


def _error(store: Store, name: str, chosen: np.ndarray, x: np.ndarray) -> float:
    """How far the rows [s c d] of chosen sequences are from the stored ones."""
    worst = 0.0
    for shard in store.manifest.shards:
        sequence, position = (store.read(shard, column) for column in ("sequence", "position"))
        own = np.isin(sequence, chosen)
        if not own.any():
            continue
        stored = np.concatenate(list(store.rows(shard, name)))[own].astype(np.float64)
        norm = np.linalg.norm(stored, axis=1)
        apart = np.linalg.norm(
            x[np.searchsorted(chosen, sequence[own]), position[own]] - stored, axis=1
        )
        # Of rows that are next to nothing, rounding is a large share.
        worst = max(worst, float((apart / np.maximum(norm, 1e-3 * np.median(norm))).max()))
    if worst > TOLERANCE:
        raise UserError(
            f"{store.path}: {name} of the replayed sequences differ by {worst:.1%} from what is "
            "stored; the model or its libraries are others than those of the harvest"
        )
    return worst


def losses(bridge: Any, hook: str, clean: Replay, rows: np.ndarray | None = None) -> np.ndarray:
    """CE of each counted token [n], float64.

    Arguments:
      rows: what stands at the hook in the place of the replaced tokens [r d]; None: the model's.
    """
    import torch

    device = bridge.cfg.device
    new = clean.x.copy()
    if rows is not None:
        new[clean.replaced] = rows
    found = []
    for here in _batches(len(clean.token), "forward"):
        token = torch.from_numpy(clean.token[here].astype(np.int64)).to(device)
        counted = torch.from_numpy(clean.counted[here]).to(device)

        def put(seen: Any, hook: Any, here: slice = here) -> Any:
            wide = (*seen.shape[:2], *(1 for _ in seen.shape[2:]))
            chosen = torch.from_numpy(clean.replaced[here]).to(device).reshape(wide)
            return torch.where(chosen, torch.from_numpy(new[here]).to(seen).reshape_as(seen), seen)

        hooks = [] if rows is None else [(hook, put)]
        at = {}
        if clean.position is not None:
            at["position_ids"] = torch.from_numpy(clean.position[here]).to(device)
        with torch.inference_mode(), bridge.hooks(fwd_hooks=hooks):
            logits = bridge(token, return_type="logits", use_cache=False, **at)[counted]  # [n v]
            label = token.roll(-1, dims=1)[counted]
            loss = torch.nn.functional.cross_entropy(logits.float(), label, reduction="none")
        found.append(loss.double().cpu().numpy())
    return np.concatenate(found)


def _batches(n: int, what: str) -> Iterator[slice]:
    starts = range(0, n, BATCH)
    with progress(total=len(starts), desc=what, unit="batch", delay=3) as bar:
        for first in starts:
            yield slice(first, first + BATCH)
            bar.update()
