"""The fields of `calibration` and `prune`, and of a source of rows."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qpruner.config.section import Section

Positive = Annotated[int, Field(ge=1)]
Named = Annotated[str, Field(min_length=1)]


class DataSource(Section):
    """Rows from one place."""

    source: Named
    """Hub id, a local .jsonl / .json / .parquet / .csv / .tsv / .txt file, or `package:NAME/FILE`."""
    format: Literal["instruction", "multiple_choice", "text"] = "instruction"
    """How a row becomes a prompt and a response."""
    columns: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Our column name -> theirs. instruction: instruction, input, output; multiple_choice: question, choices (one
    column or a list of columns), answer; text: text."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split, slices allowed (`train[:1000]`)."""
    limit: Positive | None = None
    """Take only the first rows."""


class CalibrationConfig(Section):
    """Samples that importance and sensitivity are measured on.

    With `data.response_only` importance predicts responses only, as the fine-tune does, and every token of plain text;
    sensitivities always predict responses.
    """

    data: tuple[DataSource, ...] | None = None
    """Rows for importance and compensation; null takes the training rows, as sensitivities always do."""
    token_ids: str | None = None
    """Samples for importance instead: a JSON file with a list of lists of token ids."""
    packing: bool = True
    """Join the rows and cut them into samples of exactly `max_length` tokens; off, a row is a sample."""
    num_samples: Positive = 64
    """Samples used for importance and compensation."""
    batch_size: Positive = 10
    """Samples of a backward pass. |w * gradient| is exact for one batch; over several the absolute values are summed.
    Memory grows with samples x tokens x vocabulary."""
    num_sensitivity_samples: Positive = 64
    """Training rows used for sensitivity."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens of an importance sample, at most without packing; sensitivity samples have `data.max_length`."""


RIDGE = 0.3
"""Of least squares, where nothing is said."""
REDUCING = ("fisher", "taylor", "magnitude")
"""Kinds of importance that score every matrix of a unit and make one score of them."""
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
    """Instead of `rate`: the share of its own units that every block loses (LLM-Pruner's ratio). With it `selection`
    is `per_layer`, `round_to` 1 and `query_heads` `modulo` unless given, so that LLM-Pruner's units stay."""
    units: Annotated[tuple[Literal["block", "attention", "mlp", "expert"], ...], Field(min_length=1)] = (
        "attention",
        "mlp",
    )
    """What may go: whole blocks, key/value groups with their query heads, MLP channels (of every expert, where there
    are experts), whole experts."""
    depth_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of `rate` that whole blocks take beside other units; null: half, at most a tenth of all parameters."""
    depth_importance: Literal["block_influence", "taylor"] = "block_influence"
    """How blocks are ranked: by how little they turn their hidden states (ShortGPT), or by first-order Taylor."""
    importance: Literal["fisher", "taylor", "magnitude", "fluctuation", "activation_norm", "random"] = "fisher"
    """How units are ranked: Fisher information (Taylor of second order), Taylor expansion of the loss (LLM-Pruner),
    weights, fluctuation of the output projection's inputs (FLAP), their norm (Wanda), or at random as a control."""
    order: Literal["first", "second", "mixed"] = "first"
    """Taylor only: gradient, squared gradient, or both."""
    aggregation: Literal["element", "vector"] = "element"
    """Fisher and Taylor: count weight by weight, or the sum over each row or column, many times faster with Fisher."""
    norm: Literal["l1", "l2"] = "l2"
    """Magnitude only: absolute or squared weights."""
    reduction: Literal["sum", "mean", "max", "product", "last"] = "sum"
    """Fisher, Taylor, magnitude: how the matrices of a unit become one score; `last` is the output projection."""
    query_heads: Literal["served", "modulo"] = "served"
    """Fisher, Taylor, magnitude: the key/value head that query head h counts for, where several share one: the one
    that serves it, or number h modulo their count, as in LLM-Pruner's code."""
    selection: Literal["per_layer", "global"] = "global"
    """Take the same share from every block, or the least important units wherever they are. `layer_rate` and `uniform`
    take `per_layer` unless given."""
    compensation: Literal["none", "bias", "least_squares"] | None = None
    """What makes up for the cut in the output projections (o, down): nothing, a bias (FLAP), or weights solved anew on
    the calibration samples. Null: `least_squares`, but `none` where it cannot be solved: stacked experts, or whole
    blocks alone of a family with experts or a norm behind the MLP."""
    ridge: Annotated[float, Field(gt=0.0)] = RIDGE
    """Least squares only: weight of staying near the original weights, relative to the inputs' mean square."""
    steps: Positive | None = None
    """Cut in this many steps, importance measured anew before each. Null: one for up to 20 % of all parameters, two up
    to 30 %, beyond that one for every 10 %; one with `layer_rate`."""
    round_to: Positive = 64
    """Keep a multiple of this of a block's MLP channels: 64 suits the kernels, 1 hits the rate most closely."""
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
        return "block" in self.units

    @property
    def width_units(self) -> tuple[str, ...]:
        """The kinds of unit that go out of blocks."""
        return tuple(unit for unit in self.units if unit != "block")

    @property
    def criterion(self) -> str:
        """What units of blocks are ranked by; where whole blocks alone go, what those are."""
        return self.importance if self.width_units else self.depth_importance

    @property
    def compensates_by(self) -> Literal["none", "bias", "least_squares"]:
        """What makes up for what was cut, where no experts are."""
        return self.compensation or "least_squares"

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
    def _fill_in(cls, raw: Any) -> Any:
        """Set what `layer_rate` and `uniform` imply where nothing is said."""
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
