"""What a transplant is judged by: losses, multiple choice, shared tokens that are hidden."""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, trainers

from activations.terminal import UserError
from dictlearn.transplant.methods.omp import OMPMixing
from dictlearn.transplant.methods.plain import Mean, Random, Zero
from dictlearn.transplant.methods.subwords import Subwords
from dictlearn.transplant.problem import Problem
from evals import multiple_choice
from evals.heldout_anchors import held_out, score
from evals.multiple_choice import accuracy, read_questions
from evals.token_losses import Losses, above, losses, token_nats

V = 60


class Bigram(torch.nn.Module):
    """The interface of a language model whose next token depends on the last one alone."""

    device = torch.device("cpu")

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.float32)
        self.head = torch.nn.Linear(*self.logits.shape, bias=False)
        self.head.weight.data = self.logits.T
        self.read: list[tuple[int, ...]] = []

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, x: torch.Tensor, *, use_cache: bool) -> Any:
        assert not use_cache
        self.read.append(tuple(x.shape))
        hidden = torch.nn.functional.one_hot(x, len(self.logits)).float()
        return types.SimpleNamespace(logits=self.head(hidden))

    def log_p(self, before: int, token: int) -> float:
        row = self.logits[before].double()
        return float(row[token] - torch.logsumexp(row, 0))


def bigram(v: int = 256, seed: int = 0) -> Bigram:
    return Bigram(np.random.default_rng(seed).standard_normal((v, v)) * 3)


def uniform(v: int) -> Bigram:
    return Bigram(np.zeros((v, v)))


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    """Real architectures; Gemma 2 squashes its logits and looks back a little, so as to be seen."""
    common: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    gpt2: dict[str, Any] = {
        "vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    kinds = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**common)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**common, final_logit_softcapping=2.0, sliding_window=4)
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kinds[request.param]().eval()


def plain_nats(model: Any, ids: list[int], first: int) -> np.ndarray:
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return np.array([-float(table[place - 1, ids[place]]) for place in range(first, len(ids))])


@pytest.mark.parametrize(
    ("sizes", "first"),
    [([7], [1]), ([7], [4]), ([5, 11, 2], [1, 1, 1]), ([9, 4, 12], [3, 2, 11]), ([6, 3], [5, 2])],
)
def test_nats_are_those_of_the_models_own_logits_whatever_is_padded(
    model: Any, sizes: list[int], first: list[int]
) -> None:
    rng = np.random.default_rng(len(sizes))
    sequences = [rng.integers(0, V, size).tolist() for size in sizes]
    given: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, __: given.append(inputs[0].numel()))
    found = token_nats(model, sequences, first)
    hook.remove()
    assert [len(one) for one in found] == [a - b for a, b in zip(sizes, first, strict=True)]
    assert given == [sum(map(len, found)) * head.weight.shape[1]]  # no place that is not wanted
    for nats, ids, begin in zip(found, sequences, first, strict=True):
        # By a model that reads as ever again.
        np.testing.assert_allclose(nats, plain_nats(model, ids, begin), rtol=1e-4, atol=1e-5)


def encode(text: str) -> list[int]:
    return list(text.encode())


def byte(token: int) -> bytes:
    return bytes([token])


@pytest.mark.parametrize("begin", [[], [7], [7, 8]])
def test_bits_per_byte_are_those_of_a_count_by_hand(begin: list[int]) -> None:
    lm, texts = bigram(), ["abca", "é", "x", ""]
    found = losses(lm, texts, encode, byte, begin=begin)
    nats, documents, of_document = 0.0, [], np.zeros(4)
    for document, text in enumerate(texts):
        ids = [*begin, *encode(text)]
        for place in range(max(1, len(begin)), len(ids)):
            nats -= lm.log_p(ids[place - 1], ids[place])
            of_document[document] -= lm.log_p(ids[place - 1], ids[place]) / np.log(2)
            documents.append(document)
    n_bytes = [4, 2, 1, 0] if begin else [3, 1, 0, 0]
    told = found.bits_per_byte(seed=0)
    assert told["bits_per_byte"] == pytest.approx(nats / np.log(2) / sum(n_bytes), rel=1e-5)
    low, high = told["bits_per_byte_interval"]
    assert low <= told["bits_per_byte"] <= high
    assert found.document.tolist() == documents
    assert 2 in documents or not begin  # a token by itself is predicted from what begins a text
    apart = found.by_document()
    assert apart["bytes"] == n_bytes
    assert apart["bits"] == pytest.approx(of_document, rel=1e-5)


