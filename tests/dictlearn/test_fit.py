"""python -m dictlearn.fit: what a run holds, and what each user's mistake says."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest

import dictlearn
from activations import files
from activations.config import validate
from activations.store import Store
from activations.terminal import UserError
from activations.writer import write_store
from dictlearn import artifact, fit, metrics
from dictlearn.config import FitConfig

HOOK = "blocks.0.hook_resid_post"
N_DOCUMENTS, ROWS, WIDTH = 24, 40, 16


def make_store(
    path: Path, *, seed: int = 0, bad_row: int | None = None, width: int = WIDTH
) -> Path:
    """Planted sparse rows of 24 documents in 3 shards."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(16, width))
    per_shard = N_DOCUMENTS // 3
    n = per_shard * ROWS

    def datasets(shard: int) -> dict[str, np.ndarray]:
        codes = rng.normal(size=(n, 16))
        codes[np.argsort(rng.random((n, 16)), axis=1) >= 2] = 0  # two atoms a row
        x = (codes @ atoms + 0.01 * rng.normal(size=(n, width)) + 3).astype(np.float32)
        if shard == 1 and bad_row is not None:
            x[bad_row] = np.nan
        sequence = np.repeat(np.arange(per_shard) + shard * per_shard, ROWS).astype(np.int32)
        return {
            f"activations/{HOOK}": x,
            "token": rng.integers(5, 90, n).astype(np.int32),
            "document": sequence,
            "sequence": sequence,
            "position": np.tile(np.arange(ROWS, dtype=np.int32), per_shard),
        }

    write_store(
        path,
        map(datasets, range(3)),
        sequences=np.zeros((N_DOCUMENTS, 2, ROWS)),
        vocabulary={},
        request={"model": "dir:here"},
        model={"spec": "dir:here", "description": "a made model"},
        corpus={},
        forward={},
        hooks={HOOK: width},
        context_length=ROWS,
        n_documents=N_DOCUMENTS,
        shard_sequences=per_shard,
        dropped_positions=("special",),
    )
    return path


def config_table(store: Path, **changes: object) -> dict:
    table = {
        "name": "small",
        "data": {"store": str(store), "hook": HOOK},
        "solver": {"name": "ksvd", "n_atoms": 16, "encoder": {"name": "omp", "k": 2}},
        "fit": {"batch_size": 256, "epochs": 3},
    }
    return {**table, **changes}


SAE = {"name": "sae", "n_atoms": 16, "variant": {"name": "topk", "k": 2}}


def typed(table: dict) -> FitConfig:
    return validate(FitConfig, json.loads(json.dumps(table, default=str)), "config")


