"""Matryoshka OMP: nested groups of atoms, each coding what those before it have left."""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Dictionary
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared
from dictlearn.encoders.omp import OMP


class MatryoshkaOMP(AbstractEncoder):
    """OMP group by group, so that the first atoms alone are a (coarser) dictionary of their own.

    The atoms fall into groups that end at `smallest`, 2 `smallest`, 4 `smallest`, ..., m. With
    r_0 = x, group g is coded by OMP with its share k_g of the k nonzeros, sum_g k_g = k:

        z_g = OMP_{k_g}(r_g; D_g),    r_{g+1} = r_g - z_g D_g.

    Arguments:
      k: nonzeros a row over all groups, one a group at least; the first groups take what remains
        when it is shared out.
      smallest: atoms in the first group.

    Source: the Matryoshka loop of KSVD.jl ("DB-KSVD", arXiv 2505.18441). Departures: each group is
    coded on the residual of those before it, by OMP, and the shares add up to k (there ceil(k /
    groups) each).
    """

    __pydantic_config__ = {"extra": "forbid"}

    k: Annotated[int, Field(gt=0)] = eqx.field(static=True)
    smallest: Annotated[int, Field(gt=0)] = eqx.field(static=True, default=64)
    name: Literal["matryoshka_omp"] = eqx.field(static=True, default="matryoshka_omp")
    not_negative: ClassVar[bool] = False

    def check(self) -> None:
        """Nothing to check without the number of atoms."""

    def capacity(self, n_atoms: int, width: int) -> int:
        """The most nonzeros that a row may need; raises as `stages`."""
        del width
        self.stages(n_atoms)
        return self.k

    def groups(self, n_atoms: int) -> list[slice]:
        """Which atoms are fitted in turn, each group to what those before it left."""
        return [group for group, _ in self.stages(n_atoms)]

    def stages(self, n_atoms: int) -> list[tuple[slice, OMP]]:
        """The groups in order: which atoms, coded how.

        Raises:
          ValueError: k is fewer than the groups, or a share is more than its group's atoms.
        """
        ends = [self.smallest]
        while ends[-1] < n_atoms:
            ends.append(2 * ends[-1])
        ends = [0, *ends[:-1], n_atoms]
        groups = [slice(*pair) for pair in itertools.pairwise(ends)]
        each, more = divmod(self.k, len(groups))
        if not each:
            raise ValueError(
                f"k: {self.k} is fewer than the {len(groups)} groups that {n_atoms} atoms from "
                f"smallest = {self.smallest} on make; each needs one"
            )
        shares = [each + (index < more) for index in range(len(groups))]
        for group, share in zip(groups, shares, strict=True):
            if share > group.stop - group.start:
                raise ValueError(
                    f"k: {self.k} gives {share} to a group of {group.stop - group.start} atoms, "
                    f"more than n_atoms = {n_atoms} and smallest = {self.smallest} can hold"
                )
        return [(group, OMP(k=share)) for group, share in zip(groups, shares, strict=True)]

    def prepare(self, dictionary: Dictionary) -> AbstractPrepared:
        """Each group's unit atoms and Gram matrix."""
        stages = self.stages(len(dictionary.atoms))
        none = jnp.zeros_like(dictionary.bias)
        parts = [Dictionary(dictionary.atoms[group], none) for group, _ in stages]
        return _PreparedMatryoshka(
            [omp.prepare(part) for part, (_, omp) in zip(parts, stages, strict=True)],
            parts,
            dictionary.bias,
        )


class _PreparedMatryoshka(AbstractPrepared):
    groups: list[AbstractPrepared]
    parts: list[Dictionary]
    bias: Float[Array, " d"]

    def encode(
        self, x: Float[Array, "n d"], *, gradient: Float[Array, "n d"] | None = None
    ) -> SparseCodes:
        del gradient
        left, done, codes = x - self.bias[None], 0, []
        for group, part in zip(self.groups, self.parts, strict=True):
            here = group.encode(left)
            left = _subtract(left, here, part)
            codes.append(SparseCodes(here.indices + done, here.values, n_atoms=0))
            done += len(part.atoms)
        indices, values = (
            jnp.concatenate(arrays, axis=1)
            for arrays in zip(*((c.indices, c.values) for c in codes), strict=True)
        )
        return SparseCodes(indices, values, n_atoms=done)


@jax.jit
def _subtract(x: Array, codes: SparseCodes, part: Dictionary) -> Array:
    return x - part.decode(codes)
