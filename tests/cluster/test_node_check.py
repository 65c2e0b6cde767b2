"""The check of nodes on a real cluster: nodes with other storage, another qpruner, or no answer."""

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import raw_config
from raylets import Raylets, joined_raylets, raylet_of

import qpruner
from qpruner.cluster.node_check import look_at_all
from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.pipeline.run import check
from qpruner.runs.events import TableMade

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Raylets]:
    """A cluster with one worker node.

    The working directory contains no qpruner, as workers import from it first.
    """
    monkeypatch.chdir(tmp_path)
    with joined_raylets(1) as found:
        yield found


def test_nodes_that_differ_are_named_with_the_difference(
    cluster: Raylets, tiny_model: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    other = tmp_path / "other"
    shared.mkdir()
    same = Path(qpruner.__file__).parent.parent
    shutil.copytree(
        same / "qpruner",
        other / "qpruner",
        ignore=shutil.ignore_patterns("__pycache__", "node_check.py"),
    )
    old = other / "peft-0.1.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    apart = f"mount -t tmpfs apart {shared}"
    read_only = f"mount --bind {shared} {shared}; mount -o remount,ro,bind {shared}"
    config = validate_config(raw_config(tiny_model, shared / "runs" / "mine"))
    events = []
    first, second = (
        cluster.add_apart(mounts, env_vars={"PYTHONPATH": str(code)}).node_id
        for mounts, code in ((apart, other), (read_only, same))
    )
    with pytest.raises(UserError) as caught:
        check(config, events.append, cluster.address)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "3 problems with the cluster's nodes:"
    versions, storage = (line for line in lines if first[:8] in line)
    assert "qpruner's code is " in versions
    assert "peft is 0.1.0 there and " in versions
    assert "torch" not in versions
    assert f"`output`: {config.output} is not shared with this node" in storage
    [storage] = (line for line in lines if second[:8] in line)
    assert f"`output`: {config.output} cannot be written there (Read-only file system)" in storage
    [table] = [event for event in events if isinstance(event, TableMade)]
    states = sorted(row[-1] for row in table.body)
    assert states == ["ok", "ok", "other versions, storage", "storage"]
    # The check leaves no files.
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("dies", [False, True])
def test_a_silent_node_is_a_problem_and_a_dead_one_has_left(
    dies: bool, cluster: Raylets, tmp_path: Path
) -> None:
    """A stopped raylet accepts connections but does not answer."""
    (tmp_path / "driver").write_text("driver")
    node = cluster.nodes[0]
    raylet = raylet_of(node)
    reports = []
    seconds = 120.0 if dies else 4.0
    looking = threading.Thread(
        target=lambda: reports.extend(look_at_all(tmp_path, "driver", seconds))
    )
    raylet.send_signal(signal.SIGSTOP)
    try:
        looking.start()
        # Once another node has answered, every node was asked.
        while (
            dies
            and looking.is_alive()
            and not any(path.name != "driver" for path in tmp_path.iterdir())
        ):
            time.sleep(0.1)
        if dies:
            cluster.kill(node)
        looking.join()
    finally:
        if not dies:
            raylet.send_signal(signal.SIGCONT)
    [report] = [report for report in reports if report.id == node.node_id]
    assert report.has_left == dies
    assert ("no answer in 4 s" in report.problems["no answer"]) != dies