TOKENS = {
    1: b" the", 2: b"the", 3: b"\xc3", 4: b"\xa9", 5: b" dog", 6: b"<unk>", 7: b"straz", 8: b" ",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "ids", "whole", "behind"),
    [
        ("the dog", [2, 5], 7, 4),
        ("the dog", [1, 5], 7, 4),  # the tokenizer puts a space before a text
        ("the dog", [8, 2, 5], 7, 7),  # a token of its own, that is none of the text's
        (" the dog", [1, 5], 8, 4),
        ("é the", [3, 4, 1], 6, 5),
        ("the 日本", [2, 6], 10, 7),  # an unknown word
        ("STRAß dog", [7, 5], 10, 5),  # a normalised one
        ("日", [6, 6], 3, 0),
    ],
)
def test_bytes_are_the_texts_and_not_the_tokens(
    text: str, ids: list[int], whole: int, behind: int
) -> None:
    lm = uniform(9)
    for begin, n_bytes in (([0], whole), ([], behind)):
        found = losses(lm, [text], lambda _: ids, TOKENS.__getitem__, begin=begin)
        count = len(ids) - (not begin)
        assert found.by_document()["bytes"] == [n_bytes]
        assert found.by_document()["bits"] == pytest.approx([count * np.log2(9)])


@pytest.mark.parametrize(("v", "size"), [(17, 3), (256, 1), (5, 4)])
def test_a_uniform_model_needs_log_v_bits_a_token(v: int, size: int) -> None:
    found = losses(
        uniform(v), ["abcd" * size, "xyzzy" * size], lambda text: [1] * (len(text) // size),
        lambda _: b"a" * size, begin=[0],
    )  # fmt: skip
    told = found.bits_per_byte(seed=0)
    assert told["bits_per_byte"] == pytest.approx(np.log2(v) / size, rel=1e-6)
    assert told["bits_per_byte_interval"] == pytest.approx([np.log2(v) / size] * 2, rel=1e-6)


def sums(bits: Any, n_bytes: Any) -> dict[str, Any]:
    return {"bits": list(bits), "bytes": list(n_bytes)}


def test_a_difference_is_of_ratios_of_sums_and_changes_its_sign_with_the_order() -> None:
    one, other = sums([3.0, 8.0, 5.0], [2, 10, 3]), sums([1.0, 6.0, 9.0], [2, 11, 3])
    told, back = above(one, other, seed=0), above(other, one, seed=0)
    assert told["bits_per_byte"] == pytest.approx(16 / 15 - 16 / 16)
    assert back["bits_per_byte"] == -told["bits_per_byte"]
    low, high = told["bits_per_byte_interval"]
    assert back["bits_per_byte_interval"] == pytest.approx([-high, -low])
    assert above(one, one, seed=0)["bits_per_byte_interval"] == (0, 0)


def test_what_documents_have_in_common_does_not_widen_a_difference() -> None:
    """Documents far apart from each other, one model above the other by as much on each."""
    rng = np.random.default_rng(0)
    n_bytes = rng.integers(50, 500, 100)
    bits = n_bytes * rng.uniform(0.1, 3, 100)
    told = above(sums(bits + 0.25 * n_bytes, n_bytes), sums(bits, n_bytes), seed=0)
    assert told["bits_per_byte_interval"] == pytest.approx([0.25, 0.25])
    noise = rng.normal(0, 0.2, 100)
    level = np.full(100, 100)
    told = above(sums(bits + 100 * noise, level), sums(bits, level), seed=1)
    low, high = told["bits_per_byte_interval"]
    assert told["bits_per_byte"] == pytest.approx(noise.mean())
    # A mean of differences has their standard error, 1.96 of it to each side.
    assert high - low == pytest.approx(3.92 * noise.std() / 10, rel=0.1)


def test_a_document_in_which_one_model_predicts_nothing_is_left_out_of_both() -> None:
    one, other = sums([0.0, 2.0, 6.0], [0, 4, 2]), sums([50.0, 3.0, 4.0], [9, 5, 2])
    told = above(one, other, seed=0)
    assert told == above(sums([2.0, 6.0], [4, 2]), sums([3.0, 4.0], [5, 2]), seed=0)
    assert told["bits_per_byte"] == pytest.approx(8 / 6 - 7 / 7)
    assert above(other, one, seed=0)["bits_per_byte"] == -told["bits_per_byte"]


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "b"]])
def test_texts_without_a_token_to_predict_are_the_users_to_mend(texts: list[str]) -> None:
    with pytest.raises(UserError, match=f"not one of {len(texts)} texts"):
        losses(bigram(), texts, encode, byte, begin=[])


