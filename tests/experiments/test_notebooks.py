"""The notebooks: run whole on a small model, and shipped with what came out on Gemma."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import experiments
from activations.config import validate
from experiments.compare.cell import measure
from experiments.compare.results import Results
from experiments.compare.sweep import Sweep, cells

FOLDER = Path(experiments.__file__).parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
HOOK = "blocks.1.hook_resid_post"
WIDGET = "application/vnd.jupyter.widget-view+json"


def parameters(name: str, tiny_run: Path, tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """What stands in the place of a notebook's parameters."""
    match name:
        case "probing-features":
            return {
                "RUN": str(tiny_run), "OTHER": str(tiny_run), "TEXT": "the lazy dog",
                "PROMPT": "the quick", "TARGET": " fox", "N_TEXTS": 8,
            }  # fmt: skip
        case "steering":
            sizes = {"concepts": ["nurse"], "texts": 10, "contexts": 2, "samples": 1,
                     "new_tokens": 3, "prompts": ["the dog", "the fox"]}  # fmt: skip
            return {
                "RUN": str(tiny_run), "FLUENCY_MODEL": f"dir:{tiny_model_dir}", "SIZES": sizes,
                "KL": (0.001, 0.01), "PROMPT": "the lazy", "NEW_TOKENS": 3,
            }  # fmt: skip
        case "ksvd-vs-sae":
            sweep = compared(tiny_run.parent / "store", tmp_path)
            return {
                "PLACE": sweep.place, "BASE": "ksvd", "OTHER": "topk", "CONTROL": "data_rows",
                "RUN": "{name}-m24-k3-s{seed}",
            }  # fmt: skip
    raise AssertionError(f"{name}: a notebook that this test does not know")


def compared(store: Path, place: Path) -> Sweep:
    """A small sweep, done in this process."""
    pursuit, short = {"name": "omp"}, {"batch_size": 64, "epochs": 1}
    sae = {"name": "sae", "variant": {"name": "topk"}, "learning_rate": 1e-2}
    rows = {"name": "untrained", "atoms": "data_rows", "encoder": pursuit}
    table = {
        "name": "small", "output": str(place / "sweep"), "n_atoms": [24], "k": [3],
        "seeds": [0, 1], "encoders": ["omp"], "evals": ["core"], "against": "ksvd",
        "data": {"store": str(store), "hook": HOOK, "test": 0.3},
        "dictionaries": {
            "ksvd": {"solver": {"name": "ksvd", "encoder": pursuit}, "fit": short},
            "topk": {"solver": sae, "fit": short},
            "data_rows": {"solver": rows, "fit": short, "control": True},
        },
        "settings": {"core": {"tokens": 100, "behaviour_tokens": 50}},
    }  # fmt: skip
    sweep = validate(Sweep, table, "sweep")
    every = cells(sweep, "sweep")
    for cell in every:
        measure(sweep, cell)
    Results(sweep, every).write(sweep.place)
    return sweep


def execute(book: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a notebook in a folder of its own."""
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(folder / "jupyter"))
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()


def outputs(book: Any) -> list[Any]:
    return [output for cell in book.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_whole(
    name: str, tiny_run: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (own,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    given = parameters(name, tiny_run, tiny_model_dir, tmp_path)
    asked = set(re.findall(r"^([A-Z_]+(?:, [A-Z_]+)*) = ", own.source, re.MULTILINE))
    assert {one for names in asked for one in names.split(", ")} == given.keys()
    own.source = "import dictlearn\nfrom pathlib import Path, PosixPath\n" + "\n".join(
        f"{key} = {value!r}" for key, value in given.items()
    )
    execute(book, tmp_path, monkeypatch)
    assert not [output for output in outputs(book) if WIDGET in output.get("data", {})]
    for cell in book.cells:  # what it was made to show, it shows
        if cell.cell_type == "code" and cell is not own and shows(cell.source):
            assert cell.outputs, cell.source


def shows(source: str) -> bool:
    """Whether a cell ends in an expression or prints."""
    last = source.splitlines()[-1]
    return not last.startswith((" ", "def ")) and " = " not in last and not last.endswith(":")


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_shipped_with_its_outputs(name: str) -> None:
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert outputs(book)
    for output in outputs(book):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert WIDGET not in output.get("data", {})  # it would show nothing without its kernel
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)


@pytest.mark.parametrize("off", ["", "1"])
def test_a_progress_bar_shows_itself_unless_it_is_turned_off(
    off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", off)
    source = """
from activations.terminal import progress
with progress(total=2, desc="a bar") as bar:
    print(bar.disable or bar.mininterval)
    bar.update(2)"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    execute(book, tmp_path, monkeypatch)
    shown = [output for output in outputs(book) if "a bar" in str(output)]
    assert bool(shown) == (not off)
    (printed,) = (output.text.strip() for output in outputs(book) if "text" in output)
    assert printed == ("True" if off else "0.2")
