"""The search stage: when it ends, what another budget takes over, who is compared on fresh rows, and who wins.

The first tests call its parts on records as trials write them; the last ones run it whole, with real Ray.
"""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import away, disk_of, flipped, raw_config, with_key
from ray.exceptions import RaySystemError

from qpruner.cluster.tune import SearchJob, make_proposer
from qpruner.cluster.tune.callbacks import KILLED_FOR_MEMORY, Halt, HangWatch
from qpruner.cluster.tune.driver import PlanSearcher
from qpruner.cluster.tune.job import METRIC, TIME, resume_search
from qpruner.config.load import validate_config
from qpruner.errors import StageError
from qpruner.pipeline.run import run
from qpruner.pipeline.search import FINALISTS, best_of, choose_finalists, front_of, hypervolume_of
from qpruner.plans.plan import Group, Layout, LinearShape, PlanSpace, PrecisionPlan
from qpruner.runs.events import Event, Message, Progress, TrialWithdrawn
from qpruner.runs.records import Confirmation, RungResult, SearchRecord, TrialPulse, TrialRecord
from qpruner.runs.storage import folder_digests
from qpruner.search.searchers import History, Ledger, Proposal, RandomProposer
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import (
    Materials,
    begin_session,
    begin_trial,
    read_seconds,
    read_trial,
    read_trials,
    restart_if_damaged,
    set_aside_damaged,
    write_pulse,
    write_seconds,
    write_trial,
)

MINE, ANOTHER = "a" * 16, "b" * 16
GROUPS = tuple(Group(f"layers.{index}", (LinearShape(f"layers.{index}", 64, 64),)) for index in range(6))
LAYOUT = Layout(GROUPS, 1000, 300, 2, double_quant=False, num_parameters=10**5)
NAMES = tuple(group.name for group in GROUPS)


def plan_of(text: str) -> PrecisionPlan:
    return PrecisionPlan(NAMES, tuple(map(int, text)))


SEED_PLAN = plan_of("884444")
CONTROLS = [("uniform-4", plan_of("444444")), ("seed-kl", SEED_PLAN)]


def job_of(folder: Path, num_eights: int = 3, **settings: Any) -> SearchJob:
    """A search whose budget holds `num_eights` groups at 8 bits."""
    raw = raw_config(Path("model"), folder / "run")
    for key, value in settings.items():
        raw = with_key(raw, f"search.{key}", value)
    budget = LAYOUT.plan_bytes(plan_of("8" * num_eights + "4" * (6 - num_eights)))
    return SearchJob(
        config=validate_config(raw),
        trial=run_trial,
        materials=Materials(folder, folder, folder),
        layout=LAYOUT,
        space=PlanSpace.of(LAYOUT, (4, 8), budget),
        controls=CONTROLS,
        priors={},
        trials=folder / "trials",
        scratch=folder / "tune",
        digest="0" * 16,
        search=MINE,
        resources={"cpu": 1.0},
        check_node=pickle.dumps(dict),
    )


def trial(index: int, plan: str, losses: Sequence[float], search: str = MINE, **fields: Any) -> TrialRecord:
    """A trial that reached as many rungs (steps 1, 2, 4) as there are losses; finished if that is all of them."""
    rungs = tuple(
        RungResult(step=step, loss=loss, accuracy=fields.get("accuracy"), accuracy_stderr=0.1)
        for step, loss in zip((1, 2, 4), losses, strict=False)
    )
    given = {"origin": "random", "status": "finished" if len(losses) == 3 else "stopped"} | fields
    given.pop("accuracy", None)
    return TrialRecord(
        index=index,
        digest="0" * 16,
        search=search,
        plan=plan_of(plan).as_dict(),
        plan_bytes=LAYOUT.plan_bytes(plan_of(plan)),
        mean_bits=LAYOUT.mean_bits(plan_of(plan)),
        rungs=rungs,
        **given,
    )


def ledger_of(job: SearchJob, *records: TrialRecord) -> Ledger:
    """The ledger of a search that finds these records."""
    for record in records:
        write_trial(job.trials, record)
    ledger, _ = resume_search(job, RandomProposer(job.space, seed=0))
    return ledger


def searcher_on(job: SearchJob, ledger: Ledger) -> PlanSearcher:
    """What Tune asks for plans, where two trials may be in flight."""
    return PlanSearcher(job, ledger, lambda: 2, print, Halt(print))


def suggested(ledger: Ledger) -> list[tuple[int, str, str]]:
    """All that the search would still run."""
    found = []
    while (suggestion := ledger.next()) is not None:
        found.append((suggestion.index, suggestion.origin, str(suggestion.plan)))
    return found


