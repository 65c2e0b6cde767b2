"""What the stages leave behind: small JSON records of plain data.

A record vouches for the files of its stage and carries the figures that the report shows. `digest` is the digest of
everything the stage depended on; a stage whose record has the digest it would use now is skipped.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, WithJsonSchema

if TYPE_CHECKING:
    import pandas

RUN_ID = "run.id"
"""The file in a run folder that tells it from another of the same name, and shows that its storage is there."""

StandardError = Annotated[float, WithJsonSchema({"type": ["number", "null"]}, mode="serialization")]
"""NaN over a single question or row, which JSON knows as null."""


class Recorded(BaseModel):
    """Base of what is recorded: plain data that never changes."""

    # A standard error over one question or row is NaN.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants")

    def to_dataframe(self) -> pandas.DataFrame:
        """As a table: a row for each of what the record lists; one row of its figures where it lists nothing."""
        import pandas

        return pandas.DataFrame(self.table_rows())

    def _repr_html_(self) -> str:
        return str(self.to_dataframe()._repr_html_())

    def table_rows(self) -> list[dict[str, Any]]:
        """The rows of `to_dataframe`: a column a field, `FIELD.KEY` of fields that have keys, `bits of GROUP`."""
        fields = self.model_dump()
        plan = fields.pop("plan", {})
        return [flat(fields) | {f"bits of {group}": bits for group, bits in plan.items()}]


class Record(Recorded):
    """Base of every stage's record."""

    digest: str
    seconds: float
    gpu_seconds: float = 0.0
    """Seconds at work times the GPUs that were held for it; 0 where there are none, and in records of old versions."""


class PrepareRecord(Record):
    """The base model as a local or hub checkpoint, and the encoded rows."""

    model_path: str
    converted: bool
    source_bytes: int | None = None
    """Of the .gguf file that the base's weights were expanded from; None where they are as they were given."""
    num_rows: dict[str, int]


class LayerWidths(Recorded):
    """What is kept of one block, as indices into the base model; empty where the whole block went."""

    layer: int
    kept_kv_groups: tuple[int, ...]
    kept_mlp_channels: tuple[int, ...]
    """Where experts are stacked: expert * channels + channel."""
    kept_experts: tuple[int, ...] | None = None
    base_kv_groups: int
    base_mlp_channels: int
    base_experts: int | None = None
    heads_per_group: int
    base_parameters: int
    kept_parameters: int


class PruneRecord(Record):
    """The pruned checkpoint."""

    importance: str
    """Criterion of the units that went: for units of blocks, and for whole blocks where those alone might go."""
    selection: str
    compensation: str
    target: str
    target_rate: float | None
    """Share of all parameters asked for; None when each block's own share was."""
    achieved_rate: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    peak_memory_bytes: int
    """Above the loaded model."""
    memory_counter: str
    dropped_blocks: tuple[int, ...]
    layers: tuple[LayerWidths, ...]
    weights: str = ""
    """Digest of its weight files, which from the same inputs another kind of machine may make otherwise; empty in
    records of older versions."""

    @property
    def achieved(self) -> str:
        """The achieved rate in words."""
        return f"achieved {self.achieved_rate:.2%}"

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a block of the base model."""
        return [row for layer in self.layers for row in layer.table_rows()]


class MethodScores(Recorded):
    """One sensitivity of every group."""

    unit: str
    source: str
    """What was computed, in words."""
    values: dict[int, tuple[float, ...]]
    """Bits -> predicted rise over the unquantized pruned model, a group; 0 at 16 bits."""
    seconds: float
    """Of the passes; those that several methods share are counted by each of them."""
    details: dict[str, Any]
    """Figures of the method's own: samples and positions, standard errors, what was subtracted."""

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a group, in the order of `SensitivityRecord.groups`."""
        names = [f"at {bits} bits" for bits in self.values]
        return [dict(zip(names, of_group, strict=True)) for of_group in zip(*self.values.values(), strict=True)]


class SensitivityRecord(Record):
    """How much each group suffers at fewer bits, by every method asked for. The byte budget is not among the inputs."""

    groups: tuple[str, ...]
    methods: dict[str, MethodScores]

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a group, with every method's scores of it."""
        rows: list[dict[str, Any]] = [{"group": group} for group in self.groups]
        for name, method in self.methods.items():
            for row, scores in zip(rows, method.table_rows(), strict=True):
                row |= {f"{name} {column}": value for column, value in scores.items()}
        return rows


