"""The search under Ray Tune: the only module that imports it.

Ray Tune schedules, places and stops trials; what counts is written by the trials themselves. A trial's folder holds
its record and last checkpoint, and a search that is started again reads those: finished trials are told to the
searcher in order, running ones go on from their own last rung, ASHA's rungs are filled as they were. Tune's snapshot
is scratch and never restored (its own restore loses what finished since the last snapshot, measured with Ray 2.60).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Set before Ray is imported: no usage report leaves the machine, and no banner is printed.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

from ray import tune
from ray.tune.callback import Callback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.hyperopt import HyperOptSearch

from qpruner.config import RunConfig
from qpruner.events import Emit, Message, Progress
from qpruner.plan import PlanSpace, PrecisionPlan
from qpruner.records import RungResult, TrialRecord
from qpruner.rundir import publish_folder, read_json, write_json
from qpruner.search.searchers import Ledger, Observation, Proposer, RandomProposer, Suggestion
from qpruner.search.trial import Materials, TrialJob, run_trial

METRIC = "score"
"""What Tune minimizes: the validation loss, or one minus the accuracy."""
TIME = "step"
MAX_KILLS = 3
"""Kills for want of memory that a trial may run through; which of several running trials took too much is not known."""


@dataclass(frozen=True)
class SearchJob:
    """Everything the search needs.

    Attributes:
        config: The run's configuration.
        materials: Model, bank and data.
        space: The feasible plans.
        controls: (origin, plan) of the uniform and seed plans inside the budget.
        trials: Folder of the trials' own folders.
        scratch: Folder for Ray Tune's experiment files.
        digest: Inputs a trial's result depends on.
        resources: Ray resources of one trial.
        max_concurrent: Trials in flight.
    """

    config: RunConfig
    materials: Materials
    space: PlanSpace
    controls: Sequence[tuple[str, PrecisionPlan]]
    trials: Path
    scratch: Path
    digest: str
    resources: dict[str, float]
    max_concurrent: int


def search(job: SearchJob, emit: Emit) -> list[TrialRecord]:
    """Run or continue the search until its trials are spent; returns every trial's record, in order.

    When Ray kills a worker because its node runs out of memory, `Tuner.fit` ends with a RuntimeError whatever
    `max_failures` says (Ray 2.60): the search then goes on from the records, and a trial that ran through several
    such kills is recorded as failed.
    """
    while True:
        try:
            _fit(job, emit)
        except RuntimeError as error:
            if "killed" not in str(error):
                raise
            emit(Message("search", "Ray killed a worker that ran out of memory; going on from the records"))
            _count_kill(job.trials)
        else:
            return read_trials(job.trials)


def _fit(job: SearchJob, emit: Emit) -> None:
    """One session of Ray Tune, from the records to the last trial."""
    ledger = Ledger(job.space, make_proposer(job.config, job.space), job.controls, job.config.search.trials)
    recorded = read_trials(job.trials)
    _restore(ledger, recorded, job.config)
    attempt = len(list(job.scratch.glob("search-*"))) if job.scratch.exists() else 0
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trainable, job=job), job.resources),
        tune_config=tune.TuneConfig(
            search_alg=_PlanSearcher(job, ledger, emit),
            scheduler=_RecordedAsha(job.config, recorded),
            num_samples=-1,
            max_concurrent_trials=job.max_concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"trial-{trial.config['trial']:04d}-{trial.config['origin']}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']:04d}",
        ),
        run_config=tune.RunConfig(
            name=f"search-{attempt:02d}",
            storage_path=str(job.scratch),
            callbacks=[_RungEvents(job, emit)],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    tuner.fit()


def _count_kill(trials: Path) -> None:
    """Note a kill in every trial that was running; one with too many of them has failed."""
    for record in read_trials(trials):
        if record.status == "running":
            update: dict[str, Any] = {"kills": record.kills + 1}
            if record.kills + 1 >= MAX_KILLS:
                update |= {"status": "failed", "reason": f"out of memory: killed by Ray {MAX_KILLS} times"}
            write_json(trial_folder(trials, record.index) / "trial.json", record.model_copy(update=update))


def read_trials(folder: Path) -> list[TrialRecord]:
    """Every recorded trial, in order of suggestion."""
    records = [read_json(path, TrialRecord) for path in sorted(folder.glob("*/trial.json"))]
    return [record for record in records if record is not None]


def trial_folder(trials: Path, index: int) -> Path:
    return trials / f"{index:04d}"


def checkpoint_of(trials: Path, record: TrialRecord) -> Path | None:
    """The checkpoint of a trial's last rung."""
    if not record.rungs:
        return None
    return trial_folder(trials, record.index) / f"checkpoint-{record.rungs[-1].step}"


