"""SCR and TPP: rows without latents against plain loops, planted concepts, a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from activations import models
from activations.config import validate
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder, Normaliser
from dictlearn.encoders.activations import ReLU
from dictlearn.encoders.linear import Linear
from dictlearn.encoders.omp import OMP
from evals import ablation, scr, tpp
from evals.ablation import THEIRS, AblationConfig, Bench, benches
from evals.cache import Block
from evals.linear_probe import LinearProbe
from evals.pooled import Pooled, pool
from evals.recovery import plain_coder

HOOK, D, M = "blocks.1.hook_resid_post", 16, 24
CFG = AblationConfig(HOOK, context_length=9)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_coder(d: int = D, seed: int = 0) -> Coder:
    atoms = np.random.default_rng(seed).standard_normal((M, d)).astype(np.float32)
    return plain_coder(atoms, OMP(k=3))


def some_rows(seed: int = 0, n: int = 80) -> tuple[Pooled, np.ndarray, np.ndarray]:
    """Rows with signed codes, atoms of unit norm, and a concept."""
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    codes = rng.standard_normal((n, M)) * (rng.random((n, M)) < 0.4 + 0.3 * y[:, None])
    codes += 0.2 * (codes != 0) * rng.standard_normal(M)
    x = rng.standard_normal((n, D)).astype(np.float32)
    rows = Pooled(x, scipy.sparse.csr_array(codes), rng.integers(1, 9, n))
    return rows, unit(rng.standard_normal((M, D))), y


def flipped(rows: Pooled, atoms: np.ndarray) -> tuple[Pooled, np.ndarray]:
    """The same rows, of which every other latent is told with the other sign."""
    sign = np.where(np.arange(M) % 2, -1, 1)
    codes = scipy.sparse.csr_array(rows.codes.toarray() * sign)
    return dataclasses.replace(rows, codes=codes), atoms * sign[:, None]


# Rows without latents.


@pytest.mark.parametrize("n", [1, 4, 20])
def test_rows_lose_the_latents_of_greatest_effect(n: int) -> None:
    rows, atoms, _ = some_rows()
    effects = np.random.default_rng(1).standard_normal(M)
    effects[::3] = 0
    index = np.array([5, 0, 71, 5])
    found = Bench(rows, atoms, CFG).without(effects, n, index)
    f = rows.codes.toarray()
    chosen = sorted((j for j in range(M) if effects[j] != 0), key=lambda j: -effects[j])[:n]
    assert len(chosen) == min(n, 16)
    for row, i in zip(found, index, strict=True):
        want = rows.x[i].astype(np.float64)
        for j in chosen:
            want = want - f[i, j] * atoms[j]
        np.testing.assert_allclose(row, want, atol=1e-6)


def test_latents_without_an_effect_stay() -> None:
    rows, atoms, _ = some_rows()
    index = np.arange(10)
    found = Bench(rows, atoms, CFG).without(np.zeros(M), 5, index)
    np.testing.assert_array_equal(found, rows.x[index])


def biased_coder() -> Coder:
    """Off centre, of another scale, and with codes where a row is 0."""
    rng = np.random.default_rng(0)
    weight, atoms = (rng.standard_normal((M, D)).astype(np.float32) for _ in range(2))
    plain = plain_coder(atoms, Linear(jnp.asarray(weight), jnp.full(M, 0.3), ReLU()))
    mean = jnp.asarray(rng.standard_normal(D).astype(np.float32))
    return eqx.tree_at(lambda c: c.normaliser, plain, Normaliser(mean, jnp.asarray(1.7)))


@pytest.mark.parametrize("suffix", ["", THEIRS])
def test_latents_leave_every_token_and_of_saebench_the_padding_too(suffix: str) -> None:
    coder, rng = biased_coder(), np.random.default_rng(1)
    length, sizes = 9, [4, 1, 8]
    tokens = [rng.standard_normal((size, D)).astype(np.float32) for size in sizes]
    rows = pool(coder, [Block(np.concatenate(tokens), np.cumsum([0, *sizes]))])
    effects = rng.standard_normal(M)
    chosen = np.argsort(effects)[::-1][:5]
    cfg = dataclasses.replace(CFG, context_length=length)
    found = benches(coder, rows, cfg)[suffix].without(effects, 5, np.arange(3))
    for i, x in enumerate(tokens):
        if suffix == THEIRS:
            x = np.concatenate([x, np.zeros((length - len(x), D), np.float32)])
            assert np.asarray(coder.encode(np.zeros((1, D))).dense())[0, chosen].any()
        f = np.asarray(coder.encode(x).dense(), np.float64)
        x = x - 1.7 * f[:, chosen] @ np.asarray(coder.atoms, np.float64)[chosen]
        np.testing.assert_allclose(found[i], x.sum(axis=0) / sizes[i], rtol=1e-4, atol=1e-4)


def test_nothing_leaks_where_the_row_zero_has_no_codes() -> None:
    coder, rng = random_coder(), np.random.default_rng(2)
    x = rng.standard_normal((12, D)).astype(np.float32)
    both = benches(coder, pool(coder, [Block(x, np.array([0, 2, 9, 12]))]), CFG)
    one, other = (own.without(np.arange(M) + 1.0, 6, np.arange(3)) for own in both.values())
    np.testing.assert_array_equal(one, other)


# Effects.


def plain_effect(
    f: np.ndarray, atom: np.ndarray, weight: np.ndarray, y: np.ndarray, kind: str, theirs: bool
) -> float:
    """Of one latent with the codes f."""
    own, rest = [f[i] for i in range(len(f)) if y[i]], [f[i] for i in range(len(f)) if not y[i]]
    difference = sum(own) / len(own) - sum(rest) / len(rest)
    effect = difference * sum(w * a for w, a in zip(weight, atom, strict=True))
    if kind == "scr":
        return abs(effect)
    more = difference
    if not theirs:
        more = sum(map(abs, own)) / len(own) - sum(map(abs, rest)) / len(rest)
    return effect if more > 0 else 0.0


@pytest.mark.parametrize("kind", ["scr", "tpp"])
@pytest.mark.parametrize("theirs", [False, True])
def test_effects_are_those_of_a_plain_loop(kind: Any, theirs: bool) -> None:
    rows, atoms, y = some_rows()
    index = np.random.default_rng(3).permutation(80)[:50]
    probe = LinearProbe(np.random.default_rng(4).standard_normal(D), 0.3, 1.0)
    found = Bench(rows, atoms, CFG, saebench=theirs).effects(probe, (index, y[index]), kind)
    f = rows.codes.toarray()[index]
    want = [plain_effect(f[:, j], atoms[j], probe.weight, y[index], kind, theirs) for j in range(M)]
    np.testing.assert_allclose(found, want, atol=1e-12)
    zero = np.count_nonzero(np.array(want) == 0)
    assert (0 < zero < M) == (kind == "tpp")


@pytest.mark.parametrize(("kind", "theirs"), [("scr", False), ("scr", True), ("tpp", False)])
def test_a_latent_and_its_negative_are_one(kind: Any, theirs: bool) -> None:
    rows, atoms, y = some_rows()
    probe, texts = LinearProbe(np.arange(1.0, 17), 0.0, 1.0), (np.arange(80), y)
    one, other = (
        Bench(*own, CFG, saebench=theirs).effects(probe, texts, kind)
        for own in ((rows, atoms), flipped(rows, atoms))
    )
    np.testing.assert_allclose(one, other, atol=1e-12)
    assert one.any()


def test_for_saebenchs_tpp_they_are_two() -> None:
    rows, atoms, y = some_rows()
    probe, texts = LinearProbe(np.arange(1.0, 17), 0.0, 1.0), (np.arange(80), y)
    one, other = (
        Bench(*own, CFG, saebench=True).effects(probe, texts, "tpp")
        for own in ((rows, atoms), flipped(rows, atoms))
    )
    np.testing.assert_allclose(one[::2], other[::2])
    # Each has one sign with which it fires more.
    assert ((one[1::2] == 0) != (other[1::2] == 0)).all()


@pytest.mark.parametrize("theirs", [False, True])
def test_only_saebenchs_epoch_is_chosen_by_test_texts(
    theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def spy(x: np.ndarray, y: np.ndarray, chosen_by: Any, **settings: Any) -> LinearProbe:
        asked.update(train=(x[:, 0], y), chosen=(chosen_by[0][:, 0], chosen_by[1]), **settings)
        return LinearProbe(np.zeros(1), 0.0, 0.0)

    monkeypatch.setattr(ablation, "adamw", spy)
    ids = np.arange(60, dtype=np.float32)[:, None]  # a row is its own number, odd in the concept
    rows = Pooled(ids, scipy.sparse.csr_array(ids), np.ones(60, int))
    texts = [(part, part % 2 == 1) for part in np.split(np.random.default_rng(0).permutation(60),
                                                        [40])]  # fmt: skip
    Bench(rows, np.ones((1, 1)), CFG, saebench=theirs).train(*texts, seed=7)
    for numbers, label in (asked["train"], asked["chosen"]):
        np.testing.assert_array_equal(numbers % 2 == 1, label)
    train, chosen = set(asked["train"][0]), set(asked["chosen"][0])
    if theirs:
        assert (train, chosen) == (set(texts[0][0]), set(texts[1][0]))
    else:
        assert len(chosen) == 8
        assert not train & chosen
        assert train | chosen == set(texts[0][0])
    assert asked["seed"] == 7
    assert asked["patience"] == asked["epochs"] == CFG.epochs


# Planted concepts.


def single_tokens(coder: Coder, x: np.ndarray) -> Pooled:
    return pool(coder, [Block(x.astype(np.float32), np.arange(len(x) + 1))])


def test_one_latent_carries_a_class() -> None:
    d, n, rng = 32, 60, np.random.default_rng(0)
    true = np.linalg.qr(rng.standard_normal((d, 8)))[0].T
    label = np.repeat(np.arange(5), n)
    f = rng.gamma(2, 0.5, (5 * n, 8)) * (rng.random((5 * n, 8)) < 0.3)
    f[:, :5] = rng.uniform(3, 5, (5 * n, 1)) * (label[:, None] == np.arange(5))
    x = f @ true + 0.05 * rng.standard_normal((5 * n, d))
    groups = [np.flatnonzero(label == c) for c in range(5)]
    # The penalty lets a class's probe see its own latent, not the absence of others.
    cfg = AblationConfig(HOOK, learning_rate=0.01, l1=0.05, epochs=20)
    found = {}
    coders = {"true": plain_coder(true.astype(np.float32), OMP(k=4)), "random": random_coder(d)}
    for name, coder in coders.items():
        for suffix, bench in benches(coder, single_tokens(coder, x), cfg).items():
            found[name + suffix] = tpp.perturb(bench, groups, 45, [1], seed=0)
    for suffix in ("", THEIRS):
        told = found[f"true{suffix}"]
        # At chance, but for what the probe knows by the absence of the other classes' latents.
        assert 0.4 < told["tpp_threshold_1_intended_diff_only"] <= 0.5
        assert told["tpp_threshold_1_unintended_diff_only"] == pytest.approx(0, abs=0.03)
        assert told["tpp_threshold_1_total_metric"] > 0.4
        assert found[f"random{suffix}"]["tpp_threshold_1_total_metric"] < 0.25


def two_concepts() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Rows, directions of two concepts and noise, and the corners: twice as many of two of them."""
    d, n, rng = 64, 40, np.random.default_rng(1)
    directions = np.linalg.qr(rng.standard_normal((d, 10)))[0].T
    x, corners, at = [], {}, 0
    for key in ("++", "+-", "-+", "--"):
        count = n * (1 + (key[0] == key[1]))
        f = rng.standard_normal((count, 10)) * (rng.random((count, 10)) < 0.3)
        # The second concept is the stronger one: a probe that was taught both follows it.
        for j, (sign, size) in enumerate(zip(key, (3, 6), strict=True)):
            f[:, j] = (1 if sign == "+" else -1) * rng.uniform(0.8, 1.2, count) * size
        x.append(f @ directions + 0.05 * rng.standard_normal((count, d)))
        corners[key] = np.arange(at, at + count)
        at += count
    return np.concatenate(x), directions, corners


