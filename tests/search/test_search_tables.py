"""The benchmark of searchers: tables of measured plans, replays of searches on them, and the figures of replays."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import demo_rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import search_regret  # noqa: E402
from search_replay import BadTable, EndedTrial, Replay, Table, Task, replay  # noqa: E402
from search_results import NEVER, asha_against_full, summarize  # noqa: E402
from search_tables import LORA, Evaluator, Job, build_bank  # noqa: E402

from qpruner.data.losses import mean_loss  # noqa: E402
from qpruner.quantization.assembly import PlanAssembler  # noqa: E402
from qpruner.quantization.bank import BankSource  # noqa: E402

LEVELS = ("nf4", "int8")
MAIN = [0.03, 0.005, 0.08, 0.06, 0.02]
LYING = [0.01, 0.06, 0.005, 0.02, 0.08]


def test_plans_that_share_blocks_get_their_own_loss(tiny_model: Path, tmp_path: Path) -> None:
    """The evaluator, which shares blocks between plans, measures the loss of each plan's own model."""
    text, folder = tmp_path / "text.txt", tiny_model
    text.write_text("\n".join(row["question"] for row in demo_rows("questions_train.jsonl")))
    job = Job(str(folder), str(text), str(tmp_path / "bank"), "2", LEVELS, context=24, num_validation=4, rungs=())
    build_bank(job)
    evaluator = Evaluator(job)
    found = {plan: loss for prefix in itertools.product(LEVELS) for plan, loss in evaluator.every_plan(prefix)}
    assert list(found) == list(itertools.product(LEVELS, repeat=2)) and len(set(found.values())) == 4
    assembler = PlanAssembler(BankSource(tmp_path / "bank", folder, "block", "bfloat16", LORA, 0))
    for plan, loss in found.items():
        model = assembler.model(job.formats(plan), seed=0)
        assert loss == pytest.approx(mean_loss(model, job.validation(), 0, 16).mean, abs=3e-3)
        assert loss == evaluator.one(plan)


def content() -> dict[str, Any]:
    """A table of every plan of five groups, at three rungs, with bits for levels, as tables had them at first."""
    plans = list(itertools.product((4, 8), repeat=5))
    losses = [3.0 + sum(rise for rise, bits in zip(MAIN, plan, strict=True) if bits == 4) for plan in plans]
    early = [1.0 + 2 * loss for loss in losses]
    return {
        "groups": [f"layers.{index:02d}" for index in range(5)],
        "levels": [4, 8],
        "group_bytes": {"4": [50, 60, 70, 50, 60], "8": [100, 120, 140, 100, 120]},
        "fixed_bytes": 30,
        "plans": [list(plan) for plan in plans],
        "loss": losses,
        "rungs": {"0": losses[::-1], "4": early, "8": list(losses)},
        "loss_noise": 0.0,
        "sensitivities": {"loss": {"4": MAIN, "8": [0.0] * 5}, "fisher": {"4": LYING, "8": [0.0] * 5}},
        "meta": {"sensitivity_seconds": {"loss": 12.0}},
    }


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content()))
    return path


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("groups",), None, "KeyError 'groups'"),
        (("rungs", "8", 2), float("nan"), "`rungs` at 8 must be 32 numbers, one a plan"),
        (("plans", 0), [8] * 5, "`plans` has 1 plans more than once"),
        (("sensitivities", "loss"), {"8": [0.0] * 5}, "`sensitivities.loss` lacks nf4"),
    ],
)
def test_an_invalid_table_is_refused(place: tuple[Any, ...], value: Any, said: str, table: Path) -> None:
    wrong = here = content()
    for key in place[:-1]:
        here = here[key]
    here[place[-1]] = value
    if value is None:
        del here[place[-1]]
    table.write_text(json.dumps(wrong))
    with pytest.raises(BadTable) as refused:
        Table.read(table).check_whole(0.5)
    assert "table" in str(refused.value) and said in str(refused.value)


