"""The one command: ours and others' dictionaries, what is done is not done again, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from activations.config import validate
from activations.files import sha256
from activations.store import Store
from activations.terminal import UserError
from dictlearn.interop import load
from evals import core, run
from evals.run import EvalConfig, Subject

Command = Callable[..., tuple[int, str, str]]

HOOK, D, M = "blocks.1.hook_resid_post", 16, 24
SMALL = {"core": {"tokens": 100, "behaviour_tokens": 50, "batch_size": 4}}


@pytest.fixture
def texts(tiny_run: Path) -> Path:
    return tiny_run.parent / "texts"


@pytest.fixture
def ours(tiny_run: Path) -> Path:
    return tiny_run


def weights(d: int = D) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"W_enc": (d, M), "W_dec": (M, d), "b_enc": (M,), "b_dec": (d,)}
    return {name: rng.standard_normal(of).astype(np.float32) / 4 for name, of in shapes.items()}


def saelens(folder: Path, d: int = D) -> Path:
    """A TopK dictionary as SAELens 6 writes it."""
    folder.mkdir()
    told = {"hook_name": HOOK, "model_name": "tiny", "sae_lens_version": "6.54.12"}
    config = {"architecture": "topk", "d_in": d, "d_sae": M, "k": 3, "metadata": told}
    (folder / "cfg.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights(d), folder / "sae_weights.safetensors")
    return folder


def gemma_scope(folder: Path) -> Path:
    """A JumpReLU dictionary in Gemma Scope 1's file."""
    place = folder / "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_3"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", **weights(), threshold=np.full(M, 0.2, np.float32))
    return place / "params.npz"


def subject(path: Path, **table: Any) -> Subject:
    return Subject(load(path), validate(EvalConfig, SMALL | table, "test"))


def measured(of: Subject, out: Path, **flags: bool) -> dict[str, Any]:
    options = {"quick": False, "overwrite": False} | flags
    found, failed = run.evaluate(of, ["core"], out, **options)
    if failed:
        raise UserError(failed["core"])
    return found["core"]


def test_a_run_of_ours_is_measured_on_its_test_documents(ours: Path, tmp_path: Path) -> None:
    of = subject(ours)
    token, document = of.text()
    metadata = load(ours).metadata
    assert set(np.unique(document[document >= 0])) == set(metadata["split"]["test"])
    stored = Store(metadata["store"]["path"]).sequences
    assert (document >= 0).sum() == np.isin(stored[:, 1], metadata["split"]["test"]).sum()
    found = measured(of, tmp_path)
    assert found["eval_type_id"] == "core"
    assert found["sae_lens_id"] == "run"
    assert found["eval_config"]["hook"] == HOOK
    stats = found["eval_result_metrics"]["token_stats"]
    assert 50 <= stats["total_tokens_eval_reconstruction"] <= 100 + token.shape[1]
    assert found["eval_result_metrics"]["sparsity"]["l0"] == 3
    assert len(found["eval_result_details"]) == M


