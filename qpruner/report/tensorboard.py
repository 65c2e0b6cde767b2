"""Shows a search in TensorBoard: `tensorboard --logdir RUN` compares its trials.

HParams has a row a trial that is over; Scalars its curves; Custom Scalars the best so far against the controls; Images
the plans by score, the front as it grows and the sensitivities; Text the configuration, the winner and the final table.
All of it is made from the records, as the search runs and again when it is lost (`event_files`).
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from qpruner.config.schema import RunConfig
from qpruner.data.measures import accuracy_name
from qpruner.report.search_progress import (
    bar,
    best_of,
    best_so_far,
    hypervolume_so_far,
    in_order_of_end,
    score,
    score_name,
    score_title,
    shown_together,
)
from qpruner.runs import events
from qpruner.runs.records import Results, SearchRecord, SearchState, SensitivityRecord, TrialRecord, digest_of
from qpruner.runs.run_dir import RunDir

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
FRESH = "fresh"
"""End of the names of files with what finalists scored on fresh rows."""
RESULT, WINNER = "result", "winner"
RUNGS, SELECTION = "validation by rung", "winner by fresh rows"
"""Groups of tags that are columns of the HParams table, named so that Scalars begins with the curves."""
BEST, HYPERVOLUME = "search/best so far", "search/hypervolume so far"
MOST_POINTS = 1000
"""Steps of a trial's training loss that are kept: a trial's file stays below 200 kB."""
MOST_PICTURES = 10
"""Of each kind; TensorBoard shows no more."""
TRIALS_CHARTS = {"validation loss": ["validation/loss"], "training loss": ["train/loss"]}


class Board:
    """Follows a search's events and keeps its TensorBoard files.

    Args:
        root: The run folder.
        config: The run's configuration.
    """

    def __init__(self, root: Path, config: RunConfig) -> None:
        self._run, self._folder, self._config = RunDir(root, create=False), root / FOLDER, config
        self._search: SearchState | None = None
        self._trials: dict[int, TrialRecord] = {}

    def listen(self, event: events.Event) -> None:
        """Write what an event shows; a full disk stops no search, and the next command writes what is missing."""
        try:
            self._listen(event)
        except OSError as error:
            logger.warning(
                "TensorBoard's files could not be written: %s; repeat the command, and it writes what is missing", error
            )

    def _listen(self, event: events.Event) -> None:
        match event:
            case events.SearchPlanned(search, trials, measured):
                self._search, self._trials = search, {trial.index: trial for trial in trials}
                self._drop_others()
                for trial in trials:
                    write_trial(self._folder, search, trial)
                self._write_search()
                write_sensitivity(self._folder, measured)
            case events.StageStarted(stage) if stage not in ("comparison", "report"):
                # Of what an earlier command ended with; this one's follows once the winner is done.
                shutil.rmtree(self._folder / RESULT, ignore_errors=True)
                if stage == "search":
                    shutil.rmtree(self._folder / WINNER, ignore_errors=True)
                    for path in self._folder.glob(f"trial-*/*.{FRESH}"):
                        path.unlink()
            case events.TrialChanged(trial) if self._search:
                self._trials[trial.index] = trial
                write_trial(self._folder, self._search, trial)
                if trial.is_over:
                    self._write_search()
            case events.StageFinished("search") | events.StageSkipped("search"):
                record = self._run.read_record("search", SearchRecord)
                self._write_search(is_over=True, winner=record.best_index if record else None)
                if record:
                    write_winner(self._folder, record)
                    write_selection(self._folder, record, self._trials)

    def _drop_others(self) -> None:
        """Delete what an earlier search on this folder left and this one does not compare with."""
        assert self._search
        trials = self._trials.values()
        kept = {run_name(trial) for trial in trials}
        kept |= {control_name(trial) for trial in shown_together(self._search, trials)}
        for folder in (*self._folder.glob("trial-*"), *self._folder.glob("control-*")):
            if folder.name not in kept:
                shutil.rmtree(folder)

    def _write_search(self, is_over: bool = False, winner: int | None = None) -> None:
        assert self._search
        trials = self._trials.values()
        over = in_order_of_end(shown_together(self._search, trials))
        write_curves(self._folder, self._search, over, in_order_of_end(trials)[:1], self._config)
        write_pictures(self._folder, self._search, over, is_over, self._config.search.max_trials, winner)


def run_name(trial: TrialRecord) -> str:
    """Name a trial's run in TensorBoard."""
    return f"trial-{trial.index:04d}-{trial.origin}"


def control_name(trial: TrialRecord) -> str:
    """Name a control's run in TensorBoard; of plans that were given there may be several."""
    return f"control-{trial.origin}{f'-{trial.index:04d}' if trial.is_given else ''}"


