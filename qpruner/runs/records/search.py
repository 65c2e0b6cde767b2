"""Records of the search: trials, finalists and the outcome."""

from statistics import fmean
from typing import Literal

from qpruner.runs.records.base import Record, Recorded
from qpruner.runs.records.finetunes import SELECTION, FineTune, Score


class RungResult(Score):
    """The score of a trial at one rung."""

    step: int
    train_loss: float | None = None
    train_losses: tuple[float, ...] = ()


BASE, PRUNED, RANDOM, SEARCHED = "base", "pruned", "random", "searched"
"""Names of rows in records.

The row `searched` has the plan of the winner, even if no searcher proposed it.
"""
BEST_SEARCHED = "best searched"
"""Name of the row with the best plan that a searcher proposed, if a control won."""
MERGED = "merged"
"""Name of the row of the base model that was fine-tuned unpacked, then merged and rounded."""
GIVEN = "given"
"""Origin of a plan that the user gave in place of a search."""
PAPER = "paper"
"""Origin of the plan that the paper's flow gives at the same bytes."""
OF_EVERY_CUT = ("-uniform", "-knapsack")
"""Ends of the origins of all other controls, which begin with their cut (`unpruned` for the base):
one format, and the best plan by a sensitivity."""


def is_control(origin: str) -> bool:
    """Return True for the origin of a plan that users would try instead of a search."""
    return origin == PAPER or origin.endswith(OF_EVERY_CUT)


class Begun(Recorded):
    """The start of a worker process on a trial."""

    search: str
    """Digest of the search that started the worker."""
    session: int
    time: float
    seconds: float
    """Seconds that earlier workers had spent on the trial."""


