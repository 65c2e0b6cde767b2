"""The prune step as a whole on tiny models: the rate, the units, the steps, and what it refuses."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_decoders import logits_of, samples_of, settings_of, tiny

from qpruner.config.schema import ModelConfig, PruneConfig
from qpruner.errors import UserError
from qpruner.models.loading import check_reachable, load_dense
from qpruner.pipeline.prune import layer_widths
from qpruner.pruning import prune as prune_module
from qpruner.pruning.prune import Pruned, block_sizes, num_parameters, planned_cut, prune
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
        ({"layer_rate": 0.2}, {"rate": None, "selection": "per_layer", "round_to": 1, "query_heads": "modulo"}),
        ({"layer_rate": 0.2, "round_to": 32, "query_heads": "served"}, {"round_to": 32, "query_heads": "served"}),
        ({"layer_rate": 0.2, "importance": "fluctuation"}, {"query_heads": "served", "num_steps": 1}),
        ({"rate": 0.2, "layer_rate": None, "importance": "taylor"}, {"query_heads": "served"}),
        ({"uniform": True}, {"rate": 0.2, "selection": "per_layer"}),
        ({"uniform": False}, {"selection": "global", "num_steps": 1}),
        ({"units": ["block"], "rate": 0.5}, {"compensates_by": "least_squares", "num_steps": 1}),
        ({"rate": 0.21}, {"num_steps": 2}),
        ({"rate": 0.1 * 3}, {"num_steps": 2}),
        ({"rate": 0.31}, {"num_steps": 4}),
        ({"rate": 0.5, "steps": 1}, {"num_steps": 1}),
    ],
    ids=str,
)
def test_what_is_not_said_follows_from_what_is(given: dict[str, Any], implied: dict[str, Any]) -> None:
    """A default that another key rules out would be refused as if someone had written it."""
    settings = PruneConfig.model_validate(given)
    assert {key: getattr(settings, key) for key in implied} == implied


def test_a_rate_of_zero_changes_nothing() -> None:
    model = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = prune(model, PruneConfig(rate=0.0), samples_of())
    assert pruned.model is model
    assert pruned.kept == {}
    assert pruned.parameters_before == pruned.parameters_after == num_parameters(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- which units, and what stays of the others


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


# ---- steps


@pytest.mark.parametrize("selection", ["per_layer", "global"])
@pytest.mark.parametrize("importance", ["taylor", "fluctuation"])
def test_steps_remove_nested_sets_and_end_where_one_step_does(
    monkeypatch: pytest.MonkeyPatch, selection: str, importance: str
) -> None:
    """Importance is measured anew on the model that is left, so other units may go; never one that went comes back."""
    chosen: list[Kept] = []
    sizes_seen: list[int] = []
    choose, score = prune_module.choose, prune_module.score

    def spy_choose(*args: Any, **kwargs: Any) -> Kept:
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    def spy_score(model: PreTrainedModel, *args: Any) -> Any:
        sizes_seen.append(num_parameters(model))
        return score(model, *args)

    once = prune(decoder(), settings_of(rate=0.4, selection=selection, importance=importance), samples_of())
    monkeypatch.setattr(prune_module, "choose", spy_choose)
    monkeypatch.setattr(prune_module, "score", spy_score)
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


def test_uniform_channels_of_a_phi_of_long_context_are_plain(tmp_path: Path) -> None:
    """Its config wants a factor for every pair of hidden size / heads, so heads cannot go; channels can."""
    from transformers import AutoModelForCausalLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    length = {"original_max_position_embeddings": 32}
    model = tiny("phi3", num_key_value_heads=4, rope_parameters=rope | length, **length)
    with pytest.raises(UserError, match=r"`prune.units: \[mlp\]`, or `uniform: false`"):
        planned_cut(model.config, settings_of(rate=0.3, uniform=True))
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
    foreseen = planned_cut(model.config, settings).expected
    pruned = prune(model, settings, samples_of())
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(foreseen).state_dict()
    assert {name: value.shape for name, value in shapes.items()} == {
        name: value.shape for name, value in pruned.model.state_dict().items()
    }


def test_under_global_selection_the_config_is_the_average() -> None:
    from transformers import AutoModelForCausalLM

    settings, model = settings_of(rate=0.3, selection="global"), decoder()
    foreseen = planned_cut(model.config, settings).expected
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
        {"rate": 0.3, "importance": "fluctuation", "compensation": "least_squares", "selection": "global"},
        {"rate": 0.5, "units": ["block", "mlp"], "depth_share": 0.5, "compensation": "bias", "steps": 2},
    ],
    ids=str,
)
def test_a_model_that_accelerate_has_spread_is_cut_the_same(options: dict[str, Any]) -> None:
    """`device_map: auto` leaves hooks on modules that carry their inputs to their device; they must outlive the cut."""
    from accelerate import dispatch_model

    plain = prune(decoder(), settings_of(**options), samples_of())
    spread = decoder()
    parts = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2")
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    dispatch_model(spread, places, main_device="cpu", force_hooks=True)
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
    for attempt in (lambda: prune(model, settings, samples_of()), lambda: planned_cut(model.config, settings)):
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
        planned_cut(model_config, settings_of(rate=0.9, **options))
    (told,) = re.findall(r"as it is, a rate of (0\.\d+) is the most", str(caught.value))
    planned_cut(model_config, settings_of(rate=float(told), **options))
    with pytest.raises(UserError):
        planned_cut(model_config, settings_of(rate=float(told) + 0.1, **options))


def test_a_share_of_each_block_that_takes_no_unit_is_refused() -> None:
    """Of three heads a fifth is none: nobody may go on with a model that was not cut."""
    model = tiny(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    said = r"`prune\.layer_rate` 0\.2 takes no unit .* 3 attention .*: raise it, lower that, or name"
    for options in ({}, {"uniform": True}):
        with pytest.raises(UserError, match=said):
            planned_cut(model.config, settings_of(layer_rate=0.2, units=["attention"], **options))
    with pytest.raises(UserError, match=r"channels in multiples of `prune\.round_to`: raise it"):
        planned_cut(tiny().config, settings_of(layer_rate=0.2, units=["mlp"], round_to=48))
    pruned = prune(model, settings_of(layer_rate=0.34, units=["attention"]), samples_of())
    assert pruned.parameters_after < pruned.parameters_before


# ---- shared weights


@pytest.mark.parametrize("other", ["layers.0.mlp.up_proj.weight", "norm.weight"])
def test_shared_weights_are_refused(other: str) -> None:
    """A tied output head, as of every tiny model here, is no obstacle."""
    model = decoder()
    data = model.get_parameter(f"model.{other}").data
    model.model.layers[2].mlp.up_proj.weight.data = data if data.dim() > 1 else data.view(1, -1)
    with pytest.raises(UserError, match=r"one shared \(tied\) weight.*untie them, or leave pruning out") as caught:
        prune(model, settings_of(rate=0.2), samples_of())
    assert all(f"model.{name}" in str(caught.value) for name in (other, "layers.2.mlp.up_proj.weight"))
    prune(model, PruneConfig(rate=0.0), samples_of())


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
    for attempt in (lambda: planned_cut(model.config, settings), lambda: prune(model, settings, samples_of())):
        with pytest.raises(UserError) as caught:
            attempt()
        assert said in str(caught.value)
    assert torch.equal(logits_of(model), before)
