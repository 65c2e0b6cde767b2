"""Everything that can be known to be wrong before a weight is loaded, and what the run would be.

`inspect` is what `qpruner check` prints and what `qpruner run` does first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from qpruner.config.pruning import RIDGE
from qpruner.config.schema import BudgetConfig, PruneConfig, QuantizeConfig, RunConfig
from qpruner.data.sources import Example
from qpruner.errors import PlanRefused, UserError, together
from qpruner.models.families import ATTENTION, EXPERT, MLP, family_of
from qpruner.models.layout import layout_of, num_layers
from qpruner.models.loading import load_model_config
from qpruner.pipeline.preflight_rows import RowCounts, Rows, check_encoding, check_rows, size_of_importance_samples
from qpruner.plans.file import check_affordable, read_plan
from qpruner.plans.plan import WRONGLY_DECODED, Layout, PrecisionPlan, check_cpu_widths, decodes_wrongly
from qpruner.pruning.best_cut import Cut, cuts_of, with_or_without
from qpruner.pruning.prune import are_alike, cuttable_layers
from qpruner.runs.storage import run_root

PRUNED_EARLIER = "pruned earlier: the cut is skipped"
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GIB = 1024**3
NEEDED_CAPABILITY = {4: (6, 0), 8: (7, 5)}
"""Compute capability that bitsandbytes' layers of so many bits need."""


@dataclass(frozen=True)
class Shapes:
    """What a configuration makes of its model.

    Attributes:
        model_config: transformers config of the base model.
        base: Sizes of the base model.
        cuts: The cuts of this model that are tried, the one without whole blocks first where that is open.
        left_out: Why some are not tried on the device that the run works on.
        pruned: Sizes after the first that is tried; an estimate when `is_estimate`.
        is_estimate: Global selection, or which blocks go, leaves the widths open until the scores are known.
        budget_bytes: The byte budget for the pruned model.
        plan: That of the file that `search.plan` names; None where it names none, or where how many blocks go is open.
        packs: Whether the cut is gone on from. One that is only made may have widths that a device cannot run.
    """

    model_config: Any
    base: Layout
    cuts: tuple[Cut, ...]
    left_out: tuple[str, ...]
    pruned: Layout
    is_estimate: bool
    budget_bytes: int
    plan: PrecisionPlan | None
    packs: bool


AnyShapes = TypeVar("AnyShapes", bound=Shapes)


@dataclass(frozen=True)
class Inspection(Shapes):
    """What a run would be.

    Attributes:
        examples: Rows by split.
        questions: Words of the tasks' questions, by use (`search`, `fresh`, `evaluate`).
        metrics: lm-eval's metric that scores each task, by section (`search`, `evaluate`).
        counts: How many samples and questions each step has.
        warnings: What will work, but perhaps not as hoped.
    """

    examples: dict[str, list[Example]]
    questions: dict[str, list[str]]
    metrics: dict[str, dict[str, str]]
    counts: RowCounts
    warnings: tuple[str, ...]


def inspect(config: RunConfig, works_here: bool = True, packs: bool = True) -> Inspection:
    """Validate a configuration against the model, the data, the tasks and the device; no weights are read.

    Args:
        config: The configuration.
        works_here: Whether this machine's device is what the run works on, not those of a cluster.
        packs: Whether the cut is gone on from.

    Raises:
        UserError: For what cannot work: of the folder, the model, each source of rows and the tasks all that is found,
            of what rests on them the first.
    """
    shapes: Shapes
    rows: Rows
    _, shapes, rows = together(
        lambda: run_root(config.output), lambda: shapes_of(config, works_here, packs), lambda: check_rows(config)
    )
    importance, sample_length = size_of_importance_samples(config, shapes.model_config.vocab_size, rows.examples)
    _check_positions(config, shapes, sample_length)
    check_encoding(config, rows.examples)
    samples = {"importance": importance, "sensitivity": config.calibration.num_sensitivity_samples}
    cut = _of_cut(config, shapes)
    return Inspection(
        **vars(shapes),
        examples=rows.examples,
        questions=rows.questions,
        metrics=rows.metrics,
        counts=RowCounts(samples, rows.asked, sample_length),
        warnings=(*rows.warnings, *cut, *shapes.left_out, *_few_trials(config)),
    )


def _check_positions(config: RunConfig, shapes: Shapes, sample_length: int) -> None:
    """Refuse more tokens than a table of positions has rows."""
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
                f"model has learned: give at most {most}"
            )


