"""Judges: language models that are asked about texts, at an endpoint or on this machine.

    judge = Endpoint("endpoint", "https://api.openai.com/v1", "gpt-4o-mini").open()
    print(judge.estimate(prompts, max_tokens=100))
    answers = judge.ask(prompts, max_tokens=100)

Answers are kept as they come, a file each, under `judge/` in the cache folder (`DICTLEARN_CACHE`,
or the platform's own place for caches), by a hash of the judge, the prompt and max_tokens. What was
stopped goes on where it stood, and nothing is paid for twice, by several processes either. Any of
the files may be deleted at any time.

A key is read from the environment and goes into the request's header, nowhere else.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import requests
import torch
from pydantic import Field
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from activations import models
from activations.terminal import UserError, progress
from evals import kept

# What may be better a moment later: too many requests, and a server's own trouble.
_RETRIED = (408, 429, 500, 502, 503, 504)
# Seconds that a server's Retry-After may ask for.
_LONGEST_WAIT = 300
# Shorter keys, as "EMPTY", are no secrets, and are words that an answer may hold.
_SECRET = 8
_CHARACTERS_A_TOKEN = 4

# "cut": ended by max_tokens. Of "refused" and "too long" the answer is "".
State = Literal["answered", "cut", "refused", "too long"]
Answer = tuple[str, State]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What asking would take, of what is not kept yet.

    Attributes:
      requests: that would be made.
      tokens_in: of their prompts, at about 4 characters a token.
      tokens_out: of their answers, at most.
      cost: in the currency of the prices; None where none are told.
    """

    requests: int
    tokens_in: int
    tokens_out: int
    cost: float | None

    def __str__(self) -> str:
        told = (
            f"{self.requests:,} requests, about {self.tokens_in:,} tokens in (4 characters a "
            f"token), at most {self.tokens_out:,} out"
        )
        return told if self.cost is None else f"{told}, at most {self.cost:.2f} by the prices told"


