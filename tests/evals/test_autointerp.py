"""Automatic interpretation: windows against brute force, planted latents, judges that know."""

from __future__ import annotations

import collections
import dataclasses
import http.server
import json
import re
import shutil
import string
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from scipy.stats import rankdata

from activations import models
from activations.config import validate
from activations.hooks import HookReader
from activations.models import Model
from activations.terminal import UserError
from dictlearn.dictionary import Coder
from dictlearn.encoders.omp import OMP
from evals import autointerp, results
from evals.autointerp import Config, family, windows
from evals.autointerp.family import ratings
from evals.autointerp.windows import Case, Text, draw
from evals.judges import Endpoint, LocalModel
from evals.recovery import plain_coder

HOOK, KEY = "blocks.0.hook_resid_pre", "sk-test-77ab90c2e1"
LETTERS = string.ascii_letters + string.digits
Judging = Callable[[str], str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path


# Windows.


def small(**more: Any) -> Config:
    settings: dict[str, Any] = {
        "judge": Endpoint("endpoint", "http://127.0.0.1:9/v1", "m"), "window": 3,
        "explain_top": 3, "explain_sampled": 2, "judge_top": 2, "judge_sampled": 1, "n_random": 4,
    }  # fmt: skip
    return Config(HOOK, **(settings | more))


def text_of(f: np.ndarray, kept: np.ndarray | None = None, window: int = 3) -> Text:
    """A text of sequences [s c], of which one latent fires by f; all in plain loops."""
    kept = np.ones(f.shape, bool) if kept is None else kept
    s, c = f.shape
    half = window // 2
    centres = [
        i * c + j
        for i in range(s)
        for j in range(half, c - half)
        if all(kept[i, j + o] for o in range(-half, half + 1))
    ]
    place = np.flatnonzero(kept)
    codes = scipy.sparse.csc_array(f.ravel()[place][:, None])
    token = np.arange(s * c).reshape(s, c)
    return Text(token, np.array(centres), place, codes)


def firings(seed: int, shape: tuple[int, int] = (12, 50), rate: float = 0.15) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.gamma(2, size=shape) * (rng.random(shape) < rate)


def case_of(text: Text, cfg: Config) -> Case:
    found = draw(text, 0, cfg)
    assert isinstance(found, Case)
    return found


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("sign", [1, -1])
def test_windows_are_what_they_are_called(window: int, sign: int) -> None:
    f = firings(0)
    kept = np.random.default_rng(1).random(f.shape) < 0.98
    text = text_of(sign * f * kept, kept, window)
    cfg = small(window=window)
    case = case_of(text, cfg)
    assert (case.tail, case.share, case.n_active) == (sign, 1.0, int((f * kept > 0).sum()))
    half, flat = window // 2, (f * kept).ravel()

    def around(centre: int) -> range:
        return range(centre - half, centre + half + 1)

    # All apart, and whole.
    covered = [i for centre in [*case.shown, *case.rated] for i in around(centre)]
    assert len(set(covered)) == len(covered)
    assert set(case.shown) | set(case.rated) <= set(text.centres)
    # The greatest, one after another.
    greatest: list[int] = []
    for centre in sorted(text.centres, key=lambda centre: -flat[centre]):
        if len(greatest) < 5 and all(abs(centre - other) > 2 * half for other in greatest):
            greatest.append(centre)
    top = [*case.shown[:3], *case.rated[case.kind == "top"]]
    assert set(top) == set(greatest)
    assert collections.Counter(case.kind) == {
        "top": 2, "sampled": 1, "random": 4,
        **({"quiet": case.fires[case.kind == "random"].sum()} if len(case.kind) > 7 else {}),
    }  # fmt: skip
    for centre, kind, fires in zip(case.rated, case.kind, case.fires, strict=True):
        assert fires == any(flat[i] for i in around(centre))
        assert flat[centre] > 0 or kind in ("random", "quiet")
        assert not (kind == "quiet" and fires)
    assert (~case.fires).sum() == cfg.n_random
    for centre, marked in zip(case.shown, case.marked, strict=True):
        assert list(marked) == [flat[i] > 0.01 * flat.max() for i in around(centre)]


def test_the_heavier_tail_is_explained_and_either_sign_is_a_firing() -> None:
    f = firings(2)
    other = np.roll(f, 7, axis=1) * (np.random.default_rng(0).random(f.shape) < 0.4) * (f == 0)
    case = case_of(text_of(other - f), small())
    assert case.tail == -1
    assert case.share == pytest.approx(f.sum() / (f.sum() + other.sum()))
    assert case.n_active == (f > 0).sum()
    assert all(f.ravel()[case.shown] > 0)
    quiet = case.rated[~case.fires]
    assert not any((f + other).ravel()[centre + o] for centre in quiet for o in (-1, 0, 1))


def test_sampling_is_in_proportion_to_the_square() -> None:
    f = np.zeros((1, 400))
    f[0, 5:395:10] = 1
    f[0, 5:65:10] = 3  # 6 of 39
    f[0, [355, 385]] = 10  # the top, of which nothing is left
    text = text_of(f)
    few = small(explain_top=1, judge_top=1, explain_sampled=1, judge_sampled=0, n_random=1)
    drawn = [
        f[0, case_of(text, dataclasses.replace(few, seed=seed)).shown[1]] for seed in range(400)
    ]
    share = np.mean(np.array(drawn) == 3)
    expected = 6 * 9 / (6 * 9 + 31)
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 400)
    assert set(drawn) == {1, 3}


