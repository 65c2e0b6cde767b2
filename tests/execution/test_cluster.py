"""How many trials a cluster takes at once."""

from __future__ import annotations

import pytest

from qpruner.errors import UserError
from qpruner.execution.slots import Node, Slots, worker_resources

TWO_NODES = Slots((Node(8, 2), Node(8, 1)))


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        pytest.param({"cpu": 1, "gpu": 1}, 3, id="one-gpu"),
        pytest.param({"cpu": 1, "gpu": 0.5}, 6, id="halves"),
        pytest.param({"cpu": 1, "gpu": 0.4}, 6, id="two-fit-on-each-gpu"),
        pytest.param({"cpu": 1, "gpu": 2}, 1, id="two-gpus-of-one-machine"),
        pytest.param({"cpu": 5}, 2, id="cores-of-one-machine"),
        pytest.param({"cpu": 4, "gpu": 0.25}, 4, id="too-few-cores-for-the-gpus"),
    ],
)
def test_a_trials_resources_lie_on_one_machine(resources: dict[str, float], expected: int) -> None:
    assert TWO_NODES.concurrent(resources, None) == expected


def test_what_only_two_machines_together_have_is_refused() -> None:
    """Ray would wait for ever."""
    with pytest.raises(
        UserError, match=r"'gpu': 3.* on one machine.* the largest of 2 has 8 CPUs and 2 GPUs: ask for less"
    ):
        TWO_NODES.concurrent({"cpu": 1, "gpu": 3}, None)


def test_a_limit_is_kept_and_a_gpu_is_taken_where_there_is_one() -> None:
    assert TWO_NODES.resources_per_trial(None) == {"cpu": 1.0, "gpu": 1.0}
    assert TWO_NODES.resources_per_trial({"cpu": 2.0, "gpu": 0}) == {"cpu": 2.0}
    assert Slots((Node(4, 0),)).resources_per_trial(None) == {"cpu": 1.0}
    assert TWO_NODES.concurrent({"cpu": 1, "gpu": 1}, 2) == 2


def test_workers_on_one_model_have_whole_gpus() -> None:
    assert worker_resources({"cpu": 2, "gpu": 0.5}, 1) == {"cpu": 2, "gpu": 0.5}
    assert worker_resources({"cpu": 2, "gpu": 0.5}, 2) == {"cpu": 2, "gpu": 1}
    assert worker_resources({"cpu": 2}, 2) == {"cpu": 2}


def test_cores_are_shared_out_inside_machines() -> None:
    """Two machines of 8 cores have no 16 cores for a lone task, and none has 6 for each of three."""
    nodes = Slots((Node(8, 0), Node(8, 0), Node(0, 0)))
    assert [nodes.cores_each(number) for number in (1, 2, 3, 16, 17)] == [8, 8, 4, 1, 1]


def test_what_the_workshop_holds_is_not_there_for_tasks() -> None:
    assert TWO_NODES.less({"cpu": 1, "gpu": 2}).fits({"cpu": 1, "gpu": 1}) == 1
    assert Slots((Node(0, 0), Node(1, 1))).less({"cpu": 1, "gpu": 1}).fits({"cpu": 1, "gpu": 1}) == 0
