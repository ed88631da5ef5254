"""Rows that lie where those of tokens lie that no text holds."""

from pathlib import Path

import numpy as np
import pytest

from dictlearn.transplant.undertrained import never_seen
from dictlearn.transplant.vocabulary import Vocabulary


def vocabulary(*tokens: bytes) -> Vocabulary:
    return Vocabulary(Path(), "byte-level", dict(enumerate(tokens)), {}, frozenset(), {})


WORDS = [f"word{i}".encode() for i in range(40)]
EVERY = np.arange(46)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((46, 16)).astype(np.float32)


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("padded", [True, False])
def test_rows_beside_those_of_impossible_bytes_or_padding_are_found(
    rows: np.ndarray, limit: float, *, padded: bool
) -> None:
    """Tokens 40 and 41 stand for bytes that UTF-8 does not use, or are not there at all."""
    tokens = [*WORDS, b"a", b"b"] if padded else [*WORDS, b"\xc0", b"\xff", *map(bytes, [[97]] * 4)]
    mean = rows[:40].mean(axis=0)
    rows[40:] = mean + 5 * np.eye(16, dtype=np.float32)[0]
    rows[[3, 8]] = rows[40] + 0.01
    found = never_seen(rows, EVERY, vocabulary(*tokens), limit)
    asked = np.array([42, 0, 3])
    np.testing.assert_array_equal(never_seen(rows, asked, vocabulary(*tokens), limit), found[asked])
    assert found[[3, 8, 42, 45]].all()
    centred = rows - rows.mean(axis=0)
    reference = centred[42:].mean(axis=0)
    cosine = centred @ reference / np.linalg.norm(centred, axis=1) / np.linalg.norm(reference)
    assert not found[cosine < limit - 0.05].any()
    assert (~found).sum() > 30


def test_a_limit_of_one_and_a_vocabulary_without_such_tokens_keep_all(rows: np.ndarray) -> None:
    tokens = [*WORDS, b"\xc0", b"\xc1", b"\xf5", b"\xff", b"x", b"y"]
    assert never_seen(rows, EVERY, vocabulary(*tokens), 0.5).any()
    assert not never_seen(rows, EVERY, vocabulary(*tokens), 1.0).any()
    assert not never_seen(rows[:40], EVERY[:40], vocabulary(*WORDS), 0.01).any()


def test_longer_tokens_with_such_bytes_are_no_reference(rows: np.ndarray) -> None:
    """A token may begin or end inside of a letter."""
    tokens = [*WORDS, b"\xc0a", b"\xff\xff", b"\xe2\x80", b"\xc2", b"x", b"y"]
    assert not never_seen(rows, EVERY, vocabulary(*tokens), 0.01).any()
