"""Check a configuration against its model, rows, tasks and device before any weights are loaded.

`qpruner check` prints the result of `inspect`, and `qpruner run` starts with this check.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from qpruner.config.pruning import RATES
from qpruner.config.schema import BudgetConfig, PruneConfig, RunConfig
from qpruner.errors import PlanRefused, UserError, together
from qpruner.models.families import family_of
from qpruner.models.layout import layout_of, refusals
from qpruner.models.loading import load_model_config
from qpruner.pipeline.preflight_rows import Rows, check_encoding, check_rows
from qpruner.plans.plan import (
    EMBEDDINGS,
    HEAD,
    UNPRUNED,
    Layout,
    LinearShape,
    PrecisionPlan,
    cut_title,
    read_plan,
)
from qpruner.pruning.settings import Cut, are_alike
from qpruner.quantization.formats import Capability, by_size, format_of, formats
from qpruner.runs.storage import run_root

PRUNED_EARLIER = "pruned earlier: the cut is skipped"
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GIB = 1024**3
# share of the base model's multiply-adds by which a cut may differ from what its shapes let expect
FLOPS_MARGIN = 0.02
Asked = TypeVar("Asked")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Shapes:
    """Shapes and sizes of the base model and of all cuts, with the budget.

    They are computed without weights.
    """

    model_config: Any
    base: Layout
    # the cuts that the search may choose, by name, the one that removes least first
    cuts: Mapping[str, Cut]
    layouts: Mapping[str, Layout]  # the groups of each of these cuts
    left_out: Mapping[str, str]  # name of a cut that cannot be made -> the reason
    # whether the pruned shapes depend on scores, as with global selection or dropped blocks
    is_estimate: bool
    budget_bytes: int
    plan: PrecisionPlan | None
    """The plan of the file in `search.plan`; None without a file or if the names of the groups
    depend on scores."""
    packs: bool
    """Whether later stages quantize the pruned model.

    Otherwise its widths need not suit the device.
    """

    @property
    def reference(self) -> Layout:
        """The groups of the cut that removes least, whose sensitivities are measured."""
        return next(iter(self.layouts.values()))

    @property
    def expected(self) -> Any:
        """The model config expected after that cut."""
        return self.cuts[self.reference.cut].expected


@dataclass(frozen=True)
class Inspection(Shapes, Rows):
    """Everything known about a run before its first stage: shapes, rows and questions."""


def inspect(config: RunConfig, works_here: bool = True, packs: bool = True) -> Inspection:
    """Validate a configuration against model, data and tasks.

    With `works_here` the stages run on this machine, so it is checked too; `packs` is False if they
    pack no weights.
    """
    shapes: Shapes
    rows: Rows
    _, shapes, rows = together(
        lambda: run_root(config.output),
        lambda: shapes_of(config, works_here, packs),
        lambda: check_rows(config),
    )
    _check_positions(config, shapes)
    check_encoding(config, rows.examples)
    parts = vars(shapes) | vars(rows) | {"warnings": (*rows.warnings, *_doubts(config, shapes))}
    return Inspection(**parts)


def _check_positions(config: RunConfig, shapes: Shapes) -> None:
    """Raise an error if rows or samples are longer than the learned position table of the model."""
    model_config, lengths = shapes.model_config, {"data.max_length": config.data.max_length}
    if not all(cut.settings.is_off for cut in shapes.cuts.values()):
        lengths["calibration.max_length"] = config.calibration.max_length
    for name, length in lengths.items() if family_of(model_config).has_learned_positions else ():
        if length > (most := int(model_config.max_position_embeddings)):
            raise UserError(
                f"`{name}`: {length} tokens are more than the {most} positions that this "
                f"{model_config.model_type} model has learned: use at most {most}"
            )


def shapes_of(config: RunConfig, works_here: bool, packs: bool) -> Shapes:
    """Compute the shapes and sizes of the base and the pruned model.

    Cut, budget, plan and device are checked too.
    """
    import torch

    model_config = load_model_config(config.model)
    family_of(model_config)  # raises an error if the family is not supported
    on_gpu = torch.cuda.is_available() or not works_here
    base = layout_for(config, model_config, on_gpu, UNPRUNED)
    if works_here:
        check_device(
            torch.cuda.get_device_capability() if torch.cuda.is_available() else None, config, packs
        )

    key = next(key for key in RATES if getattr(config.prune, key) is not None)

    def checked(settings: PruneConfig) -> Cut:
        cut = _planned(settings, model_config, key)
        return check_cut(on_gpu, config, cut) if packs else cut

    asked = {UNPRUNED: uncut(config.prune)} if is_pruned(model_config) else config.prune.cuts
    cuts, left_out = makeable(asked, checked)
    layouts = {name: layout_for(config, cut.expected, on_gpu, name) for name, cut in cuts.items()}
    if packs:
        _check_formats(config, layouts.values(), on_gpu)
    fast = fast_enough(config, layouts, base, FLOPS_MARGIN)
    budget = budget_bytes(config, fast)
    settings = [cut.settings for cut in cuts.values() if not cut.settings.is_off]
    is_estimate = any(each.selection == "global" or each.drops_blocks for each in settings)
    # If blocks of different sizes are dropped, the number of dropped blocks depends on scores.
    are_groups_known = not any(each.drops_blocks for each in settings) or are_alike(model_config)
    plan = (
        plan_in_file(config, fast, base, None if is_estimate else budget)
        if are_groups_known
        else None
    )
    return Shapes(model_config, base, cuts, layouts, left_out, is_estimate, budget, plan, packs)


def is_fast(config: RunConfig, layout: Layout, base: Layout, margin: float = 0.0) -> bool:
    """Return True if a token takes few enough multiply-adds on a cut.

    They may be no more than `budget.flops_fraction` allows.
    """
    return (
        layout.multiply_adds
        <= ((config.quantize.budget.flops_fraction or 1.0) + margin) * base.multiply_adds
    )


def fast_enough(
    config: RunConfig, layouts: Mapping[str, Layout], base: Layout, margin: float = 0.0
) -> dict[str, Layout]:
    """Leave out cuts above `budget.flops_fraction`; raise an error if none is below it.

    `margin` is added to it, because widths that depend on scores may differ from the expected ones.
    """
    if not (
        kept := {
            cut: layout for cut, layout in layouts.items() if is_fast(config, layout, base, margin)
        }
    ):
        share = min(layout.multiply_adds for layout in layouts.values()) / base.multiply_adds
        raise UserError(
            "`quantize.budget.flops_fraction`: no cut takes so few multiply-adds, the most pruned "
            f"one takes {share:.5g} of the base model's, got "
            f"{config.quantize.budget.flops_fraction:g}; raise it, or prune more (`prune.rates`)"
        )
    return kept


def makeable(
    wanted: Mapping[str, Asked], make: Callable[[Asked], Made]
) -> tuple[dict[str, Made], dict[str, str]]:
    """Make the cuts that can be made, and map the others to the reason.

    Raise the first error if none can be made.
    """
    cuts, errors = dict[str, Made](), dict[str, UserError]()
    for name, asked in wanted.items():
        try:
            cuts[name] = make(asked)
        except UserError as error:
            errors[name] = error
    if not cuts:
        raise next(iter(errors.values()))
    return cuts, {name: str(error) for name, error in errors.items()}


def left_out_text(name: str, reason: str) -> str:
    """Say that a cut is left out, and why."""
    return f"{cut_title(name)} is left out: {reason}"


def plan_in_file(
    config: RunConfig, layouts: Mapping[str, Layout], base: Layout, budget_bytes: int | None
) -> PrecisionPlan | None:
    """Return the plan of the file in `search.plan`, if any.

    Raise `PlanRefused` if it does not fit model or budget.

    `layouts` are those of the cuts within `budget.flops_fraction`. A plan of the base model, which
    a control may be, is accepted too, if that model is within it.
    """
    if (file := config.search.plan_file) is None:
        return None
    only = next(iter(layouts)) if len(layouts) == 1 else ""
    layouts = {**layouts, UNPRUNED: base} if is_fast(config, base, base) else layouts
    plan = read_plan(file, {name: layout.offered for name, layout in layouts.items()}, only)
    if (
        budget_bytes is not None
        and (plan_bytes := layouts[plan.cut].plan_bytes(plan)) > budget_bytes
    ):
        excess = math.ceil((plan_bytes - budget_bytes) / 100) / 1e4
        raise PlanRefused(
            f"the plan in {file} takes {plan_bytes / 1e6:.2f} MB, {excess:.4f} MB more than the "
            f"budget of {budget_bytes / 1e6:.2f} MB: give groups smaller formats, "
            "or raise `quantize.budget`"
        )
    return plan


def _doubts(config: RunConfig, shapes: Shapes) -> Iterator[str]:
    """Warn if all plans fit, or if the plans to beat may use up all trials.

    The plans to beat (`pipeline/controls.py`) run first.
    """
    most = shapes.base.plan_bytes(shapes.base.largest())
    if config.quantize.has_choice and most <= shapes.budget_bytes:
        yield (
            f"`quantize.budget`: every plan fits, as the largest takes {most / 1e6:.1f} MB: "
            "ask for fewer bytes"
        )
    trials, num_controls = config.search.max_trials, most_controls(config)
    if num_controls >= trials and config.is_searched:
        yield (
            f"up to {num_controls} plans to beat (two of each cut, the paper's) run first and may "
            f"leave none of {trials} trials (`search.max_trials`) to the searcher: allow more"
        )


def most_controls(config: RunConfig) -> int:
    """Count the plans to beat: two of the base model and of each cut, and the paper's."""
    return 2 * len({UNPRUNED, *config.prune.cuts}) + 1


