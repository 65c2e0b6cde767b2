"""Run folders as searches write them, made with the real record classes; no model is trained.

`MadeRun` is the folder of a long search: by default 30 blocks, 200 trials, two tasks, and random figures except for the
best plan. `recorded_run` is the folder of a search of six trials, whose figures are written out here.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conftest import raw_config, with_key
from made_records import made_confirmation, made_layer, made_prune, made_search
from made_rows import STATE, Scored, candidate, results_of, score, with_figures

from qpruner.config.load import validate_config
from qpruner.config.schema import RunConfig
from qpruner.pipeline.run import _environment
from qpruner.report.results import BASE, BEST_SEED, PRUNED, RANDOM, SEARCHED
from qpruner.runs.events import SearchPlanned
from qpruner.runs.records import (
    BankRecord,
    ComparisonRecord,
    MethodScores,
    PrepareRecord,
    Record,
    RungResult,
    SearchState,
    SensitivityRecord,
    StageState,
    TaskScore,
    TrialRecord,
)
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import write_trial

TRIALS, SEARCH = "1" * 16, "2" * 16
STAGE: dict[str, Any] = {"digest": "0" * 16, "seconds": 61.5}
NOISES = {"mutual_information": 1.5, "first_order": 0.6, "kl": 0.3}
"""Sensitivity method -> noise that is added to the true sensitivities."""
STAGES = ("prepare", "prune", "bank", "sensitivity", "search", "finetune", "evaluate", "comparison")
STARTED = 1_790_000_000.0
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & `| `"
"""A name that would act as markup if a report did not escape it."""
BUDGET = 93_000_000
CONTROLS = {"uniform-4": 0.0, "seed-kl": 0.5, "seed-first-order": 0.48}
"""Origin of one of the first trials -> share of groups with 8 bits."""
LEVELS = {BASE: 16, PRUNED: 16, "uniform 4-bit": 4, "uniform 8-bit": 8}
SIZES = {BASE: 278_800_000, PRUNED: 223_400_000}


class MadeRun:
    """Writes the folder of a run on `model`, up to and including the stage `until`.

    `outcome` is how its command ended; each of its jobs held `gpus` GPUs.
    """

    def __init__(
        self,
        root: Path,
        num_trials: int = 200,
        num_blocks: int = 30,
        model: str = "SmolLM2-135M",
        until: str = "comparison",
        outcome: str = "done",
        error: str | None = None,
        stages: dict[str, StageState] | None = None,
        task: str = "arc_easy",
        questions: int = 400,
        gpus: float = 0.0,
        noises: Mapping[str, float] = NOISES,
    ) -> None:
        self._gpus, self._stage = gpus, STAGE | {"gpu_seconds": STAGE["seconds"] * gpus}
        self._random = np.random.default_rng(0)
        self._tasks = {task: questions, "piqa": min(questions, 200)}
        self.run = RunDir(root)
        self.groups = [f"layers.{block:02d}.{part}" for block in range(num_blocks) for part in ("attention", "mlp")]
        self._gains = self._random.gamma(1.2, 0.01, len(self.groups))
        self._weights = np.where(np.arange(len(self.groups)) % 2, 1.4, 0.6) * 69_000_000 / len(self.groups)
        done = STAGES[: STAGES.index(until) + 1]
        self.trials: list[TrialRecord] = []
        if "search" in {*done, *(stages or {})}:
            self._add_trials(num_trials)
        for trial in self.trials:
            self.write(trial)
        self._records = self._make_records(num_blocks, noises) if self.trials else self._begin(num_blocks, noises)
        for name in done:
            self.run.write_record(name, self._records[name])
        raw = raw_config(Path(model), root)
        config = validate_config(raw).model_dump(mode="json") | {"model": {"source": model}}
        made = {name: StageState(state="done", started=STARTED, seconds=61.5) for name in done}
        search = SearchState(
            trials_digest=TRIALS, search=SEARCH, metric="loss", budget_bytes=BUDGET, max_trials=num_trials, steps=16
        )
        told = {
            "config": config,
            "command": "qpruner run my.yaml --set search.max_trials=200",
            "stages": made | (stages or {}),
        }
        told |= {"environment": _environment() | {"torch": "2.13.0", "cpu": "AMD EPYC 9555"}}
        told |= {"started": STARTED, "updated": STARTED + 60, "outcome": outcome, "error": error}
        self.state = STATE.model_copy(update=told | {"search": search if self.trials else None})
        self.run.write_state(self.state)

    def write(self, trial: TrialRecord, **changes: Any) -> None:
        """Write a trial's record with these changes."""
        write_trial(self.run.trials / TRIALS, trial.model_copy(update=changes))

    def change(self, stage: str, **changes: Any) -> None:
        """Change the record of a stage."""
        self._records[stage] = self._records[stage].model_copy(update=changes)
        self.run.write_record(stage, self._records[stage])

    def win(self, best: TrialRecord, **changes: Any) -> None:
        """Make a trial the winner, and the only one scored on fresh rows."""
        fresh = (made_confirmation(best.index, best.origin, 3.0),)
        chosen = {"best_index": best.index, "best_plan": best.plan, "best_origin": best.origin}
        self.change("search", **chosen, confirmations=fresh, **changes)

    def change_search(self, **changes: Any) -> None:
        """Change the search in the run's state."""
        assert self.state.search
        search = self.state.search.model_copy(update=changes)
        self.run.write_state(self.state.model_copy(update={"search": search}))

    def record(self, stage: str) -> Any:
        """Return the record of a stage."""
        return self._records[stage]

    def _add_trials(self, count: int) -> None:
        ends = [STARTED] * 8
        for index in range(count):
            origin = ([*CONTROLS] + ["gp"] * count)[index]
            share = CONTROLS.get(origin, self._random.uniform(0.2, 0.5))
            keys = self._gains * self._random.lognormal(0, 2.0 / (1 + index % 40 / 20), len(self.groups))
            high = np.zeros(len(self.groups), dtype=bool)
            high[np.argsort(-keys)[: int(share * len(self.groups))]] = True
            bits, last = np.where(high, 8, 4), 4.2 - float(self._gains[high].sum()) + self._random.normal(0, 0.004)
            losses = [trial.rungs[-1].loss for trial in self.trials if trial.rungs]
            status = "failed" if index == 7 else "stopped" if index > 12 and last > np.median(losses) else "finished"
            steps = {"finished": (4, 8, 16), "stopped": (4, 8)[: 1 + index % 2], "failed": ()}[status]
            slot, seconds = int(np.argmin(ends)), 20.0 + 12.0 * sum(steps) / 4
            ends[slot] += seconds
            rungs = [RungResult(step=step, loss=last + 0.4 * math.exp(-step / 4), train_loss=last) for step in steps]
            self.trials.append(
                TrialRecord(
                    index=index,
                    digest=TRIALS,
                    search=SEARCH,
                    origin=origin,
                    plan={group: int(value) for group, value in zip(self.groups, bits, strict=True)},
                    plan_bytes=int(40_000_000 + (self._weights * bits / 8).sum()),
                    mean_bits=float((self._weights * bits).sum() / self._weights.sum()),
                    status=status,  # type: ignore[arg-type]
                    rungs=tuple(rungs),
                    reason={"failed": "TrainingDiverged: loss is nan", "stopped": "stopped by ASHA"}.get(status),
                    seconds=seconds,
                    gpu_seconds=seconds * self._gpus,
                    times=(ends[slot] - seconds, *(ends[slot] - 1.0 for _ in steps), ends[slot]),
                )
            )

    def _begin(self, num_blocks: int, noises: Mapping[str, float]) -> dict[str, Record]:
        """Return the records of the stages before the search."""
        prepared = {"model_path": "/models/base", "converted": False, "num_rows": {"train": 48}}
        channels = self._random.integers(60, 150, num_blocks).tolist()
        layers = [made_layer(block, 3, each) for block, each in enumerate(channels)]
        sizes = {"bytes_before": SIZES[BASE], "bytes_after": SIZES[PRUNED]}
        methods = {}
        for name, noise in noises.items():
            values = self._gains * self._random.lognormal(0, noise, len(self.groups))
            rises = {4: tuple(values.tolist()), 8: tuple((values / 50).tolist())}
            methods[name] = MethodScores(unit="nats", source="measured", values=rises, seconds=12.5, details={})
        return {
            "prepare": PrepareRecord(**self._stage, **prepared),
            "prune": made_prune(*layers, **self._stage, **sizes),
            "bank": BankRecord(**self._stage, files={}, bytes=1, residual_ratio={}),
            "sensitivity": SensitivityRecord(**self._stage, groups=tuple(self.groups), methods=methods),
        }

    def _make_records(self, num_blocks: int, noises: Mapping[str, float]) -> dict[str, Record]:
        statuses = [trial.status for trial in self.trials]
        finished = [trial for trial in self.trials if trial.status == "finished" and trial.plan_bytes <= BUDGET]
        best = min(finished, key=lambda trial: trial.rungs[-1].loss)
        search = {
            "trials_digest": TRIALS,
            "budget_bytes": BUDGET,
            "num_trials": len(self.trials),
            **{f"num_{status}": statuses.count(status) for status in ("finished", "stopped", "failed")},
            "ended": f"all {len(self.trials)} trials were spent (`search.max_trials`)",
            "search_seconds": 1800.0,
            "confirmations": tuple(
                made_confirmation(each.index, each.origin, each.rungs[-1].loss - 0.1)
                for each in (*self.trials[:3], best)
            ),
            "best_index": best.index,
            "best_origin": best.origin,
            "best_control": 1,
        }
        untuned = [(name, self._scores(name)) for name in (BASE, PRUNED, SEARCHED)]
        made = with_figures(results_of(self._scored(best.plan), untuned, **search))
        assert made.finetune and made.evaluate
        tuned, (base, pruned, quantized, *rows) = made.finetune.candidates, made.evaluate.rows
        given: dict[str, Any] = {"inference": made.evaluate.inference, **self._stage}
        won = {"candidates": (tuned[-3],), **self._stage}
        scored = {"rows": (base, pruned, quantized, rows[-3]), **self._stage}
        return self._begin(num_blocks, noises) | {
            "search": made_search(best.plan, **search, resumed=3, sessions=2, **self._stage),
            "finetune": made.finetune.model_copy(update=won),
            "evaluate": made.evaluate.model_copy(update=scored),
            "comparison": ComparisonRecord(candidates=tuned, rows=tuple(rows), **given),
        }

    def _scored(self, best: dict[str, int]) -> list[Scored]:
        """Return the fine-tunes of every row; the searched row comes last and has three."""
        found: list[Scored] = []
        for name in (*LEVELS, BEST_SEED, RANDOM, SEARCHED):
            plan = dict.fromkeys(self.groups, LEVELS[name]) if name in LEVELS else best
            if name in (BEST_SEED, RANDOM):
                plan = dict(zip(best, self._random.permutation(list(best.values())).tolist(), strict=True))
            for seed in range(1 if name in LEVELS else 3):
                loss = 3.9 + self._random.normal(0, 0.02) + {4: 0.3, 8: 0.1}.get(LEVELS.get(name, 0), 0.0)
                row = candidate(name, plan, SIZES.get(name, 92_000_000), seed, loss, loss - 0.05)
                row = row.model_copy(update={"digest": f"{len(found):016d}", "seconds": 40.0})
                found.append((row, self._scores(name)))
        return found

    def _scores(self, name: str) -> tuple[TaskScore, ...]:
        share = {BASE: 0.77, PRUNED: 0.71, "uniform 4-bit": 0.66}.get(name, 0.69)
        correct = {task: (self._random.random(count) < share).astype(float) for task, count in self._tasks.items()}
        losses = {task: self._random.gamma(2.0, 1.0, count).tolist() for task, count in self._tasks.items()}
        return tuple(score(right.tolist(), losses[task], task) for task, right in correct.items())


