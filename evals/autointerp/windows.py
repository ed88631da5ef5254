"""Windows of tokens around a latent's firings, and elsewhere."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import scipy.sparse

from activations.hooks import HookReader
from activations.models import Model
from activations.terminal import UserError, progress
from dictlearn.dictionary import Coder
from evals.autointerp.config import Config
from evals.coding import coded
from evals.lm import check_width

_BATCH = 16  # sequences a forward pass
_ROWS = 16_384  # coded at once
_MARKED = 0.01  # of the greatest f, SAEBench's: where a token is marked


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Tokens, where latents fire in them, and where a window fits.

    Attributes:
      token: [s c].
      centres: of whole windows, as places in the flat tokens.
      place: [n] of the codes' rows, as places in the flat tokens.
      codes: [n m].
    """

    token: np.ndarray
    centres: np.ndarray
    place: np.ndarray
    codes: scipy.sparse.csc_array

    def of(self, latent: int) -> np.ndarray:
        """A latent's codes [s c], flat; 0 where a token does not count."""
        here = slice(*self.codes.indptr[latent : latent + 2])
        f = np.zeros(self.token.size, np.float32)
        f[self.place[self.codes.indices[here]]] = self.codes.data[here]
        return f


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A latent's windows, by their centres.

    Attributes:
      tail: the sign that is explained; `share` is its part of the sum of |f|.
      n_active: tokens on which it fires by that sign.
      shown: what the explanation is made from; `marked` [shown window]: its firing tokens.
      rated: in their shuffled order; `kind` of each: "top", "sampled", "random", "quiet".
      fires: whether the latent does, by either sign, anywhere in each of `rated`.
    """

    latent: int
    tail: int
    share: float
    n_active: int
    shown: np.ndarray
    marked: np.ndarray
    rated: np.ndarray
    kind: np.ndarray
    fires: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """Which of `rated` are around a firing that was drawn."""
        return np.isin(self.kind, ("top", "sampled"))


def read(coder: Coder, model: Model, token: np.ndarray, cfg: Config, document: np.ndarray) -> Text:
    """Run the model on as many sequences as have `cfg.tokens` that count, and code them; sequences
    in which none counts are passed over.

    Raises:
      UserError: the model has no such hook, or of another width; no window fits a sequence.
    """
    reader = HookReader(model.bridge, (cfg.hook,))
    check_width(coder, cfg.hook, reader.widths[cfg.hook])
    kept, half = document >= 0, cfg.window // 2
    some = kept.any(axis=1)
    n = int(np.searchsorted(np.cumsum(kept[some].sum(axis=1)), cfg.tokens)) + 1
    token, kept = token[some][:n], kept[some][:n]
    whole = np.zeros_like(kept)
    if token.shape[1] >= cfg.window:
        fits = np.lib.stride_tricks.sliding_window_view(kept, cfg.window, axis=1).all(axis=2)
        whole[:, half : token.shape[1] - half] = fits
    if not whole.any():
        raise UserError(
            f"autointerp: no {cfg.window} tokens that count stand together in a sequence of "
            f"{token.shape[1]}; make autointerp.window smaller or the sequences longer"
        )
    parts, rows, m = [], [], len(coder.dictionary.atoms)  # carriers are nothing to explain
    for at in progress(iterable=range(0, len(token), _BATCH), desc="autointerp", delay=3):
        here = slice(at, at + _BATCH)
        rows.append(reader.read(token[here])[cfg.hook][kept[here]])
        if sum(map(len, rows)) >= _ROWS or here.stop >= len(token):
            parts.append(coded(coder, np.concatenate(rows))[0][:, :m])
            rows = []
    codes = scipy.sparse.csc_array(scipy.sparse.vstack(parts))
    return Text(token, np.flatnonzero(whole), np.flatnonzero(kept), codes)


def _apart(order: np.ndarray, taken: np.ndarray, half: int, n: int) -> np.ndarray:
    """The first n of some centres whose windows overlap neither `taken` nor each other."""
    found = []
    for centre in order:
        window = slice(centre - half, centre + half + 1)
        if len(found) == n:
            break
        if not taken[window].any():
            taken[window] = True
            found.append(centre)
    return np.array(found, np.int64)


def draw(text: Text, latent: int, cfg: Config) -> Case | str:
    """A latent's windows, or why it has too few."""
    raw, half, taken = text.of(latent), cfg.window // 2, np.zeros(text.token.size, bool)
    rng = np.random.default_rng((cfg.seed, latent))  # whatever other latents there are
    tail = 1 if raw.sum() >= 0 else -1
    f = np.maximum(tail * raw, 0)
    centres = text.centres[f[text.centres] > 0]
    n_top, n_sampled = cfg.explain_top + cfg.judge_top, cfg.explain_sampled + cfg.judge_sampled
    top = rng.permutation(_apart(centres[np.argsort(-f[centres])], taken, half, n_top))
    # The least of exponentials, each over its weight: drawn one by one in proportion to weights.
    keys = rng.exponential(size=len(centres)) / np.float64(f[centres]) ** 2
    sampled = _apart(centres[np.argsort(keys)], taken, half, n_sampled)
    if len(top) + len(sampled) < n_top + n_sampled:
        return "too few firings"
    fired = np.cumsum(np.pad(raw != 0, (1, 0)))
    order = rng.permutation(text.centres)
    random = _apart(order, taken, half, cfg.n_random)
    loud = int(_any(fired, random, half).sum())
    quiet = _apart(order[~_any(fired, order, half)], taken, half, loud)
    if len(random) + len(quiet) < cfg.n_random + loud:
        return "too few windows without a firing"
    shown = np.concatenate([top[: cfg.explain_top], sampled[: cfg.explain_sampled]])
    rated = np.concatenate([top[cfg.explain_top :], sampled[cfg.explain_sampled :], random, quiet])
    names = ("top", "sampled", "random", "quiet")
    kind = np.repeat(names, [cfg.judge_top, cfg.judge_sampled, cfg.n_random, loud])
    mixed = rng.permutation(len(rated))
    rated, kind = rated[mixed], kind[mixed]
    return Case(
        latent, tail, float(f.sum() / np.abs(raw).sum()), int((f > 0).sum()), shown,
        f[shown[:, None] + np.arange(-half, half + 1)] > _MARKED * f.max(),
        rated, kind, _any(fired, rated, half),
    )  # fmt: skip


def _any(fired: np.ndarray, centres: np.ndarray, half: int) -> np.ndarray:
    """Whether there is a firing in windows, by the number of firings before each token."""
    return fired[centres + half + 1] > fired[centres - half]


def draw_all(text: Text, cfg: Config) -> tuple[list[Case], Counter[str]]:
    """As many latents as are wanted and there are, in random order, and why some were not taken."""
    cases: list[Case] = []
    passed_over: Counter[str] = Counter()
    for latent in np.random.default_rng(cfg.seed).permutation(len(text.codes.indptr) - 1):
        case = draw(text, int(latent), cfg)
        if isinstance(case, str):
            passed_over[case] += 1
        else:
            cases.append(case)
        if len(cases) == cfg.n_latents:
            break
    return cases, passed_over
