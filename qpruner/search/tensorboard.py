"""Shows a search in TensorBoard: `tensorboard --logdir RUN` compares its trials.

HParams has one row for each trial that is over. Scalars has the trials' curves, and the best score
so far of searched plans. Text has the configuration.

A file depends only on the records that it shows, so writing it twice changes nothing: during a
search new messages are appended, after a crash the repeated command completes or rewrites it.
tensorboardX's `SummaryWriter` cannot do that.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import text as text_summary

from qpruner.config.schema import RunConfig
from qpruner.data.measures import accuracy_name
from qpruner.plans.plan import formats_text
from qpruner.runs import events
from qpruner.runs.records import SearchState, TrialRecord
from qpruner.search.progress import best_so_far, in_order_of_end, score_name

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
FILE = "events.out.tfevents"  # prefix by which TensorBoard recognizes event files
TEXT, NUMBER, SUCCESS, FAILURE = 1, 3, 1, 2
"""Values of DataType and Status in the HParams plugin's api.proto."""
RUNGS = "validation by rung"
"""Tag group of the HParams table's metrics; in Scalars its name sorts after the groups of the
curves."""
BEST = "search/best so far"


class Board:
    """Follows a search's events and keeps its TensorBoard files in the run folder `root`."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self._folder, self._config = root / FOLDER, config
        self._search: SearchState | None = None
        self._trials: dict[int, TrialRecord] = {}

    def listen(self, event: events.Event) -> None:
        """Update the files after an event; a write error is logged, and the next command writes
        what is missing."""
        try:
            self._listen(event)
        except OSError as error:
            logger.warning(
                "TensorBoard's files could not be written: %s; repeat the command to write what is missing",
                error,
            )

    def _listen(self, event: events.Event) -> None:
        match event:
            case events.SearchPlanned(search, trials):
                self._search, self._trials = search, {trial.index: trial for trial in trials}
                # Remove the files of earlier searches that are not shown beside this one.
                kept = {run_name(trial) for trial in trials}
                for folder in self._folder.glob("trial-*"):
                    if folder.name not in kept:
                        shutil.rmtree(folder)
                for trial in trials:
                    write_trial(self._folder, search, trial)
                self._write_curves(search)
            case events.TrialChanged(trial) if self._search:
                self._trials[trial.index] = trial
                write_trial(self._folder, self._search, trial)
                if trial.is_over:
                    self._write_curves(self._search)

    def _write_curves(self, search: SearchState) -> None:
        """Write the curve of the best score, the HParams columns and `config`."""
        config, trials = self._config, in_order_of_end(self._trials.values())
        over = [trial for trial in trials if trial.search == search.search]
        told = f"```yaml\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}```"
        found: list[Any] = [Event(wall_time=0.0, summary=text_summary("config", told))]
        if trials:  # without trials there is no table
            whole = max(trials, key=lambda trial: len(trial.plan))  # a cut may lack blocks
            found.append(_experiment(_columns(search, whole), _metrics(search, config)))
        for count, (value, trial) in enumerate(
            zip(best_so_far(over, search.metric), over, strict=True), 1
        ):
            if value is not None:
                found.append(_scalar(BEST, value, count, trial.times[-1] if trial.times else 0.0))
        write_events(self._folder / "search", found)


def write_trial(folder: Path, search: SearchState, trial: TrialRecord) -> None:
    """Write a trial's curves and, once it is over, its row of the HParams table."""
    if not trial.rungs and not trial.is_over:
        return
    started, *moments = trial.times or (0.0,)
    moments += [started] * (len(trial.rungs) + 1 - len(moments))
    found: list[Any] = []
    step = 0
    for rung, moment in zip(trial.rungs, moments, strict=False):
        for loss in rung.train_losses:
            step += 1
            found.append(_scalar("train/loss", loss, step, moment))
        for name, value in (("loss", rung.loss), (accuracy_name(search.metrics), rung.accuracy)):
            if value is not None:
                found.append(_scalar(f"validation/{name}", value, rung.step, moment))
                found.append(
                    _scalar(f"{RUNGS}/{name} at step {rung.step}", value, rung.step, moment)
                )
    if trial.is_over:
        # Fits a column of 10 em. Without a title TensorBoard shows the file's path, which begins
        # alike in all rows.
        title = f"{trial.index:04d} of {folder.parent.name}"
        found += _session(
            title, _columns(search, trial), trial.status != "failed", (started, moments[-1])
        )
    write_events(folder / run_name(trial), found)


