"""Number formats on disk: float32, bfloat16 and float16, checked on the way in.

HDF5 knows no bfloat16 by name, but describes any floating type by its fields; plain h5py then reads
it as float32, slowly. Here the bits are taken as they are, and read as `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

from typing import Any, Literal

import h5py
import ml_dtypes
import numpy as np

Precision = Literal["float32", "bfloat16", "float16"]
Compression = Literal["none", "lzf", "gzip"]

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# The bits of the exponent: all of them set in NaN and infinity, and in nothing else.
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00}
# Rows a chunk of a compressed dataset: what is read at once to be shuffled (dictlearn.data).
CHUNK_ROWS = 256


def not_finite(x: np.ndarray) -> np.ndarray:
    """Which rows [n] of x [n d] hold NaN or infinity."""
    if x.dtype == np.float32:
        with np.errstate(invalid="ignore"):  # inf - inf
            total = x.sum(dtype=np.float64)  # one pass, and no array of flags
        if np.isfinite(total):
            return np.zeros(len(x), bool)
        return np.any(~np.isfinite(x), axis=1)
    mask = np.uint16(_EXPONENT[x.dtype.name])
    return ((x.view(np.uint16) & mask) == mask).any(axis=1)


def too_small(x: np.ndarray, precision: Precision) -> np.ndarray:
    """Which rows [n] of float32 x [n d] lie wholly below what float16 holds to its precision.

    The smallest normal number of bfloat16 is that of float32; that of float16 is 6e-5, and the
    gradients of a large model are often smaller.
    """
    if precision != "float16":
        return np.zeros(len(x), bool)
    largest = np.abs(x).max(axis=1)
    return (largest > 0) & (largest < np.finfo(np.float16).smallest_normal)


def write(file: h5py.File, name: str, x: np.ndarray, compression: Compression = "none") -> None:
    """Store x [n ...] under `name`, in its own type, compressed by chunks where asked."""
    options: dict[str, Any] = {}
    if compression != "none" and x.size:
        options = {"chunks": (min(CHUNK_ROWS, len(x)), *x.shape[1:]), "shuffle": True}
        options |= {"compression": compression}
        options |= {"compression_opts": 1} if compression == "gzip" else {}
    if x.dtype != ml_dtypes.bfloat16:
        file.create_dataset(name, data=x, **options)
        return
    dataset = file.create_dataset(name, x.shape, h5py.Datatype(_bfloat16()), **options)
    if x.size:
        everything = h5py.h5s.ALL
        bits = np.ascontiguousarray(x).view(np.uint16)
        dataset.id.write(everything, everything, bits, mtype=_bfloat16())


def read(dataset: h5py.Dataset, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` of a dataset, in the type in which they are stored."""
    rows = len(dataset)
    start, stop = min(start, rows), rows if stop is None else min(stop, rows)
    shape = (max(0, stop - start), *dataset.shape[1:])
    narrow = dataset.id.get_type() == _bfloat16()
    dtype = np.dtype(np.uint16) if narrow else dataset.dtype
    at = dataset.id.get_offset()  # None: compressed
    if at is not None and dataset.file.driver == "sec2":
        # The bytes lie there as they are: other threads work on while the disk is waited for.
        step = dtype.itemsize * int(np.prod(shape[1:]))
        count = int(np.prod(shape))
        x = np.fromfile(dataset.file.filename, dtype, count, offset=at + start * step)
        x = x.reshape(shape)
    elif narrow and shape[0]:
        x = np.empty(shape, dtype)
        there = dataset.id.get_space()
        there.select_hyperslab((start,) + (0,) * (x.ndim - 1), x.shape)
        dataset.id.read(h5py.h5s.create_simple(x.shape), there, x, mtype=_bfloat16())
    else:
        x = dataset[start:stop].astype(dtype, copy=False)
    return x.view(ml_dtypes.bfloat16) if narrow else x


def stored_type(dataset: h5py.Dataset) -> str:
    """The name of a dataset's type: one of `DTYPES`, or numpy's."""
    return "bfloat16" if dataset.id.get_type() == _bfloat16() else dataset.dtype.name


def _bfloat16() -> h5py.h5t.TypeFloatID:
    """HDF5's description of bfloat16: float32 without its lower half."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)  # sign; exponent, its bits; mantissa, its bits
    kind.set_size(2)
    kind.set_ebias(127)
    return kind