# ---- when it ends


def test_hours_of_earlier_sessions_count(tmp_path: Path) -> None:
    job = job_of(tmp_path, max_hours=1.0)
    ledger = ledger_of(job, trial(0, "444444", [3.0], status="running"))
    write_seconds(job.trials, job.search, 3599.0)
    write_seconds(job.trials, ANOTHER, 9999.0)
    assert isinstance(searcher_on(job, ledger).suggest("a"), dict)

    write_seconds(job.trials, job.search, 3601.0)
    ledger, _ = resume_search(job, RandomProposer(job.space, seed=0))
    searcher = searcher_on(job, ledger)
    cut_off = searcher.suggest("a")
    assert isinstance(cut_off, dict) and cut_off["trial"] == 0
    assert searcher.suggest("b") == "FINISHED"
    assert ledger.ended == "1 hours were spent (`search.max_hours` is 1)"


def test_each_search_pays_for_its_part_of_a_trial(tmp_path: Path) -> None:
    """What another search's trial held before this one went on with it is not this one's, and stays the other's."""
    job = job_of(tmp_path, max_gpu_hours=1.0)
    cut_off = trial(0, "844444", [3.0], ANOTHER, status="running", gpu_seconds=3500.0)
    ledger = ledger_of(job, cut_off)
    assert isinstance(searcher_on(job, ledger).suggest("a"), dict), "the hours of the search before are not its own"
    revived = read_trial(job.trials, 0)
    assert (revived.search, revived.gpu_seconds_of(ANOTHER), revived.gpu_seconds_of(MINE)) == (MINE, 3500.0, 0.0)

    write_trial(job.trials, revived.model_copy(update={"gpu_seconds": 3500.0 + 3601.0}))
    ledger, _ = resume_search(job, RandomProposer(job.space, seed=0))
    assert read_trial(job.trials, 0).gpu_seconds_of(MINE) == 3601.0, "taken up again, it is counted once"
    searcher = searcher_on(job, ledger)
    assert isinstance(searcher.suggest("a"), dict)  # what was cut off goes on
    assert searcher.suggest("b") == "FINISHED"
    assert ledger.ended == "1 GPU hours were spent (`search.max_gpu_hours` is 1)"

    # The first search takes its trial back: what it held in the beginning is still counted.
    back = replace(job, search=ANOTHER)
    resume_search(back, RandomProposer(job.space, seed=0))
    taken = read_trial(job.trials, 0)
    assert (taken.gpu_seconds_of(ANOTHER), taken.gpu_seconds_of(MINE)) == (3500.0, 3601.0)


@dataclass(frozen=True)
class Hopeless:
    """A searcher that has nothing better to expect."""

    space: PlanSpace
    name: str = "gp"

    def propose(self, index: int, history: History) -> Proposal:
        return Proposal(self.space.uniform(8), expected_improvement=0.001, noise=0.01)


def test_patience_outlives_an_interruption(tmp_path: Path) -> None:
    """Killed and repeated after every trial, the search is over after as many as without: 2 controls and 2 more."""
    job = job_of(tmp_path, searcher="gp", patience=3)
    for index in range(5):
        ledger, _ = resume_search(job, Hopeless(job.space))
        running = searcher_on(job, ledger).suggest("a")
        if index < 4:
            assert isinstance(running, dict) and running["trial"] == index
            record = read_trials(job.trials)[index]
            write_trial(job.trials, record.model_copy(update={"status": "finished"}))
    assert running == "FINISHED"
    assert ledger.ended is not None and "below the noise (0.01) for 3 proposals in a row" in ledger.ended


WORTH = dict(zip(NAMES, (2, 6, 1, 5, 3, 4), strict=True))
"""Questions of 100 that a group at 8 bits answers and at 4 does not."""


def searched_by_accuracy(folder: Path, stderr: float | None) -> list[TrialRecord]:
    """Trials of a gp whose plans answer the same questions and report this standard error, until patience ends it."""
    settings = {"metric": "accuracy", "tasks": ["qpruner_everyday_validation"], "limit": 8}
    job = job_of(folder, searcher="gp", max_trials=20, patience=3, **settings)
    ledger, _ = resume_search(job, make_proposer("gp", job.space, 0, {}))
    searcher = PlanSearcher(job, ledger, lambda: 1, print, Halt(print))
    while isinstance(asked := searcher.suggest("a"), dict):
        record = read_trial(job.trials, asked["trial"])
        accuracy = 0.5 + sum(WORTH[name] for name, bits in record.plan.items() if bits == 8) / 100
        rungs = (RungResult(step=4, loss=1.0, accuracy=accuracy, accuracy_stderr=stderr),)
        write_trial(job.trials, record.model_copy(update={"rungs": rungs, "status": "finished"}))
        result = {METRIC: 1 - accuracy, TIME: 4, "loss": 1.0, "accuracy": accuracy, "accuracy_stderr": stderr}
        searcher.on_trial_result("a", result)
        searcher.on_trial_complete("a", result)
    assert ledger.ended is not None and "`search.patience`" in ledger.ended
    return read_trials(job.trials)


