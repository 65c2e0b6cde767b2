"""A run that has finished the sensitivity stage, made-up searches after it, and readers of events.

`tests/conftest.py` loads the fixtures.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ignore, raw_config, with_key, with_keys
from made_records import made_finalist, made_search

from qpruner.config.load import validate_config
from qpruner.pipeline import preflight
from qpruner.pipeline.comparison import final_jobs
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import recorded
from qpruner.pipeline.run import run
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.events import Event, Message, Progress
from qpruner.runs.records import Record, SearchRecord
from qpruner.runs.run_dir import RunDir
from qpruner.training.jobs import FineTuneJob


def searched_record(
    plan: PrecisionPlan, losses: dict[str, float] | None = None, origin: str = "gp"
) -> SearchRecord:
    """Make the record of a search that `plan` won with a loss of 1.9; `losses` are those of its
    controls."""
    found = [
        made_finalist(index, origin, loss)
        for index, (origin, loss) in enumerate((losses or {"cut-20-knapsack": 2.0}).items())
    ]
    found.append(made_finalist(7, origin, 1.9, cut=plan.cut, plan=plan.as_dict()))
    return made_search(plan.as_dict(), digest="0" * 16, finalists=tuple(found))


def with_winner(
    context: Context, winner: PrecisionPlan, losses: dict[str, float] | None = None
) -> Context:
    """Return the run after a search that `winner` won."""
    return with_records(context, search=searched_record(winner, losses))


def with_records(context: Context, **records: Record) -> Context:
    return replace(context, records=context.records.model_copy(update=records))


def a_winner(context: Context) -> PrecisionPlan:
    """Return a plan that is no control."""
    formats = ("bf16", *(("nf4", "int8")[at] for at in (0, 1, 1, 0, 0, 1, 0, 0)))
    return PrecisionPlan(context.shapes.space.groups, formats, context.shapes.reference.cut)


def told(events: Sequence[Event], stage: str) -> list[str]:
    """List the rows that a stage reported."""
    messages = [
        event.text for event in events if isinstance(event, Message) and event.stage == stage
    ]
    return [text.partition(":")[0] for text in messages]


def progress_of(events: Sequence[Event], stage: str) -> dict[str, list[tuple[int, int]]]:
    """Collect the progress of a stage by its description."""
    found: dict[str, list[tuple[int, int]]] = {}
    for event in events:
        if isinstance(event, Progress) and event.stage == stage:
            found.setdefault(event.detail, []).append((event.done, event.total))
    return found


def rows_of(
    context: Context, winner: PrecisionPlan, losses: dict[str, float] | None = None
) -> dict[str, list[FineTuneJob]]:
    """Return the jobs of the final table by row."""
    rows: dict[str, list[FineTuneJob]] = {}
    for job in final_jobs(with_winner(context, winner, losses)):
        rows.setdefault(job.record.name, []).append(job)
    return rows


def folders(rows: dict[str, list[FineTuneJob]]) -> dict[tuple[str, int | None], Path]:
    """Return the folders by row and training seed.

    For the random row it is the folder of its last plan.
    """
    return {(name, job.record.seed): job.folder for name, jobs in rows.items() for job in jobs}


@pytest.fixture(scope="session")
def sensed(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[Event]]:
    """A configuration whose run has finished the sensitivity stage, and its events."""
    events: list[Event] = []
    keys = {"sensitivity.methods": ["mutual_information", "fisher"], "evaluate.limit": 2}
    keys |= {"finetune.seeds": 3, "finetune.random_plans": 3}
    raw = with_keys(raw_config(tiny_model, tmp_path_factory.mktemp("finish") / "run"), **keys)
    run(validate_config(raw), events.append, until="sensitivity")
    return raw, events


@pytest.fixture(scope="session")
def sensed_raw(sensed: tuple[dict[str, Any], list[Event]]) -> dict[str, Any]:
    return sensed[0]


@pytest.fixture(scope="session")
def context(sensed_raw: dict[str, Any]) -> Context:
    config = validate_config(sensed_raw)
    context = Context(config, RunDir(Path(config.output)), ignore, None, preflight.inspect(config))
    recorded(context)
    return with_winner(context, a_winner(context))


@pytest.fixture
def changed(sensed_raw: dict[str, Any], context: Context) -> Callable[[str, Any], Context]:
    """Return a function that gives the run another configuration."""
    return lambda key, value: replace(
        context, config=validate_config(with_key(sensed_raw, key, value))
    )
