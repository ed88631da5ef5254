"""Orthogonal matching pursuit on a CPU: a kernel that goes through the rows one by one.

With q_t the orthonormal vectors that the chosen atoms give in turn (Gram-Schmidt), the kernel keeps
p_t = D q_t [m], the correlations of all atoms with q_t. A new atom d_new with w_t = <q_t, d_new> =
p_t[new] gives

    q = (d_new - sum_t w_t q_t) / l,  p = (G[new] - sum_t w_t p_t) / l,  l^2 = G[new, new] - w^T w,

and takes <d_new, r> / l times p off the correlations D r. So a round costs m t multiplications, all
of them on p, which stays in a core's own cache, where the textbook form reads t rows of G from
memory. p lies in blocks of atoms, so that a block's rounds are neighbours.

Threads of Python share the rows (Numba lets go of the interpreter's lock): no result depends on
how many there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, no_type_check

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from dictlearn.encoders.pursuit import Choice, UnitAtoms

# Atoms a block: what is summed at once stays in the first cache. 1024 was the fastest at m = 2560.
_BLOCK = 1024
# Rows whose correlations are held at once, and rows a thread takes at a time.
_TILE = 1024
_PART = 64


def encode(
    part_coder: Callable[..., None],
    atoms: UnitAtoms,
    x: Float[Array, "n d"],
    capacity: int,
    tolerance: float,
) -> Choice:
    """Indices and values over unit atoms, for rows on the host, by `code_part` or one like it."""
    n = len(x)
    unit, gram = np.asarray(atoms.unit), np.asarray(atoms.gram)
    indices = np.zeros((n, capacity), np.int32)
    values = np.zeros((n, capacity), unit.dtype)
    with ThreadPoolExecutor(threads_at_hand()) as threads:
        for start in range(0, n, _TILE):
            centred, correlation = map(np.asarray, _correlate(atoms, _tile(x, start)))
            left = min(_TILE, n - start)
            parts = [slice(at, min(at + _PART, left)) for at in range(0, left, _PART)]
            there = [slice(start + part.start, start + part.stop) for part in parts]
            list(
                threads.map(
                    functools.partial(part_coder, unit, gram, tolerance),
                    [centred[part] for part in parts],
                    [correlation[part] for part in parts],
                    [indices[part] for part in there],
                    [values[part] for part in there],
                )
            )
    return jnp.asarray(indices), jnp.asarray(values)


def threads_at_hand() -> int:
    """How many this process may run on: its share of the cores, or NUMBA_NUM_THREADS."""
    return numba.config.NUMBA_NUM_THREADS  # pyright: ignore


def _tile(x: Array, start: int) -> Array:
    """The next rows; the last ones are padded, so that all tiles have one shape."""
    rows = x[start : start + _TILE]
    return jnp.pad(rows, ((0, min(_TILE, len(x)) - len(rows)), (0, 0)))


@jax.jit
def _correlate(atoms: UnitAtoms, x: Array) -> tuple[Array, Array]:
    centred = x - atoms.bias[None]
    return centred, centred @ atoms.unit.T


def code_part(
    unit: np.ndarray,
    gram: np.ndarray,
    tolerance: float,
    x: np.ndarray,
    correlation: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
) -> None:
    """Code some rows into `indices` and `values`; on a thread."""
    m, k = len(unit), indices.shape[1]
    p = np.empty((-(-m // _BLOCK), k, _BLOCK), x.dtype)
    alpha = np.empty(m, x.dtype)
    bits = alpha.view(np.int32 if x.itemsize == 4 else np.int64)
    epsilon = np.finfo(x.dtype).eps
    _code_rows(x, unit, gram, correlation, tolerance, epsilon, p, alpha, bits, indices, values)


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _code_rows(
    x, unit, gram, correlation, tolerance, epsilon, p, alpha, bits, indices, values
):  # fmt: skip
    """Rows x [n d] against unit atoms. `bits` is alpha's memory as integers."""
    n, d = x.shape
    n_blocks, k, size = p.shape
    m = len(unit)
    largest = np.empty(n_blocks, bits.dtype)
    lower = np.zeros((k, k), x.dtype)  # of the support: d_t = sum_s lower[t, s] q_s
    along = np.empty(k, x.dtype)  # <q_t, x>
    inside = np.empty(k, x.dtype)
    chosen = np.empty(k, np.int64)
    slots = np.empty(k, np.int64)
    left = np.empty(d, x.dtype)
    for row in range(n):
        energy = 0.0
        for i in range(d):
            left[i] = x[row, i]
            energy += left[i] * left[i]
        alpha[:] = correlation[row]
        for block in range(n_blocks):
            largest[block] = _largest(bits[block * size : (block + 1) * size])
        tiny = 8 * epsilon * np.sqrt(energy)
        limit = tolerance * tolerance * energy
        count = 0
        for tried in range(k):
            block = np.argmax(largest)
            new = block * size + _first(bits[block * size : (block + 1) * size], largest[block])
            square = np.float64(gram[new, new])
            if abs(alpha[new]) <= tiny * np.sqrt(square) or (tried and energy <= limit):
                break
            rest = square
            for t in range(count):
                inside[t] = p[block, t, new - block * size]
                lower[count, t] = inside[t]
                rest -= inside[t] * inside[t]
            indices[row, tried] = new
            chosen[tried] = new
            if rest <= 64 * epsilon * square:  # cannot be told from the span of those taken
                alpha[new] = 0
                largest[block] = _largest(bits[block * size : (block + 1) * size])
                continue
            length = np.sqrt(rest)
            lower[count, count] = length
            along[count] = alpha[new] / length
            energy -= along[count] * along[count]
            scale = x.dtype.type(1 / length)
            for b in range(n_blocks):
                here = slice(b * size, min(m, (b + 1) * size))
                project(p[b], gram[new, here], inside, count, scale, along[count], alpha[here])
            slots[count] = tried
            count += 1
            for t in range(tried + 1):
                alpha[chosen[t]] = 0  # or what rounding left of it
            for b in range(n_blocks):
                largest[b] = _largest(bits[b * size : min(m, (b + 1) * size)])
        solve_transposed(lower, along, count)
        for t in range(count):
            values[row, slots[t]] = along[t]
            atom = unit[chosen[slots[t]]]
            for i in range(d):
                left[i] -= along[t] * atom[i]
        # What rounding left of x along the support is fitted as well.
        for t in range(count):
            atom = unit[chosen[slots[t]]]
            inner = x.dtype.type(0)
            for i in range(d):
                inner += left[i] * atom[i]
            for s in range(t):
                inner -= lower[t, s] * along[s]
            along[t] = inner / lower[t, t]
        solve_transposed(lower, along, count)
        for t in range(count):
            values[row, slots[t]] += along[t]


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _largest(bits):
    """The largest size among floats, as the integer of the same bits: those compare faster."""
    mask = np.iinfo(bits.dtype).max
    best = bits.dtype.type(0)
    for i in range(len(bits)):
        best = max(best, bits[i] & mask)
    return best


