"""Records and folders of runs as commands write them, made with the real record classes; no model
is trained.

`results_of` returns the records of a finished run with given losses and answers in its rows.
`MadeRun` writes the folder of a long search: by default 30 blocks, 200 trials, two tasks, and
random figures except for the best plan. `recorded_run` writes the folder of a search of six trials,
whose figures are written out here.
"""

import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import raw_config, with_keys
from made_records import made_finalist, made_fine_tune, made_layer, made_prune, made_search

from qpruner.config.load import validate_config
from qpruner.config.schema import RunConfig
from qpruner.pipeline.flow import names_of, wanted_stages
from qpruner.quantization.formats import format_of
from qpruner.report.snapshot import Snapshot
from qpruner.runs.events import SearchPlanned
from qpruner.runs.records import (
    BASE,
    CONFIRMATION,
    PRUNED,
    RANDOM,
    SEARCHED,
    BankRecord,
    ComparisonRecord,
    EvalRecord,
    Finalist,
    FineTune,
    FinetuneRecord,
    Inference,
    InferenceSetting,
    MethodScores,
    PrepareRecord,
    Record,
    Results,
    RungResult,
    RunState,
    ScoredRows,
    SearchRecord,
    SearchState,
    SensitivityRecord,
    StageState,
    TaskScore,
    TrialRecord,
)
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import write_trial

PLAN = {"layers.0": "int8", "layers.1": "nf4"}
SEED_PLAN = {"layers.0": "nf4", "layers.1": "int8"}
OF_LETTER = {"4": "nf4", "8": "int8", "F": "bf16"}
TRIALS, SEARCH = "1" * 16, "2" * 16
STAGE: dict[str, Any] = {"digest": "0" * 16, "seconds": 61.5}
STAGES = ("prepare", "prune", "bank", "sensitivity", "search", "finetune", "evaluate", "comparison")
STARTED = 1_790_000_000.0
UNTUNED = (BASE, PRUNED, SEARCHED)
RIVAL = "unpruned-knapsack"
"""The control with the least confirmation loss."""
ORIGINS = {SEARCHED: "gp, trial 11", RIVAL: RIVAL, RANDOM: "3 random plans"}
STATE = RunState(
    config={
        "model": {"source": "me/base"},
        "data": {"train": []},
        "seed": 0,
        "quantize": {"budget": {"fraction": 0.5}},
    },
    flow=(*STAGES, "report"),
    asked=(*STAGES, "report"),
    until="report",
    command="qpruner run my.yaml --set search.max_trials=200",
    folder="/home/me",
    environment={"qpruner": "1.2", "python": "3.11.9", "torch": "2.13.0", "cpu": "AMD EPYC 9555"},
    host="here",
    pid=1,
    started=STARTED,
    updated=STARTED + 60,
    outcome="done",
)


def made_methods(
    values: dict[str, tuple[float | None, ...]], *names: str
) -> dict[str, MethodScores]:
    """Return sensitivities with the same predicted losses."""
    scores = MethodScores(unit="nats", values=values, seconds=12.5)
    return dict.fromkeys(names, scores)


# ---- a finished run with given losses and answers


def candidate(
    name: str,
    plan: dict[str, str],
    measured_bytes: int = 100_000_000,
    seed: int | None = 0,
    confirmation_loss: float = 2.0,
    tasks: Sequence[TaskScore] = (),
    **changes: Any,
) -> FineTune:
    """Make a fine-tune of a row with this loss on both of two rows."""
    origin = (dict.fromkeys((BASE, PRUNED), "unquantized") | ORIGINS).get(name, name)
    sizes = {"plan_bytes": measured_bytes, "measured_bytes": measured_bytes}
    losses: dict[ScoredRows, Sequence[float]] = {CONFIRMATION: (confirmation_loss,) * 2}
    return made_fine_tune(name, plan, seed, losses, tasks, origin=origin, **sizes, **changes)


def score(
    correct: Sequence[float],
    answer_loss: Sequence[float] = (),
    task: str = "arc",
    metric: str = "acc",
) -> TaskScore:
    value, count = sum(correct) / len(correct), len(correct)
    stderr = math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else math.nan
    answers = {"correct": tuple(correct), "answer_loss": tuple(answer_loss)}
    return TaskScore(
        task=task, metric=metric, value=value, stderr=stderr, num_questions=count, **answers
    )


