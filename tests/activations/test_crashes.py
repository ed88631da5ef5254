"""Laws of a harvest that is killed, shared or disturbed: it ends with the bytes of one that is not.

A process that has imported everything forks the harvests that are killed here, so that a kill is
cheap; two kills are of the real command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tomli_w

from activations.store import MANIFEST, SEQUENCES, VOCABULARY, Store, StoreError
from activations.verify import verify

pytestmark = pytest.mark.slow
pytest.importorskip("transformer_lens", reason="the [lm] extra is not installed")

# One thread: a process that has started threads cannot be forked. The real command gets the same.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Reads one order a line: fork a command (its pid comes back), or wait for one (its exit code).
WARM = """
import gc, json, os, signal, sys
import torch, transformers, transformer_lens.model_bridge
from activations import harvest, merge, models, sequences, store, terminal, writer

loaded = models.load(sys.argv[1])
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        status = os.waitpid(order["wait"], 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        signal.alarm(200)  # nothing hangs for ever
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = order["argv"]
        exec(order["first"], globals())
        try:
            terminal.run_command({"harvest": harvest, "merge": merge}[order["argv"][0]].main)
        except SystemExit as ended:
            sys.stdout.flush()
            os._exit(ended.code)
"""
# Leaves the loading out, where it is not what is stopped.
LOADED = "models.load = lambda spec: loaded\n"
# Before the k-th change on the disk the process is killed, or the disk is found full.
DISTURBED = """
import errno, pathlib
left = {k}

def disturbed(change):
    def run(*arguments, **options):
        global left
        left -= 1
        if not left and {full}:
            raise OSError(errno.ENOSPC, "No space left on device")
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*arguments, **options)
    return run

os.fsync, os.replace = disturbed(os.fsync), disturbed(os.replace)
if not {full}:
    pathlib.Path.unlink = disturbed(pathlib.Path.unlink)
"""
# Writing a shard, or another function, waits until a file is there, and says that it waits.
GATED = """
import pathlib, time

def gated(call):
    def run(*arguments, **options):
        pathlib.Path({path!r} + ".waits").touch()
        while not pathlib.Path({path!r}).exists():
            time.sleep(0.001)
        return call(*arguments, **options)
    return run

{name} = gated({name})
"""

# Takes its time over every document and every shard, so that a test hits what it aims at.
SLOW = """
import time

def slowly(documents, tokenizer, tokenised=sequences._tokenised):
    def slow():
        for document in documents:
            time.sleep(0.004)
            yield document
    return tokenised(slow(), tokenizer)

def write_shard(*arguments, write=writer.StoreWriter.write_shard):
    time.sleep(0.01)
    write(*arguments)

