"""Probes on texts: against torch, scikit-learn and plain loops; planted classes; a tiny model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from activations import models
from activations.config import validate
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder, Normaliser
from dictlearn.encoders.activations import ReLU
from dictlearn.encoders.linear import Linear
from dictlearn.encoders.omp import OMP
from evals import linear_probe, sae_probes, sparse_probing
from evals.cache import Block
from evals.linear_probe import LinearProbe, adamw, balanced, top_k_accuracy
from evals.pooled import Pooled, at_zero, pool
from evals.recovery import plain_coder
from evals.sparse_probing import Rowed
from evals.texts import Labelled, TextFile

HOOK, D, M = "blocks.1.hook_resid_post", 16, 24


def some_coder(d: int = D, seed: int = 0) -> Coder:
    """Atoms of several norms, signed codes."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((M, d)) * rng.uniform(0.3, 3, (M, 1))
    return plain_coder(atoms.astype(np.float32), OMP(k=3))


def scaled(coder: Coder) -> Coder:
    """Off centre and not of unit scale."""
    mean = np.random.default_rng(1).standard_normal(D).astype(np.float32)
    normaliser = Normaliser(jnp.asarray(mean), jnp.asarray(1.5))
    return eqx.tree_at(lambda c: c.normaliser, coder, normaliser)


# Means over texts.


def test_means_are_those_of_plain_loops() -> None:
    coder, rng = scaled(some_coder()), np.random.default_rng(2)
    sizes = [[3, 1, 5], [2, 4]]
    blocks = []
    for of in sizes:
        x = rng.standard_normal((sum(of), D)).astype(np.float32)
        blocks.append(Block(x, np.cumsum([0, *of])))
    found = pool(coder, blocks)
    at = 0
    norms = [np.sqrt(sum(float(v) ** 2 for v in atom)) for atom in np.asarray(coder.atoms)]
    for block in blocks:
        codes = np.asarray(coder.encode(block.x).dense())
        for i in range(len(block.start) - 1):
            here = range(block.start[i], block.start[i + 1])
            x = sum(block.x[t] for t in here) / len(here)
            f = [sum(codes[t, j] for t in here) / len(here) * norms[j] for j in range(M)]
            np.testing.assert_allclose(found.x[at], x, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.codes[[at]].toarray()[0], f, rtol=1e-4, atol=1e-6)
            at += 1
    assert found.n_tokens.tolist() == [*sizes[0], *sizes[1]]
    assert (found.codes.toarray() < 0).any()


def test_codes_do_not_depend_on_the_norms_of_atoms() -> None:
    coder, rng = some_coder(), np.random.default_rng(3)
    norm = np.linalg.norm(np.asarray(coder.atoms), axis=1, keepdims=True)
    unit = plain_coder(np.asarray(coder.atoms) / norm, OMP(k=3))
    block = Block(rng.standard_normal((8, D)).astype(np.float32), np.array([0, 5, 8]))
    one, other = (pool(own, [block]).codes.toarray() for own in (coder, unit))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_codes_of_the_row_zero() -> None:
    rng = np.random.default_rng(4)
    weight, bias = rng.standard_normal((M, D)), rng.standard_normal(M)
    plain = scaled(some_coder())
    encoder = Linear(jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32), ReLU())
    coder = eqx.tree_at(lambda c: c.encoder, plain, encoder, is_leaf=lambda x: x is plain.encoder)
    moved = -np.asarray(coder.normaliser.mean, np.float64) / 1.5
    want = np.maximum(weight @ moved + bias, 0) * np.linalg.norm(np.asarray(coder.atoms), axis=1)
    assert 0 < (want > 0).sum() < M
    np.testing.assert_allclose(at_zero(coder), want, rtol=1e-4, atol=1e-5)
    assert not at_zero(some_coder()).any()


# Balanced classes.


@pytest.mark.parametrize("sizes", [[12, 12, 12, 12], [10, 10], [10, 10, 10, 10]])
def test_a_class_stands_against_as_many_of_the_others(sizes: list[int]) -> None:
    at = np.cumsum([0, *sizes])
    groups = [np.arange(*at[i : i + 2]) for i in range(len(sizes))]
    for target, own in enumerate(groups):
        index, y = balanced(groups, target, np.random.default_rng(target))
        assert len(set(index)) == len(index) == 2 * len(own)
        assert set(index[y]) == set(own)
        negative = [np.isin(index[~y], group).sum() for group in groups]
        assert negative.pop(target) == 0
        each = len(own) / len(negative)
        assert max(negative) <= np.ceil(each)
        assert sum(negative) == len(own)
        # In random order: labels change more often than twice.
        assert (np.diff(y.astype(int)) != 0).sum() > 2


