"""`run.json` describes the latest command that started a stage; other commands leave it alone."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import events_of, ignore, raw_config, with_key

from qpruner.config.load import validate_config
from qpruner.errors import StageError, UserError
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import run_stage
from qpruner.pipeline.preflight import inspect
from qpruner.pipeline.prepare import Prepare
from qpruner.pipeline.run import PACKAGES, _cpu_model, _environment, run
from qpruner.runs.events import Event, Message, Progress, StageFinished, StageSkipped
from qpruner.runs.lock import NAME, this_process
from qpruner.runs.records import PrepareRecord
from qpruner.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that has finished the prepare stage."""
    root = tmp_path_factory.mktemp("prepared") / "run"
    run(validate_config(raw_config(tiny_model, root)), ignore, until="prepare")
    return root


@pytest.fixture
def raw(prepared: Path, tiny_raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose run folder has finished the prepare stage."""
    shutil.copytree(prepared, tiny_raw["output"])
    return tiny_raw


def test_progress_of_long_steps_counts_up_once(sensed: tuple[dict[str, Any], list[Event]]) -> None:
    _, events = sensed
    steps: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for event in events:
        if isinstance(event, Progress):
            # The detail is the name of a group.
            work = "groups" if event.stage == "bank" else event.detail
            steps.setdefault((event.stage, work), []).append((event.done, event.total))
    for work, counts in steps.items():
        (_, total), *_ = counts
        assert counts[-1] == (total, total)
        # By the passes of two kinds of methods.
        is_repeated = work == ("sensitivity", "loading weights")
        assert is_repeated or counts == sorted(set(counts)), work
    assert len(steps["prune", "loading weights"]) > 10
    assert len([work for stage, work in steps if stage == "sensitivity"]) == 4
    assert steps["sensitivity", "mutual_information by group"][-1] == (8, 8)
    assert steps["bank", "groups"][-1] == (8, 8)
    (ended,) = events_of(events, StageFinished, "sensitivity")
    assert ended.figures.startswith("9 groups, ")
    assert "mutual_information" in ended.figures


def test_a_command_up_to_a_stage_leaves_a_report(raw: dict[str, Any], prepared: Path) -> None:
    """The report describes this command, not an older one, and a command that starts no stage keeps
    it."""
    root = Path(raw["output"])
    said = list[Event]()
    page = root / "report.html"
    told = root / "run.json"
    assert "Ended after stage prepare, as asked." in page.read_text()
    run(validate_config(raw), said.append, until="prune")
    assert said[-1] == Message("report", f"{page} has the run so far")
    assert "Ended after stage prune, as asked." in page.read_text()
    assert (
        json.loads((root / "results.json").read_text())["standing"]
        == "Ended after stage prune, as asked."
    )

    before = told.read_bytes()
    written = page.read_text()
    run(validate_config(raw), ignore, until="prepare")
    assert told.read_bytes() == before
    assert page.read_text() == written, "one that does nothing leaves what tells more"

    def interrupt(event: Event) -> None:
        if isinstance(event, StageSkipped):  # Ctrl-C while records are compared
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(validate_config(raw), interrupt, until="bank")
    assert told.read_bytes() == before
    assert page.read_text() == written
    refused = with_key(raw, "search.resources_per_trial", {"gpu": 999})
    with pytest.raises(UserError, match="ask for less"):
        run(validate_config(refused), ignore, until="search")
    assert told.read_bytes() == before
    assert page.read_text() == written, "nor is a run that stands there called failed"

    page.unlink()
    (root / "results.json").unlink()
    (root / "results.json").mkdir()  # as good as a file that cannot be written
    run(validate_config(raw), said.append, until="prepare")
    assert isinstance(said[-1], Message)
    assert said[-1].text.startswith("warning: no report of the run so far could be ")


def test_the_state_of_another_driver_is_kept(tiny_raw: dict[str, Any]) -> None:
    """Otherwise `status` would call a running or finished run interrupted."""
    root = Path(tiny_raw["output"])
    told = list[bytes]()

    def take_over(event: Event) -> None:
        theirs = this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"})
        (root / NAME).write_text(theirs.model_dump_json())
        told.append((root / "run.json").read_bytes())

    with pytest.raises(StageError):
        run(validate_config(tiny_raw), take_over, until="prepare")
    assert [(root / "run.json").read_bytes()] == told
    assert not (root / "report.html").exists()


def test_a_record_of_another_driver_is_kept(tiny_raw: dict[str, Any]) -> None:
    """This driver was suspended during its work, and its heartbeat has not noticed yet."""
    config = validate_config(tiny_raw)
    is_lost = False
    run_dir = RunDir(config.output)
    context = Context(config, run_dir, ignore, None, inspect(config), holds_run=lambda: not is_lost)
    theirs = PrepareRecord(
        digest="theirs", seconds=1.0, model_path="", converted=False, num_rows={}
    )
    run_dir.commit("prepare", run_dir.scratch("prepare"), theirs)

    class LosingPrepare(Prepare):
        def run(self, scratch: Path) -> dict[str, Any]:
            nonlocal is_lost
            assert not is_lost, "who lost its run before has nothing to do"
            is_lost = True
            (scratch / "model").touch()
            return {"model_path": "", "converted": False, "num_rows": {}}

    lost = r"another driver took this run over .*driver\.lock"
    for _ in range(2):
        with pytest.raises(StageError, match=lost):
            run_stage(LosingPrepare(context))
    with pytest.raises(StageError, match=lost):
        context.forget("prepare")
    assert run_dir.read_record("prepare", PrepareRecord) == theirs
    assert not list(run_dir.stage("prepare").iterdir())


def test_versions_and_hardware_are_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus = [
        SimpleNamespace(name=name, total_memory=80 * 1024**3) for name in ("H100", "H100", "A100")
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    found = _environment()
    assert {"python", "platform", "cpu", "memory", "qpruner", *PACKAGES} <= set(found)
    assert all(found.values())
    assert found["cpu cores"] == str(len(os.sched_getaffinity(0)))
    assert found["gpus"] == "2 x H100, 80.0 GiB; 1 x A100, 80.0 GiB"
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert _cpu_model(tmp_path / "arm")
    assert _cpu_model(tmp_path / "missing"), "Python knows the architecture"