sequences._tokenised, writer.StoreWriter.write_shard = slowly, write_shard
"""


def gated(gate: Path, name: str) -> str:
    return LOADED + GATED.format(path=str(gate), name=name)


@dataclasses.dataclass
class Child:
    """A forked command."""

    warm: subprocess.Popen[str]
    pid: int
    log: Path

    def kill(self, sign: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, sign)  # its parent has not waited for it: the pid is still its own

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return answer(self.warm, {"wait": self.pid})

    def ends(self, code: int, *expected: str) -> None:
        """It ends with this exit code, has said all this, and never a traceback."""
        ended, said = self.wait(), self.log.read_text()
        assert ended == code, said
        assert "Traceback" not in said
        assert said.count("error: ") == (1 if code == 2 else 0)
        for part in expected:
            assert part in said


def answer(warm: subprocess.Popen[str], order: dict[str, Any]) -> int:
    assert warm.stdin is not None
    assert warm.stdout is not None
    warm.stdin.write(json.dumps(order) + "\n")
    warm.stdin.flush()
    return int(warm.stdout.readline())


Start = Callable[..., Child]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Start]:
    """`start(config, *arguments, first=)` forks the harvest; or `start("merge", store)` a merge.

    `first` is what the process runs before.
    """
    folder = tmp_path_factory.mktemp("children")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WARM, f"dir:{tiny_model_dir}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    ) as warm:
        count = iter(range(10**6))

        def run(what: dict[str, Any] | str, *arguments: str, first: str = LOADED) -> Child:
            name = folder / str(next(count))
            argv = [what, *arguments] if isinstance(what, str) else ["harvest", f"{name}.toml"]
            if not isinstance(what, str):
                Path(f"{name}.toml").write_text(tomli_w.dumps(what))
                argv += arguments
            log = Path(f"{name}.log")
            log.touch()
            order = {"argv": argv, "first": first, "log": str(log)}
            return Child(warm, answer(warm, order), log)

        yield run
        assert warm.stdin is not None
        warm.stdin.close()


@pytest.fixture(scope="module")
def settings(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A harvest of some 300 small shards, without its place."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["fox", "lazy", "dog", "quick", "mind", "the", "</s>", "naïve", "over", "jumps"]
    for index in range(80):
        (folder / f"{index}.txt").write_text(f"{index} {' '.join(rng.choice(words, 70))}")
    return {
        "model": f"dir:{tiny_model_dir}",
        "hooks": ["blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"],  # not in sorted order
        "gradients": True,
        "dtype": "bfloat16",
        "context_length": 20,
        "batch_size": 1,
        "shard_tokens": 40,
        "corpus": {"kind": "files", "paths": [str(folder / "*.txt")]},
    }


@pytest.fixture(scope="module")
def whole(start: Start, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an uninterrupted harvest."""
    return uninterrupted(start, settings, tmp_path_factory)


@pytest.fixture(scope="module")
def short(settings: dict[str, Any]) -> dict[str, Any]:
    """A harvest of four shards."""
    return settings | {"max_tokens": 120}


