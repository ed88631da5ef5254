"""Rows over all devices, everything else on each of them: JAX's own data parallelism.

With one device nothing is placed, and every function here gives back what it got.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from activations.terminal import UserError

Tree = TypeVar("Tree")


def join() -> None:
    """Be one of several processes, where JAX_COORDINATOR_ADDRESS says that there are others.

    JAX_NUM_PROCESSES and JAX_PROCESS_ID say how many, and which this one is.

    Raises:
      UserError: the address is there but not these.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    try:
        count, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    except (KeyError, ValueError) as error:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES and JAX_PROCESS_ID do not "
            f"both hold a number ({error}). Set them, or unset the address."
        ) from None
    jax.distributed.initialize(num_processes=count, process_id=index)


def leads() -> bool:
    """Whether this process writes: the first of all."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def mesh() -> Mesh | None:
    """All devices in a row; None where there is one."""
    return Mesh(np.array(jax.devices()), ("rows",)) if jax.device_count() > 1 else None


def spread(x: np.ndarray | Array, over: Mesh | None) -> Array:
    """Rows, a part on each device. Every process brings them all, and keeps its devices' part."""
    if over is None:
        return jnp.asarray(x)
    sharding = NamedSharding(over, PartitionSpec("rows"))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def everywhere(tree: Tree, over: Mesh | None) -> Tree:
    """The same arrays on each device."""
    if over is None:
        return tree
    return jax.device_put(tree, NamedSharding(over, PartitionSpec()))


def here(tree: Tree, over: Mesh | None) -> Tree:
    """Arrays that are on each device, on this process's first one alone."""
    if over is None:
        return tree

    def local(leaf: Any) -> Any:
        return jnp.asarray(np.asarray(leaf)) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(local, tree)
