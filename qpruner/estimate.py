"""What a run will take, before it is paid for: memory by part, and hours by stage.

Nothing is loaded or run here: bytes and operations are counted from the shapes. Time comes from operations and how many
of them a device does in a second: assumed below, or as `qpruner.pace` measured it.

Memory, for n tokens in a forward pass (rows x length), a vocabulary of V and elements of e bytes:

- An adapted layer of r rows and c columns keeps for its backward pass its input in float32 for the adapter (4 c), the
  adapter's inner values (4 x rank), and about e (r + c) of what lies between layers; a layer without adapter the last
  alone. Autograd keeps within 15 % of this (Llama, Qwen3, Gemma 3: tests/test_estimate.py). With gradient checkpointing
  every block keeps its input, and one block all of this.
- Logits: 12 n V. The loss is taken in float32: the loss's own copy, its gradient and the gradient of the logits.

Operations (Kaplan et al., arXiv 2001.08361, section 2.1): 2 per weight and token forward, 2 backward to the inputs and
2 to the weights. Adapters leave the latter out; gradient checkpointing adds a forward pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpruner.config import RunConfig
from qpruner.data import Example
from qpruner.plan import FULL_BITS, Layout, LinearShape
from qpruner.preflight import Inspection

LOGIT_BYTES = 12
FLOAT32_BYTES = 4
CHARACTERS_A_TOKEN = 4
ALPACA_TOKENS = 40
"""Of the template around an instruction."""
CHOICES = 4
"""Answers that a question of a task is asked with."""
SVD_OPERATIONS = 150
"""A weight, for a randomized SVD of rank 8 and packing."""
TERAFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "A6000": 155.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Peak of dense bf16 (float16 where there is no bf16) matrix products, as the makers state it."""
GPU_UTILIZATION = 0.25
"""Assumed of LoRA steps on 4- and 8-bit layers, which are decoded in every pass; not measured by us."""
CORE_FLOPS = 1.3e11
"""Of one CPU core with AVX512-BF16: a LoRA step of 4 x 256 tokens on SmolLM2-135M took 3.3 s in bf16, 3.5 in 4 bits and
4.4 in 8 (2026-11-25)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one piece of work, by part.

    Attributes:
        about: What is worked on, in words.
        parts: Name -> bytes, all held at once at the highest point.
    """

    about: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Rates:
    """Operations a second of one slot, and where they come from.

    Attributes:
        training: In forward and backward passes of the budget's plan.
        scoring: In forward passes.
        origin: What was assumed or measured.
    """

    training: float
    scoring: float
    origin: str


def assumed_rates(gpu: str | None, cores: float) -> Rates:
    """Rates of a GPU by its name, or of so many CPU cores."""
    if gpu is None:
        speed = CORE_FLOPS * cores
        return Rates(speed, speed, f"assumed: {CORE_FLOPS / 1e9:.0f} GFLOP/s a core, {cores:g} core(s) a slot")
    known = next((name for name in TERAFLOPS if name in gpu), None)
    if known is None:
        known = "A10"
        about = f"assumed: the speed of {gpu} is not known here, that of an {known}"
    else:
        about = f"assumed: {gpu}"
    speed = TERAFLOPS[known] * 1e12 * GPU_UTILIZATION
    return Rates(speed, speed, f"{about}, {TERAFLOPS[known]:g} TFLOP/s x {GPU_UTILIZATION:.0%} utilization")


def measured_rates(config: RunConfig, inspection: Inspection, training: float, scoring: float, where: str) -> Rates:
    """Rates at which a micro-batch of rows of full length takes so many seconds, forward and backward or forward."""
    rows, length = config.training.micro_batch_size, config.data.max_length
    operations = rows * length * _matrix_weights(inspection.pruned, inspection.model_config)
    origin = (
        f"measured on {where}: {rows} rows x {length} tokens take {training:.3g} s forward and backward, "
        f"{scoring:.3g} s forward"
    )
    return Rates(_operations(config) * operations / training, 2 * operations / scoring, origin)


