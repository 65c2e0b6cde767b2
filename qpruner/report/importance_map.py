"""Importance of every unit, and what was kept: the arrays, and the heat map of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qpruner.runs.records import LayerWidths, PruneRecord

if TYPE_CHECKING:
    import torch

FILE, PICTURE = "importance.npz", "importance.png"
TAG = "prune/importance"
"""The picture's name in TensorBoard."""
BLOCKS = "block"
NUM_COLUMNS = 96
"""Units of a block are drawn in at most this many columns, each the mean of its neighbours in the ranking."""
KINDS = {"attention": "kept_kv_groups", "mlp": "kept_mlp_channels", "expert": "kept_experts"}
TITLES = {"attention": "key/value groups", "mlp": "MLP channels", "expert": "experts"}

Floats = npt.NDArray[np.float64]


def save_importance(
    folder: Path, scores: Mapping[int, Mapping[str, torch.Tensor]], blocks: Mapping[int, float]
) -> None:
    """Write the scores by block and kind, as `<block>.<kind>` ``(units,)``, and those of whole blocks as `block`."""
    arrays: dict[str, Any] = {
        f"{index}.{kind}": score.numpy() for index, kinds in scores.items() for kind, score in kinds.items()
    }
    if blocks:
        arrays[BLOCKS] = np.array([[index, score] for index, score in blocks.items()])
    np.savez_compressed(folder / FILE, **arrays)


def load_importance(folder: Path) -> dict[str, Floats]:
    """What `save_importance` wrote; empty when there is none."""
    path = folder / FILE
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def draw(record: PruneRecord, scores: Mapping[str, Floats]) -> Any:
    """The heat map as a matplotlib figure: by block, importance of the units in the order of their ranking, and beside
    it the share of them that was kept; last, importance of whole blocks where they could go, those that went in red."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if any(name.endswith(f".{kind}") for name in scores)] or ["attention", "mlp"]
    widths = [5, 1] * len(kinds) + ([2] if BLOCKS in scores else [])
    figure = Figure(figsize=(0.92 * sum(widths), 1.2 + 0.16 * len(record.layers)), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths, sharey=True)[0]
    for kind, importance_axis, kept_axis in zip(kinds, axes[::2], axes[1::2], strict=False):
        rows = [_ranked(scores.get(f"{layer.layer}.{kind}")) for layer in record.layers]
        with np.errstate(divide="ignore"):
            importance = np.log10(np.array(rows))
        importance[~np.isfinite(importance)] = np.nan
        image = importance_axis.imshow(importance, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=importance_axis, label="log10 importance", location="bottom", shrink=0.7)
        importance_axis.set(title=TITLES[kind], xlabel="least to most important", xticks=[])
        kept = [_kept_share(layer, kind) for layer in record.layers]
        kept_axis.barh(range(len(kept)), kept, color="tab:gray")
        kept_axis.set(title="kept", xlim=(0, 1))
    if BLOCKS in scores:
        indices, values = scores[BLOCKS].T
        colors = ["tab:red" if index in record.dropped_blocks else "tab:gray" for index in indices]
        axes[-1].barh(indices, values, color=colors)
        axes[-1].set(title="whole blocks", xlabel="importance")
    axes[0].set(ylabel="block", ylim=(len(record.layers) - 0.5, -0.5))
    return figure


def write_pictures(folder: Path, record: PruneRecord, scores: Mapping[str, Floats]) -> None:
    """The heat map as a PNG file for the report, and as an image for TensorBoard."""
    from qpruner.report import event_files
    from qpruner.report.search_pictures import png_of

    png, size = png_of(draw(record, scores))
    (folder / PICTURE).write_bytes(png)
    event_files.write_events(folder / "tensorboard", [event_files.image(TAG, png, size, 0, time.time())])


def _ranked(scores: Floats | None) -> Floats:
    """A block's scores in ascending order, averaged into columns; NaN where the block was not scored."""
    if scores is None:
        return np.full(NUM_COLUMNS, np.nan)
    ordered = np.sort(scores)
    if len(ordered) < NUM_COLUMNS:
        return ordered[np.arange(NUM_COLUMNS) * len(ordered) // NUM_COLUMNS]
    return np.array([part.mean() for part in np.array_split(ordered, NUM_COLUMNS)])


def _kept_share(layer: LayerWidths, kind: str) -> float:
    kept = getattr(layer, KINDS[kind])
    base = {"attention": layer.base_kv_groups, "mlp": layer.base_mlp_channels, "expert": layer.base_experts}[kind]
    return len(kept) / base if base else 1.0
