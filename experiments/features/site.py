"""The files of a site: what is known of every feature, as pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import scipy.sparse

from activations.files import building
from activations.terminal import UserError, progress
from evals.coding import frame
from evals.explore import Explorer
from evals.explore.activity import Activity, Context
from evals.explore.display import visible

# Contexts of each kind, near features, tokens of the lens, bars of the histogram.
_CONTEXTS, _NEAR, _TOKENS, _BARS = 8, 8, 10, 40
# Features whose cosines and common firings are held at once.
_BLOCK = 512
COLUMNS = ("feature", "density", "positive", "max |code|", "norm", "label")


def write(look: Explorer, out: Path, *, overwrite: bool) -> None:
    """Write the site whole or not at all.

    Raises:
      UserError: a site is there already, or something else.
    """
    if out.exists():
        if not (out / "page.js").exists():
            raise UserError(f"{out}: is there, and is no site; name another place with --out")
        if not overwrite:
            raise UserError(f"{out}: holds a site; pass --overwrite to replace it")
    seen, without = _activity(look)
    n = len(look.run.coder.dictionary.atoms)
    atoms = frame(look.run.coder)[0][:n]
    lenses = _lenses(look, n)
    near = _nearest(atoms)
    together = _together(seen.codes[:, :n]) if seen else None
    labels = _labels(look, lenses)
    steered = _steered(look.run.path)
    folder = Path(__file__).parent
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = pages.get_template("feature.html.jinja")
    out.parent.mkdir(parents=True, exist_ok=True)
    with building(out) as place:
        (place / "features").mkdir(parents=True)
        index = []
        for i in progress(iterable=range(n), desc="pages", unit="page", delay=3):
            row, told = _feature(i, seen, float(np.linalg.norm(atoms[i])), labels[i])
            index.append(row)
            told |= {
                "lens": lenses and lenses[i], "near": near[i], "without": without,
                "together": together and together[i], "steering": steered.get(i, []),
            }  # fmt: skip
            text = page.render(number=i, n=n, data=_script(told))
            (place / f"features/{i}.html").write_text(text, encoding="utf-8")
        lines = ",\n".join(_script(row) for row in index)
        script = f"const COLUMNS = {_script(COLUMNS)};\nconst FEATURES = [\n{lines}\n];\n"
        (place / "index.js").write_text(script, encoding="utf-8")
        cover = pages.get_template("index.html.jinja")
        text = cover.render(name=look.run.path.absolute().name, told=_about(look, seen, without))
        (place / "index.html").write_text(text, encoding="utf-8")
        for name in ("style.css", "page.js"):
            shutil.copy(folder / name, place / name)
        if out.exists():
            shutil.rmtree(out)


def _script(value: Any) -> Any:
    """JSON that may stand inside of a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)


def _activity(look: Explorer) -> tuple[Activity | None, str]:
    """Codes of the run's store, or why there are none."""
    try:
        return look.activity, ""
    except UserError as error:
        return None, f"No contexts: {error}"


def _about(look: Explorer, seen: Activity | None, without: str) -> str:
    run = look.run
    told = f"{len(run.coder.dictionary.atoms):,} features of {run.metadata.get('hook')}"
    if name := run.metadata["model"].get("description") or run.metadata["model"].get("name"):
        told += f" of {name}"
    if seen is None:
        return f"{told}. {without}"
    return f"{told}, on {len(seen.place):,} tokens of {run.metadata['store']['path']}."


def _feature(
    i: int, seen: Activity | None, norm: float, label: str
) -> tuple[list[Any], dict[str, Any]]:
    """A feature's row of the index, and its page but for what all features share."""
    facts: list[tuple[str, Any]] = [("norm of the atom", _rounded(norm))]
    if seen is None:
        return [i, 0, 0, 0, _rounded(norm), label], {
            "facts": facts, "label": label, "contexts": None, "histogram": None,
        }  # fmt: skip
    _, codes = seen.of(i)
    density = len(codes) / len(seen.place)
    positive = float((codes > 0).mean()) if len(codes) else 0.0
    most = float(np.abs(codes).max()) if len(codes) else 0.0
    facts += [
        ("fires on", f"{len(codes):,} tokens"), ("density", _rounded(density)),
        ("positive codes", f"{positive:.0%}"), ("greatest |code|", _rounded(most)),
    ]  # fmt: skip
    contexts = {
        name: [_context(one) for one in seen.contexts(i, rows)]
        for name, rows in (
            ("positive", seen.top(i, _CONTEXTS, sign=1)),
            ("negative", seen.top(i, _CONTEXTS, sign=-1)),
            ("drawn", seen.random(i, _CONTEXTS)),
        )
    }
    histogram = None
    if len(codes):
        counts, edges = np.histogram(codes, _BARS)
        ends = {"low": _rounded(float(edges[0])), "high": _rounded(float(edges[-1]))}
        histogram = ends | {"counts": counts.tolist()}
    row = [i, _rounded(density), _rounded(positive), _rounded(most), _rounded(norm), label]
    return row, {
        "facts": facts, "label": label, "contexts": contexts | {"most": most},
        "histogram": histogram,
    }  # fmt: skip


