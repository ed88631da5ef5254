"""Absorption: formulas against plain loops, a hierarchy with a known answer, words and prompts."""

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
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models

from activations import models
from activations.config import validate
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder, Normaliser
from dictlearn.encoders.omp import OMP
from evals import absorption, coding, hierarchy, one_vs_rest, results, spelling
from evals.absorption_scores import READINGS, ClassScore, Config, Half, absorbed, score
from evals.one_vs_rest import Probe
from evals.recovery import plain_coder

HOOK = "blocks.1.hook_resid_post"
D = 16

# The formulas.


def plainly(
    f: np.ndarray, atoms: np.ndarray, x: np.ndarray, w: np.ndarray, main: list[int]
) -> tuple[float, bool]:
    """SAEBench's scores of one row, as reference/saebench.md tells them, latent by latent."""
    w = w / np.sqrt(sum(v * v for v in w))
    p = sum(a * b for a, b in zip(x, w, strict=True))
    cos, part = [], []
    for i in range(len(f)):
        size = np.sqrt(sum(v * v for v in atoms[i]))
        cos.append(sum(a * b for a, b in zip(atoms[i], w, strict=True)) / size)
        part.append(f[i] * size * cos[i])
    m = sum(part[i] for i in main)
    rest = [part[i] for i in range(len(f)) if i not in main and cos[i] >= 0.1 and part[i] > 0]
    most = sum(sorted(rest, reverse=True)[:3])
    if m >= p or most / p < 0.4:
        fraction = 0.0
    elif m <= 0:
        fraction = 1.0
    else:
        q = min(most, p - m)
        fraction = q / (q + m)
    top = max(range(len(f)), key=lambda i: part[i])
    full = all(f[i] < 1e-8 for i in main) and cos[top] >= 0.025 and p >= 0 and part[top] / p >= 0.4
    return fraction, full


def some_rows(seed: int, *, signed: bool) -> tuple[np.ndarray, ...]:
    """Codes, atoms of several norms, rows, and a direction near some of the atoms."""
    rng = np.random.default_rng(seed)
    f = rng.gamma(2, size=(600, 12)) * (rng.random((600, 12)) < 0.4)
    if signed:
        f *= rng.choice([-1, 1], f.shape)
    atoms = rng.standard_normal((12, 6)) + 0.8 * np.eye(1, 6)
    x = f @ atoms + 0.3 * rng.standard_normal((600, 6))
    return f, atoms, x, np.array([2.0, 0.1, 0, 0, 0, 0.3])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("main", [[0], [3, 7]])
def test_the_scores_are_those_of_a_plain_loop(signed: bool, main: list[int]) -> None:
    f, atoms, x, w = some_rows(0, signed=signed)
    fraction, full = absorbed(scipy.sparse.csr_array(f), atoms, x, w, main, signed=False)
    expected = [plainly(f[i], atoms, x[i], w, main) for i in range(len(f))]
    np.testing.assert_allclose(fraction, [one for one, _ in expected], atol=1e-12)
    np.testing.assert_array_equal(full, [one for _, one in expected])
    # Every branch was taken.
    assert (fraction == 0).any()
    assert (fraction == 1).any()
    assert ((fraction > 0.01) & (fraction < 0.99)).any()
    assert full.any()
    assert not full.all()


