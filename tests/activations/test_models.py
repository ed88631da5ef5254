"""Laws of finding a model: four ways to name one, each made once, each failure one message."""

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

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from activations import models
from activations.terminal import UserError

FETCH = """
import sys
from activations import models, terminal
terminal.run_command(lambda: print(models.fetch(sys.argv[1])))
"""
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(directory: Path, path: Path) -> None:
    """The Llama in a Hugging Face directory, with its byte-level tokenizer, as a GGUF file."""
    config = json.loads((directory / "config.json").read_text())
    tokenizer = json.loads((directory / "tokenizer.json").read_text())["model"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny 3k")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))  # control, control, normal ...
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, x in load_file(directory / "model.safetensors").items():
        stem = key.removeprefix("model.").removesuffix(".weight")
        block = ""
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            block = f"blk.{number}."
        if n := heads.get(stem.rpartition(".")[2]):  # GGUF interleaves the halves of the rotation
            x = x.reshape(n, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(f"{block}{GGUF_NAMES[stem]}.weight", np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_model_dir, path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`package(name, source)` installs a package of that name; its folder is returned."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    made = []

    def make(name: str, source: str = "") -> Path:
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        made.append(name)
        return folder

    yield make
    for name in made:
        sys.modules.pop(name, None)


def changed_copy(directory: Path, to: Path, **config: Any) -> Path:
    """A copy of a model's directory with keys of its config.json changed."""
    shutil.copytree(directory, to)
    table = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(table))
    return to


def logits(spec: str, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return models.load(spec).bridge(ids)


# Four ways to name one model


def test_all_four_kinds_give_the_logits_of_the_original(
    tiny_model_dir: Path, tiny_gguf: Path, package: Callable[..., Path]
) -> None:
    shutil.copy(tiny_gguf, package("tiny_shipped", "raise RuntimeError('never import me')"))
    package(
        "tiny_in_parts", f"import shutil\ndef assemble(to): shutil.copy({str(tiny_gguf)!r}, to)"
    )
    ids = torch.arange(24).reshape(2, 12)
    text = "The lazy dog</s> naïve"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.inference_mode():
        wanted = original(ids).logits
    specs = [f"dir:{tiny_model_dir}", f"gguf:{tiny_gguf}"]
    specs += ["package:tiny_shipped", "package:tiny_in_parts"]
    for spec in specs:
        model = models.load(spec)
        assert models.width(spec) == 16
        with torch.inference_mode():
            torch.testing.assert_close(model.bridge(ids), wanted, rtol=1e-6, atol=1e-6)
        assert model.identity.spec == spec
        assert model.identity.architecture == "LlamaForCausalLM"
        for read in (model.tokenizer, models.load_tokenizer(spec)):
            assert read(text, add_special_tokens=False)["input_ids"] == tokens
            assert (read.bos_token_id, read.eos_token_id) == (0, 1)


def test_a_text_only_gemma_3_without_architecture_is_read(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
    )
    original = transformers.Gemma3ForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "saved")
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "saved")
    directory = changed_copy(tmp_path / "saved", tmp_path / "gemma", architectures=None)
    ids = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        wanted = original(ids).logits
    torch.testing.assert_close(logits(f"dir:{directory}", ids), wanted, rtol=1e-6, atol=1e-6)


def test_the_identity_follows_weights_and_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> None:
    other = changed_copy(tiny_model_dir, tmp_path / "other")
    first, same = (models.identify("dir:x", directory) for directory in (tiny_model_dir, other))
    assert first == same
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors")
    moved = models.identify("dir:x", other)
    assert dataclasses.replace(moved, weights_sha256=first.weights_sha256) == first
    assert moved.weights_sha256 != first.weights_sha256
    (other / "tokenizer.json").write_text("{}")
    assert models.identify("dir:x", other).tokenizer_sha256 != first.tokenizer_sha256


# What is converted once


def test_a_gguf_file_is_converted_once_for_each_content(
    tiny_gguf: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = models.fetch(f"gguf:{tiny_gguf}")
    assert "converting tiny.gguf" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    shutil.copy(tiny_gguf, tmp_path / "renamed.gguf")
    for path in (tiny_gguf, tmp_path / "renamed.gguf"):
        assert models.fetch(f"gguf:{path}") == first
    assert capsys.readouterr().out == ""
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == before
    content = bytearray(tiny_gguf.read_bytes())
    content[-1] ^= 1  # the last byte of the last weight
    (tmp_path / "renamed.gguf").write_bytes(content)
    second = models.fetch(f"gguf:{tmp_path / 'renamed.gguf'}")
    assert second != first
    assert {first, second} == {path for path in (cache / "models").iterdir() if path.is_dir()}
    identities = [models.identify("gguf:x", directory) for directory in (first, second)]
    assert identities[0].weights_sha256 != identities[1].weights_sha256
    assert identities[0].description == "Tiny 3k, dequantised from F32"


def start_fetch(spec: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, spec],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch(spec: str, **environment: str) -> tuple[int, str, str]:
    """`models.fetch(spec)` as a command: (exit code, standard output, standard error)."""
    process = start_fetch(spec, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def check_mistake(result: tuple[int, str, str], expected: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_two_processes_at_once_convert_once(tiny_gguf: Path) -> None:
    processes = [start_fetch(f"gguf:{tiny_gguf}") for _ in range(2)]
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(out.count("converting") for out in outs) == 1
    assert len({out.splitlines()[-1] for out in outs}) == 1


def test_what_a_killed_conversion_left_is_swept(tiny_gguf: Path, cache: Path) -> None:
    process = start_fetch(f"gguf:{tiny_gguf}")
    while process.poll() is None and not list((cache / "models").glob("*.tmp-*")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert list((cache / "models").glob("*.tmp-*"))
    directory = models.fetch(f"gguf:{tiny_gguf}")
    left = {path.name for path in (cache / "models").iterdir()}
    assert left == {directory.name, f"{directory.name}.lock"}
    assert models.identify("gguf:x", directory).architecture == "LlamaForCausalLM"


def test_a_package_in_parts_is_assembled_once(
    tiny_gguf: Path, tmp_path: Path, package: Callable[..., Path]
) -> None:
    counter = tmp_path / "calls"
    package(
        "tiny_counted",
        f"import pathlib, shutil\n"
        f"def assemble(to):\n"
        f"    with open({str(counter)!r}, 'a') as file: file.write('x')\n"
        f"    shutil.copy({str(tiny_gguf)!r}, to)\n",
    )
    assert models.width("package:tiny_counted") is None  # nothing is fetched to tell
    assert len({models.fetch("package:tiny_counted") for _ in range(2)}) == 1
    assert counter.read_text() == "x"
    assert models.width("package:tiny_counted") == 16


def test_a_failed_assembly_leaves_nothing(cache: Path, package: Callable[..., Path]) -> None:
    package(
        "tiny_broken",
        "def assemble(to):\n    to.write_bytes(b'half')\n    raise OSError(28, 'No space left')",
    )
    with pytest.raises(UserError, match=r"package:tiny_broken: cannot be loaded .*No space left"):
        models.fetch("package:tiny_broken")
    assert [path.name for path in (cache / "assembled").iterdir()] == ["tiny_broken.gguf.lock"]


# Mistakes


@pytest.mark.parametrize("spec", ["", "gpt2", "dir:", ":x", "onnx:x", "DIR:x"])
def test_a_bad_spec_is_told_with_all_four_forms(spec: str) -> None:
    with pytest.raises(UserError) as caught:
        models.load(spec)
    assert all(f"\n  {example}" in str(caught.value) for example in models.KINDS.values())
    assert models.width(spec) is None


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("dir:absent", "no such directory"),
        ("gguf:absent.gguf", "cannot be read"),
        ("gguf:.", "cannot be read"),
        ("package:absent_package", "pip install absent-package"),
        ("package:../../etc", "no such package is installed"),
        ("hf:not/a/hub/id", "not a hub id"),
    ],
)
def test_what_is_not_there_is_named(spec: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        models.load(spec)
    assert str(caught.value).startswith(f"model {spec}: ")
    assert expected in str(caught.value)
    assert models.width(spec) is None


def test_a_package_without_a_model_is_told(package: Callable[..., Path]) -> None:
    package("tiny_empty")
    with pytest.raises(UserError, match=r"tiny_empty: the package holds no \.gguf file"):
        models.fetch("package:tiny_empty")
    package("tiny_sick", "import a_dependency_that_is_missing")
    with pytest.raises(UserError, match=r"tiny_sick: cannot be loaded \(ModuleNotFoundError"):
        models.fetch("package:tiny_sick")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda whole: b"", "is not a GGUF file"),
        (lambda whole: b"PK\x03\x04" + whole, "is not a GGUF file"),
        (lambda whole: whole[:4], "cannot be loaded"),
        (lambda whole: whole[: len(whole) // 2], "cannot be loaded"),
        (lambda whole: whole[:-100], "cannot be loaded"),
    ],
)
def test_a_torn_gguf_file_is_told_and_never_cached(
    tiny_gguf: Path,
    tmp_path: Path,
    cache: Path,
    content: Callable[[bytes], bytes],
    expected: str,
) -> None:
    path = tmp_path / "torn.gguf"
    path.write_bytes(content(tiny_gguf.read_bytes()))
    with pytest.raises(UserError, match=rf"^model gguf:{path}: {expected}"):
        models.fetch(f"gguf:{path}")
    assert not [left for left in cache.glob("models/*") if left.suffix != ".lock"]


def drop_tensor(directory: Path, name: str = "model.layers.1.mlp.up_proj.weight") -> None:
    weights = load_file(directory / "model.safetensors")
    del weights[name]
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
        (lambda d: os.truncate(d / "model.safetensors", 9000), "SafetensorError"),
        (lambda d: (d / "config.json").write_text("{"), "is not a valid JSON file"),
        (lambda d: (d / "config.json").write_text("{}"), "Unrecognized model"),
        (lambda d: [f.unlink() for f in d.glob("tokenizer*")], "tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        # transformers would fill these with random numbers and go on.
        (drop_tensor, "weights lack 1 of the tensors .* model.layers.1.mlp.up_proj.weight"),
        (lambda d: drop_tensor(d, "lm_head.weight"), "weights lack 1 of the tensors"),
    ],
)
def test_a_damaged_directory_is_told(
    tiny_model_dir: Path, tmp_path: Path, spoil: Callable[[Path], object], expected: str
) -> None:
    directory = changed_copy(tiny_model_dir, tmp_path / "damaged")
    spoil(directory)
    with pytest.raises(UserError, match=expected) as caught:
        models.load(f"dir:{directory}")
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_or_depth_are_refused(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    for key, value in [("num_hidden_layers", 5), ("hidden_size", 32), ("model_type", "gpt2")]:
        directory = changed_copy(tiny_model_dir, tmp_path / key, **{key: value})
        with pytest.raises(UserError, match=r"weights lack|cannot be loaded"):
            models.load(f"dir:{directory}")


def test_an_architecture_that_transformer_lens_lacks_is_named(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = transformers.CTRLConfig(vocab_size=300, n_embd=16, dff=32, n_layer=2, n_head=2)
    transformers.CTRLLMHeadModel(config).save_pretrained(tmp_path / "ctrl")
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "ctrl")
    with pytest.raises(UserError, match=r"\(CTRLLMHeadModel\): cannot be loaded") as caught:
        models.load(f"dir:{tmp_path / 'ctrl'}")
    assert len(str(caught.value)) < 1000


def test_a_cache_folder_that_cannot_be_made_is_named(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/models: cannot be written .*DICTLEARN_CACHE"):
        models.fetch(f"gguf:{tiny_gguf}")


# The hub: a local stand-in serves one model, as its client asks for it


class Hub(http.server.ThreadingHTTPServer):
    """Serves a directory as the model `org/tiny`; `asked` lists the requests."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, directory: Path) -> None:
        self.files = {file.name: file.read_bytes() for file in directory.iterdir()}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), HubRequest)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubRequest(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def send(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        model, commit = "/api/models/org/tiny", hub.commit
        if path in (model, f"{model}/revision/main", f"{model}/revision/{commit}"):
            names = [{"rfilename": name} for name in hub.files]
            info = {"id": "org/tiny", "sha": commit, "siblings": names}
            self.send(json.dumps(info).encode(), Content_Type="application/json")
        elif path == f"{model}/tree/{commit}":
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": name}
                for name, body in hub.files.items()
            ]
            self.send(json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith(f"/org/tiny/resolve/{commit}/"):
            name = path.rpartition("/")[2]
            self.send(hub.files[name], ETag=f'"{name}"', X_Repo_Commit=commit)
        elif path.startswith(f"{model}/"):
            self.send(b"{}", 404, X_Error_Code="RevisionNotFound")
        else:
            self.send(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(tiny_model_dir: Path) -> Iterator[Hub]:
    with Hub(tiny_model_dir) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Environment of a hub client with an empty cache."""
    return {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def test_a_hub_model_is_downloaded_once_then_needs_no_network(
    hub: Hub, home: dict[str, str], tiny_model_dir: Path
) -> None:
    code, out, err = fetch("hf:org/tiny", HF_ENDPOINT=hub.url, **home)
    assert (code, err) == (0, "")
    directory = Path(out.strip())
    for file in tiny_model_dir.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes()
    asked = len(hub.asked)
    assert fetch("hf:org/tiny", HF_ENDPOINT=hub.url, **home) == (0, out, "")
    assert len(hub.asked) == asked  # the local cache comes first
    assert fetch(f"hf:org/tiny@{hub.commit}", HF_ENDPOINT=hub.url, **home) == (0, out, "")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert fetch("hf:org/tiny", **home | nowhere) == (0, out, "")
    assert fetch("hf:org/tiny", **home | {"HF_HUB_OFFLINE": "1"}) == (0, out, "")
    model = models.load(f"dir:{directory}")
    identity = models.identify("x", tiny_model_dir)
    assert model.identity.weights_sha256 == identity.weights_sha256
    assert model.identity.tokenizer_sha256 == identity.tokenizer_sha256
    # A download that was cut short is completed, not taken for whole.
    (directory / "model.safetensors").unlink()
    check_mistake(fetch("hf:org/tiny", **home | nowhere), "not in the local cache")
    assert fetch("hf:org/tiny", HF_ENDPOINT=hub.url, **home) == (0, out, "")
    assert (directory / "model.safetensors").exists()


def test_what_the_hub_does_not_have_is_told(hub: Hub, home: dict[str, str]) -> None:
    for spec in ("hf:org/absent", "hf:org/tiny@no-such-branch"):
        check_mistake(
            fetch(spec, HF_ENDPOINT=hub.url, **home), f"model {spec}: the hub has no such model"
        )


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_ENDPOINT": "http://127.0.0.1:9"},  # refused
        {"HF_ENDPOINT": "http://nowhere.invalid"},  # no such name
        {"HF_HUB_OFFLINE": "1"},
    ],
)
def test_without_a_network_an_unknown_hub_model_fails_at_once(
    home: dict[str, str], environment: dict[str, str]
) -> None:
    start = time.monotonic()
    check_mistake(
        fetch("hf:org/tiny", **home | environment),
        "model hf:org/tiny: not in the local cache, and the hub cannot be reached",
    )
    assert time.monotonic() - start < 10  # seconds, imports included
