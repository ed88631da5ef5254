"""The configs under experiments/ are what their commands take."""

from __future__ import annotations

from pathlib import Path

import pytest

from activations.config import read_toml, validate
from activations.harvest import HarvestConfig
from dictlearn.config import FitConfig, recipe_of
from dictlearn.transplant.config import TransplantConfig
from evals.transplant import EvalConfig
from experiments.compare.sweep import Sweep, cells
from experiments.metric_audit import AuditConfig

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
# By a key that only these have.
KINDS = {
    "solver": FitConfig, "hooks": HarvestConfig, "donor": TransplantConfig, "documents": EvalConfig,
    "planted": AuditConfig, "dictionaries": Sweep,
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_is_valid(file: Path) -> None:
    table = read_toml(file, [])
    kind = next(kind for key, kind in KINDS.items() if key in table)
    found = validate(kind, table, str(file))
    fits = [found] if isinstance(found, FitConfig) else []
    if isinstance(found, Sweep):
        fits = [cell.config for cell in cells(found, str(file))]
    for one in fits:
        recipe_of(one, str(file))


def test_each_kind_is_there() -> None:
    tables = [read_toml(file, []) for file in FILES]
    for key in KINDS:
        assert any(key in table for table in tables)