def test_the_error_over_questions_does_not_steer_the_search(tmp_path: Path) -> None:
    """All plans answer the same questions: the standard error is recorded, and is no noise between plans."""
    searches = [searched_by_accuracy(tmp_path / str(stderr), stderr) for stderr in (0.05, None)]
    proposed = [[(each.plan, each.expected_improvement, each.noise) for each in trials] for trials in searches]
    assert proposed[0] == proposed[1]
    found = [each.rungs[-1] for each in searches[0]]
    assert max(each.accuracy or 0.0 for each in found) == 0.65, "patience ends no search before the best plan"
    assert {each.accuracy_stderr for each in found} == {0.05}


# ---- what another budget takes over


def test_trials_of_another_budget_inform_the_search(tmp_path: Path) -> None:
    """One of them is over this budget, one is a control here, one was stopped early; none is run again."""
    job = job_of(tmp_path, max_trials=4)
    ledger = ledger_of(
        job,
        trial(0, "444444", [3.4, 3.3, 3.2], ANOTHER, origin="uniform-4"),
        trial(1, "888844", [3.0, 2.9, 2.8], ANOTHER, origin="seed-kl"),
        trial(2, "484444", [3.5], ANOTHER),
    )
    told = [(item.index, item.step, item.score) for item in ledger.history().observations]
    assert told == [(0, 1, 3.4), (0, 2, 3.3), (0, 4, 3.2), (1, 1, 3.0), (1, 2, 2.9), (1, 4, 2.8), (2, 1, 3.5)]
    found = suggested(ledger)
    assert [(index, origin) for index, origin, _ in found] == [(3, "seed-kl"), *((n, "random") for n in (4, 5, 6))]
    assert {plan for *_, plan in found}.isdisjoint({"444444", "888844", "484444"})
    assert all(job.space.is_feasible(plan_of(plan)) for *_, plan in found)


def test_a_control_stopped_by_another_search_is_resumed(tmp_path: Path) -> None:
    job = job_of(tmp_path, max_trials=3)
    ledger = ledger_of(job, trial(0, "444444", [3.4, 3.3, 3.2]), trial(1, str(SEED_PLAN), [3.5], ANOTHER))
    assert suggested(ledger)[0] == (1, "seed-kl", str(SEED_PLAN))
    record = read_trials(job.trials)[1]
    assert (record.search, record.origin, record.status) == (MINE, "seed-kl", "running")
    # Killed before it went on, and once it is done, the search is the same: that trial and one more.
    assert len(suggested(resume_search(job, RandomProposer(job.space, 0))[0])) == 2
    write_trial(job.trials, record.model_copy(update={"status": "finished"}))
    assert [index for index, *_ in suggested(resume_search(job, RandomProposer(job.space, 0))[0])] == [2]


@pytest.mark.parametrize(("plan", "goes_on"), [("848444", True), ("888848", False)])
def test_what_another_search_was_cut_off_in_goes_on_if_it_fits(plan: str, goes_on: bool, tmp_path: Path) -> None:
    job = job_of(tmp_path)
    first = suggested(ledger_of(job, trial(0, plan, [3.5], ANOTHER, status="running")))[0]
    assert first == ((0, "random", plan) if goes_on else (1, "uniform-4", "444444"))
    assert read_trials(job.trials)[0].search == (MINE if goes_on else ANOTHER)


@pytest.mark.parametrize(
    ("failure", "losses", "is_retried"),
    [("storage", [3.5], True), ("diverged", [3.5], False), ("hung", [], True), ("hung", [3.5], False)],
)
def test_what_failed_for_no_fault_of_its_own_is_retried(
    failure: str, losses: list[float], is_retried: bool, tmp_path: Path
) -> None:
    """What hung before its first rung may have waited for its files; after one it is no better the next time."""
    job = job_of(tmp_path)
    failed = trial(0, "444444", losses, origin="uniform-4", status="failed", failure=failure)
    assert suggested(ledger_of(job, failed))[0][1] == ("uniform-4" if is_retried else "seed-kl")
    assert read_trials(job.trials)[0].status == ("running" if is_retried else "failed")