def test_losses_of_some_tokens_are_their_mean_and_none_of_none() -> None:
    held = Losses(
        np.array([1.0, 2.0, 6.0, 3.0]), np.array([5, 9, 5, 4]), np.zeros(4, int), np.array([9])
    )
    assert held.of(np.array([5, 77])) == {"nats": 3.5, "share": 0.5, "n": 2}
    assert held.of(np.array([77])) == {"nats": None, "share": 0.0, "n": 0}
    assert held.of(np.array([], int)) == {"nats": None, "share": 0.0, "n": 0}


def merged(text: str) -> list[int]:
    """Letters, but "d e" is one token, over whatever border it lies."""
    return [255 if one == "d e" else ord(one) for one in re.findall("d e|.", text)]


@pytest.mark.parametrize("begin", [[], [1], [2, 3]])
def test_a_choice_counts_by_its_tokens_and_by_those_that_reach_into_the_query(
    begin: list[int],
) -> None:
    lm, questions = bigram(seed=4), []
    rng = np.random.default_rng(0)
    for _ in range(30):
        query = "a" + "".join(rng.choice([*"abd"], 3))
        choices = ["".join(rng.choice([*"ef g"], size)).strip() + "e" for size in (1, 3, 6)]
        questions.append({"query": query, "choices": choices, "gold": int(rng.integers(3))})
    right, right_norm, reached = [], [], 0
    for one in questions:
        sums = []
        for choice in one["choices"]:
            text = f"{one['query']} {choice}"
            ids, before, total = merged(text), len(one["query"]), 0.0
            if one["query"].endswith("d") and choice.startswith("e"):
                before, reached = before - 1, reached + 1
            for place in range(before, len(ids)):
                total += lm.log_p([*begin, *ids][len(begin) + place - 1], ids[place])
            sums.append(total)
        per_byte = [total / len(text) for total, text in zip(sums, one["choices"], strict=True)]
        right.append(int(np.argmax(sums) == one["gold"]))
        right_norm.append(int(np.argmax(per_byte) == one["gold"]))
    told = accuracy(lm, questions, merged, begin=begin)
    assert reached > 3
    assert right != right_norm
    assert (told["right"], told["right_norm"], told["n"]) == (right, right_norm, 30)
    for key, hits in (("acc", right), ("acc_norm", right_norm)):
        assert told[key] == pytest.approx(np.mean(hits))
        # The standard error of a mean, as numpy has it.
        assert told[f"{key}_stderr"] == pytest.approx(np.std(hits, ddof=1) / np.sqrt(30))


@pytest.mark.parametrize(("tokens", "wanted"), [(1, 1), (40, 999), (999, 9), (64, 12)])
def test_questions_are_read_together_within_limits_and_to_the_same_end(
    monkeypatch: pytest.MonkeyPatch, tokens: int, wanted: int
) -> None:
    rng = np.random.default_rng(1)
    questions = [
        {
            "query": "q" * int(rng.integers(1, 20)),
            "choices": ["".join(rng.choice([*"abc"], rng.integers(1, 12))) for _ in range(n)],
            "gold": int(rng.integers(n)),
        }
        for n in rng.integers(1, 6, 25)
    ]
    lm = bigram(seed=2)
    apart = [accuracy(lm, [one], encode, begin=[1]) for one in questions]
    monkeypatch.setattr(multiple_choice, "_TOKENS", tokens)
    monkeypatch.setattr(multiple_choice, "_WANTED", wanted)
    lm.read.clear()
    given: list[int] = []
    lm.head.register_forward_hook(lambda _, inputs, __: given.append(inputs[0].shape[-2]))
    told = accuracy(lm, questions, encode, begin=[1])
    for key in ("right", "right_norm"):
        assert told[key] == [one[key][0] for one in apart]
        assert 0 < sum(told[key]) < 25
    assert sum(rows for rows, _ in lm.read) == sum(len(one["choices"]) for one in questions)
    assert all(rows == 1 or rows * length <= tokens for rows, length in lm.read)
    assert all(rows == 1 or n <= wanted for n, (rows, _) in zip(given, lm.read, strict=True))
    lengths = [length for _, length in lm.read]
    assert lengths == sorted(lengths, reverse=True)
    assert (max(rows for rows, _ in lm.read) > 1) == (tokens > 1)


