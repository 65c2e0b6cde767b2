"""The output of a running command: a live view on a terminal, plain lines in a pipe."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_program
from made_run import MadeRun
from rich.console import Console

from qpruner.api import read_run
from qpruner.cli.terminal import Terminal
from qpruner.plans.plan import plan_of
from qpruner.report import tables
from qpruner.report.snapshot import read_snapshot
from qpruner.runs import events
from qpruner.runs.records import StageState
from qpruner.wording import duration

TELL = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from made_run import planned, trials
from qpruner.runs import events
from qpruner.cli.terminal import Terminal
told = trials()
begun = [events.StageSkipped("prepare", "48 rows", 3.0), planned(told[:5])]
begun += [events.StageStarted("search", "20 trials")]
begun += [events.SlotsFound(2), *map(events.TrialChanged, (told[5], told[3]))]
begun += [events.StepsSeen({5: 3})]
waiting = told[5].model_copy(update={"index": 9, "rungs": ()})
begun += [events.TrialChanged(waiting), events.TrialChanged(waiting, is_withdrawn=True)]
with Terminal(quiet="quiet" in sys.argv) as terminal:
    for event in begun:
        terminal.emit(event)
    time.sleep(1)  # long enough for a refresh
"""
TABLES = """
import sys
from qpruner import read_run
from qpruner.cli import run_verbs
from qpruner.cli.terminal import Terminal
from qpruner.report import tables
run = sys.argv[3]
run_verbs.trials(run, "trial", False)
for table in tables.final_tables(read_run(run).results):
    Terminal(quiet=False).table(table.headings, table.rows)
"""
TESTS = Path(__file__).resolve().parents[1] / "report"


def command_of(program: str, *options: object) -> list[str]:
    return [sys.executable, "-c", program, str(TESTS), str(TESTS.parent), *map(str, options)]


def in_a_pipe(program: str, *options: object, **environment: str) -> str:
    """Run a program and return all that a pipe received."""
    command = command_of(program, *options)
    return run_program(*command, environment=os.environ | environment).stdout


def on_a_terminal(*options: object, program: str = TELL, **environment: str) -> str:
    """Run a program and return all that a pseudo-terminal of 120 columns received."""
    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": "120",
        "LINES": "40",
        **environment,
    }
    command = command_of(program, *options)
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    received = b""
    try:
        while chunk := os.read(ours, 4096):
            received += chunk
    except OSError:  # Linux raises it when the other side is closed
        pass
    finally:
        os.close(ours)
        assert process.wait(timeout=60) == 0
    return received.decode()


def test_a_terminal_shows_the_search_live() -> None:
    seen = on_a_terminal()
    counts = ("6 of 20", "3 finished", "1 stopped", "1 failed", "1 of 2 slots", "14 min 30 s")
    best = ("2.9000, trial 2 (gp)", "32.0 MB", "3.0000, trial 1 (unpruned-knapsack)")
    # The trial that runs has the loss of its rung.
    for part in ("prepare recorded", "search running", *counts, *best, "3/8", "3.1000 @2"):
        assert part in seen
    # The bar shows in colour where the running trial is past its rung.
    assert re.search(r"\x1b\[38;5;\d+;48;5;\d+m8", seen)
    # In a narrow window lines wrap, because the present state is at their end.
    seen = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", " ", on_a_terminal(COLUMNS="40")).split())
    assert re.search(r"search running, \d+ s", seen)
    for part in ("1 of 2 slots", "14 min 30 s left", *best):
        assert part in seen


def test_prose_wraps_between_words() -> None:
    text = (
        "It is worse than one random plan of equal bytes in confirmation loss, ± 0.1286 over seeds."
    )
    program = f"from qpruner.cli.terminal import Terminal as T\nT(quiet=False).say({text!r}, {{}})"
    lines = [
        line.strip()
        for line in on_a_terminal(program=program.format("True"), COLUMNS="40").splitlines()
    ]
    assert len(lines) > 2
    assert max(map(len, lines)) <= 40
    assert " ".join(lines) == text
    assert on_a_terminal(program=program.format("False"), COLUMNS="40").strip() == text
    assert in_a_pipe(program.format("True")) == f"{text}\n"


PLAIN_LINES = [
    "[prepare] already recorded: 48 rows",
    "[search] 20 trials ...",
    "[search] trial   5 [844484] not pruned, 32.0 MB step 2/8 loss 3.1000 (gp)",
    "[search] trial   3 [448844] not pruned, 32.0 MB step 2/8 loss 3.5000 (gp), stopped",
]


def test_a_pipe_gets_plain_lines_and_every_rung() -> None:
    """A pipe and a dumb terminal get plain lines, even if the environment forces colours."""
    assert in_a_pipe(TELL, FORCE_COLOR="1", TTY_COMPATIBLE="1").splitlines() == PLAIN_LINES
    assert on_a_terminal(TERM="dumb", FORCE_COLOR="1").splitlines() == PLAIN_LINES
    assert on_a_terminal("quiet") == ""


