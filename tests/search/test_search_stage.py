"""The search stage: when it ends, which trials it reuses, which it scores again on fresh rows, and
which plan wins.

Most tests call a part of it on records as trials write them. The last one runs the whole stage with
real Ray.
"""

import json
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Raw, assert_has, away, disk_of, flipped, texts, with_keys
from made_records import made_finalist
from made_searches import ANOTHER, MINE, SEED_PLAN, job_of, plan_of, trial
from ray.exceptions import RaySystemError
from ray.tune.experiment import Trial
from whole_runs import comparable

from qpruner.cluster.tune import SearchJob
from qpruner.cluster.tune.callbacks import KILLED_FOR_MEMORY, Halt, HangWatch
from qpruner.cluster.tune.devices import Devices
from qpruner.cluster.tune.driver import PlanSearcher
from qpruner.cluster.tune.job import METRIC, TIME, resume_search
from qpruner.config.load import validate_config
from qpruner.errors import StageError
from qpruner.pipeline.finalists import UNIT, further_seeds
from qpruner.pipeline.run import run
from qpruner.pipeline.search import choose_finalists, lost_controls
from qpruner.plans.plan import PrecisionPlan
from qpruner.runs.events import Progress, TrialChanged
from qpruner.runs.records import RungResult, SearchRecord, TrialPulse, TrialRecord
from qpruner.runs.storage import folder_digests
from qpruner.search.roles import best_of
from qpruner.search.searchers import Proposer, RandomProposer
from qpruner.search.trial_records import (
    begin_session,
    read_clock,
    read_trial,
    read_trials,
    restart_if_damaged,
    set_aside_damaged,
    set_aside_others,
    write_pulse,
    write_seconds,
    write_trial,
)


class Searching:
    """A search with these recorded trials, and the searcher that Tune asks for plans; two trials
    may run at once."""

    def __init__(
        self, job: SearchJob, *records: TrialRecord, proposer: Proposer | None = None
    ) -> None:
        for record in records:
            write_trial(job.trials, record)
        self.job = job
        self.room = 2
        self.events = []
        self.ledger, _ = resume_search(job, proposer or RandomProposer(job.space, seed=0))
        self.halt = Halt(self.events.append)
        self.num_devices = 1
        devices = Devices(lambda: {"node": self.num_devices}, self.events.append)
        self.searcher = PlanSearcher(
            job,
            self.ledger,
            lambda held: self.room - held,
            devices,
            self.events.append,
            self.halt,
        )

    def suggest(self, name: str) -> int | str | None:
        """Ask for a plan as Tune does, again while one is being proposed.

        Returns the number of its trial, or the answer that there is none.
        """
        given = self.searcher.suggest(name)
        while given is None and self.ledger.is_proposing:
            time.sleep(0.001)
            given = self.searcher.suggest(name)
        return int(given["trial"]) if isinstance(given, dict) else given

    def die(self, name: str, text: str) -> None:
        """Let the worker of a trial die; Ray tells the text of an error."""
        self.searcher.on_error_text(name, text)
        self.searcher.on_trial_complete(name, error=True)

    def fail(self, name: str, **fields: Any) -> None:
        """Record a failure of the last suggested trial as its worker does."""
        record = read_trials(self.job.trials)[-1]
        write_trial(self.job.trials, record.model_copy(update={"status": "failed", **fields}))
        self.searcher.on_trial_complete(name, error=True)

    def rest(self) -> list[tuple[int, str, str]]:
        """All trials that the search would still run."""
        found = []
        while (suggestion := self.ledger.next()) is not None:
            found.append((suggestion.index, suggestion.origin, str(suggestion.plan)))
        return found

    def messages(self) -> list[str]:
        return texts(self.events)


# ---- when it ends


