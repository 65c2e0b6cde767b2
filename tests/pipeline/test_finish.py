"""What the final table compares: the seed plan stands beside the winner at the winner's own bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import raw_config, with_key

from qpruner import preflight
from qpruner.config import validate_config
from qpruner.events import Event
from qpruner.pipeline import run
from qpruner.pipeline.context import Context
from qpruner.pipeline.finish import table_rows
from qpruner.plan import PrecisionPlan
from qpruner.records import SearchRecord, SensitivityRecord
from qpruner.rundir import RunDir


def ignore(event: Event) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def raw(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration whose run has got as far as the sensitivities."""
    raw = raw_config(tiny_model, tmp_path_factory.mktemp("finish") / "run")
    run(validate_config(raw), ignore, until="sensitivity")
    return raw


def context_of(raw: dict[str, Any]) -> Context:
    config = validate_config(raw)
    return Context(config, RunDir(Path(config.output)), ignore, None, preflight.inspect(config))


def searched_record(plan: PrecisionPlan) -> SearchRecord:
    return SearchRecord(
        digest="0" * 16,
        seconds=1.0,
        trials_digest="1" * 16,
        searcher="hyperopt",
        budget_bytes=1,
        num_trials=1,
        num_finished=1,
        num_stopped=0,
        num_failed=0,
        confirmations=(),
        best_index=0,
        best_origin="hyperopt",
        best_plan=plan.as_dict(),
        resumed=0,
    )


def plans_by_name(context: Context, winner: PrecisionPlan) -> dict[str, PrecisionPlan]:
    measured = context.run_dir.read_record("sensitivity", SensitivityRecord)
    assert measured is not None
    rows = table_rows(context, searched_record(winner), measured)
    return {row.name: PrecisionPlan.from_dict(dict(row.plan)) for row in rows}


def test_the_seed_row_is_the_best_seed_of_the_winners_bytes(raw: dict[str, Any]) -> None:
    """A seed plan with the whole budget against a winner that left bytes unused would be no fair comparison."""
    context = context_of(raw)
    measured = context.run_dir.read_record("sensitivity", SensitivityRecord)
    assert measured is not None
    layout = context.layout
    names = tuple(group.name for group in layout.groups)
    assert names == measured.groups
    every = [PrecisionPlan(names, bits) for bits in itertools.product((4, 8), repeat=len(names))]
    largest = max(measured.mutual_information_nats)
    worth = np.maximum(np.array(measured.mutual_information_nats) / largest, 1e-3)

    def gain(plan: PrecisionPlan) -> float:
        return float(worth @ (np.array(plan.bits) == 8))

    below_budget = 0
    for winner in np.random.default_rng(0).choice(len(every), 12, replace=False):
        winning_bytes = layout.plan_bytes(every[winner])
        below_budget += winning_bytes < context.space.budget_bytes
        found = plans_by_name(context, every[winner])
        seed = found["mutual-information seed"]
        assert found["searched"] == every[winner]
        assert layout.plan_bytes(seed) <= winning_bytes
        best = max(gain(plan) for plan in every if layout.plan_bytes(plan) <= winning_bytes)
        assert gain(seed) == pytest.approx(best)
    assert below_budget, "some winners must leave bytes unused for this to say anything"


def test_without_compare_the_winner_stands_alone(raw: dict[str, Any]) -> None:
    context = context_of(with_key(raw, "finetune.compare", False))
    winner = context.layout.uniform(4)
    assert plans_by_name(context, winner) == {"searched": winner}