class Judge:
    """A judge that answers prompts one by one, each with nothing before it, at temperature 0.

    Attributes:
      name: for people and results.
      states: how many answers there were of each `State`, kept ones included.
    """

    def __init__(
        self, name: str, identity: list[str], answer: Callable[[str, int], Answer], *,
        parallel: int = 1, price_in: float | None = None, price_out: float | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.states: collections.Counter[str] = collections.Counter()
        self._identity, self._answer, self._parallel = identity, answer, parallel
        self._prices = price_in, price_out

    def ask(self, prompts: list[str], *, max_tokens: int) -> list[str]:
        """An answer for each prompt; "" of one that was refused, or is too long for the model.

        Raises:
          UserError: an answer is not to be had. Those that came are kept.
        """
        there = {prompt: self._load(self._file(prompt, max_tokens)) for prompt in prompts}
        found = {prompt: answer for prompt, answer in there.items() if answer is not None}
        missing = [prompt for prompt in there if prompt not in found]
        with progress(total=len(missing), desc="judge", unit="answer", delay=3) as bar:
            found |= self._ask(missing, max_tokens, lambda: bar.update())
        answers = [found[prompt] for prompt in prompts]
        self.states.update(state for _, state in answers)
        return [text for text, _ in answers]

    def estimate(self, prompts: list[str], max_tokens: int) -> Estimate:
        """What `ask` would take."""
        asked = [
            prompt for prompt in dict.fromkeys(prompts)
            if self._load(self._file(prompt, max_tokens)) is None
        ]  # fmt: skip
        tokens_in = -(-sum(map(len, asked)) // _CHARACTERS_A_TOKEN)
        tokens_out = max_tokens * len(asked)
        price_in, price_out = self._prices
        cost = None
        if price_in is not None and price_out is not None:
            cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
        return Estimate(len(asked), tokens_in, tokens_out, cost)

    def _ask(
        self, prompts: list[str], max_tokens: int, came: Callable[[], Any]
    ) -> dict[str, Answer]:
        pool = concurrent.futures.ThreadPoolExecutor(self._parallel)
        asked = {pool.submit(self._keep, prompt, max_tokens): prompt for prompt in prompts}
        found = {}
        try:
            for done in concurrent.futures.as_completed(asked):
                found[asked[done]] = done.result()
                came()
        except UserError as error:
            pool.shutdown(cancel_futures=True)  # those under way may still come, and are kept
            kept = sum(self._load(self._file(p, max_tokens)) is not None for p in prompts)
            raise UserError(
                f"{self.name}: {error}. {kept} of {len(prompts)} answers came and are kept; the "
                "same command goes on from there"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _keep(self, prompt: str, max_tokens: int) -> Answer:
        """The answer, asked for where it is not kept yet."""

        def make() -> dict[str, Any]:
            answer, state = self._answer(prompt, max_tokens)
            told = {"judge": self.name, "prompt": prompt, "max_tokens": max_tokens}
            return told | {"answer": answer, "state": state}

        table = kept.kept(self._file(prompt, max_tokens), make)
        return table["answer"], table["state"]

    def _file(self, prompt: str, max_tokens: int) -> Path:
        return kept.place("judge", [*self._identity, prompt, max_tokens])

    @staticmethod
    def _load(file: Path) -> Answer | None:
        """What is kept, if it is there."""
        table = kept.read(file)
        return None if table is None else (table["answer"], table["state"])


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A server that speaks OpenAI's chat completions.

    Attributes:
      url: up to `/chat/completions`, e.g. "http://localhost:8000/v1".
      model: its name there.
      key_variable: the environment variable with the key; "" for a server that needs none.
      requests_per_minute: at most, retries apart.
      parallel: requests under way at once.
      timeout: seconds to wait for an answer.
      retries: of a request after a timeout, a lost connection, or status 408, 429 or 5xx; after
        what Retry-After says, or 0, 2, 4, 8, ... seconds.
      price_in, price_out: of a million tokens.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["endpoint"]
    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 500
    parallel: Annotated[int, Field(ge=1, le=256)] = 8
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60
    retries: Annotated[int, Field(ge=0, le=20)] = 6
    price_in: Annotated[float, Field(ge=0)] | None = None
    price_out: Annotated[float, Field(ge=0)] | None = None

    def open(self) -> Judge:
        """Nothing is asked yet.

        Raises:
          UserError: the key is missing, or does not look like one; the url is none, or holds more.
        """
        # Neither message repeats what was written: it may hold a key.
        if not re.fullmatch(r"https?://[^\s@?#]+", self.url):
            raise UserError(
                "judge.url: expected http://... or https://... up to /chat/completions, without "
                "user, query or fragment; a key belongs into the environment"
            )
        if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", self.key_variable):
            raise UserError(
                "judge.key_variable: expected the name of an environment variable, not the key"
            )
        return Judge(
            f"{self.model} at {self.url}", ["endpoint", self.url, self.model],
            _Client(self, _key(self.key_variable)).answer,
            parallel=self.parallel, price_in=self.price_in, price_out=self.price_out,
        )  # fmt: skip


def _key(variable: str) -> str:
    """The key; "" where none is needed."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"judge: the environment variable {variable} holds no key; set it, or name another as "
            'judge.key_variable ("" for a server that needs none)'
        )
    if not re.fullmatch(r"[!-~]+", key):  # a library's own message would show it
        raise UserError(f"judge: what {variable} holds is no key: it has spaces or odd characters")
    return key


class _Client:
    """An endpoint's HTTP side."""

    def __init__(self, told: Endpoint, key: str) -> None:
        self._told, self._key = told, key
        self._lock, self._next = threading.Lock(), 0.0
        retry = Retry(
            told.retries, status_forcelist=_RETRIED, allowed_methods=None, redirect=0,
            backoff_factor=1, backoff_max=60, raise_on_status=False,
            retry_after_max=_LONGEST_WAIT,
        )  # fmt: skip
        self._session = requests.Session()
        adapter = HTTPAdapter(max_retries=retry, pool_maxsize=told.parallel)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """One request, and its retries."""
        self._wait()
        body = {
            "model": self._told.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        try:
            response = self._session.post(
                f"{self._told.url.rstrip('/')}/chat/completions", json=body, auth=self._signed,
                timeout=self._told.timeout, allow_redirects=False,
            )  # fmt: skip
        except requests.RequestException as error:
            why = self._safe(str(error))
            raise UserError(f"no answer after {self._told.retries} retries ({why})") from None
        text = self._safe(response.content.decode("utf-8", "replace"))
        if response.status_code != 200:
            again = f" after {self._told.retries} retries"
            raise UserError(
                f"answers with status {response.status_code}"
                f"{again if response.status_code in _RETRIED else ''}: {text[:300]}"
            )
        return _content(text)

    def _signed(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # As `auth`, since requests puts a .netrc's password in the place of a plain header.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _safe(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _SECRET else text

    def _wait(self) -> None:
        """Until the next request may begin."""
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + 60 / self._told.requests_per_minute
        time.sleep(begin - now)


def _content(text: str) -> Answer:
    """The answer in a completion's JSON."""
    try:
        choice = json.loads(text)["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        if message.get("refusal") or reason == "content_filter":
            return "", "refused"
        content = message["content"]
        if not isinstance(content, str):
            if reason != "length":
                raise TypeError
            content = ""  # a model that thinks first was cut before it said anything
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise UserError(f"gives what is no chat completion: {text[:300]!r}") from None
    return content, "cut" if reason == "length" else "answered"


@dataclasses.dataclass(frozen=True)
class LocalModel:
    """A model on this machine, greedily; by its chat template where its tokenizer has one.

    Attributes:
      spec: see activations.models.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["model"]
    spec: str

    def open(self) -> Judge:
        """Load it.

        Raises:
          UserError: as `activations.models.load`.
        """
        model = models.load(self.spec)
        own = model.identity
        return Judge(
            f"{own.description} ({self.spec})",
            ["model", own.weights_sha256, own.tokenizer_sha256],
            lambda prompt, max_tokens: _generate(model, prompt, max_tokens),
        )


@torch.inference_mode()
def _generate(model: models.Model, prompt: str, max_tokens: int) -> Answer:
    tokenizer, ends = model.tokenizer, _ends(model)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
        ids = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) + max_tokens > model.bridge.cfg.n_ctx:
        return "", "too long"
    made = model.bridge.generate(
        torch.tensor([ids], device=model.bridge.cfg.device), max_new_tokens=max_tokens,
        do_sample=False, stop_at_eos=bool(ends), eos_token_id=ends,
        use_past_kv_cache=True, return_type="tokens", verbose=False,
    )[0, len(ids) :].tolist()  # fmt: skip
    end = next((i for i, token in enumerate(made) if token in ends), None)
    answer = tokenizer.decode(made[:end], skip_special_tokens=True)
    return answer, "cut" if end is None else "answered"


def _ends(model: models.Model) -> list[int]:
    """Tokens that end an answer: a chat model's turn mostly ends by another one than EOS."""
    told = model.bridge.original_model.generation_config.eos_token_id
    every = [model.tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])]
    return [i for i in dict.fromkeys(every) if i is not None]


JudgeConfig = Annotated[Endpoint | LocalModel, Field(discriminator="kind")]