def test_negatives_are_drawn_anew_by_another_seed() -> None:
    groups = [np.arange(6), np.arange(6, 30), np.arange(30, 60)]
    one, again, other = (
        set(balanced(groups, 0, np.random.default_rng(seed))[0]) for seed in (0, 0, 1)
    )
    assert one == again != other


# AdamW.


def by_torch(
    x: np.ndarray, y: np.ndarray, seen: tuple[np.ndarray, np.ndarray], *, rate: float, l1: float,
    epochs: int, patience: int, seed: int, batches: tuple[list[int], ...] | None = None,
) -> tuple[np.ndarray, float, float, list[float]]:  # fmt: skip
    """Weight, bias and accuracy of the best epoch, and the accuracy of each that was run."""
    n, d = x.shape
    start = np.random.default_rng(seed).uniform(-(d**-0.5), d**-0.5, d + 1).astype(np.float32)
    weight = torch.tensor(start[:d], requires_grad=True)
    bias = torch.tensor(start[d], requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=rate)
    rows, target = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    best, kept, waited, run = 0.0, (start[:d], float(start[d])), 0, []
    for _ in range(epochs):
        for batch in batches or (list(range(n)),):
            optimizer.zero_grad()
            logits = rows[batch] @ weight + bias
            loss = torch.nn.BCEWithLogitsLoss()(logits, target[batch]) + l1 * weight.abs().sum()
            loss.backward()
            optimizer.step()
        own = weight.detach().numpy().copy(), float(bias.detach())
        run.append(float(((seen[0] @ own[0] + own[1] > 0) == seen[1]).mean()))
        waited += 1
        if run[-1] > best:
            best, kept, waited = run[-1], own, 0
        if waited == patience:
            break
    return *kept, best, run


