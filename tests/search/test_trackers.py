"""Weights & Biases and MLflow as they really are: what they got, read back by their own packages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import demo_rows
from peft import PeftModel
from real_driver import driver, rungs_of, search_config, trials_of

from qpruner.config.schema import LoraConfig, TrainingConfig
from qpruner.data.encoding import encode
from qpruner.data.sources import Example
from qpruner.errors import UserError
from qpruner.models.loading import load_tokenizer
from qpruner.quantization.assembly import assemble, attach_adapters
from qpruner.training.finetune import Listener, Schedule, finetune
from qpruner.training.tracked_finetune import tracked
from qpruner.training.trackers import Trackers, check_trackers

WITHOUT = {name: importlib.util.find_spec(name) is None for name in ("wandb", "mlflow")}
WITH_WANDB = pytest.mark.skipif(WITHOUT["wandb"], reason="wandb is not installed")
WITH_MLFLOW = pytest.mark.skipif(WITHOUT["mlflow"], reason="mlflow is not installed")
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a worker is given stays in its process; here the tests share one."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def environment(folder: Path) -> dict[str, str]:
    """Both trackers on this machine."""
    return {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": SECRET,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }


def mlflow_rows(folder: Path, experiment: str = "run") -> dict[str, Any]:
    """MLflow's runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=environment(folder)["MLFLOW_TRACKING_URI"])
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.info.run_name: run for run in found}


def mlflow_curve(folder: Path, run: Any, metric: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=environment(folder)["MLFLOW_TRACKING_URI"])
    return [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, metric)]


def wandb_records(file: Path) -> Iterator[Any]:
    """What an offline run's file holds: protobuf records in LevelDB's log format behind seven bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):
            return  # still being written
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_has_ended(file: Path) -> bool:
    """Whether the file of an offline run has its last record."""
    return any(record.HasField("exit") for record in wandb_records(file))


def wandb_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Configuration and lines of every row, by name."""
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        row: dict[str, Any] = {}
        for record in wandb_records(file):
            if record.HasField("run"):
                row = rows.setdefault(record.run.display_name, {"lines": []})
                row["config"] = {each.key: json.loads(each.value_json) for each in record.run.config.update}
            if record.HasField("history"):
                line = {each.key or each.nested_key[-1]: json.loads(each.value_json) for each in record.history.item}
                row["lines"].append(line)
    return rows


def mentions(folder: Path, text: str) -> list[Path]:
    """The files below a folder that hold a text."""
    found = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and text.encode() in path.read_bytes():
                found.append(path)
    return found


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For Ray's files: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.slow
@WITH_WANDB
@WITH_MLFLOW
def test_trackers_get_every_rung_and_no_key_is_logged(tiny_model: Path, tmp_path: Path, short_folder: Path) -> None:
    config = search_config(
        tiny_model,
        tmp_path,
        **{"trackers": ["wandb", "mlflow"], "search.max_trials": 2, "finetune.compare": False},
    )
    variables = environment(tmp_path) | {"RAY_TMPDIR": str(short_folder)}
    with driver(config, verb="finetune", **variables) as command:
        code, said = command.end()
        assert code == 0, said
        assert "pid=" not in said, "what workers print is no line of the run"
    rungs, trials = rungs_of(command.run), trials_of(command.run)
    by_mlflow, by_wandb = mlflow_rows(tmp_path), wandb_rows(command.run)
    names = {index: f"trial-{index:04d}-{trials[index]['origin']}" for index in range(2)}
    [tuned] = by_mlflow.keys() - set(names.values())
    assert by_mlflow.keys() == by_wandb.keys()
    for index, name in names.items():
        expected = [(rung["step"], pytest.approx(rung["loss"])) for rung in rungs[index]]
        assert mlflow_curve(tmp_path, by_mlflow[name], "loss") == expected
        assert [(line["_step"], line["loss"]) for line in by_wandb[name]["lines"]] == expected
        size = trials[index]["plan_bytes"]
        assert int(by_mlflow[name].data.params["plan_bytes"]) == by_wandb[name]["config"]["plan_bytes"] == size
        assert by_mlflow[name].info.status == "FINISHED"
    assert [step for step, _ in mlflow_curve(tmp_path, by_mlflow[tuned], "loss")] == [1, 2, 3, 4]
    assert [line["train/global_step"] for line in by_wandb[tuned]["lines"]] == [1, 2, 3, 4]
    assert [place for place in (tmp_path, short_folder) if mentions(place, SECRET)] == [], "recorded or logged"


