"""The documentation says what is so: it builds, its configs are valid, its recipe works."""

from __future__ import annotations

import ast
import dataclasses
import fractions
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
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
from dictlearn.encoders.nn_omp import NonNegativeOMP
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
RECIPE = PAGES / "add-a-solver.md"
FILES = {str(file.relative_to(PAGES)): file for file in sorted(PAGES.rglob("*.md"))}
FILES["README.md"] = ROOT / "README.md"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(file: Path, language: str) -> list[tuple[str, str]]:
    """Titles and contents of a page's code blocks."""
    found = FENCE.findall(file.read_text(encoding="utf-8"))
    return [(title, text) for own, title, text in found if own == language]


# Pages


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    places = ["-f", ROOT / "experiments/docs/mkdocs.yml", "--site-dir", tmp_path / "site"]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "site/api/solvers.html").read_text(encoding="utf-8")
    assert "dictlearn.solvers.ksvd.KSVD" in text
    fetched = r'<(?:link|script|img)[^>]*(?:href|src)="(?:https?:)?//'
    assert not re.findall(fetched, text), "a page fetches something from elsewhere"


def test_links_of_the_readme_lead_somewhere() -> None:
    text = FILES["README.md"].read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", text)
    assert links
    for place, anchor in links:
        assert (ROOT / place).exists(), place
        titles = re.findall(r"^#+ (.*)$", (ROOT / place).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles]


# Configs

CONFIGS = [(name, text) for name, file in FILES.items() for _, text in blocks(file, "toml")]
# By a key that only these have.
KINDS = {
    "base": TransplantConfig, "methods": transplant.EvalConfig, "dictionaries": Sweep,
    "solver": FitConfig,
}  # fmt: skip


@pytest.mark.parametrize(("page", "text"), CONFIGS, ids=[name for name, _ in CONFIGS])
def test_a_config_on_a_page_is_valid(page: str, text: str) -> None:
    table = tomllib.loads(text)
    if FILES[page] == RECIPE:
        table["solver"]["name"] = "ksvd"  # its own solver is tried below
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


# Tables of keys: page, section, the classes whose fields they tell, what else stands in first cells
ENCODERS = {"omp", "nn_omp", "mp", "matryoshka_omp", "nnls"}
METHODS = {
    "omp", "neighbours", "subword_mean", "landmarks", "focus", "wechsel", "mean", "random", "zero",
}  # fmt: skip
TABLES: list[tuple[str, str, list[Any], set[str]]] = [
    ("config.md", "Top level", [FitConfig], set()),
    ("config.md", "`[data]`", [DataConfig], set()),
    ("config.md", "`[fit]`", [LoopConfig], set()),
    ("harvesting.md", "Keys", [HarvestConfig], set()),
    ("methods/ksvd.md", "Keys", [KSVD], set()),
    ("methods/omp.md", "Keys", [NonNegativeOMP, MatryoshkaOMP, MP, OMP], ENCODERS),
    ("methods/sae.md", "Keys", [SAE], set()),
    ("methods/snmf.md", "Keys", [SNMF], set()),
    ("methods/untrained.md", "Keys", [Untrained], set()),
    ("methods/transplant.md", "Keys", [OMPMixing], METHODS),
]
# Sections of their own, or told by what chooses the class.
ELSEWHERE = {"name", "data", "solver", "fit", "harvest"}


@pytest.mark.parametrize(
    ("page", "heading", "kinds", "others"), TABLES, ids=[f"{row[0]} {row[1]}" for row in TABLES]
)
def test_tables_name_every_key_with_its_default(
    page: str, heading: str, kinds: list[Any], others: set[str]
) -> None:
    text = FILES[page].read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1]
    text = text.split("\n## ", 1)[0]
    fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    told: set[str] = set()
    for line in text.splitlines():
        first, *rest = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| `") or not re.fullmatch(r"(`[a-z_]+`(, )?)+", first):
            continue
        keys = re.findall(r"`([a-z_]+)`", first)
        told |= {*keys}
        for cell in rest[:2] if keys[0] in fields else []:
            if (default := _value(cell)) is not None:
                assert [fields[key].default for key in keys] == [default] * len(keys), line
    assert told <= fields.keys() | others
    assert fields.keys() - ELSEWHERE <= told


def _value(cell: str) -> Any:
    """What a cell that is all code says; None where it says something else."""
    if (code := re.fullmatch(r"`([^`]+)`", cell)) is None:
        return None
    if re.fullmatch(r"\d+/\d+", code[1]):
        return float(fractions.Fraction(code[1]))
    try:
        return tomllib.loads(f"value = {code[1]}")["value"]
    except tomllib.TOMLDecodeError:
        return None


# Messages


def test_messages_are_what_the_code_says() -> None:
    known = "\n".join(_texts())
    for _, text in blocks(PAGES / "errors.md", "text"):
        parts = [re.escape(part.strip()) for part in text.strip().split("…") if part.strip()]
        assert re.search("[^\n]*".join(parts), known), text


def _texts() -> Iterator[str]:
    """Every text in the code on one line; a gap where something is filled in."""
    mend = "Restore the file, or delete the store and harvest again."
    files = [
        file for top in ("activations", "dictlearn", "evals") for file in (ROOT / top).rglob("*.py")
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                for part in node.values:
                    if isinstance(part, ast.Constant):
                        text += str(part.value)
                    else:
                        text += mend if "MEND" in ast.unparse(part) else " "
            yield text.replace("\n", " ")


# The recipe


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


def make_store(path: Path, hook: str) -> None:
    """Six documents of 500 rows, each of 3 among 300 atoms in 16 dimensions."""
    rng = np.random.default_rng(0)
    n, d = 500, 16
    atoms = rng.standard_normal((300, d))

    def shard(index: int) -> dict[str, np.ndarray]:
        x = np.einsum(
            "nk,nkd->nd", rng.standard_normal((n, 3)), atoms[rng.integers(300, size=(n, 3))]
        )
        columns = dict.fromkeys(("token", "sequence", "position"), np.zeros(n, np.int32))
        document = np.full(n, index, np.int32)
        return {f"activations/{hook}": x.astype(np.float32), **columns, "document": document}

    write_store(
        path,
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


def test_the_recipe_for_a_solver_can_be_followed(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("activations", "dictlearn", "tests/dictlearn"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for title, text in blocks(RECIPE, "python") + blocks(RECIPE, "toml"):
        assert not (tmp_path / title).exists()
        (tmp_path / title).write_text(text, encoding="utf-8")
    for title, text in blocks(RECIPE, "diff"):
        apply(tmp_path / title, text)
    make_store(tmp_path / "stores/quickstart", "blocks.9.hook_resid_post")
    # The commands are no workers of a pytest-xdist around this test.
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    own |= {
        "PYTHONPATH": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    commands = [text for title, text in blocks(RECIPE, "sh") if title == "run"]
    assert [command.split()[2] for command in commands] == ["pytest", "dictlearn.fit"]
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=own, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/online-001/metrics.json").exists()
