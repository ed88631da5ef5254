"""What the tests of dictlearn share: small stores, and a counter of compilations."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from activations.store import Manifest, Store, open_writer

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """A store of the given shards, each rows [n d] and their documents [n]."""

    def make(*shards: tuple[np.ndarray, np.ndarray]) -> Store:
        manifest = Manifest(
            request={},
            model={},
            corpus={},
            forward={},
            hooks={HOOK: shards[0][0].shape[1]},
            context_length=8,
            n_sequences=len(shards),
            dropped_positions=("special",),
        )
        path = tmp_path / "store"
        with open_writer(path, manifest) as writer:
            for x, document in shards:
                column = np.zeros(len(x), np.int32)
                sequences = np.zeros((1, 8), np.int32)
                writer.write_shard(
                    {
                        f"activations/{HOOK}": x.astype(np.float32),
                        "token": column,
                        "document": document.astype(np.int32),
                        "sequence": column,
                        "position": column,
                        "sequences/token": sequences,
                        "sequences/document": sequences,
                    }
                )
            writer.finish()
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