# ---- trials that do not end by themselves


def searcher_of(job: SearchJob, *records: TrialRecord) -> tuple[PlanSearcher, Halt, list[Event]]:
    events: list[Event] = []
    halt = Halt(events.append)
    return PlanSearcher(job, ledger_of(job, *records), lambda: 2, events.append, halt), halt, events


def test_a_trial_fails_after_three_deaths_in_a_row(tmp_path: Path) -> None:
    job = job_of(tmp_path, max_trials=2)
    searcher, _, events = searcher_of(job)
    found = []
    for name in "abcd":
        given = searcher.suggest(name)
        assert isinstance(given, dict)
        found.append(given["trial"])
        searcher.on_trial_complete(name, error=True)
    assert found == [0, 0, 0, 1]
    first, second = read_trials(job.trials)
    assert (first.status, first.failure, first.kills) == ("failed", "lost", 3) and len(first.times) == 2
    assert (second.status, second.failure, second.kills) == ("running", None, 1)
    told = [event.text for event in events if isinstance(event, Message)]
    assert told[0] == "trial 0 lost its worker and is resumed from its start" and len(told) == 3


def test_a_trial_killed_for_no_progress_has_failed(tmp_path: Path) -> None:
    job = job_of(tmp_path, trial_timeout_seconds=7)
    searcher, _, _ = searcher_of(job)
    searcher.suggest("a")
    searcher.on_hung("a")
    searcher.on_trial_complete("a", error=True)
    (record,) = read_trials(job.trials)
    assert (record.status, record.failure) == ("failed", "hung")
    assert record.reason == "no progress for 7 s (`search.trial_timeout_seconds`); its worker was killed"


@pytest.mark.parametrize("failure", ["diverged", "infeasible"])
def test_the_searcher_is_told_of_a_plan_that_cannot_be_trained(failure: str, tmp_path: Path) -> None:
    """As of a bad one: in the session that met it, and in the next one, which has it from the record."""
    job = job_of(tmp_path)
    ledger = ledger_of(job, trial(0, "444444", [3.5, 3.4, 3.3], origin="uniform-4"))
    searcher = searcher_on(job, ledger)
    searcher.suggest("a")
    record = read_trials(job.trials)[1]
    write_trial(job.trials, record.model_copy(update={"status": "failed", "failure": failure}))
    searcher.on_trial_complete("a", error=True)
    for each in (ledger, resume_search(job, RandomProposer(job.space, seed=0))[0]):
        history = each.history()
        scores = {item.index: item.score for item in history.observations if item.step == 4}
        assert scores[1] > scores[0] == 3.3 and history.failed == ()


def killed_for_memory(searcher: PlanSearcher, job: SearchJob) -> TrialRecord:
    """The record of trial 0 after Ray killed its worker for memory."""
    assert isinstance(searcher.suggest("a"), dict)
    searcher.on_error_text("a", f"{KILLED_FOR_MEMORY}: 1 worker(s) were killed")
    searcher.on_trial_complete("a", error=True)
    return read_trial(job.trials, 0)


def test_a_trial_killed_for_memory_halves_its_micro_batch(tmp_path: Path) -> None:
    """Three kills are no verdict while fewer rows are left to try, and the record names the rows that ran last."""
    job = job_of(tmp_path)
    training = job.config.training.model_copy(update={"batch_size": 16, "micro_batch_size": 16})
    job = replace(job, config=job.config.model_copy(update={"training": training}))
    searcher, _, events = searcher_of(job, trial(0, "444444", [], status="running", worker="w"))
    write_pulse(job.trials, 0, TrialPulse(node="n", pid=1, step=0, beats=1, peak_memory_bytes=7_000, seconds=20.0))
    for size in (8, 4, 2, 1, 1, 1):
        record = killed_for_memory(searcher, job)
        assert (record.status, record.micro_batch_size, record.peak_memory_bytes) == ("running", size, 7_000)
    record = killed_for_memory(searcher, job)
    assert (record.status, record.failure, record.seconds) == ("failed", "infeasible", 20.0)
    assert record.reason == "out of memory: Ray killed its worker 3 times in a row"
    assert (record.micro_batch_size, record.peak_memory_bytes) == (1, 7_000)
    told = [event.text for event in events if isinstance(event, Message)]
    assert told == ["trial 0 lost its worker, which Ray killed for memory, and is resumed from its start"] * 6