class BankRecord(Record):
    """Packed weights and adapter starts for every (group, bits)."""

    files: dict[str, str]
    """File name -> sha256."""
    bytes: int
    residual_ratio: dict[str, dict[str, float]]
    """bits -> group -> Frobenius norm of W - Q - BA over that of W - Q."""
    group_bytes: dict[str, dict[str, int]] = {}
    """bits -> group -> bytes of its packed weights, for all levels of the search."""

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a group."""
        rows: dict[str, dict[str, Any]] = {}
        for told in ("group_bytes", "residual_ratio"):
            for bits, by_group in getattr(self, told).items():
                for group, value in by_group.items():
                    rows.setdefault(group, {"group": group})[f"{told} at {bits} bits"] = value
        return list(rows.values())


def plan_group_bytes(group_bytes: dict[str, dict[str, int]], plan: dict[str, int]) -> int:
    """What a plan's groups take of `BankRecord.group_bytes`, without what is in no group."""
    return sum(group_bytes[f"{bits}"][group] for group, bits in plan.items())


class RungResult(Recorded):
    """A trial's score at one rung."""

    step: int
    loss: float
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    train_loss: float | None = None
    train_losses: tuple[float, ...] = ()
    """Of every step since the rung before."""


GIVEN = "given"
"""Origin of the plan that is taken instead of a search."""


class Begun(Recorded):
    """A worker process's start on a trial."""

    search: str
    """Digest of the search that it was for."""
    session: int
    """Which of that search's sessions, from 1."""
    time: float
    """Unix seconds."""
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
    """Of a failed trial: out of memory, a loss out of bounds, no progress, worker processes that died, storage that
    was full or away, a file that could not be read, a machine on which one trial after the other failed, anything
    else. Storage, damage and machine are tried again."""
    seconds: float = 0.0
    """Of all sessions, up to the last rung."""
    gpu_seconds: float = 0.0
    """The same times the GPUs it held."""
    earlier_gpu_seconds: dict[str, float] = {}
    """Of these, what searches held that had the trial before another took it over, by their digests."""
    peak_memory_bytes: int | None = None
    """Above what its worker process held when it started."""
    memory_counter: str | None = None
    checkpoint: dict[str, str] = {}
    """Of the last rung: file name -> sha256."""
    worker: str | None = None
    """Of all processes that worked on it the latest: one that was taken for dead and is not must write nothing more."""
    node: str | None = None
    """The machine that process is on, by its name for people."""
    micro_batch_size: int | None = None
    """Rows a forward pass saw, where want of memory forced it below `training.micro_batch_size`."""
    kills: int = 0
    """Times since its last rung that its worker process died, except for want of memory."""
    memory_kills: int = 0
    """Times since its last rung that it was killed for want of memory, except where fewer rows at once were the
    answer."""
    times: tuple[float, ...] = ()
    """Unix seconds: when it began (until then, when its plan was handed out), when each rung was recorded and, once it
    is over, when it ended."""
    begun: tuple[Begun, ...] = ()
    """Every start of a worker on it, in order: it may be interrupted and lose workers; empty in records of older
    versions."""

    def table_rows(self) -> list[dict[str, Any]]:
        """One row, with `loss at STEP` (and accuracy) for each rung."""
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
        """What the trial held GPUs for under one search."""
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
        """Whether it failed for want of something that says nothing of the plan."""
        return self.failure in ("storage", "damaged", "machine")

    @property
    def should_retry(self) -> bool:
        """Whether a search that goes on has it once more: so has what hung before its first rung, where its files were
        what it waited for, or its machine."""
        return self.infrastructure_failed or (self.failure == "hung" and not self.rungs)


class TrialPulse(Recorded):
    """What a trial's worker tells while it works, at most once a second and only when something moved."""

    node: str
    """Ray's id of the machine."""
    pid: int
    step: int
    """The last optimizer step."""
    beats: int
    """Forward passes so far."""
    peak_memory_bytes: int
    seconds: float = 0.0
    """Of the trial, all sessions together: what it has taken by now, its last rung or not."""
    gpu_seconds: float = 0.0
    kernel_kills: int | None = None
    """Processes that the machine's kernel had killed for want of memory by then."""


class SearchClock(Recorded):
    """Seconds a search has taken, all its sessions together, and how many there were."""

    seconds: float
    sessions: int = 0


