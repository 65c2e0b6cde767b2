"""Checks of shapes and sample lengths before weights are read."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import raw_config, with_keys
from transformers import AutoConfig

from qpruner.config.load import validate_config
from qpruner.config.schema import PruneConfig
from qpruner.errors import UserError
from qpruner.pipeline.preflight import inspect
from qpruner.pipeline.shapes import expected_shapes
from qpruner.pruning.settings import settled

SHAPES = {"num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}


def test_a_width_that_no_device_takes_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Also where other machines are to run the trials."""
    keys = {
        "prune": {"rates": [0, 0.1], "round_to": 1, "selection": "per_layer"},
        "quantize.bits": None,
    }
    keys |= {"quantize.formats": ["q4_0", "q8_0"], "quantize.budget": {"bytes": 220_000}}
    raw = with_keys(raw_config(tiny_model, tmp_path / "run"), **keys)
    found = inspect(validate_config(raw), works_here=False).shapes
    assert list(found.cuts) == ["base"]
    assert "columns do not divide by 32" in found.left_out["cut-10"]


def test_more_tokens_than_learned_positions_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "ffn_dim": 256, "word_embed_proj_dim": 64}
    shapes = SHAPES | sizes | {"vocab_size": vocabulary, "max_position_embeddings": 64}
    AutoConfig.for_model("opt", architectures=["OPTForCausalLM"], **shapes).save_pretrained(folder)
    fits = {
        "data.max_length": 64,
        "calibration.max_length": 64,
        "prune": {"rates": [0.05]},
        "quantize.bits": [8, 16],
    }
    raw = with_keys(raw_config(folder, tmp_path / "run"), **fits)
    inspect(validate_config(raw))
    for key, length, told in (
        (
            "data.max_length",
            65,
            r"`data\.max_length`: 65 tokens are more than the 64 positions that this opt model",
        ),
        ("calibration.max_length", 128, r"`calibration\.max_length`: 128 tokens .* use at most 64"),
    ):
        with pytest.raises(UserError, match=told):
            inspect(validate_config(with_keys(raw, **{key: length})))


def test_a_format_may_suit_one_cut_only(tiny_model: Path, tmp_path: Path) -> None:
    """The k-quants need widths that 256 divides, which the base model has."""
    shutil.copytree(tiny_model, model := tmp_path / "model")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    (model / "config.json").write_text(
        json.dumps(json.loads((model / "config.json").read_text()) | sizes)
    )
    keys = {
        "prune": {},
        "quantize": {"formats": ["q4_k", "q8_0"], "budget": {"bytes": 100_000_000}},
    }
    config = validate_config(with_keys(raw_config(model, tmp_path / "run"), **keys))
    found = expected_shapes(config, on_gpu=False, packs=True)
    assert list(found.cuts) == ["base", "cut-10", "cut-20"]
    assert not found.left_out


def test_keys_without_effect_change_no_cut(tiny_model: Path) -> None:
    """A change of such a key does not prune again."""
    model_config = AutoConfig.from_pretrained(tiny_model)
    for idle, plain in (
        ({"importance": "magnitude", "order": "second"}, {"importance": "magnitude"}),
        ({"units": ["block"], "round_to": 8, "rate": 0.4}, {"units": ["block"], "rate": 0.4}),
    ):
        assert settled(model_config, PruneConfig(**idle)) == settled(
            model_config, PruneConfig(**plain)
        )
