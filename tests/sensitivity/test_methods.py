"""The scores of all methods have the same shape, and the stage computes only the configured
methods."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banked_decoders import LEVELS, Banked, banked
from conftest import changed_by

from qpruner.config.load import validate_config
from qpruner.config.schema import SensitivityConfig
from qpruner.pipeline.run import run
from qpruner.runs.events import Event, Message, Progress, StageSkipped
from qpruner.runs.records import MethodScores, SensitivityRecord
from qpruner.sensitivity.methods import by_expansion, by_information, by_measurement, table_rises

Raw = dict[str, Any]


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Banked:
    """A model whose projections are fused into one matrix; its embeddings and head take 8 or 16
    bits."""
    return banked(
        tmp_path_factory.mktemp("bank"),
        "phi3",
        embeddings=("int8", "bf16"),
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def scores(phi: Banked) -> dict[str, MethodScores]:
    settings = SensitivityConfig(batch_size=2, max_positions=32, num_shuffles=1)
    groups = phi.subject.groups
    measured = by_measurement(phi.model, phi.subject)
    expanded = by_expansion(phi.model, phi.subject, table_rises(measured, groups))
    return by_information(phi.model, phi.subject, settings, 0) | expanded | measured


def test_every_method_scores_every_group_in_every_format(
    phi: Banked, scores: dict[str, MethodScores]
) -> None:
    assert tuple(scores) == SensitivityConfig().methods
    for found in scores.values():
        assert tuple(found.values) == LEVELS
        assert {len(values) for values in found.values.values()} == {len(phi.subject.groups)}
        assert np.isfinite([values[1:-1] for values in found.values.values()]).all()
        assert found.values["nf4"][0] is found.values["nf4"][-1] is None, (
            "embeddings and head are not offered it"
        )
        assert set(found.values["bf16"]) == {0.0}
        assert found.seconds > 0
        assert MethodScores.model_validate_json(found.model_dump_json()).values == found.values
    for method in ("mutual_information", "fisher", "kl"):
        assert (
            np.mean(scores[method].values["nf4"][1:-1])
            > np.mean(scores[method].values["int8"][1:-1])
            > 0
        ), method
    information = scores["mutual_information"]
    share = information.values["int8"][1] / information.values["nf4"][1]
    assert share == pytest.approx((16 - 8.008) / (16 - 4.5), rel=1e-3), "linear in bytes"
    assert scores["fisher"].seconds == scores["first_order"].seconds


def test_embeddings_and_head_are_scored_as_measured(scores: dict[str, MethodScores]) -> None:
    """For mutual information they are worth as much as the best of the other groups."""
    packed = {name: found.values["int8"] for name, found in scores.items()}
    for at in (0, -1):
        assert packed["first_order"][at] == packed["loss"][at]
        assert packed["fisher"][at] == packed["second_order"][at] == packed["kl"][at] > 0
        assert packed["mutual_information"][at] == max(packed["mutual_information"][1:-1])


@pytest.fixture
def raw(tiny_raw: Raw) -> Raw:
    return changed_by("prune={rate: 0}; quantize.group=block", tiny_raw)


def record_of(raw: Raw, change: str, events: list[Event]) -> SensitivityRecord:
    """Run until the sensitivities, and collect the events of this run in `events`."""
    events.clear()
    record = run(
        validate_config(changed_by(change, raw)), events.append, until="sensitivity"
    ).sensitivity
    assert record is not None
    return record


def measured(events: list[Event]) -> set[str]:
    """Return the methods whose results were reported."""
    texts = [
        event.text
        for event in events
        if isinstance(event, Message) and event.stage == "sensitivity"
    ]
    return {text.split()[0] for text in texts} - {"warning:"}


def test_only_missing_sensitivities_are_measured(raw: Raw) -> None:
    """After an interruption, with a new method, with a new budget, with a damaged file, and with a
    new bank."""
    events: list[Event] = []

    def interrupt(event: Event) -> None:
        events.append(event)
        if measured(events):
            # the signal itself is ignored where tests run in the background
            raise KeyboardInterrupt

    two = "sensitivity.methods=[mutual_information, kl]"
    with pytest.raises(KeyboardInterrupt):
        run(validate_config(changed_by(two, raw)), interrupt, until="sensitivity")
    assert measured(events) == {"mutual_information"}
    first = record_of(raw, two, events)
    assert measured(events) == {"kl", "loss"}, "both come from the same passes"
    assert first.methods.keys() == {"mutual_information", "kl"}
    three = "sensitivity.methods=[loss, fisher, kl]"
    second = record_of(raw, three, events)
    assert (
        tuple(second.methods) == ("loss", "fisher", "kl")
        and second.methods["kl"] == first.methods["kl"]
    )
    assert measured(events) == {"first_order", "fisher", "second_order"}
    assert record_of(raw, f"{three}; quantize.budget={{fraction: 0.9}}", events) == second
    assert "sensitivity" in [event.stage for event in events if isinstance(event, StageSkipped)]
    # The damage is found when the configured methods change, because the scores are read again
    # then.
    (file,) = (Path(raw["output"]) / "sensitivities").glob("kl-*.json")
    os.truncate(file, 100)
    third = record_of(raw, "sensitivity.methods=[kl, fisher]", events)
    assert measured(events) == {"kl", "loss"}
    assert third.methods["fisher"] == second.methods["fisher"]
    assert third.methods["kl"].values == second.methods["kl"].values
    (message,) = [
        event.text for event in events if isinstance(event, Message) and str(file) in event.text
    ]
    (aside,) = (Path(raw["output"]) / "damaged").iterdir()
    assert f"set aside in {aside}" in message
    fourth = record_of(raw, f"{three}; lora.rank=2", events)
    assert measured(events) == {"kl", "loss", "first_order", "fisher", "second_order"}
    assert fourth.methods["kl"].values != second.methods["kl"].values


def steps(events: list[Event], detail: str) -> int:
    """Return the number of steps of some work of the stage."""
    work = [
        event for event in events if isinstance(event, Progress) and event.stage == "sensitivity"
    ]
    (total,) = {event.total for event in work if event.detail == detail}
    return total


def test_packed_embeddings_are_measured_without_the_blocks(raw: Raw) -> None:
    """If neither KL nor loss is asked for, the passes are few; the scores are the same as with
    them."""
    events: list[Event] = []
    packed = (
        "quantize.embeddings=[int8, bf16]; quantize.budget={bytes: 300000}; sensitivity.methods="
    )
    alone = record_of(raw, f"{packed}[fisher]", events).methods["fisher"]
    few = steps(events, "embeddings")
    assert measured(events) == {"first_order", "fisher", "second_order"}
    both = record_of(raw, f"{packed}[kl, fisher]", events)
    assert measured(events) == {"kl", "loss"}
    assert steps(events, "kl, loss") == few * (1 + 2 * (len(both.groups) - 1)), (
        "nf4 and int8 for the blocks"
    )
    assert both.methods["fisher"].values == alone.values
    assert alone.values["int8"][0] == pytest.approx(both.methods["kl"].values["int8"][0], rel=1e-3)


def test_sensitivities_use_their_own_batch_size(raw: Raw) -> None:
    events: list[Event] = []
    change = "sensitivity.methods=[fisher]; sensitivity.batch_size=5; calibration.batch_size=32"
    first = record_of(raw, change, events)
    seen = [
        (event.done, event.total)
        for event in events
        if isinstance(event, Progress) and "fisher" in event.detail
    ]
    assert seen == [(done, 7) for done in range(1, 8)], "of 32 samples"
    assert record_of(raw, f"{change}; evaluate.batch_size=2", events) == first, (
        "scoring's batches are no input"
    )
