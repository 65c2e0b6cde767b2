"""Keeps the importance of every unit that pruning cuts by, and its picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qpruner.runs.records import PruneRecord

if TYPE_CHECKING:
    import torch

FILE, PICTURE = "importance.npz", "importance.png"
TAG = "prune/importance"
"""The picture's name in TensorBoard."""


def save_importance(
    folder: Path, scores: Mapping[int, Mapping[str, torch.Tensor]], blocks: Mapping[int, float]
) -> None:
    """Write the scores by block and kind, as `<block>.<kind>` ``(units,)``, and those of whole blocks as `block`."""
    arrays: dict[str, Any] = {
        f"{index}.{kind}": score.numpy() for index, kinds in scores.items() for kind, score in kinds.items()
    }
    if blocks:
        arrays["block"] = np.array([[index, score] for index, score in blocks.items()])
    np.savez_compressed(folder / FILE, **arrays)


def load_importance(folder: Path) -> dict[str, Any]:
    """Read what `save_importance` wrote; empty when there is none."""
    path = folder / FILE
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write_pictures(folder: Path, record: PruneRecord, scores: Mapping[str, Any]) -> None:
    """Draw the map as a PNG file for the report, and as an image for TensorBoard."""
    from qpruner.report import event_files
    from qpruner.report.plots.model import importance

    png = importance(record, scores).png()
    (folder / PICTURE).write_bytes(png)
    event_files.write_events(folder / "tensorboard", [event_files.image(TAG, png, 0, time.time())])
