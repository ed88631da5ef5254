"""A judge's marks for steered texts: 0, 1 or 2 for a concept and for fluency, as SNMF's."""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Float
from sklearn.metrics import roc_auc_score

from evals.judges import Judge
from evals.steering.concepts import Part

# Below it a judge is not believed.
LEAST_AUC = 0.8
_ENDING = "\n\nText:\n{text}\n\nAnswer with one digit, 0, 1 or 2, and nothing else.\nMark:"
_CONCEPT = (
    "How far is the text below about this subject: {concept}? 0: not at all; 1: partly; 2: clearly."
)
_FLUENCY = (
    "How fluent is the text below? It may end in the middle of a sentence. 0: broken, or the same "
    "words again and again; 1: readable, with faults; 2: good."
)


def concept_marks(judge: Judge, concept: str, texts: list[str]) -> Float[np.ndarray, " n"]:
    """0, 1 or 2 for each text; NaN where the answer has no such digit."""
    return _marks(judge, [(_CONCEPT + _ENDING).format(concept=concept, text=t) for t in texts])


def fluency_marks(judge: Judge, texts: list[str]) -> Float[np.ndarray, " n"]:
    """0, 1 or 2 for each text; NaN where the answer has no such digit."""
    return _marks(judge, [(_FLUENCY + _ENDING).format(text=text) for text in texts])


def _marks(judge: Judge, prompts: list[str]) -> np.ndarray:
    answers = judge.ask(prompts, max_tokens=4)
    found = [re.search(r"(?<!\d)[012](?!\d)", answer) for answer in answers]
    return np.array([float(one[0]) if one else np.nan for one in found])


def doubt(judge: Judge, concept: str, known: Part, *, seed: int) -> str | None:
    """Why a judge is not to be believed, by labelled texts; None where it is.

    Its marks have to tell the concept's texts from others, and texts from the same ones with their
    words in random order, with an AUC of 0.8 or more. An answer without a mark counts as 0.
    """
    rng = np.random.default_rng(seed)
    mixed = [" ".join(rng.permutation(text.split())) for text in known.text]
    both = np.arange(2 * len(known.text)) < len(known.text)
    for what, marks, truth in (
        ("the concept", concept_marks(judge, concept, known.text), known.y),
        ("fluency", fluency_marks(judge, [*known.text, *mixed]), both),
    ):
        unread = float(np.isnan(marks).mean())
        auc = float(roc_auc_score(truth, np.nan_to_num(marks)))
        if auc < LEAST_AUC:
            return (
                f"the judge's marks for {what} have an AUC of {auc:.2f} on {len(marks)} labelled "
                f"texts, below {LEAST_AUC} ({unread:.0%} of its answers could not be read)"
            )
    return None


def harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """2 a b / (a + b); 0 where one is not positive."""
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    total = a + b
    return np.divide(2 * a * b, total, out=np.zeros_like(total), where=total > 0)
