"""Tables of measured plans: what the shortcuts measure is the loss of the plan's own model, and what is no table is
said before anything is replayed."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import demo_rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from search_replay import BadTable, Table  # noqa: E402
from search_tables import LORA, Evaluator, Job, build_bank  # noqa: E402

from qpruner.data.losses import mean_loss  # noqa: E402
from qpruner.quantization.assembly import PlanAssembler  # noqa: E402


def test_plans_that_share_blocks_get_their_own_loss(tiny_model: Path, tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tiny_model
    text.write_text("\n".join(row["question"] for row in demo_rows("questions_train.jsonl")))
    job = Job(str(folder), str(text), str(tmp_path / "bank"), "2", (4, 8), context=24, num_validation=4, rungs=())
    build_bank(job)
    evaluator = Evaluator(job)
    found = {plan: loss for prefix in ((4,), (8,)) for plan, loss in evaluator.every_plan(prefix)}
    assert list(found) == list(itertools.product((4, 8), repeat=2))
    bench = PlanAssembler(folder, tmp_path / "bank", "block", "bfloat16", double_quant=False, lora=LORA)
    for plan, loss in found.items():
        model = bench.model(job.bits(plan), seed=0)
        assert loss == pytest.approx(mean_loss(model, job.validation(), 0, 16).mean, abs=3e-3)
        assert loss == evaluator.one(plan)
    assert len(set(found.values())) == 4


def table() -> dict[str, Any]:
    """A small table of three groups, as somebody else may have written it: levels in any order, no meta."""
    plans = list(itertools.product((4, 8), repeat=3))
    return {
        "groups": ["a", "b", "c"],
        "levels": [8, 4],
        "group_bytes": {"4": [10, 10, 20], "8": [20, 20, 40]},
        "plans": [list(plan) for plan in plans],
        "loss": [3.0 - 0.1 * plan.count(8) - 0.05 * (plan[2] == 8) for plan in plans],
        "loss_noise": 0.01,
        "sensitivities": {"kl": {"4": [0.1, 0.1, 0.15]}},
    }


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no groups": (lambda content: content.pop("groups"), "KeyError 'groups'"),
    "a NaN": (lambda content: content["loss"].__setitem__(2, float("nan")), "`loss` must be 8 numbers"),
    "a plan twice": (lambda content: content["plans"].__setitem__(0, [8, 8, 8]), "`plans` has 1 plans more than once"),
    "a level that a sensitivity lacks": (
        lambda content: content["sensitivities"].update(kl={"8": [0.0] * 3}),
        "`sensitivities.kl` lacks 4 bits",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_table_is_refused(what: str, tmp_path: Path) -> None:
    content, (spoil, said) = table(), WRONG[what]
    spoil(content)
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadTable) as refused:
        Table.read(path).check_whole(0.5)
    assert "theirs" in str(refused.value) and said in str(refused.value)
