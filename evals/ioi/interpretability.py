"""Whether one latent says which value an attribute of an IOI prompt has."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from dictlearn.dictionary import Coder
from dictlearn.metrics import bootstrap
from evals.coding import coded
from evals.ioi.prompts import ATTRIBUTES, Task, X
from evals.sparse_probing import spread

_SHUFFLES = 5


def interpretability(coder: Coder, task: Task, *, seed: int) -> dict[str, Any]:
    """F1 of classifiers of each attribute, as the family tells (family.py).

    `_f1`: a latent fires where its code is not 0; `_tails_f1`: where it is above 0, or below 0,
    whichever is better. Random: of latents that fire in training, the mean.
    """
    halves = (task.train, task.test)
    mean = task.train.x.mean(axis=0)
    codes = [_codes(coder, one.x) for one in halves]
    flat = [(one.x - mean).reshape(len(one.x), -1) for one in halves]  # [n r*d]
    fires = {
        "sae": [_above(abs(one)) for one in codes],
        "sae_tails": [_tails(one) for one in codes],
        "llm_tails": [_tails(scipy.sparse.csr_array(one)) for one in flat],
    }
    used = np.flatnonzero(fires["sae"][0].sum(axis=0))
    rng, found = np.random.default_rng(seed), {}
    for j, attribute in enumerate(ATTRIBUTES):
        classes = np.arange(2 if attribute == "order" else len(task.name_id))
        y, truth = (np.equal.outer(one.value[:, j], classes) for one in halves)
        said = {key: best(seen, unseen, y) for key, (seen, unseen) in fires.items()}
        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        guess = lda.fit(flat[0], task.train.value[:, j]).predict(flat[1])
        said["supervised"] = np.equal.outer(guess, classes)
        for key, own in said.items():
            name, score = f"{attribute}_{key}_f1", functools.partial(macro, own, truth)
            found[name] = float(score(np.ones((1, len(truth))))[0])
            found[f"{name}_interval"] = bootstrap(score, len(truth), seed=seed)
        shuffled = []
        for _ in range(_SHUFFLES):
            wrong, unseen = rng.permutation(y), rng.permutation(truth)
            own = best(fires["sae_tails"][0], fires["sae_tails"][1], wrong)
            shuffled.append({"f1": float(macro(own, unseen, np.ones((1, len(truth))))[0])})
        of = {f"{attribute}_shuffled_tails_{key}": own for key, own in spread(shuffled).items()}
        random = f1(fires["sae"][1], truth)[used]
        found |= of | {f"{attribute}_random_f1": float(random.mean()) if len(used) else None}
    return found


def _codes(coder: Coder, x: X) -> scipy.sparse.csr_array:
    """Codes [n r*a]: the latents of each position are features of their own."""
    own = [coded(coder, np.ascontiguousarray(x[:, r]))[0] for r in range(x.shape[1])]
    return scipy.sparse.csr_array(scipy.sparse.hstack(own))


def _above(codes: Any) -> scipy.sparse.csr_array:
    """1 where a code is above 0."""
    return scipy.sparse.csr_array(codes > 0, dtype=np.float64)


def _tails(codes: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Where codes are above 0, then where below [n 2a]."""
    return scipy.sparse.csr_array(scipy.sparse.hstack([_above(codes), _above(-codes)]))


def f1(fires: scipy.sparse.csr_array, y: Bool[np.ndarray, "n V"]) -> Float[np.ndarray, "a V"]:
    """2 hits / (firings + positives) of each feature for each class; 0 for none of either."""
    hits = fires.T @ y.astype(np.float64)
    return 2 * hits / np.maximum(fires.sum(axis=0)[:, None] + y.sum(axis=0), 1)


def best(
    seen: scipy.sparse.csr_array, unseen: scipy.sparse.csr_array,
    y: Bool[np.ndarray, "n V"],
) -> Bool[np.ndarray, "t V"]:  # fmt: skip
    """What each class's best feature in training says of the rows for testing."""
    return unseen[:, f1(seen, y).argmax(axis=0)].toarray() > 0


def macro(
    said: Bool[np.ndarray, "t V"], truth: Bool[np.ndarray, "t V"], weight: Float[np.ndarray, "w t"]
) -> Float[np.ndarray, " w"]:
    """The mean of F1 over classes, for weights of rows; classes without a row are left out."""
    positive = weight @ truth  # [w V]
    value = 2 * (weight @ (said & truth)) / np.maximum(weight @ said + positive, 1)
    return np.nanmean(np.where(positive > 0, value, np.nan), axis=1)
