"""Runs one trial in a Ray worker; writes its record before each report to Tune and at its end."""

import contextlib
import logging
import os
import shutil
import time
import traceback
import uuid
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune

from qpruner.cluster.node_check import own_device, own_name
from qpruner.cluster.tasks import is_staying
from qpruner.cluster.tune.job import METRIC, TIME, SearchJob, params_to_plan, smaller_batch
from qpruner.config.schema import RunConfig, TrainingConfig
from qpruner.errors import CorruptFile, StorageError, TakenOver, TrainingDiverged, first_line
from qpruner.models.memory import (
    PeakMemory,
    begin_job,
    free_bytes,
    is_out_of_memory,
    kernel_kills,
    release,
)
from qpruner.plans.plan import Layout, PrecisionPlan
from qpruner.runs.records import Begun, RungResult, TrialPulse
from qpruner.runs.storage import (
    folder_digests,
    progress_seconds,
    remove,
    retry_storage,
    storage_at,
    storage_error,
)
from qpruner.search import trial_records
from qpruner.search.trial_records import TrialJob

logger = logging.getLogger(__name__)

Failure = Literal["infeasible", "diverged", "storage", "damaged", "error"]


def run_recorded(params: dict[str, Any], job: SearchJob) -> None:
    """Run one trial from its last checkpoint to its end."""
    begin_job(int(job.resources.get("cpu", 1)))
    try:
        trial = _RecordedTrial(params, job)
        while not trial.run():
            release()
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # they hold the model
        raise
    finally:
        release()  # this process may wait for its next trial


def leave_if_drained() -> None:
    """End this process if its node is about to leave.

    The trial is then resumed on another node, from its last checkpoint. Ray starts no new actors on
    such a node, but Tune (2.60) would give this actor one trial after the other.
    """
    if not is_staying(ray.get_runtime_context().get_node_id()):
        os._exit(0)


