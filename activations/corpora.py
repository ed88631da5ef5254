"""Any text -> documents: the reference text inside CPython, files, a data set."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import itertools
import json
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

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