def share_at_highest(config: RunConfig, inspection: Inspection) -> float:
    """Where the budget lies between all groups at the lowest bits (0) and all at the highest (1)."""
    layout, levels = inspection.pruned, config.quantize.bits
    low, high = (layout.plan_bytes(layout.uniform(bits)) for bits in (levels[0], levels[-1]))
    return min(1.0, (inspection.budget_bytes - low) / (high - low))


def _operations(config: RunConfig) -> int:
    """A weight and token, of a training step."""
    return 6 if config.training.gradient_checkpointing else 4


def training_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Peak of a training step of a trial, or of the final fine-tune, with the budget's plan and rows of full length."""
    training, length = config.training, config.data.max_length
    tokens = training.micro_batch_size * length
    return Memory(
        f"a step of {training.micro_batch_size} rows x {length} tokens (`training.micro_batch_size`)",
        _held(config, inspection)
        | {
            "activations": activation_bytes(inspection, tokens, config.lora.rank, training.gradient_checkpointing),
            "logits": logit_bytes(inspection, tokens),
        },
    )


def scoring_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Peak of scoring a trial at a rung, which its optimizer's state outlasts."""
    rows, length = config.evaluate.batch_size, config.data.max_length
    tokens = rows * length
    return Memory(
        f"scoring {rows} rows x {length} tokens (`evaluate.batch_size`)",
        _held(config, inspection)
        | {"activations": _widest(inspection.pruned, tokens), "logits": logit_bytes(inspection, tokens)},
    )


def _held(config: RunConfig, inspection: Inspection) -> dict[str, int]:
    """What a trial holds all the time."""
    layout = inspection.pruned
    largest, adapters = layout.plan_bytes(layout.uniform(config.quantize.bits[-1])), layout.adapter_bytes
    return {
        "weights": min(inspection.budget_bytes, largest) - adapters,
        "adapters": adapters,
        "gradients": adapters,
        "optimizer": 2 * adapters,
    }


def prune_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Peak of the cut: the dense base model, and where importance asks for gradients those of one batch."""
    settings, calibration, base = config.prune, config.calibration, inspection.base
    weights = {"weights": base.num_parameters * base.element_bytes}
    largest = max(linear.num_weights for group in base.groups for linear in group.linears)
    widest = max(linear.columns for group in base.groups for linear in group.linears)
    if settings.compensation == "least_squares":
        weights["Gram matrix"] = 2 * FLOAT32_BYTES * widest**2
    if settings.importance not in ("fisher", "taylor"):
        return Memory(f"the base model, importance by {settings.importance}", weights)
    tokens = calibration.batch_size * calibration.max_length
    return Memory(
        f"gradients of {calibration.batch_size} rows x {calibration.max_length} tokens (`calibration.batch_size`)",
        weights
        | {
            "gradient": FLOAT32_BYTES * largest,
            "activations": sum(_kept(group.linears, tokens, base.element_bytes, None) for group in base.groups),
            "logits": logit_bytes(inspection, tokens),
        },
    )


def sensitivity_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Peak of the sensitivities: the dense pruned model, and gradients of one batch where a method asks for them."""
    layout, length = inspection.pruned, config.data.max_length
    weights = {"weights": layout.num_parameters * layout.element_bytes}
    by_gradient = {"first_order", "fisher", "second_order"} & set(config.sensitivity.methods)
    rows = config.calibration.batch_size if by_gradient else config.evaluate.batch_size
    tokens = rows * length
    if not by_gradient:
        parts = {"activations": _widest(layout, tokens), "logits": logit_bytes(inspection, tokens)}
        return Memory(f"forward passes of {rows} rows x {length} tokens", weights | parts)
    largest = max(linear.num_weights for group in layout.groups for linear in group.linears)
    return Memory(
        f"gradients of {rows} rows x {length} tokens",
        weights
        | {
            "gradient": FLOAT32_BYTES * largest,
            "activations": sum(_kept(group.linears, tokens, layout.element_bytes, None) for group in layout.groups),
            "logits": logit_bytes(inspection, tokens),
        },
    )