def answers(num_questions: int, num_correct: int) -> list[float]:
    return [1.0] * num_correct + [0.0] * (num_questions - num_correct)


def results_of(
    tuned: Sequence[FineTune],
    untuned: Sequence[tuple[str, tuple[TaskScore, ...]]] = (),
    origin: str = "gp",
    **changes: Any,
) -> Results:
    """Return a finished run with the rows `tuned`, the searched one last, whose plan has this
    `origin`; `changes` update the search's record.

    The winner's rival is the row `RIVAL`, if there is one.
    """
    trials = {
        "num_trials": 16,
        "num_finished": 7,
        "num_stopped": 8,
        "num_reused": 5,
        "failures": {"diverged": 1},
    }
    told = {"ended": "all 16 trials were spent (`search.max_trials`)", "resumed": 3, "sessions": 2}
    plans: dict[str, Any] = {row.name: {"plan": row.plan, "cut": row.cut} for row in tuned}
    control = made_finalist(2, RIVAL, 2.125, reused=True, **plans.get(RIVAL, {}))
    best = made_finalist(11, origin, 2.0625, losses={0: (2.03125, 2.09375)}, **plans[SEARCHED])
    search = STAGE | trials | told | {"finalists": (control, best), "best_index": 11} | changes
    winner = next(row for row in tuned if row.name == SEARCHED)
    before = [candidate(name, winner.plan, seed=None, tasks=scores) for name, scores in untuned]
    kl = made_methods({"nf4": (0.5125, 0.25), "int8": (0.0125, 0.0)}, "kl")
    return Results(
        prepare=PrepareRecord(
            **STAGE, model_path="/models/base", converted=False, num_rows={"train": 48}
        ),
        prune=made_prune(made_layer(0, 2, 100)),
        sensitivity=SensitivityRecord(**STAGE, groups=tuple(PLAN), methods=kl),
        search=made_search(winner.plan, **search),
        finetune=FinetuneRecord(**STAGE, winner=winner),
        evaluate=EvalRecord(**STAGE, rows=(*before, *tuned), tested="asked"),
    )


def snapshot(results: Results, **state: Any) -> Snapshot:
    """Return a run with these records and no trials; `state` updates the state of its latest
    command."""
    return Snapshot(RunDir("demo", create=False), STATE.model_copy(update=state), None, results, ())


def row_of(
    name: str,
    losses: Sequence[float],
    scores: Sequence[TaskScore] | None = None,
    plan: dict[str, str] = SEED_PLAN,
    measured_bytes: int = 100_000_000,
) -> list[FineTune]:
    """Return a row with one training seed per confirmation loss; without `scores` all seeds answer
    alike."""
    scores = scores or [score(answers(50, 20), [1.0] * 50)] * len(losses)
    return [
        candidate(name, plan, measured_bytes, seed, loss, [scored])
        for seed, (loss, scored) in enumerate(zip(losses, scores, strict=True))
    ]


def searched_row(
    losses: Sequence[float], scores: Sequence[TaskScore] | None = None, **changes: Any
) -> list[FineTune]:
    return row_of(SEARCHED, losses, scores, **({"plan": PLAN} | changes))


def random_rows(losses: Sequence[float], by_plan: Sequence[float]) -> list[FineTune]:
    """Return one random plan per distance from the losses, with one training seed per loss."""
    plans = [{"layers.0": "nf4", "layers.1": name} for name in OF_LETTER.values()]
    return [
        scored
        for plan, off in zip(plans, by_plan, strict=False)
        for scored in row_of(RANDOM, [loss + off for loss in losses], plan=plan)
    ]


def with_figures(results: Results) -> Results:
    """Return the run with losses on a text, and with timings.

    The timings are of three turns for each training seed.
    """
    assert results.evaluate
    rows = []
    for row in results.evaluate.rows:
        seed, decoded = row.seed or 0, (20.0, 10.0, 12.0)
        read = (100.0 + seed, 110.0 + seed, 150.0 + seed)
        figures = {"prefill_tokens_per_second": read, "decode_tokens_per_second": decoded}
        taken = (
            None
            if row.seed is None
            else Inference(memory_bytes=(30 + seed) * 10_000_000, **figures)
        )
        rows.append(
            row.model_copy(update={"text_loss": math.log(8.0 + 2 * seed), "inference": taken})
        )
    setting = InferenceSetting(
        device="NVIDIA X", prompt_tokens=128, new_tokens=16, memory_counter="cuda peak"
    )
    given = {"rows": tuple(rows), "text": "the text", "inference": setting}
    return results.model_copy(update={"evaluate": results.evaluate.model_copy(update=given)})


