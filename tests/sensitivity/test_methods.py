"""The scores of all methods have the same shape, and the stage computes only the configured
methods."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from banked_decoders import LEVELS, Banked, banked
from conftest import changed_by, events_of, texts

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
    for method, score in scores.items():
        assert tuple(score.values) == LEVELS
        assert {len(values) for values in score.values.values()} == {len(phi.subject.groups)}
        blocks = {name: values[1:-1] for name, values in score.values.items()}
        assert np.isfinite(list(blocks.values())).all()
        # Embeddings and head are not offered it.
        assert score.values["nf4"][0] is None
        assert score.values["nf4"][-1] is None
        assert set(score.values["bf16"]) == {0.0}
        assert score.seconds > 0
        assert MethodScores.model_validate_json(score.model_dump_json()).values == score.values
        if method in ("mutual_information", "fisher", "kl"):
            assert np.mean(blocks["nf4"]) > np.mean(blocks["int8"]) > 0, method
    information = scores["mutual_information"]
    share = information.values["int8"][1] / information.values["nf4"][1]
    assert share == pytest.approx((16 - 8.008) / (16 - 4.5), rel=1e-3), "linear in bytes"
    assert scores["fisher"].seconds == scores["first_order"].seconds


@pytest.mark.parametrize("at", [0, -1])
def test_embeddings_and_head_are_scored_as_measured(
    scores: dict[str, MethodScores], at: int
) -> None:
    """For mutual information they are worth as much as the best of the other groups."""
    packed = {name: score.values["int8"][at] for name, score in scores.items()}
    assert packed["first_order"] == packed["loss"]
    assert packed["fisher"] == packed["second_order"] == packed["kl"] > 0
    blocks = scores["mutual_information"].values["int8"][1:-1]
    assert packed["mutual_information"] == max(blocks)


@pytest.fixture
def raw(tiny_raw: Raw) -> Raw:
    return changed_by("prune={rate: 0}; quantize.group=block", tiny_raw)


def record_of(raw: Raw, change: str, events: list[Event]) -> SensitivityRecord:
    """Run until the sensitivities, and collect the events of this run in `events`."""
    events.clear()
    config = validate_config(changed_by(change, raw))
    record = run(config, events.append, until="sensitivity").sensitivity
    assert record is not None
    return record


def measured(events: list[Event]) -> set[str]:
    """Return the methods whose results were reported."""
    messages = events_of(events, Message, "sensitivity")
    return {event.text.split()[0] for event in messages} - {"warning:"}


def test_an_interrupted_stage_keeps_the_methods_it_has_measured(raw: Raw) -> None:
    two = "sensitivity.methods=[mutual_information, kl]"
    events: list[Event] = []

    def interrupt(event: Event) -> None:
        events.append(event)
        if measured(events):
            # the signal itself is ignored where tests run in the background
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(validate_config(changed_by(two, raw)), interrupt, until="sensitivity")
    assert measured(events) == {"mutual_information"}
    record = record_of(raw, two, events)
    assert measured(events) == {"kl", "loss"}, "both come from the same passes"
    assert record.methods.keys() == {"mutual_information", "kl"}


def test_only_missing_sensitivities_are_measured(raw: Raw) -> None:
    """With a new method, with a new budget, with a damaged file, and with a new bank."""
    events: list[Event] = []
    first = record_of(raw, "sensitivity.methods=[kl]", events).methods
    three = "sensitivity.methods=[loss, fisher, kl]"
    record = record_of(raw, three, events)
    second = record.methods
    assert tuple(second) == ("loss", "fisher", "kl")
    assert second["kl"] == first["kl"]
    assert measured(events) == {"first_order", "fisher", "second_order"}
    assert record_of(raw, f"{three}; quantize.budget={{fraction: 0.9}}", events) == record
    assert events_of(events, StageSkipped, "sensitivity")
    # The damage is found when the configured methods change, because the scores are read again
    # then.
    (file,) = (Path(raw["output"]) / "sensitivities").glob("kl-*.json")
    os.truncate(file, 100)
    third = record_of(raw, "sensitivity.methods=[kl, fisher]", events).methods
    assert measured(events) == {"kl", "loss"}
    assert third["fisher"] == second["fisher"]
    assert third["kl"].values == second["kl"].values
    (aside,) = (Path(raw["output"]) / "damaged").iterdir()
    assert any(str(file) in text and str(aside) in text for text in texts(events))
    fourth = record_of(raw, f"{three}; lora.rank=2", events).methods
    assert measured(events) == {"kl", "loss", "first_order", "fisher", "second_order"}
    assert fourth["kl"].values != second["kl"].values


def steps(events: list[Event], detail: str) -> int:
    """Return the number of steps of some work of the stage."""
    progress = events_of(events, Progress, "sensitivity")
    (total,) = {event.total for event in progress if event.detail == detail}
    return total


def test_packed_embeddings_are_measured_without_the_blocks(raw: Raw) -> None:
    """If neither KL nor loss is asked for, the passes are few; the scores are the same as with
    them."""
    events: list[Event] = []
    raw = changed_by("quantize.embeddings=[int8, bf16]; quantize.budget={bytes: 300000}", raw)
    alone = record_of(raw, "sensitivity.methods=[fisher]", events).methods["fisher"].values
    few = steps(events, "embeddings")
    assert measured(events) == {"first_order", "fisher", "second_order"}
    both = record_of(raw, "sensitivity.methods=[kl, fisher]", events)
    assert measured(events) == {"kl", "loss"}
    of_blocks = 2 * (len(both.groups) - 1)  # nf4 and int8
    assert steps(events, "kl, loss") == few * (1 + of_blocks)
    assert both.methods["fisher"].values == alone
    assert alone["int8"][0] == pytest.approx(both.methods["kl"].values["int8"][0], rel=1e-3)


def test_sensitivities_use_their_own_batch_size(raw: Raw) -> None:
    """Of 32 samples; the batches of scoring are no input."""
    events: list[Event] = []
    change = "sensitivity.methods=[fisher]; sensitivity.batch_size=5; calibration.batch_size=32"
    first = record_of(raw, change, events)
    progress = events_of(events, Progress, "sensitivity")
    steps = [(event.done, event.total) for event in progress if "fisher" in event.detail]
    assert steps == [(done, 7) for done in range(1, 8)]
    assert record_of(raw, f"{change}; evaluate.batch_size=2", events) == first
