"""The evaluation of a transplant: what it says of four models, and what it does when stopped."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from activations import terminal
from activations.corpora import Files
from activations.terminal import UserError
from dictlearn.transplant.config import Method, TransplantConfig
from dictlearn.transplant.methods.focus import Focus
from dictlearn.transplant.methods.omp import OMPMixing
from dictlearn.transplant.methods.plain import Mean, Random, Zero
from dictlearn.transplant.methods.static import Static
from dictlearn.transplant.run import read_transplant, transplant
from evals import transplant as evaluation
from evals.speaker import Speaker
from evals.transplant import EvalConfig, evaluate
from evals.transplant_rows import Rows, label
from evals.transplant_table import markdown

Command = Callable[..., tuple[int, str, str]]

OWN = OMPMixing(k=8)
OTHERS: tuple[Method, ...] = (OMPMixing(k=3), Mean(), Zero())
LINES = [
    "The lazy dog sleeps under an old oak tree, and dreams of a quick brown fox.",
    "Numbers: 1, 22, 333. The dog does not mind them at all.",
    "  Another fox jumps over another dog; the oak tree does not mind.  ",
    "Quick quick quick! Over and over the tree.",
]


def make_model(
    directory: Path,
    width: int,
    *,
    tied: bool,
    begins: bool = True,
    kind: str = "llama",
    words: str = "oak tree dreams",
) -> Path:
    """A random model with a tokenizer of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*LINES, words] * 3,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<bos>", "<eos>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    if begins:
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>"
    )
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
        "tie_word_embeddings": tied, "initializer_range": 0.3,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(width)
        if kind == "phi":  # its head has a bias
            lm: Any = transformers.PhiForCausalLM(transformers.PhiConfig(**common))
            torch.nn.init.normal_(lm.lm_head.bias)
        else:
            lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost tiny models more than they give on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("transplant") / "base"
    return make_model(directory, 12, tied=True)


@pytest.fixture(scope="module")
def out(base: Path, tiny_model_dir: Path) -> Path:
    """The donor has a head of its own, puts no token before a text, and is wider."""
    output = base.parent / "out"
    transplant(TransplantConfig(base, tiny_model_dir, output, OWN))
    return output


