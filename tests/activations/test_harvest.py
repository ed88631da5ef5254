"""Laws of the harvest: the rows are the model's own, once each, however often it was stopped."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tomli_w
import torch
import transformers
from safetensors.numpy import load_file, save_file

from activations import harvest, models, shards, terminal
from activations.hooks import HookReader
from activations.precision import DTYPES
from activations.sequences import positions, targets
from activations.store import SEQUENCES, VOCABULARY, Store, StoreError
from activations.writer import StoreWriter

HOOKS = (
    "hook_embed",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_attn_out",
    "blocks.1.hook_resid_mid",
    "blocks.1.mlp.hook_post",
    "blocks.1.hook_mlp_out",
    "blocks.2.attn.hook_z",
    "blocks.2.hook_resid_post",
)
LAST = "blocks.2.hook_resid_post"
BOS, EOS = SPECIAL = (0, 1)
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
        "corpus": {"kind": "files", "paths": [str(tmp_path / "[0-9].txt")]},
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


@pytest.fixture
def make(command: Command) -> Callable[..., Store]:
    """`make(config)`: the store that a harvest makes, which must end well."""

    def run(table: dict[str, Any]) -> Store:
        code, _, err = command(table)
        assert code == 0, err
        return Store(table["store"])

    return run


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`stop_after(n)`: as if Ctrl-C came after the next n shards; None lets it run again."""
    real = StoreWriter.write_shard

    def stop(n: int | None) -> None:
        shards = itertools.count()

        def write_shard(self: StoreWriter, *arguments: Any) -> None:
            if next(shards) == n:
                raise KeyboardInterrupt
            real(self, *arguments)

        monkeypatch.setattr(StoreWriter, "write_shard", write_shard)

    return stop


def contents(store: str | Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in Path(store).iterdir() if not f.name.startswith(".")}


def check_mistake(result: tuple[int, str, str], *expected: str) -> None:
    """Exit 2 and one message, before which only a progress bar stands."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    bar, _, message = err.rpartition("error: ")
    assert not bar or bar.lstrip().startswith("harvest ")
    for part in expected:
        assert part in message


def rows(store: Store, hook: str, kind: str = "activations") -> np.ndarray:
    """All rows at one hook [n d], in the type in which they are stored."""
    name = f"{kind}/{hook}"
    return np.concatenate([x for shard in store.manifest.shards for x in store.rows(shard, name)])


def places(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and position of every row."""
    return store.column("sequence"), store.column("position")


