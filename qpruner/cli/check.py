"""The verb `qpruner check`: validate a configuration and estimate what its run would need."""

from collections.abc import Iterator
from typing import Any

import click
import yaml

from qpruner import estimate
from qpruner.cli.terminal import Terminal
from qpruner.config.schema import RunConfig
from qpruner.errors import UserError
from qpruner.estimate import hours
from qpruner.models.layout import refusals
from qpruner.models.memory import free_bytes
from qpruner.pipeline.preflight import PRUNED_EARLIER, Inspection, amount
from qpruner.pipeline.preflight_rows import SPLITS, num_cut
from qpruner.pipeline.run import Checked
from qpruner.pipeline.run import check as check_run
from qpruner.pipeline.shapes import is_pruned
from qpruner.plans.plan import OUTSIDE_BLOCKS, Layout, budget_text, cut_title
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
) -> dict[str, Any]:
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

    facts = _facts(config, checked.inspection, checked.slots)
    facts["memory_free"] = free_bytes() if is_here else None
    facts["disk_needed"], facts["disk_free"] = checked.disk
    facts |= estimate.facts(config, checked.inspection, rates, checked.slots, gpus)
    facts["warnings"] = _warnings(config, checked.inspection, facts)

    if show_config:
        click.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if not quiet:
        click.echo("\n".join(_lines(config, facts, has_gpu=gpus is not None)))
    for warning in facts["warnings"]:
        click.echo(f"warning:     {warning}", err=quiet)
    keys = "" if quiet or show_config else "; `--show-config` prints every key in effect"
    click.echo(f"The configuration is valid{keys}.")
    return {"status": "ok", **facts}


def _warnings(config: RunConfig, inspection: Inspection, facts: dict[str, Any]) -> list[str]:
    """List what may go wrong, first a command that works on the run folder."""
    warnings = [*config.warnings, *inspection.warnings]
    driver = driver_text(RunDir(config.output, create=False))
    if driver:
        warnings.insert(0, f"{driver}: `qpruner run` is refused until it ends")
    needed = facts["memory_at_once"]
    free = facts["memory_free"]
    if free is not None and needed > free:
        warnings.append(
            f"{needed / 1e9:.2f} GB of memory are needed at most, and {free / 1e9:.2f} GB are "
            "free here: lower `evaluate.batch_size`, another batch size or `search.max_concurrent`"
        )
    return warnings


def _facts(config: RunConfig, inspection: Inspection, slots: int) -> dict[str, Any]:
    shapes = inspection.shapes
    layout = shapes.reference
    base = shapes.base
    cuts = {}
    for name, cut in shapes.cuts.items():
        of_cut = shapes.layouts[name]
        cuts[name] = {
            "parameters": of_cut.num_parameters,
            "blocks": cut.model_config.num_hidden_layers,
            "multiply_adds": of_cut.multiply_adds / base.multiply_adds,
        }

    levels = by_size(tuple({*config.quantize.levels, *config.quantize.embedding_levels}))
    facts: dict[str, Any] = {
        "num_groups": len(layout.groups),
        "parameters_base": base.num_parameters,
        "cuts": cuts,
        "left_out": dict(shapes.left_out),
        "blocks_base": shapes.model_config.num_hidden_layers,
        "is_pruned_earlier": is_pruned(shapes.model_config),
        "is_estimate": shapes.is_estimate,
        "formats": {name: _offered(config, layout, name) for name in levels},
    }
    for name in config.quantize.levels:
        facts[f"bytes_all_{name}"] = layout.plan_bytes(layout.uniform(name))
    facts["bytes_budget"] = shapes.budget_bytes
    facts["bytes_plan"] = None
    plan = shapes.plan
    if plan is not None:
        facts["bytes_plan"] = shapes.layout_of(plan.cut).plan_bytes(plan)

    facts["concurrent_trials"] = min(slots, config.num_trials)
    facts["rungs"] = list(config.search.rungs)
    facts["rows"] = {name: len(rows) for name, rows in inspection.rows.examples.items()}
    facts["rows_cut"] = {
        name: num_cut(inspection.rows.examples[name], config.data.max_length) for name in SPLITS
    }
    facts["questions"] = inspection.rows.num_questions
    return facts


def _offered(config: RunConfig, layout: Layout, name: str) -> dict[str, Any]:
    """Return the groups that may have a format, and those that cannot take it, with the reason."""
    having = []
    lacking = {}
    for group in layout.groups:
        levels = config.quantize.levels
        if group.name in OUTSIDE_BLOCKS:
            levels = config.quantize.embedding_levels
        if name in group.formats:
            having.append(group.name)
        elif name in levels:
            reasons = refusals(name, group.linears, True) or refusals(name, group.linears, False)
            lacking[group.name] = reasons[0]
    return {"groups": having, "lacking": lacking}