def layout_for(config: RunConfig, model_config: Any, on_gpu: bool, cut: str) -> Layout:
    """List the groups of a model (layers that share a format).

    They serve to compute the bytes of plans, adapters included.
    """
    return layout_of(
        model_config,
        config.quantize,
        DTYPE_BYTES[config.model.dtype],
        config.lora.rank,
        on_gpu,
        cut,
    )


def is_pruned(model_config: Any) -> bool:
    """Return True if the blocks differ in width.

    The model was then pruned earlier, and is not cut again.
    """
    return bool(model_config.is_heterogeneous)


def uncut(settings: PruneConfig) -> PruneConfig:
    """Return the settings with a rate of 0."""
    return settings.model_copy(update={"rates": None, "rate": 0.0, "layer_rate": None})


def _planned(settings: PruneConfig, model_config: Any, key: str) -> Cut:
    """Plan a cut; the errors name its rate, which stands under this key of `prune`."""
    from qpruner.pruning.prune import planned_cut

    if is_pruned(model_config):
        return Cut(settings, model_config)
    try:
        return planned_cut(model_config, settings)
    except UserError as error:
        rate = settings.rate if settings.layer_rate is None else settings.layer_rate
        raise UserError(f"{error} (`prune.{key}`: {rate:g})") from error


