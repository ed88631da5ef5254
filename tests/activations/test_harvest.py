"""Laws of the harvest: the rows are the model's own, once each, however often it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
import transformers
from safetensors.numpy import load_file, save_file

from activations import harvest, models, terminal
from activations.store import MANIFEST, Store, StoreError

HOOKS = (
    "hook_embed",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.mlp.hook_out",
    "blocks.2.hook_resid_post",
)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    """A harvest of some 600 rows in several shards; the texts hold special tokens."""
    rng = np.random.default_rng(0)
    words = ["fox", "lazy", "dog", "quick", "mind", "the", "</s>", "<s>", "naïve"]
    for index in range(9):
        text = " ".join(rng.choice(words, 40))
        (tmp_path / f"{index}.txt").write_text(f"{index} {text}")
    return {
        "store": str(tmp_path / "store"),
        "model": f"dir:{tiny_model_dir}",
        "hooks": ["blocks.1.hook_resid_post"],
        "context_length": 12,
        "batch_size": 3,
        "shard_tokens": 60,  # rounded up to two batches
        "corpus": {"kind": "files", "paths": [str(tmp_path / "*.txt")]},
    }


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """`command(config)` is `python -m activations.harvest`, in this process."""
    # As in a process of its own, where models.load comes before transformers does.
    transformers.utils.logging.disable_progress_bar()

    def run(table: dict[str, Any]) -> tuple[int, str, str]:
        path = tmp_path / "harvest.toml"
        path.write_text(tomli_w.dumps(table))
        monkeypatch.setattr(sys, "argv", ["harvest", str(path)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            terminal.run_command(harvest.main)
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return run


def contents(store: str | Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in Path(store).iterdir() if f.name != ".lock"}


def check_mistake(result: tuple[int, str, str], *expected: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    for part in expected:
        assert part in err


def rows(store: Store, hook: str) -> np.ndarray:
    return np.concatenate([store.activations(shard, hook) for shard in store.manifest.shards])


def sequences(store: Store) -> np.ndarray:
    """Every full sequence of token ids [s c]."""
    return np.concatenate([store.read(shard, "sequences/token") for shard in store.manifest.shards])


def changed_model(directory: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model with its tensors changed in place."""
    shutil.copytree(directory, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors")
    return to


def test_rows_are_the_hidden_states_of_the_model(
    config: dict[str, Any], command: Command, tiny_model_dir: Path
) -> None:
    code, out, err = command(config | {"hooks": list(HOOKS)})
    assert code == 0, err
    store = Store(config["store"])
    assert f"{len(store):,} rows" in out
    assert len(store.manifest.shards) > 3
    assert {shard.sequences for shard in store.manifest.shards[:-1]} == {6}
    token = sequences(store)
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    seen: dict[str, torch.Tensor] = {}
    layers = original.model.layers
    layers[1].mlp.register_forward_hook(lambda *call: seen.update(mlp=call[-1]))
    layers[2].register_forward_hook(lambda *call: seen.update(last=call[-1]))
    with torch.inference_mode():
        states = original(torch.from_numpy(token).long(), output_hidden_states=True).hidden_states
    wanted = (states[0], states[1], states[1], seen["mlp"], seen["last"])
    at = store.column("sequence"), store.column("position")
    np.testing.assert_array_equal(store.column("token"), token[at])
    kept = ~np.isin(token, [0, 1])
    np.testing.assert_array_equal(np.stack(at), np.nonzero(kept))
    for hook, x in zip(HOOKS, wanted, strict=True):
        assert store.width(hook) == 16
        np.testing.assert_allclose(rows(store, hook), x.numpy()[at], rtol=1e-5, atol=1e-6)


def test_the_stored_sequences_replay_to_the_stored_rows(
    config: dict[str, Any], command: Command
) -> None:
    command(config)
    store = Store(config["store"])
    (hook,) = config["hooks"]
    reader = harvest.HookReader(models.load(config["model"]).bridge, (hook,))
    for shard in store.manifest.shards:
        token = store.read(shard, "sequences/token")
        document = store.read(shard, "sequences/document")
        batches = np.split(token, range(config["batch_size"], len(token), config["batch_size"]))
        x = np.concatenate([reader.read(batch)[hook] for batch in batches])
        np.testing.assert_array_equal(x[document >= 0], store.activations(shard, hook))
        np.testing.assert_array_equal(document[document >= 0], store.read(shard, "document"))


def test_batches_and_shards_change_nothing_but_rounding(
    config: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    command(config)
    command(config | {"store": str(tmp_path / "b"), "batch_size": 7, "shard_tokens": 10**6})
    one, other = Store(config["store"]), Store(tmp_path / "b")
    assert len(other.manifest.shards) == 1
    np.testing.assert_array_equal(sequences(one), sequences(other))
    (hook,) = config["hooks"]
    np.testing.assert_allclose(rows(one, hook), rows(other, hook), rtol=1e-5, atol=1e-6)


def test_a_second_run_harvests_nothing_and_needs_no_model(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    config["model"] = f"dir:{tmp_path / 'model'}"
    command(config)
    before = contents(config["store"])
    shutil.rmtree(tmp_path / "model")
    code, out, err = command(config)
    assert (code, err) == (0, "")
    assert "complete: nothing to harvest" in out
    assert contents(config["store"]) == before


@pytest.mark.slow
def test_a_harvest_killed_in_the_middle_ends_as_if_it_had_not_been(
    config: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    config |= {"shard_tokens": 1, "batch_size": 1}
    path, whole = tmp_path / "killed.toml", tmp_path / "whole"
    path.write_text(tomli_w.dumps(config))
    command(config | {"store": str(whole)})
    manifest = tmp_path / "store" / MANIFEST
    for enough in (3, 20):  # shards, of some 80
        process = subprocess.Popen(
            [sys.executable, "-m", "activations.harvest", path],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (
            manifest.exists() and len(json.loads(manifest.read_text())["shards"]) >= enough
        ):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(StoreError, match="unfinished"):
            Store(tmp_path / "store")
    code, _, err = command(config)
    assert code == 0, err
    assert contents(tmp_path / "store") == contents(whole)


def test_the_command_prints_one_message_also_after_loading_a_model(
    config: dict[str, Any], run_command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "harvest.toml"
    path.write_text(tomli_w.dumps(config | {"hooks": ["blocks.1.resid"]}))
    check_mistake(run_command("activations.harvest", path), "no hook 'blocks.1.resid'")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("hooks", "runs"),
    [
        (("hook_embed",), [1, 0, 0]),
        (("blocks.0.hook_resid_pre",), [1, 0, 0]),
        (("blocks.0.hook_resid_post", "hook_embed"), [1, 0, 0]),
        (("blocks.1.attn.hook_out", "blocks.0.hook_resid_post"), [1, 1, 0]),
        (("blocks.2.hook_resid_post",), [1, 1, 1]),
        (("blocks.0.hook_resid_post", "unembed.hook_out"), [1, 1, 1]),
    ],
)
def test_layers_after_the_deepest_hook_never_run(
    tiny_model_dir: Path, hooks: tuple[str, ...], runs: list[int]
) -> None:
    bridge = models.load(f"dir:{tiny_model_dir}").bridge
    reader = harvest.HookReader(bridge, hooks)
    counts = [0, 0, 0]
    for layer, block in enumerate(bridge.blocks):

        def count(*_: object, layer: int = layer) -> None:
            counts[layer] += 1

        block.mlp.register_forward_pre_hook(count)
    assert set(reader.read(np.ones((2, 5), np.int32))) == set(hooks)
    assert counts == runs


# Mistakes: exit code 2, one message, nothing left


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        ("blocks.1.hook_resid_pots", "nearest are blocks.1.hook_resid_post"),
        ("blocks.3.hook_resid_post", "layer 3 is out of range; the model has layers 0 to 2"),
        ("blocks.1.attn.hook_pattern", "expected one vector a position"),
        ("rotary_emb.hook_cos", "expected one vector a position"),
        ("blocks.1.hook_mlp_in", "saw nothing"),
        ("resid", "the model has no hook 'resid'"),
        ("", "the model has no hook ''; the nearest are blocks.0.hook_resid_post"),
    ],
)
def test_a_hook_that_cannot_be_harvested_is_told(
    config: dict[str, Any], command: Command, hook: str, expected: str
) -> None:
    result = command(config | {"hooks": ["blocks.0.hook_resid_post", hook]})
    check_mistake(result, expected, hook)
    assert not Path(config["store"]).exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "dir:absent"}, "model dir:absent: no such directory"),
        ({"model": "gpt2"}, "expected one of these four forms"),
        ({"corpus": {"kind": "files", "paths": ["absent*"]}}, "no file matches 'absent*'"),
        ({"corpus": {"kind": "hub", "name": "./absent"}}, "data set ./absent"),
        ({"context_length": 100_000}, "do not fill one sequence of context_length 100000"),
    ],
)
def test_a_model_or_corpus_that_is_not_there_is_told(
    config: dict[str, Any], command: Command, change: dict[str, Any], expected: str
) -> None:
    check_mistake(command(config | change), expected)
    assert not Path(config["store"]).exists()


