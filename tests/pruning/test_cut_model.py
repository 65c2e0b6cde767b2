"""The prune step as a whole on tiny models: the rate, the units, the steps, and what it refuses."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_decoders import PAD, logits_of, rows_of, samples_of, settings_of, tiny

from qpruner.config.schema import ModelConfig, PruneConfig
from qpruner.data.calibration import Samples
from qpruner.errors import UserError
from qpruner.models.families import family_of
from qpruner.models.loading import check_reachable, load_dense
from qpruner.pipeline.prune import layer_widths
from qpruner.pruning import criteria as criteria_module
from qpruner.pruning import prune as prune_module
from qpruner.pruning.prune import Pruned, block_sizes, expected_config, num_parameters, planned_cut, prune
from qpruner.pruning.surgery import check_not_shared
from qpruner.pruning.units import Kept, unit_sizes
from qpruner.report.tables import block_cells

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHANNEL = 3 * 32
"""Parameters of one channel of the tiny Llama."""
CRITERIA: list[dict[str, Any]] = [
    {"importance": "fisher"},
    {"importance": "taylor"},
    {"importance": "fisher", "aggregation": "vector"},
    {"importance": "taylor", "order": "mixed", "aggregation": "vector", "reduction": "max"},
    {"importance": "magnitude", "norm": "l1", "reduction": "last"},
    {"importance": "magnitude", "reduction": "mean"},
    {"importance": "fluctuation"},
    {"importance": "activation_norm"},
    {"importance": "random"},
]


def decoder(seed: int = 0, **options: Any) -> PreTrainedModel:
    return tiny("llama", seed, **({"num_key_value_heads": 4, "intermediate_size": 64} | options))


def widths(pruned: Pruned) -> dict[int, dict[str, int]]:
    return {index: {kind: len(units) for kind, units in kinds.items()} for index, kinds in pruned.kept.items()}


def is_inside(inner: Kept, outer: Kept) -> bool:
    return all(set(units) <= set(outer[index][kind]) for index, kinds in inner.items() for kind, units in kinds.items())


# ---- the rate


@pytest.mark.parametrize("selection", ["per_layer", "global"])
@pytest.mark.parametrize("rate", [0.2, 0.5])
@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_the_model_loses_the_rate_that_was_asked(criterion: dict[str, Any], rate: float, selection: str) -> None:
    model = decoder()
    before = num_parameters(model)
    pruned = prune(model, settings_of(rate=rate, selection=selection, **criterion), samples_of())
    assert pruned.model is model
    assert pruned.parameters_before == before
    assert pruned.parameters_after == num_parameters(model)
    assert abs(before - pruned.parameters_after - rate * before) <= CHANNEL
    assert all(number >= 1 for kinds in widths(pruned).values() for number in kinds.values())
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize(("rate", "steps"), [(0.2, 1), (0.3, 2), (0.5, 5)])
def test_the_defaults_meet_the_rate(rate: float, steps: int) -> None:
    """Nothing but a rate: Fisher information, wherever it is least, least squares, multiples of 64, more steps the
    more goes."""
    model = decoder(intermediate_size=512)
    before = num_parameters(model)
    settings = PruneConfig(rate=rate)
    assert (settings.importance, settings.selection, settings.compensates_by) == ("fisher", "global", "least_squares")
    pruned = prune(model, settings, samples_of())
    assert abs(before - pruned.parameters_after - rate * before) <= CHANNEL * 64
    assert all(kinds["mlp"] % 64 == 0 for kinds in widths(pruned).values())
    said = {"importance": "fisher", "selection": "global", "round_to": 64, "steps": steps, "rate": rate}
    for compensation, is_same in (("least_squares", True), ("none", False)):
        settings = PruneConfig(**said, compensation=compensation)
        told = prune(decoder(intermediate_size=512), settings, samples_of())
        assert torch.equal(logits_of(told.model), logits_of(model)) == is_same
        if is_same or steps == 1:
            assert told.kept == pruned.kept


@pytest.mark.parametrize(
    ("given", "implied"),
    [
        (
            {"layer_rate": 0.2},
            {
                "rate": None,
                "selection": "per_layer",
                "compensates_by": "least_squares",
                "round_to": 1,
                "query_heads": "modulo",
            },
        ),
        ({"layer_rate": 0.2, "round_to": 32}, {"round_to": 32}),
        ({"layer_rate": 0.2, "importance": "taylor"}, {"query_heads": "modulo"}),
        ({"layer_rate": 0.2, "importance": "magnitude"}, {"query_heads": "modulo"}),
        ({"layer_rate": 0.2, "query_heads": "served"}, {"query_heads": "served"}),
        ({"layer_rate": 0.2, "importance": "fluctuation"}, {"query_heads": "served"}),
        ({"rate": 0.2, "layer_rate": None, "importance": "taylor"}, {"query_heads": "served"}),
        ({"uniform": True}, {"rate": 0.2, "selection": "per_layer"}),
        ({"units": ["block"]}, {"compensates_by": "least_squares", "selection": "global"}),
        ({"units": ["block", "mlp"]}, {"compensates_by": "least_squares"}),
        ({"uniform": False}, {"selection": "global"}),
        ({"rate": 0.2}, {"num_steps": 1}),
        ({"rate": 0.21}, {"num_steps": 2}),
        ({"rate": 0.3}, {"num_steps": 2}),
        ({"rate": 0.31}, {"num_steps": 4}),
        ({"rate": 0.1 * 3}, {"num_steps": 2}),
        ({"rate": 0.7}, {"num_steps": 7}),
        ({"rate": 0.5, "steps": 1}, {"num_steps": 1}),
        ({"rate": 0.5, "units": ["block"]}, {"num_steps": 1}),
        ({"layer_rate": 0.5}, {"num_steps": 1}),
    ],
    ids=str,
)
def test_what_is_not_said_follows_from_what_is(given: dict[str, Any], implied: dict[str, Any]) -> None:
    """A default that another key rules out would be refused as if someone had written it."""
    settings = PruneConfig.model_validate(given)
    assert {key: getattr(settings, key) for key in implied} == implied


@pytest.mark.parametrize("selection", ["per_layer", "global"])
@pytest.mark.parametrize("round_to", [32, 128])
def test_the_rate_is_met_to_within_a_multiple_of_channels(selection: str, round_to: int) -> None:
    model = decoder(intermediate_size=512)
    before = num_parameters(model)
    pruned = prune(model, settings_of(rate=0.3, round_to=round_to, selection=selection), samples_of())
    assert abs(before - pruned.parameters_after - 0.3 * before) <= CHANNEL * round_to
    assert all(kinds["mlp"] % round_to == 0 for kinds in widths(pruned).values())
    kept = [kinds["mlp"] for kinds in widths(pruned).values()]
    assert [block.mlp.up_proj.out_features for block in model.model.layers] == kept


@pytest.mark.parametrize("selection", ["per_layer", "global"])
@pytest.mark.parametrize("rate", [0.05, 0.15, 0.2])
def test_a_coarse_grid_reaches_the_nearest_rate(rate: float, selection: str) -> None:
    """Three key/value heads and nothing else: SmolLM2-135M's attention."""
    model = decoder(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    before = num_parameters(model)
    head = unit_sizes(model, range(3), ("attention",))[0]["attention"].parameters
    pruned = prune(model, settings_of(rate=rate, units=["attention"], selection=selection), samples_of())
    removed = before - pruned.parameters_after
    assert removed % head == 0
    assert abs(removed - rate * before) <= head / 2
    assert all(list(kinds) == ["attention"] for kinds in pruned.kept.values())


def test_a_rate_of_zero_changes_nothing() -> None:
    model = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = prune(model, PruneConfig(rate=0.0), samples_of())
    assert pruned.model is model
    assert pruned.kept == {}
    assert pruned.parameters_before == pruned.parameters_after == num_parameters(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_share_of_each_blocks_own_units() -> None:
    model = decoder(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    settings = settings_of(layer_rate=0.4, first_layer=1, protected_layers=[-1])
    pruned = prune(model, settings, samples_of())
    assert widths(pruned) == {1: {"attention": 2, "mlp": 38}}
    assert settings.rate is None


# ---- which units, and what stays of the others


def test_what_stays_is_what_the_record_says() -> None:
    """Each kept row and column is the base model's, in its order."""
    base = decoder()
    pruned = prune(decoder(), settings_of(rate=0.3), samples_of())
    for index, kinds in pruned.kept.items():
        old, new = base.model.layers[index], pruned.model.model.layers[index]
        rows = torch.cat([torch.arange(unit * 8, (unit + 1) * 8) for unit in kinds["attention"]])
        channels = list(kinds["mlp"])
        assert 0 < len(rows) < 32 and 0 < len(channels) < 64
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(new.self_attn.get_submodule(name).weight, old.self_attn.get_submodule(name).weight[rows])
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[:, rows])
        assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[channels])
        assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[channels])
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, channels])


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"first_layer": 1}, {0}),
        ({"last_layer": 1}, {2}),
        ({"first_layer": 1, "last_layer": -2}, {0, 2}),
        ({"protected_layers": [0, -1]}, {0, 2}),
        ({"protected_layers": [1], "selection": "global", "compensation": "least_squares"}, {1}),
    ],
    ids=str,
)
def test_blocks_outside_the_range_keep_their_weights(options: dict[str, Any], whole: set[int]) -> None:
    model = decoder()
    before = {index: copy.deepcopy(model.model.layers[index].state_dict()) for index in range(3)}
    pruned = prune(model, settings_of(rate=0.1, importance="magnitude", **options), samples_of())
    assert set(pruned.kept) == set(range(3)) - whole
    for index in range(3):
        after = model.model.layers[index].state_dict()
        is_same = all(after[name].shape == value.shape for name, value in before[index].items()) and all(
            torch.equal(after[name], value) for name, value in before[index].items()
        )
        assert is_same == (index in whole)


