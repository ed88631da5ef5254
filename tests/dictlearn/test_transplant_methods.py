"""Laws of the methods that make up rows, on problems whose answer is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.stats

from activations.terminal import UserError
from dictlearn.transplant.methods.landmarks import Landmarks
from dictlearn.transplant.methods.neighbours import Neighbours
from dictlearn.transplant.methods.omp import OMPMixing
from dictlearn.transplant.methods.plain import Mean, Random, Zero
from dictlearn.transplant.methods.subwords import Subwords
from dictlearn.transplant.problem import Problem

ANCHORS, NEW, E = 80, 12, 32  # E: the base's width
K = 5
ORDERS = [{}, {"normalised": True}, {"centre": True}, {"whiten": True}]
METHODS = [
    OMPMixing(k=K),
    OMPMixing(k=K, centre=True, whiten=True),
    Zero(),
    Mean(),
    Random(),
    Subwords(),
    Neighbours(),
    Neighbours(by="cosine"),
    Landmarks(),
]
# Whose rows are mixtures of the base's, with weights that do not depend on its space.
MIXING = [method for method in METHODS if not isinstance(method, (Random, Landmarks))]
Orders = dict[str, bool]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def rotation(size: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(normal(size, size, seed=seed))[0]


def problem(donor: np.ndarray, base: np.ndarray, targets: np.ndarray, **others: Any) -> Problem:
    """Anchors in the base's matrix lie backwards, behind three rows that are none."""
    rows = np.concatenate([normal(3, base.shape[1], seed=9), base[::-1]])
    bytes_ = [f"n{i}".encode() for i in range(len(targets))]
    given = {
        "anchor_bytes": [f"a{i}".encode() for i in range(len(donor))],
        "new_bytes": bytes_,
        "split": lambda text: [],
        "pieces": lambda text: [],
    }
    return Problem(
        donor=donor,
        base=rows,
        places=np.arange(len(rows) - 1, 2, -1),
        targets=targets,
        **given | others,
    )


def mixture(sparse: int = K, zero_sum: bool = False) -> np.ndarray:
    """Weights [n a] of `sparse` anchors each, none of them small."""
    rng = np.random.default_rng(2)
    weights = np.zeros((NEW, ANCHORS), np.float32)
    for row in weights:
        chosen = rng.choice(ANCHORS, sparse, replace=False)
        row[chosen] = rng.uniform(1, 2, sparse) * rng.choice([-1, 1], sparse)
        if zero_sum:
            row[chosen] -= row[chosen].sum() / sparse
    return weights


def planted(zero_sum: bool = False) -> tuple[Problem, np.ndarray]:
    """Donor = base @ an invertible map; new tokens are sparse combinations. And their rows."""
    base = np.linalg.qr(normal(ANCHORS, E, seed=3).T)[0] @ normal(E, ANCHORS, seed=4)
    base = (base.T / np.linalg.norm(base.T, axis=1, keepdims=True)).astype(np.float32)
    to_donor = rotation(E, seed=5) @ np.diag(np.linspace(0.8, 1.25, E, dtype=np.float32))
    weights = mixture(3, zero_sum)
    donor = base @ to_donor
    return problem(donor, base, weights @ donor), weights @ base


@pytest.mark.parametrize("orders", [{}, {"normalised": True}, {"whiten": True}])
def test_omp_finds_a_planted_combination(orders: Orders) -> None:
    """5 of 80 anchors in 80 dimensions: any pursuit finds them."""
    base = rotation(ANCHORS)
    weights = mixture()
    to_donor = rotation(ANCHORS, seed=6) @ np.diag(np.linspace(0.9, 1.1, ANCHORS))
    donor = (base @ to_donor).astype(np.float32)
    given = problem(donor, base, weights @ donor)
    codes = OMPMixing(k=K, **orders).codes(given)
    np.testing.assert_allclose(codes.dense(), weights, atol=1e-5)
    np.testing.assert_allclose(OMPMixing(k=K, **orders).rows(given, 0), weights @ base, atol=1e-5)


