"""Looking at features: where they fire, what they promote and tell apart, which are alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from activations import models
from activations.models import Model
from activations.store import Store
from activations.terminal import UserError
from dictlearn.artifact import load
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.nn_omp import NonNegativeOMP
from dictlearn.encoders.omp import OMP
from evals.coding import frame
from evals.explore import Explorer, feature_similarity, find
from evals.explore.activity import Activity, Context
from evals.explore.attribution import attribute
from evals.explore.display import Contexts, Rows, plain, shaded
from evals.explore.lens import lens

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return models.load(f"dir:{tiny_model_dir}")


@pytest.fixture(scope="module")
def look(tiny_run: Path, model: Model) -> Explorer:
    return Explorer(tiny_run, model=model)


def coder_of(atoms: np.ndarray, encoder: OMP | NonNegativeOMP) -> Coder:
    d = atoms.shape[1]
    dictionary = Dictionary(jnp.asarray(atoms, jnp.float32), jnp.zeros(d))
    return Coder(Normaliser(jnp.zeros(d), jnp.asarray(1.0)), dictionary, encoder)


# Where features fire.


def test_activity_holds_the_codes_of_the_stores_rows(look: Explorer) -> None:
    store = Store(look.run.metadata["store"]["path"])
    x = np.concatenate([store.activations(shard, HOOK) for shard in store.manifest.shards])
    seen = look.activity
    codes = np.asarray(look.run.coder.encode(x).dense())
    np.testing.assert_allclose(seen.codes.toarray(), codes, atol=1e-4)
    np.testing.assert_array_equal(seen.token.flat[seen.place], store.column("token"))
    np.testing.assert_array_equal(seen.document.flat[seen.place], store.column("document"))


def test_contexts_are_the_tokens_around_a_firing(look: Explorer) -> None:
    seen = look.activity
    for feature in range(3):
        rows, values = seen.of(feature)
        for context, row in zip(seen.contexts(feature, rows[:5]), rows[:5], strict=True):
            at = seen.place[row]
            text = look.model.tokenizer.decode([int(seen.token.flat[at])])
            assert context.tokens[context.at] == text
            assert context.codes[context.at] == values[list(rows).index(row)]
            first = at - context.at  # all of one sequence
            assert first // 12 == (first + len(context.tokens) - 1) // 12
            dense = np.zeros(seen.token.size)
            dense[seen.place[rows]] = values
            np.testing.assert_array_equal(
                context.codes, dense[first : first + len(context.tokens)]
            )  # fmt: skip


def toy(codes: np.ndarray) -> Activity:
    """100 sequences of 10 tokens, one document, codes of every token [1000 m]."""
    import scipy.sparse

    token = np.arange(1000, dtype=np.int32).reshape(100, 10)
    return Activity(
        token, np.zeros_like(token), np.arange(1000), scipy.sparse.csc_array(codes), {7: "seven"}
    )


def test_the_greatest_codes_come_first_and_do_not_overlap() -> None:
    codes = np.random.default_rng(0).standard_normal((1000, 1)).astype(np.float32)
    seen = toy(codes)
    for sign, size in ((0, np.abs(codes)), (1, codes), (-1, -codes)):
        rows = seen.top(0, 12, sign=sign)
        assert (size[rows] > 0).all()
        assert (np.diff(size[rows, 0]) <= 0).all()
        assert rows[0] == size.argmax()
        assert np.abs(np.diff(np.sort(rows))).min() >= 24
    drawn = seen.random(0, 12)
    assert set(drawn) != set(seen.top(0, 12))
    np.testing.assert_array_equal(drawn, seen.random(0, 12))


def test_a_feature_that_never_fires_has_no_contexts() -> None:
    seen = toy(np.zeros((1000, 2), np.float32))
    assert not len(seen.top(1, 5))
    assert seen.contexts(1, np.array([7]))[0].codes.sum() == 0
    assert seen.contexts(1, np.array([7]))[0].tokens[7] == "seven"


@pytest.mark.parametrize("feature", [-1, 24, 10**9])
def test_a_feature_that_is_not_there_is_told(look: Explorer, feature: int) -> None:
    for ask in (look.top_contexts, look.random_contexts, look.logit_lens, look.card):
        with pytest.raises(UserError, match=f"feature {feature}: .* 0 to 23"):
            ask(feature)


def test_without_its_store_the_rest_works(look: Explorer) -> None:
    metadata = {key: value for key, value in look.run.metadata.items() if key != "store"}
    bare = Explorer(dataclasses.replace(look.run, metadata=metadata), model=look.model)
    with pytest.raises(UserError, match="names no store"):
        bare.top_contexts(1)
    assert repr(bare.logit_lens(1)) == repr(look.logit_lens(1))
    gone = metadata | {"store": {"path": "nowhere", "manifest_sha256": ""}}
    with pytest.raises(UserError, match="nowhere"):
        Explorer(dataclasses.replace(look.run, metadata=gone)).top_contexts(1)


# What they promote.


def test_the_lens_is_the_last_norm_and_the_head(model: Model, tiny_model_dir: Path) -> None:
    from transformers import LlamaForCausalLM

    plain_model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    directions = np.random.default_rng(0).standard_normal((5, 16))
    directions[3] = 0
    seen = lens(model, directions, k=4)
    size = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = np.divide(directions, size, out=np.zeros((5, 16)), where=size > 0)
    weight = plain_model.model.norm.weight.detach().numpy()
    logits = (4 * unit * weight) @ plain_model.lm_head.weight.detach().numpy().T
    for row, own in enumerate(logits):
        order = np.argsort(-own, kind="stable")
        np.testing.assert_allclose(seen.up[row], own[order[:4]], atol=1e-4)
        np.testing.assert_allclose(seen.down[row], own[order[::-1][:4]], atol=1e-4)
        if size[row]:
            np.testing.assert_array_equal(seen.promoted[row], order[:4])
    with pytest.raises(UserError, match="directions have 15 entries"):
        lens(model, directions[:, :15])


def test_effects_are_slopes_and_their_sum_is_all_of_x(look: Explorer) -> None:
    coder, model = look.run.coder, look.model
    prompt = "the quick fox and the dog"
    seen = attribute(coder, model, HOOK, prompt, "dog")
    assert seen.log_p < attribute(coder, model, HOOK, prompt).log_p  # that of the likeliest
    assert (np.diff(np.abs(seen.effect)) <= 0).all()
    np.testing.assert_array_equal(seen.special, np.arange(len(seen.tokens)) == 0)
    assert (seen.position > 0).all()  # BOS was not in the fit
    atoms = frame(coder)[0]
    ids = [model.tokenizer.bos_token_id, *model.tokenizer(prompt)["input_ids"]]
    target = model.tokenizer("dog")["input_ids"][0]

    def log_p(step: np.ndarray) -> float:
        def add(x: torch.Tensor, hook: object) -> torch.Tensor:
            return x + torch.from_numpy(step).to(x)

        with torch.inference_mode(), model.bridge.hooks(fwd_hooks=[(HOOK, add)]):
            logits = model.bridge(torch.tensor([ids]), return_type="logits")[0, -1].double()
        return float(logits.log_softmax(-1)[target])

    assert log_p(np.zeros((len(ids), 16))) == pytest.approx(seen.log_p, abs=1e-5)
    for i in (0, 1, 5):
        step = np.zeros((len(ids), 16))
        step[seen.position[i]] = seen.code[i] * atoms[seen.feature[i]]
        slope = (log_p(1e-2 * step) - log_p(-1e-2 * step)) / 2e-2
        assert slope == pytest.approx(seen.effect[i], rel=0.02, abs=1e-4)
    # x . g, by moving all of x: the parts leave nothing out.
    whole: list[np.ndarray] = []
    with model.bridge.hooks(fwd_hooks=[(HOOK, lambda x, hook: whole.append(x.numpy()))]), \
            torch.inference_mode():  # fmt: skip
        model.bridge(torch.tensor([ids]))
    slope = (log_p(1e-3 * whole[0][0]) - log_p(-1e-3 * whole[0][0])) / 2e-3
    total = seen.effect.sum() + seen.error.sum() + seen.offset.sum()
    assert total == pytest.approx(slope, rel=0.05, abs=1e-3)


@pytest.mark.parametrize(("prompt", "target"), [("", None), ("the fox", "")])
def test_an_empty_prompt_is_told(look: Explorer, prompt: str, target: str | None) -> None:
    with pytest.raises(UserError, match="is empty"):
        look.attribute(prompt, target)


# Which tell texts apart.


def test_auroc_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (30, 6)).astype(float)
    y = rng.random(30) < 0.4
    wanted = [roc_auc_score(y, column) for column in values.T]
    np.testing.assert_allclose(find.auroc(values, y), wanted)


def test_features_are_measured_on_texts_that_did_not_choose_them(
    look: Explorer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    words = ["fox", "lazy", "dog", "quick", "mind", "the"]
    texts = [" ".join(rng.choice(words, 12)) for _ in range(120)]
    ask = find.find_features
    same = ask(look.run.coder, look.model, HOOK, texts[:60], texts[60:], n=5)
    assert all(abs(one.chosen_auroc - 0.5) >= abs(same[-1].chosen_auroc - 0.5) for one in same)
    assert np.mean([abs(one.chosen_auroc - 0.5) for one in same]) > np.mean(
        [abs(one.auroc - 0.5) for one in same]
    )  # labels mean nothing: the choice flatters, the measure does not
    told = ask(look.run.coder, look.model, HOOK, ["fox fox fox"] * 9, ["mind dog"] * 9, n=3)
    assert {one.auroc for one in told} <= {0.0, 1.0}
    with pytest.raises(UserError, match="got 3 positive and 9 negative"):
        ask(look.run.coder, look.model, HOOK, texts[:3], texts[:9])
    assert "held-out AUROC" in repr(look.find_features(texts[:60], texts[60:]))


# Which are alike.


def test_atoms_are_matched_whatever_their_order_and_sign() -> None:
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((30, 12))
    order, sign = rng.permutation(30), rng.choice([-1, 1], 30)
    other = sign[:, None] * atoms[order] * rng.uniform(1, 3, (30, 1))
    seen = feature_similarity(coder_of(atoms, OMP(k=3)), coder_of(other, OMP(k=3)))
    assert seen.signed
    assert seen.mean == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(order[seen.b], seen.a)
    np.testing.assert_array_equal(np.sign(seen.cosine), sign[seen.b])
    assert seen.control < 0.9
    assert seen.share(0.99) == 1
    one_sided = NonNegativeOMP(k=3)
    seen = feature_similarity(coder_of(atoms, one_sided), coder_of(other, one_sided))
    assert not seen.signed
    assert (seen.cosine > 0.999).sum() == (sign > 0).sum()
    assert "30 pairs" in repr(seen)


def test_dictionaries_of_other_widths_are_not_compared(look: Explorer) -> None:
    with pytest.raises(UserError, match="16 entries in one dictionary and 12"):
        feature_similarity(look.run, coder_of(np.eye(12), OMP(k=3)))


def test_a_dictionary_of_another_size_is_matched_as_far_as_it_goes(look: Explorer) -> None:
    few = eqx.tree_at(lambda c: c.dictionary.atoms, look.run.coder, look.run.coder.atoms[:10])
    seen = feature_similarity(look.run, few)
    assert len(seen.a) == 10
    assert seen.mean == pytest.approx(1, abs=1e-5)


# What is seen.


def test_markup_and_control_characters_are_shown_and_not_executed() -> None:
    context = Context(
        ["<script>", "a\n", "\x07", "\u202e", " b"], np.array([0, 2.0, -1, 0, 0]), 1, 0
    )
    page = shaded(context, 2.0)
    assert "<script" not in page
    assert "&lt;script&gt;a".replace("a", "") in page
    assert "⏎" in page
    assert not {"\n", "\x07", "\u202e"} & set(page)
    assert plain(context) == "<script>[a⏎]2 [\ufffd]-1 \ufffd b"
    warm, cold = page.index("230, 126, 34"), page.index("52, 120, 246")
    assert warm < cold
    assert "<td" in Contexts([context])._repr_html_()
    assert "&lt;b&gt;" in Rows("<b>", ["<b>"], [["<b>"]])._repr_html_()
    assert "<b>" not in Rows("t", ["<b>"], [["<b>"]])._repr_html_().replace("<p><b>t</b></p>", "")


def test_a_card_is_rich_in_a_notebook_and_plain_in_a_terminal(look: Explorer) -> None:
    feature = int(np.argmax(np.diff(look.activity.codes.indptr)))
    card = look.card(feature)
    for text in (repr(card), card._repr_html_()):
        assert f"feature {feature}" in text
        assert "logit lens" in text
        assert "top: positive codes" in text
        assert "drawn" in text
    assert "log p(" in repr(look.attribute("the fox"))
    before = look.model.bridge(torch.tensor([[0, 70, 71]]), return_type="logits")
    with look.steer(feature, 50.0):
        after = look.model.bridge(torch.tensor([[0, 70, 71]]), return_type="logits")
    assert not torch.equal(before, after)
    assert load(look.run.path).metadata["hook"] == look.hook