def close(x: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def changed_model(directory: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of a model with its tensors changed in place."""
    shutil.copytree(directory, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors")
    return f"dir:{to}"


def scaled(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        weights[name] *= factor

    return change


def one_token(directory: Path, text: str) -> int:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


class Reference:
    """The model as Hugging Face runs it: what stands at each of HOOKS, and the logits."""

    def __init__(self, directory: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory)

    def run(self, token: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        layers = self.model.model.layers
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, module: torch.nn.Module, at: int = -1) -> Any:
            def hook(*call: Any) -> None:  # module, inputs, output
                x = call[at]
                seen[name] = x[0] if isinstance(x, tuple) else x

            return module.register_forward_hook(hook)

        handles = [
            keep("hook_embed", self.model.model.embed_tokens),
            keep("blocks.0.hook_resid_post", layers[0]),
            keep("blocks.1.hook_resid_pre", layers[0]),
            keep("blocks.1.hook_attn_out", layers[1].self_attn),
            keep("blocks.1.hook_resid_mid", layers[1].post_attention_layernorm, 1),
            keep("blocks.1.mlp.hook_post", layers[1].mlp.down_proj, 1),
            keep("blocks.1.hook_mlp_out", layers[1].mlp),
            keep("blocks.2.attn.hook_z", layers[2].self_attn.o_proj, 1),
            keep("blocks.2.hook_resid_post", layers[2]),
        ]
        try:
            logits = self.model(torch.from_numpy(token.astype(np.int64))).logits
        finally:
            for handle in handles:
                handle.remove()
        return seen, logits


def owner(document: int) -> int:
    return document if document >= 0 else ~document


def predicted(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens [s c] add to the loss, and which have a row in a harvest with gradients."""
    token, document = store.sequences[:, 0], store.sequences[:, 1]
    target, row = np.zeros(token.shape, bool), np.zeros(token.shape, bool)
    ordinary = (document >= 0) & ~np.isin(token, SPECIAL)
    for s, t in np.ndindex(token.shape):
        before = owner(document[s, t - 1]) if t else None
        target[s, t] = ordinary[s, t] and before == document[s, t]
        if t and target[s, t]:
            row[s, t - 1] = ordinary[s, t - 1]
    return target, row


def test_rows_are_the_hidden_states_of_the_model(
    config: dict[str, Any], command: Command, tiny_model_dir: Path
) -> None:
    code, out, err = command(config | {"hooks": list(HOOKS)})
    assert code == 0, err
    store = Store(config["store"])
    assert f"{len(store):,} rows" in out
    assert len(store.manifest.shards) > 3
    token = np.array(store.sequences[:, 0])
    with torch.inference_mode():
        wanted, _ = Reference(tiny_model_dir).run(token)
    at = places(store)
    np.testing.assert_array_equal(store.column("token"), token[at])
    kept = ~np.isin(token, SPECIAL)
    np.testing.assert_array_equal(np.stack(at), np.nonzero(kept))
    np.testing.assert_array_equal(store.column("document"), store.sequences[:, 1][at])
    assert store.manifest.dropped_positions == ("special",)
    assert set(store.manifest.hooks) == set(HOOKS)
    for hook in HOOKS:
        x = wanted[hook].numpy()[at]
        assert rows(store, hook).dtype == np.float32
        assert store.width(hook) == x.shape[1]
        np.testing.assert_allclose(rows(store, hook), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"gradients": True, "cross_document_attention": False}])
def test_the_stored_sequences_replay_to_the_stored_rows(
    config: dict[str, Any], make: Callable[..., Store], settings: dict[str, Any]
) -> None:
    store = make(config | settings)
    (hook,) = config["hooks"]
    size = config["batch_size"]
    reader = HookReader(models.load(config["model"]).bridge, (hook,))
    for shard in store.manifest.shards:
        first = shard.index * store.manifest.shard_sequences
        chosen = np.array(store.sequences[first : first + store.manifest.shard_sequences])
        x, g = [], []
        for batch in np.split(chosen, range(size, len(chosen), size)):
            token, document = batch[:, 0], batch[:, 1]
            if settings:
                seen, gradient = reader.read_gradients(
                    token, targets(document), positions(document)
                )
                g.append(gradient[hook])
            else:
                seen = reader.read(token)
            x.append(seen[hook])
        at = store.read(shard, "sequence") - first, store.read(shard, "position")
        np.testing.assert_array_equal(np.concatenate(x)[at], store.activations(shard, hook))
        if settings:
            stored = np.concatenate(list(store.rows(shard, f"gradients/{hook}")))
            np.testing.assert_array_equal(np.concatenate(g)[at], stored)


@pytest.mark.parametrize("gradients", [False, True])
def test_batches_and_shards_change_nothing_but_rounding(
    config: dict[str, Any], make: Callable[..., Store], tmp_path: Path, gradients: bool
) -> None:
    config["gradients"] = gradients
    one = make(config)
    other = make(config | {"store": str(tmp_path / "b"), "batch_size": 7, "shard_tokens": 10**6})
    assert len(other.manifest.shards) == 1
    for name in (SEQUENCES, VOCABULARY):
        assert contents(one.path)[name] == contents(other.path)[name]
    for column in ("token", "document", "sequence", "position"):
        np.testing.assert_array_equal(one.column(column), other.column(column))
    (hook,) = config["hooks"]
    close(rows(one, hook), rows(other, hook))
    if gradients:
        close(rows(one, hook, "gradients"), rows(other, hook, "gradients"))


