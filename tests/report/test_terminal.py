"""What a person sees while a run works: a live part on a terminal, plain lines in a pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import MadeRun
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from qpruner import events
from qpruner.terminal import Terminal

TELL = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from recorded_runs import planned, trials
from qpruner import events
from qpruner.terminal import Terminal
with Terminal(quiet="quiet" in sys.argv) as terminal:
    told = trials()
    for event in (
        events.StageSkipped("prepare", "48 rows", 3.0),
        planned(told[:5]),
        events.StageStarted("search", "20 trials"),
        events.SlotsFound(2),
        events.TrialChanged(told[5]),
        events.TrialChanged(told[3]),
    ):
        terminal.emit(event)
    time.sleep(1)  # long enough for a refresh
"""
TESTS = Path(__file__).resolve().parent


def on_a_terminal(*options: str, **environment: str) -> str:
    """All that a pseudo-terminal of 120 columns received."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", **environment}
    command = [sys.executable, "-c", TELL, str(TESTS), str(TESTS.parent), *options]
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    received = b""
    try:
        while chunk := os.read(ours, 4096):
            received += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    finally:
        os.close(ours)
        assert process.wait(timeout=60) == 0
    return received.decode()


def test_a_terminal_shows_the_search_live() -> None:
    seen = on_a_terminal()
    assert "prepare recorded | search running" in seen
    assert "6 of 20 trials: 3 finished, 1 stopped, 1 failed; 1 of 2 slots busy; about 15 min 00 s left" in seen
    assert "best so far   validation loss 2.9000, trial 2 (gp), 32.0 MB" in seen
    assert "best control  validation loss 3.0000, trial 1 (seed-kl)" in seen
    assert "2/8" in seen and "\x1b[33m8" in seen, "the running trial's step, and bits in colour"


def test_a_terminal_without_color_stays_without() -> None:
    seen = on_a_terminal(NO_COLOR="1")
    assert "1 of 2 slots busy" in seen
    assert not any(f"\x1b[{color}m" in seen for color in range(30, 38))


def test_a_quiet_terminal_shows_nothing() -> None:
    assert on_a_terminal("quiet") == ""


def test_a_pipe_gets_plain_lines_and_every_rung() -> None:
    command = [sys.executable, "-c", TELL, str(TESTS), str(TESTS.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        "[prepare] already recorded: 48 rows",
        "[search] 20 trials ...",
        "[search] trial   5 [844484] 32.0 MB step 2/8 loss 3.1000 (gp)",
        "[search] trial   3 [448844] 32.0 MB step 2/8 loss 3.5000 (gp), stopped",
    ]


def test_a_pipe_is_told_now_and_then_how_far_a_long_step_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(quiet=False)
    terminal.emit(events.StageStarted("evaluate", "arc for 9 models"))
    terminal.emit(events.Progress("evaluate", 1, 900, "answers"))
    monkeypatch.setattr("qpruner.terminal.SECONDS_UNTOLD", 0.0)
    terminal.emit(events.Progress("evaluate", 250, 900, "answers"))
    assert capsys.readouterr().out.splitlines() == [
        "[evaluate] arc for 9 models ...",
        "[evaluate] answers: 250 of 900",
    ]


def test_a_picture_of_the_search(tmp_path: Path) -> None:
    """Also `docs/images/terminal.svg`: copy the file that this test leaves."""
    made = MadeRun(tmp_path / "run", num_trials=64)
    assert made.state.search
    search = made.state.search.model_copy(update={"max_trials": 200})
    over, last = made.trials[:60], made.trials[60:]
    terminal = Terminal(quiet=False)
    for stage, seconds in (("prepare", 31.0), ("prune", 210.0), ("bank", 95.0), ("sensitivity", 260.0)):
        terminal.emit(events.StageFinished(stage, seconds, ""))
    terminal.emit(events.SearchPlanned(search, tuple(over), None))
    terminal.emit(events.StageStarted("search", "200 trials"))
    terminal.emit(events.SlotsFound(4))
    for trial, rungs in zip(last, (2, 1, 1, 0), strict=True):
        under_way = {"status": "running", "rungs": trial.rungs[:rungs], "reason": None, "seconds": None}
        terminal.emit(events.TrialChanged(trial.model_copy(update=under_way)))
    console = Console(record=True, width=130, force_terminal=True, file=io.StringIO(), highlight=False)
    console.print(terminal._view())
    # The format that rich brings asks another host for a font.
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    picture = console.export_svg(title="qpruner run my.yaml", code_format=form)
    (tmp_path / "terminal.svg").write_text(picture)
    assert "of&#160;200&#160;trials" in picture and "4&#160;of&#160;4&#160;slots&#160;busy" in picture
    assert "url(" not in picture.replace("url(#", "")
