"""Records of the search: its trials, its finalists and its outcome."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from qpruner.runs.records.base import Record, Recorded, StandardError


class RungResult(Recorded):
    """A trial's score at one rung."""

    step: int
    loss: float
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    train_loss: float | None = None
    train_losses: tuple[float, ...] = ()


GIVEN = "given"
"""Origin of the plan that is taken instead of a search."""


class Begun(Recorded):
    """A worker process's start on a trial."""

    search: str
    """Digest of the search that it was for."""
    session: int
    time: float
    seconds: float
    """What the trial had taken before."""


class TrialRecord(Recorded):
    """One plan's life in the search. `index` counts suggestions from 0; records, not Tune's snapshot, are the truth."""

    index: int
    digest: str
    """Of what the trial's result depends on."""
    search: str
    """Digest of what the proposals depended on besides: budget, searcher, sensitivities."""
    origin: str
    """`uniform-4`, `seed-mutual-information`, ... for controls of that search; the searcher's name otherwise."""
    expected_improvement: float | None = None
    """Over the best plan known when this one was proposed, by the searcher's model if it has one."""
    noise: float | None = None
    """Standard deviation of a score, by the same model."""
    plan: dict[str, int]
    plan_bytes: int
    mean_bits: float
    status: Literal["running", "finished", "stopped", "failed"]
    rungs: tuple[RungResult, ...] = ()
    reason: str | None = None
    failure: Literal["infeasible", "diverged", "hung", "lost", "storage", "damaged", "machine", "error"] | None = None
    """`lost`: its worker processes died. `storage`, `damaged` and `machine` are tried again."""
    seconds: float = 0.0
    """Of all sessions, up to the last rung."""
    gpu_seconds: float = 0.0
    earlier_gpu_seconds: dict[str, float] = {}
    """Of these, what other searches held that had the trial before, by their digests."""
    peak_memory_bytes: int | None = None
    """Above what its worker process held when it started."""
    memory_counter: str | None = None
    checkpoint: dict[str, str] = {}
    """Of the last rung: file name -> sha256."""
    worker: str | None = None
    """The latest process that worked on it; an earlier one writes nothing more."""
    node: str | None = None
    """The machine of that process."""
    micro_batch_size: int | None = None
    """Where want of memory forced it below `training.micro_batch_size`."""
    kills: int = 0
    """Times since its last rung that its worker process died; for want of memory, where fewer rows were no answer."""
    times: tuple[float, ...] = ()
    """Unix seconds of its begin, of each rung, and of its end."""
    begun: tuple[Begun, ...] = ()
    """Every start of a worker on it."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return one row, with `loss at STEP` (and accuracy) for each rung."""
        told = self.model_copy(update={"checkpoint": {}, "earlier_gpu_seconds": {}})
        [row] = super(TrialRecord, told).table_rows()
        for name in ("digest", "rungs", "times", "begun"):
            del row[name]
        for rung in self.rungs:
            row[f"loss at {rung.step}"] = rung.loss
            if rung.accuracy is not None:
                row[f"accuracy at {rung.step}"] = rung.accuracy
        return [row]

    def gpu_seconds_of(self, search: str) -> float:
        """Return the GPU seconds that one search spent on the trial."""
        earlier = self.earlier_gpu_seconds
        own = self.gpu_seconds - sum(earlier.values()) if self.search == search else 0.0
        return earlier.get(search, 0.0) + own

    @property
    def is_over(self) -> bool:
        """Whether nothing of it will change."""
        return self.status != "running"

    @property
    def has_begun(self) -> bool:
        """Whether a worker ever had it; before, one is started for it, or it waits for a machine."""
        return self.worker is not None or bool(self.rungs)

    @property
    def is_given(self) -> bool:
        """Whether its plan was first tried because it was given."""
        return self.origin == GIVEN

    @property
    def is_control(self) -> bool:
        """Whether its plan was there before the search: a uniform one, a sensitivity's seed, or one that was given."""
        return self.is_given or self.origin.startswith(("uniform-", "seed-"))

    @property
    def plan_failed(self) -> bool:
        """Whether the plan itself cannot be trained here, so that searchers are told a bad score."""
        return self.failure in ("infeasible", "diverged")

    @property
    def infrastructure_failed(self) -> bool:
        """Whether it failed for a reason that says nothing about the plan."""
        return self.failure in ("storage", "damaged", "machine")

    @property
    def should_retry(self) -> bool:
        """Whether the next session runs it again; one that hung before its first rung waited for files or machine."""
        return self.infrastructure_failed or (self.failure == "hung" and not self.rungs)


