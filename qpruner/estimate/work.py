"""Hours of each stage: operations, counted from the shapes, over how many of them a slot does in a second.

Operations (Kaplan et al., arXiv 2001.08361, section 2.1): 2 per weight and token forward, 2 backward to the inputs and
2 to the weights. Adapters leave the latter out; gradient checkpointing adds a forward pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qpruner.config.schema import EXPANSION, INFORMATION, MEASUREMENT, PruneConfig, RunConfig
from qpruner.data.sources import Example
from qpruner.estimate.matmul_speed import packing_operations
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN, about_labelled, about_tokens
from qpruner.plans.plan import FULL_BITS, Layout
from qpruner.quantization.bank import is_soon_packed

CHOICES = 4
"""Answers that a question of a task is asked with."""
UNTUNED = 3
"""Models that are scored without a fine-tune: base, pruned, and quantized by the winner's plan."""
START_SECONDS = 14.0
"""Of a core, for a worker's start and its share of Ray's own (8.3 s of them imports, on a core with AVX2, 2026-11-27).
A small model's bank is mostly that."""
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
BESIDE_PRODUCTS = 2.5e-9
"""Seconds, over the hidden width, that a CPU core spends beside an operation of matrix products: norms, activations,
softmax, decoding. On a core with AVX512-BF16 (products at 500 GFLOP/s) and steps of 4 x 128 tokens it was 2.3, 2.4, 2.3
and 3.0e-9 at widths of 256, 576, 1152 and 2048; kept to AVX2 (110 GFLOP/s) 3.8, 3.4 and 2.5e-9 at the first three
(means of training and scoring, `qpruner.estimate.step_times`, 2026-11-26)."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of one slot, and where they come from.

    Attributes:
        training: In forward and backward passes of the budget's plan.
        scoring: In forward passes.
        origin: What was assumed or measured.
        packing: In quantizing and factorizing, where that was timed; None takes it for as fast as scoring.
        busy: What is to be said of what else this machine did, where its cores were timed.
    """

    training: float
    scoring: float
    origin: str
    packing: float | None = None
    busy: str | None = None

    def on(self, gpus: float) -> Rates:
        """Of a slot that holds so much of a GPU; what it holds beyond one does not make a trial faster."""
        if gpus >= 1:
            return self
        return replace(
            self,
            training=self.training * gpus,
            scoring=self.scoring * gpus,
            packing=self.packing and self.packing * gpus,
            origin=f"{self.origin}, {gpus:g} of a GPU a slot",
        )


def assumed_rates(gpu: str) -> Rates:
    """Rates of a GPU by its name."""
    known = next((name for name in TERAFLOPS if name in gpu), None)
    if known is None:
        known = "A10"
        about = f"assumed: the speed of {gpu} is not known here, that of an {known}"
    else:
        about = f"assumed: {gpu}"
    speed = TERAFLOPS[known] * 1e12 * GPU_UTILIZATION
    return Rates(speed, speed, f"{about}, {TERAFLOPS[known]:g} TFLOP/s x {GPU_UTILIZATION:.0%} utilization")


def gpu_rates(products: float, about: str) -> Rates:
    """Rates of a GPU here, which was timed at so many operations a second of matrix products."""
    speed = products * GPU_UTILIZATION
    return Rates(speed, speed, f"{about}: {products / 1e12:.3g} TFLOP/s x {GPU_UTILIZATION:.0%} utilization (assumed)")


def cpu_rates(products: float, width: int, threads: int, about: str) -> Rates:
    """Rates of cores here, which were timed at so many operations a second of matrix products.

    Args:
        products: Operations a second.
        width: Hidden width of the model.
        threads: Cores of a slot, among which what is done beside the products is shared, too.
        about: What was timed.
    """
    speed = 1 / (1 / products + BESIDE_PRODUCTS / width / threads)
    return Rates(
        speed,
        speed,
        f"{about}: {products / 1e9:.0f} GFLOP/s, about {speed / 1e9:.0f} with what else a step does",
    )


