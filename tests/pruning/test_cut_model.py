"""Pruning tiny models as a whole: rate, units, steps, and refused settings."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tensors import same
from tiny_decoders import keys, logits_of, samples_of, settings_of, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from qpruner.config.schema import ModelConfig, PruneConfig
from qpruner.errors import UserError
from qpruner.models.layout import skeleton
from qpruner.models.loading import check_reachable, load_dense
from qpruner.pruning.prune import Pruned, num_parameters, planned_cut, prune
from qpruner.pruning.settings import check_settings, uniform_remedy

CHANNEL = 3 * 32
"""Parameters of one channel of the tiny Llama."""
SELECTIONS = ["per_layer", "global"]
CRITERIA: list[dict[str, Any]] = [
    {"importance": "fisher"},
    {"importance": "taylor"},
    {"importance": "fisher", "aggregation": "vector"},
    {"importance": "taylor", "order": "mixed", "aggregation": "vector", "reduction": "max"},
    {"importance": "magnitude", "norm": "l1", "reduction": "last"},
    {"importance": "fluctuation"},
    {"importance": "activation_norm"},
    {"importance": "random"},
]


def decoder(seed: int = 0, **options: Any) -> PreTrainedModel:
    return tiny("llama", seed, **({"num_key_value_heads": 4, "intermediate_size": 64} | options))


def widths(pruned: Pruned) -> dict[int, dict[str, int]]:
    return {
        index: {kind: len(units) for kind, units in kinds.items()}
        for index, kinds in pruned.kept.items()
    }


# ---- the rate


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_the_model_loses_the_requested_rate(criterion: dict[str, Any], selection: str) -> None:
    model = decoder()
    before = num_parameters(model)
    pruned = prune(model, settings_of(rate=0.5, selection=selection, **criterion), samples_of())
    assert pruned.model is model
    assert pruned.parameters_before == before
    assert pruned.parameters_after == num_parameters(model)
    assert abs(pruned.parameters_after - 0.5 * before) <= CHANNEL
    assert all(number >= 1 for kinds in widths(pruned).values() for number in kinds.values())
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize(("rate", "steps"), [(0.2, 1), (0.3, 2), (0.5, 5)])
def test_the_defaults_meet_the_rate(rate: float, steps: int) -> None:
    """The defaults are Fisher, global, least squares, multiples of 64, and more steps for higher
    rates."""
    defaults = PruneConfig(
        rate=rate,
        importance="fisher",
        selection="global",
        compensation="least_squares",
        round_to=64,
        steps=steps,
    )
    by_default = prune(decoder(intermediate_size=512), PruneConfig(rate=rate), samples_of())
    named = prune(decoder(intermediate_size=512), defaults, samples_of())
    before = by_default.parameters_before
    assert abs(by_default.parameters_after - (1 - rate) * before) <= CHANNEL * 64
    assert named.kept == by_default.kept
    assert torch.equal(logits_of(named.model), logits_of(by_default.model))


@pytest.mark.parametrize(
    ("given", "implied"),
    [
        ("layer_rate: 0.2", "rate: null, selection: per_layer, round_to: 1, query_heads: modulo"),
        ("layer_rate: 0.2, round_to: 32, query_heads: served", "round_to: 32, query_heads: served"),
        ("layer_rate: 0.2, importance: fluctuation", "query_heads: served, num_steps: 1"),
        ("rate: 0.2, layer_rate: null, importance: taylor", "query_heads: served"),
        ("uniform: true", "rates: [0.0, 0.1, 0.2], selection: per_layer"),
        ("uniform: false", "selection: global, num_steps: 1"),
        ("units: [block], rate: 0.5", "compensates_by: least_squares, num_steps: 1"),
        ("rate: 0.30000000000000004", "num_steps: 2"),
        ("rate: 0.31", "num_steps: 4"),
        ("rate: 0.5, steps: 1", "num_steps: 1"),
    ],
)
def test_defaults_follow_from_other_keys(given: str, implied: str) -> None:
    """A default that contradicts another key would be refused as if the user had set it."""
    settings = PruneConfig.model_validate(keys(given))
    for key, value in keys(implied).items():
        setting = getattr(settings, key)
        assert (list(setting) if key == "rates" else setting) == value


# ---- which units


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ("first_layer: 1, last_layer: 1", {0, 2}),
        ("first_layer: 1, last_layer: -1", {0}),
        ("first_layer: 1, selection: global, compensation: least_squares", {0}),
        ("rate: 0.0", {0, 1, 2}),
    ],
)
def test_blocks_outside_the_range_keep_their_weights(options: str, whole: set[int]) -> None:
    model = decoder()
    before = copy.deepcopy(model.model.layers)
    settings = settings_of(**{"rate": 0.1, "importance": "magnitude"} | keys(options))
    pruned = prune(model, settings, samples_of())
    assert set(pruned.kept) == set(range(3)) - whole
    for index, (old, new) in enumerate(zip(before, model.model.layers, strict=True)):
        assert same(old.state_dict(), new.state_dict()) == (index in whole)


# ---- steps


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("importance", ["taylor", "fluctuation"])
def test_each_step_scores_the_model_that_is_left(selection: str, importance: str) -> None:
    """So several steps remove other units than one step, but as many parameters."""
    options = {"rate": 0.4, "selection": selection, "importance": importance}
    once = prune(decoder(), settings_of(**options), samples_of())
    works: list[str] = []

    def on_work(work: str, done: int, total: int) -> None:
        if done == total and work.startswith("importance"):
            works.append(work)

    settings = settings_of(**options, steps=3)
    stepped = prune(decoder(), settings, samples_of(), on_work=on_work)
    assert works == [f"importance, step {step} of 3" for step in (1, 2, 3)]
    assert stepped.kept != once.kept
    tolerance = 0 if selection == "per_layer" else CHANNEL
    assert abs(stepped.parameters_after - once.parameters_after) <= tolerance
    # The scores in the result are those of the base model.
    assert stepped.scores.keys() == once.scores.keys()
    for index, kinds in once.scores.items():
        assert same(stepped.scores[index], kinds)
    assert len(stepped.scores[0]["attention"]) == 4
    assert len(stepped.scores[0]["mlp"]) == 64


# ---- every block alike


def test_uniform_channels_of_a_long_context_phi_are_plain(tmp_path: Path) -> None:
    """Its config needs a factor for every pair of (hidden size / heads), so heads cannot be cut;
    channels can."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 32,
    }
    model = tiny(
        "phi3",
        num_key_value_heads=4,
        rope_parameters=rope,
        original_max_position_embeddings=32,
    )
    with pytest.raises(UserError, match=r"`prune.units: \[mlp\]`, or `uniform: false`"):
        planned_cut(model.config, settings_of(rate=0.3, uniform=True))
    prune(model, settings_of(rate=0.15, uniform=True, units=["mlp"]), samples_of())
    model.save_pretrained(tmp_path)
    assert "per_layer_config" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(loaded), logits_of(model))


