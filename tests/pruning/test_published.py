"""The units that LLM-Pruner (arXiv 2305.11627) removes with its own settings, by a reimplementation
of its code.

If other units were removed, a comparison with its published results would compare other models. If
query heads share key/value heads, its code counts query head h for key/value head h modulo their
number, as `query_heads: modulo` does; `served` counts it for its own key/value head.
`benchmarks/llm_pruner.py` runs the original program.
"""

from typing import Any

import pytest
import torch
from tiny_decoders import PAD, rows_of, settings_of, tiny
from transformers import PreTrainedModel

from qpruner.data.calibration import Samples
from qpruner.pruning.prune import prune

HEAD_DIM = 8
CHANNELS = 48
LENGTH = 14
MATRICES = (
    ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
    ("mlp.gate", "mlp.up", "mlp.down"),
)
HEADS = {"multi-head": (4, 4), "grouped": (6, 3)}
CRITERIA: dict[str, dict[str, str]] = {
    "param_first": {"importance": "taylor"},
    "param_second": {"importance": "taylor", "order": "second"},
    "param_mix": {"importance": "taylor", "order": "mixed"},
    "vectorize": {"importance": "taylor", "aggregation": "vector"},
    "l1": {"importance": "magnitude", "norm": "l1"},
    "l2": {"importance": "magnitude", "norm": "l2"},
}


def decoder(heads: str, seed: int = 0) -> PreTrainedModel:
    """Build a Llama with confident predictions, so that second-order terms are visible."""
    num_heads, groups = HEADS[heads]
    model = tiny(
        "llama", seed, hidden_size=48, num_attention_heads=num_heads, num_key_value_heads=groups
    )
    with torch.no_grad():
        model.model.norm.weight.mul_(60)
    return model


def accumulate(
    model: PreTrainedModel, prompts: torch.Tensor, criterion: str
) -> dict[str, torch.Tensor]:
    """Compute `acc_grad`, the mean square of sample gradients, and set `.grad` to the gradient over
    all samples."""
    squares: dict[str, torch.Tensor] = {}
    if criterion in ("param_second", "param_mix"):
        for prompt in prompts:
            model.zero_grad()
            model(prompt.unsqueeze(0), labels=prompt.unsqueeze(0)).loss.backward()
            for name, parameter in model.named_parameters():
                square = parameter.grad * parameter.grad / len(prompts)
                squares[name] = squares[name] + square if name in squares else square
    model.zero_grad()
    model(prompts, labels=prompts).loss.backward()
    return squares


def lines(
    name: str, model: PreTrainedModel, squares: dict[str, torch.Tensor], criterion: str
) -> torch.Tensor:
    """Compute the importance of each row of a `linear_out` layer, or each column of a `linear_in`
    layer."""
    weight = model.get_parameter(name).detach()
    dim = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
    if criterion in ("l1", "l2"):
        return weight.abs().pow(int(criterion[1])).sum(dim)
    salience = weight * model.get_parameter(name).grad
    if criterion == "param_second":
        salience = weight * squares[name] * weight
    elif criterion == "param_mix":
        salience = salience - 0.5 * weight * squares[name] * weight
    return salience.sum(dim).abs() if criterion == "vectorize" else salience.abs().sum(dim)


def published(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    criterion: str,
    ratio: float,
    query_heads: str = "modulo",
) -> dict[int, Any]:
    """List the key/value heads and channels that a layer keeps when it loses the share `ratio`."""
    squares = accumulate(model, prompts, criterion)
    groups = model.config.num_key_value_heads
    rows = groups * HEAD_DIM
    heads_gone = (rows - int(rows * (1 - ratio))) // HEAD_DIM
    channels_gone = CHANNELS - int(CHANNELS * (1 - ratio))
    kept = {}
    for index in range(model.config.num_hidden_layers):
        attention, mlp = (
            [
                lines(f"model.layers.{index}.{name}_proj.weight", model, squares, criterion)
                for name in names
            ]
            for names in MATRICES
        )
        if query_heads == "modulo":  # its `imp.view(len(imp) // min_imp_size, min_imp_size).sum(0)`
            attention = [each.view(-1, rows).sum(0) for each in attention]
        heads = sum(each.view(groups, -1).sum(1) for each in attention)
        channels = sum(mlp)
        kept[index] = {
            "attention": tuple(sorted(torch.argsort(heads)[heads_gone:].tolist())),
            "mlp": tuple(sorted(torch.argsort(channels)[channels_gone:].tolist())),
        }
    model.zero_grad(set_to_none=True)
    return kept


def prompts_of(seed: int = 0) -> tuple[list[dict[str, list[int]]], torch.Tensor]:
    rows = rows_of([LENGTH] * 5, seed=seed + 10)
    return rows, torch.tensor([row["input_ids"] for row in rows])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("query_heads", ["modulo", "served"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_units_stay(criterion: str, heads: str, query_heads: str, seed: int) -> None:
    model = decoder(heads, seed)
    groups = HEADS[heads][1]
    ratio = (0.25, 0.4, 0.5)[seed]
    rows, prompts = prompts_of(seed)
    expected = published(model, prompts, criterion, ratio, query_heads)
    settings = settings_of(layer_rate=ratio, query_heads=query_heads, **CRITERIA[criterion])
    assert prune(model, settings, Samples(rows, PAD, batch_size=len(rows))).kept == expected
    gone = [
        (groups - len(kinds["attention"]), CHANNELS - len(kinds["mlp"]))
        for kinds in expected.values()
    ]
    assert all(channels > 0 for _, channels in gone)
    assert (gone[0][0] > 0) == (groups * ratio >= 1), "a real choice"


def test_criteria_and_query_heads_change_the_kept_units() -> None:
    """The tests above prove little if all criteria keep the same units."""
    prompts = prompts_of()[1]
    kept = [
        published(decoder("multi-head"), prompts, criterion, 0.5)[1]["mlp"]
        for criterion in CRITERIA
    ]
    assert len(set(kept)) == len(kept)
    for heads, differ in (("multi-head", False), ("grouped", True)):
        modulo = published(decoder(heads), prompts, "l2", 0.4, "modulo")
        served = published(decoder(heads), prompts, "l2", 0.4, "served")
        assert (modulo != served) == differ