def objective(result: RungResult, config: RunConfig) -> float:
    """What is minimized: the loss, or one minus the accuracy."""
    if config.search.metric == "loss":
        return result.loss
    assert result.accuracy is not None
    return 1.0 - result.accuracy


def make_proposer(config: RunConfig, space: PlanSpace) -> Proposer:
    """The searcher that `search.searcher` names."""
    if config.search.searcher == "random":
        return RandomProposer(space, config.seed)
    return HyperOptProposer(space, config.seed)


class HyperOptProposer:
    """TPE (Bergstra et al. 2011) through Ray's HyperOptSearch.

    HyperOptSearch cannot be told of plans it did not propose, and its proposals depend on all it was asked before. So
    each proposal is made by a fresh one, seeded from (seed, index), that takes every known plan as a point to evaluate
    and is told its score: what ran is what it learns from (0.6 ms a known plan, 30 groups).
    """

    name = "hyperopt"
    INITIAL_RANDOM = 4
    """Observations before TPE models anything; Ray's default of 20 would leave small searches random."""

    def __init__(self, space: PlanSpace, seed: int) -> None:
        self._seed = seed
        self._names = tuple(group.name for group in space.layout.groups)
        # hyperopt gives lists back as tuples and takes numbers for ranges; strings come back as they are.
        levels = [str(bits) for bits in space.levels]
        self._search_space = HyperOptSearch.convert_search_space({name: tune.choice(levels) for name in self._names})

    def propose(self, index: int, observations: Sequence[Observation]) -> PrecisionPlan:
        """A plan; equal arguments give equal plans."""
        known = [{name: str(bits) for name, bits in observation.plan.as_dict().items()} for observation in observations]
        search = HyperOptSearch(
            self._search_space,
            metric=METRIC,
            mode="min",
            n_initial_points=self.INITIAL_RANDOM,
            points_to_evaluate=known or None,
            random_state_seed=int(np.random.default_rng([self._seed, index]).integers(2**31)),
        )
        for observation in observations:
            search.suggest(f"known-{observation.index}")
            search.on_trial_complete(f"known-{observation.index}", {METRIC: observation.score})
        suggested = search.suggest("new")
        assert suggested is not None
        return PrecisionPlan(self._names, tuple(int(suggested[name]) for name in self._names))


def _restore(ledger: Ledger, recorded: Sequence[TrialRecord], config: RunConfig) -> None:
    for record in recorded:
        suggestion = Suggestion(record.index, record.origin, PrecisionPlan.from_dict(record.plan))
        if record.status == "running":
            ledger.resume(suggestion)
        else:
            ledger.recall(suggestion, _final_score(record, config))


def _final_score(record: TrialRecord, config: RunConfig) -> float | None:
    if record.status == "failed" or not record.rungs:
        return None
    return objective(record.rungs[-1], config)


def _trainable(params: dict[str, Any], job: SearchJob) -> None:
    """Runs in a Ray worker: one trial, its record written before each report."""
    started = time.monotonic()
    folder = trial_folder(job.trials, params["trial"])
    record = read_json(folder / "trial.json", TrialRecord)
    assert record is not None, "the searcher writes the record before it hands the plan out"
    start = checkpoint_of(job.trials, record)
    # A trial that goes on reports its last rung again first: the scheduler may have been killed before it decided.
    if start:
        tune.report(_metrics(record.rungs[-1], job.config))

    def report(result: RungResult, checkpoint: Path) -> None:
        nonlocal record
        assert record is not None
        target = folder / f"checkpoint-{result.step}"
        publish_folder(_beside(checkpoint, target), target)
        old = checkpoint_of(job.trials, record)
        record = record.model_copy(
            update={
                "rungs": (*record.rungs, result),
                "seconds": record.seconds + time.monotonic() - started,
                "status": "finished" if result.step >= job.config.search.steps else "running",
            }
        )
        write_json(folder / "trial.json", record)
        if old:
            shutil.rmtree(old, ignore_errors=True)
        tune.report(_metrics(result, job.config))

    _limit_threads(job.resources)
    try:
        run_trial(TrialJob(job.config, job.materials, params_to_plan(params)), start, report)
    except Exception as error:
        failed = record.model_copy(update={"status": "failed", "reason": failure_reason(error)})
        write_json(folder / "trial.json", failed)
        raise


