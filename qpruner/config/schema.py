"""The run's configuration: one YAML file, frozen models, every problem told at once.

Unknown keys are errors, nothing is inherited between files, and the JSON schema under `tune_configs/schema.json` is
generated from the models here (`qpruner schema`).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from qpruner.errors import ConfigError, UserError
from qpruner.wording import counted

Positive = Annotated[int, Field(ge=1)]
Named = Annotated[str, Field(min_length=1)]
Bits = Literal[4, 8, 16]
AccuracyMetric = Literal["acc_norm", "acc", "exact_match"]
"""lm-eval's metrics that give one number between 0 and 1 a question, the preferred first."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
TAB_FOUND = "found character '\\t'"
"""PyYAML's words for a tab where YAML allows none."""


def take_out(*keys: str) -> str:
    """The remedy where a key is one too many, or where one of several is: also for a file that is only overridden."""
    options = " or ".join(f"`--set {key}=`" for key in keys)
    return f"take {'it' if len(keys) == 1 else 'one'} out (on the command line {options})"


Idle = tuple[bool, str, tuple[str, ...]]
"""Whether some keys have no effect, why, and which keys."""


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no infinities, no `yes` for a 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def idle(self) -> tuple[Idle, ...]:
        """Keys that have no effect beside others; of several reasons for a key the first is told."""
        return ()

    def is_set(self, key: str) -> bool:
        """Return whether a key differs from its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    def ignored(self) -> dict[str, str]:
        """Keys that are set, not to their defaults, and have no effect; each with the reason."""
        found: dict[str, str] = {}
        for is_idle, reason, keys in self.idle():
            for key in keys if is_idle else ():
                if self.is_set(key):
                    found.setdefault(key, reason)
        return found

    def in_effect(self) -> Self:
        """The same with defaults in place of keys that have no effect."""
        return self.model_copy(update={key: type(self).model_fields[key].default for key in self.ignored()})

    @field_validator("*", mode="before")
    @classmethod
    def no_boolean_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"must not be a boolean, got {value}; YAML reads yes, no, on and off as booleans")
        return value


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


class DataSource(Section):
    """Rows from one place."""

    source: Named
    """Hub id, a local .jsonl / .json / .parquet / .csv / .tsv / .txt file, or `package:NAME/FILE`."""
    format: Literal["instruction", "multiple_choice", "text"] = "instruction"
    """How a row becomes a prompt and a response."""
    columns: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Our column name -> theirs. instruction: instruction, input, output; multiple_choice: question, choices, answer;
    text: text. `choices` may be one column (a list, or ARC's text/label pair) or a list of columns."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split, slices allowed (`train[:1000]`)."""
    limit: Positive | None = None
    """Take only the first rows."""


class DataConfig(Section):
    """Training, validation and confirmation rows; test rows are the tasks under `evaluate`."""

    train: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Rows to fine-tune on."""
    validation: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Rows that score a trial, and decide between two cuts where `prune.units` is open."""
    confirmation: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    """Rows that no trial is scored on: the first, third, ... decide among the best trials (selection loss), the others
    judge the winner (confirmation loss)."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """How instruction rows are written: the Alpaca prompt, or the tokenizer's own chat template."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Tokens a row may have; longer ones lose their ends."""
    response_only: bool = True
    """Count the loss on the response only."""
    packing: bool = False
    """Concatenate rows to full length instead of padding."""


class CalibrationConfig(Section):
    """Samples that importance and sensitivity are measured on. With `data.response_only` importance predicts responses
    only, as the fine-tune does, and every token of plain text; sensitivities always predict responses."""

    data: tuple[DataSource, ...] | None = None
    """Rows that importance and compensation are measured on; null takes the training rows. Sensitivities, which are
    about the target task, always take training rows."""
    token_ids: str | None = None
    """Importance is measured on these instead: a JSON file with a list of lists of token ids, each a sample as it is;
    `packing`, `num_samples` and `max_length` then have no effect."""
    packing: bool = True
    """Join the rows and cut them into samples of exactly `max_length` tokens, without those that hold no token to
    predict; off, a row is a sample."""
    num_samples: Positive = 64
    """Samples used for importance and compensation."""
    batch_size: Positive = 10
    """Samples a backward pass sees: |w * gradient| is exact for one batch, over several the absolute values are summed.
    Memory grows with samples x tokens x vocabulary."""
    num_sensitivity_samples: Positive = 64
    """Training rows used for sensitivity."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens an importance sample has, or may have without packing; sensitivity samples have `data.max_length`."""

    def idle(self) -> tuple[Idle, ...]:
        is_given = self.token_ids is not None
        return ((is_given, "`calibration.token_ids` is given", ("data", "packing", "num_samples", "max_length")),)