def test_without_the_latent_of_a_spurious_concept_the_other_is_seen() -> None:
    x, directions, corners = two_concepts()
    true = plain_coder(directions.astype(np.float32), OMP(k=5))
    cfg = AblationConfig(HOOK, learning_rate=0.01)
    found = {}
    for name, coder in (("true", true), ("random", random_coder(64))):
        for suffix, bench in benches(coder, single_tokens(coder, x), cfg).items():
            found[name + suffix] = scr.remove(bench, corners, 32, [1], seed=0)
    for suffix in ("", THEIRS):
        told = found[f"true{suffix}"]
        assert told["scr_metric_threshold_1"] > 0.8
        assert told["scr_metric_threshold_1"] == told["scr_dir1_threshold_1"]
        assert abs(found[f"random{suffix}"]["scr_metric_threshold_1"]) < 0.2


def by_hand(
    biased: tuple[float, float], theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """SCR where concepts are the axes, of probes that are told and not trained."""
    corners, x = {}, []
    for i, key in enumerate(("++", "+-", "-+", "--")):
        corners[key] = np.arange(20 * i, 20 * i + (20 if key[0] == key[1] else 10))
        x += 20 * [[1.0 if sign == "+" else -1.0 for sign in key]]
    rows = Pooled(np.array(x, np.float32), scipy.sparse.csr_array(np.array(x)), np.ones(80, int))
    bench = Bench(rows, np.eye(2), CFG, saebench=theirs)
    # In the order in which they are trained.
    probes = iter([np.array([1.0, 0]), np.array([0, 1.0]), np.array(biased)])
    monkeypatch.setattr(bench, "train", lambda *_: LinearProbe(next(probes), 0.0, 1.0))
    return scr.remove(bench, corners, 8, [1], seed=0)


@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize(
    ("biased", "dir1", "dir2", "metric"),
    [
        # Follows b: a is told by chance, and wholly with b's latent out; b loses nothing.
        ((1.0, 2.0), 1.0, None, "dir1"),
        # Follows a.
        ((2.0, 1.0), None, 1.0, "dir2"),
        # Sees b alone: with its latent out there is nothing.
        ((0.0, 1.0), 0.0, None, "dir1"),
    ],
)
def test_scores_of_known_probes(
    theirs: bool, biased: tuple[float, float], dir1: float | None, dir2: float | None,
    metric: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = by_hand(biased, theirs, monkeypatch)
    left_out = 0.0 if theirs else float("nan")
    for name, want in (("dir1", dir1), ("dir2", dir2)):
        expected = left_out if want is None else want
        assert found[f"scr_{name}_threshold_1"] == pytest.approx(expected, nan_ok=True)
    assert found["scr_metric_threshold_1"] == found[f"scr_{metric}_threshold_1"]


def test_directions_that_are_biased_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0 for texts of one concept alone: of four kinds of text each concept misses one.
    ours, theirs = (by_hand((1.0, 1.0), own, monkeypatch) for own in (False, True))
    for found in (ours, theirs):
        assert found["scr_dir1_threshold_1"] == found["scr_dir2_threshold_1"] == 1
    assert ours["scr_metric_threshold_1"] == 1
    assert np.isnan(theirs["scr_metric_threshold_1"])


# With a model.


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return models.load(f"dir:{tiny_model_dir}")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))


