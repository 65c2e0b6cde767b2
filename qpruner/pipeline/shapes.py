"""The shapes of a run's cuts, and the plans that they allow; no weights are read.

Before pruning the shapes are those that the settings let expect, afterwards those that were made.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from qpruner.config.pruning import RATES
from qpruner.config.schema import BudgetConfig, PruneConfig, RunConfig
from qpruner.errors import PlanRefused, UserError
from qpruner.models.families import family_of
from qpruner.models.layout import layout_of, refusals
from qpruner.models.loading import load_model_config
from qpruner.plans.plan import (
    UNPRUNED,
    Layout,
    LinearShape,
    PrecisionPlan,
    cut_title,
    in_base,
    read_plan,
)
from qpruner.plans.space import PlanSpace, SearchSpace
from qpruner.pruning.settings import Cut, are_alike
from qpruner.quantization.formats import by_size, formats
from qpruner.runs.records import CutRecord, PruneRecord

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GIB = 1024**3
# share of the base model's multiply-adds by which a cut may differ from what its shapes let expect
FLOPS_MARGIN = 0.02


@dataclass(frozen=True)
class Shapes:
    """The shapes and sizes of the base model and of its cuts, and the plans that they allow."""

    config: RunConfig
    on_gpu: bool  # whether trials run on GPUs, which take other formats than CPUs
    packs: bool
    """Whether later stages quantize the cuts. Otherwise their widths need not suit the device."""
    model_config: Any  # of the base model
    base: Layout
    # the cuts that the search may choose, by name, the one that removes least first
    cuts: Mapping[str, Cut]
    layouts: Mapping[str, Layout]  # the groups of each of these cuts
    left_out: Mapping[str, str]  # name of a cut that cannot be used -> the reason
    made: Mapping[str, CutRecord]  # the cuts that were made; none before pruning

    def layout_of(self, cut: str) -> Layout:
        """Return the groups of a cut or of the base model."""
        return self.base if cut == UNPRUNED else self.layouts[cut]

    @property
    def reference(self) -> Layout:
        """The cut that removes least, whose sensitivities are measured and used for all cuts."""
        return next(iter(self.layouts.values()))

    @property
    def checkpoint_bytes(self) -> int:
        """Estimated bytes of a training checkpoint at most.

        It has what is trained of the base model, and its two Adam moments.
        """
        return 3 * self.base.trained_bytes

    def most_plan_bytes(self, layout: Layout) -> int:
        """Return the bytes of the largest plan within the budget."""
        smallest = layout.plan_bytes(layout.smallest())
        largest = layout.plan_bytes(layout.largest())
        return min(max(self.budget_bytes, smallest), largest)

    @property
    def tuned_bytes(self) -> int:
        """Bytes on disk, at most, of the tuned codes of a plan."""
        if self.config.quantize.rounding != "tuned":
            return 0
        return self.most_plan_bytes(self.base)

    @property
    def _pruning(self) -> list[PruneConfig]:
        """The settings of the cuts that remove something."""
        return [cut.settings for cut in self.cuts.values() if not cut.settings.is_off]

    @property
    def is_estimate(self) -> bool:
        """Whether the widths depend on scores, as with global selection or dropped blocks."""
        if self.made:
            return False
        return any(cut.selection == "global" or cut.drops_blocks for cut in self._pruning)

    @property
    def _has_known_groups(self) -> bool:
        """Whether the names of the groups are known.

        If blocks of different sizes are dropped, the number of dropped blocks depends on scores.
        """
        drops_blocks = any(cut.drops_blocks for cut in self._pruning)
        return bool(self.made) or not drops_blocks or are_alike(self.model_config)

    def may_win(self, cut: str) -> bool:
        """Return True if a token takes few enough multiply-adds on this cut.

        They may be no more than `budget.flops_fraction` allows. Expected widths have a margin.
        """
        share = self.config.quantize.budget.flops_fraction or 1.0
        if not self.made and cut != UNPRUNED:
            share += FLOPS_MARGIN
        return self.layout_of(cut).multiply_adds <= share * self.base.multiply_adds

    @cached_property
    def fast_enough(self) -> dict[str, Layout]:
        """The cuts within `budget.flops_fraction`; reading it raises an error if there are none."""
        fast = {cut: layout for cut, layout in self.layouts.items() if self.may_win(cut)}
        if fast:
            return fast
        least = min(layout.multiply_adds for layout in self.layouts.values())
        raise UserError(
            "`quantize.budget.flops_fraction`: no cut takes so few multiply-adds, the most pruned "
            f"one takes {least / self.base.multiply_adds:.5g} of the base model's, got "
            f"{self.config.quantize.budget.flops_fraction:g}; raise it, or prune more "
            "(`prune.rates`)"
        )

    @cached_property
    def budget_bytes(self) -> int:
        """The bytes that a plan may have; reading it raises an error if no plan fits.

        `fraction` and `mean_bits` are those of the only cut.
        """
        budget = self.config.quantize.budget
        layouts = self.fast_enough.values()
        size = _asked_bytes(budget, next(iter(layouts)))
        smallest = min(layouts, key=lambda layout: layout.plan_bytes(layout.smallest()))
        plan = smallest.smallest()
        least = smallest.plan_bytes(plan)
        if size < least:
            name, value = budget.size
            raise UserError(
                f"`quantize.budget.{name}` is below the most pruned model with every group in its "
                f"smallest format, {', '.join(by_size(tuple(set(plan.formats))))}: {least} bytes "
                f"({-(-least * 10**4 // GIB) / 10**4} GiB), got {value}; raise it, or prune more"
            )
        return size

    @cached_property
    def plan(self) -> PrecisionPlan | None:
        """The plan of the file in `search.plan`.

        It is None without a file, or if the names of the groups are not known yet. Reading it
        raises `PlanRefused` if the plan does not fit model or budget. A plan of the base model,
        which a control may be, is accepted too, if that model is within `budget.flops_fraction`.
        """
        file = self.config.search.plan_file
        if file is None or not self._has_known_groups:
            return None
        offered = {cut: layout.offered for cut, layout in self.fast_enough.items()}
        only = next(iter(offered)) if len(offered) == 1 else ""
        if self.may_win(UNPRUNED):
            offered[UNPRUNED] = self.base.offered
        plan = read_plan(file, offered, only)
        excess = self.layout_of(plan.cut).plan_bytes(plan) - self.budget_bytes
        if excess > 0 and not self.is_estimate:
            size = self.budget_bytes + excess
            raise PlanRefused(
                f"the plan in {file} takes {size / 1e6:.2f} MB, {math.ceil(excess / 100) / 1e4:.4f}"
                f" MB more than the budget of {self.budget_bytes / 1e6:.2f} MB: give groups "
                "smaller formats, or raise `quantize.budget`"
            )
        return plan

    def check_budget(self) -> None:
        """Raise an error if no plan fits into the budget, or the plan in the file does not."""
        _ = self.budget_bytes
        _ = self.plan

    def base_groups_of(self, cut: str) -> tuple[str, ...]:
        """Return the groups of a cut that was made, by their names in the base model.

        The names differ because blocks that were dropped shift numbers.
        """
        count = int(self.model_config.num_hidden_layers)
        return in_base(self.layout_of(cut).names, count, self.made[cut].dropped_blocks)

    def space_of(self, cut: str, layout: Layout | None = None) -> PlanSpace:
        """Return all plans within the budget, of a cut that was made.

        `layout` is given if other formats are offered than those of the run.
        """
        return PlanSpace.of(
            layout or self.layout_of(cut), self.budget_bytes, self.base_groups_of(cut)
        )

    @cached_property
    def space(self) -> SearchSpace:
        """All plans within the budget, of the cuts that have one and may win."""
        spaces = map(self.space_of, self.fast_enough)
        feasible = tuple(space for space in spaces if space.is_feasible(space.smallest()))
        losses = {cut: record.loss for cut, record in self.made.items()}
        return SearchSpace(feasible, losses)


def expected_shapes(config: RunConfig, on_gpu: bool, packs: bool) -> Shapes:
    """Compute the shapes that the cuts of a configuration are expected to have.

    Raise an error if the model, the formats, the budget or the plan of the configuration cannot be
    used.
    """
    model_config = load_model_config(config.model)
    family_of(model_config)  # raises an error if the family is not supported
    settings = config.prune.cuts
    if is_pruned(model_config):
        settings = {UNPRUNED: uncut(config.prune)}

    def planned(name: str) -> Cut:
        return _planned(config, settings[name], model_config)

    shapes = shapes_of(config, model_config, settings, planned, on_gpu, packs)
    if packs:
        _check_formats(shapes)
    shapes.check_budget()
    return shapes


def recorded_shapes(
    expected: Shapes,
    config: RunConfig,
    record: PruneRecord,
    config_of: Callable[[str], Any],
    on_gpu: bool,
) -> Shapes:
    """Compute the shapes of the cuts that were made.

    Args:
        expected: The shapes before pruning.
        config: The configuration of the run.
        record: The record of the cuts.
        config_of: Reads the model config of a pruned model.
        on_gpu: Whether trials run on GPUs.
    """

    def recorded(name: str) -> Cut:
        made = expected.model_config if name == UNPRUNED else config_of(name)
        return replace(expected.cuts[name], model_config=made)

    names = [name for name in expected.cuts if name in record.cuts]
    return shapes_of(config, expected.model_config, names, recorded, on_gpu, expected.packs, record)


def shapes_of(
    config: RunConfig,
    model_config: Any,
    names: Iterable[str],
    cut_of: Callable[[str], Cut],
    on_gpu: bool,
    packs: bool,
    record: PruneRecord | None = None,
) -> Shapes:
    """Compute the shapes of cuts, and leave out those that cannot be used.

    Raise the first error if none can be used.

    Args:
        config: The configuration of the run.
        model_config: The config of the base model.
        names: The names of the cuts, the one that removes least first.
        cut_of: Returns a cut by its name; raises `UserError` if it cannot be made.
        on_gpu: Whether trials run on GPUs.
        packs: Whether the formats have to hold the widths of the cuts.
        record: The record of the cuts that were made; None before pruning.
    """
    cuts: dict[str, Cut] = {}
    layouts: dict[str, Layout] = {}
    errors: dict[str, UserError] = {}
    for name in names:
        try:
            cut = cut_of(name)
            layout = layout_for(config, cut.model_config, on_gpu, name)
            if packs:
                _check_offers(layout, on_gpu, is_planned=not (record or cut.settings.is_off))
        except UserError as error:
            errors[name] = error
        else:
            cuts[name] = cut
            layouts[name] = layout
    if not cuts:
        raise next(iter(errors.values()))

    left_out = record.left_out if record else {}
    return Shapes(
        config=config,
        on_gpu=on_gpu,
        packs=packs,
        model_config=model_config,
        base=layout_for(config, model_config, on_gpu, UNPRUNED),
        cuts=cuts,
        layouts=layouts,
        left_out={**left_out, **{name: str(error) for name, error in errors.items()}},
        made=record.cuts if record else {},
    )


def layout_for(config: RunConfig, model_config: Any, on_gpu: bool, cut: str) -> Layout:
    """List the groups of a model (layers that share a format).

    They serve to compute the bytes of plans, any adapters included.
    """
    return layout_of(
        model_config,
        config.quantize,
        DTYPE_BYTES[config.model.dtype],
        config.lora.rank,
        on_gpu,
        cut,
        config.training.method,
    )


def is_pruned(model_config: Any) -> bool:
    """Return True if the blocks differ in width.

    The model was then pruned earlier, and is not cut again.
    """
    return bool(model_config.is_heterogeneous)


def uncut(settings: PruneConfig) -> PruneConfig:
    """Return the settings with a rate of 0."""
    return settings.model_copy(update={"rates": None, "rate": 0.0, "layer_rate": None})


def left_out_text(name: str, reason: str) -> str:
    """Say that a cut is left out, and why."""
    return f"{cut_title(name)} is left out: {reason}"


def _planned(config: RunConfig, settings: PruneConfig, model_config: Any) -> Cut:
    """Plan a cut; errors name the key and the rate of `prune` that asks for it."""
    from qpruner.pruning.prune import planned_cut

    if is_pruned(model_config):
        return Cut(settings, model_config)
    try:
        return planned_cut(model_config, settings)
    except UserError as error:
        key = next(key for key in RATES if getattr(config.prune, key) is not None)
        rate = settings.rate if settings.layer_rate is None else settings.layer_rate
        raise UserError(f"{error} (`prune.{key}`: {rate:g})") from error


def _asked_bytes(budget: BudgetConfig, layout: Layout) -> int:
    """Convert a budget to bytes.

    `fraction` and `mean_bits` are interpolated between the uniform plans.
    """
    smallest = layout.plan_bytes(layout.smallest())
    if budget.fraction is not None:
        largest = layout.plan_bytes(layout.largest())
        return round(smallest + budget.fraction * (largest - smallest))
    if budget.bytes is not None:
        return budget.bytes
    if budget.mean_bits is None:
        return round((budget.gib or 0) * GIB)

    plans = [layout.uniform(level) for level in layout.levels]
    means = [layout.mean_bits(plan) for plan in plans]
    if not means[0] <= budget.mean_bits <= means[-1]:
        raise UserError(
            "`quantize.budget.mean_bits` must be between the bits of the smallest and of the "
            f"largest format, {means[0]:g} and {means[-1]:g}, got {budget.mean_bits}"
        )
    sizes = [layout.plan_bytes(plan) for plan in plans]
    return round(float(np.interp(budget.mean_bits, means, sizes)))


def _check_offers(layout: Layout, on_gpu: bool, is_planned: bool) -> None:
    """Raise an error if a group takes none of the formats.

    If the cut is still planned, the error also says how to make it without quantizing it.
    """
    for group in layout.groups:
        if all(refusals(name, group.linears, on_gpu) for name in group.formats):
            state = f"group {group.name} takes none of"
            problem = _refused(group.formats, group.linears, on_gpu, state)
            if is_planned:
                problem += " (to prune without quantizing, use `qpruner prune`)"
            raise UserError(problem)


def _check_formats(shapes: Shapes) -> None:
    """Raise an error if no group of any cut takes one of the formats."""
    blocks = []
    for layout in shapes.layouts.values():
        blocks += [group for group in layout.groups if not group.is_table]
    for name in shapes.config.quantize.levels:
        if all(refusals(name, group.linears, shapes.on_gpu) for group in blocks):
            linears = [linear for group in blocks for linear in group.linears]
            raise UserError(_refused((name,), linears, shapes.on_gpu, "no group takes"))


def _refused(
    levels: Sequence[str], linears: Sequence[LinearShape], on_gpu: bool, state: str
) -> str:
    """Say why layers refuse formats, and which formats they take."""
    reason = next(reason for level in levels for reason in refusals(level, linears, on_gpu))
    taken = [name for name in formats() if not refusals(name, linears, on_gpu)]
    return (
        f"`quantize.formats`: {state} {', '.join(levels)} ({reason}): name some of "
        f"{', '.join(taken)}; or, if pruning made this width, set `prune.round_to` to that divisor "
        "for a layer that reads MLP channels, `prune.units: [mlp]` for one that reads attention "
        "heads"
    )
