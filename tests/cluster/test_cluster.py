"""How many trials a cluster takes at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from raylets import raylets

from qpruner.cluster.connect import connect, disconnect, read_growth
from qpruner.cluster.slots import LOOK_SECONDS, Growth, Node, Room, Slots, worker_resources
from qpruner.errors import UserError
from qpruner.runs.events import Event, Message, SlotsFound

TWO_NODES = Slots((Node(8, 2), Node(8, 1)))
ROOT = Path(__file__).resolve().parents[2]
HEAD = Node(2, 0)
CLOUD = Growth(HEAD, (Node(8, 1), Node(8, 1), Node(64, 8)), max_workers=2)
"""A head without GPUs, and an autoscaler with two types: two machines at once, of the larger type one."""


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


# ---- with an autoscaler


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        pytest.param({"cpu": 1, "gpu": 1}, 8 + 1, id="the-largest-two-of-three"),
        pytest.param({"cpu": 1, "gpu": 4}, 2, id="only-on-the-large-one"),
        pytest.param({"cpu": 2}, 1 + 32 + 4, id="the-head-too"),
    ],
)
def test_trials_may_wait_for_what_can_be_started(resources: dict[str, float], expected: int) -> None:
    for nodes in ((HEAD,), (HEAD, Node(8, 1))):
        slots = Slots(nodes, CLOUD)
        assert slots.concurrent(resources, None) == expected, "what is started already is not counted twice"
        assert slots.concurrent(resources, 2) == min(2, expected)
    assert Slots((HEAD,), CLOUD).fits({"gpu": 1}) == 0


def test_a_trial_that_fits_on_no_machine_type_is_refused() -> None:
    assert Slots((HEAD,), CLOUD).resources_per_trial(None) == {"cpu": 1.0, "gpu": 1.0}, "a GPU may come"
    expected = "the largest of 1 and of those that the autoscaler may start has 64 CPUs and 8 GPUs: ask for less"
    with pytest.raises(UserError, match=expected):
        Slots((HEAD,), CLOUD).concurrent({"cpu": 1, "gpu": 9}, None)


def test_the_cluster_file_says_what_may_be_started() -> None:
    assert read_growth(ROOT / "cluster.yaml", HEAD) == Growth(HEAD, (Node(8, 1),) * 5, max_workers=4)
    onprem = ROOT / "launch" / "cluster_onprem.yaml"
    assert read_growth(onprem, HEAD) is None, "its machines do not say their size"
    with pytest.raises(UserError, match=r"nowhere.yaml, the cluster file of Ray's autoscaler, cannot be read"):
        read_growth(ROOT / "nowhere.yaml", HEAD)


# ---- without one, on real nodes


def test_workers_are_counted_as_they_come_and_go() -> None:
    trial = {"cpu": 1.0, "gpu": 1.0}
    with raylets(0) as cluster:
        joined = connect(cluster.address)
        try:
            with pytest.raises(
                UserError, match="the largest of 1 has 0 CPUs and 0 GPUs: ask for less, or add a larger"
            ):
                joined.slots().concurrent(trial, 2)
            told: list[Event] = []
            room = Room(joined.slots, trial, 2, told.append)
            assert room() == 0
            node = cluster.add(num_gpus=1)
            assert joined.slots().concurrent(trial, 2) == 1
            cluster.add(num_cpus=3, num_gpus=3)
            assert joined.slots().concurrent(trial, 2) == 2, "no more than `search.max_concurrent`"
            time.sleep(LOOK_SECONDS)
            assert room() == 2
            cluster.cluster.remove_node(node)
            cluster.nodes.remove(node)
            assert joined.slots().fits(trial) == 3
            waiting, *others = [event for event in told if isinstance(event, Message)]
            assert "no machine is there that could run a trial" in waiting.text and not others
            assert told == [SlotsFound(0), waiting, SlotsFound(2)]
        finally:
            disconnect()
