"""The plot of slots and the search's busy seconds: this search's work alone, without pauses between sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recorded_runs import ANOTHER, DIGEST, MINE, STARTED, recorded_run, trial

from qpruner.report import tables
from qpruner.report.plots.search import timeline
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.records import Begun, TrialRecord
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import write_trial

NIGHT = 12 * 3600.0


def begun(session: int, time: float, seconds: float = 0.0, search: str = MINE) -> Begun:
    return Begun(search=search, session=session, time=STARTED + time, seconds=seconds)


def shown(root: Path, *records: TrialRecord) -> tuple[list[dict[str, Any]], str, str]:
    """The bars, the text under them and the search's busy seconds of a run with these trials in its folder."""
    run = RunDir(recorded_run(root))
    for path in (run.trials / DIGEST).glob("*/trial.json"):
        path.unlink()
    for record in records:
        write_trial(run.trials / DIGEST, record)
    snapshot = read_snapshot(run)
    chart = timeline(snapshot.worker_intervals, snapshot.trials)
    table = tables.stages(snapshot)
    [row] = [row for row in table.rows if row[0] == "search"]
    return chart.spec["data"]["values"], chart.caption, row[table.headings.index("busy seconds")]


def spans(bars: list[dict[str, Any]]) -> list[tuple[int, int, float, float]]:
    return [(bar["trial"], bar["slot"], pytest.approx(bar["start"]), pytest.approx(bar["end"])) for bar in bars]


def test_a_pause_between_sessions_is_neither_busy_nor_idle(tmp_path: Path) -> None:
    """Ctrl-C in the evening after 100 s of trial 1, whose last rung was at 60 s; in the morning it goes on."""
    whole = trial(0, "444444", [3.4, 3.3, 3.2], begun=(begun(1, 0.0),))
    times = tuple(STARTED + moment for moment in (80.0, 140.0, NIGHT + 20, NIGHT + 80, NIGHT + 81))
    resumed = (begun(1, 80.0), begun(2, NIGHT, 100.0))
    paused = trial(1, "884444", [3.3, 3.2, 3.0], begun=resumed, times=times, seconds=180.0)
    bars, caption, busy = shown(tmp_path / "run", whole, paused)
    assert spans(bars) == [(0, 1, 0, 3), (1, 2, 80 / 60, 3), (1, 1, 3, 3 + 80 / 60)]
    assert "they had a trial 69% of the time" in caption  # 360 of 2 x 260 s
    assert "over 2 sessions; the time between them is cut out" in caption
    assert busy == "360.0"


def test_a_trial_that_lost_its_worker_leaves_a_gap(tmp_path: Path) -> None:
    lost = trial(0, "444444", [3.4, 3.3, 3.2], begun=(begun(1, 0.0), begun(1, 160.0, 40.0)), seconds=180.0)
    bars, caption, busy = shown(tmp_path / "run", lost)
    assert spans(bars) == [(0, 1, 0, 40 / 60), (0, 1, 160 / 60, 5)]
    assert "they had a trial 60% of the time" in caption and "session" not in caption
    assert busy == "180.0"


def test_other_searches_trials_take_no_slots(tmp_path: Path) -> None:
    """One is theirs alone, one was ours before they took it over, one was theirs before."""
    theirs = trial(0, "444444", [3.4, 3.3, 3.2], search=ANOTHER, begun=(begun(1, -NIGHT, search=ANOTHER),))
    given = (begun(1, 0.0), begun(3, NIGHT, 60.0, ANOTHER))
    lent = trial(1, "884444", [3.3, 3.2, 3.0], search=ANOTHER, begun=given)
    taken = (begun(1, -NIGHT, search=ANOTHER), begun(1, 60.0, 120.0))
    ours = trial(2, "848444", [3.2, 3.1, 2.9], begun=taken)
    bars, caption, busy = shown(tmp_path / "run", theirs, lent, ours)
    assert spans(bars) == [(1, 1, 0, 60), (2, 1, 60, 120)]
    assert "Slots ever in use: 1; they had a trial 100% of the time" in caption
    assert busy == "120.0"


def test_older_records_are_drawn_by_their_seconds(tmp_path: Path) -> None:
    old = trial(0, "444444", [3.4, 3.3, 3.2], times=(STARTED - NIGHT, STARTED, STARTED + 60, STARTED + 120))
    bars, _, busy = shown(tmp_path / "run", old)
    assert spans(bars) == [(0, 1, 0, 180)]
    assert busy == "180.0"


@pytest.mark.parametrize(("seconds", "title", "end"), [(200.0, "seconds", 200.0), (300.0, "minutes", 5.0)])
def test_a_short_search_is_told_in_seconds(tmp_path: Path, seconds: float, title: str, end: float) -> None:
    run = RunDir(recorded_run(tmp_path / "run"))
    for path in (run.trials / DIGEST).glob("*/trial.json"):
        path.unlink()
    write_trial(run.trials / DIGEST, trial(0, "444444", [3.4], begun=(begun(1, 0.0),), seconds=seconds))
    snapshot = read_snapshot(run)
    chart = timeline(snapshot.worker_intervals, snapshot.trials)
    assert chart.spec["encoding"]["x"]["axis"]["title"] == f"{title} of searching since the first trial"
    assert spans(chart.spec["data"]["values"]) == [(0, 1, 0, end)]