def test_omp_finds_a_planted_combination_of_more_anchors_than_dimensions() -> None:
    given, expected = planted()
    made = OMPMixing(k=20, whiten=True).rows(given, 0)
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("orders", ORDERS)
def test_omp_does_not_mind_the_scale_of_either_space(orders: Orders) -> None:
    given, _ = planted()
    method = OMPMixing(k=K, **orders)
    made = method.rows(given, 0)
    donor = dataclasses.replace(given, donor=given.donor * 64, targets=given.targets * 64)
    np.testing.assert_allclose(method.rows(donor, 0), made, atol=1e-5)
    base = dataclasses.replace(given, base=given.base * 64)
    np.testing.assert_allclose(method.rows(base, 0), made * 64, atol=1e-3)
    small = dataclasses.replace(given, donor=given.donor / 4096, targets=given.targets / 4096)
    np.testing.assert_allclose(method.rows(small, 0), made, atol=1e-5)


@pytest.mark.parametrize("orders", ORDERS)
def test_omp_does_not_mind_a_translation_if_it_centres(orders: Orders) -> None:
    given, _ = planted(zero_sum=True)
    shift, move = 2 * normal(E, seed=7), 2 * normal(E, seed=8)
    there = dataclasses.replace(
        given, donor=given.donor + shift, targets=given.targets + shift, base=given.base + move
    )
    method = OMPMixing(k=K, **orders | {"centre": True})
    np.testing.assert_allclose(method.rows(there, 0), method.rows(given, 0) + move, atol=1e-4)
    plain = OMPMixing(k=K, **orders | {"centre": False})
    assert np.abs(plain.rows(there, 0) - plain.rows(given, 0) - move).max() > 0.1


def test_omp_that_whitens_does_not_mind_an_invertible_map_of_the_donors_space() -> None:
    given, _ = planted()
    bend = rotation(E, seed=6) @ np.diag(np.geomspace(0.05, 20, E, dtype=np.float32))
    bent = dataclasses.replace(given, donor=given.donor @ bend, targets=given.targets @ bend)
    method = OMPMixing(k=K, whiten=True)
    np.testing.assert_allclose(method.rows(bent, 0), method.rows(given, 0), atol=1e-3)
    plain = OMPMixing(k=K)
    assert np.abs(plain.rows(bent, 0) - plain.rows(given, 0)).max() > 0.1


@pytest.mark.parametrize("orders", ORDERS)
def test_cut_codes_are_those_of_a_pursuit_with_smaller_k(orders: Orders) -> None:
    given = problem(normal(ANCHORS, 24, seed=3), normal(ANCHORS, E, seed=4), normal(NEW, 24))
    long, short = OMPMixing(k=9, **orders), OMPMixing(k=3, **orders)
    cut, fresh = short.cut(given, long.codes(given)), short.codes(given)
    np.testing.assert_array_equal(cut.indices, fresh.indices)
    np.testing.assert_allclose(cut.values, fresh.values, atol=1e-4)
    np.testing.assert_allclose(short.mix(given, cut), short.rows(given, 0), atol=1e-3)


def test_omp_is_least_squares_on_its_anchors() -> None:
    given = problem(normal(ANCHORS, 24, seed=3), normal(ANCHORS, E, seed=4), normal(NEW, 24))
    codes = OMPMixing(k=4).codes(given)
    for target, indices, values in zip(given.targets, codes.indices, codes.values, strict=True):
        expected = np.linalg.lstsq(given.donor[np.asarray(indices)].T, target)[0]
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_omp_with_more_than_all_anchors_is_told() -> None:
    given, _ = planted()
    OMPMixing(k=20).codes(given)
    with pytest.raises(UserError, match=r"method\.k: 81 is more than the 80 tokens"):
        OMPMixing(k=ANCHORS + 1).codes(given)


def test_zeros_and_means_are_that() -> None:
    given, _ = planted()
    assert not Zero().rows(given, 0).any()
    made = Mean().rows(given, 0)
    expected = given.base[3:].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(made, np.tile(expected, (NEW, 1)), atol=1e-6)


@pytest.mark.parametrize("anchors", [ANCHORS, 4])  # 4 anchors have a covariance of rank 3
def test_random_rows_have_the_anchors_mean_and_covariance_and_are_normal(anchors: int) -> None:
    base = normal(anchors, 6, seed=3) @ normal(6, 6, seed=4) + 3
    given = problem(normal(anchors, 5), base, np.zeros((40_000, 5), np.float32), new_bytes=[])
    made = Random().rows(given, 0)
    expected = np.cov(base.T, bias=True)
    size = expected.diagonal().max()
    np.testing.assert_allclose(made.mean(axis=0), base.mean(axis=0), atol=0.02 * size**0.5)
    np.testing.assert_allclose(np.cov(made.T), expected, atol=0.03 * size)
    one = (made[:, 0] - made[:, 0].mean()) / made[:, 0].std()
    assert scipy.stats.kstest(one, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(made[:-1, 0], made[1:, 0])[0, 1]) < 0.02