@numba.njit(nogil=True, cache=True)
@no_type_check
def _first(bits, largest):
    """The first place of `largest`."""
    mask = np.iinfo(bits.dtype).max
    for i in range(len(bits)):
        if bits[i] & mask == largest:
            return i
    return 0


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def project(p, gram, inside, count, scale, along, alpha):
    """p[count] = scale (gram - sum_t inside_t p_t), and alpha -= along p[count].

    Eight t at once, so that each sum is fetched and put back less often.
    """
    out = p[count]
    size = len(gram)
    for b in range(size):
        out[b] = gram[b]
    t = 0
    while t + 8 <= count:
        a0, a1, a2, a3 = inside[t], inside[t + 1], inside[t + 2], inside[t + 3]
        a4, a5, a6, a7 = inside[t + 4], inside[t + 5], inside[t + 6], inside[t + 7]
        p0, p1, p2, p3 = p[t], p[t + 1], p[t + 2], p[t + 3]
        p4, p5, p6, p7 = p[t + 4], p[t + 5], p[t + 6], p[t + 7]
        for b in range(size):
            out[b] -= (a0 * p0[b] + a1 * p1[b] + a2 * p2[b] + a3 * p3[b]) + (
                a4 * p4[b] + a5 * p5[b] + a6 * p6[b] + a7 * p7[b]
            )
        t += 8
    if t + 4 <= count:
        a0, a1, a2, a3 = inside[t], inside[t + 1], inside[t + 2], inside[t + 3]
        p0, p1, p2, p3 = p[t], p[t + 1], p[t + 2], p[t + 3]
        for b in range(size):
            out[b] -= a0 * p0[b] + a1 * p1[b] + a2 * p2[b] + a3 * p3[b]
        t += 4
    if t + 2 <= count:
        a0, a1, p0, p1 = inside[t], inside[t + 1], p[t], p[t + 1]
        for b in range(size):
            out[b] -= a0 * p0[b] + a1 * p1[b]
        t += 2
    if t < count:
        a0, p0 = inside[t], p[t]
        for b in range(size):
            out[b] -= a0 * p0[b]
    for b in range(size):
        out[b] *= scale
        alpha[b] -= along * out[b]


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def solve_transposed(lower, z, count):
    """Overwrite z by the solution of lower^T z' = z."""
    for t in range(count - 1, -1, -1):
        for s in range(t + 1, count):
            z[t] -= lower[s, t] * z[s]
        z[t] /= lower[t, t]
