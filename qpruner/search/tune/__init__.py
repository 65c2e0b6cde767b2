"""The search under Ray Tune: the only module that imports it.

Ray Tune schedules, places and stops trials; what counts is written by the trials themselves. A trial's folder holds
its record and last checkpoint, and a search that is started again reads those: finished trials are told to the
searcher in order, running ones go on from their own last rung, ASHA's rungs are filled as they were. Tune's snapshot
is scratch and never restored (its own restore loses what finished since the last snapshot, measured with Ray 2.60).
"""

from __future__ import annotations

import os

# Set before Ray is imported: no usage report leaves the machine, and no banner is printed.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Its handler makes fit() return as if the search were over, and stays installed after it.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

import errno
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from qpruner.config import RunConfig
from qpruner.errors import StageError
from qpruner.events import Emit, Message
from qpruner.memory import release
from qpruner.plan import PlanSpace, PrecisionPlan
from qpruner.records import RungResult, TrialRecord
from qpruner.rundir import publish_folder, read_json, write_json
from qpruner.search.searchers import Ledger, Prior, Proposer, RandomProposer, Suggestion
from qpruner.search.trial import TrialJob, run_trial
from qpruner.search.trial_records import checkpoint_of, objective, read_trials, trial_folder
from qpruner.search.tune.asha import RecordedAsha
from qpruner.search.tune.driver import PlanSearcher, RungEvents
from qpruner.search.tune.hyperopt import HyperOptProposer
from qpruner.search.tune.job import METRIC, TIME, SearchJob, observations_of, params_to_plan

__all__ = ["HyperOptProposer", "SearchJob", "make_proposer", "search"]

DISK_FULL = "no space left on the disk"
"""Reason of a trial that says nothing of its plan, so it is tried again."""
MAX_KILLS = 3
"""Kills for want of memory that a trial may run through; which of several running trials took too much is not known."""


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
            return _whole(job)


def _fit(job: SearchJob, emit: Emit) -> None:
    """One session of Ray Tune, from the records to the last trial."""
    settings = job.config.search
    proposer = make_proposer(settings.searcher, job.space, job.config.seed, job.priors)
    ledger = Ledger(job.space, proposer, job.controls, settings.trials)
    recorded = read_trials(job.trials)
    _restore(ledger, recorded, job.config)
    attempt = len(list(job.scratch.glob("search-*"))) if job.scratch.exists() else 0
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trainable, job=job), job.resources),
        tune_config=tune.TuneConfig(
            search_alg=PlanSearcher(job, ledger, emit),
            scheduler=RecordedAsha(job.config, recorded, METRIC, TIME),
            num_samples=-1,
            max_concurrent_trials=job.max_concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"trial-{trial.config['trial']:04d}-{trial.config['origin']}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']:04d}",
        ),
        run_config=tune.RunConfig(
            name=f"search-{attempt:02d}",
            storage_path=str(job.scratch),
            callbacks=[RungEvents(job, emit)],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    tuner.fit()


def _whole(job: SearchJob) -> list[TrialRecord]:
    """The records of a search that ended by itself.

    Raises:
        KeyboardInterrupt: If trials are still running: somebody's signal ended Tune, and what is half done must not
            pass for the result.
        StageError: If trials failed for want of disk; they are tried again when the command is repeated.
    """
    trials = [trial for trial in read_trials(job.trials) if trial.index < job.config.search.trials]
    if any(trial.status == "running" for trial in trials):
        raise KeyboardInterrupt
    if any(trial.reason == DISK_FULL for trial in trials):
        raise StageError("search", DISK_FULL, "make room, then repeat the command: those trials are tried again")
    return trials


def _count_kill(trials: Path) -> None:
    """Note a kill in every trial that was running; one with too many of them has failed."""
    for record in read_trials(trials):
        if record.status == "running":
            update: dict[str, Any] = {"kills": record.kills + 1}
            if record.kills + 1 >= MAX_KILLS:
                update |= {"status": "failed", "reason": f"out of memory: killed by Ray {MAX_KILLS} times"}
            write_json(trial_folder(trials, record.index) / "trial.json", record.model_copy(update=update))


def make_proposer(name: str, space: PlanSpace, seed: int, priors: Mapping[str, Prior]) -> Proposer:
    """The searcher that `search.searcher` names.

    Args:
        name: `hyperopt` or `random`.
        space: The feasible plans.
        seed: Seeds its proposals.
        priors: Sensitivities by method, for a searcher that starts from them.
    """
    if name == "random":
        return RandomProposer(space, seed)
    return HyperOptProposer(space, seed)


def _restore(ledger: Ledger, recorded: Sequence[TrialRecord], config: RunConfig) -> None:
    for record in recorded:
        suggestion = Suggestion(record.index, record.origin, PrecisionPlan.from_dict(record.plan))
        if record.status == "running" or record.reason == DISK_FULL:
            ledger.resume(suggestion, observations_of(record, config))
        else:
            ledger.recall(suggestion, observations_of(record, config))


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
    release()  # the actor's last trial
    try:
        run_trial(TrialJob(job.config, job.materials, params_to_plan(params)), start, report)
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = DISK_FULL if full else failure_reason(error)
        failed = record.model_copy(update={"status": "failed", "reason": reason})
        write_json(folder / "trial.json", failed)
        raise


def failure_reason(error: BaseException) -> str:
    """One line for the record."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


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
