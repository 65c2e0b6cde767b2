"""Ray's private names that qpruner uses, all of them (Ray 2.60): what to look at when Ray is upgraded.

Each is imported when it is first asked for, as some of their modules are slow to import.
"""

from __future__ import annotations

import importlib
from typing import Any

NAMES = {
    # The driver's view of the cluster: draining nodes, dead actors.
    "state": "ray._private.state:state",
    # Whether Ray forms clusters on this system, and so on which interface it listens.
    "constants": "ray._private:ray_constants",
    "canonicalize_address": "ray._private.services:canonicalize_bootstrap_address",
    "canonicalize_address_or_die": "ray._private.services:canonicalize_bootstrap_address_or_die",
    # The control store's client, without the minutes that `ray.init` waits for it.
    "GcsClient": "ray._raylet:GcsClient",
    # Ray Train: its torch process group, and hooks into a group's workers.
    "TorchBackend": "ray.train.torch.config:_TorchBackend",
    "ControllerCallback": "ray.train.v2._internal.execution.callback:ControllerCallback",
    "WorkerGroupCallback": "ray.train.v2._internal.execution.callback:WorkerGroupCallback",
    # Ray Tune: where it keeps errors, who starts its workers, what it sends them, ASHA's rungs.
    "session_dir": "ray.train.constants:_get_ray_train_session_dir",
    "RayActorManager": "ray.air.execution._internal:RayActorManager",
    "tune_controller": "ray.tune.execution:tune_controller",
    "ENV_VARS_TO_PROPAGATE": "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE",
    "AshaBracket": "ray.tune.schedulers.async_hyperband:_Bracket",
    # Ray's W&B callback: the process that writes one row, and how it is kept on this node.
    "WandbLoggingActor": "ray.air.integrations.wandb:_WandbLoggingActor",
    "on_current_node": "ray.air.util.node:_force_on_current_node",
}


def __getattr__(name: str) -> Any:
    """Import one of `NAMES`."""
    if name not in NAMES:
        raise AttributeError(name)
    module, _, attribute = NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