# ---- a search of six trials

GROUPS = tuple(f"layers.{index}" for index in range(6))
RUNGS = (2, 4, 8)
DIGEST, MINE = "d" * 16, "a" * 16
MEGABYTE = 10**6


def config_of(folder: Path, **settings: Any) -> RunConfig:
    """Return a configuration with the rungs `RUNGS`; `section__key=value` sets other keys."""
    raw = raw_config(Path("a-model"), folder)
    for key, value in {"search__steps": 8, "search__first_rung": 2, **settings}.items():
        raw = with_key(raw, key.replace("__", "."), value)
    return validate_config(raw)


def trial(index: int, plan: str, losses: list[float], **fields: Any) -> TrialRecord:
    """Return a trial with a minute per rung, begun a minute after the previous one; with all rungs it is finished."""
    started = STARTED + 60 * index
    times = [started + 60 * count for count in range(1 + len(losses))]
    rungs = tuple(
        RungResult(step=step, loss=loss, train_loss=loss + 1, train_losses=(loss + 1.5,) * (step - before))
        for before, step, loss in zip((0, *RUNGS), RUNGS, losses, strict=False)
    )
    given = {"status": "finished" if len(losses) == len(RUNGS) else "stopped", "origin": "gp", **fields}
    over = [] if given["status"] == "running" else [times[-1] + 1]
    bits = {group: int(character) for group, character in zip(GROUPS, plan, strict=True)}
    made = {
        "index": index,
        "digest": DIGEST,
        "search": MINE,
        "plan": bits,
        "plan_bytes": MEGABYTE * sum(bits.values()),
        "mean_bits": sum(bits.values()) / len(bits),
        "rungs": rungs,
        "seconds": 60.0 * len(losses),
        "times": (*times, *over),
    }
    return TrialRecord(**made | given)