def _context(one: Context) -> dict[str, Any]:
    """Tokens, and the codes of those that have one."""
    codes = {int(i): _rounded(float(one.codes[i])) for i in np.flatnonzero(one.codes)}
    return {"tokens": [visible(token) for token in one.tokens], "codes": codes, "at": one.at}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _lenses(look: Explorer, n: int) -> list[dict[str, Any]] | None:
    """The logit lens of each feature; None without a model, or off the residual stream."""
    try:
        seen = look.lens(list(range(n)), _TOKENS)
    except UserError:
        return None
    texts: dict[int, str] = {}

    def told(ids: np.ndarray, logits: np.ndarray) -> list[tuple[str, float]]:
        for token in ids:
            if token not in texts:
                texts[token] = visible(look.model.tokenizer.decode([int(token)]))
        return [(texts[token], _rounded(float(v))) for token, v in zip(ids, logits, strict=True)]

    return [
        {"up": told(seen.promoted[i], seen.up[i]), "down": told(seen.suppressed[i], seen.down[i])}
        for i in range(n)
    ]


def _labels(look: Explorer, lenses: list[dict[str, Any]] | None) -> list[str]:
    """Explanations that `evals.run --evals autointerp` has kept, else what the lens promotes."""
    n = len(look.run.coder.dictionary.atoms)
    labels = [" ".join(text for text, _ in one["up"][:3]) for one in lenses or []] or [""] * n
    for row in _details(look.run.path, "autointerp"):
        if row.get("explanation"):
            labels[row["latent"]] = row["explanation"]
    return labels


def _steered(run: Path) -> dict[int, list[list[Any]]]:
    """What steering along a feature did, where it was measured."""
    found: dict[int, list[list[Any]]] = {}
    for row in _details(run, "steering"):
        if row["feature"] is not None and row["strength"] is not None:
            numbers = [
                "" if row[key] is None else _rounded(row[key]) for key in ("kl", "effect", "fluent")
            ]
            found.setdefault(row["feature"], []).append(
                [row["concept"], *numbers, row["text"] or ""]
            )
    return found


def _details(run: Path, family: str) -> list[dict[str, Any]]:
    file = run / "evals" / f"{family}.json"
    return json.loads(file.read_text())["eval_result_details"] if file.exists() else []


def _nearest(atoms: np.ndarray) -> list[list[tuple[int, float]]]:
    """The features of each one's greatest |cosines|, with their sign."""
    norm = np.linalg.norm(atoms, axis=1, keepdims=True)
    unit = np.divide(atoms, norm, out=np.zeros_like(atoms), where=norm > 0).astype(np.float32)
    return _best(unit.shape[0], lambda here: unit[here] @ unit.T)


def _together(codes: scipy.sparse.csc_array) -> list[list[tuple[int, float]]]:
    """The features that fire with each one: tokens with both over tokens with either (Jaccard)."""
    ones = np.ones(len(codes.data), np.float32)
    fires = scipy.sparse.csc_array((ones, codes.indices, codes.indptr), codes.shape)
    count = np.diff(fires.indptr).astype(np.float32)
    rows = scipy.sparse.csr_array(fires.T)

    def share(here: slice) -> np.ndarray:
        both = (rows[here] @ fires).toarray()
        return both / np.maximum(count[here, None] + count - both, 1)

    return _best(len(count), share)


def _best(n: int, score: Any) -> list[list[tuple[int, float]]]:
    """The others with the greatest |score| of each feature, by blocks of rows; none of 0."""
    found = []
    for at in range(0, n, _BLOCK):
        here = slice(at, min(at + _BLOCK, n))
        values = score(here)
        values[np.arange(len(values)), np.arange(here.start, here.stop)] = 0
        size = np.abs(values)
        most = min(_NEAR, n)
        columns = np.argpartition(-size, most - 1, axis=1)[:, :most]
        for row, own in zip(values, columns, strict=True):
            best = own[np.argsort(-np.abs(row[own]), kind="stable")]
            found.append([(int(j), _rounded(float(row[j]))) for j in best if row[j]])
    return found
