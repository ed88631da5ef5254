"""What greedy pursuits share: unit atoms with their Gram matrix, and rows a tile at a time."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int16

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared

# Rows coded at once: the correlations [tile m] should stay within a processor's cache.
_TILE = 1024

Choice = tuple[Int[Array, "n k"], Float[Array, "n k"]]


class UnitAtoms(eqx.Module):
    """A dictionary as pursuits see it. A zero atom stays zero: nothing correlates with it.

    Attributes:
      unit: atoms over their norms; over the greatest norm of all, for a pursuit that chooses by
        <r, d_i> as it is.
      norms: what they were divided by.
      gram: their Gram matrix; where it is too large, their cosines in 16 bits
        (encoders/omp_many.py) or None.
    """

    unit: Float[Array, "m d"]
    norms: Float[Array, " m"]
    gram: Float[Array, "m m"] | Int16[Array, "m m"] | None
    bias: Float[Array, " d"]

    @property
    def products(self) -> Float[Array, "m m"]:
        """The Gram matrix, for a pursuit that always has an exact one."""
        assert self.gram is not None
        return self.gram

    def inner(self, one: Int[Array, " n"], others: Int[Array, "n k"]) -> Float[Array, "n k"]:
        """<d_one, d_other> of each row's atoms."""
        if self.gram is not None and self.gram.dtype == self.unit.dtype:
            return self.gram[one[:, None], others]
        return jnp.einsum("nd,nkd->nk", self.unit[one], self.unit[others])


class AbstractPursuit(AbstractEncoder):
    """A greedy pursuit: array-free, so that it runs on any dictionary."""

    k: eqx.AbstractVar[int | None]
    tolerance: eqx.AbstractVar[float]
    not_negative: ClassVar[bool]  # whether its codes are
    normalised: ClassVar[bool] = True  # whether it chooses by <r, d_i> / ||d_i||

    @abc.abstractmethod
    def tile(self, atoms: UnitAtoms, x: Float[Array, "n d"]) -> Choice:
        """Indices and values over unit atoms for some rows without the bias; traced."""

    def on_cpu(self, atoms: UnitAtoms, x: Float[Array, "n d"]) -> Choice | None:
        """The same for all rows by a kernel on the host, bias included; None: there is none."""
        del atoms, x
        return None

    def capacity(self, n_atoms: int, width: int) -> int:
        """The most nonzeros that a row may need.

        Raises:
          ValueError: k is above the number of atoms.
        """
        if self.k is None:
            return min(n_atoms, width)  # more atoms than dimensions are never independent
        if self.k > n_atoms:
            raise ValueError(
                f"k: {self.k} is more than n_atoms = {n_atoms}; "
                "a row cannot use more atoms than there are"
            )
        return self.k

    def groups(self, n_atoms: int) -> list[slice]:
        """Which atoms are fitted in turn, each group to what those before it left: here one."""
        return [slice(0, n_atoms)]

    def check(self) -> None:
        """Rules that join hyperparameters. Raises ValueError naming the field."""
        if self.k is None and self.tolerance == 0:
            raise ValueError("k: neither k nor tolerance is given; nothing would stop the pursuit")

    def gram(self, unit: Float[Array, "m d"]) -> Array | None:
        """The Gram matrix that it is made ready with."""
        return exact_gram(unit)

    def prepare(self, dictionary: Dictionary) -> PreparedPursuit:
        """Unit atoms and, mostly, their Gram matrix, at a cost of m^2 d."""
        self.capacity(*dictionary.atoms.shape)
        atoms = unit_atoms(dictionary, normalised=self.normalised)
        gram = self.gram(atoms.unit)
        return PreparedPursuit(UnitAtoms(atoms.unit, atoms.norms, gram, atoms.bias), self)


class PreparedPursuit(AbstractPrepared):
    """A pursuit made ready for one dictionary."""

    atoms: UnitAtoms
    pursuit: AbstractPursuit

    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        """Codes of normalised rows."""
        del gradient
        if on_one_cpu(x) and (choice := self.pursuit.on_cpu(self.atoms, x)) is not None:
            return _codes(self.atoms, *choice)
        return _encode_tiles(self, x, mesh_of(x))


