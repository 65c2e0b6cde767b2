"""Estimate the hours of each stage: its operations, counted from the shapes, divided by the speed of timed steps.

Operations per weight and token (Kaplan et al., arXiv 2001.08361, section 2.1): 2 in the forward pass, 2 for gradients
of inputs and 2 for gradients of weights. Adapters need no gradients of weights; checkpointing adds a forward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from qpruner.config.schema import EXPANSION, INFORMATION, MEASUREMENT, RunConfig
from qpruner.estimate.step_times import measure, packing_operations
from qpruner.pipeline.bank import Bank
from qpruner.pipeline.comparison import Comparison
from qpruner.pipeline.evaluate import Evaluate
from qpruner.pipeline.finetune import Finetune
from qpruner.pipeline.flow import STAGES
from qpruner.pipeline.preflight import Inspection, most_controls
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN, about_labelled, about_tokens
from qpruner.pipeline.prune import Prune
from qpruner.pipeline.search import Search
from qpruner.pipeline.sensitivity import Sensitivity
from qpruner.pipeline.serve import Serve
from qpruner.plans.plan import EMBEDDINGS, HEAD, Group, Layout
from qpruner.pruning.grams import gram_bytes
from qpruner.quantization.formats import format_of

CHOICES = 4
"""Assumed number of answers to choose from in each question of a task."""
PADDING = 1.2
"""Tokens of a micro-batch relative to its rows, as rows of a batch are sorted by length: 1 to 1.3 for real texts."""
UNTUNED = 3
"""Number of models that are scored without a fine-tune: base, pruned, and quantized by the winner's plan."""


@dataclass(frozen=True)
class Rates:
    """Operations per second of one slot (room for one trial), by kind of work; `origin` says what was timed."""

    training: float
    scoring: float
    packing: float
    origin: str

    def on(self, gpus: float) -> Rates:
        """Return the rates of a slot that has this share of a GPU; several GPUs make a trial no faster than one."""
        if gpus >= 1:
            return self
        origin = f"{self.origin}, a slot has {gpus:g} of a GPU"
        return Rates(self.training * gpus, self.scoring * gpus, self.packing * gpus, origin)


def measured_rates(config: RunConfig, inspection: Inspection, threads: int, machine: str) -> Rates:
    """Time a micro-batch and the packing of a layer on this machine, in formats that fill the configured budget."""
    count, layout = _Count(config, inspection), inspection.pruned
    low, high = (layout.plan_bytes(plan) for plan in (layout.smallest(), layout.largest()))
    share_high = min(1.0, (inspection.budget_bytes - low) / (high - low)) if high > low else 0.0
    model_config, labelled = inspection.cuts[0].expected, count.share_labelled("train")
    training, scoring, packing = measure(config, model_config, layout, share_high, labelled, threads)
    rows, length = config.training.micro_batch_size, config.data.max_length
    operations = rows * length * count.weights_a_token("train")
    origin = (
        f"measured on {machine}: {rows} rows x {length} tokens take {training:.3g} s forward and backward, "
        f"{scoring:.3g} s forward"
    )
    return Rates(count.step_operations * operations / training, 2 * operations / scoring, packing, origin)


def multiply_adds(layout: Layout, model_config: Any) -> int:
    """Count the multiply-adds per token: one for each weight, except embeddings that are not also the head."""
    embeddings = int(model_config.vocab_size) * int(model_config.hidden_size)
    return layout.num_parameters - (0 if model_config.tie_word_embeddings else embeddings)


class StageTime(NamedTuple):
    """The hours of a stage on one slot (room for one trial), and how many slots work on it at once."""

    hours: float
    slots: int


