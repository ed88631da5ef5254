"""Speed of evaluations:  python -m experiments.benchmarks.evals RUN [--quick] [--families ...].

- core: tokens/s beside three bare forward passes to the logits of the same tokens (as the model is,
  with reconstructions, with zeros). `ratio` is ours / theirs: above 1 / 1.3 is the goal. Ours also
  codes, ablates by the mean, and takes the figures; all logits are compared.
- sparse_probing: texts/s from activations on disk, k = 1, 2, 5 and full probes of eight classes,
  one seed, beside 5,000 texts in 5 minutes.
- steering: tokens/s of generation that is steered, by adding and by clamping (which codes every
  row), beside plain generation; 40 sequences of 50 tokens, the key-value cache on. 0.8 is the goal.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activations.terminal import UserError, run_command
from dictlearn.interop import load
from evals import core, sparse_probing
from evals.run import EvalConfig, Subject
from evals.steering import steer
from evals.steering.sampling import samples
from evals.texts import Occupations
from experiments.benchmarks.common import paired, report


def bench_core(subject: Subject, tokens: int, rounds: int) -> None:
    """Print the line of core."""
    token, document = subject.text()
    n = -(-tokens // token.shape[1])
    token, document = token[:n], document[:n]
    cfg = core.Config(subject.hook, token.size, token.size)
    model, coder = subject.model, subject.run.coder

    def ours() -> float:
        started = time.perf_counter()
        core.run(coder, model, token, cfg, document)
        return token.size / (time.perf_counter() - started)

    def bare() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for _ in range(3):
                for first in range(0, n, 2):
                    batch = torch.from_numpy(token[first : first + 2].astype(np.int64))
                    model.bridge(batch.to(model.bridge.cfg.device), use_cache=False)
        return token.size / (time.perf_counter() - started)

    report(
        "evals.core", paired(ours, bare, rounds), unit="tokens/s",
        shape=f"{subject.hook}, {token.shape} tokens", peer_name="three bare forward passes",
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )  # fmt: skip


def bench_probing(subject: Subject, n_texts: int) -> None:
    """Print the line of sparse probing; the first run brings the activations to the disk."""
    each = n_texts // 16
    n_train = 2 * each * 4 // 5  # of a class
    cfg = sparse_probing.Config(
        subject.hook, (Occupations("occupations", each),), max_classes=8, n_seeds=1,
        train_per_class=n_train, test_per_class=2 * each - n_train,
    )  # fmt: skip
    few = dataclasses.replace(cfg, epochs=1, k_values=(1,))
    sparse_probing.run(subject.run.coder, subject.model, few)
    started = time.perf_counter()
    sparse_probing.run(subject.run.coder, subject.model, cfg)
    seconds = time.perf_counter() - started
    report(
        "evals.sparse_probing", [(16 * each / seconds, 5000 / 300)], unit="texts/s",
        shape=f"{16 * each} texts, 8 classes, {len(subject.run.coder.atoms)} atoms",
        peer_name="5,000 texts in 5 minutes", seconds=round(seconds, 1),
    )  # fmt: skip


def bench_steering(subject: Subject, rounds: int) -> None:
    """Print a line of each mode."""
    model, coder = subject.model, subject.run.coder
    prompts, strength = ["I think that"] * 40, np.ones(40)

    def speed(steered: Callable[[np.ndarray], Any]) -> float:
        started = time.perf_counter()
        samples(model, prompts, strength, steered, new_tokens=50, seed=0)
        return len(prompts) * 50 / (time.perf_counter() - started)

    for mode in ("add", "clamp"):

        def steered(s: np.ndarray, mode: Any = mode) -> Any:
            return steer(model, coder, 0, s, mode, hook=subject.hook)

        report(
            f"evals.steering.{mode}",
            paired(partial(speed, steered), partial(speed, lambda _: nullcontext()), rounds),
            unit="tokens/s", shape=f"{subject.hook}, 40 x 50 tokens, {len(coder.atoms)} atoms",
            peer_name="plain generation",
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )  # fmt: skip


def main() -> None:
    """Print one JSON line a family."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.evals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--families", default="core,sparse_probing,steering")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, 1,600 texts")
    arguments = parser.parse_args()
    subject = Subject(load(arguments.run), EvalConfig())
    for family in arguments.families.split(","):
        match family:
            case "core":
                tokens = 2048 if arguments.quick else arguments.tokens
                bench_core(subject, tokens, 1 if arguments.quick else arguments.rounds)
            case "sparse_probing":
                bench_probing(subject, 1600 if arguments.quick else 5008)
            case "steering":
                bench_steering(subject, 1 if arguments.quick else arguments.rounds)
            case _:
                raise UserError(f"--families: no {family!r} among core, sparse_probing, steering")


if __name__ == "__main__":
    run_command(main)