def test_shards_hold_whole_batches(config: dict[str, Any], make: Callable[..., Store]) -> None:
    store = make(config)
    size = store.manifest.shard_sequences
    assert size == 6
    for shard in store.manifest.shards:
        assert set(store.read(shard, "sequence") // size) == {shard.index}


def test_enough_rows_are_enough(
    config: dict[str, Any], make: Callable[..., Store], tmp_path: Path
) -> None:
    whole = make(config)
    (hook,) = config["hooks"]
    for enough in (1, 100, len(whole)):
        store = make(config | {"store": str(tmp_path / str(enough)), "max_tokens": enough})
        last = store.column("sequence") == len(store.sequences) - 1
        assert (~last).sum() < enough <= len(store)
        np.testing.assert_array_equal(store.sequences, whole.sequences[: len(store.sequences)])
        close(rows(store, hook), rows(whole, hook)[: len(store)])
        assert store.manifest.n_documents == len(np.unique(store.column("document")))


def test_a_corpus_that_ends_before_enough_rows_is_told(
    config: dict[str, Any], command: Command
) -> None:
    code, out, err = command(config | {"max_tokens": 10**6})
    assert code == 0, err
    assert f"the corpus ends at {len(Store(config['store'])):,} tokens, before max_tokens" in out


# Gradients


def test_gradients_are_those_of_the_summed_cross_entropy(
    config: dict[str, Any], make: Callable[..., Store], tiny_model_dir: Path
) -> None:
    store = make(config | {"hooks": list(HOOKS), "gradients": True})
    target, has_row = predicted(store)
    at = places(store)
    np.testing.assert_array_equal(np.stack(at), np.nonzero(has_row))
    token = np.array(store.sequences[:, 0])
    seen, logits = Reference(tiny_model_dir).run(token)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        torch.from_numpy(token[:, 1:].astype(np.int64)).flatten(),
        reduction="none",
    )
    loss = losses[torch.from_numpy(target[:, 1:]).flatten()].sum()
    wanted = torch.autograd.grad(loss, [seen[hook] for hook in HOOKS])
    for hook, gradient in zip(HOOKS, wanted, strict=True):
        close(rows(store, hook, "gradients"), gradient.numpy()[at])
        close(rows(store, hook), seen[hook].detach().numpy()[at])
        assert np.abs(rows(store, hook, "gradients")).max() > 0


@pytest.mark.parametrize("marks", ["bos", "none"])
def test_positions_that_predict_nothing_are_dropped(
    config: dict[str, Any], make: Callable[..., Store], marks: str, tmp_path: Path
) -> None:
    plain = make(config | {"marks": marks})
    store = make(config | {"marks": marks, "gradients": True, "store": str(tmp_path / "g")})
    assert store.manifest.dropped_positions == ("special", "not predicting")
    np.testing.assert_array_equal(store.sequences, plain.sequences)
    _, has_row = predicted(store)
    kept = has_row[places(plain)]
    assert 0 < kept.sum() < len(plain)
    np.testing.assert_array_equal(np.stack(places(store)), np.stack(places(plain))[:, kept])
    assert store.column("position").max() == config["context_length"] - 2
    (hook,) = config["hooks"]
    close(rows(store, hook), rows(plain, hook)[kept])


def test_the_logits_are_a_hook_too(config: dict[str, Any], command: Command) -> None:
    hooks = [LAST, "unembed.hook_out"]
    code, _, err = command(config | {"hooks": hooks, "gradients": True})
    assert code == 0, err
    store = Store(config["store"])
    # The gradient at the logits is softmax - onehot: it sums to nothing.
    np.testing.assert_allclose(rows(store, hooks[1], "gradients").sum(axis=1), 0, atol=1e-5)


# Documents in one sequence