def measured_rates(config: RunConfig, inspection: Inspection, training: float, scoring: float, where: str) -> Rates:
    """Rates at which a micro-batch of rows of full length, with the training rows' share of labels, takes so many
    seconds forward and backward, or forward."""
    rows, length = config.training.micro_batch_size, config.data.max_length
    operations = rows * length * _Count(config, inspection).weights_a_token("train")
    origin = (
        f"measured on {where}: {rows} rows x {length} tokens take {training:.3g} s forward and backward, "
        f"{scoring:.3g} s forward"
    )
    return Rates(_operations(config) * operations / training, 2 * operations / scoring, origin)


def share_at_highest(config: RunConfig, inspection: Inspection) -> float:
    """Where the budget lies between all groups at the lowest bits (0) and all at the highest (1)."""
    layout, levels = inspection.pruned, config.quantize.bits
    low, high = (layout.plan_bytes(layout.uniform(bits)) for bits in (levels[0], levels[-1]))
    return min(1.0, (inspection.budget_bytes - low) / (high - low)) if high > low else 0.0


def share_labelled(config: RunConfig, inspection: Inspection) -> float:
    """Share of the training rows' tokens that have a label."""
    return _Count(config, inspection).share_labelled("train")


def _operations(config: RunConfig) -> int:
    """A weight and token, of a training step."""
    return 6 if config.training.gradient_checkpointing else 4


@dataclass(frozen=True)
class Hours:
    """Hours of one slot that each stage takes, without starts of processes, loading and saving.

    Attributes:
        stages: Stage -> hours, all its jobs added up.
        shared: Stage -> slots that its jobs are shared among.
        done: Of these, what the run's folder holds already.
        at_most: All stages with no trial stopped early.
        wall: With the slots there are, trials and fine-tunes side by side.
        wall_left: Of this, what is not done.
        comparison: Hours of one slot that `finetune.compare` adds or would add; among `stages` where it is on.
    """

    stages: dict[str, float]
    shared: dict[str, int]
    done: float
    at_most: float
    wall: float
    wall_left: float
    comparison: float

    @property
    def total(self) -> float:
        return sum(self.stages.values())


