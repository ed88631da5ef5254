"""RAVEL: a model whose answers are known by construction, pairs against plain loops, bad files."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models

from activations import models
from activations.config import validate
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder, Dictionary, Normaliser
from dictlearn.encoders.omp import OMP
from evals import ravel, results
from evals.coding import coded, frame
from evals.ravel import Config, family
from evals.ravel import data as ravel_data
from evals.ravel.data import Known, Pairs
from evals.ravel.masks import Space
from evals.ravel.patched import Patched
from evals.recovery import plain_coder

HOOK = "blocks.0.hook_resid_post"
D, VALUES, NAMES = 16, 4, 3
# Two attributes in four directions each, and two questions.
COMBINED = list(itertools.product(range(VALUES), range(VALUES)))
ENTITIES = {f"e{a}{b}{i}": (a, b) for a, b in COMBINED for i in range(NAMES)}
WORDS = ["<s>", "qa", "qb", "then", *(f"{x}{v}" for x in "ab" for v in range(VALUES)), *ENTITIES]
TEMPLATES = {"A": ["%s qa", "then %s qa"], "B": ["%s qb", "then then %s qb"]}


def rotation() -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0].astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """What stands in a row's directions 0 to 3 answers question a, in 4 to 7 question b.

    An entity's row is 1 in its two directions; the second block's attention takes the mean of all
    rows so far, and the head adds each direction to one answer's logit, and a question to all of
    its answers'. All of it is rotated, so that no coordinate is a direction.
    """
    turn = torch.tensor(rotation())
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    plain = Tokenizer(token_models.WordLevel(vocabulary, unk_token="then"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=D, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    llama: Any = transformers.LlamaForCausalLM(config)
    embed, head = torch.zeros(len(WORDS), D), torch.zeros(len(WORDS), D)
    for entity, (a, b) in ENTITIES.items():
        embed[vocabulary[entity], [a, VALUES + b]] = 1
    for i, x in enumerate("ab"):
        embed[vocabulary[f"q{x}"], 8 + i] = 1
        for v in range(VALUES):
            head[vocabulary[f"{x}{v}"], [VALUES * i + v, 8 + i]] = torch.tensor([1.0, 5])
    with torch.no_grad():
        for parameter in llama.model.layers.parameters():
            parameter.zero_()
        for layer in llama.model.layers:
            layer.input_layernorm.weight.fill_(1)
            layer.post_attention_layernorm.weight.fill_(1)
        attention = llama.model.layers[1].self_attn
        attention.v_proj.weight.copy_(torch.eye(D))
        attention.o_proj.weight.copy_(3 * torch.eye(D))
        llama.model.embed_tokens.weight.copy_(embed @ turn)
        llama.lm_head.weight.copy_(head @ turn)
    directory = tmp_path_factory.mktemp("models") / "planted"
    llama.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return models.load(f"dir:{directory}")


def write(folder: Path, answers: dict[str, Any], templates: dict[str, Any]) -> Path:
    for kind, table in (("attribute_to_prompts", templates), ("entity_attributes", answers)):
        (folder / f"ravel_thing_{kind}.json").write_text(json.dumps(table))
    return folder


TRUTH = {entity: {"A": f"a{a}", "B": f"b{b}"} for entity, (a, b) in ENTITIES.items()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path, TRUTH, TEMPLATES)


def settings(data: Path, **more: Any) -> Config:
    table = {
        "hook": HOOK, "data": str(data), "entity": "thing", "attributes": ["A", "B"],
        "n_pairs": 100, "n_templates": 2, "n_seeds": 1, "batch_size": 32, "learning_rate": 0.05,
        "answer_tokens": 2,
    } | more  # fmt: skip
    return validate(Config, table, "test")


def directions(rows: np.ndarray) -> np.ndarray:
    return (rows @ rotation()).astype(np.float32)


# What the mask finds.


def test_attributes_in_latents_of_their_own_come_apart(model: Model, data: Path) -> None:
    coder = plain_coder(directions(np.eye(D)), OMP(k=4))
    result = ravel.run(coder, model, settings(data, n_seeds=2))
    told = result.metrics["ravel"]
    assert told["cause_score"] > 0.95
    assert told["isolation_score"] > 0.95
    assert told["disentanglement_score"] == pytest.approx(
        (told["cause_score"] + told["isolation_score"]) / 2
    )
    assert told["disentanglement_score_with_error"] > 0.95
    # Everything is swapped: every answer is the source's.
    assert told["cause_score_full_patch"] == 1
    assert told["isolation_score_full_patch"] == 0
    # No coordinate is a direction.
    assert told["disentanglement_score_neurons"] < 0.9
    assert told["disentanglement_score_random_mask"] < 0.9
    assert told["disentanglement_score_seed_std"] < 0.05
    assert not result.null
    for row in result.details:
        assert (row["cause_attribute"], row["isolated_attribute"]) in (("A", "B"), ("B", "A"))
        assert row["n_latents_full_patch"] == D
        assert row["n_latents_random_mask"] == row["n_latents"] >= VALUES
    assert [row["task_accuracy"] for row in result.unstructured["attributes"]] == [1, 1]
    assert result.unstructured["answered_rightly"] == 1


def test_attributes_that_share_latents_do_not(model: Model, data: Path) -> None:
    """An atom for each pair of answers: either both of them are swapped or none is."""
    rows = np.zeros((len(COMBINED), D))
    for i, (a, b) in enumerate(COMBINED):
        rows[i, [a, VALUES + b]] = 1
    told = ravel.run(plain_coder(directions(rows), OMP(k=1)), model, settings(data)).metrics
    assert told["ravel"]["disentanglement_score"] < 0.7
    assert told["ravel"]["cause_score_full_patch"] == 1


def test_the_error_holds_what_no_atom_does(model: Model, data: Path) -> None:
    """Without atoms of B nothing but the error tells B."""
    told = ravel.run(plain_coder(directions(np.eye(D)[:VALUES]), OMP(k=2)), model, settings(data))
    pair = {row["cause_attribute"]: row for row in told.details}["A"]
    assert pair["cause_score_with_error"] > 0.95
    assert pair["isolation_score_with_error"] == 1
    assert pair["isolation_score"] < 0.6
    assert set(told.null) == {f"ravel.{key}" for key in told.metrics["ravel"] if "seed_std" in key}


def test_seeds_are_honoured_and_results_are_written(model: Model, data: Path) -> None:
    coder = plain_coder(directions(np.eye(D) + 0.4 * np.eye(D, k=3)), OMP(k=3))
    few = {"n_pairs": 40, "epochs": 1}
    one, again, other = (
        ravel.run(coder, model, settings(data, seed=seed, **few)) for seed in (1, 1, 2)
    )
    assert one.metrics == again.metrics
    assert one.details != other.details
    results.write(data / "out.json", one, {"id": "x"})
    table = results.read(data / "out.json")
    assert table["eval_type_id"] == "ravel"
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()
              for file in data.glob("ravel_*")}  # fmt: skip
    assert table["eval_config"]["sha256"] == hashes
    quick = Config(HOOK, data).quick()
    assert quick.n_pairs < Config(HOOK, data).n_pairs


# The intervention.


def test_rows_put_in_are_the_formula() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6)).astype(np.float32)
    coder = Coder(
        Normaliser(jnp.arange(6.0), jnp.asarray(2.0), jnp.array([1], jnp.int32)),
        Dictionary(jnp.asarray(rng.standard_normal((9, 6)), jnp.float32), jnp.full(6, 0.5)),
        OMP(k=3),
    )
    atoms, offset = (torch.tensor(part, dtype=torch.float32) for part in frame(coder))
    space = Space(torch.tensor(x), coded(coder, x)[0], atoms, offset)
    own = Pairs(np.array([0, 3]), np.array([1, 4]), np.zeros(2, int), np.array(["", ""]))
    x_hat = np.asarray(coder.decode(coder.encode(x)))
    for mask, plain, kept in ((0, x_hat[own.base], x[own.base]), (1, x_hat[own.source], None)):
        s = torch.full((10,), float(mask))
        np.testing.assert_allclose(space.mixed(own, s, with_error=False), plain, atol=1e-4)
        expected = kept if kept is not None else plain + (x - x_hat)[own.base]
        np.testing.assert_allclose(space.mixed(own, s, with_error=True), expected, atol=1e-4)


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z",
             "blocks.2.hook_resid_post", "blocks.0.hook_mlp_out"],
)  # fmt: skip
def test_a_row_is_put_in_at_one_position(tiny_model_dir: Path, hook: str) -> None:
    """Against the whole model, with a hook of the test's own, prompt by prompt."""
    tiny = models.load(f"dir:{tiny_model_dir}")
    lm = Patched(tiny, hook)
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 300, n).astype(np.int32) for n in (5, 9, 7)]
    place = np.array([2, 8, 3])
    x, seen = lm.read(ids, place)
    put = torch.tensor(rng.standard_normal(x.shape), dtype=torch.float32)
    together = lm.logits(ids, place, put, seen), lm.logits(ids, place, put)
    for i, own in enumerate(ids):
        token = torch.tensor(own, dtype=torch.long)[None]
        held = {}

        def patch(
            x: torch.Tensor, hook: Any, i: int = i, held: dict[str, torch.Tensor] = held
        ) -> torch.Tensor:
            held["x"] = x[0, place[i]].flatten().clone()
            x = x.clone()
            x[0, place[i]] = put[i].reshape(x.shape[2:])
            return x

        with torch.inference_mode(), tiny.bridge.hooks(fwd_hooks=[(hook, patch)]):
            expected = tiny.bridge(token, return_type="logits", use_cache=False)[0, -1]
        np.testing.assert_allclose(held["x"], x[i], rtol=1e-4, atol=1e-5)
        for logits in together:
            np.testing.assert_allclose(logits[i].detach(), expected, rtol=1e-3, atol=1e-5)


