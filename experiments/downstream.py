"""What the model loses by dictionaries:  python -m experiments.downstream RUN [RUN ...] --out FILE.

Sequences that hold test documents of a run's store are replayed. At the run's hook, the activations
of the test documents' tokens (not of special ones, nor of other documents) are replaced by what the
dictionary makes of them, by the mean of the training rows, or by zero. CE is the cross-entropy of
the next token, in nats, over the tokens whose next one is of the same document:

    increase = CE(x_hat) - CE(model)
    recovered = (CE(zero) - CE(x_hat)) / (CE(zero) - CE(model))

Modes of inference: `plain`; and `gradient`, where the encoder is told the gradient of the clean
forward's summed CE. That gradient knows the next token, so that this mode is no rival of the
others; encoders that do not use it are left out of it. A line a run and mode goes to FILE; what has
its line already is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from activations import models
from activations.files import sha256
from activations.statistics import Moments
from activations.terminal import UserError, run_command
from dictlearn import artifact, heldout, metrics
from dictlearn.artifact import Run
from dictlearn.dictionary import Coder
from dictlearn.loop import Job
from dictlearn.swap import job_of
from experiments import lines
from experiments.lines import Line
from experiments.replay import Replay, losses, replay

MODES = ("plain", "gradient")


def reconstructed(coder: Coder, clean: Replay, mode: str) -> np.ndarray:
    """decode(encode(x)) of the replaced tokens [r d]."""
    gradient = None
    if mode == "gradient":
        assert clean.gradient is not None
        gradient = clean.gradient[clean.replaced]
    return np.asarray(coder.decode(coder.encode(clean.x[clean.replaced], gradient=gradient)))


@dataclasses.dataclass(frozen=True)
class Place:
    """What runs share that were fitted on the same rows: `sums` of CE by document [D]."""

    bridge: Any
    hook: str
    clean: Replay
    sums: dict[str, np.ndarray]


def place(bridge: Any, job: Job, n_tokens: int, *, gradients: bool) -> Place:
    """Replay the clean model, then with the mean of the training rows and with zero."""
    hook = job.config.data.hook
    documents = job.parts["test"].documents
    clean = replay(bridge, job.store, hook, documents, n_tokens, gradients=gradients)
    mean = Moments.over(x for x, *_ in job.parts["train"].by_shard()).mean
    shape = int(clean.replaced.sum()), clean.x.shape[2]
    others = {"model": None, "mean": np.broadcast_to(mean, shape), "zero": np.zeros(shape)}
    sums = {
        name: clean.by_document(losses(bridge, hook, clean, rows)) for name, rows in others.items()
    }
    return Place(bridge, hook, clean, sums)


def measure(coder: Coder, job: Job, where: Place, mode: str) -> Line:
    """A run's figures in one mode. l0 and fvu_bulk are of all test rows."""
    clean = where.clean
    rows = reconstructed(coder, clean, mode)
    sums = where.sums | {"hat": clean.by_document(losses(where.bridge, where.hook, clean, rows))}
    count = clean.by_document(np.ones(len(clean.owner)))
    ce = {f"ce_{name}": float(of.sum() / count.sum()) for name, of in sums.items()}
    seen = heldout.evaluate(coder, job.parts["test"], job.bulk, gradients=mode == "gradient")
    increase = sums["hat"] - sums["model"]
    return {
        "l0": seen.l0,
        "fvu_bulk": seen.fvu_bulk,
        **ce,
        "ce_increase": ce["ce_hat"] - ce["ce_model"],
        "ce_increase_interval": metrics.bootstrap_mean(increase, count, seed=0),
        "loss_recovered": (ce["ce_zero"] - ce["ce_hat"]) / (ce["ce_zero"] - ce["ce_model"]),
        "n_tokens": int(count.sum()),
        "by_document": {
            "document": clean.documents.tolist(),
            "n_tokens": count.tolist(),
            "ce_increase": (increase / count).tolist(),
        },
        "replay_error": clean.error,
    }


def identity(run: Run, mode: str, n_tokens: int) -> Line:
    """What a line must say to be the line of a run in a mode."""
    solver = run.metadata["solver"]
    chooses = solver.get("variant") or solver.get("encoder") or {}
    return {
        "run": str(run.path),
        "dictionary_sha256": sha256(run.path / artifact.WEIGHTS),
        "solver": solver,
        "seed": run.metadata["seed"],
        "k": chooses.get("k"),
        "mode": mode,
        "tokens": n_tokens,
    }


