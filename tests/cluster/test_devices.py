"""Which devices are kept from trials after failures, as the driver of a search decides."""

import pytest
from made_searches import trial

from qpruner.cluster.tune.callbacks import Holding
from qpruner.cluster.tune.devices import MAX_TRIES, TO_COME, Devices
from qpruner.errors import StageError
from qpruner.runs.events import Event, Message
from qpruner.runs.records import TrialRecord


class Bench:
    """Some devices, and the trials that fail and score on them."""

    def __init__(self, number: int) -> None:
        self.events: list[Event] = []
        self.nodes = {"node": number}
        self.devices = Devices(lambda: self.nodes, self.events.append)
        self.held: list[str] = []
        self._records: dict[int, TrialRecord] = {}

    def record(self, index: int, device: str) -> TrialRecord:
        before = self._records.get(index, trial(index, "444444", []))
        self._records[index] = before.model_copy(update={"device": device})
        return self._records[index]

    def fails(self, index: int, device: str) -> bool:
        """Let a trial fail on a device; return whether it is to be tried on another one."""
        record = self.record(index, device)
        moves = self.devices.should_move(record, lambda: self._hold(device))
        self._records[index] = record.model_copy(update={"failed_on": (*record.failed_on, device)})
        return moves

    def scores(self, index: int, device: str) -> None:
        self.devices.has_scored(self.record(index, device))

    def _hold(self, device: str) -> Holding:
        self.held.append(device)
        return Holding("node", lambda: self.held.remove(device))


def test_a_device_is_held_until_a_second_one_tells_whose_fault_it_was() -> None:
    bench = Bench(2)
    assert bench.fails(0, "a")
    assert bench.held == ["a"]
    assert bench.devices.num_held == 1
    bench.scores(0, "b")
    # One failure may be chance.
    assert bench.held == []
    assert bench.fails(1, "a")
    bench.scores(1, "b")
    assert bench.held == ["a"]
    [named] = bench.events
    assert isinstance(named, Message)
    assert "2 trials failed on a and ran on other devices" in named.text


def test_a_plan_that_fails_on_two_devices_is_at_fault() -> None:
    bench = Bench(2)
    assert bench.fails(0, "a")
    assert not bench.fails(0, "b")
    assert bench.held == []
    assert not bench.events


def test_with_one_device_no_second_one_can_tell() -> None:
    assert not Bench(1).fails(0, "a")


def test_two_plans_too_large_for_both_devices_end() -> None:
    """Both fail at once: a device that was held is let go, so that the other trial has one."""
    bench = Bench(2)
    assert bench.fails(0, "a")
    assert bench.fails(1, "b")
    assert bench.held == ["b"]
    assert not bench.fails(1, "a")
    assert bench.held == []
    # It got the device on which it had failed.
    assert bench.fails(0, "a")
    assert bench.held == ["a"]
    assert not bench.fails(0, "b")
    assert bench.held == []


def test_a_trial_that_gets_the_same_device_again_and_again_ends() -> None:
    bench = Bench(3)
    assert [bench.fails(0, "a") for _ in range(MAX_TRIES)] == [*[True] * (MAX_TRIES - 1), False]
    assert bench.held == []


def test_of_many_devices_one_goes_on() -> None:
    bench = Bench(8)
    assert all(bench.fails(index, f"{index}") for index in range(8))
    assert len(bench.held) == 7


@pytest.mark.parametrize("device", ["a", "b"])
def test_a_score_is_no_evidence_against_the_device_that_gave_it(device: str) -> None:
    bench = Bench(2)
    assert bench.fails(0, "a")
    bench.scores(0, device)
    assert bench.held == []
    assert bench.fails(1, "a")
    bench.scores(1, device)
    assert bench.held == (["a"] if device == "b" else [])


def test_a_device_that_was_left_out_is_not_counted_as_another() -> None:
    bench = Bench(2)
    for index in range(2):
        assert bench.fails(index, "a")
        bench.scores(index, "b")
    assert bench.held == ["a"]
    assert not bench.fails(2, "b")


def test_two_bad_devices_of_four_are_left_out_and_no_plan_is_blamed() -> None:
    bench = Bench(4)
    assert bench.fails(0, "c")
    bench.scores(0, "a")
    assert bench.fails(1, "d")
    bench.scores(1, "b")
    # Each of the two has failed another trial.
    assert bench.fails(2, "c")
    assert bench.fails(2, "d")
    bench.scores(2, "a")
    assert bench.held == ["c", "d"]
    assert len(bench.events) == 2


def test_a_plan_too_large_for_all_of_many_devices_is_tried_on_three() -> None:
    bench = Bench(8)
    assert [bench.fails(0, device) for device in "abc"] == [True, True, False]
    assert bench.held == []


def test_if_the_good_device_leaves_the_suspect_gets_trials_again() -> None:
    bench = Bench(2)
    assert bench.fails(0, "a")
    bench.devices.look()
    assert bench.held == ["a"]
    bench.nodes["node"] = 1
    bench.devices.look()
    assert bench.held == []
    assert bench.devices.num_held == 0


def test_if_only_a_device_that_was_left_out_is_left_the_search_ends_and_names_it() -> None:
    bench = Bench(2)
    for index in range(2):
        assert bench.fails(index, "a")
        bench.scores(index, "b")
    bench.devices.look()
    bench.nodes["node"] = 1
    with pytest.raises(
        StageError, match="no other device is left than a, where trials failed that ran elsewhere"
    ):
        bench.devices.look()


def test_a_device_whose_node_has_left_is_held_no_more() -> None:
    """Its placement group would move to another device."""
    bench = Bench(2)
    for index in range(2):
        assert bench.fails(index, "a")
        bench.scores(index, "b")
    bench.nodes = {"another": 2}
    bench.devices.look()
    assert bench.held == []
    assert bench.devices.num_held == 0


def test_a_trial_that_ends_without_a_score_lets_go_of_its_devices() -> None:
    """It may diverge on the other device, or hang there."""
    bench = Bench(2)
    assert bench.fails(0, "a")
    assert bench.held == ["a"]
    bench.devices.release(0)
    assert bench.held == []


def test_failures_of_an_earlier_command_are_not_counted() -> None:
    bench = Bench(4)
    bench.record(0, "c")
    earlier = bench.record(0, "c").model_copy(update={"failed_on": ("c", "d")})
    # Its device leaves, and is not held.
    assert bench.devices.should_move(earlier, lambda: None)
    assert bench.held == []


def test_a_device_that_may_be_started_is_another() -> None:
    """As with a spot machine, which an autoscaler replaces."""
    bench = Bench(1)
    bench.nodes[TO_COME] = 1
    assert bench.fails(0, "a")
    bench.devices.look()
    assert bench.held == ["a"]
    bench.nodes[TO_COME] = 0
    bench.devices.look()
    assert bench.held == []
