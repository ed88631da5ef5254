"""SAEBench's core: what a model loses by a dictionary, and how well and how sparsely it codes.

M are the tokens that count: neither special nor padding. With x at M, x_hat = decode(encode(x)),
r = x - x_hat; p are the model's next-token probabilities, q those with x_hat in x's place at M:

    kl = mean_M sum_v p (log p - log q),    ce = mean_M -log q(next token),

and the same with zeros at every position (SAEBench's ablation) and with the mean of x at M. The CE
leaves out the last token of a sequence.

Names are SAEBench 0.6.0's. Where it has a bug, the right value has the name and its value has the
suffix `_saebench060`:

- mse: mean_M ||r||^2 / d. Theirs is divided by the tokens of its batch instead of d.
- explained_variance: 1 - mean ||r||^2 / mean ||x - mean x||^2. Theirs takes one mean over all
  dimensions, and squares. `_legacy` is mean_M (1 - ||r||^2 / ||x - mean of the batch||^2).
- l1, densities and what is made of them: of |z|, and of z != 0. Theirs are of z, and of z > 0.

Source: SAEBench 0.6.0, evals/core; Karvonen et al. (arXiv 2503.09532).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import torch
from pydantic import Field

from activations.models import Model
from activations.terminal import UserError, progress
from dictlearn import metrics
from dictlearn.dictionary import Coder
from dictlearn.encoders.linear import Linear
from dictlearn.encoders.omp import OMP
from evals.core_sums import Features, Rows
from evals.lm import Forward, check_width
from evals.results import Result

# Rows that tell the mean, the carriers and the usual norm, and are coded by OMP beside.
_FIRST = 8192
_OMP_ROWS = 4096
# Tokens whose logits are compared at once.
_LOGIT_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      hook: TransformerLens's name.
      tokens: that are read, and give all figures of x, x_hat and codes.
      behaviour_tokens: the first of these, whose logits are compared too; they cost most.
      batch_size: sequences; SAEBench's figures that are means over batches depend on it.
      seed: of the bootstrap over documents.
    """

    __pydantic_config__ = {"extra": "forbid"}

    hook: str
    tokens: Annotated[int, Field(gt=0)] = 65_536
    behaviour_tokens: Annotated[int, Field(gt=0)] = 16_384
    batch_size: Annotated[int, Field(gt=0)] = 16
    seed: Annotated[int, Field(ge=0)] = 0

    def quick(self) -> Config:
        """The same in about two minutes, for a model of 270 million parameters on two cores."""
        return dataclasses.replace(self, tokens=16_384, behaviour_tokens=4_096)