def test_random_units_are_those_of_the_seed() -> None:
    settings = settings_of(rate=0.3, importance="random")
    first, again, other = (prune(decoder(), settings, samples_of(), seed=seed).kept for seed in (1, 1, 2))
    assert first == again != other


# ---- steps


@pytest.mark.parametrize("selection", ["per_layer", "global"])
@pytest.mark.parametrize("importance", ["taylor", "fluctuation"])
def test_steps_remove_nested_sets_and_end_where_one_step_does(
    monkeypatch: pytest.MonkeyPatch, selection: str, importance: str
) -> None:
    """Importance is measured anew on the model that is left, so other units may go; never one that went comes back."""
    chosen: list[Kept] = []
    sizes_seen: list[int] = []
    choose, score = prune_module.choose, criteria_module.score

    def spy_choose(*args: Any, **kwargs: Any) -> Kept:
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    def spy_score(model: PreTrainedModel, *args: Any) -> Any:
        sizes_seen.append(num_parameters(model))
        return score(model, *args)

    once = prune(decoder(), settings_of(rate=0.4, selection=selection, importance=importance), samples_of())
    monkeypatch.setattr(prune_module, "choose", spy_choose)
    monkeypatch.setattr(criteria_module, "score", spy_score)
    told: list[tuple[str, int, int]] = []
    settings = settings_of(rate=0.4, selection=selection, importance=importance, steps=3)
    stepped = prune(decoder(), settings, samples_of(), on_work=lambda *progress: told.append(progress))
    steps = [f"importance, step {step} of 3" for step in (1, 2, 3)]
    assert [what for what, done, total in told if done == total and what in steps] == steps
    assert sizes_seen == sorted(set(sizes_seen), reverse=True) and len(sizes_seen) == 3
    assert is_inside(chosen[1], chosen[0]) and is_inside(chosen[2], chosen[1])
    assert stepped.kept == chosen[-1] != once.kept
    tolerance = 0 if selection == "per_layer" else CHANNEL
    assert abs(stepped.parameters_after - once.parameters_after) <= tolerance
    assert abs(stepped.parameters_before - stepped.parameters_after - 0.4 * stepped.parameters_before) <= CHANNEL
    # What is reported is the importance of every unit of the base model.
    for index, kinds in once.scores.items():
        assert all(torch.equal(stepped.scores[index][kind], values) for kind, values in kinds.items())
    assert {kind: len(values) for kind, values in stepped.scores[0].items()} == {"attention": 4, "mlp": 64}