def write_trial(folder: Path, search: SearchState, trial: TrialRecord) -> None:
    """Write a trial's curves and, once it is over, its row of the HParams table."""
    from qpruner.report import event_files

    if not trial.rungs and not trial.is_over:
        return
    started, *moments = trial.times or (0.0,)
    moments += [started] * (len(trial.rungs) + 1 - len(moments))
    every = math.ceil(search.steps / MOST_POINTS)
    found: list[Event] = []
    step = 0
    for rung, moment in zip(trial.rungs, moments, strict=False):
        for loss in rung.train_losses:
            step += 1
            if step % every == 0:
                found.append(event_files.scalar("train/loss", loss, step, moment))
        for name, value in (("loss", rung.loss), (accuracy_name(search.metrics), rung.accuracy)):
            if value is not None:
                found.append(event_files.scalar(f"validation/{name}", value, rung.step, moment))
                found.append(event_files.scalar(f"{RUNGS}/{name} at step {rung.step}", value, rung.step, moment))
    if trial.is_over:
        found.append(event_files.scalar(f"{SELECTION}/{WINNER}", 0.0, search.steps, moments[-1]))
        # For a column of 10 em. The path of its files, which TensorBoard shows otherwise, begins alike in all rows.
        title = f"{trial.index:04d} of {folder.parent.name}"
        times = (started, moments[-1])
        found += event_files.session(title, _columns(search, trial), trial.status != "failed", times)
    event_files.write_events(folder / run_name(trial), found)


def _columns(search: SearchState, trial: TrialRecord) -> dict[str, str | float]:
    """Return the columns of a trial's row; TensorBoard shows the first five at first, in the order of ASCII."""
    return {
        "#": f"{trial.index:04d}",  # numbers are shown with four decimals
        "From": trial.origin,
        "MB": trial.plan_bytes / 1e6,
        "Mean bits": trial.mean_bits,
        "Status": trial.status,
        "plan": bar(trial),
        "search": "this" if trial.search == search.search else "another",
        **{f"bits {group}": bits for group, bits in trial.plan.items()},
    }


def write_curves(
    folder: Path,
    search: SearchState,
    over: Sequence[TrialRecord],
    listed: Sequence[TrialRecord],
    config: RunConfig,
) -> None:
    """Write best so far, a line a control, the hypervolume, the columns of the HParams table and the configuration.

    Args:
        folder: Where the runs lie.
        search: What it is about.
        over: Trials to compare that are over, in the order of their ends.
        listed: One that the HParams table lists, whose columns all of them have; none where the table is empty yet.
        config: The run's configuration.
    """
    from qpruner.report import event_files

    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    charts = {"best so far, and the controls": [BEST]} | (
        {"hypervolume so far": [HYPERVOLUME]} if search.pareto else {}
    )
    layout = {"the search": charts, "its trials": TRIALS_CHARTS}
    begun = [event_files.charts(layout), event_files.text("config", f"```yaml\n{text}```")]
    begun += [event_files.experiment(_columns(search, trial), _metrics(search, config)) for trial in listed]
    times = [trial.times[-1] if trial.times else 0.0 for trial in over]
    best = best_so_far(over, search.metric)
    points = [(count, value) for count, value in enumerate(best, 1) if value is not None]
    curve = [event_files.scalar(BEST, value, count, times[count - 1]) for count, value in points]
    if search.pareto:
        volumes = hypervolume_so_far(over, search.metric, search.budget_bytes)
        every = zip(volumes, times, strict=True)
        curve += [
            event_files.scalar(HYPERVOLUME, value, count, moment) for count, (value, moment) in enumerate(every, 1)
        ]
    event_files.write_events(folder / "search", [*begun, *curve])
    for control in (trial for trial in over if trial.is_control and trial.status == "finished"):
        value, moment = score(control.rungs[-1], search.metric), control.times[-1] if control.times else 0.0
        # Two points: with more, TensorBoard takes the best trials for outliers and leaves them outside the chart.
        line = [event_files.scalar(BEST, value, count, moment) for count in (1, config.search.max_trials)]
        event_files.write_events(folder / control_name(control), line)


def _metrics(search: SearchState, config: RunConfig) -> dict[str, str]:
    """Map tags to columns of the HParams table, first what trials are compared by.

    Every trial that reached all rungs has all of them: the parallel coordinates leave out whoever lacks one.
    """
    scored = ("loss", accuracy_name(search.metrics)) if config.search.tasks else ("loss",)
    steps = config.search.rungs
    rungs = {f"{RUNGS}/{name} at step {step}": f"{name} at step {step}" for name in scored for step in steps}
    last = f"{RUNGS}/{score_name(search)} at step {steps[-1]}"
    return {last: rungs[last], f"{SELECTION}/{WINNER}": WINNER} | rungs


