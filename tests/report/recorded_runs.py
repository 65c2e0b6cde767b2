"""A run folder as a search leaves it, made through the real record classes; no model is trained."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from conftest import raw_config, with_key
from made_records import made_confirmation, made_search

from qpruner.config.load import validate_config
from qpruner.config.schema import RunConfig
from qpruner.runs.events import SearchPlanned
from qpruner.runs.records import (
    MethodScores,
    RungResult,
    RunState,
    SearchRecord,
    SearchState,
    SensitivityRecord,
    StageState,
    TrialRecord,
)
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import write_trial

GROUPS = tuple(f"layers.{index}" for index in range(6))
STARTED = 1_760_000_000.0
RUNGS = (2, 4, 8)
DIGEST, MINE, ANOTHER = "d" * 16, "a" * 16, "b" * 16
MEGABYTE = 10**6


def config_of(folder: Path, **settings: Any) -> RunConfig:
    """A configuration whose rungs are `RUNGS`; `section__key=value` sets others."""
    raw = raw_config(Path("a-model"), folder)
    for key, value in {"search__steps": 8, "search__first_rung": 2, **settings}.items():
        raw = with_key(raw, key.replace("__", "."), value)
    return validate_config(raw)


def trial(index: int, plan: str, losses: list[float], **fields: Any) -> TrialRecord:
    """A trial that took a minute a rung, and started a minute after the one before; finished if it has all rungs."""
    started = STARTED + 60 * index
    times = [started + 60 * count for count in range(1 + len(losses))]
    rungs = tuple(
        RungResult(step=step, loss=loss, train_loss=loss + 1, train_losses=(loss + 1.5,) * (step - before))
        for before, step, loss in zip((0, *RUNGS), RUNGS, losses, strict=False)
    )
    given = {"status": "finished" if len(losses) == len(RUNGS) else "stopped", "origin": "gp", **fields}
    over = [] if given["status"] == "running" else [times[-1] + 1]
    bits = {group: {"4": 4, "8": 8}[character] for group, character in zip(GROUPS, plan, strict=True)}
    return TrialRecord(
        **{
            "index": index,
            "digest": DIGEST,
            "search": MINE,
            "plan": bits,
            "plan_bytes": MEGABYTE * sum(bits.values()),
            "mean_bits": sum(bits.values()) / len(bits),
            "rungs": rungs,
            "seconds": 60.0 * len(losses),
            "times": (*times, *over),
            **given,
        }
    )


def trials() -> list[TrialRecord]:
    """Two controls, a plan that beats them, one that was stopped, one that failed and one that runs."""
    return [
        trial(0, "444444", [3.4, 3.3, 3.2], origin="uniform-4"),
        trial(1, "884444", [3.3, 3.2, 3.0], origin="seed-kl"),
        trial(2, "848444", [3.2, 3.1, 2.9]),
        trial(3, "448844", [3.5]),
        trial(4, "444488", [], status="failed", failure="diverged", reason="TrainingDiverged: the loss is nan"),
        trial(5, "844484", [3.1], status="running"),
    ]


def search_state(**fields: Any) -> SearchState:
    given = {"metric": "loss", "budget_bytes": 32 * MEGABYTE, "max_trials": 20, "steps": 8, "slots": 2}
    return SearchState(**{"trials_digest": DIGEST, "search": MINE, **given, **fields})


def sensitivity() -> SensitivityRecord:
    values = {4: tuple(0.1 * index for index in range(len(GROUPS))), 8: (0.0,) * len(GROUPS)}
    scores = MethodScores(unit="nats", source="measured", values=values, seconds=1.0, details={})
    return SensitivityRecord(digest="e" * 16, seconds=2.0, groups=GROUPS, methods={"kl": scores})


def planned(records: list[TrialRecord], **fields: Any) -> SearchPlanned:
    return SearchPlanned(search_state(**fields), tuple(records), sensitivity())


def search_record(best: TrialRecord) -> SearchRecord:
    return made_search(
        best.plan,
        trials_digest=DIGEST,
        budget_bytes=32 * MEGABYTE,
        num_trials=6,
        num_finished=3,
        num_stopped=1,
        ended="all 6 trials were spent (`search.max_trials`)",
        confirmations=(made_confirmation(best.index, best.origin, best.rungs[-1].loss + 0.05),),
        best_index=best.index,
        best_origin=best.origin,
        best_control=1,
    )


def recorded_run(root: Path, *, is_over: bool = False, pid: int | None = None, **settings: Any) -> Path:
    """A run in its search, or with the search behind it, as this process would have left it."""
    run, records = RunDir(root), trials()
    for record in records:
        write_trial(run.trials / DIGEST, record)
    stage = StageState(state="running", started=STARTED, done=5, total=8, text="8 trials")
    if is_over:
        run.write_record("search", search_record(records[2]))
        stage = StageState(state="done", started=STARTED, seconds=600.0, text="3 finished")
    state = RunState(
        config=config_of(root, **settings).model_dump(mode="json"),
        until="report",
        command="qpruner run config.yaml",
        folder="/somewhere",
        environment={},
        host=socket.gethostname(),
        pid=os.getpid() if pid is None else pid,
        started=STARTED,
        updated=STARTED + 400,
        outcome="done" if is_over else "running",
        stages={"prepare": StageState(state="recorded", started=STARTED, text="48 rows"), "search": stage},
        search=search_state(),
    )
    run.write_state(state)
    return root
