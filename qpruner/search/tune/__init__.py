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
# Its own loggers would fill the scratch folder with a second copy of every figure, which TensorBoard lists as runs.
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
# Its handler makes fit() return as if the search were over, and stays installed after it.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

import errno
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from qpruner.config import RunConfig
from qpruner.errors import CorruptFile, StageError
from qpruner.events import Emit, Message
from qpruner.memory import release
from qpruner.plan import PlanSpace
from qpruner.records import RungResult, TrialRecord
from qpruner.rundir import publish_folder, read_json
from qpruner.search.searchers import (
    Prior,
    Proposer,
    RandomProposer,
    ScalarizedProposer,
    check_searcher,
)
from qpruner.search.trial import TrialJob, run_trial
from qpruner.search.trial_records import (
    checkpoint_of,
    objective,
    read_seconds,
    read_trials,
    trial_folder,
    trial_path,
    write_trial,
)
from qpruner.search.tune.asha import RecordedAsha
from qpruner.search.tune.driver import PlanSearcher
from qpruner.search.tune.hyperopt import HyperOptProposer
from qpruner.search.tune.job import METRIC, TIME, SearchJob, SearchOutcome, params_to_plan
from qpruner.search.tune.resume import DAMAGED, DISK_FULL, is_no_fault_of_the_plan, take_up

__all__ = ["HyperOptProposer", "SearchJob", "SearchOutcome", "check_searcher", "make_proposer", "search"]

MAX_KILLS = 3
"""Kills for want of memory that a trial may run through; which of several running trials took too much is not known."""


def search(job: SearchJob, emit: Emit) -> SearchOutcome:
    """Run or continue the search until it is over.

    When Ray kills a worker because its node runs out of memory, `Tuner.fit` ends with a RuntimeError whatever
    `max_failures` says (Ray 2.60): the search then goes on from the records, and a trial that ran through several
    such kills is recorded as failed.
    """
    while True:
        try:
            ended = _fit(job, emit)
        except RuntimeError as error:
            if "killed" not in str(error):
                raise
            emit(Message("search", "Ray killed a worker that ran out of memory; going on from the records"))
            _count_kill(job)
        else:
            return _outcome(job, ended)


