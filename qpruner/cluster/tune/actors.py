"""Ray Tune's management of workers, corrected."""

from __future__ import annotations

from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError

from qpruner.cluster.ray_private import RayActorManager

KILLED_FOR_MEMORY = "Ray killed this worker because its machine ran out of memory"


class ActorManager(RayActorManager):  # type: ignore[misc]
    """Makes a worker that Ray killed for memory fail its trial alone; Ray (2.60) would end every trial's session."""

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{KILLED_FOR_MEMORY}: {exception}")
        super()._actor_task_failed(tracked_actor_task, exception)
