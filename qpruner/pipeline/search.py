"""The search stage: controls, trials under Ray Tune, and the choice among the best on fresh rows.

A trial's result depends on weights, data and training (`trials_digest`); what is proposed depends on budget, searcher
and sensitivities besides (`search_digest`). Searches that share the former share a folder of trials, so that one with
another budget starts from what the last one left.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from qpruner.data.measures import accuracy_name
from qpruner.errors import CorruptFile, StageError
from qpruner.pipeline.stage import Stage
from qpruner.plans.pareto import hypervolume, non_dominated
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.events import Message, Progress, SearchPlanned
from qpruner.runs.records import (
    GIVEN,
    BankRecord,
    Confirmation,
    FreshScore,
    FrontPoint,
    KeptScore,
    SearchRecord,
    SearchState,
    SensitivityRecord,
    TrialRecord,
    digest_of,
)
from qpruner.runs.storage import for_each, quarantine, read_json, write_json
from qpruner.search.choice import controls_of, finalist_positions, winner_position
from qpruner.search.trial_records import (
    SETTING_REMEDIES,
    Materials,
    checkpoint_of,
    fresh_path,
    objective,
    read_trials,
    readable_trials,
    restart_if_damaged,
    set_aside_damaged,
)
from qpruner.sensitivity.seeds import seed_plan
from qpruner.training.table_rows import Candidate, ConfirmationJob, confirm_trial
from qpruner.wording import counted, error_text

if TYPE_CHECKING:
    from qpruner.cluster.tune import SearchJob, SearchOutcome
    from qpruner.pipeline.context import Context

FINALISTS = "scoring finalists on fresh rows"
REMEDY = "mend the cause, delete the folders of those trials in the run's `trials`"
"""What to do when all trials failed and no word is known for the reason, or there are several."""


class Search(Stage[SearchRecord]):
    """Try candidate plans as parallel trials, and score the best few again on fresh rows."""

    name = "search"
    help = "Run up to the precision search."
    record = SearchRecord
    trains = True

    @cached_property
    def given(self) -> PrecisionPlan | None:
        """The plan that is taken instead of a search."""
        return given_plan(self.context)

    @cached_property
    def search_digest(self) -> str:
        """Digest of what is proposed."""
        return _search_digest(self.context, self.given)

    @cached_property
    def trials_digest(self) -> str:
        """Digest of what a trial's own result depends on."""
        return _trials_digest(self.context, self.search_digest)

    @property
    def folder(self) -> Path:
        """Where the trials are recorded."""
        return self.context.run_dir.trials / self.trials_digest

    @override
    def inputs(self) -> tuple[Any, ...]:
        settings = self.config.search
        # More trials or hours continue with those there are.
        ends = (settings.max_trials, settings.max_hours, settings.max_gpu_hours, settings.patience, settings.confirm)
        return (self.trials_digest, self.search_digest, *ends)

    @override
    def warnings(self) -> Iterable[str]:
        return self.context.inspection.warnings

    @override
    def check(self) -> None:
        from qpruner.pipeline.resources import check_search
        from qpruner.training.trackers import check_trackers

        check_search(self.config.search, self.context.known_slots)
        check_trackers(self.config.trackers)

    @override
    def begin(self) -> None:
        """Report what is known of the trials, and forget the record where one of them was damaged."""
        context, settings = self.context, self.config.search
        # Its memory is needed before the trials start.
        context.executor.close()
        set_aside_damaged(self.folder, self.search_digest, self.tell)
        trials = read_trials(self.folder)
        own = [trial for trial in trials if trial.search == self.search_digest][: settings.max_trials]
        with contextlib.suppress(CorruptFile):  # which is met again where the record is read
            if not all(trial.is_over for trial in own) and self.matching_record(self.digest):
                context.forget("search")  # all of them were over, before a trial's record was damaged
        state = SearchState(
            trials_digest=self.trials_digest,
            search=self.search_digest,
            beside=_search_digest(context, None) if self.given else None,
            metric=self._metric,
            metrics=context.inspection.metrics["search"],
            pareto=settings.pareto,
            budget_bytes=context.space.budget_bytes,
            max_trials=self.config.num_trials,
            steps=settings.steps,
        )
        context.emit(SearchPlanned(state, tuple(trials), context.record(SensitivityRecord)))

    @property
    def _metric(self) -> Literal["loss", "accuracy"]:
        return "accuracy" if self.config.search.by_accuracy else "loss"

    @override
    def detail(self) -> str:
        settings = self.config.search
        trials = "the given plan" if self.given else f"{counted(settings.max_trials, 'trial')}, {settings.searcher}"
        budget = self.context.space.budget_bytes / 1e6
        return f"{trials}, {counted(settings.steps, 'step')} each, budget {budget:.1f} MB"

    @override
    def run(self, scratch: Path) -> dict[str, Any]:
        context, job = self.context, self._job()
        # Beside a plan that was given the controls are not run, but known for what they are where a search ran them.
        priors = job.priors
        known = replace(job, controls=[*controls_of(job.space, priors), *job.controls]) if self.given else job
        context.join()
        resumed = _report_recorded(context, job)
        outcome, finalists = self._finalists(job, known)
        fresh = _fresh_scores(context, finalists, known)
        confirmations = _confirm(context, finalists, fresh, known)
        by_index = {trial.index: trial for trial in finalists}
        eligible = [each for each in confirmations if self.given in (None, _plan(by_index[each.index]))]
        best = _best(eligible, job)
        best_control = _best([each for each in confirmations if each.control], job)
        assert best is not None, "there are finalists"
        write_json(scratch / "best.json", by_index[best.index])
        front = _front(confirmations, by_index, job) if self.config.search.pareto else ()
        return self._trial_fields(outcome) | {
            "confirmation_gpu_seconds": sum(score.gpu_seconds for score in fresh),
            "confirmations": confirmations,
            "best_index": best.index,
            "best_origin": GIVEN if self.given else best.origin,
            "best_plan": by_index[best.index].plan,
            "best_control": best_control.index if best_control else None,
            "control_won": best.control and not self.given,
            "front": front,
            "hypervolume": _hypervolume(front, job) if front else None,
            "resumed": resumed,
        }

    def _job(self) -> SearchJob:
        """Collect what the trials are run with."""
        from qpruner.cluster.tune import SearchJob
        from qpruner.search.trial import run_trial

        context, space = self.context, self.context.space
        priors = {name: method.values for name, method in context.record(SensitivityRecord).methods.items()}
        return SearchJob(
            config=context.worker_config,
            trial=run_trial,
            materials=Materials(context.checkpoint, context.bank, context.data),
            layout=context.layout,
            space=space,
            controls=[(GIVEN, self.given)] if self.given else controls_of(space, priors),
            priors=priors,
            trials=self.folder,
            scratch=context.run_dir.tune,
            digest=self.trials_digest,
            search=self.search_digest,
            resources=context.trial_resources,
            check_node=context.check_node,
        )

    def _finalists(self, job: SearchJob, known: SearchJob) -> tuple[SearchOutcome, list[TrialRecord]]:
        """Run the trials, again where the files of a finalist turn out to be damaged."""
        from qpruner.cluster import tune
        from qpruner.cluster.slots import Room

        context = self.context
        room = Room(lambda: context.slots, job.resources, self.config.search.max_concurrent, context.emit)
        while True:
            outcome = tune.search(job, room, context.emit, context.trackers)
            self.tell(f"ended: {outcome.ended}")
            earlier = [trial for trial in outcome.reused if job.space.is_feasible(_plan(trial))]
            usable = [*outcome.trials, *earlier]
            if self.given:
                finalists = _beside_given(usable, self.given, known)
            else:
                finalists = _finalists([trial for trial in usable if _competes(trial, job)], job)
            # What is fine to read may not be what was written.
            if not [trial for trial in finalists if restart_if_damaged(job.trials, trial, self.tell)]:
                return outcome, finalists

    def _trial_fields(self, outcome: SearchOutcome) -> dict[str, Any]:
        """Return the fields of the record that describe the trials."""
        statuses = [trial.status for trial in outcome.trials]
        return {
            "trials_digest": self.trials_digest,
            "searcher": self.config.search.searcher if self.config.is_searched else "none",
            "metric": self._metric,
            "metrics": self.context.inspection.metrics["search"],
            "budget_bytes": self.context.space.budget_bytes,
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
        }

    @override
    def summary(self, record: SearchRecord) -> str:
        front = f"a front of {counted(len(record.front), 'plan')}, " if record.front else ""
        return (
            f"{record.num_finished} finished, {record.num_stopped} stopped early, {record.num_failed} failed; {front}"
            f"winner: trial {record.best_index} [{PrecisionPlan.from_dict(record.best_plan)}] ({record.best_origin})"
        )

    @override
    def share_done(self) -> float:
        over = sum(trial.is_over and trial.search == self.search_digest for trial in readable_trials(self.folder))
        return min(1.0, over / self.config.num_trials)

    @override
    def disk_bytes(self) -> int:
        are_here = self.context.run_dir.storage.fills_this_disk
        return self.context.checkpoint_bytes * self.config.num_trials if are_here else 0


