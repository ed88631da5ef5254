"""Documents -> sequences of tokens on disk, whose every token knows its document.

`sequences.npy` is [s 2 c] int32: tokens, and the document i of each. A token that gets no row has
~i = -i-1 instead: a special token that belongs to document i. Padding, after the last token of the
last sequence, has `PADDING`. Padding stands on the right, whatever side the tokenizer prefers:
attention is causal, so that no mask is needed and nothing before it changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from activations.corpora import Corpus
from activations.files import replace_file, replacing, sha256
from activations.store import SEQUENCES, VOCABULARY
from activations.terminal import UserError, progress

PADDING = np.iinfo(np.int32).min
Marks = Literal["bos", "eos", "none"]
# Sequences held before they are written.
_FLUSH = 1024


@dataclasses.dataclass(frozen=True)
class Written:
    """What `write` put on the disk. `exhausted`: the corpus ended before `max_tokens`."""

    n_sequences: int
    n_rows: int
    n_documents: int
    exhausted: bool
    files: dict[str, str]


def write(
    path: Path,
    corpus: Corpus,
    tokenizer: Any,
    *,
    context_length: int,
    max_tokens: int | None = None,
    marks: Marks = "bos",
    predicting: bool = False,
) -> Written:
    """Tokenise a corpus into `path`/sequences.npy and vocabulary.json, without holding it.

    Lines that stood before, anywhere in the corpus, are dropped. Documents follow one another in a
    sequence; what is left at the end is padded to a last sequence.

    Arguments:
      max_tokens: enough rows; the sequence that reaches it is whole.
      marks: "bos": each document and each sequence begins with BOS (EOS, where the tokenizer has no
        BOS; nothing, where it has neither), never twice. "eos": each document ends with EOS, and
        each sequence begins with BOS, where there is one. "none": no marks.
      predicting: only tokens that predict the next one count as rows (see `has_row`).

    Raises:
      UserError: the corpus holds no text, or no token that gets a row; there is no EOS.
    """
    vocabulary = np.zeros(0, np.int64)
    n_sequences = n_rows = n_documents = 0
    last_document, exhausted = -1, True
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    pieces = _marked(corpus.documents(), tokenizer, marks)
    head = None if marks == "none" else _bos(tokenizer, marks)
    with (
        replacing(path / SEQUENCES) as out,
        progress(total=max_tokens, unit="tok", unit_scale=True, desc="tokenise", delay=3) as bar,
    ):
        _write_header(out, 0, context_length)
        for block in _batched(_cut(pieces, context_length, head, pad), _FLUSH):
            sequences = np.stack(block)  # [s 2 c]
            rows = has_row(sequences[:, 1], predicting=predicting)
            if max_tokens is not None:
                reached = np.flatnonzero(n_rows + np.cumsum(rows.sum(axis=1)) >= max_tokens)
                if len(reached):
                    exhausted = False
                    sequences, rows = sequences[: reached[0] + 1], rows[: reached[0] + 1]
            out.write(sequences.tobytes())
            vocabulary = np.union1d(vocabulary, sequences[:, 0])
            n_sequences += len(sequences)
            n_rows += int(rows.sum())
            bar.update(int(rows.sum()))
            documents = np.unique(sequences[:, 1][rows])
            n_documents += int((documents > last_document).sum())  # documents come in order
            last_document = int(documents.max(initial=last_document))
            if not exhausted:
                break
        if not n_rows:
            raise UserError(
                "corpus: holds no text, or nothing but special tokens"
                if not n_sequences
                else "corpus: no token gets a row: "
                "there are only special tokens, or documents of one token"
            )
        out.seek(0)
        _write_header(out, n_sequences, context_length)
    _write_vocabulary(path / VOCABULARY, vocabulary, tokenizer)
    digests = {name: sha256(path / name) for name in (SEQUENCES, VOCABULARY)}
    return Written(n_sequences, n_rows, n_documents, exhausted, digests)


def has_row(document: np.ndarray, *, predicting: bool) -> np.ndarray:
    """Which tokens [... c] get a row: those that are neither special nor padding.

    Arguments:
      predicting: only those whose next token is a row's token of the same document, so that the
        cross-entropy there is defined; the last token of a sequence never is.
    """
    kept = document >= 0
    if predicting:
        kept[..., :-1] &= document[..., 1:] == document[..., :-1]
        kept[..., -1] = False
    return kept


def targets(document: np.ndarray) -> np.ndarray:
    """Which tokens [... c] the one before predicts: rows' tokens, and of the same document."""
    owner = np.where(document < 0, ~document, document)
    target = document >= 0
    target[..., 1:] &= owner[..., 1:] == owner[..., :-1]
    target[..., 0] = False
    return target