def _format_text(name: str, offered: dict[str, Any]) -> str:
    groups = offered["groups"]
    having = ", ".join(groups) if len(groups) <= 2 else counted(len(groups), "group")
    text = f"{name} for {having}"
    for group, reason in offered["lacking"].items():
        return f"{text}, not for {counted(len(offered['lacking']), 'group')} ({group}: {reason})"
    return text


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


def _given_plan(config: RunConfig, facts: dict[str, Any]) -> list[str]:
    """Format the bytes of a plan that the configuration gives."""
    if config.search.plan is None or config.search.plan_method:
        return []
    parts = []
    size = facts["bytes_plan"]
    if size is not None:
        parts.append(f"{size / 1e6:.1f} MB, {budget_text(size, facts['bytes_budget'])}")
    if facts["is_estimate"]:
        parts.append("its bytes are compared with the budget once the model is pruned")
    return [f"your plan:   {'; '.join(parts)}"]


def _row_lines(config: RunConfig, facts: dict[str, Any]) -> list[str]:
    """Format the rows and questions of every step."""
    lines = [_split_line(config, facts), _calibration_line(config, facts)]
    questions = facts["questions"]
    scored = []
    if questions["search"]:
        scored.append(f"{_questions(questions['search'])} score the trials")
    if questions["fresh"]:
        scored.append(f"{_questions(questions['fresh'])}, fresh, choose the winner")
    if scored:
        lines.append(f"search:      {'; '.join(scored)}")

    tested = [_questions(questions["test"])]
    if "text" in facts["rows"]:
        tested.append(f"{counted(facts['rows']['text'], 'row')} of text (`evaluate.text`)")
    lines.append(f"test:        {', '.join(tested)}")
    return lines


def _split_line(config: RunConfig, facts: dict[str, Any]) -> str:
    rows = facts["rows"]
    chosen = (rows["confirmation"] + 1) // 2
    judged = rows["confirmation"] - chosen
    line = (
        f"rows:        {rows['train']} train, {rows['validation']} validation, "
        f"{rows['confirmation']} confirmation "
        f"({chosen} fresh ones choose the winner, {judged} judge it)"
    )
    cut = [f"{number} {name}" for name, number in facts["rows_cut"].items() if number]
    if cut:
        limit = f"`data.max_length` {config.data.max_length}"
        line += f"; about {', '.join(cut)} lose their ends ({limit})"
    return line


def _calibration_line(config: RunConfig, facts: dict[str, Any]) -> str:
    calibration = config.calibration
    key = "`calibration.data`" if calibration.data else "`data.train`"
    origin = f"from {facts['rows']['calibration']} rows of {key}"
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


def _cut_lines(facts: dict[str, Any], limit: float | None) -> Iterator[str]:
    """Format the parameters of each cut, with its blocks if some are dropped.

    The share of multiply-adds is added if they have a limit.
    """
    for name, cut in facts["cuts"].items():
        kept = f"{facts['parameters_base'] / 1e6:.1f} M -> {cut['parameters'] / 1e6:.1f} M"
        if cut["blocks"] < facts["blocks_base"]:
            kept += f", {facts['blocks_base']} -> {cut['blocks']} blocks"
        if limit is not None:
            kept += f", {cut['multiply_adds']:.1%} of the multiply-adds"
            if cut["multiply_adds"] > limit:
                kept += ", too many to win"
        title = PRUNED_EARLIER if facts["is_pruned_earlier"] else cut_title(name)
        yield f"parameters:  {kept} ({title})"


def _lines(config: RunConfig, facts: dict[str, Any], has_gpu: bool) -> list[str]:
    """Format the estimates and sizes of a run as the lines that `check` prints."""
    formats = [_format_text(name, offered) for name, offered in facts["formats"].items()]
    lines = [
        f"groups:      {facts['num_groups']} ({config.quantize.group})",
        f"formats:     {'; '.join(formats)}",
    ]
    lines += _cut_lines(facts, config.quantize.budget.flops_fraction)
    lines += _row_lines(config, facts)
    at_once = f"{facts['concurrent_trials']} at once, scored at steps {facts['rungs']}"
    lines.append(f"trials:      {config.num_trials}, {at_once}")
    lines += estimate.memory_text(facts)
    needed = amount(facts["disk_needed"])
    lines.append(f"disk:        about {needed} at most; {amount(facts['disk_free'])} free here")
    lines += estimate.time_text(facts, has_gpu)

    sizes = [
        f"all {name} {facts[f'bytes_all_{name}'] / 1e6:.1f} MB" for name in config.quantize.levels
    ]
    budget = f"budget {facts['bytes_budget'] / 1e6:.1f} MB"
    if facts["is_estimate"]:
        budget += " (estimate: the exact widths are known once the model is pruned)"
    lines.append(f"plan bytes:  {', '.join(sizes)}, {budget}")
    lines += _given_plan(config, facts)
    return lines
