"""The fields of a run's configuration: a frozen pydantic model for each section of the YAML file.

Rules between keys are in `qpruner.config.rules`, loading and overrides in `qpruner.config.load`.
The docstring of a field is its text in `docs/configuration.md` and in the JSON schema (`qpruner
schema`).
"""

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from qpruner.config.pruning import CalibrationConfig as CalibrationConfig
from qpruner.config.pruning import DataSource as DataSource
from qpruner.config.pruning import Named, OneOrMore, Positive, Share
from qpruner.config.pruning import PruneConfig as PruneConfig
from qpruner.config.section import Section
from qpruner.quantization.formats import ALIASES, DENSE, Method, by_size, format_of

Bits = Literal[4, 8, 16]
AccuracyMetric = Literal["acc_norm", "acc", "exact_match"]
"""Metrics of lm-eval that give each question a number between 0 and 1, in order of preference."""
HUB_ID = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?$")
HubId = Annotated[str, Field(pattern=HUB_ID)]
LICENSE_ID = r"^[a-z0-9][a-z0-9.+-]*$"


class ModelConfig(Section):
    """The base model."""

    source: Named
    """Hub id, local folder, `.gguf` file, or `package:NAME/FILE` for a file inside an installed
    Python package."""
    revision: str | None = None
    """Git revision of a hub model; the default branch when null."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the unquantized weights."""
    device_map: Literal["single", "auto"] = "single"
    """Where the dense model is placed for pruning: on one device, or spread over all GPUs by
    accelerate."""
    trust_remote_code: bool = False
    """Run Python code from the repository of a hub model; only for authors whom you trust."""


class DataConfig(Section):
    """Rows to train on, to score trials, and to choose and judge the winner."""

    train: OneOrMore[DataSource]
    """Rows to fine-tune on."""
    validation: OneOrMore[DataSource]
    """Rows on which trials are scored."""
    confirmation: OneOrMore[DataSource]
    """Rows on which no trial is scored: odd ones choose among the best trials, even ones judge the
    winner."""
    template: Literal["alpaca", "alpaca_short", "chat"] = "alpaca"
    """How instruction rows are written: the Alpaca prompt, without its preamble, or the tokenizer's
    chat template."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Maximum tokens of a row; the end of a longer row is cut off."""
    response_only: bool = True
    """Compute the loss on the response only."""
    packing: bool = False
    """Join rows to samples of `max_length` tokens instead of padding them."""


class BudgetConfig(Section):
    """The size that a plan may have, and the multiply-adds.

    Exactly one of the first four keys gives the size.
    """

    fraction: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """0: the size with every group in its smallest format; 1: in its largest; linear between."""
    mean_bits: float | None = None
    """Mean bits per weight without scales, over the weights of all groups."""
    gib: PositiveFloat | None = None
    """Gibibytes of the whole model, adapters included."""
    bytes: Positive | None = None
    """Bytes of the whole model, adapters included."""
    flops_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Beside the size: most multiply-adds per token, as a share of the base model's. Only pruning
    lowers them: cuts above it are not searched, and their plans cannot win."""

    @property
    def sizes(self) -> dict[str, float]:
        """The keys that give the size, and their values."""
        return self.model_dump(exclude={"flops_fraction"}, exclude_none=True)

    @property
    def size(self) -> tuple[str, float]:
        """The key that gives the size, and its value."""
        ((key, value),) = self.sizes.items()
        return key, value


class TuningConfig(Section):
    """How gradients change the codes of a block, for `quantize.rounding: tuned`."""

    iterations: Positive = 60
    """Optimizer steps a block, each on 8 training rows."""
    rows: Positive = 240
    """Training rows, of which the first 128 tokens are taken; fewer if there are fewer."""
    rate: PositiveFloat = 0.02
    """Learning rate of Adam, in units of a group's scale; it falls to 0."""


