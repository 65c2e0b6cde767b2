"""Nodes of a real cluster that differ: their own storage, another qpruner, a small disk, or no answer at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import raw_config
from raylets import Raylets, raylets

import qpruner
from qpruner.cluster.connect import connect, disconnect
from qpruner.cluster.node_check import NodeReport, look_at_all
from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.pipeline.run import check
from qpruner.runs.events import Event, TableMade
from qpruner.runs.run_dir import BANK_CACHE

pytestmark = pytest.mark.slow
CLONE_NEWNS = 0x20000


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Raylets]:
    """A head and one node; this process has joined them from a folder without qpruner, which workers search first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(BANK_CACHE, str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    with raylets(1) as found:
        connect(found.address)
        yield found
        disconnect()


def machine(cluster: Raylets, mounts: str, code: Path) -> str:
    """Add a node with mounts and a qpruner of its own; returns its id."""
    libc = ctypes.CDLL(None, use_errno=True)

    def start() -> Any:
        # Mounts belong to a thread, and to what it starts.
        if libc.unshare(CLONE_NEWNS):
            pytest.skip(f"mounting is not permitted here: {os.strerror(ctypes.get_errno())}")
        subprocess.run(["bash", "-ec", f"mount --make-rprivate /; {mounts}"], check=True)
        cluster.cluster._shutdown_at_exit = False  # by a handler of signals, which only the main thread may set
        return cluster.add(env_vars={"PYTHONPATH": str(code)})

    with ThreadPoolExecutor(1) as thread:
        node_id: str = thread.submit(start).result().node_id
    return node_id


def test_nodes_that_differ_are_named_with_what_differs(cluster: Raylets, tiny_model: Path, tmp_path: Path) -> None:
    shared, cache = tmp_path / "shared", tmp_path / "cache"
    shared.mkdir()
    same = Path(qpruner.__file__).parent.parent
    other = tmp_path / "other"
    without = shutil.ignore_patterns("__pycache__", "node_check.py")
    shutil.copytree(same / "qpruner", other / "qpruner", ignore=without)
    old = other / "peft-0.1.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    apart = f"mount -t tmpfs apart {shared}; mount -t tmpfs -o size=16k small {cache}"
    read_only = f"mount --bind {shared} {shared}; mount -o remount,ro,bind {shared}"
    config = validate_config(raw_config(tiny_model, shared / "runs" / "mine"))
    events: list[Event] = []
    first, second = machine(cluster, apart, other), machine(cluster, read_only, same)
    with pytest.raises(UserError) as caught:
        check(config, events.append, cluster.address)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "4 problems with the cluster's nodes:"
    of_first = [line for line in lines if first[:8] in line]
    of_second = [line for line in lines if second[:8] in line]
    assert len(of_first) == 3 and len(of_second) == 1
    versions, storage, disk = of_first
    assert "qpruner's code is " in versions and "peft is 0.1.0 there and " in versions and "torch" not in versions
    assert f"`output`: {config.output} is not shared with it" in storage
    assert f"in {cache}, where 0.000 GiB can be written" in disk
    assert f"`output`: {config.output} cannot be written there (Read-only file system)" in of_second[0]
    (table,) = [event for event in events if isinstance(event, TableMade)]
    states = {row[0]: row[-1] for row in table.body}
    assert sorted(states.values()) == ["ok", "ok", "other versions, storage, disk", "storage"]
    assert list(shared.iterdir()) == [], "nothing is left of the look"


def test_a_silent_node_is_named_in_time(cluster: Raylets, tmp_path: Path) -> None:
    """A stopped raylet takes connections and answers nothing."""
    node = cluster.nodes[0]
    (tmp_path / "driver").write_text("driver")
    raylet = node.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    try:
        reports = look_at_all(tmp_path, "driver", {}, seconds=4.0)
    finally:
        os.kill(raylet, signal.SIGCONT)
    (silent,) = [report for report in reports if report.id == node.node_id]
    assert "no answer in 4 s" in silent.problems["no answer"] and not silent.has_left


def test_a_node_that_dies_while_it_is_looked_at_has_left(cluster: Raylets, tmp_path: Path) -> None:
    node = cluster.nodes[0]
    (tmp_path / "driver").write_text("driver")
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGSTOP)
    reports: list[NodeReport] = []
    looking = threading.Thread(target=lambda: reports.extend(look_at_all(tmp_path, "driver", {})))
    looking.start()
    # The others' answers: every node has been asked.
    while looking.is_alive() and not any(path.name != "driver" for path in tmp_path.iterdir()):
        time.sleep(0.1)
    cluster.kill(node)
    looking.join()
    (left,) = [report for report in reports if report.id == node.node_id]
    assert left.has_left