def shapes_of(config: RunConfig, works_here: bool, packs: bool) -> Shapes:
    """What the configuration makes of the model."""
    model_config = load_model_config(config.model)
    family_of(model_config)
    base = layout_for(config, model_config)
    cuts, plan = _for_plan(config, model_config, cuts_in_effect(config.prune, model_config))
    shapes = Shapes(model_config, base, cuts, (), base, False, 0, plan, packs)
    return shapes_on(_own_capability(), config, shapes) if works_here else _with_cuts(config, shapes, cuts)


def shapes_on(capability: tuple[int, int] | None, config: RunConfig, shapes: AnyShapes) -> AnyShapes:
    """With those cuts alone that a device can train and run; all of them where it can none and nothing more is to be
    done.

    Args:
        capability: Compute capability of the GPU; None of a CPU.
        config: The configuration.
        shapes: What the configuration makes of the model, whatever the device.

    Raises:
        UserError: Naming the key, the rule and the remedy, where it can run no cut: that of the first.
    """
    cuts, refusals = cuts_on(capability, config, shapes.model_config, shapes.cuts, shapes.packs)
    left_out = tuple(
        f"the cut {with_or_without(cut.settings)} whole blocks is left out: {refusal}"
        for cut, refusal in refusals
        if cut not in cuts
    )
    return replace(_with_cuts(config, shapes, cuts), left_out=left_out)


def _with_cuts(config: RunConfig, shapes: AnyShapes, cuts: tuple[Cut, ...]) -> AnyShapes:
    """The sizes after these cuts."""
    pruned = layout_for(config, cuts[0].expected)
    budget = budget_bytes(config.quantize, pruned, config.search.pareto)
    is_estimate = any(
        not cut.settings.is_off and (cut.settings.selection == "global" or cut.settings.drops_blocks) for cut in cuts
    )
    if shapes.plan and not is_estimate:
        assert config.search.plan_file
        check_affordable(config.search.plan_file, pruned.plan_bytes(shapes.plan), budget)
    return replace(shapes, cuts=cuts, pruned=pruned, is_estimate=is_estimate, budget_bytes=budget)


def _for_plan(
    config: RunConfig, model_config: Any, cuts: tuple[Cut, ...]
) -> tuple[tuple[Cut, ...], PrecisionPlan | None]:
    """The plan in the file of `search.plan`, with the cut whose groups it names; no plan where there is none, or where
    the groups are known after the cut alone."""
    # Where blocks are not alike, how many go depends on which.
    has_known_groups = are_alike(model_config) or not any(
        cut.settings.drops_blocks and not cut.settings.is_off for cut in cuts
    )
    file = config.search.plan_file
    if file is None or not has_known_groups:
        return cuts, None
    refusals = []
    for cut in cuts:
        groups = [group.name for group in layout_for(config, cut.expected).groups]
        try:
            return (cut,), read_plan(file, groups, config.quantize.bits)
        except PlanRefused as error:
            refusals.append(error)
    raise refusals[0]


def _of_cut(config: RunConfig, shapes: Shapes) -> Iterator[str]:
    """That keys of the cut have no effect on this model."""
    prune, source = config.prune, config.model.source
    key = "rate" if prune.layer_rate is None else "layer_rate"
    rate = getattr(prune, key)
    if is_pruned(shapes.model_config):
        if rate and key in prune.model_fields_set:
            also = "" if key == "rate" else " and take out `prune.layer_rate` (`--set prune.layer_rate=`)"
            yield (
                f"`prune.{key}` is {rate:g}, but {source} was pruned earlier, so that the cut is skipped: set "
                f"`prune.rate: 0`{also}, or name the unpruned model"
            )
        return
    compensations = {cut.settings.compensates_by for cut in shapes.cuts if not cut.settings.is_off}
    if prune.in_effect().ridge != RIDGE and compensations == {"none"}:
        yield f"`prune.ridge` has no effect: least squares cannot make up for what goes from {source}"


def _few_trials(config: RunConfig) -> Iterator[str]:
    """That the trials may end before the searcher begins."""
    trials, num_controls = config.search.max_trials, len(config.quantize.bits) - 1 + len(config.sensitivity.methods)
    if num_controls >= trials and config.is_searched:
        yield (
            f"up to {num_controls} uniform and seed plans come first, which may leave none of {trials} trials "
            "(`search.max_trials`) to the searcher: allow more trials, or name fewer `sensitivity.methods`"
        )


