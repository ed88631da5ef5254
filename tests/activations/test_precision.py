"""Laws of the number formats on disk: what is written is read, to the bit, by anyone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

from activations import precision
from activations.precision import DTYPES, not_finite, stored_type, too_small

NARROW = ("bfloat16", "float16")
COMPRESSIONS = ("none", "lzf", "gzip")
# Bits of sign, exponent, mantissa.
FIELDS = {"float32": (1, 8, 23), "bfloat16": (1, 8, 7), "float16": (1, 5, 10)}


@pytest.fixture
def file(tmp_path: Path) -> Iterator[h5py.File]:
    with h5py.File(tmp_path / "x.h5", "w") as opened:
        yield opened


def every_value(dtype: str) -> np.ndarray:
    """All 65,536 numbers of a 16-bit type, one a row [65536 1]."""
    return np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])[:, None]


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def exactly_rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Nearest number of a 16-bit type by search in a table of them all; a tie to even bits."""
    top = np.uint16(0x7F80 if dtype == "bfloat16" else 0x7C00)
    table = np.arange(top, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float64)  # 0 and up
    # Past the last number comes the one that a greater exponent would give: infinity here.
    table = np.append(table, 2 * table[top - 1] - table[top - 2])
    size = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    up, down = table[above] - size, size - table[above - 1]
    even = np.where(above % 2 == 0, above, above - 1)
    nearest = np.where(up < down, above, np.where(down < up, above - 1, even))
    return (nearest | np.where(np.signbit(x), 0x8000, 0)).astype(np.uint16).view(DTYPES[dtype])


# On disk


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("shape", [(700, 5), (256, 1), (1, 640), (0, 5), (300,), (0,), (9, 2, 3)])
def test_what_is_written_is_read(
    file: h5py.File, dtype: str, compression: precision.Compression, shape: tuple[int, ...]
) -> None:
    x = random(shape, dtype)
    precision.write(file, "a/x", x, compression)
    dataset = file["a/x"]
    found = precision.read(dataset)
    assert found.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(bits(found), bits(x))
    assert stored_type(dataset) == dtype
    assert dataset.shape == shape
    if compression != "none" and x.size:
        assert dataset.compression == compression