def test_answers_are_the_greedy_texts(tiny_model_dir: Path) -> None:
    tiny = models.load(f"dir:{tiny_model_dir}")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    texts = [
        ("say %s", "fox"),
        ("The %s and the dog", "quick brown"),
        ("%s", "mind"),
        ("a %s", "x"),
    ]
    ids, place = ravel_data.tokens(tiny.tokenizer, texts)
    greedy = []
    for own in ids:
        token = torch.tensor(own, dtype=torch.long)[None]
        for _ in range(4):
            with torch.inference_mode():
                token = torch.cat([token, plain(token).logits[:, -1:].argmax(-1)], dim=1)
        greedy.append(token[0, len(own) :].tolist())
    said = [tiny.tokenizer.decode(one).lstrip() for one in greedy]
    lm = Patched(tiny, "blocks.1.hook_resid_post")
    wanted = [one.rstrip("\ufffd").upper() for one in said]
    right, first = lm.answer(ids, place, wanted, most=4)
    assert right.all()
    assert first.tolist() == [one[0] for one in greedy]
    assert not lm.answer(ids, place, [f"{one}#" for one in said], most=4)[0].any()
    assert not lm.answer(ids, place, [f"#{one}" for one in said], most=4)[0].any()
    x, seen = lm.read(ids, place)  # its own rows change nothing
    assert lm.answer(ids, place, wanted, torch.tensor(x), seen, most=4)[0].all()