def test_a_place_that_cannot_be_a_store_is_told(
    config: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    for place in (tmp_path, tmp_path / "0.txt"):
        before = contents(tmp_path)
        check_mistake(command(config | {"store": str(place)}), f"{place}: is there, but is no")
        before["harvest.toml"] = contents(tmp_path)["harvest.toml"]
        assert contents(tmp_path) == before


def test_a_store_of_another_harvest_is_left_alone(config: dict[str, Any], command: Command) -> None:
    command(config)
    before = contents(config["store"])
    check_mistake(command(config | {"model": "dir:other"}), "model: there", "asked 'dir:other'")
    other = config["corpus"] | {"documents_are": "lines"}
    check_mistake(
        command(config | {"corpus": other}),
        "corpus.documents_are: there 'files', asked 'lines'",
    )
    assert contents(config["store"]) == before


def poison(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        for name in names:
            weights[name][...] = np.nan

    return change


def test_nan_from_the_model_stops_the_harvest_with_nothing_written(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    model = changed_model(
        tiny_model_dir, tmp_path / "ill", poison("model.layers.1.mlp.up_proj.weight")
    )
    code, out, err = command(config | {"model": f"dir:{model}"})
    assert (code, out) == (2, "")
    message = err[err.index("error: ") :]  # the progress bar stands before
    assert message.startswith("error: blocks.1.hook_resid_post: the model gave NaN or infinity")
    assert "Traceback" not in err
    assert not Path(config["store"]).exists()
    # The layers that the harvest does not reach are not asked.
    code, _, err = command(
        config | {"model": f"dir:{model}", "hooks": ["blocks.0.hook_resid_post"]}
    )
    assert code == 0, err


def test_nan_for_a_late_token_keeps_the_shards_before_it(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    (token,) = tokenizer("%", add_special_tokens=False)["input_ids"]

    def change(weights: dict[str, Any]) -> None:
        weights["model.embed_tokens.weight"][token] = np.inf

    model = changed_model(tiny_model_dir, tmp_path / "ill", change)
    (tmp_path / "8.txt").write_text("% the quick dog " * 20)
    code, _, err = command(config | {"model": f"dir:{model}"})
    assert code == 2
    assert f"NaN or infinity at token {token}" in err
    with pytest.raises(StoreError, match="unfinished"):
        Store(config["store"])
    kept = contents(config["store"])
    assert len(json.loads(kept[MANIFEST])["shards"]) == len(kept) - 1 > 2
    # Weights that were mended are other weights: the shards of the old ones are not gone on with.
    shutil.copy(tiny_model_dir / "model.safetensors", model)
    code, _, err = command(config | {"model": f"dir:{model}"})
    assert code == 2
    assert "was made by other weights" in err
    assert contents(config["store"]) == kept


def test_a_store_of_other_weights_under_the_same_path_is_refused(
    tiny_model_dir: Path, tmp_path: Path, run_command: Command
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "harvest.toml").write_text(
        f'store = "store"\nmodel = "dir:{model}"\nhooks = ["blocks.0.hook_resid_post"]\n'
        f'context_length = 8\n[corpus]\nkind = "files"\npaths = ["{text}"]\n'
    )
    command = ("activations.harvest", "harvest.toml")
    assert run_command(*command, cwd=tmp_path)[0] == 0
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, errors = run_command(*command, cwd=tmp_path)
    assert code == 2
    assert "other weights" in errors


def python_docs(model: Path, folder: Path, settings: str) -> tuple[str, str]:
    """The command of a harvest of CPython's reference text, with these settings."""
    (folder / "harvest.toml").write_text(
        f'store = "store"\nmodel = "dir:{model}"\nhooks = ["blocks.0.hook_resid_post"]\n'
        f'{settings}\n[corpus]\nkind = "python-docs"\n'
    )
    return "activations.harvest", "harvest.toml"


def test_more_context_than_the_model_has_positions(
    tiny_model_dir: Path, tmp_path: Path, run_command: Command
) -> None:
    command = python_docs(tiny_model_dir, tmp_path, "context_length = 129")
    code, _, errors = run_command(*command, cwd=tmp_path)
    assert code == 2
    assert "context_length: 129" in errors
    assert "128 positions" in errors
    assert not (tmp_path / "store").exists()


def test_a_complete_store_with_a_truncated_shard_is_not_called_complete(
    tiny_model_dir: Path, tmp_path: Path, run_command: Command
) -> None:
    command = python_docs(tiny_model_dir, tmp_path, "context_length = 8\nmax_tokens = 50")
    assert run_command(*command, cwd=tmp_path)[0] == 0
    shard = tmp_path / "store" / "shard-00000.h5"
    os.truncate(shard, shard.stat().st_size - 1)
    code, _, errors = run_command(*command, cwd=tmp_path)
    assert code == 2
    assert "shard-00000.h5" in errors
