"""The other tools, in a process and an environment of their own; a benchmark calls them by turns.

    python -m venv .peers
    .peers/bin/pip install -r experiments/benchmarks/requirements-peers.txt
    python -m experiments.benchmarks.omp --peers .peers/bin/python

The index has a package `dictlearn` too, which would be hidden by ours (or hide it), so this file is
run there as a script in isolated mode: it imports nothing of this project. It reads requests from
stdin and answers on stdout, a JSON line each; arrays lie as .npy in a temporary directory. Time is
taken here, around a tool's own call alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Answer = tuple[dict[str, Any], Arrays]


class Peers:
    """The other process, alive from `with` to its end.

    Arguments:
      python: the interpreter of the peers' environment.
    """

    def __init__(self, python: str) -> None:
        self._python = python

    def __enter__(self) -> Peers:
        self._stack = contextlib.ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._process = self._stack.enter_context(
            subprocess.Popen(
                [self._python, "-I", __file__, str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._stack.close()

    def call(self, tool: str, arrays: Arrays, **settings: Any) -> Answer:
        """Run a tool of `TOOLS` there: what it tells, and the arrays that it gives back."""
        for name, array in arrays.items():
            np.save(self._folder / f"{name}.npy", array)
        assert self._process.stdin
        assert self._process.stdout
        request = {"tool": tool, "arrays": list(arrays), "settings": settings}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._python}: {tool} ended the peers' process; see above")
        told = json.loads(line)
        return told, {name: np.load(self._folder / f"{name}.npy") for name in told.pop("arrays")}


def serve(folder: Path) -> None:
    """Answer requests until stdin ends."""
    # A tool that prints must not print into the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        arrays = {name: np.load(folder / f"{name}.npy") for name in request["arrays"]}
        told, given = TOOLS[request["tool"]](**arrays, **request["settings"])
        for name, array in given.items():
            np.save(folder / f"{name}.npy", array)
        print(json.dumps(told | {"arrays": list(given)}), file=answers, flush=True)


# What follows runs in the peers' process. Modules come in by name: type checkers see ours.


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _name(distribution: str) -> str:
    return f"{distribution} {importlib.metadata.version(distribution)}"


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def spams_omp(x: np.ndarray, atoms: np.ndarray, *, k: int) -> Answer:
    """SPAMS, which takes no Gram matrix: it makes one in each call.

    What that takes is where the line through two numbers of rows begins (for one row it makes
    none). It stops early unless eps is given as 0.
    """
    omp = importlib.import_module("spams").omp

    def run(rows: np.ndarray) -> tuple[float, Any]:  # x.T lies in columns, as it asks
        return _timed(lambda: omp(rows.T, atoms.T, L=k, eps=0.0, numThreads=_threads()))

    seconds, codes = run(x)
    eighth, _ = run(x[: len(x) // 8])
    gram = max(0.0, (8 * eighth - seconds) / 7)
    told = {"name": _name("spams-bin"), "seconds": seconds, "seconds_gram": gram}
    return told, {"x_hat": codes.T @ atoms}


def sklearn_omp(x: np.ndarray, atoms: np.ndarray, *, k: int) -> Answer:
    """scikit-learn, Gram matrix given."""
    module = importlib.import_module("sklearn.decomposition")
    gram, product = _timed(lambda: atoms @ atoms.T)
    seconds, codes = _timed(
        lambda: module.sparse_encode(
            x, atoms, gram=product, algorithm="omp", n_nonzero_coefs=k, n_jobs=_threads()
        )
    )
    told = {"name": _name("scikit-learn"), "seconds": seconds + gram, "seconds_gram": gram}
    return told, {"x_hat": codes @ atoms}


def index_omp(x: np.ndarray, atoms: np.ndarray, *, k: int) -> Answer:
    """The index's dictlearn, Gram matrix given; it computes in float64, on one core."""
    module = importlib.import_module("dictlearn")
    gram, product = _timed(lambda: (atoms @ atoms.T).astype(np.float64))
    seconds, codes = _timed(
        lambda: module.sparse_encode(x, atoms, gram=product, algorithm="omp", n_nonzero_coefs=k)
    )
    told = {"name": _name("dictlearn"), "seconds": seconds + gram, "seconds_gram": gram}
    return told, {"x_hat": codes.astype(atoms.dtype) @ atoms}


