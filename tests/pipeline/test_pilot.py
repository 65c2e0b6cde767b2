"""`training.learning_rate: auto` tries rates before the search, whose trials have the best one."""

import shutil
from pathlib import Path

import pytest
from conftest import Raw, raw_config, with_keys

from qpruner.config.load import validate_config
from qpruner.errors import ConfigError, StageError
from qpruner.pipeline import pilot
from qpruner.pipeline.run import run
from qpruner.runs.events import Event, StageSkipped
from qpruner.runs.records import VALIDATION, FineTune, PilotRecord, Results
from qpruner.runs.run_dir import RunDir
from qpruner.search.trial_records import read_trials

SCALES = {
    "training.method": "scales",
    "quantize.bits": None,
    "quantize.formats": ["q4_0", "q8_0"],
    "prune.rate": 0.0,
    "sensitivity.methods": ["first_order"],
}


def ignore(event: Event) -> None:
    pass


def piloted(raw: Raw, until: str = "pilot") -> tuple[Results, list[Event]]:
    events: list[Event] = []
    results = run(validate_config(raw), events.append, until=until)
    return results, events


def recorded(results: Results) -> PilotRecord:
    assert results.pilot
    return results.pilot


def losses(record: PilotRecord, method: str) -> dict[float, float]:
    of_method = [fine_tune for fine_tune in record.fine_tunes if fine_tune.method == method]
    return {tuned.learning_rate: tuned.losses[VALIDATION].mean for tuned in of_method}


def auto(model: Path, folder: Path, **keys: object) -> Raw:
    own = {"training.learning_rate": "auto", "search.max_concurrent": 1}
    return with_keys(raw_config(model, folder), **own | keys)


@pytest.fixture(scope="module")
def tried(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Raw, PilotRecord]:
    raw = auto(tiny_model, tmp_path_factory.mktemp("pilot") / "run", **{"search.max_trials": 2})
    return raw, recorded(piloted(raw)[0])


def test_the_best_rate_on_validation_rows_is_taken(tried: tuple[Raw, PilotRecord]) -> None:
    record = tried[1]
    of_rates = losses(record, "adapter")
    assert tuple(of_rates) == pilot.RATES["adapter"]
    assert record.rates == {"adapter": min(of_rates, key=of_rates.__getitem__)}
    assert len(set(of_rates.values())) == len(of_rates)
    for rate, loss in of_rates.items():
        assert f"{loss:.4f} at {rate:g}" in record.text


def test_a_fine_tune_at_a_rate_that_diverges_is_not_taken(
    tried: tuple[Raw, PilotRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tried[0] | {"output": str(tmp_path / "run")}
    shutil.copytree(tried[0]["output"], raw["output"])
    monkeypatch.setitem(pilot.RATES, "adapter", (1e-3, 1e30))
    record = recorded(piloted(raw)[0])
    assert record.rates == {"adapter": 1e-3}
    assert "diverged at 1e+30" in record.text
    monkeypatch.setitem(pilot.RATES, "adapter", (1e30,))
    with pytest.raises(StageError, match=r"set a lower one as `training\.learning_rate`"):
        piloted(raw)


@pytest.mark.slow
def test_trials_and_finalists_have_that_rate(tried: tuple[Raw, PilotRecord]) -> None:
    """The trial of the plan on which rates were tried repeats the best of those fine-tunes.

    The search begins after a command that ended with the pilot, which is not done again.
    """
    raw, record = tried
    results, events = piloted(raw, until="search")
    assert "pilot" in {event.stage for event in events if isinstance(event, StageSkipped)}
    [rate] = record.rates.values()
    [best] = [tuned for tuned in record.fine_tunes if tuned.learning_rate == rate]
    [trials] = RunDir(Path(raw["output"])).trials.iterdir()
    [same] = [
        trial for trial in read_trials(trials) if (trial.cut, trial.plan) == (best.cut, best.plan)
    ]
    score = same.rungs[-1].loss
    by_distance = sorted(abs(score - loss) for loss in losses(record, "adapter").values())
    assert abs(score - best.losses[VALIDATION].mean) == by_distance[0]
    assert by_distance[0] < 5e-4 < by_distance[1], "fine-tunes round their adapters to 16 bits"
    assert results.search
    fine_tunes: list[FineTune] = [
        tuned for finalist in results.search.finalists for tuned in finalist.fine_tunes
    ]
    assert {tuned.learning_rate for tuned in fine_tunes} == {rate}


@pytest.mark.slow
def test_each_method_of_a_run_has_its_rate(tiny_model: Path, tmp_path: Path) -> None:
    """The models that are not packed, to which `compare` gives the fine-tune too, get adapters."""
    results, _ = piloted(auto(tiny_model, tmp_path / "run", **SCALES))
    record = recorded(results)
    assert record.rates.keys() == {"scales", "adapter"}
    for method, rate in record.rates.items():
        of_rates = losses(record, method)
        assert tuple(of_rates) == pilot.RATES[method]  # type: ignore[index]
        assert rate == min(of_rates, key=of_rates.__getitem__)


def test_a_rate_for_each_method_can_be_given(tiny_model: Path, tmp_path: Path) -> None:
    raw = with_keys(
        raw_config(tiny_model, tmp_path / "run"),
        **{"training.learning_rate": {"adapter": 0.001, "scales": 0.002}},
    )
    training = validate_config(raw).training
    assert (training.rate_of("adapter"), training.rate_of("scales")) == (0.001, 0.002)
    assert not piloted(raw, until="prepare")[0].pilot
    for wrong in ("fast", {"adapter": 0.001}, -1.0):
        with pytest.raises(ConfigError, match=r"training\.learning_rate"):
            validate_config(with_keys(raw, **{"training.learning_rate": wrong}))
