"""Estimate the hours of the longest stages.

The tokens that a stage passes through the model are multiplied by the seconds per token of timed
steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qpruner.config.schema import RunConfig
from qpruner.data.sources import Example
from qpruner.estimate.step_times import measure
from qpruner.pipeline.comparison import Comparison, num_rounded
from qpruner.pipeline.controls import may_merge
from qpruner.pipeline.evaluate import Evaluate
from qpruner.pipeline.finetune import Finetune
from qpruner.pipeline.flow import wanted_stages
from qpruner.pipeline.pilot import Pilot, num_fine_tunes
from qpruner.pipeline.preflight import Inspection, most_controls
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN, about_labelled, about_tokens
from qpruner.pipeline.prune import Prune
from qpruner.pipeline.search import Search
from qpruner.quantization.tuned import BATCH_SIZE, MOST_TOKENS

IMPORTANCE_PASSES = {"fisher": 3, "taylor": 3, "fluctuation": 1, "activation_norm": 1}
"""Forward passes that the importance of a criterion takes; a backward pass counts as two."""
ANSWER_TOKENS = 8  # assumed length of an answer
CHOICES = 4  # assumed number of answers to choose from in each question of a task
PADDING = 1.2
"""Tokens of a micro-batch relative to its rows, as rows of a batch are sorted by length: 1 to 1.3
for real texts."""
UNTUNED = 3
"""Number of models scored without a fine-tune: base, pruned, quantized by the winner's plan."""


@dataclass(frozen=True)
class Rates:
    """Seconds per token of training and of a forward pass on one slot, and what was timed.

    A slot is the room for one trial.
    """

    training: float
    scoring: float
    origin: str


def measured_rates(config: RunConfig, inspection: Inspection, threads: int, machine: str) -> Rates:
    """Time a micro-batch on this machine, with every block in its smallest format."""
    examples = inspection.rows.examples["train"]
    labelled = sum(about_labelled(row, config.data) for row in examples)
    share_labelled = min(1.0, labelled / sum(_lengths(config, examples)))
    shapes = inspection.shapes
    model_config = shapes.cuts[shapes.reference.cut].model_config
    training, scoring = measure(config, model_config, share_labelled, threads)

    rows = config.training.micro_batch_size
    length = config.data.max_length
    seconds = f"{training:.3g} s forward and backward, {scoring:.3g} s forward"
    origin = f"measured on {machine}: {rows} rows x {length} tokens take {seconds}"
    tokens = rows * length
    return Rates(training / tokens, scoring / tokens, origin)


def _lengths(config: RunConfig, examples: Sequence[Example]) -> list[int]:
    return [min(sum(about_tokens(row)), config.data.max_length) for row in examples]


class StageTime(NamedTuple):
    """The hours of a stage on one slot, and the number of slots that work on it at once.

    A slot is the room for one trial.
    """

    hours: float
    slots: int


