"""`run.json` tells what the latest command that began something did; one that is refused leaves it alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import raw_config, with_key

from qpruner.config.load import validate_config
from qpruner.errors import StageError, UserError
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import run_stage
from qpruner.pipeline.preflight import inspect
from qpruner.pipeline.prepare import Prepare
from qpruner.pipeline.run import PACKAGES, RunProgress, _cpu_model, _environment, run
from qpruner.runs.events import Event, Message, Progress, StageFinished, StageSkipped, StageStarted, StepsSeen
from qpruner.runs.lock import NAME, hold_run, this_process
from qpruner.runs.records import PrepareRecord, RunState
from qpruner.runs.run_dir import RunDir


def ignore(event: Event) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that `prepare` was the last stage of."""
    root = tmp_path_factory.mktemp("prepared") / "run"
    run(validate_config(raw_config(tiny_model, root)), ignore, until="prepare")
    return root


@pytest.fixture
def raw(prepared: Path, tiny_raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose run folder is a copy of that one."""
    shutil.copytree(prepared, tiny_raw["output"])
    return tiny_raw


def test_long_steps_tell_how_far_they_are(sensed: tuple[dict[str, Any], list[Event]]) -> None:
    told: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for event in sensed[1]:
        if isinstance(event, Progress):
            what = "groups" if event.stage == "bank" else event.detail  # its detail is the group's name
            told.setdefault((event.stage, what), []).append((event.done, event.total))
    for (stage, what), steps in told.items():
        last = steps[0][1] if what != "mutual_information" else 8  # counts batches, then groups
        counted = [step for step in steps if step[1] == last]
        assert counted[-1] == steps[-1] == (last, last) and counted == sorted(set(counted)), f"{stage}: {what}"
    assert len(told["prune", "loading weights"]) > 10
    assert len([what for stage, what in told if stage == "sensitivity"]) == 2
    assert ("bank", "groups") in told


def test_a_command_up_to_a_stage_leaves_a_report(raw: dict[str, Any], prepared: Path) -> None:
    """After hours of a search there is something to look at, and of this command, not of an older one."""
    root, said = Path(raw["output"]), list[Event]()
    page, told = root / "report.html", root / "run.json"
    assert "Ended after stage prepare, as asked." in page.read_text()
    run(validate_config(raw), said.append, until="prune")
    assert said[-1] == Message("report", f"{page} has the run so far")
    assert "Ended after stage prune, as asked." in page.read_text()
    assert json.loads((root / "results.json").read_text())["standing"] == "Ended after stage prune, as asked."

    before, written = told.read_bytes(), page.read_text()
    run(validate_config(raw), ignore, until="prepare")
    assert (told.read_bytes(), page.read_text()) == (before, written), "one that does nothing leaves what tells more"

    def interrupt(event: Event) -> None:
        if isinstance(event, StageSkipped):  # Ctrl-C while records are compared
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(validate_config(raw), interrupt, until="bank")
    assert (told.read_bytes(), page.read_text()) == (before, written)
    refused = with_key(raw, "search.resources_per_trial", {"gpu": 999})
    with pytest.raises(UserError, match="ask for less"):
        run(validate_config(refused), ignore, until="search")
    assert (told.read_bytes(), page.read_text()) == (before, written), "nor is a run that stands there called failed"

    page.unlink()
    (root / "results.json").unlink()
    (root / "results.json").mkdir()  # as good as a file that cannot be written
    run(validate_config(raw), said.append, until="prepare")
    assert isinstance(said[-1], Message) and said[-1].text.startswith("warning: no report of the run so far could be ")


def test_what_another_driver_told_is_left(tiny_raw: dict[str, Any]) -> None:
    """It would else say of a run that goes on, or is done, that it was interrupted."""
    root, told = Path(tiny_raw["output"]), list[bytes]()

    def take_over(event: Event) -> None:
        theirs = this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"})
        (root / NAME).write_text(theirs.model_dump_json())
        told.append((root / "run.json").read_bytes())

    with pytest.raises(StageError):
        run(validate_config(tiny_raw), take_over, until="prepare")
    assert [(root / "run.json").read_bytes()] == told and not (root / "report.html").exists()


def test_steps_of_a_lost_run_are_not_told(tiny_raw: dict[str, Any]) -> None:
    """A driver that slept has steps of its own to tell of, mostly before its heartbeat notices."""
    root = RunDir(tiny_raw["output"])
    _ = root.id  # beside it a lock that is gone was taken away
    with hold_run(root.root, print) as holds_run:
        progress = RunProgress(root, validate_config(tiny_raw), "report", None, holds_run)
        progress.listen(StageStarted("search", "20 trials"))
        before = root.read_state(RunState)
        assert before and before.stages["search"].state == "running"
        theirs = before.model_copy(update={"host": "gpu-7", "outcome": "done"})
        root.write_state(theirs)
        (root.root / NAME).unlink()
        progress.listen(StageFinished("search", 1.0, ""))
        assert root.read_state(RunState) == theirs


def test_the_lock_is_read_only_when_the_state_is_written(tiny_raw: dict[str, Any]) -> None:
    """An object store is asked for money, and trials tell of every step."""
    asked = list[int]()

    def holds_run() -> bool:
        asked.append(1)
        return True

    progress = RunProgress(RunDir(tiny_raw["output"]), validate_config(tiny_raw), "report", None, holds_run)
    for event in (StageStarted("search", "20 trials"), *(StepsSeen({0: step}) for step in range(500))):
        progress.listen(event)
    assert 1 <= len(asked) < 50


def test_a_record_of_another_driver_is_left(tiny_raw: dict[str, Any]) -> None:
    """The driver slept in its work, and its heartbeat has not noticed yet."""
    config, is_lost = validate_config(tiny_raw), False
    run_dir = RunDir(config.output)
    context = Context(config, run_dir, ignore, None, inspect(config), holds_run=lambda: not is_lost)
    theirs = PrepareRecord(digest="theirs", seconds=1.0, model_path="", converted=False, num_rows={})
    run_dir.commit("prepare", run_dir.scratch("prepare"), theirs)

    class LosingPrepare(Prepare):
        def run(self, scratch: Path) -> dict[str, Any]:
            nonlocal is_lost
            assert not is_lost, "who lost its run before has nothing to do"
            is_lost = True
            (scratch / "model").touch()
            return {"model_path": "", "converted": False, "num_rows": {}}

    lost = r"another driver took this run over .*driver\.lock belongs to another driver, or is missing"
    for attempt in (lambda: run_stage(LosingPrepare(context)),) * 2 + (lambda: context.forget("prepare"),):
        with pytest.raises(StageError, match=lost):
            attempt()
    assert run_dir.read_record("prepare", PrepareRecord) == theirs and not list(run_dir.stage("prepare").iterdir())


def test_a_command_that_finds_all_recorded_is_done(prepared: Path, raw: dict[str, Any]) -> None:
    """Commands before it that were cut off are counted: killed ones, and those of Ctrl-C."""
    folder = RunDir(raw["output"])

    def told() -> RunState:
        state = folder.read_state(RunState)
        assert state and state.outcome == "done"
        return state

    assert told().stages["prepare"].state == "done"
    for number, outcome in enumerate(("running", "interrupted", "done"), start=1):
        folder.write_state(told().model_copy(update={"outcome": outcome}))
        run(validate_config(raw), ignore, until="prepare")
        assert told().resumed == min(number, 2)
    assert told().stages["prepare"].state == "recorded"


def test_the_hardware_is_told_with_the_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seconds and megabytes of a report say nothing without it."""
    gpus = [SimpleNamespace(name=name, total_memory=80 * 1024**3) for name in ("H100", "H100", "A100")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    told = _environment()
    hardware = ("cpu", "cpu cores", "memory", "gpus")
    assert set(told) == {"python", "platform", *hardware, "qpruner", *PACKAGES} and all(told.values())
    assert told["memory"] == f"{psutil.virtual_memory().total / 1024**3:.1f} GiB"
    assert told["cpu cores"] == str(len(os.sched_getaffinity(0)))
    assert told["gpus"] == "2 x H100, 80.0 GiB; 1 x A100, 80.0 GiB"
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert _cpu_model(tmp_path / "arm") and _cpu_model(tmp_path / "missing"), "else Python knows the architecture"
