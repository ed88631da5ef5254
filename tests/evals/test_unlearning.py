"""Unlearning on a dictionary whose every latent is one token: what fires is known by counting."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from activations import models
from activations.config import validate
from activations.corpora import Files
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from dictlearn.encoders.omp import OMP
from evals import unlearning
from evals.lm import Forward
from evals.recovery import plain_coder
from evals.results import Result
from evals.unlearning import Config, family, figures, latents, questions
from evals.unlearning.bank import Change, Firing, Hooked, Passage, documents, firing
from evals.unlearning.latents import Setting

HOOK = "blocks.0.hook_resid_pre"
WORDS = ["fox", "dog", "lazy", "over", "mind", "the", "brown", "jumps", "quick"]
MULTIPLIERS = (0.0, 8.0)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return models.load(f"dir:{tiny_model_dir}")


@functools.cache
def embedding(model: Model) -> np.ndarray:
    """[v d], unit rows."""
    rows = Forward(model, HOOK).read(np.arange(model.bridge.cfg.d_vocab)[None])[0]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ids(model: Model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def planted(model: Model, *, flipped: bool = False) -> Coder:
    """Latent t fires on token t alone; the atoms of digits turned round, if told."""
    atoms = embedding(model).copy()
    if flipped:
        atoms[[ids(model, d)[0] for d in "0123456789"]] *= -1
    return plain_coder(atoms, OMP(k=1))


def lines(seed: int, n: int, *, digits: bool) -> list[str]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        words = list(rng.choice(WORDS, 6))
        if digits:
            words = [w + "7" + str(rng.choice(["3", "7"])) for w in words]
        found.append(" ".join(words))
    return found


def log_p(model: Model, token: list[int], multiplier: float | None = None) -> np.ndarray:
    """Of each token but the first, by the whole model; 7 and 3 clamped by hand, if told: a token's
    row becomes -multiplier times its atom, since its error is 0."""
    atoms = torch.tensor(embedding(model))
    clamped = torch.isin(torch.tensor(token), torch.tensor(ids(model, "73")))

    def replace(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x if multiplier is None else torch.where(clamped[None, :, None], put, x)

    put = -(multiplier or 0.0) * atoms[token][None]
    with torch.inference_mode(), model.bridge.hooks(fwd_hooks=[(HOOK, replace)]):
        logits = model.bridge(torch.tensor([token]), return_type="logits")[0].double()
    told = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(token[1:])[:, None])
    return told[:, 0].numpy()


def likeliest(model: Model, query: str, choices: list[str], multiplier: float | None = None) -> int:
    bos, before = model.tokenizer.bos_token_id, len(ids(model, query))
    scores = []
    for choice in choices:
        whole = ids(model, f"{query} {choice}")
        assert whole[:before] == ids(model, query)
        scores.append(log_p(model, [bos, *whole], multiplier)[before:].sum())
    return int(np.argmax(scores))


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("unlearning")
    texts = {"forget": lines(0, 24, digits=True), "retain": lines(1, 24, digits=False)}
    for name, own in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(own))
    return {name: folder / f"{name}.txt" for name in texts}


@pytest.fixture(scope="module")
def asked(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Questions whose gold is the model's own answer; but for two of the twelve to be forgotten."""
    folder, told = tmp_path_factory.mktemp("questions"), {}
    for name in ("forget", "retain"):
        digits, rows = name == "forget", []
        for i, text in enumerate(lines(5 + digits, 12, digits=digits)):
            choices = [
                f"{WORDS[(i + j) % 9]}{'7' * digits} {WORDS[(i * j) % 9]}" for j in (1, 3, 4)
            ]
            gold = likeliest(model, text, choices)
            gold = (gold + 1) % 3 if digits and i < 2 else gold
            rows.append({"query": text, "choices": choices, "gold": gold})
        told[name] = rows
    told["settings"] = {
        "forget_questions": write(folder / "forget", told["forget"]),
        "retain_questions": [write(folder / "retain", told["retain"])],
    }
    return told


def config(files: dict[str, Path], **told: Any) -> Config:
    table: dict[str, Any] = {
        "hook": HOOK, "n_latents": [2], "multipliers": list(MULTIPLIERS),
        "retain_thresholds": [0.01], "scoring": "likelihood", "n_seeds": 2,
    }  # fmt: skip
    for name in ("forget", "retain"):
        table[name] = {"kind": "files", "paths": [str(files[name])], "documents_are": "lines"}
    return validate(Config, table | told, "test")


