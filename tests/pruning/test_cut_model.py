"""Pruning tiny models as a whole: rate, units, steps, and refused settings."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_decoders import logits_of, samples_of, settings_of, tiny
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
    model, rate = decoder(), 0.5
    before = num_parameters(model)
    pruned = prune(model, settings_of(rate=rate, selection=selection, **criterion), samples_of())
    assert pruned.model is model
    assert (pruned.parameters_before, pruned.parameters_after) == (before, num_parameters(model))
    assert abs(before - pruned.parameters_after - rate * before) <= CHANNEL
    assert all(number >= 1 for kinds in widths(pruned).values() for number in kinds.values())
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize(("rate", "steps"), [(0.2, 1), (0.3, 2), (0.5, 5)])
def test_the_defaults_meet_the_rate(rate: float, steps: int) -> None:
    """The defaults are Fisher, global, least squares, multiples of 64, and more steps for higher
    rates."""
    settings = {
        "importance": "fisher",
        "selection": "global",
        "compensation": "least_squares",
        "round_to": 64,
    }
    by_default, named = (
        prune(decoder(intermediate_size=512), PruneConfig(rate=rate, **options), samples_of())
        for options in ({}, settings | {"steps": steps})
    )
    before, after = by_default.parameters_before, by_default.parameters_after
    assert abs(before - after - rate * before) <= CHANNEL * 64
    assert named.kept == by_default.kept and torch.equal(
        logits_of(named.model), logits_of(by_default.model)
    )


@pytest.mark.parametrize(
    ("given", "implied"),
    [
        (
            {"layer_rate": 0.2},
            {"rate": None, "selection": "per_layer", "round_to": 1, "query_heads": "modulo"},
        ),
        (
            {"layer_rate": 0.2, "round_to": 32, "query_heads": "served"},
            {"round_to": 32, "query_heads": "served"},
        ),
        (
            {"layer_rate": 0.2, "importance": "fluctuation"},
            {"query_heads": "served", "num_steps": 1},
        ),
        ({"rate": 0.2, "layer_rate": None, "importance": "taylor"}, {"query_heads": "served"}),
        ({"uniform": True}, {"rates": (0.0, 0.1, 0.2), "selection": "per_layer"}),
        ({"uniform": False}, {"selection": "global", "num_steps": 1}),
        ({"units": ["block"], "rate": 0.5}, {"compensates_by": "least_squares", "num_steps": 1}),
        ({"rate": 0.1 * 3}, {"num_steps": 2}),
        ({"rate": 0.31}, {"num_steps": 4}),
        ({"rate": 0.5, "steps": 1}, {"num_steps": 1}),
    ],
    ids=str,
)
def test_defaults_follow_from_other_keys(given: dict[str, Any], implied: dict[str, Any]) -> None:
    """A default that contradicts another key would be refused as if the user had set it."""
    settings = PruneConfig.model_validate(given)
    assert {key: getattr(settings, key) for key in implied} == implied


# ---- which units


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"first_layer": 1, "last_layer": 1}, {0, 2}),
        ({"first_layer": 1, "last_layer": -1}, {0}),
        ({"first_layer": 1, "selection": "global", "compensation": "least_squares"}, {0}),
        ({"rate": 0.0}, {0, 1, 2}),
    ],
    ids=str,
)
def test_blocks_outside_the_range_keep_their_weights(
    options: dict[str, Any], whole: set[int]
) -> None:
    model = decoder()
    before = copy.deepcopy(model.model.layers)
    pruned = prune(
        model, settings_of(**{"rate": 0.1, "importance": "magnitude"} | options), samples_of()
    )
    assert set(pruned.kept) == set(range(3)) - whole
    for index, (old, new) in enumerate(zip(before, model.model.layers, strict=True)):
        pairs = list(zip(old.parameters(), new.parameters(), strict=True))
        assert all(torch.equal(*pair) for pair in pairs) == (index in whole)


# ---- steps


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("importance", ["taylor", "fluctuation"])
def test_each_step_scores_the_model_that_is_left(selection: str, importance: str) -> None:
    """So several steps remove other units than one step, but as many parameters."""
    options = {"rate": 0.4, "selection": selection, "importance": importance}
    once = prune(decoder(), settings_of(**options), samples_of())
    reports: list[tuple[str, int, int]] = []
    settings = settings_of(**options, steps=3)
    stepped = prune(
        decoder(), settings, samples_of(), on_work=lambda *progress: reports.append(progress)
    )
    steps = [f"importance, step {step} of 3" for step in (1, 2, 3)]
    assert [what for what, done, total in reports if done == total and what in steps] == steps
    assert stepped.kept != once.kept
    tolerance = 0 if selection == "per_layer" else CHANNEL
    assert abs(stepped.parameters_after - once.parameters_after) <= tolerance
    # The scores in the result are those of the base model.
    for index, kinds in once.scores.items():
        assert all(
            torch.equal(stepped.scores[index][kind], values) for kind, values in kinds.items()
        )
    assert {kind: len(values) for kind, values in stepped.scores[0].items()} == {
        "attention": 4,
        "mlp": 64,
    }


# ---- every block alike


def test_uniform_channels_of_a_long_context_phi_are_plain(tmp_path: Path) -> None:
    """Its config needs a factor for every pair of (hidden size / heads), so heads cannot be cut;
    channels can."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    length = {"original_max_position_embeddings": 32}
    model = tiny("phi3", num_key_value_heads=4, rope_parameters=rope | length, **length)
    with pytest.raises(UserError, match=r"`prune.units: \[mlp\]`, or `uniform: false`"):
        planned_cut(model.config, settings_of(rate=0.3, uniform=True))
    prune(model, settings_of(rate=0.15, uniform=True, units=["mlp"]), samples_of())
    model.save_pretrained(tmp_path)
    assert "per_layer_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)),
        logits_of(model),
    )