def layout_for(config: RunConfig, model_config: Any) -> Layout:
    """Groups and sizes of a model under this configuration's quantization and adapters."""
    return layout_of(
        model_config,
        config.quantize.group,
        DTYPE_BYTES[config.model.dtype],
        config.quantize.double_quant,
        config.lora.rank,
    )


def is_pruned(model_config: Any) -> bool:
    """Whether the blocks already differ in width, so that the cut is skipped."""
    return bool(model_config.is_heterogeneous)


def cuts_in_effect(settings: PruneConfig, model_config: Any) -> tuple[Cut, ...]:
    """The cuts of this model that are tried; of one that was pruned earlier, that there is none.

    Raises:
        UserError: If the model cannot meet the settings.
    """
    if is_pruned(model_config):
        return (Cut(settings.model_copy(update={"rate": 0.0, "layer_rate": None}), model_config),)
    try:
        return cuts_of(model_config, settings)
    except UserError as error:
        key, rate = ("rate", settings.rate) if settings.layer_rate is None else ("layer_rate", settings.layer_rate)
        raise UserError(f"{error} (`prune.{key}` is {rate:g})") from error


def check_quantizable(model_config: Any) -> None:
    """Refuse weights that no bit-width can be given to; pruning alone works for such models.

    Raises:
        UserError: Naming the first parameter.
    """
    family = family_of(model_config)
    if family.unquantizable:
        with_experts = (
            index
            for index in range(num_layers(model_config))
            if any(kind.name == EXPERT for kind in family.unit_kinds(model_config.per_layer_config[index], index))
        )
        path = f"{family.block_path(next(with_experts, 0))}.{family.unquantizable[0]}"
        raise UserError(
            f"`quantize`: the experts of a {family.model_type} model are stacked in one parameter ({path}), which "
            "bitsandbytes' 4- and 8-bit layers cannot hold: "
            "such a model can be pruned (`qpruner prune`), not quantized"
        )


def budget_bytes(quantize: QuantizeConfig, layout: Layout, pareto: bool) -> int:
    """The budget in bytes.

    Args:
        quantize: Names the budget and the bit-widths.
        layout: The pruned model.
        pareto: Whether a front is searched, which may go up to the largest plan.

    Raises:
        UserError: If no plan meets it, or, of several bit-widths, only the smallest plan does or every plan does; the
            smallest and the largest that work are named.
    """
    budget, levels = quantize.budget, quantize.bits
    lowest, highest = layout.plan_bytes(layout.uniform(levels[0])), layout.plan_bytes(layout.uniform(levels[-1]))
    size = _asked_bytes(budget, levels, [layout.plan_bytes(layout.uniform(bits)) for bits in levels])
    name, value = next((name, value) for name, value in budget if value is not None)
    choice = lowest
    if len(levels) > 1:
        choice += min(more - less for less, more in zip(*map(layout.group_bytes, levels[:2]), strict=True))
    smallest = f"the smallest that works is {choice} bytes ({_rounded_up_gib(choice)} GiB)"
    if size < lowest:
        raise UserError(
            f"`quantize.budget.{name}` is below the pruned model with every group at {levels[0]} bits, {lowest} bytes: "
            f"{smallest}, got {value}; raise it, or prune more"
        )
    if len(levels) == 1:
        return size
    if size < choice:
        raise UserError(
            f"`quantize.budget.{name}` leaves nothing to choose, only every group at {levels[0]} bits fits, {lowest} "
            f"bytes: {smallest}, got {value}; raise it, or prune more"
        )
    if size >= highest and not pareto:
        largest = f"the largest {highest - 1} bytes ({_rounded_down_gib(highest - 1)} GiB)"
        raise UserError(
            f"`quantize.budget.{name}` leaves nothing to choose, every group fits at {levels[-1]} bits: {smallest}, "
            f"{largest}, got {value}; lower it, or search the whole front with `search.pareto`"
        )
    return size


def _asked_bytes(budget: BudgetConfig, levels: tuple[int, ...], sizes: list[int]) -> int:
    """Bytes that a budget means, given those of the uniform plan of each level; mean bits lie between neighbours."""
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