@pytest.mark.parametrize("trouble", [away])
def test_a_trial_does_not_hang_while_the_storage_is_away(
    trouble: Callable[[Path], AbstractContextManager[Callable[[], None]]], tmp_path: Path
) -> None:
    """Nor for the time in which the driver did not look, because it waited for the storage, too."""
    with disk_of("1m", tmp_path / "disk") as disk:
        job = replace(job_of(tmp_path, trial_timeout_seconds=1.0), trials=disk / "trials")
        searcher, _, _ = searcher_of(job)
        searcher.suggest("a")
        write_pulse(job.trials, 0, TrialPulse(node="n", pid=1, step=3, beats=9, peak_memory_bytes=1))
        watch = HangWatch(job, searcher.on_hung, print)
        at_work = SimpleNamespace(trial_id="a", config={"trial": 0}, temporary_state=SimpleNamespace(ray_actor="a"))

        def looked_for(seconds: float) -> bool:
            """Whether the trial was taken for hanging, at which its stand-in has nothing to be killed."""
            until = time.monotonic() + seconds
            with suppress(RaySystemError):
                while time.monotonic() < until:
                    watch.on_step_end(1, [at_work])
                    time.sleep(0.02)
                return False
            return True

        with trouble(disk) as end:
            assert not looked_for(2.5)
            end()
        assert not looked_for(0.3)
        time.sleep(1.5)
        assert not looked_for(0.2)
        assert looked_for(5.0)


