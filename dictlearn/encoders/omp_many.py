"""Orthogonal matching pursuit on a CPU over so many atoms that a row cannot keep all correlations.

The atoms' cosines are held in 16 bits (steps of 3e-5: 4.3 GB for 46,000 atoms). They serve choices
alone; what the values come from is computed from the atoms themselves.

The form of dictlearn.encoders.omp_cpu takes m t multiplications in round t. Here a row works on the
few atoms that correlate most with its residual, and all are looked at again, D r = D x - G z, only
when one that was left out may have become the best. With b the greatest |<r, d_i>| of those left
out at the last look, r' the residual since,

    |<r', d_i>| <= |<r, d_i>| + |<r - r', d_i>|,

where the last term is about ||r - r'|| / sqrt(d) for an atom that has nothing to do with the
difference. A row goes on by itself while its best atom reaches

    b + 1.5 ||r - r'|| / sqrt(d),

so that now and then it takes the second best. What that costs is in experiments/LOG.md.
"""

from __future__ import annotations

from typing import no_type_check

import jax
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Float, Int16

from dictlearn.encoders.omp_cpu import project, solve_transposed

# Atoms a row works on by itself.
_FEW = 384
# How far an atom's correlation is taken to drift, in units of ||r - r'|| / sqrt(d).
_DRIFT = 1.5
# Atoms whose greatest correlation is found at once; whose correlations are summed at once.
_BLOCK = 64
_SUM = 2048
# Rows of the Gram matrix that are computed at once, and the integer that stands for 1.
_ROWS = 512
_ONE = 32767