# ---- without weights


@pytest.mark.parametrize(
    "options",
    [
        "rate: 0.3",
        "rate: 0.3, steps: 3, compensation: least_squares",
        "rate: 0.1, units: [attention]",
        "layer_rate: 0.4",
        "rate: 0.3, uniform: true",
        "rate: 0.4, units: [block]",
        "rate: 0.5, units: [block, attention, mlp], depth_share: 0.5, uniform: true",
        "rate: 0.0",
    ],
)
def test_the_config_is_known_without_weights(options: str) -> None:
    """`qpruner check` counts bytes on the planned config."""
    model = decoder()
    settings = settings_of(**keys(options))
    planned = skeleton(planned_cut(model.config, settings).model_config)
    prune(model, settings, samples_of())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in planned.state_dict().items()}


def test_a_planned_config_has_average_widths_if_scores_decide() -> None:
    model = decoder()
    settings = settings_of(rate=0.3, selection="global")
    planned = skeleton(planned_cut(model.config, settings).model_config)
    pruned = prune(model, settings, samples_of())
    assert abs(num_parameters(planned) - pruned.parameters_after) <= CHANNEL
    channels = [block.mlp.up_proj.out_features for block in planned.model.layers]
    assert max(channels) - min(channels) <= 1
    assert len({kinds["mlp"] for kinds in widths(pruned).values()}) > 1


# ---- spread over devices


@pytest.mark.parametrize(
    "options",
    [
        "rate: 0.3, importance: fluctuation, compensation: least_squares, selection: global",
        "rate: 0.5, units: [block, mlp], depth_share: 0.5, steps: 2",
    ],
)
def test_a_model_that_accelerate_has_spread_is_cut_the_same(options: str) -> None:
    """`device_map: auto` adds hooks that move inputs to the device of a module; the cut must keep
    them."""
    from accelerate import dispatch_model

    settings = settings_of(**keys(options))
    plain = prune(decoder(), settings, samples_of())
    spread = decoder()
    parts = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2")
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    dispatch_model(spread, places, main_device="cpu", force_hooks=True)
    pruned = prune(spread, settings, samples_of())
    assert pruned.kept == plain.kept
    assert pruned.dropped_blocks == plain.dropped_blocks
    assert all(hasattr(block, "_hf_hook") for block in spread.model.layers)
    torch.testing.assert_close(logits_of(spread), logits_of(plain.model), rtol=1e-5, atol=1e-5)