def run_apart(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dictlearn.fit", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def command(here, monkeypatch, capsys):
    """The same as `run_apart`, in this process, which has imported everything already."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["fit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            fit.command()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code, said.out, said.err)

    return run


@contextlib.contextmanager
def endless(*arguments: object, cwd: Path, until: Callable[[], bool]) -> Iterator[subprocess.Popen]:
    """A fit in a process of its own, which never ends; it has come as far as `until`."""
    with subprocess.Popen(
        [sys.executable, "-m", "dictlearn.fit", *map(str, arguments), "--set", "fit.epochs=100000"],
        cwd=cwd, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while not until():
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


def assert_one_message(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "made")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = """
name = "small"
[data]
store = "{store}"
hook = "{hook}"
[solver]
name = "ksvd"
n_atoms = 16
encoder = {{ name = "omp", k = 2 }}
[fit]
batch_size = 256
epochs = 2
"""


@pytest.fixture
def quick(here, store):
    path = here / "quick.toml"
    path.write_text(QUICK.format(store=store, hook=HOOK))
    return path


@pytest.mark.parametrize("solver", [None, SAE], ids=["ksvd", "sae"])
def test_a_run_holds_what_the_design_says(here, store, solver):
    table = config_table(store, **({"solver": solver} if solver else {}))
    run = fit.fit(typed(table))
    assert run == Path("runs/small-001")
    assert {p.name for p in run.iterdir()} == {
        "config.toml", "dictionary.safetensors", "dictionary.json", "train.jsonl", "metrics.json",
    }  # fmt: skip
    loaded = dictlearn.load(run)
    figures = loaded.metrics
    x = np.concatenate([Store(store).activations(s, HOOK) for s in Store(store).manifest.shards])
    document = Store(store).column("document")
    test = x[np.isin(document, loaded.metadata["split"]["test"])]
    codes = loaded.coder.encode(test)
    x_hat = np.asarray(loaded.coder.decode(codes))
    assert figures["n_tokens"] == len(test)
    assert figures["fvu"] == pytest.approx(metrics.fvu(test, x_hat), rel=1e-4)
    assert figures["l0"] == pytest.approx(float(codes.l0().mean()), rel=1e-6)
    assert figures["fvu_bulk_interval"][0] <= figures["fvu_bulk"] <= figures["fvu_bulk_interval"][1]
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    resolved = tomllib.loads((run / "config.toml").read_text())
    assert resolved["data"]["memory_mib"] == 2048
    assert typed(resolved) == typed({**table, "data": resolved["data"]})


def test_no_document_is_in_two_parts(here, store):
    split = dictlearn.load(fit.fit(typed(config_table(store)))).metadata["split"]
    every = [*split["train"], *split["validation"], *split["test"]]
    assert sorted(every) == list(range(N_DOCUMENTS))


def test_ksvd_beats_the_control_on_planted_data(here, store):
    table = config_table(store, fit={"batch_size": 256, "epochs": 8})
    figures = dictlearn.load(fit.fit(typed(table))).metrics
    assert figures["fvu_bulk"] < 0.85 * figures["control_fvu_bulk"]


@pytest.mark.parametrize("solver", [None, SAE], ids=["ksvd", "sae"])
def test_one_seed_one_dictionary(here, store, solver):
    table = config_table(store, **({"solver": solver} if solver else {}))
    first, second = fit.fit(typed(table)), fit.fit(typed(table))
    other = fit.fit(typed({**table, "seed": 1}))
    assert [path.name for path in (first, second, other)] == ["small-001", "small-002", "small-003"]
    same = (first / artifact.WEIGHTS).read_bytes() == (second / artifact.WEIGHTS).read_bytes()
    assert same
    assert (first / artifact.WEIGHTS).read_bytes() != (other / artifact.WEIGHTS).read_bytes()


def test_the_best_state_on_validation_is_kept(here, store):
    """A learning rate that ruins the SAE late: the saved state is the best line of train.jsonl."""
    table = config_table(store, solver={**SAE, "learning_rate": 0.3}, fit={"batch_size": 64,
                         "epochs": 8})  # fmt: skip
    run = fit.fit(typed(table))
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    seen = {line["step"]: line["validation_fvu_bulk"] for line in lines if "validation_fvu" in line}
    assert len(seen) > 3
    assert dictlearn.load(run).metrics["best_step"] == min(seen, key=seen.__getitem__)


def test_the_test_rows_are_read_once_and_last(here, store, monkeypatch):
    read = []
    evaluate = fit.heldout.evaluate

    def watched(coder, rows, bulk):
        read.append(tuple(rows.documents))
        return evaluate(coder, rows, bulk)

    monkeypatch.setattr(fit.heldout, "evaluate", watched)
    run = fit.fit(typed(config_table(store)))
    split = dictlearn.load(run).metadata["split"]
    assert [part == tuple(split["test"]) for part in read[-2:]] == [True, True]  # fit, control
    assert all(part == tuple(split["validation"]) for part in read[:-2])


def test_nan_stops_with_the_step(here, store):
    table = config_table(store, solver={**SAE, "learning_rate": 1e30})
    with pytest.raises(UserError, match=r"step \d+: the objective is (nan|inf).*learning_rate"):
        fit.fit(typed(table))
    assert not list(Path("runs").iterdir())


def test_summary_names_weights_control_and_sibling(here, store, quick):
    fit.fit(typed(config_table(store, solver=SAE)))
    result = run_apart(quick, cwd=here)
    assert result.returncode == 0, result.stderr
    for words in ("a made model", "control: untrained rows", "topk sae (small-001)", "fvu_bulk"):
        assert words in result.stdout


def test_dry_run_does_nothing(here, quick, command):
    before = sorted(here.rglob("*"))
    result = command(quick, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert sorted(here.rglob("*")) == before
    for words in ("960", "steps", "bytes on disk", "memory"):
        assert words in result.stdout


BAD_CONFIGS = {
    "misspelt key": (["solver.n_atms=4"], ["solver.n_atms: unknown key", "n_atoms"]),
    "nested key": (["solver.k=4"], ["solver.k: unknown key", "encoder.k"]),
    "k > m": (["solver.encoder.k=17"], ["solver.encoder.k", "17", "16"]),
    "k = 0": (["solver.encoder.k=0"], ["solver.encoder.k", "greater than 0"]),
    "wrong type": (["solver.n_atoms='16'"], ["solver.n_atoms", "integer"]),
    "no such solver": (["solver.name=kvsd"], ["solver.name", "ksvd"]),
    "split": (["data.test=0.6", "data.validation=0.5"], ["data", "nothing for training"]),
    "hook not in store": (["data.hook=blocks.1.hook_resid_post"], [HOOK, "holds no hook"]),
    "no store": (["data.store=nowhere"], ["nowhere", "no store"]),
    "batch": (["fit.batch_size=100000"], ["fit.batch_size"]),
    "more atoms than rows": (["solver.n_atoms=4096"], ["solver.n_atoms", "training rows"]),
    "dead_after": (["solver.dead_after=99999999999999"], ["solver.dead_after"]),
    "epochs": (["fit.epochs=1e300"], ["fit.epochs"]),
    "override": (["nonsense"], ["--set nonsense", "section.key=value"]),
    "overwrite": (["--overwrite"], ["--overwrite", "output"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(here, quick, name, command):
    overrides, words = BAD_CONFIGS[name]
    arguments = [a for o in overrides for a in ([o] if o.startswith("--") else ["--set", o])]
    before = sorted(here.rglob("*"))
    assert_one_message(command(quick, *arguments), *words)
    assert sorted(here.rglob("*")) == before


def test_missing_config(here):
    assert_one_message(run_apart("absent.toml", cwd=here), "absent.toml", "no such config")


def test_toml_that_does_not_parse_shows_the_line(here, command):
    (here / "bad.toml").write_text('name = "x"\nseed = = 3\n')
    assert_one_message(command("bad.toml"), "line 2", "seed = = 3")


def test_truncated_shard(here, store, quick, command):
    shutil.copytree(store, here / "cut")
    shard = here / "cut" / "shard-00001.h5"
    os.truncate(shard, shard.stat().st_size - 100)
    result = command(quick, "--set", "data.store=cut")
    assert_one_message(result, "shard-00001.h5", "manifest tells")
    assert not (here / "runs").exists()


def test_a_flipped_bit_is_found_on_demand(here, store, quick, command):
    shutil.copytree(store, here / "flipped")
    with (here / "flipped" / "shard-00001.h5").open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    Store(here / "flipped")  # opening is cheap, and reads no rows
    result = command(quick, "--verify", "--set", "data.store=flipped")
    assert_one_message(result, "1 of 5 files", "shard-00001.h5: is damaged")
    assert not (here / "runs").exists()


def test_nan_row_is_named(here, quick, command):
    make_store(here / "bad", bad_row=7)
    result = command(quick, "--set", "data.store=bad")
    assert_one_message(result, "shard-00001.h5", "row 7", HOOK)
    assert not (here / "runs").exists()


def test_a_named_output_is_not_overwritten_by_itself(here, quick, command):
    named = (quick, "--set", "output=mine")
    assert command(*named).returncode == 0
    before = (here / "mine" / artifact.WEIGHTS).read_bytes()
    assert_one_message(command(*named), "mine", "finished run", "--overwrite")
    assert (here / "mine" / artifact.WEIGHTS).read_bytes() == before
    assert command(*named, "--set", "seed=5", "--overwrite").returncode == 0
    assert (here / "mine" / artifact.WEIGHTS).read_bytes() != before
    assert [p.name for p in here.iterdir() if "mine" in p.name] == ["mine"]


def test_what_is_no_run_is_never_replaced(here, quick, command):
    (here / "precious").mkdir()
    (here / "precious" / "thesis.tex").write_text("years")
    result = command(quick, "--set", "output=precious", "--overwrite")
    assert_one_message(result, "precious", "not a run")
    assert (here / "precious" / "thesis.tex").read_text() == "years"


def test_a_failed_overwrite_keeps_the_old_run(here, store):
    table = config_table(store, output="mine", solver=SAE)
    fit.fit(typed(table))
    before = (here / "mine" / artifact.WEIGHTS).read_bytes()
    with pytest.raises(UserError):
        fit.fit(typed({**table, "solver": {**SAE, "learning_rate": 1e30}}), overwrite=True)
    assert (here / "mine" / artifact.WEIGHTS).read_bytes() == before


def test_a_full_disk_leaves_a_run_that_can_go_on(here, store, monkeypatch):
    def full(path, content):
        if path.name == artifact.WEIGHTS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.replace_file(path, content)

    monkeypatch.setattr(artifact, "replace_file", full)
    with pytest.raises(UserError, match=r"no space left .* kept\. Go on"):
        fit.fit(typed(config_table(store)))
    run = here / "runs" / "small-001"
    with pytest.raises(artifact.ArtifactError, match="unfinished"):
        dictlearn.load(run)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert dictlearn.load(fit.go_on(run)).metrics["l0"] > 0


@pytest.fixture
def interruptible():
    """Ctrl-C counts, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_leaves_a_run_that_says_so(here, store, quick, command):
    log = here / "runs" / "small-001" / "train.jsonl"

    def has_begun() -> bool:
        return log.exists() and log.read_text().count("\n") > 3

    with endless(quick, cwd=here, until=has_begun) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "kept. Go on: python -m dictlearn.fit runs/small-001" in errors
    with pytest.raises(artifact.ArtifactError, match="unfinished: it is running, or was killed"):
        dictlearn.load(here / "runs" / "small-001")
    # The next fit goes elsewhere, and this one is never shown as a sibling.
    assert command(quick).returncode == 0
    assert dictlearn.load(here / "runs" / "small-002").metrics["l0"] > 0


def test_two_fits_at_once_get_directories_of_their_own(here, quick):
    both = [
        subprocess.Popen([sys.executable, "-m", "dictlearn.fit", str(quick)], cwd=here)
        for _ in range(2)
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert {path.name for path in (here / "runs").iterdir()} == {"small-001", "small-002"}


def test_a_store_of_another_model_is_refused(here, store, quick, command):
    table = {"model": "dir:elsewhere", "hooks": [HOOK], "corpus": {"kind": "python-docs"}}
    result = command(quick, "--set", f"harvest={_inline(table)}")
    assert_one_message(result, "model", "dir:here", "dir:elsewhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"store": "x"}, ["harvest.store", "data.store"]),
        ({"modle": "x"}, ["harvest.modle", "model"]),
        ({"hooks": ["blocks.5.hook_resid_post"]}, ["data.hook", "blocks.5.hook_resid_post"]),
        ({"corpus": {"kind": "pydocs"}}, ["harvest.corpus.kind", "python-docs"]),
        ({"context_length": 1}, ["harvest.context_length"]),
    ],
)
def test_bad_harvest_sections(here, quick, change, words, command):
    table = {"model": "dir:x", "hooks": [HOOK], "corpus": {"kind": "python-docs"}, **change}
    assert_one_message(command(quick, "--set", f"harvest={_inline(table)}", "--dry-run"), *words)


def test_rows_of_one_document_cannot_be_split(here, quick, command):
    made = make_store(here / "one")
    for shard in Store(made).manifest.shards:
        with h5py.File(made / shard.file, "r+") as file:
            file["document"][:] = 0
    result = command(quick, "--set", "data.store=one")
    assert_one_message(result, "document", "documents_are")


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def test_jax_is_on_the_cpu_here_or_says_so(here, store):
    assert dictlearn.load(fit.fit(typed(config_table(store)))).metadata["device"] == (
        jax.devices()[0].device_kind
    )


@pytest.mark.usefixtures("interruptible")
def test_two_fits_at_one_named_place(here, store, quick, command):
    """The second is refused while the first runs; Ctrl-C keeps both what was and what is begun."""
    named = (quick, "--set", "output=mine", "--overwrite")
    assert command(*named).returncode == 0
    before = (here / "mine" / artifact.WEIGHTS).read_bytes()
    log = here / "mine" / "train.jsonl"

    def has_begun() -> bool:
        return (here / ".mine.replaced").exists() and log.exists() and log.read_text() != ""

    with endless(*named, cwd=here, until=has_begun) as first:
        assert_one_message(command(*named), "another fit is writing")
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=300)
    assert first.returncode == 130
    assert (here / ".mine.replaced" / artifact.WEIGHTS).read_bytes() == before
    assert (here / "mine" / artifact.CHECKPOINT).exists()
    assert command(*named).returncode == 0  # begun anew
    assert dictlearn.load(here / "mine").metrics["l0"] > 0
    assert [path.name for path in here.iterdir() if "mine" in path.name] == ["mine"]


