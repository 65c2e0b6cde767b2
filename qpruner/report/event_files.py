"""TensorBoard's event files, written so that writing twice changes nothing.

A file is a function of what it shows. While a search goes on it grows at the end, which a TensorBoard that is open
follows; after a crash, a resume or a loss the same call completes or rewrites it, and no row is there twice.
Format: TFRecord frames (length, masked CRC-32C, bytes, masked CRC-32C) of `Event` messages.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.record_writer import masked_crc32c

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
    wanted = b"".join(_framed(event.SerializeToString(deterministic=True)) for event in (version, *events))
    path = folder / f"{FILE}.{name}"
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


def scalar(tag: str, value: float, step: int, time: float) -> Any:
    """One point of a curve."""
    return _event(Summary.Value(tag=tag, simple_value=value), step, time)


def image(tag: str, png: bytes, size: tuple[int, int], step: int, time: float) -> Any:
    """A picture.

    Args:
        tag: Its name.
        png: The file.
        size: Width and height in pixels.
        step: Where the slider shows it.
        time: Unix seconds.
    """
    width, height = size
    picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return _event(Summary.Value(tag=tag, image=picture), step, time)


def text(tag: str, markdown: str, time: float = 0.0) -> Any:
    """A text, shown as Markdown."""
    from tensorboardX.summary import text as text_summary

    return Event(wall_time=time, summary=text_summary(tag, markdown))


def charts(layout: dict[str, dict[str, list[str]]]) -> Any:
    """The layout of the custom scalars: category -> chart -> tags, every run with such a tag a line."""
    from tensorboardX.summary import custom_scalars

    lines = {
        category: {chart: ["Multiline", tags] for chart, tags in of_category.items()}
        for category, of_category in layout.items()
    }
    return Event(summary=custom_scalars(lines))


def experiment(columns: Mapping[str, str | float], metrics: Mapping[str, str]) -> Any:
    """The HParams table's columns.

    Args:
        columns: Parameters, with a value of each.
        metrics: Tag -> what its column is called.
    """
    content = HParamsPluginData(version=0)
    for name, value in columns.items():
        content.experiment.hparam_infos.add(name=name, type=TEXT if isinstance(value, str) else NUMBER)
    for tag, called in metrics.items():
        content.experiment.metric_infos.add(name={"tag": tag}, display_name=called)
    return _event(Summary.Value(tag="_hparams_/experiment", metadata=_of_hparams(content)), 0, 0.0)


def session(called: str, parameters: dict[str, str | float], is_success: bool, times: tuple[float, float]) -> list[Any]:
    """A row of the HParams table; its metrics are the run's last scalars.

    Args:
        called: What its first column says; rows of one name are merged, whatever runs they are from.
        parameters: Columns.
        is_success: Whether the trial did not fail.
        times: Unix seconds of start and end.
    """
    start, end = HParamsPluginData(version=0), HParamsPluginData(version=0)
    start.session_start_info.start_time_secs = times[0]
    start.session_start_info.group_name = called
    for name, value in parameters.items():
        column = start.session_start_info.hparams[name]
        if isinstance(value, str):
            column.string_value = value
        else:
            column.number_value = value
    end.session_end_info.status = SUCCESS if is_success else FAILURE
    end.session_end_info.end_time_secs = times[1]
    return [
        _event(Summary.Value(tag=f"_hparams_/session_{name}_info", metadata=_of_hparams(content)), 0, times[1])
        for name, content in (("start", start), ("end", end))
    ]


def _of_hparams(content: Any) -> Any:
    data = SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString(deterministic=True))
    return SummaryMetadata(plugin_data=data)


def _event(value: Any, step: int, time: float) -> Any:
    return Event(wall_time=time, step=step, summary=Summary(value=[value]))


def _framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
