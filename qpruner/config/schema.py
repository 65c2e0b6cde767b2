"""The fields of a run's configuration: frozen pydantic models, one a section of the YAML file.

What goes with what is in `qpruner.config.rules`, reading and overriding in `qpruner.config.load`. The docstring of a
field is its text in `docs/configuration.md` and in the JSON schema (`qpruner schema`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from qpruner.config.pruning import CalibrationConfig as CalibrationConfig
from qpruner.config.pruning import DataSource as DataSource
from qpruner.config.pruning import Named, Positive
from qpruner.config.pruning import PruneConfig as PruneConfig
from qpruner.config.section import Section

Bits = Literal[4, 8, 16]
AccuracyMetric = Literal["acc_norm", "acc", "exact_match"]
"""lm-eval's metrics that give one number between 0 and 1 a question, the preferred first."""
HUB_ID = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$")
HubId = Annotated[str, Field(pattern=HUB_ID)]


class ModelConfig(Section):
    """The base model."""

    source: Named
    """Hub id, local folder, `.gguf` file, or `package:NAME/FILE` for a file inside an installed Python package."""
    revision: str | None = None
    """Git revision of a hub model; the default branch when null."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the unquantized weights."""
    device_map: Literal["single", "auto"] = "single"
    """Where the dense model lies while it is pruned: on one device, or spread over all GPUs by accelerate."""
    trust_remote_code: bool = False
    """Run Python code that a hub model brings along. Off unless you trust its author."""


class DataConfig(Section):
    """Training, validation and confirmation rows; test rows are the tasks under `evaluate`."""

    train: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Rows to fine-tune on."""
    validation: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Rows that score a trial."""
    confirmation: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Rows that no trial is scored on: the first, third, ... choose among the best trials, the others judge the
    winner."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """How instruction rows are written: the Alpaca prompt, or the tokenizer's own chat template."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Tokens of a row at most; longer ones lose their ends."""
    response_only: bool = True
    """Count the loss on the response only."""
    packing: bool = False
    """Concatenate rows to full length instead of padding."""


class BudgetConfig(Section):
    """The bytes a plan may take; exactly one of the keys."""

    fraction: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """0 is every group at its lowest bits, 1 every group at its highest."""
    mean_bits: float | None = None
    """Mean bits per grouped weight."""
    gib: Annotated[float, Field(gt=0)] | None = None
    """Gibibytes of the whole model, adapters included."""
    bytes: Positive | None = None
    """Bytes of the whole model, adapters included."""


class QuantizeConfig(Section):
    """Mixed precision."""

    group: Literal["block", "sublayer", "projection"] = "block"
    """What gets one bit-width."""
    bits: Annotated[tuple[Bits, ...], Field(min_length=1)] = (4, 8)
    """Bit-widths a group may take: 4 (NF4), 8 (LLM.int8), 16 (unquantized). With a single one nothing is measured or
    searched, and one trial is run."""
    double_quant: bool = False
    """Quantize the 4-bit scales too."""
    budget: BudgetConfig = BudgetConfig(fraction=0.5)
    """The bytes a plan may take."""


class LoraConfig(Section):
    """The adapters."""

    rank: Positive = 8
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before each adapter."""
    init: Literal["loftq", "plain"] = "loftq"
    """Start from the quantization error (LoftQ), or from zero."""
    loftq_iterations: Positive = 1
    """Alternations of quantization and SVD."""
    svd: Literal["exact", "randomized"] = "randomized"
    """Randomized SVD is many times faster and loses little at these ranks."""


class TrainingConfig(Section):
    """One optimizer setting for trials and the final fine-tune."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate (AdamW, warm-up, cosine)."""
    batch_size: Positive = 64
    """Rows an optimizer step sees."""
    micro_batch_size: Positive = 4
    """Rows a forward pass sees; the rest is gradient accumulation."""
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the steps that warms up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


SensitivityMethod = Literal["mutual_information", "first_order", "fisher", "second_order", "kl", "loss"]
INFORMATION = ("mutual_information",)
EXPANSION = ("first_order", "fisher", "second_order")
MEASUREMENT = ("kl", "loss")
"""Methods by the passes over the rows that they need."""