def test_a_search_halts_when_a_trial_finds_no_room(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    searcher, halt, _ = searcher_of(job)
    searcher.suggest("a")
    (record,) = read_trials(job.trials)
    write_trial(job.trials, record.model_copy(update={"status": "failed", "failure": "storage", "reason": "no space"}))
    searcher.on_trial_complete("a", error=True)
    assert halt.requested and not halt.interrupted


def failing(searcher: PlanSearcher, job: SearchJob, name: str, node: str, failure: str = "error") -> int:
    """Have the next trial fail on a machine; returns its number."""
    given = searcher.suggest(name)
    assert isinstance(given, dict)
    record = read_trial(job.trials, given["trial"])
    failed = {"status": "failed", "failure": failure, "reason": f"{failure} {name}", "worker": name, "node": node}
    write_trial(job.trials, record.model_copy(update=failed))
    searcher.on_trial_complete(name, error=True)
    return record.index


def test_a_broken_machine_ends_the_search(tmp_path: Path) -> None:
    """Free again within seconds, it would take all plans that are left."""
    job = job_of(tmp_path, max_trials=20)
    searcher, halt, _ = searcher_of(job, trial(0, "444444", [3.5], status="running", worker="w", node="good"))
    searcher.suggest("good")
    for name, node in (("a", "bad"), ("b", "good"), ("c", "bad"), ("d", "good")):
        failing(searcher, job, name, node)
    searcher.on_trial_result("good", {METRIC: 3.0, TIME: 2, "loss": 3.0})
    failing(searcher, job, "e", "good")
    assert not halt.requested, "two in a row on each"
    failing(searcher, job, "f", "bad")
    assert halt.requested and not halt.interrupted
    failures = {record.index: record.failure for record in read_trials(job.trials)}
    assert failures == {0: None, 1: "machine", 2: "error", 3: "machine", 4: "error", 5: "error", 6: "machine"}
    assert read_trial(job.trials, 3).reason == "3 trials in a row failed on bad, trial 3 with error c"
    ledger, _ = resume_search(job, RandomProposer(job.space, seed=0))
    assert [index for index, *_ in suggested(ledger)][:4] == [0, 1, 3, 6], "by the next command, before new plans"


def test_a_driver_that_slept_changes_no_others_trial(tmp_path: Path) -> None:
    """Its worker leaves such a trial to the other's, which is no death to be counted, nor a second end."""
    job = job_of(tmp_path)
    begin_session(job.trials, job.search)
    searcher, halt, _ = searcher_of(job)
    assert [isinstance(searcher.suggest(name), dict) for name in "ab"] == [True, True]
    begin_session(job.trials, job.search)
    finished = trial(0, "444444", [3.5, 3.4, 3.3], origin="uniform-4", times=(1.0, 2.0), worker="theirs")
    goes_on = trial(1, str(SEED_PLAN), [3.5], status="running", worker="theirs")
    for record in (finished, goes_on):
        write_trial(job.trials, record)
    write_seconds(job.trials, job.search, 7.0)
    for name in "ab":
        searcher.on_trial_complete(name, error=True)
    assert read_trials(job.trials) == [finished, goes_on] and read_seconds(job.trials, job.search) == 7.0
    with pytest.raises(StageError, match="another driver took this run over"):
        halt.on_step_begin(1, [])


def test_only_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    """Its worker was killed after it had recorded the last rung, or with the driver: nobody works on it again."""
    job = job_of(tmp_path)
    searcher, _, _ = searcher_of(job)
    for name in "ab":
        searcher.suggest(name)
    left = ("checkpoint-2", "checkpoint-4", ".checkpoint-2.worker", ".checkpoint-1.doomed")
    for index, (status, losses) in enumerate((("finished", [3.5, 3.4, 3.3]), ("running", [3.5, 3.4]))):
        record = read_trial(job.trials, index)
        write_trial(job.trials, trial(index, "".join(map(str, record.plan.values())), losses, status=status))
        for each in left:
            (job.trials / f"000{index}" / each).mkdir()
            (job.trials / f"000{index}" / each / "adapter").touch()

    def checkpoints() -> list[list[str]]:
        return [sorted(path.name for path in job.trials.glob(f"000{index}/*checkpoint-*")) for index in range(2)]

    searcher.on_trial_complete("a", error=True)
    assert checkpoints() == [["checkpoint-4"], sorted(left)], "who goes on has its own"
    resume_search(job, RandomProposer(job.space, seed=0))
    assert checkpoints() == [["checkpoint-4"], sorted(left)]
    write_trial(job.trials, read_trial(job.trials, 1).model_copy(update={"status": "failed", "failure": "lost"}))
    resume_search(job, RandomProposer(job.space, seed=0))
    assert checkpoints() == [["checkpoint-4"], ["checkpoint-2"]]


# ---- trials that wait for a machine


def test_no_more_plans_are_handed_out_than_there_is_room_for(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    room = 2
    searcher = PlanSearcher(job, ledger_of(job), lambda: room, print, Halt(print))
    assert [isinstance(searcher.suggest(name), dict) for name in "abc"] == [True, True, False]
    room = 3
    assert isinstance(searcher.suggest("d"), dict)
    room = 1
    searcher.on_trial_complete("a", error=True)
    assert searcher.suggest("e") is None, "two are in flight, one too many"
    assert [record.index for record in read_trials(job.trials)] == [0, 1, 2]


def test_a_waiting_trial_is_withdrawn_after_the_hours(tmp_path: Path) -> None:
    """Its plan is the next search's first, should there be one with more hours; one that had begun goes on."""
    job = job_of(tmp_path, max_hours=1.0)
    write_seconds(job.trials, job.search, 3599.5)
    searcher, _, events = searcher_of(job)
    for name in "ab":
        assert isinstance(searcher.suggest(name), dict) and not searcher.is_recalled(name)
    write_trial(job.trials, read_trials(job.trials)[0].model_copy(update={"worker": "a process"}))
    time.sleep(1.1)
    assert [searcher.is_recalled(name) for name in "ab"] == [False, True]
    searcher.on_trial_complete("b")
    assert [record.index for record in read_trials(job.trials)] == [0]
    assert TrialWithdrawn(1) in events
    assert searcher.suggest("c") == "FINISHED"
    more = resume_search(job_of(tmp_path, max_hours=2.0), RandomProposer(job.space, seed=0))[0]
    assert suggested(more)[:2] == [(0, "uniform-4", "444444"), (1, "seed-kl", str(SEED_PLAN))]


# ---- what is damaged


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda text: text[:-20],
    "bits": lambda text: flipped(text, b'"layers.0": '),
}


@pytest.mark.parametrize(
    ("copy", "damage"), [("whole", "cut"), ("whole", "bits"), ("damaged", "cut"), ("missing", "bits")]
)
def test_a_damaged_record_is_set_aside_and_its_trial_rerun(copy: str, damage: str, tmp_path: Path) -> None:
    """With its plan, which no searcher would propose at its number, as long as a copy of that can be read."""
    job = job_of(tmp_path)
    for record in (trial(0, "444444", [3, 3, 3], origin="uniform-4"), trial(1, "484444", [3, 3, 3])):
        begin_trial(job.trials, record.model_copy(update={"rungs": (), "status": "running"}))
        write_trial(job.trials, record)
    suggested_path = job.trials / "0001" / "suggested.json"
    if copy == "damaged":
        suggested_path.write_bytes(flipped(suggested_path.read_bytes(), b'"layers.1": '))
    elif copy == "missing":
        suggested_path.unlink()
    path = job.trials / "0001" / "trial.json"
    damaged = DAMAGES[damage](path.read_bytes())
    path.write_bytes(damaged)
    told: list[str] = []
    set_aside_damaged(job.trials, job.search, told.append)
    assert len(told) == 1 and str(path) in told[0]
    (kept,) = job.trials.glob("damaged/*/trial.json")
    assert kept.read_bytes() == damaged
    first, *others = suggested(ledger_of(job))
    plans = ["444444", first[2], *(plan for _, _, plan in others)]
    assert len(set(plans)) == len(plans), "none is handed out twice"
    if copy == "whole":
        assert "that trial is run again" in told[0] and first == (1, "random", "484444")
        path.write_bytes(damaged)
        set_aside_damaged(job.trials, job.search, told.append)
        assert suggested(ledger_of(job))[0] == first, "and so it is a second time"
    else:
        assert "its number gets another plan" in told[0] and first == (1, "seed-kl", str(SEED_PLAN))


@pytest.mark.parametrize("text", ["", '{"sec', '{"seconds": 9.0, "record_digest": "0"}'])
def test_a_damaged_clock_begins_at_zero(text: str, tmp_path: Path) -> None:
    job = job_of(tmp_path)
    write_trial(job.trials, trial(0, "444444", [3, 3, 3], times=(10.0, 30.0)))
    clock = job.trials / f"search-{MINE}.json"
    clock.write_text(text)
    told: list[str] = []
    for _ in range(2):  # the second finds it whole
        set_aside_damaged(job.trials, job.search, told.append)
        assert len(told) == 1 and str(clock) in told[0] and "count from zero" in told[0]
        assert read_seconds(job.trials, job.search) == 0.0


@pytest.mark.parametrize("damage", ["flipped", "missing", None])
def test_a_trial_whose_checkpoint_is_damaged_starts_anew(damage: str | None, tmp_path: Path) -> None:
    job = job_of(tmp_path)
    checkpoint = job.trials / "0000" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"w" * 1000)
    running = trial(0, "444444", [3.5, 3.4], origin="uniform-4", status="running", times=(1.0, 2.0, 3.0))
    write_trial(job.trials, running.model_copy(update={"checkpoint": folder_digests(checkpoint)}))
    if damage == "flipped":
        (checkpoint / "weights").write_bytes(b"w" * 500 + b"v" + b"w" * 499)
    elif damage == "missing":
        shutil.rmtree(checkpoint)
    told: list[str] = []
    set_aside_damaged(job.trials, job.search, told.append)
    (found,) = read_trials(job.trials)
    if damage is None:
        assert told == [] and len(found.rungs) == 2
        return
    assert len(told) == 1 and str(checkpoint) in told[0] and "trial 0 is restarted" in told[0]
    assert (found.rungs, found.status, found.times) == ((), "running", (1.0,))
    assert not checkpoint.exists()
    assert len(list(job.trials.glob("damaged/*/weights"))) == (damage == "flipped")