def task(path: Path, searcher: str = "random", **changes: Any) -> Task:
    asked = {"path": path, "fraction": 0.5, "searcher": searcher, "seeded": False, "in_flight": 1, "seed": 0}
    return Task(**asked | changes)


def replayed(of: Task, losses: Sequence[float]) -> Replay:
    """A search whose trials ended in this order, without noise and controls."""
    trials = [EndedTrial(at, loss, loss, loss, False, True, 8 * (at + 1)) for at, loss in enumerate(losses)]
    return Replay(of, trials, best_seed=None, promises={}, proposals=len(losses), wasted=1, seconds=0.1)


@pytest.mark.parametrize(("searcher", "in_flight"), [("random", 1), ("gp", 16)])
def test_a_replay_runs_every_plan_of_a_small_space_once(table: Path, searcher: str, in_flight: int) -> None:
    done, found = replay(task(table, searcher, in_flight=in_flight)), Table.read(table)
    feasible = found.feasible(found.space(0.5))
    losses = sorted(trial.loss for trial in done.trials)
    assert losses == pytest.approx(sorted(found.score(plan.formats, 8) for plan in feasible))
    # With several in flight the searcher is asked until it has nothing left.
    assert done.proposals >= len(feasible)
    assert (done.wasted == 0) == (searcher == "gp")


def test_regret_is_a_share_of_the_range(table: Path) -> None:
    found = Table.read(table)
    best, worst = found.limits(found.space(0.5))

    def at(*regrets: float) -> Replay:
        return replayed(task(table), [best + regret * (worst - best) for regret in regrets])

    (row,) = summarize([at(0.5, 0.7, 0.04, 0.2, 0.0), at(0.5, 0.3), at(0.5, 0.3, 0.02)])
    assert row.regret[8] == pytest.approx((0.0, 0.02, 0.3))
    assert row.to_5_percent == (3, 3, NEVER)
    assert row.to_1_percent == (5, NEVER, NEVER)
    assert (row.ends_best, row.wasted) == pytest.approx((1 / 3, 3 / 10))
    assert row.area[1] == pytest.approx((0.5 + 0.3 + 62 * 0.02) / 64)


def test_asha_stops_poor_trials_and_no_control(table: Path) -> None:
    full, early = (replay(task(table, "random", seeded=True, asha=asha)) for asha in (False, True))
    stopped = [trial for trial in early.trials if not trial.finished]
    assert stopped and not [trial for trial in stopped if trial.control]
    kept = [trial.loss for trial in early.trials if trial.finished and not trial.control]
    assert np.mean([trial.loss for trial in stopped]) > np.mean(kept)
    # Half a trial's steps each: the first rung is at 4 of 8.
    assert early.trials[-1].spent == full.trials[-1].spent - 4 * len(stopped)
    found = {row["asha"]: row for row in asha_against_full([full, early])}
    assert found[False]["spent"][1] == len(full.trials)
    assert found[True]["spent"][1] == pytest.approx(len(early.trials) - len(stopped) / 2)
    assert found[True]["stopped"] == pytest.approx(len(stopped) / len(early.trials))
    assert asha_against_full([full]) == []


@pytest.mark.slow
def test_the_benchmark_runs_and_resumes(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search_regret.py", "--table", str(table), "--seeds", "1"]
    command += ["--searchers", "gp", "random", "--plot", str(tmp_path / "plot.png"), "--keep", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", command)
    lines = []
    for _ in range(2):
        search_regret.main()
        output = capsys.readouterr().out
        lines.append(json.loads(output.splitlines()[-1]))
        assert "regret of the plan that is returned, in % of the range" in output
    assert lines[0] == lines[1]
    assert len((tmp_path / "kept").read_text().splitlines()) == 32
    assert {row["searcher"] for row in lines[0]["rows"]} == {"gp", "random"}
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert np.all([row["regret"]["64"][1] == 0 for row in lines[0]["rows"]])