def run_name(trial: TrialRecord) -> str:
    """Return the name of a trial's run in TensorBoard, such as `trial-0007-cut-10-gp`."""
    return f"trial-{trial.index:04d}-{trial.cut}-{trial.origin.removeprefix(f'{trial.cut}-')}"


def _columns(search: SearchState, trial: TrialRecord) -> dict[str, str | float]:
    """Return a trial's HParams columns.

    TensorBoard shows the first five by name: capitals put useful ones first.
    """
    return {
        "#": f"{trial.index:04d}",  # a text, because TensorBoard shows numbers with four decimals
        "Cut": trial.cut,
        "From": trial.origin,
        "MB": trial.plan_bytes / 1e6,
        "Status": trial.status,
        "mean bits": trial.mean_bits,
        "formats": formats_text(trial.plan),
        "search": "this" if trial.search == search.search else "another",
        **{f"format {group}": name for group, name in trial.plan.items()},
    }


def _metrics(search: SearchState, config: RunConfig) -> dict[str, str]:
    """Map tags to metric columns of the HParams table; the first is the score that compares trials.

    Every finished trial has all these metrics. TensorBoard's parallel coordinates leave out a trial
    that lacks one.
    """
    scored = ("loss", accuracy_name(search.metrics)) if config.search.tasks else ("loss",)
    steps = config.search.rungs
    rungs = {
        f"{RUNGS}/{name} at step {step}": f"{name} at step {step}"
        for name in scored
        for step in steps
    }
    last = f"{RUNGS}/{score_name(search)} at step {steps[-1]}"
    return {last: rungs[last]} | rungs


# ---- messages and files


def write_events(folder: Path, messages: Sequence[Any]) -> None:
    """Write exactly these messages to the event file in a folder, which TensorBoard shows as one
    run."""
    version = Event(wall_time=messages[0].wall_time, file_version="brain.Event:2")
    path, wanted = folder / f"{FILE}.0", _framed([version, *messages])
    found = path.read_bytes() if path.is_file() else b""
    if found == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if found and wanted.startswith(found):
        with path.open("ab") as file:
            file.write(wanted[len(found) :])
        return
    aside = folder / ".0"
    aside.write_bytes(wanted)
    aside.replace(path)


def _framed(messages: Sequence[Any]) -> bytes:
    with TemporaryDirectory() as folder:  # tensorboardX's writer writes to files only
        file = Path(folder) / FILE
        writer = RecordWriter(str(file))
        for message in messages:
            writer.write(message.SerializeToString(deterministic=True))
        writer.close()
        return file.read_bytes()


def _scalar(tag: str, value: float, step: int, time: float) -> Any:
    return _event(Summary.Value(tag=tag, simple_value=value), step, time)


def _experiment(columns: Mapping[str, str | float], metrics: Mapping[str, str]) -> Any:
    """Declare the HParams table's columns: parameters (name -> example value) and metrics (tag ->
    title)."""
    content = HParamsPluginData(version=0)
    for name, value in columns.items():
        content.experiment.hparam_infos.add(
            name=name, type=TEXT if isinstance(value, str) else NUMBER
        )
    for tag, title in metrics.items():
        content.experiment.metric_infos.add(name={"tag": tag}, display_name=title)
    return _hparams("experiment", content, 0.0)


def _session(
    title: str, parameters: dict[str, str | float], is_success: bool, times: tuple[float, float]
) -> list[Any]:
    """Return the messages of an HParams row, whose `title` must be unique, because TensorBoard
    merges equal ones.

    TensorBoard takes the metrics from the run's last scalars. tensorboardX's `hparams` sets neither
    titles nor times.
    """
    start, end = HParamsPluginData(version=0), HParamsPluginData(version=0)
    start.session_start_info.start_time_secs = times[0]
    start.session_start_info.group_name = title
    for name, value in parameters.items():
        column = start.session_start_info.hparams[name]
        if isinstance(value, str):
            column.string_value = value
        else:
            column.number_value = value
    end.session_end_info.status = SUCCESS if is_success else FAILURE
    end.session_end_info.end_time_secs = times[1]
    return [
        _hparams("session_start_info", start, times[1]),
        _hparams("session_end_info", end, times[1]),
    ]


def _hparams(name: str, content: Any, time: float) -> Any:
    data = SummaryMetadata.PluginData(
        plugin_name="hparams", content=content.SerializeToString(deterministic=True)
    )
    return _event(
        Summary.Value(tag=f"_hparams_/{name}", metadata=SummaryMetadata(plugin_data=data)), 0, time
    )


def _event(value: Any, step: int, time: float) -> Any:
    return Event(wall_time=time, step=step, summary=Summary(value=[value]))