class _RecordedTrial:
    """A trial that writes its record and its pulse (a sign of progress) while it runs."""

    def __init__(self, params: dict[str, Any], job: SearchJob) -> None:
        self._job = job
        self._plan = params_to_plan(params)
        record = trial_records.read_trial(job.trials, params["trial"])
        if trial_records.restart_if_damaged(job.trials, record, logger.warning):
            record = trial_records.read_trial(job.trials, params["trial"])

        # The pulse of an earlier process may be newer than its record.
        latest = trial_records.read_pulse(job.trials, record.index) or record
        self._seconds_before = max(record.seconds, latest.seconds)
        self._gpu_seconds_before = max(record.gpu_seconds, latest.gpu_seconds)
        self._started = time.monotonic()
        self._memory = PeakMemory()
        self._beats = 0
        self._last_pulse = float("-inf")

        begun = Begun(
            search=job.search,
            session=job.session,
            time=time.time(),
            seconds=self._seconds_before,
        )
        update = {
            "worker": uuid.uuid4().hex,
            "node": own_name(),
            "device": own_device(),
            "begun": (*record.begun, begun),
        }
        if not record.saved_step:
            update["times"] = (begun.time,)  # waiting for a machine does not count
        self._record = record.model_copy(update=update)
        trial_records.write_trial(job.trials, self._record)
        self._progress(self._record.saved_step)
        leave_if_drained()
        if self._record.rungs:
            # Reported again, as the driver may have been killed before ASHA decided on it.
            tune.report(_metrics(self._record.rungs[-1], job.config))

    def run(self) -> bool:
        """Run the trial; return False if it failed but can resume.

        It resumes with smaller micro-batches, or once the storage is back.
        """
        search = self._job
        plan = self._plan
        start = trial_records.checkpoint_of(search.trials, self._record)
        try:
            check_free_memory(search.layouts[plan.cut], plan, search.config.training)
            job = TrialJob(
                config=self._config(),
                materials=search.materials,
                plan=plan.as_dict(),
                cut=plan.cut,
                save_seconds=search.save_seconds,
            )
            search.trial(job, start, self._report, self._progress)
        except TakenOver:
            raise
        except Exception as error:
            smaller = smaller_batch(self._record, search.config)
            if smaller is not None and is_out_of_memory(error):
                self._write(micro_batch_size=smaller)
                return False
            if self._was_away(error):
                return False
            self._fail(error)
            raise
        return True

    def _config(self) -> RunConfig:
        """Return the configuration with the micro-batch of this trial."""
        config = self._job.config
        size = self._record.micro_batch_size
        if size is None:
            return config
        num_scored = max(1, config.evaluate.batch_size * size // config.training.micro_batch_size)
        update = {
            "training": config.training.model_copy(update={"micro_batch_size": size}),
            "evaluate": config.evaluate.model_copy(update={"batch_size": num_scored}),
        }
        return config.model_copy(update=update)

    def _report(self, result: RungResult | None, checkpoint: Path) -> None:
        """Publish a checkpoint and record it.

        If it has a rung, record the rung, too, and report it to Tune.
        """
        old = trial_records.checkpoint_of(self._job.trials, self._record)
        step = result.step if result else int(checkpoint.name.removeprefix("checkpoint-"))
        update: dict[str, Any] = {
            "checkpoint": self._publish(checkpoint, step),
            "kills": 0,
            "memory_kills": 0,
        }
        if result is None:
            update["saved_between"] = step
        else:
            is_last = step >= self._job.config.search.steps
            update["rungs"] = (*self._record.rungs, result)
            update["status"] = "finished" if is_last else "running"
            update["times"] = (*self._record.times, time.time())
        self._write(**update)
        if old:
            remove(old)
        if result:
            tune.report(_metrics(result, self._job.config))
            leave_if_drained()

    def _publish(self, checkpoint: Path, step: int) -> dict[str, str]:
        """Copy a checkpoint to the folder of the trial, and return its digests."""
        folder = trial_records.trial_folder(self._job.trials, self._record.index)
        target = folder / f"checkpoint-{step}"
        # Copied to the same folder, so that publishing is a rename.
        aside = storage_at(folder / f".{target.name}.{self._record.worker}").staging
        # Nothing reads training_args.bin, which is a pickle.
        left_out = shutil.ignore_patterns("training_args.bin", "README.md")

        def copy() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(checkpoint, aside, ignore=left_out)

        retry_storage(copy, target)
        digests = folder_digests(aside)
        self._check_ownership()  # before publishing, and again after it, as both take time
        for left in aside.parent.glob(".checkpoint-*"):  # unpublished copies of earlier workers
            if left != aside:
                shutil.rmtree(left, ignore_errors=True)
        storage_at(target).publish(aside)
        self._check_ownership()
        return digests

    def _check_ownership(self) -> None:
        """Raise TakenOver if another worker runs this trial now."""
        recorded = trial_records.read_trial(self._job.trials, self._record.index)
        if recorded.worker != self._record.worker:
            raise TakenOver

    def _progress(self, step: int) -> None:
        """Write the pulse of this trial, unless the last pulse is recent."""
        self._beats += 1
        if time.monotonic() - self._last_pulse < progress_seconds(self._job.trials):
            return
        self._last_pulse = time.monotonic()
        pulse = TrialPulse(
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            step=step,
            beats=self._beats,
            peak_memory_bytes=self._memory.bytes(),
            kernel_kills=kernel_kills(),
            **self._spent(),
        )
        trial_records.write_pulse(self._job.trials, self._record.index, pulse)

    def _was_away(self, error: Exception) -> bool:
        """Return True if an error came from a storage that was unreachable and is back now.

        The error may have any type.
        """
        failure, _ = diagnosis(error)
        if failure not in ("error", "damaged"):
            return False
        path = trial_records.trial_path(self._job.trials, self._record.index)
        with contextlib.suppress(OSError, StorageError):
            storage_at(path).read()
            return False
        with contextlib.suppress(OSError, StorageError):
            retry_storage(storage_at(path).read, path, was_there=True)
            logger.warning(
                "trial %d resumes: the storage was unreachable as it failed: %s",
                self._record.index,
                error,
            )
            return True
        return False

    def _fail(self, error: Exception) -> None:
        """Record that this trial failed, unless it had finished before the error."""
        if self._record.is_over:
            return
        failure, reason = diagnosis(error)
        if failure == "infeasible":
            reason += f" (micro-batch {self._config().training.micro_batch_size})"
        if failure in ("storage", "damaged"):
            reason += f" (on {own_name()})"  # it may be the disk or a copy of this node
        # If this write fails, the record says "running", and the trial resumes from its last
        # checkpoint.
        with contextlib.suppress(OSError, StorageError):
            self._check_ownership()
            self._write(patience_seconds=0.0, status="failed", failure=failure, reason=reason)

    def _write(self, patience_seconds: float | None = None, **update: Any) -> None:
        """Write the record with these fields and the time and memory spent so far."""
        measured = {
            **self._spent(),
            "peak_memory_bytes": self._memory.bytes(),
            "memory_counter": self._memory.counter,
        }
        self._record = self._record.model_copy(update=measured | update)
        trial_records.write_trial(self._job.trials, self._record, patience_seconds)

    def _spent(self) -> dict[str, float]:
        """Return the seconds and GPU seconds of the trial in all sessions."""
        seconds = time.monotonic() - self._started
        gpu_seconds = seconds * self._job.resources.get("gpu", 0.0)
        return {
            "seconds": self._seconds_before + seconds,
            "gpu_seconds": self._gpu_seconds_before + gpu_seconds,
        }


def check_free_memory(layout: Layout, plan: PrecisionPlan, training: TrainingConfig) -> None:
    """Raise a `MemoryError` if this device has too little free memory for a plan.

    The tensors of the plan and the optimizer's averages must fit. Activations come on top, so that
    a trial may still run out of memory later.
    """
    needed = layout.plan_bytes(plan) + layout.trained_bytes // 4 * training.moment_bytes
    free = free_bytes()
    if free < needed:
        raise MemoryError(
            f"{free / 1e9:.2f} GB are free, and the model takes at least {needed / 1e9:.2f} GB"
        )


def diagnosis(error: Exception) -> tuple[Failure, str]:
    """Return the kind of a trial's failure, and its reason in one line."""
    if isinstance(error, StorageError):
        return "storage", error.cause
    if isinstance(error, CorruptFile):
        return "damaged", f"a file of the run is damaged: {error}"
    line = f"{type(error).__name__}: {first_line(error)[:200]}"
    if is_out_of_memory(error):
        return "infeasible", f"out of memory: {line}"
    if isinstance(error, TrainingDiverged):
        return "diverged", line
    trouble = storage_error(error)
    if trouble:
        return "storage", trouble.cause
    return "error", line


def _metrics(result: RungResult, config: RunConfig) -> dict[str, float]:
    """Return the values of a rung that are reported to Tune."""
    names = {"loss", "accuracy", "accuracy_stderr", "train_loss"}
    values = result.model_dump(include=names, exclude_none=True)
    return {METRIC: result.cost(config.search.metric), TIME: result.step, **values}
