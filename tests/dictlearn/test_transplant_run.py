"""The command: two tiny models on disk become a third one, which loads and keeps what it should."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from activations.files import Whole
from activations.terminal import UserError, run_command
from dictlearn.transplant import __main__ as command
from dictlearn.transplant.config import TransplantConfig
from dictlearn.transplant.methods.omp import OMPMixing
from dictlearn.transplant.methods.plain import Mean, Random
from dictlearn.transplant.run import read_pair, read_transplant, transplant

torch = pytest.importorskip("torch", reason="the [lm] extra is not installed")
transformers = pytest.importorskip("transformers", reason="the [lm] extra is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

Write = Callable[..., Path]
Make = Callable[..., Path]
Tensors = dict[str, Any]

COMMON = [" the", " fox", " quick", "ing", " a", "é", "jump"]
OURS, THEIRS = [*COMMON, " lazy", "dog"], [*COMMON, " brown", "over", " naïve"]
TEXTS = ["the quick fox", " a brown fox jumping over", "naïve é\n12  €", "", "<s> it </s><|user|>"]
# Of the donor's new tokens, rows that are multiples of a shared token's: three, or minus two.
PLANTED = {" brown": (" the", 3.0), "over": (" quick", -2.0)}
EMBED = {
    "llama": "model.embed_tokens.weight",
    "gemma": "model.embed_tokens.weight",
    "neox": "gpt_neox.embed_in.weight",
    "gptj": "transformer.wte.weight",
}
HEAD = dict.fromkeys(EMBED, "lm_head.weight") | {"neox": "embed_out.weight"}


def configs(name: str, **settings: Any) -> Any:
    """A model's config and class, as small as they come."""
    if name == "gemma":
        kind, given = transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **settings,
        )  # fmt: skip
    elif name == "llama":
        kind, given = transformers.LlamaForCausalLM, transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, **settings,
        )  # fmt: skip
    elif name == "neox":
        kind, given = transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, **settings,
        )  # fmt: skip
    else:
        kind, given = (
            transformers.GPTJForCausalLM,
            transformers.GPTJConfig(
                n_embd=16, n_inner=32, n_layer=2, n_head=2, rotary_dim=4, n_positions=64, **settings
            ),
        )
    return kind, given


SPECIAL = {
    "byte-level": ("<s>", "</s>", "<|user|>", "<|end|>"),
    "sentencepiece": ("<pad>", "<eos>", "<bos>", "<unk>", "<|user|>"),
}
ROLES = {
    "byte-level": {"bos_token": "<s>", "eos_token": "</s>"},
    "sentencepiece": {
        "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>",
    },
}  # fmt: skip


def around(before: str, behind: str = "") -> Callable[[Any], None]:
    """A change to a tokenizer: it puts special tokens around each text."""

    def change(made: Any) -> None:
        named = [(text, made.token_to_id(text)) for text in (before, behind) if text]
        single = f"{f'{before} ' if before else ''}$A{f' {behind}' if behind else ''}"
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=named
        )

    return change


def plant(matrix: Any, directory: Path) -> None:
    for new, (old, factor) in PLANTED.items() if "▁brown" in raw(directory).get_vocab() else ():
        matrix[token(directory, new)] = factor * matrix[token(directory, old)]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Write) -> Make:
    """`make(architecture, tied=, padding=, ...)`: a model of random weights, made once."""
    made: dict[str, Path] = {}

    def directory(name: str, **options: Any) -> Path:
        key = f"{name} {options}"
        if key not in made:
            place = tmp_path_factory.mktemp(name)
            write_model(place, write_tokenizer, name, seed=len(made), **options)
            made[key] = place
        return made[key]

    return directory


