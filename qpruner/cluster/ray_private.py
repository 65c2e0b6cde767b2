"""All private names of Ray (2.60) that qpruner uses.

Each one is imported at its first use, because some of their modules are slow to import.
"""

import importlib
from typing import Any

NAMES = {
    # The driver's view of the cluster: draining nodes, dead actors.
    "state": "ray._private.state:state",
    # Whether Ray forms clusters on this system; this decides on which interface Ray listens.
    "constants": "ray._private:ray_constants",
    "canonicalize_address_or_die": "ray._private.services:canonicalize_bootstrap_address_or_die",
    # Ray Train: the torch process group, and hooks into the workers of a group.
    "TorchBackend": "ray.train.torch.config:_TorchBackend",
    "ControllerCallback": "ray.train.v2._internal.execution.callback:ControllerCallback",
    "WorkerGroupCallback": "ray.train.v2._internal.execution.callback:WorkerGroupCallback",
    # Ray Tune: the folder of errors, the class that starts workers, the variables sent to workers,
    # the rungs of ASHA.
    "session_dir": "ray.train.constants:_get_ray_train_session_dir",
    "RayActorManager": "ray.air.execution._internal:RayActorManager",
    "tune_controller": "ray.tune.execution:tune_controller",
    "ENV_VARS_TO_PROPAGATE": "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE",
    "AshaBracket": "ray.tune.schedulers.async_hyperband:_Bracket",
    # The W&B callback of Ray: the process that writes one row, and the option that keeps this
    # process on this node.
    "WandbLoggingActor": "ray.air.integrations.wandb:_WandbLoggingActor",
    "on_current_node": "ray.air.util.node:_force_on_current_node",
}


def __getattr__(name: str) -> Any:
    """Import a name from `NAMES`."""
    if name not in NAMES:
        raise AttributeError(name)
    module, _, attribute = NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
