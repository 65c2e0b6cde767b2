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
from qpruner.config.schema import RunConfig
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
        release()  # this process may wait for its next trial, or keep its device from others


def leave_if_drained() -> None:
    """End this process if its node is about to leave.

    Its trial resumes on another node from its last checkpoint. Ray starts no new actors on such a
    node, but Tune (2.60) would give this actor one trial after the other.
    """
    if not is_staying(ray.get_runtime_context().get_node_id()):
        os._exit(0)


class _RecordedTrial:
    """A trial that writes its record and its pulse (a sign of progress) while it runs."""

    def __init__(self, params: dict[str, Any], job: SearchJob) -> None:
        self._job, self._plan = job, params_to_plan(params)
        self._record = trial_records.read_trial(job.trials, params["trial"])
        if trial_records.restart_if_damaged(job.trials, self._record, logger.warning):
            self._record = trial_records.read_trial(job.trials, params["trial"])
        # The pulse of an earlier process may be newer than its record.
        spent = [
            each
            for each in (self._record, trial_records.read_pulse(job.trials, self._record.index))
            if each
        ]
        self._before = max(each.seconds for each in spent), max(each.gpu_seconds for each in spent)
        self._started = time.monotonic()
        self._memory = PeakMemory()
        self._beats, self._last_pulse = 0, float("-inf")
        begun = Begun(
            search=job.search, session=job.session, time=time.time(), seconds=self._before[0]
        )
        times = (
            {} if self._record.saved_step else {"times": (begun.time,)}
        )  # waiting for a machine does not count
        own: dict[str, Any] = {
            "worker": uuid.uuid4().hex,
            "node": own_name(),
            "device": own_device(),
        }
        own["begun"] = (*self._record.begun, begun)
        self._record = self._record.model_copy(update=own | times)
        trial_records.write_trial(job.trials, self._record)
        self._progress(self._record.saved_step)
        leave_if_drained()
        if (
            self._record.rungs
        ):  # report it again, as the driver may have been killed before ASHA decided on it
            tune.report(_metrics(self._record.rungs[-1], job.config))

    def run(self) -> bool:
        """Run the trial; return False if it failed but can resume.

        It resumes with smaller micro-batches, or once the storage is back.
        """
        start = trial_records.checkpoint_of(self._job.trials, self._record)
        try:
            own, plan = self._job, self._plan
            check_free_memory(own.layouts[plan.cut], plan)
            job = TrialJob(
                self._config(), own.materials, plan.as_dict(), plan.cut, own.save_seconds
            )
            own.trial(job, start, self._report, self._progress)
        except TakenOver:
            raise
        except Exception as error:
            smaller = (
                smaller_batch(self._record, self._job.config) if is_out_of_memory(error) else None
            )
            if smaller is not None:
                self._write(micro_batch_size=smaller)
            elif not self._was_away(error):
                self._fail(error)
                raise
            return False
        return True

    def _config(self) -> RunConfig:
        """Return the configuration with the micro-batch of this trial."""
        config, size = self._job.config, self._record.micro_batch_size
        if size is None:
            return config
        training = config.training.model_copy(update={"micro_batch_size": size})
        scored = max(1, config.evaluate.batch_size * size // config.training.micro_batch_size)
        evaluate = config.evaluate.model_copy(update={"batch_size": scored})
        return config.model_copy(update={"training": training, "evaluate": evaluate})

    def _report(self, result: RungResult | None, checkpoint: Path) -> None:
        """Publish a checkpoint and record it.

        If it has a rung, record the rung, too, and report it to Tune.
        """
        step = result.step if result else int(checkpoint.name.removeprefix("checkpoint-"))
        old, digests = (
            trial_records.checkpoint_of(self._job.trials, self._record),
            self._publish(checkpoint, step),
        )
        update: dict[str, Any] = {"saved_between": step}
        if result:
            update = {
                "rungs": (*self._record.rungs, result),
                "status": "finished" if result.step >= self._job.config.search.steps else "running",
                "times": (*self._record.times, time.time()),
            }
        self._write(checkpoint=digests, kills=0, memory_kills=0, **update)
        if old:
            remove(old)
        if result:
            tune.report(_metrics(result, self._job.config))
            leave_if_drained()

    def _publish(self, checkpoint: Path, step: int) -> dict[str, str]:
        """Copy a checkpoint to the folder of the trial, and return its digests."""
        target = (
            trial_records.trial_folder(self._job.trials, self._record.index) / f"checkpoint-{step}"
        )
        # Copied to the same folder, so that publishing is a rename.
        aside = storage_at(target.with_name(f".{target.name}.{self._record.worker}")).staging

        def copy() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            # Nothing reads training_args.bin, which is a pickle.
            shutil.copytree(
                checkpoint, aside, ignore=shutil.ignore_patterns("training_args.bin", "README.md")
            )

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
        if (
            trial_records.read_trial(self._job.trials, self._record.index).worker
            != self._record.worker
        ):
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
        path = trial_records.trial_path(self._job.trials, self._record.index)
        if diagnosis(error)[0] not in ("error", "damaged"):
            return False
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
            "peak_memory_bytes": self._memory.bytes(),
            "memory_counter": self._memory.counter,
        }
        self._record = self._record.model_copy(update=self._spent() | measured | update)
        trial_records.write_trial(self._job.trials, self._record, patience_seconds)

    def _spent(self) -> dict[str, float]:
        """Return the seconds and GPU seconds of the trial in all sessions."""
        seconds = time.monotonic() - self._started
        held = seconds * self._job.resources.get("gpu", 0.0)
        return {"seconds": self._before[0] + seconds, "gpu_seconds": self._before[1] + held}


def check_free_memory(layout: Layout, plan: PrecisionPlan) -> None:
    """Raise a `MemoryError` if this device has too little free memory for a plan.

    The tensors of the plan and Adam's moments must fit. Activations come on top, so that a trial
    may still run out of memory later.
    """
    needed, free = layout.plan_bytes(plan) + 2 * layout.trained_bytes, free_bytes()
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
    return ("storage", trouble.cause) if trouble else ("error", line)


def _metrics(result: RungResult, config: RunConfig) -> dict[str, float]:
    """Return the values of a rung that are reported to Tune."""
    names = ("loss", "accuracy", "accuracy_stderr", "train_loss")
    values = {name: value for name in names if (value := getattr(result, name)) is not None}
    return {METRIC: result.cost(config.search.metric), TIME: result.step, **values}
