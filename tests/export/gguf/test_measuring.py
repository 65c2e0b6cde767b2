"""Loss and speed of GGUF files in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_gguf import write_small, write_small_adapter

from qpruner.data.losses import mean_loss
from qpruner.export.gguf.measuring import loss, measure_speed
from qpruner.export.gguf.writing import write_gguf
from qpruner.hf import load


def test_the_loss_is_that_of_transformers(tiny_model: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_gguf(tiny_model, tmp_path / "tiny.gguf", "tiny")
    told: list[tuple[int, int]] = []
    found = loss((tmp_path / "tiny.gguf", None), rows, on_progress=lambda _, *counts: told.append(counts))
    expected = mean_loss(load(tiny_model).float(), rows, pad_id=1, batch_size=4)
    assert found.mean == pytest.approx(expected.mean, abs=1e-3)
    assert found.by_row == pytest.approx(expected.by_row, abs=1e-2)
    assert told[-1] == (24, 24)


def test_models_are_timed_in_turns(tmp_path: Path) -> None:
    model, adapter = write_small(tmp_path / "small.gguf"), write_small_adapter(tmp_path / "adapter.gguf")
    speeds = measure_speed([(model, None), (model, adapter)], prompt_tokens=32, new_tokens=4, turns=3)
    assert [len(each) for each in speeds] == [3, 3]
    assert all(rate > 0 for each in speeds for speed in each for rate in speed)