def whole_results() -> Results:
    """Return a finished run with every row, on two tasks; the last three rows have two training
    seeds."""
    plans = {name: dict.fromkeys(PLAN, level) for name, level in LEVELS.items()}
    plans |= dict.fromkeys((RIVAL, RANDOM), SEED_PLAN) | {SEARCHED: PLAN}
    scored: list[FineTune] = []
    for number, (name, plan) in enumerate(plans.items()):
        for seed in range(2 if name in ORIGINS else 1):
            # Every random plan is another one.
            own = PLAN if name == RANDOM and seed else plan
            size = 100_000_000 + 100_000 * (number + seed)
            right = score(answers(50, 10 + number + 5 * seed), [1.0 + seed] * 50)
            tasks = (right, score(answers(40, 30), [2.0] * 40, "piqa"))
            scored.append(candidate(name, own, size, seed, 2.0 + seed, tasks))
    untuned = [
        (name, (score(answers(50, 5)), score(answers(40, 6), task="piqa"))) for name in UNTUNED
    ]
    return results_of(scored, untuned)


def finalist_of(trial: TrialRecord, loss: float) -> Finalist:
    return made_finalist(
        trial.index, trial.origin, loss, plan=trial.plan, plan_bytes=trial.plan_bytes
    )


# ---- the folder of a long search

NOISES = {"mutual_information": 1.5, "first_order": 0.6, "kl": 0.3}
"""Sensitivity method -> noise that is added to the true sensitivities."""
HOSTILE = (
    "</script><script>document.title='owned'</script>"
    "<img src=x onerror=\"document.title='owned'\"> & `| `"
)
"""A name that would act as markup if a report did not escape it."""
BUDGET = 93_000_000
CONTROLS = {"unpruned-uniform": 0.0, RIVAL: 0.5, "paper": 0.48}
"""Origin of one of the first trials -> share of groups in int8."""
LEVELS = {BASE: "bf16", PRUNED: "bf16", "unpruned-uniform": "nf4", "paper": "int8"}
SIZES = {BASE: 278_800_000, PRUNED: 223_400_000}