@pytest.mark.parametrize("dtype", NARROW)
def test_every_bit_pattern_comes_back(file: h5py.File, dtype: str) -> None:
    """NaNs with their payload, both zeros, subnormal numbers."""
    x = every_value(dtype)
    precision.write(file, "x", x)
    np.testing.assert_array_equal(bits(precision.read(file["x"])), bits(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_part_is_the_part_of_the_whole(
    file: h5py.File, dtype: str, compression: precision.Compression
) -> None:
    x = random((700, 3), dtype)
    precision.write(file, "x", x, compression)
    for start, stop in [
        (0, 1), (0, 256), (255, 257), (699, 700), (600, 900), (700, 900), (5, 5), (0, None),
        (256, None), (700, None), (5, 3), (800, 900), (800, None),
    ]:  # fmt: skip
        found = precision.read(file["x"], start, stop)
        assert found.shape == x[start:stop].shape
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(bits(found), bits(x[start:stop]))


def test_columns_keep_their_type(file: h5py.File) -> None:
    column = np.arange(-3, 700, dtype=np.int32)
    precision.write(file, "token", column)
    found = precision.read(file["token"], 2, 600)
    assert found.dtype == np.int32
    assert stored_type(file["token"]) == "int32"
    np.testing.assert_array_equal(found, column[2:600])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_need_not_lie_one_after_another(file: h5py.File, dtype: str) -> None:
    x = random((40, 30), dtype)
    for index, view in enumerate((x[::3], x[:, ::2], x.T, x[::-1])):
        precision.write(file, f"{index}", view)
        np.testing.assert_array_equal(bits(precision.read(file[f"{index}"])), bits(view))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_h5py_reads_the_values(tmp_path: Path, dtype: str) -> None:
    """Of a file that is closed and opened again, whole and in part."""
    x = every_value(dtype) if dtype in NARROW else random((700, 3), dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        precision.write(file, "x", x)
    with h5py.File(tmp_path / "x.h5", "r") as file:
        plain, part = file["x"][:], file["x"][5:70]
    assert plain.dtype == (np.float32 if dtype == "bfloat16" else x.dtype)
    np.testing.assert_array_equal(plain, x.astype(plain.dtype))  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(plain), np.signbit(x))
    np.testing.assert_array_equal(part, plain[5:70])


def test_what_plain_h5py_writes_as_bfloat16_is_read(file: h5py.File) -> None:
    """HDF5's own conversion from float32 and our reader agree on what the bits mean."""
    x = random((50, 4), "bfloat16")
    precision.write(file, "ours", x)
    file.create_dataset("theirs", x.shape, file["ours"].id.get_type())
    file["theirs"][...] = x.astype(np.float32)
    assert stored_type(file["theirs"]) == "bfloat16"
    np.testing.assert_array_equal(bits(precision.read(file["theirs"])), bits(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hdf5_knows_the_fields_of_the_type(file: h5py.File, dtype: str) -> None:
    precision.write(file, "x", random((2, 2), dtype))
    kind = file["x"].id.get_type()
    _, exponent, mantissa = FIELDS[dtype]
    assert kind.get_size() == DTYPES[dtype].itemsize
    assert kind.get_fields() == (exponent + mantissa, mantissa, exponent, 0, mantissa)
    assert kind.get_ebias() == 2 ** (exponent - 1) - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_takes_its_bytes_and_no_more(tmp_path: Path, dtype: str) -> None:
    x = random((1000, 64), dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        precision.write(file, "x", x)
    assert 0 <= (tmp_path / "x.h5").stat().st_size - x.nbytes < 8192


# Not finite


@pytest.mark.parametrize("dtype", NARROW)
def test_not_finite_is_right_for_every_number(dtype: str) -> None:
    x = every_value(dtype)
    bad = not_finite(x)
    np.testing.assert_array_equal(bad, ~np.isfinite(x[:, 0].astype(np.float32)))
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
        np.testing.assert_array_equal(bad, ~np.isfinite(x[:, 0]))
    exponent, mantissa = FIELDS[dtype][1:]
    assert bad.sum() == 2 * 2**mantissa  # both signs
    assert exponent + mantissa == 15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_finds_it_anywhere(dtype: str, value: float) -> None:
    clean = random((6, 5), dtype)
    assert not not_finite(clean).any()
    for row in range(6):
        for column in range(5):
            x = clean.copy()
            x[row, column] = value
            np.testing.assert_array_equal(not_finite(x), np.arange(6) == row)
            np.testing.assert_array_equal(not_finite(x[::-1]), np.arange(6)[::-1] == row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_names_each_row(dtype: str) -> None:
    """Also where infinities of both signs cancel each other."""
    x = random((9, 4), dtype)
    x[2, 0], x[2, 3], x[5, 1], x[8, 0] = np.inf, -np.inf, np.nan, -np.inf
    np.testing.assert_array_equal(np.flatnonzero(not_finite(x)), [2, 5, 8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_greatest_numbers_are_finite(dtype: str) -> None:
    """Though their sum may be more than the type holds."""
    limits = ml_dtypes.finfo(DTYPES[dtype])
    x = np.full((3, 50), limits.max, DTYPES[dtype])
    x[1] = limits.min
    x[2, ::2] = limits.smallest_subnormal
    np.testing.assert_array_equal(not_finite(x), [False] * 3)
    x[1, 49] = np.inf
    np.testing.assert_array_equal(not_finite(x), [False, True, False])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_are_finite(dtype: str) -> None:
    assert not_finite(np.empty((0, 4), DTYPES[dtype])).tolist() == []


def test_random_bits_of_float32() -> None:
    x = np.random.default_rng(1).integers(0, 2**32, (4000, 20), np.uint32).view(np.float32)
    expected = ~np.isfinite(x).all(axis=1)
    assert 0 < expected.sum() < 4000
    np.testing.assert_array_equal(not_finite(x), expected)


# Rounding


def midpoints(dtype: str) -> np.ndarray:
    """Float32 halfway between neighbours of a 16-bit type, just beside it, and random ones."""
    top = 0x7F7F if dtype == "bfloat16" else 0x7BFF
    below = np.arange(top, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float64)
    above = np.arange(1, top + 1, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float64)
    with np.errstate(under="ignore"):
        middle = ((below + above) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(to)) for to in (0, np.inf)]
    scattered = np.random.default_rng(2).uniform(0, 2, 5000) * 2.0 ** np.arange(-20, 15, 0.007)
    x = np.concatenate([middle, *beside, scattered.astype(np.float32)])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("dtype", NARROW)
def test_conversion_rounds_to_the_nearest_and_ties_to_even(dtype: str) -> None:
    x = midpoints(dtype)
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(bits(x.astype(DTYPES[dtype])), bits(exactly_rounded(x, dtype)))


@pytest.mark.parametrize("dtype", NARROW)
def test_too_great_a_number_is_seen_after_the_conversion(dtype: str) -> None:
    """From half a step above the greatest number on, it is infinity; up to there, the greatest."""
    limits = ml_dtypes.finfo(DTYPES[dtype])
    greatest, mantissa = float(limits.max), FIELDS[dtype][2]
    half_step = 2.0 ** (np.floor(np.log2(greatest)) - mantissa - 1)
    edge = np.float32(greatest + half_step)
    x = np.array([[greatest], [np.nextafter(edge, np.float32(0))], [edge], [-edge]], np.float32)
    with np.errstate(over="ignore"):
        stored = x.astype(DTYPES[dtype])
    np.testing.assert_array_equal(not_finite(stored), [False, False, True, True])
    np.testing.assert_array_equal(stored[:2].astype(np.float32), np.float32(greatest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_loses_nothing(dtype: str) -> None:
    x = every_value(dtype)[:, 0] if dtype in NARROW else random((999,), dtype)
    wide = x.astype(np.float32)
    finite = np.isfinite(wide)
    np.testing.assert_array_equal(bits(wide[finite].astype(x.dtype)), bits(x[finite]))


# Too small


@pytest.mark.parametrize("dtype", DTYPES)
def test_too_small_is_of_float16_alone(dtype: precision.Precision) -> None:
    normal = np.float32(2.0**-14)  # the smallest of float16 that has all its bits
    below = np.nextafter(normal, np.float32(0))
    x = np.array(
        [[0, 0], [below, 0], [0, -below], [normal, below], [-normal, 0], [1e-30, -1e-38], [1, 0]],
        np.float32,
    )
    expected = [False, True, True, False, False, True, False]
    assert too_small(x, dtype).tolist() == (expected if dtype == "float16" else [False] * 7)


def test_rows_that_are_not_too_small_keep_their_precision() -> None:
    """What `too_small` lets pass holds its greatest entry to 2^-11; what it names may lose all."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((4000, 3)) * 10.0 ** rng.uniform(-9, 2, (4000, 1))).astype(np.float32)
    named = too_small(x, "float16")
    assert 0 < named.sum() < 4000
    with np.errstate(under="ignore"):
        error = np.abs(x.astype(np.float16).astype(np.float32) - x).max(axis=1)
    relative = error / np.abs(x).max(axis=1)
    assert relative[~named].max() <= 2.0**-11
    assert relative[named].max() > 0.9