def _rounded_up_gib(size: int) -> float:
    return -(-size * 10**4 // GIB) / 10**4


def _rounded_down_gib(size: int) -> float:
    return size * 10**4 // GIB / 10**4


def amount(size: int) -> str:
    """`1.5 GiB`, or MiB where GiB would show nothing."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{-(-size * 10 // 1024**2) / 10:.1f} MiB"


def check_gpu(config: RunConfig, capability: tuple[int, int]) -> None:
    """Refuse a GPU of a compute capability that cannot run the configured layers.

    Raises:
        UserError: Naming the key, the rule and the remedy.
    """
    for bits in config.quantize.bits:
        needed = NEEDED_CAPABILITY.get(bits, (0, 0))
        if capability < needed:
            has, need = (".".join(map(str, version)) for version in (capability, needed))
            raise UserError(
                f"`quantize.bits`: a GPU of compute capability {has} cannot run {bits}-bit layers, which need "
                f"{need}; leave {bits} out"
            )


def cuts_on(
    capability: tuple[int, int] | None, config: RunConfig, model_config: Any, cuts: tuple[Cut, ...], packs: bool
) -> tuple[tuple[Cut, ...], list[tuple[Cut, UserError]]]:
    """Of the cuts that are tried, those that a device can train and run, all of them where it can none and nothing more
    is to be done; and what it cannot, with the reasons.

    Args:
        capability: Compute capability of the GPU; None of a CPU.
        config: The configuration.
        model_config: Of the model before the cut.
        cuts: The cuts.
        packs: Whether the cut is gone on from.

    Raises:
        UserError: Naming the key, the rule and the remedy, where it can run none: that of the first.
    """
    if capability is None and config.model.dtype == "float16":
        raise UserError("`model.dtype`: float16 cannot be trained on a CPU; use bfloat16 or float32")
    found: list[Cut] = []
    refusals: list[tuple[Cut, UserError]] = []
    for cut in cuts:
        try:
            _check_cpu(config, model_config, cut) if capability is None else check_gpu(config, capability)
            found.append(cut)
        except UserError as error:
            refusals.append((cut, error))
    if not found and packs:
        refused, why = refusals[0]
        raise UserError(str(why) + ("" if refused.settings.is_off else " (`qpruner prune` alone still makes this cut)"))
    return tuple(found) or cuts, refusals


def remark_on_cut(config: RunConfig, shapes: Shapes) -> str | None:
    """That this machine can make it, and no more; None where it can go on."""
    _, refusals = cuts_on(_own_capability(), config, shapes.model_config, shapes.cuts, packs=False)
    if len(refusals) < len(shapes.cuts):
        return None
    return f"nothing but the cut can be done on this machine: {refusals[0][1]}"


def _check_cpu(config: RunConfig, model_config: Any, cut: Cut) -> None:
    if 4 not in config.quantize.bits:
        return
    groups = layout_for(config, cut.expected).groups
    check_cpu_widths([linear for group in groups for linear in group.linears])
    if cut.settings.selection == "global" and not cut.settings.is_off:
        for index in cuttable_layers(model_config, cut.settings):
            _check_any_width(model_config, cut.settings, index)


def _check_any_width(model_config: Any, prune: PruneConfig, index: int) -> None:
    """Refuse widths that a block may be left with where scores decide on them."""
    family = family_of(model_config)
    for kind in family.unit_kinds(model_config.per_layer_config[index], index):
        if kind.name not in prune.width_units or not kind.output_linear:
            continue
        columns = next(item.width for item in kind.slices if item.parameter == f"{kind.output_linear}.weight")
        multiple = prune.round_to if kind.name == MLP else 1
        left = [*range(multiple, kind.num_units, multiple), kind.num_units]
        wrong = next((units for units in left if decodes_wrongly(units * columns)), None)
        if wrong is None:
            continue
        linear = f"{family.block_path(index)}.{kind.output_linear}"
        if kind.name == MLP and wrong < kind.num_units:
            raise UserError(
                f"`prune.round_to` must be a multiple of 64 for `selection: global` with 4-bit layers on a CPU, got "
                f"{prune.round_to}: {linear} may be left with {wrong * columns} columns, {WRONGLY_DECODED}"
            )
        raise UserError(
            f"`prune.selection: global` may leave {linear} with {wrong * columns} columns, {WRONGLY_DECODED}: use "
            f"`quantize.bits` 8 and 16, set `prune.units: [{ATTENTION if kind.name == MLP else MLP}]`, or `selection: "
            "per_layer`, whose widths are known before the cut"
        )


def _own_capability() -> tuple[int, int] | None:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
