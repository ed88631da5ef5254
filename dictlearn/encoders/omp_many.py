"""Orthogonal matching pursuit on a CPU over so many atoms that no Gram matrix of them fits.

The textbook form takes the correlations of all m atoms in each of k rounds, 2 k m d operations a
row. Here a row works on the few atoms that correlate most with its residual, and all are looked at
again (one product of matrices for many rows) only when one that was left out may have become the
best. With b the greatest |<r, d_i>| of those left out at the last look, r' the residual since,

    |<r', d_i>| <= |<r, d_i>| + |<r - r', d_i>|,

where the last term is about ||r - r'|| / sqrt(d) for an atom that has nothing to do with the
difference. A row goes on by itself while its best atom reaches

    b + ||r - r'|| / sqrt(d),

so that now and then it takes the second best: with 46,145 atoms of 640 dimensions and k = 64,
residuals are 0.3 % longer than those of the textbook form (experiments/LOG.md), at a seventh of
its products. Where there are not more atoms than a row works on, the form is exact.

Threads of Python share the rows, as in dictlearn.encoders.omp_cpu.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float

from dictlearn.encoders.omp_cpu import solve_transposed, threads_at_hand

if TYPE_CHECKING:
    from dictlearn.encoders.pursuit import Choice, UnitAtoms

# Atoms a row works on by itself: 192 of 640 numbers stay in a core's own cache.
_FEW = 192
# How far an atom's correlation is taken to drift, in units of ||r - r'|| / sqrt(d).
_DRIFT = 1.0
# Atoms whose greatest correlation is found at once.
_BLOCK = 64
# Rows that are worked on by turns, at most; bytes of their orthonormal vectors.
_TILE = 512
_BYTES = 2**28
# Bytes of the correlations of rows that look at all atoms together: what the C library keeps for
# the next ones (up to 32 MiB) instead of giving it back to the system, at a third of all time.
_LOOK = 24 * 2**20
# Numbers of rows come in these steps, so that few shapes are compiled.
_STEP = 16


class _Rows(NamedTuple):
    """What is known of some rows: residual [n d], and of each slot [n k]:

    the atom, its orthonormal vector q [n k d], <q, x>, and lower [n k k], the coordinates of atoms
    along the q before them. So many slots are `filled`; k where the row is done.
    """

    residual: np.ndarray
    indices: np.ndarray
    basis: np.ndarray
    along: np.ndarray
    lower: np.ndarray
    filled: np.ndarray
    norm: np.ndarray


def encode(atoms: UnitAtoms, x: Float[Array, "n d"], capacity: int, tolerance: float) -> Choice:
    """Indices and values over the atoms, for rows on the host."""
    unit = np.asarray(atoms.unit)
    n, d = x.shape
    spare = SimpleQueue()
    for _ in range(threads_at_hand()):
        spare.put(_scratch(unit))
    size = max(1, min(_TILE, n, _BYTES // (capacity * d * x.dtype.itemsize)))
    indices = np.zeros((n, capacity), np.int32)
    values = np.zeros((n, capacity), unit.dtype)
    with ThreadPoolExecutor(threads_at_hand()) as threads:
        for start in range(0, n, size):
            part = np.array(x[start : start + size] - atoms.bias[None])
            there = slice(start, start + len(part))
            work = functools.partial(_go_on, unit, tolerance, spare)
            _encode_tile(atoms.unit, unit, part, work, indices[there], values[there], threads)
    return jnp.asarray(indices), jnp.asarray(values)


def _encode_tile(
    on_device: Array,
    unit: np.ndarray,
    x: np.ndarray,
    work: Callable[..., None],
    indices: np.ndarray,
    values: np.ndarray,
    threads: ThreadPoolExecutor,
) -> None:
    """Code some rows into `indices` and `values`."""
    n, k = indices.shape
    d = x.shape[1]
    state = _Rows(
        x.copy(), indices, np.empty((n, k, d), x.dtype), np.zeros((n, k), x.dtype),
        np.zeros((n, k, k), x.dtype), np.zeros(n, np.int64), np.linalg.norm(x, axis=1),
    )  # fmt: skip
    at_once = max(1, _LOOK // (len(unit) * unit.itemsize))
    while len(left := np.flatnonzero(state.filled < k)):
        for rows in np.split(left, range(at_once, len(left), at_once)):
            padded = np.pad(state.residual[rows], ((0, -len(rows) % _STEP), (0, 0)))
            correlation = np.asarray(_correlate(jnp.asarray(padded), on_device))
            part = -(-len(rows) // (4 * threads._max_workers))
            places = range(0, len(rows), part)
            list(
                threads.map(
                    functools.partial(work, state),
                    [rows[at : at + part] for at in places],
                    [correlation[at : at + part] for at in places],
                )
            )
    part = -(-n // threads._max_workers)
    places = [slice(at, at + part) for at in range(0, n, part)]
    finish: Any = _finish
    list(threads.map(lambda p: finish(x[p], unit, *(f[p] for f in state[1:5]), values[p]), places))


@jax.jit
def _correlate(x: Array, unit: Array) -> Array:
    return x @ unit.T


def _scratch(unit: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where a thread works: made once, since the system takes back what is as large."""
    m, d = unit.shape
    return (
        np.empty((min(_FEW, m), d), unit.dtype),
        np.empty(m, np.int64),
        np.empty(m, unit.dtype),
        np.empty(-(-m // _BLOCK), unit.dtype),
    )


def _go_on(
    unit: np.ndarray,
    tolerance: float,
    spare: SimpleQueue[Any],
    state: _Rows,
    rows: np.ndarray,
    correlation: np.ndarray,
) -> None:
    """Rounds of some rows until each is done or has to look at all atoms again; on a thread."""
    scratch = spare.get()
    drift = unit.dtype.type(_DRIFT / np.sqrt(unit.shape[1]))
    epsilon = np.finfo(unit.dtype).eps
    kernel: Any = _rounds
    kernel(unit, *state, rows, correlation, tolerance, epsilon, drift, *scratch)
    spare.put(scratch)


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _rounds(
    unit, residual, indices, basis, along, lower, filled, norm, rows, correlation, tolerance,
    epsilon, drift, few, places, sizes, block_best,
):  # fmt: skip
    """As many rounds of each row as its few best atoms, copied to `few`, are enough for."""
    d, k = unit.shape[1], indices.shape[1]
    alpha = np.empty(len(few), unit.dtype)
    inside = np.empty(k, unit.dtype)
    for i in range(len(rows)):
        row = rows[i]
        r, t = residual[row], filled[row]
        n, left_out = _most(correlation[i], len(few), places, sizes, block_best)
        n = _without(places, n, indices[row, :t])
        for c in range(n):
            few[c] = unit[places[c]]
            alpha[c] = correlation[i, places[c]]
        moved = unit.dtype.type(0)
        looked = True
        while t < k:
            if not looked:
                _inner(few, r, n, alpha)
            best = 0
            for c in range(1, n):
                if abs(alpha[c]) > abs(alpha[best]) or (
                    abs(alpha[c]) == abs(alpha[best]) and places[c] < places[best]
                ):
                    best = c
            top = abs(alpha[best])
            if n and not looked and top < left_out + drift * np.sqrt(moved):
                break
            looked = False
            square = unit.dtype.type(0)
            energy = unit.dtype.type(0)
            for j in range(d):
                energy += r[j] * r[j]
                square += few[best, j] * few[best, j]
            if (
                n == 0  # as with a row of NaN
                or top <= 8 * epsilon * norm[row] * np.sqrt(square)
                or (t > 0 and energy <= (tolerance * norm[row]) ** 2)
            ):
                t = k
                break
            q = basis[row, t]
            q[:] = few[best]
            rest = _orthogonalise(q, basis[row], t, square, inside, lower[row, t])
            indices[row, t] = places[best]
            if rest <= 64 * epsilon * square:  # cannot be told from the span of those taken
                q[:] = 0
                lower[row, t, t] = 1
            else:
                length = np.sqrt(rest)
                lower[row, t, t] = length
                step = unit.dtype.type(0)
                for j in range(d):
                    q[j] /= length
                    step += q[j] * r[j]
                for j in range(d):
                    r[j] -= step * q[j]
                along[row, t] = step
                moved += step * step
            t += 1
            n -= 1  # the last of the few takes its place
            few[best] = few[n]
            places[best] = places[n]
        filled[row] = t


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _orthogonalise(q, basis, t, square, inside, lower):
    """Take q's part along the first t of the basis off, add it to `lower`; what is left, squared.

    Once more where most was taken off: rounding left some of it (Giraud, Langou and others, 2005).
    """
    rest = square
    lower[:t] = 0
    for _ in range(2):
        _inner(basis, q, t, inside)
        for s in range(t):
            lower[s] += inside[s]
            for j in range(len(q)):
                q[j] -= inside[s] * basis[s, j]
        before, rest = rest, q.dtype.type(0)
        for j in range(len(q)):
            rest += q[j] * q[j]
        if rest > before / 2:
            break
    return rest


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _inner(rows, x, n, out):
    """out[i] = <rows_i, x> of the first n rows, four at once."""
    zero = x.dtype.type(0)
    whole = n - n % 4
    for i in range(0, whole, 4):
        a, b, c, d = zero, zero, zero, zero
        for j in range(len(x)):
            a += rows[i, j] * x[j]
            b += rows[i + 1, j] * x[j]
            c += rows[i + 2, j] * x[j]
            d += rows[i + 3, j] * x[j]
        out[i], out[i + 1], out[i + 2], out[i + 3] = a, b, c, d
    for i in range(whole, n):
        a = zero
        for j in range(len(x)):
            a += rows[i, j] * x[j]
        out[i] = a


@numba.njit(nogil=True, cache=True)
@no_type_check
def _most(correlation, want, places, sizes, block_best):
    """Put the places of the `want` greatest sizes into `places`; how many, and the next size.

    Only blocks whose greatest size is among the `want` greatest of the blocks can hold any.
    """
    m, n_blocks = len(correlation), len(block_best)
    for b in range(n_blocks):
        block_best[b] = _greatest(correlation[b * _BLOCK : (b + 1) * _BLOCK])
    bound = block_best.dtype.type(-1)
    if n_blocks > want:
        bound = np.partition(block_best, n_blocks - want)[n_blocks - want]
    n = 0
    for b in range(n_blocks):
        if block_best[b] >= bound:
            for j in range(b * _BLOCK, min(m, (b + 1) * _BLOCK)):
                size = abs(correlation[j])
                if size >= bound:
                    places[n], sizes[n] = j, size
                    n += 1
    if n <= want:
        return n, max(bound, 0)
    bound = np.partition(sizes[:n], n - want)[n - want]
    kept = 0
    ties = want
    for c in range(n):
        ties -= sizes[c] > bound
    for c in range(n):
        if sizes[c] > bound or (sizes[c] == bound and ties > 0):
            ties -= sizes[c] == bound
            places[kept] = places[c]
            kept += 1
    return kept, bound


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _greatest(values):
    """The greatest size."""
    best = values.dtype.type(0)
    for value in values:
        best = max(best, abs(value))
    return best


@numba.njit(nogil=True, cache=True)
@no_type_check
def _without(places, n, taken):
    """Take atoms out of the first n places; how many are left."""
    kept = 0
    for c in range(n):
        there = False
        for atom in taken:
            there |= atom == places[c]
        if not there:
            places[kept] = places[c]
            kept += 1
    return kept


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _finish(x, unit, indices, basis, along, lower, values):
    """Values on the supports, and once more on what rounding left of x along them."""
    k = along.shape[1]
    left = np.empty_like(x[0])
    for row in range(len(x)):
        used = 0
        while used < k and lower[row, used, used] > 0:
            used += 1
        left[:] = x[row]
        z = along[row]
        for _ in range(2):
            solve_transposed(lower[row], z, used)
            for t in range(used):
                values[row, t] += z[t]
                for j in range(len(left)):
                    left[j] -= z[t] * unit[indices[row, t], j]
            _inner(basis[row], left, used, z)
