"""Any text -> sequences of tokens with BOS, whose every token knows its document."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib
import itertools
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from activations.terminal import UserError


@dataclasses.dataclass(frozen=True)
class PythonDocs:
    """The English reference text inside every CPython (`pydoc_data`): a document a topic."""

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["python-docs"]

    def documents(self) -> Iterator[str]:
        """Each topic's text, in the order of the topics' names."""
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return (topics[name] for name in sorted(topics))

    def identity(self) -> dict[str, Any]:
        """What the text depends on beside this configuration."""
        return {"python": platform.python_version()}


@dataclasses.dataclass(frozen=True)
class Files:
    """Files of one's own: `.jsonl` and `.parquet` by their text field, anything else as text.

    Attributes:
      paths: files or globs (`**` descends), read in sorted order.
      documents_are: what one document is in a text file. jsonl and parquet: one a record.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["files"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    text_field: str = "text"
    documents_are: Literal["files", "paragraphs", "lines"] = "files"

    def documents(self) -> Iterator[str]:
        """Each document's text, file after file."""
        paths = [path for pattern in self.paths for path in self._matches(pattern)]
        for path in paths:
            yield from self._read(path)

    def identity(self) -> dict[str, Any]:
        """What the text depends on beside this configuration: its tokens' hash says enough."""
        return {}

    def _matches(self, pattern: str) -> list[Path]:
        if Path(pattern).is_file():  # whatever brackets its name holds
            return [Path(pattern)]
        found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not found:
            raise UserError(f"corpus.paths: no file matches {pattern!r}")
        return [Path(path) for path in found]

    def _read(self, path: Path) -> Iterator[str]:
        try:
            match path.suffix.lower():
                case ".jsonl":
                    yield from self._read_jsonl(path)
                case ".parquet":
                    yield from self._read_parquet(path)
                case _:
                    yield from self._read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"corpus file {path}: cannot be read ({error})") from None

    def _read_text(self, path: Path) -> Iterator[str]:
        if self.documents_are == "files":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as file:
            if self.documents_are == "lines":
                yield from file
            else:
                for blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
                    if not blank:
                        yield "".join(lines)

    def _read_jsonl(self, path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.text_field]
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"corpus file {path}, line {number}: expected a JSON object with a text "
                        f"field {self.text_field!r} ({type(error).__name__}: {error})"
                    ) from None
                yield _text(text, f"{path}, line {number}", self.text_field)

    def _read_parquet(self, path: Path) -> Iterator[str]:
        pyarrow, parquet = _import_arrow()
        try:
            file = parquet.ParquetFile(path)
            if self.text_field not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UserError(
                    f"corpus file {path}: no column {self.text_field!r}; it has {columns}"
                )
            for batch in file.iter_batches(columns=[self.text_field]):
                for text in batch.column(0).to_pylist():
                    yield _text(text, str(path), self.text_field)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"corpus file {path}: is not a parquet file ({error})") from None


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """A Hugging Face data set, streamed; `name` may also be a local data set directory."""

    __pydantic_config__ = {"extra": "forbid"}

    kind: Literal["hub"]
    name: str
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    revision: str | None = None

    def documents(self) -> Iterator[str]:
        """Each record's text, in the data set's own order."""
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise UserError(
                "a hub data set needs datasets: pip install 'dictlearn-interp[lm]'"
            ) from None
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our message says it all
        try:
            if not Path(self.name).exists():
                # One short question first: without a network, datasets retries for half a minute.
                hub = importlib.import_module("huggingface_hub")
                hub.HfApi().dataset_info(self.name, revision=self.revision, timeout=5)
            records: Iterable[dict[str, Any]] = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
            for record in records:
                if self.text_field not in record:
                    raise UserError(
                        f"data set {self.name}: no field {self.text_field!r}; "
                        f"it has {', '.join(record)}"
                    )
                yield _text(record[self.text_field], self.name, self.text_field)
        except UserError:
            raise
        except (
            Exception
        ) as error:  # datasets, pyarrow and the hub's client raise kinds of their own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise UserError(
                f"data set {self.name} (split {self.split!r}): cannot be read "
                f"({type(error).__name__}: {reason})"
            ) from None

    def identity(self) -> dict[str, Any]:
        """What the text depends on beside this configuration: its tokens' hash says enough."""
        return {}