def trials() -> list[TrialRecord]:
    """Return six trials: two controls, a plan that beats them, one stopped, one failed and one running."""
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


def planned(records: list[TrialRecord], **fields: Any) -> SearchPlanned:
    values = {4: tuple(0.1 * index for index in range(len(GROUPS))), 8: (0.0,) * len(GROUPS)}
    scores = MethodScores(unit="nats", source="measured", values=values, seconds=1.0, details={})
    measured = SensitivityRecord(digest="e" * 16, seconds=2.0, groups=GROUPS, methods={"kl": scores})
    return SearchPlanned(search_state(**fields), tuple(records), measured)


def recorded_run(root: Path, *, is_over: bool = False, pid: int | None = None, **settings: Any) -> Path:
    """Write a run whose search is running or over, as if this process had written it."""
    run, records = RunDir(root), trials()
    for record in records:
        write_trial(run.trials / DIGEST, record)
    stage = StageState(state="running", started=STARTED, done=5, total=8, text="8 trials")
    if is_over:
        best, ended = records[2], {"num_trials": 6, "num_finished": 3, "num_stopped": 1, "best_control": 1}
        chosen = {"best_index": 2, "trials_digest": DIGEST, "budget_bytes": 32 * MEGABYTE}
        fresh = (made_confirmation(2, best.origin, best.rungs[-1].loss + 0.05),)
        run.write_record("search", made_search(best.plan, confirmations=fresh, **ended, **chosen))
        stage = StageState(state="done", started=STARTED, seconds=600.0, text="3 finished")
    told = {"config": config_of(root, **settings).model_dump(mode="json"), "command": "qpruner run config.yaml"}
    told |= {"folder": "/somewhere", "host": socket.gethostname(), "pid": os.getpid() if pid is None else pid}
    told |= {"started": STARTED, "updated": STARTED + 400, "outcome": "done" if is_over else "running"}
    stages = {"prepare": StageState(state="recorded", started=STARTED, text="48 rows"), "search": stage}
    run.write_state(STATE.model_copy(update=told | {"stages": stages, "search": search_state()}))
    return root
