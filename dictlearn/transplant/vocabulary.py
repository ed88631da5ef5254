"""A tokenizer's vocabulary as bytes: what its tokens stand for, in whatever alphabet they are.

Four ways of writing tokens down are read, from a Hugging Face directory's tokenizer.json or a
tiktoken file:

    byte-level   every byte is a letter of GPT-2's alphabet: `Ġthe` is b" the", `Ċ` is b"\\n"
    sentencepiece   `▁` is a space, `<0x0A>` is a byte: `▁the`, Unigram or BPE
    wordpiece    `##ing` goes on with a word, others begin one: `the` is b" the"
    tiktoken     a line a token: base64 of its bytes, and its id

Added tokens are text as it stands.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import importlib
import re
from pathlib import Path
from typing import Any

from activations.terminal import UserError
from dictlearn.interop.files import table

ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONVERT = "Have its own library write one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes:
      directory: where it was read.
      kind: how its tokens are written down, one of the four above.
      tokens: the bytes of each token that is no special one, by id.
      special: the text of each special token, by id.
      fallback: ids of tokens that stand for a single byte where no other token does.
      roles: the ids of the special tokens that begin a text ("bos"), end it ("eos"), ...
      added: ids of tokens that were added to the tokenizer and are no special ones.
    """

    directory: Path
    kind: str
    tokens: dict[int, bytes]
    special: dict[int, str]
    fallback: frozenset[int]
    roles: dict[str, int]
    added: frozenset[int] = frozenset()

    def __len__(self) -> int:
        """One more than the greatest id."""
        return max([*self.tokens, *self.special], default=-1) + 1

    def text(self, token: int) -> str:
        """A token as people read it."""
        if token in self.special:
            return self.special[token]
        return self.tokens.get(token, b"").decode("utf-8", "backslashreplace")

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; of a special one its text."""
        return self.tokens[token] if token in self.tokens else self.special[token].encode()

    @functools.cached_property
    def by_text(self) -> dict[str, int]:
        """Ids by what `text` gives, special tokens before others."""
        ids = {self.text(token): token for token in reversed(self.tokens)}
        return ids | {text: token for token, text in self.special.items()}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer itself.

        Raises:
          UserError: the directory has no tokenizer.json, or a damaged one; the library is missing.
        """
        try:
            tokenizers = importlib.import_module("tokenizers")
        except ImportError:
            raise UserError(
                "reading a tokenizer needs tokenizers: pip install 'dictlearn-interp[transplant]'"
            ) from None
        file = self.directory / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{self.directory}: holds no tokenizer.json. {_CONVERT}")
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{file}: cannot be read as a tokenizer ({error})") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the special tokens around it."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def read_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face directory.

    Which tokens begin, end and pad a text, the model's configs say where the tokenizer's settings
    do not. (Where those say null, there is none.)

    Raises:
      UserError: there is no tokenizer, it is damaged, or of a kind that is not understood.
    """
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the first is the older one
        settings |= table(directory / name) if (directory / name).exists() else {}
    file = directory / "tokenizer.json"
    if file.exists():
        kind, tokens, special, fallback, added = _from_json(file)
    else:
        kind, tokens, special, fallback, added = _from_tiktoken(directory, settings)
    by_text = {text: token for token, text in special.items()}
    roles = {}
    for role in ROLES:
        told = settings.get(f"{role}_token")
        text = told.get("content") if isinstance(told, dict) else told
        if text in by_text:
            roles[role] = by_text[text]
    # Configs often say that the token that ends texts begins them as well. As such it would be
    # matched first, and nothing would be left for the other model's end of text.
    roles |= {
        role: token
        for role, token in _roles_of_model(directory, special).items()
        if f"{role}_token" not in settings and (role != "bos" or token != roles.get("eos"))
    }
    return Vocabulary(directory, kind, tokens, special, fallback, roles, added)


def _roles_of_model(directory: Path, special: dict[int, str]) -> dict[str, int]:
    """Roles by the model's configs: older tokenizers, GPT-2's among them, name none themselves."""
    files = [directory / name for name in ("config.json", "generation_config.json")]
    configs = [table(file) for file in files if file.exists()]
    configs += [config.get("text_config") or {} for config in configs]
    roles: dict[str, int] = {}
    for config in configs:
        for role in ("bos", "eos", "pad"):
            ids = config.get(f"{role}_token_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            if isinstance(first, int) and first in special:
                roles.setdefault(role, first)
    return roles


_Parts = tuple[str, dict[int, bytes], dict[int, str], frozenset[int], frozenset[int]]


def _from_json(file: Path) -> _Parts:
    """From tokenizer.json, as the library `tokenizers` writes it."""
    held = table(file)
    try:
        model, added = held["model"], held.get("added_tokens") or []
        texts = model["vocab"]
        if isinstance(texts, list):  # Unigram
            texts = {text: token for token, (text, _) in enumerate(texts)}
        special = {entry["id"]: entry["content"] for entry in added if entry["special"]}
        plain = {entry["id"]: entry["content"].encode() for entry in added if not entry["special"]}
        kind = _kind(held)
        if kind is None:
            raise UserError(
                f"{file}: a {_type(model)} tokenizer whose tokens are written in a way that "
                "is not understood; those that are: byte-level BPE, SentencePiece (BPE or "
                "Unigram), WordPiece, tiktoken. Name another model with the same tokens in one of "
                "these forms"
            )
        read = _READ[kind]
        prefix = model.get("continuing_subword_prefix") or "##"
        tokens = {
            token: read(text, prefix) for text, token in texts.items() if token not in special
        }
        # SentencePiece's own pieces may be listed as added ones, too: they stay what they are.
        own = tokens.keys() if kind == "sentencepiece" else ()
        tokens |= {token: content for token, content in plain.items() if token not in own}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read as a tokenizer ({error!r})") from None
    fallback = frozenset(
        token
        for text, token in texts.items()
        if kind == "sentencepiece" and _BYTE.fullmatch(text) and token in tokens
    )
    return kind, tokens, special, fallback, frozenset(plain)


def _kind(held: dict[str, Any]) -> str | None:
    """How a tokenizer.json writes its tokens; None: in no way that is known here."""
    model = held["model"]
    parts = [
        part
        for name in ("normalizer", "pre_tokenizer", "decoder")
        for part in _flat(held.get(name))
    ]
    types = {part["type"] for part in parts}
    if _type(model) == "WordPiece":
        return "wordpiece"
    if _type(model) not in ("BPE", "Unigram") or model.get("end_of_word_suffix"):
        return None
    if "ByteLevel" in types:
        return "byte-level"
    spaces = "Metaspace" in types or any(
        "▁" in (part.get("content"), (part.get("pattern") or {}).get("String"))
        for part in parts
        if part["type"] == "Replace"
    )
    return "sentencepiece" if spaces or model.get("byte_fallback") else None


def _type(model: dict[str, Any]) -> str:
    """A model's type; old files, GPT-2's among them, do not name it."""
    keys = {"merges": "BPE", "max_input_chars_per_word": "WordPiece", "unk_id": "Unigram"}
    return model.get("type") or next((keys[key] for key in keys if key in model), "WordLevel")


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of a tokenizer.json and those inside it."""
    if part is None:
        return []
    inner = next((part[key] for key in part if isinstance(part[key], list)), [])
    return [part, *(step for one in inner if isinstance(one, dict) for step in _flat(one))]


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: a byte that can be seen is itself, others come after 255."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    hidden = (byte for byte in range(256) if byte not in seen)
    return {chr(byte): byte for byte in seen} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }


