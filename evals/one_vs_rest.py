"""Logistic probes, one against the rest: many at once by Adam, and few features at a time."""

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

LEARNING_RATE, LAST_RATE = 1e-2, 1e-5
_ADAM = optax.scale_by_adam()


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """logits = x @ weight.T + bias; a row is said to be of class c where logit c is positive."""

    weight: Float[np.ndarray, "C d"]
    bias: Float[np.ndarray, " C"]

    def logits(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n C"]:
        """In float64."""
        return np.asarray(x, np.float64) @ self.weight.T + self.bias[None]


def fit(
    x: np.ndarray | scipy.sparse.csr_array,
    y: Bool[np.ndarray, "n C"],
    *,
    batch_size: int,
    epochs: int,
    decay: float,
    l1: float = 0.0,
    seed: int,
) -> Probe:
    """Train all classes' probes at once.

        loss = mean_{b,c} [-w_c y log s(z) - (1 - y) log(1 - s(z))] + l1 mean_c ||weight_c||_1,

    with w_c = #negatives / #positives (1 for a class without positives, which learns to say no).
    Adam; its learning rate falls from 1e-2, the same factor after each epoch, towards 1e-5; `decay`
    times the parameters is added to the gradient, biases included, as torch's Adam does it.
    Parameters begin uniform in +-1/sqrt(d). The last batch of an epoch may be smaller.

    Arguments:
      x: rows [n d]; sparse ones are made dense a batch at a time.
      seed: of the start and of the order of the rows.

    Source: the settings of SAEBench 0.6.0, `absorption/probing.py`.
    """
    n, d = len(y), x[:1].shape[1]
    rng = np.random.default_rng(seed)
    bound = d**-0.5
    start = rng.uniform(-bound, bound, (y.shape[1], d + 1)).astype(np.float32)
    parameters = (jnp.asarray(start[:, :d]), jnp.asarray(start[:, d]))
    state = _ADAM.init(parameters)
    positive = y.sum(axis=0)
    weight = np.where(positive > 0, (n - positive) / np.maximum(positive, 1), 1)
    batch_size = min(batch_size, n)
    factor = (LAST_RATE / LEARNING_RATE) ** (1 / epochs)
    settings = [jnp.asarray(value, jnp.float32) for value in (weight, l1, decay)]
    for epoch in range(epochs):
        rate = jnp.asarray(LEARNING_RATE * factor**epoch, jnp.float32)
        order = rng.permutation(n)
        for first in range(0, n, batch_size):
            rows = order[first : first + batch_size]
            # Filled up to one shape, so that there is one trace.
            filled = ((0, batch_size - len(rows)), (0, 0))
            batch = x[rows] if isinstance(x, np.ndarray) else x[rows].toarray()
            arrays = (batch.astype(np.float32), y[rows].astype(np.float32))
            parameters, state = _step(
                parameters,
                state,
                *(jnp.asarray(np.pad(a, filled)) for a in arrays),
                jnp.asarray(np.arange(batch_size) < len(rows), jnp.float32),
                rate,
                *settings,
            )
    return Probe(*(np.asarray(p, np.float64) for p in parameters))


@jax.jit
def _step(
    parameters: tuple[Array, Array],
    state: optax.OptState,
    x: Float[Array, "b d"],
    y: Float[Array, "b C"],
    counted: Float[Array, " b"],
    rate: Array,
    positive: Float[Array, " C"],
    l1: Array,
    decay: Array,
) -> tuple[tuple[Array, Array], optax.OptState]:
    def loss(parameters: tuple[Array, Array]) -> Array:
        weight, bias = parameters
        z = x @ weight.T + bias[None]
        each = positive[None] * y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z)
        return (each.mean(axis=1) * counted).sum() / counted.sum() + l1 * (
            jnp.abs(weight).sum(axis=1).mean()
        )

    slope = jax.tree.map(lambda g, p: g + decay * p, jax.grad(loss)(parameters), parameters)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        update, state = _ADAM.update(slope, state)
    return jax.tree.map(lambda p, u: p - rate * u, parameters, update), state


def f1(y: Bool[np.ndarray, " n"], told: Bool[np.ndarray, " n"]) -> float:
    """2 tp / (2 tp + fp + fn); 0 where that is 0 / 0."""
    return 2 * float((y & told).sum()) / max(float(y.sum() + told.sum()), 1.0)


def main_features(
    order: tuple[int, ...],
    train: tuple[scipy.sparse.csr_array, Bool[np.ndarray, " n"]],
    test: tuple[scipy.sparse.csr_array, Bool[np.ndarray, " n"]],
    *,
    jump: float,
) -> tuple[list[int], list[float]]:
    """The first features of `order` that together tell a class, as few as do.

    For k = 1, 2, ... a logistic regression (scikit-learn's, balanced, at most 500 iterations) reads
    the first k features. They are the main features while the F1 of each k on the test rows is
    more than `jump` above that of the k before; the first failure ends it.

    Arguments:
      order: features, best first; the longest set is the whole.
      train, test: codes [n m] and whether each row is of the class.

    Returns:
      The main features, at least one, and the F1 of each k that was tried.
    """
    scores: list[float] = []
    for k in range(1, len(order) + 1):
        (seen, y), (unseen, truth) = (
            (codes[:, order[:k]].toarray(), labels) for codes, labels in (train, test)
        )
        with warnings.catch_warnings():
            # Codes are as large as the model's activations, and are not scaled, as in the original;
            # 500 iterations may then fall short, by little.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(class_weight="balanced", max_iter=500).fit(seen, y)
        scores.append(f1(truth, model.decision_function(unseen) > 0))
        if k > 1 and scores[-1] <= scores[-2] + jump:
            return list(order[: k - 1]), scores
    return list(order), scores