def given_plan(context: Context) -> PrecisionPlan | None:
    """Return the plan that is used instead of a search, or None.

    It comes from a file, is a sensitivity's seed plan, or the only plan there is.

    Raises:
        PlanRefused: If a file's plan does not fit this model or its budget.
    """
    space, method = context.space, context.config.search.plan_method
    if method:
        measured = context.record(SensitivityRecord)
        return seed_plan(measured.methods[method].values, space)
    if context.plan_in_file or len(space.levels) > 1:
        return context.plan_in_file
    return space.uniform(space.levels[0])


def _search_digest(context: Context, given: PrecisionPlan | None) -> str:
    """Digest of what is proposed, or of the plan that is given in its place."""
    settings = context.config.search
    return digest_of(
        context.record(SensitivityRecord).digest,
        context.space.budget_bytes,
        settings.searcher,
        settings.metric,
        settings.pareto,
        context.config.seed,
        *([given.as_dict()] if given else []),
    )


def _trials_digest(context: Context, search_digest: str) -> str:
    """Digest of what a trial's own result depends on; with `reuse_trials` off also of whose trial it is."""
    config, settings = context.config, context.config.search
    scored = (settings.steps, settings.rungs, settings.tasks, settings.limit, config.evaluate.batch_size)
    return digest_of(
        "trials",
        context.record(BankRecord).digest,
        context.space.levels,
        config.training,
        config.lora,
        config.seed,
        scored,
        (context.task_digest, context.inspection.metrics["search"]) if settings.tasks else "",
        "" if settings.reuse_trials else search_digest,
    )


