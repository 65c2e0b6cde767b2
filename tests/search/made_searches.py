"""Searches on six small groups, and their trials, as several files of tests make them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import raw_config, with_key

from qpruner.cluster.tune import SearchJob
from qpruner.config.load import validate_config
from qpruner.plans.plan import Group, Layout, LinearShape, PlanSpace, PrecisionPlan
from qpruner.runs.records import RungResult, TrialRecord
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials

MINE, ANOTHER = "a" * 16, "b" * 16
"""Digests of searches."""
GROUPS = tuple(Group(f"layers.{index}", (LinearShape(f"layers.{index}", 64, 64),)) for index in range(6))
LAYOUT = Layout(GROUPS, 1000, 300, 2, double_quant=False, num_parameters=10**5)


def plan_of(text: str) -> PrecisionPlan:
    return PrecisionPlan(tuple(group.name for group in GROUPS), tuple(map(int, text)))


SEED_PLAN = "884444"
CONTROLS = [("uniform-4", plan_of("444444")), ("seed-kl", plan_of(SEED_PLAN))]


def job_of(folder: Path, **settings: Any) -> SearchJob:
    """A search whose budget holds three groups at 8 bits."""
    raw = raw_config(Path("model"), folder / "run")
    for key, value in settings.items():
        raw = with_key(raw, f"search.{key}", value)
    return SearchJob(
        config=validate_config(raw),
        trial=run_trial,
        materials=Materials(folder, folder, folder),
        layout=LAYOUT,
        space=PlanSpace.of(LAYOUT, (4, 8), LAYOUT.plan_bytes(plan_of("888444"))),
        controls=CONTROLS,
        priors={},
        trials=folder / "trials",
        scratch=folder / "tune",
        digest="0" * 16,
        search=MINE,
        resources={"cpu": 1.0},
        check_node=pickle.dumps(dict),
    )


def trial(index: int, plan: str, losses: Sequence[float], search: str = MINE, **fields: Any) -> TrialRecord:
    """A trial that reached as many rungs (steps 1, 2, 4) as there are losses; finished if that is all of them."""
    rungs = tuple(RungResult(step=step, loss=loss) for step, loss in zip((1, 2, 4), losses, strict=False))
    given = {"origin": "random", "status": "finished" if len(losses) == 3 else "stopped", "rungs": rungs} | fields
    return TrialRecord(
        index=index,
        digest="0" * 16,
        search=search,
        plan=plan_of(plan).as_dict(),
        plan_bytes=LAYOUT.plan_bytes(plan_of(plan)),
        mean_bits=LAYOUT.mean_bits(plan_of(plan)),
        **given,
    )
