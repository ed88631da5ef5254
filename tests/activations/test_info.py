"""What `python -m activations.info` tells is what numpy says of the whole arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from activations.info import describe
from activations.store import Store
from activations.writer import write_store

HOOK = "blocks.3.hook_resid_post"
WIDTH, ROWS = 20, (900, 1, 2500)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Rows with two carriers (3 and 11) and five massive rows, and their tokens."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sum(ROWS), WIDTH), np.float32) + 5
    x[:, 3] += 6 * rng.standard_normal(len(x), np.float32)
    x[:, 11] += 5 * rng.standard_normal(len(x), np.float32)
    token = rng.choice([4, 5, 6], len(x), p=[0.6, 0.3, 0.1]).astype(np.int32)
    for row, fill in ((0, 7), (899, 7), (900, 8), (2000, 7), (3400, 8)):
        x[row], token[row] = 300, fill
    return x, token


@pytest.fixture
def store(tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]) -> Store:
    x, token = arrays
    ends = np.cumsum(ROWS)

    def datasets(index: int) -> dict[str, np.ndarray]:
        part = slice(ends[index] - ROWS[index], ends[index])
        zero = np.zeros(ROWS[index], np.int32)
        rows = {f"activations/{HOOK}": x[part], f"gradients/{HOOK}": -2 * x[part]}
        columns = {"token": token[part], "document": zero, "sequence": zero, "position": zero}
        return rows | columns

    write_store(
        tmp_path / "store",
        map(datasets, range(len(ROWS))),
        sequences=np.zeros((3, 2, 8)),
        vocabulary={4: " the", 5: "[bold]", 6: "\n", 7: "é"},
        request={},
        model={"description": "a made model"},
        corpus={"kind": "made"},
        forward={},
        hooks={HOOK: WIDTH},
        context_length=8,
        n_documents=1,
        shard_sequences=1,
        dropped_positions=("special",),
        gradients=True,
    )
    return Store(tmp_path / "store")


def test_statistics_are_those_of_the_whole_array(
    store: Store, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    x, token = arrays[0].astype(np.float64), arrays[1]
    for name, wanted in ((f"activations/{HOOK}", x), (f"gradients/{HOOK}", -2 * x)):
        seen = describe(store, name)
        np.testing.assert_allclose(seen.moments.mean, wanted.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(seen.moments.variance, wanted.var(axis=0), rtol=1e-12)
        norms = np.linalg.norm(wanted, axis=1)
        massive = norms > 5 * np.median(norms)
        assert massive.sum() == 5
        assert seen.massive == {7: 3, 8: 2}
        assert set(token[massive]) == {7, 8}
        spread = ((wanted - wanted.mean(axis=0)) ** 2).sum(axis=1)
        assert seen.massive_share == pytest.approx(spread[massive].sum() / spread.sum(), rel=1e-9)
    again = describe(store, f"activations/{HOOK}")
    first = describe(store, f"activations/{HOOK}")
    assert again.moments.mean.tobytes() == first.moments.mean.tobytes()


def test_the_command_shows_them(
    store: Store, arrays: tuple[np.ndarray, np.ndarray], run_command: Command
) -> None:
    code, out, err = run_command("activations.info", store.path, COLUMNS="100")
    assert code == 0, err
    x = arrays[0].astype(np.float64)
    norms = np.linalg.norm(x, axis=1)
    lines = [line for line in out.splitlines() if line.startswith(HOOK)]
    median, greatest, mean, scale = map(float, lines[0].split()[2:])
    assert median == pytest.approx(np.median(norms), rel=1e-3)
    assert greatest == pytest.approx(norms.max(), rel=1e-3)
    assert mean == pytest.approx(np.linalg.norm(x.mean(axis=0)), rel=1e-3)
    assert scale == pytest.approx(np.sqrt(x.var(axis=0).mean()), rel=1e-3)
    for expected in ("a made model", "3,401 of 1 documents", "3 shards", f"grad {HOOK}"):
        assert expected in out
    assert "'é' x 3, 'token 8' x 2" in out
    assert "'[bold]'" in out
    frequent = [line for line in out.splitlines() if line.startswith("' the'")]
    count = int((arrays[1] == 4).sum())
    assert frequent[0].split()[-2:] == [f"{count:,}", f"{count / len(x):.1%}"]


def test_a_place_that_is_no_store_is_told(tmp_path: Path, run_command: Command) -> None:
    assert run_command("activations.info", tmp_path / "absent") == (
        2,
        "",
        f"error: {tmp_path / 'absent'}: no store there. Harvest one, or mend the path.\n",
    )
