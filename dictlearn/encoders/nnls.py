"""Non-negative least squares over all atoms."""

from __future__ import annotations

from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared
from dictlearn.encoders.pursuit import mesh_of

# Rows coded at once: codes and correlations [m tile] should stay within a cache, and all rows of a
# tile wait for its slowest one.
_TILE = 256
# Atoms between two matrix products.
_BLOCK = 16
# Sweeps between two looks at the optimality, which cost as much as a sweep.
_SWEEPS = 4


class NNLS(AbstractEncoder):
    """Codes over all atoms that leave the least residual: argmin_{z >= 0} ||x - b - z D||^2.

    b is the dictionary's bias. By cyclic coordinate descent on the Gram matrix of the atoms at unit
    norm, G = U U^T with correlations c = U (x - b):

        z_j <- max(0, z_j - g_j),    g = G z - c,

    until no coordinate would move by more than `tolerance` times the greatest of c,

        max_j |z_j - max(0, z_j - g_j)| <= tolerance * max_j c_j,

    or after `max_sweeps` sweeps over the atoms. Zeros are exact. A row that no atom correlates with
    positively, one at the bias for instance, has zero codes; so has a zero atom. Of equal atoms the
    first one takes it all. Where atoms are dependent, as they are where m > d, the codes need not
    be the only ones that are as good.

    Arguments:
      tolerance: as above. In float32 rounding lets some rows come no closer than about 1e-6.
      max_sweeps: the most sweeps. Where atoms are nearly dependent, as with m > d, rows may need
        ten times as many as the default allows.

    Source: Franc, Hlavac and Navara, "Sequential coordinate-wise algorithm for the non-negative
    least squares problem" (2005); atoms go in blocks here, so that most of the work is
    matrix products over many rows.
    """

    __pydantic_config__ = {"extra": "forbid"}

    tolerance: Annotated[float, Field(gt=0, lt=1)] = eqx.field(static=True, default=1e-4)
    max_sweeps: Annotated[int, Field(gt=0)] = eqx.field(static=True, default=1000)
    name: Literal["nnls"] = eqx.field(static=True, default="nnls")

    def check(self) -> None:
        """No rule joins these hyperparameters."""

    def prepare(self, dictionary: Dictionary) -> PreparedNNLS:
        """Unit atoms and their Gram matrix, at a cost of m^2 d."""
        return _prepare(dictionary, self)


class PreparedNNLS(AbstractPrepared):
    """NNLS made ready for one dictionary."""

    unit: Float[Array, "m d"]
    norms: Float[Array, " m"]
    gram: Float[Array, "p p"]  # p = m, filled up with zeros to whole blocks
    bias: Float[Array, " d"]
    nnls: NNLS

    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        """Codes of normalised rows: slot j is atom j's."""
        del gradient
        return _encode(self, x, mesh_of(x))


@eqx.filter_jit
def _prepare(dictionary: Dictionary, nnls: NNLS) -> PreparedNNLS:
    norms = jnp.linalg.norm(dictionary.atoms, axis=1)
    norms = jnp.where(norms > 0, norms, 1)
    unit = dictionary.atoms / norms[:, None]
    fill = -len(unit) % _BLOCK
    gram = jnp.pad(unit @ unit.T, ((0, fill), (0, fill)))
    return PreparedNNLS(unit, norms, gram, dictionary.bias, nnls)


@eqx.filter_jit
def _encode(prepared: PreparedNNLS, x: Float[Array, "n d"], mesh: Mesh | None) -> SparseCodes:
    """All rows, a tile after another; each device has rows of its own."""

    def encode(prepared: PreparedNNLS, x: Array) -> Array:
        n, m, p = len(x), len(prepared.unit), len(prepared.gram)
        tile = max(1, min(_TILE, n))
        inner = (x - prepared.bias[None]) @ prepared.unit.T
        inner = jnp.pad(inner, ((0, -n % tile), (0, p - m)))
        tiles = inner.reshape(-1, tile, p)  # [n p] -> [tiles tile p]
        values = jax.lax.map(lambda c: _tile(prepared, c.T).T, tiles)
        return values.reshape(-1, p)[:n, :m] / prepared.norms[None]  # [n m]

    if mesh is not None:
        rows = PartitionSpec(mesh.axis_names)
        encode = jax.shard_map(
            encode, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
        )
    values = encode(prepared, x)
    m = len(prepared.unit)
    indices = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32)[None], values.shape)
    return SparseCodes(indices, values, n_atoms=m)


def _tile(prepared: PreparedNNLS, inner: Float[Array, "p n"]) -> Float[Array, "p n"]:
    """Codes over unit atoms from correlations; traced. Atoms are rows, so that each is at hand."""
    gram, nnls = prepared.gram, prepared.nnls
    bound = nnls.tolerance * jnp.maximum(inner.max(axis=0), 0)

    def sweep(_: Array, z: Array) -> Array:
        def block(index: Array, z: Array) -> Array:
            at = index * _BLOCK
            rows = jax.lax.dynamic_slice_in_dim(gram, at, _BLOCK)  # [block p]
            square = jax.lax.dynamic_slice_in_dim(rows, at, _BLOCK, axis=1)
            gradient = rows @ z - jax.lax.dynamic_slice_in_dim(inner, at, _BLOCK)

            def coordinate(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                own, gradient = state
                moved = jnp.maximum(own[j] - gradient[j], 0)
                return own.at[j].set(moved), gradient + square[:, j, None] * (moved - own[j])[None]

            own = jax.lax.dynamic_slice_in_dim(z, at, _BLOCK)
            own, _ = jax.lax.fori_loop(0, _BLOCK, coordinate, (own, gradient))
            return jax.lax.dynamic_update_slice_in_dim(z, own, at, axis=0)

        return jax.lax.fori_loop(0, len(gram) // _BLOCK, block, z)

    def sweeps(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        z, count, active = state
        most = jnp.minimum(_SWEEPS, nnls.max_sweeps - count)
        # A row that is done rests, so that its codes do not depend on those beside it.
        z = jnp.where(active[None], jax.lax.fori_loop(0, most, sweep, z), z)
        moves = jnp.abs(z - jnp.maximum(z - (gram @ z - inner), 0)).max(axis=0)
        return z, count + most, active & (moves > bound)

    start = jnp.zeros_like(inner), jnp.zeros((), jnp.int32), bound > 0
    return jax.lax.while_loop(
        lambda state: state[2].any() & (state[1] < nnls.max_sweeps), sweeps, start
    )[0]
