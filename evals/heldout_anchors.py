"""Shared tokens treated as new: how near a method comes to rows that are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dictlearn.metrics import bootstrap_mean
from dictlearn.transplant.problem import Problem
from evals.cuts import fewest


def held_out(problem: Problem, count: int, *, seed: int) -> tuple[Problem, np.ndarray]:
    """The same with `count` anchors, or half of them, as its only new tokens; their true rows.

    Its base's tokenizer lacks them: where it said one, there are the fewest others for its bytes.
    """
    order = np.random.default_rng(seed).permutation(len(problem.donor))
    out = np.sort(order[: min(count, len(order) // 2)])
    hidden = {*problem.places[out].tolist()}
    kept = np.flatnonzero(~np.isin(problem.places, [*hidden]))  # two anchors may have one row
    others = {content: place for place, content in problem.tokens.items() if place not in hidden}
    instead = {
        place: fewest(content, others)
        for place, content in zip(problem.places.tolist(), problem.anchor_bytes, strict=True)
        if place in hidden
    }
    one = dataclasses.replace(
        problem,
        donor=problem.donor[kept],
        places=problem.places[kept],
        targets=problem.donor[out],
        anchor_bytes=[problem.anchor_bytes[place] for place in kept],
        new_bytes=[problem.anchor_bytes[place] for place in out],
        split=lambda text: [
            token for own in problem.split(text) for token in instead.get(own, [own])
        ],
    )
    return one, problem.base[problem.places[out]]


def score(rows: np.ndarray, true: np.ndarray, mean: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Means over tokens, with 95 % bootstrap intervals.

    cosine: <row, true> / (|row| |true|), 0 where a norm is; centred_cosine: the same without the
    anchors' mean row [e]; error: |row - true| / |true|; norm: |row| / |true|. Tokens whose true row
    is zero are left out; n says how many there are.
    """
    there = true.any(axis=1)
    rows, true = rows[there], true[there]
    if not len(true):
        return {"n": 0}

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return np.einsum("ne,ne->n", a, b) / np.where(norms > 0, norms, 1)

    size = np.linalg.norm(true, axis=1)
    figures = {
        "cosine": cosine(rows, true),
        "centred_cosine": cosine(rows - mean, true - mean),
        "error": np.linalg.norm(rows - true, axis=1) / size,
        "norm": np.linalg.norm(rows, axis=1) / size,
    }
    told: dict[str, Any] = {"n": len(true)}
    for name, values in figures.items():
        told[name] = float(values.mean())
        told[f"{name}_interval"] = bootstrap_mean(values, np.ones(len(values)), seed=seed)
    return told