@pytest.mark.parametrize(("gold", "expected"), [(1, 1.0), (0, 0.0)])
def test_a_model_that_always_says_one_choice_is_always_right_or_never(
    gold: int, expected: float
) -> None:
    table = np.zeros((256, 256))
    table[:, ord("y")] = 20
    asked = [
        {"query": query, "choices": ["nnn", "yyy", "n"], "gold": gold} for query in ("a b", "cd")
    ]
    told = accuracy(Bigram(table), asked, encode, begin=[])
    assert [told[key] for key in ("acc", "acc_norm")] == [expected] * 2
    assert [told[key] for key in ("acc_stderr", "acc_norm_stderr")] == [0.0] * 2


@pytest.mark.parametrize(
    ("choices", "acc", "acc_norm"),
    [
        (["a", "bbbb"], 0, 1),  # 2 and 5 tokens with the space, 1 and 4 bytes
        (["bbbb", "a"], 1, 0),
        (["aa", "éé"], 0, 1),  # as many letters, twice the bytes; of equals the first is taken
    ],
)
def test_long_choices_lose_by_their_sums_and_win_by_bytes_under_a_uniform_model(
    choices: list[str], acc: float, acc_norm: float
) -> None:
    told = accuracy(
        uniform(256), [{"query": "q", "choices": choices, "gold": 1}],
        lambda text: [ord(one) for one in text], begin=[],
    )  # fmt: skip
    assert (told["acc"], told["acc_norm"]) == (acc, acc_norm)


def test_a_choice_without_anything_before_it_is_told_and_not_scored() -> None:
    asked = [{"query": "", "choices": ["a", "b"], "gold": 0}]
    with pytest.raises(UserError, match="zero_shot: the query ''"):
        accuracy(bigram(), asked, encode, begin=[])
    assert accuracy(bigram(), asked, encode, begin=[1])["n"] == 1


def written(file: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts), encoding="utf-8")
    return file


def question(number: int = 0, **other: Any) -> dict[str, Any]:
    return {"query": f"q{number}", "choices": ["a", "b"], "gold": 1} | other


def test_questions_are_drawn_by_the_seed_and_none_twice(tmp_path: Path) -> None:
    file = written(tmp_path / "some.jsonl", *map(question, range(50)))
    draws = [
        [int(one["query"][1:]) for one in read_questions(file, 20, seed=seed)] for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all(len({*drawn}) == 20 for drawn in draws)
    everything = read_questions(file, 999, seed=3)
    assert everything == [question(number) for number in range(50)]


def test_questions_may_hold_any_separator_of_lines_but_the_files_own(tmp_path: Path) -> None:
    odd = question(query="a\u2028b\x85c", extra=1)
    file = written(tmp_path / "some.jsonl", json.dumps(odd, ensure_ascii=False), "", question(2))
    assert [one["query"] for one in read_questions(file, 9, seed=0)] == [odd["query"], "q2"]


@pytest.mark.parametrize(
    "line",
    [
        '{"query": "a", "choi', "[1]", "7", "null", '"text"', {"query": "a", "choices": ["b"]},
        question(gold=2), question(gold=-1), question(gold="1"), question(gold=0.5),
        question(gold=True), question(gold=None), question(choices=[]), question(choices=["a", ""]),
        question(choices="ab"), question(choices={"a": 1, "b": 2}), question(choices=["a", 3]),
        question(choices=None), question(query=None), question(query=["a"]),
    ],
)  # fmt: skip
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: Any) -> None:
    file = written(tmp_path / "some.jsonl", question(0), "", line, question(3))
    with pytest.raises(UserError, match=r"some\.jsonl: line 3 "):
        read_questions(file, 1, seed=0)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe{}"])