class TrialPulse(Recorded):
    """What a trial's worker tells while it works, at most once a second and only when something moved."""

    node: str
    """Ray's id of the machine."""
    pid: int
    step: int
    beats: int
    """Forward passes so far."""
    peak_memory_bytes: int
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    kernel_kills: int | None = None
    """Processes that the machine's kernel had killed for want of memory by then."""


class SearchClock(Recorded):
    """Seconds a search has taken, all its sessions together, and how many there were."""

    seconds: float
    sessions: int = 0


class FreshScore(Recorded):
    """A finished trial on rows and questions that no trial was scored on."""

    loss: float
    """The selection loss: on the half of the confirmation rows that chooses, in nats per token."""
    stderr: StandardError
    accuracy: float | None = None
    accuracy_stderr: float | None = None


class FinalistScore(FreshScore):
    """The same with values by row, so that two finalists can be paired."""

    losses: tuple[float, ...] = ()
    """As `CandidateRecord.confirmation_losses`, of the half that chooses."""


class KeptScore(FinalistScore):
    """The same as a trial's folder keeps it, for commands to come."""

    digest: str
    """Of the weights and of what they were scored by."""
    gpu_seconds: float


class Confirmation(FinalistScore):
    """A finalist: one of the best trials, or a control."""

    index: int
    origin: str
    """A control's name, else the searcher that proposed it; with `of another search` where that was another."""
    control: bool
    reused: bool
    """Whether another search ran it."""


class FrontPoint(FreshScore):
    """A plan that no confirmed plan of this few bytes beats."""

    index: int
    origin: str
    plan: dict[str, int]
    plan_bytes: int


class SearchRecord(Record):
    """The outcome of the search; the trials' own records lie under `trials/<trials_digest>/`."""

    listed: ClassVar[str] = "confirmations"
    trials_digest: str
    searcher: str
    metric: Literal["loss", "accuracy"]
    metrics: dict[str, str] = {}
    """Task -> lm-eval's metric that `accuracy` is a mean of."""
    budget_bytes: int
    num_trials: int
    """Without those reused from another search."""
    num_finished: int
    num_stopped: int
    num_failed: int
    failures: dict[str, int] = {}
    """By `TrialRecord.failure`."""
    num_reused: int
    """Trials of other searches that this one started from."""
    ended: str
    """Why there were no more trials."""
    search_seconds: float
    """Wall-clock seconds of the trials' part, all sessions together."""
    gpu_seconds: float
    """Of trials."""
    confirmation_gpu_seconds: float = 0.0
    """Of the finalists' scores on fresh rows."""
    confirmations: tuple[Confirmation, ...]
    best_index: int
    best_origin: str
    best_plan: dict[str, int]
    best_control: int | None
    """On fresh rows; None where none finished."""
    control_won: bool
    """No searched plan beat the best control on fresh rows, so that control is returned."""
    front: tuple[FrontPoint, ...]
    """With `search.pareto`, by bytes: the plans that none of fewer or equal bytes beats on fresh rows."""
    hypervolume: float | None = None
    """How much better the front's best plan inside a budget is than its smallest, in the mean over budgets up to
    `budget_bytes`."""
    resumed: int
    """Trials that an earlier, interrupted run had recorded."""
    sessions: int = 1
    """Starts of the command until the search was over."""

    @property
    def total_seconds(self) -> float:
        """What the search took, all sessions together, with the finalists that the last one scored on fresh rows."""
        return max(self.seconds, self.search_seconds)

    @property
    def total_gpu_seconds(self) -> float:
        """What it held GPUs for: its trials, and the finalists on fresh rows."""
        return self.gpu_seconds + self.confirmation_gpu_seconds
