"""Ray Tune's workers, where a worker's end would be the end of all."""

from __future__ import annotations

from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError

from qpruner.cluster.ray_private import RayActorManager

KILLED_FOR_MEMORY = "Ray killed this worker because its machine ran out of memory"


class ActorManager(RayActorManager):  # type: ignore[misc]
    """Has a worker that Ray killed for memory end as any other that dies: its trial fails, and nothing else.

    Of an error of that type Ray's own makes a RuntimeError that ends the session of every trial (2.60).
    """

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=f"{KILLED_FOR_MEMORY}: {exception}")
        super()._actor_task_failed(tracked_actor_task, exception)
