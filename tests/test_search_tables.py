"""Tables of measured plans: what the shortcuts measure is the loss of the plan's own model."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from conftest import demo_rows

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from search_tables import LORA, Evaluator, Job, build_bank  # noqa: E402

from qpruner.calibration import mean_loss  # noqa: E402
from qpruner.quantization.assembly import Workbench  # noqa: E402


def test_plans_that_share_blocks_get_the_loss_of_their_own_models(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(row["question"] for row in demo_rows("questions_train.jsonl")))
    job = Job(str(tiny_model), str(text), str(tmp_path / "bank"), "2", (4, 8), context=24, num_validation=4, rungs=())
    build_bank(job)
    evaluator = Evaluator(job)
    found = {plan: loss for prefix in ((4,), (8,)) for plan, loss in evaluator.every_plan(prefix)}
    assert list(found) == list(itertools.product((4, 8), repeat=2))
    bench = Workbench(tiny_model, tmp_path / "bank", "block", "bfloat16", double_quant=False, lora=LORA)
    for plan, loss in found.items():
        model = bench.model(job.bits(plan), seed=0)
        assert loss == pytest.approx(mean_loss(model, job.validation(), 0, 16).mean, abs=3e-3)
        assert loss == evaluator.one(plan)
    assert len(set(found.values())) == 4