@pytest.mark.parametrize("hidden", ["trials", "trials/0000"])
def test_a_checkpoint_on_a_storage_that_is_away_is_kept(hidden: str, tmp_path: Path) -> None:
    job = job_of(tmp_path)
    checkpoint = job.trials / "0000" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"w" * 1000)
    record = trial(0, "444444", [3.5, 3.4], status="running", checkpoint=folder_digests(checkpoint))
    write_trial(job.trials, record)
    told: list[str] = []
    with away(tmp_path / hidden) as end:
        threading.Timer(0.3, end).start()
        assert not restart_if_damaged(job.trials, record, told.append)
    assert told == [] and read_trials(job.trials) == [record]


# ---- who is compared, and who wins


def test_finalists_are_the_best_and_the_controls(tmp_path: Path) -> None:
    """What was a seed at another budget is a plan like any other; a control that a searcher proposed there is one."""
    trials = [
        trial(0, "444444", [3, 3, 3.9], origin="uniform-4"),
        trial(1, "448444", [3, 3, 3.8], ANOTHER, origin="seed-kl"),
        trial(2, str(SEED_PLAN), [3, 3, 3.7], ANOTHER, origin="random"),
        trial(3, "488444", [3, 3, 3.2]),
        trial(4, "848444", [3, 3, 3.1]),
        trial(5, "844844", [3, 3, 3.3]),
        trial(6, "844484", [2.0, 2.0]),
    ]
    assert [each.index for each in choose_finalists(trials, job_of(tmp_path, confirm=2))] == [0, 2, 3, 4]


