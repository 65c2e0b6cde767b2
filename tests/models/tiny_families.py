"""Tiny random models of all supported families, cuts to try on them, and references for the cut
models.

The reference `silenced` switches off the removed parts of an uncut model without code of the
package. With these widths every layer can have 4 bits on a CPU (`plan.check_cpu_widths`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from made_tensors import token_rows
from transformers import PreTrainedModel

from qpruner.models import ragged
from qpruner.pruning.units import Kept

HIDDEN = 60
HEAD_DIM = 14
CHANNELS = 40
LAYERS = 3
QUERY_HEADS = 6
KEY_VALUE_HEADS = 3
WINDOW = 6
"""Shorter than the prompt."""

_NAMES = "gemma2 gemma3_text gpt_neox granite llama mistral olmo2 opt phi3 qwen2 qwen3"
FAMILY_NAMES = tuple(_NAMES.split())
HEADWISE = ("gpt_neox", "opt")
"""Families without grouped heads, where an attention unit is one head."""

BLOCKS = {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
LLAMA_OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
OUTPUTS = {
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
}
"""Paths of the blocks in a model and of the output projections in a block, where they differ from
Llama."""

LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "layer_types": LAYER_TYPES,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_neox": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
        "tie_word_embeddings": True,
    },
    "llama": {"head_dim": HEAD_DIM, "tie_word_embeddings": True},
    "mistral": {"head_dim": HEAD_DIM, "sliding_window": WINDOW},
    "olmo2": {},
    "opt": {"ffn_dim": CHANNELS, "word_embed_proj_dim": HIDDEN},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": HEAD_DIM, "tie_word_embeddings": True},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt, no biases": ("opt", {"enable_bias": False}),
    "phi-4-mini": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.8}}),
    "phi-3, 128k": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0],
            },
        },
    ),
}
"""Variants of families in which a unit owns other weights or is used in another way: name ->
family, config keys."""
MODEL_NAMES = (*FAMILY_NAMES, *VARIANTS)


def family_name(name: str) -> str:
    return VARIANTS[name][0] if name in VARIANTS else name


def family_model(name: str, seed: int | None = None, **others: Any) -> PreTrainedModel:
    """Build three float32 blocks with random norms and biases; `others` are config keys."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ragged.install()  # as loading does
    family, changes = VARIANTS.get(name, (name, {}))
    options: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 128,
        "num_attention_heads": QUERY_HEADS,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family != "opt":
        options["intermediate_size"] = CHANNELS
    if family not in HEADWISE:
        options["num_key_value_heads"] = KEY_VALUE_HEADS
    config = AutoConfig.for_model(family, **options | OPTIONS[family] | changes | others)
    torch.manual_seed(MODEL_NAMES.index(name) if seed is None else seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(not key.endswith("bias")), std=0.3)
        else:
            # Larger than transformers' 0.02, so that every part of a block shows in the logits.
            parameter.data.mul_(6.0)
    return model.eval()


# ---- cuts


def kept_of(name: str) -> Kept:
    """Return a cut of attention units and channels: blocks 0 and 2 get different widths, block 1 is
    uncut."""
    first, last = ((0, 2), (1,))
    if family_name(name) in HEADWISE:
        first, last = ((0, 2, 3, 5), (1, 4))
    return {
        0: {"attention": first, "mlp": (*range(3, 20), 38)},
        2: {"attention": last, "mlp": tuple(range(0, CHANNELS, 3))},
    }


# ---- what a cut must do


def blocks_of(model: PreTrainedModel) -> Any:
    return model.get_submodule(BLOCKS.get(model.config.model_type, "model.layers"))


def output_projections(block: torch.nn.Module, family: str) -> tuple[Any, Any]:
    """Return the output projections of attention and MLP."""
    attention, mlp = OUTPUTS.get(family, LLAMA_OUTPUTS)
    return block.get_submodule(attention), block.get_submodule(mlp)


@torch.no_grad()
def silenced(model: PreTrainedModel, name: str, kept: Kept) -> PreTrainedModel:
    """Switch off all units of an uncut model that are not kept, in place.

    The columns of removed heads and channels in the output projection become zero. In OLMo 2 the
    query and key norms leave removed heads out of their mean.
    """
    family = family_name(name)
    num_units = QUERY_HEADS if family in HEADWISE else KEY_VALUE_HEADS
    for index, units in kept.items():
        block = blocks_of(model)[index]
        attention_out, mlp_out = output_projections(block, family)
        gone = sorted(set(range(num_units)) - set(units["attention"]))
        attention_out.weight.view(HIDDEN, num_units, -1)[:, gone] = 0
        if family == "olmo2":
            leave_out_of_mean(block.self_attn.q_norm, gone, num_units)
            leave_out_of_mean(block.self_attn.k_norm, gone, num_units)
        mlp_out.weight[:, sorted(set(range(CHANNELS)) - set(units["mlp"]))] = 0
    return model


def skip_blocks(model: PreTrainedModel, gone: Sequence[int]) -> PreTrainedModel:
    for index in gone:
        blocks_of(model)[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


def leave_out_of_mean(norm: Any, gone: Sequence[int], units: int) -> None:
    stays = torch.ones(units, norm.weight.numel() // units)
    stays[list(gone)] = 0
    mask = stays.flatten()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        mean_square = (hidden.square() * mask).sum(dim=-1, keepdim=True) / mask.sum()
        return norm.weight * hidden * torch.rsqrt(mean_square + norm.variance_epsilon)

    norm.forward = forward


# ---- looking at models


def prompt() -> torch.Tensor:
    return torch.tensor(token_rows(2, 9, 5, 97))


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=prompt(), use_cache=False).logits
    return logits


def generated_scores(model: PreTrainedModel, use_cache: bool) -> torch.Tensor:
    """Generate four tokens greedily after the prompt and return their logits ``(tokens, 2,
    vocabulary)``."""
    generated = model.generate(
        prompt(),
        use_cache=use_cache,
        return_dict_in_generate=True,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
    )
    return torch.stack(generated.logits)