# ---- every block alike


@pytest.mark.parametrize("rate", [0.2, 0.5])
@pytest.mark.parametrize("compensation", ["none", "least_squares"])
def test_uniform_widths_make_a_plain_config(rate: float, compensation: str, tmp_path: Path) -> None:
    """Every block alike, so the config has no entry by block: and what a plain Llama may not be, it never becomes."""
    from transformers import AutoConfig

    model = decoder(hidden_size=48, num_attention_heads=8, num_key_value_heads=8)
    before = num_parameters(model)
    pruned = prune(model, settings_of(rate=rate, uniform=True, compensation=compensation), samples_of())
    assert len({tuple(kinds.items()) for kinds in widths(pruned).values()}) == 1
    assert abs(before - pruned.parameters_after - rate * before) <= 3 * 3 * 48
    assert 48 % model.config.num_attention_heads == 0
    model.config.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert not saved.is_heterogeneous
    assert "per_layer_config" not in (tmp_path / "config.json").read_text()
    assert saved.num_attention_heads == model.model.layers[0].self_attn.q_proj.out_features // 8
    assert saved.intermediate_size == model.model.layers[0].mlp.up_proj.out_features


LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("gemma2", {}), ("phi3", LONG_ROPE)])
def test_blocks_that_happen_to_be_alike_are_saved_and_loaded(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Three of four heads in every block: transformers refuses that number as a plain one, but not block by block."""
    from transformers import AutoModelForCausalLM

    model = tiny(name, num_key_value_heads=4, **options)
    pruned = prune(model, settings_of(layer_rate=0.25, units=["attention"]), samples_of())
    assert widths(pruned) == {index: {"attention": 3} for index in range(3)}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), logits_of(model))


def test_uniform_channels_of_a_phi_of_long_context_are_plain(tmp_path: Path) -> None:
    """Its config wants a factor for every pair of hidden size / heads, so heads cannot go; channels can."""
    from transformers import AutoModelForCausalLM

    model = tiny("phi3", num_key_value_heads=4, **LONG_ROPE)
    with pytest.raises(UserError, match=r"`prune.units: \[mlp\]`, or `uniform: false`"):
        expected_config(model.config, settings_of(rate=0.3, uniform=True))
    prune(model, settings_of(rate=0.15, uniform=True, units=["mlp"]), samples_of())
    model.save_pretrained(tmp_path)
    assert "per_layer_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), logits_of(model))


@pytest.mark.parametrize("name", ["opt", "gpt_neox"])
@pytest.mark.parametrize("compensation", ["none", "bias"])
def test_uniform_channels_are_plain_where_heads_cannot_be(name: str, compensation: str) -> None:
    """These families have output biases, so even that compensation has a place."""
    model = tiny(name)
    settings = settings_of(rate=0.15, units=["mlp"], uniform=True, compensation=compensation)
    prune(model, settings, samples_of())
    assert not model.config.is_heterogeneous
    assert "qpruner" not in str(model.config.to_dict())


# ---- what it would be, without weights


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.3},
        {"rate": 0.3, "steps": 3, "compensation": "least_squares"},
        {"rate": 0.3, "compensation": "bias"},
        {"rate": 0.1, "units": ["attention"]},
        {"layer_rate": 0.4},
        {"rate": 0.3, "uniform": True},
        {"rate": 0.4, "units": ["block"]},
        {"rate": 0.5, "units": ["block", "attention", "mlp"], "depth_share": 0.5, "uniform": True},
        {"rate": 0.2, "protected_layers": [1]},
        {"rate": 0.0},
    ],
    ids=str,
)
def test_the_config_is_known_without_weights(options: dict[str, Any]) -> None:
    """What `qpruner check` counts bytes on is what comes out."""
    from transformers import AutoModelForCausalLM

    settings, model = settings_of(**options), decoder()
    foreseen = expected_config(copy.deepcopy(model.config), settings)
    pruned = prune(model, settings, samples_of())
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(foreseen).state_dict()
    assert {name: value.shape for name, value in shapes.items()} == {
        name: value.shape for name, value in pruned.model.state_dict().items()
    }


def test_under_global_selection_the_config_is_the_average() -> None:
    from transformers import AutoModelForCausalLM

    settings, model = settings_of(rate=0.3, selection="global"), decoder()
    foreseen = expected_config(copy.deepcopy(model.config), settings)
    with torch.device("meta"):
        average = AutoModelForCausalLM.from_config(foreseen)
    pruned = prune(model, settings, samples_of())
    assert abs(num_parameters(average) - pruned.parameters_after) <= CHANNEL
    channels = [block.mlp.up_proj.out_features for block in average.model.layers]
    assert max(channels) - min(channels) <= 1
    assert len({kinds["mlp"] for kinds in widths(pruned).values()}) > 1


# ---- spread over devices


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.3},
        {"rate": 0.3, "compensation": "least_squares", "selection": "global"},
        {
            "rate": 0.5,
            "units": ["block", "attention", "mlp"],
            "depth_share": 0.5,
            "compensation": "bias",
            "steps": 2,
        },
        {"rate": 0.3, "importance": "fluctuation"},
    ],
    ids=str,
)
def test_a_model_that_accelerate_has_spread_is_cut_the_same(options: dict[str, Any]) -> None:
    """`device_map: auto` leaves hooks on modules that carry their inputs to their device; they must outlive the cut."""
    from accelerate import dispatch_model

    plain = prune(decoder(), settings_of(**options), samples_of())
    spread = decoder()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(
        spread,
        places | {f"model.layers.{index}": "cpu" for index in range(3)},
        main_device="cpu",
        force_hooks=True,
    )
    assert hasattr(spread.model.layers[0], "_hf_hook")
    pruned = prune(spread, settings_of(**options), samples_of())
    assert pruned.kept == plain.kept
    assert pruned.dropped_blocks == plain.dropped_blocks
    assert all(hasattr(block, "_hf_hook") for block in spread.model.layers)
    torch.testing.assert_close(logits_of(spread), logits_of(plain.model), rtol=1e-5, atol=1e-5)


def test_a_model_that_was_left_on_disk_in_part_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """accelerate puts there, or in the machine's memory, what no GPU has room for; no cut can reach it."""
    from transformers import AutoModelForCausalLM

    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    spilled = AutoModelForCausalLM.from_pretrained(
        tiny_model, device_map=places | {"model.rotary_emb": "cpu", "lm_head": "cpu"}, offload_folder=tmp_path
    )
    assert next(spilled.model.layers[1].parameters()).is_meta
    with pytest.raises(UserError, match=r"`model.device_map`: .* model\.layers\.1 on the disk.*more or larger GPUs"):
        check_reachable(spilled)
    check_reachable(load_dense(str(tiny_model), "bfloat16", ModelConfig(source=str(tiny_model), device_map="auto")))


# ---- experts


@pytest.mark.parametrize("units", [["attention", "expert"], ["attention", "mlp"], ["expert"]])
@pytest.mark.parametrize("selection", ["per_layer", "global"])
def test_experts_are_cut_whole_or_channel_by_channel(units: list[str], selection: str) -> None:
    model = tiny("mixtral", num_local_experts=6)
    before = num_parameters(model)
    sizes = unit_sizes(model, range(3), units)[0]
    finest = min(size.parameters * (8 if kind == "mlp" else 1) for kind, size in sizes.items())
    pruned = prune(model, settings_of(rate=0.25, units=units, selection=selection, round_to=8), samples_of())
    assert abs(before - pruned.parameters_after - 0.25 * before) <= finest
    assert all(block.mlp.gate.weight.shape[0] >= 2 for block in model.model.layers), "a token is sent to two"
    assert torch.isfinite(logits_of(model)).all()


def test_the_record_lists_the_channels_of_the_experts_that_stay() -> None:
    model = tiny("mixtral")
    base = copy.deepcopy(model.config)
    pruned = prune(model, settings_of(rate=0.3, units=["expert"]), samples_of())
    layers = layer_widths(base, pruned, block_sizes(tiny("mixtral"), range(3)))
    cut = [layer for layer in layers if len(layer.kept_experts or ()) < 4]
    assert cut
    for layer in layers:
        experts = pruned.kept[layer.layer]["expert"]
        assert layer.kept_experts == experts
        assert layer.kept_mlp_channels == tuple(unit for unit in range(4 * 24) if unit // 24 in experts)
        assert block_cells(layer)[3] == f"{len(experts)} x 24 of 4 x 24"


@pytest.mark.parametrize("options", [{"rate": 0.3}, {"rate": 0.3, "uniform": True}, {"layer_rate": 0.4}], ids=str)
def test_experts_can_be_measured_between_two_steps(options: dict[str, Any]) -> None:
    """In bfloat16 torch's grouped product takes widths of whole 16 bytes only, so every step has to leave such."""
    model = tiny("mixtral", intermediate_size=64).to(torch.bfloat16)
    pruned = prune(model, settings_of(units=["mlp"], round_to=8, steps=4, **options), samples_of())
    assert {kinds["mlp"] % (4 * 8) for kinds in widths(pruned).values()} == {0}
    once = prune(tiny("mixtral", intermediate_size=64), settings_of(units=["mlp"], round_to=8, **options), samples_of())
    assert widths(pruned) == widths(once)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"importance": "fluctuation"}, ("importance fluctuation (fisher, taylor, magnitude or random)",)),
        ({"aggregation": "vector"}, ("aggregation vector (element)",)),
        (
            {"importance": "fisher", "aggregation": "vector", "compensation": "least_squares"},
            ("aggregation vector (element)", "compensation least_squares (none)"),
        ),
        ({"compensation": "bias"}, ("compensation bias (none)", "`prune.units: [attention]`")),
        ({"compensation": "least_squares", "units": ["expert"]}, ("mlp.experts.gate_up_proj", "least_squares (none)")),
        ({"round_to": 4}, ("`prune.round_to` must be a multiple of 8 for the experts of a mixtral model, got 4",)),
    ],
    ids=str,
)
def test_what_stacked_experts_cannot_do_is_refused(options: dict[str, Any], said: tuple[str, ...]) -> None:
    model, settings = tiny("mixtral"), settings_of(**{"rate": 0.2, "round_to": 8, **options})
    for attempt in (lambda: prune(model, settings, samples_of()), lambda: expected_config(model.config, settings)):
        with pytest.raises(UserError) as caught:
            attempt()
        assert [part for part in said if part not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("units", "expected"),
    [(("attention", "mlp"), "none"), (("expert",), "none"), (("attention",), "least_squares")],
    ids=str,
)
def test_experts_get_no_compensation_by_default(units: Any, expected: str) -> None:
    """What only linear layers can have is no default for those that have none."""
    model, settings = tiny("mixtral"), PruneConfig(rate=0.1, units=units, round_to=8)
    assert planned_cut(model.config, settings).settings.compensates_by == expected
    before = num_parameters(model)
    assert prune(model, settings, samples_of()).parameters_after < before


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("selection", ["per_layer", "global"])
@pytest.mark.parametrize("rate", [0.05, 0.14, 0.23, 0.32, 0.47])
def test_heads_and_whole_experts_come_as_near_as_they_can(rate: float, selection: str, steps: int) -> None:
    """Where heads alone cannot give what experts leave, one more expert goes."""
    model, units = tiny("mixtral"), ["attention", "expert"]
    before, asked = num_parameters(model), round(rate * num_parameters(model))
    pools = [(size.parameters, 3 * (size.count - size.least)) for size in unit_sizes(model, [0], units)[0].values()]
    sums = {
        heads * pools[0][0] + experts * pools[1][0]
        for heads in range(pools[0][1] + 1)
        for experts in range(pools[1][1] + 1)
    }
    options = {"rate": rate, "units": units, "importance": "magnitude", "selection": selection, "steps": steps}
    pruned = prune(model, settings_of(**options), samples_of())
    nearest = min(abs(number - asked) for number in sums)
    assert abs(before - pruned.parameters_after - asked) <= max(nearest, pools[0][0] / 2)