def write_pictures(
    folder: Path,
    search: SearchState,
    over: Sequence[TrialRecord],
    is_over: bool,
    max_trials: int,
    winner: int | None,
) -> None:
    """Draw the plans by score and the front, after every tenth of the trials and at the end.

    A picture is an event file of its own, named by what it shows, so that none is drawn twice: the number of trials, a
    digest of them, and the winner where it is known.
    """
    from qpruner.report import event_files

    seen = [
        (trial.index, trial.origin, trial.status, trial.plan, [rung.loss for rung in trial.rungs]) for trial in over
    ]

    def name_of(count: int) -> str:
        return f"{count:06d}-{digest_of(search.metric, search.budget_bytes, seen[:count])}"

    runs = folder / "pictures"
    last = name_of(len(over)) if winner is None else f"{name_of(len(over))}-{winner}"
    for path in runs.glob(f"{event_files.FILE}.*"):
        name = path.name.rpartition(".")[2]
        count = int(name.partition("-")[0])
        if not name.startswith(name_of(count)) or (is_over and count == len(over) and name != last):
            path.unlink()
    every = math.ceil(max_trials / MOST_PICTURES)
    for count in range(1, len(over) + 1):
        is_last = is_over and count == len(over)
        if not (is_last or count % every == 0) or not any(trial.rungs for trial in over[:count]):
            continue
        if not any(runs.glob(f"{event_files.FILE}.{name_of(count)}*")):
            name = last if is_last else name_of(count)
            _write_moment(runs, search, over[:count], name, winner if is_last else None)


def _write_moment(runs: Path, search: SearchState, over: Sequence[TrialRecord], name: str, winner: int | None) -> None:
    from qpruner.report import event_files
    from qpruner.report.plots.search import Shown, front, plans_by_score

    searched = [trial for trial in over if trial.status == "finished" and not trial.is_control]
    best = best_of(
        (trial for trial in over if trial.index == winner) if winner is not None else searched, search.metric
    )
    title = WINNER if winner is not None else "best so far"
    shown = Shown(search, over, best, title, winner is not None, score_title(search))
    drawn = {"plans by score": plans_by_score(shown), "bytes and score": front(shown)}
    moment = over[-1].times[-1] if over[-1].times else 0.0
    found = [
        event_files.image(f"search/{tag}", chart.png(), len(over), moment) for tag, chart in drawn.items() if chart
    ]
    event_files.write_events(runs, found, name)


def write_sensitivity(folder: Path, record: SensitivityRecord) -> None:
    """Draw the sensitivities."""
    from qpruner.report import event_files
    from qpruner.report.plots.model import sensitivities

    runs = folder / "sensitivity"
    if not record.methods or (runs / f"{event_files.FILE}.{record.digest}").is_file():
        return
    shutil.rmtree(runs, ignore_errors=True)
    drawn = event_files.image("sensitivity/by group", sensitivities(record).png(), 0, time.time())
    event_files.write_events(runs, [drawn], record.digest)


def write_winner(folder: Path, search: SearchRecord) -> None:
    """Write the winner's plan as a text: fine-tunes and evaluation take hours after it is known."""
    from qpruner.report import event_files, markdown

    plan = [(group, str(bits)) for group, bits in search.best_plan.items()]
    chosen = f"Trial {search.best_index} ({markdown.prose(search.best_origin)})."
    table = f"{chosen}\n\n{markdown.pipe_table(('group', 'bits'), plan)}"
    event_files.write_events(folder / WINNER, [event_files.text("winner", table)])


def write_selection(folder: Path, search: SearchRecord, trials: Mapping[int, TrialRecord]) -> None:
    """Write what each finalist scored on fresh rows, and which won, a step after the trial's last.

    It is a file of its own, since it may change when the trial is long over.

    Args:
        folder: Where the runs lie.
        search: The record of a search that is over.
        trials: Every trial that it knew, by number.
    """
    from qpruner.report import event_files

    for each in search.confirmations:
        trial = trials.get(each.index)
        if trial is None or not trial.rungs:  # damaged since, and to be run again
            continue
        values: dict[str, float] = {
            score_name(search): score(each, search.metric),
            WINNER: float(each.index == search.best_index),
        }
        step, moment = trial.rungs[-1].step + 1, trial.times[-1] if trial.times else 0.0
        found = [event_files.scalar(f"{SELECTION}/{name}", value, step, moment) for name, value in values.items()]
        event_files.write_events(folder / run_name(trial), found, FRESH)


def write_result(root: Path, results: Results) -> None:
    """Write the claim and the final table as a text."""
    from qpruner.report import event_files, markdown, sections

    table = "\n\n".join(markdown.parts_text(sections.measured(results)))
    event_files.write_events(root / FOLDER / RESULT, [event_files.text("final table", table)])
