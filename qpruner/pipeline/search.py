"""The search stage: try plans in trials, then choose the winner on fresh rows.

No trial was scored on these rows.

Results of trials depend on weights, data and training (`trials_digest`); the proposed plans also
depend on budget, searcher and sensitivities (`search_digest`). Searches with equal `trials_digest`
share a folder and reuse its trials. Controls are the plans to beat, which need no search (see
`controls.py`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qpruner.config.pruning import RATES
from qpruner.errors import CorruptFile, StageError, UserError
from qpruner.pipeline.controls import controls, shared
from qpruner.pipeline.finalists import score_finalists, with_further_seeds
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import UNPRUNED, PrecisionPlan, plan_of
from qpruner.quantization.formats import PAPER
from qpruner.runs.events import SearchPlanned
from qpruner.runs.records import (
    GIVEN,
    BankRecord,
    SearchRecord,
    SearchState,
    SensitivityRecord,
    TrialRecord,
    digest_of,
)
from qpruner.runs.storage import files_in, for_each, remove, write_json
from qpruner.search import choice
from qpruner.search.roles import best_of, rival_of
from qpruner.search.rungs import agreements
from qpruner.search.searchers import check_searcher
from qpruner.search.trial_records import (
    SETTING_REMEDIES,
    Materials,
    read_trials,
    restart_if_damaged,
    set_aside_damaged,
    set_aside_others,
)
from qpruner.training.trackers import check_trackers
from qpruner.wording import counted

if TYPE_CHECKING:
    from qpruner.cluster.tune import SearchJob, SearchOutcome

REMEDY = "fix the cause, delete the folders of those trials in the run's `trials`"
"""Advice if all trials failed, for different reasons or for an unknown reason."""


class Search(Stage[SearchRecord]):
    """Try plans in parallel trials, and score the best plans again.

    They are scored on rows that no trial has used.
    """

    name = "search"
    help = "Run up to the precision search."
    record = SearchRecord
    trains = True

    @cached_property
    def given(self) -> PrecisionPlan | None:
        """The plan to try without a search; None if plans are searched.

        It is `search.plan`, or the only one possible.
        """
        space, method = self.context.shapes.space.spaces[0], self.config.search.plan_method
        if method:
            return choice.seed_plan(
                shared(self.context, method, space.base_groups, space.levels), space
            )
        if self.context.shapes.plan or self.config.has_choice:
            return self.context.shapes.plan
        return space.smallest()

    @cached_property
    def controls(self) -> list[tuple[str, PrecisionPlan]]:
        """The plans that the search has to beat."""
        return controls(self.context)

    @cached_property
    def search_digest(self) -> str:
        """Digest of everything that the proposed plans depend on, including a given plan."""
        settings, given = self.config.search, self.given
        return digest_of(
            self.context.record(SensitivityRecord).digest,
            [self.context.places.bank_of(cut).inputs for cut in self.context.shapes.cuts],
            self.config.quantize.budget,
            self.context.shapes.budget_bytes,
            settings.searcher,
            settings.metric,
            self.config.seed,
            *([given.cut, given.as_dict()] if given else []),
        )

    @cached_property
    def trials_digest(self) -> str:
        """Digest of everything that a trial's result depends on.

        The trial's plan and `TrialRecord.model` are not part of it. So a further cut starts from
        the trials of the others.
        """
        context, config, settings = self.context, self.config, self.config.search
        scored = (
            settings.steps,
            settings.rungs,
            settings.tasks,
            settings.limit,
            config.evaluate.batch_size,
        )
        quantize, base = config.quantize, context.places.bank_of(UNPRUNED)
        return digest_of(
            "trials",
            [
                base.digest(level)
                for level in sorted({*quantize.levels, *quantize.embedding_levels, *PAPER})
            ],
            config.prune.model_copy(update=dict.fromkeys(RATES)),
            context.worker_config.training,
            config.lora,
            config.seed,
            scored,
            (context.task_digest("search"), context.inspection.rows.metrics["search"])
            if settings.tasks
            else "",
        )

    @property
    def _cuts(self) -> tuple[str, ...]:
        """The cuts of all trials: the candidates, and the base model, which controls use."""
        return tuple(dict.fromkeys((*self.context.shapes.cuts, UNPRUNED)))

    @property
    def folder(self) -> Path:
        """Folder of the trial records."""
        return self.context.run_dir.trials / self.trials_digest

    def inputs(self) -> tuple[Any, ...]:
        settings = self.config.search
        ends = (settings.max_trials, settings.max_hours, settings.max_gpu_hours)
        return (
            self.trials_digest,
            self.search_digest,
            *ends,
            settings.confirm,
            settings.confirm_seeds,
        )

    def warnings(self) -> Iterable[str]:
        return self.context.inspection.warnings

    def check(self) -> None:
        settings = self.config.search
        check_searcher(settings.searcher)
        on_gpu = self.context.machines.on_gpu  # raises an error if no machine can run a trial
        if settings.max_gpu_hours is not None and not on_gpu:
            raise UserError(
                "`search.max_gpu_hours` has no effect if trials use no GPU, got "
                f"{settings.max_gpu_hours:g}; use `search.max_hours`"
            )
        check_trackers(self.config.trackers)

    def begin(self) -> None:
        """Emit the recorded trials.

        Delete the record of the search if one of its trials is set aside or not over.
        """
        context, settings = self.context, self.config.search
        set_aside_damaged(self.folder, self.search_digest, self.notify)
        set_aside_others(
            self.folder,
            {cut: context.places.bank_of(cut).inputs for cut in self._cuts},
            self.notify,
        )
        trials = read_trials(self.folder)
        own = [trial for trial in trials if trial.search == self.search_digest][
            : settings.max_trials
        ]
        with contextlib.suppress(CorruptFile):  # `run_stage` reports it
            record, over = (
                self.matching_record(self.digest),
                {trial.index for trial in trials if trial.is_over},
            )
            if record and not (
                len(own) >= record.num_trials
                and all(trial.is_over for trial in own)
                and over.issuperset(each.index for each in record.finalists)
            ):
                # a damaged trial has to run again, or its number gets another plan
                context.forget("search")
        state = SearchState(
            trials_digest=self.trials_digest,
            search=self.search_digest,
            metric=self._metric,
            metrics=context.inspection.rows.metrics["search"],
            budget_bytes=context.shapes.budget_bytes,
            may_win=tuple(filter(context.shapes.may_win, self._cuts)),
            max_trials=self.config.num_trials,
            steps=settings.steps,
        )
        context.emit(SearchPlanned(state, tuple(trials)))

    @property
    def _metric(self) -> Literal["loss", "accuracy"]:
        return "accuracy" if self.config.search.by_accuracy else "loss"

    def detail(self) -> str:
        settings = self.config.search
        trials = (
            "the given plan"
            if self.given
            else f"{counted(settings.max_trials, 'trial')}, {settings.searcher}"
        )
        return (
            f"{trials}, {counted(settings.steps, 'step')} each, budget "
            f"{self.context.shapes.budget_bytes / 1e6:.1f} MB"
        )

    def run(self, scratch: Path) -> dict[str, Any]:
        job = self.search_job()
        banks = self.context.run_dir.root / "banks"
        parts = [banks / name for name in files_in(banks) if Path(name).name.startswith(".")]
        for_each(remove, parts)  # of entries that killed workers were writing
        _ = self.context.machines.cluster  # connects to Ray
        own = [job.owns(trial) for trial in read_trials(job.trials) if trial.rungs]
        if resumed := own.count(True):
            self.notify(f"resuming with {counted(resumed, 'recorded trial')}")
        if others := own.count(False):
            self.notify(f"starting with {counted(others, 'trial')} of earlier searches")
        outcome, trials = self._finalists(job)
        finalists = score_finalists(self, trials, job)
        if self.given is None:
            finalists = with_further_seeds(self, finalists, trials, job)
        best = best_of([finalist for finalist in finalists if finalist.fits], self._metric)
        if best is None:
            raise StageError(
                "search",
                "no trial that fits into the budget finished",
                "see the trials' reasons in the log",
            )
        rival = rival_of(finalists, best, self._metric)
        write_json(
            scratch / "best.json", next(trial for trial in trials if trial.index == best.index)
        )
        statuses = [trial.status for trial in outcome.trials]
        all_trials = (*outcome.trials, *outcome.reused)
        scores = (
            (trial.cut, {rung.step: rung.cost(self._metric) for rung in trial.rungs})
            for trial in all_trials
        )
        return {
            "trials_digest": self.trials_digest,
            "searcher": self.config.search.searcher if self.config.is_searched else "none",
            "metric": self._metric,
            "metrics": self.context.inspection.rows.metrics["search"],
            "budget_bytes": self.context.shapes.budget_bytes,
            "steps": self.config.search.steps,
            "num_trials": len(outcome.trials),
            "num_finished": statuses.count("finished"),
            "num_stopped": statuses.count("stopped"),
            "num_failed": statuses.count("failed"),
            "failures": dict(Counter(trial.failure for trial in outcome.trials if trial.failure)),
            "num_reused": sum(1 for trial in outcome.reused if trial.rungs),
            "ended": outcome.ended,
            "search_seconds": outcome.seconds,
            "gpu_seconds": outcome.gpu_seconds,
            "sessions": outcome.sessions,
            "finalists": finalists,
            "rungs": agreements(scores, self.config.search.steps),
            "best_index": best.index,
            "rival": rival.index if rival else None,
            "lost_controls": lost_controls(job, all_trials, outcome.ended),
            "resumed": resumed,
        }

    def search_job(self) -> SearchJob:
        """Collect everything that the trials need."""
        from qpruner.cluster.tune import SearchJob
        from qpruner.search.trial import run_trial

        context = self.context
        space = context.shapes.space
        if context.record(BankRecord).error:
            errors = shared(context, None, space.groups, space.levels)
            space = replace(space, errors=errors)
        measured = context.record(SensitivityRecord).methods
        return SearchJob(
            config=context.worker_config,
            trial=run_trial,
            materials=Materials(
                {cut: context.places.bank_of(cut) for cut in self._cuts}, context.places.data
            ),
            layouts={cut: context.shapes.layout_of(cut) for cut in self._cuts},
            space=space,
            may_win=list(filter(context.shapes.may_win, self._cuts)),
            controls=[(GIVEN, self.given)] if self.given else self.controls,
            priors={
                method: shared(context, method, space.groups, space.levels) for method in measured
            },
            trials=self.folder,
            scratch=context.run_dir.tune,
            digest=self.trials_digest,
            search=self.search_digest,
            resources=context.machines.trial_resources,
            check_node=context.machines.check_node,
        )

    def _finalists(self, job: SearchJob) -> tuple[SearchOutcome, list[TrialRecord]]:
        """Run the trials, then choose finalists; repeat if a file is damaged."""
        from qpruner.cluster import tune
        from qpruner.cluster.slots import Room

        context = self.context
        room = Room(
            lambda: context.machines.slots,
            job.resources,
            self.config.search.max_concurrent,
            context.emit,
        )
        while True:
            outcome = tune.search(job, room, context.emit, context.trackers)
            self.notify(f"ended: {outcome.ended}")
            usable = [
                each for each in (*outcome.trials, *outcome.reused) if job.may_run(plan_of(each))
            ]
            finalists = choose_finalists(
                [each for each in usable if self.given in (None, plan_of(each))], job
            )
            if not [
                trial for trial in finalists if restart_if_damaged(job.trials, trial, self.notify)
            ]:
                return outcome, finalists

    def summary(self, record: SearchRecord) -> str:
        return (
            f"{record.num_finished} finished, {record.num_stopped} stopped early, "
            f"{record.num_failed} failed; winner: trial {record.best_index} "
            f"[{plan_of(record.winner)}] ({record.winner.origin})"
        )

    def unfinished(self) -> Iterable[Path]:
        run_dir = self.context.run_dir
        return [*super().unfinished(), run_dir.trials, run_dir.candidates]

    def disk_bytes(self) -> int:
        are_here, settings = self.context.run_dir.storage.fills_this_disk, self.config.search
        again = (settings.confirm + 1) * settings.confirm_seeds if self.config.is_searched else 0
        return (
            self.context.inspection.shapes.checkpoint_bytes * (self.config.num_trials + again)
            if are_here
            else 0
        )


def choose_finalists(trials: Sequence[TrialRecord], job: SearchJob) -> list[TrialRecord]:
    """Choose the best finished trials, all controls (plans that need no search)."""
    if not trials:
        raise StageError(
            "search",
            "`search.max_hours` passed before any trial could start",
            "find out why with `ray status` or raise `search.max_hours`, then repeat the command",
        )
    finished = sorted(
        (trial for trial in trials if trial.status == "finished"), key=lambda trial: trial.index
    )
    if not finished:
        reasons = [trial.reason for trial in trials if trial.reason]
        kinds = {trial.failure for trial in trials}
        remedy = SETTING_REMEDIES.get(kinds.pop() or "", REMEDY) if len(kinds) == 1 else REMEDY
        raise StageError(
            "search",
            f"none of {counted(len(trials), 'trial')} finished; the first reason: "
            f"{[*reasons, 'unknown'][0]}",
            f"{remedy} and repeat the command",
        )
    scores = [trial.rungs[-1].cost(job.config.search.metric) for trial in finished]
    are_controls = [job.control_of(plan_of(trial)) is not None for trial in finished]
    fit = [job.fits(trial.cut, trial.plan_bytes) for trial in finished]
    chosen = choice.finalist_positions(scores, are_controls, job.config.search.confirm, fit)
    return [finished[position] for position in chosen]


def lost_controls(job: SearchJob, trials: Sequence[TrialRecord], ended: str) -> dict[str, str]:
    """Return the controls in the budget without a finished trial, and the reasons.

    `ended` is why the search ended.
    """
    by_plan = {plan_of(trial): trial for trial in trials}
    lost = {}
    for origin, plan in job.controls:
        trial = by_plan.get(plan)
        if job.fits(plan.cut, job.layouts[plan.cut].plan_bytes(plan)) and not (
            trial and trial.status == "finished"
        ):
            lost[origin] = (trial and trial.reason) or f"not tried, because {ended}"
    return lost