class QuantizeConfig(Section):
    """Mixed-precision quantization."""

    group: Literal["block", "sublayer", "projection"] = "block"
    """The part of the model that gets one format."""
    formats: OneOrMore[Named] | None = None
    """Formats to choose from, see [formats](formats.md). A group gets those that all its layers
    take. With a single one for all groups, nothing is measured; with one cut too, one trial is run.
    Null takes nf4 and int8."""
    bits: OneOrMore[Bits] | None = None
    """Short for `formats`: 4 is nf4, 8 is int8, 16 is bf16 (not packed)."""
    double_quant: bool = False
    """Take nf4_double, with quantized scales, in place of nf4."""
    embeddings: OneOrMore[Named] = (DENSE,)
    """Formats for the token embeddings and for the head (one group if they are tied); bf16 leaves
    them unpacked."""
    rounding: Literal["nearest", "gptq", "tuned"] = "nearest"
    """Round weights to the nearest code, or so that the layer's outputs on the calibration rows
    change least (GPTQ). LoftQ then counts errors of outputs too. nf4, k-quants, 8 bits and untied
    embeddings always round to nearest. tuned is GPTQ in trials; before each final fine-tune
    gradients change the codes of one block after the other, see [formats](formats.md#rounding)."""
    tuning: TuningConfig = TuningConfig()
    """How `rounding: tuned` changes the codes of a block."""
    budget: BudgetConfig = BudgetConfig(fraction=0.5)
    """The size that a plan may have."""

    @property
    def uses_grams(self) -> bool:
        """Whether GPTQ rounds weights, by Gram matrices of the layers' inputs."""
        return self.rounding != "nearest"

    @property
    def named(self) -> tuple[str, ...]:
        """The formats for groups of decoder layers as the file names them."""
        return self.formats or tuple(ALIASES[bits] for bits in self.bits or (4, 8))

    @property
    def levels(self) -> tuple[str, ...]:
        """The formats to choose from for groups of decoder layers, smallest first."""
        doubled = (format_of(name).doubled or name for name in self.named)
        return by_size(tuple(dict.fromkeys(doubled)) if self.double_quant else self.named)

    @property
    def embedding_levels(self) -> tuple[str, ...]:
        """The formats to choose from for embeddings and head, smallest first."""
        return by_size(self.embeddings)

    @property
    def has_choice(self) -> bool:
        """Whether plans can differ."""
        return len(self.levels) > 1 or len(self.embeddings) > 1


class LoraConfig(Section):
    """The LoRA adapters."""

    rank: Positive = 8
    """Rank of each adapter."""
    alpha: PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: Share = 0.0
    """Dropout before each adapter."""
    init: Literal["loftq", "plain"] = "loftq"
    """Start adapters from the quantization error (LoftQ), or from zero."""
    loftq_iterations: Positive = 1
    """How often LoftQ alternates quantization and SVD."""
    svd: Literal["exact", "randomized"] = "randomized"
    """Randomized SVD is many times faster and loses little at these ranks."""


class LearningRates(Section):
    """A learning rate for each method of training."""

    adapter: PositiveFloat
    """Learning rate of plans that get an adapter."""
    scales: PositiveFloat
    """Learning rate of plans whose scales are trained."""