def test_hours_of_earlier_sessions_count(tmp_path: Path) -> None:
    job = job_of(tmp_path, max_hours=1.0)
    write_seconds(job.trials, job.search, 3599.0)
    write_seconds(job.trials, ANOTHER, 9999.0)
    assert Searching(job, trial(0, "444444", [3.0], status="running")).suggest("a") == 0

    write_seconds(job.trials, job.search, 3601.0)
    again = Searching(job)
    # What was cut off goes on, and nothing else.
    assert [again.suggest("a"), again.suggest("b")] == [0, None]
    assert again.ledger.ended == "1 hours were spent (`search.max_hours` is 1)"


def test_each_search_pays_for_its_part_of_a_trial(tmp_path: Path) -> None:
    """The GPU hours of a trial that another search began count for the search that spent them."""
    job = job_of(tmp_path, max_gpu_hours=1.0)
    cut_off = trial(0, "844444", [3.0], ANOTHER, status="running", gpu_seconds=3500.0)
    # The hours of the search before are not its own.
    assert Searching(job, cut_off).suggest("a") == 0
    revived = read_trial(job.trials, 0)
    assert revived.search == MINE
    assert revived.gpu_seconds_of(ANOTHER) == 3500.0
    assert revived.gpu_seconds_of(MINE) == 0.0

    again = Searching(job, revived.model_copy(update={"gpu_seconds": 3500.0 + 3601.0}))
    # A trial that is taken up again is counted once.
    assert read_trial(job.trials, 0).gpu_seconds_of(MINE) == 3601.0
    assert [again.suggest("a"), again.suggest("b")] == [0, None]
    assert again.ledger.ended == "1 GPU hours were spent (`search.max_gpu_hours` is 1)"

    Searching(replace(job, search=ANOTHER))  # the first search takes its trial back
    taken = read_trial(job.trials, 0)
    assert taken.gpu_seconds_of(ANOTHER) == 3500.0
    assert taken.gpu_seconds_of(MINE) == 3601.0


# ---- trials of another budget


def test_trials_of_another_budget_inform_the_search(tmp_path: Path) -> None:
    """None is run again: one is a control here, one is over this budget, one was stopped early."""
    job = job_of(tmp_path, max_trials=4)
    search = Searching(
        job,
        trial(0, "444444", [3.4, 3.3, 3.2], ANOTHER, origin="unpruned-uniform"),
        trial(1, "888844", [3.0, 2.9, 2.8], ANOTHER, origin="unpruned-knapsack"),
        trial(2, "484444", [3.5], ANOTHER),
    )
    observations = search.ledger.history().observations
    assert [item.index for item in observations] == [0, 0, 0, 1, 1, 1, 2]
    assert [item.step for item in observations] == [1, 2, 4, 1, 2, 4, 1]
    assert [item.score for item in observations] == [3.4, 3.3, 3.2, 3.0, 2.9, 2.8, 3.5]
    indices, origins, plans = zip(*search.rest(), strict=True)
    assert indices == (3, 4, 5, 6)
    assert origins == ("unpruned-knapsack", "random", "random", "random")
    assert {"444444", "888844", "484444"}.isdisjoint(plans)
    assert all(job.space.is_feasible(plan_of(plan)) for plan in plans)


def test_a_control_stopped_by_another_search_is_resumed(tmp_path: Path) -> None:
    job = job_of(tmp_path, max_trials=3)
    search = Searching(
        job, trial(0, "444444", [3.4, 3.3, 3.2]), trial(1, SEED_PLAN, [3.5], ANOTHER)
    )
    assert search.rest()[0] == (1, "unpruned-knapsack", SEED_PLAN)
    record = read_trials(job.trials)[1]
    assert_has(record, search=MINE, origin="unpruned-knapsack", status="running")
    # Killed before it went on, and once it is done, the search is the same: that trial and one
    # more.
    assert len(Searching(job).rest()) == 2
    [last] = Searching(job, record.model_copy(update={"status": "finished"})).rest()
    assert last[0] == 2