def test_random_rows_have_one_result_a_seed() -> None:
    given, _ = planted()
    np.testing.assert_array_equal(Random().rows(given, 3), Random().rows(given, 3))
    assert (Random().rows(given, 3) != Random().rows(given, 4)).any()


def test_neighbours_by_distance_are_weighted_by_its_inverse() -> None:
    donor = np.array([[0, 0], [3, 0], [0, 4], [50, 50]], np.float32)
    base = np.array([[1, 0], [0, 1], [1, 1], [9, 9]], np.float32)
    given = problem(donor, base, np.array([[0, 1], [3, 4]], np.float32))
    made = Neighbours(k=2).rows(given, 0)
    # (0, 1) is 1 from the first, 3 from the third; (3, 4) is 3 from the third, 4 from the second.
    expected = [(base[0] + base[2] / 3) / (1 + 1 / 3), (base[1] / 4 + base[2] / 3) / (7 / 12)]
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_neighbours_by_cosine_are_weighted_by_it() -> None:
    donor = np.array([[10, 0], [0, 0.1], [-1, 0], [0, -5]], np.float32)
    base = np.array([[1, 0], [0, 1], [7, 7], [8, 8]], np.float32)
    given = problem(donor, base, np.array([[3, 4], [-2, 0], [0, 0]], np.float32))
    made = Neighbours(k=3, by="cosine").rows(given, 0)
    np.testing.assert_allclose(made[0], (0.6 * base[0] + 0.8 * base[1]) / 1.4, atol=1e-6)
    np.testing.assert_allclose(made[1], base[2], atol=1e-6)  # others have a cosine of 0 or less
    assert np.isfinite(made).all()


@pytest.mark.parametrize("by", ["distance", "cosine"])
def test_the_nearest_neighbour_of_an_anchor_is_itself(by: Any) -> None:
    donor, base = normal(ANCHORS, 8), normal(ANCHORS, E, seed=1)
    given = problem(donor, base, donor[:NEW])
    np.testing.assert_allclose(Neighbours(k=1, by=by).rows(given, 0), base[:NEW], atol=1e-6)
    if by == "distance":  # however many others there are, they weigh nothing at a distance of 0
        np.testing.assert_allclose(Neighbours(k=9).rows(given, 0), base[:NEW], atol=1e-6)


@pytest.mark.parametrize("by", ["distance", "cosine"])
def test_more_neighbours_than_anchors_are_all_of_them(by: Any) -> None:
    given = problem(normal(4, 8), normal(4, E), np.abs(normal(NEW, 8)))
    np.testing.assert_array_equal(
        Neighbours(k=4, by=by).rows(given, 0), Neighbours(k=9, by=by).rows(given, 0)
    )


def test_landmarks_are_exact_where_spaces_differ_by_a_rotation_a_scale_and_a_shift() -> None:
    donor = normal(ANCHORS + NEW, E) @ np.diag(np.linspace(0.5, 2, E, dtype=np.float32)) + 1
    base = 3 * donor @ rotation(E) - 2
    made = Landmarks().rows(problem(donor[NEW:], base[NEW:], donor[:NEW]), 0)
    np.testing.assert_allclose(made, base[:NEW], atol=1e-3)


@pytest.mark.parametrize("wide", [E + 9, E - 9])
def test_landmarks_are_exact_between_widths_if_the_wider_space_has_no_more_directions(
    wide: int,
) -> None:
    inner = min(wide, E)
    hidden = normal(ANCHORS + NEW, inner) @ np.diag(np.geomspace(1, 4, inner, dtype=np.float32))
    donor = hidden @ rotation(wide, seed=3)[:inner] + normal(wide, seed=4)
    base = 0.5 * hidden @ rotation(E, seed=5)[:inner] + normal(E, seed=6)
    made = Landmarks().rows(problem(donor[NEW:], base[NEW:], donor[:NEW]), 0)
    np.testing.assert_allclose(made, base[:NEW], atol=1e-3)


