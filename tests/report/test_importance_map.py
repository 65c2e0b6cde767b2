"""The importance of every unit is kept as arrays and shown as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from made_records import made_layer, made_prune
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpruner.report.importance_map import load_importance, save_importance, write_pictures


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert load_importance(tmp_path) == {}
    kinds = {"attention": torch.tensor([1.0, 2.5], dtype=torch.float64), "mlp": torch.rand(5, dtype=torch.float64)}
    save_importance(tmp_path, {3: kinds, 11: {"mlp": kinds["mlp"] * 2}}, {3: 0.25, 11: 0.5})
    found = load_importance(tmp_path)
    assert set(found) == {"3.attention", "3.mlp", "11.mlp", "block"}
    assert found["3.attention"].tolist() == [1.0, 2.5]
    assert found["11.mlp"].tolist() == (kinds["mlp"] * 2).tolist()
    assert found["block"].tolist() == [[3, 0.25], [11, 0.5]]
    save_importance(tmp_path, {}, {})
    assert load_importance(tmp_path) == {}


def test_the_picture_is_the_image_in_tensorboard(tmp_path: Path) -> None:
    scores = {"0.mlp": np.random.default_rng(0).gamma(2.0, 1.0, 200)}
    write_pictures(tmp_path, made_prune(made_layer(0, 3, 150)), scores)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    (image,) = events.Images("prune/importance")
    assert image.encoded_image_string == (tmp_path / "importance.png").read_bytes()
    assert image.width > 300 and image.height > 50
