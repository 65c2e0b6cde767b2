"""The verb `qpruner check`: validate a configuration and estimate what its run would need."""

from collections.abc import Iterator
from typing import NamedTuple

import click
import yaml

from qpruner import estimate
from qpruner.cli import Facts
from qpruner.cli.terminal import Terminal
from qpruner.config.schema import RunConfig
from qpruner.errors import UserError
from qpruner.estimate import hours
from qpruner.models.layout import refusals
from qpruner.models.memory import free_bytes
from qpruner.pipeline.preflight import PRUNED_EARLIER, Inspection, amount
from qpruner.pipeline.preflight_rows import SPLITS, Rows, num_cut
from qpruner.pipeline.run import Checked
from qpruner.pipeline.run import check as check_run
from qpruner.pipeline.shapes import Shapes, is_pruned
from qpruner.plans.plan import budget_text, cut_title
from qpruner.quantization.formats import by_size
from qpruner.report.snapshot import driver_text
from qpruner.runs.run_dir import RunDir
from qpruner.wording import counted


def check(
    config: RunConfig,
    address: str | None,
    quiet: bool,
    measure: bool,
    for_gpus: bool,
    show_config: bool,
) -> Facts:
    """Print and return the sizes, memory and time of a planned run.

    Args:
        config: The validated configuration.
        address: Address of a Ray cluster to check; None checks this machine.
        quiet: Print only the verdict, and the warnings on stderr.
        measure: Time a few steps on this machine and estimate the hours from them.
        for_gpus: Assume a machine with GPUs, even if this one has none.
        show_config: Print every key of the configuration first.

    Returns:
        The object that `--json` prints; bytes and hours are not rounded.

    Raises:
        UserError: The run cannot work.
    """
    if measure and for_gpus:
        raise UserError(
            "`--measure` times this machine, `--gpu` assumes another one: give only one of them"
        )
    is_elsewhere = for_gpus and address is None
    with Terminal(quiet=quiet) as terminal:
        checked = check_run(config, terminal.emit, address, gpu_is_elsewhere=is_elsewhere)
    rates = _measured_rates(config, checked) if measure else None
    gpus = checked.resources.get("gpu") or (1.0 if for_gpus else None)
    is_here = address is None and not for_gpus and config.model.device_map == "single"
    if gpus is not None and gpus > 1:
        is_here = False
    estimates = estimate.facts(config, checked.inspection, rates, checked.slots, gpus)
    estimates["memory_free"] = free_bytes() if is_here else None
    warnings = _warnings(config, checked.inspection, estimates)

    if show_config:
        click.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if not quiet:
        for line in _lines(config, checked, estimates, has_gpu=gpus is not None):
            click.echo(line)
    for warning in warnings:
        click.echo(f"warning:     {warning}", err=quiet)
    keys = "" if quiet or show_config else "; `--show-config` prints every key in effect"
    click.echo(f"The configuration is valid{keys}.")
    return {"status": "ok", **_facts(config, checked), **estimates, "warnings": warnings}


def _warnings(config: RunConfig, inspection: Inspection, estimates: Facts) -> list[str]:
    """List what may go wrong, first a command that works on the run folder."""
    warnings = [*config.warnings, *inspection.warnings]
    driver = driver_text(RunDir(config.output, create=False))
    if driver:
        warnings.insert(0, f"{driver}: `qpruner run` is refused until it ends")
    needed = estimates["memory_at_once"]
    free = estimates["memory_free"]
    if free is not None and needed > free:
        warnings.append(
            f"{needed / 1e9:.2f} GB of memory are needed at most, and {free / 1e9:.2f} GB are "
            "free here: lower `evaluate.batch_size`, another batch size or `search.max_concurrent`"
        )
    return warnings


# ---- the object that `--json` prints