# ---- without weights


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.3},
        {"rate": 0.3, "steps": 3, "compensation": "least_squares"},
        {"rate": 0.1, "units": ["attention"]},
        {"layer_rate": 0.4},
        {"rate": 0.3, "uniform": True},
        {"rate": 0.4, "units": ["block"]},
        {"rate": 0.5, "units": ["block", "attention", "mlp"], "depth_share": 0.5, "uniform": True},
        {"rate": 0.0},
        {"rate": 0.3, "selection": "global"},
    ],
    ids=str,
)
def test_the_config_is_known_without_weights(options: dict[str, Any]) -> None:
    """`qpruner check` counts bytes on the planned config, which has average widths if widths depend
    on scores."""
    settings, model = settings_of(**options), decoder()
    planned = skeleton(planned_cut(model.config, settings).expected)
    pruned = prune(model, settings, samples_of())
    shapes = [
        {name: value.shape for name, value in each.state_dict().items()}
        for each in (planned, pruned.model)
    ]
    if settings.selection == "per_layer" or not pruned.kept:
        assert shapes[0] == shapes[1]
        return
    assert abs(num_parameters(planned) - pruned.parameters_after) <= CHANNEL
    channels = [block.mlp.up_proj.out_features for block in planned.model.layers]
    assert max(channels) - min(channels) <= 1
    assert len({kinds["mlp"] for kinds in widths(pruned).values()}) > 1


# ---- spread over devices


@pytest.mark.parametrize(
    "options",
    [
        {
            "rate": 0.3,
            "importance": "fluctuation",
            "compensation": "least_squares",
            "selection": "global",
        },
        {"rate": 0.5, "units": ["block", "mlp"], "depth_share": 0.5, "steps": 2},
    ],
    ids=str,
)
def test_a_model_that_accelerate_has_spread_is_cut_the_same(options: dict[str, Any]) -> None:
    """`device_map: auto` adds hooks that move inputs to the device of a module; the cut must keep
    them."""
    from accelerate import dispatch_model

    plain = prune(decoder(), settings_of(**options), samples_of())
    spread = decoder()
    parts = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2")
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    dispatch_model(spread, places, main_device="cpu", force_hooks=True)
    pruned = prune(spread, settings_of(**options), samples_of())
    assert (pruned.kept, pruned.dropped_blocks) == (plain.kept, plain.dropped_blocks)
    assert all(hasattr(block, "_hf_hook") for block in spread.model.layers)
    torch.testing.assert_close(logits_of(spread), logits_of(plain.model), rtol=1e-5, atol=1e-5)


