"""What a family of evals gives, in SAEBench's envelope: one JSON file a family.

Field names are those of SAEBench 0.6.0. NaN and infinity are null there, with the reason under
`eval_result_unstructured.null`; what SAEBench has no name for has one of ours beside its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from activations.files import replace_file
from activations.terminal import UserError
from dictlearn.artifact import finite

Metrics = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a family measured.

    Attributes:
      family: SAEBench's `eval_type_id`, e.g. "core".
      config: the family's settings, every default written out.
      metrics: category, metric: a number, or None where it is not defined.
      details: a table a feature, data set or letter.
      unstructured: what fits neither.
      null: "category.metric": why it is None.
    """

    family: str
    config: dict[str, Any]
    metrics: Metrics
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unstructured: dict[str, Any] = dataclasses.field(default_factory=dict)
    null: dict[str, str] = dataclasses.field(default_factory=dict)

    def id(self, subject: dict[str, Any]) -> str:
        """A hash of the family, its settings and the subject, see `envelope`."""
        told = json.dumps([self.family, self.config, subject], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def envelope(self, subject: dict[str, Any]) -> dict[str, Any]:
        """The JSON table.

        Arguments:
          subject: which dictionary was measured: "id", "release", "commit", "config".
        """
        return {
            "eval_type_id": self.family,
            "eval_config": self.config,
            "eval_id": self.id(subject),
            "datetime_epoch_millis": int(1000 * time.time()),
            "eval_result_metrics": self.metrics,
            "eval_result_details": self.details,
            "eval_result_unstructured": self.unstructured | {"null": self.null},
            "sae_bench_commit_hash": subject.get("commit"),
            "sae_lens_id": subject.get("id"),
            "sae_lens_release_id": subject.get("release"),
            "sae_lens_version": None,
            "sae_cfg_dict": subject.get("config"),
        }


def write(file: Path, result: Result, subject: dict[str, Any]) -> None:
    """Write a family's file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(result.envelope(subject)), indent=1, allow_nan=False, default=str)
    replace_file(file, (text + "\n").encode())


def read(file: Path) -> dict[str, Any]:
    """A family's file.

    Raises:
      UserError: it is no such file.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as results ({error})") from None
    if not isinstance(table, dict) or "eval_result_metrics" not in table:
        raise UserError(f"{file}: holds no results of an evaluation")
    return table