def run(
    coder: Coder, model: Model, tokens: np.ndarray, cfg: Config, document: np.ndarray | None = None
) -> Result:
    """Measure a dictionary on sequences.

    Arguments:
      tokens: [s c], with their special tokens.
      document: of each token [s c], the unit of the bootstrap; negative where a token does not
        count. Left out: each sequence is one, and what the tokenizer calls special does not count.

    Raises:
      UserError: the hook is not the model's, or has another width; no token counts.
    """
    forward = Forward(model, cfg.hook)
    check_width(coder, cfg.hook, forward.width)
    if document is None:
        special = np.isin(tokens, model.tokenizer.all_special_ids)
        document = np.where(special, -1, np.arange(len(tokens))[:, None])
    counted = np.cumsum((document >= 0).sum(axis=1))
    if not counted[-1]:
        raise UserError("core: no token counts; all are special, or of documents left out")
    n_read = int(np.searchsorted(counted, cfg.tokens)) + 1
    n_compared = int(np.searchsorted(counted, cfg.behaviour_tokens)) + 1
    tokens, document = tokens[:n_read], document[:n_read]
    read = _read_first(forward, tokens, document, cfg.batch_size)
    first = np.concatenate([x[document[at : at + len(x)] >= 0] for at, x in read.items()])[:_FIRST]
    rows, features = Rows(first, cfg.seed), Features(len(coder.atoms))
    behaviour = _Behaviour(forward, first.mean(axis=0, dtype=np.float64).astype(np.float32))
    prepared = coder.prepare()
    with progress(total=len(tokens), desc="core", unit="sequence") as bar:
        for at in range(0, len(tokens), cfg.batch_size):
            here = slice(at, min(at + cfg.batch_size, len(tokens)))
            kept = document[here] >= 0
            x = read.pop(at) if at in read else forward.read(tokens[here])
            own = x[kept]
            filled = np.pad(own, ((0, kept.size - len(own)), (0, 0)))  # one shape, so one trace
            codes = prepared.encode(filled)
            x_hat = np.asarray(coder.decode(codes))[: len(own)]
            values, indices = (np.asarray(a)[: len(own)] for a in (codes.values, codes.indices))
            owner = np.broadcast_to(np.arange(here.start, here.stop)[:, None], kept.shape)[kept]
            rows.add(own, x_hat, document[here][kept], forward.normed)
            features.add(indices, values, owner)
            if at < n_compared:
                new = x.copy()
                new[kept] = x_hat
                behaviour.add(tokens[here], x, new, document[here])
            bar.update(here.stop - here.start)
    return _result(coder, cfg, rows, features, behaviour, first)


def _read_first(
    forward: Forward, tokens: np.ndarray, document: np.ndarray, batch_size: int
) -> dict[int, np.ndarray]:
    """What the hook sees in the first batches [b c d], by where they begin."""
    found, count = {}, 0
    for at in range(0, len(tokens), batch_size):
        here = slice(at, at + batch_size)
        found[at] = forward.read(tokens[here])
        count += int((document[here] >= 0).sum())
        if count >= _FIRST:
            break
    return found


