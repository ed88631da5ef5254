"""The synthetic experiment: its signals, what counts as recovered, and that runs go on."""

from __future__ import annotations

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dictlearn.dictionary import Dictionary
from dictlearn.encoders.omp import OMP
from experiments import recovery


@pytest.mark.parametrize("coefficients", ["uniform", "gaussian"])
def test_signals_have_the_noise_asked_for(coefficients: str) -> None:
    clean, noisy = (recovery.plant(0, snr, coefficients) for snr in (math.inf, 20.0))
    np.testing.assert_array_equal(clean.atoms, noisy.atoms)
    noise = ((noisy.x - clean.x) ** 2).sum() / (clean.x**2).sum()
    assert noise == pytest.approx(0.01, rel=1e-3)
    np.testing.assert_allclose(np.linalg.norm(clean.atoms, axis=1), 1, rtol=1e-5)
    # OMP over the true atoms leaves nothing of most rows: they are made of three.
    dictionary = Dictionary(jnp.asarray(clean.atoms), jnp.zeros(recovery.D))
    codes = OMP(k=recovery.K).prepare(dictionary).encode(jnp.asarray(clean.x))
    left = np.linalg.norm(clean.x - codes.decode(dictionary.atoms), axis=1)
    assert (left < 1e-4).mean() > 0.5


def test_recovered_counts_true_atoms_of_either_sign() -> None:
    atoms = np.eye(4, 20, dtype=np.float32)
    near = atoms[1] + 0.1 * atoms[2]  # 1 - cos is 0.005
    far = atoms[3] + 0.2 * atoms[2]  # 0.019
    learned = np.stack([-atoms[0], atoms[0], near, far])
    learned /= np.linalg.norm(learned, axis=1, keepdims=True)
    assert recovery.recovered(atoms, learned) == 2


def test_cleaning_replaces_rare_atoms_and_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "M", 4)
    d, x = np.eye(4), np.zeros((5, 4))
    x[1], x[3] = [3, 3, 3, 3], [0, 2, 2, 0]
    d[1] = -d[0]  # a twin: the first of the two goes, then there is none
    z = np.ones((5, 4))
    z[3:, 3] = 0  # three signals use it
    recovery._clean(d, z, x, np.array([0.0, 4, 0, 3, 0]))
    np.testing.assert_allclose(d[0], 0.5)
    np.testing.assert_array_equal(d[1:3], [[-1, 0, 0, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(d[3], np.sqrt([0, 0.5, 0.5, 0]))


def test_a_line_that_is_there_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def truth(trial: recovery.Trial, seed: int) -> np.ndarray:
        calls.append(seed)
        return trial.atoms

    monkeypatch.setitem(recovery.SYSTEMS, "truth", truth)
    file = tmp_path / "lines.jsonl"

    def run(trials: int) -> list[int]:
        lines = recovery.run(["truth"], [20.0, math.inf], trials, "uniform", file)
        return [line["recovered"] for line in lines]

    assert run(1) == [50, 50]
    with file.open("a") as out:
        out.write('{"system": "tru')  # a kill
    assert run(2) == [50] * 4
    assert calls == [0, 0, 1, 1]
    assert run(2) == [50] * 4
    assert len(calls) == 4
    recovery.show(recovery.run(["truth"], [20.0], 2, "uniform", file))


@pytest.mark.parametrize("system", ["ksvd, batches of 250", "textbook", "textbook, cleaned"])
def test_a_step_from_the_truth_stays_there(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "STEPS", 2)
    trial = recovery.plant(0, math.inf, "gaussian")
    trial = recovery.Trial(trial.atoms, trial.x, trial.atoms)
    assert recovery.recovered(trial.atoms, recovery.SYSTEMS[system](trial, 0)) == 50
