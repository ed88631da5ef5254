"""The documentation says what is so: it builds, its configs are valid, its recipe works."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations.config import validate
from activations.harvest import HarvestConfig
from activations.writer import write_store
from dictlearn.config import DataConfig, FitConfig, LoopConfig
from dictlearn.encoders.matryoshka_omp import MatryoshkaOMP
from dictlearn.encoders.mp import MP
from dictlearn.encoders.omp import OMP
from dictlearn.solvers.ksvd import KSVD
from dictlearn.solvers.sae import SAE
from dictlearn.solvers.snmf import SNMF
from dictlearn.solvers.untrained import Untrained
from dictlearn.transplant.config import TransplantConfig
from dictlearn.transplant.methods.omp import OMPMixing
from evals import run, transplant
from experiments.compare.sweep import Sweep, cells

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "experiments/docs/pages"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# By a key that only these have.
KINDS = {
    "base": TransplantConfig, "methods": transplant.EvalConfig, "dictionaries": Sweep,
    "solver": FitConfig,
}  # fmt: skip
# Of a page's sections the classes whose fields their tables name; the first column has the keys.
TABLES = {
    "config.md": {
        "Top level": [FitConfig], "`[data]`": [DataConfig], "`[fit]`": [LoopConfig],
    },
    "harvesting.md": {"Keys": [HarvestConfig]},
    "methods/ksvd.md": {"Keys": [KSVD]},
    "methods/omp.md": {"Keys": [OMP, MP, MatryoshkaOMP]},
    "methods/sae.md": {"Keys": [SAE]},
    "methods/snmf.md": {"Keys": [SNMF]},
    "methods/untrained.md": {"Keys": [Untrained]},
    "methods/transplant.md": {"Keys": [OMPMixing]},
}  # fmt: skip


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """Titles and contents of a page's code blocks."""
    found = FENCE.findall((PAGES / page).read_text(encoding="utf-8"))
    return [(title, text) for own, title, text in found if own == language]


def section(page: str, heading: str) -> str:
    text = (PAGES / page).read_text(encoding="utf-8")
    return re.split(r"^## ", text.split(f"## {heading}\n", 1)[1], flags=re.MULTILINE)[0]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    places = ["-f", ROOT / "experiments/docs/mkdocs.yml", "--site-dir", tmp_path / "site"]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "site/methods/ksvd.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:link|script|img)[^>]*(?:href|src)="(?:https?:)?//', text)


@functools.cache
def configs() -> list[tuple[str, str]]:
    files = sorted(PAGES.rglob("*.md"))
    names = [str(file.relative_to(PAGES)) for file in files]
    return [(name, text) for name in names for _, text in blocks(name, "toml")]


@pytest.mark.parametrize("index", range(len(configs())), ids=lambda i: f"{i}-{configs()[i][0]}")
def test_a_config_on_a_page_is_valid(index: int) -> None:
    page, text = configs()[index]
    table = tomllib.loads(text)
    if page == "add-a-solver.md":
        table["solver"]["name"] = "ksvd"  # the recipe's own solver is tried below
    kind = next((kind for key, kind in KINDS.items() if key in table), run.EvalConfig)
    found = validate(kind, table, page)
    if isinstance(found, Sweep):
        cells(found, page)
    if "harvest" in table:
        store = {"store": table["data"]["store"]}
        validate(HarvestConfig, table["harvest"] | store, page)
    if kind is run.EvalConfig:
        for name in run.FAMILIES.keys() & table.keys():
            validate(run.FAMILIES[name].config, table[name] | {"hook": "h"}, page)


@pytest.mark.parametrize("page", TABLES)
def test_keys_of_tables_exist_and_none_is_missing(page: str) -> None:
    for heading, kinds in TABLES[page].items():
        rows = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \|(.*)$", section(page, heading), re.M)
        keys = {key for names, _ in rows for key in re.findall(r"`([a-z_]+)`", names)}
        fields = {f.name: f for kind in kinds for f in dataclasses.fields(kind)}
        told = keys & set(fields)
        assert keys <= set(fields) | {*run.FAMILIES, *_names(), *PLAIN}, keys - set(fields)
        tables = {"name", "data", "solver", "fit", "harvest"}  # told by headings
        assert set(fields) - told <= tables, set(fields) - told
        for names, rest in rows:  # a default that is told is the default
            if len(re.findall("`", names)) == 2 and (key := names.strip("`")) in fields:
                _check_default(fields[key], rest, page)