def test_a_file_without_questions_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "some.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"some\.jsonl"):
        read_questions(file, 1, seed=0)


def planted(
    n_base: int = 300, anchors: int = 200, *, noise: bool = False, seed: int = 0
) -> Problem:
    """donor = base @ map: a token is the same combination of others in both spaces."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((n_base, 6)).astype(np.float32)
    places = rng.permutation(n_base)[:anchors]
    donor = base[places] @ rng.standard_normal((6, 9)).astype(np.float32)
    if noise:
        donor = rng.standard_normal(donor.shape).astype(np.float32)
    return Problem(
        donor=donor, base=base, places=places, targets=donor[:0],
        anchor_bytes=[f"{place} ".encode() for place in places], new_bytes=[],
        split=lambda text: [int(one) for one in text.split()], pieces=lambda text: [text.encode()],
    )  # fmt: skip


@pytest.mark.parametrize(("count", "hidden"), [(30, 30), (100, 100), (1000, 100)])
def test_hidden_anchors_are_gone_from_all_that_a_method_sees(count: int, hidden: int) -> None:
    problem = planted()
    one, true = held_out(problem, count, seed=5)
    row = {int(place): at for at, place in enumerate(problem.places)}
    gone = [int(content) for content in one.new_bytes]
    assert len({*gone}) == hidden == len(true)
    assert {*gone} | {*one.places.tolist()} == {*row}
    assert not {*gone} & {*one.places.tolist()}
    assert not {*one.anchor_bytes} & {*one.new_bytes}
    np.testing.assert_array_equal(one.targets, problem.donor[[row[place] for place in gone]])
    np.testing.assert_array_equal(true, problem.base[gone])
    np.testing.assert_array_equal(one.donor, problem.donor[[row[p] for p in one.places.tolist()]])
    assert one.anchor_bytes == [f"{place} ".encode() for place in one.places]
    kept = one.places[:2].tolist()
    assert one.split(f"{kept[0]} {gone[0]} {kept[1]} {gone[-1]}") == kept
    # Nothing but the token itself stands for its text: there is nothing to take the mean of.
    np.testing.assert_array_equal(Subwords().rows(one, 0), Mean().rows(one, 0))
    other = held_out(problem, count, seed=6)[0]
    assert held_out(problem, count, seed=5)[0].new_bytes == one.new_bytes != other.new_bytes


def test_a_hidden_token_is_split_as_by_a_tokenizer_that_never_had_it() -> None:
    """Beside the library's own tokenizer with the hidden tokens taken out of its file."""
    bpe = Tokenizer(models.BPE())
    words = "the then there other another mother brother bother both bath path that this"
    bpe.train_from_iterator(
        words.split() * 3, trainers.BpeTrainer(vocab_size=60, show_progress=False)
    )
    places = bpe.get_vocab()
    contents = {place: text.encode() for text, place in places.items()}
    anchors = [place for place in sorted(contents) if len(contents[place]) > 1]
    base = np.random.default_rng(0).standard_normal((len(places), 6)).astype(np.float32)
    problem = Problem(
        donor=base[anchors], base=base, places=np.array(anchors), targets=base[:0],
        anchor_bytes=[contents[place] for place in anchors], new_bytes=[],
        split=lambda text: bpe.encode(text).ids, pieces=lambda text: [text.encode()],
        tokens=contents,
    )  # fmt: skip
    same = []
    for seed in range(20):
        one, _ = held_out(problem, 5, seed=seed)
        hidden = {content.decode() for content in one.new_bytes}
        held = json.loads(bpe.to_str())
        kept = {text: place for text, place in places.items() if text not in hidden}
        merges = [(a, b) for a, b in held["model"]["merges"] if not {a, b, a + b} & hidden]
        held["model"] |= {"vocab": kept, "merges": merges}
        lacking = Tokenizer.from_str(json.dumps(held))
        for row, content in zip(Subwords().rows(one, 0), one.new_bytes, strict=True):
            parts, expected = one.split(content.decode()), lacking.encode(content.decode()).ids
            assert b"".join(contents[place] for place in parts) == content
            assert len(parts) <= len(expected)  # its merges do not always end with the fewest
            np.testing.assert_allclose(row, base[parts].mean(axis=0), rtol=1e-5)
            same.append(parts == expected)
        whole = [*hidden, "t", *(contents[place].decode() for place in one.places)]
        told = one.split("".join(whole))
        assert b"".join(contents[place] for place in told) == "".join(whole).encode()
        assert not {*told} & {places[text] for text in hidden}
    assert np.mean(same) > 0.7