@pytest.mark.parametrize("marks", ["bos", "none"])
def test_documents_without_attention_across_are_as_if_each_were_alone(
    config: dict[str, Any], make: Callable[..., Store], tmp_path: Path, marks: str
) -> None:
    texts = ["The quick brown fox", "jumps over the lazy dog", "and the dog does not mind."]
    for index, text in enumerate(texts):
        (tmp_path / f"text{index}.txt").write_text(text)
    hook = LAST
    config |= {"hooks": [hook], "context_length": 64, "gradients": True, "marks": marks}

    def harvested(name: str, paths: str, cross: bool) -> Store:
        corpus = {"kind": "files", "paths": [str(tmp_path / paths)]}
        place = {"store": str(tmp_path / name), "cross_document_attention": cross}
        return make(config | place | {"corpus": corpus})

    apart = harvested("apart", "text*.txt", False)
    across = harvested("across", "text*.txt", True)
    assert len(apart.sequences) == 1
    for index in range(len(texts)):
        alone = harvested(f"alone{index}", f"text{index}.txt", True)
        own = apart.column("document") == index
        np.testing.assert_array_equal(apart.column("token")[own], alone.column("token"))
        for kind in ("activations", "gradients"):
            close(rows(apart, hook, kind)[own], rows(alone, hook, kind))
            if index:
                with pytest.raises(AssertionError):
                    close(rows(across, hook, kind)[own], rows(alone, hook, kind))


# Number formats and compression


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_rows_are_the_float32_rows_to_the_nearest_even(
    config: dict[str, Any], make: Callable[..., Store], tmp_path: Path, dtype: str
) -> None:
    hooks = ["blocks.1.mlp.hook_post", LAST]
    config |= {"hooks": hooks, "gradients": True}
    wide = make(config)
    store = make(config | {"store": str(tmp_path / "narrow"), "dtype": dtype})
    for hook, kind in itertools.product(hooks, ("activations", "gradients")):
        x, y = rows(wide, hook, kind).astype(np.float64), rows(store, hook, kind)
        assert y.dtype == DTYPES[dtype]
        bits = y.view(np.uint16)
        error = np.abs(x - y.astype(np.float64))
        for neighbour in (bits + 1, bits - 1):  # the next numbers away from nought and towards it
            other = np.abs(x - neighbour.view(y.dtype).astype(np.float64))
            seen = np.isfinite(other) & (y != 0)
            assert (error[seen] <= other[seen]).all()
            assert (bits[seen & (error == other)] % 2 == 0).all()
        smallest = np.array(1, np.uint16).view(y.dtype).astype(np.float64)
        assert (np.abs(x[y == 0]) <= smallest / 2).all()
        assert (np.signbit(y) == np.signbit(x)).all()