class SensitivityConfig(Section):
    """How much each group suffers at fewer bits: seeds of the search, and what a searcher expects beforehand."""

    methods: tuple[SensitivityMethod, ...] = get_args(SensitivityMethod)
    """What is measured, each giving a seed plan: mutual information with the prediction (the paper's), gradient times
    quantization error, Fisher-weighted squared error, the sum of these two, and the change of the predictions (KL) or
    of the loss with one group quantized."""
    batch_size: Positive = 4
    """Samples of a pass. Scores do not depend on it, up to rounding; memory grows with it."""
    num_measured_samples: Positive = 32
    """KL and loss: samples, at most. They cost a pass through half the model for every group, bit-width and sample."""
    num_components: Positive = 4
    """Mutual information: leading principal components kept of a group's output."""
    num_neighbors: Positive = 3
    """Mutual information: k of the nearest-neighbour estimator."""
    num_shuffles: Positive = 5
    """Mutual information: shuffled-label baselines that are averaged and subtracted."""
    max_positions: Annotated[int, Field(ge=32)] = 512
    """Mutual information: predicted positions used, at most; drawn from all samples."""


class ResourcesConfig(Section):
    """What Ray reserves for one trial."""

    cpu: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores."""
    gpu: Annotated[float, Field(ge=0)] | None = None
    """A share of a GPU, one, or several that the trial's model is spread over; null takes one where there are GPUs."""


class SearchConfig(Section):
    """The precision search."""

    searcher: Literal["gp", "hyperopt", "bayesopt", "random"] = "gp"
    """gp is a Gaussian process over plans (BoTorch), hyperopt is TPE and bayesopt bayesian-optimization, both through
    Ray's searchers; random is the control."""
    max_trials: Positive = 16
    """The search ends after this many trials, uniform and seed plans included."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """It ends after this many hours of searching, interrupted sessions included; trials in flight finish."""
    max_gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """It ends after its trials have held GPUs for this many hours; trials in flight finish."""
    patience: Positive | None = None
    """It ends after this many proposals in a row whose expected improvement is below the noise of a score. Needs
    `searcher: gp` and no `pareto`."""
    plan: Named | None = None
    """Fine-tune this plan instead of searching: a file (`qpruner plan` prints one), or the name of a sensitivity, whose
    seed plan is taken. Also `--plan`."""
    pareto: bool = False
    """Look for the front of `metric` against bytes instead of the one best plan inside the budget."""
    reuse_trials: bool = True
    """Start from the trials that a search with another budget or searcher left in this run."""
    max_concurrent: Positive | None = None
    """Trials in flight; null takes as many as fit on the machines there are and on those an autoscaler may start."""
    steps: Positive = 16
    """Optimizer steps of a full trial: the last rung."""
    first_rung: Positive = 4
    """Steps before ASHA may stop a trial for the first time."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """ASHA keeps one in this many at each rung."""
    metric: Literal["loss", "accuracy", AccuracyMetric] = "loss"
    """Validation loss, or the mean over `tasks` of a metric that each of them reports; `accuracy` takes a task's
    acc_norm, else acc, else exact_match. The winner is chosen by the same on fresh rows or questions."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks scored at every rung."""
    limit: Positive | None = None
    """Questions a task, at most. Every `metric` but the loss needs it: as many after these choose the winner."""
    confirm: Positive = 3
    """Best trials that are scored again on fresh rows, beside the controls; with `pareto` at least the whole front."""
    resources_per_trial: ResourcesConfig | None = None
    """null takes one GPU where there are GPUs and one CPU core where there are none."""
    trial_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """A trial without progress for this long (no forward pass, nothing loaded) is killed and recorded as hung."""
    retry_out_of_memory: bool = True
    """Repeat a trial that runs out of memory with half the micro-batch and twice the accumulation, down to one row,
    which is the same math; else its plan is infeasible."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps at which a trial is scored: first_rung times powers of the factor, and the last step."""
        rungs, step = [], self.first_rung
        while step < self.steps:
            rungs.append(step)
            step *= self.reduction_factor
        return (*rungs, self.steps)

    @property
    def plan_method(self) -> str | None:
        """The sensitivity whose seed plan is taken; None where `plan` names none."""
        return self.plan if self.plan in get_args(SensitivityMethod) else None

    @property
    def plan_file(self) -> Path | None:
        """The file whose plan is taken; None where `plan` names none."""
        return Path(self.plan) if self.plan and not self.plan_method else None

    @property
    def num_questions(self) -> int | None:
        """Questions of each task that the search looks at: those of the trials and those that choose the winner."""
        return self.limit * 2 if self.by_accuracy and self.limit else self.limit

    @property
    def by_accuracy(self) -> bool:
        """Whether trials are compared by an accuracy, not by the loss."""
        return self.metric != "loss"

    @property
    def named_metric(self) -> str | None:
        """The lm-eval metric that `metric` names; None where each task's preferred one counts."""
        return None if self.metric in ("loss", "accuracy") else self.metric