def stage_times(
    config: RunConfig, inspection: Inspection, rates: Rates, slots: int
) -> dict[str, StageTime]:
    """Estimate the time of the stages that take longest.

    Starts of processes, loading, packing and saving are not included.
    """
    count = _Tokens(config, inspection)
    workers = config.finetune.num_workers
    judged = count.split("confirmation") / 2
    finetune = count.training(count.finetune_steps()) * rates.training
    finetune += (count.split("validation") + judged) * rates.scoring
    evaluation = count.evaluation() * rates.scoring
    steps = expected_steps(config)[0] + num_confirmed_again(config) * config.search.steps
    search = count.training(steps) * rates.training + count.search_scores() * rates.scoring
    tried = num_fine_tunes(config)
    pilot = count.training(config.search.steps) * rates.training
    pilot += count.split("validation") * rates.scoring
    rounding = count.tuned_rounding() * rates.scoring
    compared = num_compared(config)
    rounded = num_rounded(config)
    merged = config.finetune.seeds if may_merge(config) else 0
    compared_at_once = max(1, min(slots // workers, compared))

    times: dict[Any, tuple[float, int]] = {
        Prune: (count.prune() * rates.scoring, 1),
        Pilot: (tried * pilot, min(slots, tried)),
        Search: (search, min(slots, config.num_trials)),
        Finetune: (rounding + finetune, workers),
        Evaluate: ((1 + UNTUNED) * evaluation, min(slots, 1 + UNTUNED)),
        Comparison: (
            rounded * rounding + compared * (finetune + evaluation) + merged * evaluation,
            compared_at_once * workers,
        ),
    }
    stages: dict[str, StageTime] = {}
    for stage in wanted_stages(config):
        if stage in times:
            seconds, slots_of_stage = times[stage]
            stages[stage.name] = StageTime(seconds / 3600, slots_of_stage)
    return stages


def expected_steps(config: RunConfig) -> tuple[float, float]:
    """Estimate the total optimizer steps, and the total rungs reached, of all trials of a search.

    ASHA keeps one trial in `reduction_factor` at each rung, but every plan to beat
    (`preflight.most_controls`).
    """
    search = config.search
    steps = 0.0
    rungs = 0.0
    reached = 0
    for position, rung in enumerate(search.rungs):
        share = search.reduction_factor**-position  # of the trials that are not controls
        steps += share * (rung - reached)
        rungs += share
        reached = rung

    controls = min(config.num_trials, most_controls(config))
    others = config.num_trials - controls
    all_steps = controls * search.steps + others * steps
    all_rungs = controls * len(search.rungs) + others * rungs
    return all_steps, all_rungs


def num_confirmed_again(config: RunConfig) -> int:
    """Count the trainings of finalists under further seeds.

    This is their largest number: it assumes that no finalist can be told apart from the best.
    """
    if not config.is_searched:
        return 0
    search = config.search
    return min(search.max_trials, search.confirm + 1) * search.confirm_seeds


def num_compared(config: RunConfig) -> int:
    """Count the fine-tunes that `finetune.compare` adds to the first one of the winner.

    Equal plans share one fine-tune.
    """
    settings = config.finetune
    # Base and pruned model, and the controls, the best of which gets the other training seeds too.
    once = 2 + most_controls(config)
    if config.is_searched:
        once += settings.seeds - 1
    if may_merge(config):  # the base is merged under every seed
        once += settings.seeds - 1
    drawn = settings.random_plans if config.has_choice else 0
    return once + (1 + drawn) * settings.seeds - 1


class _Tokens:
    """Counts the tokens that each kind of work passes through the model.

    A backward pass takes as long as two forward passes, and counts as much.
    """

    def __init__(self, config: RunConfig, inspection: Inspection) -> None:
        self._config = config
        self._inspection = inspection
        self._lengths = {
            name: _lengths(config, examples) for name, examples in inspection.rows.examples.items()
        }

    def training(self, steps: float) -> float:
        """Count the tokens of optimizer steps, padding included."""
        mean = float(self._config.data.max_length)
        if not self._config.data.packing:
            lengths = self._lengths["train"]
            mean = PADDING * sum(lengths) / len(lengths)
        return steps * self._config.training.batch_size * mean

    def finetune_steps(self) -> float:
        """Count the optimizer steps of the final fine-tune."""
        settings = self._config.finetune
        if settings.steps:
            return settings.steps
        steps_an_epoch = math.ceil(len(self._lengths["train"]) / self._config.training.batch_size)
        return (settings.epochs or 0) * steps_an_epoch

    def split(self, name: str) -> float:
        return sum(self._lengths[name])

    def search_scores(self) -> float:
        """Count the tokens of scoring at every rung, and of finalists on fresh rows."""
        config = self._config
        search = config.search
        questions = self._questions("search")
        _, rungs = expected_steps(config)
        # A given plan is the only finalist to score: an earlier search has already scored the
        # controls.
        finalists = 1
        if config.is_searched:
            finalists = min(search.max_trials, search.confirm + most_controls(config))
        finalists += num_confirmed_again(config)
        at_rungs = rungs * (self.split("validation") + questions)
        return at_rungs + finalists * (self.split("confirmation") / 2 + questions)

    def tuned_rounding(self) -> float:
        """Count the tokens of the pass that tunes the codes of a plan.

        Every row passes each block unquantized and tuned.
        """
        if self._config.quantize.rounding != "tuned":
            return 0.0
        tuning = self._config.quantize.tuning
        rows = 2 * tuning.rows + 3 * tuning.iterations * BATCH_SIZE
        return float(rows * MOST_TOKENS)

    def evaluation(self) -> float:
        return self._questions("evaluate") + sum(self._lengths.get("text", ()))

    def prune(self) -> float:
        """Count importance and compensation in every step.

        All cuts share the importance of the first.
        """
        passes = 0
        is_first = True
        for cut in self._inspection.shapes.cuts.values():
            settings = cut.settings
            if settings.is_off:
                continue
            if settings.width_units:
                importance = IMPORTANCE_PASSES.get(settings.importance, 0)
                compensation = 0 if settings.compensates_by == "none" else 2
                passes += (importance + compensation) * settings.num_steps
                if not is_first:
                    passes -= importance
            if settings.drops_blocks:
                passes += 5
            is_first = False
        calibration = self._config.calibration
        return passes * calibration.num_samples * calibration.max_length

    def _questions(self, section: str) -> float:
        """Count the tokens of questions; every answer is a separate row."""
        texts = self._inspection.rows.questions.get(section, [])
        tokens = sum(len(text) for text in texts) / CHARACTERS_A_TOKEN
        rows_a_question = CHOICES * (1 + self._config.evaluate.num_fewshot)
        return rows_a_question * (tokens + ANSWER_TOKENS * len(texts))
