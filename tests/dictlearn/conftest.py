"""What the tests of dictlearn share: small stores, and a counter of compilations."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from activations.precision import DTYPES
from activations.store import Store
from activations.writer import write_store

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """A store of the given shards, each rows [n d] and their documents [n]."""

    def make(
        *shards: tuple[np.ndarray, np.ndarray], gradients: bool = False, **settings: Any
    ) -> Store:
        def datasets(x: np.ndarray, document: np.ndarray) -> dict[str, np.ndarray]:
            x = x.astype(DTYPES[settings.get("dtype", "float32")])
            rows = {f"activations/{HOOK}": x}
            if gradients:  # told from its activation at sight
                rows[f"gradients/{HOOK}"] = -x
            column = np.zeros(len(x), np.int32)
            columns = dict.fromkeys(("token", "sequence", "position"), column)
            return {**rows, **columns, "document": document.astype(np.int32)}

        path = tmp_path / "store"
        write_store(
            path,
            (datasets(*shard) for shard in shards),
            sequences=np.zeros((len(shards), 2, 8)),
            vocabulary={},
            request={},
            model={},
            corpus={},
            forward={},
            hooks={HOOK: shards[0][0].shape[1]},
            context_length=8,
            n_documents=len(shards),
            shard_sequences=1,
            dropped_positions=("special",),
            gradients=gradients,
            **settings,
        )
        return Store(path)

    return make


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """A list that grows with everything that XLA compiles during the test."""
    names: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
