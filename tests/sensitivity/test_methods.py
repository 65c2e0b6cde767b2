"""Every method in one shape, and the stage that runs those that are asked for."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banked_decoders import LEVELS, Banked, banked
from conftest import with_key
from raylets import raylets

from qpruner.config.load import validate_config
from qpruner.config.schema import SensitivityConfig
from qpruner.pipeline.run import run
from qpruner.runs.events import Event, Message, Progress, StageSkipped
from qpruner.runs.records import MethodScores, SensitivityRecord
from qpruner.sensitivity.measurement import measure
from qpruner.sensitivity.methods import (
    MeasurementJob,
    by_expansion,
    by_information,
    by_measurement,
    measure_share,
)


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Banked:
    """Projections that are fused in one matrix."""
    return banked(tmp_path_factory.mktemp("bank"), "phi3")


@pytest.fixture(scope="module")
def scores(phi: Banked) -> dict[str, MethodScores]:
    model, subject = phi.model, phi.subject
    settings = SensitivityConfig(batch_size=2, max_positions=32, num_shuffles=1)
    passed, count = list[tuple[int, int]](), len(subject.rows)
    told = lambda done, total: passed.append((done, total))  # noqa: E731
    found = by_information(model, subject, settings, 0, lambda done, total: None, told)
    assert passed == [(min(done + 2, count), count) for done in range(0, count, 2)], "the pass is told of"
    found |= by_expansion(model, subject, 2, lambda done, total: None)
    return found | by_measurement(measure(model, phi.samples(), phi.starts), subject.levels, seconds=1.0)


def test_every_method_scores_every_group_at_every_width(phi: Banked, scores: dict[str, MethodScores]) -> None:
    assert tuple(scores) == SensitivityConfig().methods
    for found in scores.values():
        assert tuple(sorted(found.values)) == LEVELS
        assert {len(values) for values in found.values.values()} == {len(phi.groups)}
        assert np.isfinite(list(found.values.values())).all()
        assert set(found.values[16]) == {0.0}
        assert found.seconds > 0
        assert MethodScores.model_validate_json(found.model_dump_json()).values == found.values
    for method in ("mutual_information", "fisher", "kl"):
        assert np.mean(scores[method].values[4]) > np.mean(scores[method].values[8]) > 0, method
    information = scores["mutual_information"]
    net = np.array(information.details["raw_nats"]) - np.array(information.details["baseline_nats"])
    for bits in LEVELS:
        assert information.values[bits] == pytest.approx(net * (16 - bits) / (16 - 4))
    assert scores["kl"].details["shared_with"] == ["loss"]
    assert scores["fisher"].details["shared_with"] == ["first_order", "second_order"]
    assert scores["fisher"].seconds == scores["first_order"].seconds


def test_a_process_of_its_own_measures_the_same(phi: Banked, scores: dict[str, MethodScores], tmp_path: Path) -> None:
    phi.model.save_pretrained(tmp_path)
    found = measure_share(MeasurementJob(tmp_path, "float32", phi.subject, batch_size=2, threads=1))
    again = by_measurement(found, LEVELS, seconds=1.0)
    assert again["kl"].values[4] == pytest.approx(scores["kl"].values[4], rel=1e-4)


def record_of(raw: dict[str, Any], events: list[Event]) -> SensitivityRecord:
    """Run up to the sensitivities; `events` are those of this run."""
    events.clear()
    record = run(validate_config(raw), events.append, until="sensitivity").sensitivity
    assert record is not None
    return record


def measured(events: list[Event]) -> set[str]:
    """The methods that told their figures."""
    texts = [event.text for event in events if isinstance(event, Message) and event.stage == "sensitivity"]
    return {text.split()[0] for text in texts}


def test_only_what_is_not_known_yet_is_measured(tiny_raw: dict[str, Any]) -> None:
    """Another method later, another budget, the same again; then another bank, for which nothing is known."""
    raw = copy.deepcopy(tiny_raw) | {"prune": {"rate": 0}}
    raw["quantize"]["group"] = "block"
    events: list[Event] = []
    first = record_of(with_key(raw, "sensitivity.methods", ["kl"]), events)
    assert tuple(first.methods) == ("kl",)
    assert measured(events) == {"kl", "loss"}, "the same passes give both"
    raw = with_key(raw, "sensitivity.methods", ["loss", "fisher", "kl"])
    second = record_of(raw, events)
    assert tuple(second.methods) == ("loss", "fisher", "kl")
    assert measured(events) == {"first_order", "fisher", "second_order"}
    assert second.methods["kl"] == first.methods["kl"]
    assert record_of(with_key(raw, "quantize.budget", {"fraction": 0.9}), events) == second
    assert "sensitivity" in [event.stage for event in events if isinstance(event, StageSkipped)]
    third = record_of(with_key(raw, "lora.rank", 2), events)
    assert measured(events) == {"kl", "loss", "first_order", "fisher", "second_order"}
    assert third.methods["kl"].values != second.methods["kl"].values


def test_batches_are_the_sensitivities_own(tiny_raw: dict[str, Any]) -> None:
    raw = copy.deepcopy(tiny_raw) | {"prune": {"rate": 0}, "sensitivity": {"methods": ["fisher"], "batch_size": 5}}
    raw, events = with_key(raw, "calibration.batch_size", 32), list[Event]()
    first = record_of(raw, events)
    seen = [event.done for event in events if isinstance(event, Progress) and "fisher" in event.detail]
    assert seen == [5, 10, 15, 20, 25, 30, 32], "of 32 samples"
    assert record_of(with_key(raw, "evaluate.batch_size", 2), events) == first, "scoring's batches are no input"


def test_damaged_scores_alone_are_made_anew(tiny_raw: dict[str, Any]) -> None:
    """Nobody reads them before another method is asked for."""
    raw = copy.deepcopy(tiny_raw) | {"prune": {"rate": 0}}
    raw["quantize"]["group"] = "block"
    events: list[Event] = []
    first = record_of(with_key(raw, "sensitivity.methods", ["kl", "fisher"]), events)
    (file,) = (Path(raw["output"]) / "sensitivity").glob("kl-*.json")
    os.truncate(file, 100)
    second = record_of(with_key(raw, "sensitivity.methods", ["kl", "fisher", "loss"]), events)
    (told,) = [event.text for event in events if isinstance(event, Message) and str(file) in event.text]
    (aside,) = (Path(raw["output"]) / "damaged").iterdir()
    assert f"set aside in {aside}" in told
    assert measured(events) - {"warning:"} == {"kl", "loss"}
    assert second.methods["fisher"] == first.methods["fisher"]
    assert second.methods["kl"].values == first.methods["kl"].values


def test_scores_of_an_interrupted_command_are_kept(tiny_raw: dict[str, Any]) -> None:
    raw = copy.deepcopy(tiny_raw) | {"prune": {"rate": 0}, "sensitivity": {"methods": ["mutual_information", "kl"]}}
    raw["quantize"]["group"] = "block"
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if measured(events):
            raise KeyboardInterrupt  # the signal itself is ignored where tests run in the background

    with pytest.raises(KeyboardInterrupt):
        run(validate_config(raw), emit, until="sensitivity")
    assert measured(events) == {"mutual_information"}
    record = record_of(raw, events := [])
    assert measured(events) == {"kl", "loss"} and record.methods.keys() == {"mutual_information", "kl"}


NUM_NODES = 2


@pytest.mark.slow
def test_a_cluster_shares_the_samples_and_measures_the_same(tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    raw = copy.deepcopy(tiny_raw) | {"prune": {"rate": 0}, "sensitivity": {"methods": ["kl"]}}
    raw["quantize"]["group"] = "block"
    raw["model"]["dtype"] = "float32"  # in bfloat16, batches of other rows round differently
    alone = record_of(raw, []).methods["kl"]
    raw["output"] = str(tmp_path / "shared")
    steps: list[Event] = []
    with raylets(NUM_NODES) as cluster:
        shared = run(validate_config(raw), steps.append, address=cluster.address, until="sensitivity").sensitivity
    assert shared is not None
    totals = {event.total for event in steps if isinstance(event, Progress) and event.stage == "sensitivity"}
    assert totals == {NUM_NODES}, "a share for every core"
    for bits in (4, 8):
        assert shared.methods["kl"].values[bits] == pytest.approx(alone.values[bits], rel=1e-3, abs=1e-8)
