"""Runs on the Hugging Face Hub:  python -m dictlearn.interop.hub push RUN OWNER/NAME.

`push` uploads a finished run in one commit, with a model card made of its config and figures; what
a path of this machine would tell is left out. `dictlearn.load("hf:OWNER/NAME")` (`@REVISION` for a
revision) loads one, from the local cache where it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from activations.terminal import UserError, run_command
from dictlearn import artifact
from dictlearn.artifact import Run

# What a run is on the hub, beside its card.
FILES = (artifact.WEIGHTS, artifact.METADATA, artifact.METRICS, "config.toml", "train.jsonl")
_FIGURES = {
    "fvu_bulk": "fvu_bulk", "control_fvu_bulk": "fvu_bulk of the control", "fvu": "fvu",
    "control_fvu": "fvu of the control", "l0": "L0", "frac_alive": "share of atoms alive",
    "twins": "share of atoms with a twin", "n_tokens": "test tokens",
}  # fmt: skip


def push(path: Path, repo: str, *, private: bool = False) -> str:
    """Upload a run; the address of what is there now.

    Raises:
      UserError: the run is unfinished or damaged; the hub is not to be reached, or refuses.
    """
    run = artifact.load(path)
    with _errors(repo) as hub, tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in FILES:
            (place / name).write_bytes((path / name).read_bytes())
        told = json.dumps(_nowhere(run.metadata), indent=1, default=str)
        (place / artifact.METADATA).write_text(told + "\n")
        config = tomllib.loads((path / "config.toml").read_text())
        (place / "config.toml").write_text(tomli_w.dumps(_nowhere(config)))
        (place / "README.md").write_text(card(run, repo, _licence(hub, run)))
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        title = f"{run.metadata['name']}: {run.metadata['solver']['name']}"
        api.upload_folder(repo_id=repo, folder_path=place, commit_message=title)
        return f"{api.endpoint}/{repo}"


def pull(name: str) -> Path:
    """The directory of a run on the hub; the local cache first.

    Arguments:
      name: OWNER/NAME, or OWNER/NAME@REVISION.

    Raises:
      UserError: it is neither cached nor to be had.
    """
    repo, _, revision = name.partition("@")
    with _errors(name) as hub:
        where = {"revision": revision or None, "allow_patterns": [*FILES]}
        with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
            place = Path(hub.snapshot_download(repo, local_files_only=True, **where))
            if all((place / file).exists() for file in FILES[:3]):
                return place
        hub.HfApi().model_info(repo, revision=revision or None, timeout=5)  # no retries offline
        return Path(hub.snapshot_download(repo, **where))


def card(run: Run, repo: str, licence: str | None) -> str:
    """A model card: what it is, how to load it, its figures, its config.

    Arguments:
      licence: of the base model, as the hub names it; None where it is not known.
    """
    told, model = run.metadata, run.metadata["model"]
    base = _base(run)
    head: dict[str, Any] = {"library_name": "dictlearn", "tags": ["sparse-dictionary"]}
    head |= {"base_model": base} if base else {}
    head["license"] = licence or "other"
    if licence is None:
        head["license_name"] = "that of the base model"
    name = model.get("description") or base or "a language model"
    rows = "\n".join(
        f"| {title} | {run.metrics[key]:.4g} |"
        for key, title in _FIGURES.items()
        if run.metrics.get(key) is not None
    )
    config = {key: told[key] for key in ("solver", "hook", "data", "seed", "context_length")}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    return f"""---
{front}
---

# {repo}

A sparse dictionary of {told["solver"]["n_atoms"]:,} atoms for the activations of {name} at
`{told["hook"]}`, fitted by {told["solver"]["name"]}.

```python
import dictlearn

run = dictlearn.load("hf:{repo}")
codes = run.coder.encode(x)  # x [tokens d], raw activations of {told["hook"]}
```

Figures are of held-out documents. fvu is the variance unexplained, fvu_bulk the same without the
few dimensions and rows that hold most of it; the control is untrained rows of the data as atoms,
with the same number of codes. Lower error is not truer features.

| figure | |
|---|---|
{rows}

```json
{json.dumps(config, indent=1, default=str)}
```
"""


def _base(run: Run) -> str | None:
    """The hub's name of the language model, where it came from there."""
    spec = str(run.metadata["model"].get("spec") or "")
    return spec.removeprefix("hf:").partition("@")[0] if spec.startswith("hf:") else None


def _licence(hub: Any, run: Run) -> str | None:
    base = _base(run)
    if base is None:
        return None
    with contextlib.suppress(hub.errors.RepositoryNotFoundError):
        data = hub.HfApi().model_info(base, timeout=5).card_data
        return getattr(data, "license", None)
    return None


def _nowhere(value: Any) -> Any:
    """The same with the last part of each absolute path: the rest is this machine's."""
    if isinstance(value, dict):
        return {key: _nowhere(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_nowhere(inner) for inner in value]
    if isinstance(value, str):
        kind, colon, path = value.rpartition(":")  # "dir:/models/mine"
        return kind + colon + Path(path).name if Path(path).is_absolute() else value
    return value


@contextlib.contextmanager
def _errors(name: str) -> Iterator[Any]:
    """The hub's client; its errors as ours."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("the hub needs huggingface_hub: pip install 'dictlearn-interp[lm]'")
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        yield hub
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(f"hf:{name}: the hub has no such run (or it needs a login)") from None
    except errors.HFValidationError as error:
        raise UserError(f"hf:{name}: not a hub id ({error})") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        login = "; log in with `hf auth login`, or set HF_TOKEN" if code in (401, 403) else ""
        raise UserError(f"hf:{name}: the hub answers with status {code}{login}") from None
    except Exception as error:
        # Its client lets errors of its HTTP library through: requests, httpx, now httpx2.
        if not (
            isinstance(error, (ConnectionError, errors.OfflineModeIsEnabled))
            or type(error).__module__.startswith(("httpx", "httpcore", "requests"))
        ):
            raise
        raise UserError(
            f"hf:{name}: the hub cannot be reached ({type(error).__name__}); go online, or name a "
            "local directory"
        ) from None


def main() -> None:
    """Entry of `python -m dictlearn.interop.hub`."""
    parser = argparse.ArgumentParser(prog="python -m dictlearn.interop.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pushing = commands.add_parser("push", help="upload a run")
    pushing.add_argument("run", type=Path)
    pushing.add_argument("repo", help="OWNER/NAME")
    pushing.add_argument("--private", action="store_true")
    pulling = commands.add_parser("pull", help="download a run, and say where it is")
    pulling.add_argument("repo", help="OWNER/NAME, or OWNER/NAME@REVISION")
    arguments = parser.parse_args()
    if arguments.command == "push":
        print(push(arguments.run, arguments.repo, private=arguments.private))
    else:
        print(pull(arguments.repo))


if __name__ == "__main__":
    run_command(main)