@pytest.fixture(scope="module")
def results(model: Model, files: dict[str, Path], asked: dict[str, Any]) -> list[Result]:
    """Of the planted dictionary, and of that with digits turned round."""
    cfg = config(files, **asked["settings"])
    return [unlearning.run(planted(model, flipped=f), model, cfg) for f in (False, True)]


def test_the_latents_of_the_forget_texts_are_found_and_the_rest_stays(
    model: Model, results: list[Result]
) -> None:
    assert [row["latents"] for row in results[0].details] == [ids(model, "73")] * 2
    told = results[0].metrics["unlearning"]
    assert told["loss_increase_retain"] == 0
    assert told["loss_increase_retain_interval"] == (0, 0)
    low, high = told["loss_increase_forget_interval"]
    assert low <= told["loss_increase_forget"] <= high
    # Other latents that fire on the forget corpus are of tokens that both corpora have.
    assert told["loss_increase_retain_random"] != 0
    assert told["loss_increase_retain_random_seed_std"] > 0


def test_losses_are_those_of_the_whole_model_with_other_embeddings(
    model: Model, files: dict[str, Path], results: list[Result]
) -> None:
    multiplier = results[0].details[results[0].unstructured["loss_setting"]]["multiplier"]
    rise, base, n = 0.0, 0.0, 0
    for text in files["forget"].read_text().splitlines(keepends=True)[1::2]:
        token = [model.tokenizer.bos_token_id, *ids(model, text)]
        own = log_p(model, token)
        rise += (own - log_p(model, token, multiplier)).sum()
        base -= own.sum()
        n += len(own)
    told = results[0].metrics["unlearning"]
    assert told["loss_forget_base"] == pytest.approx(base / n, abs=1e-5)
    assert told["loss_increase_forget"] == pytest.approx(rise / n, abs=1e-5)
    assert abs(rise / n) > 1e-3


def test_questions_are_forgotten_as_by_hand(
    model: Model, asked: dict[str, Any], results: list[Result]
) -> None:
    known = asked["forget"][2:]
    right = [
        sum(likeliest(model, one["query"], one["choices"], m) == one["gold"] for one in known)
        for m in MULTIPLIERS
    ]
    assert min(right) < 10
    for result, theirs in zip(results, (1 - min(right) / 10, 0), strict=True):
        held, told = result.unstructured["forget_questions"], result.metrics["unlearning"]
        assert held == {"n": 12, "n_known": 10, "accuracy": 10 / 12, "chance": pytest.approx(1 / 3)}
        assert result.unstructured["retain_questions"]["n_known"] == 12
        assert told["retain_accuracy"] == 1
        place = result.unstructured["question_setting"]
        rates = [row["chosen_by_forget_accuracy"] for row in result.details]
        assert rates[place] == min(rates)
        # Both halves are of five.
        assert 5 * (rates[place] + told["forget_accuracy"]) == pytest.approx(right[place])
        assert told["unlearning_score"] == 1 - told["forget_accuracy"]
        low, high = told["unlearning_score_interval"]
        assert low <= told["unlearning_score"] <= high
        # What fires only negatively does not fire by SAEBench's reading.
        assert told["unlearning_score_saebench060"] == pytest.approx(theirs)


def test_the_sign_that_was_stored_does_not_matter(results: list[Result]) -> None:
    plain, flipped = results
    assert plain.details[0]["sign"] == [1, 1]
    assert flipped.details[0]["sign"] == [-1, -1]
    assert flipped.details[0]["latents"] == plain.details[0]["latents"]
    for key in ("loss_increase_forget", "loss_increase_retain", "forget_accuracy"):
        assert flipped.metrics["unlearning"][key] == pytest.approx(
            plain.metrics["unlearning"][key], abs=1e-6
        )
    assert [one.unstructured["signed"] for one in results] == [False, True]


def test_without_questions_losses_are_the_same(
    model: Model, files: dict[str, Path], results: list[Result]
) -> None:
    result = unlearning.run(planted(model), model, config(files))
    for key, value in result.metrics["unlearning"].items():
        if key.startswith("loss"):
            assert value == results[0].metrics["unlearning"][key]
        else:
            assert value is None
            assert "no questions" in result.null[f"unlearning.{key}"]


def test_the_documents_that_choose_are_not_those_that_are_held_out(
    model: Model, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, set[bytes]] = {}
    for name in ("firing", "by_losses", "loss_figures"):
        own = getattr(family, name)

        def spy(hooked: Any, passages: Any, *rest: Any, name: str = name, own: Any = own) -> Any:
            flat = passages if name == "firing" else [one for side in passages for one in side]
            read.setdefault(name, set()).update(one.ids.tobytes() for one in flat)
            return own(hooked, passages, *rest)

        monkeypatch.setattr(family, name, spy)
    family.run(planted(model), model, config(files))
    assert read["by_losses"] == read["firing"]
    assert not read["by_losses"] & read["loss_figures"]


