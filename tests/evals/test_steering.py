"""Steering: against plain forwards, planted directions, texts and marks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import torch

from activations import models
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.activations import AbsTopK
from dictlearn.encoders.linear import Linear
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP
from evals import cache, results, steering
from evals.cache import Block
from evals.pooled import Pooled
from evals.steering import (
    Config,
    bidirectionality,
    concepts,
    directions,
    family,
    rating,
    steer,
)
from evals.steering.concepts import Part, WordClassifier, telling_tokens
from evals.steering.fluency import Fluency, bits_per_byte, distinct_2
from evals.steering.matched_kl import Contexts
from evals.steering.sampling import samples
from evals.steering.scores import OWN, Marked, Text, summary
from evals.texts import Labelled, Occupations

HOOK, D, M = "blocks.1.hook_resid_post", 16, 24
NEURONS = "blocks.1.mlp.hook_post"


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return models.load(f"dir:{tiny_model_dir}")


@pytest.fixture(scope="module")
def token(model: Model) -> np.ndarray:
    ids = np.random.default_rng(0).integers(2, 290, (4, 7))
    ids[:, 0] = model.tokenizer.bos_token_id
    return ids


def sae(seed: int = 0, d: int = D) -> Coder:
    """Signed codes, off centre and not of unit scale or norm."""
    rng = np.random.default_rng(seed)
    atoms, weight = (rng.standard_normal((M, d)).astype(np.float32) / 4 for _ in range(2))
    mean = jnp.asarray(rng.standard_normal(d).astype(np.float32) / 10)
    return Coder(
        Normaliser(mean, jnp.asarray(1.5)), Dictionary(jnp.asarray(atoms), jnp.zeros(d)),
        Linear(jnp.asarray(weight), jnp.zeros(M), AbsTopK(4)),
    )  # fmt: skip


def seen(model: Model, token: np.ndarray, hook: str = HOOK) -> np.ndarray:
    """What the hook sees, and what is put there by those before."""
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        hooks = [(hook, lambda x, hook: found.update(x=x.clone()))]
        with model.bridge.hooks(fwd_hooks=hooks):
            model.bridge(torch.from_numpy(token), return_type="logits", use_cache=False)
    return found["x"].numpy()


def put(model: Model, token: np.ndarray, x: np.ndarray, hook: str = HOOK) -> np.ndarray:
    """Logits with x at the hook."""
    new = torch.from_numpy(x.astype(np.float32))
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=[(hook, lambda seen, hook: new)]):
        return model.bridge(torch.from_numpy(token), return_type="logits", use_cache=False).numpy()


def logits(model: Model, token: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model.bridge(torch.from_numpy(token), return_type="logits", use_cache=False).numpy()


def unit(coder: Coder, feature: int) -> tuple[np.ndarray, float]:
    """An atom's direction, and its length in raw units."""
    raw = np.array(coder.dictionary.atoms[feature], float) * float(coder.normaliser.scale)
    return raw / np.linalg.norm(raw), float(np.linalg.norm(raw))


@pytest.mark.parametrize("hook", [HOOK, NEURONS])
@pytest.mark.parametrize("strength", [0.7, np.array([0.0, 1.0, -2.0, 3.0])])
def test_adding_goes_along_the_atom_behind_the_first_position(
    model: Model, token: np.ndarray, strength: Any, hook: str
) -> None:
    x = seen(model, token, hook)
    coder = sae(d=x.shape[-1])
    before = logits(model, token)
    with steer(model, coder, 5, strength, hook=hook):
        found = logits(model, token)
    x[:, 1:] += np.broadcast_to(strength, 4)[:, None, None] * unit(coder, 5)[0]
    np.testing.assert_allclose(found, put(model, token, x, hook), atol=1e-5)
    assert np.abs(found - before)[1:].max() > 1e-3
    np.testing.assert_array_equal(logits(model, token), before)  # nothing stays behind