def failure_reason(error: BaseException) -> str:
    """One line for the record."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def params_to_plan(params: dict[str, Any]) -> dict[str, int]:
    return {name.removeprefix("bits/"): bits for name, bits in params.items() if name.startswith("bits/")}


def _beside(checkpoint: Path, target: Path) -> Path:
    """Copy a checkpoint next to its final place, so that the last step is a rename."""
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    # training_args.bin is a pickle that nothing reads; it stays out of the run's storage.
    shutil.copytree(checkpoint, aside, ignore=shutil.ignore_patterns("training_args.bin", "README.md"))
    return aside


def _limit_threads(resources: dict[str, float]) -> None:
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(resources.get("cpu", 1))))


def _metrics(result: RungResult, config: RunConfig) -> dict[str, float]:
    values = {METRIC: objective(result, config), TIME: result.step, "loss": result.loss}
    optional = {"accuracy": result.accuracy, "accuracy_stderr": result.accuracy_stderr, "train_loss": result.train_loss}
    return values | {name: value for name, value in optional.items() if value is not None}


class _LivesInDriver:
    """Tune pickles searcher and callbacks into a snapshot that is never restored; these hold the terminal, so they
    leave nothing there."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _PlanSearcher(_LivesInDriver, Searcher):  # type: ignore[misc]
    """Hands the ledger's suggestions to Tune and writes each trial's record before it runs."""

    def __init__(self, job: SearchJob, ledger: Ledger, emit: Emit) -> None:
        super().__init__(metric=METRIC, mode="min")
        self._job, self._ledger, self._emit = job, ledger, emit
        self._live: dict[str, Suggestion] = {}
        self._done = sum(1 for record in read_trials(job.trials) if record.status != "running")

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        suggestion = self._ledger.next()
        if suggestion is None:
            finished: str = Searcher.FINISHED
            return finished
        self._live[trial_id] = suggestion
        path = trial_folder(self._job.trials, suggestion.index) / "trial.json"
        if not path.exists():
            layout = self._job.space.layout
            write_json(
                path,
                TrialRecord(
                    index=suggestion.index,
                    digest=self._job.digest,
                    origin=suggestion.origin,
                    plan=suggestion.plan.as_dict(),
                    plan_bytes=layout.plan_bytes(suggestion.plan),
                    mean_bits=layout.mean_bits(suggestion.plan),
                    status="running",
                ),
            )
        bits = {f"bits/{name}": value for name, value in suggestion.plan.as_dict().items()}
        return {"trial": suggestion.index, "origin": suggestion.origin, **bits}

    # Ray calls these by keyword, so the parameters keep its names.
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        suggestion = self._live.pop(trial_id)
        path = trial_folder(self._job.trials, suggestion.index) / "trial.json"
        record = read_json(path, TrialRecord)
        assert record is not None
        if record.status == "running":
            update = (
                {"status": "failed", "reason": "the worker process died"}
                if error
                else {"status": "stopped", "reason": f"stopped by ASHA at step {record.rungs[-1].step}"}
            )
            record = record.model_copy(update=update)
            write_json(path, record)
        self._ledger.observe(suggestion, _final_score(record, self._job.config))
        self._done += 1
        self._emit(Progress("search", self._done, self._job.config.search.trials))
        if record.status == "failed":
            self._emit(Message("search", f"trial {record.index} failed: {record.reason}"))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the trials' records are the searcher's state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore; see `save`."""


class _RecordedAsha(ASHAScheduler):  # type: ignore[misc]
    """ASHA (Li et al., arXiv 1810.05934) that spares controls and knows what earlier sessions recorded."""

    def __init__(self, config: RunConfig, recorded: Sequence[TrialRecord]) -> None:
        search_config = config.search
        super().__init__(
            time_attr=TIME,
            metric=METRIC,
            mode="min",
            max_t=search_config.steps,
            grace_period=search_config.first_rung,
            reduction_factor=search_config.reduction_factor,
        )
        bracket = self._brackets[0]
        for record in recorded:
            # The last rung of a running trial is reported, and decided on, again.
            decided = record.rungs[:-1] if record.status == "running" else record.rungs
            for rung in decided:
                bracket.on_result(_Recorded(f"recorded-{record.index}"), rung.step, -objective(rung, config))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action: str = super().on_trial_result(tune_controller, trial, result)
        is_control = trial.config["origin"].startswith(("uniform-", "seed-"))
        if is_control and result[TIME] < self._max_t:
            return str(TrialScheduler.CONTINUE)
        return action


@dataclass(frozen=True)
class _Recorded:
    """Stands for a trial of an earlier session in ASHA's rungs, which look at nothing but the id."""

    trial_id: str


class _RungEvents(_LivesInDriver, Callback):  # type: ignore[misc]
    """Tells the terminal about every rung."""

    def __init__(self, job: SearchJob, emit: Emit) -> None:
        self._steps, self._emit = job.config.search.steps, emit

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        bar = str(PrecisionPlan.from_dict(params_to_plan(trial.config)))
        accuracy = f" accuracy {result['accuracy']:.3f}" if "accuracy" in result else ""
        self._emit(
            Message(
                "search",
                f"trial {trial.config['trial']:>3} [{bar}] step {result[TIME]}/{self._steps} "
                f"loss {result['loss']:.4f}{accuracy} ({trial.config['origin']})",
            )
        )