def budget_bytes(config: RunConfig, layouts: Mapping[str, Layout]) -> int:
    """Return the budget of the cuts in bytes; raise an error if no plan fits.

    `fraction` and `mean_bits` are those of the only cut.
    """
    size = _asked_bytes(config.quantize.budget, next(iter(layouts.values())))
    least, formats = min(
        (each.plan_bytes(plan := each.smallest()), plan.formats) for each in layouts.values()
    )
    if size < least:
        name, value = config.quantize.budget.size
        raise UserError(
            f"`quantize.budget.{name}` is below the most pruned model with every group in its "
            f"smallest format, {', '.join(by_size(tuple(set(formats))))}: {least} bytes "
            f"({-(-least * 10**4 // GIB) / 10**4} GiB), got {value}; raise it, or prune more"
        )
    return size


def _asked_bytes(budget: BudgetConfig, layout: Layout) -> int:
    """Convert a budget to bytes.

    `fraction` and `mean_bits` are interpolated between the uniform plans.
    """
    plans = [layout.uniform(level) for level in layout.levels]
    sizes = [layout.plan_bytes(plan) for plan in (layout.smallest(), *plans, layout.largest())]
    if budget.fraction is not None:
        return round(sizes[0] + budget.fraction * (sizes[-1] - sizes[0]))
    if budget.mean_bits is None:
        return budget.bytes if budget.bytes is not None else round((budget.gib or 0) * GIB)
    means = [layout.mean_bits(plan) for plan in plans]
    if not means[0] <= budget.mean_bits <= means[-1]:
        raise UserError(
            "`quantize.budget.mean_bits` must be between the bits of the smallest and of the "
            f"largest format, {means[0]:g} and {means[-1]:g}, got {budget.mean_bits}"
        )
    return round(float(np.interp(budget.mean_bits, means, sizes[1:-1])))