def test_a_pipe_reports_counts_after_a_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(quiet=False)
    terminal.emit(events.StageStarted("evaluate", "arc for 9 models"))
    terminal.emit(events.Progress("evaluate", 100, 900, "answers"))
    monkeypatch.setattr("qpruner.cli.terminal.SILENCE_SECONDS", 0.0)
    terminal.emit(events.Progress("evaluate", 250, 900, "answers"))
    said = ["[evaluate] arc for 9 models ...", "[evaluate] answers: 250 of 900"]
    assert capsys.readouterr().out.splitlines() == said


def live_view(terminal: Terminal) -> str:
    """Return the text that the live view shows now."""
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(terminal._view())
    return console.export_text()


def test_markup_in_messages_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would replace words between colons by emoji, and words in brackets by styles."""
    terminal = Terminal(quiet=False)
    told = "kernels.cpp:100: no [bold] room"
    terminal.emit(events.StageStarted("bank", told))
    terminal.emit(events.Progress("bank", 1, 2, told))
    assert capsys.readouterr().out == f"[bank] {told} ...\n"
    assert f"bank {told} " in live_view(terminal)


def test_a_bar_shows_the_time_left_of_each_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    terminal = Terminal(quiet=False)

    def bar_after(seconds: float, done: int, total: int, detail: str) -> str:
        now[0] += seconds
        terminal.emit(events.Progress("bank", done, total, detail))
        [line] = [line for line in live_view(terminal).splitlines() if line.startswith("bank ")]
        return " ".join(line.split())

    bars = [bar_after(60, done, 4, f"layers.{done}") for done in range(1, 4)]
    # A minute a group, whatever the groups are called.
    assert bars[-1].endswith("3/4 0:02:00 0:01:00 left")
    assert bar_after(60, 4, 4, "layers.4").endswith("4/4 0:03:00 0:00:00 left")
    # Each count has its own pace.
    assert bar_after(5, 1, 4, "saving weights").endswith("1/4 0:00:00 -:--:-- left")
    assert bar_after(2, 2, 4, "saving weights").endswith("2/4 0:00:02 0:00:04 left")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A finished run with 60 groups, whose first trial has a very long origin."""
    made = MadeRun(tmp_path_factory.mktemp("tables") / "run", num_trials=20)
    made.write(made.trials[0], origin="a control with a rather long name")
    return made


def test_a_pipe_gets_one_line_per_row(made: MadeRun) -> None:
    text = in_a_pipe(TABLES, made.run.root)
    lines = text.splitlines()
    plans = [line.split()[-1] for line in lines[1:21]]
    # Each trial is one line, with its plan of 60 groups.
    assert plans == [str(plan_of(trial)) for trial in made.trials]
    # A column is as wide as its widest cell; two spaces separate columns.
    told = []
    for final in tables.final_tables(read_snapshot(made.run).results):
        part = [final.headings, *final.rows]
        widths = [max(map(len, column)) for column in zip(*part, strict=True)]
        told += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in part]
    assert lines[-len(told) :] == told
    # The table is narrow enough for a page.
    assert max(map(len, told)) <= 120
    # Nothing is drawn.
    assert text.replace("±", "").isascii()


def test_a_terminal_folds_wide_tables(made: MadeRun) -> None:
    colored = on_a_terminal(made.run.root, program=TABLES, COLUMNS="100")
    seen = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert "\u2026" not in seen
    assert max(map(len, seen.splitlines())) <= 100
    first = seen[: seen.index("\r\n1 ")]
    plan = [line.split()[-1] for line in first.splitlines() if line.split()]
    # The plan is whole, in several lines.
    assert "".join(part for part in plan if set(part) <= {"4", "8"}) == str(plan_of(made.trials[0]))


def test_a_picture_shows_the_search_at_one_moment(tmp_path: Path) -> None:
    """`docs/pictures.py` replays a run up to a moment of its search; the picture loads nothing from
    another host."""
    sys.path.insert(0, str(TESTS.parent.parent / "docs"))
    from pictures import moment_of, terminal_picture

    made = MadeRun(tmp_path / "run", num_trials=64)
    made.change_search(slots=8)
    begun = min(trial.times[0] for trial in made.trials)
    stages = {
        "prune": StageState(
            state="done", started=begun - 100, seconds=90, text="134.5M -> 107.6M parameters"
        ),
        "search": StageState(
            state="done", started=begun - 1, seconds=90_000, text="all 64 trials were spent"
        ),
    }
    made.change_state(stages=stages)
    moment = moment_of(made.trials)
    seen = (picture := terminal_picture(read_run(made.run.root))).replace("&#160;", " ")
    assert "[prune] done in 90.0 s: 134.5M -&gt; 107.6M parameters" in seen
    assert f"prune 1 min 30 s | search running, {duration(moment - begun + 1)}" in seen
    assert "of 64 trials: " in seen
    assert "8 of 8 slots busy" in seen
    # This came later.
    assert "all 64 trials" not in seen
    assert "url(" not in picture.replace("url(#", "")
