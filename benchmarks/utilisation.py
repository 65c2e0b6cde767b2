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

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from harness import command_line
from stand_in import Slept, run_search, sleeps, start_ray

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
        driver_ms: Processor time of the driver for a trial.
    """

    slots: int
    mean_seconds: float
    trials: int
    busy: float
    window_seconds: float
    ramp_seconds: float
    tail_seconds: float
    driver_ms: float


def measure(slots: int, mean_seconds: float, num_trials: int, searcher: str) -> Usage:
    """Run one search on so many faked GPUs."""
    start_ray(num_cpus=slots, num_gpus=slots)
    with tempfile.TemporaryDirectory(prefix="qpruner-utilisation-") as name:
        folder = Path(name)
        started = time.time()
        processor_started = time.process_time()
        outcome = run_search(
            folder, searcher, num_trials, slots, mean_seconds, {"cpu": 1.0, "gpu": 1.0}
        )
        ended = time.time()
        processor_seconds = time.process_time() - processor_started
        slept = sleeps(folder / "diary")
    ray.shutdown()
    first = all_busy(slept, slots)
    last = max(trial.times[0] for trial in outcome.trials)
    if first >= last:
        raise SystemExit(
            f"the {slots} slots were not all busy before the last suggestion: "
            "give more trials a slot"
        )
    busy = sum(max(0.0, min(sleep.end, last) - max(sleep.start, first)) for sleep in slept)
    return Usage(
        slots=slots,
        mean_seconds=mean_seconds,
        trials=len(outcome.trials),
        busy=busy / (slots * (last - first)),
        window_seconds=last - first,
        ramp_seconds=first - started,
        tail_seconds=ended - last,
        driver_ms=1000 * processor_seconds / len(outcome.trials),
    )


def all_busy(slept: Sequence[Slept], slots: int) -> float:
    """The first moment at which so many sleep at once."""
    asleep = 0
    changes = [(sleep.start, 1) for sleep in slept] + [(sleep.end, -1) for sleep in slept]
    for moment, change in sorted(changes):
        asleep += change
        if asleep == slots:
            return moment
    raise SystemExit(f"{slots} slots were never busy at once: give more trials a slot")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--slots", type=int, help="one setting of your own instead of the table's")
    parser.add_argument("--seconds", type=float, default=10.0, help="mean length of a trial there")
    parser.add_argument("--trials-per-slot", type=int, default=12)
    parser.add_argument("--searcher", default="gp")
    options = parser.parse_args()
    settings: Sequence[tuple[int, float, int]] = SETTINGS
    if options.slots:
        settings = [(options.slots, options.seconds, options.trials_per_slot)]
    print("slots  mean s  trials  busy   window s  ramp s  tail s  driver ms")
    usages = []
    for slots, seconds, trials_per_slot in settings:
        usage = measure(slots, seconds, max(24, trials_per_slot * slots), options.searcher)
        usages.append(usage)
        print(
            f"{slots:5}  {seconds:6g}  {usage.trials:6}  {100 * usage.busy:4.1f}%  "
            f"{usage.window_seconds:8.0f}  {usage.ramp_seconds:6.1f}  {usage.tail_seconds:6.1f}  "
            f"{usage.driver_ms:9.1f}",
            flush=True,
        )
    print(json.dumps({"searcher": options.searcher, "rows": [asdict(usage) for usage in usages]}))


if __name__ == "__main__":
    main()
