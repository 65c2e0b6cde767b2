"""Problems of a node, found in its report without Ray."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import raw_config, with_key
from plain_transformers import run_python

from qpruner.cluster.node_check import NodeReport, _gpus, differences, versions
from qpruner.cluster.slots import Node, Slots
from qpruner.config.load import validate_config
from qpruner.pipeline.context import Context
from qpruner.pipeline.nodes import row, troubles

GIB = 1024**3
L40S = ("NVIDIA L40S", 45 * GIB, (8, 9))
M60 = ("Tesla M60", 8 * GIB, (5, 2))
P40 = ("P40", GIB, (6, 1))
RUN = Path("/shared/runs/mine")
FINE = NodeReport("ab" * 28, "10.0.0.5 (worker, abababab)", Node(8, 2), {}, (L40S, L40S))


def found(
    report: NodeReport, bits: tuple[int, ...] = (4, 8), gpu: float = 1.0, unseen: bool = False
) -> dict[str, str]:
    config = validate_config(with_key(raw_config(Path("model"), RUN), "quantize.bits", list(bits)))
    return troubles(report, config, {"cpu": 1.0, "gpu": gpu} if gpu else {"cpu": 1.0}, RUN, unseen)


def test_a_node_that_can_do_the_run_is_ok() -> None:
    assert found(FINE) == {}
    assert row(FINE, {}) == ("10.0.0.5 (worker, abababab)", "8", "2 x NVIDIA L40S, 45.0 GiB", "ok")


@pytest.mark.parametrize(
    ("fields", "unseen", "word", "part"),
    [
        (
            {"problems": {"storage": "cannot be written there"}},
            False,
            "storage",
            f"`output`: {RUN} cannot be written",
        ),
        (
            {},
            True,
            "storage",
            "file that the node wrote; `output` must be in a folder that every node",
        ),
        ({"problems": {"GPUs": "torch sees 1"}}, False, "GPUs", "torch sees 1"),
        ({"gpus": (L40S, M60)}, False, "GPUs", "capability 5.2 cannot run nf4: it needs a GPU"),
        ({"problems": {"no answer": "in 60 s"}, "gpus": ()}, True, "no answer", "in 60 s"),
    ],
)
def test_a_problem_is_named_with_its_remedy(
    fields: dict[str, Any], unseen: bool, word: str, part: str
) -> None:
    report = replace(FINE, **fields)
    told = found(report, unseen=unseen)
    assert list(told) == [word]
    assert part in told[word]
    assert row(report, told)[-1] == word


def test_a_node_that_left_has_no_problems() -> None:
    left = replace(FINE, problems={"no answer": "gone"}, has_left=True)
    assert found(left, unseen=True) == {}
    assert row(left, {})[-1] == "left the cluster"


def test_older_gpus_run_what_they_can() -> None:
    assert found(replace(FINE, gpus=(P40,))) == {}
    assert found(replace(FINE, gpus=(M60,)), bits=(8, 16)) == {}


def test_a_node_that_no_trial_fits_on_needs_no_gpus() -> None:
    """The head of a cluster of GPUs may have none."""
    assert found(replace(FINE, size=Node(4, 0), problems={"GPUs": "none"}, gpus=())) == {}


# ---- what a node finds out


def test_versions_that_differ_are_named() -> None:
    own = versions()
    assert differences(own) == differences({}) == ""
    assert differences(own | {"torch": "0.1"}) == f"torch is {own['torch']} there and 0.1 here"


def test_gpus_declared_to_ray_need_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU driver Ray finds no GPUs itself, so these GPUs were declared by hand."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for has_hardware, trouble in (
        (False, ""),
        (True, "Ray counts 2 GPUs, torch sees 0; install a torch"),
    ):
        monkeypatch.setattr(
            "qpruner.cluster.node_check._has_hardware", lambda has=has_hardware: has
        )
        seen, told = _gpus(2)
        assert seen == []
        assert told.startswith(trouble)
        assert bool(told) == has_hardware


@pytest.mark.gpu
def test_gpus_that_ray_hides_are_seen() -> None:
    """A process that reserves no GPU sees all GPUs of its node."""
    code = "import json; from qpruner.cluster.node_check import _gpus; print(json.dumps(_gpus(1)))"
    seen, told = json.loads(run_python(code, CUDA_VISIBLE_DEVICES="").splitlines()[-1])
    assert len(seen) == torch.cuda.device_count() > 0
    assert told == ""


@pytest.mark.parametrize(
    ("limit", "num_workers", "expected"),
    [(None, 1, 6), (3, 1, 3), (1, 1, 1), (None, 2, 4), (5, 2, 2), (1, 2, 1)],
)
def test_no_stage_runs_more_jobs_at_once_than_asked(
    limit: int | None, num_workers: int, expected: int, changed: Callable[[str, Any], Context]
) -> None:
    """Six jobs run on eight GPUs.

    Troubleshooting advises a smaller number where memory is short.
    """
    context = changed("search.max_concurrent", limit)
    eight = Slots((Node(64, 8),))
    context.machines.__dict__["cluster"] = SimpleNamespace(slots=lambda: eight)
    context.machines.__dict__["trial_resources"] = {"cpu": 1.0, "gpu": 1.0}
    assert context.machines.task_resources(6, num_workers)[1] == expected
