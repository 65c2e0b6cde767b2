"""Real steps are timed with the shapes of a model, pruned ones too, without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import changed_by, raw_config
from tiny_families import family_model, kept_of

from qpruner.config.load import validate_config
from qpruner.config.schema import LoraConfig
from qpruner.estimate.step_times import measure, packing_operations
from qpruner.plans.plan import LinearShape
from qpruner.pruning.surgery import cut


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_a_cut_model_of_the_family_is_timed(name: str) -> None:
    """The families have two kinds of layers and fused projections; the times depend on the machine."""
    changes = "data.max_length=16; lora.dropout=0.1; training.gradient_checkpointing=true"
    raw = changed_by(changes, raw_config(Path("a-model"), Path("a-run")))
    config = cut(family_model(name), kept_of(name)).config
    linear = LinearShape("layer", 128, 64)
    times = measure(validate_config(raw), config, linear, share_high=0.5, share_labelled=0.25, threads=1)
    assert all(value > 0 for value in times)
    assert config.num_hidden_layers == 3, "the config is not changed"


def test_packing_counts_levels_and_iterations() -> None:
    once = packing_operations(10, 20, LoraConfig(), 1)
    assert packing_operations(10, 20, LoraConfig(loftq_iterations=3), 2) == 6 * once
    assert packing_operations(100, 200, LoraConfig(svd="exact"), 1) == 10 * 100 * 100 * 200