class FinetuneConfig(Section):
    """The final fine-tune; give steps or epochs."""

    steps: Positive | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows."""
    save_steps: Positive = 50
    """Steps between checkpoints."""
    compare: bool = False
    """After the winner's report give base, pruned, uniform, seed and random plans the same fine-tune, for the final
    table and its claim. `--set finetune.compare=true` adds this to a finished run."""
    num_workers: Positive = 1
    """Workers, each with a GPU or cores of its own, that share every batch of a fine-tune through Ray Train. The losses
    are those of one worker."""
    seeds: Positive = 3
    """With `compare`: training seeds (data order and dropout) of the searched, the best seed and the random plans,
    counted from `seed` + 1. One leaves a claim about one training seed."""
    random_plans: Annotated[int, Field(ge=0)] = 3
    """With `compare`: random plans of equal bytes, each under all `seeds`. The claim needs several."""
    seed_rows: Literal["best", "all"] = "best"
    """With `compare`: which sensitivities' seed plans are rows: the best on fresh rows, under all `seeds`, and mutual
    information's under the first; or every other's under the first, too."""


class EvaluateConfig(Section):
    """The final measurement, on tasks the search never saw."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """lm-eval tasks."""
    include_path: str | None = None
    """A folder of further lm-eval task files (also `package:NAME/FOLDER`); they serve `search.tasks` too."""
    limit: Positive | None = None
    """Questions a task, at most."""
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    """Worked examples before each question."""
    batch_size: Positive = 16
    """Requests a forward pass answers."""
    text: Annotated[tuple[DataSource, ...], Field(min_length=1)] | None = None
    """Held-out text (`format: text`) for the table's perplexity, in windows of `data.max_length` tokens. Null takes the
    responses of the confirmation rows that chose nothing, none if multiple-choice."""


class CardConfig(Section):
    """What `final/README.md`, the final model's card, states; nothing is computed from it."""

    base_model: HubId | None = None
    """Hub id of the base model; null takes `model.source` where that is one."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")] | None = None
    """The hub's identifier of the final model's licence, such as apache-2.0; null takes the base model's."""
    datasets: tuple[HubId, ...] | None = None
    """Hub ids of the training data; null takes those that `data.train` names, `[]` states that there are none."""


class RunConfig(Section):
    """Everything a run needs."""

    output: Named
    """The run folder, or `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`; credentials come from the environment."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds sampling, adapters, data order and the searcher alike."""
    model: ModelConfig
    data: DataConfig
    calibration: CalibrationConfig = CalibrationConfig()
    prune: PruneConfig = PruneConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()
    finetune: FinetuneConfig
    evaluate: EvaluateConfig
    card: CardConfig = CardConfig()
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where every trial and fine-tune is logged beside TensorBoard. Places and keys come from the trackers' own
    environment variables (WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

    @property
    def measured_methods(self) -> tuple[str, ...]:
        """Sensitivities that are measured: none where groups have one bit-width to choose from."""
        return self.sensitivity.methods if len(self.quantize.bits) > 1 else ()

    @property
    def is_searched(self) -> bool:
        """Whether plans are searched: none is given, and there are bit-widths to choose from."""
        return self.search.plan is None and len(self.quantize.bits) > 1

    @property
    def num_trials(self) -> int:
        """Trials that end the search; one where nothing is searched."""
        return self.search.max_trials if self.is_searched else 1

    @property
    def warnings(self) -> tuple[str, ...]:
        """Every key that is set and has no effect beside another, in a sentence each."""
        found = self.ignored()
        for name, section in self:
            for key, reason in section.ignored().items() if isinstance(section, Section) else ():
                found.setdefault(f"{name}.{key}", reason)
        return tuple(f"`{key}` has no effect: {reason}" for key, reason in found.items())

    def is_set(self, key: str) -> bool:
        """Return whether a key of a section, `section.key`, differs from its default."""
        section, name = key.split(".")
        return bool(getattr(self, section).is_set(name))
