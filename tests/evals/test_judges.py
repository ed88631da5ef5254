"""Judges against a server of our own: answers, troubles, what is kept, and a key that stays put."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from activations import models
from activations.config import validate
from activations.terminal import UserError
from evals.judges import Endpoint, JudgeConfig, LocalModel

KEY = "sk-test-5e1f0c7a9d"
Reply = tuple[int, dict[str, str], Any]


class Server:
    """Answers chat completions by `reply(prompt, how often it was asked before)`."""

    def __init__(self) -> None:
        self.reply: Callable[[str, int], Reply] = lambda prompt, _: completion(f"re: {prompt}")
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once, self.most_at_once = 0, 0
        lock, server = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    before = sum(one == body for one in server.asked)
                    server.asked.append(body)
                    server.headers.append({"path": self.path, **dict(self.headers)})
                    server.times.append(time.monotonic())
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                status, headers, told = server.reply(prompt, before)
                with lock:
                    server.at_once -= 1
                content = told if isinstance(told, bytes) else json.dumps(told).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the one who asked has gone
                    pass

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

    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


def completion(text: str | None, reason: str = "stop", **more: Any) -> Reply:
    message = {"role": "assistant", "content": text, **more}
    return 200, {}, {"choices": [{"message": message, "finish_reason": reason}]}


@pytest.fixture
def server() -> Iterator[Server]:
    own = Server()
    yield own
    own.close()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "judge"


def endpoint(server: Server, **more: Any) -> Endpoint:
    settings: dict[str, Any] = {"requests_per_minute": 60_000, "retries": 1, "timeout": 5}
    return Endpoint("endpoint", server.url, "some-model", **(settings | more))


def holds_key(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


# Answers.


def test_answers_stand_in_the_order_of_their_prompts(server: Server) -> None:
    def reply(prompt: str, _: int) -> Reply:
        time.sleep(0.05 if prompt == "0" else 0)  # the first comes last
        return completion(f"re: {prompt}")

    server.reply = reply
    judge = endpoint(server).open()
    prompts = [str(i % 7) for i in range(10)]
    assert judge.ask(prompts, max_tokens=9) == [f"re: {prompt}" for prompt in prompts]
    assert sorted(server.prompts()) == sorted(set(prompts))  # none twice
    assert judge.states == {"answered": 10}
    for body, headers in zip(server.asked, server.headers, strict=True):
        assert headers["path"] == "/v1/chat/completions"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("some-model", 0, 9)
    assert judge.ask([], max_tokens=9) == []


def test_what_is_kept_is_not_asked_again(server: Server, folder: Path) -> None:
    endpoint(server).open().ask(["a", "b"], max_tokens=9)
    again = endpoint(server, parallel=2).open()
    assert again.ask(["b", "a", "c"], max_tokens=9) == ["re: b", "re: a", "re: c"]
    assert sorted(server.prompts()) == ["a", "b", "c"]
    again.ask(["a"], max_tokens=10)
    dataclasses.replace(endpoint(server), model="other").open().ask(["a"], max_tokens=9)
    assert len(server.asked) == 5
    for file in folder.glob("*.json"):
        file.write_bytes(file.read_bytes()[:20])  # damaged
    assert endpoint(server).open().ask(["a"], max_tokens=9) == ["re: a"]
    assert len(server.asked) == 6


def test_refused_cut_and_silent_answers_have_states(server: Server) -> None:
    replies = {
        "refusal": completion(None, refusal="I will not."),
        "filter": completion("bad", "content_filter"),
        "long": completion("and so", "length"),
        "thinks": completion(None, "length"),
        "well": completion("yes"),
    }
    server.reply = lambda prompt, _: replies[prompt]
    judge = endpoint(server).open()
    assert judge.ask(list(replies), max_tokens=9) == ["", "", "and so", "", "yes"]
    assert judge.states == {"refused": 2, "cut": 2, "answered": 1}
    again = endpoint(server).open()
    again.ask(list(replies), max_tokens=9)
    assert again.states == judge.states
    assert len(server.asked) == len(replies)


# Troubles.


def test_retry_after_is_waited_for(server: Server) -> None:
    def reply(prompt: str, before: int) -> Reply:
        if not before:
            return 429, {"Retry-After": "1"}, {"error": {"message": "slow down"}}
        return completion("now")

    server.reply = reply
    assert endpoint(server).open().ask(["a"], max_tokens=9) == ["now"]
    assert len(server.times) == 2
    assert server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_trouble_is_tried_again(server: Server, status: int) -> None:
    server.reply = lambda _, before: (status, {}, b"oh") if not before else completion("good")
    assert endpoint(server).open().ask(["a"], max_tokens=9) == ["good"]
    assert len(server.asked) == 2


def test_a_timeout_is_tried_again(server: Server) -> None:
    def reply(prompt: str, before: int) -> Reply:
        time.sleep(0 if before or prompt == "never" else 0.6)
        if prompt == "never":
            time.sleep(0.6)
        return completion("late")

    server.reply = reply
    judge = endpoint(server, timeout=0.3).open()
    assert judge.ask(["slow"], max_tokens=9) == ["late"]
    assert len(server.asked) == 2
    with pytest.raises(UserError, match=r"no answer after 1 retries .*timed out.* 0 of 1 answers"):
        judge.ask(["never"], max_tokens=9)


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        ((500, {}, b"on fire"), "status 500 after 1 retries: on fire", 2),
        ((429, {}, {"error": "quota"}), "status 429 after 1 retries.*quota", 2),
        ((401, {}, f"bad key {KEY}".encode()), r"status 401: bad key \[key\]", 1),
        ((400, {}, b"too many tokens"), "status 400: too many tokens", 1),
        ((302, {"Location": "/elsewhere"}, b""), "status 302", 1),
        ((200, {}, b"<html>hello</html>"), "no chat completion: '<html>", 1),
        ((200, {}, {"choices": []}), "no chat completion", 1),
        ((200, {}, {"choices": [{"message": {"content": 5}}]}), "no chat completion", 1),
        ((200, {}, [1]), "no chat completion", 1),
    ],
)
def test_what_cannot_be_had_is_told_and_the_rest_is_kept(
    server: Server, reply: Reply, message: str, requests: int, folder: Path, capfd: Any
) -> None:
    server.reply = lambda prompt, _: reply if prompt == "bad" else completion("good")
    judge = endpoint(server, parallel=1).open()
    with pytest.raises(UserError, match=message) as caught:
        judge.ask(["a", "b", "bad", "c"], max_tokens=9)
    first = server.prompts()
    assert first[: 2 + requests] == ["a", "b", *["bad"] * requests]
    late = first[2 + requests :]  # what had begun before the others were called off
    assert late in ([], ["c"])
    assert f"{2 + len(late)} of 4 answers came and are kept" in str(caught.value)
    assert KEY not in str(caught.value) + "".join(capfd.readouterr())
    assert not holds_key(folder.parent)
    server.reply = lambda *_: completion("good")
    assert judge.ask(["a", "b", "bad", "c"], max_tokens=9) == ["good"] * 4
    again = server.prompts()[len(first) :]
    assert again == (["bad"] if late else ["bad", "c"])


def test_nobody_at_home(server: Server) -> None:
    gone = dataclasses.replace(endpoint(server), url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(UserError, match="no answer after 0 retries"):
        gone.open().ask(["a"], max_tokens=9)


def test_parallel_and_pace_are_kept_to(server: Server) -> None:
    def reply(prompt: str, _: int) -> Reply:
        time.sleep(0.1)
        return completion("x")

    server.reply = reply
    endpoint(server, parallel=3).open().ask([str(i) for i in range(9)], max_tokens=9)
    assert server.most_at_once == 3
    server.times.clear()
    endpoint(server, requests_per_minute=600).open().ask(list("abcde"), max_tokens=9)
    assert server.times[-1] - server.times[0] >= 0.35  # 4 times 0.1 s, and the way there


def test_unwritable_caches_are_told(server: Server, folder: Path) -> None:
    folder.write_text("a file in the place of the folder")
    with pytest.raises(UserError, match="DICTLEARN_CACHE"):
        endpoint(server).open().ask(["a"], max_tokens=9)


# The key.


def test_the_key_is_nowhere_but_in_the_header(
    server: Server, folder: Path, capfd: Any, caplog: Any
) -> None:
    caplog.set_level("DEBUG")
    server.reply = lambda prompt, _: completion(f"your key is {KEY}")  # a server that tells it
    told = endpoint(server)
    judge = told.open()
    answers = judge.ask(["a"], max_tokens=9)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert answers == ["your key is [key]"]
    seen = [repr(judge), judge.name, repr(told), json.dumps(dataclasses.asdict(told))]
    seen += [str(judge.estimate(["b"], 9)), *capfd.readouterr(), caplog.text]
    assert KEY not in "".join(seen)
    assert list(folder.glob("*.json"))
    assert not holds_key(folder.parent)


def test_a_netrc_does_not_take_the_keys_place(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    endpoint(server).open().ask(["a"], max_tokens=9)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    endpoint(server, key_variable="").open().ask(["b"], max_tokens=9)
    assert [h.get("Authorization") for h in server.headers] == [f"Bearer {KEY}", None]


def test_keys_that_are_missing_or_misplaced(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY_KEY", " ")
    monkeypatch.setenv("ODD_KEY", "sk-secret\nHost: elsewhere")
    cases = {
        "NOT_SET_KEY": "variable NOT_SET_KEY holds no key",
        "EMPTY_KEY": "variable EMPTY_KEY holds no key",
        "ODD_KEY": "what ODD_KEY holds is no key",
        "sk-secret": "expected the name of an environment variable",
    }
    for variable, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            endpoint(server, key_variable=variable).open()
        assert "sk-secret" not in str(caught.value)
    for url in ("https://me:sk-secret@x.org/v1", "https://x.org/v1?key=sk-secret", "x.org"):
        with pytest.raises(UserError, match=r"judge\.url") as caught:
            dataclasses.replace(endpoint(server), url=url).open()
        assert "sk-secret" not in str(caught.value)
    assert not server.asked


# Stopped, resumed, and two at once.

ASKING = """
import sys
from evals.judges import Endpoint
judge = Endpoint("endpoint", sys.argv[1], "some-model", parallel=1, requests_per_minute=60000)
print(judge.open().ask([str(i) for i in range(12)], max_tokens=9))
"""


def start(server: Server) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ASKING, server.url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_kill_loses_only_what_was_under_way(server: Server, folder: Path) -> None:
    halfway = threading.Event()

    def reply(prompt: str, _: int) -> Reply:
        if prompt == "6" and not halfway.is_set():
            halfway.set()
            time.sleep(0.5)
        return completion(f"re: {prompt}")

    server.reply = reply
    process = start(server)
    assert halfway.wait(60)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    kept = list(folder.glob("*.json"))
    assert len(kept) == 6
    answers = endpoint(server).open().ask([str(i) for i in range(12)], max_tokens=9)
    assert answers == [f"re: {i}" for i in range(12)]
    # The one that was under way was asked for twice.
    assert sorted(server.prompts(), key=int) == sorted([*map(str, range(12)), "6"], key=int)
    assert KEY not in out + err
    assert not holds_key(folder.parent)


def test_two_at_once_pay_once(server: Server) -> None:
    def reply(prompt: str, _: int) -> Reply:
        time.sleep(0.05)
        return completion(f"re: {prompt}")

    server.reply = reply
    prompts = [str(i) for i in range(12)]
    found: list[list[str]] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(endpoint(server).open().ask(prompts, max_tokens=9))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"re: {i}" for i in range(12)]] * 2
    assert sorted(server.prompts()) == sorted(prompts)


# Estimates and settings.


def test_an_estimate_counts_what_is_not_kept(server: Server, folder: Path) -> None:
    judge = endpoint(server, price_in=2.0, price_out=8.0).open()
    prompts = ["x" * 400, "y" * 400, "y" * 400]
    told = judge.estimate(prompts, 50)
    assert (told.requests, told.tokens_in, told.tokens_out) == (2, 200, 100)
    assert told.cost == pytest.approx((200 * 2 + 100 * 8) / 1e6)
    judge.ask(prompts[:1], max_tokens=50)
    assert judge.estimate(prompts, 50).requests == 1
    assert judge.estimate(prompts, 51).requests == 2
    assert endpoint(server).open().estimate(prompts, 50).cost is None
    assert "1 requests" in str(judge.estimate(prompts, 50))
    for file in folder.glob("*.json"):
        file.write_bytes(b"{")  # damaged, so asked for again
    assert judge.estimate(prompts, 50).requests == 2


@dataclasses.dataclass(frozen=True)
class Holder:
    __pydantic_config__ = {"extra": "forbid"}

    judge: JudgeConfig


def test_settings_are_read_strictly() -> None:
    url = {"kind": "endpoint", "url": "http://localhost:8000/v1", "model": "m"}
    assert validate(Holder, {"judge": url}, "t").judge == Endpoint("endpoint", url["url"], "m")
    local = {"kind": "model", "spec": "dir:x"}
    assert validate(Holder, {"judge": local}, "t").judge == LocalModel("model", "dir:x")
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "judge: missing"),
        ({"judge": url | {"kind": "oracle"}}, "no kind 'oracle'"),
        ({"judge": url | {"parallel": 0}}, r"judge\.parallel"),
        ({"judge": url | {"timeout": float("inf")}}, r"judge\.timeout"),
        ({"judge": url | {"retrys": 3}}, r"Did you mean judge\.retries"),
        ({"judge": local | {"url": "x"}}, r"judge\.url: unknown key"),
    ]
    for table, message in bad:
        with pytest.raises(UserError, match=message):
            validate(Holder, table, "t")


# A model on this machine.


@pytest.fixture(scope="module")
def chatty_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    place = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(tiny_model_dir, place)
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} dog:{% endif %}"
    )
    (place / "chat_template.jinja").write_text(template)
    return place


def greedily(directory: Path, text: str, n: int, bos: bool) -> str:
    """Token by token, every one by a whole forward of the Hugging Face model."""
    model = models.load(f"dir:{directory}")
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [model.tokenizer.bos_token_id] * bos + ids
    made: list[int] = []
    with torch.inference_mode():
        for _ in range(n):
            logits = model.bridge(torch.tensor([ids + made]), return_type="logits", use_cache=False)
            made.append(int(logits[0, -1].argmax()))
    assert model.tokenizer.eos_token_id not in made
    return model.tokenizer.decode(made, skip_special_tokens=True)


def test_a_local_model_answers_greedily(tiny_model_dir: Path, folder: Path) -> None:
    judge = LocalModel("model", f"dir:{tiny_model_dir}").open()
    prompts = ["The lazy dog", "The quick", "fox " * 200]
    answers = judge.ask(prompts, max_tokens=12)
    assert answers[:2] == [greedily(tiny_model_dir, p, 12, bos=True) for p in prompts[:2]]
    assert len(set(answers)) == 3
    assert answers[2] == ""
    assert judge.states == {"cut": 2, "too long": 1}
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    assert LocalModel("model", f"dir:{tiny_model_dir}").open().ask(prompts, max_tokens=12) == (
        answers
    )
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*.json")} == kept


def test_a_chat_template_is_used(chatty_model_dir: Path) -> None:
    judge = LocalModel("model", f"dir:{chatty_model_dir}").open()
    (answer,) = judge.ask(["The fox"], max_tokens=8)
    assert answer == greedily(chatty_model_dir, "[user] The fox dog:", 8, bos=False)


def test_an_answer_ends_where_the_models_turn_does(chatty_model_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "ending"
    shutil.copytree(chatty_model_dir, place)
    tokenizer = models.load_tokenizer(f"dir:{place}")
    made = greedily(place, "[user] The fox dog:", 8, bos=False)
    ids = tokenizer(made, add_special_tokens=False)["input_ids"]
    told = {"eos_token_id": [tokenizer.eos_token_id, ids[3]]}
    (place / "generation_config.json").write_text(json.dumps(told))
    judge = LocalModel("model", f"dir:{place}").open()
    assert judge.ask(["The fox"], max_tokens=8) == [tokenizer.decode(ids[: ids.index(ids[3])])]
    assert judge.states == {"answered": 1}