def test_densities_are_counts(model: Model, files: dict[str, Path]) -> None:
    hooked = Hooked(planted(model, flipped=True), model, HOOK)
    corpus = Files("files", (str(files["forget"]),), documents_are="lines")
    chosen, held, _ = documents(hooked, corpus, "forget", length=20, tokens=(10**6, 10**6))
    texts = files["forget"].read_text().splitlines(keepends=True)
    for part, own in ((chosen, texts[::2]), (held, texts[1::2])):
        assert [one.ids[1:].tolist() for one in part] == [ids(model, text)[:19] for text in own]
    got = firing(hooked, chosen)
    count = Counter(i for text in texts[::2] for i in ids(model, text)[:19])
    total = sum(count.values())
    dense = np.array([count[i] / total for i in range(model.bridge.cfg.d_vocab)])
    np.testing.assert_allclose(got.fires, dense)
    negative = [ids(model, d)[0] for d in "37"]
    assert (got.positive[negative] == 0).all()
    np.testing.assert_allclose(np.delete(got.positive, negative), np.delete(dense, negative))
    assert (got.mean[negative] < 0).all()
    assert got.signed


def test_a_corpus_is_read_as_far_as_it_is_needed(model: Model, files: dict[str, Path]) -> None:
    hooked = Hooked(planted(model), model, HOOK)
    corpus = Files("files", (str(files["forget"]),), documents_are="lines")
    chosen, held, _ = documents(hooked, corpus, "forget", length=11, tokens=(45, 12))
    assert [len(one.targets) for one in chosen] == [10] * 5
    assert [len(one.targets) for one in held] == [10] * 2


@pytest.mark.parametrize("positive", [False, True])
def test_the_clamp_is_decode_of_clamped_codes_plus_the_error(positive: bool) -> None:
    rng = np.random.default_rng(0)
    f = rng.standard_normal((50, 8)) * (rng.random((50, 8)) < 0.5)
    atoms = rng.standard_normal((8, 5))
    norm = np.sqrt((atoms**2).sum(axis=1))
    change = Change(np.array([6, 2]), np.array([-3.0, 5.0]), positive)
    new = f.copy()
    for i in range(50):
        for latent, goal in ((6, -3.0), (2, 5.0)):
            if f[i, latent] > 0 or (f[i, latent] < 0 and not positive):
                new[i, latent] = goal / norm[latent]
    step = change.step(scipy.sparse.csr_array(f), atoms)
    np.testing.assert_allclose(step, new @ atoms - f @ atoms, atol=1e-12)


def firings(fires: list[float], mean: Sequence[float] | None = None) -> Firing:
    own = np.array(fires)
    return Firing(own, own / 2, np.array(mean or fires))


def test_latents_are_those_of_greatest_forget_density_below_the_threshold() -> None:
    forget = firings([0.5, 0.1, 0.3, 0.0, 0.2], [1, -1, 1, 0, 1])
    retain = firings([0.02, 0.0, 0.005, 0.0, 0.01])
    assert latents.choose(forget, retain, 0.01, 3, positive=False).tolist() == [2, 1]
    # 4 is at the threshold, but not by half as many; 3 never fires.
    assert latents.choose(forget, retain, 0.01, 3, positive=True).tolist() == [2, 4, 1]
    tried = latents.settings(forget, retain, (0.01, 0.02), (1, 2, 5), (3.0, 7.0), positive=False)
    assert [
        (one.threshold, one.n, one.change.latents.tolist(), one.change.goal.tolist())
        for one in tried
    ] == [
        (0.01, 1, [2], [-3]), (0.01, 1, [2], [-7]),
        (0.01, 2, [2, 1], [-3, 3]), (0.01, 2, [2, 1], [-7, 7]),
        (0.02, 2, [2, 4], [-3, -3]), (0.02, 2, [2, 4], [-7, -7]),
        (0.02, 5, [2, 4, 1], [-3, -3, 3]), (0.02, 5, [2, 4, 1], [-7, -7, 7]),
    ]  # fmt: skip


