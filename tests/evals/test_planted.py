"""Planted truth: the laws that the rows promise, and scores whose value is known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from activations.config import validate
from activations.store import StoreError
from activations.terminal import UserError
from dictlearn import metrics
from dictlearn.codes import SparseCodes
from dictlearn.data import Rows, split_by_document
from dictlearn.dictionary import Coder, Dictionary
from dictlearn.encoders.base import AbstractEncoder, AbstractPrepared
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.sae import SAE
from dictlearn.solvers.sae_variants import GradientTopK
from evals.planted import (
    BLOCK,
    HOOK,
    PlantedConfig,
    Sample,
    Truth,
    loss,
    plant,
    rows,
    store,
)
from evals.recovery import match, oracle, plain_coder, score

N = 20_000
CONFIG = PlantedConfig(
    width=32, n_features=200, mean_active=5.0, zipf=0.8, most_common=0.2, grouped=0.32,
    group_size=4, children=0.3, signed=0.2, noise=0.05, carrier=0.5, massive=0.01, seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def truth() -> Truth:
    return plant(CONFIG)


@pytest.fixture(scope="module")
def sample(truth: Truth) -> Sample:
    return rows(truth, N)


@pytest.fixture(scope="module")
def fires(sample: Sample) -> np.ndarray:
    return sample.codes.toarray() != 0


# The law of the rows.


def test_the_features_are_what_the_config_asks_for(truth: Truth) -> None:
    np.testing.assert_allclose(np.linalg.norm(truth.directions, axis=1), 1, rtol=1e-5)
    assert truth.rate.sum() == pytest.approx(CONFIG.mean_active, rel=1e-9)
    assert truth.rate.max() <= CONFIG.most_common
    tail = truth.rate[truth.rate < CONFIG.most_common]
    rank = np.arange(200 - len(tail), 200) + 1.0
    np.testing.assert_allclose(np.diff(np.log(tail)) / np.diff(np.log(rank)), -CONFIG.zipf)
    assert (truth.parent >= 0).sum() == 60
    assert truth.signed.sum() == 40
    np.testing.assert_array_equal(np.bincount(truth.group[truth.group >= 0]), [4] * 16)
    assert not ((truth.parent >= 0) & (truth.group >= 0)).any()
    parents = np.unique(truth.parent[truth.parent >= 0])
    assert (truth.parent[parents] < 0).all()
    assert (truth.group[parents] < 0).all()


def test_features_fire_as_often_as_their_probability(truth: Truth, fires: np.ndarray) -> None:
    deviation = np.sqrt(N * truth.rate * (1 - truth.rate))
    z = (fires.sum(axis=0) - N * truth.rate) / deviation
    assert np.abs(z).max() < 5
    assert 0.5 < (z**2).mean() < 1.6
    assert fires.sum() / N == pytest.approx(CONFIG.mean_active, rel=0.02)


def test_a_child_fires_only_where_its_parent_does(truth: Truth, fires: np.ndarray) -> None:
    child = np.flatnonzero(truth.parent >= 0)
    assert not (fires[:, child] & ~fires[:, truth.parent[child]]).any()
    # Not always, though: a child is a feature of its own.
    assert fires[:, child].sum() < 0.7 * fires[:, truth.parent[child]].sum()


def test_members_of_a_group_fire_together(truth: Truth, fires: np.ndarray) -> None:
    together = np.float64(fires.T) @ np.float64(fires) / N
    alone = np.outer(truth.rate, truth.rate)
    same = truth.group[:, None] == truth.group[None]
    inside = same & (truth.group >= 0) & ~np.eye(200, dtype=bool)
    group = truth.group[:, None] * np.ones(200, int)
    awake = np.array([truth.rate[truth.group == g].max() for g in range(16)]) / CONFIG.cofire
    assert together[inside].sum() > 3 * alone[inside].sum()
    expected = (alone[inside] / awake[group[inside]]).sum()
    assert together[inside].sum() == pytest.approx(expected, rel=0.05)
    outside = ~same & (truth.group[:, None] >= 0) & (truth.group[None] >= 0)
    assert together[outside].sum() == pytest.approx(alone[outside].sum(), rel=0.05)


def test_signed_features_take_both_signs_and_the_others_one(truth: Truth, sample: Sample) -> None:
    codes = sample.codes.toarray()
    assert (codes[:, ~truth.signed] >= 0).all()
    negative, fired = (codes < 0).sum(axis=0), (codes != 0).sum(axis=0)
    z = (negative - fired / 2)[truth.signed] / np.sqrt(fired[truth.signed] / 4)
    assert np.abs(z).max() < 4.5
    log = np.log(np.abs(sample.codes.data))
    assert log.std() == pytest.approx(CONFIG.magnitude_sigma, rel=0.02)
    assert np.mean(sample.codes.data**2) == pytest.approx(1, rel=0.03)


def test_rows_are_codes_times_features_and_nothing_else() -> None:
    bare = plant(dataclasses.replace(CONFIG, noise=0.0, carrier=0.0, massive=0.0))
    got = rows(bare, 500)
    assert got.x.dtype == np.float32
    np.testing.assert_allclose(got.x, got.codes.toarray() @ bare.directions, atol=2e-6)
    assert bare.background.shape == (0, CONFIG.width)


def test_noise_and_carrier_have_the_variance_they_should(truth: Truth, sample: Sample) -> None:
    usual = ~sample.massive
    signal = sample.codes.toarray() @ np.float64(truth.directions)
    rest = (sample.x - signal)[usual]
    elsewhere = np.arange(CONFIG.width) != truth.carrier
    np.testing.assert_allclose(rest[:, elsewhere].std(axis=0), truth.noise_std, rtol=0.03)
    noise = CONFIG.width * truth.noise_std**2
    assert noise == pytest.approx(CONFIG.noise * signal.var(axis=0).sum(), rel=0.02)
    both = truth.carrier_std**2 + truth.noise_std**2
    assert rest[:, truth.carrier].var() == pytest.approx(both, rel=0.03)
    variance = sample.x[usual].var(axis=0, dtype=np.float64)
    assert variance[truth.carrier] / variance.sum() == pytest.approx(CONFIG.carrier, rel=0.03)


def test_massive_rows_add_one_direction(truth: Truth, sample: Sample) -> None:
    expected, deviation = N * CONFIG.massive, math.sqrt(N * CONFIG.massive)
    assert abs(sample.massive.sum() - expected) < 5 * deviation
    norm = np.linalg.norm(sample.x.astype(np.float64), axis=1)
    usual = math.sqrt((norm[~sample.massive] ** 2).mean())
    assert np.median(norm[sample.massive]) == pytest.approx(50 * usual, rel=0.05)
    unit = sample.x[sample.massive] / norm[sample.massive, None]
    assert (unit @ truth.background[1]).min() > 0.95
    axis = np.eye(CONFIG.width)[truth.carrier]
    np.testing.assert_array_equal(truth.background[0], axis)


@pytest.mark.parametrize("n_features", [2, 40, 1000])
def test_no_shares_and_few_features_work_too(n_features: int) -> None:
    config = PlantedConfig(
        width=4, n_features=n_features, mean_active=0.5, zipf=0.0, most_common=0.6,
        grouped=0.0, children=0.0, signed=0.0, magnitude_sigma=0.0,
    )  # fmt: skip
    got = rows(plant(config), 2000)
    np.testing.assert_allclose(got.codes.data, 1)
    assert got.codes.nnz == pytest.approx(1000, rel=0.2)


# The same rows, whatever they are asked for in.


def test_rows_do_not_depend_on_the_range_they_are_asked_in(truth: Truth) -> None:
    whole = rows(plant(CONFIG), 3 * BLOCK + 7)
    for first, stop in ((0, 1), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (5, 3 * BLOCK + 7)):
        part = rows(truth, stop - first, first=first)
        np.testing.assert_array_equal(part.x, whole.x[first:stop])
        np.testing.assert_array_equal(part.codes.toarray(), whole.codes.toarray()[first:stop])
        np.testing.assert_array_equal(part.massive, whole.massive[first:stop])


def test_another_seed_is_another_truth_and_blocks_differ(truth: Truth) -> None:
    other = plant(dataclasses.replace(CONFIG, seed=4))
    assert np.abs((truth.directions * other.directions).sum(axis=1)).mean() < 0.3
    # NumPy makes the same stream of 3 and of [3]: atoms drawn from the same seed are no features.
    drawn = np.random.default_rng(CONFIG.seed).standard_normal(truth.directions.shape, np.float32)
    assert np.abs((truth.directions * _unit(drawn)).sum(axis=1)).mean() < 0.3
    got = rows(truth, 2 * BLOCK)
    assert not np.array_equal(got.x[:BLOCK], got.x[BLOCK:])


def test_the_store_holds_the_rows(truth: Truth, tmp_path: Path) -> None:
    n = 101 * BLOCK + 30  # two shards, and a last document that is short
    written = store(tmp_path / "store", truth, n)
    assert len(written) == n
    documents = np.arange(102)
    got = [(x, document) for x, document, _ in Rows(written, HOOK, documents).by_shard()]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in got]), rows(truth, n).x)
    document = np.concatenate([document for _, document in got])
    np.testing.assert_array_equal(document, np.arange(n) // BLOCK)
    parts = split_by_document(written, HOOK, validation=0.1, test=0.1, seed=0)
    assert sum(map(len, parts.values())) == n
    with pytest.raises(StoreError, match="holds a store already"):
        store(tmp_path / "store", truth, n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_active": 50.0}, "mean_active: is more than"),
        ({"zipf": 0.0}, "children: too few"),
        ({"grouped": 0.8}, "grouped: with children"),
        ({"cofire": 0.02}, "grouped: too few features"),
        ({"carrier": 0.01}, "carrier: every coordinate"),
    ],
)
def test_rules_that_join_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plant(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize("change", [{"width": 1}, {"signed": 1.5}, {"sinned": 0.1}, {"noise": "x"}])
def test_the_config_is_strict(change: dict[str, Any]) -> None:
    table = dataclasses.asdict(CONFIG)
    assert validate(PlantedConfig, table, "here") == CONFIG
    with pytest.raises(UserError, match=f"here:\n  {next(iter(change))}"):
        validate(PlantedConfig, table | change, "here")


# The match.


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_match_undoes_permutation_and_sign() -> None:
    rng = np.random.default_rng(0)
    directions = _unit(rng.standard_normal((50, 20)))
    order, sign = rng.permutation(50), rng.choice([-1, 1], 50)
    for exact in (0, 50):
        chosen, cosine = match(3 * sign[:, None] * directions[order], directions, exact=exact)
        np.testing.assert_array_equal(order[chosen], np.arange(50))
        np.testing.assert_allclose(cosine, sign[chosen], rtol=1e-6)


@pytest.mark.parametrize("m", [200, 300, 400])
def test_the_greedy_match_comes_near_the_best(m: int) -> None:
    rng = np.random.default_rng(m)
    directions = _unit(rng.standard_normal((300, 48)))
    atoms = rng.standard_normal((m, 48))
    best, greedy = (match(atoms, directions, exact=exact) for exact in (m + 300, 0))
    for chosen, _ in (best, greedy):
        found = chosen[chosen >= 0]
        assert len(found) == len(np.unique(found)) == min(m, 300)
    assert 0.95 < np.abs(greedy[1]).sum() / np.abs(best[1]).sum() <= 1 + 1e-9
    # Half of the features are there, more or less exactly: of these both find the same.
    known = m // 2
    atoms[:known] = directions[:known] + rng.uniform(0, 0.05, (known, 1)) * atoms[:known]
    best, greedy = (match(atoms, directions, exact=exact) for exact in (m + 300, 0))
    np.testing.assert_array_equal(greedy[0][:known], np.arange(known))
    np.testing.assert_array_equal(best[0][:known], np.arange(known))


# The score.


class Lookup(AbstractEncoder, AbstractPrepared):
    """Codes from a table of rows that it knows: an encoder without fault, or with a known one."""

    x: Array
    indices: Array
    values: Array
    n_atoms: int

    def prepare(self, dictionary: Dictionary) -> AbstractPrepared:
        del dictionary
        return self

    def encode(self, x: Array, *, gradient: Array | None = None) -> SparseCodes:
        del gradient
        row = jnp.argmax((x[:, None, :2] == self.x[None, :, :2]).all(axis=2), axis=1)
        return SparseCodes(self.indices[row], self.values[row], n_atoms=self.n_atoms)


def known_codes(sample: Sample, codes: np.ndarray) -> Lookup:
    order = np.argsort(-np.abs(codes), axis=1, kind="stable")[:, : max((codes != 0).sum(axis=1))]
    values = np.take_along_axis(codes, order, axis=1).astype(np.float32)
    x, indices, values = (jnp.asarray(a) for a in (sample.x, order, values))
    return Lookup(x, indices.astype(jnp.int32), values, codes.shape[1])


@pytest.fixture(scope="module")
def clean() -> Truth:
    return plant(dataclasses.replace(CONFIG, noise=0.0, carrier=0.0, massive=0.0))


@pytest.fixture(scope="module")
def held_out(clean: Truth) -> Sample:
    return rows(clean, 1500, first=N)


def perfect(truth: Truth, sample: Sample) -> Coder:
    return oracle(truth, known_codes(sample, sample.codes.toarray()))


@pytest.fixture(scope="module")
def ceiling(clean: Truth, held_out: Sample) -> dict[str, float]:
    return score(perfect(clean, held_out), clean, held_out)


def test_the_truth_scores_one(ceiling: dict[str, float], held_out: Sample) -> None:
    figures = dict(ceiling)
    fired = np.asarray((held_out.codes != 0).sum(axis=0))
    assert figures.pop("n_scored") == (fired >= 10).sum() > 100
    assert figures.pop("l0") == pytest.approx(held_out.codes.nnz / 1500)
    for name in ("fvu", "fvu_bulk", "junk", "duplicates"):
        assert figures.pop(name) == pytest.approx(0, abs=1e-9)
    assert figures == pytest.approx(dict.fromkeys(figures, 1.0))
    kinds = ("", "_signed", "_children", "_grouped", "_by_firing")
    assert {f"{name}{kind}" for name in ("precision", "recall", "f1") for kind in kinds} < set(
        figures
    )
    json.dumps(ceiling, allow_nan=False)


def test_order_size_and_sign_of_atoms_do_not_matter(
    clean: Truth, held_out: Sample, ceiling: dict[str, float]
) -> None:
    rng = np.random.default_rng(1)
    order, scale = rng.permutation(200), rng.uniform(0.5, 2, 200) * rng.choice([-1, 1], 200)
    codes = (held_out.codes.toarray() / scale)[:, order]
    atoms = (scale[:, None] * clean.directions)[order]
    got = score(plain_coder(atoms, known_codes(held_out, codes)), clean, held_out)
    assert got == pytest.approx(ceiling, abs=1e-6)
    greedy = score(plain_coder(atoms, known_codes(held_out, codes)), clean, held_out, exact=0)
    assert greedy == pytest.approx(ceiling, abs=1e-6)


def test_a_feature_found_twice_counts_once(clean: Truth, held_out: Sample) -> None:
    half = np.arange(0, 200, 2)
    atoms = np.concatenate([clean.directions[half], -clean.directions[half]])
    codes = held_out.codes.toarray()[:, half]
    codes = np.concatenate([np.maximum(codes, 0), np.maximum(-codes, 0)], axis=1)
    got = score(plain_coder(atoms, known_codes(held_out, codes)), clean, held_out)
    assert got["recovered_95"] == 0.5
    assert got["duplicates"] == 0.5
    assert got["junk"] == 0
    assert got["atom_cosine"] == pytest.approx(1)


def test_codes_of_the_wrong_sign_are_false_alarms(clean: Truth, held_out: Sample) -> None:
    codes = held_out.codes.toarray()
    positive = oracle(clean, known_codes(held_out, np.maximum(codes, 0)))
    got = score(positive, clean, held_out)  # one end of each antonym pair
    assert got["precision_signed"] == 1
    assert got["recall_signed"] == pytest.approx(0.5, abs=0.05)
    got = score(oracle(clean, known_codes(held_out, np.abs(codes))), clean, held_out)
    assert got["precision_signed"] == got["recall_signed"] == pytest.approx(0.5, abs=0.05)
    assert got["f1_signed"] == pytest.approx(got["recall_signed"])
    got = score(oracle(clean, known_codes(held_out, -codes)), clean, held_out)
    assert got["precision"] == got["recall"] == got["f1"] == 0
    assert got["recovered_95"] == 1


def test_false_alarms_lower_precision_and_misses_recall(clean: Truth, held_out: Sample) -> None:
    codes = held_out.codes.toarray()
    rng = np.random.default_rng(2)
    missing = np.where(rng.random(codes.shape) < 0.25, 0, codes)
    got = score(oracle(clean, known_codes(held_out, missing)), clean, held_out)
    assert got["precision"] == 1
    assert got["recall"] == pytest.approx(0.75, abs=0.02)
    assert got["f1"] == pytest.approx(1.5 / 1.75, abs=0.02)
    # One further code, of a feature that does not fire there, in every row that is not zero (the
    # table cannot tell zero rows from one another).
    fired = (codes != 0).sum(axis=0)
    extra = codes.copy()
    row = np.flatnonzero(codes.any(axis=1))
    free = np.argmin(np.where(codes != 0, np.inf, rng.random(codes.shape)), axis=1)[row]
    extra[row, free] = 1
    got = score(oracle(clean, known_codes(held_out, extra)), clean, held_out, min_firings=1)
    alarms = fired + np.bincount(free, minlength=200)
    assert got["recall"] == 1
    counted = fired > 0
    precision, rate = fired[counted] / alarms[counted], clean.rate[counted]
    assert got["precision"] == pytest.approx(precision.mean())
    assert got["precision_by_firing"] == pytest.approx((precision * rate).sum() / rate.sum())


def test_common_and_rare_features_are_told_apart(clean: Truth, held_out: Sample) -> None:
    atoms = clean.directions.copy()
    atoms[100:] = np.random.default_rng(5).standard_normal((100, CONFIG.width))
    encoder = known_codes(held_out, held_out.codes.toarray())
    got = score(plain_coder(atoms, encoder), clean, held_out)
    assert got["recovered_90_common"] == 1
    assert got["recovered_90_rare"] == 0
    assert got["recovered_90"] == 0.5
    share = clean.rate[:100].sum() / clean.rate.sum()
    assert got["recovered_90_by_firing"] == pytest.approx(share)


def test_random_atoms_score_low_and_the_true_ones_high(truth: Truth) -> None:
    held_out = rows(truth, 3000, first=N)
    atoms = np.random.default_rng(6).standard_normal((200, CONFIG.width))
    floor = score(plain_coder(atoms, OMP(k=5)), truth, held_out)
    assert floor["recovered_90"] == floor["duplicates"] == 0
    assert floor["junk"] > 0.95
    assert floor["f1"] < 0.1
    found = score(oracle(truth, OMP(k=5)), truth, held_out)
    assert found["recovered_95"] == 1
    assert found["junk"] == 0  # the carrier and the massive direction are known
    assert found["f1"] > 0.4
    assert found["fvu_bulk"] < floor["fvu_bulk"] / 2


def test_an_oracle_can_be_centred(clean: Truth) -> None:
    mean = np.random.default_rng(7).standard_normal(CONFIG.width).astype(np.float32)
    x = mean + 3 * clean.directions[[5, 70]]
    centred = oracle(clean, OMP(k=1), mean=mean)
    codes = centred.encode(x)
    np.testing.assert_array_equal(codes.indices[:, 0], [5, 70])
    np.testing.assert_allclose(codes.values, 3, rtol=1e-5)
    np.testing.assert_allclose(centred.decode(codes), x, atol=1e-5)


def test_fewer_atoms_than_features_and_kinds_that_are_absent(held_out: Sample) -> None:
    config = dataclasses.replace(CONFIG, grouped=0.0, children=0.0, signed=0.0)
    bare = plant(config)
    sample = rows(bare, 500)
    coder = plain_coder(bare.directions[:50], known_codes(sample, sample.codes.toarray()[:, :50]))
    got = score(coder, bare, sample)
    assert got["recovered_95"] == 0.25
    assert got["precision"] == got["recall"] < 1
    assert all(math.isnan(got[f"f1_{kind}"]) for kind in ("signed", "children", "grouped"))


READ = PlantedConfig(width=16, n_features=40, mean_active=3.0, classes=5)


def test_the_readouts_gradient_is_that_of_its_loss() -> None:
    truth = plant(READ)
    sample = rows(truth, 3)
    x = sample.x.astype(np.float64)
    _, slope = loss(truth, x, sample.label)
    step = 1e-5 * np.eye(16)[:, None]  # [16 1 16]
    ahead, back = (
        np.stack([loss(truth, x + sign * one, sample.label)[0] for one in step], axis=1)
        for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, (ahead - back) / 2e-5, atol=1e-5)


def test_labels_are_drawn_from_the_readout() -> None:
    """Then the gradient has mean 0, and the loss is least where the rows are."""
    truth = plant(READ)
    sample = rows(truth, 20_000)
    value, slope = loss(truth, sample.x, sample.label)
    error = slope.std(axis=0) / np.sqrt(len(slope))
    assert np.abs(slope.mean(axis=0) / error).max() < 4
    for scale in (0.8, 1.2):
        assert loss(truth, scale * sample.x, sample.label)[0].mean() > value.mean()


def test_a_readout_leaves_the_rows_as_they_are(tmp_path: Path) -> None:
    without = plant(dataclasses.replace(READ, classes=0))
    made = store(tmp_path / "store", plant(READ), 500)
    shard = made.manifest.shards[0]
    sample = rows(plant(READ), 500)
    slope = loss(plant(READ), sample.x, sample.label)[1]
    stored = np.concatenate(list(made.rows(shard, f"gradients/{HOOK}")))
    np.testing.assert_array_equal(stored, slope)
    np.testing.assert_array_equal(rows(without, 500).x, sample.x)
    assert not store(tmp_path / "other", without, 500).manifest.gradients


def test_loss_increase_is_that_of_the_reconstruction() -> None:
    truth = plant(READ)
    sample = rows(truth, 2000)
    coder = oracle(truth, OMP(k=2))
    found = score(coder, truth, sample)["loss_increase"]
    x_hat = np.asarray(coder.decode(coder.encode(sample.x)))
    before, after = (loss(truth, x, sample.label)[0].mean() for x in (sample.x, x_hat))
    assert found == pytest.approx(after - before, rel=1e-3)
    assert found > 0.01
    assert "loss_increase" not in score(coder, plant(dataclasses.replace(READ, classes=0)), sample)


def test_codes_are_told_the_gradient() -> None:
    """With only the gradient to choose by, the codes are those of the greatest |<g, d>|."""
    truth = plant(READ)
    sample = rows(truth, 500)
    solver = SAE(n_atoms=40, variant=GradientTopK(k=2, beta=1e6))
    x = jnp.asarray(sample.x)
    state = solver.init(x, n_steps=1, key=jax.random.key(0))
    dictionary, encoder = solver.result(state)
    encoder = eqx.tree_at(lambda e: e.activation.scale, encoder, jnp.ones(()))
    coder = dataclasses.replace(oracle(truth, encoder), dictionary=dictionary)
    plain, told = (score(coder, truth, sample, gradients=on) for on in (False, True))
    slope = loss(truth, sample.x, sample.label)[1]
    x_hat = np.asarray(coder.decode(coder.encode(sample.x, gradient=slope)))
    assert told["fvu"] == pytest.approx(metrics.fvu(sample.x, x_hat), rel=1e-3)
    assert told["fvu"] != pytest.approx(plain["fvu"], rel=0.05)


def test_a_direction_lies_in_a_share_of_the_coordinates() -> None:
    config = PlantedConfig(width=40, n_features=60, mean_active=3.0, support=0.1)
    directions = plant(config).directions
    assert ((directions != 0).sum(axis=1) == 4).all()
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)
    assert (np.abs(directions).sum(axis=0) > 0).all()