def two_classes(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.5
    x = rng.standard_normal((n, d)) + np.where(y, 0.5, -0.5)[:, None] * np.linspace(0, 1, d)
    return x.astype(np.float32), y


@pytest.mark.parametrize("l1", [0.0, 0.05])
@pytest.mark.parametrize("patience", [40, 3])
@pytest.mark.parametrize("batch_size", [60, 1000])
def test_a_full_batch_follows_torch(l1: float, patience: int, batch_size: int) -> None:
    x, y = two_classes(60, 8, seed=0)
    seen = two_classes(150, 8, seed=1)
    asked = {"l1": l1, "epochs": 40, "patience": patience, "seed": 5}
    weight, bias, best, run = by_torch(x, y, seen, rate=0.02, **asked)
    assert (len(run) < 40) == (patience == 3)
    assert 0 < int(np.argmax(run)) < len(run) - 1
    found = adamw(x, y, seen, learning_rate=0.02, batch_size=batch_size, **asked)
    np.testing.assert_allclose(found.weight, weight, rtol=1e-4, atol=1e-4)
    assert found.bias == pytest.approx(bias, abs=1e-4)
    assert found.accuracy == pytest.approx(best)
    assert found.right(*seen).mean() == pytest.approx(best)


def test_an_epoch_takes_each_row_once_in_some_order() -> None:
    x, y = two_classes(5, 3, seed=2)
    # Rows that any probe has half of right: so that the one epoch is the best.
    seen = np.zeros((2, 3), np.float32), np.array([True, False])
    asked: dict[str, Any] = {"l1": 0.01, "epochs": 1, "patience": 1, "seed": 0}
    found = adamw(x, y, seen, learning_rate=0.5, batch_size=2, **asked)
    distance = {}
    for order in itertools.permutations(range(5)):
        batches = sorted(order[:2]), sorted(order[2:4]), list(order[4:])
        weight, bias, _, _ = by_torch(x, y, seen, rate=0.5, batches=batches, **asked)
        far = np.abs(found.weight - weight).max() + abs(found.bias - bias)
        distance[str(batches)] = far
    nearest = sorted(distance.values())
    assert len(nearest) == 30
    assert nearest[0] < 1e-4
    assert nearest[1] > 1e-2


def test_a_probe_that_is_never_right_stays_as_it_began() -> None:
    x = np.ones((4, 2), np.float32)
    wrong = x, np.zeros(4, bool)
    settings: dict[str, Any] = {"batch_size": 4, "epochs": 3, "patience": 3}
    # Begins to say no, says yes after its first epoch.
    found = adamw(x, np.ones(4, bool), wrong, learning_rate=5.0, seed=0, **settings)
    start = np.random.default_rng(0).uniform(-(2**-0.5), 2**-0.5, 3)
    np.testing.assert_allclose([*found.weight, found.bias], start, rtol=1e-6)
    assert found.accuracy == 0


def test_where_a_probe_is_right() -> None:
    probe = LinearProbe(np.array([1.0, -2.0]), 0.5, 1.0)
    x = np.array([[1, 0], [0, 1], [0, 0.25], [3, 1]], np.float32)
    # 1.5, -1.5, 0, 1.5: a row on the border is not of the class.
    right = probe.right(x, np.array([True, True, False, False]))
    assert right.tolist() == [True, False, True, False]


# Few features.


@pytest.mark.parametrize("kind", [np.asarray, scipy.sparse.csr_array])
def test_few_features_are_those_of_the_greatest_difference(kind: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    y, truth = rng.random(200) < 0.5, rng.random(90) < 0.5
    x, unseen = (
        rng.standard_normal((len(of), 10)) * (rng.random((len(of), 10)) < 0.7)
        for of in (y, truth)
    )  # fmt: skip
    for rows, labels in ((x, y), (unseen, truth)):
        rows[labels, 3] -= 1.5  # greatest, though negative
        rows[labels, 7] += 1.2
        rows[:, 5] += 100  # large, but alike in both
    for k, features in ((1, [3]), (2, [3, 7])):
        plain = LogisticRegression(max_iter=1000).fit(x[:, features], y)
        want = plain.score(unseen[:, features], truth)
        assert 0.6 < want < 1
        assert top_k_accuracy((kind(x), y), (kind(unseen), truth), k) == pytest.approx(want)


def test_a_mean_difference_of_large_rows_is_exact() -> None:
    # In float32 the sums would lose the difference.
    y = np.arange(2000) % 2 == 0
    x = np.stack([np.where(y, 4097, 4096), np.where(y, 0, 1)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(linear_probe.mean_difference(x, y), [1, -1])


# Sparse probing.


def planted(seed: int, *, n: int = 60) -> Rowed:
    """Three classes, each with a latent of its own, which many dimensions of the model share."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(3), n)
    codes = rng.gamma(4, 1, (3 * n, 12)) * (rng.random((3 * n, 12)) < 0.4)
    codes[:, :3] = 0
    codes[np.arange(3 * n), label] = rng.uniform(3, 5, 3 * n)
    directions = np.linalg.qr(rng.standard_normal((40, 12)))[0].T
    x = codes @ directions + 0.5 * rng.standard_normal((3 * n, 40))
    pooled = Pooled(x.astype(np.float32), scipy.sparse.csr_array(codes), np.ones(3 * n, int))
    groups = [np.flatnonzero(label == c) for c in range(3)]
    return Rowed("planted", ["a", "b", "c"], groups, 4 * n // 5, pooled)


SPARSE = sparse_probing.Config(HOOK, epochs=40, k_values=(1, 5))


def test_one_latent_tells_what_no_single_dimension_tells() -> None:
    found = sparse_probing.measure(planted(0, n=150), SPARSE, seed=0)
    assert found["sae_top_1_test_accuracy"] == [1.0, 1.0, 1.0]
    assert max(found["llm_top_1_test_accuracy"]) < 0.95
    # All dimensions together tell it as well.
    assert min(found["llm_test_accuracy"]) > 0.9
    assert set(found) == {
        f"{kind}_{name}" for kind in ("llm", "sae")
        for name in ("test_accuracy", "test_accuracy_saebench060", "top_1_test_accuracy",
                     "top_5_test_accuracy")
    }  # fmt: skip


def test_shuffled_labels_are_told_by_chance() -> None:
    own = planted(1, n=100)
    mixed = np.random.default_rng(2).permutation(300).reshape(3, 100)
    shuffled = dataclasses.replace(own, groups=list(mixed))
    found = [sparse_probing.measure(shuffled, SPARSE, seed) for seed in range(3)]
    keys = [key for key in found[0] if "saebench" not in key]
    means = {key: np.mean([one[key] for one in found]) for key in found[0]}
    # 360 test rows each: a deviation is 0.026, more where seeds share rows.
    assert all(abs(means[key] - 0.5) < 0.1 for key in keys)
    # The test rows chose the epoch.
    assert means["llm_test_accuracy_saebench060"] > means["llm_test_accuracy"]


def test_only_saebenchs_epoch_is_chosen_by_test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 75
    ids = np.arange(1, n + 1, dtype=np.float32)[:, None]  # a row is its own number
    pooled = Pooled(ids, scipy.sparse.csr_array(ids), np.ones(n, int))
    own = Rowed("ids", ["a", "b", "c"], list(np.arange(n).reshape(3, -1)), 20, pooled)
    asked: list[tuple[set[float], set[float]]] = []

    def spy(x: np.ndarray, y: np.ndarray, chosen_by: Any, **_: Any) -> LinearProbe:
        assert len(chosen_by[0]) == len(chosen_by[1])
        asked.append((set(x[:, 0]), set(chosen_by[0][:, 0])))
        return LinearProbe(np.zeros(1), 0.0, 0.0)

    monkeypatch.setattr(sparse_probing, "adamw", spy)
    sparse_probing.measure(own, sparse_probing.Config(HOOK, k_values=(1,)), seed=0)
    assert len(asked) == 2 * 2 * 3
    tested: set[float] = set()
    for (train, chosen), (whole, test) in zip(asked[::2], asked[1::2], strict=True):
        assert (len(train), len(chosen), len(test)) == (32, 8, 10)
        assert not train & chosen
        assert train | chosen == whole
        tested |= test
    assert not tested & set.union(*(whole for whole, _ in asked))


def test_means_and_deviations_over_seeds_and_sets() -> None:
    by_seed = [{"sae_a": 1.0, "b": 2.0}, {"sae_a": 4.0, "b": float("nan")}]
    one = sparse_probing.spread(by_seed)
    assert one == pytest.approx(
        {"sae_a": 2.5, "sae_a_seed_std": 3 / np.sqrt(2), "b": 2.0, "b_seed_std": None}
    )
    other = {"sae_a": 0.5, "sae_a_seed_std": 2.0, "b": 1.0, "b_seed_std": 1.0}
    found = sparse_probing.categories([one, other])
    assert set(found) == {"sae"}
    assert found["sae"]["sae_a"] == 1.5
    # Of the mean of two independent figures.
    assert found["sae"]["sae_a_seed_std"] == pytest.approx(np.sqrt(4.5 + 4) / 2)


# sae-probes.


def signed_rows(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    size = rng.gamma(2, size=(n, 15)) * 10.0 ** rng.uniform(-2, 2, 15)
    codes = size * rng.choice([-1, 1], size.shape) * (rng.random(size.shape) < 0.3)
    codes += 0.3 * size * (rng.random(size.shape) < 0.2) * y[:, None]
    codes[:, 14] = 0
    return codes, y


def test_the_ranking_is_that_of_plain_loops() -> None:
    f, y = signed_rows(120, seed=0)
    codes = scipy.sparse.csr_array(f)
    codes.data[:7] = 0  # zeros that are stored count as none
    f = codes.toarray()
    score = []
    for j in range(f.shape[1]):
        fired = [abs(v) for v in f[:, j] if v != 0]
        mean = sum(fired) / (len(fired) + 1e-6) if fired else 0.0
        apart = [[f[i, j] for i in range(len(f)) if y[i] == own] for own in (True, False)]
        score.append(abs(np.mean(apart[0]) - np.mean(apart[1])) / (mean + 1e-6))
    assert sorted(score)[0] == 0 < min(np.diff(sorted(score)))
    np.testing.assert_array_equal(sae_probes.ranking(codes, y), np.argsort(score)[::-1])


def plain_regression(
    x: np.ndarray, y: np.ndarray, unseen: np.ndarray, truth: np.ndarray, penalty: str, seed: int
) -> tuple[int, tuple[float, float, float]]:
    """Which C is best, counted from 1e5 down, and accuracy, AUC and weighted F1."""
    n = len(y)
    if n < 128:
        folds = list(StratifiedKFold(6, shuffle=True, random_state=seed).split(x, y))
    else:
        cut = n - min(int(0.2 * n), 100)
        folds = [(np.arange(cut), np.arange(cut, n))]
    settings: dict[str, Any] = {"l1_ratio": 1, "solver": "saga"} if penalty == "l1" else {}
    probes, aucs = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for power in np.linspace(5, -5, 10):
            probe = LogisticRegression(C=10**power, max_iter=1000, random_state=seed, **settings)
            own = []
            for rest, held in folds:
                probe.fit(x[rest], y[rest])
                own.append(roc_auc_score(y[held], probe.decision_function(x[held])))
            aucs.append(sum(own) / len(own))
            probes.append(probe)
        best = max(range(10), key=lambda i: aucs[i])
        probe = probes[best].fit(x, y)
    said, margin = probe.predict(unseen), probe.decision_function(unseen)
    above = [
        1.0 if p > q else 0.5 if p == q else 0.0 for p in margin[truth] for q in margin[~truth]
    ]
    f1 = 0.0
    for own in (True, False):
        hits = ((said == own) & (truth == own)).sum()
        f1 += 2 * hits / ((said == own).sum() + (truth == own).sum()) * (truth == own).mean()
    return best, ((said == truth).mean(), np.mean(above), f1)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize(("n", "seed"), [(127, 1), (128, 3), (600, 1)])
def test_the_regression_is_that_of_a_plain_loop(penalty: str, n: int, seed: int) -> None:
    # Most dimensions tell nothing, so that the strength of the penalty matters.
    (x, y), (unseen, truth) = (two_classes(size, 4, s) for size, s in ((n, seed), (101, seed + 10)))
    rng = np.random.default_rng(seed)
    x, unseen = (np.append(of, rng.standard_normal((len(of), 16)), axis=1) for of in (x, unseen))
    best, want = plain_regression(x, y, unseen, truth, penalty, seed)
    assert best > 0  # a choice was made
    found = sae_probes.regression((x, y), (unseen, truth), penalty, seed)
    assert found == pytest.approx(want, abs=1e-9)


def test_a_planted_latent_tells_the_last_token() -> None:
    own, rng = planted(3, n=80), np.random.default_rng(0)
    order = rng.permutation(240)
    split: dict[str, Any] = {"train": order[:150], "test": order[150:], "seed": 0}
    y = np.repeat([True, False, False], 80)
    found = sae_probes.probe(own.pooled, y, ks=(1, 2), **split)
    assert found["sae_top_1_test_accuracy"] == found["sae_top_1_test_auc"] == 1
    assert found["sae_top_1_test_f1"] == 1
    assert found["llm_test_auc"] > 0.9
    random = sae_probes.probe(own.pooled, rng.random(240) < 0.5, ks=(1,), **split)
    assert abs(random["sae_top_1_test_auc"] - 0.5) < 0.2


# With a model.


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return models.load(f"dir:{tiny_model_dir}")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))


def text_file(folder: Path, words: list[str], n: int) -> Path:
    """n texts about each word."""
    rng = np.random.default_rng(0)
    lines = []
    for word in words:
        for i in range(n):
            filler = " ".join(rng.choice(["the", "and", "over", "does", "not"], 3))
            lines.append(json.dumps({"text": f"{i} {filler} {word} {word}", "label": word}))
    path = folder / "words.jsonl"
    path.write_text("\n".join(lines))
    return path


def sparse(path: Path, **settings: Any) -> sparse_probing.Config:
    table = {
        "train_per_class": 8, "test_per_class": 4, "context_length": 16, "epochs": 3, "n_seeds": 2
    }  # fmt: skip
    sets = [{"kind": "file", "path": str(path)}]
    table = {"hook": HOOK, "sets": sets} | table | settings
    return validate(sparse_probing.Config, table, "test")


def test_sparse_probing_from_texts_to_figures(model: Model, tmp_path: Path) -> None:
    path = text_file(tmp_path, ["fox", "dog", "lazy", "mind"], 13)
    result = sparse_probing.run(some_coder(), model, sparse(path, max_classes=3))
    assert result.family == "sparse_probing"
    for kind in ("llm", "sae"):
        names = [
            "test_accuracy", "top_1_test_accuracy", "top_2_test_accuracy", "top_5_test_accuracy",
            "test_accuracy_saebench060",
        ]  # fmt: skip
        keys = {f"{kind}_{name}{end}" for name in names for end in ("", "_seed_std")}
        assert set(result.metrics[kind]) == keys
        for key, value in result.metrics[kind].items():
            assert 0 <= value <= 1
            (row,) = result.details
            assert row[key] == pytest.approx(value)
    assert set(result.metrics) == {"llm", "sae"}
    assert (row["dataset_name"], row["n_classes"]) == ("words", 3)
    assert (row["n_train"], row["n_test"]) == (8, 4)
    by_class = result.unstructured["by_class"]["words"]
    assert set(by_class) == {"dog", "fox", "lazy"}
    own = [one["sae_top_1_test_accuracy"] for one in by_class.values()]
    assert result.metrics["sae"]["sae_top_1_test_accuracy"] == pytest.approx(np.mean(own))

    again = sparse_probing.run(some_coder(), model, sparse(path, max_classes=3))
    assert again.metrics == result.metrics
    other = sparse_probing.run(some_coder(), model, sparse(path, max_classes=3, seed=7))
    assert other.metrics != result.metrics


def test_one_seed_has_no_deviation(model: Model, tmp_path: Path) -> None:
    path = text_file(tmp_path, ["fox", "dog"], 12)
    found = sparse_probing.run(some_coder(), model, sparse(path, n_seeds=1)).metrics
    for category in found.values():
        deviations = {key for key in category if key.endswith("_seed_std")}
        assert len(deviations) == len(category) / 2
        assert all((category[key] is None) == (key in deviations) for key in category)


def test_sae_probes_from_texts_to_figures(model: Model, tmp_path: Path) -> None:
    path = text_file(tmp_path, ["fox", "dog"], 120)
    table = {"hook": HOOK, "sets": [{"kind": "file", "path": str(path)}], "ks": [1]}
    cfg = validate(sae_probes.Config, table | {"context_length": 16, "n_seeds": 2}, "test")
    result = sae_probes.run(some_coder(), model, cfg)
    assert result.family == "sparse_probing_sae_probes"
    for kind, name in (("llm", "llm"), ("sae", "sae_top_1")):
        assert set(result.metrics[kind]) == {
            f"{name}_test_{figure}{end}" for figure in ("accuracy", "auc", "f1")
            for end in ("", "_seed_std")
        }  # fmt: skip
        assert all(0 <= value <= 1 for value in result.metrics[kind].values())
    assert result.details[0]["n_classes"] == 1
    # The last token is the word itself.
    assert result.metrics["llm"]["llm_test_auc"] > 0.95

    single = [
        sae_probes.run(some_coder(), model, dataclasses.replace(cfg, seed=seed, n_seeds=1))
        for seed in (cfg.seed, cfg.seed + 1)
    ]
    for name in ("accuracy", "auc", "f1"):
        key = f"sae_top_1_test_{name}"
        both = [one.metrics["sae"][key] for one in single]
        assert result.metrics["sae"][key] == pytest.approx(np.mean(both), abs=1e-12)
        assert result.metrics["sae"][f"{key}_seed_std"] == pytest.approx(np.std(both, ddof=1))
        assert single[0].metrics["sae"][f"{key}_seed_std"] is None


def test_too_few_texts_are_told_before_the_model_runs(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evals.cache.read", lambda *_, **__: pytest.fail("the model was run"))
    path = text_file(tmp_path, ["fox", "dog"], 11)
    sets = (TextFile("file", path),)
    with pytest.raises(UserError, match=r"words: has 11 texts .* at least 12 "):
        sparse_probing.run(some_coder(), model, sparse(path))
    with pytest.raises(UserError, match=r"words: 11 texts of 'fox' .* fewer than the 64 "):
        sae_probes.run(some_coder(), model, sae_probes.Config(HOOK, sets=sets))


def test_a_dictionary_of_another_width_is_told(model: Model, tmp_path: Path) -> None:
    path = text_file(tmp_path, ["fox", "dog"], 70)
    cfg = sae_probes.Config(HOOK, sets=(TextFile("file", path),))
    with pytest.raises(UserError, match=r"8 entries, but .* has 16"):
        sparse_probing.run(some_coder(8), model, sparse(path))
    with pytest.raises(UserError, match=r"8 entries, but .* has 16"):
        sae_probes.run(some_coder(8), model, cfg)


def test_each_class_has_as_many_texts_as_asked_for() -> None:
    label = np.repeat([f"class {c}" for c in range(5)], 400)
    labelled = Labelled("set", [f"text {i}" for i in range(2000)], label, None)
    for most in (200, 300):
        cfg = sae_probes.Config(HOOK, max_texts=most)
        classes, texts = sae_probes._draw(labelled, cfg)
        assert len(classes) == 5
        assert len(np.unique(texts)) == 5 * most // 2
        assert (np.unique(label[texts], return_counts=True)[1] == most // 2).all()
