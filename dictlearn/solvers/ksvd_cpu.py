"""KSVD's sweep over the atoms on one CPU: as dictlearn.solvers.ksvd._sweep, one code after another.

The nonzeros are sorted by atom. While the atoms of a chunk move, each thread has columns of the
residual to itself; while their coefficients move, rows. So no thread waits for another within a
chunk, and no sum depends on how many there are.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, no_type_check

import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float, Int

from dictlearn.codes import SparseCodes
from dictlearn.encoders.omp_cpu import threads_at_hand

if TYPE_CHECKING:
    from dictlearn.solvers.ksvd import KSVD

# Columns of the residual that lie in one line of a processor's cache, in float32.
_LINE = 16


def sweep(
    solver: KSVD,
    atoms: Float[Array, "m d"],
    residual: Float[Array, "n d"],
    codes: SparseCodes,
    history: Float[Array, " m"],
    order: Int[Array, " g"],
) -> tuple[Float[Array, "m d"], Float[Array, "n d"]]:
    """Move the atoms of `order`, and their coefficients, a chunk after another."""
    d, left = np.array(atoms), np.array(residual)
    start, row, value = _by_atom(np.asarray(codes.indices), np.asarray(codes.values), len(d))
    weight, turn, norm = np.asarray(history), np.asarray(order), np.empty(len(d), d.dtype)
    count = threads_at_hand()
    columns = _shares(left.shape[1], count, _LINE)
    rows = _shares(len(left), count, 1)
    # Where each atom's codes in each thread's rows begin [m threads+1].
    cuts = _cuts(start, row, np.array([first for first, _ in rows] + [len(left)]))
    not_negative = solver.encoder.not_negative
    with ThreadPoolExecutor(count) as threads:
        for first in range(0, len(turn), solver.chunk_size):
            chunk = turn[first : first + solver.chunk_size]
            move_atoms = functools.partial(_move_atoms, chunk, start, row, value, weight, d, left)
            move_codes = functools.partial(
                _move_codes, chunk, row, value, d, left, norm, not_negative, cuts
            )
            for _ in range(solver.power_steps):
                old = d[chunk]
                list(threads.map(move_atoms, columns))
                _to_unit_norm(chunk, start, row, value, d, old, left, norm)
                list(threads.map(move_codes, range(len(rows))))
    return jnp.asarray(d), jnp.asarray(left)


def _shares(size: int, count: int, multiple: int) -> list[tuple[int, int]]:
    """0 to `size` in at most `count` parts that begin at multiples."""
    each = -(-size // (count * multiple)) * multiple
    return [(first, min(first + each, size)) for first in range(0, size, each)]


@numba.njit(nogil=True, cache=True)
@no_type_check
def _by_atom(indices, values, m):
    """The nonzeros atom by atom, in the order of rows: where each begins, rows and values."""
    n, k = indices.shape
    start = np.zeros(m + 1, np.int64)
    for i in range(n):
        for t in range(k):
            if values[i, t] != 0:
                start[indices[i, t] + 1] += 1
    for j in range(m):
        start[j + 1] += start[j]
    at = start[:-1].copy()
    row = np.empty(start[-1], np.int32)
    value = np.empty(start[-1], values.dtype)
    for i in range(n):
        for t in range(k):
            if values[i, t] != 0:
                j = indices[i, t]
                row[at[j]], value[at[j]] = i, values[i, t]
                at[j] += 1
    return start, row, value


@numba.njit(nogil=True, cache=True)
@no_type_check
def _cuts(start, row, bounds):
    cuts = np.empty((len(start) - 1, len(bounds)), np.int64)
    for j in range(len(start) - 1):
        cuts[j] = start[j] + np.searchsorted(row[start[j] : start[j + 1]], bounds)
    return cuts


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _move_atoms(chunk, start, row, value, history, d, left, columns):
    """d_j += R^T z_j / (||z_j||^2 + h_j) on some columns, and R follows; norms are left alone."""
    first, last = columns
    move = np.empty(last - first, d.dtype)
    for j in chunk:
        energy = _energy(value[start[j] : start[j + 1]])
        if energy == 0:
            continue
        move[:] = 0
        for t in range(start[j], start[j + 1]):
            z = value[t]
            r = left[row[t], first:last]
            for i in range(len(move)):
                move[i] += z * r[i]
        energy += history[j]
        own = d[j, first:last]
        for i in range(len(move)):
            move[i] /= energy
            own[i] += move[i]
        for t in range(start[j], start[j + 1]):
            z = value[t]
            r = left[row[t], first:last]
            for i in range(len(move)):
                r[i] -= z * move[i]


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _energy(values):
    total = values.dtype.type(0)
    for i in range(len(values)):
        total += values[i] * values[i]
    return total


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _to_unit_norm(chunk, start, row, value, d, old, left, norm):
    """Scale the atoms; one that vanished is put back, and the residual with it."""
    for b in range(len(chunk)):
        j = chunk[b]
        norm[j] = np.sqrt(_energy(d[j]))
        if _energy(value[start[j] : start[j + 1]]) == 0:
            norm[j] = 1
        elif norm[j] > 0:
            d[j] /= norm[j]
        else:
            norm[j] = 1
            d[j] = old[b]
            for t in range(start[j], start[j + 1]):
                left[row[t]] -= value[t] * old[b]


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _move_codes(chunk, row, value, d, left, norm, not_negative, cuts, thread):
    """z_j += R d_j on some rows, and R follows."""
    for j in chunk:
        atom = d[j]
        for t in range(cuts[j, thread], cuts[j, thread + 1]):
            r = left[row[t]]
            z = value[t] * norm[j]
            change = d.dtype.type(0)
            for i in range(len(atom)):
                change += r[i] * atom[i]
            if not_negative and change < -z:
                change = -z
            for i in range(len(atom)):
                r[i] -= change * atom[i]
            value[t] = z + change