def write_model(
    place: Path,
    write_tokenizer: Write,
    name: str,
    *,
    seed: int,
    tied: bool = False,
    padding: int = 0,
    dtype: str = "float32",
    shard: str = "5GB",
    kind: str | None = None,
    before: str | None = None,
    behind: str = "",
    roles: dict[str, str] | None = None,
    template: str | None = None,
    words: tuple[str, ...] | None = None,
) -> None:
    kind = kind or ("sentencepiece" if name == "gemma" else "byte-level")
    roles = ROLES[kind] if roles is None else roles
    own = list(words) if words else THEIRS if kind == "sentencepiece" else OURS
    before = roles.get("bos_token", "") if before is None else before
    settings = dict(roles) | ({} if template is None else {"chat_template": template})
    write_tokenizer(place, kind, own, SPECIAL[kind], config=settings, change=around(before, behind))
    tokenizer = raw(place)
    ids = {f"{role}_id": tokenizer.token_to_id(text) for role, text in roles.items()}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")) | ids
    ids.pop("unk_token_id", None)
    rows = tokenizer.get_vocab_size() + padding
    model_kind, config = configs(name, vocab_size=rows, tie_word_embeddings=tied, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_kind(config)
        with torch.no_grad():
            matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
            for matrix in matrices:
                matrix.weight.normal_()
                if getattr(matrix, "bias", None) is not None:
                    matrix.bias.normal_()
            for matrix in matrices[: 1 if tied else 2]:
                plant(matrix.weight, place)
    model.to(getattr(torch, dtype)).save_pretrained(place, max_shard_size=shard)


def config_of(base: Path, donor: Path, output: Path, **settings: Any) -> TransplantConfig:
    given = {"method": OMPMixing(k=4), "undertrained": 1.0} | settings
    return TransplantConfig(base=base, donor=donor, output=output, **given)


def tensors(directory: Path) -> Tensors:
    held: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        held |= safetensors_torch.load_file(file)
    return held


def raw(directory: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def token(directory: Path, text: str) -> int:
    (one,) = raw(directory).encode(text, add_special_tokens=False).ids
    return one


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def settings(directory: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((directory / name).read_text())


def loaded(directory: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, if every weight of it comes from the files."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(info[key] for key in info), info
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def check_made(out: Path, base: Path, donor: Path, name: str, donor_name: str = "gemma") -> None:
    """Laws of every transplant by OMP from the donor with planted rows."""
    new, old, theirs = tensors(out), tensors(base), tensors(donor)
    rows = theirs[EMBED[donor_name]].shape[0]
    matrices = [EMBED[name], *([HEAD[name]] if HEAD[name] in old else [])]
    biases = [key for key in old if key == "lm_head.bias"]
    assert new.keys() == old.keys()
    for key in new.keys() - {*matrices, *biases}:
        assert same(new[key], old[key]), key
    for key in (*matrices, *biases):
        assert new[key].dtype == old[key].dtype
        assert new[key].shape == (rows, *old[key].shape[1:])
        for text in COMMON:
            assert torch.equal(new[key][token(out, text)], old[key][token(base, text)])
        for text, (of, factor) in PLANTED.items():
            expected = factor * old[key][token(base, of)].float()
            tolerance = max(1e-4, 4 * torch.finfo(new[key].dtype).eps)
            assert torch.allclose(
                new[key][token(out, text)].float(), expected, rtol=tolerance, atol=tolerance
            )
    model, tokenizer = loaded(out)
    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape[-1] == rows == model.config.vocab_size
    assert torch.isfinite(logits).all()


# What is made.


def test_the_command_makes_a_model_that_loads(make: Make, tmp_path: Path, run_command: Any) -> None:
    base, donor, out = make("llama"), make("gemma", tied=True), tmp_path / "new" / "out"
    table = {"base": str(base), "donor": str(donor), "output": str(out), "undertrained": 1}
    (tmp_path / "t.toml").write_text(tomli_w.dumps(table | {"method": {"name": "omp", "k": 4}}))
    code, said, error = run_command("dictlearn.transplant", tmp_path / "t.toml")
    assert code == 0, error
    assert "AutoModelForCausalLM" in said
    check_made(out, base, donor, "llama")
    told = settings(out, "transplant.json")
    assert told["method"]["k"] == 4
    code, again, error = run_command("dictlearn.transplant", tmp_path / "t.toml")
    assert (code, again) == (2, "")
    assert error.count("error: ") == 1
    assert f"{out} is there already" in error


@pytest.mark.parametrize("name", ["llama", "neox", "gptj"])
@pytest.mark.parametrize("base_tied", [False, True])
@pytest.mark.parametrize("donor_tied", [False, True])
def test_bodies_and_shared_rows_stay_and_new_rows_are_combinations(
    name: str, base_tied: bool, donor_tied: bool, make: Make, tmp_path: Path
) -> None:
    base, donor = make(name, tied=base_tied), make("gemma", tied=donor_tied)
    transplant(config_of(base, donor, tmp_path / "out", method=OMPMixing(k=1)))
    check_made(tmp_path / "out", base, donor, name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 7},
        {"shard": "8KB"},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "shard": "8KB", "padding": 3},
    ],
    ids=str,
)
def test_files_and_types_of_the_base_stay(
    tied: bool, options: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    base, donor, out = make("llama", tied=tied, **options), make("gemma"), tmp_path / "out"
    transplant(config_of(base, donor, out, method=OMPMixing(k=1)))
    check_made(out, base, donor, "llama")
    files = [{file.name for file in one.glob("*.safetensors*")} for one in (base, out)]
    assert files[0] == files[1]
    assert ("model.safetensors.index.json" in files[1]) == ("shard" in options)


def test_padding_of_the_donor_stays_and_has_the_mean_of_shared_rows(
    make: Make, tmp_path: Path
) -> None:
    base, donor, out = make("llama", padding=5), make("gemma", padding=9), tmp_path / "out"
    transplant(config_of(base, donor, out))
    check_made(out, base, donor, "llama")
    matching = read_pair(base, donor, {}).matching
    new, old = tensors(out), tensors(base)
    for key in (EMBED["llama"], HEAD["llama"]):
        mean = old[key][matching.anchors[:, 1]].mean(dim=0)
        assert new[key].shape[0] == raw(donor).get_vocab_size() + 9
        assert torch.allclose(new[key][-9:], mean.expand(9, -1), atol=1e-5)


def test_either_model_can_take_the_others_tokenizer(make: Make, tmp_path: Path) -> None:
    base, donor, out = make("gemma"), make("llama"), tmp_path / "out"
    transplant(config_of(base, donor, out))
    new, old = tensors(out), tensors(base)
    for text in COMMON:
        for key in (EMBED["gemma"], HEAD["gemma"]):
            assert torch.equal(new[key][token(out, text)], old[key][token(base, text)])
    model, tokenizer = loaded(out)
    assert torch.isfinite(model(tokenizer("a fox", return_tensors="pt").input_ids).logits).all()
    assert [tokenizer.bos_token, tokenizer.eos_token] == ["<s>", "</s>"]


def test_a_vocabulary_that_lies_in_the_bases_needs_nothing_made_up(
    make: Make, tmp_path: Path
) -> None:
    base, donor = make("llama"), make("llama", words=("jump", " the"))
    out = tmp_path / "out"
    told = transplant(config_of(base, donor, out))
    assert told["matching"]["approximated"]["count"] == 0
    new, old = tensors(out), tensors(base)
    for text, place in raw(out).get_vocab().items():
        other = raw(base).token_to_id(text)
        assert torch.equal(new[EMBED["llama"]][place], old[EMBED["llama"]][other])
    loaded(out)


def test_a_seed_has_one_result(make: Make, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> bytes:
        out = tmp_path / name
        transplant(config_of(make("llama"), make("gemma"), out, method=Random(), seed=seed))
        return (out / "model.safetensors").read_bytes()

    first, again, other = made("a", 3), made("b", 3), made("c", 4)
    assert first == again
    assert first != other


def test_a_transplant_can_be_read_back(make: Make, tmp_path: Path) -> None:
    base, donor, out = make("llama"), make("gemma"), tmp_path / "out"
    given = config_of(base, donor, out, overrides={"over": " lazy"}, seed=7)
    told = transplant(given)
    pair, again = read_transplant(out)
    assert again == given
    assert told["matching"]["override"] == {"count": 1, "examples": [["over", " lazy"]]}
    rows = tensors(out)[EMBED["llama"]].numpy()
    (problem, head) = pair.problems()
    made = [given.method.rows(one, 7) for one in (problem, head)]
    np.testing.assert_array_equal(pair.tensors([problem, head], made)[EMBED["llama"]], rows)


def test_tied_weights_that_are_stored_twice_are_written_once(make: Make, tmp_path: Path) -> None:
    base = twice(make("llama", tied=True), tmp_path / "base", factor=1)
    donor, out = make("gemma"), tmp_path / "out"
    transplant(config_of(base, donor, out, method=OMPMixing(k=1)))
    assert HEAD["llama"] not in tensors(out)
    check_made(out, make("llama", tied=True), donor, "llama")


@pytest.mark.parametrize("tied", [False, True])
def test_a_tiktoken_file_of_the_donor_is_enough(
    tied: bool, make: Make, tmp_path: Path, write_tokenizer: Write
) -> None:
    """Its tokens match; what the new directory lacks is a tokenizer.json, as the donor does."""
    whole = make("gemma", tied=tied)
    donor = tmp_path / "donor"
    shutil.copytree(whole, donor)
    (donor / "tokenizer.json").unlink()
    write_tokenizer(donor, "tiktoken", [*COMMON, " brown"], ("<|end|>",))
    base, out = make("llama"), tmp_path / "out"
    told = transplant(config_of(base, donor, out))
    assert told["matching"]["kinds"] == {"donor": "tiktoken", "base": "byte-level"}
    assert told["digits"]["donor"] == "unknown"
    assert (out / "own.tiktoken").read_bytes() == (donor / "own.tiktoken").read_bytes()
    new, old = tensors(out)[EMBED["llama"]], tensors(base)[EMBED["llama"]]
    a_word = 256 + COMMON.index(" quick")
    assert torch.equal(new[a_word], old[token(base, " quick")])


def test_identical_tokenizers_make_a_plain_copy_and_say_so(make: Make, tmp_path: Path) -> None:
    base, donor, out = make("llama"), make("llama", tied=True), tmp_path / "out"
    told = transplant(config_of(base, donor, out))
    assert told["identical"]
    assert "plain copy" in told["warnings"][0]
    for file in base.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="plain copy"):
        read_transplant(out)


def test_a_plain_copy_may_lie_inside_of_the_base_and_is_said(
    make: Make, tmp_path: Path, run_command: Any
) -> None:
    shutil.copytree(make("llama"), tmp_path / "base")
    table = {"base": "base", "donor": str(make("llama", tied=True)), "output": "base/it's new"}
    (tmp_path / "t.toml").write_text(tomli_w.dumps(table))
    _, said, _ = run_command("dictlearn.transplant", "t.toml", "--dry-run", cwd=tmp_path)
    assert "plain copy" in said
    code, said, error = run_command("dictlearn.transplant", "t.toml", cwd=tmp_path)
    assert code == 0, error
    assert "plain copy" in said
    assert "evals" not in said
    names = {file.name for file in make("llama").iterdir()} | {"transplant.json"}
    assert {file.name for file in (tmp_path / "base" / "it's new").iterdir()} == names


def test_a_transplant_with_relative_paths_can_be_read_from_anywhere(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama", "gemma"):
        shutil.copytree(make(name), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    given = config_of(Path("llama"), Path("gemma"), Path("out"), method=Mean())
    transplant(given)
    monkeypatch.chdir("/")
    pair, _ = read_transplant(tmp_path / "out")
    assert pair.base.directory == tmp_path / "llama"
    assert pair.donor.directory == tmp_path / "gemma"


# Conventions.


def test_ids_are_those_of_the_new_vocabulary(make: Make, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(make("llama"), base)
    ends = [token(base, "</s>"), token(base, "<|user|>"), token(base, "<|end|>")]
    held = {"eos_token_id": ends, "bos_token_id": 0, "pad_token_id": 1, "temperature": 0.5}
    (base / "generation_config.json").write_text(json.dumps(held))
    donor, out = make("gemma"), tmp_path / "out"
    told = transplant(config_of(base, donor, out))
    ids = {text: raw(donor).token_to_id(text) for text in SPECIAL["sentencepiece"]}
    config, generation = settings(out), settings(out, "generation_config.json")
    assert config["vocab_size"] == raw(donor).get_vocab_size()
    assert config["bos_token_id"] == ids["<bos>"]
    assert config["eos_token_id"] == ids["<eos>"]
    assert generation["eos_token_id"] == [ids["<eos>"], ids["<|user|>"]]  # <|end|> has none
    assert generation["bos_token_id"] == ids["<bos>"]
    assert generation["pad_token_id"] == ids["<pad>"]
    assert generation["temperature"] == 0.5
    assert {key: config[key] for key in settings(base) if "token" not in key} == {
        key: value if key != "vocab_size" else config["vocab_size"]
        for key, value in settings(base).items()
        if "token" not in key
    }
    assert not any("end of text" in warning for warning in told["warnings"])


def test_a_lost_end_of_text_is_told_and_an_override_names_one(make: Make, tmp_path: Path) -> None:
    base = make("llama")
    donor = make("gemma", roles={"bos_token": "<bos>"})
    told = transplant(config_of(base, donor, tmp_path / "lost"))
    assert any("will not stop by itself" in warning for warning in told["warnings"])
    assert settings(tmp_path / "lost")["eos_token_id"] is None
    given = config_of(base, donor, tmp_path / "named", overrides={"<|user|>": "</s>"})
    told = transplant(given)
    assert not any("will not stop by itself" in warning for warning in told["warnings"])
    user = raw(donor).token_to_id("<|user|>")
    assert settings(tmp_path / "named")["eos_token_id"] == user
    assert loaded(tmp_path / "named")[1].eos_token == "<|user|>"


def test_ids_that_are_lost_are_null_and_those_of_the_class_do_not_come_in(
    make: Make, tmp_path: Path
) -> None:
    """Gemma's class has 0, 1 and 2 by itself; these are other tokens of the new vocabulary."""
    base = tmp_path / "base"
    shutil.copytree(make("gemma"), base)
    user = raw(base).token_to_id("<|user|>")
    held = {"eos_token_id": [1, user], "bos_token_id": [2], "pad_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(held))
    donor, out = make("llama", roles={}), tmp_path / "out"
    told = transplant(config_of(base, donor, out))
    config = transformers.AutoConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    generation = settings(out, "generation_config.json")
    assert generation["eos_token_id"] == [raw(donor).token_to_id("<|user|>")]
    assert generation["bos_token_id"] is generation["pad_token_id"] is None
    for warning in ("bos_token_id 2 ('<bos>')", "eos_token_id 1 ('<eos>')", "pad_token_id 0"):
        (one,) = [one for one in told["warnings"] if warning in one]
        assert "has no token in the new vocabulary" in one
    assert not any("will not stop by itself" in warning for warning in told["warnings"])
    loaded(out)


@pytest.mark.parametrize("nested", [False, True])
def test_ids_that_a_config_leaves_out_are_those_of_the_tokenizers_roles(
    nested: bool, make: Make, tmp_path: Path
) -> None:
    """They are so where they are the class's own: those of Gemma's are 0, 1 and 2."""
    base = tmp_path / "base"
    shutil.copytree(make("gemma"), base)
    held = {key: value for key, value in settings(base).items() if not key.endswith("_token_id")}
    held = {"eos_token_id": [1], "text_config": held} if nested else held
    (base / "config.json").write_text(json.dumps(held))
    (base / "generation_config.json").unlink()
    donor, out = make("llama"), tmp_path / "out"
    told = transplant(config_of(base, donor, out))
    config = settings(out)
    one = config["text_config"] if nested else config
    ids = [raw(donor).token_to_id(text) for text in ("<s>", "</s>")]
    assert [one["bos_token_id"], one["eos_token_id"], one["pad_token_id"]] == [*ids, None]
    assert not nested or config["eos_token_id"] == ids[1:]
    assert not any("will not stop by itself" in warning for warning in told["warnings"])


def test_ids_in_other_settings_are_those_of_the_new_vocabulary_too(
    make: Make, tmp_path: Path
) -> None:
    """Classes of models that read images do not take null for an id; -1 is no token's."""
    base, donor, out = tmp_path / "base", make("gemma"), tmp_path / "out"
    shutil.copytree(make("llama"), base)
    old, new = (raw(one).token_to_id("<|user|>") for one in (base, donor))
    lost = raw(base).token_to_id("<|end|>")
    images = {"image_token_id": old, "image_token_index": lost, "mask_token_id": lost}
    (base / "config.json").write_text(json.dumps(settings(base) | images))
    held = {"suppress_tokens": [old, lost], "bad_words_ids": [[old]], "sequence_bias": {"x": 1.0}}
    (base / "generation_config.json").write_text(json.dumps(held | {"top_k": 1}))
    told = transplant(config_of(base, donor, out))
    config = settings(out)
    assert {key: config[key] for key in images} == {
        "image_token_id": new, "image_token_index": -1, "mask_token_id": None,
    }  # fmt: skip
    assert settings(out, "generation_config.json") == {
        "suppress_tokens": [new], "bad_words_ids": None, "sequence_bias": None, "top_k": 1,
    }  # fmt: skip
    for key in ("image_token_index", "mask_token_id", "suppress_tokens", "bad_words_ids"):
        assert any(warning.startswith(f"{key} ") for warning in told["warnings"])


def test_roles_that_only_the_models_configs_name_are_matched(make: Make, tmp_path: Path) -> None:
    """As of GPT-2, whose tokenizer names no role."""
    base, donor, out = tmp_path / "base", tmp_path / "donor", tmp_path / "out"
    for name, place in (("llama", base), ("gemma", donor)):
        shutil.copytree(make(name), place)
        (place / "tokenizer_config.json").write_text("{}")
    told = transplant(config_of(base, donor, out))
    assert told["matching"]["role"]["examples"] == [["<bos>", "<s>"], ["<eos>", "</s>"]]
    tokenizer = loaded(out)[1]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    assert tokenizer("the").input_ids[0] == settings(out)["bos_token_id"] == 2


def test_an_end_of_text_that_is_an_ordinary_token_is_found(make: Make, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(make("llama"), base)
    held = settings(base) | {"eos_token_id": token(base, " fox")}
    (base / "config.json").write_text(json.dumps(held))
    told = transplant(config_of(base, make("gemma"), tmp_path / "out"))
    assert settings(tmp_path / "out")["eos_token_id"] == token(make("gemma"), " fox")
    assert not any("eos" in warning or "stop" in warning for warning in told["warnings"])


@pytest.mark.parametrize("before", ["<s>", "", "<|user|>"])
@pytest.mark.parametrize("behind", ["", "</s>"])
@pytest.mark.parametrize("theirs", ["<bos>", ""])
def test_what_stands_around_a_text_is_what_the_base_puts_there(
    before: str, behind: str, theirs: str, make: Make, tmp_path: Path
) -> None:
    base, donor = make("llama", before=before, behind=behind), make("gemma", before=theirs)
    out = tmp_path / "out"
    transplant(config_of(base, donor, out, method=Mean()))
    new_names = {"<s>": "<bos>", "</s>": "<eos>", "": None}
    own, tokenizer = raw(out), transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        ids = own.encode(text).ids
        plain = raw(donor).encode(text, add_special_tokens=False).ids
        ends = [own.token_to_id(new_names.get(t, t)) for t in (before, behind) if t]
        begin = ends[: 1 if before else 0]
        assert ids == [*begin, *plain, *ends[len(begin) :]]
        assert tokenizer(text).input_ids == ids
        assert tokenizer(text, add_special_tokens=False).input_ids == plain
        assert tokenizer.decode(plain) == raw(donor).decode(plain, skip_special_tokens=False)


def test_a_text_begins_as_the_base_has_it_where_an_override_names_the_token(
    make: Make, tmp_path: Path
) -> None:
    base, donor = make("llama"), make("gemma", roles={"eos_token": "<eos>"})
    out = tmp_path / "out"
    transplant(config_of(base, donor, out, method=Mean(), overrides={"<|user|>": "<s>"}))
    begin = raw(out).token_to_id("<|user|>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert raw(out).encode("the").ids[0] == begin
    assert tokenizer("the").input_ids == raw(out).encode("the").ids
    assert tokenizer.bos_token_id == begin == settings(out)["bos_token_id"]


def test_a_pair_of_texts_is_the_same_in_both_ways_of_loading(make: Make, tmp_path: Path) -> None:
    transplant(config_of(make("llama"), make("gemma"), tmp_path / "out", method=Mean()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the", " fox").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("the", " fox").input_ids == raw(tmp_path / "out").encode("the", " fox").ids


TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"


@pytest.mark.parametrize("own_file", [False, True])
def test_a_chat_is_written_as_the_base_does_in_the_new_tokens(
    own_file: bool, make: Make, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(make("llama", template=None if own_file else TEMPLATE), base)
    if own_file:
        (base / "chat_template.jinja").write_text(TEMPLATE)
    donor = make("gemma", template="the donor's own")
    transplant(config_of(base, donor, tmp_path / "out", method=Mean()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert said == "<bos><|user|>a<eos>"


def test_tokens_that_change_names_with_each_other_are_not_mixed_up(
    make: Make, tmp_path: Path
) -> None:
    """The base's </s> is called <|user|> now, and its <|user|> is called <eos>."""
    base, donor = make("llama", template="</s> <|user|> </s>"), make("gemma")
    overrides = {"<|user|>": "</s>", "<eos>": "<|user|>"}
    transplant(config_of(base, donor, tmp_path / "out", method=Mean(), overrides=overrides))
    written = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert written == "<|user|> <eos> <|user|>"


def test_a_token_that_takes_the_name_of_a_shorter_one_keeps_it(make: Make, tmp_path: Path) -> None:
    """The base's <|user|> is called <eos> now, and its <eos> is called <|user|>."""
    base = tmp_path / "base"
    shutil.copytree(make("llama", padding=1, template="<|user|> <eos> <|user|>"), base)
    made = raw(base)
    made.add_special_tokens(["<eos>"])
    made.save(str(base / "tokenizer.json"))
    overrides = {"<eos>": "<|user|>", "<|user|>": "<eos>"}
    transplant(config_of(base, make("gemma"), tmp_path / "out", method=Mean(), overrides=overrides))
    written = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert written == "<eos> <|user|> <eos>"


def test_added_tokens_of_a_template_that_are_no_special_ones_are_renamed_as_well(
    make: Make, tmp_path: Path
) -> None:
    """Of two with one beginning the longer one is meant; what is white stands for itself."""
    base, words = tmp_path / "base", ["<|im_start|>", "<|im_start|>a", "<|im_end|>", "\n\n"]
    template = "<|im_start|>a\n\n<|im_start|><|im_end|>"
    shutil.copytree(make("llama", padding=4, template=template), base)
    made = raw(base)
    made.add_tokens(words)
    made.save(str(base / "tokenizer.json"))
    overrides = {"<|user|>": "<|im_start|>", "<pad>": "<|im_start|>a"}
    told = transplant(config_of(base, make("gemma"), tmp_path / "out", overrides=overrides))
    written = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert written == "<pad>\n\n<|user|><|im_end|>"
    (warning,) = [one for one in told["warnings"] if "chat template writes" in one]
    assert "'<|im_end|>'" in warning


def test_special_tokens_of_a_template_that_are_lost_are_told(make: Make, tmp_path: Path) -> None:
    base = make("llama", template="<|user|>{{ messages[0]['content'] }}<|end|>")
    told = transplant(config_of(base, make("gemma"), tmp_path / "out", method=Mean()))
    assert any("chat template writes '<|end|>'" in warning for warning in told["warnings"])


def test_the_donors_template_alone_is_left_out_and_said(make: Make, tmp_path: Path) -> None:
    donor = make("gemma", template="the donor's own")
    told = transplant(config_of(make("llama"), donor, tmp_path / "out", method=Mean()))
    assert any("chat template is left out" in warning for warning in told["warnings"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("tied", [False, True])
def test_generation_stops_at_the_new_end_of_text(tied: bool, make: Make, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(make("gptj", tied=tied), base)
    held = tensors(base)
    held["lm_head.bias"][token(base, "</s>")] = 1e4  # it says nothing else
    safetensors_torch.save_file(held, base / "model.safetensors", {"format": "pt"})
    transplant(config_of(base, make("gemma"), tmp_path / "out"))
    model, tokenizer = loaded(tmp_path / "out")
    given = tokenizer("the fox", return_tensors="pt")
    made = model.generate(**given, max_new_tokens=5, do_sample=False)
    assert made[0, given.input_ids.shape[1] :].tolist() == [tokenizer.eos_token_id]
    assert tokenizer.eos_token == "<eos>"


# What goes wrong.


def twice(tied: Path, place: Path, factor: float) -> Path:
    """A directory of tied weights that holds a head as well."""
    shutil.copytree(tied, place)
    held = tensors(tied)
    held[HEAD["llama"]] = factor * held[EMBED["llama"]]
    safetensors_torch.save_file(held, place / "model.safetensors", {"format": "pt"})
    return place


def edited(directory: Path, name: str, edit: Callable[[Path], Any]) -> None:
    edit(directory / name)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def as_bin(file: Path) -> None:
    file.unlink()
    (file.parent / "pytorch_model.bin").write_bytes(b"never read")


def more_tokens(file: Path) -> None:
    """Two ordinary tokens more than the embedding has rows."""
    made = tokenizers.Tokenizer.from_file(str(file))
    made.add_tokens(["surplus", "more of it"])
    made.save(str(file))


def doubled(file: Path) -> None:
    held = tensors(file.parent)
    held[HEAD["llama"]] = 2 * held[EMBED["llama"]]
    safetensors_torch.save_file(held, file, {"format": "pt"})


def integers(file: Path) -> None:
    held = tensors(file.parent)
    held[EMBED["llama"]] = held[EMBED["llama"]].to(torch.int8)
    safetensors_torch.save_file(held, file, {"format": "pt"})


def word_level(file: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.save(str(file))


def with_tensors(directory: Path, **more: Any) -> None:
    """A directory's weights with other tensors, or others beside them."""
    held = tensors(directory) | {name.replace("__", "."): value for name, value in more.items()}
    safetensors_torch.save_file(held, directory / WEIGHTS, {"format": "pt"})


def no_embedding(file: Path) -> None:
    held = {key: value for key, value in tensors(file.parent).items() if "embed" not in key}
    safetensors_torch.save_file(held, file, {"format": "pt"})


def no_head(file: Path) -> None:
    held = {key: value for key, value in tensors(file.parent).items() if "head" not in key}
    safetensors_torch.save_file(held, file, {"format": "pt"})


WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("which", ["base", "donor"])
@pytest.mark.parametrize(
    ("file", "edit", "expected"),
    [
        ("", shutil.rmtree, "is no directory"),
        ("config.json", Path.unlink, "config.json: cannot be read"),
        ("config.json", lambda file: file.write_text("{"), "config.json: cannot be read"),
        ("tokenizer.json", Path.unlink, "holds no tokenizer.json"),
        ("tokenizer.json", cut, "tokenizer.json: cannot be read"),
        ("tokenizer.json", word_level, "a WordLevel tokenizer whose tokens are written in a way"),
        ("tokenizer.json", more_tokens, "2 tokens have none ('surplus', 'more of it')"),
        (WEIGHTS, cut, "model.safetensors: is "),
        (WEIGHTS, cut_header, "cannot be read as safetensors"),
        (WEIGHTS, lambda file: file.write_bytes(b""), "cannot be read as safetensors"),
        (WEIGHTS, lambda file: file.write_bytes(b"\xff" * 999), "cannot be read as safetensors"),
        (WEIGHTS, Path.unlink, "has no model.safetensors; is it a model's directory"),
        (WEIGHTS, as_bin, "python -m activations.models export dir:"),
        (WEIGHTS, doubled, "says tie_word_embeddings, but lm_head.weight is not"),
        (WEIGHTS, integers, "holds I8"),
        (WEIGHTS, no_embedding, "the embedding cannot be told"),
    ],
)
def test_damaged_models_are_told(
    which: str,
    file: str,
    edit: Callable[[Path], Any],
    expected: str,
    make: Make,
    tmp_path: Path,
    fails: Callable[..., str],
) -> None:
    given = {"base": make("llama", tied=True), "donor": make("gemma")}
    broken = tmp_path / "broken"
    shutil.copytree(make("llama", tied=True), broken)
    if which == "donor":
        given["base"] = make("gemma")
    edit(broken / file)
    said = fails(given | {which: broken}, expected)
    assert str(broken) in said


def test_an_untied_model_without_a_head_is_told(
    make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    shutil.copytree(make("llama"), tmp_path / "broken")
    no_head(tmp_path / "broken" / WEIGHTS)
    given = {"base": tmp_path / "broken", "donor": make("gemma")}
    fails(given, "the output head cannot be told")


@pytest.mark.parametrize("which", ["base", "donor"])
def test_a_head_with_other_rows_than_the_embedding_is_told(
    which: str, make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(make("llama"), broken)
    with_tensors(broken, lm_head__weight=torch.ones(3, 16))
    given = {"base": make("gemma"), "donor": make("gemma")} | {which: broken}
    fails(given, "rows and lm_head.weight 3; expected as many")


@pytest.mark.parametrize("which", ["base", "donor"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_told_with_their_token(
    which: str, tied: bool, value: float, make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(make("llama", tied=tied), broken)
    key = EMBED["llama"] if tied else HEAD["llama"]
    matrix, row = tensors(broken)[key], token(broken, " quick")
    matrix[row, 7] = matrix[-1, 0] = value
    with_tensors(broken, **{key: matrix})
    said = fails({"base": make("gemma"), "donor": make("gemma")} | {which: broken}, str(broken))
    place = f"{key} holds NaN or infinity in 2 of {len(matrix)} rows, first in row {row}"
    assert f"{WEIGHTS}: {place} (token ' quick')" in said


def test_a_bias_that_is_no_number_is_told(
    make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    shutil.copytree(make("gptj"), tmp_path / "broken")
    bias = tensors(tmp_path / "broken")["lm_head.bias"]
    bias[5] = float("nan")
    with_tensors(tmp_path / "broken", lm_head__bias=bias)
    given = {"base": tmp_path / "broken", "donor": make("gemma")}
    fails(given, f"lm_head.bias holds NaN or infinity in 1 of {len(bias)} rows, first in row 5")


def test_a_row_that_does_not_fit_the_bases_type_is_told(
    make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """ " brown" is three times " the", and 65,504 the greatest number of 16 bits."""
    base = tmp_path / "base"
    shutil.copytree(make("llama", dtype="float16"), base)
    matrix = tensors(base)[EMBED["llama"]]
    matrix[token(base, " the"), 3] = 30000
    with_tensors(base, **{EMBED["llama"]: matrix})
    given = {"base": base, "donor": make("gemma"), "undertrained": 1}
    given |= {"method": {"name": "omp", "k": 1}}
    fails(given, "model.embed_tokens.weight: a row that was made up is no number in F16")


@pytest.mark.parametrize(
    ("name", "columns", "refused"),
    [
        ("model.embed_tokens_per_layer.weight", 4, True),  # as Gemma 3n's
        ("model.layers.0.ffn.s_emb.weight", 4, True),
        ("model.mtp_head.weight", 4, True),
        ("final_logits_bias", 0, True),
        ("model.embed_positions.weight", 4, False),
        ("transformer.wpe.weight", 4, False),
        ("model.layers.0.mlp.gate_proj.weight", 4, False),
        ("model.layers.0.mlp.gate_proj.bias", 0, False),
        ("model.final_layernorm.bias", 0, False),
    ],
)
def test_what_else_has_a_row_for_every_token_is_told_by_its_name(
    name: str, columns: int, refused: bool,
    make: Make, tmp_path: Path, fails: Callable[..., str],
) -> None:  # fmt: skip
    odd = tmp_path / "odd"
    shutil.copytree(make("llama"), odd)
    shape = (len(tensors(odd)[EMBED["llama"]]), *([columns] if columns else []))
    more = torch.full(shape, 0.25)
    with_tensors(odd, **{name: more})
    if refused:
        fails({"base": odd, "donor": make("gemma")}, f"{WEIGHTS}: {name} holds something for every")
    else:
        transplant(config_of(odd, make("gemma"), tmp_path / "out", method=Mean()))
        assert same(tensors(tmp_path / "out")[name], more)
    # What a donor has beside its embedding is not read.
    transplant(config_of(make("gemma"), odd, tmp_path / "other", method=Mean()))


def test_a_matrix_for_a_part_of_the_vocabulary_is_told_by_the_config(
    make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """Gemma 3n's matrix for each layer has fewer rows than its embedding."""
    shutil.copytree(make("llama"), tmp_path / "odd")
    with_tensors(tmp_path / "odd", model__embed_tokens_per_layer__weight=torch.ones(200, 4))
    held = settings(tmp_path / "odd") | {"vocab_size_per_layer_input": 200}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(held))
    given = {"base": tmp_path / "odd", "donor": make("gemma")}
    fails(given, "model.embed_tokens_per_layer.weight holds something for every token")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": {"name": "omp", "k": 5000}}, "method.k: 5000 is more than the"),
        ({"method": {"name": "omp", "k": 0}}, "method.k"),
        ({"method": {"name": "opm"}}, "Did you mean omp?"),
        ({"method": {"name": "mean", "k": 3}}, "method.k: unknown key"),
        ({"method": {"name": "focus"}}, "method.static: missing"),
        ({"method": {"name": "focus", "static": {}}}, "method.static: give either vectors"),
        ({"methods": {"name": "omp"}}, "methods: unknown key. Did you mean method "),
        ({"undertrained": 0}, "undertrained"),
        ({"undertrained": 1.5}, "undertrained"),
        ({"seed": -1}, "seed"),
        ({"overrides": {"<none>": "</s>"}}, "has no token '<none>'"),
        ({"overrides": {"<eos>": "<none>"}}, "has no token '<none>'"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_followed_are_told(
    settings: dict[str, Any], expected: str, make: Make, fails: Callable[..., str]
) -> None:
    fails({"base": make("llama"), "donor": make("gemma")} | settings, expected)


def test_vocabularies_without_a_shared_token_are_told(
    make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    shutil.copytree(make("gemma"), tmp_path / "other")
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({"日": 0, "本": 1}, unk_token="日"))
    made.save(str(tmp_path / "other" / "tokenizer.json"))
    fails({"base": make("llama"), "donor": tmp_path / "other"}, "share no tokens")


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file"])
def test_an_output_in_use_is_left_alone(
    kind: str, make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
    if kind == "directory":
        (out / "mine").write_text("mine")
    fails({"base": make("llama"), "donor": make("gemma")}, "is there already", made=True)
    assert out.is_file() if kind == "file" else [*out.iterdir()] == [*out.glob("mine")]


def test_an_output_that_cannot_be_written_is_told(
    make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("")
    given = {"base": make("llama"), "donor": make("gemma"), "output": tmp_path / "file" / "out"}
    fails(given, "cannot be written")


@pytest.mark.parametrize(
    ("donor", "place", "name", "call"),
    [
        ("gemma", Path, "write_text", 1),
        ("gemma", Path, "write_text", 4),
        ("gemma", shutil, "copyfile", 1),
        ("gemma", Whole, "write", 1),
        ("gemma", Whole, "write", 5),
        ("gemma", os, "fsync", 1),
        ("gemma", os, "replace", 2),
        # Of these a plain copy is made.
        ("llama", shutil, "copyfile", 1),
        ("llama", shutil, "copyfile", 2),
        ("llama", Path, "write_text", 1),
        ("llama", os, "replace", 1),
    ],
)
def test_a_full_disk_leaves_nothing_and_is_told_once(
    donor: str, place: Any, name: str, call: int,
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base, other = make("llama", shard="8KB"), make(donor)
    calls, original = itertools.count(1), getattr(place, name)

    def full(*args: Any, **options: Any) -> Any:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        with pytest.raises(UserError, match="cannot be written") as caught:
            transplant(config_of(base, other, tmp_path / "out"))
    assert next(calls) > call
    said = str(caught.value)
    assert said.count("No space left on device") == 1
    assert said.endswith("; nothing is left")
    assert not [file for file in tmp_path.iterdir() if file.name != ".out.lock"]


@pytest.mark.parametrize("size", [16, 48])  # KiB: full in the tokenizer, in the weights
def test_a_disk_that_is_really_full_is_told(
    size: int, make: Make, tmp_path: Path, fails: Callable[..., str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        given = {"base": make("llama"), "donor": make("gemma"), "output": disk / "out"}
        fails(given | {"method": {"name": "mean"}}, "No space left on device")
        assert [file.name for file in disk.iterdir()] == [".out.lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`fails(config, expected)`: the command ends with 2 and one message, and leaves nothing."""

    def check(given: dict[str, Any], expected: str, *, made: bool = False) -> str:
        table = {"output": tmp_path / "out"} | given
        toml = {key: str(one) if isinstance(one, Path) else one for key, one in table.items()}
        (tmp_path / "t.toml").write_text(tomli_w.dumps(toml))
        monkeypatch.setattr(sys, "argv", ["transplant", str(tmp_path / "t.toml")])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command(command.main)
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert said.out == ""
        assert said.err.count("error: ") == 1
        assert "Traceback" not in said.err
        assert expected in said.err
        assert (tmp_path / "out").exists() == made
        assert not [*tmp_path.glob("out.tmp-*")]
        return said.err

    return check


def test_special_tokens_of_the_base_without_rows_are_not_given_away(
    make: Make, tmp_path: Path
) -> None:
    """A padding token that was added to the tokenizer, and never to the weights."""
    base = tmp_path / "base"
    shutil.copytree(make("llama"), base)
    made = raw(base)
    made.add_special_tokens(["[PAD]"])
    made.save(str(base / "tokenizer.json"))
    held = settings(base, "tokenizer_config.json") | {"pad_token": "[PAD]"}
    (base / "tokenizer_config.json").write_text(json.dumps(held))
    out, donor = tmp_path / "out", make("gemma")
    told = transplant(config_of(base, donor, out))
    assert ["<pad>", "[PAD]"] not in told["matching"]["role"]["examples"]
    check_made(out, make("llama"), donor, "llama")


def test_special_tokens_with_brackets_are_shown(
    make: Make, tmp_path: Path, write_tokenizer: Write, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rich would read [/INST] as markup, and fail."""
    given = {}
    for which, name in (("base", "llama"), ("donor", "gemma")):
        given[which] = str(tmp_path / which)
        shutil.copytree(make(name), tmp_path / which)
        kind = "byte-level" if name == "llama" else "sentencepiece"
        words = OURS if name == "llama" else THEIRS
        write_tokenizer(tmp_path / which, kind, words[:-1], ("[/INST]", "[bold]"))
    (tmp_path / "t.toml").write_text(tomli_w.dumps(given | {"output": str(tmp_path / "out")}))
    argv = ["transplant", str(tmp_path / "t.toml"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", argv)
    command.main()
    said = capsys.readouterr().out
    assert "'[/INST]' -> '[/INST]'" in said
    assert "'[bold]' -> '[bold]'" in said
    assert not (tmp_path / "out").exists()


# Kills, and two at once.

SLOW = """
import pathlib, sys, time
from dictlearn.transplant import weights, __main__ as command
from activations.terminal import run_command
gate, write = pathlib.Path(sys.argv.pop(1)), weights._write
def slow(file, *rest):
    write(file, *rest)
    (gate / "writing").touch()
    while not (gate / "go on").exists():
        time.sleep(0.01)
weights._write = slow
run_command(command.main)
"""


@contextlib.contextmanager
def writing(config: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, stopped behind its first file of weights until "go on" lies beside `config`."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, config.parent, config],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for _ in range(6000):
                if (config.parent / "writing").exists() or process.poll() is not None:
                    break
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def test_a_kill_leaves_no_output_and_the_next_run_sweeps_and_ends(
    make: Make, tmp_path: Path
) -> None:
    base, donor, out = make("llama", shard="8KB"), make("gemma"), tmp_path / "out"
    table = {"base": str(base), "donor": str(donor), "output": str(out)}
    (tmp_path / "t.toml").write_text(tomli_w.dumps(table | {"method": {"name": "mean"}}))
    with writing(tmp_path / "t.toml") as process:
        assert process.poll() is None, process.stdout and process.stdout.read()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert len([*tmp_path.glob("out.tmp-*")]) == 1
    transplant(config_of(base, donor, out, method=OMPMixing(k=1)))
    assert not [*tmp_path.glob("out.tmp-*")]
    check_made(out, base, donor, "llama")


def test_of_two_at_once_one_wins_and_the_other_says_so(make: Make, tmp_path: Path) -> None:
    base, donor, out = make("llama"), make("gemma"), tmp_path / "out"
    table = {"base": str(base), "donor": str(donor), "output": str(out), "undertrained": 1}
    (tmp_path / "t.toml").write_text(tomli_w.dumps(table | {"method": {"name": "omp", "k": 1}}))
    with writing(tmp_path / "t.toml") as process:
        assert process.poll() is None, process.stdout and process.stdout.read()
        with pytest.raises(UserError, match="another transplant is writing"):
            transplant(config_of(base, donor, out))
        assert not out.exists()
        (tmp_path / "go on").touch()
        assert process.wait(60) == 0
    check_made(out, base, donor, "llama")
