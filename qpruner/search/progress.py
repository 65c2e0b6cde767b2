"""Computes the progress of a search from its trials' records.

The progress is the counts, the best scores and the time left.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qpruner.data.measures import accuracy_name
from qpruner.plans.plan import cut_title, plan_of
from qpruner.runs import events
from qpruner.runs.records import SearchRecord, SearchState, TrialRecord
from qpruner.wording import counted, duration

Line = tuple[str, TrialRecord | None]
"""A line that describes a search, and the trial whose plan belongs to its end, if any."""


@dataclass(frozen=True)
class SearchProgress:
    """The progress of a search.

    It has the search's trials in order of their numbers, and `best`, the best finished searched
    plan. `best_control` is the best finished plan that no searcher proposed. `seconds_left` assumes
    a trial's mean time.
    """

    trials: tuple[TrialRecord, ...]
    best: TrialRecord | None
    best_control: TrialRecord | None
    seconds_left: float | None

    def count(self, status: str) -> int:
        """Count the trials of this search with a status."""
        return sum(1 for trial in self.trials if trial.status == status)

    @property
    def running(self) -> list[TrialRecord]:
        """The trials that have not ended, also those that still wait for a slot."""
        return [trial for trial in self.trials if not trial.is_over]


def search_progress(search: SearchState, records: Iterable[TrialRecord]) -> SearchProgress:
    """Compute the progress of a search from all trials in its folder."""
    trials = tuple(
        trial
        for trial in sorted(records, key=lambda trial: trial.index)
        if trial.search == search.search
    )
    finished = [trial for trial in trials if trial.status == "finished"]
    over = [trial.seconds for trial in trials if trial.is_over]
    left = None
    if over and search.slots and len(over) < len(trials):
        under_way = sum(trial.seconds for trial in trials if not trial.is_over)
        left = (
            max(0.0, (search.max_trials - len(over)) * sum(over) / len(over) - under_way)
            / search.slots
        )
    in_budget = [trial for trial in finished if fits(trial, search)]
    searched = [trial for trial in in_budget if not trial.is_control]
    controls = [trial for trial in in_budget if trial.is_control]
    return SearchProgress(
        trials=trials,
        best=best_of(searched, search.metric),
        best_control=best_of(controls, search.metric),
        seconds_left=left,
    )


def fits(trial: TrialRecord, search: SearchState) -> bool:
    """Return True if a trial's plan may win; only some controls may not."""
    return trial.plan_bytes <= search.budget_bytes and trial.cut in (search.may_win or (trial.cut,))


def best_of(finished: Iterable[TrialRecord], metric: str) -> TrialRecord | None:
    """Return the trial with the best score at its last rung; of equal scores, the first trial."""
    return min(
        finished, key=lambda trial: (trial.rungs[-1].cost(metric), trial.index), default=None
    )


def score_name(search: SearchState | SearchRecord) -> str:
    """Return the name of the score that compares trials.

    It is `loss` or, in a search by accuracy, lm-eval's name for the metric. If the tasks have
    different metrics, it is `accuracy`.
    """
    return "loss" if search.metric == "loss" else accuracy_name(search.metrics)


def score_title(search: SearchState | SearchRecord) -> str:
    """Return the heading over trials' scores: `validation loss`, or what `score_name` returns."""
    return f"{'validation ' if search.metric == 'loss' else ''}{score_name(search)}"


def score_with_step(score_text: str, scored_step: int, current_step: int) -> str:
    """Append `@` and the step at which the score was measured.

    Only a trial that has since reached a later step gets them.
    """
    return score_text if scored_step == current_step else f"{score_text} @{scored_step}"