@pytest.mark.parametrize(
    ("record", "is_resumed"),
    [
        (trial(0, "848444", [3.5], ANOTHER, status="running"), True),
        (trial(0, "888848", [3.5], ANOTHER, status="running"), False),  # does not fit
        (trial(0, "484444", [3.5], status="failed", failure="storage"), True),
        (trial(0, "484444", [3.5], status="failed", failure="diverged"), False),
        # it may have waited for its files
        (trial(0, "484444", [], status="failed", failure="hung"), True),
        (trial(0, "484444", [3.5], status="failed", failure="hung"), False),
    ],
)
def test_a_trial_that_failed_without_fault_is_resumed(
    record: TrialRecord, is_resumed: bool, tmp_path: Path
) -> None:
    job = job_of(tmp_path)
    resumed = record.model_copy(update={"search": MINE, "status": "running"})
    assert Searching(job, record).rest()[0][0] == (0 if is_resumed else 1)
    [found] = read_trials(job.trials)
    expected = resumed if is_resumed else record
    assert_has(found, search=expected.search, status=expected.status)


# ---- trials that do not end by themselves


def test_a_trial_fails_after_three_deaths_in_a_row(tmp_path: Path) -> None:
    search = Searching(job_of(tmp_path, max_trials=2))
    for name, index in zip("abcd", (0, 0, 0, 1), strict=True):
        assert search.suggest(name) == index
        search.searcher.on_trial_complete(name, error=True)
    first, second = read_trials(search.job.trials)
    assert_has(first, status="failed", failure="lost", kills=3)
    assert len(first.times) == 2
    assert_has(second, status="running", failure=None, kills=1)
    messages = search.messages()
    assert messages[0] == "trial 0 lost its worker and is resumed from its start"
    assert len(messages) == 3


@pytest.mark.parametrize("failure", ["diverged", "infeasible"])
def test_the_searcher_learns_of_a_plan_that_cannot_be_trained(failure: str, tmp_path: Path) -> None:
    """It counts as a bad plan, in the session in which it failed and in the next one."""
    search = Searching(
        job_of(tmp_path), trial(0, "444444", [3.5, 3.4, 3.3], origin="unpruned-uniform")
    )
    search.suggest("a")
    search.fail("a", failure=failure)
    for each in (search, Searching(search.job)):
        history = each.ledger.history()
        scores = {item.index: item.score for item in history.observations if item.step == 4}
        assert scores[1] > scores[0] == 3.3
        assert history.failed == ()


def test_a_trial_killed_for_memory_halves_its_micro_batch(tmp_path: Path) -> None:
    """Three kills fail a trial only at a micro-batch of one row; the record has the last
    micro-batch that ran."""
    job = job_of(tmp_path)
    training = job.config.training.model_copy(update={"batch_size": 16, "micro_batch_size": 16})
    job = replace(job, config=job.config.model_copy(update={"training": training}))
    search = Searching(job, trial(0, "444444", [], status="running", worker="w"))
    write_pulse(
        job.trials,
        0,
        TrialPulse(node="n", pid=1, step=0, beats=1, peak_memory_bytes=7_000, seconds=20.0),
    )
    for size in (8, 4, 2, 1, 1, 1, 1):
        assert search.suggest("a") == 0
        search.die("a", f"{KILLED_FOR_MEMORY}: 1 worker(s) were killed")
        record = read_trial(job.trials, 0)
        assert_has(record, micro_batch_size=size, peak_memory_bytes=7_000)
    assert_has(
        record,
        status="failed",
        failure="infeasible",
        seconds=20.0,
        reason="out of memory: Ray killed its worker 3 times in a row",
    )
    assert len(search.messages()) == 6
    assert all("trial 0 lost its worker, which Ray killed" in text for text in search.messages())


def test_deaths_for_memory_are_counted_apart(tmp_path: Path) -> None:
    search = Searching(
        job_of(tmp_path), trial(0, "444444", [], status="running", micro_batch_size=1)
    )
    for text in ("", "", KILLED_FOR_MEMORY):
        search.suggest("a")
        search.die("a", text)
    record = read_trial(search.job.trials, 0)
    assert_has(record, status="running", kills=2, memory_kills=1)