class Measurer:
    """Measures runs one after another; what several share is replayed once.

    Arguments:
      gradients: whether the clean model is run backward too.
    """

    def __init__(self, n_tokens: int, *, gradients: bool) -> None:
        self._n_tokens = n_tokens
        self._gradients = gradients
        self._models: dict[str, models.Model] = {}
        self._places: dict[Any, Place] = {}

    def __call__(self, run: Run, mode: str) -> Line:
        """The figures of a run in a mode."""
        job = job_of(run)
        data = run.metadata["store"]["manifest_sha256"], job.config.data.hook
        key = *data, *(tuple(part.documents) for part in job.parts.values())
        if key not in self._places:
            self._places.clear()  # runs of one split should stand side by side
            bridge = self._model(run).bridge
            self._places[key] = place(bridge, job, self._n_tokens, gradients=self._gradients)
        return measure(run.coder, job, self._places[key], mode)

    def _model(self, run: Run) -> models.Model:
        told = run.metadata["model"]
        if "spec" not in told:
            raise UserError(f"{run.path}: its rows come from no language model")
        if told["spec"] not in self._models:
            self._models[told["spec"]] = models.load(told["spec"])
        model = self._models[told["spec"]]
        run.check_weights(model.identity.weights_sha256)
        return model


def measure_all(runs: list[Run], modes: Sequence[str], n_tokens: int, file: Path) -> list[Line]:
    """Measure what has no line yet; the line of every run and mode."""
    tasks = [
        (run, mode)
        for run in sorted(runs, key=lambda run: run.metadata["split"]["test"])
        for mode in modes
        if mode == "plain" or _uses_gradient(run)
    ]
    missing = {m for run, m in tasks if lines.find(identity(run, m, n_tokens), file) is None}
    measurer = Measurer(n_tokens, gradients="gradient" in missing)
    found = []
    for run, mode in tasks:
        own = identity(run, mode, n_tokens)
        found.append(lines.find(own, file) or lines.add(own | measurer(run, mode), file))
    return found


def _uses_gradient(run: Run) -> bool:
    """Whether codes depend on the gradient where it is given."""
    return bool(getattr(getattr(run.coder.encoder, "activation", None), "projects", False))


def show(found: list[Line]) -> None:
    """A table; `vs first` is the CE against that of the first run on the same documents, paired."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    titles = "run", "mode", "L0", "fvu_bulk", "CE increase", "95 %", "recovered", "vs first", "95 %"
    for title in titles:
        table.add_column(title, no_wrap=True)
    for line in found:
        own = line["by_document"]
        count, increase = np.array(own["n_tokens"]), np.array(own["ce_increase"])
        same = (
            other
            for other in found
            if other["by_document"]["document"] == own["document"]
            and other["by_document"]["n_tokens"] == own["n_tokens"]
        )
        first = next(same)
        apart = (increase - np.array(first["by_document"]["ce_increase"])) * count
        rest = ("", "")
        if first is not line:
            rest = (
                f"{apart.sum() / count.sum():+.4f}",
                _range(metrics.bootstrap_mean(apart, count, seed=0)),
            )
        table.add_row(
            Path(line["run"]).name, line["mode"], f"{line['l0']:.1f}", f"{line['fvu_bulk']:.4f}",
            f"{line['ce_increase']:.4f}", _range(line["ce_increase_interval"]),
            f"{line['loss_recovered']:.2%}", *rest,
        )  # fmt: skip
    console = Console(highlight=False, width=150)
    console.print(table)
    for key in ("ce_model", "ce_mean", "ce_zero", "n_tokens"):
        console.print(f"{key}: {', '.join(sorted({f'{line[key]:.5g}' for line in found}))}")


def _range(interval: list[float] | tuple[float, float]) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}"


def main() -> None:
    """Entry of `python -m experiments.downstream`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.downstream", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2000, help="to be counted, of each split")
    parser.add_argument("--modes", default=",".join(MODES))
    arguments = parser.parse_args()
    modes = arguments.modes.split(",")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"--modes: no {unknown[0]!r} among {', '.join(MODES)}")
    if arguments.tokens < 1:
        raise UserError(f"--tokens: expected at least 1, got {arguments.tokens}")
    runs = [artifact.load(run) for run in arguments.runs]
    show(measure_all(runs, modes, arguments.tokens, arguments.out))


if __name__ == "__main__":
    run_command(main)