def test_a_seed_draws_the_same_again() -> None:
    text = text_of(firings(3))
    one, again, other = (case_of(text, small(seed=seed)) for seed in (4, 4, 5))
    np.testing.assert_array_equal(one.rated, again.rated)
    np.testing.assert_array_equal(one.shown, again.shown)
    assert list(one.rated) != list(other.rated)


def test_latents_with_too_few_windows_are_passed_over_and_counted() -> None:
    rare, dense = np.zeros((4, 40)), np.ones((4, 40))
    rare[0, 10::5] = 1  # 6 windows, of which 8 are needed
    normal = firings(4, (4, 40), 0.3)
    assert draw(text_of(rare), 0, small()) == "too few firings"
    assert draw(text_of(dense), 0, small()) == "too few windows without a firing"
    one = text_of(normal)
    codes = scipy.sparse.csc_array(np.stack([0 * rare, rare, dense, normal]).reshape(4, -1).T)
    cases, passed_over = windows.draw_all(dataclasses.replace(one, codes=codes), small())
    assert [case.latent for case in cases] == [3]
    assert passed_over == {"too few firings": 2, "too few windows without a firing": 1}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1: 0\n2: 10\n3: 5", [0, 10, 5]),
        ("**1**: 7/10\n**2** : 2\nExcerpt 3 = 4.5", [7, 2, 4.5]),
        ('{"1": 3, "2": 0, "3": 9}', [3, 0, 9]),
        ("1: 0\n2: 10", None),
        ("1: 0\n2: 10\n2: 5", None),
        ("1: 0\n2: 11\n3: 5", None),
        ("1: 0\n3: 1\n2: 5", None),
        ("1: 0\n2: -1\n3: 5", None),
        ("1: 0\n2: .5\n3: 5", None),
        ("0, 10, 5", None),
        ("I cannot help with that.", None),
        ("", None),
    ],
)
def test_ratings_are_read_or_not(answer: str, expected: list[float] | None) -> None:
    found = ratings(answer, 3)
    assert (None if found is None else list(found)) == expected


def test_scores_are_those_of_plain_counts() -> None:
    rng = np.random.default_rng(0)
    text = text_of(firings(0, rate=0.25))
    for seed in range(20):
        case = case_of(text, small(seed=seed))
        assert (case.kind == "quiet").any() or seed
        rated = rng.integers(0, 11, len(case.rated)).astype(float)
        positive = np.isin(case.kind, ["top", "sampled"])
        negative = ~case.fires
        ranks = rankdata(rated[positive | negative])
        n, m = positive.sum(), negative.sum()
        above = ranks[positive[positive | negative]].sum() - n * (n + 1) / 2
        mixed = case.kind != "quiet"
        right = sum((r >= 5) == p for r, p in zip(rated[mixed], positive[mixed], strict=True))
        assert family.scores(case, rated) == pytest.approx(
            {
                "score": above / (n * m),
                "balanced_accuracy": (
                    (rated[positive] >= 5).mean() + (rated[negative] < 5).mean()
                ) / 2,
                "accuracy_saebench060": right / 7,
            }
        )  # fmt: skip


