"""What a unit owns in every family: if this broke, pruning would cut the wrong rows and nothing would say so."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_families import CHANNELS, FAMILY_NAMES, KEPT, KEY_VALUE_HEADS, LAYERS, QUERY_HEADS, family_model, logits_of
from transformers import AutoConfig

from qpruner.errors import UserError
from qpruner.models.layout import group_linears, layout_of, output_modules
from qpruner.models.structure import FAMILIES, family_of, family_of_type
from qpruner.pruning.selection import unit_sizes
from qpruner.pruning.surgery import cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def silence(model: PreTrainedModel, kept: dict[int, dict[str, tuple[int, ...]]]) -> PreTrainedModel:
    """The same model with everything of the removed units at zero, from first principles: no slice of ours is used."""
    head_dim = model.model.layers[0].self_attn.head_dim
    heads_per_group = QUERY_HEADS // KEY_VALUE_HEADS
    for index, units in kept.items():
        block = model.model.layers[index]
        for removed in set(range(KEY_VALUE_HEADS)) - set(units["attention"]):
            keys = slice(removed * head_dim, (removed + 1) * head_dim)
            queries = slice(removed * heads_per_group * head_dim, (removed + 1) * heads_per_group * head_dim)
            for linear, rows in (
                (block.self_attn.q_proj, queries),
                (block.self_attn.k_proj, keys),
                (block.self_attn.v_proj, keys),
            ):
                linear.weight[rows] = 0
                if linear.bias is not None:
                    linear.bias[rows] = 0
            block.self_attn.o_proj.weight[:, queries] = 0
        for removed in set(range(CHANNELS)) - set(units["mlp"]):
            block.mlp.gate_proj.weight[removed] = 0
            block.mlp.up_proj.weight[removed] = 0
            block.mlp.down_proj.weight[:, removed] = 0
    return model


def num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_tiny_models_are_of_every_supported_family() -> None:
    assert {family.model_type for family in FAMILIES} == set(FAMILY_NAMES)
    for name in FAMILY_NAMES:
        assert type(family_model(name)).__module__ == f"transformers.models.{name}.modeling_{name}"


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_cutting_units_is_the_same_as_silencing_them(name: str) -> None:
    model = family_model(name)
    silenced = logits_of(silence(copy.deepcopy(model), KEPT))
    whole = logits_of(model)
    cut_logits = logits_of(cut(model, KEPT))
    torch.testing.assert_close(cut_logits, silenced, rtol=1e-4, atol=1e-4)
    assert (cut_logits - whole).abs().max() > 0.05, "the cut must be visible for this test to say anything"


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_keeping_every_unit_changes_no_logit(name: str) -> None:
    model = family_model(name)
    before = logits_of(model)
    everything = {"attention": tuple(range(KEY_VALUE_HEADS)), "mlp": tuple(range(CHANNELS))}
    assert torch.equal(logits_of(cut(model, dict.fromkeys(range(LAYERS), everything))), before)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_model_shrinks_by_what_the_units_promise(name: str) -> None:
    model = family_model(name)
    sizes, before = unit_sizes(model, 0), num_parameters(model)
    removed_heads = sum(KEY_VALUE_HEADS - len(units["attention"]) for units in KEPT.values())
    removed_channels = sum(CHANNELS - len(units["mlp"]) for units in KEPT.values())
    after = cut(model, KEPT)
    promised = removed_heads * sizes.parameters["attention"] + removed_channels * sizes.parameters["mlp"]
    assert before - num_parameters(after) == promised
    for index in range(LAYERS):
        block, units = after.model.layers[index], KEPT.get(index)
        heads = len(units["attention"]) if units else KEY_VALUE_HEADS
        channels = len(units["mlp"]) if units else CHANNELS
        assert block.self_attn.k_proj.weight.shape[0] == heads * block.self_attn.head_dim
        assert block.self_attn.o_proj.weight.shape[1] == heads * 2 * block.self_attn.head_dim
        assert block.mlp.down_proj.weight.shape[1] == channels


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_sizes_are_known_without_weights(name: str) -> None:
    """`qpruner check` tells sizes from the config alone; they must be those of the model that is made."""
    model = cut(family_model(name), KEPT)
    layout = layout_of(model.config, "projection", 4, double_quant=False, lora_rank=2)
    assert layout.num_parameters == num_parameters(model)
    assert layout.plan_bytes(layout.uniform(16)) - layout.adapter_bytes == 4 * num_parameters(model)
    for group in layout.groups:
        for linear in group.linears:
            assert tuple(model.get_submodule(linear.name).weight.shape) == (linear.rows, linear.columns)


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize(("group", "per_block"), [("block", 1), ("sublayer", 2), ("projection", 4)])
def test_every_projection_is_in_one_group(name: str, group: str, per_block: int) -> None:
    model = family_model(name)
    groups = group_linears(model.config, group)
    paths = [path for linears in groups.values() for path in linears]
    projections = {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith("model.layers.")
    }
    assert len(groups) == per_block * LAYERS
    assert len(paths) == len(set(paths)) == 7 * LAYERS
    assert set(paths) == projections
    for modules in output_modules(model.config, group).values():
        assert all(model.get_submodule(path) is not None for path in modules)


def test_an_unknown_architecture_is_told_with_the_supported_ones() -> None:
    with pytest.raises(UserError) as caught:
        family_of(AutoConfig.for_model("gpt2"))
    message = str(caught.value)
    assert "`gpt2` is not supported" in message
    assert all(name in message for name in FAMILY_NAMES)
    with pytest.raises(UserError, match="`mamba`"):
        family_of_type("mamba")