class MadeRun:
    """Writes the folder of a run on `model`, up to and including the stage `until`, and the trials
    of its search.

    `stages` are states of later stages, each job held `gpus` GPUs, and `state` updates the state of
    the command.
    """

    def __init__(
        self,
        root: Path,
        num_trials: int = 200,
        num_blocks: int = 30,
        model: str = "SmolLM2-135M",
        until: str = "comparison",
        stages: dict[str, StageState] | None = None,
        task: str = "arc_easy",
        gpus: float = 0.0,
        **state: Any,
    ) -> None:
        self._gpus, self._stage = gpus, STAGE | {"gpu_seconds": STAGE["seconds"] * gpus}
        self._random, self._tasks = np.random.default_rng(0), {task: 400, "piqa": 200}
        self.run = RunDir(root)
        self.groups = [
            f"layers.{block:02d}.{part}"
            for block in range(num_blocks)
            for part in ("attention", "mlp")
        ]
        self._gains = self._random.gamma(1.2, 0.01, len(self.groups))
        self._weights = (
            np.where(np.arange(len(self.groups)) % 2, 1.4, 0.6) * 69_000_000 / len(self.groups)
        )
        self.trials = self._make_trials(num_trials)
        for trial in self.trials:
            self.write(trial)
        self._records = self._after_the_search() | self._before_the_search(num_blocks)
        done = STAGES[: STAGES.index(until) + 1]
        for name in done:
            self.run.write_record(name, self._records[name])
        made = {name: StageState(state="done", started=STARTED, seconds=61.5) for name in done}
        settings = validate_config(raw_config(Path(model), root))
        flow = names_of(wanted_stages(settings))
        config = settings.model_dump(mode="json") | {"model": {"source": model}}
        search = search_state(budget_bytes=BUDGET, max_trials=num_trials, steps=16, slots=None)
        self.state = STATE
        self.change_state(
            config=config,
            flow=flow,
            asked=flow,
            stages=made | (stages or {}),
            search=search,
            **state,
        )

    def write(self, trial: TrialRecord, **changes: Any) -> None:
        """Write a trial's record with these changes."""
        write_trial(self.run.trials / TRIALS, trial.model_copy(update=changes))

    def record(self, stage: str) -> Any:
        """Return the record of a stage."""
        return self._records[stage]

    def change(self, stage: str, **changes: Any) -> None:
        """Change the record of a stage."""
        self._records[stage] = self._records[stage].model_copy(update=changes)
        self.run.write_record(stage, self._records[stage])

    def change_state(self, **changes: Any) -> None:
        """Change the state of the latest command."""
        self.state = self.state.model_copy(update=changes)
        self.run.write_state(self.state)

    def change_search(self, **changes: Any) -> None:
        """Change the search in the run's state."""
        assert self.state.search
        self.change_state(search=self.state.search.model_copy(update=changes))

    def hold_for_finalists(self, gpu_seconds: float) -> None:
        """Record these GPU seconds for scoring the finalists."""
        search = self.run.read_record("search", SearchRecord)
        assert search
        first, *others = search.finalists
        scored = first.as_trial.model_copy(update={"gpu_seconds": gpu_seconds})
        first = first.model_copy(update={"fine_tunes": (scored, *first.fine_tunes[1:])})
        self.change("search", finalists=(first, *others))

    def win(self, best: TrialRecord, **changes: Any) -> None:
        """Make a trial the winner, and the only one scored on fresh rows."""
        fresh = (finalist_of(best, 3.0),)
        self.change("search", best_index=best.index, finalists=fresh, rival=None, **changes)

    def _make_trials(self, count: int) -> list[TrialRecord]:
        ends, trials = [STARTED] * 8, []
        for index in range(count):
            origin = ([*CONTROLS] + ["gp"] * count)[index]
            share = CONTROLS.get(origin, self._random.uniform(0.2, 0.5))
            keys = self._gains * self._random.lognormal(
                0, 2.0 / (1 + index % 40 / 20), len(self.groups)
            )
            high = np.zeros(len(self.groups), dtype=bool)
            high[np.argsort(-keys)[: int(share * len(self.groups))]] = True
            bits, last = (
                np.where(high, 8, 4),
                4.2 - float(self._gains[high].sum()) + self._random.normal(0, 0.004),
            )
            losses = [trial.rungs[-1].loss for trial in trials if trial.rungs]
            status = (
                "failed"
                if index == 7
                else "stopped"
                if index > 12 and last > np.median(losses)
                else "finished"
            )
            steps = {"finished": (4, 8, 16), "stopped": (4, 8)[: 1 + index % 2], "failed": ()}[
                status
            ]
            slot, seconds = int(np.argmin(ends)), 20.0 + 12.0 * sum(steps) / 4
            ends[slot] += seconds
            rungs = [
                RungResult(step=step, loss=last + 0.4 * math.exp(-step / 4), train_loss=last)
                for step in steps
            ]
            taken = {"seconds": seconds, "gpu_seconds": seconds * self._gpus, "rungs": rungs}
            times = (ends[slot] - seconds, *(ends[slot] - 1.0 for _ in steps), ends[slot])
            plan = {
                group: OF_LETTER[str(value)] for group, value in zip(self.groups, bits, strict=True)
            }
            size = int(40_000_000 + (self._weights * bits / 8).sum())
            mean_bits = float((self._weights * bits).sum() / self._weights.sum())
            told = {
                "reason": {
                    "failed": "TrainingDiverged: loss is nan",
                    "stopped": "stopped by ASHA",
                }.get(status)
            }
            told |= {
                "digest": TRIALS,
                "search": SEARCH,
                "origin": origin,
                "status": status,
                "times": times,
            }
            trials.append(
                TrialRecord(
                    index=index,
                    cut="cut-20",
                    plan=plan,
                    plan_bytes=size,
                    mean_bits=mean_bits,
                    **taken,
                    **told,
                )
            )
        return trials

    def _before_the_search(self, num_blocks: int) -> dict[str, Record]:
        channels = self._random.integers(60, 150, num_blocks).tolist()
        layers = [made_layer(block, 3, each) for block, each in enumerate(channels)]
        sizes = {"bytes_before": SIZES[BASE], "bytes_after": SIZES[PRUNED]}
        methods = {}
        for name, noise in NOISES.items():
            values = self._gains * self._random.lognormal(0, noise, len(self.groups))
            methods |= made_methods(
                {"nf4": tuple(values.tolist()), "int8": tuple((values / 50).tolist())}, name
            )
        prepared = {"model_path": "/models/base", "converted": False, "num_rows": {"train": 48}}
        return {
            "prepare": PrepareRecord(**self._stage, **prepared),
            "prune": made_prune(*layers, **self._stage, **sizes),
            "bank": BankRecord(**self._stage, cut="cut-20", files={}, bytes=1, residual_ratio={}),
            "sensitivity": SensitivityRecord(
                **self._stage, groups=tuple(self.groups), methods=methods
            ),
        }

    def _after_the_search(self) -> dict[str, Record]:
        statuses = [trial.status for trial in self.trials]
        finished = [
            trial
            for trial in self.trials
            if trial.status == "finished" and trial.plan_bytes <= BUDGET
        ]
        best = min(finished, key=lambda trial: trial.rungs[-1].loss)
        found = [finalist_of(each, each.rungs[-1].loss - 0.1) for each in (*self.trials[:3], best)]
        losses = [each.mean.loss for each in found if each.control]
        found[1] = finalist_of(self.trials[1], min(losses) - 0.01)  # the best control
        search = {
            f"num_{status}": statuses.count(status) for status in ("finished", "stopped", "failed")
        }
        search |= {
            "num_trials": len(statuses),
            "ended": f"all {len(statuses)} trials were spent (`search.max_trials`)",
        }
        search |= {"trials_digest": TRIALS, "budget_bytes": BUDGET, "search_seconds": 1800.0}
        search |= {"best_index": best.index}
        search |= {"finalists": tuple(found)}
        untuned = [(name, self._scores(name)) for name in UNTUNED]
        made = with_figures(results_of(self._scored(best.plan), untuned, **search, **self._stage))
        assert made.search and made.finetune and made.evaluate
        rows = made.evaluate.rows
        before = rows[: len(UNTUNED)]
        compared = rows[len(UNTUNED) :]
        winner = compared[-3]
        return {
            "search": made.search,
            "finetune": FinetuneRecord(winner=winner, **self._stage),
            "evaluate": made.evaluate.model_copy(update={"rows": (*before, winner), **self._stage}),
            "comparison": ComparisonRecord(
                rows=compared, inference=made.evaluate.inference, **self._stage
            ),
        }

    def _scored(self, best: dict[str, str]) -> list[FineTune]:
        """Return the fine-tunes of every row; the searched row comes last and has three."""
        found: list[FineTune] = []
        for name in (*LEVELS, RIVAL, RANDOM, SEARCHED):
            plan = dict.fromkeys(self.groups, LEVELS[name]) if name in LEVELS else best
            if name == RIVAL:
                plan = self.trials[1].plan
            elif name == RANDOM:
                plan = dict(
                    zip(best, self._random.permutation(list(best.values())).tolist(), strict=True)
                )
            for seed in range(1 if name in LEVELS else 3):
                loss = (
                    3.9
                    + self._random.normal(0, 0.02)
                    + {"nf4": 0.3, "int8": 0.1}.get(LEVELS.get(name, ""), 0.0)
                )
                size = SIZES.get(name, 92_000_000)
                digest = f"{len(found):016d}"
                tasks = self._scores(name)
                found.append(candidate(name, plan, size, seed, loss - 0.05, tasks, digest=digest))
        return found

    def _scores(self, name: str) -> tuple[TaskScore, ...]:
        share = {BASE: 0.77, PRUNED: 0.71, "unpruned-uniform": 0.66}.get(name, 0.69)
        correct = {
            task: (self._random.random(count) < share).astype(float)
            for task, count in self._tasks.items()
        }
        losses = {
            task: self._random.gamma(2.0, 1.0, count).tolist()
            for task, count in self._tasks.items()
        }
        return tuple(score(right.tolist(), losses[task], task) for task, right in correct.items())