@pytest.fixture
def build(tiny_model: Path) -> Callable[[], PeftModel]:
    def build() -> PeftModel:
        model, starts = assemble(tiny_model, tiny_model, "block", {"layers.0": 16, "layers.1": 16}, "bfloat16", False)
        return attach_adapters(model, starts, LoraConfig(rank=4, init="plain"), "block", seed=3)

    return build


def trackers_in(folder: Path, *names: str) -> Trackers:
    return Trackers(names, "run", folder, environment(folder))


@pytest.mark.parametrize(
    "tracker", [pytest.param("wandb", marks=WITH_WANDB), pytest.param("mlflow", marks=WITH_MLFLOW)]
)
def test_a_tracker_gets_every_step_of_a_fine_tune(
    tracker: str, build: Callable[[], PeftModel], tiny_model: Path, tmp_path: Path
) -> None:
    examples = [Example("multiple_choice", row["question"], "", "yes") for row in demo_rows("questions_train.jsonl")]
    rows = encode(examples[:24], load_tokenizer(str(tiny_model)), 64)
    settings = TrainingConfig(learning_rate=1e-2, batch_size=4, micro_batch_size=4)
    losses: dict[int, float] = {}
    listener = Listener(on_step=lambda step, total, loss: losses.update({step: loss}))
    with tracked(trackers_in(tmp_path, tracker), "searched, training seed 0", {"row": "searched"}) as now:
        torch.manual_seed(0)
        finetune(build(), rows, settings, Schedule(steps=4), tmp_path, 5, 1, listener=listener, callbacks=[now])
    assert now.errors == []
    if tracker == "mlflow":
        row = mlflow_rows(tmp_path)["searched, training seed 0"]
        curve = mlflow_curve(tmp_path, row, "loss")
        assert row.data.params["row"] == "searched"
    else:
        # Its service may still be writing when `finish` returns (wandb 0.31).
        deadline = time.monotonic() + 60
        while not all(map(wandb_has_ended, tmp_path.glob("wandb/offline-run-*/run-*.wandb"))):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        row = wandb_rows(tmp_path)["searched, training seed 0"]
        curve = [(line["train/global_step"], line["train/loss"]) for line in row["lines"] if "train/loss" in line]
        assert row["config"]["row"] == "searched"
    assert [step for step, _ in curve] == [1, 2, 3, 4]
    assert dict(curve) == pytest.approx(losses, rel=1e-3)


@WITH_MLFLOW
def test_a_tracker_that_goes_away_stops_no_fine_tune(
    build: Callable[[], PeftModel], tiny_model: Path, tmp_path: Path
) -> None:
    rows = encode([Example("text", "", "", "some words")] * 8, load_tokenizer(str(tiny_model)), 32)
    settings = TrainingConfig(batch_size=4, micro_batch_size=4)

    def on_step(step: int, total: int, loss: float) -> None:
        if step == 1:
            (tmp_path / "mlflow.db").write_bytes(b"no data base any more")

    with tracked(trackers_in(tmp_path, "mlflow"), "row", {}) as now:
        listener = Listener(on_step=on_step)
        done = finetune(build(), rows, settings, Schedule(steps=3), tmp_path, 5, 1, listener=listener, callbacks=[now])
    assert done.steps == 3
    (trouble,) = now.errors
    assert trouble.startswith("nothing more is logged to mlflow: ")


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'`trackers` names wandb, .*pip install "qpruner\[wandb\]"'):
        check_trackers(("wandb",))


@WITH_WANDB
def test_wandb_without_a_key_is_refused(tmp_path: Path) -> None:
    hidden = {"HOME": str(tmp_path)}  # where a login would be
    rest = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    code = "from qpruner.training.trackers import check_trackers; check_trackers(('wandb',))"
    done = subprocess.run([sys.executable, "-c", code], env=rest | hidden, capture_output=True, text=True)
    assert done.returncode and "UserError: `trackers` names wandb, and there is no key for it" in done.stderr


@WITH_MLFLOW
@pytest.mark.parametrize("place", [None, "http://me:{secret}@127.0.0.1:9"])
def test_mlflow_without_address_is_refused_without_password(place: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if place:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place.format(secret=SECRET))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as caught:
        check_trackers(("mlflow",))
    assert SECRET not in str(caught.value)
