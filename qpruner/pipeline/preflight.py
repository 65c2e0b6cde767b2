"""Check a configuration against its model, rows, tasks and device before any weights are loaded.

`qpruner check` prints the result of `inspect`, and `qpruner run` starts with this check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qpruner.config.schema import BudgetConfig, PruneConfig, QuantizeConfig, RunConfig
from qpruner.data.encoding import load_token_ids
from qpruner.errors import PlanRefused, UserError, together
from qpruner.models.families import ATTENTION, MLP, family_of
from qpruner.models.layout import layout_of
from qpruner.models.loading import load_model_config
from qpruner.pipeline.preflight_rows import Rows, check_encoding, check_rows
from qpruner.plans.plan import WRONGLY_DECODED, Layout, PrecisionPlan, check_cpu_widths, decodes_wrongly, read_plan
from qpruner.pruning.settings import Cut, are_alike, cuttable_layers
from qpruner.runs.storage import run_root

PRUNED_EARLIER = "pruned earlier: the cut is skipped"
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GIB = 1024**3
NEEDED_CAPABILITY = {4: (6, 0), 8: (7, 5)}
"""Minimum CUDA compute capability for the layers of bitsandbytes, by bit-width."""


@dataclass(frozen=True)
class Shapes:
    """Shapes and sizes of the base and the pruned model, with cuts and budget, computed without weights."""

    model_config: Any
    base: Layout
    cuts: tuple[Cut, ...]
    pruned: Layout
    is_estimate: bool
    """Whether the pruned shapes depend on scores, as with global selection or dropped blocks."""
    budget_bytes: int
    plan: PrecisionPlan | None
    """The plan of the file in `search.plan`; None without a file or if the names of the groups depend on scores."""
    packs: bool
    """Whether later stages quantize the pruned model. Otherwise its widths need not suit the device."""


@dataclass(frozen=True)
class Inspection(Shapes, Rows):
    """Everything known about a run before its first stage: shapes, rows, questions and samples."""

    samples: dict[str, int]
    """Number of `importance` and `sensitivity` samples."""
    sample_length: int
    """Number of tokens of the longest `importance` sample."""


def inspect(config: RunConfig, works_here: bool = True, packs: bool = True) -> Inspection:
    """Validate a configuration against model, data and tasks.

    With `works_here` the stages run on this machine, so it is checked too; `packs` is False if they pack no weights.
    """
    shapes: Shapes
    rows: Rows
    _, shapes, rows = together(
        lambda: run_root(config.output), lambda: shapes_of(config, works_here, packs), lambda: check_rows(config)
    )
    calibration, vocabulary = config.calibration, shapes.model_config.vocab_size
    num_samples, sample_length = calibration.num_samples, calibration.max_length
    if calibration.token_ids:
        given = load_token_ids(Path(calibration.token_ids), vocabulary)
        num_samples, sample_length = len(given), max(len(sample["input_ids"]) for sample in given)
    _check_positions(config, shapes, sample_length)
    check_encoding(config, rows.examples, vocabulary)
    samples = {"importance": num_samples, "sensitivity": calibration.num_sensitivity_samples}
    parts = vars(shapes) | vars(rows) | {"warnings": (*rows.warnings, *_few_trials(config))}
    return Inspection(**parts, samples=samples, sample_length=sample_length)


def _check_positions(config: RunConfig, shapes: Shapes, sample_length: int) -> None:
    """Raise an error if rows or samples are longer than the learned position table of the model."""
    model_config = shapes.model_config
    if not family_of(model_config).has_learned_positions:
        return
    lengths = {"data.max_length": config.data.max_length}
    if not all(cut.settings.is_off for cut in shapes.cuts):
        key = "calibration.token_ids" if config.calibration.token_ids else "calibration.max_length"
        lengths[key] = sample_length
    for name, length in lengths.items():
        if length > (most := int(model_config.max_position_embeddings)):
            raise UserError(
                f"`{name}`: {length} tokens are more than the {most} positions that this {model_config.model_type} "
                f"model has learned: use at most {most}"
            )


def shapes_of(config: RunConfig, works_here: bool, packs: bool) -> Shapes:
    """Compute the shapes and sizes of the base and the pruned model; check cut, budget, plan and device."""
    import torch

    model_config = load_model_config(config.model)
    family_of(model_config)  # raises an error if the family is not supported
    base = layout_for(config, model_config)
    cuts = cuts_in_effect(config.prune, model_config)
    if works_here:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        check_device(capability, config, model_config, cuts, packs)
    pruned = layout_for(config, cuts[0].expected)
    budget = budget_bytes(config.quantize, pruned, config.search.pareto)
    uncertain = [cut for cut in cuts if cut.settings.selection == "global" or cut.settings.drops_blocks]
    is_estimate = not all(cut.settings.is_off for cut in uncertain)
    # If blocks of different sizes are dropped, the number of dropped blocks depends on scores.
    settings = cuts[0].settings
    are_groups_known = settings.is_off or not settings.drops_blocks or are_alike(model_config)
    plan = plan_in_file(config, pruned, None if is_estimate else budget) if are_groups_known else None
    return Shapes(model_config, base, cuts, pruned, is_estimate, budget, plan, packs)


def plan_in_file(config: RunConfig, layout: Layout, budget_bytes: int | None) -> PrecisionPlan | None:
    """Return the plan of the file in `search.plan`, if any; raise `PlanRefused` if it does not fit model or budget."""
    file = config.search.plan_file
    if file is None:
        return None
    plan = read_plan(file, [group.name for group in layout.groups], config.quantize.bits)
    if budget_bytes is not None and (plan_bytes := layout.plan_bytes(plan)) > budget_bytes:
        excess = math.ceil((plan_bytes - budget_bytes) / 100) / 1e4
        raise PlanRefused(
            f"the plan in {file} takes {plan_bytes / 1e6:.2f} MB, {excess:.4f} MB more than the budget of "
            f"{budget_bytes / 1e6:.2f} MB: give groups fewer bits, or raise `quantize.budget`"
        )
    return plan


def _few_trials(config: RunConfig) -> Iterator[str]:
    """Warn if the plans to beat (uniform, and the best by each sensitivity), which run first, may use up all trials."""
    trials, num_controls = config.search.max_trials, len(config.quantize.bits) - 1 + len(config.sensitivity.methods)
    if num_controls >= trials and config.is_searched:
        yield (
            f"up to {num_controls} uniform and seed plans run first and may leave none of {trials} trials "
            "(`search.max_trials`) to the searcher: allow more trials, or name fewer `sensitivity.methods`"
        )


def layout_for(config: RunConfig, model_config: Any) -> Layout:
    """List the groups of a model (layers that share a bit-width), to compute the bytes of plans, adapters included."""
    quantize, element_bytes = config.quantize, DTYPE_BYTES[config.model.dtype]
    return layout_of(model_config, quantize.group, element_bytes, quantize.double_quant, config.lora.rank)


def is_pruned(model_config: Any) -> bool:
    """Return True if the blocks differ in width, so the model was pruned earlier and is not cut again."""
    return bool(model_config.is_heterogeneous)


def cuts_in_effect(settings: PruneConfig, model_config: Any) -> tuple[Cut, ...]:
    """Plan the cut of a model; for a model that was pruned earlier, return a cut of rate 0, which changes nothing."""
    from qpruner.pruning.prune import planned_cut

    if is_pruned(model_config):
        return (Cut(settings.model_copy(update={"rate": 0.0, "layer_rate": None}), model_config),)
    try:
        return (planned_cut(model_config, settings),)
    except UserError as error:
        key, rate = ("rate", settings.rate) if settings.layer_rate is None else ("layer_rate", settings.layer_rate)
        raise UserError(f"{error} (`prune.{key}` is {rate:g})") from error


def check_quantizable(model_config: Any) -> None:
    """Raise an error if bitsandbytes cannot quantize the model."""
    family = family_of(model_config)
    if family.unquantizable:
        raise UserError(
            f"`quantize`: the experts of a {family.model_type} model are stacked in one parameter "
            f"({family.unquantizable[0]}), which bitsandbytes' 4- and 8-bit layers cannot hold: such a model can be "
            "pruned (`qpruner prune`), not quantized"
        )


def budget_bytes(quantize: QuantizeConfig, layout: Layout, pareto: bool) -> int:
    """Return the budget in bytes; raise an error if the budget leaves no choice between plans."""
    budget, levels = quantize.budget, quantize.bits
    lowest, highest = layout.plan_bytes(layout.uniform(levels[0])), layout.plan_bytes(layout.uniform(levels[-1]))
    size = _asked_bytes(budget, levels, [layout.plan_bytes(layout.uniform(bits)) for bits in levels])
    name, value = next((name, value) for name, value in budget if value is not None)
    choice = lowest
    if len(levels) > 1:
        choice += min(more - less for less, more in zip(*map(layout.group_bytes, levels[:2]), strict=True))
    key = f"`quantize.budget.{name}`"
    smallest = f"the smallest budget that works is {choice} bytes ({-(-choice * 10**4 // GIB) / 10**4} GiB)"
    if size < choice:
        state = "is below" if size < lowest else "leaves no choice but"
        raise UserError(
            f"{key} {state} the pruned model with every group at {levels[0]} bits ({lowest} bytes): {smallest}, got "
            f"{value}; raise it, or prune more"
        )
    if size >= highest and len(levels) > 1 and not pareto:
        largest = f"the largest {highest - 1} bytes ({(highest - 1) * 10**4 // GIB / 10**4} GiB)"
        raise UserError(
            f"{key} leaves nothing to choose, because every group fits at {levels[-1]} bits: {smallest}, "
            f"{largest}, got {value}; lower it, or let `search.pareto` find the best plan of every size"
        )
    return size


def _asked_bytes(budget: BudgetConfig, levels: tuple[int, ...], sizes: list[int]) -> int:
    """Convert a budget to bytes; interpolate `fraction` or `mean_bits` between `sizes`, those of the uniform plans."""
    if budget.fraction is not None:
        return round(sizes[0] + budget.fraction * (sizes[-1] - sizes[0]))
    if budget.mean_bits is None:
        return budget.bytes if budget.bytes is not None else round((budget.gib or 0) * GIB)
    if not levels[0] <= budget.mean_bits <= levels[-1]:
        raise UserError(
            f"`quantize.budget.mean_bits` must be between the lowest and highest of `quantize.bits`, {levels[0]} and "
            f"{levels[-1]}, got {budget.mean_bits}"
        )
    return round(float(np.interp(budget.mean_bits, levels, sizes)))


def amount(size: int) -> str:
    """Format bytes as GiB, such as `1.5 GiB`, or as MiB below one GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{-(-size * 10 // 1024**2) / 10:.1f} MiB"


def check_gpu(config: RunConfig, capability: tuple[int, int]) -> None:
    """Raise an error if a GPU of this compute capability cannot run the configured bit-widths."""
    for bits in config.quantize.bits:
        needed = NEEDED_CAPABILITY.get(bits, (0, 0))
        if capability < needed:
            has, need = (".".join(map(str, version)) for version in (capability, needed))
            raise UserError(
                f"`quantize.bits`: a GPU of compute capability {has} cannot run {bits}-bit layers, which need "
                f"{need}; leave {bits} out"
            )


def check_device(
    capability: tuple[int, int] | None, config: RunConfig, model_config: Any, cuts: Sequence[Cut], packs: bool
) -> None:
    """Raise an error if the pruned model cannot run on a GPU of this compute capability, or on a CPU (None)."""
    if capability is None and config.model.dtype == "float16":
        raise UserError("`model.dtype`: float16 cannot be trained on a CPU; use bfloat16 or float32")
    for cut in cuts if packs else ():
        try:
            _check_cpu(config, model_config, cut) if capability is None else check_gpu(config, capability)
        except UserError as error:
            if cut.settings.is_off:
                raise
            raise UserError(f"{error} (to prune without quantizing, use `qpruner prune`)") from error


def _check_cpu(config: RunConfig, model_config: Any, cut: Cut) -> None:
    """Raise an error if a cut may leave widths that 4-bit layers on a CPU decode wrongly."""
    if 4 not in config.quantize.bits:
        return
    groups = layout_for(config, cut.expected).groups
    check_cpu_widths([linear for group in groups for linear in group.linears])
    if cut.settings.selection == "global" and not cut.settings.is_off:
        for index in cuttable_layers(model_config, cut.settings):
            _check_any_width(model_config, cut.settings, index)


def _check_any_width(model_config: Any, prune: PruneConfig, index: int) -> None:
    """Raise an error if global selection may leave a block with a width that 4-bit layers on a CPU decode wrongly."""
    family = family_of(model_config)
    for kind in family.unit_kinds(model_config.per_layer_config[index], index):
        if kind.name not in prune.width_units or not kind.output_linear:
            continue
        columns = next(item.width for item in kind.slices if item.parameter == f"{kind.output_linear}.weight")
        multiple = prune.round_to if kind.name == MLP else 1
        widths = (units * columns for units in (*range(multiple, kind.num_units, multiple), kind.num_units))
        wrong = next(filter(decodes_wrongly, widths), None)
        if wrong is None:
            continue
        linear = f"{family.block_path(index)}.{kind.output_linear}"
        remedy = "make `prune.round_to` a multiple of 64, or " if kind.name == MLP else ""
        raise UserError(
            f"`prune.selection: global` may leave {linear} with {wrong} columns, {WRONGLY_DECODED}: {remedy}set "
            f"`prune.units: [{ATTENTION if kind.name == MLP else MLP}]`, or use `quantize.bits` 8 and 16, or use "
            "`prune.selection: per_layer`, which fixes these numbers of columns before the cut"
        )
