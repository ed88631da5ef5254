"""Intervals over seeds and documents, and the smallest difference that seeds detect."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from experiments.compare.results import Figure, difference, mean


def of_documents(values: np.ndarray, documents: np.ndarray) -> Figure:
    return Figure(float(values.mean()), documents, lambda w: (w @ values) / w.sum(axis=1))


def test_an_interval_is_students_where_there_are_no_documents() -> None:
    values = np.array([0.3, 0.5, 0.4, 0.6, 0.1])
    found = mean({seed: Figure(value) for seed, value in enumerate(values)})
    low, high = scipy.stats.t.interval(0.95, 4, values.mean(), scipy.stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    power = scipy.stats.nct.cdf  # what `least` promises, by the noncentral t distribution
    shift = found.least / (values.std(ddof=1) / math.sqrt(5))
    edge = scipy.stats.t.ppf(0.975, 4)
    assert 1 - power(edge, 4, shift) == pytest.approx(0.8, abs=0.05)


def test_differences_are_paired_by_seed_and_document() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 40)  # documents differ far more than dictionaries
    one, other = {}, {}
    for seed in range(5):
        documents = np.sort(rng.permutation(40)[:25])
        one[seed] = of_documents(hard[documents] + 1 + rng.normal(0, 0.1, 25), documents)
        other[seed] = of_documents(hard[documents], documents)
    apart = difference(one, other | {7: other[0]})
    assert apart.n == 5
    assert apart.told_apart
    assert 0.9 < apart.low < 1 < apart.high < 1.1
    assert mean(one).high - mean(one).low > 1


def test_seeds_on_the_same_documents_do_not_narrow_the_interval() -> None:
    documents = np.arange(10)
    values = np.random.default_rng(1).normal(0, 1, 10)
    single = mean({0: of_documents(values, documents)})
    many = mean({seed: of_documents(values, documents) for seed in range(50)})
    assert many.high - many.low == pytest.approx(single.high - single.low, rel=0.02)
    assert single.high - single.low == pytest.approx(2 * 1.96 * values.std() / 10**0.5, rel=0.1)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        own = {
            seed: of_documents(rng.normal(0, 1, 30), np.arange(30)) for seed in range(5)
        }  # fmt: skip
        found = mean(own)
        held += found.low <= 0 <= found.high
    assert held >= 186  # 95 % of 200 less two deviations; it is the wider of two
