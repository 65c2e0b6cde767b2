"""The weights that a unit owns in every family.

With wrong ones, pruning would cut wrong rows without an error.
"""

import copy
from pathlib import Path

import pytest
import torch
from tiny_families import (
    BLOCKS,
    FAMILY_NAMES,
    HEADWISE,
    KEY_VALUE_HEADS,
    LAYERS,
    MODEL_NAMES,
    QUERY_HEADS,
    blocks_of,
    family_model,
    generated_scores,
    kept_of,
    logits_of,
    prompt,
    silenced,
    skip_blocks,
)
from transformers import AutoConfig

from qpruner.config.schema import QuantizeConfig
from qpruner.errors import UserError
from qpruner.models.families import families, family_of
from qpruner.models.layout import group_linears, layout_of, output_modules
from qpruner.pruning.surgery import cut, keep_blocks
from qpruner.pruning.units import unit_sizes

ARCHETYPES = ("llama", "gpt_neox")
"""Grouped heads, fused heads; for tests that need no other families."""


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_cutting_units_is_the_same_as_silencing_them(name: str) -> None:
    model, kept = family_model(name), kept_of(name)
    expected = logits_of(silenced(copy.deepcopy(model), name, kept))
    whole = logits_of(model)
    found = logits_of(cut(model, kept))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert (found - whole).norm() > 0.2 * whole.norm(), "the cut must change the logits"


def test_the_tiny_models_are_of_every_supported_family() -> None:
    """A family without a tiny model would be supported in name only."""
    assert tuple(families()) == FAMILY_NAMES
    for name in FAMILY_NAMES:
        module = name.removesuffix("_text")
        assert (
            type(family_model(name)).__module__ == f"transformers.models.{module}.modeling_{module}"
        )


# ---- cut == masked


@pytest.mark.parametrize("name", ARCHETYPES)
def test_a_cut_in_two_steps_is_the_cut_in_one(name: str) -> None:
    """With `prune.steps` the second cut numbers the units that the first cut kept."""
    kept = kept_of(name)
    once, twice = cut(family_model(name), kept), family_model(name)
    for kind in ("attention", "mlp"):
        cut(twice, {index: {kind: units[kind]} for index, units in kept.items()})
    assert torch.equal(logits_of(twice), logits_of(once))
    last = kept[0]["attention"][-1]
    fewer = {**kept, 0: {**kept[0], "attention": (last,)}}
    cut(twice, {0: {"attention": (len(kept[0]["attention"]) - 1,)}})
    assert torch.equal(logits_of(twice), logits_of(cut(family_model(name), fewer)))


# ---- whole blocks


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_dropping_blocks_is_the_same_as_passing_them_by(name: str) -> None:
    """Windows and cache positions belong to a block, not to its old position."""
    whole = logits_of(family_model(name))
    for stay, gone in (((0, 2), 1), ((1, 2), 0)):
        model = keep_blocks(family_model(name), stay)
        found = logits_of(model)
        torch.testing.assert_close(
            found, logits_of(skip_blocks(family_model(name), [gone])), rtol=1e-5, atol=2e-5
        )
        assert len(blocks_of(model)) == model.config.num_hidden_layers == 2
        assert (found - whole).norm() > 0.2 * whole.norm()


@pytest.mark.parametrize("name", ARCHETYPES)
def test_cut_blocks_can_be_dropped_and_dropped_models_cut(name: str) -> None:
    kept, stay = kept_of(name), (1, 2)
    cut_first = keep_blocks(cut(family_model(name), kept), stay)
    dropped_first = cut(keep_blocks(family_model(name), stay), {stay.index(2): kept[2]})
    expected = logits_of(skip_blocks(silenced(family_model(name), name, kept), [0]))
    torch.testing.assert_close(logits_of(cut_first), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logits_of(dropped_first), expected, rtol=1e-5, atol=2e-5)
    assert cut_first.num_parameters() == dropped_first.num_parameters()
    # Without a reload, a block with its old position would look for its keys and values there.
    for model in (cut_first, dropped_first):
        cached, uncached = (generated_scores(model, use_cache) for use_cache in (True, False))
        torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)