@pytest.mark.parametrize("text", ["", KILLED_FOR_MEMORY])
def test_a_trial_whose_worker_died_is_tried_on_another_device(text: str, tmp_path: Path) -> None:
    """Another machine may have more memory, and another GPU no defect."""
    own = {"device": "bad", "micro_batch_size": 1, "kills": 1, "memory_kills": 1}
    search = Searching(job_of(tmp_path), trial(0, "444444", [], status="running", **own))
    search.num_devices = 2
    assert search.suggest("a") == 0
    search.die("a", text)
    record = read_trial(search.job.trials, 0)
    assert_has(record, status="running", failed_on=("bad",), micro_batch_size=None)
    # Deaths there would be blamed on the plan.
    assert_has(record, kills=0, memory_kills=0)


def test_a_hanging_trial_fails_but_not_while_storage_is_away(tmp_path: Path) -> None:
    """The time in which the driver itself waits for the storage does not count either."""
    with disk_of("1m", tmp_path / "disk") as disk:
        job = replace(job_of(tmp_path, trial_timeout_seconds=1.0), trials=disk / "trials")
        search = Searching(job)
        search.suggest("a")
        write_pulse(
            job.trials, 0, TrialPulse(node="n", pid=1, step=3, beats=9, peak_memory_bytes=1)
        )
        watch = HangWatch(job, search.searcher.on_hung, print)
        state = SimpleNamespace(ray_actor="a")
        at_work = SimpleNamespace(
            trial_id="a", config={"trial": 0}, status=Trial.RUNNING, temporary_state=state
        )

        def looked_for(seconds: float) -> bool:
            """Whether the trial was found to hang; killing its stand-in is then an error of Ray."""
            until = time.monotonic() + seconds
            with suppress(RaySystemError):
                while time.monotonic() < until:
                    watch.on_step_end(1, [at_work])
                    time.sleep(0.02)
                return False
            return True

        with away(disk) as end:
            assert not looked_for(2.5)
            end()
        assert not looked_for(0.3)
        time.sleep(1.5)
        assert not looked_for(0.2)
        assert looked_for(5.0)
        search.searcher.on_trial_complete("a", error=True)
        record = read_trial(job.trials, 0)
    assert_has(
        record,
        status="failed",
        failure="hung",
        reason="no progress for 1 s (`search.trial_timeout_seconds`); its worker was killed",
    )


def test_a_search_halts_when_a_trial_finds_no_room(tmp_path: Path) -> None:
    search = Searching(job_of(tmp_path))
    search.suggest("a")
    search.fail("a", failure="storage", reason="no space")
    assert search.halt.requested
    assert not search.halt.interrupted


def test_a_trial_of_another_driver_ends_the_search(tmp_path: Path) -> None:
    """This driver slept while another one ran the next trial."""
    search = Searching(job_of(tmp_path))
    theirs = trial(0, "844444", [3.5, 3.4, 3.3])
    write_trial(search.job.trials, theirs)
    search.suggest("a")
    with pytest.raises(StageError, match=r"another driver took this run over .*/0000/trial\.json"):
        search.halt.on_step_begin(1, [])
    assert read_trials(search.job.trials) == [theirs]


def test_errors_of_all_trials_end_the_search(tmp_path: Path) -> None:
    """Without this, machines that fail within seconds would get all plans that are left."""
    job = job_of(tmp_path, max_trials=20)
    search = Searching(job, trial(0, "444444", [3.5], status="running", worker="w", device="good"))
    search.room = 20
    search.suggest("good")

    def fail(*names: str) -> None:
        for name in names:
            search.suggest(name)
            search.fail(name, failure="error", reason=f"error {name}", worker=name, device="bad")

    fail("a", "b")
    search.searcher.on_trial_result("good", {METRIC: 3.0, TIME: 2, "loss": 3.0})
    fail("c", "d")
    # There were two in a row each time.
    assert not search.halt.requested
    fail("e")
    assert search.halt.requested
    assert not search.halt.interrupted
    failures = {record.index: record.failure for record in read_trials(job.trials)}
    assert failures == {0: None, 1: "error", 2: "error", 3: "machine", 4: "machine", 5: "machine"}
    reason = "3 trials in a row failed, the last on bad, trial 4 with error d"
    assert read_trial(job.trials, 4).reason == reason
    # The next command runs them before new plans.
    assert [index for index, *_ in Searching(job).rest()][:4] == [0, 3, 4, 5]