class TrainingConfig(Section):
    """Optimizer settings for trials and the final fine-tune."""

    method: Method = "adapter"
    """adapter trains LoRA matrices beside the packed weights. scales trains the scales that the
    packed weights store, so that the result is one plain file. It needs formats of llama.cpp's
    simple kinds (q4_0, ...) or of `w`; models that are not packed get an adapter."""
    learning_rate: PositiveFloat | LearningRates | Literal["auto"] = 1e-4
    """Peak learning rate (AdamW, warm-up, cosine): a number, or one for each method as `{adapter:
    0.001, scales: 0.002}`. auto tries three for each method before the search, see [the
    search](search.md#the-learning-rate)."""
    batch_size: Positive = 64
    """Rows per optimizer step."""
    micro_batch_size: Positive = 4
    """Rows per forward pass; gradients are accumulated over the batch."""
    warmup_ratio: Share = 0.05
    """Share of the steps in which the learning rate warms up."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit is AdamW of bitsandbytes, which keeps its two averages in 8 bits: a quarter of
    their memory. It is for `method: scales` with a large model."""

    @property
    def moment_bytes(self) -> int:
        """Bytes of the optimizer's two averages for each trained value."""
        return 8 if self.optimizer == "adamw" else 2

    def of(self, method: Method) -> "TrainingConfig":
        """Return the settings with the learning rate of a method alone."""
        return self.model_copy(update={"learning_rate": self.rate_of(method)})

    def rate_of(self, method: Method) -> float:
        """Return the learning rate of a method; `auto` has been replaced by then."""
        rate = self.learning_rate
        assert rate != "auto", "the pilot stage chooses"
        if isinstance(rate, LearningRates):
            return rate.adapter if method == "adapter" else rate.scales
        return rate


SensitivityMethod = Literal[
    "mutual_information", "first_order", "fisher", "second_order", "kl", "loss"
]
MUTUAL_INFORMATION: SensitivityMethod = "mutual_information"
INFORMATION = (MUTUAL_INFORMATION,)
EXPANSION = ("first_order", "fisher", "second_order")
MEASUREMENT = ("kl", "loss")
"""The constants above group the sensitivity methods by the passes over the rows that they need."""


class SensitivityConfig(Section):
    """Score how much each group suffers in a smaller format.

    The scores give the controls and the searcher's prior.
    """

    methods: tuple[SensitivityMethod, ...] = get_args(SensitivityMethod)
    """Methods to measure, on the least pruned cut; see [the
    search](search.md#before-the-first-trial)."""
    batch_size: Positive = 4
    """Samples per pass. Scores do not depend on it, except for rounding; memory grows with it."""
    num_measured_samples: Positive = 32
    """KL and loss: maximum samples. Each costs half a forward pass for every group and format."""
    num_components: Positive = 4
    """Mutual information: number of principal components to keep of the output of a group."""
    num_neighbors: Positive = 3
    """Mutual information: k of the nearest-neighbour estimator."""
    num_shuffles: Positive = 5
    """Mutual information: number of baselines with shuffled labels, whose mean is subtracted."""
    max_positions: Annotated[int, Field(ge=32)] = 512
    """Mutual information: maximum predicted positions, drawn from all samples."""


class ResourcesConfig(Section):
    """Resources that Ray reserves for one trial."""

    cpu: PositiveFloat = 1.0
    """CPU cores."""
    gpu: NonNegativeFloat | None = None
    """A share of a GPU, one GPU, or several over which the model is spread; null takes one if there
    are GPUs."""


