"""A node that joins during a run and differs from the driver's: a second raylet with its own code,
packages or mounts.

No work is done there, no trial counts as failed, and the error names the node.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_has
from made_searches import job_of
from raylets import Raylets, joined_raylets

import qpruner
from qpruner.cluster.node_check import packed_check, versions
from qpruner.cluster.tasks import run_tasks
from qpruner.cluster.tune import search
from qpruner.errors import NodeDiffers
from qpruner.runs.events import Event, Message
from qpruner.runs.records import RungResult
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import Progress, Report, Trial, TrialJob, read_trials

pytestmark = pytest.mark.slow
CPU = {"cpu": 1.0}
HELD = {"cpu": 1.0, "gpu": 1.0}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Raylets]:
    """A head and one node, joined by this process from a folder without qpruner: workers import
    from there first."""
    monkeypatch.chdir(tmp_path)
    with joined_raylets(1, num_gpus=1) as found:
        found.in_a_thread()
        yield found


def with_another_qpruner(cluster: Raylets, folder: Path) -> Any:
    """Add a node whose qpruner lacks a package."""
    same = Path(qpruner.__file__).parent
    other = folder / "other" / "qpruner"
    shutil.copytree(same, other, ignore=shutil.ignore_patterns("__pycache__", "cluster"))
    return cluster.add(
        num_gpus=1, env_vars={"PYTHONPATH": os.pathsep.join([str(other.parent), *sys.path])}
    )


def with_a_folder_of_its_own(cluster: Raylets, folder: Path) -> Any:
    """Add a node with another file system at the path of the run."""
    return cluster.add_apart(f"mount -t tmpfs apart {folder / 'run'}", num_gpus=1)


CARD = """
mount -t tmpfs devices /sys/bus/pci/devices
mkdir /sys/bus/pci/devices/0000:09:00.0; cd /sys/bus/pci/devices/0000:09:00.0
echo 0x10de > vendor; echo 0x030200 > class
"""
"""A GPU, as Linux lists one that has no driver."""


def with_a_gpu_that_torch_does_not_see(cluster: Raylets, folder: Path) -> Any:
    """Add a node that has a card; on others the check accepts GPUs that do not exist."""
    return cluster.add_apart(CARD, num_gpus=1)


def standing_in(run: Path) -> Trial:
    """A trial that leaves a file when it begins, and ends once the file `go` is there."""

    def trial(job: TrialJob, start: Path | None, report: Report, progress: Progress) -> None:
        (run / f"began-{time.monotonic_ns()}").touch()
        deadline = time.monotonic() + 120
        while not (run / "go").exists():
            assert time.monotonic() < deadline, "nobody says go"
            time.sleep(0.05)
        (checkpoint := run / f"made-{time.monotonic_ns()}").mkdir()
        report(RungResult(step=job.config.search.steps, loss=3.0), checkpoint)

    return trial


Work = Callable[[dict[str, float], bytes, Path], int]
"""Returns 1 from a process of the cluster with these resources that has passed the check."""


def as_task(resources: dict[str, float], check_node: bytes, scratch: Path) -> int:
    [(_, found)] = run_tasks(lambda job: job, [1], resources, 1, True, check_node)
    return found


def in_group(resources: dict[str, float], check_node: bytes, scratch: Path) -> int:
    from qpruner.cluster.group import run_groups

    [(_, found)] = run_groups(lambda job: job, [1], resources, 1, 1, scratch, check_node)
    return found


EVERY: tuple[Work, ...] = (as_task, in_group)


@pytest.mark.parametrize(
    ("join", "what", "works", "held"),
    [
        (with_another_qpruner, r"qpruner's code is \w+ there and \w+ here", EVERY, CPU),
        (with_a_folder_of_its_own, "`output`: {run} is not shared", EVERY, CPU),
        # Work there would run on the CPU for days. A group needs no check: its processes could not
        # connect.
        (
            with_a_gpu_that_torch_does_not_see,
            "a GPU is reserved for work there, but torch",
            (as_task,),
            HELD,
        ),
    ],
)
def test_no_work_is_done_on_a_node_that_joins_late_and_differs(
    join: Callable[[Raylets, Path], Any],
    what: str,
    works: tuple[Work, ...],
    held: dict[str, float],
    cluster: Raylets,
    tmp_path: Path,
) -> None:
    check = packed_check(versions(), RunDir(tmp_path / "run"))
    assert {begun(held, check, tmp_path / "train") for begun in works} == {1}
    late = join(cluster, tmp_path)
    cluster.kill_machine(cluster.nodes[0])
    for begun in works:
        with pytest.raises(
            NodeDiffers, match=rf"{late.node_id[:8]}\): {what.format(run=tmp_path / 'run')}"
        ) as caught:
            begun(held, check, tmp_path / "train")
        assert "repeat the command" in str(caught.value)


def test_a_late_node_that_differs_is_named_and_not_retried(
    cluster: Raylets, tmp_path: Path
) -> None:
    job = job_of(tmp_path, max_trials=2, searcher="random")
    check = packed_check(versions(), RunDir(tmp_path / "run"))
    run = tmp_path / "run"
    late = []
    job = replace(
        job, trials=run / "trials", trial=standing_in(run), resources=HELD, check_node=check
    )

    def join_once_the_first_has_begun() -> None:
        while not list(run.glob("began-*")):
            time.sleep(0.1)
        late.append(with_a_folder_of_its_own(cluster, tmp_path))

    def tell(event: Event) -> None:
        if isinstance(event, Message) and "stop at the next rung" in event.text:
            (run / "go").touch()

    joining = threading.Thread(target=join_once_the_first_has_begun, daemon=True)
    joining.start()
    with pytest.raises(NodeDiffers) as caught:
        search(job, lambda held: 2, tell)
    joining.join()
    assert f"`output`: {run} is not shared with this node" in caught.value.cause
    assert f"{late[0].node_id[:8]})" in caught.value.cause
    assert "repeat the command" in str(caught.value)
    first, second = read_trials(job.trials)
    assert first.status == "finished"
    assert_has(second, status="running", kills=0, failure=None, worker=None)

    cluster.kill_machine(late[0])
    outcome = search(job, lambda held: 1, tell)
    assert [(trial.status, trial.kills) for trial in outcome.trials] == [("finished", 0)] * 2