# A model whose latents are letters, before judges.


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return models.load(f"dir:{tiny_model_dir}")


@pytest.fixture(scope="module")
def token(model: Model) -> np.ndarray:
    rng = np.random.default_rng(0)
    ids = np.array([model.tokenizer(letter)["input_ids"][-1] for letter in LETTERS])
    found = ids[rng.integers(0, len(ids), (64, 60))]
    found[:, 0] = model.tokenizer.bos_token_id
    return found.astype(np.int32)


def letters_coder(model: Model, flipped: int = 0) -> Coder:
    """Latent i fires on the i-th letter, and nowhere else; some of them negatively."""
    ids = np.array([[model.tokenizer(letter)["input_ids"][-1] for letter in LETTERS]], np.int32)
    x = HookReader(model.bridge, (HOOK,)).read(ids)[HOOK][0]
    atoms = x / np.linalg.norm(x, axis=1, keepdims=True)
    atoms[:flipped] *= -1
    return plain_coder(atoms, OMP(k=1))


class Server:
    """Answers each prompt by `judge(prompt)`; None is a failure."""

    def __init__(self) -> None:
        self.judge: Callable[[str], str | None] = lambda prompt: ""
        self.prompts: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                server.prompts.append(prompt)
                answer = server.judge(prompt)
                told = {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
                content = json.dumps(told).encode()
                self.send_response(200 if answer is not None else 400)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    own = Server()
    yield own
    own.close()


def config(server: Server, **more: Any) -> Config:
    judge = Endpoint("endpoint", server.url, "m", requests_per_minute=60_000, retries=0)
    return Config(HOOK, judge, **({"window": 3, "n_latents": 12} | more))


def asked_windows(prompt: str) -> list[str]:
    lines = prompt.split("\n\n")[2].split("\n")
    return [line.partition(": ")[2] for line in lines]


def oracle(prompt: str) -> str:
    """Explains by the letter that is marked most often; says where the explanation's letter is."""
    if "<<" in prompt:
        marked = re.findall("<<(.)>>", prompt)
        ((letter, count),) = collections.Counter(marked).most_common(1)
        assert count == len(marked)  # a latent fires on one letter
        return f"the letter\n {letter}"
    found = re.search(r"active on: the letter (.)\n", prompt)
    return "\n".join(
        f"{i}: {10 if found and found[1] in window else 0}"
        for i, window in enumerate(asked_windows(prompt), 1)
    )


def test_a_judge_that_knows(server: Server, model: Model, token: np.ndarray, capfd: Any) -> None:
    server.judge = oracle
    cfg = config(server)
    result = autointerp.run(letters_coder(model, flipped=31), model, token, cfg)
    own = result.metrics["autointerp"]
    assert not result.null
    assert (own["n_latents"], own["unread_share"]) == (12, 0)
    assert (own["autointerp_score"], own["balanced_accuracy"]) == (1, 1)
    assert own["autointerp_score_interval"] == [1, 1]
    assert own["empty_score"] == own["empty_balanced_accuracy"] == 0.5
    assert own["gain_over_empty"] == 0.5
    # Another letter is as rare around firings as elsewhere.
    assert own["shuffled_score"] == pytest.approx(0.5, abs=0.03)
    low, high = own["gain_over_shuffled_interval"]
    assert 0.4 < low <= own["gain_over_shuffled"] <= high < 0.6
    # SAEBench takes it for a mistake where the letter is in a random window.
    assert any(row["n_rated"] > 14 for row in result.details)
    for row in result.details:
        assert row["explanation"] == f"the letter {LETTERS[row['latent']]}"
        assert row["tail"] == (-1 if row["latent"] < 31 else 1)
        ids = model.tokenizer(LETTERS[row["latent"]])["input_ids"]
        assert row["n_active"] == (token == ids[-1]).sum()
        theirs = 1 - (row["n_rated"] - 14) / 14
        assert row["own_accuracy_saebench060"] == pytest.approx(theirs)
    positive = [row["n_rated"] for row in result.details if row["tail"] > 0]
    assert 2 <= len(positive) < 12
    theirs = np.mean([1 - (n - 14) / 14 for n in positive])
    assert own["autointerp_score_saebench060"] == pytest.approx(theirs)
    assert len(server.prompts) == 4 * 12
    assert "12 requests" in (err := capfd.readouterr().err)
    assert "36 requests" in err


def test_none_of_them_is_no_merit(server: Server, model: Model, token: np.ndarray) -> None:
    def none(prompt: str) -> str:
        if "<<" in prompt:
            return "something"
        return "\n".join(f"{i}: 0" for i in range(1, len(asked_windows(prompt)) + 1))

    server.judge = none
    own = autointerp.run(letters_coder(model), model, token, config(server)).metrics["autointerp"]
    assert own["autointerp_score"] == own["balanced_accuracy"] == own["shuffled_score"] == 0.5
    assert own["autointerp_score_saebench060"] == pytest.approx(10 / 14)
    assert own["always_none_saebench060"] == 10 / 14
    assert own["gain_over_shuffled_interval"] == [0, 0]


def test_the_other_explanation_is_another_latents(
    server: Server, model: Model, token: np.ndarray
) -> None:
    server.judge = oracle
    autointerp.run(letters_coder(model), model, token, config(server, n_latents=2))
    by_windows = collections.defaultdict(set)
    for prompt in server.prompts[2:]:
        by_windows[prompt.split("\n\n")[2]].add(prompt.split("\n")[0].partition("on: ")[2])
    assert len(by_windows) == 2
    one, other = by_windows.values()
    assert one == other
    assert len(one) == 3
    assert "(unknown)" in one


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_unread_answers_are_counted(
    server: Server, model: Model, token: np.ndarray, share: float
) -> None:
    def judge(prompt: str) -> str:
        answer, windows = oracle(prompt), prompt.split("\n\n")[2]
        # By the windows, so that all three answers of a latent are lost together.
        lost = "<<" not in prompt and hash_of(windows) < share
        return "I would rather not." if lost else answer

    server.judge = judge
    result = autointerp.run(letters_coder(model), model, token, config(server, n_latents=24))
    own = result.metrics["autointerp"]
    lost = sum("own_score" not in row for row in result.details)
    assert lost > 0
    assert own["unread_share"] == pytest.approx(lost / len(result.details))
    assert own["n_latents"] == len(result.details) - lost
    if own["unread_share"] <= 0.2:
        assert share == 0.1
        assert own["autointerp_score"] == 1
    else:
        assert share == 0.4
        assert own["autointerp_score"] is own["gain_over_shuffled_interval"] is None
        assert "cannot be read" in result.null["autointerp.autointerp_score"]


def hash_of(text: str) -> float:
    return sum(text.encode()) * 0.6180339887 % 1


def test_an_explanation_that_is_refused_is_unread(
    server: Server, model: Model, token: np.ndarray
) -> None:
    letters: list[str] = []

    def judge(prompt: str) -> str:
        answer = oracle(prompt)
        if "<<" in prompt:
            letters.append(answer)
        return "" if "<<" in prompt and len(letters) == 1 else answer

    server.judge = judge
    own = autointerp.run(letters_coder(model), model, token, config(server)).metrics["autointerp"]
    # Its own ratings are missing, and those by it of another latent.
    assert own["unread_share"] == pytest.approx(2 / 36)
    assert own["n_latents"] == 10
    assert own["autointerp_score"] == 1


def test_what_was_stopped_goes_on(
    server: Server, model: Model, token: np.ndarray, folder: Path, capfd: Any
) -> None:
    def failing(prompt: str) -> str | None:
        return oracle(prompt) if len(server.prompts) <= 24 else None

    server.judge = failing
    coder, cfg = letters_coder(model), config(server)
    with pytest.raises(UserError, match=r"status 400.* of 36 answers came and are kept"):
        autointerp.run(coder, model, token, cfg)
    kept = len(list(folder.rglob("judge/*.json")))
    before = len(server.prompts)
    server.judge = oracle
    result = autointerp.run(coder, model, token, cfg)
    assert kept + len(server.prompts) - before == 4 * 12
    assert autointerp.run(coder, model, token, cfg).metrics == result.metrics
    assert kept + len(server.prompts) - before == 4 * 12
    results.write(folder / "a.json", result, {"id": "x"})
    assert results.read(folder / "a.json")["eval_config"]["judge"]["key_variable"]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert not any(KEY.encode() in file.read_bytes() for file in files)
    assert KEY not in "".join(capfd.readouterr())


def test_a_local_model_that_cannot_judge_gives_null(
    tiny_model_dir: Path, tmp_path: Path, model: Model, token: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(family, "_EXPLANATION", 20)
    monkeypatch.setattr(family, "_RATING", 2)
    place = tmp_path / "roomy"
    shutil.copytree(tiny_model_dir, place)
    table = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(table | {"max_position_embeddings": 4096}))
    few = {"explain_top": 2, "explain_sampled": 0, "judge_top": 1, "judge_sampled": 0}
    cfg = Config(
        HOOK, LocalModel("model", f"dir:{place}"), window=3, n_latents=2, n_random=2, **few
    )
    result = autointerp.run(letters_coder(model), model, token, cfg)
    assert result.unstructured["answers"]["cut"] >= 6  # it said something, to no end
    assert all(row["explanation"] for row in result.details)
    own = result.metrics["autointerp"]
    assert own["unread_share"] == 1
    assert own["autointerp_score"] is None
    assert "100% of" in result.null["autointerp.autointerp_score"]


def test_too_few_latents_give_null_with_the_reason(
    server: Server, model: Model, token: np.ndarray
) -> None:
    result = autointerp.run(letters_coder(model), model, token[:2], config(server))
    own = result.metrics["autointerp"]
    assert own["autointerp_score"] is own["unread_share"] is None
    assert "'too few firings': 62" in result.null["autointerp.autointerp_score"]
    assert result.null["autointerp.unread_share"]
    # One latent alone has no other's explanation: nothing is asked, which may cost money.
    coder = letters_coder(model)
    one = plain_coder(np.asarray(coder.dictionary.atoms)[:1], OMP(k=1))
    own = autointerp.run(one, model, token, config(server, n_random=2, judge_sampled=0))
    assert own.metrics["autointerp"]["autointerp_score"] is None
    assert "fewer than 2 latents" in own.null["autointerp.autointerp_score"]
    assert not server.prompts


def test_mistakes_are_told(
    server: Server, model: Model, token: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    coder, cfg = letters_coder(model), config(server)

    def fails(match: str, *, coder: Coder = coder, **more: Any) -> None:
        with pytest.raises(UserError, match=match):
            autointerp.run(coder, model, token, dataclasses.replace(cfg, **more))

    fails("expected an odd number, got 4", window=4)
    fails("no 61 tokens", window=61)
    fails("no hook", hook="blocks.0.hook_resid_prr")
    fails("5 entries", coder=plain_coder(np.eye(4, 5, dtype=np.float32), OMP(k=1)))
    judge = dataclasses.asdict(cfg.judge)
    for table, match in (
        ({"hook": HOOK}, r"autointerp\.judge: missing, and it has no default"),
        ({"hook": HOOK, "judge": judge, "n_latents": 1}, r"autointerp\.n_latents"),
        ({"hook": HOOK, "judge": judge, "n_latent": 3}, "Did you mean"),
    ):
        with pytest.raises(UserError, match=match):
            validate(Config, table, "t", "autointerp.")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds no key"):
        autointerp.run(coder, None, token, cfg)  # pyright: ignore[reportArgumentType]
    assert not server.prompts


def test_documents_that_do_not_count_are_left_out(model: Model, token: np.ndarray) -> None:
    document = np.zeros(token.shape, int)
    document[:, :30] = -1
    document[1::2] = -1
    text = windows.read(letters_coder(model), model, token, small(tokens=500), document)
    np.testing.assert_array_equal(text.token, token[:34:2])  # 17 sequences that have 30 each
    column = text.centres % token.shape[1]
    assert (column.min(), column.max()) == (31, 58)
    assert len(text.place) == len(text.codes.toarray()) == 17 * 30
    letter = model.tokenizer("q")["input_ids"][-1]
    fires = text.of(LETTERS.index("q")).reshape(text.token.shape) != 0
    np.testing.assert_array_equal(fires, (text.token == letter) & (document[:34:2] >= 0))


def test_quick_is_less_of_the_same() -> None:
    cfg = small(n_latents=300).quick()
    assert (cfg.tokens, cfg.n_latents, cfg.window) == (65_536, 20, 3)
