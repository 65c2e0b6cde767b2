"""Real Weights & Biases and MLflow: what was logged to them is read back by their own packages."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from real_driver import driver, rungs_of, search_config, trials_of

from qpruner.config.schema import TrainingConfig
from qpruner.errors import UserError
from qpruner.training.finetune import Listener, Schedule, finetune
from qpruner.training.tracked_finetune import tracked
from qpruner.training.trackers import Trackers, check_trackers, trackers_of

WITHOUT = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None]
WITH_BOTH = pytest.mark.skipif(bool(WITHOUT), reason=f"not installed: {WITHOUT}")
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restore the environment after each test, since a worker's variables are set in the tests'
    process."""
    with patch.dict(os.environ):
        yield


def environment(folder: Path) -> dict[str, str]:
    """Return variables that keep both trackers on this machine."""
    return {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": SECRET,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }


def trackers_in(folder: Path, *names: str) -> Trackers:
    """Return the trackers of a run, as the driver finds them configured."""
    os.environ.update(environment(folder))
    return trackers_of(names, "run", folder)


def mlflow_runs(folder: Path) -> dict[str, tuple[Any, list[tuple[int, float]]]]:
    """Return MLflow's runs by name, each with its loss curve."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=environment(folder)["MLFLOW_TRACKING_URI"])
    found = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    curves = [client.get_metric_history(run.info.run_id, "loss") for run in found]
    return {
        run.info.run_name: (run, [(each.step, each.value) for each in curve])
        for run, curve in zip(found, curves, strict=True)
    }


def wandb_records(file: Path) -> list[Any]:
    """Read an offline run's file: seven bytes of header, then protobuf records in LevelDB's log
    format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    position = 7
    parts = b""
    found = []
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(data):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def wandb_runs(folder: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the configuration and the logged lines of every run, by name."""
    rows: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    deadline = time.monotonic() + 60
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        # Its service may still be writing when `finish` returns (wandb 0.31).
        records = wandb_records(file)
        while not any(record.HasField("exit") for record in records):
            assert time.monotonic() < deadline, "its last record is missing"
            time.sleep(0.1)
            records = wandb_records(file)
        [run] = [record.run for record in records if record.HasField("run")]
        lines = [
            {
                each.key or each.nested_key[-1]: json.loads(each.value_json)
                for each in record.history.item
            }
            for record in records
            if record.HasField("history")
        ]
        rows[run.display_name] = (
            {each.key: json.loads(each.value_json) for each in run.config.update},
            lines,
        )
    return rows


@pytest.mark.slow
@WITH_BOTH
def test_trackers_get_every_rung_and_no_key_is_logged(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"trackers": ["wandb", "mlflow"], "search.max_trials": 2, "finetune.compare": False}
    config = search_config(tiny_model, tmp_path, **settings)
    # For Ray's files: a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as short_folder:
        with driver(
            config, verb="finetune", **environment(tmp_path), RAY_TMPDIR=short_folder
        ) as command:
            code, said = command.end()
            assert code == 0, said
            assert "pid=" not in said, "what workers print is no line of the run"
        told = subprocess.run(
            ["grep", "-rlF", SECRET, tmp_path, short_folder], capture_output=True, text=True
        )
        assert told.stdout == "", "recorded or logged"
    rungs = rungs_of(command.run)
    trials = trials_of(command.run)
    by_mlflow = mlflow_runs(tmp_path)
    by_wandb = wandb_runs(command.run)
    names = {index: f"trial-{index:04d}-{trials[index]['origin']}" for index in range(2)}
    [tuned] = by_mlflow.keys() - set(names.values())
    assert by_mlflow.keys() == by_wandb.keys()
    for index, name in names.items():
        (run, curve) = by_mlflow[name]
        (about, lines) = by_wandb[name]
        expected = [(rung["step"], pytest.approx(rung["loss"])) for rung in rungs[index]]
        assert curve == [(line["_step"], line["loss"]) for line in lines] == expected
        assert (
            int(run.data.params["plan_bytes"]) == about["plan_bytes"] == trials[index]["plan_bytes"]
        )
        assert run.info.status == "FINISHED"
    assert [step for step, _ in by_mlflow[tuned][1]] == [1, 2, 3, 4]
    assert [line["train/global_step"] for line in by_wandb[tuned][1] if "train/loss" in line] == [
        1,
        2,
        3,
        4,
    ]


SETTINGS = TrainingConfig(learning_rate=1e-2, batch_size=4, micro_batch_size=4)


@pytest.mark.slow
@WITH_BOTH
def test_trackers_get_every_step_of_a_fine_tune(
    fresh: Callable[..., Any], rows: Any, tmp_path: Path
) -> None:
    losses: dict[int, float] = {}
    listener = Listener(on_step=lambda step, total, loss: losses.update({step: loss}))
    with tracked(
        trackers_in(tmp_path, "wandb", "mlflow"), "searched, training seed 0", {"row": "searched"}
    ) as now:
        torch.manual_seed(0)
        finetune(
            fresh(),
            rows,
            SETTINGS,
            Schedule(steps=4),
            tmp_path,
            5,
            1,
            listener=listener,
            callbacks=[now],
        )
    assert now.errors == []
    run, curve = mlflow_runs(tmp_path)["searched, training seed 0"]
    about, lines = wandb_runs(tmp_path)["searched, training seed 0"]
    assert run.data.params["row"] == about["row"] == "searched"
    for each in (
        curve,
        [(line["train/global_step"], line["train/loss"]) for line in lines if "train/loss" in line],
    ):
        assert [step for step, _ in each] == [1, 2, 3, 4]
        assert dict(each) == pytest.approx(losses, rel=1e-3)


@pytest.mark.slow
@WITH_BOTH
def test_a_tracker_that_goes_away_stops_no_fine_tune(
    fresh: Callable[..., Any], rows: Any, tmp_path: Path
) -> None:
    def on_step(step: int, total: int, loss: float) -> None:
        if step == 1:
            (tmp_path / "mlflow.db").write_bytes(b"no data base any more")

    listener = Listener(on_step=on_step)
    with tracked(trackers_in(tmp_path, "mlflow"), "row", {}) as now:
        done = finetune(
            fresh(),
            rows,
            SETTINGS,
            Schedule(steps=3),
            tmp_path,
            5,
            1,
            listener=listener,
            callbacks=[now],
        )
    assert done.steps == 3
    (trouble,) = now.errors
    assert trouble.startswith("logging to mlflow has stopped: ")


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'`trackers` names wandb, .*pip install "qpruner\[wandb\]"'
    ):
        check_trackers(("wandb",))


@WITH_BOTH
def test_wandb_without_a_key_is_refused(tmp_path: Path) -> None:
    hidden = {"HOME": str(tmp_path)}  # where a login would be
    rest = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    code = "from qpruner.training.trackers import check_trackers; check_trackers(('wandb',))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=rest | hidden, capture_output=True, text=True
    )
    assert done.returncode
    assert "UserError: `trackers` names wandb, but there is no API key" in done.stderr


@WITH_BOTH
@pytest.mark.parametrize("place", [None, f"http://me:{SECRET}@127.0.0.1:9"])
def test_mlflow_without_address_is_refused_without_password(
    place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if place:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as caught:
        check_trackers(("mlflow",))
    assert SECRET not in str(caught.value)
