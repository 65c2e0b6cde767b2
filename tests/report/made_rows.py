"""Records of a finished run with given losses and answers in its rows, for tests of claim and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from made_records import made_confirmation, made_layer, made_prune, made_search

from qpruner.report.liveness import Liveness
from qpruner.report.results import BEST_SEED, RANDOM, SEARCHED
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import (
    CandidateRecord,
    EvalRecord,
    FinetuneRecord,
    Inference,
    InferenceSetting,
    MethodScores,
    PrepareRecord,
    Results,
    RowScores,
    RunState,
    SensitivityRecord,
    TaskScore,
)
from qpruner.runs.run_dir import RunDir

PLAN = {"layers.0": 8, "layers.1": 4}
SEED_PLAN = {"layers.0": 4, "layers.1": 8}
STAGE = {"digest": "0" * 16, "seconds": 1.5}
UNTUNED = ("base", "pruned", "searched")
ORIGINS = {SEARCHED: "gp, trial 11", BEST_SEED: "seed-kl at the winner's bytes", RANDOM: "3 random plans"}
STATE = RunState(
    config={
        "model": {"source": "me/base"},
        "data": {"train": []},
        "seed": 0,
        "quantize": {"budget": {"fraction": 0.5}},
    },
    until="report",
    command="qpruner run my.yaml",
    folder="/home/me",
    environment={"qpruner": "1.2", "python": "3.11.9"},
    host="here",
    pid=1,
    started=0.0,
    updated=0.0,
    outcome="done",
)


def candidate(
    name: str,
    plan: dict[str, int],
    measured_bytes: int = 100_000_000,
    seed: int = 0,
    validation_loss: float = 2.125,
    confirmation_loss: float = 2.0,
) -> CandidateRecord:
    return CandidateRecord(
        **STAGE,
        name=name,
        origin=ORIGINS.get(name, "unquantized" if name in ("base", "pruned") else "uniform"),
        seed=seed,
        plan=plan,
        plan_bytes=measured_bytes,
        measured_bytes=measured_bytes,
        mean_bits=sum(plan.values()) / len(plan),
        num_parameters=120_000_000,
        steps=40,
        train_loss=1.9,
        validation_loss=validation_loss,
        confirmation_loss=confirmation_loss,
        peak_memory_bytes=900_000_000,
        memory_counter="rss",
    )


def score(
    correct: Sequence[float], answer_loss: Sequence[float] = (), task: str = "arc", metric: str = "acc"
) -> TaskScore:
    value = sum(correct) / len(correct)
    stderr = math.sqrt(value * (1 - value) / (len(correct) - 1)) if len(correct) > 1 else math.nan
    return TaskScore(
        task=task,
        metric=metric,
        value=value,
        stderr=stderr,
        num_questions=len(correct),
        correct=tuple(correct),
        answer_loss=tuple(answer_loss),
    )


def answers(num_questions: int, num_correct: int) -> list[float]:
    return [1.0] * num_correct + [0.0] * (num_questions - num_correct)


Scored = tuple[CandidateRecord, tuple[TaskScore, ...]]


def results_of(
    scored: Sequence[Scored], untuned: Sequence[tuple[str, tuple[TaskScore, ...]]] = (), **changes: Any
) -> Results:
    """Return a finished run with the rows `scored`, the searched one last; `changes` update the search's record."""
    search: dict[str, Any] = {
        **STAGE,
        "num_trials": 16,
        "num_finished": 7,
        "num_stopped": 8,
        "num_reused": 5,
        "ended": "all 16 trials were spent (`search.max_trials`)",
        "confirmations": (
            made_confirmation(2, "seed-kl", 2.125, reused=True),
            made_confirmation(11, "gp", 2.0625, stderr=0.03125),
        ),
        "best_index": 11,
        "resumed": 3,
        "sessions": 2,
        "failures": {"diverged": 1},
    }
    measured, values = {"unit": "nats", "seconds": 12.5, "details": {}}, {4: (0.5125, 0.25), 8: (0.0125, 0.0)}
    rows_scored = [RowScores(digest="0", name=name, seed=None, scores=scores) for name, scores in untuned]
    rows_scored += [RowScores(digest="0", name=row.name, seed=row.seed, scores=scores) for row, scores in scored]
    return Results(
        prepare=PrepareRecord(**STAGE, model_path="/models/base", converted=False, num_rows={"train": 48}),
        prune=made_prune(made_layer(0, 2, 100)),
        sensitivity=SensitivityRecord(
            **STAGE,
            groups=tuple(PLAN),
            methods={"kl": MethodScores(source="one group at a time", values=values, **measured)},
        ),
        search=made_search(scored[-1][0].plan, **(search | changes)),
        finetune=FinetuneRecord(**STAGE, winner=SEARCHED, candidates=tuple(row for row, _ in scored)),
        evaluate=EvalRecord(**STAGE, rows=tuple(rows_scored), tested="asked"),
    )