def test_random_latents_are_near_in_density_and_others() -> None:
    forget = firings(list(np.linspace(1, 0.01, 200)), [-1] * 200)
    setting = Setting(0.01, 2, 3.0, Change(np.array([100, 101]), np.array([3.0, 3.0])))
    drawn = [latents.random_change(forget, setting, seed=s) for s in range(30)]
    assert len({tuple(one.latents.tolist()) for one in drawn if one}) > 10
    for one in drawn:
        assert one
        assert not set(one.latents.tolist()) & {100, 101}
        assert len(set(one.latents.tolist())) == 2
        assert (np.abs(one.latents - 100) <= 23).all()
        assert one.goal.tolist() == [3, 3]


def test_figures_are_means_and_their_controls() -> None:
    forget = firings([0.5, 0.4, 0.3, 0.0])
    changes = [Change(np.array(own), -np.ones(len(own))) for own in ([0], [0, 1])]
    trial = figures.Trial(
        forget, [Setting(0.1, len(one.latents), 1.0, one) for one in changes], [], 0, 8
    )

    def sums(change: Change) -> list[np.ndarray]:
        return [np.full(3, float(change.latents[0])), np.array([1.0, 2.0])]

    counts = [np.array([2, 2, 2]), np.array([1, 3])]
    told, null = trial.figures("of_{}", 0, sums, counts)
    assert (told["of_forget"], told["of_retain"]) == (0, 3 / 4)
    assert told["of_retain_interval"] == (2 / 3, 1)
    assert 0.5 < told["of_forget_random"] < 1  # of latents 1 and 2
    assert told["of_retain_random_seed_std"] == 0
    assert not null
    told, null = trial.figures("of_{}", 1, sums, counts)
    assert told["of_forget"] == 0
    assert told["of_forget_random"] is None
    assert "too few" in null["of_retain_random_seed_std"]


def test_the_best_harms_most_of_those_that_keep() -> None:
    harm, kept = np.array([0.9, 0.2, 0.5, 0.5]), np.array([0.5, 1, 0.99, 1])
    assert figures.best(harm, kept) == 2
    assert figures.best(harm, kept - 0.6) is None
    assert figures.best(harm[:0], kept[:0]) is None


def test_a_model_that_cannot_answer_gives_null_with_its_accuracy(
    model: Model, files: dict[str, Path], asked: dict[str, Any], tmp_path: Path
) -> None:
    wrong = [one | {"gold": (one["gold"] + 1) % 3} for one in asked["forget"]]
    told = asked["settings"] | {"forget_questions": write(tmp_path / "forget", wrong)}
    result = unlearning.run(planted(model), model, config(files, **told))
    assert result.metrics["unlearning"]["unlearning_score"] is None
    accuracy = result.unstructured["forget_questions"]["accuracy"]
    assert accuracy <= 2 / 12
    assert f"{accuracy:.3f}" in result.null["unlearning.unlearning_score"]
    assert result.metrics["unlearning"]["loss_increase_forget"] is not None


def test_letters_are_asked_in_all_orders(model: Model) -> None:
    hooked = Hooked(planted(model), model, HOOK)
    one = {"query": "the fox", "choices": ["dog", "mind", "lazy"], "gold": 2}
    every = questions.in_orders(hooked, one, "letters")
    texts = [model.tokenizer.decode(own.passages[0].ids) for own in every]
    assert texts[0] == "<s>the fox\nA. dog\nB. mind\nC. lazy\nAnswer:"
    assert len(set(texts)) == 6
    got = hooked.base(questions.passages_of(every))
    for text, own, told in zip(texts, every, got, strict=True):
        assert f"{'ABC'[own.gold]}. lazy\n" in text
        held = own.passages[0].ids.tolist()
        expected = [log_p(model, [*held, ids(model, f" {a}")[-1]])[-1] for a in "ABC"]
        np.testing.assert_allclose(told[0], expected, atol=1e-5)
        assert own.right([told]) == (np.argmax(expected) == own.gold)
        assert own.chance == pytest.approx(1 / 3)
    many = questions.in_orders(hooked, one | {"choices": list("vwxyz")}, "letters")
    assert len(many) == 24
    assert "\nA. v\nB. w\n" in model.tokenizer.decode(many[0].passages[0].ids)