Corpus = Annotated[PythonDocs | Files | HubDataset, Field(discriminator="kind")]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A corpus as sequences: `token` and `document` [s c]; a special token's document is -1."""

    token: np.ndarray
    document: np.ndarray
    exhausted: bool

    @property
    def n_rows(self) -> int:
        """Tokens that are not special: the rows a store will have."""
        return int((self.document >= 0).sum())

    @property
    def n_documents(self) -> int:
        """Documents that have at least one row."""
        return len(np.unique(self.document[self.document >= 0]))

    def sha256(self) -> str:
        """Of both arrays."""
        return hashlib.sha256(self.token.tobytes() + self.document.tobytes()).hexdigest()


def pack(
    corpus: PythonDocs | Files | HubDataset,
    tokenizer: Any,
    *,
    context_length: int,
    max_tokens: int | None,
) -> Packed:
    """Tokenise a corpus into sequences of `context_length`, each begun by BOS.

    Lines that stood before, anywhere in the corpus, are dropped. Documents follow one another in a
    sequence, each again begun by BOS (EOS where the tokenizer has no BOS; nothing where it has
    neither). What does not fill the last sequence is left out.

    Arguments:
      max_tokens: enough rows (special tokens not counted); the sequence that reaches it is whole.

    Raises:
      UserError: the corpus is empty, or shorter than one sequence.
    """
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    special = np.array(sorted(tokenizer.all_special_ids), np.int32)
    sequences: list[np.ndarray] = []
    rows, n_tokens = 0, 0
    stream = np.empty((2, 0), np.int32)  # [token/document, not yet in a sequence]
    documents = _tokenised(_without_repeats(corpus.documents()), tokenizer)
    for index, ids in enumerate(documents):
        owner = np.where(np.isin(ids, special), -1, index).astype(np.int32)
        n_tokens += len(ids)
        begun = stream.shape[1] > 0 and stream[0, -1] == bos
        mark = _marked(None if begun else bos)
        stream = np.concatenate([stream, mark, np.stack([ids, owner])], axis=1)
        start = 0
        while start < stream.shape[1]:
            mark = _marked(None if stream[0, start] == bos else bos)
            end = start + context_length - mark.shape[1]
            if end > stream.shape[1]:
                break
            sequences.append(np.concatenate([mark, stream[:, start:end]], axis=1))
            rows += int((sequences[-1][1] >= 0).sum())
            if max_tokens is not None and rows >= max_tokens:
                return _packed(sequences, exhausted=False)
            start = end
        stream = stream[:, start:]
    if not n_tokens:
        raise UserError("corpus: holds no text")
    if not rows:
        raise UserError(
            f"corpus: {n_tokens} tokens do not fill one sequence of context_length {context_length}"
        )
    return _packed(sequences, exhausted=True)


def _packed(sequences: list[np.ndarray], *, exhausted: bool) -> Packed:
    both = np.stack(sequences, axis=1)  # [2 s c]
    return Packed(token=both[0], document=both[1], exhausted=exhausted)


def _marked(bos: int | None) -> np.ndarray:
    """The mark that begins a document or a sequence, as a piece of the stream [2 0..1]."""
    return np.array([[], []] if bos is None else [[bos], [-1]], np.int32)


def _tokenised(documents: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    for batch in _batched(documents, 64):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        yield from (np.array(ids, np.int32) for ids in encoded)


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
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


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"corpus {where}: field {field!r} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"corpus {where}: field {field!r} is not text ({error.reason})") from None
    return value


def _import_arrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'dictlearn-interp[lm]'") from None
