"""IOI: laws of the prompts, planted attributes with known answers, a tiny model at chance."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import transformers
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

from activations import models
from activations.config import validate
from activations.models import Model
from activations.terminal import UserError
from dictlearn.encoders.omp import OMP
from evals.ioi import Config, interpretability, prompts
from evals.ioi import family as ioi
from evals.ioi.prompts import ATTRIBUTES, ROLES, Rows, Task
from evals.recovery import plain_coder

HOOK = "blocks.1.hook_resid_post"
D = 16


def small(**settings: Any) -> Config:
    return Config(**{"hook": HOOK, "n_names": 5, "n_train": 40, "n_test": 20} | settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random Llama whose tokenizer has the words of the prompts; but " Mary" is two tokens."""
    names, places, things = prompts.NAMES[1:8], ("store", "park"), ("drink", "book")
    spaced = [f" {word}" for word in (*names, *places, *things)] * 9
    text = [t.format(first="", second="", s="", place="", thing="") for t in prompts.TEMPLATES]
    bpe = Tokenizer(token_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        spaced + text,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = transformers.LlamaForCausalLM(config)
        with torch.no_grad():  # so that a changed activation changes the answer
            for weight in llama.parameters():
                weight.mul_(5 if weight.ndim == 2 else 1)
    directory = tmp_path_factory.mktemp("models") / "ioi-llama"
    llama.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return models.load(f"dir:{directory}")


# Prompts.


def test_names_that_are_not_one_token_are_passed_over(model: Model) -> None:
    known = prompts.words(model, 5)
    assert known.names == prompts.NAMES[1:6]
    for name, token in zip(known.names, known.name_id, strict=True):
        assert model.tokenizer.decode([token]) == f" {name}"
    assert len(set(known.contexts)) == len(prompts.TEMPLATES) * 2 * 2
    with pytest.raises(UserError, match=r"7 names, 2 places and 2 objects .* expected 8"):
        prompts.words(model, 8)


def test_values_are_balanced_and_no_name_stands_twice() -> None:
    value = prompts.draw(120, 6, np.random.default_rng(0))
    assert (value[:, 0] != value[:, 1]).all()
    for j, size in enumerate((6, 6, 2)):
        np.testing.assert_array_equal(np.bincount(value[:, j], minlength=size), 120 // size)
    assert len(np.unique(value[:, :2], axis=0)) > 25  # of 30 pairs
    again, other = (prompts.draw(120, 6, np.random.default_rng(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(value, again)
    assert (value != other).any()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_edit_changes_its_attribute_alone(attribute: str) -> None:
    rng = np.random.default_rng(0)
    value = prompts.draw(600, 5, rng)
    new = prompts.edited(value, attribute, 5, rng)
    j = ATTRIBUTES.index(attribute)
    assert (new[:, j] != value[:, j]).all()
    np.testing.assert_array_equal(np.delete(new, j, axis=1), np.delete(value, j, axis=1))
    if j < 2:
        assert (new[:, j] != value[:, 1 - j]).all()
        assert set(np.unique(new[:, j])) == set(range(5))


def test_a_prompt_says_what_its_values_say(model: Model) -> None:
    known, rng = prompts.words(model, 5), np.random.default_rng(0)
    value = prompts.draw(40, 5, rng)
    context = rng.integers(len(known.contexts), size=40)
    made = prompts.write(model, known, value, context)
    decode = model.tokenizer.decode
    for i, (io, s, order) in enumerate(value):
        io, s = f" {known.names[io]}", f" {known.names[s]}"
        at = dict(zip(ROLES, made.at[i], strict=True))
        token = made.token[i]
        assert [decode(token[at[role]]) for role in ROLES[:3]] == [io, s, s]
        assert (at["io"] < at["s1"]) == bool(order)
        assert max(at["io"], at["s1"]) < at["s2"] < at["end"]
        assert decode(token[: at["end"] + 1]) == f"<s>{made.text[i]}"
        assert made.text[i].endswith(" to")
        assert made.text[i].split().count(io.strip()) == 1


def test_contexts_of_training_and_testing_are_apart(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[prompts.Prompts] = []
    write = prompts.write

    def spy(*args: Any) -> prompts.Prompts:
        seen.append(write(*args))
        return seen[-1]

    monkeypatch.setattr(prompts, "write", spy)
    first, again, other = (prepared(model, seed=seed) for seed in (0, 0, 1))
    assert not set(seen[0].context) & set(seen[1].context)
    np.testing.assert_array_equal(first.test.x, again.test.x)
    assert (first.test.value != other.test.value).any()


# The model.


def prepared(model: Model, hook: str = HOOK, seed: int = 0, **settings: Any) -> Task:
    cfg = small(hook=hook, seed=seed, **settings)
    return prompts.prepare(
        model, hook, cfg.positions, n_names=cfg.n_names, n_train=cfg.n_train, n_test=cfg.n_test,
        seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("hook", [HOOK, "blocks.1.hook_mlp_out"])
def test_answers_are_the_models(model: Model, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the bridge itself, a prompt at a time, without what fills up shorter ones."""
    seen: list[prompts.Prompts] = []
    write = prompts.write
    monkeypatch.setattr(prompts, "write", lambda *args: seen.append(write(*args)) or seen[-1])
    task = prepared(model, hook, positions=("s2", "end"))
    rows = np.array([0, 7, 13])
    put = np.random.default_rng(0).standard_normal((3, 2, D)).astype(np.float32)
    plain, changed = task.answer(rows, task.test.x[rows]), task.answer(rows, put)
    for i, row in enumerate(rows):
        at = seen[1].at[row]
        token = torch.from_numpy(seen[1].token[row, : at[3] + 1].astype(np.int64))[None]

        def replace(x: torch.Tensor, hook: Any, i: int = i, at: np.ndarray = at) -> torch.Tensor:
            x = x.clone()
            x[0, at[2:]] = torch.from_numpy(put[i])
            return x

        with torch.inference_mode():
            own = model.bridge(token, return_type="logits")[0, -1]
            other = model.bridge.run_with_hooks(
                token, return_type="logits", fwd_hooks=[(hook, replace)]
            )[0, -1]
        np.testing.assert_allclose(plain[i], own, atol=1e-4)
        np.testing.assert_allclose(changed[i], other, atol=1e-4)
    assert np.abs(plain - changed).max() > 0.1


def some_coder() -> Any:
    atoms = np.random.default_rng(0).standard_normal((24, D)).astype(np.float32)
    return plain_coder(atoms / np.linalg.norm(atoms, axis=1, keepdims=True), OMP(k=3))


def test_a_model_at_chance_gives_null_with_the_reason(model: Model) -> None:
    result = ioi.run(some_coder(), model, small())
    share = result.metrics["task"]["io_over_s"]
    assert share < 0.8
    assert result.metrics["approximation"]["sae_kept"] is None
    for category in ("approximation", "control", "interpretability"):
        for key, value in result.metrics[category].items():
            assert value is None
            assert f"{share:.1%} of the prompts" in result.null[f"{category}.{key}"]


def test_a_misfit_is_told(model: Model) -> None:
    with pytest.raises(UserError, match=r"5 entries, but .* has 16"):
        ioi.run(plain_coder(np.eye(4, 5, dtype=np.float32), OMP(k=2)), model, small())
    with pytest.raises(UserError, match="hook"):
        ioi.run(some_coder(), model, small(hook="blocks.9.hook_resid_post"))
    with pytest.raises(UserError, match="do not have each of 7 names"):
        ioi.run(some_coder(), model, small(n_names=7, n_test=6))
    for wrong in ({"positions": ["s3"]}, {"positions": []}, {"n_names": 2}, {"fit": "mean"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            validate(Config, {"hook": HOOK} | wrong, "test")


# Planted attributes.

M, WIDTH = 6, 40


@dataclasses.dataclass(frozen=True, eq=False)
class Planted:
    """a = mean + v_io + v_s + v_order + noise, and a model of such activations."""

    task: Task
    mean: np.ndarray
    v: np.ndarray  # [6 + 6 + 2, 40], orthonormal


@pytest.fixture(scope="module")
def planted() -> Planted:
    """Where the order is 1 IO is named, where it is 0 S is: in a tenth of the prompts for testing.

    So an edit of IO changes the answer in nine tenths, one of S in the others, one of the order in
    all.
    """
    rng = np.random.default_rng(5)
    v = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0][: 2 * M + 2]
    mean = rng.standard_normal(WIDTH)

    def rows(value: np.ndarray) -> Rows:
        x = mean + v[value[:, 0]] + v[M + value[:, 1]] + v[2 * M + value[:, 2]]
        x = x + 0.01 * rng.standard_normal(x.shape)
        return Rows(x[:, None].astype(np.float32), value)

    def answer(rows: np.ndarray, put: np.ndarray) -> np.ndarray:
        del rows
        part = (put[:, 0] - mean) @ v.T  # [b 14]
        return 4 * np.sign(part[:, 13:] - part[:, 12:13]) * (part[:, :M] - part[:, M : 2 * M])

    train, test = (prompts.draw(n, M, rng) for n in (1200, 120))
    test[:, 2] = np.arange(120) % 10 > 0
    changed = {a: rows(prompts.edited(test, a, M, rng)) for a in ATTRIBUTES}
    return Planted(Task(rows(train), rows(test), changed, answer, np.arange(M)), mean, v)


def config(**settings: Any) -> Config:
    return Config(**{"hook": HOOK, "positions": ("end",), "n_latents": (1, 2)} | settings)


@pytest.mark.parametrize("fit", ["means", "lstsq"])
def test_the_supervised_fit_recovers_what_was_planted(planted: Planted, fit: str) -> None:
    told = ioi.supervise(planted.task.train, M, fit)
    truth = planted.task.test.value
    io, s, order = planted.v[:M], planted.v[M : 2 * M], planted.v[2 * M :]
    expected = planted.mean + io[truth[:, 0]] + s[truth[:, 1]] + order[truth[:, 2]]
    # Means of io count that s is another: each v_s less the mean of the others', so 1 / 5 of it.
    error = np.linalg.norm(told.rebuild(truth)[:, 0] - expected, axis=1)
    assert error.max() < (0.01 if fit == "lstsq" else 0.4)
    step = told.v[0][2, 0] - told.v[0][4, 0]
    own = io[2] - io[4] - (0 if fit == "lstsq" else (s[2] - s[4]) / (M - 1))
    np.testing.assert_allclose(step, own, atol=0.01 if fit == "lstsq" else 0.06)


def test_greedy_takes_what_an_exhaustive_step_takes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        parts, goal = rng.standard_normal((7, 4)), rng.standard_normal(4)
        chosen, rest = ioi.greedy(parts, goal, 5), goal
        for i in range(5):
            errors = [np.linalg.norm(rest - part) for part in parts]
            free = [j for j in range(7) if j not in chosen[:i]]
            best = min(free, key=errors.__getitem__)
            if i == len(chosen):
                assert errors[best] >= np.linalg.norm(rest) - 1e-9
                break
            assert chosen[i] == best
            rest = rest - parts[best]


def test_f1_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    fires, y = rng.random((200, 5)) < 0.3, rng.random((200, 3)) < 0.4
    got = interpretability.f1(scipy.sparse.csr_array(fires.astype(float)), y)
    expected = [[f1_score(y[:, j], fires[:, i]) for j in range(3)] for i in range(5)]
    np.testing.assert_allclose(got, expected)
    weight = np.stack([np.ones(200), rng.integers(0, 4, 200)])
    got = interpretability.macro(fires[:, :3], y, weight)
    for w, one in zip(weight, got, strict=True):
        own = [f1_score(y[:, j], fires[:, j], sample_weight=w) for j in range(3)]
        np.testing.assert_allclose(one, np.mean(own))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_dictionary_of_the_planted_vectors_scores_as_the_supervised(
    planted: Planted, sign: int
) -> None:
    atoms = sign * planted.v.astype(np.float32)  # negative codes fire as well
    coder = plain_coder(atoms, OMP(k=3), mean=planted.mean.astype(np.float32))
    result = ioi.measure(coder, planted.task, config(fit="lstsq"))
    assert not result.null
    assert result.metrics["task"]["io_first"] == 0.9
    kept = result.metrics["approximation"]
    assert kept["sae_kept"] == pytest.approx(1, abs=0.02)
    assert kept["supervised_kept"] == pytest.approx(1, abs=0.02)
    assert kept["random_kept"] < 0.5
    assert kept["sae_kl"] < 1e-2 < kept["mean_kl"]
    control, f1 = (result.metrics[name] for name in ("control", "interpretability"))
    assert [control[f"{name}_changed"] for name in ATTRIBUTES] == [0.9, 0.1, 1]
    for attribute in ATTRIBUTES:
        # One value out and one in: two codes, and not one.
        assert control[f"{attribute}_supervised_success"] == 1
        assert control[f"{attribute}_sae_2_success"] == 1
        # Two of the four codes that differ, by noise at least: all one out and one in by a sixth.
        assert control[f"{attribute}_random_2_success"] < 0.7
        size = control[f"{attribute}_patched_size"]
        assert control[f"{attribute}_sae_2_size"] == pytest.approx(size, abs=0.03)
        for key in ("sae", "sae_tails", "supervised"):
            assert f1[f"{attribute}_{key}_f1"] == 1
            assert f1[f"{attribute}_{key}_f1_interval"] == (1, 1)
        assert f1[f"{attribute}_shuffled_tails_f1"] < (0.75 if attribute == "order" else 0.35)
        assert control[f"{attribute}_mean_success"] < 0.5


def test_a_dictionary_that_knows_nothing_scores_as_the_controls(planted: Planted) -> None:
    rng = np.random.default_rng(1)
    atoms = rng.standard_normal((60, WIDTH)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    coder = plain_coder(atoms, OMP(k=3), mean=planted.mean.astype(np.float32))
    told = ioi.measure(coder, planted.task, config(fit="lstsq")).metrics
    assert told["approximation"]["sae_kept"] < 0.5
    for attribute in ATTRIBUTES:
        for n in (1, 2):
            own = told["control"][f"{attribute}_sae_{n}_success"]
            random = told["control"][f"{attribute}_random_{n}_success"]
            assert own == pytest.approx(random, abs=0.1)
            assert own < 0.2
        assert told["interpretability"][f"{attribute}_sae_f1"] < 0.75
        assert told["interpretability"][f"{attribute}_supervised_f1"] == 1


def test_an_edit_without_effect_is_null_with_the_reason(planted: Planted) -> None:
    same = dict.fromkeys(ATTRIBUTES, planted.task.test)
    coder = plain_coder(planted.v.astype(np.float32), OMP(k=3))
    task = dataclasses.replace(planted.task, counterfactual=same)
    result = ioi.measure(coder, task, config())
    assert result.metrics["control"]["io_changed"] == 0
    assert result.metrics["control"]["io_sae_2_success"] is None
    assert "answers otherwise on 0 prompts" in result.null["control.io_sae_2_success"]
    assert set(result.null) == {
        f"control.{name}_{own}_success"
        for name in ATTRIBUTES
        for own in ("supervised", "sae_1", "sae_2", "random_1", "random_2", "mean")
    }


def test_swaps_take_the_other_prompts_codes(planted: Planted) -> None:
    """With every code swapped the edit is the difference of the reconstructions."""
    rng = np.random.default_rng(2)
    x, other = rng.standard_normal((2, 9, 2, D)).astype(np.float32)
    coder = some_coder()
    edits = ioi.swaps(coder, x, other, config(n_latents=(1, 99)))
    here, there = (
        np.asarray(coder.decode(coder.encode(one.reshape(-1, D)))).reshape(x.shape)
        for one in (x, other)
    )
    np.testing.assert_allclose(edits["random_99"], there - here, atol=1e-5)
    rest = [np.linalg.norm(other - x - edits[key]) for key in ("random_1", "sae_1", "sae_99")]
    assert rest[0] > rest[1] > rest[2]


def test_no_share_is_kept_of_a_loss_that_is_none(planted: Planted) -> None:
    """Where the answer does not depend on what is put in, the mean loses nothing."""
    clean = planted.task.answer(np.arange(len(planted.task.test.x)), planted.task.test.x)
    task = dataclasses.replace(planted.task, answer=lambda rows, x: clean[rows])
    coder = plain_coder(planted.v.astype(np.float32), OMP(k=3))
    result = ioi.measure(coder, task, config())
    for key in ("sae_kept", "random_kept", "supervised_kept"):
        assert result.metrics["approximation"][key] is None
        assert "does not pass here" in result.null[f"approximation.{key}"]