def mergekit_omp(x: np.ndarray, atoms: np.ndarray, *, k: int) -> Answer:
    """What mergekit-tokensurgeon approximates tokens with, 512 at once by default."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(_threads())
    omp = importlib.import_module("mergekit.tokensurgeon.omp").batch_omp
    rows, points = torch.tensor(x), torch.tensor(atoms)
    seconds, (indices, values) = _timed(lambda: omp(rows, points, k))
    x_hat = torch.einsum("nk,nkd->nd", values, points[indices])
    return {"name": _name("mergekit"), "seconds": seconds}, {"x_hat": x_hat.numpy()}


class _Done(Exception):  # noqa: N818
    pass


def index_fit(
    x: np.ndarray, atoms: np.ndarray, *, algorithm: str, k: int, iterations: int
) -> Answer:
    """The index's dictlearn from given atoms: seconds and atoms after each update.

    The coder is wrapped, as it alone is called in every iteration: at its start the last update is
    done. What we do in between is not counted, and the coding after the last update, which `fit`
    throws away, is not waited for.
    """
    module = importlib.import_module("dictlearn")
    seconds: list[float] = []
    given: list[np.ndarray] = []

    def coder(rows: np.ndarray, now: np.ndarray, **settings: Any) -> np.ndarray:
        nonlocal resumed
        seconds.append(time.perf_counter() - resumed + (seconds[-1] if seconds else 0))
        given.append(now.copy())
        if len(given) > iterations:
            raise _Done
        resumed = time.perf_counter()
        return module.sparse_encode(rows, now, algorithm="omp", **settings)

    fit = module.DictionaryLearning(
        len(atoms), fit_algorithm=algorithm, transform_algorithm=coder, n_nonzero_coefs=k,
        max_iter=iterations, dict_init=atoms, random_state=0,
    ).fit  # fmt: skip
    resumed = time.perf_counter()
    with contextlib.suppress(_Done):
        fit(x)
    told = {"name": f"{_name('dictlearn')} {algorithm}", "seconds": seconds[1:]}
    return told, {"atoms": np.stack(given[1:])}


def sklearn_fit(
    x: np.ndarray, atoms: np.ndarray, *, k: int, alpha: float, batch_size: int, limit: float
) -> Answer:
    """scikit-learn's online learning, one pass or `limit` seconds; atoms after each eighth."""
    module = importlib.import_module("sklearn.decomposition")
    model = module.MiniBatchDictionaryLearning(
        len(atoms), alpha=alpha, fit_algorithm="cd", batch_size=batch_size, dict_init=atoms,
        transform_algorithm="omp", transform_n_nonzero_coefs=k, n_jobs=_threads(), random_state=0,
    )  # fmt: skip
    starts = range(0, len(x) - batch_size + 1, batch_size)
    seconds, given, spent = [], [], 0.0
    for step, start in enumerate(starts, 1):
        with warnings.catch_warnings(action="ignore"):  # its coder is not always done
            now, _ = _timed(lambda rows=x[start : start + batch_size]: model.partial_fit(rows))
        spent += now
        if step % max(1, len(starts) // 8) == 0 or step == len(starts) or spent > limit:
            seconds.append(spent)
            given.append(model.components_.copy())
        if spent > limit:
            break
    told = {"name": f"{_name('scikit-learn')} MiniBatchDictionaryLearning", "seconds": seconds}
    return told, {"atoms": np.stack(given)}


def torch_sae(
    x: np.ndarray,
    atoms: np.ndarray,
    centre: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    rates: np.ndarray,
    *,
    k: int,
    batch: int,
    gathered: bool,
    compiled: bool,
) -> Answer:
    """A TopK autoencoder in PyTorch, as it is usually written, from given parameters.

    A step a learning rate in `rates`, on `batch` rows of x in turn. Tells the seconds of all steps
    but the first, and each step's FVU before its update. PyTorch has what makes it faster here: the
    fused Adam (on 2 cores at m = 5120, d = 640: 4 ms, against 53 ms for foreach), an allocator that
    keeps its pages (without it each large array is faulted in anew), and on a GPU products in
    TF32, which is XLA's default there. There is no AuxK, so nothing may be dead long enough.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    _keep_pages()
    loss = _torch_loss(k, gathered, compiled)
    rows = torch.tensor(x, device=device).split(batch)
    w, b, d, c = parameters = [
        torch.nn.Parameter(torch.tensor(array, device=device))
        for array in (weight, bias, atoms, centre)
    ]
    adam = torch.optim.Adam(parameters, fused=True)
    unused = torch.zeros(len(atoms), dtype=torch.int64, device=device)

    def step(at: int) -> Any:
        fvu, indices, values = loss(rows[at % len(rows)], w, b, d, c)
        adam.zero_grad()
        fvu.backward()
        with torch.no_grad():
            d.grad -= (d.grad * d).sum(1, keepdim=True) * d
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            adam.param_groups[0]["lr"] = float(rates[at])
            adam.step()
            d.div_(d.norm(dim=1, keepdim=True))
            unused.add_(batch)
            unused[indices[values > 0]] = 0
        return fvu.detach()

    def steps(first: int, last: int) -> list[float]:
        return torch.stack([step(at) for at in range(first, last)]).tolist()

    curve = steps(0, 1)
    seconds, rest = _timed(lambda: steps(1, len(rates)))
    kind = ("gathered" if gathered else "dense") + (", compiled" if compiled else "")
    name = f"torch {torch.__version__} {kind}"
    return {"name": name, "seconds": seconds, "fvu": curve + rest}, {}


@functools.cache
def _torch_loss(k: int, gathered: bool, compiled: bool) -> Callable[..., Any]:
    """FVU, and indices and values of the codes; the latter `gathered`, else made dense.

    The centre goes into the encoder's bias, which spares the product for its gradient.
    """
    torch = importlib.import_module("torch")
    functional = torch.nn.functional

    def loss(x: Any, w: Any, b: Any, d: Any, c: Any) -> Any:
        u = functional.linear(x, w, b - w @ c)
        values, indices = torch.topk(u, k, sorted=False)
        values = torch.relu(values)
        if gathered:
            x_hat = functional.embedding_bag(indices, d, per_sample_weights=values, mode="sum")
        else:
            x_hat = torch.zeros_like(u).scatter(1, indices, values) @ d
        error = (x - x_hat - c).square().sum(1).mean()
        return error / (x - x.mean(0)).square().sum(1).mean(), indices, values

    return torch.compile(loss, dynamic=False) if compiled else loss


@functools.cache
def _keep_pages() -> None:
    """Have glibc return no memory to the system: no mmap for large arrays, no trimming."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
        libc.mallopt(parameter, value)


TOOLS: dict[str, Callable[..., Answer]] = {
    "spams_omp": spams_omp,
    "sklearn_omp": sklearn_omp,
    "index_omp": index_omp,
    "mergekit_omp": mergekit_omp,
    "index_fit": index_fit,
    "sklearn_fit": sklearn_fit,
    "torch_sae": torch_sae,
}

if __name__ == "__main__":
    serve(Path(sys.argv[1]))