@pytest.mark.parametrize("mode", ["clamp", "ablate"])
def test_clamping_moves_the_code_alone_and_keeps_the_rest(
    model: Model, token: np.ndarray, mode: Any
) -> None:
    coder, strength = sae(), 2.5
    x = seen(model, token)
    feature = int(np.abs(np.asarray(coder.encode(x[0]).dense())).sum(axis=0).argmax())
    with steer(model, coder, feature, strength, mode, hook=HOOK):
        found = logits(model, token)
    direction, length = unit(coder, feature)
    goal = strength if mode == "clamp" else 0.0
    for row in x:
        codes = np.asarray(coder.encode(row).dense())[:, feature] * length
        assert (codes != 0).any()
        row[1:] += (goal - codes[1:, None]) * direction
    np.testing.assert_allclose(found, put(model, token, x), atol=1e-5)


def test_clamped_coordinates_of_a_whole_dictionary_are_what_was_asked_for(
    model: Model, token: np.ndarray
) -> None:
    axes = Dictionary(3 * jnp.eye(D), jnp.zeros(D))
    coder = Coder(Normaliser(jnp.zeros(D), jnp.asarray(0.5)), axes, OMP(k=D))
    with steer(model, coder, 2, -1.25, "clamp", hook=HOOK):
        x = seen(model, token)
    np.testing.assert_allclose(x[:, 1:, 2], -1.25, atol=1e-4)


