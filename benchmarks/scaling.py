"""Measure what the orchestrator costs, by a real search and by 2,000 trials that do nothing.

    .venv/bin/qpruner sensitivity tune_configs/demo_smollm2_cpu.yaml
    .venv/bin/python benchmarks/scaling.py runs/demo --config tune_configs/demo_smollm2_cpu.yaml

The real search has the same plans on one raylet and on two of one core each, and no ASHA; beside it
the same trials in one bare process and in two, which is the speed-up that this machine has to give.
Both are timed from the start of their processes to the end of their last trial, in turns. The 2,000
trials have the random searcher, two slots and no length: the driver's processor time and memory a
trial, and the seconds in which a new process takes the search up again, are the orchestrator's own.
Prints a table and a JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import command_line, run_for_record

from qpruner.config.load import load_config
from qpruner.config.schema import RunConfig

NUM_PLANS = 8
NUM_EMPTY = 2000
NUM_SIZES = 20


def fixed(config: RunConfig, output: Path) -> RunConfig:
    """The configuration of a search whose plans are the same on any number of workers, with no
    trial stopped."""
    update = {
        "searcher": "random",
        "max_trials": NUM_PLANS,
        "first_rung": config.search.steps,
        "confirm": 1,
    }
    return config.model_copy(
        update={"output": str(output), "search": config.search.model_copy(update=update)}
    )


Plans = list[tuple[dict[str, str], str]]
"""Plans with their cuts."""


def search_seconds(
    config: RunConfig, run: Path, num_raylets: int, work: Path
) -> tuple[float, Path, Plans]:
    """Run a search; return its seconds, its run folder, and the plans.

    The seconds include the start of Tune and of its workers.
    """
    from ray.cluster_utils import Cluster

    from qpruner.search.trial_records import read_trials

    output = work / f"search-{num_raylets}-{time.time_ns()}"
    shutil.copytree(
        run,
        output,
        copy_function=os.link,
        ignore=shutil.ignore_patterns("trials", "tune", "search*"),
    )
    (output / "records" / "search.json").unlink(missing_ok=True)
    head = {"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_raylets):
            cluster.add_node(num_cpus=1)
        settings = work / f"{output.name}.yaml"
        settings.write_text(json.dumps(fixed(config, output).model_dump(mode="json")))
        # A process of its own, as a user's.
        command = [sys.executable, "-m", "qpruner", "search", str(settings), "--quiet", "--address"]
        # Else Ray takes 127.0.0.1 for the address on the way to the internet, where this head does
        # not listen.
        environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        subprocess.run([*command, cluster.address], check=True, env=environment)
    finally:
        cluster.shutdown()
    trials = read_trials(next(path for path in (output / "trials").iterdir() if path.is_dir()))
    assert len(trials) == NUM_PLANS and all(trial.status == "finished" for trial in trials)
    seconds = json.loads((output / "records" / "search.json").read_text())["search_seconds"]
    return seconds, output, [(trial.plan, trial.cut) for trial in trials]


BARE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qpruner.config.load import validate_config
from qpruner.pipeline.places import Places
from qpruner.runs.records import PrepareRecord, PruneRecord, Results
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial import run_trial
from qpruner.search.trial_records import Materials, TrialJob
run, config, plans = Path(sys.argv[1]), validate_config(json.loads(sys.argv[2])), \
json.loads(sys.argv[3])
folder = RunDir(str(run))
prepared, pruned = folder.read_record("prepare", PrepareRecord), \
folder.read_record("prune", PruneRecord)
places = Places(config, folder, Results(prepare=prepared, prune=pruned))
banks = {cut: places.bank_of(cut) for cut in pruned.cuts}
for plan, cut in plans:
    job = TrialJob(config, Materials(banks, run / "prepare" / "data"), plan, cut)
    run_trial(job, None, lambda result, checkpoint: None)
"""


def bare_seconds(config: RunConfig, run: Path, plans: Plans, num_processes: int) -> float:
    """Seconds that so many processes take for the trials, without Ray and without us."""
    settings = json.dumps(fixed(config, run).model_dump(mode="json"))
    command = [sys.executable, "-c", BARE, str(run), settings]
    started = time.monotonic()
    processes = [
        subprocess.Popen([*command, json.dumps(plans[start::num_processes])])
        for start in range(num_processes)
    ]
    codes = [process.wait() for process in processes]
    assert codes == [0] * num_processes
    return time.monotonic() - started


def empty_trials(folder: Path, num_trials: int) -> dict[str, float | None]:
    """The cost of trials that do nothing, in this process."""
    import ray
    from stand_in import run_search, start_ray

    from qpruner.runs.events import Event, Progress

    start_ray(num_cpus=2)
    sizes: list[tuple[int, int]] = []
    every = max(1, num_trials // NUM_SIZES)
    first: list[float] = []
    began = time.monotonic()

    def listen(event: Event) -> None:
        first[:] = first or [time.monotonic() - began]
        if isinstance(event, Progress) and event.done % every == 0:
            sizes.append((event.done, resident_bytes()))

    cpu = time.process_time()
    run_search(folder, "random", num_trials, 2, 0.0, {"cpu": 1.0}, listen)
    seconds = time.monotonic() - began
    cpu = time.process_time() - cpu
    ray.shutdown()
    # The first tenth fills pools and caches that do not grow with trials.
    later = [(done, size) for done, size in sizes if done >= num_trials // 10]
    slope = float(np.polyfit(*zip(*later, strict=True), 1)[0]) if len(later) > 2 else None
    return {
        "trials": num_trials,
        "seconds": seconds,
        "driver_cpu_ms_per_trial": 1000 * cpu / num_trials,
        "driver_bytes_per_trial": slope,
        "first_event_seconds": first[0],
    }


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def speed_up(options: argparse.Namespace, work: Path) -> dict[str, object]:
    """Compare two raylets with one, beside two bare processes with one."""
    config = load_config(options.config, options.overrides)
    searches: list[float] = []
    bares: list[float] = []
    for _ in range(options.repeats):
        one, run, plans = search_seconds(config, options.run, 1, work)
        two, _, _ = search_seconds(config, options.run, 2, work)
        alone = bare_seconds(config, run, plans, 1)
        both = bare_seconds(config, run, plans, 2)
        searches.append(one / two)
        bares.append(alone / both)
        print(
            f"search {one:.1f} s on one raylet, {two:.1f} s on two: {searches[-1]:.2f}x; "
            f"bare {alone:.1f} s in one process, {both:.1f} s in two: {bares[-1]:.2f}x",
            flush=True,
        )
    shares = [search / bare for search, bare in zip(searches, bares, strict=True)]
    return {"search": searches, "bare": bares, "share": statistics.median(shares)}


def main() -> None:
    parser = command_line(__doc__, overrides=True)
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="a run up to `sensitivity`; left out, only the empty trials",
    )
    parser.add_argument("--config", type=Path, help="the run's configuration file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--empty", type=int, default=NUM_EMPTY, help="trials that do nothing")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resume:
        print(json.dumps(empty_trials(options.resume, options.empty)))
        return
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(
        prefix="qpruner-scaling-", dir=options.run and options.run.parent
    ) as name:
        work = Path(name)
        if options.run:
            figures["speed_up"] = speed_up(options, work)
        child = [sys.executable, __file__, "--resume", str(work / "empty"), "--empty"]
        for title, number in (("begun", options.empty), ("taken up", options.empty + 2)):
            figures[title] = run_for_record([*child, str(number)])
            print(f"{title}: {json.dumps(figures[title])}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
