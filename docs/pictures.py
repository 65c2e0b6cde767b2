"""Take the pictures of README and docs/report.md, from one run that a single command made whole.

    python docs/pictures.py runs/demo

`terminal.svg` is the run's search shown again: its stages, and its trials' records as they stood at
one moment, go through the view that `qpruner run` has. For `tensorboard.png` Chromium opens the
real TensorBoard on the run, for `report.png`, `report-phone.png` (both dark too) and `plans.png`
its report.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from rich._export_format import CONSOLE_SVG_FORMAT

from qpruner.api import read_run
from qpruner.cli import terminal
from qpruner.report.snapshot import Snapshot
from qpruner.runs import events
from qpruner.runs.records import TrialRecord

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
COLUMNS, LINES = 118, 40
FONT = re.compile(r"@font-face \{\{.*?\}\}", re.DOTALL)
"""Rich's format would ask another host for one."""
TimedEvent = tuple[float, events.Event]
"""When, in Unix seconds, and what."""


def main(root: Path) -> None:
    """Write the pictures."""
    run = read_run(root)
    (IMAGES / "terminal.svg").write_text(terminal_picture(run), encoding="utf-8")
    browser_pictures(run, root)


# ---- the terminal


class Screen(io.StringIO):
    """What rich takes for a terminal."""

    def isatty(self) -> bool:
        return True


def terminal_picture(run: Snapshot) -> str:
    """Draw the search as `qpruner run` showed it when most trials were past their first rung and
    not over, as SVG."""
    moment = moment_of(run.own_trials)
    timed = sorted(
        (*events_of_stages(run, moment), *events_of_trials(run, moment)), key=lambda each: each[0]
    )
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    with contextlib.redirect_stdout(Screen()), patch.object(terminal, "time", clock):
        view = terminal.Terminal(quiet=False)
        view._console.size, view._console.record = (COLUMNS, LINES), True
        # A terminal itself wraps long lines, a picture does not.
        view._console.print = partial(unwrapped, view._console.print)  # type: ignore[method-assign]
        view._progress.get_time = clock.monotonic
        for clock.now, event in timed:
            view.emit(event)
        clock.now = moment
        view._console.print(view._view())
        program, *arguments = run.state.command.split()
        title = " ".join([Path(program).name, *arguments])
        return view._console.export_svg(title=title, code_format=FONT.sub("", CONSOLE_SVG_FORMAT))


def unwrapped(print_: Callable[..., None], *what: Any, **options: Any) -> None:
    """Print with lines as wide as the picture."""
    print_(*what, **options | {"soft_wrap": False})


def moment_of(trials: Sequence[TrialRecord]) -> float:
    """Return the last time that as many trials as ever were past their first rung and not over."""
    spans = [(trial.times[1], trial.times[-1]) for trial in trials if trial.rungs]
    return max(
        (begin for begin, _ in spans),
        key=lambda now: (sum(begin <= now < end for begin, end in spans), now),
    )


def events_of_stages(run: Snapshot, until: float) -> Iterator[TimedEvent]:
    """Yield when stages began and ended; the search has no end yet."""
    for name, stage in run.state.stages.items():
        if stage.started <= until:
            yield stage.started, events.StageStarted(name, "begun")
            if stage.seconds is not None and stage.started + stage.seconds <= until:
                yield (
                    stage.started + stage.seconds,
                    events.StageFinished(name, stage.seconds, stage.text),
                )


def events_of_trials(run: Snapshot, until: float) -> Iterator[TimedEvent]:
    """Yield what the search reported of its trials, and of how many are over."""
    search = run.state.search
    assert search, "the run has searched"
    begun = [trial for trial in run.own_trials if trial.times[0] <= until]
    planned = events.SearchPlanned(search.model_copy(update={"slots": None}), ())
    yield min(trial.times[0] for trial in begun), planned
    if search.slots:
        yield min(trial.times[0] for trial in begun), events.SlotsFound(search.slots)
    over = sorted(
        (trial for trial in begun if trial.times[-1] <= until), key=lambda trial: trial.times[-1]
    )
    for number, trial in enumerate(over, 1):
        yield trial.times[-1], events.TrialChanged(trial)
        yield trial.times[-1], events.Progress("search", number, search.max_trials)
    for trial in begun:
        if trial not in over:
            yield until, events.TrialChanged(as_of(trial, until))


def as_of(trial: TrialRecord, moment: float) -> TrialRecord:
    """Return the record of a trial under way, with the rungs that it had reached."""
    reached = sum(when <= moment for when in trial.times[1:-1])
    update = {
        "status": "running",
        "rungs": trial.rungs[:reached],
        "times": trial.times[: 1 + reached],
        "reason": None,
    }
    return trial.model_copy(update=update)


# ---- the browser


def browser_pictures(run: Snapshot, root: Path) -> None:
    """Take TensorBoard's table of the trials, the first screen of the report, and its plans."""
    sys.path.append(str(ROOT / "tests"))
    from chromium import chromium
    from tensorboard_server import serving

    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={root}"]
    with serving(command, "trial-0000") as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1680, "height": 640})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/#hparams")
        table = page.locator("tf-hparams-table-view")
        for trial in run.trials:
            table.get_by_text(re.compile(rf"\b{trial.index:04d}\b")).first.wait_for()
        page.screenshot(path=IMAGES / "tensorboard.png")
        for name, (width, height) in {"report-phone": (390, 844), "report": (1280, 800)}.items():
            for scheme, ending in (("dark", "-dark"), ("light", "")):
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                page.goto((root / "report.html").resolve().as_uri())
                page.screenshot(path=IMAGES / f"{name}{ending}.png")
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        page.locator('figure[data-plot="plans"]').screenshot(path=IMAGES / "plans.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