class FreshScore(Recorded):
    """A finished trial on what no trial was scored on: confirmation rows and, for accuracy, further questions."""

    loss: float
    """The selection loss: on the half of the confirmation rows that chooses, in nats per token."""
    stderr: StandardError
    """Of the loss, over these rows."""
    accuracy: float | None = None
    accuracy_stderr: float | None = None


class FinalistScore(FreshScore):
    """The same with what its rows say, so that two finalists can be paired by row."""

    losses: tuple[float, ...] = ()
    """As `CandidateRecord.confirmation_losses`, of the half that chooses. Empty in records of older versions."""


class KeptScore(FinalistScore):
    """The same as a trial's folder keeps it, for commands to come."""

    digest: str
    """Of the weights and of what they were scored by."""
    gpu_seconds: float
    """Seconds that the scoring held GPUs, times how many."""


class Confirmation(FinalistScore):
    """A finalist: one of the best trials, or a control."""

    index: int
    origin: str
    """A control's name, else the searcher that proposed it; with `of another search` where that was another."""
    control: bool
    """Whether the plan is a control of this search."""
    reused: bool
    """Whether a search with another budget, searcher or plan ran it."""


class FrontPoint(FreshScore):
    """A plan that no confirmed plan of this few bytes beats."""

    index: int
    origin: str
    plan: dict[str, int]
    plan_bytes: int


class SearchRecord(Record):
    """The outcome of the search; the trials' own records lie under `trials/<trials_digest>/`."""

    trials_digest: str
    searcher: str
    metric: Literal["loss", "accuracy"]
    """What was searched, and what chose among the confirmations."""
    metrics: dict[str, str] = {}
    """Task -> lm-eval's metric that `accuracy` is a mean of."""
    budget_bytes: int
    num_trials: int
    """Of this search; those reused from another are not among them."""
    num_finished: int
    num_stopped: int
    num_failed: int
    failures: dict[str, int] = {}
    """Failed trials by kind, as in `TrialRecord.failure`."""
    num_reused: int
    """Trials that searches with another budget, searcher or plan had left and this one started from."""
    ended: str
    """Why there were no more trials."""
    search_seconds: float
    """Wall-clock seconds of the trials' part, all sessions together."""
    gpu_seconds: float
    """Seconds that trials held GPUs, times how many."""
    confirmation_gpu_seconds: float = 0.0
    """The same of the finalists' scores on fresh rows, whichever command made them."""
    confirmations: tuple[Confirmation, ...]
    best_index: int
    best_origin: str
    best_plan: dict[str, int]
    best_control: int | None
    """The control that was best on fresh rows; None where none finished."""
    control_won: bool
    """No searched plan beat the best control on fresh rows, so that control is returned."""
    front: tuple[FrontPoint, ...]
    """With `search.pareto`, by bytes: the plans that none of fewer or equal bytes beats on fresh rows; else empty."""
    hypervolume: float | None = None
    """With `search.pareto`: how much better than the smallest plan of the front its best inside a budget is on fresh
    rows, in the unit of the metric, in the mean over all budgets from that plan's bytes to `budget_bytes`."""
    resumed: int
    """Trials that an earlier, interrupted run had already recorded."""
    sessions: int = 1
    """Times that the command was started until the search was over."""

    @property
    def total_seconds(self) -> float:
        """What the search took, all sessions together, with the finalists that the last one scored on fresh rows."""
        return max(self.seconds, self.search_seconds)

    @property
    def total_gpu_seconds(self) -> float:
        """What it held GPUs for: its trials, and the finalists on fresh rows."""
        return self.gpu_seconds + self.confirmation_gpu_seconds

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a finalist."""
        return [row for each in self.confirmations for row in each.table_rows()]


class CandidateRecord(Record):
    """One row of the final table under one training seed, fine-tuned."""

    name: str
    origin: str
    """Where the plan came from: a searcher and its trial, a sensitivity, ..."""
    seed: int
    """Of data order and dropout."""
    plan: dict[str, int]
    plan_bytes: int
    """By the formula."""
    measured_bytes: int
    """Of the packed tensors."""
    mean_bits: float
    num_parameters: int
    steps: int
    train_loss: float
    validation_loss: float
    confirmation_loss: float
    """On the half of the confirmation rows that chose nothing, in nats per token."""
    confirmation_losses: tuple[float, ...] = ()
    """What each of these rows says of it, so that two models can be paired by row: no losses of rows, but values whose
    mean is the loss and whose spread its standard error, although rows have more and fewer tokens; they may lie below
    zero. Empty in records of older versions."""
    peak_memory_bytes: int
    memory_counter: str
    adapter_sha256: str = ""
    """Of its weights; empty in records of older versions."""


class FinetuneRecord(Record):
    """The winner's fine-tune, whose adapter the final model has."""

    winner: str
    candidates: tuple[CandidateRecord, ...]

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a fine-tune."""
        return [row for each in self.candidates for row in each.table_rows()]


class MetricScore(Recorded):
    """A metric of an lm-eval task."""

    value: float
    """As lm-eval aggregates it."""
    stderr: StandardError
    """Of the mean over questions; null where the metric is no such mean, too."""


class TaskScore(Recorded):
    """An lm-eval accuracy. Per-question values are kept, in the task's order, so that rows can be paired."""

    task: str
    metric: str
    """The one that tables and claims use: `acc_norm` where the task reports it, then `acc`, then `exact_match`; in a
    trial the one that `search.metric` names."""
    value: float
    stderr: StandardError
    num_questions: int
    correct: tuple[float, ...]
    """1 or 0 a question, by `metric`."""
    metrics: dict[str, MetricScore] = {}
    """Every metric that the task reports, by lm-eval's names (`METRIC,FILTER` where the task filters answers)."""
    answer_loss: tuple[float, ...] = ()
    """Negative log-likelihood of the right choice in nats, a question (its tokens added up, no mean); empty where the
    task has no choices."""

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a question."""
        columns = {"correct": self.correct} | ({"answer_loss": self.answer_loss} if self.answer_loss else {})
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class Inference(Recorded):
    """What a row's model takes to use, its adapter on, in a generation of one sequence."""

    memory_bytes: int
    """At the highest point."""
    prefill_tokens_per_second: tuple[float, ...]
    """In each turn; the rows took turns."""
    decode_tokens_per_second: tuple[float, ...]