def test_without_negative_codes_both_readings_agree() -> None:
    f, atoms, x, w = some_rows(1, signed=False)
    codes = scipy.sparse.csr_array(f)
    for mine, theirs in zip(
        absorbed(codes, atoms, x, w, [2]),
        absorbed(codes, atoms, x, w, [2], signed=False),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_the_sign_that_was_stored_does_not_matter() -> None:
    f, atoms, x, w = some_rows(2, signed=True)
    flip = np.where(np.arange(12) % 3 == 0, -1.0, 1.0)
    codes, flipped = scipy.sparse.csr_array(f), scipy.sparse.csr_array(f * flip)
    one = absorbed(codes, atoms, x, w, [0, 4])
    other = absorbed(flipped, atoms * flip[:, None], x, w, [0, 4])
    np.testing.assert_allclose(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    theirs = absorbed(flipped, atoms * flip[:, None], x, w, [0, 4], signed=False)
    assert (theirs[0] != one[0]).any()


def test_a_main_feature_that_fires_negatively_fires() -> None:
    atoms = np.array([[1.0, 0], [1, 0]])
    codes = scipy.sparse.csr_array(np.array([[-0.5, 1.5], [0, 1]]))
    x, w = np.array([[1.0, 0], [1, 0]]), np.array([1.0, 0])
    np.testing.assert_array_equal(absorbed(codes, atoms, x, w, [0])[1], [False, True])
    theirs = absorbed(codes, atoms, x, w, [0], signed=False)[1]
    np.testing.assert_array_equal(theirs, [True, True])


def test_nothing_along_the_probe_is_not_absorbed() -> None:
    atoms, codes = np.eye(2), scipy.sparse.csr_array(np.array([[-2.0, 1], [0, 0]]))
    x = np.array([[-1.0, 0], [0, 0]])
    fraction, full = absorbed(codes, atoms, x, np.array([1.0, 1]), [0])
    np.testing.assert_array_equal(fraction, 0)
    assert not full.any()


# The probes.


def test_the_probe_is_torchs() -> None:
    """One epoch is one batch, so that the order of the rows does not matter."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 5)).astype(np.float32)
    y = rng.random((40, 3)) < 0.3
    got = one_vs_rest.fit(x, y, batch_size=64, epochs=30, decay=1e-2, l1=0.05, seed=7)
    start = np.random.default_rng(7).uniform(-(5**-0.5), 5**-0.5, (3, 6)).astype(np.float32)
    linear = torch.nn.Linear(5, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(start[:, :5]))
        linear.bias.copy_(torch.tensor(start[:, 5]))
    labels = torch.tensor(y, dtype=torch.float32)
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=(40 - labels.sum(0)) / labels.sum(0))
    adam = torch.optim.Adam(linear.parameters(), lr=1e-2, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.ExponentialLR(adam, gamma=1e-3 ** (1 / 30))
    for _ in range(30):
        adam.zero_grad()
        penalty = 0.05 * linear.weight.abs().sum(dim=-1).mean()
        (loss(linear(torch.tensor(x)), labels) + penalty).backward()
        adam.step()
        rate.step()
    np.testing.assert_allclose(got.weight, linear.weight.detach(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got.bias, linear.bias.detach(), rtol=1e-3, atol=1e-5)


def test_a_smaller_last_batch_and_sparse_rows_change_nothing_else() -> None:
    rng = np.random.default_rng(1)
    x = (9 * rng.standard_normal((50, 6)) * (rng.random((50, 6)) < 0.5)).astype(np.float32)
    y = x[:, :2] > 2
    y[:, 1] = False  # a class without positives is no division by zero
    dense = one_vs_rest.fit(x, y, batch_size=16, epochs=300, decay=0, seed=0)
    sparse = one_vs_rest.fit(
        scipy.sparse.csr_array(x), y, batch_size=16, epochs=300, decay=0, seed=0
    )
    np.testing.assert_array_equal(dense.weight, sparse.weight)
    assert np.isfinite(dense.weight).all()
    assert one_vs_rest.f1(y[:, 0], dense.logits(x)[:, 0] > 0) > 0.9
    assert not (dense.logits(x)[:, 1] > 0).any()


def test_main_features_end_where_another_adds_little() -> None:
    rng = np.random.default_rng(2)
    codes = (rng.random((4000, 4)) < [0.3, 0.02, 0.3, 0.3]).astype(float)
    y = codes[:, :3].any(axis=1)
    half = scipy.sparse.csr_array(codes[:2000]), y[:2000]
    other = scipy.sparse.csr_array(codes[2000:]), y[2000:]
    found, scores = one_vs_rest.main_features((2, 0, 1, 3), half, other, jump=0.03)
    assert found == [2, 0]
    assert len(scores) == 3
    assert 0.001 < scores[2] - scores[1] < 0.03  # the rare one adds something
    assert one_vs_rest.main_features((2, 0, 1, 3), half, other, jump=0.001)[0] == [2, 0, 1]
    assert one_vs_rest.main_features((2,), half, other, jump=0.03)[0] == [2]


# The hierarchy.


@pytest.fixture(scope="module")
def truth() -> hierarchy.Hierarchy:
    return hierarchy.plant(
        hierarchy.HierarchyConfig(width=128, parents=4, children=30, parent_rate=0.3, seed=1)
    )


def by_codes(truth: hierarchy.Hierarchy, share: float) -> dict[str, Any]:
    halves = [hierarchy.rows(truth, n, draw=i) for i, n in enumerate((4000, 3000))]
    coded = [hierarchy.codes(truth, here, share) for here in halves]
    atoms = hierarchy.atoms(truth, share)
    for here, f in zip(halves, coded, strict=True):  # they are the rows' codes
        assert np.abs(f @ atoms - here.x).max() < 0.01
    return hierarchy.figures(truth, *halves, coded, atoms, np.zeros(128))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7, 1.0])
def test_what_is_absorbed_is_what_was_built(truth: hierarchy.Hierarchy, share: float) -> None:
    told = by_codes(truth, share)
    assert told["n_parents"] == 4
    for reading in READINGS:
        fraction, full = (
            told[f"{name}_where_children_fire{reading}"]
            for name in ("absorption_fraction", "full_absorption")
        )
        assert fraction == pytest.approx(share, abs=0.02)
        assert full == (share == 1)
        # In half of a parent's rows a child fires.
        assert told[f"absorption_fraction{reading}"] == pytest.approx(share / 2, abs=0.03)
        assert told[f"num_split_features{reading}"] == 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_coder_is_scored_as_its_codes(truth: hierarchy.Hierarchy, share: float) -> None:
    told = hierarchy.score_synthetic(hierarchy.coder(truth, share), truth, n_train=4000)
    assert told["absorption_fraction_where_children_fire"] == pytest.approx(share, abs=0.02)
    assert told["full_absorption_where_children_fire"] == pytest.approx(share, abs=0.02)


def test_scale_mean_and_signs_of_a_coder_change_nothing(truth: hierarchy.Hierarchy) -> None:
    """The same dictionary in other units, centred about its offset, with atoms turned round."""
    one = hierarchy.coder(truth, 1.0)
    flip = jnp.where(jnp.arange(len(one.atoms)) % 2 == 0, -1.0, 1.0)
    shifted = Coder(
        Normaliser(jnp.zeros(128), jnp.asarray(5.0)),
        eqx.tree_at(lambda d: d.atoms, one.dictionary, one.atoms * flip[:, None] * 3),
        one.encoder,
    )
    here, there = (
        hierarchy.score_synthetic(coder, truth, n_train=4000, n_test=2000)
        for coder in (one, shifted)
    )
    assert there["absorption_fraction"] == pytest.approx(here["absorption_fraction"], abs=0.02)
    assert there["full_absorption"] == pytest.approx(here["full_absorption"], abs=0.02)
    # SAEBench's reading misses parents whose atom is stored the other way round.
    assert there["absorption_fraction_saebench"] != pytest.approx(
        here["absorption_fraction"], abs=0.02
    )


def test_an_offset_is_explained_by_no_latent(truth: hierarchy.Hierarchy) -> None:
    """An offset along the probes hides absorption from the readings that count it as p."""
    offset = 2 * truth.parents.sum(axis=0)
    halves = []
    for i, n in enumerate((4000, 2000)):
        here = hierarchy.rows(truth, n, draw=i)
        halves.append(Half(here.x + offset, hierarchy.codes(truth, here, 1.0), here.size > 0))
    true = hierarchy.probe(truth)
    probe = Probe(true.weight, true.bias - 2)
    cfg = Config("planted", k_sparse_probe_batch_size=256)
    for one in score(*halves, hierarchy.atoms(truth, 1.0), offset, probe, list("abcd"), cfg):
        assert one.probe_f1 == 1
        assert one.full["_centred"].mean() == pytest.approx(0.5, abs=0.1)
        np.testing.assert_allclose(one.fraction["_centred"], one.full["_centred"], atol=0.02)
        # p is s + 2 in place of s, and the child's part s is less than 0.4 of that.
        assert not one.full[""].any()
        assert not one.full["_saebench"].any()


def test_the_rows_of_a_hierarchy(truth: hierarchy.Hierarchy) -> None:
    here, again = hierarchy.rows(truth, 500, draw=0), hierarchy.rows(truth, 500, draw=0)
    np.testing.assert_array_equal(here.x, again.x)
    assert (hierarchy.rows(truth, 500, draw=1).x != here.x).any()
    assert (here.child[here.size == 0] == -1).all()
    directions = np.concatenate([truth.parents, truth.children.reshape(-1, 128)])
    np.testing.assert_allclose(directions @ directions.T, np.eye(124), atol=1e-9)
    with pytest.raises(ValueError, match="width: "):
        hierarchy.plant(hierarchy.HierarchyConfig(width=9))


# Classes and metrics.


def few(seed: int = 0, **settings: Any) -> list[ClassScore]:
    """Three classes: a good one, one without training rows, one that the probe cannot tell."""
    rng = np.random.default_rng(3)
    f = rng.random((300, 5)) * (rng.random((300, 5)) < 0.4)
    y = np.stack([f[:, 0] > 0, np.arange(300) >= 250, rng.random(300) < 0.5], axis=1)
    codes = scipy.sparse.csr_array(f)
    halves = [Half(f[part], codes[part], y[part]) for part in (slice(200), slice(200, None))]
    probe = Probe(np.eye(3, 5), np.array([-0.01, 0, -0.5]))
    cfg = Config("x", seed=seed, k_sparse_probe_batch_size=32, **settings)
    return score(*halves, np.eye(5), np.zeros(5), probe, ["a", "b", "c"], cfg)


def test_a_class_without_scores_has_a_reason() -> None:
    good, absent, weak = few()
    assert good.reason is None
    assert absent.reason == "no training word"
    assert weak.reason is not None
    assert "F1" in weak.reason
    assert not absent.fraction
    table = good.table()
    assert table["first_letter"] == "a"
    assert table["num_probe_true_positives"] == len(good.rows)
    assert table["main_features"] == [0]
    assert table["main_features_f1"] > 0.8
    assert {
        "mean_absorption_fraction", "full_absorption_rate", "num_full_absorption",
        "num_split_features",
    } <= set(table)  # fmt: skip


def test_the_scale_of_the_activations_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe on latents sees the same, whatever the units of the model."""
    seen: list[np.ndarray] = []
    fit = one_vs_rest.fit

    def spy(x: Any, *args: Any, **options: Any) -> Probe:
        seen.append(x.toarray())
        return fit(x, *args, **options)

    monkeypatch.setattr(one_vs_rest, "fit", spy)
    f, atoms, x, w = some_rows(4, signed=True)
    y = (x @ w > 0)[:, None]
    codes = scipy.sparse.csr_array(f)
    told = []
    for unit in (1.0, 1000.0):
        halves = [
            Half(unit * x[part], codes[part], y[part]) for part in (slice(400), slice(400, None))
        ]
        probe, cfg = Probe(w[None], np.zeros(1)), Config("x", k_sparse_probe_batch_size=64)
        told += score(*halves, unit * atoms, np.zeros(6), probe, ["a"], cfg, unit=unit)
    np.testing.assert_allclose(seen[0], seen[1])
    np.testing.assert_allclose(seen[0], f[:400] * np.linalg.norm(atoms, axis=1))
    assert told[0].main == told[1].main
    np.testing.assert_allclose(told[0].fraction[""], told[1].fraction[""])


def test_too_few_letters_give_null_with_the_reason() -> None:
    metrics, null = absorption.summary(few(), Config("x"))
    assert set(metrics["mean"].values()) == {None}
    assert set(null) == {f"mean.{key}" for key in metrics["mean"]}
    assert "1 letters" in null["mean.mean_absorption_fraction_score"]
    metrics, null = absorption.summary(few(), Config("x", min_feats_for_eval=1))
    assert metrics["mean"]["mean_num_split_features"] == 1
    # The deviation of one letter is not defined.
    assert all("std_dev" in key for key in null)
    assert len(null) == 3 * len(READINGS)


def test_metrics_are_means_over_letters() -> None:
    rows = np.arange(2)
    scores = [
        ClassScore(
            name, 0.9, None, rows, main=dict.fromkeys(READINGS, main),
            fraction=dict.fromkeys(READINGS, np.array(fraction)),
            full=dict.fromkeys(READINGS, np.array(full)),
        )
        for name, main, fraction, full in (
            ("a", [1], [0.5, 1.0], [False, True]), ("b", [1, 2, 3], [0.0, 0.25], [False, False])
        )
    ]  # fmt: skip
    metrics, null = absorption.summary(scores, Config("x", min_feats_for_eval=2))
    assert not null
    mean = metrics["mean"]
    assert mean["mean_absorption_fraction_score"] == pytest.approx((0.75 + 0.125) / 2)
    assert mean["std_dev_absorption_fraction_score"] == pytest.approx(0.625 / np.sqrt(2))
    assert mean["mean_full_absorption_score"] == pytest.approx(0.25)
    assert mean["mean_num_split_features"] == 2
    assert mean["std_dev_num_split_features"] == pytest.approx(np.sqrt(2))


# Words and prompts.

SYLLABLES = [a + b + c for a in "bcdfg" for b in "aeiou" for c in "nrs"]
TEMPLATE_TOKENS = ["Ġhas", "Ġthe", "Ġfirst", "Ġletter", ":"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """75 syllables are a token each, with and without a space.

    " bad" is in the vocabulary, but a space and a "b" are what its text becomes; so it is two or
    three tokens in a prompt, where the syllables are one.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", *alphabet, *TEMPLATE_TOKENS[:4], *SYLLABLES, *(f"Ġ{w}" for w in SYLLABLES)]
    merges = []
    for word in [*(t[1:] for t in TEMPLATE_TOKENS[:4]), *SYLLABLES]:
        for i in range(2, len(word) + 1):
            merges.append((word[: i - 1], word[i - 1]))
        merges.append(("Ġ", word))
    tokens += [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "Ġbad"]))}
    plain = Tokenizer(token_models.BPE(vocabulary, list(dict.fromkeys(merges))))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>")


def test_words_are_the_alphabetic_tokens(tokenizer: Any) -> None:
    words = spelling.vocabulary(tokenizer)
    assert len(set(words)) == len(words)
    assert {"ban", " ban", "b", " has", " bad"} <= set(words)
    assert not {"<s>", ":", "", " "} & set(words)
    assert all(word.removeprefix(" ").isalpha() and word.isascii() for word in words)


def test_the_hook_is_read_at_the_end_of_the_word(tokenizer: Any) -> None:
    asked = spelling.prompts(tokenizer, n_words=60, n_examples=4, seed=0)
    assert asked.counts["tokens_after_the_word"] == 5  # SAEBench's position -6
    assert asked.counts["dropped_prompts"] == 0
    # BOS and newline; word, 5 of the template, the answer in two, newline; the word.
    assert asked.token.shape == (60, 2 + 4 * 9 + 1)
    assert asked.n_train == 48
    for word, token, letter in zip(asked.word, asked.token, asked.letter, strict=True):
        text = tokenizer.decode(token)
        assert text.startswith("<s>\n")
        assert text.endswith(f"\n{word}")
        assert tokenizer.decode(token[-1:]) == word
        assert spelling.LETTERS[letter] == word.strip()[0].lower()
        examples = [line.partition(" has the first letter: ") for line in text.split("\n")[1:-1]]
        assert len(examples) == 4
        assert all(answer == one.strip()[0].upper() for one, _, answer in examples)
        assert word not in [one for one, _, _ in examples]


def test_examples_come_from_the_words_own_half(tokenizer: Any) -> None:
    asked = spelling.prompts(tokenizer, n_words=60, n_examples=4, seed=0)
    halves = set(asked.word[: asked.n_train]), set(asked.word[asked.n_train :])
    assert not halves[0] & halves[1]
    for i, token in enumerate(asked.token):
        lines = tokenizer.decode(token).split("\n")[1:-1]
        words = {line.partition(" has the first")[0] for line in lines}
        assert words <= halves[i >= asked.n_train]


def test_words_of_another_length_are_dropped_and_counted(tokenizer: Any) -> None:
    # " bad" is a token that the tokenizer never makes of its text.
    assert len(tokenizer(" bad")["input_ids"]) > 1
    asked = spelling.prompts(tokenizer, n_words=None, n_examples=2, seed=0)
    assert asked.counts["dropped_words"] >= 1
    assert asked.counts["vocabulary"] - asked.counts["dropped_words"] == len(asked.word)
    assert " bad" not in asked.word
    assert asked.share == 1


def test_prompts_of_another_length_are_dropped_and_counted(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the length of a word in its line told nothing of its length in a prompt.
    words = [" bad", *SYLLABLES]
    monkeypatch.setattr(spelling, "_usual", lambda *_: words)
    asked = spelling.prompts(tokenizer, n_words=None, n_examples=2, seed=0)
    assert asked.counts["dropped_prompts"] >= 1
    assert " bad" not in asked.word
    for word, token in zip(asked.word, asked.token, strict=True):
        assert tokenizer.decode(token).endswith(f"\n{word}")
        assert " bad has" not in tokenizer.decode(token)


def test_the_seed_is_honoured(tokenizer: Any) -> None:
    one, again, other = (
        spelling.prompts(tokenizer, n_words=50, n_examples=3, seed=seed) for seed in (4, 4, 5)
    )
    assert one.word == again.word
    np.testing.assert_array_equal(one.token, again.token)
    assert one.word != other.word
    assert set(one.word) != set(other.word)


def test_too_few_words_and_slow_tokenizers_are_told(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="6 words"):
        spelling.prompts(tokenizer, n_words=6, n_examples=3, seed=0)

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="fast"):
        spelling.prompts(Slow(), n_words=6, n_examples=3, seed=0)


# With a model.


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tokenizer: Any) -> Model:
    """The tiny model under the tokenizer of syllables; its embedding has more rows than needed."""
    tiny = models.load(f"dir:{tiny_model_dir}")
    size = tiny.bridge.cfg.d_vocab
    assert size >= 300
    return dataclasses.replace(tiny, tokenizer=_Folded(tokenizer, size))


class _Folded:
    """A tokenizer whose ids are folded into a smaller vocabulary."""

    is_fast = True

    def __init__(self, plain: Any, size: int) -> None:
        self._plain, self._size = plain, size
        self.bos_token_id, self.eos_token_id = plain.bos_token_id, None
        self.get_vocab, self.convert_tokens_to_string = (
            plain.get_vocab, plain.convert_tokens_to_string
        )  # fmt: skip

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        coded = dict(self._plain(texts, **options))
        coded["input_ids"] = [[i % self._size for i in ids] for ids in coded["input_ids"]]
        return coded


def small(**settings: Any) -> Config:
    table = {"n_words": 120, "n_examples": 2, "min_feats_for_eval": 2} | settings
    return validate(Config, {"hook": HOOK, "min_probe_f1": 0.1, **table}, "test")


def some_coder(seed: int = 0) -> Coder:
    atoms = np.random.default_rng(seed).standard_normal((40, D)).astype(np.float32)
    return plain_coder(atoms, OMP(k=4))


def test_from_words_to_a_file(model: Model, tmp_path: Path) -> None:
    cfg = small()
    result = absorption.run(some_coder(), model, cfg)
    assert result.family == "absorption_first_letter"
    mean = result.metrics["mean"]
    assert mean["mean_num_split_features"] >= 1
    assert 0 <= mean["mean_absorption_fraction_score"] <= 1
    assert not result.null
    letters = {row["first_letter"] for row in result.details}
    assert letters <= set("bcdfghtl")
    assert letters | set(result.unstructured["letters_left_out"]) == set(spelling.LETTERS)
    assert result.unstructured["letters_left_out"]["z"] in ("no training word", "no test word")
    assert result.unstructured["negative_codes"] > 0
    results.write(tmp_path / "a.json", result, {"id": "x"})
    table = results.read(tmp_path / "a.json")
    assert table["eval_config"]["n_words"] == 120
    assert json.dumps(table)
    again = absorption.run(some_coder(), model, cfg)
    assert again.metrics == result.metrics
    assert absorption.run(some_coder(), model, small(seed=1)).metrics != result.metrics


def test_what_is_read_is_the_models_own(model: Model) -> None:
    found = absorption.prepare(model, small(n_words=30))
    with torch.inference_mode():
        _, cache = model.bridge.run_with_cache(torch.tensor(found.asked.token, dtype=torch.long))
    np.testing.assert_allclose(found.x, cache[HOOK][:, -1].numpy(), rtol=1e-4, atol=1e-5)


def test_codes_and_frame_are_the_coders(model: Model) -> None:
    x = np.random.default_rng(0).standard_normal((300, D)).astype(np.float32)
    plain = some_coder()
    coder = Coder(
        Normaliser(jnp.arange(16.0), jnp.asarray(3.0), jnp.array([2], jnp.int32)),
        eqx.tree_at(lambda d: d.bias, plain.dictionary, jnp.full(D, 0.5)),
        plain.encoder,
    )
    atoms, offset = coding.frame(coder)
    codes, _ = coding.coded(coder, x)
    np.testing.assert_allclose(
        offset[None] + codes @ atoms, coder.decode(coder.encode(x)), rtol=1e-4, atol=1e-4
    )


def test_a_misfit_is_told(model: Model) -> None:
    narrow = plain_coder(np.eye(4, 5, dtype=np.float32), OMP(k=2))
    with pytest.raises(UserError, match=r"5 entries, but .* has 16"):
        absorption.run(narrow, model, small(n_words=30))
    with pytest.raises(UserError, match="hook"):
        absorption.run(some_coder(), model, small(hook="blocks.9.hook_resid_post"))
    with pytest.raises(UserError, match="n_word"):
        validate(Config, {"hook": HOOK, "n_word": 3}, "test")


def test_too_few_words_give_null_with_the_reason(tiny_model_dir: Path) -> None:
    tiny = models.load(f"dir:{tiny_model_dir}")
    result = absorption.run(some_coder(), tiny, Config(HOOK, n_words=12))
    assert set(result.metrics["mean"].values()) == {None}
    assert "12 words" in result.null["mean.mean_full_absorption_score"]
