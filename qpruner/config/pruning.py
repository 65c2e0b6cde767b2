"""The sections `calibration` and `prune` of the configuration, and `DataSource`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from qpruner.config.section import Section

Positive = Annotated[int, Field(ge=1)]
Named = Annotated[str, Field(min_length=1)]
Rate = Annotated[float, Field(ge=0.0, le=0.9)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
ProperShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Item = TypeVar("Item")
OneOrMore = Annotated[tuple[Item, ...], Field(min_length=1)]
UNPRUNED = "base"
"""Name of the cut that removes nothing: the base model as it was."""


class DataSource(Section):
    """Rows from a data set or file."""

    source: Named
    """Hub id, a local .jsonl / .json / .parquet / .csv / .txt file, or `package:NAME/FILE`."""
    format: Literal["instruction", "multiple_choice", "text"] = "instruction"
    """How a row is turned into a prompt and a response."""
    columns: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Column of the format -> column of the source. instruction: instruction, input, output;
    multiple_choice: question, choices (one column or a list of columns), answer; text: text."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of the data set; slices are allowed (`train[:1000]`)."""
    limit: Positive | None = None
    """Use only this many rows, from the first."""


class CalibrationConfig(Section):
    """Samples on which importance and sensitivity are measured.

    Sensitivity uses response tokens only, importance too unless `data.response_only` is false. In
    plain text every token counts.
    """

    data: tuple[DataSource, ...] | None = None
    """Rows for importance, compensation, GPTQ; null takes the training rows. Sensitivities always
    use training rows."""
    packing: bool = True
    """Join the rows and cut them into samples of exactly `max_length` tokens; if false, each row is
    a sample."""
    num_samples: Positive = 64
    """Samples used for importance, compensation and GPTQ."""
    batch_size: Positive = 10
    """Samples per backward pass. |w * gradient| is exact within a batch; absolute values of several
    batches are summed. Memory grows with samples x tokens x vocabulary."""
    num_sensitivity_samples: Positive = 64
    """Training rows used for sensitivity."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens of each importance sample (without packing: the maximum); sensitivity samples use
    `data.max_length`."""


RATES = ("rates", "rate", "layer_rate")
"""Keys of `prune` of which exactly one says how much is cut."""
RIDGE = 0.3
"""Default of `prune.ridge`."""
REDUCING = ("fisher", "taylor", "magnitude")
"""Kinds of importance that score every matrix of a unit and combine these scores."""
FEW_STEPS = {1: 0.2, 2: 0.3}
"""Default number of steps -> largest `rate` that is cut in so few steps (docs/pruning.md)."""
MOST_OF_A_STEP = 0.1
"""Share of all parameters that each step cuts by default at higher rates."""
MOST_OF_BLOCKS = 0.1
"""Default maximum share cut as whole blocks beside other units; more would cost more accuracy
(docs/pruning.md)."""


def _percent(rate: float) -> str:
    return f"{100 * rate:.10g}"


