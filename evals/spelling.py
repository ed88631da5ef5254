"""First letters: the words of a tokenizer, prompts about them, and what a hook sees there.

    \\n{example} has the first letter: E\\n ... \\n{word} has the first letter:

The hook is read at the last token of the last word, whatever its place: the tokens after it are not
run, since attention is causal. Source: SAEBench 0.6.0, `absorption/prompting.py`, `vocab.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import numpy as np

from activations.hooks import HookReader
from activations.models import Model
from activations.terminal import UserError, progress

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = "{word} has the first letter:"
TRAIN_SHARE = 0.8


class TooFewWordsError(UserError):
    """The tokenizer has too few words for training and test."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts up to the word's last token, of one length, training ones first.

    Attributes:
      word: of each prompt, with its leading space.
      token: [n c].
      n_train: how many are for training.
      share: of the words that could have been asked for, how many are.
      counts: words of the vocabulary, words and prompts dropped because they tokenise to another
        number of tokens than most, and the tokens that would follow the word in a prompt.
    """

    word: tuple[str, ...]
    token: np.ndarray
    n_train: int
    share: float
    counts: dict[str, int]

    @property
    def letter(self) -> np.ndarray:
        """The place of each word's first letter in the alphabet [n]."""
        return np.array([LETTERS.index(word.strip()[0].lower()) for word in self.word])


def vocabulary(tokenizer: Any) -> list[str]:
    """Words that are one token: letters a-z of either case, with a leading space or without.

    In the order of their ids, each once.
    """
    words = {}
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        text = tokenizer.convert_tokens_to_string([token])
        if token.startswith("▁") and not text.startswith(" "):
            text = f" {text}"  # tokenizers after Llama's drop the space of a text's first token
        if re.fullmatch(r" ?[A-Za-z]+", text):
            words[text] = None
    return list(words)


def line(word: str) -> str:
    """A solved example."""
    return f"{TEMPLATE.format(word=word)} {word.strip()[0].upper()}"


def prompts(tokenizer: Any, *, n_words: int | None, n_examples: int, seed: int) -> Prompts:
    """One prompt for each of some words; examples come from the word's own half of the split.

    A word that splits into another number of tokens than most do, in its line of a prompt, is
    neither asked for nor an example.

    Arguments:
      n_words: a random sample; None for all.
      n_examples: lines before the one that is read.
      seed: of the sample, the split and the examples.

    Raises:
      TooFewWordsError: a half has no more words than a prompt has examples.
      UserError: the tokenizer is not one of the fast ones, which tell a token's place in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("absorption: needs a fast tokenizer (tokenizers library), got a slow one")
    words = vocabulary(tokenizer)
    usable = _usual(words, [len(ids) for ids in _ids(tokenizer, [f"\n{line(w)}" for w in words])])
    rng = np.random.default_rng([0x5350454C, seed])
    order = rng.permutation(len(usable))[:n_words]
    chosen = [usable[i] for i in order]
    n_train = int(len(chosen) * TRAIN_SHARE)
    halves = chosen[:n_train], chosen[n_train:]
    if min(map(len, halves)) <= n_examples:
        raise TooFewWordsError(
            f"absorption: {len(chosen)} words ({len(words)} in the vocabulary, {len(usable)} of "
            f"which are as many tokens as most) leave {min(map(len, halves))} for one half of the "
            f"split; a prompt takes {n_examples} and the word itself"
        )
    text = [_prompt(half, i, n_examples, rng) for half in halves for i in range(len(half))]
    found = _tokens(tokenizer, text)
    shape = Counter((len(ids), place) for ids, place in found).most_common(1)[0][0]
    kept = [i for i, (ids, place) in enumerate(found) if (len(ids), place) == shape]
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    return Prompts(
        word=tuple(chosen[i] for i in kept),
        token=np.array([[*start, *found[i][0][: shape[1] + 1]] for i in kept], np.int32),
        n_train=sum(i < n_train for i in kept),
        share=len(kept) / len(usable),
        counts={
            "vocabulary": len(words),
            "dropped_words": len(words) - len(usable),
            "dropped_prompts": len(chosen) - len(kept),
            "tokens_after_the_word": shape[0] - shape[1] - 1,
        },
    )


def _usual(words: list[str], lengths: list[int]) -> list[str]:
    """The words of the most frequent length."""
    if not words:
        return []
    usual = Counter(lengths).most_common(1)[0][0]
    return [word for word, length in zip(words, lengths, strict=True) if length == usual]


def _prompt(half: list[str], index: int, n_examples: int, rng: np.random.Generator) -> str:
    """The prompt of a half's word, up to the colon."""
    others = rng.choice(len(half) - 1, n_examples, replace=False)
    examples = [half[i + (i >= index)] for i in others]  # the word itself is passed over
    return "\n".join(["", *map(line, examples), TEMPLATE.format(word=half[index])])


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens without special ones."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _tokens(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], int]]:
    """Tokens of each prompt, and the place of the one that ends the word of its last line."""
    after = len(TEMPLATE.format(word=""))
    found = []
    coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for text, ids, spans in zip(texts, coded["input_ids"], coded["offset_mapping"], strict=True):
        last = len(text) - after - 1  # the word's last character
        place = max(i for i, (begin, end) in enumerate(spans) if begin <= last < end)
        found.append((ids, place))
    return found


def read(model: Model, hook: str, asked: Prompts, *, batch_size: int) -> np.ndarray:
    """What a hook sees at the last token of each prompt: float32 [n d].

    Raises:
      UserError: the model has no such hook.
    """
    reader = HookReader(model.bridge, (hook,))
    x = np.empty((len(asked.token), reader.widths[hook]), np.float32)
    with progress(total=len(x), unit="word", desc="first letters", delay=3) as bar:
        for first in range(0, len(x), batch_size):
            rows = slice(first, first + batch_size)
            x[rows] = reader.read(asked.token[rows])[hook][:, -1]
            bar.update(len(x[rows]))
    return x
