"""Estimate the hours of each stage: its operations, counted from the shapes, divided by the speed of timed steps.

Operations per weight and token (Kaplan et al., arXiv 2001.08361, section 2.1): 2 in the forward pass, 2 for gradients
of inputs and 2 for gradients of weights. Adapters need no gradients of weights; checkpointing adds a forward pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qpruner.config.schema import EXPANSION, INFORMATION, MEASUREMENT, LoraConfig, PruneConfig, RunConfig
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
from qpruner.plans.plan import EMBEDDINGS, HEAD, Layout
from qpruner.pruning.grams import gram_bytes
from qpruner.quantization.formats import format_of

T = TypeVar("T")
CHOICES = 4
"""Assumed number of answers to choose from in each question of a task."""
UNPRUNED_PLANS = 2
"""Number of plans of the unpruned model that a search tries."""
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
    count, layout = _Count(config, inspection), inspection.reference
    low, high = (layout.plan_bytes(plan) for plan in (layout.smallest(), layout.largest()))
    share_high = min(1.0, (inspection.budget_bytes - low) / (high - low)) if high > low else 0.0
    model_config, labelled = next(iter(inspection.cuts.values())).expected, count.share_labelled("train")
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


def slot_hours(config: RunConfig, inspection: Inspection, rates: Rates) -> dict[str, float]:
    """Estimate the hours of each stage on one slot (room for one trial); starting, loading and saving do not count."""
    count, steps = _Count(config, inspection), expected_steps(config)[0]
    scores = count.split("validation") + count.split("confirmation") / 2
    finetune = count.training(count.finetune_steps()) / rates.training + scores / rates.scoring
    evaluation = count.evaluation() / rates.scoring
    seconds = {
        Prune: count.prune() / rates.training,
        Bank: count.bank() / rates.packing + count.rounding() / rates.training,
        Sensitivity: count.sensitivity() / rates.training,
        Search: count.training(steps) / rates.training + count.search_scores() / rates.scoring,
        Finetune: finetune,
        Evaluate: (1 + UNTUNED) * evaluation,
        Comparison: num_compared(config) * (finetune + evaluation),
        # The base model in transformers and in three files, and every form; speeds take as long as losses.
        Serve: 2 * (4 + len(config.serve.to)) * count.split("confirmation") / 2 / rates.scoring,
    }
    return {name: each / 3600 for name, each in _of_wanted(config, seconds).items()}


def slots_sharing(config: RunConfig, inspection: Inspection, slots: int, has_gpus: bool) -> dict[str, int]:
    """Return for each stage how many slots, each the room for one trial, work on it at once."""
    workers = config.finetune.num_workers
    measures = has_gpus and set(MEASUREMENT) & set(config.measured_methods)
    sharing = {
        Prune: 1,
        Bank: min(slots, len(inspection.reference.groups)),
        Sensitivity: slots if measures else 1,
        Search: min(slots, config.num_trials),
        Finetune: workers,
        Evaluate: min(slots, 1 + UNTUNED),
        Comparison: max(1, min(slots // workers, num_compared(config))) * workers,
        Serve: 1,
    }
    return _of_wanted(config, sharing)


def _of_wanted(config: RunConfig, by_stage: Mapping[Any, T]) -> dict[str, T]:
    """Keep the stages that the configuration needs, by name, in the order of the flow."""
    return {stage.name: by_stage[stage] for stage in STAGES if stage in by_stage and stage.is_wanted(config)}


def expected_steps(config: RunConfig) -> tuple[float, float]:
    """Estimate the total optimizer steps, and the total rungs reached, of all trials of a search.

    ASHA keeps one trial in `reduction_factor` at each rung, but every plan to beat (`preflight.most_controls`). The
    first trial at a rung always continues, so a small search takes more steps than this.
    """
    search = config.search
    controls = min(config.num_trials, most_controls(config))
    shares = [search.reduction_factor**-position for position in range(len(search.rungs))]
    lengths = [after - before for before, after in zip((0, *search.rungs), search.rungs, strict=False)]
    others = config.num_trials - controls
    steps = sum(share * length for share, length in zip(shares, lengths, strict=True))
    return controls * search.steps + others * steps, controls * len(search.rungs) + others * sum(shares)


def num_compared(config: RunConfig) -> int:
    """Count the fine-tunes that `finetune.compare` adds to the first fine-tune of the winner.

    They are for the other rows of the final table, and for the winner under further training seeds. Rows with the same
    plan share a fine-tune. Without a search there is no row `best seed`, for which the search chooses the sensitivity.
    """
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
        self._pruned = multiply_adds(inspection.reference, inspection.model_config)
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
        """Count the operations of optimizer steps, padding included."""
        training, lengths = self._config.training, self._lengths["train"]
        mean, padding = sum(lengths) / len(lengths), 0.0
        if self._config.data.packing:
            mean = float(self._config.data.max_length)
        else:
            rows = random.Random(self._config.seed).sample(lengths, len(lengths))
            padding = _padded(rows, training.batch_size, training.micro_batch_size) - mean
        weights = mean * self.weights_a_token("train") + padding * (self._pruned - self._head)
        return steps * training.batch_size * weights * self.step_operations

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
        return sum(self._cut(cut.settings) for cut in self._inspection.cuts.values())

    def _cut(self, settings: PruneConfig) -> float:
        """Count the operations of a cut: dropping whole blocks once, then importance and compensation in every step."""
        if settings.is_off:
            return 0.0
        per_weight = {"fisher": 6, "taylor": 6, "fluctuation": 2, "activation_norm": 2}.get(settings.importance, 0)
        per_weight += 4 if settings.compensates_by != "none" else 0
        tokens = self._inspection.samples["importance"] * self._inspection.sample_length
        passes = settings.num_steps * per_weight * tokens if settings.width_units else 0
        if settings.drops_blocks:
            passes += {"block_influence": 2, "taylor": 6}[settings.depth_importance] * tokens
            passes += 4 * tokens if settings.compensates_by == "least_squares" else 0
        return passes * self._base

    def sensitivity(self) -> float:
        settings, calibration = self._config.sensitivity, self._config.calibration
        rows = self._lengths["train"][: calibration.num_sensitivity_samples]
        tokens, methods = sum(rows), set(self._config.measured_methods)
        operations = 2.0 * tokens if methods & set(INFORMATION) else 0.0
        if methods & set(EXPANSION):
            operations += 6 * tokens
        measured = tokens * min(1.0, settings.num_measured_samples / max(1, len(rows)))
        if methods & set(MEASUREMENT):
            # Half a forward pass for each group and format: outputs of the blocks before the group are kept.
            operations += measured * self._packed_entries(in_blocks=True)
        if methods & {*MEASUREMENT, *EXPANSION}:
            operations += 2 * measured * self._packed_entries(in_blocks=False)
        return operations * self._pruned

    def _packed_entries(self, in_blocks: bool) -> int:
        """Count the pairs of a group and a packed format, of groups in blocks, or of embeddings and head."""
        groups = [
            group for group in self._inspection.reference.groups if (group.name in (EMBEDDINGS, HEAD)) != in_blocks
        ]
        return sum(format_of(name).is_packed for group in groups for name in group.formats)

    def bank(self) -> float:
        """Count the operations of packing every group in every format, and the groups of the base for two plans."""
        lora, operations = self._config.lora, 0.0
        has_base = not self._config.prune.is_off and (self._config.is_searched or self._config.finetune.compare)
        of_base = self._inspection.base.groups if has_base else ()
        for most, groups in ((math.inf, self._inspection.reference.groups), (UNPRUNED_PLANS, of_base)):
            for group in groups:
                levels = min(most, sum(format_of(name).is_packed for name in group.formats))
                own = LoraConfig(init="plain") if group.name in (EMBEDDINGS, HEAD) else lora
                operations += sum(packing_operations(each.rows, each.columns, own, levels) for each in group.linears)
        return operations

    def rounding(self) -> float:
        """Count the operations of GPTQ: two passes over the samples, Gram matrices of inputs, and the rounding."""
        inspection = self._inspection
        if self._config.quantize.rounding != "gptq":
            return 0.0
        tokens = inspection.samples["importance"] * inspection.sample_length
        squares = sum(gram_bytes(inspection.reference, next(iter(inspection.cuts.values())).expected)) / 4
        rounded = sum(
            len(group.formats) * each.rows * each.columns**2
            for group in inspection.reference.groups
            for each in group.linears
            if group.name not in (EMBEDDINGS, HEAD)
        )
        one = 2 * tokens * (2 * self._pruned + squares) + rounded
        return one if self._config.prune.is_off else 2 * one  # the base is rounded too

    def _questions(self, section: str) -> float:
        """Count the operations of scoring questions; every answer is a separate row."""
        words = self._inspection.questions.get(section, [])
        tokens = sum(len(text) for text in words) / CHARACTERS_A_TOKEN
        return 2 * self._pruned * CHOICES * (tokens + 8 * len(words)) * (1 + self._config.evaluate.num_fewshot)


def _padded(lengths: Sequence[int], batch_size: int, micro_batch: int) -> float:
    """Return the mean row length if each batch is sorted by length and cut into micro-batches, each padded alone."""
    padded = 0
    for start in range(0, len(lengths), batch_size):
        batch = sorted(lengths[start : start + batch_size], reverse=True)
        padded += sum(batch[at] * len(batch[at : at + micro_batch]) for at in range(0, len(batch), micro_batch))
    return padded / len(lengths)