class SearchConfig(Section):
    """The search for the best plan."""

    searcher: Literal["gp", "hyperopt", "bayesopt", "random"] = "gp"
    """gp is a Gaussian process over plans (BoTorch). hyperopt (TPE) and bayesopt
    (bayesian-optimization) run through Ray's searchers. random is the control."""
    max_trials: Positive = 16
    """The search ends after this many trials, controls included."""
    max_hours: PositiveFloat | None = None
    """The search ends after this many hours, interrupted sessions included; running
    trials finish."""
    max_gpu_hours: PositiveFloat | None = None
    """The search ends after its trials have held GPUs for this many hours; running
    trials finish."""
    plan: Named | None = None
    """Fine-tune this plan instead of searching: a file (`qpruner plan` prints one), or a method of
    `sensitivity.methods` for its seed plan. `--plan` sets it too."""
    max_concurrent: Positive | None = None
    """Maximum trials, fine-tunes or other jobs at once; null: as many as fit on the cluster,
    including machines that an autoscaler may start."""
    steps: Positive = 16
    """Optimizer steps of a full trial; the last rung."""
    first_rung: Positive = 4
    """Steps before ASHA may stop a trial for the first time."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """ASHA keeps one in this many trials at each rung."""
    metric: Literal["loss", "accuracy", AccuracyMetric] = "loss"
    """Validation loss, or the mean over `tasks` of a metric that each task reports; `accuracy`
    takes a task's acc_norm, else acc, else exact_match. The same metric on fresh rows or questions
    chooses the winner."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks scored at every rung."""
    limit: Positive | None = None
    """Maximum questions per task. Needed unless `metric` is loss: as many further questions choose
    the winner."""
    confirm: Positive = 3
    """Number of best trials to score on fresh rows, beside the controls."""
    confirm_seeds: NonNegativeInt = 1
    """Further training seeds for the finalists that cannot be told apart from the best on fresh
    rows: each is trained again, and the lowest mean over all its seeds wins."""
    resources_per_trial: ResourcesConfig | None = None
    """null takes one GPU if there are GPUs, else one CPU core."""
    trial_timeout_seconds: PositiveFloat = 1800.0
    """A trial without progress for this long (no forward pass, nothing loaded) is killed and
    recorded as hung."""
    retry_out_of_memory: bool = True
    """Repeat a trial that runs out of memory with smaller micro-batches, then on another GPU,
    before its plan counts as infeasible. With `false` the other GPU is tried at once."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Return the steps at which trials are scored.

        These are `first_rung` times powers of `reduction_factor`, and the last step.
        """
        rungs = []
        step = self.first_rung
        while step < self.steps:
            rungs.append(step)
            step *= self.reduction_factor
        return (*rungs, self.steps)

    @property
    def plan_method(self) -> str | None:
        """Return the sensitivity method that gives the plan; None if `plan` names no method."""
        return self.plan if self.plan in get_args(SensitivityMethod) else None

    @property
    def plan_file(self) -> Path | None:
        """The file with the plan to use; None if `plan` names no file."""
        return Path(self.plan) if self.plan and not self.plan_method else None

    @property
    def num_questions(self) -> int | None:
        """Questions per task that the search uses, to score trials and to choose the winner."""
        return self.limit * 2 if self.by_accuracy and self.limit else self.limit

    @property
    def by_accuracy(self) -> bool:
        """Whether trials are compared by accuracy instead of loss."""
        return self.metric != "loss"

    @property
    def named_metric(self) -> str | None:
        """Return the lm-eval metric that `metric` names.

        It is None for the loss, and for `accuracy`, which depends on the task.
        """
        return None if self.metric in ("loss", "accuracy") else self.metric


class FinetuneConfig(Section):
    """The final fine-tune; give steps or epochs."""

    steps: Positive | None = None
    """Optimizer steps."""
    epochs: PositiveFloat | None = None
    """Passes over the training rows."""
    compare: bool = False
    """After the report on the winner, give base, pruned model, random plans and controls that did
    not lose as trials the same fine-tune, for the final table and its claim. If formats of
    llama.cpp are offered, the fine-tuned base is also merged with its adapter and rounded. `--set
    finetune.compare=true` adds this to a finished run."""
    num_workers: Positive = 1
    """Workers with a GPU or cores each that share every batch through Ray Train; losses are as with
    one worker."""
    seeds: Positive = 3
    """With `compare`: training seeds (data order and dropout) for the winner, its rival, the random
    plans and the merged model, counted from `seed` + 1. With one, the claim holds for one training
    seed only."""
    random_plans: NonNegativeInt = 3
    """With `compare`: number of random plans of equal bytes, each under all `seeds`. The claim
    needs several."""