def activation_bytes(inspection: Inspection, tokens: int, rank: int, checkpointing: bool) -> int:
    """What is kept for the backward pass of a forward pass with adapters."""
    layout = inspection.pruned
    blocks = _by_block(layout)
    kept = [_kept(linears, tokens, layout.element_bytes, rank) for linears in blocks]
    if not checkpointing:
        return sum(kept)
    return len(blocks) * tokens * int(inspection.model_config.hidden_size) * layout.element_bytes + max(kept)


def logit_bytes(inspection: Inspection, tokens: int) -> int:
    """Logits and the gradients of the loss."""
    return LOGIT_BYTES * tokens * int(inspection.model_config.vocab_size)


def _kept(linears: Iterable[LinearShape], tokens: int, element_bytes: int, rank: int | None) -> int:
    """What layers keep for the backward pass; without a rank they have no adapter."""
    adapter = 0 if rank is None else FLOAT32_BYTES
    return tokens * sum(
        element_bytes * (linear.rows + linear.columns) + adapter * (linear.columns + (rank or 0)) for linear in linears
    )


def _widest(layout: Layout, tokens: int) -> int:
    """What a forward pass holds at once: the inputs and outputs of the widest group's layers."""
    return max(_kept(group.linears, tokens, layout.element_bytes, None) for group in layout.groups)


def _by_block(layout: Layout) -> list[list[LinearShape]]:
    """The linear layers of each block; a group's name begins with its block's, `layers.07`."""
    blocks: dict[str, list[LinearShape]] = {}
    for group in layout.groups:
        blocks.setdefault(".".join(group.name.split(".")[:2]), []).extend(group.linears)
    return list(blocks.values())


@dataclass(frozen=True)
class Hours:
    """Hours of one slot that each stage takes, without starts of processes, loading and saving.

    Attributes:
        stages: Stage -> hours, all its jobs added up.
        at_most: The same with no trial stopped early.
        wall: With the slots there are, trials and fine-tunes side by side.
    """

    stages: dict[str, float]
    at_most: float
    wall: float

    @property
    def total(self) -> float:
        return sum(self.stages.values())


def hours(config: RunConfig, inspection: Inspection, rates: Rates, slots: int) -> Hours:
    """Time by stage.

    Args:
        config: The run's configuration.
        inspection: Shapes, rows and questions.
        rates: Operations a second of a slot.
        slots: Trials at once.
    """
    counted = _Count(config, inspection)
    jobs = num_finetunes(config)
    steps, trials = expected_steps(config), config.search.num_trials
    stages = {
        "prune": counted.prune() / rates.training,
        "bank": counted.bank() / rates.scoring,
        "sensitivity": counted.sensitivity() / rates.training,
        "search": counted.training(steps.steps) / rates.training + counted.search_scores(steps) / rates.scoring,
        "finetune": jobs * counted.training(counted.finetune_steps()) / rates.training
        + jobs * counted.split("validation", "confirmation") / rates.scoring,
        "evaluate": (jobs + 2) * counted.evaluation() / rates.scoring,
    }
    every = _Steps(trials * config.search.steps, trials * len(config.search.rungs))
    unstopped = counted.training(every.steps) / rates.training + counted.search_scores(every) / rates.scoring
    shared = {"search": min(slots, trials), "finetune": min(slots, jobs), "evaluate": min(slots, jobs + 2)}
    wall = sum(seconds / shared.get(name, 1) for name, seconds in stages.items())
    in_hours = {name: seconds / 3600 for name, seconds in stages.items()}
    at_most = sum(in_hours.values()) - in_hours["search"] + unstopped / 3600
    return Hours(in_hours, at_most, wall / 3600)


