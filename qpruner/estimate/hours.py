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
from qpruner.pipeline.comparison import Comparison
from qpruner.pipeline.evaluate import Evaluate
from qpruner.pipeline.finetune import Finetune
from qpruner.pipeline.flow import STAGES
from qpruner.pipeline.preflight import Inspection, most_controls
from qpruner.pipeline.preflight_rows import CHARACTERS_A_TOKEN, about_labelled, about_tokens
from qpruner.pipeline.prune import Prune
from qpruner.pipeline.search import Search

CHOICES = 4  # assumed number of answers to choose from in each question of a task
PADDING = 1.2
"""Tokens of a micro-batch relative to its rows, as rows of a batch are sorted by length: 1 to 1.3
for real texts."""
# number of models that are scored without a fine-tune: base, pruned, and quantized by the winner's
# plan
UNTUNED = 3


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
    examples = inspection.examples["train"]
    labelled = sum(about_labelled(row, config.data) for row in examples) / sum(
        _lengths(config, examples)
    )
    training, scoring = measure(config, inspection.expected, min(1.0, labelled), threads)
    rows, length = config.training.micro_batch_size, config.data.max_length
    took = f"{training:.3g} s forward and backward, {scoring:.3g} s forward"
    origin = f"measured on {machine}: {rows} rows x {length} tokens take {took}"
    return Rates(training / (rows * length), scoring / (rows * length), origin)


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
    count, workers, compared = (
        _Tokens(config, inspection),
        config.finetune.num_workers,
        num_compared(config),
    )
    judged = count.split("confirmation") / 2
    finetune = count.training(count.finetune_steps()) * rates.training
    finetune += (count.split("validation") + judged) * rates.scoring
    evaluation = count.evaluation() * rates.scoring
    steps = expected_steps(config)[0] + num_confirmed_again(config) * config.search.steps
    search = count.training(steps) * rates.training + count.search_scores() * rates.scoring
    times: dict[Any, tuple[float, int]] = {
        Prune: (count.prune() * rates.scoring, 1),
        Search: (search, min(slots, config.num_trials)),
        Finetune: (finetune, workers),
        Evaluate: ((1 + UNTUNED) * evaluation, min(slots, 1 + UNTUNED)),
        Comparison: (
            compared * (finetune + evaluation),
            max(1, min(slots // workers, compared)) * workers,
        ),
    }
    wanted = [stage for stage in STAGES if stage in times and stage.is_wanted(config)]
    return {stage.name: StageTime(times[stage][0] / 3600, times[stage][1]) for stage in wanted}


def expected_steps(config: RunConfig) -> tuple[float, float]:
    """Estimate the total optimizer steps, and the total rungs reached, of all trials of a search.

    ASHA keeps one trial in `reduction_factor` at each rung, but every plan to beat
    (`preflight.most_controls`).
    """
    search = config.search
    controls = min(config.num_trials, most_controls(config))
    shares = [search.reduction_factor**-position for position in range(len(search.rungs))]
    lengths = [
        after - before for before, after in zip((0, *search.rungs), search.rungs, strict=False)
    ]
    others = config.num_trials - controls
    steps = sum(share * length for share, length in zip(shares, lengths, strict=True))
    return controls * search.steps + others * steps, controls * len(search.rungs) + others * sum(
        shares
    )


def num_confirmed_again(config: RunConfig) -> int:
    """Count the trainings of finalists under further seeds.

    This is their largest number: it assumes that no finalist can be told apart from the best.
    """
    search = config.search
    finalists = min(search.max_trials, search.confirm + 1) if config.is_searched else 0
    return finalists * search.confirm_seeds


def num_compared(config: RunConfig) -> int:
    """Count the fine-tunes that `finetune.compare` adds to the first one of the winner.

    Equal plans share one fine-tune.
    """
    settings = config.finetune
    drawn = settings.random_plans if config.has_choice else 0
    # Base and pruned model, and the controls, the best of which gets the other training seeds too.
    once = 2 + most_controls(config) + config.is_searched * (settings.seeds - 1)
    return once + (1 + drawn) * settings.seeds - 1


class _Tokens:
    """Counts the tokens that each kind of work passes through the model.

    A backward pass takes as long as two forward passes, and counts as much.
    """

    def __init__(self, config: RunConfig, inspection: Inspection) -> None:
        self._config, self._inspection = config, inspection
        self._lengths = {
            name: _lengths(config, examples) for name, examples in inspection.examples.items()
        }

    def training(self, steps: float) -> float:
        lengths, mean = self._lengths["train"], float(self._config.data.max_length)
        if not self._config.data.packing:
            mean = PADDING * sum(lengths) / len(lengths)
        return steps * self._config.training.batch_size * mean

    def finetune_steps(self) -> float:
        settings, batch = self._config.finetune, self._config.training.batch_size
        return settings.steps or (settings.epochs or 0) * math.ceil(
            len(self._lengths["train"]) / batch
        )

    def split(self, name: str) -> float:
        return sum(self._lengths[name])

    def search_scores(self) -> float:
        """Count the tokens of scoring at every rung, and of finalists on fresh rows."""
        search, (_, rungs) = self._config.search, expected_steps(self._config)
        rung = self.split("validation") + self._questions("search")
        # A given plan is the only finalist to score: an earlier search has already scored the
        # controls.
        best = min(search.max_trials, search.confirm + most_controls(self._config))
        finalists = (best if self._config.is_searched else 1) + num_confirmed_again(self._config)
        return rungs * rung + finalists * (
            self.split("confirmation") / 2 + self._questions("search")
        )

    def evaluation(self) -> float:
        return self._questions("evaluate") + sum(self._lengths.get("text", ()))

    def prune(self) -> float:
        """Count importance and compensation in every step.

        All cuts share the importance of the first.
        """
        passes = 0
        asked = [cut.settings for cut in self._inspection.cuts.values() if not cut.settings.is_off]
        for number, settings in enumerate(asked):
            importance = {"fisher": 3, "taylor": 3, "fluctuation": 1, "activation_norm": 1}.get(
                settings.importance, 0
            )
            each = importance + (0 if settings.compensates_by == "none" else 2)
            passes += (
                each * settings.num_steps - bool(number) * importance if settings.width_units else 0
            )
            passes += 5 if settings.drops_blocks else 0
        return passes * self._config.calibration.num_samples * self._config.calibration.max_length

    def _questions(self, section: str) -> float:
        """Count the tokens of questions; every answer is a separate row."""
        words = self._inspection.questions.get(section, [])
        tokens = sum(len(text) for text in words) / CHARACTERS_A_TOKEN
        return CHOICES * (tokens + 8 * len(words)) * (1 + self._config.evaluate.num_fewshot)