def _facts(config: RunConfig, checked: Checked) -> Facts:
    shapes = checked.inspection.shapes
    rows = checked.inspection.rows
    needed, free = checked.disk
    cuts = {}
    for name, cut in shapes.cuts.items():
        cuts[name] = {
            "parameters": shapes.layouts[name].num_parameters,
            "blocks": cut.model_config.num_hidden_layers,
            "multiply_adds": _multiply_adds(shapes, name),
        }
    offered = {name: groups._asdict() for name, groups in _offered(config, shapes).items()}
    return {
        "num_groups": len(shapes.reference.groups),
        "parameters_base": shapes.base.num_parameters,
        "cuts": cuts,
        "left_out": dict(shapes.left_out),
        "blocks_base": shapes.model_config.num_hidden_layers,
        "is_pruned_earlier": is_pruned(shapes.model_config),
        "is_estimate": shapes.is_estimate,
        "formats": offered,
        **{f"bytes_all_{name}": size for name, size in _uniform_bytes(config, shapes).items()},
        "bytes_budget": shapes.budget_bytes,
        "bytes_plan": _plan_bytes(shapes),
        "concurrent_trials": min(checked.slots, config.num_trials),
        "rungs": list(config.search.rungs),
        "rows": {name: len(examples) for name, examples in rows.examples.items()},
        "rows_cut": _num_cut(config, rows),
        "questions": rows.num_questions,
        "disk_needed": needed,
        "disk_free": free,
    }


class _Groups(NamedTuple):
    """The groups that may have a format, and those that cannot take it, with the reason."""

    groups: list[str]
    lacking: dict[str, str]


def _offered(config: RunConfig, shapes: Shapes) -> dict[str, _Groups]:
    """Return the groups of every format that the configuration names."""
    quantize = config.quantize
    offered = {}
    for name in by_size(tuple({*quantize.levels, *quantize.embedding_levels})):
        groups = _Groups([], {})
        for group in shapes.reference.groups:
            is_outside = group.is_table
            levels = quantize.embedding_levels if is_outside else quantize.levels
            if name in group.formats:
                groups.groups.append(group.name)
            elif name in levels:
                linears = group.linears
                reasons = refusals(name, linears, True) or refusals(name, linears, False)
                groups.lacking[group.name] = reasons[0]
        offered[name] = groups
    return offered


def _multiply_adds(shapes: Shapes, cut: str) -> float:
    """Return the multiply-adds of a cut as a share of the base model's."""
    return shapes.layouts[cut].multiply_adds / shapes.base.multiply_adds


def _uniform_bytes(config: RunConfig, shapes: Shapes) -> dict[str, int]:
    layout = shapes.reference
    return {name: layout.plan_bytes(layout.uniform(name)) for name in config.quantize.levels}


def _plan_bytes(shapes: Shapes) -> int | None:
    """Return the bytes of the plan that the configuration gives, if they are known."""
    plan = shapes.plan
    return None if plan is None else shapes.layout_of(plan.cut).plan_bytes(plan)


def _num_cut(config: RunConfig, rows: Rows) -> dict[str, int]:
    """Estimate how many rows of each split lose their ends."""
    return {name: num_cut(rows.examples[name], config.data.max_length) for name in SPLITS}


def _measured_rates(config: RunConfig, checked: Checked) -> hours.Rates:
    """Time a few steps on this machine.

    Raises:
        UserError: Trials need a GPU, and this machine has none.
    """
    import torch

    cores = max(1, int(checked.resources.get("cpu", 1)))
    machine = counted(cores, "CPU core")
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    elif checked.resources.get("gpu"):
        raise UserError(
            "`--measure` times this machine, which has no GPU, but trials would use one: "
            "run it on theirs"
        )
    return hours.measured_rates(config, checked.inspection, cores, machine)


# ---- lines of text


def _lines(config: RunConfig, checked: Checked, estimates: Facts, has_gpu: bool) -> Iterator[str]:
    """Format the estimates and sizes of a run as the lines that `check` prints."""
    shapes = checked.inspection.shapes
    formats = [_format_text(name, *groups) for name, groups in _offered(config, shapes).items()]
    yield f"groups:      {len(shapes.reference.groups)} ({config.quantize.group})"
    yield f"formats:     {'; '.join(formats)}"
    yield from _cut_lines(shapes, config.quantize.budget.flops_fraction)
    yield from _row_lines(config, checked.inspection.rows)
    num_concurrent = min(checked.slots, config.num_trials)
    at_once = f"{num_concurrent} at once, scored at steps {list(config.search.rungs)}"
    yield f"trials:      {config.num_trials}, {at_once}"
    yield from estimate.memory_text(estimates)
    needed, free = map(amount, checked.disk)
    yield f"disk:        about {needed} at most; {free} free here"
    yield from estimate.time_text(estimates, has_gpu)

    uniform = _uniform_bytes(config, shapes)
    sizes = [f"all {name} {size / 1e6:.1f} MB" for name, size in uniform.items()]
    budget = f"budget {shapes.budget_bytes / 1e6:.1f} MB"
    if shapes.is_estimate:
        budget += " (estimate: the exact widths are known once the model is pruned)"
    yield f"plan bytes:  {', '.join(sizes)}, {budget}"
    if config.search.plan is not None and not config.search.plan_method:
        yield f"your plan:   {_given_plan(shapes)}"


