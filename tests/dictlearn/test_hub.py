"""Runs on the hub: a local stand-in takes a commit and serves it again, as its client asks."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("huggingface_hub", reason="the [lm] extra is not installed")

from dictlearn import load
from dictlearn.interop import hub as hub_module

Command = Callable[..., tuple[int, str, str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Holds one repository, `org/tiny`; those who bring no token may only read."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Request(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def send(self, body: Any, code: int = 200, **headers: str) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        if not isinstance(body, bytes):
            headers["Content_Type"] = "application/json"
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def do_POST(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        if self.headers.get("Transfer-Encoding") == "chunked":
            text = b""
            while size := int(self.rfile.readline(), 16):
                text += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.send({"error": "no token"}, 401)
        elif path == "/api/repos/create":
            self.send({"url": f"{hub.url}/org/tiny", "name": "org/tiny", "id": "org/tiny"})
        elif path == "/api/validate-yaml":
            self.send({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(text)["files"]]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            self.send({"files": [{"path": name, **told} for name in names]})
        else:
            assert path == "/api/models/org/tiny/commit/main"
            for line in map(json.loads, text.splitlines()):
                if line["key"] == "file":
                    held = base64.b64decode(line["value"]["content"])
                    hub.files[line["value"]["path"]] = held
            address = f"{hub.url}/org/tiny/commit/{COMMIT}"
            self.send({"success": True, "commitUrl": address, "commitOid": COMMIT})

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        model = "/api/models/org/tiny"
        if path in (model, f"{model}/revision/main", f"{model}/revision/{COMMIT}"):
            names = [{"rfilename": name} for name in hub.files]
            self.send({"id": "org/tiny", "sha": COMMIT, "siblings": names})
        elif path == f"{model}/tree/{COMMIT}":
            self.send([
                {"type": "file", "path": name, "size": len(body), "oid": name}
                for name, body in hub.files.items()
            ])  # fmt: skip
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            self.send(hub.files[name], ETag=f'"{name}"', X_Repo_Commit=COMMIT)
        elif path.startswith(f"{model}/"):
            self.send({}, 404, X_Error_Code="RevisionNotFound")
        else:
            self.send({}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture
def client(tmp_path: Path, run_command: Command) -> Command:
    """The command, with an empty cache of its own."""
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return lambda *arguments, **more: run_command(
        "dictlearn.interop.hub", *arguments, **home | more
    )


def test_a_run_goes_up_and_comes_back(
    hub: Hub, client: Command, tiny_run: Path, tmp_path: Path
) -> None:
    there = {"HF_ENDPOINT": hub.url}
    code, out, err = client("push", tiny_run, "org/tiny", HF_TOKEN="hf_test", **there)
    assert (code, out.strip()) == (0, f"{hub.url}/org/tiny"), err
    assert set(hub.files) == {*hub_module.FILES, "README.md"}
    # Nothing of this machine's paths goes up.
    for name, held in hub.files.items():
        assert str(tiny_run.parent).encode() not in held, name
    page = hub.files["README.md"].decode()
    run = load(tiny_run)
    assert f"| fvu_bulk | {run.metrics['fvu_bulk']:.4g} |" in page
    assert 'license: "other"' in page
    assert 'dictlearn.load("hf:org/tiny")' in page

    code, out, err = client("pull", "org/tiny", **there)
    assert code == 0, err
    back = load(out.strip())
    for key in ("atoms", "bias"):
        np.testing.assert_array_equal(
            getattr(back.coder.dictionary, key), getattr(run.coder.dictionary, key)
        )
    assert back.metrics == run.metrics
    asked = len(hub.asked)
    assert client("pull", "org/tiny", HF_HUB_OFFLINE="1", **there)[:2] == (0, out)
    assert len(hub.asked) == asked  # the local cache comes first


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("pull", "org/absent"), {}, "hf:org/absent: the hub has no such run"),
        (("pull", "org/tiny@no-branch"), {}, "the hub has no such run"),
        (("pull", "no hub id"), {}, "not a hub id"),
        (("pull", "org/tiny"), {"HF_HUB_OFFLINE": "1"}, "the hub cannot be reached"),
        (("pull", "org/tiny"), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        (("push", "RUN", "org/tiny"), {}, "status 401; log in"),
        (("push", "nowhere", "org/tiny"), {}, "no run there"),
    ],
)
def test_what_cannot_be_is_told(
    hub: Hub, client: Command, tiny_run: Path, arguments: tuple[str, ...],
    environment: dict[str, str], message: str,
) -> None:  # fmt: skip
    own = [str(tiny_run) if one == "RUN" else one for one in arguments]
    code, out, err = client(*own, **{"HF_ENDPOINT": hub.url, "HF_TOKEN": "wrong"} | environment)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_card_names_the_base_model_and_its_licence(tiny_run: Path) -> None:
    import dataclasses

    run = load(tiny_run)
    model = run.metadata["model"] | {"spec": "hf:openai-community/gpt2@main"}
    of_hub = dataclasses.replace(run, metadata=run.metadata | {"model": model})
    page = hub_module.card(of_hub, "me/mine", "mit")
    assert 'base_model: "openai-community/gpt2"\nlicense: "mit"\n---' in page
    assert "license_name" not in page
    assert 'license_name: "that of the base model"' in hub_module.card(run, "me/mine", None)


def test_load_takes_a_name_on_the_hub(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(hub_module, "pull", lambda name: asked.append(name) or tiny_run)
    assert load("hf:org/tiny@main").path == tiny_run
    assert asked == ["org/tiny@main"]