def snapshot(results: Results, **state: Any) -> Snapshot:
    """Return a run with these records and no trials; `state` updates the state of its latest command."""
    return Snapshot(RunDir("demo", create=False), Liveness(STATE.model_copy(update=state), None), results, ())


def row_of(
    name: str,
    losses: Sequence[float],
    scores: Sequence[TaskScore] | None = None,
    plan: dict[str, int] = SEED_PLAN,
    measured_bytes: int = 100_000_000,
) -> list[Scored]:
    """Return a row with one training seed per confirmation loss; without `scores` all seeds answer alike."""
    scores = scores or [score(answers(50, 20), [1.0] * 50)] * len(losses)
    return [
        (candidate(name, plan, measured_bytes, seed, confirmation_loss=loss), (scored,))
        for seed, (loss, scored) in enumerate(zip(losses, scores, strict=True))
    ]


def searched_row(losses: Sequence[float], scores: Sequence[TaskScore] | None = None, **changes: Any) -> list[Scored]:
    return row_of(SEARCHED, losses, scores, **({"plan": PLAN} | changes))


def random_rows(losses: Sequence[float], by_plan: Sequence[float]) -> list[Scored]:
    """Return one random plan per distance from the losses, with one training seed per loss."""
    plans = [{"layers.0": 4, "layers.1": bits} for bits in (4, 8, 16)]
    return [
        scored
        for plan, off in zip(plans, by_plan, strict=False)
        for scored in row_of(RANDOM, [loss + off for loss in losses], plan=plan)
    ]


def with_figures(results: Results) -> Results:
    """Return the run with losses on a text, and with timings: three turns for each training seed."""
    assert results.evaluate
    rows_scored = []
    for row in results.evaluate.rows:
        seed = row.seed or 0
        taken = Inference(
            memory_bytes=300_000_000 + 10_000_000 * seed,
            prefill_tokens_per_second=(100.0 + seed, 110.0 + seed, 150.0 + seed),
            decode_tokens_per_second=(20.0, 10.0, 12.0),
        )
        figures = {"text_loss": math.log(8.0 + 2 * seed), "inference": None if row.seed is None else taken}
        rows_scored.append(row.model_copy(update=figures))
    setting = InferenceSetting(device="NVIDIA X", prompt_tokens=128, new_tokens=16, memory_counter="cuda peak")
    given = {"rows": tuple(rows_scored), "text": "the text", "inference": setting}
    return results.model_copy(update={"evaluate": results.evaluate.model_copy(update=given)})


def whole_results() -> Results:
    """Return a finished run with every row, on two tasks; three of the rows have two training seeds."""
    plans = {
        "base": {"layers.0": 16, "layers.1": 16},
        "pruned": {"layers.0": 16, "layers.1": 16},
        "uniform 4-bit": {"layers.0": 4, "layers.1": 4},
        "uniform 8-bit": {"layers.0": 8, "layers.1": 8},
        "mutual-information seed": SEED_PLAN,
        BEST_SEED: SEED_PLAN,
        RANDOM: SEED_PLAN,
        SEARCHED: PLAN,
    }
    scored: list[Scored] = []
    for number, (name, plan) in enumerate(plans.items()):
        for seed in range(2 if name in ORIGINS else 1):
            # Every random plan is another one.
            own = PLAN if name == RANDOM and seed else plan
            row = candidate(name, own, 100_000_000 + 100_000 * (number + seed), seed, 2.125 + seed / 4, 2.0 + seed)
            scores = (
                score(answers(50, 10 + number + 5 * seed), [1.0 + seed] * 50),
                score(answers(40, 30), [2.0] * 40, "piqa"),
            )
            scored.append((row, scores))
    untuned = [(name, (score(answers(50, 5)), score(answers(40, 6), task="piqa"))) for name in UNTUNED]
    return results_of(scored, untuned)