class InferenceSetting(Recorded):
    """How `Inference` was measured."""

    device: str
    prompt_tokens: int
    new_tokens: int
    memory_counter: str


class RowScores(Recorded):
    """One row on the held-out tasks, under one training seed; without a seed as it is before any fine-tune: quantized
    layers with the adapter start that makes up for a part of the error."""

    digest: str
    name: str
    seed: int | None
    scores: tuple[TaskScore, ...]
    text_loss: float | None = None
    """On the held-out text, in nats per token; None without such a text."""
    inference: Inference | None = None
    """Of fine-tuned rows."""
    gpu_seconds: float = 0.0
    """Seconds that the scoring held GPUs, times how many."""

    def table_rows(self) -> list[dict[str, Any]]:
        """One row, with every metric of each task and its standard error."""
        [row] = super().table_rows()
        del row["scores"]
        for score in self.scores:
            used = {score.metric: MetricScore(value=score.value, stderr=score.stderr)}
            for name, each in (used | score.metrics).items():
                row |= {f"{score.task} {name}": each.value, f"{score.task} {name}_stderr": each.stderr}
        return [row]


class EvalRecord(Record):
    """Accuracies on the held-out tasks: base, pruned and quantized before any fine-tune, and the fine-tuned winner."""

    rows: tuple[RowScores, ...]
    text: str | None = None
    """Which held-out text `RowScores.text_loss` is on."""
    inference: InferenceSetting | None = None
    tested: str = ""
    """Digest of the questions and of how they are asked; empty in records of older versions."""

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the metric that tables and claims use."""
        return {score.task: score.metric for score in self.rows[-1].scores}

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a model and training seed that was scored."""
        return [row for each in self.rows for row in each.table_rows()]