class _Behaviour:
    """KL and CE of each token, as the model is and with something in the place of x."""

    NAMES = ("sae", "ablation", "mean")

    def __init__(self, forward: Forward, mean: np.ndarray) -> None:
        self._forward, self._mean = forward, mean
        self.kl: dict[str, list[np.ndarray]] = {name: [] for name in self.NAMES}
        self.ce: dict[str, list[np.ndarray]] = {name: [] for name in ("without", *self.NAMES)}
        self.owner: list[np.ndarray] = []
        self.owner_ce: list[np.ndarray] = []

    def add(self, token: np.ndarray, x: np.ndarray, new: np.ndarray, document: np.ndarray) -> None:
        """Run a batch: token [b c]; x and what is put in its place [b c d]; document [b c]."""
        for part in self._forward.parts(token):
            ids, kept = token[part], document[part] >= 0
            mean = np.where(kept[..., None], self._mean, x[part])
            put = {"without": x[part], "sae": new[part], "mean": mean, "ablation": 0 * x[part]}
            logits = {name: self._logits(ids, rows) for name, rows in put.items()}
            row, place = np.flatnonzero(kept), np.nonzero(kept)[1]
            label = torch.from_numpy(np.roll(ids, -1, axis=1)[kept].astype(np.int64))
            for at in range(0, len(row), _LOGIT_ROWS):
                here = slice(at, at + _LOGIT_ROWS)
                self._compare(
                    {name: of[row[here]] if len(of) > 1 else of for name, of in logits.items()},
                    label[here], place[here] < ids.shape[1] - 1,
                )  # fmt: skip
            del logits  # before those of the next part are made
            self.owner.append(document[part][kept])
            self.owner_ce.append(document[part][:, :-1][kept[:, :-1]])

    def _logits(self, ids: np.ndarray, x: np.ndarray) -> torch.Tensor:
        """Of all tokens [b c, v]; of one, where all have the same."""
        if self._forward.residual and not x.any():
            # Nothing of the text is left: what one position sees, all do.
            ids, x = ids[:1, :1], x[:1, :1]
        return self._forward.logits(ids, x).flatten(0, 1)

    def _compare(
        self, logits: dict[str, torch.Tensor], label: torch.Tensor, predicts: np.ndarray
    ) -> None:
        """Logits [n v] of a few tokens, so that they stay in the processor's cache."""
        clean = logits["without"].float()
        label = label.to(clean.device)[:, None]
        total = clean.logsumexp(dim=-1)
        p = clean.softmax(dim=-1)
        mass = p.sum(dim=-1)
        for name, of in logits.items():
            other = of.float()
            own = other.logsumexp(dim=-1)
            if name != "without":
                # Summed and divided so, float32 is good to 1e-5 of it with 262,144 tokens.
                kl = (clean - other).mul_(p).sum(dim=-1) / mass - (total - own)
                self.kl[name].append(kl.double().cpu().numpy())
            ce = own - other.expand(len(label), -1).gather(1, label)[:, 0]
            self.ce[name].append(ce.double().cpu().numpy()[predicts])

    def by_document(self) -> dict[str, Any]:
        """Of each document, the sum of what the CE rises by, over so many tokens."""
        document, place = np.unique(np.concatenate(self.owner_ce), return_inverse=True)
        rise = np.concatenate(self.ce["sae"]) - np.concatenate(self.ce["without"])
        return {
            "document": document.tolist(),
            "ce_increase": np.bincount(place, rise).tolist(),
            "n_tokens": np.bincount(place).tolist(),
        }

    def figures(self, seed: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """SAEBench's two categories, and the headline in nats with intervals."""
        kl = {name: np.concatenate(parts) for name, parts in self.kl.items()}
        ce = {name: np.concatenate(parts) for name, parts in self.ce.items()}
        of = {name: float(values.mean()) for name, values in ce.items()}
        mean_kl = {name: float(values.mean()) for name, values in kl.items()}
        increase = ce["sae"] - ce["without"]
        headline = {
            "ce_increase": float(increase.mean()),
            "ce_increase_interval": _interval(increase, np.concatenate(self.owner_ce), seed),
            "kl": mean_kl["sae"],
            "kl_interval": _interval(kl["sae"], np.concatenate(self.owner), seed),
            "n_tokens": len(kl["sae"]),
        }
        return {
            "model_behavior_preservation": {
                "kl_div_score": _share(mean_kl["ablation"], mean_kl["sae"], 0.0),
                "kl_div_with_ablation": mean_kl["ablation"],
                "kl_div_with_sae": mean_kl["sae"],
                "kl_div_with_mean_ablation": mean_kl["mean"],
                "kl_div_score_mean_ablation": _share(mean_kl["mean"], mean_kl["sae"], 0.0),
            },
            "model_performance_preservation": {
                "ce_loss_score": _share(of["ablation"], of["sae"], of["without"]),
                "ce_loss_with_ablation": of["ablation"],
                "ce_loss_with_sae": of["sae"],
                "ce_loss_without_sae": of["without"],
                "ce_loss_with_mean_ablation": of["mean"],
                "ce_loss_score_mean_ablation": _share(of["mean"], of["sae"], of["without"]),
            },
        }, headline


def _share(worst: float, sae: float, best: float) -> float:
    """(worst - sae) / (worst - best), how much of the ablation's harm is undone."""
    return (worst - sae) / (worst - best) if worst != best else float("nan")


def _interval(values: np.ndarray, owner: np.ndarray, seed: int) -> tuple[float, float]:
    """95 %, of a mean over tokens, by bootstrap over documents."""
    _, place = np.unique(owner, return_inverse=True)
    sums, count = np.bincount(place, values), np.bincount(place)
    return metrics.bootstrap_mean(sums, count, seed=seed)


def _result(
    coder: Coder, cfg: Config, rows: Rows, features: Features, behaviour: _Behaviour,
    first: np.ndarray,
) -> Result:  # fmt: skip
    found, headline = behaviour.figures(cfg.seed)
    own = rows.figures()
    sparsity = features.sparsity(rows.n)
    weights, misc, null = _weights(coder)
    details = features.details(rows.n)
    for index, row in enumerate(details):
        row |= {name: float(values[index]) for name, values in weights.items()}
    found |= {
        "headline": headline | own.pop("headline") | _gap(coder, first, rows, sparsity["l0"]),
        **own,
        "sparsity": sparsity,
        "token_stats": {
            "total_tokens_eval_reconstruction": headline["n_tokens"],
            "total_tokens_eval_sparsity_variance": rows.n,
        },
        "misc_metrics": features.misc(rows.n) | misc,
    }
    told = {"by_document": behaviour.by_document()}
    return Result("core", dataclasses.asdict(cfg), found, details, told, null | _undefined(found))


def _undefined(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Why figures are None or NaN."""
    return {
        f"{category}.{name}": "its denominator is 0, or there is nothing to take it over"
        for category, values in found.items()
        for name, value in values.items()
        if isinstance(value, float) and not np.isfinite(value)
    }


def _gap(coder: Coder, first: np.ndarray, rows: Rows, l0: float) -> dict[str, Any]:
    """fvu_bulk of the first rows by the dictionary's own encoder, and by OMP with as many codes."""
    x = first[:_OMP_ROWS]
    most = min(coder.dictionary.atoms.shape)
    k = int(np.clip(round(l0 - len(coder.normaliser.carriers)), 1, most))
    pursuit = Coder(coder.normaliser, coder.dictionary, OMP(k=k))
    by = [
        metrics.fvu_bulk(x, np.asarray(c.decode(c.encode(x))), rows.bulk) for c in (coder, pursuit)
    ]
    return {"omp_k": k, "fvu_bulk_omp": by[1], "amortisation_gap": by[0] - by[1]}


def _weights(
    coder: Coder,
) -> tuple[dict[str, np.ndarray], dict[str, float | None], dict[str, str]]:
    """Norms and cosines of encoder and decoder rows: by feature, and their means."""
    decoder = np.asarray(coder.atoms, np.float32)
    found = {"max_decoder_cosine_sim": _greatest_cosine(decoder)}
    misc: dict[str, float | None] = {
        "average_max_decoder_cosine_sim": float(found["max_decoder_cosine_sim"].mean()),
        "average_max_encoder_cosine_sim": None,
    }
    encoder = coder.encoder
    if not isinstance(encoder, Linear) or len(encoder.weight) != len(decoder):
        why = f"{type(encoder).__name__} has no weights of its own"
        return found, misc, {"misc_metrics.average_max_encoder_cosine_sim": why}
    weight = np.asarray(encoder.weight / coder.normaliser.scale, np.float32)  # of raw rows
    norms = [np.linalg.norm(a, axis=1) for a in (weight, decoder)]
    cosine = (weight * decoder).sum(axis=1) / np.maximum(norms[0] * norms[1], 1e-30)
    found["max_encoder_cosine_sim"] = _greatest_cosine(weight)
    found |= {
        "encoder_bias": np.asarray(encoder.bias),
        "encoder_norm": norms[0],
        "encoder_decoder_cosine_sim": cosine,
    }
    misc["average_max_encoder_cosine_sim"] = float(found["max_encoder_cosine_sim"].mean())
    return found, misc, {}


def _greatest_cosine(rows: np.ndarray) -> np.ndarray:
    """Each row's greatest cosine with another [m], signed."""
    unit = jnp.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30))
    greatest = []
    for at in range(0, len(rows), 1024):
        cosine = np.array(unit[at : at + 1024] @ unit.T)
        cosine[np.arange(len(cosine)), np.arange(at, at + len(cosine))] = -np.inf
        greatest.append(cosine.max(axis=1))
    return np.concatenate(greatest)