@pytest.mark.parametrize("compression", ["lzf", "gzip"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compressed_rows_are_the_same_rows(
    config: dict[str, Any],
    make: Callable[..., Store],
    tmp_path: Path,
    compression: str,
    dtype: str,
) -> None:
    config |= {"dtype": dtype, "gradients": True}
    plain = make(config)
    place = {"store": str(tmp_path / compression), "compression": compression}
    store = make(config | place)
    (hook,) = config["hooks"]
    for kind in ("activations", "gradients"):
        np.testing.assert_array_equal(
            rows(store, hook, kind).view(np.uint8), rows(plain, hook, kind).view(np.uint8)
        )
        with h5py.File(store.path / "shard-00000.h5") as file:
            dataset = file[f"{kind}/{hook}"]
            assert isinstance(dataset, h5py.Dataset)
            assert (dataset.compression, dataset.shuffle) == (compression, True)


def test_a_value_too_large_for_float16_stops_and_bfloat16_takes_the_place(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    hook = "blocks.1.hook_resid_post"
    token = one_token(tiny_model_dir, "%")
    (tmp_path / "0.txt").write_text("quick dog % lazy")

    def change(weights: dict[str, Any]) -> None:
        weights["model.embed_tokens.weight"][token] *= 1e7

    config["model"] = changed_model(tiny_model_dir, tmp_path / "loud", change)
    config["hooks"] = ["blocks.0.hook_resid_pre", hook]
    result = command(config | {"dtype": "float16"})
    check_mistake(
        result, "blocks.0.hook_resid_pre", f"at token {token} ", 'dtype = "bfloat16"', "float16"
    )
    assert not Path(config["store"]).exists()
    code, _, err = command(config | {"dtype": "bfloat16"})
    assert code == 0, err
    store = Store(config["store"])
    largest = np.abs(rows(store, hook).astype(np.float32)).max(axis=1)
    assert set(store.column("token")[largest > 65504]) == {token}


def test_gradients_too_small_for_float16_stop_and_bfloat16_takes_the_place(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    (hook,) = config["hooks"]
    config["gradients"] = True
    config["model"] = changed_model(
        tiny_model_dir, tmp_path / "quiet", scaled("lm_head.weight", 1e-7)
    )
    result = command(config | {"dtype": "float16"})
    token = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)("0 ").input_ids[0]
    check_mistake(result, hook, f"gradients at token {token}", "float16", 'dtype = "bfloat16"')
    assert not Path(config["store"]).exists()
    code, _, err = command(config | {"dtype": "bfloat16"})
    assert code == 0, err
    assert (np.abs(rows(Store(config["store"]), hook, "gradients")).max(axis=1) > 0).all()


# Marks, padding, little text


def packed(documents: Iterable[list[int]], length: int, marks: str, pad: int) -> np.ndarray:
    """Token and owner [s 2 c] of the documents one after another; padding is owned by None."""
    stream: list[tuple[int, int | None]] = []
    for index, ids in enumerate(documents):
        if marks == "bos" and ids[0] != BOS:
            stream.append((BOS, index))
        stream += [(token, index) for token in ids]
        if marks == "eos":
            stream.append((EOS, index))
    sequences = []
    while stream:
        head = marks != "none" and stream[0][0] != BOS
        taken = ([(BOS, stream[0][1])] if head else []) + stream[: length - head]
        del stream[: length - head]
        sequences.append(taken + [(pad, None)] * (length - len(taken)))
    return np.array(sequences, object).swapaxes(1, 2)


@pytest.mark.parametrize("marks", ["bos", "eos", "none"])
@pytest.mark.parametrize("length", [12, 30])
def test_marks_part_documents(
    config: dict[str, Any],
    make: Callable[..., Store],
    tmp_path: Path,
    tiny_model_dir: Path,
    marks: str,
    length: int,
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    texts = [(tmp_path / f"{index}.txt").read_text() for index in range(9)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    wanted = packed(ids, length, marks, tokenizer.pad_token_id)
    store = make(config | {"marks": marks, "context_length": length})
    token, document = store.sequences[:, 0], store.sequences[:, 1]
    np.testing.assert_array_equal(token, wanted[:, 0].astype(int))
    padding = np.equal(wanted[:, 1], None)
    special = np.isin(token, SPECIAL)
    owned = np.where(padding, -1, wanted[:, 1]).astype(int)
    np.testing.assert_array_equal(document[~special], owned[~special])
    np.testing.assert_array_equal(~document[special & ~padding], owned[special & ~padding])
    # Every ordinary token of every document has one row, in order.
    flat = [(i, t) for i, each in enumerate(ids) for t in each if t not in SPECIAL]
    stored = np.stack([store.column("document"), store.column("token")], axis=1)
    np.testing.assert_array_equal(stored, flat)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_shorter_than_a_sequence_has_one_row_a_token(
    config: dict[str, Any],
    make: Callable[..., Store],
    tmp_path: Path,
    tiny_model_dir: Path,
    side: str,
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": side}))
    for path in tmp_path.glob("[1-9].txt"):
        path.unlink()
    text = "The naïve fox minds"
    (tmp_path / "0.txt").write_text(text)
    store = make(config | {"context_length": 40, "hooks": [LAST], "model": f"dir:{model}"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(store.column("token"), ids)
    np.testing.assert_array_equal(store.column("position"), 1 + np.arange(len(ids)))
    assert store.sequences.shape == (1, 2, 40)
    with torch.inference_mode():
        seen, _ = Reference(tiny_model_dir).run(np.array([[BOS, *ids]]))
    close(rows(store, LAST), seen[LAST].numpy()[0, 1:])


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("", {}, "corpus: holds no text"),
        (" \n\n", {}, "corpus: holds no text"),
        ("<s></s><s>", {}, "special tokens"),
        ("</s>", {"marks": "none"}, "special tokens"),
        ("<s></s>" * 40, {}, "special tokens"),
        ("a", {"gradients": True}, "corpus: no token gets a row"),
    ],
)
def test_a_text_without_rows_is_told_and_leaves_nothing(
    config: dict[str, Any],
    command: Command,
    tmp_path: Path,
    text: str,
    settings: dict[str, Any],
    expected: str,
) -> None:
    for path in tmp_path.glob("[0-9].txt"):
        path.unlink()
    (tmp_path / "0.txt").write_text(text)
    check_mistake(command(config | settings), expected)
    assert not Path(config["store"]).exists()


# Stopping and going on


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


def test_a_stopped_harvest_goes_on_with_the_threads_it_was_begun_with(
    config: dict[str, Any],
    command: Command,
    make: Callable[..., Store],
    stop_after: Callable[..., None],
    tmp_path: Path,
) -> None:
    config["hooks"] = ["blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"]  # not sorted
    whole = make(config | {"store": str(tmp_path / "whole")})
    stop_after(2)
    assert command(config)[0] == 130
    with pytest.raises(StoreError, match="unfinished"):
        Store(config["store"])
    stop_after(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        store = make(config)
        assert store.manifest.forward["threads"] == threads
    finally:
        torch.set_num_threads(threads)
    assert contents(store.path) == contents(whole.path)


@pytest.mark.parametrize("harm", ["flipped", "cut", "removed"])
def test_sequences_that_were_damaged_are_not_gone_on_with(
    config: dict[str, Any], command: Command, stop_after: Callable[..., None], harm: str
) -> None:
    stop_after(2)
    assert command(config)[0] == 130
    stop_after(None)
    file = Path(config["store"]) / SEQUENCES
    content = bytearray(file.read_bytes())
    match harm:
        case "flipped":
            content[-100] ^= 4
            file.write_bytes(content)
        case "cut":
            os.truncate(file, len(content) - 8)
        case _:
            file.unlink()
    before = contents(config["store"])
    check_mistake(command(config), str(file), "is missing or damaged", "Restore the file")
    assert contents(config["store"]) == before


def test_a_finished_shard_that_was_lost_is_told_before_the_store_is_called_complete(
    config: dict[str, Any], command: Command, stop_after: Callable[..., None]
) -> None:
    stop_after(2)
    assert command(config)[0] == 130
    stop_after(None)
    (Path(config["store"]) / "shard-00001.h5").unlink()
    check_mistake(command(config), "shard-00001.h5", "is missing")
    with pytest.raises(StoreError, match="unfinished"):
        Store(config["store"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hooks": ["hook_embed"]}, "hooks: there"),
        ({"dtype": "bfloat16"}, "dtype: there 'float32', asked 'bfloat16'"),
        ({"compression": "lzf"}, "compression: there 'none', asked 'lzf'"),
        ({"gradients": True}, "gradients: there False, asked True"),
        ({"marks": "eos"}, "marks: there 'bos', asked 'eos'"),
        ({"cross_document_attention": False}, "cross_document_attention: there True"),
        ({"context_length": 13}, "context_length: there 12, asked 13"),
        ({"max_tokens": 100}, "max_tokens: there None, asked 100"),
        ({"batch_size": 4}, "batch_size: there 3, asked 4"),
        ({"shard_tokens": 61}, "shard_tokens: there 60, asked 61"),
        ({"model": "dir:other"}, "asked 'dir:other'"),
        (
            {"corpus": {"kind": "python-docs"}},
            "corpus.kind: there 'files', asked 'python-docs'",
        ),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_another_harvest_is_left_alone(
    config: dict[str, Any],
    command: Command,
    stop_after: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    expected: str,
    finished: bool,
) -> None:
    stop_after(None if finished else 1)
    command(config)
    monkeypatch.setattr(models, "load", lambda spec: pytest.fail("a model was loaded"))
    before = contents(config["store"])
    assert len(before) > 3
    check_mistake(command(config | change), expected, config["store"])
    assert contents(config["store"]) == before


def test_a_store_begun_by_other_versions_is_left_alone(
    config: dict[str, Any],
    command: Command,
    stop_after: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(2)
    command(config)
    stop_after(None)
    before = contents(config["store"])
    real = harvest.importlib.metadata.version
    monkeypatch.setattr(
        harvest.importlib.metadata,
        "version",
        lambda name: "9.9" if name == "torch" else real(name),
    )
    check_mistake(command(config), "begun with other settings", "forward.torch: there", "'9.9'")
    assert contents(config["store"]) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_other_weights_under_the_same_path_is_refused(
    config: dict[str, Any],
    command: Command,
    stop_after: Callable[..., None],
    tiny_model_dir: Path,
    tmp_path: Path,
    finished: bool,
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config["model"] = f"dir:{model}"
    stop_after(None if finished else 1)
    command(config)
    stop_after(None)
    before = contents(config["store"])
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    check_mistake(command(config), "was made by other weights")
    assert contents(config["store"]) == before


@pytest.fixture
def threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are written by a thread, as they are where the model runs on a GPU."""
    monkeypatch.setattr(shards, "_Here", lambda: ThreadPoolExecutor(1))


def test_a_thread_that_writes_writes_the_same(
    config: dict[str, Any],
    make: Callable[..., Store],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    config |= {"gradients": True}
    store = make(config)
    request.getfixturevalue("threaded")
    other = make(config | {"store": str(tmp_path / "threaded")})
    assert contents(store.path) == contents(other.path)


@pytest.mark.usefixtures("threaded")
def test_a_mistake_seen_by_the_thread_is_told(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    loud = scaled("model.layers.1.mlp.down_proj.weight", 1e12)
    config["model"] = changed_model(tiny_model_dir, tmp_path / "loud", loud)
    check_mistake(command(config | {"dtype": "float16"}), config["hooks"][0], "bfloat16")
    assert not Path(config["store"]).exists()


@pytest.mark.usefixtures("threaded")
def test_the_model_never_runs_far_ahead_of_the_disk(
    config: dict[str, Any], make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow disk must not fill the memory with batches that wait for it.
    read, add = shards._read, shards._ShardBuilder.add
    counts, ahead = {"read": 0, "added": 0}, []

    def counted_read(*arguments: Any) -> Any:
        counts["read"] += 1
        ahead.append(counts["read"] - counts["added"])
        return read(*arguments)

    def slow_add(*arguments: Any) -> None:
        time.sleep(0.03)
        add(*arguments)
        counts["added"] += 1

    monkeypatch.setattr(shards, "_read", counted_read)
    monkeypatch.setattr(shards._ShardBuilder, "add", slow_add)
    store = make(config | {"batch_size": 1, "shard_tokens": 1})
    assert len(store.manifest.shards) > 50
    assert max(ahead) <= 5


# Mistakes: exit code 2, one message, nothing left


def test_the_command_prints_one_message_also_after_loading_a_model(
    config: dict[str, Any], run_command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "harvest.toml"
    path.write_text(tomli_w.dumps(config | {"hooks": ["blocks.1.resid"]}))
    result = run_command("activations.harvest", path)
    check_mistake(result, "no hook 'blocks.1.resid'")
    assert result[2].startswith("error: ")
    assert not (tmp_path / "store").exists()


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
        ({"context_length": 129}, "context_length: 129 is more than the 128 positions"),
    ],
)
def test_a_model_or_corpus_that_is_not_there_is_told(
    config: dict[str, Any], command: Command, change: dict[str, Any], expected: str
) -> None:
    check_mistake(command(config | change), expected)
    assert not Path(config["store"]).exists()


def test_eos_marks_need_an_eos(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    config |= {"model": f"dir:{model}", "marks": "eos"}
    check_mistake(command(config), 'marks: "eos", but the tokenizer has no EOS')
    assert not Path(config["store"]).exists()


def test_a_place_that_cannot_be_a_store_is_told(
    config: dict[str, Any], command: Command, tmp_path: Path
) -> None:
    for place in (tmp_path, tmp_path / "0.txt"):
        before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
        check_mistake(command(config | {"store": str(place)}), f"{place}: is there, but is no")
        after = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
        before["harvest.toml"] = after["harvest.toml"]
        assert after == before


def test_an_empty_directory_is_a_place_and_stays_one(
    config: dict[str, Any], command: Command, make: Callable[..., Store]
) -> None:
    Path(config["store"]).mkdir()
    check_mistake(command(config | {"hooks": ["absent"]}), "no hook 'absent'")
    assert list(Path(config["store"]).iterdir()) == []
    make(config)


def poison(name: str, value: float, row: int | None = None) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        weights[name][slice(None) if row is None else row] = value

    return change


def test_nan_from_the_model_stops_the_harvest_with_nothing_written(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    config["model"] = changed_model(
        tiny_model_dir, tmp_path / "ill", poison("model.layers.1.mlp.up_proj.weight", np.nan)
    )
    check_mistake(command(config), "blocks.1.hook_resid_post: the model gave NaN or infinity")
    assert not Path(config["store"]).exists()
    # The layers that the harvest does not reach are not asked.
    code, _, err = command(config | {"hooks": ["blocks.0.hook_resid_post"]})
    assert code == 0, err


def test_nan_only_in_the_gradients_stops_the_harvest(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    config["model"] = changed_model(
        tiny_model_dir, tmp_path / "ill", poison("lm_head.weight", np.inf, 7)
    )
    expected = ("blocks.1.hook_resid_post: the model gave NaN or infinity", "(gradients)")
    check_mistake(command(config | {"gradients": True}), *expected)
    assert not Path(config["store"]).exists()
    code, _, err = command(config)
    assert code == 0, err


def test_nan_for_a_late_token_keeps_the_shards_before_it(
    config: dict[str, Any], command: Command, tmp_path: Path, tiny_model_dir: Path
) -> None:
    token = one_token(tiny_model_dir, "%")
    model = changed_model(
        tiny_model_dir, tmp_path / "ill", poison("model.embed_tokens.weight", np.inf, token)
    )
    (tmp_path / "8.txt").write_text("% the quick dog " * 20)
    check_mistake(command(config | {"model": model}), f"NaN or infinity at token {token}")
    with pytest.raises(StoreError, match="unfinished"):
        Store(config["store"])
    kept = contents(config["store"])
    part = json.loads(kept["worker-1-of-1.json"])["shards"]
    assert len(part) == sum(name.startswith("shard-") for name in kept) > 2
    # Weights that were mended are other weights: the shards of the old ones are not gone on with.
    shutil.copy(tiny_model_dir / "model.safetensors", tmp_path / "ill")
    check_mistake(command(config | {"model": model}), "was made by other weights")
    assert contents(config["store"]) == kept


def test_a_complete_store_with_a_truncated_shard_is_not_called_complete(
    config: dict[str, Any], command: Command, make: Callable[..., Store]
) -> None:
    shard = make(config).path / "shard-00000.h5"
    os.truncate(shard, shard.stat().st_size - 1)
    check_mistake(command(config), "shard-00000.h5")