def test_no_anchor_keeps_the_row_of_a_hidden_one() -> None:
    problem = planted()
    places = problem.places.copy()
    places[1::2] = places[::2]  # two of the donor's tokens for each of the base's
    one, true = held_out(dataclasses.replace(problem, places=places), 20, seed=0)
    assert len(true) == 20
    assert len(one.donor) == len(one.places) == len(one.anchor_bytes)
    rows = {row.tobytes() for row in one.anchors}
    assert not any(row.tobytes() in rows for row in true)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # As many tokens as dimensions write any row exactly, in either space.
        (OMPMixing(k=6), {"cosine": 1, "centred_cosine": 1, "error": 0, "norm": 1}),
        (Zero(), {"cosine": 0, "error": 1, "norm": 0}),
        (Mean(), {"centred_cosine": 0}),
    ],
)
def test_a_planted_map_is_found_by_the_pursuit_and_by_nothing_that_does_not_look(
    method: Any, expected: dict[str, float]
) -> None:
    one, true = held_out(planted(), 100, seed=0)
    told = score(method.rows(one, 0), true, one.anchors.mean(axis=0), seed=0)
    assert {key: told[key] for key in expected} == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("method", "noise"), [(Random(), False), (OMPMixing(k=2), True)])
def test_chance_has_no_cosine(method: Any, noise: bool) -> None:
    one, true = held_out(planted(600, 600, noise=noise), 300, seed=0)
    told = score(method.rows(one, 0), true, one.anchors.mean(axis=0), seed=0)
    assert abs(told["cosine"]) < 4 / np.sqrt(300 * 6)  # four standard errors


def test_scores_of_perfect_rows_are_perfect_and_of_scaled_ones_known() -> None:
    true = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    mean = true.mean(axis=0)
    perfect = score(true, true, mean, seed=0)
    keys = ("cosine", "centred_cosine", "error", "norm")
    assert [perfect[key] for key in keys] == pytest.approx([1, 1, 0, 1], abs=1e-6)
    assert perfect["n"] == 40
    turned = score(-3 * true, true, 0 * mean, seed=0)
    assert [turned[key] for key in keys] == pytest.approx([-1, -1, 4, 3], abs=1e-5)
    nothing = score(0 * true, true, mean, seed=0)
    assert [nothing[key] for key in ("cosine", "error", "norm")] == [0, 1, 0]


def test_scores_are_means_over_tokens_with_intervals_around_them() -> None:
    rng = np.random.default_rng(1)
    true, rows = (rng.standard_normal((60, 7)) + 1 for _ in range(2))
    told = score(rows, true, true.mean(axis=0), seed=0)
    loops: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
        "cosine": lambda a, b: a @ b / np.sqrt(a @ a * (b @ b)),
        "centred_cosine": lambda a, b: loops["cosine"](a - true.mean(axis=0), b - true.mean(0)),
        "error": lambda a, b: np.sqrt(((a - b) ** 2).sum() / (b**2).sum()),
        "norm": lambda a, b: np.sqrt((a**2).sum() / (b**2).sum()),
    }
    for key, figure in loops.items():
        values = [figure(a, b) for a, b in zip(rows, true, strict=True)]
        assert told[key] == pytest.approx(np.mean(values))
        low, high = told[f"{key}_interval"]
        error = np.std(values) / np.sqrt(60)  # 95 % are about two of them to each side
        assert low < told[key] < high
        assert high - low == pytest.approx(3.92 * error, rel=0.2)


def test_a_token_without_a_row_of_its_own_is_left_out_of_scores() -> None:
    rng = np.random.default_rng(2)
    true, rows = (rng.standard_normal((12, 4)) for _ in range(2))
    true[[3, 7]] = 0
    kept = true.any(axis=1)
    mean = np.ones(4)
    assert score(rows, true, mean, seed=0) == score(rows[kept], true[kept], mean, seed=0)
    assert score(rows, 0 * true, mean, seed=0) == {"n": 0}
    assert score(rows[:0], true[:0], mean, seed=0) == {"n": 0}
