"""Checks of shapes and sample lengths before weights are read."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import changed_by, raw_config, with_key, with_keys
from transformers import AutoConfig

from qpruner.config.load import validate_config
from qpruner.config.schema import PruneConfig, RunConfig
from qpruner.errors import UserError
from qpruner.pipeline.preflight import check_cut, check_device, inspect, makeable
from qpruner.pruning.prune import planned_cut
from qpruner.pruning.settings import settled

SHAPES = {"num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
PHI = {"hidden_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 1024}
"""Heads have 96 rows as in Phi-3-mini: two heads are a multiple of 64, one and three are not."""


def config_of(folder: Path, bits: list[int], **prune: Any) -> RunConfig:
    raw = with_key(raw_config(folder, folder / "run"), "prune", {"compensation": "none", **prune})
    return validate_config(with_keys(raw, **{"quantize.bits": bits, "quantize.budget": {"bytes": 10**6}}))


def check_on_cpu(model_config: Any, config: RunConfig) -> None:
    check_device(None, config, packs=True)
    check_cut(False, config, model_config, planned_cut(model_config, config.prune))


def test_heads_that_a_cpu_would_decode_wrongly_are_refused(tmp_path: Path) -> None:
    """With global selection any number of heads may stay in a block."""
    units = ["attention", "mlp"]
    model_config = AutoConfig.for_model("phi3", **SHAPES, **PHI)
    config = config_of(tmp_path, [4], rate=0.1, selection="global", units=units)
    with pytest.raises(UserError) as caught:
        check_on_cpu(model_config, config)
    for part in ("`prune.selection: global`", "self_attn.o_proj: on a CPU", "96 columns", "`prune.units: [mlp]`"):
        assert part in str(caught.value)
    check_on_cpu(model_config, config_of(tmp_path, [4, 8], rate=0.1, selection="global", units=units))
    check_on_cpu(model_config, config_of(tmp_path, [4], rate=0.1, selection="global", units=["mlp"]))
    check_on_cpu(model_config, config_of(tmp_path, [4], layer_rate=0.5, units=units, round_to=64))
    with pytest.raises(UserError, match=r"o_proj: .* 288 columns .* `prune\.units: \[mlp\]`"):
        check_on_cpu(model_config, config_of(tmp_path, [4], layer_rate=0.25, units=units, round_to=64))


def test_a_cut_that_the_device_cannot_hold_is_left_out(tmp_path: Path) -> None:
    model_config = AutoConfig.for_model("phi3", **SHAPES, **PHI)
    config = config_of(tmp_path, [4], rates=[0, 0.1], selection="global")
    cuts = {name: planned_cut(model_config, settings) for name, settings in config.prune.cuts.items()}
    kept, refused = makeable(cuts, partial(check_cut, False, config, model_config))
    assert list(kept) == ["base"] and list(refused) == ["cut-10"] and "96 columns" in refused["cut-10"]


def test_a_width_that_no_device_takes_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Also where other machines are to run the trials."""
    keys = {"prune": {"rates": [0, 0.1], "round_to": 1, "selection": "per_layer"}, "quantize.bits": None}
    keys |= {"quantize.formats": ["q4_0", "q8_0"], "quantize.budget": {"bytes": 220_000}}
    found = inspect(validate_config(with_keys(raw_config(tiny_model, tmp_path / "run"), **keys)), works_here=False)
    assert list(found.cuts) == ["base"] and "columns do not divide by 32" in found.left_out["cut-10"]


def test_a_block_that_loses_nothing_keeps_its_width(tmp_path: Path) -> None:
    llama = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = config_of(tmp_path, [4], rate=0.2, selection="global", units=["mlp"])
    check_on_cpu(AutoConfig.for_model("llama", **SHAPES, **llama, intermediate_size=192), config)
    with pytest.raises(UserError, match=r"takes .*down_proj: .* 176 columns"):
        check_on_cpu(AutoConfig.for_model("llama", **SHAPES, **llama, intermediate_size=176), config)


def test_more_tokens_than_learned_positions_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "ffn_dim": 256, "word_embed_proj_dim": 64}
    shapes = SHAPES | sizes | {"vocab_size": vocabulary, "max_position_embeddings": 64}
    AutoConfig.for_model("opt", architectures=["OPTForCausalLM"], **shapes).save_pretrained(folder)
    fits = "data.max_length=64; calibration.max_length=64; prune.rate=0.05; quantize.bits=[8, 16]"
    raw = changed_by(fits, raw_config(folder, tmp_path / "run"))
    inspect(validate_config(raw))
    for change, told in (
        ("data.max_length=65", r"`data\.max_length`: 65 tokens are more than the 64 positions that this opt model"),
        ("calibration.max_length=128", r"`calibration\.max_length`: 128 tokens .* use at most 64"),
    ):
        with pytest.raises(UserError, match=told):
            inspect(validate_config(changed_by(change, raw)))


def test_keys_without_effect_change_no_cut(tiny_model: Path) -> None:
    """A change of such a key does not prune again."""
    model_config = AutoConfig.from_pretrained(tiny_model)
    for idle, plain in (
        ({"importance": "magnitude", "order": "second"}, {"importance": "magnitude"}),
        ({"units": ["block"], "round_to": 8, "rate": 0.4}, {"units": ["block"], "rate": 0.4}),
    ):
        assert settled(model_config, PruneConfig(**idle)) == settled(model_config, PruneConfig(**plain))