def test_a_fit_that_stops_at_a_tolerance_alone(here, quick, command):
    setting = 'solver.encoder={name="omp", tolerance=0.3}'
    done = command(quick, "--set", setting)
    assert done.returncode == 0, done.stderr
    assert "as many a token as the tolerance takes" in done.stdout
    assert "OMP with the same tolerance" in done.stdout
    assert 0 < dictlearn.load(here / "runs" / "small-001").metrics["median_error"] < 0.3**2 * 1.5


def test_a_run_can_be_fitted_again_from_its_own_config(here, quick, command):
    assert command(quick, "--set", "output=mine").returncode == 0
    assert command("mine/config.toml", "--set", "solver.encoder.k=1").returncode == 0
    assert dictlearn.load(here / "runs" / "small-001").metrics["l0"] <= 1


def test_without_a_bulk_the_figures_are_null(here, tmp_path):
    """Every one of 4 dimensions holds over 10 % of the variance: fvu_bulk is not defined."""
    made = make_store(tmp_path / "narrow", width=4)
    table = config_table(made, solver={**SAE, "n_atoms": 8})
    run = fit.fit(typed(table))
    figures = json.loads((run / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert figures["fvu_bulk"] is None
    assert 0 < figures["fvu"] < 1
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    seen = {line["step"]: line["validation_fvu"] for line in lines if "validation_fvu" in line}
    assert figures["best_step"] == min(seen, key=seen.__getitem__)
    fit.report.show(run)


def test_a_killed_overwrite_does_not_cost_the_old_run(here, store):
    """Killed while replacing, then replaced in vain: the finished run is back."""
    table = config_table(store, output="mine", solver=SAE)
    fit.fit(typed(table))
    before = (here / "mine" / artifact.WEIGHTS).read_bytes()
    (here / "mine").rename(here / ".mine.replaced")  # as a kill -9 leaves it
    (here / "mine").mkdir()
    (here / "mine" / artifact.UNFINISHED).write_text("killed")
    with pytest.raises(UserError):
        fit.fit(typed({**table, "solver": {**SAE, "learning_rate": 1e30}}), overwrite=True)
    assert (here / "mine" / artifact.WEIGHTS).read_bytes() == before


def test_a_second_fit_compiles_nothing(store: Path, tmp_path: Path, compiled: list[str]) -> None:
    """What is compiled stays in memory: a notebook that fits again and again would grow."""
    for name in ("first", "second"):
        compiled.clear()
        fit.fit(typed(config_table(store, output=str(tmp_path / name))))
    assert not compiled
