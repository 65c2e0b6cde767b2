"""The benchmark of searchers: tables of measured plans of several cuts, and replays of searches on
them."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Raw

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import search_regret
from search_replay import Replay, Table, Task, replay

GROUPS = ["layers.00-01", "layers.02-03", "layers.04-05", "embeddings"]
LEVELS = ("q4_0", "q8_0")
RISES = [0.03, 0.005, 0.08, 0.06]
CUTS = {"base": 1.0, "cut-10": 0.9}
BUDGET = 300  # every plan of the cut, and half of the base's


def content() -> Raw:
    """A table of every plan of two cuts at two rungs; nothing in it is noisy."""
    plans = list(itertools.product(CUTS, *[LEVELS] * len(GROUPS)))
    losses = [
        2.0 + 2 * (1 - CUTS[cut]) + sum(np.array(RISES) * [level == "q4_0" for level in of])
        for cut, *of in plans
    ]
    sizes = {"q4_0": [50, 50, 60, 60], "q8_0": [100, 90, 80, 100]}
    return {
        "groups": GROUPS,
        "cuts": {
            cut: {
                "fixed_bytes": 0,
                "group_bytes": {
                    level: [int(share * each) for each in of] for level, of in sizes.items()
                },
            }
            for cut, share in CUTS.items()
        },
        "multiply_adds": {cut: round(share * 100) for cut, share in CUTS.items()},
        "after_cut": {"base": 2.1, "cut-10": 2.5},
        "plans": plans,
        "rungs": {"4": [1.0 + 2 * loss for loss in losses], "8": losses},
        "loss_noise": 0.0,
        "sensitivities": {"fisher": {"q4_0": RISES[::-1], "q8_0": [0.0] * 4}},
    }


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content()))
    return path


def replayed(path: Path, searcher: str, **changes: Any) -> Replay:
    asked = {
        "path": path,
        "budget": BUDGET,
        "searcher": searcher,
        "seed": 0,
        "trials": 40,
        "asha": False,
    }
    return replay(Task(**asked | changes))


@pytest.mark.parametrize(("step", "losses"), [("8", [float("nan")] * 32), ("4", [2.0])])
def test_a_table_that_lacks_losses_is_refused(step: str, losses: list[float], table: Path) -> None:
    wrong = content()
    wrong["rungs"][step] = losses
    (table.parent / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="a number for each plan"):
        Table.read(table.parent / "wrong.json")


@pytest.mark.parametrize(("searcher", "in_flight"), [("random", 1), ("gp", 16)])
def test_a_replay_runs_every_plan_of_a_small_space_once(
    table: Path, searcher: str, in_flight: int
) -> None:
    done = replayed(table, searcher, in_flight=in_flight)
    found = Table.read(table)
    feasible = [plan for plan in found.plans if found.space(BUDGET).is_feasible(plan)]
    assert len(feasible) < len(found.plans)
    assert sorted(map(str, feasible)) == sorted(str(trial.plan) for trial in done.trials)
    assert done.regrets()[-1] == 0
    assert (done.repaired == 0) == (searcher == "gp")


def test_a_cut_that_computes_too_much_only_has_its_controls(table: Path) -> None:
    done = replayed(table, "random", flops_fraction=0.95)
    of_base = [trial for trial in done.trials if trial.plan.cut == "base"]
    assert of_base
    assert all(trial.control and not trial.fits for trial in of_base)
    winner = done.returned(len(done.trials))
    assert winner.plan.cut == "cut-10"
    assert done.regrets()[-1] == 0


def test_asha_stops_poor_trials_and_no_control(table: Path) -> None:
    full, early = (replayed(table, "random", asha=asha) for asha in (False, True))
    stopped = [trial for trial in early.trials if not trial.finished]
    assert stopped
    assert not [trial for trial in stopped if trial.control]
    assert early.returned(40) == early.returned(40, as_if_finished=True)
    # Half a trial's steps each: the first rung is at 4 of 8.
    assert early.trials[-1].spent == full.trials[-1].spent - 4 * len(stopped)
    row = search_regret.asha_row([early], [full], 40)
    assert row["winner if none is stopped"] == "same in 1 of 1"
    assert row["without ASHA"] == "same in 1"


@pytest.mark.slow
def test_the_benchmark_tells_every_searcher(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "search_regret.py",
        "--table",
        str(table),
        "--budgets",
        str(BUDGET / 1e6),
        "--seeds",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--searchers", "gp", "random"])
    search_regret.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["searcher"] for row in told["regret"]] == ["gp", "random"]
    assert {row["after 32"] for row in told["regret"]} == {"0.000 [0.000]"}