class ComparisonRecord(Record):
    """Every row of the final table after the same fine-tune, the winner's own too, by row and then by training seed."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    candidates: tuple[CandidateRecord, ...]
    rows: tuple[RowScores, ...]
    """Their scores on the held-out tasks, in the same order."""
    inference: InferenceSetting
    """Of all rows, which took turns: the winner's figures stand beside those measured in the same minutes."""

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a fine-tune, with its scores."""
        pairs = zip(self.candidates, self.rows, strict=True)
        return [scores.table_rows()[0] | tuned.table_rows()[0] for tuned, scores in pairs]


class StageState(Recorded):
    """Where a stage of the latest command stands."""

    state: Literal["running", "done", "recorded"]
    """`recorded`: there was nothing to do."""
    started: float
    """Unix seconds."""
    seconds: float | None = None
    """It took, or had taken when it was recorded; None while it runs."""
    done: int | None = None
    total: int | None = None
    """Steps of its own, where it tells them."""
    text: str = ""
    """What it is about to do, what its present steps are, or what came out."""


class SearchState(Recorded):
    """What the latest command's search is about."""

    trials_digest: str
    search: str
    """Of its own trials; see `TrialRecord.search`."""
    beside: str | None = None
    """Where a plan was given: of the search that the configuration asks for without it, which that plan is shown
    beside."""
    metric: Literal["loss", "accuracy"]
    metrics: dict[str, str] = {}
    """Task -> lm-eval's metric that `accuracy` is a mean of."""
    pareto: bool = False
    """Whether the front of metric against bytes is searched."""
    budget_bytes: int
    max_trials: int
    steps: int
    slots: int | None = None
    """Trials at once; None where no trial had to run."""


class RunState(Recorded):
    """`run.json`: what the latest command on a run folder is doing or did, for who looks at it from elsewhere."""

    config: dict[str, Any]
    until: str
    """The last stage it was asked for."""
    command: str
    """As the shell had it."""
    folder: str
    """Where it was started."""
    environment: dict[str, str]
    """Versions of Python and packages, and the machine it was started on."""
    host: str
    pid: int
    started: float
    """Unix seconds."""
    updated: float
    """The last sign of life, in Unix seconds."""
    outcome: Literal["running", "done", "failed", "interrupted"]
    error: str | None = None
    resumed: int = 0
    """Earlier commands on the folder that did not come to their end."""
    stages: dict[str, StageState] = {}
    search: SearchState | None = None

    @property
    def asked_stages(self) -> list[str]:
        """The stages that were asked for, in the order of the flow."""
        names = [*Results.model_fields, "report"]  # which leaves no record
        asked = names[: names.index(self.until) + 1]
        return [name for name in asked if name != "comparison" or self.compares]

    @property
    def compares(self) -> bool:
        """Whether a comparison is asked for (`finetune.compare`)."""
        return bool(self.config.get("finetune", {}).get("compare"))


MARK = "qpruner_export.json"
"""Name of an `ExportRecord` in the export's folder."""


class ExportRecord(Recorded):
    """Which final model an export was made of."""

    final: dict[str, str]
    """sha256 of what differs between final models, by file name: the adapter, and the configuration with the plan."""


class Results(Recorded):
    """Every record of a run in the order of the flow; None for stages that have not run.

    `pipeline/flow.py` has the stages: a field is named as its stage.
    """

    prepare: PrepareRecord | None = None
    prune: PruneRecord | None = None
    bank: BankRecord | None = None
    sensitivity: SensitivityRecord | None = None
    search: SearchRecord | None = None
    finetune: FinetuneRecord | None = None
    evaluate: EvalRecord | None = None
    comparison: ComparisonRecord | None = None

    @property
    def candidates(self) -> tuple[CandidateRecord, ...]:
        """The fine-tunes of the final table: every row's, or without a comparison the winner's."""
        record = self.comparison or self.finetune
        return record.candidates if record else ()

    @property
    def scores(self) -> tuple[RowScores, ...]:
        """The models as they are before any fine-tune, then the `candidates`, on the held-out tasks."""
        rows = self.evaluate.rows if self.evaluate else ()
        if self.comparison is None:
            return rows
        return (*(row for row in rows if row.seed is None), *self.comparison.rows)

    @property
    def inference(self) -> InferenceSetting | None:
        """How memory and speed of the `candidates` were measured."""
        record = self.comparison or self.evaluate
        return record.inference if record else None

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage took that has run."""
        taken = {name: record.seconds for name, record in self if record}
        return taken | ({"search": self.search.total_seconds} if self.search else {})

    @property
    def gpu_seconds(self) -> dict[str, float]:
        """What each stage held GPUs for that has run."""
        held = {name: record.gpu_seconds for name, record in self if record}
        return held | ({"search": self.search.total_gpu_seconds} if self.search else {})

    def table_rows(self) -> list[dict[str, Any]]:
        """A row a stage that has run: what it took."""
        return [
            {"stage": name, "seconds": seconds, "gpu_seconds": self.gpu_seconds[name]}
            for name, seconds in self.seconds.items()
        ]


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`field.key` -> value, however deep."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def digest_of(*parts: Any) -> str:
    """A sha256 over canonical JSON; the first 16 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} cannot be part of a digest")
