"""Runs the search under Ray Tune; no other package imports Ray Tune.

Ray Tune schedules, places and stops trials. Each trial writes its record and its last checkpoint to
its own folder. A search that starts again reads them: the searcher learns from finished trials in
order, running trials resume, and the rungs of ASHA are filled. Tune's snapshot is not restored: it
lacks trials that finished after it (Ray 2.60).
"""

import os
import re

# Send no usage report and print no banner. Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Tune's loggers would write every metric to the scratch folder again, and TensorBoard would list
# these copies as runs.
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
# Tune's handler makes fit() return as if the search were over, and stays installed afterwards.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
# The searcher decides how many trials wait for a machine; Tune's default is one.
os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(10**6)
# A trial waits until its worker has ended the trial before it; by default Tune (2.60) silently
# gives the trial up after 2 s. Workers read this variable, because they import this module too.
os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(10**6)

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune.error import TuneError

from qpruner.cluster import ray_private
from qpruner.cluster.tasks import checked
from qpruner.cluster.tune.asha import RecordedAsha
from qpruner.cluster.tune.callbacks import ActorManager, Halt, HangWatch
from qpruner.cluster.tune.devices import Devices, count_devices
from qpruner.cluster.tune.driver import PlanSearcher
from qpruner.cluster.tune.job import SearchJob, SearchOutcome, resume_search
from qpruner.cluster.tune.ray_searchers import BayesOptProposer, HyperOptProposer
from qpruner.cluster.tune.trackers import tracker_callbacks
from qpruner.cluster.tune.worker import run_recorded
from qpruner.errors import StageError
from qpruner.plans.space import SearchSpace
from qpruner.runs.events import Emit
from qpruner.runs.storage import retry_storage, storage_error
from qpruner.search.searchers import Prior, Proposer, RandomProposer, check_searcher
from qpruner.search.trial_records import (
    REMEDIES,
    begin_session,
    read_clock,
    read_trials,
    wait_for_storage,
)
from qpruner.training.trackers import Trackers

