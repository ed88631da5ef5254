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

    In order of their indices; of equals, the first ones. NaN is the largest: it is not hidden.

    Arguments:
      signed: by |u|, and the values keep their sign.
      score: by this instead [n m], of entries of u above 0.
    """
    n = len(u)
    indices, values = np.zeros((n, k), np.int32), np.zeros((n, k), u.dtype)
    kind = np.int32 if u.itemsize == 4 else np.int64
    mask = kind(np.iinfo(kind).max if signed else -1)  # without the bit of the sign
    bits = np.ascontiguousarray(u if score is None else score).view(kind)
    parts = [slice(at, at + _PART) for at in range(0, n, _PART)]
    with ThreadPoolExecutor(threads_at_hand()) as threads:
        list(
            threads.map(
                functools.partial(_largest, mask),
                *([array[part] for part in parts] for array in (u, bits, indices, values)),
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
def _largest(mask, u, bits, indices, values):
    """`bits` are the scores as integers, in whose order positive floats are."""
    n, m = u.shape
    k = indices.shape[1]
    size = min(64, max(1, m // (2 * k)))
    greatest = np.empty(-(-m // size), bits.dtype)  # of each block
    held = np.empty(m, bits.dtype)  # candidates, in order
    mixed = np.empty(m, bits.dtype)
    place = np.empty(m, np.int32)
    for row in range(n):
        own = bits[row]
        for block in range(len(greatest)):
            greatest[block] = _greatest(own[block * size : (block + 1) * size], mask)
        # k blocks hold something as great as this: so do the k largest entries.
        mixed[: len(greatest)] = greatest
        limit = max(_select(mixed, len(greatest), k), 1)
        count = 0
        for block in range(len(greatest)):
            if greatest[block] >= limit:
                for j in range(block * size, min((block + 1) * size, m)):
                    score = own[j] & mask
                    if score >= limit:
                        held[count], place[count] = score, j
                        count += 1
        if count > k:
            mixed[:count] = held[:count]
            _keep(held, place, count, k, _select(mixed, count, k))
            count = k
        for t in range(count):
            indices[row, t], values[row, t] = place[t], u[row, place[t]]


@numba.njit(nogil=True, cache=True, inline="always")
@no_type_check
def _greatest(bits, mask):
    """As integers: comparisons of floats are not done several at once."""
    greatest = bits.dtype.type(0)
    for j in range(len(bits)):
        greatest = max(greatest, bits[j] & mask)
    return greatest


@numba.njit(nogil=True, cache=True)
@no_type_check
def _select(mixed, count, k):
    """The k-th largest of some values, which are put into another order (Hoare's selection)."""
    low, high = 0, count - 1
    while low < high:
        pivot = mixed[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while mixed[i] > pivot:
                i += 1
            while mixed[j] < pivot:
                j -= 1
            if i <= j:
                mixed[i], mixed[j] = mixed[j], mixed[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return mixed[k - 1]


@numba.njit(nogil=True, cache=True)
@no_type_check
def _keep(held, place, count, k, least):
    """Leave the k largest, the last of which is `least`, in their order; of equals, the first."""
    equals = k
    for t in range(count):
        equals -= held[t] > least
    at = 0
    for t in range(count):
        if held[t] > least or (held[t] == least and equals > 0):
            equals -= held[t] == least
            held[at], place[at] = held[t], place[t]
            at += 1


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