def _report_recorded(context: Context, job: SearchJob) -> int:
    """Report what the search starts from; return the number of its own recorded trials."""
    recorded = [trial for trial in read_trials(job.trials) if trial.rungs]
    resumed = sum(1 for trial in recorded if job.owns(trial))
    if resumed:
        context.emit(Message("search", f"going on from {counted(resumed, 'recorded trial')}"))
    if len(recorded) > resumed:
        number = len(recorded) - resumed
        context.emit(Message("search", f"starting from {counted(number, 'trial')} that earlier searches left"))
    return resumed


def _plan(trial: TrialRecord) -> PrecisionPlan:
    return PrecisionPlan.from_dict(trial.plan)


def _competes(trial: TrialRecord, job: SearchJob) -> bool:
    """Whether a trial may win: a plan that was given in place of an earlier search may not."""
    return not trial.is_given or job.control_of(_plan(trial)) is not None


def _finalists(trials: Sequence[TrialRecord], job: SearchJob) -> list[TrialRecord]:
    """Choose the best finished trials and every finished control; for a front, all trials that could be on it.

    Raises:
        StageError: If no trial finished, with the first reason.
    """
    if not trials:
        cause = "its hours were over before any machine took a trial"
        raise StageError("search", cause, "see why none came (`ray status`), allow more hours, then repeat the command")
    finished = sorted((trial for trial in trials if trial.status == "finished"), key=lambda trial: trial.index)
    if not finished:
        reasons = [trial.reason for trial in trials if trial.reason]
        kinds = {trial.failure for trial in trials}
        mend = SETTING_REMEDIES.get(kinds.pop() or "", REMEDY) if len(kinds) == 1 else REMEDY
        raise StageError(
            "search",
            f"none of {counted(len(trials), 'trial')} finished; the first said: {reasons[0] if reasons else 'nothing'}",
            f"{mend} and repeat the command",
        )
    settings = job.config.search
    scores = [objective(trial.rungs[-1], job.config) for trial in finished]
    chosen = finalist_positions(
        scores, [job.control_of(_plan(trial)) is not None for trial in finished], settings.confirm
    )
    if settings.pareto:
        weighed = [(trial.plan_bytes, score) for trial, score in zip(finished, scores, strict=True)]
        chosen += non_dominated(weighed)
    return [finished[position] for position in sorted(set(chosen))]


def _beside_given(trials: Sequence[TrialRecord], given: PrecisionPlan, job: SearchJob) -> list[TrialRecord]:
    """Choose the trial of the given plan, and every control that a search has finished to compare it with.

    Raises:
        StageError: If the given plan's trial did not finish.
    """
    tried = _finalists([trial for trial in trials if _plan(trial) == given], job)
    controls = [trial for trial in trials if trial.status == "finished" and job.control_of(_plan(trial))]
    return sorted({trial.index: trial for trial in (*tried, *controls)}.values(), key=lambda trial: trial.index)


