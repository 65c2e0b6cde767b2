"""`run.json` describes the latest command that started a stage; other commands leave it alone."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ignore, raw_config, with_key

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
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for event in sensed[1]:
        if isinstance(event, Progress):
            # the detail is the name of a group
            work = "groups" if event.stage == "bank" else event.detail
            found.setdefault((event.stage, work), []).append((event.done, event.total))
    for work, steps in found.items():
        # by the passes of two kinds of methods
        is_repeated = work == (
            "sensitivity",
            "loading weights",
        )
        assert steps[-1] == (steps[0][1],) * 2 and (is_repeated or steps == sorted(set(steps))), (
            work
        )
    assert len(found["prune", "loading weights"]) > 10
    assert len([work for stage, work in found if stage == "sensitivity"]) == 4
    assert (
        found["sensitivity", "mutual_information by group"][-1]
        == found["bank", "groups"][-1]
        == (8, 8)
    )
    (ended,) = [
        each
        for each in sensed[1]
        if isinstance(each, StageFinished) and each.stage == "sensitivity"
    ]
    assert ended.figures.startswith("9 groups, smallest less largest format: mutual_information ")


def test_a_command_up_to_a_stage_leaves_a_report(raw: dict[str, Any], prepared: Path) -> None:
    """The report describes this command, not an older one, and a command that starts no stage keeps
    it."""
    root, said = Path(raw["output"]), list[Event]()
    page, told = root / "report.html", root / "run.json"
    assert "Ended after stage prepare, as asked." in page.read_text()
    run(validate_config(raw), said.append, until="prune")
    assert said[-1] == Message("report", f"{page} has the run so far")
    assert "Ended after stage prune, as asked." in page.read_text()
    assert (
        json.loads((root / "results.json").read_text())["standing"]
        == "Ended after stage prune, as asked."
    )

    before, written = told.read_bytes(), page.read_text()
    run(validate_config(raw), ignore, until="prepare")
    assert (told.read_bytes(), page.read_text()) == (before, written), (
        "one that does nothing leaves what tells more"
    )

    def interrupt(event: Event) -> None:
        if isinstance(event, StageSkipped):  # Ctrl-C while records are compared
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(validate_config(raw), interrupt, until="bank")
    assert (told.read_bytes(), page.read_text()) == (before, written)
    refused = with_key(raw, "search.resources_per_trial", {"gpu": 999})
    with pytest.raises(UserError, match="ask for less"):
        run(validate_config(refused), ignore, until="search")
    assert (told.read_bytes(), page.read_text()) == (before, written), (
        "nor is a run that stands there called failed"
    )

    page.unlink()
    (root / "results.json").unlink()
    (root / "results.json").mkdir()  # as good as a file that cannot be written
    run(validate_config(raw), said.append, until="prepare")
    assert isinstance(said[-1], Message) and said[-1].text.startswith(
        "warning: no report of the run so far could be "
    )


def test_the_state_of_another_driver_is_kept(tiny_raw: dict[str, Any]) -> None:
    """Otherwise `status` would call a running or finished run interrupted."""
    root, told = Path(tiny_raw["output"]), list[bytes]()

    def take_over(event: Event) -> None:
        theirs = this_process().model_copy(update={"host": "gpu-7", "machine": "elsewhere"})
        (root / NAME).write_text(theirs.model_dump_json())
        told.append((root / "run.json").read_bytes())

    with pytest.raises(StageError):
        run(validate_config(tiny_raw), take_over, until="prepare")
    assert [(root / "run.json").read_bytes()] == told and not (root / "report.html").exists()


def test_a_record_of_another_driver_is_kept(tiny_raw: dict[str, Any]) -> None:
    """This driver was suspended during its work, and its heartbeat has not noticed yet."""
    config, is_lost = validate_config(tiny_raw), False
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

    lost = (
        r"another driver took this run over .*driver\.lock belongs to another driver, or is missing"
    )
    for attempt in (lambda: run_stage(LosingPrepare(context)),) * 2 + (
        lambda: context.forget("prepare"),
    ):
        with pytest.raises(StageError, match=lost):
            attempt()
    assert run_dir.read_record("prepare", PrepareRecord) == theirs and not list(
        run_dir.stage("prepare").iterdir()
    )


def test_versions_and_hardware_are_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus = [
        SimpleNamespace(name=name, total_memory=80 * 1024**3) for name in ("H100", "H100", "A100")
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    found = _environment()
    assert {"python", "platform", "cpu", "memory", "qpruner", *PACKAGES} <= set(found) and all(
        found.values()
    )
    assert found["cpu cores"] == str(len(os.sched_getaffinity(0)))
    assert found["gpus"] == "2 x H100, 80.0 GiB; 1 x A100, 80.0 GiB"
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert _cpu_model(tmp_path / "arm") and _cpu_model(tmp_path / "missing"), (
        "Python knows the architecture"
    )
