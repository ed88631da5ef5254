"""What the tests of dictlearn share: small stores and tokenizers, and a counter of compilations."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from activations.precision import DTYPES
from activations.store import Store
from activations.writer import write_store

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """A store of the given shards, each rows [n d] and their documents [n]."""

    def make(
        *shards: tuple[np.ndarray, np.ndarray], gradients: bool = False, **settings: Any
    ) -> Store:
        def datasets(x: np.ndarray, document: np.ndarray) -> dict[str, np.ndarray]:
            x = x.astype(DTYPES[settings.get("dtype", "float32")])
            rows = {f"activations/{HOOK}": x}
            if gradients:  # told from its activation at sight
                rows[f"gradients/{HOOK}"] = -x
            column = np.zeros(len(x), np.int32)
            columns = dict.fromkeys(("token", "sequence", "position"), column)
            return {**rows, **columns, "document": document.astype(np.int32)}

        path = tmp_path / "store"
        write_store(
            path,
            (datasets(*shard) for shard in shards),
            sequences=np.zeros((len(shards), 2, 8)),
            vocabulary={},
            request={},
            model={},
            corpus={},
            forward={},
            hooks={HOOK: shards[0][0].shape[1]},
            context_length=8,
            n_documents=len(shards),
            shard_sequences=1,
            dropped_positions=("special",),
            gradients=gradients,
            **settings,
        )
        return Store(path)

    return make


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """A list that grows with everything that XLA compiles during the test."""
    names: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[..., Path]:
    """`write_tokenizer(directory, kind, words)`: a tokenizer of any kind that has these words.

    Special tokens have the first ids; then come single bytes or letters, then the words (" the"
    begins with a space) with all that they begin with, then `plain` added tokens. `config` is
    tokenizer_config.json. Kinds: byte-level, sentencepiece (BPE, bytes for what it has no letter
    for), unigram, wordpiece, tiktoken (no tokenizer.json).
    """
    tokenizers = pytest.importorskip("tokenizers", reason="the [transplant] extra is missing")
    models, steps = tokenizers.models, tokenizers.pre_tokenizers
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    as_bytes = steps.ByteLevel(add_prefix_space=False, use_regex=False)

    def bpe(units: list[str], words: list[str], special: tuple[str, ...], **options: Any) -> Any:
        known = dict.fromkeys([*special, *units])
        merges = []
        for word in words:
            for end in range(2, len(word) + 1):
                if word[:end] not in known:
                    known[word[:end]] = None
                    merges.append((word[: end - 1], word[end - 1]))
        vocab = {text: token for token, text in enumerate(known)}
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))

    def byte_level(words: list[str], special: tuple[str, ...]) -> Any:
        letters = [as_bytes.pre_tokenize_str(word)[0][0] for word in words]
        made = bpe(sorted(steps.ByteLevel.alphabet()), letters, special, ignore_merges=True)
        made.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        return made

    def sentencepiece(words: list[str], special: tuple[str, ...]) -> Any:
        pieces = [word.replace(" ", "▁") for word in words]
        units = [f"<0x{byte:02X}>" for byte in range(256)] + sorted({*"▁".join(pieces)})
        made = bpe(units, pieces, special, byte_fallback=True, fuse_unk=True)
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return made

    def unigram(words: list[str], special: tuple[str, ...]) -> Any:
        pieces = [word.replace(" ", "▁") for word in words]
        letters = dict.fromkeys("▁".join(pieces), -9.0)
        scores = dict.fromkeys(special, 0.0) | letters | dict.fromkeys(pieces, -2.0)
        made = tokenizers.Tokenizer(models.Unigram([*scores.items()], unk_id=0))
        made.pre_tokenizer = steps.Metaspace(prepend_scheme="never")
        made.decoder = decoders.Metaspace(prepend_scheme="never")
        return made

    def wordpiece(words: list[str], special: tuple[str, ...]) -> Any:
        pieces = [word[1:] if word.startswith(" ") else f"##{word}" for word in words]
        letters = sorted({*"".join(words)} - {" "})
        known = [*special, *letters, *(f"##{letter}" for letter in letters), *pieces]
        vocab = {text: token for token, text in enumerate(dict.fromkeys(known))}
        made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special[0]))
        made.pre_tokenizer = steps.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        return made

    def tiktoken(directory: Path, words: list[str], special: tuple[str, ...]) -> dict[str, Any]:
        contents = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
        ids = {content: token for token, content in enumerate(dict.fromkeys(contents))}
        (directory / "own.tiktoken").write_text(
            "".join(f"{base64.b64encode(content).decode()} {ids[content]}\n" for content in ids)
        )
        added = {str(len(ids) + i): {"content": text} for i, text in enumerate(special)}
        return {"added_tokens_decoder": added}

    makers = {
        "byte-level": byte_level,
        "sentencepiece": sentencepiece,
        "unigram": unigram,
        "wordpiece": wordpiece,
    }

    def write(
        directory: Path,
        kind: str,
        words: list[str],
        special: tuple[str, ...] = ("<s>", "</s>"),
        plain: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
        change: Callable[[Any], None] = lambda made: None,
    ) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        settings = {} if config is None else config
        if kind == "tiktoken":
            settings = tiktoken(directory, words, special) | settings
        else:
            made = makers[kind](words, special)
            made.add_special_tokens([*special])
            made.add_tokens([*plain])
            change(made)
            made.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        return directory

    return write