def test_the_place_is_the_entitys_last_token(tiny_model_dir: Path) -> None:
    tokenizer = models.load_tokenizer(f"dir:{tiny_model_dir}")
    texts = [("the %s, and", "lazy dog"), ("%s is", "Ürümqi"), ("in %s", "fox")]
    ids, place = ravel_data.tokens(tokenizer, texts)
    for (template, entity), own, at in zip(texts, ids, place, strict=True):
        assert own[0] == tokenizer.bos_token_id
        upto = template.replace("%s", entity)[: template.index("%s") + len(entity)]
        assert tokenizer.decode(own[1 : at + 1]) == upto
        assert tokenizer.decode(own[1:at]) != upto


# What is known, and pairs.


def some_known(n: int = 8) -> Known:
    rng = np.random.default_rng(0)
    shape = (2, 3, n)
    return Known(
        ["A", "B"], [f"e{i}" for i in range(n)], [np.arange(3)] * 6 * n, np.zeros(6 * n, int),
        np.arange(6 * n).reshape(shape), rng.random(shape) < 0.6, rng.integers(0, 3, shape),
        np.array([[("x", "y", "z")[i % 3] for i in range(n)]] * 2),
    )  # fmt: skip


def test_pairs_are_those_of_a_plain_loop() -> None:
    known, inside = some_known(), np.array([0, 1, 3, 4, 6])
    expected = {}
    for t, base, source in itertools.product(range(3), inside, inside):
        right, first, answers = known.right[1], known.first[1], known.answers[1]
        if (
            right[t, base] and right[t, source] and first[t, base] != first[t, source]
            and answers[base] != answers[source]
        ):  # fmt: skip
            expected[24 + 8 * t + base, source] = first[t, base], first[t, source]
    assert len(expected) > 5
    rng = np.random.default_rng(0)
    cause, isolation = ravel_data.pairs(known, 1, inside, 1000, rng)
    found = {}
    for own in range(len(cause)):
        base, other = cause.base[own], cause.source[own]
        source = other % 8
        assert known.right.reshape(-1)[other]
        assert other >= 24
        assert isolation.base[own] == base
        assert isolation.source[own] == other
        assert cause.wanted[own] == known.answers[1, source]
        assert isolation.wanted[own] == known.answers[1, base % 8]
        found[base, source] = isolation.target[own], cause.target[own]
    assert found == expected
    assert len(cause) == len(expected)
    assert len(ravel_data.pairs(known, 1, inside, 3, rng)[0]) == 3