def stage_times(
    config: RunConfig, inspection: Inspection, rates: Rates, slots: int, has_gpus: bool = False
) -> dict[str, StageTime]:
    """Estimate the time of each stage that runs, in order of the flow; starts, loading and saving are not included."""
    count, workers, compared = _Count(config, inspection), config.finetune.num_workers, num_compared(config)
    judged = count.split("confirmation") / 2
    finetune = count.training(count.finetune_steps()) / rates.training
    finetune += (count.split("validation") + judged) / rates.scoring
    evaluation = count.evaluation() / rates.scoring
    packing = count.bank() / rates.packing + count.rounding() / rates.training
    search = count.training(expected_steps(config)[0]) / rates.training + count.search_scores() / rates.scoring
    # The base model in transformers and in three files, and every form; speeds take as long as losses.
    served = 2 * (4 + len(config.serve.to)) * judged / rates.scoring
    is_shared = has_gpus and set(MEASUREMENT) & set(config.measured_methods)
    times: dict[Any, tuple[float, int]] = {
        Prune: (count.prune() / rates.training, 1),
        Bank: (packing, min(slots, len(inspection.pruned.groups))),
        Sensitivity: (count.sensitivity() / rates.training, slots if is_shared else 1),
        Search: (search, min(slots, config.num_trials)),
        Finetune: (finetune, workers),
        Evaluate: ((1 + UNTUNED) * evaluation, min(slots, 1 + UNTUNED)),
        Comparison: (compared * (finetune + evaluation), max(1, min(slots // workers, compared)) * workers),
        Serve: (served, 1),
    }
    wanted = [stage for stage in STAGES if stage in times and stage.is_wanted(config)]
    return {stage.name: StageTime(times[stage][0] / 3600, times[stage][1]) for stage in wanted}


def expected_steps(config: RunConfig) -> tuple[float, float]:
    """Estimate the total optimizer steps, and the total rungs reached, of all trials of a search.

    ASHA keeps one trial in `reduction_factor` at each rung, but every plan to beat (`preflight.most_controls`).
    """
    search = config.search
    controls = min(config.num_trials, most_controls(config))
    shares = [search.reduction_factor**-position for position in range(len(search.rungs))]
    lengths = [after - before for before, after in zip((0, *search.rungs), search.rungs, strict=False)]
    others = config.num_trials - controls
    steps = sum(share * length for share, length in zip(shares, lengths, strict=True))
    return controls * search.steps + others * steps, controls * len(search.rungs) + others * sum(shares)


def num_compared(config: RunConfig) -> int:
    """Count the fine-tunes that `finetune.compare` adds to the first one of the winner; equal plans share one."""
    methods, settings, levels = config.measured_methods, config.finetune, config.quantize.levels
    has_best = bool(methods) and config.is_searched
    shown = set(methods) if settings.seed_rows == "all" else {"mutual_information"} & set(methods)
    # With `all` the best seed plan is not counted here but under all `seeds` below.
    seed_rows = len(shown) - (has_best and settings.seed_rows == "all")
    is_own_row = not config.quantize.has_choice or config.search.plan_method in shown
    paper, unpruned = "mutual_information" in methods, 0 if config.prune.is_off else 2
    uniform = sum(format_of(name).is_packed for name in levels)
    once = 2 + uniform + paper + unpruned + seed_rows - is_own_row
    drawn = settings.random_plans if config.quantize.has_choice else 0
    # The best control, which is one of these rows, gets the other training seeds too.
    return once + config.is_searched * (settings.seeds - 1) + (1 + has_best + drawn) * settings.seeds - 1


class _Count:
    """Counts the operations of a run, by kind of work."""

    def __init__(self, config: RunConfig, inspection: Inspection) -> None:
        self._config, self._inspection = config, inspection
        self.step_operations = 6 if config.training.gradient_checkpointing else 4
        self._pruned = multiply_adds(inspection.pruned, inspection.model_config)
        self._base = multiply_adds(inspection.base, inspection.model_config)
        self._head = int(inspection.model_config.vocab_size) * int(inspection.model_config.hidden_size)
        examples, most = inspection.examples, config.data.max_length
        self._lengths = {name: [min(sum(about_tokens(row)), most) for row in examples[name]] for name in examples}

    def share_labelled(self, name: str) -> float:
        rows = self._inspection.examples[name]
        return sum(about_labelled(row, self._config.data) for row in rows) / sum(self._lengths[name])

    def weights_a_token(self, name: str) -> float:
        """Return the mean multiply-adds per token of a split; the head runs only at tokens with a label."""
        return self._pruned - (1 - self.share_labelled(name)) * self._head

    def training(self, steps: float) -> float:
        lengths, mean = self._lengths["train"], float(self._config.data.max_length)
        if not self._config.data.packing:
            mean = PADDING * sum(lengths) / len(lengths)
        rows = steps * self._config.training.batch_size
        return rows * mean * self.weights_a_token("train") * self.step_operations

    def finetune_steps(self) -> float:
        settings, batch = self._config.finetune, self._config.training.batch_size
        return settings.steps or (settings.epochs or 0) * math.ceil(len(self._lengths["train"]) / batch)

    def split(self, name: str) -> float:
        # A forward pass. Rows of similar length share a batch, so there is hardly any padding.
        return 2 * self.weights_a_token(name) * sum(self._lengths[name])

    def search_scores(self) -> float:
        """Count the operations of validation at every rung, and of scoring the finalists on fresh rows."""
        search, (_, rungs) = self._config.search, expected_steps(self._config)
        rung = self.split("validation") + self._questions("search")
        # A given plan is the only finalist to score: an earlier search has already scored the controls.
        best = min(search.max_trials, search.confirm + len(self._config.measured_methods))
        finalists = best if self._config.is_searched else 1
        return rungs * rung + finalists * (self.split("confirmation") / 2 + self._questions("search"))

    def evaluation(self) -> float:
        return self._questions("evaluate") + sum(self._lengths.get("text", ())) * 2 * self._pruned

    def prune(self) -> float:
        """Count importance and compensation in every step; blocks are dropped in one."""
        passes = 0
        for settings in (cut.settings for cut in self._inspection.cuts if not cut.settings.is_off):
            each = {"fisher": 6, "taylor": 6, "fluctuation": 2, "activation_norm": 2}.get(settings.importance, 0)
            each += 0 if settings.compensates_by == "none" else 4
            passes += each * settings.num_steps if settings.width_units else 0
            passes += 10 if settings.drops_blocks else 0
        return passes * self._calibration_tokens * self._base

    @property
    def _calibration_tokens(self) -> int:
        return self._inspection.samples["importance"] * self._inspection.sample_length

    def sensitivity(self) -> float:
        settings, methods = self._config.sensitivity, set(self._config.measured_methods)
        rows = self._lengths["train"][: self._config.calibration.num_sensitivity_samples]
        passes = 2.0 * bool(methods & set(INFORMATION)) + 6 * bool(methods & set(EXPANSION))
        if methods & set(MEASUREMENT):
            # Half a forward pass for each group and format: outputs of the blocks before the group are kept.
            measured = min(1.0, settings.num_measured_samples / max(1, len(rows)))
            packed = [name for group in self._inspection.pruned.groups for name in group.formats]
            passes += measured * sum(format_of(name).is_packed for name in packed)
        return passes * sum(rows) * self._pruned

    def bank(self) -> float:
        """Count the operations of packing every group of blocks in every format; embeddings and head need no SVD."""
        layers = [
            (each, sum(format_of(name).is_packed for name in group.formats))
            for group in self._blocks
            for each in group.linears
        ]
        return sum(packing_operations(each.rows, each.columns, self._config.lora, levels) for each, levels in layers)

    def rounding(self) -> float:
        """Count the operations of GPTQ: two passes over the samples, Gram matrices of inputs, and the rounding."""
        if self._config.quantize.rounding != "gptq":
            return 0.0
        squares = sum(gram_bytes(self._inspection.pruned, self._inspection.cuts[0].expected)) / 4
        layers = [(each, len(group.formats)) for group in self._blocks for each in group.linears]
        rounded = sum(levels * each.rows * each.columns**2 for each, levels in layers)
        return 2 * self._calibration_tokens * (2 * self._pruned + squares) + rounded

    @property
    def _blocks(self) -> list[Group]:
        return [group for group in self._inspection.pruned.groups if group.name not in (EMBEDDINGS, HEAD)]

    def _questions(self, section: str) -> float:
        """Count the operations of scoring questions; every answer is a separate row."""
        words = self._inspection.questions.get(section, [])
        tokens = sum(len(text) for text in words) / CHARACTERS_A_TOKEN
        return 2 * self._pruned * CHOICES * (tokens + 8 * len(words)) * (1 + self._config.evaluate.num_fewshot)