def test_a_driver_that_slept_changes_no_trial_of_another(tmp_path: Path) -> None:
    """Its own worker stops for the worker of the other driver: that counts neither as a death nor
    as an end."""
    job = job_of(tmp_path)
    begin_session(job.trials, job.search)
    search = Searching(job)
    assert [search.suggest(name) for name in "ab"] == [0, 1]
    begin_session(job.trials, job.search)
    finished = trial(
        0, "444444", [3.5, 3.4, 3.3], origin="unpruned-uniform", times=(1.0, 2.0), worker="theirs"
    )
    goes_on = trial(1, SEED_PLAN, [3.5], status="running", worker="theirs")
    for record in (finished, goes_on):
        write_trial(job.trials, record)
    write_seconds(job.trials, job.search, 7.0)
    for name in "ab":
        search.searcher.on_trial_complete(name, error=True)
    assert read_trials(job.trials) == [finished, goes_on]
    assert read_clock(job.trials, job.search).seconds == 7.0
    with pytest.raises(StageError, match="another driver took this run over"):
        search.halt.on_step_begin(1, [])


def test_only_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    """Workers killed after they had recorded the last rung leave other checkpoints, which no worker
    removes later."""
    job = job_of(tmp_path)
    search = Searching(job)
    left = ["checkpoint-2", "checkpoint-4", ".checkpoint-2.worker", ".checkpoint-1.doomed"]
    for index, (status, losses) in enumerate(
        (("finished", [3.5, 3.4, 3.3]), ("running", [3.5, 3.4]))
    ):
        search.suggest("ab"[index])
        plan = str(PrecisionPlan.from_dict(read_trial(job.trials, index).plan))
        write_trial(job.trials, trial(index, plan, losses, status=status))
        for each in left:
            (job.trials / f"000{index}" / each).mkdir()
            (job.trials / f"000{index}" / each / "adapter").touch()

    def checkpoints() -> list[set[str]]:
        return [
            {path.name for path in job.trials.glob(f"000{index}/*checkpoint-*")}
            for index in range(2)
        ]

    search.searcher.on_trial_complete("a", error=True)
    # A trial that goes on keeps its checkpoints.
    assert checkpoints() == [{"checkpoint-4"}, set(left)]
    Searching(job)
    assert checkpoints() == [{"checkpoint-4"}, set(left)]
    Searching(
        job, read_trial(job.trials, 1).model_copy(update={"status": "failed", "failure": "lost"})
    )
    assert checkpoints() == [{"checkpoint-4"}, {"checkpoint-2"}]


# ---- trials that wait for a machine


def test_no_more_plans_are_handed_out_than_there_is_room_for(tmp_path: Path) -> None:
    search = Searching(job_of(tmp_path))
    assert [search.suggest(name) for name in "abc"] == [0, 1, None]
    search.room = 3
    assert search.suggest("d") == 2
    search.room = 1
    search.searcher.on_trial_complete("a", error=True)
    # Two are in flight, which is one too many.
    assert search.suggest("e") is None


