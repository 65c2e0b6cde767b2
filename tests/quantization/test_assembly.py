"""A plan's model, weighed: the bytes of its tensors are the bytes that the budget counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixed_models import DTYPE, GROUP, LORA, fill_bank, mixed_plan
from transformers import AutoConfig

from qpruner.models.layout import layout_of
from qpruner.plans.plan import PrecisionPlan
from qpruner.quantization.assembly import assemble, attach_adapters, measured_bytes


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_weighs_exactly_what_its_plan_says(tiny_model: Path, tmp_path: Path, double_quant: bool) -> None:
    names = fill_bank(tiny_model, tmp_path, double_quant)
    layout = layout_of(AutoConfig.from_pretrained(tiny_model), GROUP, 2, double_quant, LORA.rank)
    for pattern in ((4,), (8,), (16,), (4, 8, 16, 8, 4)):
        plan = mixed_plan(names, pattern)
        model, starts = assemble(tiny_model, tmp_path, GROUP, plan, DTYPE, double_quant)
        promised = layout.plan_bytes(PrecisionPlan.from_dict(plan))
        assert measured_bytes(model) == promised - layout.adapter_bytes
        assert measured_bytes(attach_adapters(model, starts, LORA, GROUP, seed=0)) == promised