@dataclass(frozen=True)
class _Steps:
    """Optimizer steps, and rungs reached, of all trials."""

    steps: float
    rungs: float


def expected_steps(config: RunConfig) -> _Steps:
    """Of a search in which ASHA keeps one in `reduction_factor` at each rung; controls run to the end.

    A trial that is first at a rung is never stopped there, so a small search takes more.
    """
    search = config.search
    controls = min(search.num_trials, len(config.quantize.bits) - 1 + len(config.sensitivity.methods))
    if search.plan:
        controls = 1
    shares = [search.reduction_factor**-position for position in range(len(search.rungs))]
    lengths = [after - before for before, after in zip((0, *search.rungs), search.rungs, strict=False)]
    others = search.num_trials - controls
    steps = sum(share * length for share, length in zip(shares, lengths, strict=True))
    return _Steps(controls * search.steps + others * steps, controls * len(search.rungs) + others * sum(shares))


def num_finetunes(config: RunConfig) -> int:
    """Rows of the final table, each training seed counted."""
    if not config.finetune.compare:
        return 1
    methods = config.sensitivity.methods
    once = 2 + sum(bits != FULL_BITS for bits in config.quantize.bits) + ("mutual_information" in methods)
    return once + (2 + bool(methods)) * config.finetune.seeds


class _Count:
    """Counts operations."""

    def __init__(self, config: RunConfig, inspection: Inspection) -> None:
        self._config, self._inspection = config, inspection
        self._pruned = _matrix_weights(inspection.pruned, inspection.model_config)
        self._base = _matrix_weights(inspection.base, inspection.model_config)
        self._lengths = {name: _lengths(rows, config) for name, rows in inspection.examples.items()}

    def training(self, steps: float) -> float:
        """Of optimizer steps, padding included."""
        training = self._config.training
        rows = list(self._lengths["train"])
        random.Random(self._config.seed).shuffle(rows)
        if self._config.data.packing:
            padded = float(self._config.data.max_length)
        else:
            padded = _padded(rows, training.micro_batch_size)
        return steps * training.batch_size * padded * _operations(self._config) * self._pruned

    def finetune_steps(self) -> float:
        settings, batch = self._config.finetune, self._config.training.batch_size
        return settings.steps or (settings.epochs or 0) * math.ceil(len(self._lengths["train"]) / batch)

    def split(self, *names: str) -> float:
        """Forward passes over rows of like length together, so without padding."""
        return sum(2 * self._pruned * sum(self._lengths[name]) for name in names)

    def search_scores(self, steps: _Steps) -> float:
        """Validation at every rung, and the finalists on fresh rows."""
        search = self._config.search
        rung = self.split("validation") + self._questions("search")
        finalists = min(search.num_trials, search.confirm + len(self._config.sensitivity.methods))
        return steps.rungs * rung + finalists * (self.split("confirmation") + self._questions("search"))

    def evaluation(self) -> float:
        text = sum(self._lengths.get("text", ())) * 2 * self._pruned
        return self._questions("evaluate") + text

    def prune(self) -> float:
        """Importance and compensation, for each of `prune.steps`."""
        settings, calibration = self._config.prune, self._config.calibration
        if settings.is_off:
            return 0.0
        per_weight = {"fisher": 6, "taylor": 6, "fluctuation": 2, "activation_norm": 2}.get(settings.importance, 0)
        per_weight += 4 if settings.compensation != "none" else 0
        return settings.steps * per_weight * self._base * calibration.num_samples * calibration.max_length

    def sensitivity(self) -> float:
        settings, calibration = self._config.sensitivity, self._config.calibration
        rows = self._lengths["calibration"][: calibration.num_sensitivity_samples]
        tokens = sum(rows)
        methods = set(settings.methods)
        operations = 2.0 * tokens if "mutual_information" in methods else 0.0
        if {"first_order", "fisher", "second_order"} & methods:
            operations += 6 * tokens
        if {"kl", "loss"} & methods:
            measured = tokens * min(1.0, settings.num_measured_samples / max(1, len(rows)))
            lower = len(self._config.quantize.bits) - 1 + (self._config.quantize.bits[-1] != FULL_BITS)
            # Half a forward pass a group and level: what lies before the group is kept.
            operations += measured * len(self._inspection.pruned.groups) * lower
        return operations * self._pruned

    def bank(self) -> float:
        lora, layout = self._config.lora, self._inspection.pruned
        levels = sum(bits != FULL_BITS for bits in self._config.quantize.bits)
        linears = [linear for group in layout.groups for linear in group.linears]
        if lora.init == "loftq" and lora.svd == "exact":
            by_weight = sum(10 * linear.num_weights * min(linear.rows, linear.columns) for linear in linears)
        else:
            by_weight = sum(SVD_OPERATIONS * linear.num_weights for linear in linears)
        return float(levels * lora.loftq_iterations * by_weight)

    def _questions(self, section: str) -> float:
        """Every answer of every question is a row of its own."""
        words = self._inspection.questions.get(section, [])
        tokens = sum(len(text) for text in words) / CHARACTERS_A_TOKEN
        return 2 * self._pruned * CHOICES * (tokens + 8 * len(words)) * (1 + self._config.evaluate.num_fewshot)