@pytest.mark.parametrize("make", [lambda p: saelens(p / "sae"), gemma_scope])
def test_others_are_measured_on_a_corpus(
    make: Any, texts: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    corpus = {"kind": "files", "paths": [str(texts / "*.txt")]}
    table = {"corpus": corpus, "model": f"dir:{tiny_model_dir}", "context_length": 12, "hook": HOOK}
    found = measured(subject(make(tmp_path), **table), tmp_path / "out")
    assert found["eval_result_metrics"]["headline"]["kl"] > 0
    assert found["eval_result_metrics"]["misc_metrics"]["average_max_encoder_cosine_sim"] > 0
    assert found["sae_cfg_dict"]["text"]["corpus"]["paths"] == corpus["paths"]


def test_what_is_done_is_not_done_again(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(subject(ours), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(core, "run", lambda *_: pytest.fail("measured again"))
        assert measured(subject(ours), tmp_path) == found
        other = {"core": SMALL["core"] | {"seed": 1}}
        with pytest.raises(UserError, match=r"core\.json: holds results of another .*--overwrite"):
            measured(subject(ours, **other), tmp_path)
    again = measured(subject(ours, **other), tmp_path, overwrite=True)
    assert again["eval_config"]["seed"] == 1
    assert again["eval_result_metrics"]["sparsity"] == found["eval_result_metrics"]["sparsity"]
    (tmp_path / "core.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as results"):
        measured(subject(ours), tmp_path)


def test_mistakes_are_told(ours: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"core\.tokns: unknown key"):
        measured(subject(ours, core={"tokns": 5}), tmp_path)
    with pytest.raises(UserError, match=r"core\.hook: unknown key; the hook stands at the top"):
        measured(subject(ours, core={"hook": HOOK}), tmp_path)
    wide = saelens(tmp_path / "wide", 8)
    with pytest.raises(UserError, match="name it with --set model"):
        measured(subject(wide), tmp_path / "out")
    with pytest.raises(UserError, match="8 entries, but blocks"):
        measured(subject(wide, model=f"dir:{tiny_model_dir}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of three classes, and a second label."""
    path = tmp_path_factory.mktemp("labelled") / "animals.jsonl"
    rows = [
        {"text": f"the {word} {i} {other}", "label": word, "second": other}
        for word in ("fox", "dog", "mind") for other in ("quick", "lazy") for i in range(32)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_families(labelled: Path, model: Path) -> dict[str, Any]:
    """Small settings of all families but `ioi`, whose words a tiny vocabulary does not have."""
    facts = {f"e{i}": {"A": f"a{i % 3}", "B": f"b{i % 2}"} for i in range(12)}
    for kind, told in (
        ("attribute_to_prompts", {"A": ["the %s is", "of %s"], "B": ["a %s has", "its %s"]}),
        ("entity_attributes", facts),
    ):
        (labelled.parent / f"ravel_thing_{kind}.json").write_text(json.dumps(told))
    judge = {"kind": "model", "spec": f"dir:{model}"}
    ravel = {"data": str(labelled.parent), "entity": "thing", "attributes": ["A", "B"]}
    steering = {
        "fluency_model": f"dir:{model}", "set": {"kind": "occupations", "n": 40}, "texts": 10,
        "max_concepts": 1, "samples": 1, "new_tokens": 2, "kl": [1e-4], "contexts": 2,
        "prompts": ["The fox", "The dog"],
    }  # fmt: skip
    corpora = {}
    for side, word in (("forget", "fox"), ("retain", "dog")):
        file = labelled.parent / f"{side}.txt"
        file.write_text("\n\n".join(f"the {word} and {i} others jump over it" for i in range(8)))
        corpora[side] = {"kind": "files", "paths": [str(file)], "documents_are": "paragraphs"}
    sets = [{"kind": "file", "path": str(labelled)}]
    few = {"context_length": 12, "epochs": 2, "n_seeds": 2}
    last = {"sets": sets, "context_length": 12, "n_seeds": 1, "ks": [1]}
    return {
        "sparse_probing": {"sets": sets, "k_values": [1], **few},
        "sparse_probing_sae_probes": last,
        "absorption": {"n_words": 50},
        "tpp": {"sets": sets, "n_values": [2], **few},
        "scr": {"sets": [sets[0] | {"second": "second"}], "n_values": [2], **few},
        "steering": steering,
        "unlearning": corpora | {"n_latents": [1], "multipliers": [1.0], "n_seeds": 1},
        "ravel": ravel | {"answer_tokens": 2},
        "autointerp": {"judge": judge, "window": 3, "n_latents": 2, "n_random": 2, "judge_top": 1,
                       "judge_sampled": 0, "explain_top": 1, "explain_sampled": 0},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "saelens", "gemma_scope"])
def test_every_family_measures_every_kind(
    kind: str, ours: Path, labelled: Path, tiny_model_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path / "cache"))
    table = all_families(labelled, tiny_model_dir)
    path = {"ours": lambda: ours, "saelens": lambda: saelens(tmp_path / "sae"),
            "gemma_scope": lambda: gemma_scope(tmp_path)}[kind]()  # fmt: skip
    if kind != "ours":
        table |= {"model": f"dir:{tiny_model_dir}", "hook": HOOK, "context_length": 12}
    of = subject(path, **table)
    out = tmp_path / "out"
    found, failed = run.evaluate(of, list(run.FAMILIES), out, quick=False, overwrite=False)
    assert list(failed) == ["ioi"]
    assert "expected" in failed["ioi"]
    families = {name: family for name, family in run.FAMILIES.items() if name != "ioi"}
    for name, family in families.items():
        assert found[name]["eval_type_id"] == family.id
        assert found[name] == json.loads((out / f"{name}.json").read_text())
    probing = found["sparse_probing"]["eval_result_metrics"]
    assert 0 <= probing["sae"]["sae_top_1_test_accuracy"] <= 1
    (told,) = found["tpp"]["eval_config"]["sets"]
    assert told["sha256"] == sha256(labelled)
    run.show(found)
    with monkeypatch.context() as patch:  # all of it is done
        patch.setattr(Subject, "model", property(lambda self: pytest.fail("loaded again")))
        run.evaluate(of, list(families), out, quick=False, overwrite=False)


def test_a_family_that_fails_leaves_the_others(
    ours: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path / "cache"))
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "the fox", "label": "fox"}\n')
    every = all_families(labelled, labelled)
    table = {name: every[name] for name in ("sparse_probing", "tpp")}
    table["sparse_probing"] |= {"sets": [{"kind": "file", "path": str(one)}]}
    names = ["sparse_probing", "core", "tpp"]
    found, failed = run.evaluate(
        subject(ours, **table), names, tmp_path, quick=False, overwrite=False
    )
    assert set(found) == {"core", "tpp"}
    assert "one class, 'fox'" in failed["sparse_probing"]
    assert not (tmp_path / "sparse_probing.json").exists()
    # A changed file is another set.
    with labelled.open("a") as lines:
        lines.write('{"text": "a late fox", "label": "fox", "second": "lazy"}\n')
    with pytest.raises(UserError, match=r"tpp\.json: holds results of another dictionary, text"):
        run.evaluate(subject(ours, **table), ["tpp"], tmp_path, quick=False, overwrite=False)
    table["tpp"]["sets"] = [{"kind": "file", "path": str(tmp_path / "none.csv")}]
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        run.evaluate(subject(ours, **table), ["tpp"], tmp_path, quick=False, overwrite=False)


@pytest.mark.slow
def test_the_command(ours: Path, run_command: Command, tmp_path: Path) -> None:
    options = ["--evals", "core", "--set", "core.tokens=100", "--set", "core.behaviour_tokens=50"]
    code, out, errors = run_command("evals.run", ours, *options, cwd=tmp_path)
    assert code == 0, errors
    assert "headline.ce_increase" in out
    assert f"results in {ours}/evals" in out.replace("\n", "")
    assert (ours / "evals/core.json").exists()
    code, _, errors = run_command("evals.run", ours, "--evals", "cor")
    assert (code, errors) == (2, f"error: --evals: no 'cor' among {', '.join(run.FAMILIES)}\n")
    code, _, errors = run_command("evals.run", tmp_path)
    assert code == 2
    assert "no run there" in errors


def test_categories_with_the_same_figures_stand_side_by_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def figures(score: float | None) -> dict[str, Any]:
        ends = None if score is None else [score - 0.1, score + 0.1]
        return {"score": score, "score_interval": ends, "judge_score": None, "effect": 0.5}

    metrics = {"feature": figures(0.25), "probe": figures(0.75), "pca": figures(None)}
    metrics["other"] = {"share": 0.125}
    told = {"null": {"pca.score": "it [knows] nothing", "pca.judge_score": "it [knows] nothing"}}
    run.show({"steering": {"eval_result_metrics": metrics, "eval_result_unstructured": told}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["steering", "other.share", "0.125"] in lines
    assert ["steering", "score", "effect"] in lines  # what is null for all has no column
    assert ["feature", "0.25", "(0.15", "to", "0.35)", "0.5"] in lines
    assert ["pca", "null", "0.5"] in lines
    told = ["steering:", "pca.score,", "pca.judge_score", "null:", "it", "[knows]", "nothing"]
    assert lines.count(told) == 1