def test_a_model_that_was_left_on_disk_in_part_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """accelerate places layers there, or in host memory, if no GPU has room; they cannot be cut."""
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
    }
    spilled = AutoModelForCausalLM.from_pretrained(
        tiny_model,
        device_map=places | {"model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path,
    )
    with pytest.raises(
        UserError, match=r"`model.device_map`: .* model\.layers\.1 on disk.*more or larger GPUs"
    ):
        check_reachable(spilled)
    check_reachable(
        load_dense(
            str(tiny_model), "bfloat16", ModelConfig(source=str(tiny_model), device_map="auto")
        )
    )


# ---- refused settings


@pytest.mark.parametrize(
    "options", [{"units": ["mlp"]}, {"units": ["attention"]}, {"last_layer": 1}], ids=str
)
def test_the_highest_rate_in_the_message_is_accepted(options: dict[str, Any]) -> None:
    model_config = tiny().config
    with pytest.raises(UserError) as caught:
        planned_cut(model_config, settings_of(rate=0.9, **options))
    (highest,) = re.findall(r"the highest rate is (0\.\d+)$", str(caught.value))
    planned_cut(model_config, settings_of(rate=float(highest), **options))
    with pytest.raises(UserError):
        planned_cut(model_config, settings_of(rate=float(highest) + 0.1, **options))


@pytest.mark.parametrize("other", ["layers.0.mlp.up_proj.weight", "norm.weight"])
def test_shared_weights_are_refused(other: str) -> None:
    """A tied output head, which all tiny models here have, is accepted."""
    model = decoder()
    data = model.get_parameter(f"model.{other}").data
    model.model.layers[2].mlp.up_proj.weight.data = data if data.dim() > 1 else data.view(1, -1)
    with pytest.raises(
        UserError, match=r"one shared \(tied\) weight.*untie them, or leave pruning out"
    ) as caught:
        prune(model, settings_of(rate=0.2), samples_of())
    assert all(
        f"model.{name}" in str(caught.value) for name in (other, "layers.2.mlp.up_proj.weight")
    )
    prune(model, PruneConfig(rate=0.0), samples_of())


def test_a_single_key_value_group_stays_in_a_uniform_cut() -> None:
    """As in Gemma 3 270M, whose heads together are wider than its hidden states; it was refused for
    the contrary."""
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=1)
    pruned = prune(model, settings_of(rate=0.1, uniform=True), samples_of())
    assert {kinds["attention"] for kinds in pruned.kept.values()} == {(0,)}
    assert len({len(kinds["mlp"]) for kinds in pruned.kept.values()}) == 1


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("llama", {}, "`prune.uniform: true`"),
        (
            "llama",
            {"selection": "global"},
            "`prune.uniform: true` and `prune.selection: per_layer`",
        ),
        ("opt", {}, "`prune.uniform: true` and `prune.units: [mlp]`"),
        (
            *("opt", {"selection": "global"}),
            "`prune.uniform: true`, `prune.selection: per_layer` and `prune.units: [mlp]`",
        ),
    ],
)
def test_all_that_makes_a_cut_uniform_is_named_at_once(
    name: str, options: dict[str, Any], keys: str
) -> None:
    """What is named is accepted: nobody is led from one error to the next."""
    model = tiny(name)
    said = uniform_remedy(model.config, PruneConfig(**{"selection": "per_layer"} | options))
    assert said == f"set {keys}, so that all blocks have the same widths"
    named = dict(re.findall(r"`prune\.(\w+): ([^`]+)`", said))
    changes = {key: yaml.safe_load(value) for key, value in named.items()}
    check_settings(
        model.config, PruneConfig(**{"rate": 0.2, "selection": "per_layer"} | options | changes)
    )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "llama",
            {"rate": 0.4, "first_layer": 2},
            ["lower the rate, allow more blocks (`prune.first_layer`"],
        ),
        ("llama", {"layer_rate": 0.3, "uniform": True}, ["leaves 3 key/value groups in a block"]),
        # A fifth of four heads is no head: a run must not continue with an uncut model.
        (
            "llama",
            {"layer_rate": 0.2, "units": ["attention"]},
            ["0.2 removes no unit", "raise the rate, lower"],
        ),
        (
            "llama",
            {"layer_rate": 0.2, "units": ["mlp"], "round_to": 48},
            ["in multiples of `prune.round_to`"],
        ),
        ("llama", {"last_layer": -9}, ["must be a range within the model's 3 blocks, 0 to 2"]),
        (
            "opt",
            {"uniform": True},
            ["cannot have fewer heads", "`prune.units: [mlp]`, or `uniform: false`"],
        ),
    ],
    ids=str,
)
def test_what_a_model_cannot_meet_is_refused(
    name: str, options: dict[str, Any], said: list[str]
) -> None:
    """The refused model is unchanged."""
    model = tiny(name, **({"num_key_value_heads": 4} if name == "llama" else {}))
    by_rate = {} if "layer_rate" in options else {"rate": 0.2}
    settings = settings_of(**by_rate | options)
    before = logits_of(model)
    for attempt in (
        lambda: planned_cut(model.config, settings),
        lambda: prune(model, settings, samples_of()),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        assert [part for part in said if part not in str(caught.value)] == [], str(caught.value)
    assert torch.equal(logits_of(model), before)
