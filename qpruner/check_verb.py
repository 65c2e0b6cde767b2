"""What `qpruner check` prints: the configuration in effect, and what the run would be and take."""

from __future__ import annotations

from typing import Any

import click
import yaml

from qpruner import estimate, pipeline
from qpruner.config import RunConfig
from qpruner.errors import UserError
from qpruner.estimate import work
from qpruner.plan import told_of_budget
from qpruner.preflight import Inspection
from qpruner.terminal import Terminal
from qpruner.wording import counted


def check(config: RunConfig, address: str | None, quiet: bool, measure: bool, gpu: str | None) -> dict[str, Any]:
    """Everything that can be known of a run before it is begun.

    Args:
        config: The configuration.
        address: A Ray cluster to look at; None looks at this machine.
        quiet: Print nothing.
        measure: Time a few steps here.
        gpu: Name of a GPU to assume.

    Raises:
        UserError: For the first thing that cannot work.
    """
    if measure and gpu:
        raise UserError("`--measure` times what is here, `--gpu` assumes what is not: leave one of them out")
    if gpu is not None and gpu not in work.TERAFLOPS:
        raise UserError(f"`--gpu` knows {', '.join(work.TERAFLOPS)}; got {gpu}")
    with Terminal(quiet=quiet) as terminal:
        found = pipeline.check(config, terminal.emit, address)
    inspection, concurrent, resources = found.inspection, found.concurrent, found.resources
    rates = _rates(config, inspection, resources, measure, gpu)
    gpus = resources.get("gpu") or (1.0 if gpu else None)
    layout, levels = inspection.pruned, config.quantize.bits
    facts = {
        "num_groups": len(layout.groups),
        "parameters_base": inspection.base.num_parameters,
        "parameters_pruned": layout.num_parameters,
        "is_estimate": inspection.is_estimate,
        **{f"bytes_all_{bits}": layout.plan_bytes(layout.uniform(bits)) for bits in levels},
        "bytes_budget": inspection.budget_bytes,
        "bytes_plan": None if inspection.plan is None else layout.plan_bytes(inspection.plan),
        "concurrent_trials": concurrent,
        "rungs": list(config.search.rungs),
        "rows": {name: len(rows) for name, rows in inspection.examples.items()},
        "warnings": list(inspection.warnings),
        **estimate.facts(config, inspection, rates, concurrent, found.done, gpus),
    }
    if not quiet:
        click.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        click.echo(_text(config, facts, has_gpu=gpus is not None))
    return {"status": "ok", **facts}


def _rates(
    config: RunConfig, inspection: Inspection, resources: dict[str, float], measure: bool, gpu: str | None
) -> work.Rates:
    """How fast a slot is: measured here, or assumed of a GPU or of cores.

    Raises:
        UserError: If trials hold GPUs and there is none here to be timed.
    """
    import torch

    cores = int(resources.get("cpu", 1))
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if not measure:
        return work.assumed_rates(gpu or here or ("a GPU elsewhere" if resources.get("gpu") else None), cores)
    if resources.get("gpu") and not here:
        raise UserError(
            "`--measure` times this machine, which has no GPU, and trials hold one: check on a machine like the "
            f"cluster's, or name its GPU with `--gpu` ({', '.join(work.TERAFLOPS)})"
        )
    from qpruner import pace

    share = work.share_at_highest(config, inspection)
    seconds = pace.measure(config, inspection.pruned_config, share, cores)
    where = here or counted(cores, "CPU core")
    return work.measured_rates(config, inspection, seconds.training, seconds.scoring, where)


def _given_plan(config: RunConfig, facts: dict[str, Any]) -> list[str]:
    """What the plan of `--plan` takes; none where a search chooses."""
    if config.search.plan is None:
        return []
    size, budget = facts["bytes_plan"], facts["bytes_budget"]
    told = "" if size is None else f"{size / 1e6:.1f} MB, {told_of_budget(size, budget)}"
    later = "its bytes are compared with the budget once the model is pruned" if facts["is_estimate"] else ""
    return [f"your plan:  {'; '.join(filter(None, (told, later)))}"]


def _text(config: RunConfig, facts: dict[str, Any], has_gpu: bool) -> str:
    about = " (estimate: what is cut is open until the model is pruned)" if facts["is_estimate"] else ""
    sizes = [f"all {bits}-bit {facts[f'bytes_all_{bits}'] / 1e6:.1f} MB" for bits in config.quantize.bits]
    rows = ", ".join(f"{count} {name}" for name, count in facts["rows"].items())
    trials = f"{config.search.num_trials}, {facts['concurrent_trials']} at once, scored at steps {facts['rungs']}"
    return "\n".join(
        [
            f"groups:     {facts['num_groups']} ({config.quantize.group})",
            f"parameters: {facts['parameters_base'] / 1e6:.1f} M -> {facts['parameters_pruned'] / 1e6:.1f} M",
            f"plan bytes: {', '.join(sizes)}, budget {facts['bytes_budget'] / 1e6:.1f} MB{about}",
            *_given_plan(config, facts),
            f"trials:     {trials}",
            f"rows:       {rows}",
            *estimate.text(facts, has_gpu),
            *[f"warning:    {warning}" for warning in facts["warnings"]],
            "The configuration is valid.",
        ]
    )