def _format_text(name: str, groups: list[str], lacking: dict[str, str]) -> str:
    having = ", ".join(groups) if len(groups) <= 2 else counted(len(groups), "group")
    text = f"{name} for {having}"
    for group, reason in lacking.items():
        return f"{text}, not for {counted(len(lacking), 'group')} ({group}: {reason})"
    return text


def _given_plan(shapes: Shapes) -> str:
    """Format the bytes of a plan that the configuration gives."""
    parts = []
    size = _plan_bytes(shapes)
    if size is not None:
        parts.append(f"{size / 1e6:.1f} MB, {budget_text(size, shapes.budget_bytes)}")
    if shapes.is_estimate:
        parts.append("its bytes are compared with the budget once the model is pruned")
    return "; ".join(parts)


def _cut_lines(shapes: Shapes, limit: float | None) -> Iterator[str]:
    """Format the parameters of each cut, with its blocks if some are dropped.

    The share of multiply-adds is added if they have a limit.
    """
    num_blocks = shapes.model_config.num_hidden_layers
    for name, cut in shapes.cuts.items():
        num_parameters = shapes.layouts[name].num_parameters
        kept = f"{shapes.base.num_parameters / 1e6:.1f} M -> {num_parameters / 1e6:.1f} M"
        num_kept = cut.model_config.num_hidden_layers
        if num_kept < num_blocks:
            kept += f", {num_blocks} -> {num_kept} blocks"
        if limit is not None:
            share = _multiply_adds(shapes, name)
            kept += f", {share:.1%} of the multiply-adds"
            if share > limit:
                kept += ", too many to win"
        title = PRUNED_EARLIER if is_pruned(shapes.model_config) else cut_title(name)
        yield f"parameters:  {kept} ({title})"


def _row_lines(config: RunConfig, rows: Rows) -> Iterator[str]:
    """Format the rows and questions of every step."""
    yield _split_line(config, rows)
    yield _calibration_line(config, rows)
    questions = rows.num_questions
    scored = []
    if questions["search"]:
        scored.append(f"{_questions(questions['search'])} score the trials")
    if questions["fresh"]:
        scored.append(f"{_questions(questions['fresh'])}, fresh, choose the winner")
    if scored:
        yield f"search:      {'; '.join(scored)}"

    tested = _questions(questions["test"])
    if "text" in rows.examples:
        tested += f", {counted(len(rows.examples['text']), 'row')} of text (`evaluate.text`)"
    yield f"test:        {tested}"


def _split_line(config: RunConfig, rows: Rows) -> str:
    train, validation, confirmation = (len(rows.examples[name]) for name in SPLITS)
    chosen = (confirmation + 1) // 2
    line = (
        f"rows:        {train} train, {validation} validation, {confirmation} confirmation "
        f"({chosen} fresh ones choose the winner, {confirmation - chosen} judge it)"
    )
    cut = [f"{number} {name}" for name, number in _num_cut(config, rows).items() if number]
    if cut:
        limit = f"`data.max_length` {config.data.max_length}"
        line += f"; about {', '.join(cut)} lose their ends ({limit})"
    return line


def _calibration_line(config: RunConfig, rows: Rows) -> str:
    calibration = config.calibration
    key = "`calibration.data`" if calibration.data else "`data.train`"
    origin = f"from {len(rows.examples['calibration'])} rows of {key}"
    if calibration.packing:
        origin = f"of {calibration.max_length} tokens packed {origin}"
    measured = "none"
    if config.measured_methods:
        measured = counted(calibration.num_sensitivity_samples, "row")
    return (
        f"calibration: {counted(calibration.num_samples, 'sample')} {origin} for importance; "
        f"{measured} of `data.train` for the sensitivities"
    )


def _questions(by_task: dict[str, int]) -> str:
    """Format question counts as `48 questions (arc_easy 24, piqa 24)`."""
    text = ", ".join(f"{task} {count}" for task, count in by_task.items())
    return f"{counted(sum(by_task.values()), 'question')} ({text})"