def test_a_waiting_trial_is_withdrawn_after_the_hours(tmp_path: Path) -> None:
    """A trial that has begun continues.

    With more hours, the next search begins with the withdrawn plan.
    """
    job = job_of(tmp_path, max_hours=1.0)
    write_seconds(job.trials, job.search, 3599.5)
    search = Searching(job)
    assert [(search.suggest(name), search.searcher.is_cancelled(name)) for name in "ab"] == [
        (0, False),
        (1, False),
    ]
    write_trial(job.trials, read_trials(job.trials)[0].model_copy(update={"worker": "a process"}))
    time.sleep(1.1)
    assert [search.searcher.is_cancelled(name) for name in "ab"] == [False, True]
    search.searcher.on_trial_complete("b")
    assert [record.index for record in read_trials(job.trials)] == [0]
    withdrawn = [
        each.trial.index
        for each in search.events
        if isinstance(each, TrialChanged) and each.is_withdrawn
    ]
    # It is no longer shown as waiting.
    assert withdrawn == [1]
    # The trial that has begun may have to be resumed.
    assert search.suggest("c") is None
    more = Searching(job_of(tmp_path, max_hours=2.0)).rest()
    assert more[:2] == [(0, "unpruned-uniform", "444444"), (1, "unpruned-knapsack", SEED_PLAN)]


# ---- damaged files


def test_a_damaged_record_is_set_aside(tmp_path: Path) -> None:
    """Its number gets another plan."""
    job = job_of(tmp_path)
    for record in (
        trial(0, "444444", [3, 3, 3], origin="unpruned-uniform"),
        trial(1, "484444", [3, 3, 3]),
    ):
        write_trial(job.trials, record)
    path = job.trials / "0001" / "trial.json"
    damaged = flipped(path.read_bytes(), b'"layers.0": ')
    path.write_bytes(damaged)
    messages = []
    set_aside_damaged(job.trials, job.search, messages.append)
    assert len(messages) == 1
    assert str(path) in messages[0]
    assert "its number gets another plan" in messages[0]
    [kept] = job.trials.glob("damaged/*/trial.json")
    assert kept.read_bytes() == damaged
    first, *others = Searching(job).rest()
    plans = ["444444", first[2], *(plan for _, _, plan in others)]
    # None is handed out twice.
    assert first == (1, "unpruned-knapsack", SEED_PLAN)
    assert len(set(plans)) == len(plans)


@pytest.mark.parametrize("text", ['{"sec', '{"seconds": 9.0, "record_digest": "0"}'])
def test_a_damaged_clock_begins_at_zero(text: str, tmp_path: Path) -> None:
    trials = job_of(tmp_path).trials
    messages = []
    write_trial(trials, trial(0, "444444", [3, 3, 3], times=(10.0, 30.0)))
    clock = trials / f"search-{MINE}.json"
    clock.write_text(text)
    for _ in range(2):  # the second finds it whole
        set_aside_damaged(trials, MINE, messages.append)
        assert len(messages) == 1
        assert str(clock) in messages[0]
        assert "count from zero" in messages[0]
        assert read_clock(trials, MINE).seconds == 0.0


@pytest.mark.parametrize("damage", ["flipped", "missing", "away", None])
def test_a_trial_whose_checkpoint_is_damaged_starts_anew(
    damage: str | None, tmp_path: Path
) -> None:
    """A checkpoint on a storage that is away for a moment does not count as missing."""
    trials = job_of(tmp_path).trials
    messages = []
    checkpoint = trials / "0000" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"w" * 1000)
    running = trial(
        0, "444444", [3.5, 3.4], origin="unpruned-uniform", status="running", times=(1.0, 2.0, 3.0)
    )
    running = running.model_copy(update={"checkpoint": folder_digests(checkpoint)})
    write_trial(trials, running)
    if damage in ("away", None):
        with away(trials) as end:
            threading.Timer(0.3 if damage else 0.0, end).start()
            assert not restart_if_damaged(trials, running, messages.append)
        assert messages == []
        assert read_trials(trials) == [running]
        return
    if damage == "flipped":
        (checkpoint / "weights").write_bytes(b"w" * 500 + b"v" + b"w" * 499)
    else:
        shutil.rmtree(checkpoint)
    set_aside_damaged(trials, MINE, messages.append)
    [found] = read_trials(trials)
    assert len(messages) == 1
    assert str(checkpoint) in messages[0]
    assert "trial 0 is restarted" in messages[0]
    assert_has(found, rungs=(), status="running", times=(1.0,))
    assert not checkpoint.exists()
    assert len(list(trials.glob("damaged/*/weights"))) == (damage == "flipped")


