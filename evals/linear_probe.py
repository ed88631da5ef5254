"""Linear probes of one class against others, as SAEBench trains them: AdamW, or few features."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from jaxtyping import Array, Bool, Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Rows = np.ndarray | scipy.sparse.csr_array
# torch's AdamW decays by it where nothing else is said.
_DECAY = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class LinearProbe:
    """A row is of the class where weight . x + bias > 0.

    Attributes:
      accuracy: on the rows that chose the epoch.
    """

    weight: Float[np.ndarray, " d"]
    bias: float
    accuracy: float

    def right(
        self, x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """Where it is right."""
        return (np.asarray(x, np.float64) @ self.weight + self.bias > 0) == y


def balanced(
    groups: list[np.ndarray], target: int, rng: np.random.Generator
) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
    """A class against as many rows of the others, evenly drawn from each; in random order.

    Arguments:
      groups: the indices of each class's rows.

    Returns:
      Indices, and which are of the class `target`.
    """
    own = groups[target]
    others = [group for i, group in enumerate(groups) if i != target]
    each = -(-len(own) // len(others))
    drawn = np.concatenate([rng.permutation(group)[:each] for group in others])
    negative = rng.permutation(drawn)[: len(own)]
    index = np.concatenate([own, negative])
    order = rng.permutation(len(index))
    return index[order], (np.arange(len(index)) < len(own))[order]


def adamw(
    x: Float[np.ndarray, "n d"],
    y: Bool[np.ndarray, " n"],
    chosen_by: tuple[Float[np.ndarray, "v d"], Bool[np.ndarray, " v"]],
    *,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    patience: int,
    l1: float = 0.0,
    seed: int,
) -> LinearProbe:
    """Train by AdamW, and keep the epoch with the best accuracy on other rows.

        loss = mean_b log(1 + exp(-s_b (w . x_b + bias))) + l1 ||w||_1,   s = +1 or -1 by y

    After `patience` epochs without a better one it stops. Parameters begin uniform in
    +-1/sqrt(d); weight decay is torch's 0.01. The last batch of an epoch may be smaller.

    Arguments:
      chosen_by: rows that choose the epoch, and their labels.

    Source: SAEBench 0.6.0, `sparse_probing/probe_training.py`, where the test rows choose.
    """
    rng = np.random.default_rng(seed)
    n, d = x.shape
    batch_size = min(batch_size, n)
    bound = d**-0.5
    start = rng.uniform(-bound, bound, d + 1).astype(np.float32)
    parameters = (jnp.asarray(start[:d]), jnp.asarray(start[d]))
    rows, sign = jnp.asarray(x, jnp.float32), jnp.asarray(np.where(y, 1, -1), jnp.float32)
    seen = jnp.asarray(chosen_by[0], jnp.float32), jnp.asarray(chosen_by[1])
    settings = jnp.asarray(learning_rate, jnp.float32), jnp.asarray(l1, jnp.float32)
    best, kept, waited = 0.0, parameters, 0
    fill = -n % batch_size
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        state = _ADAM.init(parameters)
        for _ in range(epochs):
            order = np.pad(rng.permutation(n), (0, fill)).reshape(-1, batch_size)
            counted = (np.arange(n + fill) < n).reshape(-1, batch_size)
            parameters, state, accuracy = _epoch(
                parameters, state, rows, sign, jnp.asarray(order),
                jnp.asarray(counted, jnp.float32), seen, *settings,
            )  # fmt: skip
            if float(accuracy) > best:
                best, kept, waited = float(accuracy), parameters, 0
            else:
                waited += 1
                if waited >= patience:
                    break
    return LinearProbe(np.asarray(kept[0], np.float64), float(kept[1]), best)


_ADAM = optax.scale_by_adam()


@jax.jit
def _epoch(
    parameters: tuple[Array, Array], state: optax.OptState, x: Array, sign: Array, order: Array,
    counted: Array, seen: tuple[Array, Array], rate: Array, l1: Array,
) -> tuple[tuple[Array, Array], optax.OptState, Array]:  # fmt: skip
    """All batches; and the accuracy on `seen` then."""

    def loss(parameters: tuple[Array, Array], here: Array, counts: Array) -> Array:
        weight, bias = parameters
        each = jax.nn.softplus(-sign[here] * (x[here] @ weight + bias))
        return (each * counts).sum() / counts.sum() + l1 * jnp.abs(weight).sum()

    def step(carry: tuple, batch: tuple[Array, Array]) -> tuple[tuple, None]:
        parameters, state = carry
        update, state = _ADAM.update(jax.grad(loss)(parameters, *batch), state)
        parameters = jax.tree.map(
            lambda p, u: p * (1 - rate * _DECAY) - rate * u, parameters, update
        )
        return (parameters, state), None

    (parameters, state), _ = jax.lax.scan(step, (parameters, state), (order, counted))
    weight, bias = parameters
    right = (seen[0] @ weight + bias > 0) == seen[1]
    return parameters, state, right.mean()


def mean_difference(x: Rows, y: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " d"]:
    """mean of the class - mean of the others, of each feature."""
    means = [np.asarray(x[of].astype(np.float64).mean(axis=0)).ravel() for of in (y, ~y)]
    return means[0] - means[1]


def top_k_accuracy(
    train: tuple[Rows, Bool[np.ndarray, " n"]],
    test: tuple[Rows, Bool[np.ndarray, " m"]],
    k: int,
) -> float:
    """Test accuracy of a logistic regression on the k features of greatest |mean difference|.

    scikit-learn's, with an L2 penalty and C = 1, at most 1000 iterations.
    """
    order = np.argsort(-np.abs(mean_difference(*train)), kind="stable")[:k]
    (seen, y), (unseen, truth) = ((dense(x, order), labels) for x, labels in (train, test))
    with warnings.catch_warnings():
        # Codes and activations are not scaled, as in the original; it may fall short, by little.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = LogisticRegression(max_iter=1000).fit(seen, y)
    return float((probe.predict(unseen) == truth).mean())


def dense(x: Rows, columns: np.ndarray | None = None) -> Float[np.ndarray, "n k"]:
    """Some columns, or all, as a plain float32 matrix."""
    part = x if columns is None else x[:, columns]
    return np.asarray(part if isinstance(part, np.ndarray) else part.toarray(), np.float32)