def amount(size: int) -> str:
    """Format bytes as GiB, such as `1.5 GiB`, or as MiB below one GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{-(-size * 10 // 1024**2) / 10:.1f} MiB"


def check_gpu(config: RunConfig, capability: Capability) -> None:
    """Raise an error if a GPU of this compute capability cannot run one of the formats."""
    for name in {*config.quantize.levels, *config.quantize.embedding_levels}:
        if reason := format_of(name).refusal(4096, capability):
            has = ".".join(map(str, capability))
            raise UserError(
                f"`quantize.formats`: a GPU of compute capability {has} cannot run {name}: "
                f"{reason}; leave {name} out"
            )


def check_device(capability: Capability | None, config: RunConfig, packs: bool) -> None:
    """Raise an error if a device cannot run type and formats of a model.

    The device is a GPU of this compute capability, or a CPU (None).
    """
    if capability is None and config.model.dtype == "float16":
        raise UserError(
            "`model.dtype`: float16 cannot be trained on a CPU; use bfloat16 or float32"
        )
    if packs and capability is not None:
        check_gpu(config, capability)


def check_cut(on_gpu: bool, config: RunConfig, cut: Cut) -> Cut:
    """Return the cut, if the formats can hold its widths.

    Raise an error if they cannot hold the widths that it is expected to leave.
    """
    try:
        check_offers(config, layout_for(config, cut.expected, on_gpu, UNPRUNED), on_gpu)
    except UserError as error:
        if cut.settings.is_off:
            raise
        raise UserError(f"{error} (to prune without quantizing, use `qpruner prune`)") from error
    return cut


def check_offers(config: RunConfig, layout: Layout, on_gpu: bool) -> None:
    """Raise an error if a group takes none of the formats."""
    for group in layout.groups:
        if all(refusals(name, group.linears, on_gpu) for name in group.formats):
            raise UserError(
                _refused(group.formats, group.linears, on_gpu, f"group {group.name} takes none of")
            )


def _check_formats(config: RunConfig, layouts: Iterable[Layout], on_gpu: bool) -> None:
    """Raise an error if no group of any cut takes one of the formats."""
    blocks = [
        group
        for layout in layouts
        for group in layout.groups
        if group.name not in (EMBEDDINGS, HEAD)
    ]
    linears = [linear for group in blocks for linear in group.linears]
    for name in config.quantize.levels:
        if all(refusals(name, group.linears, on_gpu) for group in blocks):
            raise UserError(_refused((name,), linears, on_gpu, "no group takes"))


def _refused(
    levels: Sequence[str], linears: Sequence[LinearShape], on_gpu: bool, state: str
) -> str:
    """Say why layers refuse formats, and which formats they take."""
    reasons = dict.fromkeys(
        reason for level in levels for reason in refusals(level, linears, on_gpu)
    )
    taken = [name for name in formats() if not refusals(name, linears, on_gpu)]
    return (
        f"`quantize.formats`: {state} {', '.join(levels)} ({next(iter(reasons))}): name some of "
        f"{', '.join(taken)}; or, if pruning made this width, set `prune.round_to` to that divisor "
        "for a layer that reads MLP channels, `prune.units: [mlp]` for one that reads attention "
        "heads"
    )
