"""Matching pursuit over weights as they are: against a plain loop over rows, and its laws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dictlearn.dictionary import Dictionary
from dictlearn.encoders.mp import MP
from dictlearn.encoders.mp_sae import _TILE, MPSAE

M, D = 40, 12


def weights(*, low: float = 0.6, high: float = 1.2) -> np.ndarray:
    """Rows [m d] of many norms."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((M, D))
    norms = rng.uniform(low, high, (M, 1))
    return norms * rows / np.linalg.norm(rows, axis=1, keepdims=True)


def some_rows(n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, D))


def plain(
    x: np.ndarray, weight: np.ndarray, rounds: int, threshold: float, stop_on_repeat: bool
) -> np.ndarray:
    """One row without a bias, as the docstring of MPSAE says."""
    z, residual = np.zeros(len(weight)), x.copy()
    for _ in range(rounds):
        inner = weight @ residual
        j = int(np.argmax(inner))
        step = max(inner[j], 0.0)
        repeated = z[j] != 0 or step == 0
        z[j] += step
        residual = residual - step * weight[j]
        if (stop_on_repeat and repeated) or np.linalg.norm(residual) < threshold:
            break
    return z


def encode(encoder: MPSAE, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    dictionary = Dictionary(encoder.weight, jnp.asarray(bias))
    codes = encoder.prepare(dictionary).encode(jnp.asarray(x))
    assert codes.values.dtype == x.dtype
    for row, values in zip(np.asarray(codes.indices), np.asarray(codes.values), strict=True):
        assert len(set(row[values != 0])) == (values != 0).sum()
    return np.asarray(codes.dense())


@pytest.mark.parametrize("stop_on_repeat", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("rounds", [1, 6, 3 * M])
def test_codes_are_those_of_the_loop(rounds: int, threshold: float, stop_on_repeat: bool) -> None:
    weight, x, bias = weights(), some_rows(_TILE + 9), np.linspace(-2, 2, D)
    expected = np.array([plain(row, weight, rounds, threshold, stop_on_repeat) for row in x])
    with jax.enable_x64(True):
        encoder = MPSAE(jnp.asarray(weight), rounds, threshold, stop_on_repeat)
        found = encode(encoder, x + bias, bias)
    np.testing.assert_array_equal(found != 0, expected != 0)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    most = (expected != 0).sum(axis=1).max()
    assert most == 1 if rounds == 1 or threshold == 100 else most > 3


def test_every_rule_for_stopping_ends_some_rows() -> None:
    """What the loop's cases are there for: each changes codes."""
    weight, x = weights(), some_rows(50)
    rules = [(60, 0, False), (6, 0, False), (60, 0.5, False), (60, 0, True)]
    free, *ended = (np.array([plain(row, weight, *rule) for row in x]) for rule in rules)
    assert all(np.abs(codes - free).max() > 1e-3 for codes in ended)


def test_unit_atoms_and_their_negatives_are_signed_matching_pursuit() -> None:
    """As long as no atom is taken again, where MP goes on to its k-th nonzero."""
    unit = weights(low=1, high=1)
    with jax.enable_x64(True):
        encoder = MPSAE(jnp.asarray(np.concatenate([unit, -unit])), 3, 0.0, False)
        found = encode(encoder, some_rows(60), np.zeros(D))
        dictionary = Dictionary(jnp.asarray(unit), jnp.zeros(D))
        signed = MP(k=3).prepare(dictionary).encode(jnp.asarray(some_rows(60))).dense()
    same = (found != 0).sum(axis=1) == 3
    assert same.sum() > 40
    np.testing.assert_allclose((found[:, :M] - found[:, M:])[same], signed[same], atol=1e-9)


def test_a_row_that_nothing_points_at_has_zero_codes() -> None:
    weight = np.eye(D, dtype=np.float32)[:4]
    x = np.stack([-np.ones(D), np.zeros(D), np.eye(D)[2]]).astype(np.float32)
    found = encode(MPSAE(jnp.asarray(weight), 5, 0.0, False), x, np.zeros(D, np.float32))
    np.testing.assert_array_equal(found, [[0] * 4, [0] * 4, [0, 0, 1, 0]])


def test_long_atoms_count_twice() -> None:
    """Chosen before a shorter one that fits better, and stepped too far: z = <x, w>."""
    weight = np.array([[1, 0], [1.2, 0.9]], np.float32)
    x = np.array([[1, 0]], np.float32)
    found = encode(MPSAE(jnp.asarray(weight), 1, 0.0, False), x, np.zeros(2, np.float32))
    np.testing.assert_allclose(found, [[0, 1.2]])