_ALPHABET = _alphabet()


def _byte_level(text: str, prefix: str) -> bytes:
    del prefix
    if all(letter in _ALPHABET for letter in text):
        return bytes(_ALPHABET[letter] for letter in text)
    return text.encode()


def _sentencepiece(text: str, prefix: str) -> bytes:
    del prefix
    if byte := _BYTE.fullmatch(text):
        return bytes([int(byte[1], 16)])
    return text.replace("▁", " ").encode()


def _wordpiece(text: str, prefix: str) -> bytes:
    return text.removeprefix(prefix).encode() if text.startswith(prefix) else f" {text}".encode()


_READ = {"byte-level": _byte_level, "sentencepiece": _sentencepiece, "wordpiece": _wordpiece}


def _from_tiktoken(directory: Path, settings: dict[str, Any]) -> _Parts:
    """From a file of base64 and ids, with the special tokens that tokenizer_config.json lists."""
    files = [*sorted(directory.glob("*.tiktoken")), directory / "tokenizer.model"]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise UserError(f"{directory}: holds no tokenizer.json and no tiktoken file. {_CONVERT}")
    tokens = {}
    try:
        for line in file.read_bytes().splitlines():
            if line.strip():
                token, rank = line.split()
                tokens[int(rank)] = base64.b64decode(token, validate=True)
    except (ValueError, binascii.Error):
        raise UserError(f"{file}: is no tiktoken file, and there is no other. {_CONVERT}") from None
    added = settings.get("added_tokens_decoder", {})
    special = {int(token): entry["content"] for token, entry in added.items()}
    return "tiktoken", tokens, special, frozenset(), frozenset()
