"""A run that is killed at any time and repeated has the same plans, losses and report."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from real_driver import between_rungs, config_file, search_record, trials_of
from whole_runs import (
    comparable,
    has_claim,
    kill_when,
    num_tuned,
    outcome,
    said,
    written_config,
)

from qpruner.config.load import load_config
from qpruner.pipeline.flow import STAGES
from qpruner.pipeline.run import run
from qpruner.runs.events import Event, Message
from qpruner.runs.records import is_control


@pytest.mark.slow
def test_killed_between_cuts_and_repeated_gives_the_same(tiny_model: Path, tmp_path: Path) -> None:
    """Only the cuts that are missing are made again."""
    rates = {
        "prune": {"rates": [0.1, 0.2], "compensation": "none"},
        "quantize.budget": {"bytes": 200_000},
    }
    undisturbed = config_file(tiny_model, tmp_path / "undisturbed", **rates)
    killed = config_file(tiny_model, tmp_path / "killed", **rates)
    kill_when(killed, (killed.parent / "run" / "cuts" / "cut-10" / "cut.json").exists)
    events: list[Event] = []
    found = [
        run(load_config(config), events.append, until="prune") for config in (killed, undisturbed)
    ]
    made = [
        event.text.partition(":")[0]
        for event in events
        if isinstance(event, Message) and " loss " in event.text
    ]
    assert made == ["20 % pruned", "10 % pruned", "20 % pruned"]
    one, other = (comparable(records.model_dump(mode="json")) for records in found)
    assert one == other
    assert not list(killed.parent.glob("run/.scratch-*")), "nothing half-made is left"


@pytest.mark.slow
def test_killed_inside_every_stage_gives_the_same(
    undisturbed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The signal handler of Tune must not turn Ctrl-C into the regular end of a search."""
    config = written_config(tmp_path / "killed", tiny_model)
    root = config.parent / "run"
    kills = 0
    for stage in (stage.name for stage in STAGES if stage.record and stage.help):
        kill_when(config, (root / f".scratch-{stage}").exists)
        kills += 1
        for index, number in enumerate(
            (signal.SIGKILL, signal.SIGINT) if stage == "search" else ()
        ):
            kill_when(config, lambda index=index: bool(between_rungs(root, index)), number)
            assert not (root / "records" / "search.json").exists()
            kills += 1
    kill_when(config, lambda: num_tuned(root) >= 2)
    said(config)
    assert outcome(root) == outcome(undisturbed)
    assert not list(root.glob(".scratch-*")), "nothing half-made is left"
    told = (root / "report.md").read_text()
    assert re.search(
        r" It ran in \d sessions; the last began with \d trials? already recorded\.", told
    )
    assert f"Finished; resumed {kills + 1} times after a command that did not finish." in told


@pytest.mark.slow
def test_another_budget_starts_from_the_trials_there_are(undisturbed: Path, tmp_path: Path) -> None:
    """The stages before the search stay recorded."""
    root = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    first = search_record(root)
    before = trials_of(root)
    other = (
        "quantize.budget={fraction: 0.8}",
        "search.searcher=random",
        "search.max_trials=3",
        f"output={root}",
    )
    told = said(
        undisturbed.parent / "config.yaml", *(f"--set={key}" for key in other), verb="search"
    )
    assert told.count("already recorded") == 4
    second = search_record(root)
    after = trials_of(root)
    assert second["trials_digest"] == first["trials_digest"]
    assert second["budget_bytes"] > first["budget_bytes"]
    assert second["num_trials"] == 3
    assert second["num_reused"] == len(before)
    assert second["ended"] == "all 3 trials were spent (`search.max_trials`)"
    assert {index: after[index] for index in before} == before, "reused trials stay unchanged"
    plans = {(trial["cut"], *trial["plan"].values()) for trial in after.values()}
    assert len(plans) == len(after) == len(before) + 3
    controls = {
        each["fine_tunes"][0]["origin"]: each for each in second["finalists"] if each["control"]
    }
    assert controls["cut-20-uniform"]["reused"]
    losses = {
        each["index"]: each["fine_tunes"][0]["losses"]["selection"]["mean"]
        for each in second["finalists"]
    }
    assert losses[second["best_index"]] == min(losses.values())


@pytest.mark.slow
def test_a_comparison_is_added_to_a_finished_run(
    undisturbed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The comparison may be killed, and changes nothing of the winner."""
    config = written_config(tmp_path / "added", tiny_model)
    root = config.parent / "run"
    compared = ("--set", "finetune.compare=true")

    def written() -> dict[Path, int]:
        paths = (*(root / "records").iterdir(), root / "final" / "config.json")
        return {path: path.stat().st_mtime_ns for path in paths}

    def table() -> list[str]:
        return [row["name"] for row in json.loads((root / "results.json").read_text())["table"]]

    assert "--set finetune.compare=true" in said(config, "--set", "finetune.compare=false")
    before = written()
    assert {each["index"] for each in search_record(root)["finalists"] if each["control"]} == {
        index for index, trial in trials_of(root).items() if is_control(trial["origin"])
    }, (
        "controls are trials, and scored on fresh rows, "
        "also where nothing is compared after a fine-tune"
    )
    assert table() == ["searched"]
    assert num_tuned(root) == 1
    kill_when(
        config,
        lambda: num_tuned(root) >= 3,
        signal.SIGKILL,
        *compared,
    )
    assert table() == ["searched"]
    assert written() == before
    assert "Unfinished in stage comparison: " in (root / "report.html").read_text()
    claim = json.loads((root / "results.json").read_text())["claim"]
    assert has_claim(root, claim)

    told = said(config, *compared)
    assert told.count("already recorded") == 7
    title = json.loads((root / "results.json").read_text())["table"][-1]["title"]
    assert f"[comparison] {title}, training seed 1: " not in told, (
        "it is neither trained nor scored again"
    )
    assert {path: time for path, time in written().items() if path in before} == before
    assert outcome(root) == outcome(undisturbed)
    before = written()
    assert said(config, *compared).count("already recorded") == 8
    assert written() == before