class PruneConfig(Section):
    """Structured pruning: whole blocks, key/value groups with their query heads, MLP channels."""

    rates: OneOrMore[Rate] | None = (0.0, 0.1, 0.2)
    """Shares of *all* parameters to remove, ascending: each is a cut that the search may choose; 0
    is no cut."""
    rate: Rate | None = None
    """Instead of `rates`: a single share; 0 skips the cut."""
    layer_rate: ProperShare | None = None
    """Instead of `rates`: the share of its units that each block loses (LLM-Pruner's ratio). It
    changes the defaults to `selection: per_layer`, `round_to: 1` and `query_heads: modulo`, which
    keep the same units as LLM-Pruner."""
    units: OneOrMore[Literal["block", "attention", "mlp"]] = (
        "attention",
        "mlp",
    )
    """Kinds of units that may be cut: whole blocks, key/value groups with their query heads, MLP
    channels."""
    depth_share: ProperShare | None = None
    """Part of `rate` to cut as whole blocks beside other units; null: half of it, at most a tenth
    of all parameters."""
    importance: Literal[
        "fisher", "taylor", "magnitude", "fluctuation", "activation_norm", "random"
    ] = "fisher"
    """How units are ranked, see [pruning](pruning.md#how-units-are-ranked)."""
    order: Literal["first", "second", "mixed"] = "first"
    """Taylor only: gradient, squared gradient, or both."""
    aggregation: Literal["element", "vector"] = "element"
    """Fisher and Taylor: score each weight, or the sum over a row or column, which is much faster
    with Fisher."""
    norm: Literal["l1", "l2"] = "l2"
    """Magnitude only: absolute or squared weights."""
    reduction: Literal["sum", "mean", "max", "product", "last"] = "sum"
    """Fisher, Taylor, magnitude: how to combine the scores of a unit's matrices; `last`: the output
    projection only."""
    query_heads: Literal["served", "modulo"] = "served"
    """Fisher, Taylor, magnitude: which key/value head gets the score of query head h, if query
    heads share them: the head that serves it, or head h modulo their number, as in LLM-Pruner's
    code."""
    selection: Literal["per_layer", "global"] = "global"
    """Cut the same share of every block, or the least important units of the whole model.
    `layer_rate` and `uniform` change the default to `per_layer`."""
    compensation: Literal["none", "least_squares"] | None = None
    """How the output projections (o, down) compensate for the cut: not at all, or by weights solved
    for on the calibration samples. Null: `least_squares`, or `none` for whole blocks alone in a
    family with a norm after the MLP."""
    ridge: PositiveFloat = RIDGE
    """Least squares only: strength of the pull to the original weights, relative to the inputs'
    mean square."""
    steps: Positive | None = None
    """Number of steps of the cut; importance is measured again before each. Null: one for up to 20
    % of all parameters, two up to 30 %, beyond that one for every 10 %; one with `layer_rate`."""
    round_to: Positive = 64
    """Keep a multiple of this number of MLP channels in each block: 64 suits GPU kernels, 1 is
    closest to the rate."""
    uniform: bool = False
    """Give every block the same widths, so that the pruned model is a plain checkpoint that loads
    without qpruner."""
    first_layer: NonNegativeInt = 0
    """First block that may be cut, counted from 0."""
    last_layer: int = -1
    """Last block that may be cut (inclusive); negative counts from the end."""

    @property
    def cuts(self) -> dict[str, PruneConfig]:
        """Return the cuts by name, the one that removes least first.

        Each has exactly one of `rate` and `layer_rate`.
        """
        if self.layer_rate is not None:
            name = f"layers-{_percent(self.layer_rate)}"
            return {name: self.model_copy(update={"rates": None, "rate": None})}
        cuts = {}
        for rate in self.rates or (self.rate or 0.0,):
            name = f"cut-{_percent(rate)}" if rate else UNPRUNED
            cuts[name] = self.model_copy(update={"rates": None, "rate": rate})
        return cuts

    @property
    def is_off(self) -> bool:
        """Whether nothing is pruned: the only rate is 0."""
        return set(self.rates or (self.rate,)) == {0.0}

    @property
    def drops_blocks(self) -> bool:
        """Whether `units` names whole blocks."""
        return "block" in self.units

    @property
    def width_units(self) -> tuple[str, ...]:
        """The kinds of units inside blocks that may be cut."""
        return tuple(unit for unit in self.units if unit != "block")

    @property
    def criterion(self) -> str:
        """Return the kind of importance that ranks units.

        It is `block_influence` if only whole blocks are cut.
        """
        return self.importance if self.width_units else "block_influence"

    @property
    def compensates_by(self) -> Literal["none", "least_squares"]:
        """The key `compensation` or, if it is null, its default `least_squares`."""
        return self.compensation or "least_squares"

    @property
    def num_steps(self) -> int:
        """Return the number of steps that cut units inside blocks.

        Whole blocks are cut before the first step.
        """
        if self.steps:
            return self.steps
        rate = round(self.rate or 0.0, 9) if self.width_units else 0.0
        for steps, most in FEW_STEPS.items():
            if rate <= most:
                return steps
        return math.ceil(round(rate / MOST_OF_A_STEP, 6))

    @property
    def block_rate(self) -> float:
        """Share of all parameters to cut as whole blocks."""
        rate = self.rate or 0.0
        if not self.drops_blocks:
            return 0.0
        if not self.width_units:
            return rate
        if self.depth_share is None:
            return min(rate / 2, MOST_OF_BLOCKS)
        return rate * self.depth_share

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """Set what `layer_rate` and `uniform` imply for keys that are not given.

        An example is `selection`.
        """
        if not isinstance(raw, dict):
            return raw
        implied: dict[str, Any] = {}
        if any(raw.get(key) is not None for key in RATES):
            implied |= dict.fromkeys(RATES)
        if raw.get("layer_rate") is not None:
            implied["round_to"] = 1
            if raw.get("importance", cls.model_fields["importance"].default) in REDUCING:
                implied["query_heads"] = "modulo"
        if raw.get("layer_rate") is not None or raw.get("uniform") is True:
            implied["selection"] = "per_layer"
        return implied | raw
