"""The gradient of a sparse autoencoder's loss on one CPU, where codes are entries of u.

As dictlearn.solvers.sae._slope, written out: with c = 2 / (n variance groups), what the prefix up
to the group g of atoms leaves e_g = x - b - sum_{h <= g} z_h D_h, and s_g = sum_{h >= g} e_h,

    dL/dz_nj = -c <s_g(j), d_j>,   dL/dd_j = -c sum_n z_nj s_g(j),   dL/du = dL/dz where z != 0.

The cost beside u itself is that of the nonzeros. AuxK is dense over the dead latents alone.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, no_type_check

import equinox as eqx
import jax.numpy as jnp
import numba
import numpy as np
from jaxtyping import Array, Bool, Float

from dictlearn.dictionary import Dictionary
from dictlearn.encoders import activations_cpu
from dictlearn.encoders.linear import TILE
from dictlearn.encoders.omp_cpu import threads_at_hand
from dictlearn.solvers.base import Batch
from dictlearn.solvers.sae_variants import Parameters, Seen, Told

if TYPE_CHECKING:
    from dictlearn.solvers.sae import SAE


def slope(
    solver: SAE,
    parameters: Parameters,
    running: Float[Array, ""],
    dead: Bool[Array, " m"],
    batch: Batch,
) -> tuple[Parameters, Told] | None:
    """The gradient and what the batch tells; None where the variant has no kernel."""
    n = len(batch.x)
    out = np.flatnonzero(np.asarray(dead)) if solver.aux_weight > 0 else np.zeros(0, np.int64)
    sums = _Sums(out)
    picked = solver.variant.on_cpu(
        functools.partial(_tiles, parameters, batch, sums), n, float(running)
    )
    if picked is None:
        return None
    start, index, z = picked
    atoms, weight = np.asarray(parameters.dictionary.atoms), np.asarray(parameters.weight)
    centred, spread = map(np.asarray, _centre(batch.x, parameters.dictionary.bias))
    ends = np.array(solver.groups)
    m, kind = len(atoms), atoms.dtype.type
    left = _ROOM.take("left", (n, len(ends), atoms.shape[1]), atoms.dtype)
    errors = np.empty(n)
    du = np.empty_like(z)
    with ThreadPoolExecutor(threads_at_hand()) as threads:
        cuts = np.linspace(0, n, 4 * threads_at_hand() + 1).astype(np.int64)
        parts = list(itertools.pairwise(cuts))
        row_wise = functools.partial(_rows, start, index, z, centred, atoms, ends, left, errors, du)
        list(threads.map(row_wise, parts))
        step = kind(-2 / (n * (spread if spread > 0 else 1) * len(ends)))
        du *= step
        begins, row, place = _by_atom(index, start, m)
        d_atoms, d_weight = (_ROOM.take(name, atoms.shape, atoms.dtype) for name in "dw")
        atom_wise = functools.partial(
            _atoms, begins, row, z[place], du[place], centred, left, ends, d_atoms, d_weight
        )
        cuts = np.searchsorted(begins, np.linspace(0, len(z), 8 * threads_at_hand() + 1))
        cuts[0], cuts[-1] = 0, m
        list(threads.map(atom_wise, itertools.pairwise(cuts)))
    d_atoms *= step
    d_bias = np.bincount(index, weights=du, minlength=m).astype(kind)
    d_centre = step * left[:, 0].sum(axis=0)
    if len(out):
        u = np.concatenate(sums.dead)
        _add_aux(solver, u, out, centred, left[:, -1], atoms, d_atoms, d_weight, d_bias)
    d_centre -= d_bias @ weight
    used = np.diff(begins) > 0
    gradient = Parameters(
        Dictionary(jnp.array(d_atoms), jnp.array(d_centre)),  # copies
        jnp.array(d_weight), jnp.array(d_bias), None,
    )  # fmt: skip
    seen = Seen(
        jnp.asarray(kind(len(z) / n)),
        jnp.asarray(kind(np.abs(z).min(initial=np.inf))),
        jnp.asarray(kind(sums.projection / n)),
    )
    objective = kind(errors.mean() + sums.nothing)
    return gradient, Told(jnp.asarray(objective), jnp.asarray(spread), seen, jnp.asarray(used))


class _Room(threading.local):
    """Memory that a thread's steps use one after another: new pages are slow to come by."""

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with any contents."""
        held = self.held.get(name)
        if held is None or held.shape != shape or held.dtype != dtype:
            held = self.held[name] = np.empty(shape, dtype)
        return held


_ROOM = _Room()


class _Sums:
    """What goes through the tiles leaves on its way."""

    def __init__(self, out: np.ndarray) -> None:
        self.out = out
        self.reset()

    def reset(self) -> None:
        """Before another pass."""
        self.dead: list[np.ndarray] = []  # pre-activations of the dead
        self.projection = 0.0  # sum over rows of the mean |<g, d_j>|
        self.nothing = 0.0  # 0; NaN where a pre-activation is not finite


def _tiles(
    parameters: Parameters, batch: Batch, sums: _Sums
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """u and |<g, d_j>| of the rows, a tile at a time."""
    sums.reset()
    for at in range(0, len(batch.x), TILE):
        gradient = None if batch.gradient is None else batch.gradient[at : at + TILE]
        u, projection, mean, nothing = _pre(parameters, batch.x[at : at + TILE], gradient)
        u = np.asarray(u)
        sums.nothing += float(nothing)
        sums.projection += float(mean) * len(u)
        if len(sums.out):
            sums.dead.append(u[:, sums.out])
        yield u, None if projection is None else np.asarray(projection)


@eqx.filter_jit
def _pre(
    parameters: Parameters, x: Float[Array, "t d"], gradient: Float[Array, "t d"] | None
) -> tuple[Array, Array | None, Array, Array]:
    own = parameters
    u = (x - own.dictionary.bias[None]) @ own.weight.T + own.bias[None]
    nothing = 0 * jnp.sum(u)
    if gradient is None:
        return u, None, nothing, nothing
    projection = jnp.abs(gradient @ own.dictionary.atoms.T)
    return u, projection, projection.mean(), nothing


@eqx.filter_jit
def _centre(x: Float[Array, "n d"], bias: Float[Array, " d"]) -> tuple[Array, Array]:
    """x - b, and mean ||x - mean x||^2."""
    variance = jnp.mean(jnp.sum((x - x.mean(axis=0, keepdims=True)) ** 2, axis=1))
    return x - bias[None], variance


def _add_aux(
    solver: SAE,
    u: np.ndarray,
    out: np.ndarray,
    centred: np.ndarray,
    error: np.ndarray,
    atoms: np.ndarray,
    d_atoms: np.ndarray,
    d_weight: np.ndarray,
    d_bias: np.ndarray,
) -> None:
    """Add AuxK's part of the gradient: the dead latents `out`, with pre-activations u [n q]."""
    k, signed = solver.auxiliary(atoms.shape[1]), solver.variant.signed
    z = u if signed else np.maximum(u, 0)
    if u.shape[1] > k:
        index, value = activations_cpu.largest(u, k, signed=signed)
        z = np.zeros_like(u)
        rows = np.arange(len(u))[:, None]
        np.add.at(z, (rows, index), value)  # unused slots share indices
    left = error - z @ atoms[out]
    square = float(np.mean(error.astype(np.float64) ** 2))
    left *= atoms.dtype.type(-2 * solver.aux_weight / (left.size * (square or 1.0)))
    dz = np.where(z != 0, left @ atoms[out].T, 0)
    d_atoms[out] += z.T @ left
    d_weight[out] += dz.T @ centred
    d_bias[out] += dz.sum(axis=0)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _by_atom(index, start, m):
    """Of each atom: where its codes begin [m+1]; their rows, and their places in `index`."""
    begins = np.zeros(m + 1, np.int64)
    for t in range(len(index)):
        begins[index[t] + 1] += 1
    for j in range(m):
        begins[j + 1] += begins[j]
    at = begins[:-1].copy()
    row = np.empty(len(index), np.int32)
    place = np.empty(len(index), np.int64)
    for i in range(len(start) - 1):
        for t in range(start[i], start[i + 1]):
            row[at[index[t]]], place[at[index[t]]] = i, t
            at[index[t]] += 1
    return begins, row, place


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _rows(start, index, z, centred, atoms, ends, left, errors, du, part):
    """s_g of some rows, their squared errors, and <s_g, d_j> of their codes (in order of j)."""
    groups, d = left.shape[1:]
    group = np.empty(len(index), np.int64)
    for i in range(part[0], part[1]):
        t = start[i]
        for g in range(groups):
            e = left[i, g]
            e[:] = left[i, g - 1] if g else centred[i]
            while t < start[i + 1] and index[t] < ends[g]:
                atom = atoms[index[t]]
                for c in range(d):
                    e[c] -= z[t] * atom[c]
                group[t] = g
                t += 1
        errors[i] = 0
        for c in range(d):
            errors[i] += left[i, groups - 1, c] ** 2
        for g in range(groups - 2, -1, -1):
            left[i, g] += left[i, g + 1]
        for t in range(start[i], start[i + 1]):
            atom, s = atoms[index[t]], left[i, group[t]]
            total = z.dtype.type(0)
            for c in range(d):
                total += s[c] * atom[c]
            du[t] = total


@numba.njit(nogil=True, cache=True, fastmath=True)
@no_type_check
def _atoms(begins, row, z, du, centred, left, ends, d_atoms, d_weight, part):
    """Sums over the rows of each of some atoms."""
    d = centred.shape[1]
    for j in range(part[0], part[1]):
        g = np.searchsorted(ends, j, side="right")
        own, weight = d_atoms[j], d_weight[j]
        own[:] = 0
        weight[:] = 0
        for t in range(begins[j], begins[j + 1]):
            s, x = left[row[t], g], centred[row[t]]
            for c in range(d):
                own[c] += z[t] * s[c]
                weight[c] += du[t] * x[c]
