"""Records of the search: trials, finalists and the outcome."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from qpruner.runs.records.base import Record, Recorded, StandardError


class RungResult(Recorded):
    """The score of a trial at one rung."""

    step: int
    loss: float
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    train_loss: float | None = None
    train_losses: tuple[float, ...] = ()


GIVEN = "given"
"""Origin of a plan that the user gave in place of a search."""


class Begun(Recorded):
    """The start of a worker process on a trial."""

    search: str
    """Digest of the search that started the worker."""
    session: int
    time: float
    seconds: float
    """Seconds that the trial had taken before."""


class TrialRecord(Recorded):
    """The state and scores of one trial. A search resumes from these records, not from the snapshot of Ray Tune."""

    index: int
    """Position among the proposed plans, from 0."""
    digest: str
    """Digest of the inputs of the result."""
    search: str
    """Digest of the inputs of the proposal: also budget, searcher and sensitivities."""
    origin: str
    """Name of the searcher, or of a control of that search: `uniform-4`, `seed-mutual-information`, ..."""
    expected_improvement: float | None = None
    """Expected improvement over the best plan known at the time, if the searcher has a model."""
    noise: float | None = None
    """Standard deviation of a score by the model of the searcher."""
    plan: dict[str, int]
    plan_bytes: int
    mean_bits: float
    status: Literal["running", "finished", "stopped", "failed"]
    rungs: tuple[RungResult, ...] = ()
    reason: str | None = None
    failure: Literal["infeasible", "diverged", "hung", "lost", "storage", "damaged", "machine", "error"] | None = None
    """`lost`: its worker processes died. Trials with `storage`, `damaged` or `machine` are run again."""
    seconds: float = 0.0
    """Seconds in all sessions, up to the last rung."""
    gpu_seconds: float = 0.0
    earlier_gpu_seconds: dict[str, float] = {}
    """Share of `gpu_seconds` that earlier searches used for this trial, by the digest of the search."""
    peak_memory_bytes: int | None = None
    """Peak in addition to the memory of the worker process at its start."""
    memory_counter: str | None = None
    checkpoint: dict[str, str] = {}
    """Checkpoint of the last rung: file name -> sha256."""
    worker: str | None = None
    """The latest worker process; earlier ones may no longer write."""
    node: str | None = None
    """The machine of `worker`."""
    micro_batch_size: int | None = None
    """Rows per micro-batch, if memory was too small for `training.micro_batch_size`."""
    kills: int = 0
    """Worker deaths since the last rung; without lost machines, and deaths that a smaller micro-batch followed."""
    times: tuple[float, ...] = ()
    """Unix seconds of the start, of each rung and of the end."""
    begun: tuple[Begun, ...] = ()

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row, with `loss at STEP` and perhaps `accuracy at STEP` for each rung."""
        shown = self.model_copy(update={"checkpoint": {}, "earlier_gpu_seconds": {}})
        [row] = super(TrialRecord, shown).table_rows()
        for name in ("digest", "rungs", "times", "begun"):
            del row[name]
        for rung in self.rungs:
            row[f"loss at {rung.step}"] = rung.loss
            if rung.accuracy is not None:
                row[f"accuracy at {rung.step}"] = rung.accuracy
        return [row]

    def gpu_seconds_of(self, search: str) -> float:
        """Return the GPU seconds that one search used for this trial."""
        earlier = self.earlier_gpu_seconds
        own = self.gpu_seconds - sum(earlier.values()) if self.search == search else 0.0
        return earlier.get(search, 0.0) + own

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended."""
        return self.status != "running"

    @property
    def has_begun(self) -> bool:
        """Whether a worker has ever started on the trial."""
        return self.worker is not None or bool(self.rungs)

    @property
    def is_given(self) -> bool:
        """Whether the plan was first tried because the user gave it."""
        return self.origin == GIVEN

    @property
    def is_control(self) -> bool:
        """Whether the plan existed before the search: uniform, seeded by a sensitivity, or given by the user."""
        return self.is_given or self.origin.startswith(("uniform-", "seed-"))

    @property
    def plan_failed(self) -> bool:
        """Whether the plan cannot be trained on these machines; searchers then get a bad score."""
        return self.failure in ("infeasible", "diverged")

    @property
    def infrastructure_failed(self) -> bool:
        """Whether the trial failed for a reason that does not concern the plan."""
        return self.failure in ("storage", "damaged", "machine")

    @property
    def should_retry(self) -> bool:
        """Whether the next session runs the trial again: its infrastructure failed, or it hung before a rung."""
        return self.infrastructure_failed or (self.failure == "hung" and not self.rungs)


class TrialPulse(Recorded):
    """Progress of the worker of a trial, written at most once a second and only after a change."""

    node: str
    """The node id of the machine in Ray."""
    pid: int
    step: int
    beats: int
    """Forward passes so far."""
    peak_memory_bytes: int
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    kernel_kills: int | None = None
    """Processes that the kernel of the machine had killed for memory so far."""


class SearchClock(Recorded):
    """Seconds of all sessions of a search, and the number of sessions."""

    seconds: float
    sessions: int = 0


class FreshScore(Recorded):
    """The score of a finished trial on fresh rows and questions, which no trial was scored on during the search."""

    loss: float
    """Loss on the half of the confirmation rows that selects the winner, in nats per token."""
    stderr: StandardError
    accuracy: float | None = None
    accuracy_stderr: float | None = None


class FinalistScore(FreshScore):
    """A `FreshScore` with the loss of each row, to compare two finalists row by row."""

    losses: tuple[float, ...] = ()
    """Loss of each row in the half of the confirmation rows that selects the winner."""


class KeptScore(FinalistScore):
    """A `FinalistScore` stored in the folder of the trial for later commands."""

    digest: str
    """Digest of the weights and of the rows and questions."""
    gpu_seconds: float


class Confirmation(FinalistScore):
    """A finalist with its score on fresh rows: one of the best trials, or a control."""

    index: int
    origin: str
    """Name of the control or of the searcher; ends in `of another search` if it was reused from one."""
    control: bool
    reused: bool
    """Whether another search ran the trial."""


class FrontPoint(FreshScore):
    """A plan on the Pareto front: no confirmed plan with as few bytes has a better score."""

    index: int
    origin: str
    plan: dict[str, int]
    plan_bytes: int


class SearchRecord(Record):
    """The outcome of the search; the records of its trials are in `trials/<trials_digest>/`."""

    listed: ClassVar[str] = "confirmations"
    trials_digest: str
    searcher: str
    metric: Literal["loss", "accuracy"]
    metrics: dict[str, str] = {}
    """Task -> lm-eval metric; `accuracy` is the mean of these."""
    budget_bytes: int
    num_trials: int
    """Number of trials, without those reused from another search."""
    num_finished: int
    num_stopped: int
    num_failed: int
    failures: dict[str, int] = {}
    """Number of failed trials by `TrialRecord.failure`."""
    num_reused: int
    ended: str
    """Why the search ended."""
    search_seconds: float
    """Wall-clock seconds of the trials, in all sessions."""
    gpu_seconds: float
    """GPU seconds of the trials."""
    confirmation_gpu_seconds: float = 0.0
    """GPU seconds for the scores of the finalists on fresh rows."""
    confirmations: tuple[Confirmation, ...]
    best_index: int
    best_origin: str
    best_plan: dict[str, int]
    best_control: int | None
    """Index of the best control on fresh rows; None if no control finished."""
    control_won: bool
    """Whether the best control is returned, because no searched plan beat it on fresh rows."""
    front: tuple[FrontPoint, ...]
    """With `search.pareto`: the Pareto front on fresh rows, sorted by bytes."""
    hypervolume: float | None = None
    """Mean over budgets up to `budget_bytes`: how far the best plan within the budget beats the smallest plan."""
    resumed: int
    """Number of trials that an earlier, interrupted command had recorded."""
    sessions: int = 1
    """Number of times the command was started until the search ended."""

    @property
    def total_seconds(self) -> float:
        """Seconds of all sessions, with the scoring of finalists in the last one."""
        return max(self.seconds, self.search_seconds)

    @property
    def total_gpu_seconds(self) -> float:
        """GPU seconds of the trials and of the finalists on fresh rows."""
        return self.gpu_seconds + self.confirmation_gpu_seconds