def search_lines(
    search: SearchState, now: SearchProgress, is_running: bool = True
) -> Iterator[Line]:
    """Describe a search for the live view and `qpruner status`.

    The counts and the time left come first, then the best trials.
    """
    counts = ", ".join(
        f"{now.count(status)} {status}" for status in ("finished", "stopped", "failed")
    )
    busy = f"{len(now.running)} {'running' if is_running else 'begun'}" if now.running else ""
    if is_running and search.slots is not None:
        # Trials without a slot wait for a machine that an autoscaler may start.
        num_waiting = max(0, len(now.running) - search.slots)
        busy = f"{len(now.running) - num_waiting} of {counted(search.slots, 'slot')} busy"
        busy += f", {num_waiting} waiting for one" if num_waiting else ""
    left = "" if now.seconds_left is None else f"; about {duration(now.seconds_left)} left"
    left += " once it goes on" if left and not is_running else ""
    now_busy = f"; {busy}" if busy else ""
    yield (
        f"{len(now.trials)} of {counted(search.max_trials, 'trial')}: {counts}{now_busy}{left}",
        None,
    )
    yield from ((line, None) for line in failing_devices(now.trials))
    for best in filter(None, (now.best, now.best_control)):
        name = (
            "given plan" if best.is_given else "best control" if best.is_control else "best so far"
        )
        reached = (
            f"{score_title(search)} {best.rungs[-1].value(search.metric):.4f}, trial {best.index}"
        )
        yield (
            (
                f"{name:<12}  {reached} ({best.origin}), {cut_title(best.cut)}, "
                f"{best.plan_bytes / 1e6:.1f} MB"
            ),
            best,
        )


def failing_devices(trials: Iterable[TrialRecord]) -> list[str]:
    """Name each device on which trials failed that then scored on another one, and count them."""
    failed = Counter(
        device for trial in trials if trial.rungs for device in {*trial.failed_on} - {trial.device}
    )
    return [
        f"{counted(count, 'trial')} failed on {device} and ran elsewhere"
        for device, count in failed.items()
    ]


def best_so_far(over: Iterable[TrialRecord], metric: str) -> list[float | None]:
    """Return the best score of a searched plan after each trial, None before the first score."""
    best: TrialRecord | None = None
    curve = []
    for trial in over:
        if trial.status == "finished" and not trial.is_control:
            best = best_of([trial] if best is None else [best, trial], metric)
        curve.append(best.rungs[-1].value(metric) if best else None)
    return curve


def in_order_of_end(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the trials that are over, in the order in which they ended."""
    return sorted(
        (trial for trial in trials if trial.is_over),
        key=lambda trial: (trial.times[-1:], trial.index),
    )


def trial_line(trial: TrialRecord, steps: int) -> str:
    """Describe a trial in one line: number, plan, cut, last score, status."""
    line = (
        f"trial {trial.index:>3} [{plan_of(trial)}] {cut_title(trial.cut)}, "
        f"{trial.plan_bytes / 1e6:.1f} MB"
    )
    if trial.rungs:
        last = trial.rungs[-1]
        accuracy = "" if last.accuracy is None else f" accuracy {last.accuracy:.3f}"
        line += f" step {last.step}/{steps} loss {last.loss:.4f}{accuracy}"
    ends = {
        "running": "",
        "finished": "",
        "stopped": ", stopped",
        "failed": f", failed: {trial.reason}",
    }
    return f"{line} ({trial.origin}){ends[trial.status]}"


def event_line(event: events.Event, steps: int) -> str | None:
    """Describe an event in one line for terminal and log; None if the event needs no line."""
    match event:
        case events.StageStarted(stage, detail):
            return f"[{stage}] {detail} ..."
        case events.StageFinished(stage, seconds, figures):
            return f"[{stage}] done in {seconds:.1f} s: {figures}"
        case events.StageSkipped(stage, figures):
            return f"[{stage}] already recorded: {figures}"
        case events.Message(stage, text):
            return f"[{stage}] {text}"
        case events.TrialChanged(trial) if trial.is_over or trial.rungs:
            return f"[search] {trial_line(trial, steps)}"
    return None