OF_UNITS = ("importance", "order", "aggregation", "norm", "reduction", "query_heads", "round_to")
"""Keys that are about units inside blocks alone."""
REDUCING = ("fisher", "taylor", "magnitude")
"""Kinds of importance that score every matrix of a unit and make one score of them."""
RIDGE = 0.3
"""Of least squares, where nothing is said."""
FEW_STEPS = {1: 0.2, 2: 0.3}
"""Number of steps -> share of all parameters that go in as many at most where nothing is said (docs/pruning.md)."""
MOST_OF_A_STEP = 0.1
"""Share that goes in each where there are more."""
MOST_OF_BLOCKS = 0.1
"""Share of all parameters that whole blocks take at most beside other kinds where nothing is said: more of them cost
more than channels do (docs/pruning.md)."""


class PruneConfig(Section):
    """Structured pruning: whole blocks, key/value groups with their query heads, MLP channels, experts."""

    rate: Annotated[float, Field(ge=0.0, le=0.9)] | None = 0.2
    """Share of *all* parameters to remove; 0 skips the cut. Null with `layer_rate`."""
    layer_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Instead of `rate`: the share of its own units that every block of the range loses (LLM-Pruner's ratio). It is
    there to keep the units that LLM-Pruner keeps, so `selection`, `round_to` and `query_heads` are LLM-Pruner's where
    nothing is said: `per_layer`, 1 and `modulo`."""
    units: Annotated[tuple[Literal["block", "attention", "mlp", "expert"], ...], Field(min_length=1)] | None = None
    """What may go: whole blocks, key/value groups with their query heads, MLP channels (of every expert, where there
    are experts), whole experts. Null: `attention` and `mlp`; where least squares can make up for whole blocks, the
    same with `block` beside them is cut too, and what loses less on the rows of `data.validation` stays."""
    depth_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of `rate` that whole blocks take where other units go beside them; null takes half, but about a tenth of
    all parameters at most."""
    depth_importance: Literal["block_influence", "taylor"] = "block_influence"
    """How blocks are ranked: by how little they turn their hidden states (ShortGPT), or by first-order Taylor."""
    importance: Literal["fisher", "taylor", "magnitude", "fluctuation", "activation_norm", "random"] = "fisher"
    """How units are ranked: by Fisher information (that is Taylor of second order), by Taylor expansion of the loss
    (LLM-Pruner), by their weights, by the fluctuation of what reaches the output projection (FLAP), by its norm
    (Wanda), or at random as a control."""
    order: Literal["first", "second", "mixed"] = "first"
    """Taylor only: gradient, squared gradient, or both."""
    aggregation: Literal["element", "vector"] = "element"
    """Fisher and Taylor: count weight by weight, or the sum over each row or column; `vector` is many times faster
    with Fisher and close to it."""
    norm: Literal["l1", "l2"] = "l2"
    """Magnitude only: absolute or squared weights."""
    reduction: Literal["sum", "mean", "max", "product", "last"] = "sum"
    """Fisher, Taylor, magnitude: how the matrices of a unit become one score; `last` is the output projection."""
    query_heads: Literal["served", "modulo"] = "served"
    """Fisher, Taylor, magnitude: the key/value head whose score query head h adds to, where several share one: the one
    that serves it, with which it goes, or number h modulo their count, as in LLM-Pruner's code, which is taken with
    `layer_rate` where nothing is said."""
    selection: Literal["per_layer", "global"] = "global"
    """The same share from every block, or the least important units wherever they are; `per_layer` where `layer_rate`
    or `uniform` needs it and nothing is said."""
    compensation: Literal["none", "bias", "least_squares"] | None = None
    """What the output projections (o, down) do for what was cut: nothing, a bias (FLAP), or weights solved anew on the
    calibration samples, block by block; with least squares the block in front also makes up for whole blocks. Null:
    `least_squares`, but `none` where experts are cut, whose stacked weights it cannot solve, and where whole blocks
    alone go from a family with a norm behind the MLP, or experts in its place."""
    ridge: Annotated[float, Field(gt=0.0)] = RIDGE
    """Least squares only: weight of staying near the original weights, relative to the inputs' mean square."""
    steps: Positive | None = None
    """Cut in this many steps, importance measured anew before each. Null: one where up to 20 % of all parameters are to
    go, two up to 30 %, beyond that one for every 10 %; one with `layer_rate`."""
    round_to: Positive = 64
    """MLP channels that stay in a block are a multiple of this: 64 suits the kernels, 1 hits the rate most closely, and
    is taken with `layer_rate` where nothing is said."""
    uniform: bool = False
    """Give every block the same widths, so that the folder is a plain checkpoint that needs no qpruner."""
    first_layer: Annotated[int, Field(ge=0)] = 0
    """First block that may be cut, counted from 0."""
    last_layer: int = -1
    """Last block that may be cut (inclusive); negative counts from the end."""
    protected_layers: tuple[int, ...] = ()
    """Blocks inside the range that keep everything; negative counts from the end."""

    @property
    def is_off(self) -> bool:
        """Whether nothing is cut."""
        return self.rate == 0

    @property
    def drops_blocks(self) -> bool:
        """Whether `units` names whole blocks."""
        return "block" in (self.units or ())

    @property
    def width_units(self) -> tuple[str, ...]:
        """The kinds of unit that go out of blocks."""
        return tuple(unit for unit in self.units or ("attention", "mlp") if unit != "block")

    @property
    def criterion(self) -> str:
        """What units of blocks are ranked by; where whole blocks alone go, what those are."""
        return self.importance if self.width_units else self.depth_importance

    @property
    def compensates_by(self) -> Literal["none", "bias", "least_squares"]:
        """What makes up for what was cut, where no experts are."""
        return self.compensation or "least_squares"

    @property
    def may_add_blocks(self) -> bool:
        """Whether a second cut with whole blocks is tried beside that of units, where the model allows it."""
        is_open = self.units is None and bool(self.rate)
        return is_open and self.compensates_by == "least_squares" and self.importance != "random"

    @property
    def num_steps(self) -> int:
        """In how many steps units are cut; whole blocks go before the first."""
        rate = round((self.rate if self.width_units else None) or 0.0, 9)
        few = (steps for steps, most in FEW_STEPS.items() if rate <= most)
        return self.steps or next(few, math.ceil(round(rate / MOST_OF_A_STEP, 6)))

    @property
    def looks_at_linears(self) -> bool:
        """Whether importance is measured on what goes through linear layers."""
        return self.importance in ("fluctuation", "activation_norm")

    @property
    def block_rate(self) -> float:
        """Share of all parameters that whole blocks take."""
        rate = self.rate or 0.0
        if not self.drops_blocks:
            return 0.0
        if not self.width_units:
            return rate
        return min(rate / 2, MOST_OF_BLOCKS) if self.depth_share is None else rate * self.depth_share

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        implied: dict[str, Any] = {}
        if raw.get("layer_rate") is not None:
            implied |= {"rate": None, "round_to": 1}
            if raw.get("importance", cls.model_fields["importance"].default) in REDUCING:
                implied["query_heads"] = "modulo"
        if raw.get("layer_rate") is not None or raw.get("uniform") is True:
            implied["selection"] = "per_layer"
        return implied | raw

    @model_validator(mode="after")
    def consistent(self) -> PruneConfig:
        problems = [message for is_wrong, message in self._rules() if is_wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        """What cannot work together."""
        by_rate, units = self.layer_rate is not None, self.units or ()
        return (
            (not by_rate and self.rate is None, "give `rate` or `layer_rate`, got neither"),
            (
                by_rate and self.rate is not None,
                f"give `rate` or `layer_rate`, not both: {take_out('prune.rate', 'prune.layer_rate')}",
            ),
            (
                len(set(units)) < len(units),
                f"`units` names a kind twice: {list(units)}; name each once",
            ),
            (
                {"expert", "mlp"} <= set(units),
                "`units` may name `expert` or `mlp`, not both: whole experts go, or channels of every expert",
            ),
            (by_rate and self.drops_blocks, "`layer_rate` is about units inside blocks: take `block` out of `units`"),
            *(
                (
                    needs and self.selection == "global",
                    f"`{key}` needs `selection: per_layer`, its default; got global: {take_out('prune.selection')}",
                )
                for key, needs in (("layer_rate", by_rate), ("uniform", self.uniform))
            ),
            (
                self.reduction == "product" and self.selection == "global" and bool(self.width_units),
                "`reduction: product` needs `selection: per_layer`: heads and channels have different numbers of "
                "matrices, so their products cannot be compared; or take another reduction, such as sum",
            ),
        )

    def idle(self) -> tuple[Idle, ...]:
        blocks_only, importance = not self.width_units, f"`prune.importance` is {self.importance}"
        may_drop, only = self.drops_blocks or self.may_add_blocks, "`prune.units` names whole blocks only"
        # `uniform` implies `selection`.
        others = [key for key in type(self).model_fields if key != "rate" and not (key == "selection" and self.uniform)]
        return (
            (self.is_off, "`prune.rate` is 0", tuple(others)),
            (blocks_only, only, OF_UNITS),
            (blocks_only and self.compensation == "bias", only, ("compensation",)),
            (blocks_only and self.steps != 1, only, ("steps",)),
            (blocks_only and not self.uniform, only, ("selection",)),
            (blocks_only, only, ("depth_share",)),
            (not may_drop, "no whole blocks go (`prune.units`)", ("depth_share", "depth_importance")),
            (self.compensates_by != "least_squares", f"`prune.compensation` is {self.compensation}", ("ridge",)),
            (self.importance != "taylor", importance, ("order",)),
            (self.importance not in ("fisher", "taylor"), importance, ("aggregation",)),
            (self.importance != "magnitude", importance, ("norm",)),
            (self.importance not in REDUCING, importance, ("reduction", "query_heads")),
        )


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

    @model_validator(mode="after")
    def exactly_one(self) -> BudgetConfig:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            named = [f"quantize.budget.{name}" for name in given]
            remedy = f"{', '.join(given)}: {take_out(*named)}" if given else "none"
            raise ValueError(f"give exactly one of fraction, mean_bits, gib, bytes; got {remedy}")
        return self


class QuantizeConfig(Section):
    """Mixed precision."""

    group: Literal["block", "sublayer", "projection"] = "block"
    """What gets one bit-width."""
    bits: Annotated[tuple[Bits, ...], Field(min_length=1)] = (4, 8)
    """Bit-widths a group may take: 4 (NF4), 8 (LLM.int8), 16 (unquantized). One alone gives every group the same:
    nothing is measured or searched, one trial is run."""
    double_quant: bool = False
    """Quantize the 4-bit scales too."""
    budget: BudgetConfig = BudgetConfig(fraction=0.5)
    """The bytes a plan may take."""

    @model_validator(mode="after")
    def ascending(self) -> QuantizeConfig:
        if list(self.bits) != sorted(set(self.bits)):
            raise ValueError(f"`bits` must be different bit-widths in ascending order, got {list(self.bits)}")
        return self

    def idle(self) -> tuple[Idle, ...]:
        return ((4 not in self.bits, "`quantize.bits` has no 4", ("double_quant",)),)


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

    def idle(self) -> tuple[Idle, ...]:
        return ((self.init == "plain", "`lora.init` is plain", ("loftq_iterations", "svd")),)


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

    @model_validator(mode="after")
    def whole_accumulation(self) -> TrainingConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"`batch_size` must be a multiple of `micro_batch_size`, got {self.batch_size} and "
                f"{self.micro_batch_size}: take another batch size or a smaller micro-batch"
            )
        return self


SensitivityMethod = Literal["mutual_information", "first_order", "fisher", "second_order", "kl", "loss"]
INFORMATION = ("mutual_information",)
EXPANSION = ("first_order", "fisher", "second_order")
MEASUREMENT = ("kl", "loss")
"""Methods by the passes over the rows that they need."""


class SensitivityConfig(Section):
    """How much each group suffers at fewer bits: seeds of the search, and what a searcher expects beforehand."""

    methods: tuple[SensitivityMethod, ...] = get_args(SensitivityMethod)
    """What is measured, each giving a seed plan: mutual information with the prediction (the paper's), gradient times
    quantization error, Fisher-weighted squared error, the sum of these two, and the KL divergence and the change of the
    loss with one group quantized. The middle three share a backward pass, the last two their passes."""
    batch_size: Positive = 4
    """Samples a pass sees, a backward pass too. Scores do not depend on it, up to rounding; memory grows with it."""
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

    @model_validator(mode="after")
    def different(self) -> SensitivityConfig:
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"`methods` names a method twice, got {', '.join(self.methods)}: name each once")
        return self

    def idle(self) -> tuple[Idle, ...]:
        of_information = ("num_components", "num_neighbors", "num_shuffles", "max_positions")
        return (
            (not self.methods, "`sensitivity.methods` is empty", ("batch_size",)),
            *(
                (not set(needed) & set(self.methods), f"`sensitivity.methods` lacks {' and '.join(needed)}", keys)
                for needed, keys in ((INFORMATION, of_information), (MEASUREMENT, ("num_measured_samples",)))
            ),
        )