def _matrix_weights(layout: Layout, model_config: Any) -> int:
    """Weights that every token is multiplied with: all but an embedding table that is not the head too."""
    embeddings = int(model_config.vocab_size) * int(model_config.hidden_size)
    return layout.num_parameters - (0 if model_config.tie_word_embeddings else embeddings)


def _lengths(rows: Sequence[Example], config: RunConfig) -> list[int]:
    """About how many tokens each row has."""
    found = []
    for row in rows:
        tokens = sum(map(len, (row.prompt, row.context, row.response))) // CHARACTERS_A_TOKEN + 4
        tokens += ALPACA_TOKENS if row.format == "instruction" else 0
        found.append(min(tokens, config.data.max_length))
    return found


def _padded(lengths: Sequence[int], rows: int) -> float:
    """Mean length of batches that are padded to their longest row."""
    longest = [max(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
    return sum(longest) / len(longest)


def facts(config: RunConfig, inspection: Inspection, rates: Rates, slots: int) -> dict[str, Any]:
    """Every figure as plain data."""
    works = {
        "trial, training": training_memory,
        "trial, scoring": scoring_memory,
        "prune": prune_memory,
        "sensitivity": sensitivity_memory,
    }
    memory = {name: work(config, inspection) for name, work in works.items()}
    time = hours(config, inspection, rates, slots)
    return {
        "memory": {name: {"at": each.about, "parts": each.parts, "total": each.total} for name, each in memory.items()},
        "hours": {
            "rates": rates.origin,
            "stages": time.stages,
            "total": time.total,
            "at_most": time.at_most,
            "wall": time.wall,
            "slots": slots,
        },
    }


def text(found: Mapping[str, Any], has_gpu: bool) -> list[str]:
    """The same as lines."""
    lines = []
    for name, each in found["memory"].items():
        lines.append(f"memory, {name}: {_amount(each['total'])} at most ({each['at']})")
        lines += [f"    {part:<12} {_amount(size):>10}" for part, size in each["parts"].items()]
    time = found["hours"]
    unit = "GPU hours" if has_gpu else "slot hours"
    lines.append(
        f"time, {time['total']:.2f} {unit} (at most {time['at_most']:.2f}, with no trial stopped), about "
        f"{time['wall']:.2f} hours on {time['slots']} slot(s):"
    )
    lines += [f"    {stage:<12} {taken:>10.3f}" for stage, taken in time["stages"].items()]
    lines.append(
        f"    {time['rates']}; rows of {CHARACTERS_A_TOKEN} characters a token, {CHOICES} answers a question; without "
        "starts of processes, loading and saving"
    )
    return lines


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
