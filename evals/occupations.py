"""Short biographies by program: eight occupations, two genders, no text stored or downloaded.

A stand-in for the Bias in Bios set of SAEBench's SCR, which no package ships. The occupation shows
in what somebody does, the gender in name and pronouns.
"""

from __future__ import annotations

import numpy as np

_DUTIES = {
    "professor": (
        "lectures to undergraduates", "publishes papers in scholarly journals",
        "supervises doctoral students", "chairs the faculty committee",
        "applies for research grants", "grades final examinations",
    ),
    "nurse": (
        "takes the temperature of patients", "works night shifts on the ward",
        "gives injections", "changes bandages", "comforts families at the bedside",
        "records blood pressure",
    ),
    "architect": (
        "draws floor plans", "designs museums and town halls", "meets builders at the site",
        "chooses facades and materials", "builds scale models", "revises blueprints",
    ),
    "journalist": (
        "interviews politicians", "files stories before the deadline", "reports from abroad",
        "writes headlines", "protects confidential sources", "edits the morning bulletin",
    ),
    "surgeon": (
        "transplants kidneys", "scrubs in before each operation", "removes tumours",
        "stitches deep wounds", "consults the anaesthetist", "operates on damaged hearts",
    ),
    "psychologist": (
        "listens to clients talk of their childhood", "treats anxiety and phobias",
        "administers personality tests", "leads group therapy", "studies memory and attention",
        "counsels couples",
    ),
    "attorney": (
        "argues cases before the jury", "drafts contracts", "cross-examines witnesses",
        "files motions with the court", "negotiates settlements", "advises clients on the law",
    ),
    "teacher": (
        "explains fractions to ten-year-olds", "marks homework", "plans lessons for the term",
        "meets parents in the classroom", "watches the playground at recess", "reads stories aloud",
    ),
}  # fmt: skip
_NAMES = {
    "female": "Anna Beth Clara Diana Emma Grace Helen Irene Julia Karen Laura Maria Nora Olivia "
    "Paula Rachel Sarah Susan Teresa Victoria",
    "male": "Adam Brian Carl David Edward Frank George Henry Ian James Kevin Luke Martin Nathan "
    "Oscar Peter Robert Simon Thomas Walter",
}
_WORDS = {"female": ("She", "Her", "herself"), "male": ("He", "His", "himself")}
_PLACES = "Boston Leeds Toronto Sydney Dublin Chicago Bristol Denver Glasgow Auckland"
_FRAMES = (
    "{name} {a} and {b}. {She} has lived in {place} for {years} years. {Her} colleagues say that "
    "{name} also {c}.",
    "Most days {name} {a}. {She} often {b}, too, and {c} {herself}. {Her} family lives in {place}.",
    "In {place}, {name} {a}. After {years} years {she} still enjoys it. On Fridays {name} {b} and "
    "{c}.",
    "{She} {a}, {b} and, when there is time, {c}. {Her} friends in {place} have known {name} for "
    "{years} years.",
)


def biographies(n: int) -> dict[str, tuple[str, str]]:
    """Texts, n of each occupation and gender, and these two; always the same, no two alike."""
    rng = np.random.default_rng(0)
    found: dict[str, tuple[str, str]] = {}
    for occupation, duties in _DUTIES.items():
        for gender, names in _NAMES.items():
            goal = len(found) + n
            while len(found) < goal:
                a, b, c = rng.permutation(len(duties))[:3]
                she, her, herself = _WORDS[gender]
                text = _FRAMES[rng.integers(len(_FRAMES))].format(
                    name=rng.choice(names.split()), place=rng.choice(_PLACES.split()),
                    years=rng.integers(2, 30), a=duties[a], b=duties[b], c=duties[c],
                    She=she, she=she.lower(), Her=her, herself=herself,
                )  # fmt: skip
                found[text] = (occupation, gender)
    return found