def test_generation_with_a_cache_is_steered_as_without(model: Model, token: np.ndarray) -> None:
    coder, ids = sae(), token[:2]
    with steer(model, coder, 3, 4.0, hook=HOOK), torch.inference_mode():
        cached = model.bridge.generate(
            torch.from_numpy(ids), max_new_tokens=6, do_sample=False, stop_at_eos=False,
            verbose=False, return_type="tokens",
        ).numpy()  # fmt: skip
    plain = ids
    for _ in range(6):
        x = seen(model, plain)
        x[:, 1:] += 4.0 * unit(coder, 3)[0]
        plain = np.concatenate([plain, put(model, plain, x)[:, -1].argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(cached, plain)


@pytest.mark.parametrize(
    ("arguments", "hook", "message"),
    [
        ((M, 1.0), HOOK, "feature 24: the dictionary has features 0 to 23"),
        ((-1, 1.0), HOOK, "features 0 to 23"),
        ((0, float("nan")), HOOK, "expected finite numbers"),
        ((0, np.array([1.0, np.inf])), HOOK, "expected finite numbers"),
        ((0, 1.0, "push"), HOOK, "expected add, clamp or ablate"),
        ((0, 1.0), "blocks.9.hook_resid_post", "out of range"),
        ((0, 1.0), "blocks.1.mlp.hook_post", "rows have 16 entries"),
    ],
)
def test_mistakes_are_named(model: Model, arguments: Any, hook: str, message: str) -> None:
    with pytest.raises(UserError, match=message), steer(model, sae(), *arguments, hook=hook):
        pass


def test_a_zero_atom_points_nowhere(model: Model) -> None:
    coder = eqx.tree_at(lambda c: c.dictionary.atoms, sae(), replace_fn=lambda a: a.at[1].set(0))
    with pytest.raises(UserError, match="atom is zero"), steer(model, coder, 1, 1.0, hook=HOOK):
        pass


# Matched KL.


def kl_of(model: Model, token: np.ndarray, x: np.ndarray, hook: str) -> float:
    p, q = (
        torch.from_numpy(of[:, -1]).double().log_softmax(-1).numpy()
        for of in (logits(model, token), put(model, token, x, hook))
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("hook", [HOOK, NEURONS])
def test_strengths_have_the_kl_that_was_asked_for(
    model: Model, token: np.ndarray, hook: str
) -> None:
    untouched = seen(model, token, hook)
    direction = unit(sae(d=untouched.shape[-1]), 7)[0]
    goals = np.array([1e-5, 1e-4, 1e-3])
    strength, kl = Contexts(model, hook, token).matched(direction, goals)
    np.testing.assert_allclose(kl, goals, rtol=0.02)
    for own, goal in zip(strength, goals, strict=True):
        x = untouched.copy()
        x[:, 1:] += own * direction
        assert kl_of(model, token, x, hook) == pytest.approx(goal, rel=0.03)
        for less in own * np.linspace(0.05, 0.9, 8):  # the smallest one
            x = untouched.copy()
            x[:, 1:] += less * direction
            assert kl_of(model, token, x, hook) < goal


def test_out_of_reach_and_broken_strengths_are_nan(model: Model, token: np.ndarray) -> None:
    contexts = Contexts(model, HOOK, token)
    strength, kl = contexts.matched(unit(sae(), 7)[0], np.array([1e-4, 19.0]))
    assert np.isfinite(strength[0])
    assert np.isnan(strength[1])
    assert np.isnan(kl[1])
    nothing = contexts.matched(np.zeros(D), np.array([1e-4]))
    assert np.isnan(nothing[0]).all()
    assert np.isinf(contexts.kl(np.full(D, np.nan), np.array([1.0]))).all()


def test_logit_shift_is_the_rise_above_that_of_all(model: Model, token: np.ndarray) -> None:
    direction, words = unit(sae(), 7)[0], np.array([5, 17, 200])
    found = Contexts(model, HOOK, token).logit_shift(direction, np.array([0.0, 3.0]), words)
    x = seen(model, token)
    x[:, 1:] += 3.0 * direction
    rise = (put(model, token, x) - logits(model, token))[:, -1].astype(float)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx((rise[:, words].mean(1) - rise.mean(1)).mean(), abs=1e-5)


# Directions.


def test_directions_find_what_is_planted() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(40) < 20
    axis = np.zeros(D)
    axis[3] = 1
    x = rng.standard_normal((40, D)) * 0.5 - 3 * np.where(y, 1, 0)[:, None] * axis
    x[:, 9] = np.tile(8 * rng.standard_normal(20), 2)  # most variance, and the same on both sides
    atoms = 0.5 * np.eye(M, D)
    coder = Coder(
        Normaliser(jnp.zeros(D), jnp.asarray(2.0)), Dictionary(jnp.asarray(atoms), jnp.zeros(D)),
        OMP(k=2),
    )  # fmt: skip
    codes = np.zeros((40, M))
    codes[:, 3], codes[:, 5] = x[:, 3], 0.3
    found = directions.directions(coder, Pooled(x, scipy.sparse.csr_array(codes), y * 1), y, seed=0)
    assert found["feature"].feature == 3
    np.testing.assert_allclose(found["feature"].vector, -axis)  # the sense of the concept
    assert found["random_feature"].feature in (3, 5)  # of those that fire
    assert found["diff_means"].vector @ -axis > 0.7
    assert found["probe"].vector @ -axis > 0.5
    assert abs(found["pca"].vector[9]) > 0.99
    assert {name for name, of in found.items() if of.n_labels} == {
        "feature", "diff_means", "probe", "pca",
    }  # fmt: skip
    for one in found.values():
        assert np.linalg.norm(one.vector) == pytest.approx(1)
    again = directions.directions(coder, Pooled(x, scipy.sparse.csr_array(codes), y * 1), y, seed=1)
    assert abs(again["random_direction"].vector @ found["random_direction"].vector) < 0.9
    none = Pooled(x, scipy.sparse.csr_array(codes.shape), y * 1)
    with pytest.raises(UserError, match="no latent"):
        directions.directions(coder, none, y, seed=0)


def test_detection_in_closed_form() -> None:
    x = np.array([[1.0, 0], [0, 2.0], [3.0, 4.0], [-1.0, 0], [0.1, 0.995]])
    start, y = np.array([0, 2, 3, 5]), np.array([True, False, False])
    others = (0.6 + 0.1 / np.hypot(0.1, 0.995)) / 2
    found = directions.detection(np.array([1.0, 0]), x, start, y)
    assert found == pytest.approx(np.log(1.0 / others))
    assert directions.detection(np.array([-1.0, 0]), x, start, y) is None


# Texts.


def test_parts_of_a_concept_do_not_meet() -> None:
    labelled = Occupations("occupations", 40).read()
    one = concepts.concept(labelled, "nurse", 15, seed=0)
    parts = [one.choose, one.learn, one.held_out, one.detect]
    for a, b in itertools.combinations(parts, 2):
        assert not {*a.text} & {*b.text}
    label = dict(zip(labelled.text, labelled.label, strict=True))
    for part in parts:
        assert part.y.sum() * 2 == len(part.y)
        np.testing.assert_array_equal([label[text] == "nurse" for text in part.text], part.y)
    with pytest.raises(UserError, match="has no class 'baker'"):
        concepts.concept(labelled, "baker", 15, seed=0)
    with pytest.raises(UserError, match="expected at least 400"):
        concepts.concept(labelled, "nurse", 100, seed=0)


def test_the_classifier_learns_words_and_is_at_chance_without_any() -> None:
    labelled = Occupations("occupations", 60).read()
    classifier = WordClassifier(concepts.concept(labelled, "nurse", 20, seed=0))
    assert classifier.accuracy > 0.95
    p = classifier.probability(["She changes bandages on the ward", "He drafts contracts"])
    assert p[0] > 0.5 > p[1]
    mixed = dataclasses.replace(
        labelled, label=np.random.default_rng(0).permutation(labelled.label)
    )
    assert WordClassifier(concepts.concept(mixed, "nurse", 20, seed=0)).accuracy < 0.75


def test_telling_tokens_are_the_planted_ones() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) < 30
    ids = [np.append(rng.integers(0, 50, 40), [70, 71] * 3 if own else [80] * 6) for own in y]
    assert {*telling_tokens(ids, y, 2, 100)} == {70, 71}
    assert {*telling_tokens(ids, ~y, 1, 100)} == {80}


def test_bits_per_byte_are_those_of_the_model_and_loops_are_not_fluent(
    model: Model, tiny_model_dir: Path
) -> None:
    texts = ["The quick brown fox", "and the dog does not mind.", ""]
    found = bits_per_byte(f"dir:{tiny_model_dir}", texts)
    for text, own in zip(texts[:2], found, strict=False):
        ids = np.array([model.tokenizer.bos_token_id, *model.tokenizer(text)["input_ids"]])[None]
        log_p = torch.from_numpy(logits(model, ids)).double().log_softmax(-1)[0, :-1]
        nats = -log_p.gather(1, torch.from_numpy(ids[0, 1:, None])).sum()
        assert own == pytest.approx(float(nats) / np.log(2) / len(text), rel=1e-5)
    assert np.isnan(found[2])
    assert distinct_2("a b a b a b") == pytest.approx(2 / 5)
    assert distinct_2("one") == 1
    judge = Fluency.of(np.linspace(1, 2, 50), np.linspace(0.8, 1, 50))
    told = judge.of_texts(np.array([1.5, 0.1, 2.5, np.nan]), np.array([1.0, 0.2, 1.0, 1.0]))
    assert told.tolist() == [True, False, False, False]


# Figures.


def marked(effect: np.ndarray, fluent: np.ndarray) -> Marked:
    """Of marks [m g p], of one concept and a text each; methods are "feature", "other"."""
    places = [*np.ndindex(*effect.shape)]
    names = ("feature", "other")
    texts = [Text("c", names[m], g, p, "", "") for m, g, p in places]
    texts += [Text("", OWN, 0, p, "", "") for p in range(effect.shape[2])]
    pad = np.full(effect.shape[2], np.nan)
    a, b = (np.append(of.ravel(), pad) for of in (effect, fluent))
    return Marked(texts, a, b, a, b, np.full((2, len(texts)), np.nan))


def test_the_kl_is_chosen_on_one_half_and_scored_on_the_other() -> None:
    effect, fluent = np.zeros((2, 3, 4)), np.ones((2, 3, 4))
    effect[0, 1, :2], effect[0, 1, 2:] = 0.9, 0.3  # chosen, and not so good afterwards
    effect[0, 2, 2:] = 1.0  # would be better
    effect[1, 0], fluent[1, 0] = 0.6, 0.5
    found, null = summary(marked(effect, fluent), ["feature", "other"], ["c"], 3, 4, seed=0)
    assert found["feature"]["effect"] == pytest.approx(0.3)
    assert found["feature"]["score"] == pytest.approx(2 * 0.3 / 1.3)
    assert found["other"]["score"] == pytest.approx(2 * 0.6 * 0.5 / 1.1)
    difference = 2 * 0.3 / 1.3 - 0.6 / 1.1
    assert found["other"]["feature_above"] == pytest.approx(difference)
    low, high = found["other"]["feature_above_interval"]
    assert low == pytest.approx(difference)  # all prompts are alike
    assert high == pytest.approx(difference)
    assert found["feature"]["feature_above"] is None
    assert "itself" in null["feature.feature_above"]
    assert found["feature"]["judge_score"] is None
    assert "judge" in null["feature.judge_score"]


def test_no_reach_is_no_effect_and_no_classifier_is_null() -> None:
    effect, fluent = np.full((2, 2, 4), 0.5), np.ones((2, 2, 4))
    effect[1] = np.nan  # no text at all
    found, _ = summary(marked(effect, fluent), ["feature", "other"], ["c"], 2, 4, seed=0)
    assert found["other"]["score"] == 0
    assert found["other"]["effect"] == 0
    assert found["feature"]["score"] == pytest.approx(2 * 0.5 / 1.5)
    effect[0] = np.nan
    found, null = summary(marked(effect, fluent), ["feature", "other"], ["c"], 2, 4, seed=0)
    assert found["feature"]["score"] is None
    assert "classifier" in null["feature.score"]


class Says:
    """A judge that answers by a function of the prompt."""

    name = "stand-in"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def ask(self, prompts: list[str], *, max_tokens: int) -> list[str]:
        del max_tokens
        return [self.answer(prompt) for prompt in prompts]


def test_a_judge_is_believed_only_if_it_knows_labelled_texts() -> None:
    texts = [f"{word} went over there and it was {i} in the end" for i in range(8)
             for word in ("Whale", "Tax")]  # fmt: skip
    known = Part(texts, np.array([text.startswith("Whale") for text in texts]))

    def good(prompt: str) -> str:
        text = prompt.split("Text:\n")[1].split("\n\nAnswer")[0]
        if "subject: whales" in prompt:
            return "2" if "Whale" in text else "Mark: 0."
        return " 2\n" if text in texts else "0"

    assert rating.doubt(Says(good), "whales", known, seed=0) is None  # pyright: ignore
    for answer in ("1", "I would rather not.", "22"):
        why = rating.doubt(Says(lambda _, a=answer: a), "whales", known, seed=0)  # pyright: ignore
        assert why is not None
        assert "AUC of 0.50" in why
    marks = rating.concept_marks(Says(lambda _: "12"), "x", ["a"])  # pyright: ignore
    assert np.isnan(marks).all()
    np.testing.assert_allclose(
        rating.harmonic(np.array([2.0, 0, -1]), np.array([1.0, 2, 1])), [4 / 3, 0, 0]
    )


# Two signs.


@pytest.mark.parametrize("kind", ["signed", "one-sided", "one-sided without opposites"])
def test_opposites_are_found_by_sign_or_by_antipodes(
    kind: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = len(bidirectionality.PAIRS)
    rows = np.zeros((pairs, 2, 6, pairs), np.float32)
    for p in range(pairs):
        rows[p, 0, :, p], rows[p, 1, :, p] = 1, -1
    flat = rows.reshape(-1, pairs)
    blocks = [Block(flat, np.arange(len(flat) + 1))]
    monkeypatch.setattr(cache, "read", lambda *_, **__: iter(blocks))
    eye = np.eye(pairs, dtype=np.float32)
    atoms = eye if kind != "one-sided" else np.concatenate([eye, -eye])
    encoder = OMP(k=1) if kind == "signed" else NonNegativeOMP(k=1)
    coder = Coder(
        Normaliser(jnp.zeros(pairs), jnp.ones(())),
        Dictionary(jnp.asarray(atoms), jnp.zeros(pairs)), encoder,
    )  # fmt: skip
    found = bidirectionality.bidirectionality(coder, model, HOOK, seed=0)
    assert found["separated"] == (kind == "signed")
    assert found["separated_antipodal"] == (kind == "one-sided")
    assert found["antipodal_atoms"] == (kind == "one-sided")
    assert found["negative_codes"] == (0.5 if kind == "signed" else 0)
    assert found["separated_control"] == 0
    assert found["separated_antipodal_control"] == 0


# The family.


def test_the_whole_family_on_a_tiny_model(
    model: Model, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))
    cfg = Config(
        HOOK, f"dir:{tiny_model_dir}", Occupations("occupations", 40), ("nurse", "attorney"),
        texts=10, context_length=24, prompts=("The fox", "The dog", "and the"), samples=1,
        new_tokens=5, kl=(1e-4, 2e-4, 15.0), contexts=4,
    )  # fmt: skip
    said = []
    monkeypatch.setattr(family, "samples", lambda *a, **k: said.append(0) or samples(*a, **k))
    with monkeypatch.context() as stopped:
        stopped.setattr(family, "detection", Mock(side_effect=[None] * 9 + [KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            steering.run(sae(), model, cfg)
    assert len(said) == 12  # the own texts, six directions and prompting; four directions
    result = steering.run(sae(), model, cfg)
    assert len(said) == 1 + 2 * 7  # what was said before the stop is not said again
    methods = ["feature", "diff_means", "probe", "pca", "random_feature", "random_direction"]
    assert [*result.metrics] == [*methods, "prompt", "bidirectionality"]
    rows = [row for row in result.details if row["kl_goal"] == 15.0]
    assert all(row["strength"] is None and row["text"] is None for row in rows)
    near = [row for row in result.details if row["kl_goal"] == 2e-4]
    assert len(near) == 12
    for row in near:
        assert row["kl"] == pytest.approx(2e-4, rel=0.03)
        assert row["text"].startswith(("The fox", "The dog", "and the"))
    for method in methods:
        assert np.isfinite(result.metrics[method]["logit_shift"])
    assert "prompt.logit_shift" in result.null
    file = tmp_path / "steering.json"
    results.write(file, result, {"id": "x"})
    again = steering.run(sae(), model, cfg)
    assert json.loads(json.dumps(again.metrics)) == json.loads(json.dumps(result.metrics))
    assert len(said) == 15
    shutil.rmtree(tmp_path / "steering")
    anew = steering.run(sae(), model, cfg)
    assert json.loads(json.dumps(anew.metrics)) == json.loads(json.dumps(result.metrics))
    assert len(said) == 30
    steering.run(sae(seed=1), model, cfg)
    assert len(said) <= 30 + 2 * 2  # only what comes from the dictionary is another
    other = dataclasses.replace(cfg, concepts=("baker",))
    with pytest.raises(UserError, match="has no class 'baker'"):
        steering.run(sae(), model, other)


def test_a_classifier_that_is_not_good_enough_gives_null(
    model: Model, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))
    told = Occupations("occupations", 40).read()
    mixed = dataclasses.replace(told, label=np.random.default_rng(0).permutation(told.label))
    monkeypatch.setattr(Occupations, "read", lambda _: mixed)
    cfg = Config(
        HOOK, f"dir:{tiny_model_dir}", Occupations("occupations", 40), ("nurse",), texts=10,
        context_length=24, prompts=("The fox", "The dog"), samples=1, new_tokens=3, kl=(1e-4,),
        contexts=4,
    )  # fmt: skip
    result = steering.run(sae(), model, cfg)
    assert result.metrics["feature"]["score"] is None
    assert "classifier" in result.null["feature.score"]
    assert isinstance(told, Labelled)