def _fit(job: SearchJob, emit: Emit) -> str:
    """One session of Ray Tune, from the records to the last trial; returns why there are no more."""
    settings = job.config.search
    proposer = make_proposer(settings.searcher, job.space, job.config.seed, job.priors, settings.pareto)
    ledger, recorded = take_up(job, proposer)
    attempt = len(list(job.scratch.glob("search-*"))) if job.scratch.exists() else 0
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trainable, job=job), job.resources),
        tune_config=tune.TuneConfig(
            search_alg=PlanSearcher(job, ledger, emit),
            scheduler=RecordedAsha(job.config, job.space, [plan for _, plan in job.controls], recorded),
            num_samples=-1,
            max_concurrent_trials=job.max_concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"trial-{trial.config['trial']:04d}-{trial.config['origin']}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']:04d}",
        ),
        run_config=tune.RunConfig(
            name=f"search-{attempt:02d}",
            storage_path=str(job.scratch),
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    tuner.fit()
    if ledger.ended is None:
        # Somebody's signal ended Tune: what is half done must not pass for the result.
        raise KeyboardInterrupt
    return ledger.ended


def _outcome(job: SearchJob, ended: str) -> SearchOutcome:
    """The records of a search that ended by itself.

    Raises:
        KeyboardInterrupt: If trials are still running, because somebody's signal ended Tune.
        StageError: If trials failed for want of disk or for a damaged file; they are tried again when the command is
            repeated.
    """
    recorded = read_trials(job.trials)
    trials = [trial for trial in recorded if job.owns(trial)][: job.config.search.max_trials]
    if any(trial.status == "running" for trial in trials):
        raise KeyboardInterrupt
    reasons = [trial.reason or "" for trial in trials if is_no_fault_of_the_plan(trial)]
    if reasons:
        mend = "make room, then repeat" if reasons[0] == DISK_FULL else "repeat"
        remedy = f"{mend} the command: what is damaged is built again, and those trials are tried again"
        raise StageError("search", reasons[0], remedy)
    return SearchOutcome(
        trials=trials,
        taken_over=[trial for trial in recorded if not job.owns(trial)],
        ended=ended,
        seconds=read_seconds(job.trials, job.search),
    )


def _count_kill(job: SearchJob) -> None:
    """Note a kill in every trial that was running; one with too many of them has failed."""
    for record in read_trials(job.trials):
        if job.owns(record) and record.status == "running":
            update: dict[str, Any] = {"kills": record.kills + 1}
            if record.kills + 1 >= MAX_KILLS:
                update |= {"status": "failed", "reason": f"out of memory: killed by Ray {MAX_KILLS} times"}
            write_trial(job.trials, record.model_copy(update=update))


def make_proposer(
    name: str, space: PlanSpace, seed: int, priors: Mapping[str, Prior], pareto: bool = False
) -> Proposer:
    """The searcher that `search.searcher` names.

    Args:
        name: `gp`, `hyperopt`, `bayesopt` or `random`.
        space: The feasible plans.
        seed: Seeds its proposals.
        priors: Sensitivities by method, for a searcher that starts from them.
        pareto: Whether the front of score against bytes is wanted instead of the best score.

    Raises:
        UserError: If the searcher's extra is not installed.
    """
    check_searcher(name)
    if name == "gp":
        from qpruner.search.gaussian_process import GaussianProcessProposer

        return GaussianProcessProposer(space, seed, priors, pareto)
    proposer: Proposer
    if name == "bayesopt":
        from qpruner.search.tune.bayesopt import BayesOptProposer

        proposer = BayesOptProposer(space, seed)
    elif name == "hyperopt":
        proposer = HyperOptProposer(space, seed)
    else:
        proposer = RandomProposer(space, seed)
    return ScalarizedProposer(proposer, space, seed) if pareto else proposer


def _trainable(params: dict[str, Any], job: SearchJob) -> None:
    """Runs in a Ray worker: one trial, its record written before each report."""
    started = time.monotonic()
    folder = trial_folder(job.trials, params["trial"])
    record = read_json(trial_path(job.trials, params["trial"]), TrialRecord)
    assert record is not None, "the searcher writes the record before it hands the plan out"
    spent, gpu_spent = record.seconds, record.gpu_seconds
    start = checkpoint_of(job.trials, record)
    # A trial that goes on reports its last rung again first: the scheduler may have been killed before it decided.
    if start:
        tune.report(_metrics(record.rungs[-1], job.config))

    def times() -> dict[str, float]:
        seconds = time.monotonic() - started
        return {"seconds": spent + seconds, "gpu_seconds": gpu_spent + seconds * job.resources.get("gpu", 0.0)}

    def report(result: RungResult, checkpoint: Path) -> None:
        nonlocal record
        assert record is not None
        target = folder / f"checkpoint-{result.step}"
        publish_folder(_beside(checkpoint, target), target)
        old = checkpoint_of(job.trials, record)
        record = record.model_copy(
            update={
                "rungs": (*record.rungs, result),
                "status": "finished" if result.step >= job.config.search.steps else "running",
                "times": (*record.times, time.time()),
                **times(),
            }
        )
        write_trial(job.trials, record)
        if old:
            shutil.rmtree(old, ignore_errors=True)
        tune.report(_metrics(result, job.config))

    _limit_threads(job.resources)
    release()  # the actor's last trial
    try:
        run_trial(TrialJob(job.config, job.materials, params_to_plan(params)), start, report)
    except Exception as error:
        reason = failure_reason(error)
        write_trial(job.trials, record.model_copy(update={"status": "failed", "reason": reason, **times()}))
        raise


def failure_reason(error: BaseException) -> str:
    """One line for the record."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DISK_FULL
    if isinstance(error, CorruptFile):
        return f"{DAMAGED}: {error}"
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