@jax.jit
def rough_gram(unit: Float[Array, "m d"]) -> Int16[Array, "m m"]:
    """round(32767 cos(d_i, d_j)) of atoms of any length, never held in another type."""
    m = len(unit)
    rows = min(_ROWS, m)
    norms = jnp.linalg.norm(unit, axis=1, keepdims=True)
    unit = unit / jnp.where(norms > 0, norms, 1)

    def fill(block: Array, gram: Array) -> Array:
        start = jnp.minimum(block * rows, m - rows)
        inner = jax.lax.dynamic_slice_in_dim(unit, start, rows) @ unit.T
        inner = jnp.round(_ONE * jnp.clip(inner, -1, 1)).astype(jnp.int16)
        return jax.lax.dynamic_update_slice_in_dim(gram, inner, start, 0)

    return jax.lax.fori_loop(0, -(-m // rows), fill, jnp.zeros((m, m), jnp.int16))


def code_part(
    lengths: np.ndarray,
    unit: np.ndarray,
    gram: np.ndarray,
    tolerance: float,
    x: np.ndarray,
    correlation: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
) -> None:
    """Code some rows into `indices` and `values`; on a thread. `lengths` are those of `unit`."""
    drift = unit.dtype.type(_DRIFT / np.sqrt(unit.shape[1]))
    few = min(_FEW, len(unit))
    epsilon = np.finfo(unit.dtype).eps
    _code_rows(x, unit, lengths, gram, correlation, tolerance, epsilon, drift, few, indices, values)


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _code_rows(
    x, unit, lengths, gram, correlation, tolerance, epsilon, drift, few, indices, values
):  # fmt: skip
    """Rows x [n d] against atoms `unit`, not longer than 1."""
    d, k, m = x.shape[1], indices.shape[1], len(unit)
    one = x.dtype.type(1)
    lower = np.zeros((k, k), x.dtype)  # of the support: d_t = sum_s lower[t, s] q_s
    own = np.empty((k, d), x.dtype)  # the support's atoms
    along, inside, z = np.empty(k, x.dtype), np.empty(k, x.dtype), np.empty(k, x.dtype)  # along q_t
    chosen, slots, tries = np.empty(k, np.int64), np.empty(k, np.int64), np.empty(k, np.int64)
    every, sizes = np.empty(m, x.dtype), np.empty(m, x.dtype)
    block_best = np.empty(-(-m // _BLOCK), x.dtype)
    places = np.empty(m, np.int64)  # of the few; longer while they are sought
    alpha, gathered = np.empty(few, x.dtype), np.empty(few, x.dtype)
    p = np.empty((k, few), x.dtype)  # <q_t, d_i> of the few
    for row in range(len(x)):
        energy = 0.0
        for i in range(d):
            energy += x[row, i] * x[row, i]
        tiny = 8 * epsilon * np.sqrt(energy)
        limit = tolerance * tolerance * energy
        tried = count = 0
        while tried < k:
            z[:count] = along[:count]
            solve_transposed(lower, z, count)
            for s in range(count):
                z[s] *= lengths[chosen[s]]
            _look(correlation[row], lengths, gram, chosen, z, count, every)
            every[tries[:tried]] = 0  # or what rounding left of it
            n, left_out = _most(every, few, places, sizes, block_best)
            for c in range(n):
                alpha[c] = every[places[c]]
            for s in range(count):
                _gather(gram[chosen[s]], lengths, chosen[s], places, n, gathered)
                scale = one / lower[s, s]
                project(p, gathered[:n], lower[s], s, scale, 0 * one, alpha[:n])
            moved = 0.0
            start = tried
            while tried < k:
                best = 0
                for c in range(1, n):
                    if abs(alpha[c]) > abs(alpha[best]) or (
                        abs(alpha[c]) == abs(alpha[best]) and places[c] < places[best]
                    ):
                        best = c
                if n and tried > start and abs(alpha[best]) < left_out + drift * np.sqrt(moved):
                    break
                new = places[best]
                square = 0.0
                for i in range(d):
                    own[count, i] = unit[new, i]
                    square += own[count, i] * own[count, i]
                rest = _inside(own, count, lower, square, inside)
                inner = correlation[row, new]  # with the residual, exactly
                for s in range(count):
                    inner -= inside[s] * along[s]
                if (
                    n == 0  # as with a row of NaN
                    or abs(inner) <= tiny * np.sqrt(square)
                    or (tried and energy <= limit)
                ):
                    k = tried  # ends this row
                    break
                indices[row, tried] = tries[tried] = new
                tried += 1
                n -= 1  # the last of the few takes its place
                alpha[best], places[best] = alpha[n], places[n]
                for s in range(count):
                    p[s, best] = p[s, n]
                if rest <= 64 * epsilon * square:  # cannot be told from the span of those taken
                    continue
                length = np.sqrt(rest)
                step = inner / length
                lower[count, :count] = inside[:count]
                lower[count, count] = length
                along[count] = step
                chosen[count], slots[count] = new, tried - 1
                _gather(gram[new], lengths, new, places, n, gathered)
                scale = x.dtype.type(1 / length)
                project(p, gathered[:n], inside, count, scale, along[count], alpha[:n])
                energy -= step * step
                moved += step * step
                count += 1
        k = indices.shape[1]
        _finish(x[row], own, lower, along, count, slots, values[row])


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _look(correlation, lengths, gram, chosen, z, count, out):
    """out = D x - G z with z for atoms of length 1, four atoms of the support at once."""
    unit = out.dtype.type(1 / _ONE)
    m = len(out)
    for b in range(0, m, _SUM):
        here = slice(b, min(m, b + _SUM))
        part, length, whole = out[here], lengths[here], correlation[here]
        part[:] = 0
        s = 0
        while s + 4 <= count:
            g0, g1 = gram[chosen[s], here], gram[chosen[s + 1], here]
            g2, g3 = gram[chosen[s + 2], here], gram[chosen[s + 3], here]
            z0, z1, z2, z3 = unit * z[s], unit * z[s + 1], unit * z[s + 2], unit * z[s + 3]
            for i in range(len(part)):
                part[i] += (
                    z0 * np.float32(g0[i]) + z1 * np.float32(g1[i])
                    + z2 * np.float32(g2[i]) + z3 * np.float32(g3[i])
                )  # fmt: skip
            s += 4
        while s < count:
            g0, z0 = gram[chosen[s], here], unit * z[s]
            for i in range(len(part)):
                part[i] += z0 * np.float32(g0[i])
            s += 1
        for i in range(len(part)):
            part[i] = whole[i] - length[i] * part[i]


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _gather(row, lengths, new, places, n, out):
    """<d_new, d_i> at the first n places, from the new atom's row of cosines."""
    scale = out.dtype.type(lengths[new] / _ONE)
    for c in range(n):
        out[c] = scale * lengths[places[c]] * np.float32(row[places[c]])


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _inside(own, count, lower, square, inside):
    """inside_t = <q_t, d> of the atom that stands behind the support; d's square without them."""
    new = own[count]
    rest = square
    for t in range(count):
        inner = own.dtype.type(0)
        for i in range(len(new)):
            inner += own[t, i] * new[i]
        for s in range(t):
            inner -= lower[t, s] * inside[s]
        inside[t] = inner / lower[t, t]
        rest -= inside[t] * inside[t]
    return rest


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _finish(x, own, lower, along, count, slots, values):
    """Values on the support, and once more on what rounding left of x along it."""
    left = x.copy()
    for _ in range(2):
        solve_transposed(lower, along, count)
        for t in range(count):
            values[slots[t]] += along[t]
            for i in range(len(left)):
                left[i] -= along[t] * own[t, i]
        for t in range(count):
            inner = left.dtype.type(0)
            for i in range(len(left)):
                inner += left[i] * own[t, i]
            for s in range(t):
                inner -= lower[t, s] * along[s]
            along[t] = inner / lower[t, t]


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