def test_only_what_is_right_in_all_orders_is_known(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that finds the fox, and says A where it is asked for a dog."""
    hooked = Hooked(planted(model), model, HOOK)

    def base(passages: list[Passage]) -> list[np.ndarray]:
        found = []
        for one in passages:
            query, *choices, _ = model.tokenizer.decode(one.ids).split("\n")
            fox = ["fox" in choice for choice in choices]
            found.append(np.array([fox if "the fox" in query else [1, 0, 0]], float))
        return found

    monkeypatch.setattr(hooked, "base", base)
    queries = ["the fox", "the dog", "the fox", "the dog", "the fox", "the dog", "the fox"]
    rows = [
        {"query": query, "choices": ["mind", "fox", "dog"], "gold": gold}
        for query, gold in zip(queries, (1, 0, 1, 0, 0, 0, 1), strict=True)
    ]
    every = [questions.in_orders(hooked, one, "letters") for one in rows]
    kept, told, why = questions.known(hooked, every, "animals")
    assert kept == [every[i][0] for i in (0, 2, 6)]
    assert told == {"n": 7, "n_known": 3, "accuracy": 6 / 7, "chance": pytest.approx(1 / 3)}
    assert why is None
    why = questions.known(hooked, [every[1]] * 9 + [every[0]], "animals")[2]
    assert why
    assert "1 of 10 animals right in all orders (accuracy 1.000)" in why


def test_no_latent_and_no_setting_are_told(
    model: Model, files: dict[str, Path], asked: dict[str, Any], tmp_path: Path
) -> None:
    same = tmp_path / "same.txt"  # other documents, of the same tokens
    same.write_text("\n".join(line + " mind" for line in lines(0, 24, digits=True)))
    told = {"retain_thresholds": [1e-9], **asked["settings"]}
    result = unlearning.run(planted(model), model, config(files | {"retain": same}, **told))
    assert not result.details
    for key in ("loss_increase_forget", "unlearning_score"):
        assert result.metrics["unlearning"][key] is None
        assert "no latent fires" in result.null[f"unlearning.{key}"]
    told |= {"retain_thresholds": [1.0], "n_latents": [300], "multipliers": [100.0]}
    result = unlearning.run(planted(model), model, config(files, **told))
    assert "retain accuracy of 0.99" in result.null["unlearning.unlearning_score"]
    assert result.metrics["unlearning"]["unlearning_score_saebench060"] == 0


def test_where_too_much_of_the_retain_loss_is_lost_no_setting_is_best(
    model: Model, files: dict[str, Path]
) -> None:
    hooked = Hooked(planted(model), model, HOOK)
    corpus = Files("files", (str(files["forget"]),), documents_are="lines")
    held = documents(hooked, corpus, "forget", length=20, tokens=(20, 20))[1]
    setting = Setting(0.01, 1, 1.0, Change(np.array([3]), np.array([1.0])))
    trial = figures.Trial(firings([1.0]), [setting], [], 0, 2)
    row = {"chosen_by_loss_increase_forget": 1.0, "chosen_by_retain_loss_kept": 0.98}
    told, null, more = figures.loss_figures(hooked, [held, held], trial, [row], 20)
    assert more == {"loss_setting": None}
    assert told["loss_retain_base"] > 0
    assert "keeps 0.99" in null["loss_increase_forget_random"]
    assert {key for key, value in told.items() if value is None} == set(null)


def test_bad_corpora_are_told(model: Model, files: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(UserError, match=r"unlearning.forget: the corpus has 0 different"):
        unlearning.run(planted(model), model, config(files | {"forget": empty}))
    shared = tmp_path / "shared.txt"
    shared.write_text(
        files["retain"].read_text() + "\n" + files["forget"].read_text().split("\n")[3]
    )
    with pytest.raises(UserError, match="share 1 documents"):
        unlearning.run(planted(model), model, config(files | {"retain": shared}))


def test_bad_questions_are_told(
    model: Model, files: dict[str, Path], asked: dict[str, Any], tmp_path: Path
) -> None:
    good = asked["settings"]["forget_questions"]
    bad = {"query": "a", "choices": ["b", "c"], "gold": 2}
    for row, match in (
        (bad, "bad: line 1"),
        ({"query": "a", "choices": ["b"], "gold": 0}, "1 choices"),
    ):
        told = {"forget_questions": good, "retain_questions": [write(tmp_path / "bad", [row])]}
        with pytest.raises(UserError, match=match):
            unlearning.run(planted(model), model, config(files, **told))
    with pytest.raises(UserError, match="both or neither"):
        unlearning.run(planted(model), model, config(files, forget_questions=good))


def test_a_misfit_is_told(model: Model, files: dict[str, Path]) -> None:
    narrow = plain_coder(np.eye(4, 5, dtype=np.float32), OMP(k=2))
    with pytest.raises(UserError, match=r"5 entries, but .* has 16"):
        unlearning.run(narrow, model, config(files))
    with pytest.raises(UserError, match="multiplier"):
        config(files, multiplier=[3.0])
    assert config(files).quick().tokens == 16_384