class ResourcesConfig(Section):
    """What Ray reserves for one trial."""

    cpu: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores."""
    gpu: Annotated[float, Field(ge=0)] | None = None
    """A share of a GPU, one, or several that the trial's model is spread over; null takes one where there are GPUs."""

    @model_validator(mode="after")
    def whole_gpus(self) -> ResourcesConfig:
        if self.gpu is not None and self.gpu > 1 and self.gpu != int(self.gpu):
            raise ValueError(f"`gpu` must be a share of one GPU or a whole number of them, got {self.gpu:g}")
        return self


OF_SEARCHING = (
    "searcher",
    "max_trials",
    "max_hours",
    "max_gpu_hours",
    "patience",
    "pareto",
    "confirm",
)
"""Keys that are about several trials."""


class SearchConfig(Section):
    """The precision search."""

    searcher: Literal["gp", "hyperopt", "bayesopt", "random"] = "gp"
    """gp is a Gaussian process over plans (BoTorch), hyperopt is TPE and bayesopt bayesian-optimization, both through
    Ray's searchers; random is the control."""
    max_trials: Positive = 16
    """The search ends after this many trials, uniform and seed plans included."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """It ends after this many hours of searching, those of interrupted sessions included; trials in flight finish."""
    max_gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """It ends after its trials have held GPUs for this many hours; trials in flight finish."""
    patience: Positive | None = None
    """It ends after this many proposals in a row whose expected improvement is below the noise of a score. Needs
    `searcher: gp` and no `pareto`."""
    plan: Named | None = None
    """Take this plan instead of searching: a file made by hand or by another run (`qpruner plan` prints one), or the
    name of a sensitivity (`mutual_information`), whose seed plan is taken. No other is tried, and it is what is
    fine-tuned. Also `--plan`."""
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
    acc_norm, else acc, else exact_match. The winner is chosen by the same on what no trial was scored on: half the
    confirmation rows, or the `limit` questions of each task that come after those of the trials."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks scored at every rung."""
    limit: Positive | None = None
    """Questions a task, at most; every `metric` but the loss needs it, so that others are left to choose the winner
    by."""
    confirm: Positive = 3
    """Best trials that are scored again on fresh rows, beside the controls; with `pareto` at least the whole front."""
    resources_per_trial: ResourcesConfig | None = None
    """null takes one GPU where there are GPUs and one CPU core where there are none."""
    trial_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """A trial without progress for this long (no forward pass, nothing loaded) is killed and recorded as hung."""
    retry_out_of_memory: bool = True
    """A trial that runs out of memory goes on with half the micro-batch and twice the accumulation, which is the same
    math, down to one row; without this, or when one row is too much, its plan is infeasible."""

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
        """Trials are compared by an accuracy, not by the loss."""
        return self.metric != "loss"

    @property
    def named_metric(self) -> str | None:
        """The lm-eval metric that `metric` names; None where each task's preferred one counts."""
        return None if self.metric in ("loss", "accuracy") else self.metric

    @model_validator(mode="after")
    def consistent(self) -> SearchConfig:
        problems = [message for is_wrong, message in self._rules() if is_wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        """What cannot work together."""
        return (
            (
                self.first_rung > self.steps,
                f"`first_rung` must be at most `steps` ({self.steps}), got {self.first_rung}",
            ),
            (
                self.by_accuracy and not self.tasks,
                f"`metric: {self.metric}` needs at least one task under `tasks`",
            ),
            (
                self.by_accuracy and bool(self.tasks) and (self.limit is None or self.limit < 2),
                f"`metric: {self.metric}` needs a `limit` of at least 2, since one question has no standard error and "
                f"those after the limit choose the winner, got {self.limit}",
            ),
        )

    def idle(self) -> tuple[Idle, ...]:
        return (
            (self.searcher != "gp", f"`search.searcher` is {self.searcher}", ("patience",)),
            (self.pareto, "`search.pareto` is true", ("patience",)),
            (not self.tasks, "`search.tasks` names none", ("limit",)),
        )


class FinetuneConfig(Section):
    """The final fine-tune; give steps or epochs."""

    steps: Positive | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows."""
    save_steps: Positive = 50
    """Steps between checkpoints."""
    compare: bool = False
    """Once the winner is fine-tuned, evaluated and reported, give base, pruned, uniform, seed and random plans the same
    fine-tune, for the final table and its claim. `--set finetune.compare=true` adds this to a finished run."""
    num_workers: Positive = 1
    """Workers, each with a GPU (or with cores) of its own, that share every batch of a fine-tune through Ray Train; the
    workers may lie on several nodes. `training.batch_size` stays that of all together, so the losses are those of one
    worker; it must be a multiple of `num_workers` times `training.micro_batch_size`."""
    seeds: Positive = 3
    """With `compare`: training seeds (data order and dropout) of the searched, the best seed and the random plans; the
    first is `seed` + 1, the others count up from it, since the trials that chose the winner were trained under `seed`.
    One leaves a claim about one training seed."""
    random_plans: Annotated[int, Field(ge=0)] = 3
    """With `compare`: random plans of equal bytes, each under all `seeds`. The claim speaks of random plans
    where there are several; of one it can say nothing."""
    seed_rows: Literal["best", "all"] = "best"
    """With `compare`: which sensitivities' seed plans are rows. `best` has the one that was best on fresh rows, under
    all `seeds`, and that of mutual information, under the first; `all` every other's, under the first, too."""

    @model_validator(mode="after")
    def consistent(self) -> FinetuneConfig:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else f"both: {take_out('finetune.steps', 'finetune.epochs')}"
            raise ValueError(f"give exactly one of `steps` and `epochs`, got {given}")
        return self

    def idle(self) -> tuple[Idle, ...]:
        return ((not self.compare, "`finetune.compare` is false", ("seeds", "random_plans", "seed_rows")),)


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
    """Held-out text (`format: text`) whose perplexity the final table tells: its rows, joined by blank lines, in
    windows of `data.max_length` tokens. Null takes the responses of the confirmation rows that chose nothing, none if
    multiple-choice."""

    @model_validator(mode="after")
    def running_text(self) -> EvaluateConfig:
        other = [source.format for source in self.text or () if source.format != "text"]
        if other:
            raise ValueError(f"`text` is running text: give its sources `format: text`, got {', '.join(other)}")
        return self


class CardConfig(Section):
    """What `final/README.md`, the final model's card, states; nothing is computed from it."""

    base_model: str | None = None
    """Hub id of the base model; null takes `model.source` where that is one."""
    license: str | None = None
    """The hub's identifier of the final model's licence, such as apache-2.0; null takes what the base model's own card
    says, or the metadata of the package of a `package:` source."""
    datasets: tuple[str, ...] | None = None
    """Hub ids of the data sets that the model was fine-tuned on; null takes those that `data.train` names, `[]` states
    that there are none on a hub."""

    @field_validator("base_model", "datasets")
    @classmethod
    def hub_ids(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for name in (value,) if isinstance(value, str) else value or ():
            if not HUB_ID.fullmatch(name):
                raise ValueError(f"must be hub ids, OWNER/NAME, got {name!r}: leave out what is on no hub")
        return value

    @field_validator("license")
    @classmethod
    def license_id(cls, value: str | None) -> str | None:
        if value is not None and not LICENSE_ID.fullmatch(value):
            raise ValueError(f"must be the hub's identifier of a licence, such as apache-2.0 or other, got {value!r}")
        return value


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
    """Told of every trial and fine-tune, beside TensorBoard. Where they are and their keys come from their own
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

    def idle(self) -> tuple[Idle, ...]:
        """Keys that have no effect beside those of another section, `section.key`.

        `search.plan` is no reason: `--plan` takes a plan for a file that was written for a search.
        `calibration.num_sensitivity_samples` always has an effect: only runs of the same rows are compared as pairs.
        """
        only = f"`quantize.bits` is {list(self.quantize.bits)}, so nothing is measured or searched"
        searched = (f"search.{key}" for key in OF_SEARCHING)
        measured = (f"sensitivity.{key}" for key in SensitivityConfig.model_fields)
        return ((len(self.quantize.bits) == 1, only, (*searched, *measured)),)

    @model_validator(mode="after")
    def consistent(self) -> RunConfig:
        problems = [message for is_wrong, message in self._rules() if is_wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        """What sections ask of one another."""
        seen = sorted(set(self.search.tasks) & set(self.evaluate.tasks))
        workers, training, asked = self.finetune.num_workers, self.training, self.search.resources_per_trial
        gpus = (asked.gpu if asked else None) or 0
        method, bits = self.search.plan_method, self.quantize.bits
        return (
            (
                bool(method) and method not in self.measured_methods,
                f"`search.plan` takes the seed plan of {method}, which is not measured: name it in "
                f"`sensitivity.methods`, got {list(self.sensitivity.methods)}, and two bit-widths or more in "
                f"`quantize.bits`, got {list(bits)}; a file of that name is `./{method}`",
            ),
            (
                bool(seen),
                f"`evaluate.tasks` must not share tasks with `search.tasks`, both name {', '.join(seen)}: the report "
                "must be on tasks the search never saw",
            ),
            (
                bool(training.batch_size % (workers * training.micro_batch_size)),
                f"`training.batch_size` must be a multiple of `finetune.num_workers` x `training.micro_batch_size` "
                f"({workers} x {training.micro_batch_size}), got {training.batch_size}: the workers share every batch; "
                "take fewer workers, a smaller micro-batch or another batch size",
            ),
            (
                workers > 1 and gpus > 1,
                f"`finetune.num_workers` above 1 needs workers with one GPU each, got {workers} with "
                f"`search.resources_per_trial.gpu` {gpus:g}: a model is spread over several GPUs, or shared among "
                "workers, not both",
            ),
        )


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str) -> Any:
    """What a YAML or JSON text holds; raises `yaml.YAMLError`, also where a key is given twice."""
    return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and validate a configuration file.

    Args:
        path: The YAML file.
        overrides: `section.key=value` pairs; values are YAML. An item of a list is its number, counted from 0
            (`data.train.0.limit=8`). `section.key=` takes the key out, so that its default holds.

    Raises:
        UserError: If the file is missing or is no YAML.
        ConfigError: With every problem found.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; give a configuration file: of a run, the one that `qpruner run` was given"
        )
    if not path.is_file():
        raise UserError(f"configuration file {path} does not exist; see tune_configs/ for complete examples")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(_explain_yaml(path, error)) from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} must be a mapping of sections, got {type(raw).__name__}; see tune_configs/ for complete examples"
        )
    for override in overrides or []:
        _apply_override(raw, override)
    return validate_config(raw, f"{path}, overrides included" if overrides else str(path))


def _explain_yaml(path: Path, error: Exception) -> str:
    """What is wrong with a file that is no YAML; of a tab, which editors do not show, where it is."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark and TAB_FOUND in (error.problem or ""):
        line, column = error.problem_mark.line + 1, error.problem_mark.column + 1
        return (
            f"{path}, line {line}, column {column}: a tab; YAML indents and separates by spaces alone: replace the "
            "file's tabs by spaces, two for each level"
        )
    return f"{path} is not valid YAML: {error}; mend it, or see tune_configs/ for complete examples"


def validate_config(raw: dict[str, Any], source: str | None = None) -> RunConfig:
    """Build a `RunConfig` from plain data; raises `ConfigError` with every problem found."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_explain(problem) for problem in _root_causes(error)], source) from error


def _root_causes(error: ValidationError) -> list[Any]:
    """The problems, less those that only repeat that something inside them is wrong."""
    problems = error.errors()
    places = [problem["loc"] for problem in problems]

    def repeats(problem: Any) -> bool:
        place = problem["loc"]
        inside = any(other[: len(place)] == place and len(other) > len(place) for other in places)
        return inside and problem["type"] == "too_short"

    return [problem for problem in problems if not repeats(problem)]


def config_schema() -> str:
    """The JSON schema of the configuration, for editors."""
    return json.dumps(RunConfig.model_json_schema(), indent=2, sort_keys=True) + "\n"


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set takes section.key=value, such as search.max_trials=20; got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {error}; quote a text") from error
    *sections, last = key.split(".")
    here: Any = raw
    for section in sections:
        place = _place_in(here, section, override)
        here = here[place] if isinstance(here, list) else here.setdefault(place, {})
        if not isinstance(here, dict | list):
            raise UserError(
                f"--set {override}: `{section}` is not a section; `qpruner check --show-config` prints every key"
            )
    place = _place_in(here, last, override)
    if text.strip():
        here[place] = value
    elif isinstance(here, dict) and place not in here:
        raise UserError(f"--set {override}: {_why_not_there(key)}")
    else:
        del here[place]


def _why_not_there(key: str) -> str:
    """Why a key cannot be taken out of a file: it is none, or the file does not have it."""
    location = [int(part) if part.isdecimal() else part for part in key.split(".")]
    for depth, part in enumerate(location):
        if isinstance(part, str) and part not in _known_keys(location[:depth]):
            return _explain_unknown_key(location[: depth + 1])
    return f"there is no `{key}` in the file to be taken out, its default holds anyway"


def _place_in(here: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """Where a part of a key leads: a name in a section, a number in a list."""
    if isinstance(here, dict):
        return part
    if not part.isdecimal():
        raise UserError(f"--set {override}: `{part}` must be the number of an item, since it is of a list: 0, 1, ...")
    if int(part) >= len(here):
        raise UserError(
            f"--set {override}: there is no item {part} in a list of {counted(len(here), 'item')}, counted from 0; to "
            "add one, give the whole list"
        )
    return int(part)


def _explain(problem: Any) -> str:
    """One pydantic error as a sentence that names the key, the value, the rule and the remedy."""
    location = list(problem["loc"])
    key = ".".join(str(part) for part in location) or "configuration"
    if problem["type"] == "extra_forbidden":
        return _explain_unknown_key(location)
    if problem["type"] == "missing":
        return f"`{key}` is missing: it must be given"
    rule = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"`{key}`: {rule}" if location else rule
    # pydantic's own words for these name Python types.
    rule = {
        "tuple_type": "must be a list",
        "dict_type": "must be a mapping of keys",
        "model_type": "must be a mapping of keys (a section)",
        "too_short": "must have at least 1 item",
    }.get(problem["type"], rule)
    return f"`{key}`: {rule[0].lower() + rule[1:]}, got {problem['input']!r}{_as_share(problem)}"


def _as_share(problem: Any) -> str:
    """How a share is written that was given in per cent; nothing where it was not."""
    limits = problem.get("ctx", {})
    most, given = limits.get("le", limits.get("lt", math.inf)), problem["input"]
    if not (most <= 1 and isinstance(given, int | float) and 2 <= given <= 100 * most):
        return ""
    return f": a share, so {given:g} % is {given / 100:g}"


def _explain_unknown_key(location: list[str | int]) -> str:
    known = _known_keys(location[:-1])
    name = str(location[-1])
    prefix = "".join(f"{part}." for part in location[:-1])
    inside = [f"{section}.{name}" for section in known if name in _known_keys([*location[:-1], section])]
    nearest = inside or [f"{prefix}{key}" for key in difflib.get_close_matches(name, known, n=1, cutoff=0.5)]
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known keys: {', '.join(sorted(known))}"
    return f"`{prefix}{name}` is not a known key; {hint}"


def _known_keys(location: list[str | int]) -> list[str]:
    """The fields of the section that a location leads to."""
    section: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _section_of(argument)
        if found:
            return found
    return None
