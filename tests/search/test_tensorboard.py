"""TensorBoard shows a search: files are read back with its own reader; the last test opens it in a
browser."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium
from conftest import Raw, disk_of, fill
from made_run import GROUPS, RUNGS, STARTED, config_of, planned, recorded_run, trials
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard_server import serving

from qpruner.runs.events import StageSkipped, TrialChanged
from qpruner.search.tensorboard import BEST, Board, run_name


def show(root: Path, *events: Any, max_trials: int = 20) -> Board:
    """Send these events to a board."""
    board = Board(root, config_of(Path("runs/demo"), search__max_trials=max_trials))
    for event in events:
        board.listen(event)
    return board


def read(root: Path, run: str) -> EventAccumulator:
    return EventAccumulator(str(root / "tensorboard" / run), size_guidance={"scalars": 0}).Reload()


def points(root: Path, run: str, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in read(root, run).Scalars(tag)]


def config_text(root: Path) -> str:
    return str(
        read(root, "search").Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    )


def files(root: Path) -> dict[Path, bytes]:
    found = (path for path in (root / "tensorboard").rglob("*") if path.is_file())
    return {path.relative_to(root): path.read_bytes() for path in found}


def row(root: Path, run: str) -> Raw:
    """Return a trial's row of the HParams table."""
    content = read(root, run).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    columns = metadata.parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in columns.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder in which all trials but one are over; tests only read it."""
    root = tmp_path_factory.mktemp("written") / "run"
    show(root, planned(trials()))
    return root


def test_hparams_has_the_columns_of_all_cuts(tmp_path: Path) -> None:
    first, *others = trials()
    show(
        tmp_path,
        planned([first.model_copy(update={"plan": dict(list(first.plan.items())[1:])}), *others]),
    )
    content = read(tmp_path, "search").SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    columns = {each.name for each in metadata.parse_experiment_plugin_data(content).hparam_infos}
    assert {f"format {group}" for group in GROUPS} <= columns


@pytest.fixture
def shown(written: Path, tmp_path: Path) -> Path:
    """Return a copy of `written`, which a test may change."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def test_hparams_has_a_row_for_every_trial_that_is_over(written: Path) -> None:
    rows = {record.index: row(written, run_name(record)) for record in trials() if record.is_over}
    statuses = {index: each["Status"] for index, each in rows.items()}
    assert statuses == {0: "finished", 1: "finished", 2: "finished", 3: "stopped", 4: "failed"}
    named = {
        "From": "unpruned-knapsack",
        "MB": 32,
        "formats": "4 nf4, 2 int8",
        "Status": "finished",
        "#": "0001",
    }
    named |= {"Cut": "base", "search": "this"}
    formats = dict(
        zip((f"format {group}" for group in GROUPS), [*["int8"] * 2, *["nf4"] * 4], strict=True)
    )
    assert rows[1] == {**named, **formats, "mean bits": pytest.approx(32 / 6)}
    ends = {}
    for record in (trials()[2], trials()[4]):
        content = (
            read(written, run_name(record))
            .SummaryMetadata(metadata.SESSION_END_INFO_TAG)
            .plugin_data.content
        )
        ends[record.index] = metadata.parse_session_end_info_plugin_data(content)
    assert ends[2].status == 1
    assert ends[4].status == 2
    assert ends[2].end_time_secs == STARTED + 2 * 60 + 3 * 60 + 1
    running = read(written, run_name(trials()[5]))
    assert metadata.SESSION_START_INFO_TAG not in running.Tags()["tensors"]
    assert running.Scalars("validation/loss")

    content = read(written, "search").SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    columns = metadata.parse_experiment_plugin_data(content)
    steps = (RUNGS[-1], *RUNGS[:-1])
    assert [metric.display_name for metric in columns.metric_infos] == [
        f"loss at step {step}" for step in steps
    ]
    assert {info.name for info in columns.hparam_infos} == set(rows[0])
    # Columns that tell trials apart come first.
    assert sorted(rows[0])[:5] == ["#", "Cut", "From", "MB", "Status"]
    tags = read(written, run_name(trials()[2])).Tags()["scalars"]
    # Otherwise the parallel coordinates would lack a metric.
    assert {metric.name.tag for metric in columns.metric_infos} <= set(tags)


