"""The verb `qpruner check`: validate a configuration and estimate what its run would need."""

from collections.abc import Iterator
from itertools import starmap
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
from qpruner.pipeline.preflight import PRUNED_EARLIER, Inspection, amount, is_pruned
from qpruner.pipeline.preflight_rows import SPLITS, num_cut
from qpruner.pipeline.run import Checked
from qpruner.pipeline.run import check as check_run
from qpruner.plans.plan import EMBEDDINGS, HEAD, UNPRUNED, Layout, budget_text, cut_title
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
    with Terminal(quiet=quiet) as terminal:
        found = check_run(
            config, terminal.emit, address, gpu_is_elsewhere=for_gpus and address is None
        )
    inspection, resources = found.inspection, found.resources
    rates = _measured_rates(config, found) if measure else None
    gpus = resources.get("gpu") or (1.0 if for_gpus else None)
    is_here = (
        address is None
        and not for_gpus
        and config.model.device_map == "single"
        and (gpus or 0) <= 1
    )
    free, disk = (
        free_bytes() if is_here else None,
        dict(zip(("disk_needed", "disk_free"), found.disk, strict=True)),
    )
    estimated = estimate.facts(config, inspection, rates, found.slots, gpus)
    facts = _facts(config, inspection, found.slots) | {"memory_free": free} | disk | estimated
    driver = driver_text(RunDir(config.output, create=False))
    warnings = facts["warnings"] = [*config.warnings, *inspection.warnings]
    if driver:
        warnings.insert(0, f"{driver}: `qpruner run` is refused until it ends")
    if free is not None and estimated["memory_at_once"] > free:
        warnings.append(
            f"{estimated['memory_at_once'] / 1e9:.2f} GB of memory are needed at most, and "
            f"{free / 1e9:.2f} GB are "
            "free here: lower `evaluate.batch_size`, another batch size or `search.max_concurrent`"
        )
    if show_config:
        click.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if not quiet:
        click.echo("\n".join(_lines(config, facts, has_gpu=gpus is not None)))
    for warning in warnings:
        click.echo(f"warning:     {warning}", err=quiet)
    keys = "" if quiet or show_config else "; `--show-config` prints every key in effect"
    click.echo(f"The configuration is valid{keys}.")
    return {"status": "ok", **facts}


def _facts(config: RunConfig, inspection: Inspection, slots: int) -> dict[str, Any]:
    layout, plan, base = inspection.reference, inspection.plan, inspection.base
    levels = by_size(tuple({*config.quantize.levels, *config.quantize.embedding_levels}))
    return {
        "num_groups": len(layout.groups),
        "parameters_base": base.num_parameters,
        "cuts": {
            name: {
                "parameters": inspection.layouts[name].num_parameters,
                "blocks": cut.expected.num_hidden_layers,
                "multiply_adds": inspection.layouts[name].multiply_adds / base.multiply_adds,
            }
            for name, cut in inspection.cuts.items()
        },
        "left_out": dict(inspection.left_out),
        "blocks_base": inspection.model_config.num_hidden_layers,
        "is_pruned_earlier": is_pruned(inspection.model_config),
        "is_estimate": inspection.is_estimate,
        "formats": {name: _offered(config, layout, name) for name in levels},
        **{
            f"bytes_all_{name}": layout.plan_bytes(layout.uniform(name))
            for name in config.quantize.levels
        },
        "bytes_budget": inspection.budget_bytes,
        "bytes_plan": None
        if plan is None
        else {UNPRUNED: base, **inspection.layouts}[plan.cut].plan_bytes(plan),
        "concurrent_trials": min(slots, config.num_trials),
        "rungs": list(config.search.rungs),
        "rows": {name: len(rows) for name, rows in inspection.examples.items()},
        "rows_cut": {
            name: num_cut(inspection.examples[name], config.data.max_length) for name in SPLITS
        },
        "questions": inspection.num_questions,
    }


def _offered(config: RunConfig, layout: Layout, name: str) -> dict[str, Any]:
    """Return the groups that may have a format, and those that cannot take it, with the reason."""
    lacking = {}
    for group in layout.groups:
        asked = (
            config.quantize.embedding_levels
            if group.name in (EMBEDDINGS, HEAD)
            else config.quantize.levels
        )
        if name in asked and name not in group.formats:
            lacking[group.name] = (
                refusals(name, group.linears, True) or refusals(name, group.linears, False)
            )[0]
    return {
        "groups": [group.name for group in layout.groups if name in group.formats],
        "lacking": lacking,
    }


