"""The record of a fine-tune: a plan, trained under one seed, and its scores."""

from typing import Literal

from qpruner.quantization.formats import Method
from qpruner.runs.records.base import Recorded, StandardError

ScoredRows = Literal["validation", "selection", "confirmation"]
"""What a fine-tune is scored on: the `data.validation` rows, as trials are, or one of the halves of
the `data.confirmation` rows, of which the first selects the winner and the second judges it."""
VALIDATION: ScoredRows = "validation"
SELECTION: ScoredRows = "selection"
CONFIRMATION: ScoredRows = "confirmation"


class Score(Recorded):
    """A loss, in nats per token, and the accuracy on tasks, None in a search without tasks."""

    loss: float
    accuracy: float | None = None
    accuracy_stderr: float | None = None

    def value(self, metric: str) -> float:
        """Return the loss or the accuracy: what the search compares, as reports show it."""
        if metric == "loss":
            return self.loss
        assert self.accuracy is not None, "a search by accuracy measures it wherever it compares"
        return self.accuracy

    def cost(self, metric: str) -> float:
        """Return what the search minimizes: the loss, or one minus the accuracy."""
        return self.loss if metric == "loss" else 1.0 - self.value(metric)


class TaskScore(Recorded):
    """The accuracy on an lm-eval task.

    It has the values of all questions, to compare two models question by question.
    """

    task: str
    metric: str
    """The first of `acc_norm`, `acc` and `exact_match` that the task reports; `METRIC,FILTER` if it
    filters answers."""
    value: float
    stderr: StandardError
    num_questions: int
    correct: tuple[float, ...]
    """1 or 0 for each question by `metric`, in the order of the task."""
    answer_loss: tuple[float, ...] = ()
    """Negative log-likelihood of the right choice for each question, in nats; empty if the task has
    no choices."""


class Inference(Recorded):
    """Memory and speed of a model while it generates one sequence."""

    memory_bytes: int
    prefill_tokens_per_second: tuple[float, ...]
    """One value per turn; in every turn each model is measured once."""
    decode_tokens_per_second: tuple[float, ...]


class InferenceSetting(Recorded):
    """How the values of `Inference` were measured."""

    device: str
    prompt_tokens: int
    new_tokens: int
    memory_counter: str


class RowLosses(Recorded):
    """Losses on rows of text, in nats per token."""

    mean: float
    by_row: tuple[float, ...]
    """Loss of each row, to compare two models row by row."""


class FineTune(Recorded):
    """A plan, trained under one seed, and its scores.

    Every list of a run that compares models has these records: the finalists of the search, the
    winner, the models before any fine-tune, and those that the winner is compared with.
    """

    digest: str
    """Digest of all that the weights depend on: plan, cut, bank, training settings and seed.

    Records with the same digest are of the same fine-tune.
    """
    name: str
    """The row of the final table: `base`, `searched`, `random`, the name of a control, ..."""
    origin: str
    """Source of the plan, such as a searcher and its trial, or a sensitivity."""
    seed: int | None
    """The training seed; None if the model was not fine-tuned."""
    cut: str = "base"
    plan: dict[str, str]
    """Group -> name of its format."""
    plan_bytes: int
    """Bytes of the whole quantized model with any adapter, computed from the plan."""
    mean_bits: float
    num_parameters: int
    bank: str = ""
    """Digest of the inputs of the bank by whose Gram matrices GPTQ rounded the weights; empty
    without GPTQ."""

    method: Method = "adapter"
    """What the fine-tune trains: an adapter beside the weights, or the scales that they store."""
    is_merged: bool = False
    """Says that the unpacked model was fine-tuned, its adapter merged into the weights, and these
    rounded to the plan."""
    learning_rate: float = 0.0
    """The peak learning rate."""
    steps: int = 0
    train_loss: float | None = None
    measured_bytes: int = 0
    """Bytes of the packed tensors of the model with any adapter, as measured."""
    peak_memory_bytes: int = 0
    """Peak memory of the training; 0 without a fine-tune."""
    memory_counter: str = ""
    trained_sha256: str = ""
    """sha256 of the file with what was trained; empty if the training diverged."""
    seconds: float = 0.0
    """Seconds of the training and of the scores right after it; 0 for a trial."""
    gpu_seconds: float = 0.0
    """These seconds times the GPUs that were held for them."""

    scored: str = ""
    """Digest of the rows, questions and text that the scores below are of."""
    scoring_seconds: float = 0.0
    """Seconds of a scoring apart from the training."""
    scoring_gpu_seconds: float = 0.0
    """These seconds times the GPUs that were held for them."""
    losses: dict[ScoredRows, RowLosses] = {}
    tasks: tuple[TaskScore, ...] = ()
    """Scores on tasks: those of `evaluate.tasks` or, of a finalist, those that selected."""
    accuracy: float | None = None
    """Mean over `tasks`."""
    accuracy_stderr: StandardError | None = None
    text_loss: float | None = None
    """Loss on the held-out text, in nats per token; None if there is no such text."""
    inference: Inference | None = None

    @property
    def selection(self) -> Score:
        """The score on the rows and questions that select the winner."""
        return Score(
            loss=self.losses[SELECTION].mean,
            accuracy=self.accuracy,
            accuracy_stderr=self.accuracy_stderr,
        )

    @property
    def total_gpu_seconds(self) -> float:
        """GPU seconds of training and scoring."""
        return self.gpu_seconds + self.scoring_gpu_seconds

    @property
    def confirmation(self) -> RowLosses:
        """The losses on the rows that judge the winner."""
        return self.losses[CONFIRMATION]