@pytest.fixture(scope="module")
def whole_short(
    start: Start, short: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The store of an uninterrupted short harvest."""
    return uninterrupted(start, short, tmp_path_factory)


def uninterrupted(
    start: Start, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("whole") / "store"
    start(settings | {"store": str(place)}, first="").ends(0, "rows of")
    verify(place)
    return place


def visible(store: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in store.iterdir() if not f.name.startswith(".")}


def check_same(store: Path, whole: Path) -> None:
    """Every dataset, then every byte of every file, and no other file but hidden locks."""
    manifest = Store(whole).manifest
    shards = [shard.file for shard in manifest.shards]
    here, there = visible(store), visible(whole)
    assert set(there) == {MANIFEST, SEQUENCES, VOCABULARY, *shards}
    assert set(here) == set(there)
    hidden = [f.name for f in store.iterdir() if f.name not in here]
    assert all(name.endswith(".lock") for name in hidden)
    for name in shards:
        with h5py.File(store / name) as one, h5py.File(whole / name) as other:
            for dataset in (*manifest.datasets, "token", "document", "sequence", "position"):
                a, b = one[dataset], other[dataset]
                assert isinstance(a, h5py.Dataset)
                assert isinstance(b, h5py.Dataset)
                assert a.id.get_type() == b.id.get_type()
                assert a[()].tobytes() == b[()].tobytes(), f"{name}: {dataset}"
    assert [name for name in there if here[name] != there[name]] == []


def n_shards(store: Path) -> int:
    """Shards on the disk."""
    try:
        return sum(name.startswith("shard-") and name[-3:] == ".h5" for name in os.listdir(store))
    except FileNotFoundError:
        return 0


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(200_000):
        if condition():
            return
        time.sleep(0.0003)
    pytest.fail("it never happened")


def check_unfinished(store: Path) -> None:
    with pytest.raises(StoreError, match=r"unfinished|no store there"):
        Store(store)


@contextlib.contextmanager
def real_command(folder: Path, config: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    (folder / "real.toml").write_text(tomli_w.dumps(config))
    with subprocess.Popen(
        [sys.executable, "-m", "activations.harvest", folder / "real.toml"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_twenty_kills_at_random_moments_leave_no_trace(
    start: Start, settings: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    place = tmp_path / "store"
    config = settings | {"store": str(place)}
    total = n_shards(whole)
    assert total > 200

    def kill(process: Child | subprocess.Popen[bytes]) -> None:
        process.kill()
        assert process.wait() == -signal.SIGKILL
        check_unfinished(place)

    # Before the first shards: at first while it tokenises, then anywhere.
    for early in (SEQUENCES + ".partial", "", "", "", "", ""):
        child = start(config, first=SLOW)
        wait_until(lambda file=early: not file or (place / file).exists())
        end = time.monotonic() + rng.uniform(0, 0.1 if early else 1.0)
        wait_until(lambda end=end: time.monotonic() > end or n_shards(place) > 10)
        kill(child)
    for _ in range(2):
        before = n_shards(place)
        with real_command(tmp_path, config) as process:
            wait_until(lambda before=before: n_shards(place) > before + 2)
            time.sleep(rng.uniform(0, 0.01))
            kill(process)
    # Anywhere in the rest.
    for target in np.sort(rng.integers(n_shards(place), total - 40, 12)):
        child = start(config, first=SLOW)
        wait_until(lambda enough=target: n_shards(place) >= enough)
        time.sleep(rng.uniform(0, 0.03))
        kill(child)
    assert n_shards(place) < total
    start(config, first="").ends(0, "rows of")
    check_same(place, whole)
    verify(place)


def test_the_real_command_makes_the_same_store(
    short: dict[str, Any], whole_short: Path, tmp_path: Path
) -> None:
    with real_command(tmp_path, short | {"store": str(tmp_path / "store")}) as process:
        assert process.wait() == 0
    check_same(tmp_path / "store", whole_short)


@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
def test_it_may_be_stopped_before_any_change_on_the_disk(
    start: Start, short: dict[str, Any], whole_short: Path, tmp_path: Path, full: bool
) -> None:
    for k in range(1, 100):
        place = tmp_path / str(k)
        config = short | {"store": str(place)}
        child = start(config, first=LOADED + DISTURBED.format(k=k, full=full))
        code = child.wait()
        if code == 0:
            break
        said = child.log.read_text()
        if full:
            assert code == 2, said
            assert said.count("error: ") == 1
            assert "no space left on the device" in said
            assert "Traceback" not in said
        else:
            assert code == -signal.SIGKILL, said
            for torn in place.glob("*.partial"):  # as if the kill had come while it was written
                os.truncate(torn, torn.stat().st_size // 2)
        start(config).ends(0)
        check_same(place, whole_short)
    assert k > 6 * n_shards(whole_short)


def test_a_kill_before_the_shards_are_joined_costs_nothing(
    start: Start, short: dict[str, Any], whole_short: Path, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    config = short | {"store": str(place)}
    deadly = LOADED + "harvest.merge = lambda path: os.kill(os.getpid(), signal.SIGKILL)"
    assert start(config, first=deadly).wait() == -signal.SIGKILL
    assert n_shards(place) == n_shards(whole_short)
    check_unfinished(place)
    start(config).ends(0)
    check_same(place, whole_short)


def test_a_kill_after_the_shards_are_joined_leaves_a_complete_store(
    start: Start, short: dict[str, Any], whole_short: Path, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    config = short | {"store": str(place)}
    deadly = (
        LOADED
        + """
import pathlib
unlink = pathlib.Path.unlink
def deadly(self, *arguments, **options):
    if self.name == "worker-1-of-1.json":
        os.kill(os.getpid(), signal.SIGKILL)
    unlink(self, *arguments, **options)
pathlib.Path.unlink = deadly
"""
    )
    assert start(config, first=deadly).wait() == -signal.SIGKILL
    assert (place / MANIFEST).read_bytes() == (whole_short / MANIFEST).read_bytes()
    verify(place)
    start(config).ends(0, "nothing to harvest")
    check_same(place, whole_short)


# Ctrl-C


@pytest.mark.parametrize("shards", [1, 40])
def test_ctrl_c_while_shards_are_written_ends_with_130(
    start: Start, settings: dict[str, Any], whole: Path, tmp_path: Path, shards: int
) -> None:
    place = tmp_path / "store"
    config = settings | {"store": str(place)}
    child = start(config, first=LOADED + SLOW)
    wait_until(lambda: n_shards(place) >= shards)
    child.kill(signal.SIGINT)
    child.ends(130, "interrupted")
    assert shards <= n_shards(place) < n_shards(whole)
    assert list(place.glob("*.partial")) == []
    check_unfinished(place)
    start(config).ends(0)
    check_same(place, whole)


@pytest.mark.parametrize("name", ["models.load_tokenizer", "models.load", "sequences._cut"])
def test_ctrl_c_before_the_first_manifest_leaves_nothing(
    start: Start, short: dict[str, Any], tmp_path: Path, name: str
) -> None:
    place, gate = tmp_path / "store", tmp_path / "gate"
    child = start(short | {"store": str(place)}, first=gated(gate, name))
    wait_until(Path(f"{gate}.waits").exists)
    child.kill(signal.SIGINT)
    child.ends(130, "interrupted")
    assert not place.exists()


# Several processes


@pytest.mark.parametrize("name", ["models.load", "writer.StoreWriter.write_shard", "harvest.merge"])
def test_a_second_harvester_of_the_same_store_is_refused(
    start: Start, short: dict[str, Any], whole_short: Path, tmp_path: Path, name: str
) -> None:
    place, gate = tmp_path / "store", tmp_path / "gate"
    config = short | {"store": str(place)}
    one = start(config, first=gated(gate, name))
    wait_until(Path(f"{gate}.waits").exists)
    before = visible(place)
    for _ in range(2):
        start(config).ends(2, str(place), "another process is writing this store as worker 1/1")
    assert visible(place) == before
    gate.touch()
    one.ends(0, "rows of")
    check_same(place, whole_short)


def test_three_workers_of_which_one_dies_make_the_store_of_one(
    start: Start, settings: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    config = settings | {"store": str(place)}
    total = n_shards(whole)
    second = [f"shard-{index:05d}.h5" for index in range(total // 3, total * 2 // 3)]
    workers = [start(config, "--worker", f"{i}/3", first=SLOW) for i in (1, 2, 3)]
    wait_until((place / second[5]).exists)
    workers[1].kill()
    assert workers[1].wait() == -signal.SIGKILL
    for worker in (workers[0], workers[2]):
        worker.ends(0, f"python -m activations.merge {place}")
    missing = sum(not (place / name).exists() for name in second)
    assert 0 < missing < len(second)
    before = visible(place)
    start("merge", str(place)).ends(2, "Finish every worker first")
    start(config).ends(2, "was begun by 3 worker(s), not by 1")
    start(config, "--worker", "2/4").ends(2, "was begun by 3 worker(s), not by 4")
    check_unfinished(place)
    assert visible(place) == before
    start(config, "--worker", "2/3").ends(0, f"python -m activations.merge {place}")
    check_unfinished(place)
    start("merge", str(place)).ends(0, f"complete, {len(Store(whole)):,} rows in {total} shards")
    check_same(place, whole)
    start(config, "--worker", "2/3").ends(0, "nothing to harvest")
    start("merge", str(place)).ends(0, "complete")
    check_same(place, whole)


@pytest.mark.parametrize("name", ["sequences._cut", "models.load"])
def test_the_other_workers_take_over_where_one_dies_at_the_beginning(
    start: Start, short: dict[str, Any], whole_short: Path, tmp_path: Path, name: str
) -> None:
    place, gate = tmp_path / "store", tmp_path / "gate"
    config = short | {"store": str(place)}
    one = start(config, "--worker", "1/2", first=gated(gate, name))
    wait_until(Path(f"{gate}.waits").exists)
    two = start(config, "--worker", "2/2")
    wait_until(lambda: "waiting for another process" in two.log.read_text())
    assert not (place / MANIFEST).exists()
    one.kill()
    assert one.wait() == -signal.SIGKILL
    two.ends(0)
    start(config, "--worker", "1/2").ends(0)
    start("merge", str(place)).ends(0)
    check_same(place, whole_short)


@pytest.mark.parametrize("name", ["pathlib.Path.iterdir", "pathlib.Path.read_bytes"])
def test_a_store_can_be_begun_while_another_worker_looks_for_it(
    start: Start, short: dict[str, Any], whole_short: Path, tmp_path: Path, name: str
) -> None:
    place, begins, looks = tmp_path / "store", tmp_path / "begins", tmp_path / "looks"
    config = short | {"store": str(place)}
    one = start(config, "--worker", "1/2", first=gated(begins, "sequences._cut"))
    wait_until(Path(f"{begins}.waits").exists)
    two = start(config, "--worker", "2/2", first=gated(looks, name))
    wait_until(Path(f"{looks}.waits").exists)
    begins.touch()
    one.ends(0)
    looks.touch()
    two.ends(0)
    start("merge", str(place)).ends(0)
    check_same(place, whole_short)


def test_a_worker_is_one_process(
    start: Start, short: dict[str, Any], whole_short: Path, tmp_path: Path
) -> None:
    place, gate = tmp_path / "store", tmp_path / "gate"
    config = short | {"store": str(place)}
    first = gated(gate, "writer.StoreWriter.write_shard")
    one = start(config, "--worker", "1/2", first=first)
    wait_until(Path(f"{gate}.waits").exists)
    start(config, "--worker", "1/2").ends(2, "another process is writing", "as worker 1/2")
    start(config, "--worker", "2/2").ends(0)
    gate.touch()
    one.ends(0)
    start("merge", str(place)).ends(0)
    check_same(place, whole_short)


def test_more_workers_than_shards_leave_some_without_work(
    start: Start, short: dict[str, Any], whole_short: Path, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    config = short | {"store": str(place)}
    count = n_shards(whole_short) + 2
    for worker in [start(config, "--worker", f"{i + 1}/{count}") for i in range(count)]:
        worker.ends(0)
    start("merge", str(place)).ends(0)
    check_same(place, whole_short)


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "of another store"])
def test_a_damaged_partial_manifest_is_told_and_left(
    start: Start,
    settings: dict[str, Any],
    short: dict[str, Any],
    tmp_path: Path,
    harm: str,
) -> None:
    place = tmp_path / "store"
    config = short | {"store": str(place)}
    start(config, "--worker", "1/2").ends(0)
    file = place / "worker-1-of-2.json"
    content = bytearray(file.read_bytes())
    match harm:
        case "flipped":
            content[len(content) // 2] ^= 1
        case "cut":
            del content[-30:]
        case "empty":
            content.clear()
        case _:
            other = tmp_path / "other"
            start(short | {"store": str(other), "marks": "eos"}, "--worker", "1/2").ends(0)
            content[:] = (other / file.name).read_bytes()
    file.write_bytes(content)
    before = visible(place)
    for child in (start(config, "--worker", "1/2"), start("merge", str(place))):
        child.ends(2, str(file))
    assert visible(place) == before


@pytest.mark.parametrize(
    "worker", ["0/3", "4/3", "x", "1", "1/0", "1/", "/3", "1/2/3", "1.5/2", ""]
)
def test_a_worker_is_named_by_its_number_and_their_count(
    start: Start, short: dict[str, Any], tmp_path: Path, worker: str
) -> None:
    place = tmp_path / "store"
    child = start(short | {"store": str(place)}, "--worker", worker)
    child.ends(2, f"--worker {worker}: expected i/n with i from 1 to n")
    assert not place.exists()


def test_merge_of_no_store_is_told(start: Start, tmp_path: Path) -> None:
    start("merge", str(tmp_path / "absent")).ends(2, "no store there")
    (tmp_path / "text.txt").write_text("text")
    start("merge", str(tmp_path)).ends(2, "is there, but is no store")
