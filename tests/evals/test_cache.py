"""Activations of texts on disk: what a hook sees text by text, once, and damage and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations import models
from activations.hooks import HookReader
from activations.models import Model
from activations.terminal import UserError
from evals import cache
from evals.cache import Keep

HOOK, OTHER, LENGTH = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post", 9
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and it does not mind.",
    "dog",
    "The <s> fox</s> jumps",
    "A zebra, too.",
    "the lazy dog and the quick brown fox, and the dog",
]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return models.load(f"dir:{tiny_model_dir}")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))
    return tmp_path / "activations"


def alone(model: Model, texts: list[str], keep: Keep, hook: str = HOOK) -> list[np.ndarray]:
    """Each text in a forward pass of its own, without padding."""
    reader, tokenizer = HookReader(model.bridge, (hook,)), model.tokenizer
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[-(LENGTH - 1) :] if keep == "last" else ids[: LENGTH - 1]
        ids = [tokenizer.bos_token_id, *ids]
        x = reader.read(np.array([ids], np.int32))[hook][0]
        if keep == "last":
            found.append(x[-1:])
        else:
            special = tokenizer.all_special_ids
            found.append(np.stack([row for i, row in zip(ids, x, strict=True) if i not in special]))
    return found


def read(model: Model, texts: list[str] = TEXTS, **options: Any) -> list[np.ndarray]:
    """The rows of each text."""
    settings = {"length": LENGTH} | options
    blocks = cache.read(model, settings.pop("hook", HOOK), texts, **settings)
    return [rows for block in blocks for rows in np.split(block.x, block.start[1:-1])]


def same(found: list[np.ndarray], want: list[np.ndarray], **near: float) -> None:
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, **near)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookReader, "read", lambda *_: pytest.fail("the model was run"))


@pytest.mark.parametrize("keep", ["text", "last"])
@pytest.mark.parametrize("at_once", [2048, 20])
def test_rows_are_those_of_each_text_alone(
    keep: Keep, at_once: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_TOKENS", at_once)
    sizes = {len(ids) for ids in cache.tokens(model, TEXTS, length=99)}
    assert len(sizes) > 3
    assert min(sizes) < LENGTH < max(sizes)
    want = alone(model, TEXTS, keep)
    same(read(model, keep=keep), want, rtol=1e-4, atol=1e-5)
    # The rows tell the texts apart: a wrong order would show.
    rows = np.stack([one[-1] for one in want])
    apart = np.abs(rows[:, None] - rows[None]).max(axis=2) + np.eye(len(rows))
    assert apart.min() > 1e-3


def test_tokens_begin_with_bos_and_are_cut_at_either_end(model: Model) -> None:
    tokenizer = model.tokenizer
    whole = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    (end,), (beginning,), (all_,) = (
        cache.tokens(model, TEXTS[:1], length=length, left=left)
        for length, left in ((5, False), (5, True), (999, True))
    )
    assert end.tolist() == [bos, *whole[:4]]
    assert beginning.tolist() == [bos, *whole[-4:]]
    assert all_.tolist() == [bos, *whole]


def test_special_tokens_are_dropped(model: Model) -> None:
    text = TEXTS[2]
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    special = np.isin(ids, model.tokenizer.all_special_ids).sum()
    assert special == 2
    (rows,) = read(model, [text], length=99)
    assert len(rows) == len(ids) - special


@pytest.mark.parametrize("keep", ["text", "last"])
def test_the_second_read_is_from_disk(
    keep: Keep, model: Model, request: pytest.FixtureRequest
) -> None:
    first = read(model, keep=keep)
    request.getfixturevalue("no_model")
    same(read(model, keep=keep), first, rtol=0)


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "zip", "nonsense", "fewer rows", "more rows", "float64"]
)
def test_a_damaged_file_is_made_anew(damage: str, model: Model, folder: Path) -> None:
    first = [rows.copy() for rows in read(model)]
    (file,) = folder.glob("*.npy")
    whole, x = file.read_bytes(), np.load(file)
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[:-20])
    elif damage in ("empty", "zip"):
        file.write_bytes(b"PK\x03\x04" if damage == "zip" else b"")
    elif damage == "nonsense":
        file.write_bytes(b"no array")
    else:
        rows = {"fewer rows": x[:-1], "more rows": np.repeat(x, 2, 0), "float64": x.astype("f8")}
        np.save(file, rows[damage])
    same(read(model), first, rtol=0)
    assert file.read_bytes() == whole


def test_what_is_read_otherwise_lies_in_another_file(model: Model, folder: Path) -> None:
    asked: list[dict[str, Any]] = [
        {}, {"hook": OTHER}, {"length": 5}, {"keep": "last"}, {"texts": TEXTS[:3]},
        {"texts": TEXTS[::-1]},
    ]  # fmt: skip
    for count, options in enumerate(asked, start=1):
        read(model, **options)
        read(model, **options)
        assert len(list(folder.glob("*.npy"))) == count
    same(read(model, hook=OTHER), alone(model, TEXTS, "text", OTHER), rtol=1e-4, atol=1e-5)


def test_many_texts_come_in_order_in_several_files(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{text} {i}" for i in range(2) for text in TEXTS]
    whole = [rows.copy() for rows in read(model, texts)]
    monkeypatch.setattr(cache, "_TEXTS", 4)
    blocks = list(cache.read(model, HOOK, texts, length=LENGTH))
    assert [len(block.start) - 1 for block in blocks] == [4, 4, 2]
    assert len(list(folder.glob("*.npy"))) == 1 + 3
    same(read(model, texts), whole, rtol=1e-4, atol=1e-5)
    same(whole, alone(model, texts, "text"), rtol=1e-4, atol=1e-5)


def test_what_was_read_before_a_stop_is_not_read_again(
    model: Model, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(cache, "_TEXTS", 2)
    blocks = cache.read(model, HOOK, TEXTS, length=LENGTH)
    first = next(blocks).x.copy()
    blocks.close()
    request.getfixturevalue("no_model")
    again = cache.read(model, HOOK, TEXTS, length=LENGTH)
    np.testing.assert_array_equal(next(again).x, first)
    with pytest.raises(pytest.fail.Exception, match="the model was run"):
        next(again)


def test_a_text_of_special_tokens_only_is_told(model: Model) -> None:
    ids = model.tokenizer("<s></s>", add_special_tokens=False)["input_ids"]
    assert set(ids) <= set(model.tokenizer.all_special_ids)
    with pytest.raises(UserError, match="the text '<s></s>' has no token that is not special"):
        read(model, [*TEXTS, "<s></s>"])


def test_a_hook_that_is_none_is_told(model: Model) -> None:
    with pytest.raises(UserError, match=r"no hook 'blocks\.1\.hook_resid'"):
        read(model, hook="blocks.1.hook_resid")


def test_a_place_that_cannot_be_written_is_told(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"file/below/activations: .*DICTLEARN_CACHE"):
        read(model)