# ---- finalists and the winner


def test_finalists_are_the_best_and_the_controls(tmp_path: Path) -> None:
    """Whether a trial is a control depends on its plan at this budget, not on its origin."""
    trials = [
        trial(0, "444444", [3, 3, 3.9], origin="unpruned-uniform"),
        trial(1, "448444", [3, 3, 3.8], ANOTHER, origin="unpruned-knapsack"),
        trial(2, SEED_PLAN, [3, 3, 3.7], ANOTHER, origin="random"),
        trial(3, "488444", [3, 3, 3.2]),
        trial(4, "848444", [3, 3, 3.1]),
        trial(5, "844844", [3, 3, 3.3]),
        trial(6, "844484", [2.0, 2.0]),
    ]
    assert [each.index for each in choose_finalists(trials, job_of(tmp_path, confirm=2))] == [
        0,
        2,
        3,
        4,
    ]


def test_a_search_by_accuracy_takes_the_most_accurate(tmp_path: Path) -> None:
    """The losses say the contrary."""
    rungs = {
        index: RungResult(step=4, loss=3.0 - 0.1 * index, accuracy=0.9 - 0.1 * index)
        for index in range(4)
    }
    plans = ("488444", "848444", "844844", "844484")
    trials = [
        trial(at, plan, [3, 3, 3]).model_copy(update={"rungs": (rungs[at],)})
        for at, plan in enumerate(plans)
    ]
    job = job_of(tmp_path, metric="accuracy", tasks=["piqa"], limit=10, confirm=2)
    assert [each.index for each in choose_finalists(trials, job)] == [0, 1]
    fresh = [
        made_finalist(at, "random", 3.0 - 0.1 * at, accuracy=0.9 - 0.1 * at) for at in range(2)
    ]
    best = best_of(fresh, metric="accuracy")
    assert best.index == 0


def test_trials_of_a_cut_with_other_weights_are_set_aside(tmp_path: Path) -> None:
    """A cut that was lost and made again, on another machine, may keep other units."""
    for at, model in enumerate(("old", "new", "")):
        write_trial(tmp_path, trial(at, "444444", [3.0], model=model, cut="cut-20"))
    write_trial(tmp_path, trial(3, "444444", [3.0], model="old", cut="cut-30"))
    messages = []
    set_aside_others(tmp_path, {"cut-20": "new"}, messages.append)
    # This command has no cut-30.
    assert [each.index for each in read_trials(tmp_path)] == [1, 2, 3]
    assert len(messages) == 1
    assert "20 % pruned, has other weights now" in messages[0]


def test_a_search_without_a_finished_trial_says_why(tmp_path: Path) -> None:
    trials = [
        trial(0, "444444", [], status="failed", failure="diverged", reason="loss is nan at step 1")
    ]
    with pytest.raises(
        StageError, match=r"none of 1 trial finished.*at step 1.*\n.*training.learning_rate"
    ):
        choose_finalists(trials, job_of(tmp_path))


def test_controls_without_a_result_are_kept_with_the_reason(tmp_path: Path) -> None:
    """One of them may be better than the winner, and the headline names them."""
    job = job_of(tmp_path)
    (uniform, _), (knapsack, _) = job.controls
    lost = trial(
        0,
        "444444",
        [],
        origin=uniform,
        status="failed",
        failure="infeasible",
        reason="out of memory: x",
    )
    ended = "1 hours were spent"
    assert lost_controls(job, [lost], ended) == {
        uniform: "out of memory: x",
        knapsack: f"not tried, because {ended}",
    }
    done = [
        trial(0, "444444", [3, 3, 3], origin=uniform),
        trial(1, SEED_PLAN, [3, 3, 3], origin=knapsack),
    ]
    assert lost_controls(job, done, ended) == {}
    over = replace(job, controls=[("unpruned-uniform", plan_of("888888"))])
    # One over the budget could not win.
    assert lost_controls(over, [], ended) == {}