def test_a_model_that_was_left_on_disk_in_part_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """accelerate places layers there, or in host memory, if no GPU has room; they cannot be cut."""
    parts = ("embed_tokens", "norm", "rotary_emb", "layers.0")
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    places["model.layers.1"] = "disk"
    spilled = AutoModelForCausalLM.from_pretrained(
        tiny_model, device_map=places, offload_folder=tmp_path
    )
    with pytest.raises(UserError, match=r"`model.device_map`: .* model\.layers\.1 on disk.*GPUs"):
        check_reachable(spilled)
    config = ModelConfig(source=str(tiny_model), device_map="auto")
    check_reachable(load_dense(str(tiny_model), "bfloat16", config))


# ---- refused settings


@pytest.mark.parametrize("options", ["units: [mlp]", "units: [attention]", "last_layer: 1"])
def test_the_highest_rate_in_the_message_is_accepted(options: str) -> None:
    model_config = tiny().config
    with pytest.raises(UserError) as caught:
        planned_cut(model_config, settings_of(rate=0.9, **keys(options)))
    (highest,) = re.findall(r"the highest rate is (0\.\d+)$", str(caught.value))
    planned_cut(model_config, settings_of(rate=float(highest), **keys(options)))
    with pytest.raises(UserError):
        planned_cut(model_config, settings_of(rate=float(highest) + 0.1, **keys(options)))


@pytest.mark.parametrize("other", ["layers.0.mlp.up_proj.weight", "norm.weight"])
def test_shared_weights_are_refused(other: str) -> None:
    """A tied output head, which all tiny models here have, is accepted."""
    model = decoder()
    data = model.get_parameter(f"model.{other}").data
    model.model.layers[2].mlp.up_proj.weight.data = data if data.dim() > 1 else data.view(1, -1)
    with pytest.raises(UserError, match=r"shared \(tied\) weight.*untie them") as caught:
        prune(model, settings_of(rate=0.2), samples_of())
    for name in (other, "layers.2.mlp.up_proj.weight"):
        assert f"model.{name}" in str(caught.value)
    prune(model, PruneConfig(rate=0.0), samples_of())


def test_a_single_key_value_group_stays_in_a_uniform_cut() -> None:
    """As in Gemma 3 270M, whose heads together are wider than its hidden states; it was refused for
    the contrary."""
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=1)
    pruned = prune(model, settings_of(rate=0.1, uniform=True), samples_of())
    assert {kinds["attention"] for kinds in pruned.kept.values()} == {(0,)}
    assert len({len(kinds["mlp"]) for kinds in pruned.kept.values()}) == 1


@pytest.mark.parametrize(
    ("name", "selection", "named"),
    [
        ("llama", "per_layer", "uniform: true"),
        ("llama", "global", "uniform: true, selection: per_layer"),
        ("opt", "per_layer", "uniform: true, units: [mlp]"),
        ("opt", "global", "uniform: true, selection: per_layer, units: [mlp]"),
    ],
)
def test_all_that_makes_a_cut_uniform_is_named_at_once(
    name: str, selection: str, named: str
) -> None:
    """What is named is accepted: nobody is led from one error to the next."""
    model_config = tiny(name).config
    remedy = uniform_remedy(model_config, PruneConfig(selection=selection))
    assert ", ".join(re.findall(r"`prune\.(\w+: [^`]+)`", remedy)) == named
    changed = {"rate": 0.2, "selection": "per_layer"} | keys(named)
    check_settings(model_config, PruneConfig(**changed))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", "rate: 0.4, first_layer: 2", "lower the rate, .*`prune.first_layer`"),
        ("llama", "layer_rate: 0.3, uniform: true", "leaves 3 key/value groups"),
        # A fifth of four heads is no head: a run must not continue with an uncut model.
        ("llama", "layer_rate: 0.2, units: [attention]", "0.2 removes no unit.*raise the rate"),
        ("llama", "layer_rate: 0.2, units: [mlp], round_to: 48", "multiples of `prune.round_to`"),
        ("llama", "rate: 0.2, last_layer: -9", "within the model's 3 blocks, 0 to 2"),
        ("opt", "rate: 0.2, uniform: true", r"fewer heads.*`prune.units: \[mlp\]`, or `uniform: f"),
    ],
)
def test_what_a_model_cannot_meet_is_refused(name: str, options: str, message: str) -> None:
    """The refused model is unchanged."""
    model = tiny(name, **({"num_key_value_heads": 4} if name == "llama" else {}))
    settings = settings_of(**keys(options))
    before = logits_of(model)
    with pytest.raises(UserError, match=message):
        planned_cut(model.config, settings)
    with pytest.raises(UserError, match=message):
        prune(model, settings, samples_of())
    assert torch.equal(logits_of(model), before)