# ---- the folder of a search of six trials

GROUPS = tuple(f"layers.{index}" for index in range(6))
RUNGS = (2, 4, 8)
MEGABYTE = 10**6


def config_of(folder: Path, **settings: Any) -> RunConfig:
    """Return a configuration with the rungs `RUNGS`; `section__key=value` sets other keys."""
    keys = {"search__steps": 8, "search__first_rung": 2, **settings}
    return validate_config(with_keys(raw_config(Path("a-model"), folder), **keys))


def trial(index: int, plan: str, losses: list[float], **fields: Any) -> TrialRecord:
    """Return a trial with a minute per rung, begun a minute after the previous one; with all rungs
    it is finished."""
    started = STARTED + 60 * index
    times = [started + 60 * count for count in range(1 + len(losses))]
    rungs = tuple(
        RungResult(
            step=step, loss=loss, train_loss=loss + 1, train_losses=(loss + 1.5,) * (step - before)
        )
        for before, step, loss in zip((0, *RUNGS), RUNGS, losses, strict=False)
    )
    given = {
        "status": "finished" if len(losses) == len(RUNGS) else "stopped",
        "origin": "gp",
        **fields,
    }
    over = [] if given["status"] == "running" else [times[-1] + 1]
    formats = {group: OF_LETTER[character] for group, character in zip(GROUPS, plan, strict=True)}
    bits = sum(format_of(name).bits for name in formats.values())
    made = {"index": index, "digest": TRIALS, "search": SEARCH, "plan": formats, "rungs": rungs}
    made |= {"plan_bytes": MEGABYTE * int(bits), "mean_bits": bits / len(formats)}
    made |= {"seconds": 60.0 * len(losses), "times": (*times, *over)}
    return TrialRecord(**made | given)