@pytest.mark.parametrize("options", [{"units": ["mlp"]}, {"units": ["attention"]}, {"last_layer": 1}], ids=str)
def test_the_highest_rate_that_is_told_can_be_had(options: dict[str, Any]) -> None:
    model_config = tiny().config
    with pytest.raises(UserError) as caught:
        expected_config(model_config, settings_of(rate=0.9, **options))
    (told,) = re.findall(r"as it is, a rate of (0\.\d+) is the most", str(caught.value))
    expected_config(model_config, settings_of(rate=float(told), **options))
    with pytest.raises(UserError):
        expected_config(model_config, settings_of(rate=float(told) + 0.1, **options))


def test_no_highest_rate_is_named_beside_dropped_blocks() -> None:
    settings = settings_of(rate=0.9, units=["block", "attention"], depth_share=0.5)
    with pytest.raises(UserError, match=r"at most .* can .*\(once \d whole blocks? went") as caught:
        expected_config(tiny(num_hidden_layers=6).config, settings)
    assert "is the most" not in str(caught.value)


def test_a_share_of_each_block_that_takes_no_unit_is_refused() -> None:
    """Of three heads a fifth is none: nobody may go on with a model that was not cut."""
    model = tiny(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    for options in ({}, {"uniform": True}):
        settings = settings_of(layer_rate=0.2, units=["attention"], **options)
        with pytest.raises(
            UserError, match=r"`prune\.layer_rate` 0\.2 takes no unit .* 3 attention .*: raise it or name"
        ):
            expected_config(model.config, settings)
    settings = settings_of(layer_rate=0.2, units=["mlp"], round_to=48)
    with pytest.raises(UserError, match=r"mlp ones in multiples of 48: raise it, lower `prune\.round_to`"):
        expected_config(tiny(intermediate_size=96).config, settings)
    pruned = prune(model, settings_of(layer_rate=0.34, units=["attention"]), samples_of())
    assert pruned.parameters_after < pruned.parameters_before


# ---- shared weights


def _share_between_blocks(model: PreTrainedModel) -> None:
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def _share_with_the_head(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(model.model.norm.weight.data.view(1, -1))


@pytest.mark.parametrize(
    ("share", "names"),
    [
        (_share_between_blocks, ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")),
        (_share_with_the_head, ("model.layers.1.self_attn.o_proj.weight", "model.norm.weight")),
    ],
)
def test_shared_weights_are_refused(share: Any, names: tuple[str, ...]) -> None:
    model = decoder()
    share(model)
    with pytest.raises(UserError, match=r"one shared \(tied\) weight.*untie them, or leave pruning out") as caught:
        prune(model, settings_of(rate=0.2), samples_of())
    assert all(name in str(caught.value) for name in names)
    prune(model, PruneConfig(rate=0.0), samples_of())


def test_a_tied_output_head_is_no_obstacle() -> None:
    model = decoder()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_not_shared(model)
    prune(model, settings_of(rate=0.2), samples_of())
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("llama", {"rate": 0.9}, "lower the rate, widen `prune.first_layer`"),
        ("llama", {"rate": 0.4, "first_layer": 2}, "lower the rate, widen `prune.first_layer`"),
        ("llama", {"rate": 0.4, "units": ["attention"]}, "name more `prune.units`"),
        ("llama", {"rate": 0.1, "units": ["expert"]}, "no block of this llama model has such units"),
        ("llama", {"rate": 0.1, "round_to": 64}, "at most the 48 MLP channels of a block, got 64"),
        ("llama", {"rate": 0.1, "last_layer": 3}, "3 blocks, 0 to 2"),
        ("llama", {"rate": 0.1, "uniform": True, "first_layer": 1}, "all 3 blocks must be cut alike, but only 2 may"),
        ("llama", {"rate": 0.1, "uniform": True, "compensation": "bias"}, "has no place for output biases"),
        ("llama", {"layer_rate": 0.3, "uniform": True}, "leaves 3 key/value groups in a block"),
        ("opt", {"rate": 0.1, "uniform": True}, "`prune.units: [mlp]`, or `uniform: false`"),
        ("gpt_neox", {"rate": 0.1, "uniform": True}, "`prune.units: [mlp]`, or `uniform: false`"),
    ],
    ids=str,
)
def test_what_a_model_cannot_meet_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    """And the model is as it was."""
    grouped = {"num_key_value_heads": 4} if name == "llama" else {}
    model, settings = tiny(name, **grouped), settings_of(**options)
    before = logits_of(model)
    for attempt in (lambda: expected_config(model.config, settings), lambda: prune(model, settings, samples_of())):
        with pytest.raises(UserError) as caught:
            attempt()
        assert said in str(caught.value)
    assert torch.equal(logits_of(model), before)


def test_a_model_of_no_family_is_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match="`gpt2` is not supported"):
        family_of(GPT2Config())


def test_padding_does_not_change_what_goes() -> None:
    """The same samples one by one and in padded batches: for activations, tokens are tokens."""
    kept = [
        prune(
            decoder(),
            settings_of(rate=0.3, importance="fluctuation"),
            Samples(rows_of((9, 16, 12, 7, 16)), PAD, batch_size),
        ).kept
        for batch_size in (1, 3, 8)
    ]
    assert kept[0] == kept[1] == kept[2]
