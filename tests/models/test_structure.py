"""The weights that a unit owns in every family.

With wrong ones, pruning would cut wrong rows without an error.
"""

import copy
from pathlib import Path

import pytest
import torch
from made_tensors import distance
from tiny_families import (
    BLOCKS,
    FAMILY_NAMES,
    LAYERS,
    MODEL_NAMES,
    QUERY_HEADS,
    blocks_of,
    family_model,
    family_name,
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
    kept = kept_of(name)
    logits = logits_of(cut(family_model(name), kept))
    expected = logits_of(silenced(family_model(name), name, kept))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    assert distance(logits, logits_of(family_model(name))) > 0.2, "the cut must change the logits"


def test_the_tiny_models_are_of_every_supported_family() -> None:
    """A family without a tiny model would be supported in name only."""
    assert tuple(families()) == FAMILY_NAMES
    for name in FAMILY_NAMES:
        module = name.removesuffix("_text")
        of_model = type(family_model(name)).__module__
        assert of_model == f"transformers.models.{module}.modeling_{module}"


# ---- cut == masked


@pytest.mark.parametrize("name", ARCHETYPES)
def test_a_cut_in_two_steps_is_the_cut_in_one(name: str) -> None:
    """With `prune.steps` the second cut numbers the units that the first cut kept."""
    kept = kept_of(name)
    once = cut(family_model(name), kept)
    twice = family_model(name)
    for kind in ("attention", "mlp"):
        cut(twice, {index: {kind: units[kind]} for index, units in kept.items()})
    assert torch.equal(logits_of(twice), logits_of(once))
    heads = kept[0]["attention"]
    cut(twice, {0: {"attention": (len(heads) - 1,)}})
    kept[0]["attention"] = heads[-1:]
    assert torch.equal(logits_of(twice), logits_of(cut(family_model(name), kept)))


# ---- whole blocks


@pytest.mark.parametrize(("stay", "gone"), [((0, 2), 1), ((1, 2), 0)])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_dropping_blocks_is_the_same_as_passing_them_by(
    name: str, stay: tuple[int, ...], gone: int
) -> None:
    """Windows and cache positions belong to a block, not to its old position."""
    model = keep_blocks(family_model(name), stay)
    logits = logits_of(model)
    expected = logits_of(skip_blocks(family_model(name), [gone]))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    assert len(blocks_of(model)) == model.config.num_hidden_layers == 2
    assert distance(logits, logits_of(family_model(name))) > 0.2


@pytest.mark.parametrize("name", ARCHETYPES)
def test_cut_blocks_can_be_dropped_and_dropped_models_cut(name: str) -> None:
    kept = kept_of(name)
    cut_first = keep_blocks(cut(family_model(name), kept), (1, 2))
    dropped_first = cut(keep_blocks(family_model(name), (1, 2)), {1: kept[2]})
    expected = logits_of(skip_blocks(silenced(family_model(name), name, kept), [0]))
    assert cut_first.num_parameters() == dropped_first.num_parameters()
    for model in (cut_first, dropped_first):
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=2e-5)
        # Without a reload, a block with its old position would look for its keys and values there.
        cached = generated_scores(model, use_cache=True)
        uncached = generated_scores(model, use_cache=False)
        torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)


# ---- sizes


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_sizes_are_known_before_the_cut(name: str) -> None:
    """`qpruner check` computes sizes from the config alone; the cut model must have these sizes."""
    model = family_model(name)
    size = model.num_parameters()
    quantize = QuantizeConfig(group="projection", bits=(16,))
    layout = layout_of(model.config, quantize, 4, lora_rank=2, on_gpu=False)
    assert layout.num_parameters == size
    assert layout.plan_bytes(layout.dense()) - layout.adapter_bytes == 4 * size
    for group in layout.groups:
        for linear in group.linears:
            weight = model.get_submodule(linear.name).weight
            assert weight.shape == (linear.rows, linear.columns)
    promised = 0
    for index, units in kept_of(name).items():
        for kind, unit in unit_sizes(model, [index], tuple(units))[index].items():
            promised += (unit.count - len(units[kind])) * unit.parameters
    assert size - cut(model, kept_of(name)).num_parameters() == promised > 0


# ---- groups


@pytest.mark.parametrize(("group", "of_block"), [("block", 1), ("sublayer", 2), ("projection", 4)])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_linear_layer_of_a_block_is_in_one_group(
    name: str, group: str, of_block: int
) -> None:
    """Layers outside all groups would silently stay at 16 bits."""
    model = family_model(name)
    groups = group_linears(model.config, group)
    paths = [path for linears in groups.values() for path in linears]
    blocks = BLOCKS.get(family_name(name), "model.layers")
    linears = [
        f"{blocks}.{path}"
        for path, module in blocks_of(model).named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert sorted(paths) == sorted(linears)
    assert len(groups) == LAYERS * of_block


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_group_is_measured_where_its_output_leaves(name: str) -> None:
    """Sensitivity hooks these modules, so they must exist and produce the output of the group."""
    config = family_model(name).config
    block = f"{BLOCKS.get(name, 'model.layers')}.1"
    attention = "attention" if name == "gpt_neox" else "self_attn"
    mlp = "fc2" if name == "opt" else "mlp"
    assert output_modules(config, "block")["layers.1"] == (block,)
    sublayers = output_modules(config, "sublayer")
    assert sublayers["layers.1.attention"] == (f"{block}.{attention}",)
    assert sublayers["layers.1.mlp"] == (f"{block}.{mlp}",)
    assert output_modules(config, "projection") == group_linears(config, "projection")


@pytest.mark.parametrize("name", ARCHETYPES)
def test_another_attention_is_set_for_every_block(name: str) -> None:
    """Each cut block has its own config, which transformers does not change itself."""
    model = copy.deepcopy(cut(family_model(name), kept_of(name)))
    before = logits_of(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)
    weights = model(input_ids=prompt(), output_attentions=True).attentions
    heads = [4, QUERY_HEADS, 2]  # two groups of two heads, or four heads of their own
    assert [tensor.shape[1] for tensor in weights] == heads


def test_an_unsupported_architecture_is_refused() -> None:
    message = rf"`gpt2` is not supported.*{', '.join(FAMILY_NAMES)}.*docs/families\.md"
    with pytest.raises(UserError, match=message):
        family_of(AutoConfig.for_model("gpt2"))


def test_the_page_on_families_names_every_one_of_them() -> None:
    page = (Path(__file__).parents[2] / "docs/families.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(["`model_type`", *(f"`{name}`" for name in FAMILY_NAMES)])
