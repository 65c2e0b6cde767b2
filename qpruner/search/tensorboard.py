"""Shows a search in TensorBoard: `tensorboard --logdir RUN` compares its trials.

HParams has one row for each trial that is over. Scalars has the trials' curves, and the best score
so far of searched plans. Text has the configuration.

A file depends only on the records that it shows, so writing it twice changes nothing: during a
search new messages are appended, after a crash the repeated command completes or rewrites it. The
`SummaryWriter` of torch and of tensorboardX names every file by time and host and writes the time
into it, so a repeated command would add files that double every curve. It also sets neither titles
nor times of the HParams table's rows.
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

# Values of DataType and Status in the HParams plugin's api.proto.
TEXT = 1
NUMBER = 3
SUCCESS = 1
FAILURE = 2

RUNGS = "validation by rung"
"""Tag group of the HParams table's metrics; in Scalars its name sorts after the groups of the
curves."""
BEST = "search/best so far"


class Board:
    """Follows a search's events and keeps its TensorBoard files in the run folder `root`."""

    def __init__(self, root: Path, config: RunConfig) -> None:
        self._folder = root / FOLDER
        self._config = config
        self._search: SearchState | None = None
        self._trials: dict[int, TrialRecord] = {}

    def listen(self, event: events.Event) -> None:
        """Update the files after an event.

        A write error is logged, and the next command writes what is missing.
        """
        try:
            self._listen(event)
        except OSError as error:
            logger.warning(
                "TensorBoard's files could not be written: %s; repeat the command to write what is "
                "missing",
                error,
            )

    def _listen(self, event: events.Event) -> None:
        match event:
            case events.SearchPlanned(search, trials):
                self._search = search
                self._trials = {trial.index: trial for trial in trials}
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
        trials = in_order_of_end(self._trials.values())
        keys = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
        text = text_summary("config", f"```yaml\n{keys}```")
        messages: list[Any] = [Event(wall_time=0.0, summary=text)]
        if trials:  # without trials there is no table
            whole = max(trials, key=lambda trial: len(trial.plan))  # a cut may lack blocks
            columns = _columns(search, whole)
            messages.append(_experiment(columns, _metrics(search, self._config)))

        of_this_search = [trial for trial in trials if trial.search == search.search]
        best = best_so_far(of_this_search, search.metric)
        for count, trial in enumerate(of_this_search, 1):
            value = best[count - 1]
            if value is not None:
                moment = trial.times[-1] if trial.times else 0.0
                messages.append(_scalar(BEST, value, count, moment))
        write_events(self._folder / "search", messages)


def write_trial(folder: Path, search: SearchState, trial: TrialRecord) -> None:
    """Write a trial's curves and, once it is over, its row of the HParams table."""
    if not trial.rungs and not trial.is_over:
        return
    started, *moments = trial.times or (0.0,)
    moments += [started] * (len(trial.rungs) + 1 - len(moments))
    messages: list[Any] = []
    step = 0
    for rung, moment in zip(trial.rungs, moments, strict=False):
        for loss in rung.train_losses:
            step += 1
            messages.append(_scalar("train/loss", loss, step, moment))
        scores = {"loss": rung.loss, accuracy_name(search.metrics): rung.accuracy}
        for name, value in scores.items():
            if value is not None:
                of_rung = f"{RUNGS}/{name} at step {rung.step}"
                messages.append(_scalar(f"validation/{name}", value, rung.step, moment))
                messages.append(_scalar(of_rung, value, rung.step, moment))
    if trial.is_over:
        # Fits a column of 10 em. Without a title TensorBoard shows the file's path, which begins
        # alike in all rows.
        title = f"{trial.index:04d} of {folder.parent.name}"
        has_worked = trial.status != "failed"
        messages += _session(title, _columns(search, trial), has_worked, (started, moments[-1]))
    write_events(folder / run_name(trial), messages)


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
    last = f"{score_name(search)} at step {config.search.rungs[-1]}"
    titles = [last]
    for name in ("loss", accuracy_name(search.metrics)):
        if name == "loss" or config.search.tasks:
            titles += [f"{name} at step {step}" for step in config.search.rungs]
    return {f"{RUNGS}/{title}": title for title in titles}


# ---- messages and files


def write_events(folder: Path, messages: Sequence[Any]) -> None:
    """Write exactly these messages to the event file in a folder.

    TensorBoard shows the folder as one run. Messages that follow those in the file are appended,
    because TensorBoard does not read a file again that it has open.
    """
    version = Event(wall_time=messages[0].wall_time, file_version="brain.Event:2")
    content = _framed([version, *messages])
    path = folder / f"{FILE}.0"
    written = path.read_bytes() if path.is_file() else b""
    if written == content:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if written and content.startswith(written):
        with path.open("ab") as file:
            file.write(content[len(written) :])
        return
    aside = folder / ".0"
    aside.write_bytes(content)
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
    """Declare the columns of the HParams table.

    Args:
        columns: Name of a parameter -> a value of it, which gives its type.
        metrics: Tag of a metric -> title of its column.
    """
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
    """Return the messages of a row in the HParams table.

    TensorBoard takes the metrics from the run's last scalars. It merges rows with equal titles, so
    each needs its own.
    """
    start = HParamsPluginData(version=0)
    end = HParamsPluginData(version=0)
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