@pytest.fixture(scope="module")
def cfg(base: Path) -> EvalConfig:
    text, questions = base.parent / "text.txt", base.parent / "asked.jsonl"
    text.write_text("\n".join([*LINES, LINES[0], "", f" {LINES[1]} "]))
    asked = [
        {"query": f"The dog does {n}", "choices": ["not mind", "an oak"], "gold": n % 2}
        for n in range(5)
    ]
    questions.write_text("\n".join(map(json.dumps, asked)))
    return EvalConfig(
        corpus=Files("files", (str(text),), documents_are="lines"), documents=3, characters=50,
        zero_shot=(questions,), questions=4, held_out=40, prompts=("The dog",), new_tokens=3,
        methods=OTHERS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(out: Path, cfg: EvalConfig) -> Path:
    """Of an evaluation that nothing stopped."""
    place = out.parent / "results"
    evaluate(out, cfg, place)
    return place


@pytest.fixture(scope="module")
def held(results: Path) -> dict[str, Any]:
    return json.loads((results / "transplant.json").read_text())


CUT = "base, cut as OUT"
NAMES = ["base", CUT, "donor", "omp k=8", "omp k=3", "mean", "zero"]


def test_json_and_table_hold_every_model_and_figure(held: dict[str, Any], results: Path) -> None:
    assert [*held["models"]] == NAMES
    lines = (results / "transplant.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert cells[0][-1] == "asked"
    assert [row[0] for row in cells[2:]] == NAMES
    for name, row in zip(NAMES, cells[2:], strict=True):
        told = held["models"][name]
        low, high = told["bits_per_byte_interval"]
        assert low <= told["bits_per_byte"] <= high
        assert row[1] == f"{told['bits_per_byte']:.3f}"
        if name == CUT:
            assert [bool(cell) for cell in row] == [True] * 4 + [False] * (len(row) - 4)
            continue
        assert row[-1] == f"{told['zero_shot']['asked']['acc_norm']:.3f}"
        assert told["zero_shot"]["asked"]["n"] == 4
        assert [*told["samples"]] == ["The dog"]
        made_up = name not in ("base", "donor")
        assert ("held_out" in told) == made_up == (row[6] != "") == (row[4] != "")
    zero = held["models"]["zero"]["held_out"]
    assert [zero[0][key] for key in ("n", "cosine", "error", "norm")] == [40, 0, 1, 0]


def by_hand(lm: Any, tokenizer: Any, texts: list[str]) -> tuple[float, list[int], list[float]]:
    """Bits per byte of a byte-level model, with transformers alone; predicted ids and nats."""
    n_bytes, ids, nats = 0, [], []
    for text in texts:
        whole = tokenizer(text).input_ids
        begins = whole[0] == tokenizer.bos_token_id
        with torch.no_grad():
            table = torch.log_softmax(lm(torch.tensor([whole])).logits[0].double(), -1)
        n_bytes += len(text.encode())
        n_bytes -= 0 if begins else len(tokenizer.decode(whole[:1]).encode())
        ids += whole[1:]
        nats += [-float(table[place - 1, whole[place]]) for place in range(1, len(whole))]
    return sum(nats) / np.log(2) / n_bytes, ids, nats


@pytest.mark.parametrize("name", ["base", "donor", "omp k=8", "zero"])
def test_figures_are_those_that_transformers_alone_gives(
    base: Path, tiny_model_dir: Path, out: Path, cfg: EvalConfig, held: dict[str, Any], name: str
) -> None:
    directory = {"base": base, "donor": tiny_model_dir}.get(name, out)
    lm: Any = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    # Both are byte-level: the same bytes are the same text.
    known = transformers.AutoTokenizer.from_pretrained(base).get_vocab()
    words = tokenizer.get_vocab()
    special = {*tokenizer.all_special_ids}
    new = {token for text, token in words.items() if text not in known and token not in special}
    if name == "zero":
        lm.get_input_embeddings().weight.data[[*new]] = 0
    expected, ids, nats = by_hand(lm, tokenizer, cfg.texts())
    told = held["models"][name]
    assert told["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert begins == (name != "donor")  # what begins a text is the base's convention
    if directory == out:
        those = [value for token, value in zip(ids, nats, strict=True) if token in new]
        assert 0 < len(those) < len(ids)
        assert told["tokens"]["new"]["n"] == len(those)
        assert told["tokens"]["new"]["nats"] == pytest.approx(np.mean(those), rel=1e-5)
        shares = [told["tokens"][kind]["share"] for kind in ("new", "shared")]
        assert sum(shares) == pytest.approx(1)
    x = tokenizer("The dog", return_tensors="pt").input_ids
    for _ in range(3):
        with torch.no_grad():
            x = torch.cat([x, lm(x).logits[:, -1:].argmax(-1)], 1)
    said = tokenizer.decode(x[0, -3:], skip_special_tokens=True)
    assert told["samples"] == {"The dog": said}


def test_the_base_reads_the_texts_in_the_pieces_of_the_donors_tokens(
    base: Path, tiny_model_dir: Path, cfg: EvalConfig, held: dict[str, Any]
) -> None:
    lm: Any = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    own, other = map(transformers.AutoTokenizer.from_pretrained, (base, tiny_model_dir))
    known, bits, pieces = own.get_vocab(), [], 0
    for text in cfg.texts():
        ids = [own.bos_token_id]
        for token in other.tokenize(text):
            piece = other.convert_tokens_to_string([token])
            alone = own(piece, add_special_tokens=False).input_ids
            ids += [known[token]] if token in known else alone
        pieces += len(ids) - len(own(text).input_ids)
        with torch.no_grad():
            table = torch.log_softmax(lm(torch.tensor([ids])).logits[0].double(), -1)
        nats = [-float(table[place - 1, ids[place]]) for place in range(1, len(ids))]
        bits.append(sum(nats) / np.log(2))
    assert pieces > 0
    told = held["models"][CUT]
    assert {*told} == {"bits_per_byte", "bits_per_byte_interval", "by_document", "above_out"}
    assert told["by_document"]["bits"] == pytest.approx(bits, rel=1e-5)
    n_bytes = [len(text.encode()) for text in cfg.texts()]
    assert told["by_document"]["bytes"] == n_bytes
    assert told["bits_per_byte"] == pytest.approx(sum(bits) / sum(n_bytes), rel=1e-5)


def test_all_models_stand_above_out_and_in_the_table_so(
    held: dict[str, Any], results: Path
) -> None:
    rows = (results / "transplant.md").read_text().splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[3].strip() for row in rows[2:]}
    ratios = {
        name: sum(told["by_document"]["bits"]) / sum(told["by_document"]["bytes"])
        for name, told in held["models"].items()
    }
    assert "above_out" not in held["models"]["omp k=8"]
    assert cells.pop("omp k=8") == ""
    assert [*cells] == [name for name in NAMES if name != "omp k=8"]
    for name, cell in cells.items():
        told = held["models"][name]["above_out"]
        low, high = told["bits_per_byte_interval"]
        assert told["bits_per_byte"] == pytest.approx(ratios[name] - ratios["omp k=8"])
        assert low <= told["bits_per_byte"] <= high
        assert low < high
        assert cell == f"{told['bits_per_byte']:+.3f} ({low:.3f} to {high:.3f})"


def test_texts_are_distinct_cut_and_drawn_by_the_seed(cfg: EvalConfig) -> None:
    distinct = [line.strip()[:50].strip() for line in LINES]
    assert dataclasses.replace(cfg, documents=99).texts() == distinct
    draws = [dataclasses.replace(cfg, documents=2, seed=seed).texts() for seed in range(6)]
    assert draws == [dataclasses.replace(cfg, documents=2, seed=seed).texts() for seed in range(6)]
    assert len({tuple(drawn) for drawn in draws}) > 1
    assert all(len({*drawn}) == 2 and {*drawn} <= {*distinct} for drawn in draws)


class StoppedError(Exception):
    pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were measured."""
    seen: list[str] = []
    measure, measure_cut = evaluation.measure, evaluation.measure_cut

    def counted(speaker: Any, cfg: Any, name: str, kinds: Any) -> Any:
        seen.append(name)
        return measure(speaker, cfg, name, kinds)

    def counted_cut(*arguments: Any) -> Any:
        seen.append(CUT)
        return measure_cut(*arguments)

    monkeypatch.setattr(evaluation, "measure", counted)
    monkeypatch.setattr(evaluation, "measure_cut", counted_cut)
    return seen


def test_a_second_call_measures_nothing_and_gives_the_same(
    out: Path, cfg: EvalConfig, results: Path, held: dict[str, Any], calls: list[str]
) -> None:
    before = {file.name: file.read_bytes() for file in results.iterdir()}
    assert {*before} == {"transplant.json", "transplant.md"}
    assert evaluate(out, cfg, results) == held
    assert not calls
    assert {file.name: file.read_bytes() for file in results.iterdir()} == before


@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_what_was_stopped_goes_on_to_the_same_results(
    out: Path, cfg: EvalConfig, results: Path, calls: list[str], tmp_path: Path, at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    counted = evaluation.measure

    def stopping(speaker: Any, cfg: Any, name: str, kinds: Any) -> Any:
        if name == NAMES[at]:
            raise StoppedError
        return counted(speaker, cfg, name, kinds)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measure", stopping)
        with pytest.raises(StoppedError):
            evaluate(out, cfg, tmp_path / "new" / "place")
    assert calls == NAMES[:at]
    evaluate(out, cfg, tmp_path / "new" / "place")
    assert calls == NAMES  # each once
    for name in ("transplant.json", "transplant.md"):
        assert (tmp_path / "new" / "place" / name).read_text() == (results / name).read_text()


def test_results_of_other_figures_are_not_mixed(
    out: Path, cfg: EvalConfig, held: dict[str, Any], calls: list[str], tmp_path: Path
) -> None:
    """Those written before bits were counted by the text's bytes."""
    settings = {key: value for key, value in held["settings"].items() if key != "figures"}
    (tmp_path / "transplant.json").write_text(json.dumps(held | {"settings": settings}))
    with pytest.raises(UserError, match="other settings"):
        evaluate(out, cfg, tmp_path)
    assert not calls


@pytest.mark.parametrize(
    "other", [{"documents": 2}, {"seed": 1}, {"characters": 49}, {"zero_shot": ()}, {"held_out": 9}]
)
def test_results_of_other_settings_are_neither_mixed_nor_written_over(
    out: Path, cfg: EvalConfig, results: Path, calls: list[str], other: dict[str, Any]
) -> None:
    before = (results / "transplant.json").read_bytes()
    with pytest.raises(UserError, match="other settings"):
        evaluate(out, dataclasses.replace(cfg, **other), results)
    assert (results / "transplant.json").read_bytes() == before
    assert not calls


def test_questions_that_were_written_over_are_other_settings(
    out: Path, cfg: EvalConfig, calls: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "own.jsonl"
    content = cfg.zero_shot[0].read_text()
    file.write_text(content)
    cfg = dataclasses.replace(cfg, zero_shot=(file,), methods=())
    evaluate(out, cfg, tmp_path / "results")
    assert calls == NAMES[:4]
    file.write_text(content.replace("an oak", "an ash"))
    with pytest.raises(UserError, match="other settings"):
        evaluate(out, cfg, tmp_path / "results")


def test_methods_can_be_added_to_results(
    out: Path, cfg: EvalConfig, held: dict[str, Any], calls: list[str], tmp_path: Path
) -> None:
    for methods in ((), (Mean(),), (OWN, Mean(), Zero(), Zero())):
        told = evaluate(out, dataclasses.replace(cfg, methods=methods), tmp_path)
    assert calls == ["base", CUT, "donor", "omp k=8", "mean", "zero"]
    for name in calls:
        assert json.loads(json.dumps(told["models"][name])) == held["models"][name]


def test_a_pursuit_is_run_once_for_all_k_and_gives_what_separate_runs_give(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, made = read_transplant(out)
    assert made.method == OWN
    problems = pair.problems()
    centred = OMPMixing(k=2, centre=True)
    methods = (OWN, *OTHERS, OMPMixing(k=5), centred)
    apart = {method: method.rows(problems[0], 0) for method in methods}
    ran: list[OMPMixing] = []
    codes = OMPMixing.codes

    def counted(self: OMPMixing, problem: Any) -> Any:
        ran.append(self)
        return codes(self, problem)

    monkeypatch.setattr(OMPMixing, "codes", counted)
    rows = Rows(problems, methods, 0)
    for method in reversed(methods):
        (found,) = rows.made(method)
        np.testing.assert_allclose(found, apart[method], rtol=1e-3, atol=1e-4)
    assert ran == [centred, OWN]  # another setting is another path
    assert not np.allclose(apart[OWN], apart[OMPMixing(k=3)], atol=1e-2)


PAIRS = {
    "both tied": ({"tied": True}, {"tied": True}),
    "both untied": ({"tied": False}, {"tied": False}),
    "head and embedding from one": ({"tied": False}, {"tied": True}),
    "a head with a bias": ({"tied": False, "kind": "phi"}, {"tied": False}),
    "a bias beside one matrix": ({"tied": False, "kind": "phi"}, {"tied": True}),
}


@pytest.mark.parametrize("kinds", PAIRS.values(), ids=[*PAIRS])
@pytest.mark.parametrize("method", [OWN, Random()], ids=label)
def test_rows_put_in_for_outs_own_method_are_outs(
    tmp_path: Path, kinds: tuple[dict[str, Any], ...], method: Method
) -> None:
    base = make_model(tmp_path / "base", 16, **kinds[0])
    donor = make_model(tmp_path / "donor", 24, **kinds[1], words="zebra zebu zenith " * 9)
    output = tmp_path / "out"
    transplant(TransplantConfig(base, donor, output, method))
    pair, made = read_transplant(output)
    problems = pair.problems()
    speaker = Speaker.load(output)
    x = torch.arange(4, 40, device=speaker.model.device)[None]

    def logits() -> np.ndarray:
        with torch.no_grad():
            return speaker.model(x).logits[0].cpu().numpy()

    untouched = logits()
    rows = Rows(problems, (made.method, Zero()), made.seed)
    speaker.put(pair, pair.tensors(problems, rows.made(Zero())))
    zeroed = logits()
    new = pair.matching.new
    assert not np.allclose(zeroed[:, new], untouched[:, new], atol=1e-2)
    np.testing.assert_array_equal(zeroed[:, new], 0)
    speaker.put(pair, pair.tensors(problems, rows.made(made.method)))
    np.testing.assert_allclose(logits(), untouched, rtol=1e-5, atol=1e-5)


def test_models_with_heads_of_their_own_are_judged_in_both_matrices(
    tiny_model_dir: Path, cfg: EvalConfig, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", 12, tied=False, begins=False)
    transplant(TransplantConfig(base, tiny_model_dir, tmp_path / "out", OMPMixing(k=12)))
    cfg = dataclasses.replace(cfg, zero_shot=(), methods=(Mean(),))
    told = evaluate(tmp_path / "out", cfg, tmp_path / "results")
    for name in ("omp k=12", "mean"):
        first, second = told["models"][name]["held_out"]
        assert first["n"] == second["n"] == 40
        assert first["error"] != second["error"]


def test_hiding_more_than_a_pursuit_can_spare_is_told_before_measuring(
    base: Path, tiny_model_dir: Path, cfg: EvalConfig, calls: list[str], tmp_path: Path
) -> None:
    transplant(TransplantConfig(base, tiny_model_dir, tmp_path / "out", OMPMixing(k=200)))
    cfg = dataclasses.replace(cfg, methods=(), zero_shot=(), held_out=10**6)
    with pytest.raises(UserError, match="omp k=200, with shared tokens held out: "):
        evaluate(tmp_path / "out", cfg, tmp_path / "results")
    assert calls == ["base", CUT, "donor"]


def test_what_is_no_transplant_is_told(
    base: Path, out: Path, cfg: EvalConfig, results: Path, tmp_path: Path, calls: list[str]
) -> None:
    copy = tmp_path / "copy"
    transplant(TransplantConfig(base, base, copy, OWN))
    for place, words in (
        (tmp_path / "none", "none"), (base, "base"), (results, "transplant.json"), (copy, "copy"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            evaluate(place, cfg, tmp_path / "results")
    with pytest.raises(UserError, match="other settings"):
        evaluate(out, cfg, out)  # results in OUT itself, whose report has the same name
    assert not calls
    assert not (tmp_path / "results").exists()


def test_a_damaged_set_of_questions_is_told_before_anything_is_measured(
    out: Path, cfg: EvalConfig, calls: list[str], tmp_path: Path
) -> None:
    (tmp_path / "damaged.jsonl").write_text('{"query": 1}\n')
    for name in ("damaged", "missing"):
        files = (*cfg.zero_shot, tmp_path / f"{name}.jsonl")
        with pytest.raises(UserError, match=f"{name}.jsonl"):
            evaluate(out, dataclasses.replace(cfg, zero_shot=files), tmp_path / "results")
    assert not calls


def test_the_table_leaves_out_what_there_is_none_of(held: dict[str, Any]) -> None:
    told = json.loads(json.dumps(held))
    own = told["models"]["omp k=8"]
    own["tokens"]["new"] = {"nats": None, "share": 0.0, "n": 0}
    own["held_out"] = [{"n": 0}]
    row = next(line for line in markdown(told).splitlines() if "omp k=8" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [bool(cell) for cell in cells] == [
        True, True, True, False, False, True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (OMPMixing(), "omp k=64"), (OMPMixing(k=3, centre=True), "omp k=3 centre=True"),
        (Mean(), "mean"), (Focus(Static(Path("a.vec"))), "focus vectors=a.vec"),
        (Focus(Static(text=(Path("a"), Path("b")), epochs=1)), "focus text=a,b epochs=1"),
    ],
)  # fmt: skip
def test_labels_tell_apart_methods_that_differ(method: Method, name: str) -> None:
    assert label(method) == name


def settings(cfg: EvalConfig) -> list[str]:
    assert isinstance(cfg.corpus, Files)
    return [
        item
        for setting in (
            'corpus.kind="files"', f"corpus.paths={list(cfg.corpus.paths)}",
            'corpus.documents_are="lines"', "documents=2", "characters=50", "held_out=5",
            "new_tokens=2", 'prompts=["The [b]dog[/b]"]',
        )
        for item in ("--set", setting)
    ]  # fmt: skip


def test_the_command_prints_the_table_and_writes_both_files(
    run_command: Command, out: Path, cfg: EvalConfig, tmp_path: Path
) -> None:
    code, said, error = run_command(
        "evals.transplant", out, "--methods", "mean,zero", *settings(cfg), cwd=tmp_path
    )
    assert code == 0, error
    place = tmp_path / "runs" / "out-evals"
    held = json.loads((place / "transplant.json").read_text())
    assert [*held["models"]] == ["base", CUT, "donor", "omp k=8", "mean", "zero"]
    assert (place / "transplant.md").read_text() in said
    assert said.count("'The [b]dog[/b]' -> ") == 5
    assert "Traceback" not in error


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["evals.transplant", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        terminal.run_command(evaluation.main)
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "mean,nothing"], "'nothing'"),
        (["--methods", "all,mean"], "'all'"),
        (["--methods", "focus"], "static"),
        (["--set", "documents=0"], "documents"),
        (["--set", "prompts=['']"], "prompts"),
        (["--set", "zero_shot=['a/x.jsonl','b/x.jsonl']"], "zero_shot"),
        (["--set", "methods=[{name='focus',static={}}]"], "static"),
        (["--set", "methods=[{name='omp',k=0}]"], "methods"),
        (["--set", "unknown=1"], "unknown"),
        (["--config", "missing.toml"], "missing.toml"),
    ],
)
def test_mistakes_in_the_command_end_with_2_and_a_word(
    out: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, out, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert not calls
    assert not [*tmp_path.iterdir()]


def test_all_methods_are_those_that_need_no_settings(
    out: Path, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def told(*arguments: Any) -> dict[str, Any]:
        asked.extend(arguments)
        return held

    monkeypatch.setattr(evaluation, "evaluate", told)
    arguments = (
        out, "--methods", "all", "--set", "methods=[{name='omp',k=3}]", "--out", tmp_path / "here",
    )  # fmt: skip
    assert command(monkeypatch, *arguments) == 0
    place, cfg, results = asked
    assert (place, results) == (out, tmp_path / "here")
    known = {"omp", "zero", "mean", "random", "subword_mean", "neighbours", "landmarks"}
    names = [method.name for method in cfg.methods]
    assert names[0] == "omp"
    assert cfg.methods[0].k == 3
    assert sorted(names[1:]) == sorted(known)