def text_file(folder: Path, labels: list[str], seconds: list[str], n: int) -> Path:
    """n texts of each label and second label, which both stand in them."""
    rng = np.random.default_rng(0)
    lines = []
    for label in labels:
        for second in seconds:
            for i in range(n):
                filler = " ".join(rng.choice(["the", "does", "not"], 2))
                text = f"{i} {filler} {label} {second} {label}"
                lines.append(json.dumps({"text": text, "label": label, "also": second}))
    path = folder / "words.jsonl"
    path.write_text("\n".join(lines))
    return path


SMALL = {
    "hook": HOOK, "train_per_class": 20, "test_per_class": 8, "context_length": 16, "epochs": 3,
    "n_values": [2, 5, 500], "n_seeds": 2,
}  # fmt: skip


def settings(kind: type, path: Path, **more: Any) -> Any:
    own = {"kind": "file", "path": str(path)} | ({"second": "also"} if kind is scr.Config else {})
    return validate(kind, SMALL | {"sets": [own]} | more, "test")


def figures(family: str, names: list[str], n_values: list[int]) -> set[str]:
    return {
        f"{family}_{name.format(n)}{suffix}{end}" for name in names for n in n_values
        for suffix in ("", THEIRS) for end in ("", "_seed_std")
    }  # fmt: skip