class TrialRecord(Recorded):
    """The state and scores of one trial.

    A search resumes from these records, not from the snapshot of Ray Tune.
    """

    index: int
    """Position among the proposed plans, from 0."""
    digest: str
    """Digest of all that the result depends on but the plan and `model`; equal to
    `SearchRecord.trials_digest`."""
    search: str
    """Digest of the search that proposed the plan: its sensitivities, budget, searcher and other
    settings."""
    origin: str
    """Name of the searcher, or of a control (see `is_control`): `unpruned-uniform`,
    `cut-10-knapsack`, ..."""
    cut: str = "base"
    """Name of the cut that the plan quantizes; `base` is the model before pruning."""
    model: str = ""
    """Digest of the cut's weights and of what they are packed by."""
    plan: dict[str, str]
    """Group -> name of its format."""
    plan_bytes: int
    mean_bits: float
    status: Literal["running", "finished", "stopped", "failed"]
    rungs: tuple[RungResult, ...] = ()
    reason: str | None = None
    failure: (
        Literal["infeasible", "diverged", "hung", "lost", "storage", "damaged", "machine", "error"]
        | None
    ) = None
    """`lost`: its worker processes died. Trials with `storage`, `damaged` or `machine` are run
    again."""
    seconds: float = 0.0
    """Seconds that workers spent on the trial in all sessions (see `SearchClock`)."""
    gpu_seconds: float = 0.0
    earlier_gpu_seconds: dict[str, float] = {}
    """Share of `gpu_seconds` that earlier searches used for this trial, by the digest of the
    search."""
    peak_memory_bytes: int | None = None
    """Peak memory of the worker process, less its memory at the start."""
    memory_counter: str | None = None
    saved_between: int = 0
    """Step of the last checkpoint between rungs; they are made by time."""
    checkpoint: dict[str, str] = {}
    """The last checkpoint: file name -> sha256."""
    worker: str | None = None
    """The latest worker process of the trial; earlier workers may no longer write."""
    node: str | None = None
    """The machine of `worker`."""
    device: str | None = None
    """The GPU of `worker` and its machine, or the machine alone if trials use no GPU."""
    failed_on: tuple[str, ...] = ()
    """Devices on which the trial failed, after which it was tried on another one."""
    micro_batch_size: int | None = None
    """Rows per micro-batch, if memory was too small for `training.micro_batch_size`."""
    kills: int = 0
    """Worker deaths since the last checkpoint, except by loss of the machine and for lack of
    memory."""
    memory_kills: int = 0
    """Worker deaths since the last checkpoint for lack of memory, except those answered by a
    smaller micro-batch."""
    times: tuple[float, ...] = ()
    """Unix seconds of the start, of each rung and of the end."""
    begun: tuple[Begun, ...] = ()

    def gpu_seconds_of(self, search: str) -> float:
        """Return the GPU seconds that one search used for this trial."""
        own = (
            self.gpu_seconds - sum(self.earlier_gpu_seconds.values())
            if self.search == search
            else 0.0
        )
        return self.earlier_gpu_seconds.get(search, 0.0) + own

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint, from which the trial resumes; 0 before the first."""
        return max(self.saved_between, self.rungs[-1].step if self.rungs else 0)

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
        """Whether the trial was created for a plan that the user gave."""
        return self.origin == GIVEN

    @property
    def is_control(self) -> bool:
        """Whether the plan is a control, which no searcher proposed.

        A control is a plan that the user gave, or one that users would try instead of a search.
        """
        return self.is_given or is_control(self.origin)

    @property
    def plan_failed(self) -> bool:
        """Whether the plan cannot be trained on these machines; searchers then get a bad score."""
        return self.failure in ("infeasible", "diverged")

    @property
    def infrastructure_failed(self) -> bool:
        """Whether the trial failed because of its infrastructure, and not because of the plan.

        The cause is then the storage, a damaged file or a machine.
        """
        return self.failure in ("storage", "damaged", "machine")

    @property
    def should_retry(self) -> bool:
        """Whether the next session runs the trial again.

        It does if the trial's infrastructure failed, or if the trial hung before any rung.
        """
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
    """The time that a search took, and its number of sessions.

    Each command that runs trials of the search begins a session.
    """

    seconds: float
    sessions: int = 0


class Finalist(Recorded):
    """One of the best trials, or a control, with its scores on fresh rows.

    Fresh rows are rows on which the search scores no trial.
    """

    index: int
    """Number of the trial."""
    control: bool
    """Whether users would try the plan instead of a search."""
    reused: bool
    """Whether another search ran the trial."""
    fits: bool = True
    """Whether the plan is within the budget; a control may exceed it, and is then no winner."""
    fine_tunes: tuple[FineTune, ...]
    """The trial first, then its plan under the seeds of `search.confirm_seeds`.

    Only finalists that cannot be told apart are trained under more seeds. The winner is one of the
    finalists that have most seeds. Two finalists are compared on the seeds that both have.
    """

    @property
    def as_trial(self) -> FineTune:
        """The trial itself, under the training seed of all trials."""
        return self.fine_tunes[0]

    @property
    def origin(self) -> str:
        """Name of the control or searcher; that of a reused trial ends in `of another search`."""
        return self.as_trial.origin

    @property
    def cut(self) -> str:
        """Name of the cut."""
        return self.as_trial.cut

    @property
    def plan(self) -> dict[str, str]:
        """Group -> name of its format."""
        return self.as_trial.plan

    @property
    def plan_bytes(self) -> int:
        """Bytes of the quantized model with its adapter."""
        return self.as_trial.plan_bytes

    @property
    def losses(self) -> dict[int, tuple[float, ...]]:
        """Training seed -> loss of each fresh row, in nats per token."""
        return {
            tuned.seed: tuned.losses[SELECTION].by_row
            for tuned in self.fine_tunes
            if tuned.seed is not None
        }

    @property
    def mean(self) -> Score:
        """The means over the training seeds."""
        scores = [tuned.selection for tuned in self.fine_tunes]
        loss = fmean(score.loss for score in scores)
        if self.as_trial.accuracy is None:
            return Score(loss=loss)
        accuracy = fmean(score.value("accuracy") for score in scores)
        stderr = fmean(score.accuracy_stderr or 0.0 for score in scores)
        return Score(loss=loss, accuracy=accuracy, accuracy_stderr=stderr)


class RungAgreement(Recorded):
    """How a rung orders finished trials, against the last rung.

    The figures are Kendall's tau over pairs of trials, from -1 to 1.
    """

    step: int
    num_trials: int
    within: float | None
    """Tau over pairs of trials of the same cut; null without such a pair."""
    across: float | None
    """Tau over pairs of trials of different cuts; null without such a pair."""


class SearchRecord(Record):
    """The outcome of the search; the records of its trials are in `trials/<trials_digest>/`."""

    trials_digest: str
    searcher: str
    metric: Literal["loss", "accuracy"]
    metrics: dict[str, str] = {}
    """Task -> lm-eval metric; `accuracy` is the mean of these."""
    budget_bytes: int
    steps: int = 0
    """Training steps of a finished trial."""
    num_trials: int
    """Number of trials, except those reused from another search."""
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
    rungs: tuple[RungAgreement, ...] = ()
    """How well each earlier rung predicts the order at the last one, over finished trials, reused
    ones included."""
    finalists: tuple[Finalist, ...]
    best_index: int
    """Number of the winner's trial, which is among the finalists."""
    lost_controls: dict[str, str] = {}
    """Origin of each control in the budget that has no finished trial -> the reason."""
    rival: int | None
    """Index of the finalist that the winner is compared with (see `search.roles.rival_of`); None if
    it is alone."""
    resumed: int
    """Number of trials that an earlier, interrupted command had recorded."""
    sessions: int = 1
    """Number of sessions (see `SearchClock`) until the search ended."""

    @property
    def by_accuracy(self) -> bool:
        """Whether the search minimized errors on its tasks, and not the loss."""
        return self.metric == "accuracy"

    @property
    def winner(self) -> Finalist:
        """The winner, as a trial on fresh rows."""
        return self.finalist(self.best_index)

    @property
    def rival_as_trial(self) -> Finalist | None:
        """The finalist that the winner is compared with; None if it is alone."""
        return None if self.rival is None else self.finalist(self.rival)

    def finalist(self, index: int) -> Finalist:
        """Return the finalist with the number of its trial."""
        return next(each for each in self.finalists if each.index == index)

    @property
    def total_seconds(self) -> float:
        """Seconds of all sessions, the scoring of the finalists included."""
        return max(self.seconds, self.search_seconds)

    @property
    def confirmation_gpu_seconds(self) -> float:
        """GPU seconds spent on finalists: scores on fresh rows, and training under more seeds."""
        return sum(
            tuned.total_gpu_seconds for finalist in self.finalists for tuned in finalist.fine_tunes
        )

    @property
    def total_gpu_seconds(self) -> float:
        """GPU seconds of the trials and of scoring the finalists on fresh rows."""
        return self.gpu_seconds + self.confirmation_gpu_seconds