def positions(document: np.ndarray) -> np.ndarray:
    """Each token's distance [s c] from the beginning of its document in its sequence."""
    owner = np.where(document < 0, ~document, document)
    index = np.arange(owner.shape[1])
    begins = np.zeros(owner.shape, np.int64)
    begins[:, 1:] = np.where(owner[:, 1:] != owner[:, :-1], index[1:], 0)
    return index - np.maximum.accumulate(begins, axis=1)


def _write_vocabulary(file: Path, tokens: np.ndarray, tokenizer: Any) -> None:
    texts = tokenizer.batch_decode([[int(token)] for token in tokens])
    table = {str(token): text for token, text in zip(tokens, texts, strict=True)}
    replace_file(file, json.dumps(table, indent=0).encode())


def _write_header(out: Any, n_sequences: int, context_length: int) -> None:
    # numpy leaves room for the first axis to grow, so that both headers are of one length.
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<i4", "fortran_order": False, "shape": (n_sequences, 2, context_length)}
    )


def _bos(tokenizer: Any, marks: Marks) -> int | None:
    if tokenizer.bos_token_id is None and marks == "bos":
        return tokenizer.eos_token_id
    return tokenizer.bos_token_id


def _marked(documents: Iterable[str], tokenizer: Any, marks: Marks) -> Iterator[np.ndarray]:
    """Each document's tokens with its mark [2 n]."""
    bos, eos = _bos(tokenizer, marks), tokenizer.eos_token_id
    if marks == "eos" and eos is None:
        raise UserError('marks: "eos", but the tokenizer has no EOS; "bos" and "none" are left')
    special = np.array(sorted(tokenizer.all_special_ids), np.int32)
    for index, ids in enumerate(_tokenised(_without_repeats(documents), tokenizer)):
        if marks == "bos" and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if marks == "eos":
            ids = [*ids, eos]
        token = np.array(ids, np.int32)
        yield np.stack([token, np.where(np.isin(token, special), ~index, index).astype(np.int32)])


def _cut(
    pieces: Iterable[np.ndarray], length: int, head: int | None, pad: int
) -> Iterator[np.ndarray]:
    """Sequences [2 length] from the documents one after another, each begun by `head`."""
    left = np.empty((2, 0), np.int32)
    for piece in pieces:
        stream = np.concatenate([left, piece], axis=1)
        start = 0
        while (taken := _sequence(stream, start, length, head)) is not None:
            sequence, start = taken
            yield sequence
        left = stream[:, start:]
    if (left[1] >= 0).any():
        room = length - left.shape[1]
        padding = np.tile(np.array([[pad], [PADDING]], np.int32), room)
        taken = _sequence(np.concatenate([left, padding], axis=1), 0, length, head)
        assert taken is not None
        yield taken[0]


def _sequence(
    stream: np.ndarray, start: int, length: int, head: int | None
) -> tuple[np.ndarray, int] | None:
    """The sequence that begins at `start`, and where the next one does; None at the end."""
    if start >= stream.shape[1]:
        return None
    token, document = stream[:, start]
    marked = head is None or token == head
    end = start + length - (not marked)
    if end > stream.shape[1]:
        return None
    if marked:
        return stream[:, start:end], end
    mark = np.array([[head], [document if document < 0 else ~document]], np.int32)
    return np.concatenate([mark, stream[:, start:end]], axis=1), end


def _tokenised(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    for batch in _batched(documents, 64):
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """Each document without the lines that stood before; empty ones are left out.

    Repeats would put the same text on both sides of the split by document.
    """
    seen: set[bytes] = set()
    for document in documents:
        lines = []
        for line in document.splitlines(keepends=True):
            key = hashlib.blake2b(line.strip().encode(), digest_size=8).digest()
            if not line.strip() or key not in seen:
                seen.add(key)
                lines.append(line)
        text = "".join(lines)
        if text.strip():
            yield text