def hours(
    config: RunConfig,
    inspection: Inspection,
    rates: Rates,
    slots: int,
    done: Mapping[str, float] | None = None,
    has_gpus: bool = False,
) -> Hours:
    """Time by stage.

    Args:
        config: The run's configuration.
        inspection: Shapes, rows and questions.
        rates: Operations a second of a slot.
        slots: Trials, or fine-tunes, at once.
        done: How much of each stage is recorded, from 0 to 1.
        has_gpus: Whether slots hold GPUs, among which groups are measured; what else scores them is little beside that.
    """
    counted = _Count(config, inspection)
    others = num_compared(config)
    steps, trials = expected_steps(config), config.num_trials
    packers = min(slots, len(inspection.pruned.groups))
    starts = 0 if has_gpus else counted.bank_starts(packers)
    stages = {
        "prune": counted.prune() / rates.training,
        "bank": counted.bank() / (rates.packing or rates.scoring) + starts * START_SECONDS,
        "sensitivity": counted.sensitivity() / rates.training,
        "search": counted.training(steps.steps) / rates.training + counted.search_scores(steps) / rates.scoring,
        "finetune": counted.training(counted.finetune_steps()) / rates.training
        + (counted.split("validation") + counted.split("confirmation") / 2) / rates.scoring,
        "evaluate": (1 + UNTUNED) * counted.evaluation() / rates.scoring,
    }
    comparison = others * (stages["finetune"] + counted.evaluation() / rates.scoring)
    if config.finetune.compare:
        stages["comparison"] = comparison
    every = _Steps(trials * config.search.steps, trials * len(config.search.rungs))
    unstopped = counted.training(every.steps) / rates.training + counted.search_scores(every) / rates.scoring
    workers = config.finetune.num_workers
    shared = {
        "prune": 1,
        "bank": packers,
        "sensitivity": slots if has_gpus and set(MEASUREMENT) & set(config.measured_methods) else 1,
        "search": min(slots, trials),
        "finetune": workers,
        "evaluate": min(slots, 1 + UNTUNED),
        "comparison": max(1, min(slots // workers, others)) * workers,
    }
    shared = {name: shared[name] for name in stages}
    walls = {name: seconds / shared[name] / 3600 for name, seconds in stages.items()}
    in_hours = {name: seconds / 3600 for name, seconds in stages.items()}
    shares = {name: (done or {}).get(name, 0.0) for name in stages}
    return Hours(
        stages=in_hours,
        shared=shared,
        done=sum(shares[name] * each for name, each in in_hours.items()),
        at_most=sum(in_hours.values()) - in_hours["search"] + unstopped / 3600,
        wall=sum(walls.values()),
        wall_left=sum((1 - shares[name]) * each for name, each in walls.items()),
        comparison=comparison / 3600,
    )


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
    controls = min(config.num_trials, max(1, len(config.quantize.bits) - 1 + len(config.measured_methods)))
    shares = [search.reduction_factor**-position for position in range(len(search.rungs))]
    lengths = [after - before for before, after in zip((0, *search.rungs), search.rungs, strict=False)]
    others = config.num_trials - controls
    steps = sum(share * length for share, length in zip(shares, lengths, strict=True))
    return _Steps(controls * search.steps + others * steps, controls * len(search.rungs) + others * sum(shares))


def num_compared(config: RunConfig) -> int:
    """Fine-tunes that `finetune.compare` adds to the winner's first: of the other rows, and of the winner under further
    training seeds. Rows of one plan share theirs. Without a search only one trial is confirmed, so no seed is the best;
    the winner is then its own row: of its method, or of the only bit-width.
    """
    methods, settings, bits = config.measured_methods, config.finetune, config.quantize.bits
    has_best = bool(methods) and config.is_searched
    shown = set(methods) if settings.seed_rows == "all" else {"mutual_information"} & set(methods)
    # `all`: every method but the best
    seed_rows = len(shown) - (has_best and settings.seed_rows == "all")
    is_own_row = len(bits) == 1 or config.search.plan_method in shown
    once = 2 + sum(each != FULL_BITS for each in bits) + seed_rows - is_own_row
    drawn = settings.random_plans if len(bits) > 1 else 0
    return once + (1 + has_best + drawn) * settings.seeds - 1


class _Count:
    """Counts operations."""

    def __init__(self, config: RunConfig, inspection: Inspection) -> None:
        self._config, self._inspection = config, inspection
        self._pruned = _matrix_weights(inspection.pruned, inspection.model_config)
        self._base = _matrix_weights(inspection.base, inspection.model_config)
        self._head = int(inspection.model_config.vocab_size) * int(inspection.model_config.hidden_size)
        self._lengths = {name: _lengths(rows, config) for name, rows in inspection.examples.items()}

    def share_labelled(self, name: str) -> float:
        """Share of a split's tokens that have a label."""
        rows = self._inspection.examples[name]
        return sum(about_labelled(row, self._config.data) for row in rows) / sum(self._lengths[name])

    def weights_a_token(self, name: str) -> float:
        """Weights that a token of a split is multiplied with, on average: the head's where it has a label."""
        return self._pruned - (1 - self.share_labelled(name)) * self._head

    def training(self, steps: float) -> float:
        """Of optimizer steps, padding included."""
        training, lengths = self._config.training, self._lengths["train"]
        mean, padding = sum(lengths) / len(lengths), 0.0
        if self._config.data.packing:
            mean = float(self._config.data.max_length)
        else:
            rows = random.Random(self._config.seed).sample(lengths, len(lengths))
            padding = _padded(rows, training.batch_size, training.micro_batch_size) - mean
        weights = mean * self.weights_a_token("train") + padding * (self._pruned - self._head)
        return steps * training.batch_size * weights * _operations(self._config)

    def finetune_steps(self) -> float:
        settings, batch = self._config.finetune, self._config.training.batch_size
        return settings.steps or (settings.epochs or 0) * math.ceil(len(self._lengths["train"]) / batch)

    def split(self, *names: str) -> float:
        """Forward passes over rows of like length together, so without padding."""
        return sum(2 * self.weights_a_token(name) * sum(self._lengths[name]) for name in names)

    def search_scores(self, steps: _Steps) -> float:
        """Validation at every rung, and the finalists on fresh rows."""
        search = self._config.search
        rung = self.split("validation") + self._questions("search")
        # Of a plan that is given only that: the controls beside it were scored by the search that tried them.
        best = min(search.max_trials, search.confirm + len(self._config.measured_methods))
        finalists = best if self._config.is_searched else 1
        return steps.rungs * rung + finalists * (self.split("confirmation") / 2 + self._questions("search"))

    def evaluation(self) -> float:
        text = sum(self._lengths.get("text", ())) * 2 * self._pruned
        return self._questions("evaluate") + text

    def prune(self) -> float:
        """Of every cut."""
        return sum(self._cut(cut.settings) for cut in self._inspection.cuts)

    def _cut(self, settings: PruneConfig) -> float:
        """What whole blocks take, then importance and compensation for each of `prune.steps`."""
        counts = self._inspection.counts
        if settings.is_off:
            return 0.0
        per_weight = {"fisher": 6, "taylor": 6, "fluctuation": 2, "activation_norm": 2}.get(settings.importance, 0)
        per_weight += 4 if settings.compensates_by != "none" else 0
        tokens = counts.samples["importance"] * counts.sample_length
        passes = settings.num_steps * per_weight * tokens if settings.width_units else 0
        if settings.drops_blocks:
            passes += {"block_influence": 2, "taylor": 6}[settings.depth_importance] * tokens
            passes += 4 * tokens if settings.compensates_by == "least_squares" else 0
        return passes * self._base

    def sensitivity(self) -> float:
        settings, calibration = self._config.sensitivity, self._config.calibration
        rows = self._lengths["train"][: calibration.num_sensitivity_samples]
        tokens = sum(rows)
        methods = set(self._config.measured_methods)
        operations = 2.0 * tokens if methods & set(INFORMATION) else 0.0
        if methods & set(EXPANSION):
            operations += 6 * tokens
        if methods & set(MEASUREMENT):
            measured = tokens * min(1.0, settings.num_measured_samples / max(1, len(rows)))
            lower = len(self._config.quantize.bits) - 1 + (self._config.quantize.bits[-1] != FULL_BITS)
            # Half a forward pass a group and level: what lies before the group is kept.
            operations += measured * len(self._inspection.pruned.groups) * lower
        return operations * self._pruned

    def bank(self) -> float:
        levels = sum(bits != FULL_BITS for bits in self._config.quantize.bits)
        linears = [linear for group in self._inspection.pruned.groups for linear in group.linears]
        return sum(packing_operations(each.rows, each.columns, self._config.lora, levels) for each in linears)

    def bank_starts(self, slots: int) -> int:
        """Workers that are started for the bank; one slot, or few weights, start none."""
        return 0 if slots == 1 or is_soon_packed(self._inspection.pruned) else slots

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
    return [min(sum(about_tokens(row)), config.data.max_length) for row in rows]


def _padded(lengths: Sequence[int], batch_size: int, rows: int) -> float:
    """Mean length of rows in micro-batches of so many, each padded to its longest; rows of a batch come by length."""
    padded = 0
    for start in range(0, len(lengths), batch_size):
        batch = sorted(lengths[start : start + batch_size], reverse=True)
        padded += sum(longest * len(batch[at : at + rows]) for at, longest in enumerate(batch) if at % rows == 0)
    return padded / len(lengths)