def none_without_a_reason(result: Any, category: str) -> set[str]:
    own = {key for key, value in result.metrics[category].items() if value is None}
    return {key for key in own if f"{category}.{key}" not in result.null}


def test_scr_from_texts_to_figures(model: Model, tmp_path: Path) -> None:
    path = text_file(tmp_path, ["fox", "dog", "mind", "lazy"], ["and", "over"], 28)
    cfg = settings(scr.Config, path)
    result = scr.run(random_coder(), model, cfg)
    assert result.family == "scr"
    found = result.metrics["scr_metrics"]
    names = ["dir1_threshold_{}", "dir2_threshold_{}", "metric_threshold_{}"]
    assert set(found) == figures("scr", names, [2, 5, 500])
    assert all(found[key] is None for key in found if "500" in key)
    assert "24 latents" in result.null["scr_metrics.scr_metric_threshold_500"]
    assert not none_without_a_reason(result, "scr_metrics")
    assert [row["dataset_name"] for row in result.details] == [
        "words: dog / fox, and / over", "words: lazy / mind, and / over",
    ]  # fmt: skip
    assert {(row["n_train"], row["n_test"]) for row in result.details} == {(20, 8)}
    assert "unreliable" in result.unstructured["caveat"]
    assert scr.run(random_coder(), model, cfg).metrics == result.metrics
    pair = settings(scr.Config, path, pairs=[["mind", "dog"]], n_seeds=1)
    one = scr.run(random_coder(), model, pair)
    assert [row["dataset_name"] for row in one.details] == ["words: mind / dog, and / over"]
    assert one.metrics["scr_metrics"]["scr_metric_threshold_2_saebench060_seed_std"] is None
    assert not none_without_a_reason(one, "scr_metrics")


