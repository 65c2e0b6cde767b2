"""What is wrong with a node, from what it said: plain data, no Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import raw_config, with_key

from qpruner.cluster.probe import Cache, Gpu, NodeFacts, Report
from qpruner.cluster.slots import Node
from qpruner.config.load import validate_config
from qpruner.pipeline.nodes import Needs, row, troubles
from qpruner.plans.plan import Group, Layout, LinearShape
from qpruner.runs.run_dir import BANK_CACHE
from qpruner.runs.storage import bucket as objects

GIB = 1024**3
GROUPS = tuple(Group(f"layers.{index}", (LinearShape(f"layers.{index}", 4096, 4096),)) for index in range(32))
LAYOUT = Layout(GROUPS, 1000, 10**7, 2, double_quant=False, num_parameters=10**9)
OWN = {"python": "3.11", "qpruner's code": "0a1b2c3d", "torch": "2.13.0", "bitsandbytes": "0.50.2"}
L40S, V100, P40 = Gpu("NVIDIA L40S", 45 * GIB, (8, 9)), Gpu("Tesla V100", 16 * GIB, (7, 0)), Gpu("P40", GIB, (6, 1))
CACHE = Cache(BANK_CACHE, "/tmp/qpruner-bank-0", disk=1, is_writable=True, free_bytes=100 * GIB, held_bytes=0)
SMALL = replace(CACHE, free_bytes=GIB // 2)
TWO_GPUS = Node(8, 2)
FACTS = NodeFacts(
    versions=OWN,
    storage="",
    caches=(CACHE,),
    has_hardware=True,
    gpus=(L40S, L40S),
    gpu_trouble="",
)


def report(size: Node = TWO_GPUS, **facts: Any) -> Report:
    return Report("ab" * 28, "10.0.0.5 (worker, abababab)", size, replace(FACTS, **facts))


def needs(bits: tuple[int, ...] = (4, 8), gpu: float = 1.0) -> Needs:
    raw = with_key(raw_config(Path("model"), Path("/shared/runs/mine")), "quantize.bits", list(bits))
    resources = {"cpu": 1.0, "gpu": gpu} if gpu else {"cpu": 1.0}
    return Needs(validate_config(raw), LAYOUT, resources, Path("/shared/runs/mine"), OWN)


def test_a_node_that_can_do_the_run_is_ok() -> None:
    assert troubles(report(), needs(), is_unseen=False) == {}
    expected = ("10.0.0.5 (worker, abababab)", "8", "2 x NVIDIA L40S, 45.0 GiB", "100.0 GiB", "same", "ok")
    assert row(report(), needs(), {}) == expected


@pytest.mark.parametrize(
    ("facts", "word", "parts"),
    [
        pytest.param(
            {"versions": OWN | {"torch": "2.12.0", "qpruner's code": "ffffffff"}},
            "other versions",
            ("torch is 2.12.0 there and 2.13.0 here", "code is ffffffff there and 0a1b2c3d here", "the same on every"),
            id="versions",
        ),
        pytest.param(
            {"versions": OWN | {"bitsandbytes": "not installed"}},
            "other versions",
            ("bitsandbytes is not installed there and 0.50.2 here",),
            id="missing",
        ),
        pytest.param(
            {"storage": "cannot be written there (Read-only file system)"},
            "storage",
            ("`output`: /shared/runs/mine cannot be written there (Read-only file system)", "every node"),
            id="storage",
        ),
        pytest.param({"caches": (SMALL,)}, "disk", ("takes 819.6 MiB", "512.0 MiB are free"), id="disk"),
        pytest.param(
            {"caches": (replace(CACHE, is_writable=False),)},
            "disk",
            ("/tmp/qpruner-bank-0, which cannot be",),
            id="read-only",
        ),
        pytest.param({"gpus": (L40S,)}, "GPUs", ("Ray counts 2 GPUs, torch sees 1",), id="fewer"),
        pytest.param({"gpus": ()}, "GPUs", ("Ray counts 2 GPUs, torch sees 0",), id="torch-for-cpus"),
        pytest.param(
            {"gpus": (L40S, V100)},
            "GPUs",
            ("Tesla V100", "compute capability 7.0 cannot run 8-bit layers, which need 7.5", "leave 8 out"),
            id="old",
        ),
        pytest.param({"gpu_trouble": "no library for"}, "GPUs", ("cannot be used: no library",), id="library"),
    ],
)
def test_what_is_wrong_is_told_with_the_remedy(facts: dict[str, Any], word: str, parts: tuple[str, ...]) -> None:
    found = troubles(report(**facts), needs(), is_unseen=False)
    assert list(found) == [word]
    assert [part for part in parts if part not in found[word]] == [], found[word]
    assert row(report(**facts), needs(), found)[-1] == word


def test_a_silent_node_is_named_and_one_that_left_is_not_missed() -> None:
    silent = replace(report(), facts=None, silence="no answer in 60 s")
    found = troubles(silent, needs(), is_unseen=True)
    assert found["no answer"].startswith("it could not be looked at: no answer in 60 s; see Ray's log there")
    assert row(silent, needs(), found)[1:] == ("8", "2", "", "", "no answer")
    left = replace(silent, has_left=True)
    assert troubles(left, needs(), is_unseen=True) == {}
    assert row(left, needs(), {})[-1] == "left the cluster"


def test_what_a_node_wrote_must_be_seen_by_the_driver() -> None:
    assert "what it wrote is not here" in troubles(report(), needs(), is_unseen=True)["storage"]


def test_older_gpus_run_what_they_can() -> None:
    assert troubles(report(gpus=(V100, P40)), needs(bits=(4, 16)), is_unseen=False) == {}


def test_a_node_that_no_trial_fits_on_needs_neither_disk_nor_gpus() -> None:
    """The head of a cluster of GPUs."""
    facts = {"gpus": (), "has_hardware": False, "caches": (SMALL,)}
    assert troubles(report(Node(4, 0), **facts), needs(), is_unseen=False) == {}
    assert list(troubles(report(Node(4, 0), **facts), needs(gpu=0), is_unseen=False)) == ["disk"]


def test_gpus_that_somebody_told_ray_of_are_not_looked_for_in_vain() -> None:
    """Ray counts none by itself where there is no driver."""
    declared = report(gpus=(), has_hardware=False)
    assert troubles(declared, needs(), is_unseen=False) == {}
    assert row(declared, needs(), {})[2] == "2, none seen by torch"


def test_what_is_there_of_this_run_is_not_asked_for_again() -> None:
    held = report(caches=(replace(SMALL, held_bytes=GIB // 2),))
    assert troubles(held, needs(), is_unseen=False) == {}


def test_of_a_run_at_a_uri_the_pruned_model_needs_room_beside_the_bank() -> None:
    """1.9 GiB and 0.8 GiB."""
    bank = replace(CACHE, free_bytes=5 * GIB // 2)
    model = replace(bank, variable=objects.CACHE, folder="/root/.cache/qpruner")
    found = troubles(report(caches=(bank, model)), needs(), is_unseen=False)
    assert "of the pruned model takes 1.9 GiB in /root/.cache/qpruner, where 1.7 GiB are free" in found["disk"]
    assert f"another folder by {objects.CACHE} " in found["disk"]
    assert troubles(report(caches=(bank, replace(model, disk=2))), needs(), is_unseen=False) == {}