def test_a_control_that_no_searched_plan_beats_is_returned() -> None:
    for searched, winner in ((2.9, 4), (3.0, 5), (3.1, 5)):
        confirmed = [
            made_finalist(4, "gp", searched),
            made_finalist(5, "unpruned-knapsack", 3.0),
        ]
        best = best_of(confirmed, metric="loss")
        assert best.index == winner


# ---- the whole stage


@pytest.mark.slow
def test_finalists_alike_are_trained_again_under_further_seeds(tiny_raw: Raw) -> None:
    """A later command trains only what is missing or damaged, and comes to the same winner."""
    search = {"max_trials": 7, "first_rung": 4, "confirm": 3, "confirm_seeds": 2}
    config = validate_config(
        with_keys(tiny_raw, **{f"search.{key}": value for key, value in search.items()})
    )
    events = []

    def searched() -> tuple[SearchRecord, list[str]]:
        events.clear()
        found = run(config, events.append, until="search").search
        assert found is not None
        named = [f"training seed {seed}" for seed in further_seeds(config)]
        return found, [text for text in texts(events) if any(name in text for name in named)]

    first, said = searched()
    again = {each.index: each for each in first.finalists if len(each.losses) > 1}
    assert 2 <= len(again) <= 4
    assert len(said) == 2 * len(again)
    for each in again.values():
        assert list(each.losses) == [config.seed, *further_seeds(config)]
        assert each.mean.loss == pytest.approx(np.mean(list(each.losses.values())), abs=1e-4)
    assert first.rival is not None
    assert first.rival != first.best_index
    assert again[first.best_index].mean.loss == min(each.mean.loss for each in again.values())
    run_folder = Path(config.output)
    (run_folder / "records" / "search.json").unlink()
    seeded = [
        path
        for path in sorted(run_folder.glob("candidates/*/record.json"))
        if json.loads(path.read_text())["seed"] in further_seeds(config)
    ]
    assert len(seeded) == 2 * len(again)
    damaged = seeded[0]
    missing = seeded[1]
    kept = seeded[-1]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    missing.unlink()
    (kept.parent / "checkpoints").mkdir()  # its driver was killed just after the score
    part = next(run_folder.glob("banks/*/nf4")) / ".layers.0.down.safetensors.0123abcd"
    part.write_bytes(b"of a killed worker")
    second, said = searched()
    # Only what is gone is trained again.
    assert len([text for text in said if " steps, " in text]) == 2
    assert any(text.startswith("warning: ") and str(damaged) in text for text in said)
    assert len(said) == 3
    assert second.best_index == first.best_index
    one, other = (comparable(found.model_dump(mode="json")) for found in (first, second))
    assert one["finalists"] == other["finalists"]
    # What is not needed is gone.
    assert not list(run_folder.glob("candidates/*/checkpoints"))
    assert not part.exists()


@pytest.mark.slow
def test_a_search_by_accuracy(tiny_raw: Raw) -> None:
    search = {"max_trials": 6, "searcher": "gp", "first_rung": 2, "metric": "acc", "limit": 8}
    keys = {f"search.{key}": value for key, value in search.items()} | {
        "search.tasks": ["qpruner_everyday_validation"],
        "sensitivity.methods": ["mutual_information"],
    }
    events = []
    found = run(validate_config(with_keys(tiny_raw, **keys)), events.append, until="search").search
    assert_has(
        found,
        metric="accuracy",
        metrics={"qpruner_everyday_validation": "acc"},
        ended="all 6 trials were spent (`search.max_trials`)",
    )
    finalists = [
        (each.done, each.total)
        for each in events
        if isinstance(each, Progress) and each.detail == UNIT
    ]
    num_answers = len(found.finalists) * finalists[-1][1] // len(found.finalists)
    assert finalists[-1] == (num_answers, num_answers)
    assert num_answers > len(found.finalists)
    assert finalists == sorted(set(finalists))
    assert all(each.mean.accuracy is not None for each in found.finalists)
