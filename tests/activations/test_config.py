"""Laws of the TOML reader: strict, and every message leads to the place to mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from activations.config import read_toml, validate
from activations.harvest import HarvestConfig
from activations.terminal import UserError

GOOD = """\
store = "stores/mine"
model = "dir:mine"
hooks = ["blocks.0.hook_resid_post"]
max_tokens = 60_000

[corpus]
kind = "files"
paths = ["*.txt"]
"""


def parse(path: Path, text: str = GOOD, *overrides: str) -> HarvestConfig:
    path.write_text(text)
    return validate(HarvestConfig, read_toml(path, list(overrides)), str(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_a_good_config_becomes_the_typed_one(path: Path) -> None:
    config = parse(path)
    assert config.store == Path("stores/mine")
    assert config.corpus.kind == "files"
    assert config.corpus.paths == ("*.txt",)
    assert config.max_tokens == 60_000
    assert config.batch_size == 16


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # An unknown key names its nearest neighbour, also one that stands deeper.
        ("max_token=3", "max_token: unknown key. Did you mean max_tokens or "),
        ("corpus=docs", "corpus: expected a table, got 'docs'"),
        ("path=['x']", "path: unknown key. Did you mean corpus.paths"),
        ("text_field='x'", "text_field: unknown key. Did you mean corpus.text_field"),
        ("corpus.text_feld='x'", "corpus.text_feld: unknown key. Did you mean corpus.text_field?"),
        ("zzzz=1", "zzzz: unknown key. Known here: store, model, hooks, corpus,"),
        # Nothing is coerced.
        ("max_tokens='3'", "max_tokens: expected a valid integer, got '3'"),
        ("max_tokens=3.0", "max_tokens: expected a valid integer, got 3.0"),
        ("max_tokens=true", "max_tokens: expected a valid integer, got True"),
        ("max_tokens=inf", "max_tokens: expected a valid integer, got inf"),
        ("hooks='blocks.0.hook_resid_post'", "hooks: expected a valid array"),
        ("hooks=[3]", "hooks.0: expected a valid string, got 3"),
        ("corpus=3", "corpus: expected"),
        # Ranges.
        ("context_length=1", "context_length: expected greater than or equal to 2, got 1"),
        ("batch_size=0", "batch_size: expected greater than or equal to 1, got 0"),
        ("model=", "model: expected at least 1 character, got ''"),
        ("hooks=[]", "hooks: expected at least 1 item"),
        ("hooks=['a', 'a']", "hooks: a hook is named twice"),
        ("shard_tokens=0", "shard_tokens: expected greater than or equal to 1, got 0"),
        ("max_tokens=0", "max_tokens: expected greater than or equal to 1, got 0"),
        ("gradients=1", "gradients: expected a valid boolean, got 1"),
        ("cross_document_attention='no'", "cross_document_attention: expected a valid boolean"),
        ("dtype='float64'", "dtype: expected 'float32', 'bfloat16' or 'float16', got 'float64'"),
        ("compression='zstd'", "compression: expected 'none', 'lzf' or 'gzip', got 'zstd'"),
        ("marks='BOS'", "marks: expected 'bos', 'eos' or 'none', got 'BOS'"),
        ("corpus.documents_are='pages'", "corpus.documents_are: expected 'files', 'paragraphs'"),
        # Unions.
        ("corpus.kind='filez'", "corpus.kind: no kind 'filez'. Did you mean files?"),
        ("corpus={paths=['x']}", "corpus: expected a table with 'kind'"),
        ("corpus={kind='files'}", "corpus.paths: missing"),
        ("corpus={kind='python-docs',paths=['x']}", "corpus.paths: unknown key."),
    ],
)
def test_a_bad_value_is_named_by_file_and_dotted_key(
    path: Path, override: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        parse(path, GOOD, override)
    message = str(caught.value)
    assert message.startswith(f"{path}:\n  ")
    assert expected in message


def test_every_mistake_is_told_at_once(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(path, 'corpus = { kind = "python-docs" }\nbatch_size = 0\nmodl = "x"\n')
    lines = str(caught.value).splitlines()[1:]
    assert {line.strip().split(":")[0] for line in lines} == {
        "store",
        "model",
        "hooks",
        "batch_size",
        "modl",
    }


def test_a_prefix_stands_before_every_key(path: Path) -> None:
    path.write_text(GOOD + "\n")
    for override, key in [("corpus.kind='x'", "kind"), ("corpus.pahts=['x']", "pahts")]:
        with pytest.raises(UserError, match=rf"\n  harvest\.corpus\.{key}: "):
            validate(HarvestConfig, read_toml(path, [override]), "here", prefix="harvest.")
    with pytest.raises(UserError, match=r"\n  harvest\.hooks: a hook is named twice"):
        validate(HarvestConfig, read_toml(path, ["hooks=['a','a']"]), "here", prefix="harvest.")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('store = "a"\nmodel = dir:mine\n', "\n  2 | model = dir:mine"),
        ("[corpus\nkind = 1\n", "\n  1 | [corpus"),
        ("a = 1\na = 2\n", "\n  2 | a = 2"),
        ('a = 1\nhooks = ["x"', '\n  2 | hooks = ["x"'),
    ],
)
def test_what_is_not_toml_is_shown_with_its_line(path: Path, text: str, shown: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(path, text)
    assert str(caught.value).startswith(f"{path}: not valid TOML: ")
    assert shown in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        read_toml(path, [])
    with pytest.raises(UserError, match="cannot be read as a config file"):
        read_toml(path.parent, [])
    path.write_bytes(b'store = "\xff"')
    with pytest.raises(UserError, match="cannot be read as a config file"):
        read_toml(path, [])


def test_overrides_are_typed_and_fall_back_to_text(path: Path) -> None:
    path.write_text(GOOD)
    table = read_toml(
        path,
        ["max_tokens=5", "model=gguf:a=b.gguf", "corpus.documents_are=lines", "new.inner.key=[1]"],
    )
    assert table["max_tokens"] == 5
    assert table["model"] == "gguf:a=b.gguf"
    assert table["corpus"] == {"kind": "files", "paths": ["*.txt"], "documents_are": "lines"}
    assert table["new"] == {"inner": {"key": [1]}}


@pytest.mark.parametrize("override", ["max_tokens", "=3", "corpus.=3", "store.inner=3"])
def test_a_malformed_override_is_told(path: Path, override: str) -> None:
    path.write_text(GOOD)
    with pytest.raises(UserError, match=r"^--set "):
        read_toml(path, [override])


def test_what_is_written_out_reads_back_as_the_same_config(path: Path) -> None:
    config = parse(path, GOOD, "gradients=true", "dtype=bfloat16", "compression=lzf", "marks=eos")
    table = json.loads(json.dumps(config.request)) | {"store": str(config.store)}
    del table["corpus"]["kind"]
    with pytest.raises(UserError, match="corpus: expected a table"):
        validate(HarvestConfig, table, "here")
    table["corpus"]["kind"] = "files"
    assert validate(HarvestConfig, table, "here") == config


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (None, (), "no such config file"),
        ("store =", (), "not valid TOML"),
        (GOOD, ("--set", "corpus.pathz=3"), "corpus.pathz: unknown key."),
        (GOOD, ("--set", "nothing"), "expected section.key=value"),
    ],
)
def test_the_command_ends_with_2_and_one_message(
    path: Path, run_command, text: str | None, arguments: tuple[str, ...], expected: str
) -> None:
    if text is not None:
        path.write_text(text)
    before = set(path.parent.iterdir())
    code, out, err = run_command("activations.harvest", path, *arguments, cwd=path.parent)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert expected in err
    assert "Traceback" not in err
    assert set(path.parent.iterdir()) == before
