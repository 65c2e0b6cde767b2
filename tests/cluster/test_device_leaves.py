"""A search on two machines with one GPU each, of which the good one leaves."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import texts
from made_searches import job_of
from raylets import raylets
from test_placement import breakdown, recording_trial

from qpruner.cluster.connect import connect, disconnect
from qpruner.cluster.slots import Room
from qpruner.cluster.tune import search
from qpruner.errors import StageError
from qpruner.runs.events import Event
from qpruner.search.trial_records import Progress, Report, TrialJob, read_trials


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "trouble"),
    [
        ("is tried on another device", "trials in a row failed"),
        ("no more trials", "no other device is left than GPU 0 of 127.0.0.1"),
    ],
)
def test_if_the_other_machine_leaves_the_search_ends(
    told: str, trouble: str, tmp_path: Path
) -> None:
    """It leaves after the first failure, or once the GPU that fails was left out.

    A GPU that may be at fault is tried again; one that was left out is not.
    """
    with raylets(0) as cluster:
        bad = cluster.add(num_cpus=2, num_gpus=1)
        joined = connect(cluster.address)
        good = cluster.add(num_cpus=2, num_gpus=1)
        intact = recording_trial(tmp_path, 0)
        fail = breakdown()
        of_bad = bad.node_id

        def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
            import ray

            if ray.get_runtime_context().get_node_id() == of_bad:
                fail(job)
            time.sleep(8.0)
            intact(job, start, report, progress)

        def emit(event: Event) -> None:
            if good in cluster.nodes and any(told in text for text in texts([event])):
                cluster.kill_machine(good)

        job = job_of(tmp_path, searcher="random", first_rung=4, max_trials=8)
        job = replace(job, trial=trial, resources={"cpu": 1.0, "gpu": 1.0})
        try:
            with pytest.raises(StageError) as caught:
                search(job, Room(joined.slots, job.resources, None, emit), emit)
        finally:
            disconnect()
        assert trouble in caught.value.cause
        assert {trial.failure for trial in read_trials(job.trials)} <= {None, "machine"}
