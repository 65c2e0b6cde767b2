"""A run folder as a long search leaves it, made through the real record classes: 30 blocks, 200 trials, two tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from conftest import raw_config
from made_records import made_confirmation, made_layer, made_prune, made_search

from qpruner.config.load import validate_config
from qpruner.pipeline.progress import _environment
from qpruner.report.files import write_report
from qpruner.report.results import BASE, BEST_SEED, PRUNED, RANDOM, SEARCHED
from qpruner.runs.records import (
    BankRecord,
    CandidateRecord,
    ComparisonRecord,
    EvalRecord,
    FinetuneRecord,
    Inference,
    InferenceSetting,
    MethodScores,
    PrepareRecord,
    Record,
    RowScores,
    RungResult,
    RunState,
    SearchRecord,
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
PARTS = ("attention", "mlp")
NOISES = {"mutual_information": 1.5, "first_order": 0.6, "kl": 0.3}
"""Sensitivity method -> how far it is from what trials find."""
STAGES = ("prepare", "prune", "bank", "sensitivity", "search", "finetune", "evaluate", "comparison")
STARTED = 1_790_000_000.0
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & `| `"
"""A name that would be markup if a report let it."""
BUDGET = 93_000_000
SETTING = InferenceSetting(
    device="2 CPU cores", prompt_tokens=128, new_tokens=16, memory_counter="rise of resident memory"
)


class MadeRun:
    """Writes the folder of a run on `model`, up to and with the stage `until`; `outcome` is how its command ended; each
    of its jobs held `gpus`; a block has a group for each of `parts`."""

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
        parts: Sequence[str] = PARTS,
        noises: Mapping[str, float] = NOISES,
    ) -> None:
        self._noises = noises
        self._gpus = gpus
        self._stage = STAGE | {"gpu_seconds": STAGE["seconds"] * gpus}
        self._random = np.random.default_rng(0)
        self._tasks = {task: questions, "piqa": min(questions, 200)}
        self.run = RunDir(root)
        self.groups = [f"layers.{block:02d}.{part}" for block in range(num_blocks) for part in parts]
        self._gains = self._random.gamma(1.2, 0.01, len(self.groups))
        self._weights = np.where(np.arange(len(self.groups)) % 2, 1.4, 0.6) * 69_000_000 / len(self.groups)
        done = STAGES[: STAGES.index(until) + 1]
        self.trials = self._trials(num_trials) if "search" in {*done, *(stages or {})} else []
        for trial in self.trials:
            write_trial(self.run.trials / TRIALS, trial)
        records = self._records(num_blocks)
        for name in done:
            self.run.write_record(name, records[name]())
        raw = raw_config(Path(model), root)
        config = validate_config(raw).model_dump(mode="json") | {"model": {"source": model}}
        made = {name: StageState(state="done", started=STARTED, seconds=61.5) for name in done}
        self.state = RunState(
            config=config,
            until="report",
            command="qpruner run my.yaml --set search.max_trials=200",
            folder="/home/me",
            environment=_environment() | {"torch": "2.13.0", "cpu": "AMD EPYC 9555"},
            host="here",
            pid=1,
            started=STARTED,
            updated=STARTED + 60,
            outcome=outcome,  # type: ignore[arg-type]
            error=error,
            stages=made | (stages or {}),
            search=SearchState(
                trials_digest=TRIALS, search=SEARCH, metric="loss", budget_bytes=BUDGET, max_trials=num_trials, steps=16
            )
            if self.trials
            else None,
        )
        self.run.write_state(self.state)

    def _loss(self, high: np.ndarray[Any, Any]) -> float:
        return 4.2 - float(self._gains[high].sum()) + self._random.normal(0, 0.004)

    def _trials(self, count: int) -> list[TrialRecord]:
        trials = []
        ends = [STARTED] * 8
        controls = {"uniform-4": 0.0, "seed-kl": 0.5, "seed-first-order": 0.48}
        for index in range(count):
            origin = (list(controls) + ["gp"] * count)[index]
            share = controls.get(origin, self._random.uniform(0.2, 0.5))
            keys = self._gains * self._random.lognormal(0, 2.0 / (1 + index % 40 / 20), len(self.groups))
            high = np.zeros(len(self.groups), dtype=bool)
            high[np.argsort(-keys)[: int(share * len(self.groups))]] = True
            bits = np.where(high, 8, 4)
            last = self._loss(high)
            status = "finished"
            if index == 7:
                status = "failed"
            elif index > 12 and last > np.median([trial.rungs[-1].loss for trial in trials if trial.rungs]):
                status = "stopped"
            steps = {"finished": (4, 8, 16), "stopped": (4, 8)[: 1 + index % 2], "failed": ()}[status]
            slot, gpus = int(np.argmin(ends)), self._gpus
            seconds = 20.0 + 12.0 * sum(steps) / 4
            ends[slot] += seconds
            trials.append(
                TrialRecord(
                    index=index,
                    digest=TRIALS,
                    search=SEARCH,
                    origin=origin,
                    plan={group: int(value) for group, value in zip(self.groups, bits, strict=True)},
                    plan_bytes=int(40_000_000 + (self._weights * bits / 8).sum()),
                    mean_bits=float((self._weights * bits).sum() / self._weights.sum()),
                    status=status,  # type: ignore[arg-type]
                    rungs=tuple(
                        RungResult(step=step, loss=last + 0.4 * math.exp(-step / 4), train_loss=last) for step in steps
                    ),
                    reason={"failed": "TrainingDiverged: loss is nan", "stopped": "stopped by ASHA"}.get(status),
                    seconds=seconds,
                    gpu_seconds=seconds * gpus,
                    times=(ends[slot] - seconds, *(ends[slot] - 1.0 for _ in steps), ends[slot]),
                )
            )
        return trials

    def _records(self, num_blocks: int) -> dict[str, Any]:
        prepared = {"model_path": "/models/base", "converted": False, "num_rows": {"train": 48}}
        return {
            "prepare": lambda: PrepareRecord(**self._stage, **prepared),
            "prune": lambda: self._prune(num_blocks),
            "bank": lambda: BankRecord(**self._stage, files={}, bytes=1, residual_ratio={}),
            "sensitivity": self._sensitivity,
            "search": self._search,
            "finetune": self._finetune,
            "evaluate": self._evaluate,
            "comparison": self._comparison,
        }

    def _prune(self, num_blocks: int) -> Record:
        kept = self._random.integers(600, 1500, num_blocks)
        layers = [
            made_layer(block, 3, channels).model_copy(
                update={
                    "base_mlp_channels": 1536,
                    "base_parameters": 3_539_000,
                    "kept_parameters": int(884_000 * 2 / 3 + 2_655_000 * channels / 1536),
                }
            )
            for block, channels in enumerate(kept.tolist())
        ]
        sizes = {"bytes_before": 278_800_000, "bytes_after": 223_400_000}
        return made_prune(*layers, **self._stage, **sizes, parameters_before=134_515_008, parameters_after=107_545_344)

    def _sensitivity(self) -> Record:
        def method(noise: float) -> MethodScores:
            values = self._gains * self._random.lognormal(0, noise, len(self.groups))
            rises = {4: tuple(values.tolist()), 8: tuple((values / 50).tolist())}
            return MethodScores(unit="nats", source="one group at a time", values=rises, seconds=12.5, details={})

        methods = {name: method(noise) for name, noise in self._noises.items()}
        return SensitivityRecord(**self._stage, groups=tuple(self.groups), methods=methods)

    def _search(self) -> SearchRecord:
        statuses = [trial.status for trial in self.trials]
        finished = [trial for trial in self.trials if trial.status == "finished" and trial.plan_bytes <= BUDGET]
        best = min(finished, key=lambda trial: trial.rungs[-1].loss)
        finalists = [*self.trials[:3], best]
        return made_search(
            best.plan,
            **self._stage,
            trials_digest=TRIALS,
            budget_bytes=BUDGET,
            num_trials=len(self.trials),
            num_finished=statuses.count("finished"),
            num_stopped=statuses.count("stopped"),
            num_failed=statuses.count("failed"),
            ended=f"all {len(self.trials)} trials were spent (`search.max_trials`)",
            search_seconds=1800.0,
            confirmations=tuple(
                made_confirmation(each.index, each.origin, each.rungs[-1].loss - 0.1) for each in finalists
            ),
            best_index=best.index,
            best_origin=best.origin,
            best_control=1,
            resumed=3,
            sessions=2,
        )

    def _candidates(self) -> tuple[CandidateRecord, ...]:
        best = self._search().best_plan
        levels = {BASE: 16, PRUNED: 16, "uniform 4-bit": 4, "uniform 8-bit": 8}
        rows = []
        for name in (*levels, BEST_SEED, RANDOM, SEARCHED):
            plan = dict.fromkeys(self.groups, levels[name]) if name in levels else best
            if name in (BEST_SEED, RANDOM):
                plan = dict(zip(best, self._random.permutation(list(best.values())).tolist(), strict=True))
            for seed in range(1 if name in levels else 3):
                loss = 3.9 + self._random.normal(0, 0.02) + {4: 0.3, 8: 0.1}.get(levels.get(name, 0), 0.0)
                rows.append(
                    CandidateRecord(
                        digest=f"{len(rows):016d}",
                        seconds=40.0,
                        name=name,
                        origin={SEARCHED: "gp, trial 57", BEST_SEED: "seed-kl at the winner's bytes"}.get(
                            name, "uniform"
                        ),
                        seed=seed,
                        plan=plan,
                        plan_bytes=92_000_000,
                        measured_bytes={BASE: 278_800_000, PRUNED: 223_400_000}.get(name, 92_000_000),
                        mean_bits=float(np.mean(list(plan.values()))),
                        num_parameters=134_515_008 if name == BASE else 107_545_344,
                        steps=40,
                        train_loss=loss - 0.2,
                        validation_loss=loss,
                        confirmation_loss=loss - 0.05,
                        peak_memory_bytes=1_070_000_000,
                        memory_counter="rise of resident memory",
                    )
                )
        return tuple(rows)

    @cached_property
    def _every_row(self) -> tuple[tuple[CandidateRecord, ...], tuple[RowScores, ...]]:
        """Every fine-tune, the winner's first training seed among them, and its scores."""
        candidates = self._candidates()
        return candidates, self._scores([(row.name, row.seed) for row in candidates])

    def _finetune(self) -> Record:
        [winner] = [row for row in self._every_row[0] if (row.name, row.seed) == (SEARCHED, 0)]
        return FinetuneRecord(**self._stage, winner=SEARCHED, candidates=(winner,))

    def _evaluate(self) -> Record:
        untuned = self._scores([(BASE, None), (PRUNED, None), (SEARCHED, None)])
        winner = [row for row in self._every_row[1] if (row.name, row.seed) == (SEARCHED, 0)]
        text = "`evaluate.text` in 12 windows of 128 tokens"
        return EvalRecord(**self._stage, rows=(*untuned, *winner), text=text, inference=SETTING)

    def _comparison(self) -> Record:
        candidates, rows = self._every_row
        return ComparisonRecord(**self._stage, candidates=candidates, rows=rows, inference=SETTING)

    def _scores(self, wanted: Sequence[tuple[str, int | None]]) -> tuple[RowScores, ...]:
        shares = {BASE: 0.77, PRUNED: 0.71, "uniform 4-bit": 0.66}
        return tuple(
            RowScores(
                digest="0",
                name=name,
                seed=seed,
                scores=tuple(self._score(task, count, shares.get(name, 0.69)) for task, count in self._tasks.items()),
                text_loss=3.3 + self._random.normal(0, 0.01),
                inference=None if seed is None else self._taken(name),
            )
            for name, seed in wanted
        )

    def _taken(self, name: str) -> Inference:
        low, high = {BASE: (0.9, 1.0), PRUNED: (1.1, 1.2)}.get(name, (0.5, 0.7))
        return Inference(
            memory_bytes={BASE: 331_000_000, PRUNED: 270_000_000}.get(name, 140_000_000),
            prefill_tokens_per_second=tuple(self._random.uniform(600 * low, 600 * high, 3).tolist()),
            decode_tokens_per_second=tuple(self._random.uniform(24 * low, 24 * high, 3).tolist()),
        )

    def _score(self, task: str, count: int, share: float) -> TaskScore:
        correct = self._random.random(count) < share
        value = float(correct.mean())
        return TaskScore(
            task=task,
            metric="acc",
            value=value,
            stderr=math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else math.nan,
            num_questions=count,
            correct=tuple(correct.astype(float).tolist()),
            answer_loss=tuple(self._random.gamma(2.0, 1.0, count).tolist()),
        )


def reported_run(root: Path) -> Path:
    """The folder of a finished run of 200 trials, its report written."""
    write_report(MadeRun(root).run)
    return root