class EvaluateConfig(Section):
    """The final measurement, on tasks that the search has not seen."""

    tasks: OneOrMore[str]
    """lm-eval tasks."""
    include_path: str | None = None
    """A folder with further lm-eval task files (also `package:NAME/FOLDER`), for `search.tasks`
    too."""
    limit: Positive | None = None
    """Maximum questions per task."""
    num_fewshot: NonNegativeInt = 0
    """Worked examples before each question."""
    batch_size: Positive = 16
    """Requests per forward pass."""
    text: OneOrMore[DataSource] | None = None
    """Held-out text (`format: text`) for the table's perplexity, in windows of `data.max_length`
    tokens. Null takes the responses of the confirmation rows that judge the winner; none if they
    are multiple-choice."""


class ServeConfig(Section):
    """Files of the final model for other servers."""

    to: tuple[Literal["gguf", "gguf_merged", "vllm", "vllm_merged"], ...] = ()
    """Forms to write to `serve/` in the run folder, as `qpruner export` does: gguf for llama.cpp
    and Ollama, timed there instead of in transformers, vllm for vLLM; with the adapter in its own
    file or merged. `--set serve.to=[gguf]` adds this to a finished run."""
    threads: Positive | None = None
    """CPU threads of every measured row; null takes the cores of a trial
    (`search.resources_per_trial`)."""

    @property
    def uses_llama_cpp(self) -> bool:
        """Return True if a form is for llama.cpp."""
        return any(form.startswith("gguf") for form in self.to)

    @property
    def how(self) -> str:
        """Say what is measured of the forms, to follow their list."""
        if not self.uses_llama_cpp:
            return ""
        return "; those for llama.cpp are measured beside the base model, on the CPU"


class CardConfig(Section):
    """Facts for the card of the final model, `final/README.md`; nothing is computed from them."""

    base_model: HubId | None = None
    """Hub id of the base model; null takes `model.source` if it is a hub id."""
    license: Annotated[str, Field(pattern=LICENSE_ID)] | None = None
    """The hub's identifier of the final model's licence, such as apache-2.0; null takes the base
    model's."""
    datasets: tuple[HubId, ...] | None = None
    """Hub ids of the training data; null takes the hub ids in `data.train`, `[]` states that there
    are none."""


class RunConfig(Section):
    """The configuration of a run."""

    output: Named
    """The run folder, or `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`; credentials come from the
    environment."""
    seed: NonNegativeInt = 0
    """Seed of sampling, adapters, data order and the searcher."""
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
    serve: ServeConfig = ServeConfig()
    card: CardConfig = CardConfig()
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where every trial and fine-tune is logged besides TensorBoard. Places and keys come from the
    trackers' own environment variables (WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE;
    MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

    @property
    def measured_methods(self) -> tuple[str, ...]:
        """Sensitivity methods that are measured; none if all plans are the same."""
        return self.sensitivity.methods if self.quantize.has_choice else ()

    @property
    def has_choice(self) -> bool:
        """Whether there are several formats or several cuts."""
        return self.quantize.has_choice or len(self.prune.cuts) > 1

    @property
    def is_searched(self) -> bool:
        """Whether plans are searched: several are possible, and none is given."""
        return self.search.plan is None and self.has_choice

    @property
    def trial_finetune(self) -> FinetuneConfig:
        """The settings of a fine-tune that is as long as a trial."""
        return self.finetune.model_copy(update={"steps": self.search.steps, "epochs": None})

    @property
    def num_trials(self) -> int:
        """Number of trials after which the search ends; one if nothing is searched."""
        return self.search.max_trials if self.is_searched else 1

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for every key that is set without effect."""
        reasons = self.ignored()
        for name, section in self:
            if isinstance(section, Section):
                for key, reason in section.ignored().items():
                    reasons.setdefault(f"{name}.{key}", reason)
        return tuple(f"`{key}` has no effect: {reason}" for key, reason in reasons.items())

    def is_set(self, key: str) -> bool:
        """Return True if the key `section.key` has another value than its default."""
        section, name = key.split(".")
        return bool(getattr(self, section).is_set(name))
