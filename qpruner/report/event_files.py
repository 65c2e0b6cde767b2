"""Writes TensorBoard's event files with tensorboardX, so that writing twice changes nothing.

A file is a function of what it shows. While a search runs it grows at the end, which a TensorBoard that is open
follows; after a crash, a resume or a loss the same call completes or rewrites it, and no row is in it twice.
`SummaryWriter` only appends, with its own times and file names, so messages are made here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import custom_scalars
from tensorboardX.summary import text as text_summary

FILE = "events.out.tfevents"
"""How the names of event files begin, for TensorBoard to see them."""
TEXT, NUMBER, SUCCESS, FAILURE = 1, 3, 1, 2
"""DataType and Status of the HParams plugin's api.proto."""


def write_events(folder: Path, events: Sequence[Any], name: str = "0") -> None:
    """Make a run's event file hold these events and no others.

    Args:
        folder: The run, as TensorBoard names it.
        events: `Event` messages, the first of them with the time at which the run began.
        name: End of the file's name.
    """
    version = Event(wall_time=events[0].wall_time, file_version="brain.Event:2")
    path, wanted = folder / f"{FILE}.{name}", _framed([version, *events])
    found = path.read_bytes() if path.is_file() else b""
    if found == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if found and wanted.startswith(found):
        with path.open("ab") as file:
            file.write(wanted[len(found) :])
        return
    aside = folder / f".{name}"
    aside.write_bytes(wanted)
    aside.replace(path)


def _framed(events: Sequence[Any]) -> bytes:
    with TemporaryDirectory() as folder:  # tensorboardX's writer knows files alone
        file = Path(folder) / FILE
        writer = RecordWriter(str(file))
        for event in events:
            writer.write(event.SerializeToString(deterministic=True))
        writer.close()
        return file.read_bytes()


def scalar(tag: str, value: float, step: int, time: float) -> Any:
    """Make one point of a curve."""
    return _event(Summary.Value(tag=tag, simple_value=value), step, time)


def image(tag: str, png: bytes, step: int, time: float) -> Any:
    """Make a picture of a PNG file, which the slider shows at a step."""
    width, height = struct.unpack(">II", png[16:24])
    picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return _event(Summary.Value(tag=tag, image=picture), step, time)


def text(tag: str, markdown: str, time: float = 0.0) -> Any:
    """Make a text, shown as Markdown."""
    return Event(wall_time=time, summary=text_summary(tag, markdown))


def charts(layout: dict[str, dict[str, list[str]]]) -> Any:
    """Make the layout of the custom scalars: category -> chart -> tags, every run with such a tag a line."""
    lines = {
        category: {chart: ["Multiline", tags] for chart, tags in of_category.items()}
        for category, of_category in layout.items()
    }
    return Event(summary=custom_scalars(lines))


def experiment(columns: Mapping[str, str | float], metrics: Mapping[str, str]) -> Any:
    """Make the HParams table's columns: of parameters, with a value of each, and of metrics, tag -> title."""
    content = HParamsPluginData(version=0)
    for name, value in columns.items():
        content.experiment.hparam_infos.add(name=name, type=TEXT if isinstance(value, str) else NUMBER)
    for tag, title in metrics.items():
        content.experiment.metric_infos.add(name={"tag": tag}, display_name=title)
    return _hparams("experiment", content, 0.0)


def session(title: str, parameters: dict[str, str | float], is_success: bool, times: tuple[float, float]) -> list[Any]:
    """Make a row of the HParams table; its metrics are the run's last scalars.

    tensorboardX's own `hparams` has neither titles nor times.

    Args:
        title: Of its first column; rows of one title are merged, whatever runs they are from.
        parameters: Columns.
        is_success: Whether the trial did not fail.
        times: Unix seconds of start and end.
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
    return [_hparams("session_start_info", start, times[1]), _hparams("session_end_info", end, times[1])]


def _hparams(name: str, content: Any, time: float) -> Any:
    data = SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString(deterministic=True))
    return _event(Summary.Value(tag=f"_hparams_/{name}", metadata=SummaryMetadata(plugin_data=data)), 0, time)


def _event(value: Any, step: int, time: float) -> Any:
    return Event(wall_time=time, step=step, summary=Summary(value=[value]))