# ---- sizes


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_sizes_are_known_before_the_cut(name: str) -> None:
    """`qpruner check` computes sizes from the config alone; the cut model must have these sizes."""
    model, kept, promised = family_model(name), kept_of(name), 0
    for index, units in kept.items():
        sizes = unit_sizes(model, [index], tuple(units))[index]
        for kind, stays in units.items():
            promised += (sizes[kind].count - len(stays)) * sizes[kind].parameters
    assert model.num_parameters() - cut(model, kept).num_parameters() == promised > 0
    layout = layout_of(
        model.config, QuantizeConfig(group="projection", bits=(16,)), 4, lora_rank=2, on_gpu=False
    )
    assert layout.num_parameters == model.num_parameters()
    assert layout.plan_bytes(layout.dense()) - layout.adapter_bytes == 4 * model.num_parameters()
    for group in layout.groups:
        for linear in group.linears:
            assert tuple(model.get_submodule(linear.name).weight.shape) == (
                linear.rows,
                linear.columns,
            )


# ---- groups


@pytest.mark.parametrize("group", ["block", "sublayer", "projection"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_linear_layer_of_a_block_is_in_one_group(name: str, group: str) -> None:
    """Layers outside all groups would silently stay at 16 bits."""
    model = family_model(name)
    groups = group_linears(model.config, group)
    paths = [path for linears in groups.values() for path in linears]
    blocks = {id(module) for block in blocks_of(model) for module in block.modules()}
    linears = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in blocks
    ]
    assert sorted(paths) == sorted(linears)
    assert len(groups) == LAYERS * {"block": 1, "sublayer": 2, "projection": 4}[group]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_group_is_measured_where_its_output_leaves(name: str) -> None:
    """Sensitivity hooks these modules, so they must exist and produce the output of the group."""
    config, block = family_model(name).config, f"{BLOCKS.get(name, 'model.layers')}.1"
    attention = f"{block}.{'attention' if name == 'gpt_neox' else 'self_attn'}"
    mlp = f"{block}.{'fc2' if name == 'opt' else 'mlp'}"
    assert output_modules(config, "block")["layers.1"] == (block,)
    by_sublayer = output_modules(config, "sublayer")
    assert by_sublayer["layers.1.attention"] == (attention,)
    assert by_sublayer["layers.1.mlp"] == (mlp,)
    assert output_modules(config, "projection") == group_linears(config, "projection")


@pytest.mark.parametrize("name", ARCHETYPES)
def test_another_attention_is_set_for_every_block(name: str) -> None:
    """Each cut block has its own config, which transformers does not change itself."""
    model = copy.deepcopy(cut(family_model(name), kept_of(name)))
    before = logits_of(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)
    weights = model(input_ids=prompt(), output_attentions=True).attentions
    per_unit = 1 if name in HEADWISE else QUERY_HEADS // KEY_VALUE_HEADS
    heads = {index: len(units["attention"]) * per_unit for index, units in kept_of(name).items()}
    assert [each.shape[1] for each in weights] == [
        heads.get(index, QUERY_HEADS) for index in range(LAYERS)
    ]


def test_an_unsupported_architecture_is_refused() -> None:
    said = rf"`gpt2` is not supported; supported: {', '.join(FAMILY_NAMES)}\. .*docs/families\.md"
    with pytest.raises(UserError, match=said):
        family_of(AutoConfig.for_model("gpt2"))


def test_the_page_on_families_names_every_one_of_them() -> None:
    page = (Path(__file__).parents[2] / "docs/families.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(["`model_type`", *(f"`{name}`" for name in FAMILY_NAMES)])