def mesh_of(x: Array) -> Mesh | None:
    """The devices that hold a part of the rows each, where there are several."""
    if isinstance(x, Tracer) or not isinstance(x.sharding, NamedSharding):
        return None
    mesh = x.sharding.mesh
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def on_one_cpu(x: Array) -> bool:
    """Whether rows are at hand for a kernel that runs on the host."""
    return (
        not isinstance(x, Tracer)
        and {d.platform for d in x.devices()} == {"cpu"}
        and (len(x.devices()) == 1)
    )


@eqx.filter_jit
def unit_atoms(dictionary: Dictionary, *, normalised: bool = True) -> UnitAtoms:
    """Without a Gram matrix."""
    norms = jnp.linalg.norm(dictionary.atoms, axis=1)
    if not normalised:
        norms = jnp.full_like(norms, norms.max())
    unit = dictionary.atoms / jnp.where(norms > 0, norms, 1)[:, None]
    return UnitAtoms(unit, norms, None, dictionary.bias)


@jax.jit
def exact_gram(unit: Float[Array, "m d"]) -> Float[Array, "m m"]:
    """All <d_i, d_j>."""
    return unit @ unit.T


@eqx.filter_jit
def _encode_tiles(
    prepared: PreparedPursuit, x: Float[Array, "n d"], mesh: Mesh | None
) -> SparseCodes:
    """The pursuit over all rows, a tile after another; each device has rows of its own."""
    atoms, pursuit = prepared.atoms, prepared.pursuit

    def encode(atoms: UnitAtoms, x: Array) -> Choice:
        n, d = x.shape
        tile = max(1, min(_TILE, n))
        padded = jnp.pad(x - atoms.bias[None], ((0, -n % tile), (0, 0)))
        indices, values = jax.lax.map(
            lambda rows: pursuit.tile(atoms, rows), padded.reshape(-1, tile, d)
        )
        k = indices.shape[-1]
        return indices.reshape(-1, k)[:n], values.reshape(-1, k)[:n]  # [n k]

    indices, values = _by_device(encode, mesh)(atoms, x)
    return _codes(atoms, indices, values)


def _codes(atoms: UnitAtoms, indices: Array, values: Array) -> SparseCodes:
    """Codes over the dictionary's own atoms from values over unit atoms."""
    norms = jnp.where(atoms.norms > 0, atoms.norms, 1)
    return SparseCodes(indices, values / norms[indices], n_atoms=len(norms))


_F = TypeVar("_F", bound=Callable[..., Choice])


def _by_device(encode: _F, mesh: Mesh | None) -> _F:
    """`encode(atoms, x)` with each device's rows apart; no device waits for another."""
    if mesh is None:
        return encode
    rows = PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        encode, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False
    )


def least_squares(
    atoms: UnitAtoms,
    x: Float[Array, "n d"],
    indices: Int[Array, "n k"],
    used: Bool[Array, "n k"],
) -> Float[Array, "n k"]:
    """argmin_z ||x - sum_i z_i d_i||^2 over the used slots; 0 in the others.

    By Cholesky's factor of the support's Gram matrix, with a ridge of 64 eps that keeps atoms which
    are dependent to rounding finite, and one step of refinement from the residual.
    """
    k = indices.shape[1]
    both = used[:, :, None] & used[:, None, :]
    gram = jax.vmap(atoms.inner, (1, None), 1)(indices, indices)  # [n k k]
    gram = jnp.where(both, gram, 0)
    ridge = jnp.where(used, 64 * jnp.finfo(x.dtype).eps, 1)
    factor = jnp.linalg.cholesky(gram + ridge[:, :, None] * jnp.eye(k, dtype=x.dtype)[None])

    def fit(rows: Array) -> Array:
        inner = jax.lax.map(lambda chosen: jnp.sum(rows * atoms.unit[chosen], axis=1), indices.T).T
        inner = jnp.where(used, inner, 0)[:, :, None]
        half = jax.lax.linalg.triangular_solve(factor, inner, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(
            factor, half, left_side=True, lower=True, transpose_a=True
        )[:, :, 0]

    values = fit(x)
    left = x - SparseCodes(indices, values, n_atoms=len(atoms.unit)).decode(atoms.unit)
    return jnp.where(used, values + fit(left), 0)
