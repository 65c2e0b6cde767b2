"""Refuse before the first stage what the cluster or the installed packages cannot do."""

from __future__ import annotations

from qpruner.cluster.slots import Slots, worker_resources
from qpruner.config.schema import RunConfig, SearchConfig
from qpruner.errors import UserError
from qpruner.search.searchers import check_searcher
from qpruner.wording import counted


def check_search(config: SearchConfig, slots: Slots) -> int:
    """Refuse now, not after pruning, what the cluster or the installed packages cannot do; returns trials at once.

    Raises:
        UserError: For a trial that does not fit, GPU hours without GPUs, or a searcher whose package is missing.
    """
    check_searcher(config.searcher)
    asked = config.resources_per_trial
    resources = slots.resources_per_trial(asked.model_dump() if asked else None)
    if config.max_gpu_hours is not None and not resources.get("gpu"):
        raise UserError(
            f"`search.max_gpu_hours` ends no search whose trials hold no GPU, got {config.max_gpu_hours:g}; use "
            "`search.max_hours`"
        )
    return slots.concurrent(resources, config.max_concurrent)


def check_finetune(config: RunConfig, slots: Slots) -> None:
    """Refuse now a final fine-tune on more workers than the cluster takes at once.

    Raises:
        UserError: With both numbers.
    """
    wanted, asked = config.finetune.num_workers, config.search.resources_per_trial
    resources = worker_resources(slots.resources_per_trial(asked.model_dump() if asked else None), wanted)
    fits = slots.at_most(resources)
    if wanted > 1 and fits < wanted:
        raise UserError(
            f"`finetune.num_workers` asks for {wanted} workers of {resources} at once, got room for {fits} on "
            f"{counted(len(slots.nodes), 'machine')}, the largest with {slots.largest}: ask for fewer, or add machines"
        )
