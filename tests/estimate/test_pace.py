"""A few real steps of the model's own shapes can be timed for every family, cut ones too, without a weight of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import raw_config, with_key
from tiny_families import family_model, kept_of

from qpruner.config.schema import validate_config
from qpruner.estimate.step_times import measure
from qpruner.pruning.surgery import cut


@pytest.mark.parametrize("name", ["gemma2", "opt", "phi3"])
def test_a_cut_model_of_the_family_is_timed(name: str) -> None:
    """Layers of two kinds, a family with biases and one with fused projections; how long it takes is the machine's."""
    raw = raw_config(Path("a-model"), Path("a-run"))
    for key, value in {"data.max_length": 16, "lora.dropout": 0.1, "training.gradient_checkpointing": True}.items():
        raw = with_key(raw, key, value)
    config = cut(family_model(name), kept_of(name)).config
    seconds = measure(validate_config(raw), config, share_high=0.5, share_labelled=0.25, threads=1)
    assert seconds.scoring > 0 and seconds.training > 0
    assert config.num_hidden_layers == 3, "the config is not changed"