def test_no_entity_is_in_both_halves(data: Path) -> None:
    known = some_known(20)
    for seed in range(5):
        halves = zip(*family.draw(known, settings(data), seed), strict=True)
        train, test = (
            {int(i) % 20 for own in half for kind in own for i in (*kind.base, *kind.source)}
            for half in halves
        )
        assert len(train) > len(test) > 2
        assert not train & test


def test_a_part_keeps_its_own_prompts() -> None:
    known = some_known()
    part = known.take([1], np.array([[2, 0]]), np.array([5, 2, 7]))
    for t, e in itertools.product(range(2), range(3)):
        old_t, old_e = (2, 0)[t], (5, 2, 7)[e]
        assert part.right[0, t, e] == known.right[1, old_t, old_e]
        assert part.first[0, t, e] == known.first[1, old_t, old_e]
        assert (part.prompt[0, t, e] >= 0) == part.right[0, t, e]
    assert len(part.ids) == part.right.sum()
    assert part.entities == ["e5", "e2", "e7"]
    assert part.answers.tolist() == [["z", "z", "y"]]


def test_task_accuracy_is_by_the_other_templates() -> None:
    known = np.array([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    # The first has right 3, of which the second has 2; the second has 2, and the first both.
    assert family.task_accuracy(known) == pytest.approx((2 / 3 + 1) / 2)
    known[1, 2] = np.nan  # what was not asked does not count
    assert family.task_accuracy(known) == 1
    # Guesses of one in four are no knowledge, whichever entities they make look known.
    guesses = np.random.default_rng(0).random((2, 20_000)) < 0.25
    assert family.task_accuracy(guesses) == pytest.approx(0.25, abs=0.02)


def test_a_model_that_does_not_know_gives_null(model: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = [one["B"] for one in TRUTH.values()]
    wrong = {
        key: one | {"B": value}
        for (key, one), value in zip(TRUTH.items(), rng.permutation(values), strict=True)
    }
    coder = plain_coder(directions(np.eye(D)), OMP(k=4))
    by_guess = {"A": TEMPLATES["A"], "B": ["%s qb", "%s qa"]}  # one of which asks for another
    result = ravel.run(coder, model, settings(write(tmp_path, wrong, by_guess)))
    assert set(result.metrics["ravel"].values()) == {None}
    assert set(result.null) == {f"ravel.{key}" for key in result.metrics["ravel"]}
    assert "A 1.000, B 0.000" in result.null["ravel.cause_score"]
    few = ravel.run(coder, model, settings(write(tmp_path, TRUTH, TEMPLATES), n_candidates=12))
    assert "knows 12 of 12 entities" in few.null["ravel.cause_score"]


def test_answers_that_are_all_alike_give_null(model: Model, tmp_path: Path) -> None:
    alike = {key: one for key, one in TRUTH.items() if one["B"] == "b1"}
    result = ravel.run(
        plain_coder(directions(np.eye(D)), OMP(k=4)), model,
        settings(write(tmp_path, alike, TEMPLATES), min_entities=4),
    )  # fmt: skip
    assert "B (task accuracy 1.000): 0 pairs" in result.null["ravel.isolation_score"]


def test_an_example_is_not_asked_for(model: Model, tmp_path: Path) -> None:
    templates = TEMPLATES | {"A": ["e000 qa a0 then %s qa", "%s qa"]}
    facts = ravel_data.read(write(tmp_path, TRUTH, templates), "thing", ("A", "B"))
    known = ravel_data.ask(
        Patched(model, HOOK), facts, n_entities=100, n_templates=2, most=1, seed=0
    )
    e = known.entities.index("e000")
    assert sorted(known.prompt[0, :, e] >= 0) == [False, True]
    assert (known.prompt >= 0).sum() == 4 * len(TRUTH) - 1


# What a user gets wrong.


@pytest.mark.parametrize(
    ("answers", "templates", "message"),
    [
        ([], TEMPLATES, "JSON object"),
        ({"e": 3}, TEMPLATES, "table of answers"),
        (TRUTH, {"A": ["%s", "%s."]}, "no attribute 'B'; it has A"),
        (TRUTH, TEMPLATES | {"A": ["%s"]}, "two templates"),
        ({"e000": {"A": "a0"}}, TEMPLATES, "no entity has an answer to each of A, B"),
        (TRUTH, TEMPLATES | {"A": ["%s qa", "%s and %s"]}, "one %s"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, answers: Any, templates: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ravel_data.read(write(tmp_path, answers, templates), "thing", ("A", "B"))


def test_other_mistakes_are_told(model: Model, data: Path, tmp_path: Path) -> None:
    coder = plain_coder(directions(np.eye(D)), OMP(k=4))
    with pytest.raises(UserError, match=r"ravel_city_.* cannot be read"):
        ravel.run(coder, model, settings(data, entity="city"))
    with pytest.raises(UserError, match="twice"):
        ravel.run(coder, model, settings(data, attributes=["A", "A"]))
    with pytest.raises(UserError, match=r"5 entries, but .* has 16"):
        ravel.run(plain_coder(np.eye(5, dtype=np.float32), OMP(k=2)), model, settings(data))
    with pytest.raises(UserError, match="hook"):
        ravel.run(coder, model, settings(data, hook="blocks.7.hook_resid_post"))
    for wrong in (
        {"n_templates": 1},
        {"min_accuracy": 1.5},
        {"entities": 3},
        {"attributes": ["A"]},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            settings(data, **wrong)
    file = tmp_path / "ravel_thing_entity_attributes.json"
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        ravel.run(coder, model, settings(data))

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="fast"):
        ravel_data.tokens(Slow(), [("%s", "x")])


def test_a_changed_file_is_told(data: Path) -> None:
    cfg = settings(data)
    pinned = cfg.pinned()
    assert pinned.pinned() == pinned != cfg
    assert validate(Config, {"hook": HOOK, "data": str(data), "sha256": pinned.sha256}, "t")
    write(data, TRUTH | {"e000": {"A": "a1", "B": "b0"}}, TEMPLATES)
    assert cfg.pinned().sha256 != pinned.sha256
    with pytest.raises(UserError, match=r"ravel\.sha256: .* expected"):
        pinned.pinned()


def test_entities_without_an_answer_are_passed_over(tmp_path: Path) -> None:
    answers = TRUTH | {"e000": {"A": "a0"}, "e001": {"A": "a0", "B": " "}}
    facts = ravel_data.read(write(tmp_path, answers, TEMPLATES), "thing", ("A", "B"))
    assert len(facts.answers) == len(TRUTH) - 2
    assert "e000" not in facts.answers