def test_a_subword_mean_is_that_of_the_bases_own_tokens() -> None:
    given, _ = planted()
    pieces = {" dog": [4], "dogs": [4, 7, 7], "": []}
    contents = [b" dog", b"dogs", b"", b"\xff", b"dogs\xe2\x82"]
    asked = []

    def split(text: str) -> list[int]:
        asked.append(text)
        return pieces[text]

    few = dataclasses.replace(given, targets=given.targets[:5], new_bytes=contents, split=split)
    made = Subwords().rows(few, 0)
    mean, dogs = given.anchors.mean(axis=0), (given.base[4] + 2 * given.base[7]) / 3
    np.testing.assert_allclose(made, [given.base[4], dogs, mean, mean, dogs], atol=1e-6)
    assert asked == [" dog", "dogs", "", "", "dogs"]


def repeated(given: Problem) -> Problem:
    """Every anchor twice."""
    return dataclasses.replace(
        given,
        donor=np.concatenate([given.donor, given.donor]),
        places=np.concatenate([given.places, given.places]),
        anchor_bytes=given.anchor_bytes * 2,
    )


def degenerate(name: str) -> Problem:
    given, _ = planted()
    zeros = np.zeros_like(given.targets)
    return {
        "no new tokens": lambda: dataclasses.replace(given, targets=zeros[:0], new_bytes=[]),
        "new tokens of zeros": lambda: dataclasses.replace(given, targets=zeros),
        "anchors twice": lambda: repeated(given),
        "anchors of zeros": lambda: dataclasses.replace(given, donor=np.zeros_like(given.donor)),
        "one anchor many times": lambda: dataclasses.replace(
            given,
            donor=np.tile(given.donor[:1], (ANCHORS, 1)),
            places=np.full(ANCHORS, given.places[0]),
        ),
    }[name]()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "no new tokens",
        "new tokens of zeros",
        "anchors twice",
        "anchors of zeros",
        "one anchor many times",
    ],
)
def test_every_method_gives_finite_float32_rows_for_odd_problems(name: str, method: Any) -> None:
    given = degenerate(name)
    made = method.rows(given, 0)
    assert made.shape == (len(given.targets), E)
    assert made.dtype == np.float32
    assert np.isfinite(made).all()
    assert np.abs(made).max(initial=0) < 100


@pytest.mark.parametrize("orders", ORDERS)
def test_omp_of_zeros_is_the_origin(orders: Orders) -> None:
    given, _ = planted()
    origin = given.donor.mean(axis=0) if orders.get("centre") else np.zeros(E, np.float32)
    given = dataclasses.replace(given, targets=np.tile(origin, (NEW, 1)))
    expected = given.anchors.mean(axis=0) if orders.get("centre") else np.zeros(E)
    made = OMPMixing(k=K, **orders).rows(given, 0)
    np.testing.assert_allclose(made, np.tile(expected, (NEW, 1)), atol=1e-4)


@pytest.mark.parametrize("method", [OMPMixing(k=K), OMPMixing(k=K, centre=True), Landmarks()])
def test_anchors_twice_make_the_same_rows(method: Any) -> None:
    given, _ = planted()
    np.testing.assert_allclose(method.rows(repeated(given), 0), method.rows(given, 0), atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_rows_do_not_depend_on_the_order_of_anchors(method: Any) -> None:
    given, _ = planted()
    order = np.random.default_rng(0).permutation(ANCHORS)
    other = dataclasses.replace(
        given,
        donor=given.donor[order],
        places=given.places[order],
        anchor_bytes=[given.anchor_bytes[i] for i in order],
    )
    if isinstance(method, Random):  # drawn: of the same distribution
        first, second = np.linalg.qr(given.anchors)[1], np.linalg.qr(other.anchors)[1]
        np.testing.assert_allclose(first.T @ first, second.T @ second, atol=1e-4)
        return
    np.testing.assert_allclose(method.rows(other, 0), method.rows(given, 0), atol=1e-4)


@pytest.mark.parametrize("method", MIXING, ids=str)
def test_two_matrices_side_by_side_are_made_up_as_each_of_them(method: Any) -> None:
    """As embedding and head are, where the donor has one matrix for both."""
    given, _ = planted()
    head = normal(*given.base.shape, seed=11)
    both = dataclasses.replace(given, base=np.concatenate([given.base, head], axis=1))
    made = method.rows(both, 0)
    np.testing.assert_allclose(made[:, :E], method.rows(given, 0), atol=1e-5)
    other = method.rows(dataclasses.replace(given, base=head), 0)
    np.testing.assert_allclose(made[:, E:], other, atol=1e-4)