# First cells of tables in these sections that name values or methods, not keys.
PLAIN = {"neighbours", "subword_mean", "landmarks", "focus", "wechsel", "mean", "random", "zero"}


def _names() -> set[str]:
    return {"omp", "nn_omp", "mp", "matryoshka_omp", "nnls"}


def _check_default(field: Any, rest: str, page: str) -> None:
    for cell in rest.split("|")[:2]:
        if (told := re.match(r"^ `([^`]+)` $", cell)) is None:
            continue
        text = told[1].replace("_", "") if re.match(r"^[\d_.]+$", told[1]) else told[1]
        try:
            value = eval(text, {"__builtins__": {}}, {"true": True, "false": False})
        except (NameError, SyntaxError):
            continue  # the "of" column of omp.md
        assert value == field.default, (page, field.name, value, field.default)


def test_messages_are_what_the_code_says() -> None:
    known = "\n".join(_strings())
    for _, text in blocks("errors.md", "text"):
        parts = [re.escape(part.strip()) for part in text.strip().split("…") if part.strip()]
        assert re.search("[^\n]*".join(parts), known), text


def _strings() -> list[str]:
    """Every text in the code, one a line; what is filled in becomes a space."""
    found = []
    mend = "Restore the file, or delete the store and harvest again."
    for file in (
        f for top in ("activations", "dictlearn", "evals") for f in (ROOT / top).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                names = [
                    ast.unparse(v) if isinstance(v, ast.FormattedValue) else v.value
                    for v in node.values
                ]  # type: ignore[attr-defined]
                found.append("".join(mend if "MEND" in name else name for name in names))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("\n", " ") for text in found]


def apply(file: Path, diff: str) -> None:
    """Apply hunks that are parted by @@ lines; each must fit in exactly one place."""
    text = file.read_text(encoding="utf-8")
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"{file.name}: does not fit once:\n{old}"
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


def test_the_recipe_for_a_solver_can_be_followed(tmp_path: Path) -> None:
    page = "add-a-solver.md"
    for name in ("activations", "dictlearn", "tests/dictlearn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for title, text in blocks(page, "python") + blocks(page, "toml"):
        assert not (tmp_path / title).exists()
        (tmp_path / title).write_text(text, encoding="utf-8")
    for title, text in blocks(page, "diff"):
        apply(tmp_path / title, text)

    rng = np.random.default_rng(0)
    hook, n, d = "blocks.9.hook_resid_post", 500, 16
    atoms = rng.standard_normal((300, d))

    def shard(index: int) -> dict[str, np.ndarray]:
        codes = rng.standard_normal((n, 3))
        x = np.einsum("nk,nkd->nd", codes, atoms[rng.integers(300, size=(n, 3))])
        column = np.zeros(n, np.int32)
        columns = dict.fromkeys(("token", "sequence", "position"), column)
        rows = {f"activations/{hook}": x.astype(np.float32)}
        return {**rows, **columns, "document": np.full(n, index, np.int32)}

    write_store(
        tmp_path / "stores/quickstart",
        map(shard, range(6)),
        sequences=np.zeros((6, 2, 8)),
        vocabulary={},
        request={},
        model={},
        corpus={},
        forward={},
        hooks={hook: d},
        context_length=8,
        n_documents=6,
        shard_sequences=1,
        dropped_positions=("special",),
    )
    commands = [text.strip() for title, text in blocks(page, "sh") if title == "run"]
    assert len(commands) == 2
    python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A worker of pytest-xdist tells its cores by these; the command is no worker.
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    own |= {"PYTHONPATH": str(tmp_path), "PATH": python}
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=own, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/online-001/metrics.json").exists()