def trials() -> list[TrialRecord]:
    """Return six trials: two controls, a plan that beats them, one stopped, one failed and one
    running."""
    return [
        trial(0, "444444", [3.4, 3.3, 3.2], origin="unpruned-uniform"),
        trial(1, "884444", [3.3, 3.2, 3.0], origin=RIVAL),
        trial(2, "848444", [3.2, 3.1, 2.9]),
        trial(3, "448844", [3.5]),
        trial(
            4,
            "444488",
            [],
            status="failed",
            failure="diverged",
            reason="TrainingDiverged: the loss is nan",
        ),
        trial(5, "844484", [3.1], status="running"),
    ]


def search_state(**fields: Any) -> SearchState:
    given = {
        "metric": "loss",
        "budget_bytes": 32 * MEGABYTE,
        "max_trials": 20,
        "steps": 8,
        "slots": 2,
    }
    return SearchState(**{"trials_digest": TRIALS, "search": SEARCH, **given, **fields})


def planned(records: list[TrialRecord], **fields: Any) -> SearchPlanned:
    return SearchPlanned(search_state(**fields), tuple(records))


def recorded_run(
    root: Path, *, is_over: bool = False, pid: int | None = None, **settings: Any
) -> Path:
    """Write a run whose search is running or over, as if this process had written it."""
    run, records = RunDir(root), trials()
    for record in records:
        write_trial(run.trials / TRIALS, record)
    stage = StageState(state="running", started=STARTED, done=5, total=8, text="8 trials")
    if is_over:
        best, ended = records[2], {"num_trials": 6, "num_finished": 3, "num_stopped": 1}
        chosen = {"best_index": 2, "trials_digest": TRIALS, "budget_bytes": 32 * MEGABYTE}
        fresh = (finalist_of(best, best.rungs[-1].loss + 0.05),)
        run.write_record("search", made_search(best.plan, finalists=fresh, **ended, **chosen))
        stage = StageState(state="done", started=STARTED, seconds=600.0, text="3 finished")
    told = {
        "config": config_of(root, **settings).model_dump(mode="json"),
        "command": "qpruner run config.yaml",
    }
    told |= {
        "folder": "/somewhere",
        "host": socket.gethostname(),
        "pid": os.getpid() if pid is None else pid,
    }
    told |= {"outcome": "done" if is_over else "running", "search": search_state()}
    stages = {
        "prepare": StageState(state="recorded", started=STARTED, text="48 rows"),
        "search": stage,
    }
    run.write_state(STATE.model_copy(update=told | {"stages": stages}))
    return root