def test_tpp_from_texts_to_figures(model: Model, tmp_path: Path) -> None:
    path = text_file(tmp_path, ["fox", "dog", "mind"], ["and"], 28)
    cfg = settings(tpp.Config, path)
    result = tpp.run(random_coder(), model, cfg)
    assert result.family == "tpp"
    found = result.metrics["tpp_metrics"]
    kinds = ["total_metric", "intended_diff_only", "unintended_diff_only"]
    names = [f"threshold_{{}}_{kind}" for kind in kinds]
    assert set(found) == figures("tpp", names, [2, 5, 500])
    assert all(found[key] is None for key in found if "500" in key)
    assert "24 latents" in result.null["tpp_metrics.tpp_threshold_500_total_metric"]
    for suffix in ("", THEIRS):
        total, own, others = (found[f"tpp_threshold_5_{kind}{suffix}"] for kind in kinds)
        assert total == pytest.approx(own - others)
    (row,) = result.details
    assert (row["classes"], row["n_train"], row["n_test"]) == (["dog", "fox", "mind"], 20, 8)
    assert tpp.run(random_coder(), model, cfg).metrics == result.metrics


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.cache.read", lambda *_, **__: pytest.fail("the model was run"))


@pytest.mark.usefixtures("_no_model")
def test_what_scr_cannot_use_is_told(model: Model, tmp_path: Path) -> None:
    path = text_file(tmp_path, ["fox", "dog"], ["and", "over"], 28)
    without = [{"kind": "file", "path": str(path)}]
    with pytest.raises(UserError, match=r"scr: words has no second label; .*second = "):
        scr.run(random_coder(), model, settings(scr.Config, path, sets=without))
    with pytest.raises(UserError, match=r"cat / dog.*\(\+\+ 0, \+- 0, -\+ 28, -- 28\).* 0 texts"):
        scr.run(random_coder(), model, settings(scr.Config, path, pairs=[["cat", "dog"]]))
    few = [line for i, line in enumerate(path.read_text().splitlines()) if not 33 <= i < 56]
    path.write_text("\n".join(few))
    # Of dog and "over" 5 are left, of 14 that are needed.
    with pytest.raises(UserError, match=r"\(\+\+ 28, \+- 5, -\+ 28, -- 28\).* 5 texts .* 14 "):
        scr.run(random_coder(), model, settings(scr.Config, path, pairs=[["fox", "dog"]]))
    with pytest.raises(UserError, match=r"8 entries, but .* has 16"):
        scr.run(random_coder(8), model, settings(scr.Config, path))


@pytest.mark.usefixtures("_no_model")
def test_what_tpp_cannot_use_is_told(model: Model, tmp_path: Path) -> None:
    path = text_file(tmp_path, ["fox", "dog"], ["and"], 28)
    with pytest.raises(UserError, match="tpp: words has two classes; expected three or more"):
        tpp.run(random_coder(), model, settings(tpp.Config, path))
    path = text_file(tmp_path, ["fox", "dog", "mind"], ["and"], 27)
    with pytest.raises(UserError, match=r"words: has 27 texts .* at least 28 "):
        tpp.run(random_coder(), model, settings(tpp.Config, path))
    with pytest.raises(UserError, match=r"8 entries, but .* has 16"):
        tpp.run(random_coder(8), model, settings(tpp.Config, path))


def test_no_row_is_tested_that_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"++": 20, "+-": 10, "-+": 10, "--": 20}
    at = np.cumsum([0, *sizes.values()])
    corners = {key: np.arange(at[i], at[i + 1]) for i, key in enumerate(sizes)}
    trained: list[set[int]] = []
    tested: list[set[int]] = []

    class Watched(Bench):
        def train(self, halves: Any, test: Any, seed: int) -> LinearProbe:
            trained.append(set(halves[0].tolist()))
            tested.append(set(test[0].tolist()))
            return super().train(halves, test, seed)

    codes = scipy.sparse.csr_array(np.random.default_rng(0).random((60, 4)))
    rows = Pooled(codes.toarray().astype(np.float32), codes, np.ones(60, int))
    scr.remove(Watched(rows, np.eye(4), scr.Config(HOOK, epochs=1)), corners, 8, [1], 0)
    assert [len(of) for of in trained] == [32, 32, 32]
    assert [len(of) for of in tested] == [8, 8, 8]
    assert not set.union(*trained) & set.union(*tested)
