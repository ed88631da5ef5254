"""A Coder on many rows at once: its codes as one sparse matrix, and what they stand for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Float

from dictlearn.codes import SparseCodes
from dictlearn.dictionary import Coder

# Rows coded at once: one shape, so one trace.
_BLOCK = 1024


def coded(
    coder: Coder, x: Float[np.ndarray, "n d"], *, gradient: Float[np.ndarray, "n d"] | None = None
) -> tuple[scipy.sparse.csr_array, Float[np.ndarray, "n d"]]:
    """Codes [n a] of raw rows, zeros not stored, and reconstructions."""
    prepared = coder.prepare()
    parts, x_hat = [], np.empty_like(x)
    for first in range(0, len(x), _BLOCK):
        here = slice(first, min(first + _BLOCK, len(x)))
        n = here.stop - first
        filled = ((0, _BLOCK - n), (0, 0))
        slope = None if gradient is None else np.pad(gradient[here], filled)
        codes = prepared.encode(np.pad(x[here], filled), gradient=slope)
        x_hat[here] = np.asarray(coder.decode(codes))[:n]
        values, indices = (np.asarray(a)[:n] for a in (codes.values, codes.indices))
        row, slot = np.nonzero(values)
        entries = (values[row, slot], (row, indices[row, slot]))
        parts.append(scipy.sparse.csr_array(entries, (n, codes.n_atoms)))
    return scipy.sparse.csr_array(scipy.sparse.vstack(parts)), x_hat


def norms(coder: Coder) -> Float[np.ndarray, " a"]:
    """Of the atoms; codes times these are over atoms of unit norm."""
    return np.linalg.norm(np.asarray(coder.atoms, np.float64), axis=1)


def frame(coder: Coder) -> tuple[Float[np.ndarray, "a d"], Float[np.ndarray, " d"]]:
    """Atoms and offset in the units of raw rows: decode(f) = offset + f atoms."""
    none = jnp.zeros((1, 1))
    empty = SparseCodes(none.astype(jnp.int32), none, n_atoms=len(coder.atoms))
    scale = float(coder.normaliser.scale)
    return scale * np.asarray(coder.atoms, np.float64), np.asarray(coder.decode(empty))[0]