def test_curves_have_every_step(written: Path) -> None:
    run = run_name(trials()[2])
    assert points(written, run, "validation/loss") == [(2, 3.2), (4, 3.1), (8, 2.9)]
    assert points(written, run, "train/loss") == list(
        enumerate([4.7] * 2 + [4.6] * 2 + [4.4] * 4, 1)
    )
    walls = [event.wall_time for event in read(written, run).Scalars("validation/loss")]
    assert walls == [STARTED + 2 * 60 + minutes * 60 for minutes in (1, 2, 3)]
    # In the order of their ends: trial 4 failed at once and 3 was stopped before 2 finished.
    assert points(written, "search", BEST) == [(5, 2.9)]
    assert "max_trials: 20" in config_text(written)


def test_files_grow_to_what_the_records_alone_give(written: Path, tmp_path: Path) -> None:
    """The board gets an event for each rung and each end of a trial, in order of time."""
    told = []
    for record in trials():
        for count in range(len(record.rungs) + 1):
            part = {
                "rungs": record.rungs[:count],
                "times": record.times[: 1 + count],
                "status": "running",
            }
            told.append((record.times[count], TrialChanged(record.model_copy(update=part))))
        if record.is_over:
            told.append((record.times[-1], TrialChanged(record)))
    show(
        tmp_path / "run",
        planned([]),
        *(event for _, event in sorted(told, key=lambda item: item[0])),
    )
    assert files(tmp_path / "run") == files(written)


@pytest.mark.parametrize("damage", ["none", "cut short", "gone", "overwritten"])
def test_lost_files_come_back_and_nothing_is_doubled(shown: Path, damage: str) -> None:
    whole = files(shown)
    folder = shown / "tensorboard"
    for path, content in whole.items():
        if damage == "gone":
            (shown / path).unlink()
        elif damage != "none":
            (shown / path).write_bytes(
                content[:-7] if damage == "cut short" else b"\0" + content[1:]
            )
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    show(shown, planned(trials()))
    assert files(shown) == whole
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    # Nothing is written again.
    assert damage != "none" or after == before


def test_a_full_disk_stops_no_search(written: Path, tmp_path: Path) -> None:
    with disk_of("1m", tmp_path / "run") as disk:
        filler = fill(disk, leave=8192)
        show(disk, planned(trials()))
        filler.unlink()
        assert len(files(disk)) < len(files(written))
        show(disk, planned(trials()))
        assert files(disk) == files(written)


def test_a_new_search_shows_nothing_of_the_last_one(shown: Path) -> None:
    show(shown, planned([]), StageSkipped("search", "best: trial 2", 1.0), max_trials=4)
    assert {path.name for path in (shown / "tensorboard").iterdir()} == {"search"}
    assert read(shown, "search").Tags()["scalars"] == []
    assert "max_trials: 4" in config_text(shown)


@pytest.mark.slow
def test_tensorboard_in_a_browser_lists_the_trials(tmp_path: Path) -> None:
    root = recorded_run(tmp_path / "run")
    show(root, planned(trials()))
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={root}"]
    with serving(command, "trial-0003") as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 620})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/#hparams")
        table = page.locator("tf-hparams-table-view")
        names = [f"{record.index:04d} of {root.name}" for record in trials() if record.is_over]
        for text in (
            *names,
            "0003",
            "unpruned-knapsack",
            "stopped",
            "failed",
            "loss at step 8",
            "2.9000",
        ):
            table.get_by_text(text, exact=True).first.wait_for()
        # Each trial is listed once.
        assert table.get_by_text(re.compile(r"^\s*\d{4} of ")).count() == len(names)
        cut = "cell => [cell, cell.parentElement].some(each => each.scrollWidth > each.clientWidth)"
        # Each name is shown whole.
        assert not any(table.get_by_text(name, exact=True).first.evaluate(cut) for name in names)