def test_for_a_front_no_plan_that_may_be_on_it_is_left_out(tmp_path: Path) -> None:
    trials = [
        trial(0, "888444", [3, 3, 3.0]),
        trial(1, "484444", [3, 3, 3.5]),
        trial(2, "448444", [3, 3, 3.4]),
        trial(3, "448484", [3, 3, 3.6]),
        trial(4, "444444", [3, 3, 3.9]),
    ]
    assert [each.index for each in choose_finalists(trials, job_of(tmp_path, confirm=1, pareto=True))] == [0, 2, 4]


def test_a_search_without_a_finished_trial_says_why(tmp_path: Path) -> None:
    trials = [trial(0, "444444", [], status="failed", failure="diverged", reason="loss is nan at step 1")]
    with pytest.raises(StageError, match=r"none of 1 trial finished.*at step 1.*\n.*training.learning_rate"):
        choose_finalists(trials, job_of(tmp_path))


def confirmation(index: int, loss: float, control: bool = False, accuracy: float | None = None) -> Confirmation:
    return Confirmation(
        index=index,
        origin="seed-kl" if control else "gp",
        control=control,
        reused=False,
        loss=loss,
        stderr=0.1,
        accuracy=accuracy,
        accuracy_stderr=None if accuracy is None else 0.1,
    )


def test_a_control_that_no_searched_plan_beats_is_returned(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    control = confirmation(5, 3.0, control=True)
    for searched, winner in ((2.9, 4), (3.0, 5), (3.1, 5)):
        best = best_of([confirmation(4, searched), control], job)
        assert best is not None and best.index == winner


def test_the_front_is_that_of_the_fresh_scores(tmp_path: Path) -> None:
    """By the trials' own scores the middle plan is on the front; on fresh rows the small one beats it."""
    trials = {
        0: trial(0, "884444", [3, 3, 3.0]),
        1: trial(1, "844444", [3, 3, 3.2], origin="seed-kl"),
        2: trial(2, "444444", [3, 3, 3.4]),
    }
    fresh = [confirmation(0, 3.1), confirmation(1, 3.5, control=True), confirmation(2, 3.3)]
    job = job_of(tmp_path, pareto=True)
    front = front_of(fresh, trials, job)
    assert [(point.index, point.loss, point.plan_bytes) for point in front] == [
        (2, 3.3, LAYOUT.plan_bytes(plan_of("444444"))),
        (0, 3.1, LAYOUT.plan_bytes(plan_of("884444"))),
    ]
    smallest, larger = (point.plan_bytes for point in front)
    worth = (3.3 - 3.1) * (job.space.budget_bytes - larger) / (job.space.budget_bytes - smallest)
    assert 0 < worth < 0.2
    assert hypervolume_of(front, job) == pytest.approx(worth)
    assert hypervolume_of(front[:1], job) == 0.0


# ---- the whole stage


def go(raw: dict[str, Any]) -> tuple[SearchRecord, list[Event]]:
    """Runs the flow up to the search, in process; returns its record and what was said."""
    events: list[Event] = []
    results = run(validate_config(raw), events.append, until="search")
    assert results.search is not None
    return results.search, events


@pytest.mark.slow
def test_a_front_by_accuracy(tiny_raw: dict[str, Any]) -> None:
    raw = tiny_raw
    for key, value in {
        "sensitivity.methods": ["mutual_information"],
        "quantize.budget": {"fraction": 1.0},
        "search.max_trials": 6,
        "search.searcher": "gp",
        "search.first_rung": 2,
        "search.pareto": True,
        "search.metric": "acc",
        "search.tasks": ["qpruner_everyday_validation"],
        "search.limit": 8,
    }.items():
        raw = with_key(raw, key, value)
    found, events = go(raw)
    assert (found.metric, found.metrics) == ("accuracy", {"qpruner_everyday_validation": "acc"})
    assert found.ended == "all 6 trials were spent (`search.max_trials`)"
    finalists = [(each.done, each.total) for each in events if isinstance(each, Progress) and each.detail == FINALISTS]
    assert finalists == [(done, len(found.confirmations)) for done in range(len(found.confirmations) + 1)]
    sizes, accuracies = zip(*((point.plan_bytes, point.accuracy) for point in found.front), strict=True)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] <= found.budget_bytes
    assert list(accuracies) == sorted(set(accuracies))
    assert found.best_plan == found.front[-1].plan, "the best is the front's best inside the budget"
    assert all(each.accuracy is not None for each in found.confirmations)
    assert found.hypervolume is not None and found.hypervolume >= 0
    # The largest plan is the whole budget: it is the best inside no smaller one.
    assert (found.hypervolume > 0) == any(point.plan_bytes < found.budget_bytes for point in found.front[1:])
