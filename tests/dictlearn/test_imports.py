"""Imports run one way: activations.store <- dictlearn <- evals <- experiments."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "transformer_lens"}
# What dictlearn may import of activations; none brings in neither a model nor a corpus.
SHARED = {
    f"activations.{name}"
    for name in ("store", "verify", "precision", "files", "statistics", "config", "terminal")
}
# May import the harvester inside a function, for configs that ask for one.
MAY_HARVEST = {"fit.py", "config.py", "plan.py"}
PROJECT = ("activations", "dictlearn", "evals", "experiments")


# For SAELens's environment, copied and never imported here.
PLUGIN = ROOT / "dictlearn" / "interop" / "saelens_omp.py"


def files(package: str) -> list[Path]:
    return sorted(set((ROOT / package).rglob("*.py")) - {PLUGIN})


def imports(file: Path, *, lazy: bool) -> set[str]:
    """Modules that a file imports, dotted; with `lazy` also those inside functions.

    What stands under `if TYPE_CHECKING:` is never run, and does not count.
    """
    package = file.relative_to(ROOT).parent.parts

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            match node:
                case ast.Import():
                    yield from (alias.name for alias in node.names)
                case ast.ImportFrom():
                    base = package[: len(package) + 1 - node.level] if node.level else ()
                    module = ".".join([*base, *filter(None, [node.module])])
                    # `from activations import store` names a module, `from x import y` may.
                    yield from (f"{module}.{alias.name}" for alias in node.names)
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    yield from walk(node.orelse)
                case ast.FunctionDef() | ast.AsyncFunctionDef() if not lazy:
                    pass
                case _:
                    for inner in ast.iter_child_nodes(node):
                        yield from walk([inner])  # pyright: ignore[reportArgumentType]

    return set(walk(ast.parse(file.read_text()).body))


def of(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if name.split(".")[0] in packages}


def is_shared(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in SHARED)


def test_the_reader_of_imports_finds_them() -> None:
    """The one lazy import that the design allows is seen as such."""
    fit = ROOT / "dictlearn" / "fit.py"
    eager, every = (of(imports(fit, lazy=lazy), "activations") for lazy in (False, True))
    assert "activations.store.Store" in eager
    assert {name.split(".")[1] for name in every - eager} <= {"harvest", "models"}
    assert any(name.startswith("activations.harvest") for name in every - eager)


@pytest.mark.parametrize("file", files("dictlearn"), ids=lambda f: str(f.relative_to(ROOT)))
def test_dictlearn_imports_only_the_store_and_what_it_needs(file: Path) -> None:
    every = imports(file, lazy=True)
    assert not of(every, *HEAVY, "evals", "experiments")
    checked = imports(file, lazy=False) if file.name in MAY_HARVEST else every
    assert all(is_shared(name) for name in of(checked, "activations"))


@pytest.mark.parametrize(
    ("package", "above"),
    [("activations", PROJECT[1:]), ("dictlearn", PROJECT[2:]), ("evals", PROJECT[3:])],
)
def test_no_package_imports_one_above_it(package: str, above: tuple[str, ...]) -> None:
    assert files(package)
    for file in files(package):
        assert not of(imports(file, lazy=True), *above), file


@pytest.mark.parametrize(
    "module", ["dictlearn.interop", "dictlearn.swap", "dictlearn.fit", "dictlearn.report"]
)
def test_no_language_model_library_is_loaded(module: str) -> None:
    code = f"import sys, {module}; print(*(n for n in sys.modules if '.' not in n))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split())
    assert {"dictlearn", "jax"} <= loaded
    assert not loaded & HEAVY


def test_the_package_itself_brings_in_little_and_has_its_names() -> None:
    code = (
        "import sys, dictlearn; assert 'jax' not in sys.modules, 'jax'; "
        "assert set(dictlearn.__all__) <= set(dir(dictlearn)); "
        "assert all(callable(getattr(dictlearn, name)) for name in dictlearn.__all__); "
        "from dictlearn import load; assert load is dictlearn.load; "
        "assert not hasattr(dictlearn, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
