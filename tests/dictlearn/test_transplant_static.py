"""FOCUS and WECHSEL: sparsemax, planted contexts, one result a seed, and damaged files."""

from __future__ import annotations

import os
import random
import string
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from activations.config import validate
from activations.terminal import UserError
from dictlearn.transplant.methods import focus
from dictlearn.transplant.methods.focus import Focus, sparsemax, written
from dictlearn.transplant.methods.static import Static, drawn
from dictlearn.transplant.methods.wechsel import Wechsel
from dictlearn.transplant.problem import Problem

GROUPS, WORDS, ANCHORS = 6, 5, 4
E = GROUPS + 3
Method = Callable[[Static], Focus | Wechsel]
METHODS = [Focus, Wechsel]


def words() -> list[list[str]]:
    """Words by the group whose contexts they share; letters are chance, and say nothing."""
    rng = random.Random(0)
    return [
        ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(WORDS)]
        for _ in range(GROUPS)
    ]


def write_text(path: Path) -> Path:
    """Lines of words of one group each."""
    rng, known = random.Random(1), words()
    lines = (" ".join(rng.choices(rng.choice(known), k=12)) for _ in range(1200))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def planted() -> Problem:
    """The last word of each group is new; the base has the others, and splits that one in two.

    An anchor's row is its group's unit vector and noise; the two halves have rows of noise alone.
    """
    known = words()
    anchors = [word for group in known for word in group[:ANCHORS]]
    new = [group[-1] for group in known]
    halves = [half for word in new for half in (word[:3], word[3:])]
    places = {word: place for place, word in enumerate([*halves, *anchors])}
    base = 0.05 * np.random.default_rng(2).standard_normal((len(places), E), np.float32)
    for place, _ in enumerate(anchors):
        base[len(halves) + place, place // ANCHORS] += 1

    def split(text: str) -> list[int]:
        pieces = (
            [word] if word in places else [word[:3], word[3:]] for word in text.strip().split()
        )
        return [places[piece] for word in pieces for piece in word if piece in places]

    return Problem(
        donor=np.zeros((len(anchors), 2), np.float32),
        base=base,
        places=np.arange(len(halves), len(places)),
        targets=np.zeros((len(new), 2), np.float32),
        anchor_bytes=[f" {word}".encode() for word in anchors],
        new_bytes=[f" {word}".encode() for word in new],
        split=split,
        pieces=lambda text: [f" {word}".encode() for word in text.split()],
    )


def learned(method: Method, text: Path, seed: int = 0) -> np.ndarray:
    return method(Static(text=(text,), dimensions=16)).rows(planted(), seed)


def write_vectors(path: Path, vectors: dict[str, Any]) -> Path:
    size = len(next(iter(vectors.values())))
    lines = (f"{word} {' '.join(map(str, vector))}" for word, vector in vectors.items())
    path.write_text(f"{len(vectors)} {size}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gensim", reason="the [transplant] extra is not installed")
    return write_text(tmp_path_factory.mktemp("static") / "text")


@pytest.mark.parametrize("scale", [0.1, 1, 5])
def test_sparsemax_is_the_projection_onto_the_simplex(scale: float) -> None:
    for z in scale * np.random.default_rng(0).standard_normal((5, 7)):
        found = scipy.optimize.minimize(
            lambda w, z=z: ((w - z) ** 2).sum(),
            np.full(7, 1 / 7),
            jac=lambda w, z=z: 2 * (w - z),
            bounds=[(0, None)] * 7,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        np.testing.assert_allclose(sparsemax(jnp.asarray(z, jnp.float32)), found.x, atol=1e-5)


def test_sparsemax_keeps_its_laws() -> None:
    z = jnp.asarray(np.random.default_rng(1).standard_normal((50, 30)), jnp.float32)
    w = sparsemax(z)
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=1e-6)
    assert (w >= 0).all()
    assert ((w > 0).sum(axis=1) < 30).all()
    np.testing.assert_allclose(sparsemax(z + 100), w, atol=1e-4)
    np.testing.assert_allclose(sparsemax(z[:, ::-1]), w[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(sparsemax(jnp.full((4,), 3.0)), 0.25)
    np.testing.assert_array_equal(sparsemax(jnp.asarray([0.0, 5.0])), [0, 1])
    np.testing.assert_array_equal(sparsemax(jnp.asarray([7.0])), [1])


@pytest.mark.parametrize("k", [1, 3, 40])
def test_sparsemax_of_the_nearest_is_that_of_all(k: int) -> None:
    rng = np.random.default_rng(2)
    sources = jnp.asarray(rng.standard_normal((40, 8)), jnp.float32)
    x = jnp.asarray(0.1 * rng.standard_normal((6, 8)), jnp.float32)
    whole = sparsemax(x @ sources.T)
    assert ((whole > 0).sum(axis=1) > 3).any()
    weights, places = focus._weights(x, sources, k)
    found = jnp.zeros_like(whole).at[jnp.arange(6)[:, None], places].set(weights)
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_written_is_injective_and_without_white_space() -> None:
    letters = [written(bytes([byte])) for byte in range(256)]
    assert len(set(letters)) == 256
    assert all(len(letter) == 1 and letter.isprintable() for letter in letters)
    assert not any(letter.isspace() for letter in letters)
    assert written(" né\n".encode()) == "ĠnÃ©Ċ"


@pytest.mark.parametrize("method", METHODS)
def test_a_new_token_gets_rows_of_tokens_in_its_contexts(method: Method, text: Path) -> None:
    rows = learned(method, text)
    assert rows.shape == (GROUPS, E)
    assert rows.dtype == np.float32
    groups = rows[:, :GROUPS]
    assert (groups.argmax(axis=1) == np.arange(GROUPS)).all()
    wrong = groups - 10 * np.eye(GROUPS, dtype=np.float32)
    assert (np.diagonal(groups) > 3 * wrong.max(axis=1)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_has_one_result_in_every_process(method: Method, text: Path) -> None:
    first = learned(method, text)
    np.testing.assert_array_equal(learned(method, text), first)
    assert (learned(method, text, seed=1) != first).any()
    command = (
        "import sys, pathlib, importlib.util as u, numpy as np\n"
        "spec = u.spec_from_file_location('t', sys.argv[1]); t = u.module_from_spec(spec)\n"
        "sys.modules['t'] = t; spec.loader.exec_module(t)\n"
        "rows = t.learned(getattr(t, sys.argv[2]), pathlib.Path(sys.argv[3]))\n"
        "print(rows.tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, __file__, method.__name__, str(text)],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    there = np.frombuffer(bytes.fromhex(done.stdout), np.float32)
    np.testing.assert_array_equal(there.reshape(first.shape), first)


def test_focus_reads_vectors_and_draws_where_there_are_none(tmp_path: Path) -> None:
    pytest.importorskip("gensim")
    problem, known = planted(), words()
    vectors = {
        written(f" {word}".encode()): np.eye(GROUPS)[group]
        for group, both in enumerate(known)
        for word in both
        if word != known[1][-1]
    }
    file = write_vectors(tmp_path / "tokens.vec", vectors)
    rows = Focus(Static(vectors=file)).rows(problem, 3)
    means = problem.anchors.reshape(GROUPS, ANCHORS, E).mean(axis=1)
    np.testing.assert_allclose(np.delete(rows, 1, 0), np.delete(means, 1, 0), atol=1e-6)
    np.testing.assert_array_equal(rows[1], drawn(GROUPS, problem.anchors, 3)[1])


def test_wechsel_is_its_equation(tmp_path: Path) -> None:
    """One token of two words, weighed 1 and 1 / 2 by their ranks; one in no word."""
    pytest.importorskip("gensim")
    base = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    problem = Problem(
        donor=np.zeros((1, 2), np.float32),
        base=base,
        places=np.arange(1),
        targets=np.zeros((2, 2), np.float32),
        anchor_bytes=[b"a"],
        new_bytes=[b"s", b"?"],
        split=lambda text: {"as": [0], "bs": [1, 1]}.get(text.strip(), []),
        pieces=lambda text: [bytes([letter]) for letter in text.encode()],
    )
    file = write_vectors(tmp_path / "words.vec", {"as": [1.0, 0.0], "bs": [0.0, 1.0]})
    rows = Wechsel(Static(vectors=file), temperature=0.5).rows(problem, 4)
    cosines = np.array([1, 0.5]) / np.sqrt(1.25)
    weights = np.exp(cosines / 0.5) / np.exp(cosines / 0.5).sum()
    np.testing.assert_allclose(rows[0], weights @ base[:2], rtol=1e-5)
    np.testing.assert_array_equal(rows[1], drawn(2, base, 4)[1])


@pytest.mark.parametrize("method", METHODS)
def test_a_word_that_stands_twice_counts_once(method: Method, tmp_path: Path) -> None:
    pytest.importorskip("gensim")
    lines = [
        f"{word} {group} 1"
        for group, both in enumerate(words())
        for one in both
        for word in (one, written(f" {one}".encode()))
    ]
    once, twice = tmp_path / "once.vec", tmp_path / "twice.vec"
    once.write_text("\n".join([f"{len(lines)} 2", *lines, ""]), encoding="utf-8")
    twice.write_text("\n".join([f"{2 * len(lines)} 2", *lines, *lines, ""]), encoding="utf-8")
    rows = [method(Static(vectors=file)).rows(planted(), 0) for file in (once, twice)]
    np.testing.assert_array_equal(rows[0], rows[1])


def test_binary_files_are_read(tmp_path: Path, text: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gensim.models import FastText, KeyedVectors
        from gensim.models.fasttext import save_facebook_model
    known = KeyedVectors(3)
    known.add_vectors(["as", "bs"], np.arange(6.0).reshape(2, 3).astype(np.float32))
    known.save_word2vec_format(str(tmp_path / "words.bin"), binary=True)
    found = Static(vectors=tmp_path / "words.bin").load(str.split, 0)
    np.testing.assert_array_equal(found["bs"], known["bs"])
    np.testing.assert_allclose(found.expandos["count"], [1, 0.5])
    model = FastText([["word", "other"] * 20], vector_size=4, min_count=1, workers=1, bucket=50)
    save_facebook_model(model, str(tmp_path / "model.bin"))
    found = Static(vectors=tmp_path / "model.bin").load(str.split, 0)
    np.testing.assert_allclose(found["word"], model.wv["word"], atol=1e-6)
    assert found.expandos["count"].tolist() == [20, 20]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [{}, {"vectors": "a.vec", "text": ["a"]}])
def test_one_source_is_given(method: type, given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="static: give either"):
        validate(method, {"static": given}, "config.toml")
    with pytest.raises(UserError, match="dimensions"):
        validate(method, {"static": {"text": ["a"], "dimensions": 0}}, "config.toml")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "held",
    [
        None,
        b"",
        b"nothing of the kind\n",
        b"2 3\na 1 2 3\n",
        b"2 3\na 1 2 3\nb 1 2\n",
        b"1 3\na 1 2 x\n",
        b"1 2\na 1 nan\n",
        b"0 3\n",
        b"\xff\xfe\x00\n",
        b"\xba\x16\x4f\x2f\x0c",
    ],
)
@pytest.mark.parametrize("name", ["words.vec", "words.bin"])
def test_damaged_vectors_are_named(
    method: Method, name: str, held: bytes | None, tmp_path: Path
) -> None:
    pytest.importorskip("gensim")
    file = tmp_path / name
    if held is not None:
        file.write_bytes(held)
    with pytest.raises(UserError, match=name):
        method(Static(vectors=file)).rows(planted(), 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("held", [None, b"", b"\n\n", b"few words\n", b"a " * 20, b"\xff\xfe\n"])
def test_text_that_cannot_be_learned_from_is_named(
    method: Method, held: bytes | None, tmp_path: Path
) -> None:
    pytest.importorskip("gensim")
    file = tmp_path / "text"
    if held is not None:
        file.write_bytes(held)
    with pytest.raises(UserError, match=str(file)):
        method(Static(text=(file,))).rows(planted(), 0)


@pytest.mark.parametrize("method", METHODS)
def test_vectors_of_other_words_are_refused(method: Method, tmp_path: Path) -> None:
    pytest.importorskip("gensim")
    file = write_vectors(tmp_path / "words.vec", {"nowhere": [1.0, 2.0]})
    with pytest.raises(UserError, match=r"static.*token"):
        method(Static(vectors=file)).rows(planted(), 0)


def test_a_missing_gensim_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gensim.models", "gensim.models.fasttext", "gensim.models.word2vec"):
        monkeypatch.setitem(sys.modules, module, None)
    for static in (Static(vectors=tmp_path / "a"), Static(text=(tmp_path / "a",))):
        with pytest.raises(UserError, match=r"dictlearn-interp\[transplant\]"):
            Focus(static).rows(planted(), 0)
