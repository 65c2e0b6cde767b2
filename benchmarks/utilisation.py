"""Measure for what share of the time a search keeps its GPUs busy.

Trials only sleep, on GPUs that Ray only counts.

    .venv/bin/python benchmarks/utilisation.py                          # about 35 minutes
    .venv/bin/python benchmarks/utilisation.py --slots 4 --seconds 10 --trials-per-slot 8

The search is the real one: searcher, ASHA, Tune, records, checkpoints of 100 kB. Lengths are
log-normal, sigma 1, with the given mean for a trial that runs to its end; ASHA stops about half of
them at a quarter of it and half of the others at the half. Busy is asleep: a report, a checkpoint,
a decision, a new plan, a process that starts are idle time. The share counts from the moment at
which every slot has been busy at once to the last suggestion; the ramp before and the tail after it
are reported separately. Prints a table and a JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import ray
from stand_in import FIRST_RUNG, Slept, run_search, sleeps, start_ray

SETTINGS = ((1, 10.0, 24), (4, 10.0, 24), (16, 10.0, 48), (16, 60.0, 10), (64, 60.0, 10))
"""(slots, mean seconds of a trial, trials a slot). Two cores start 16 processes in a minute and 64
in seven, in which trials of ten seconds on 64 slots would be over."""


@dataclass(frozen=True)
class Usage:
    """One search.

    Attributes:
        slots: Faked GPUs.
        mean_seconds: Of a trial that nobody stops.
        trials: Their number.
        busy: Share of the slots' time in the window that trials slept.
        window_seconds: From every slot busy to the last suggestion.
        ramp_seconds: From the start of the search to the window.
        tail_seconds: From the last suggestion to the end.
        rung_gap_ms: Median and 95th percentile of the time between two sleeps of one trial.
        trial_gap_ms: The same between the last sleep of a trial and the first of the next in the
            same process.
        driver_ms: Processor time of the driver for a trial.
    """

    slots: int
    mean_seconds: float
    trials: int
    busy: float
    window_seconds: float
    ramp_seconds: float
    tail_seconds: float
    rung_gap_ms: tuple[float, float]
    trial_gap_ms: tuple[float, float]
    driver_ms: float


def measure(slots: int, mean_seconds: float, num_trials: int, searcher: str) -> Usage:
    """Run one search on so many faked GPUs."""
    start_ray(num_cpus=slots, num_gpus=slots)
    with tempfile.TemporaryDirectory(prefix="qpruner-utilisation-") as name:
        folder = Path(name)
        started, cpu = time.time(), time.process_time()
        outcome = run_search(
            folder, searcher, num_trials, slots, mean_seconds, {"cpu": 1.0, "gpu": 1.0}
        )
        ended, cpu = time.time(), time.process_time() - cpu
        slept = sleeps(folder / "diary")
    ray.shutdown()
    first, last = all_busy(slept, slots), max(trial.times[0] for trial in outcome.trials)
    if first >= last:
        raise SystemExit(
            f"the {slots} slots were not all busy before the last suggestion: "
            "give more trials a slot"
        )
    busy = sum(max(0.0, min(each.end, last) - max(each.start, first)) for each in slept)
    return Usage(
        slots=slots,
        mean_seconds=mean_seconds,
        trials=len(outcome.trials),
        busy=busy / (slots * (last - first)),
        window_seconds=last - first,
        ramp_seconds=first - started,
        tail_seconds=ended - last,
        rung_gap_ms=spread(
            [after.start - before.end for before, after in gaps(slept) if after.step > FIRST_RUNG]
        ),
        trial_gap_ms=spread(
            [after.start - before.end for before, after in gaps(slept) if after.step == FIRST_RUNG]
        ),
        driver_ms=1000 * cpu / len(outcome.trials),
    )


def all_busy(slept: Sequence[Slept], slots: int) -> float:
    """The first moment at which so many sleep at once."""
    asleep = 0
    for moment, change in sorted(
        [(each.start, 1) for each in slept] + [(each.end, -1) for each in slept]
    ):
        asleep += change
        if asleep == slots:
            return moment
    raise SystemExit(f"{slots} slots were never busy at once: give more trials a slot")


def gaps(slept: Sequence[Slept]) -> list[tuple[Slept, Slept]]:
    """Sleeps that follow each other in one process."""
    ordered = sorted(slept, key=lambda each: (each.process, each.start))
    return [
        (before, after) for before, after in pairwise(ordered) if before.process == after.process
    ]


def spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile, in milliseconds."""
    if len(seconds) < 2:
        return float("nan"), float("nan")
    return 1000 * statistics.median(seconds), 1000 * statistics.quantiles(seconds, n=20)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, help="one setting of your own instead of the table's")
    parser.add_argument("--seconds", type=float, default=10.0, help="mean length of a trial there")
    parser.add_argument("--trials-per-slot", type=int, default=12)
    parser.add_argument("--searcher", default="gp")
    options = parser.parse_args()
    settings = (
        ((options.slots, options.seconds, options.trials_per_slot),) if options.slots else SETTINGS
    )
    print(
        "slots  mean s  trials  busy   window s  ramp s  tail s  "
        "rung gap ms (95 %)  trial gap ms (95 %)  driver ms"
    )
    found = []
    for slots, seconds, trials_per_slot in settings:
        usage = measure(slots, seconds, max(24, trials_per_slot * slots), options.searcher)
        found.append(usage)
        rung, trial = (
            f"{median:.0f} ({high:.0f})" for median, high in (usage.rung_gap_ms, usage.trial_gap_ms)
        )
        print(
            f"{slots:5}  {seconds:6g}  {usage.trials:6}  {100 * usage.busy:4.1f}%  "
            f"{usage.window_seconds:8.0f}  {usage.ramp_seconds:6.1f}  {usage.tail_seconds:6.1f}  "
            f"{rung:>18}  {trial:>19}  {usage.driver_ms:9.1f}",
            flush=True,
        )
    print(json.dumps({"searcher": options.searcher, "rows": [asdict(usage) for usage in found]}))


if __name__ == "__main__":
    main()
