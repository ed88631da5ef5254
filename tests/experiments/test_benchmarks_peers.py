from __future__ import annotations

import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dictlearn.dictionary import Dictionary
from dictlearn.encoders.omp import OMP
from experiments.benchmarks.ksvd import reached
from experiments.benchmarks.omp import fvu, planted
from experiments.benchmarks.peers import Peers
from experiments.benchmarks.sae import Problem


def test_a_peer_codes_in_a_process_of_its_own_as_well_as_we_do() -> None:
    """scikit-learn is at hand here too, so that this needs no second environment."""
    pytest.importorskip("sklearn")
    x, atoms = (np.asarray(array) for array in planted(40, 16, 24, seed=0, active=6))
    with Peers(sys.executable) as peers:
        for _ in range(2):
            told, given = peers.call("sklearn_omp", {"x": x, "atoms": atoms}, k=4)
    dictionary = Dictionary(jnp.asarray(atoms), jnp.zeros(16))
    codes = OMP(k=4).prepare(dictionary).encode(jnp.asarray(x))
    ours = fvu(x, np.asarray(dictionary.decode(codes)))
    assert told["name"].startswith("scikit-learn ")
    assert 0 < told["seconds_gram"] < told["seconds"]
    assert fvu(x, given["x_hat"]) == pytest.approx(ours, rel=1e-3)


def test_pytorch_trains_a_topk_autoencoder_as_ours() -> None:
    """torch is at hand here too; what it differentiates are dense codes and gathered atoms."""
    pytest.importorskip("torch")
    problem = Problem.of((64, 16, 24, 4), n_steps=6)
    mine = problem.ours().fvu
    assert len(mine) == 6
    with Peers(sys.executable) as peers:
        for tool in ("dense", "gathered"):
            theirs = problem.peer(peers, tool)
            assert theirs.name.startswith("torch ")
            assert theirs.seconds > 0
            assert theirs.fvu == pytest.approx(mine, rel=1e-4)


def test_reached_is_the_first_point_at_the_goal() -> None:
    curve = [(1.0, 0.5), (2.0, 0.3), (3.0, 0.4)]
    assert reached(curve, 0.3) == 2
    assert reached(curve, 0.45) == 2
    assert math.isinf(reached(curve, 0.2))