# Tune (2.60) would put the driver's AWS keys into the runtime environment of its actors, which Ray
# writes to its logs. Every machine has its own keys.
ray_private.ENV_VARS_TO_PROPAGATE.difference_update(
    [name for name in ray_private.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
)
# Tune has no option for the class of its actor manager.
ray_private.tune_controller.RayActorManager = ActorManager

__all__ = ["SearchJob", "SearchOutcome", "check_searcher", "make_proposer", "search"]


def search(
    job: SearchJob, room: Callable[[int], int], emit: Emit, trackers: Trackers | None = None
) -> SearchOutcome:
    """Run or resume the search until it is over.

    If Tune ends while trials still have to be resumed, another session of Tune starts. If Tune
    cannot write, the search waits for the storage, as in `retry_storage`. `room` returns how many
    trials may run or wait for a machine.

    Raises:
        KeyboardInterrupt: On Ctrl-C. Running trials are recorded up to their last checkpoint.
        NodeDiffers: If a trial was sent to an unusable node.
        StageError: If trials failed because of the storage, a damaged file or a broken machine, or
            if the time limit is reached and no machine is left.
        StorageError: If the storage stays full or unreachable.
    """
    assert ray.is_initialized(), "without `connect`, Tune would choose a cluster itself"
    halt = Halt(emit)
    devices = Devices(partial(count_devices, job.resources, room), emit)
    job = replace(job, session=begin_session(job.trials, job.search))
    while True:
        ended = retry_storage(
            lambda: _fit(job, room, devices, emit, halt, trackers), job.scratch, resumable=True
        )
        if halt.interrupted:
            raise KeyboardInterrupt
        if halt.trouble:
            raise halt.trouble
        outcome = _outcome(job, ended or "")
        if ended is not None and all(trial.is_over for trial in outcome.trials):
            return outcome


def _fit(
    job: SearchJob,
    room: Callable[[int], int],
    devices: Devices,
    emit: Emit,
    halt: Halt,
    trackers: Trackers | None,
) -> str | None:
    """Run one session of Ray Tune.

    Return why there are no more trials, or None if there may be more.
    """
    # With one format all plans are controls.
    has_more = job.config.is_searched and job.config.quantize.has_choice
    name = job.config.search.searcher if has_more else "random"
    proposer = make_proposer(name, job.space, job.config.seed, job.priors)
    wait_for_storage(job.trials, job.search)
    ledger, recorded = resume_search(job, proposer)
    searcher = PlanSearcher(job, ledger, room, devices, emit, halt)
    scheduler = RecordedAsha(
        job.config,
        job.space,
        [plan for _, plan in job.controls],
        recorded,
        searcher.is_cancelled,
        searcher.on_error_text,
    )
    watch = HangWatch(job, searcher.on_hung, emit)
    attempt = len(list(job.scratch.glob("search-*")))
    trainable = checked(job.check_node, partial(run_recorded, job=job))
    tuner = tune.Tuner(
        tune.with_resources(trainable, job.resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"{_folder_name(trial)}-{trial.config['origin']}",
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name=f"search-{attempt:02d}",
            storage_path=str(job.scratch),
            stop=halt,
            callbacks=[watch, halt, *tracker_callbacks(trackers, emit)],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    try:
        with halt.listening():
            tuner.fit()
    except Exception as error:
        # The next session resumes the same trials, so their old workers must end first.
        watch.kill_all()
        disk_error = _disk_error(str(error)) if isinstance(error, TuneError) else None
        if disk_error is None:
            raise
        raise disk_error from error
    finally:
        ledger.drop_proposals()
        devices.end_session()
    return ledger.ended


def _folder_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:04d}"


def _disk_error(text: str) -> OSError | None:
    """Return the disk error at the end of a TuneError's traceback.

    The result is None if the last error is another one.

    The error names no file if Tune (2.60) failed to write to Ray's folder on this machine.
    """
    match = re.search(r"^OSError: \[Errno (\d+)\] ([^:\n]+)(?:: '(.+)')?\s*\Z", text, re.MULTILINE)
    if match is None:
        return None
    error = OSError(int(match[1]), match[2], match[3] or ray_private.session_dir())
    return error if storage_error(error) else None


def _outcome(job: SearchJob, ended: str) -> SearchOutcome:
    """Return the outcome of a search from its trials' records.

    Raises:
        StageError: If the infrastructure of the search failed.
    """
    wait_for_storage(job.trials, job.search)
    recorded = read_trials(job.trials)
    trials = [trial for trial in recorded if job.owns(trial)][: job.config.search.max_trials]
    for trial in trials:
        if trial.infrastructure_failed:
            raise StageError(
                "search", f"trial {trial.index}: {trial.reason}", REMEDIES[trial.failure or ""]
            )
    return SearchOutcome(
        trials=trials,
        reused=[trial for trial in recorded if not job.owns(trial)],
        ended=ended,
        seconds=read_clock(job.trials, job.search).seconds,
        sessions=job.session,
        gpu_seconds=sum(trial.gpu_seconds_of(job.search) for trial in recorded),
    )


def make_proposer(
    name: str, space: SearchSpace, seed: int, priors: Mapping[str, Prior]
) -> Proposer:
    """Make the searcher `gp`, `hyperopt`, `bayesopt` or `random`.

    Only `gp` uses `priors`, the sensitivities by method. A searcher whose package is missing raises
    `UserError`.
    """
    check_searcher(name)
    # imported here, because every worker imports this module and it is slow to import
    if name == "gp":
        from qpruner.search.gaussian_process import GaussianProcessProposer

        return GaussianProcessProposer(space, seed, priors)
    if name == "hyperopt":
        return HyperOptProposer(space, seed)
    if name == "bayesopt":
        return BayesOptProposer(space, seed)
    return RandomProposer(space, seed)