def _confirm(
    context: Context, finalists: Sequence[TrialRecord], scores: Sequence[KeptScore], job: SearchJob
) -> list[Confirmation]:
    """Report the finalists with their scores on fresh rows."""
    confirmations = []
    for trial, score in zip(finalists, scores, strict=True):
        control, reused = job.control_of(_plan(trial)), not job.owns(trial)
        each = Confirmation(
            index=trial.index,
            origin=control or (f"{trial.origin} of another search" if reused else trial.origin),
            control=control not in (None, GIVEN),
            reused=reused,
            **score.model_dump(exclude={"digest", "gpu_seconds"}),
        )
        text = (
            f"finalist: trial {each.index} ({each.origin}), selection loss {each.loss:.4f}{error_text(each.stderr, 4)}"
        )
        if each.accuracy is not None:
            name = accuracy_name(context.inspection.metrics["search"])
            text += f", selection {name} {each.accuracy:.3f}{error_text(each.accuracy_stderr, 3)}"
        context.emit(Message("search", text))
        confirmations.append(each)
    return confirmations


def _fresh_scores(context: Context, finalists: Sequence[TrialRecord], job: SearchJob) -> list[KeptScore]:
    """Score each finalist on fresh rows; scores of an earlier command are reused."""
    from qpruner.cluster.tasks import run_tasks

    paths = [fresh_path(job.trials, trial.index) for trial in finalists]
    # Which rows there are is told by the folder of trials, as all that they were trained on.
    asked = (context.config.search.metric, context.inspection.questions["fresh"])
    digests = [digest_of(trial.checkpoint, *asked) for trial in finalists]
    found: dict[int, KeptScore] = {}
    for position, kept in enumerate(for_each(_kept_or_error, paths)):
        if isinstance(kept, CorruptFile):
            where = quarantine(paths[position], job.trials)
            context.emit(Message("search", f"warning: {kept}; set aside in {where}, that finalist is scored again"))
        elif kept and kept.digest == digests[position]:
            found[position] = kept
    context.emit(Progress("search", len(found), len(finalists), FINALISTS))
    left = [position for position in range(len(finalists)) if position not in found]
    if left:
        jobs, resources, concurrent = _confirmation_jobs(context, [finalists[position] for position in left], job)
        held: list[float] = []
        for number, score in run_tasks(
            confirm_trial,
            jobs,
            resources,
            concurrent,
            fresh=False,
            check_node=context.check_node,
            on_held=held.append,
        ):
            position = left[number]
            kept_score = KeptScore(**score.model_dump(), digest=digests[position], gpu_seconds=held[-1])
            write_json(paths[position], kept_score)
            found[position] = kept_score
            context.emit(Progress("search", len(found), len(finalists), FINALISTS))
    return [found[position] for position in range(len(finalists))]


def _kept_or_error(path: Path) -> KeptScore | CorruptFile | None:
    try:
        return read_json(path, KeptScore)
    except CorruptFile as error:
        return error


def _confirmation_jobs(
    context: Context, finalists: Sequence[TrialRecord], job: SearchJob
) -> tuple[list[ConfirmationJob], dict[str, float], int]:
    """Make a job for each finalist; return them, the resources of each, and how many run at once."""
    resources, concurrent = context.task_resources(len(finalists))
    jobs = []
    for trial in finalists:
        checkpoint = checkpoint_of(job.trials, trial)
        assert checkpoint is not None, "a finished trial has a checkpoint"
        seed = context.config.seed
        title = f"trial {trial.index}"
        candidate = Candidate(trial.origin, title, context.checkpoint, context.bank, trial.plan, checkpoint, seed)
        threads = int(resources.get("cpu", 1))
        jobs.append(ConfirmationJob(context.worker_config, candidate, checkpoint, context.data, threads))
    return jobs, resources, concurrent


def _best(confirmations: Sequence[Confirmation], job: SearchJob) -> Confirmation | None:
    """Return the best on fresh rows; a control wins a tie."""
    scores = [objective(each, job.config) for each in confirmations]
    position = winner_position(scores, [each.control for each in confirmations])
    return None if position is None else confirmations[position]


def _front(
    confirmations: Sequence[Confirmation], trials: dict[int, TrialRecord], job: SearchJob
) -> tuple[FrontPoint, ...]:
    """List the confirmed plans that no plan of fewer or equal bytes beats, by bytes."""
    weighed = [(trials[each.index].plan_bytes, objective(each, job.config)) for each in confirmations]
    return tuple(
        FrontPoint(
            index=each.index,
            origin=each.origin,
            plan=trials[each.index].plan,
            plan_bytes=trials[each.index].plan_bytes,
            **each.model_dump(include=set(FreshScore.model_fields)),
        )
        for each in (confirmations[position] for position in non_dominated(weighed))
    )


def _hypervolume(front: Sequence[FrontPoint], job: SearchJob) -> float:
    points = [(point.plan_bytes, objective(point, job.config)) for point in front]
    return hypervolume(points, points[0], job.space.budget_bytes)
