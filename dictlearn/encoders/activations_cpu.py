"""Which pre-activations become codes, on a CPU: kernels that go through the rows one by one.

XLA's top_k sorts whole rows there; these look at each entry once.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numba
import numpy as np

from dictlearn.encoders.omp_cpu import threads_at_hand

# Rows a thread takes at a time.
_PART = 64


def largest(
    u: np.ndarray, k: int, *, signed: bool = False, score: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices [n k] and values [n k] of the k largest of each row of u [n m] that are above 0.

    Arguments:
      signed: by |u|, and the values keep their sign.
      score: by this instead [n m], of entries of u above 0.
    """
    n = len(u)
    indices, values = np.zeros((n, k), np.int32), np.zeros((n, k), u.dtype)
    by = u if score is None else score
    parts = [slice(at, at + _PART) for at in range(0, n, _PART)]
    with ThreadPoolExecutor(threads_at_hand()) as threads:
        list(
            threads.map(
                functools.partial(_largest, signed),
                *([array[part] for part in parts] for array in (u, by, indices, values)),
            )
        )
    return indices, values


def above(u: np.ndarray, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entries of u [n m] above 0 and above its column's threshold [m], row by row.

    Returns:
      Where each row's begin [n+1], their indices and their values.
    """
    n = len(u)
    start = np.zeros(n + 1, np.int64)
    parts = [slice(at, min(at + _PART, n)) for at in range(0, n, _PART)]
    with ThreadPoolExecutor(threads_at_hand()) as threads:
        counts = [start[1:][part] for part in parts]
        list(threads.map(_count, [u[part] for part in parts], [threshold] * len(parts), counts))
        np.cumsum(start, out=start)
        index, value = np.empty(start[-1], np.int32), np.empty(start[-1], u.dtype)
        rows = [slice(start[part.start], start[part.stop]) for part in parts]
        list(
            threads.map(
                _collect,
                [u[part] for part in parts],
                [threshold] * len(parts),
                [index[row] for row in rows],
                [value[row] for row in rows],
            )
        )
    return start, index, value


@numba.njit(nogil=True, cache=True)
@no_type_check
def _largest(signed, u, by, indices, values):
    n, m = u.shape
    k = indices.shape[1]
    room = k + max(k, 32)
    held = np.empty(room, by.dtype)  # candidates; all that are above `limit` so far
    place = np.empty(room, np.int32)
    for row in range(n):
        count, limit = 0, by.dtype.type(0)
        for j in range(m):
            score = abs(by[row, j]) if signed else by[row, j]
            if score > limit:
                held[count], place[count] = score, j
                count += 1
                if count == room:
                    limit = _keep(held, place, count, k)
                    count = k
        if count > k:
            _keep(held, place, count, k)
            count = k
        kept = np.sort(place[:count])
        for t in range(count):
            value = u[row, kept[t]]
            if signed or value > 0:
                indices[row, t], values[row, t] = kept[t], value


@numba.njit(nogil=True, cache=True)
@no_type_check
def _keep(held, place, count, k):
    """The k largest come first; of equals, those that came first. Returns the least of them."""
    order = np.argsort(-held[:count], kind="mergesort")[:k]
    held[:k], place[:k] = held[:count][order], place[:count][order]
    return held[k - 1]


@numba.njit(nogil=True, cache=True)
@no_type_check
def _count(u, threshold, counts):
    n, m = u.shape
    for row in range(n):
        total = 0
        for j in range(m):
            total += (u[row, j] > threshold[j]) & (u[row, j] > 0)
        counts[row] = total


@numba.njit(nogil=True, cache=True)
@no_type_check
def _collect(u, threshold, index, value):
    n, m = u.shape
    at = 0
    for row in range(n):
        for j in range(m):
            if u[row, j] > threshold[j] and u[row, j] > 0:
                index[at], value[at] = j, u[row, j]
                at += 1
