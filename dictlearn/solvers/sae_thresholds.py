"""Codes above a threshold, in training: what BatchTopK and JumpReLU keep, and its slope."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dictlearn.encoders import activations_cpu

# u and |<g, d_j>| (where asked for) of a tile of rows, tile after tile.
Tiles = Callable[[], Iterator[tuple[np.ndarray, np.ndarray | None]]]
# Codes row by row: where each row's begin [n+1], their indices, their values.
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def least(u: Float[Array, "n m"], k: int) -> Float[Array, ""]:
    """The mean over rows of their k-th largest entry, kept above 0: about k a row are above it."""
    tiny = 1e-3 * jnp.abs(u).mean() + jnp.finfo(u.dtype).tiny
    return jnp.maximum(jax.lax.top_k(u, k)[0][:, -1].mean(), tiny)


def batch_top(u: Float[Array, "n m"], k: int) -> Float[Array, "n m"]:
    """The k n largest entries of u that are above 0; all of those that equal the last one.

    The last one is found bit by bit: positive floats are in the order of their bits.
    """
    n = len(u)
    kind, top = (jnp.int32, 30) if u.dtype == jnp.float32 else (jnp.int64, 62)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(jax.nn.relu(u)), kind)

    def with_bit(step: Array, floor: Array) -> Array:
        higher = floor | (jnp.ones((), kind) << (top - step).astype(kind))
        return jnp.where(jnp.sum(bits >= higher) >= k * n, higher, floor)

    floor = jax.lax.fori_loop(0, top + 1, with_bit, jnp.zeros((), kind))
    return jnp.where(bits >= jnp.maximum(floor, 1), u, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(
    u: Float[Array, "n m"], log_theta: Float[Array, " m"], bandwidth: float
) -> Float[Array, "n m"]:
    """u above theta, else 0."""
    return jnp.where(u > jnp.exp(log_theta)[None], u, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def above(
    u: Float[Array, "n m"], log_theta: Float[Array, " m"], bandwidth: float
) -> Float[Array, "n m"]:
    """1 above theta, else 0."""
    return (u > jnp.exp(log_theta)[None]).astype(u.dtype)


def _ramp(u: Array, log_theta: Array, bandwidth: float, cotangent: Array) -> Array:
    """Cotangents of log theta, for a jump of height 1: minus the ramp's slope, times theta."""
    near = jnp.abs(u / jnp.exp(log_theta)[None] - 1) < bandwidth / 2
    return -jnp.sum(jnp.where(near, cotangent, 0), axis=0) / bandwidth


def _jump_back(bandwidth: float, inputs: tuple[Array, Array], z: Array) -> tuple[Array, Array]:
    u, log_theta = inputs
    slope = _ramp(u, log_theta, bandwidth, z) * jnp.exp(log_theta)
    return jnp.where(u > jnp.exp(log_theta)[None], z, 0), slope


def _above_back(bandwidth: float, inputs: tuple[Array, Array], h: Array) -> tuple[Array, Array]:
    return jnp.zeros_like(h), _ramp(*inputs, bandwidth, h)


jump.defvjp(
    lambda u, log_theta, bandwidth: (jump(u, log_theta, bandwidth), (u, log_theta)), _jump_back
)
above.defvjp(
    lambda u, log_theta, bandwidth: (above(u, log_theta, bandwidth), (u, log_theta)), _above_back
)


def rows_of(parts: list[tuple[np.ndarray, np.ndarray]]) -> Rows:
    """Codes of tiles [t k] without their zeros."""
    indices, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    used = values != 0
    return np.concatenate([[0], np.cumsum(used.sum(axis=1))]), indices[used], values[used]


def batch_top_on_cpu(tiles: Tiles, count: int, running: float) -> Rows:
    """`batch_top` by a kernel on the host: candidates are what is above half the last threshold."""
    for floor in (running / 2, 0.0):
        parts = [activations_cpu.above(u, np.full(u.shape[1], floor, u.dtype)) for u, _ in tiles()]
        starts, indices, values = zip(*parts, strict=True)
        index, value = np.concatenate(indices), np.concatenate(values)
        if len(value) >= count:
            break
    if len(value) > count:
        last = np.partition(value, len(value) - count)[len(value) - count]
        kept = value >= last
    else:
        kept = np.ones(len(value), bool)
    per_row = np.concatenate([np.diff(start) for start in starts])
    start = np.concatenate([[0], np.cumsum(per_row)])
    return np.concatenate([[0], np.cumsum(kept)])[start], index[kept], value[kept]