def _format_text(name: str, offered: dict[str, Any]) -> str:
    having, lacking = offered["groups"], list(offered["lacking"].items())
    text = f"{name} for {', '.join(having) if len(having) <= 2 else counted(len(having), 'group')}"
    return (
        f"{text}, not for {counted(len(lacking), 'group')} ({': '.join(lacking[0])})"
        if lacking
        else text
    )


def _measured_rates(config: RunConfig, found: Checked) -> hours.Rates:
    """Time a few steps on this machine.

    Raises:
        UserError: Trials need a GPU, and this machine has none.
    """
    import torch

    cores = max(1, int(found.resources.get("cpu", 1)))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if found.resources.get("gpu") and not gpu:
        raise UserError(
            "`--measure` times this machine, which has no GPU, but trials would use one: run it on "
            "theirs"
        )
    return hours.measured_rates(config, found.inspection, cores, gpu or counted(cores, "CPU core"))


def _given_plan(config: RunConfig, facts: dict[str, Any]) -> list[str]:
    search, size = config.search, facts["bytes_plan"]
    if search.plan is None or search.plan_method:
        return []
    parts = (
        [] if size is None else [f"{size / 1e6:.1f} MB, {budget_text(size, facts['bytes_budget'])}"]
    )
    parts += ["its bytes are compared with the budget once the model is pruned"] * facts[
        "is_estimate"
    ]
    return [f"your plan:   {'; '.join(parts)}"]


def _row_lines(config: RunConfig, facts: dict[str, Any]) -> list[str]:
    rows, calibration, questions = facts["rows"], config.calibration, facts["questions"]
    origin = (
        f"from {rows['calibration']} rows of "
        f"{'`calibration.data`' if calibration.data else '`data.train`'}"
    )
    if calibration.packing:
        origin = f"of {calibration.max_length} tokens packed {origin}"
    measured = (
        counted(calibration.num_sensitivity_samples, "row") if config.measured_methods else "none"
    )
    chosen = (rows["confirmation"] + 1) // 2
    scored = [f"{_questions(questions['search'])} score the trials"] if questions["search"] else []
    scored += (
        [f"{_questions(questions['fresh'])}, fresh, choose the winner"]
        if questions["fresh"]
        else []
    )
    text = [f"{counted(rows['text'], 'row')} of text (`evaluate.text`)"] if "text" in rows else []
    cut = [f"{number} {name}" for name, number in facts["rows_cut"].items() if number]
    ends = (
        f"; about {', '.join(cut)} lose their ends (`data.max_length` {config.data.max_length})"
        if cut
        else ""
    )
    return [
        f"rows:        {rows['train']} train, {rows['validation']} validation, "
        f"{rows['confirmation']} confirmation "
        f"({chosen} fresh ones choose the winner, {rows['confirmation'] - chosen} judge it){ends}",
        f"calibration: {counted(calibration.num_samples, 'sample')} {origin} for importance; "
        f"{measured} of `data.train` for the sensitivities",
        *([f"search:      {'; '.join(scored)}"] if scored else []),
        f"test:        {', '.join([_questions(questions['test']), *text])}",
    ]


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
            kept += ", too many to win" if cut["multiply_adds"] > limit else ""
        yield (
            f"parameters:  {kept} "
            f"({PRUNED_EARLIER if facts['is_pruned_earlier'] else cut_title(name)})"
        )


def _lines(config: RunConfig, facts: dict[str, Any], has_gpu: bool) -> list[str]:
    """Format the estimates and sizes of a run as the lines that `check` prints."""
    about = (
        " (estimate: the exact widths are known once the model is pruned)"
        if facts["is_estimate"]
        else ""
    )
    sizes = [
        f"all {name} {facts[f'bytes_all_{name}'] / 1e6:.1f} MB" for name in config.quantize.levels
    ]
    trials = (
        f"{config.num_trials}, {facts['concurrent_trials']} at once, scored at steps "
        f"{facts['rungs']}"
    )
    return [
        f"groups:      {facts['num_groups']} ({config.quantize.group})",
        f"formats:     {'; '.join(starmap(_format_text, facts['formats'].items()))}",
        *_cut_lines(facts, config.quantize.budget.flops_fraction),
        *_row_lines(config, facts),
        f"trials:      {trials}",
        *estimate.memory_text(facts),
        f"disk:        about {amount(facts['disk_needed'])} at most; {amount(facts['disk_free'])} "
        "free here",
        *estimate.time_text(facts, has_gpu),
        f"plan bytes:  {', '.join(sizes)}, budget {facts['bytes_budget'] / 1e6:.1f} MB{about}",
        *_given_plan(config, facts),
    ]
