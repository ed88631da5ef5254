"""The configs under experiments/ are what their commands take."""

from __future__ import annotations

from pathlib import Path

import pytest

from activations.config import read_toml, validate
from activations.harvest import HarvestConfig
from dictlearn.config import FitConfig
from dictlearn.transplant.config import TransplantConfig
from evals import run
from evals.transplant import EvalConfig
from experiments.compare.sweep import Sweep, cells
from experiments.metric_audit import AuditConfig

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
# By a key that only these have.
KINDS = {
    "solver": FitConfig, "hooks": HarvestConfig, "donor": TransplantConfig, "documents": EvalConfig,
    "planted": AuditConfig, "steering": run.EvalConfig,
    "dictionaries": Sweep,
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_is_valid(file: Path) -> None:
    table = read_toml(file, [])
    kind = next(kind for key, kind in KINDS.items() if key in table)
    found = validate(kind, table, str(file))
    if isinstance(found, Sweep):
        cells(found, str(file))
    if kind is run.EvalConfig:
        for name, settings in table.items():
            validate(run.FAMILIES[name].config, settings | {"hook": "h"}, str(file))
    if kind is FitConfig and "harvest" in table:
        store = table["harvest"] | {"store": table["data"]["store"]}
        validate(HarvestConfig, store, str(file))


def test_each_kind_is_there() -> None:
    tables = [read_toml(file, []) for file in FILES]
    for key in KINDS:
        assert any(key in table for table in tables)
