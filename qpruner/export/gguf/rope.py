"""Say how llama.cpp turns queries and keys: rotation by position (RoPE), and how it is stretched to longer contexts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf
    import torch

BETAS = {"beta_fast": 32, "beta_slow": 1}
"""Bounds of YaRN's ramp. llama.cpp reads other values for few architectures, none of them ours."""
SCALED_BY_TENSOR = ("llama", "deci")
"""Architectures that read a factor for each frequency, `rope_freqs.weight`."""


def parameters(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """Return the RoPE parameters of a config, of one type of layer if types differ."""
    found: dict[str, Any] = config.rope_parameters.get(layer_type, config.rope_parameters)
    return found


def refusal(config: Any, architecture: str) -> str | None:
    """Say why llama.cpp cannot turn queries and keys as this model does; None if it can."""
    found, local = parameters(config), parameters(config, "sliding_attention")
    kind = found["rope_type"]
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated by position"
    if local is not found and local["rope_type"] != "default":
        return f"layers with a sliding window have RoPE scaling `{local['rope_type']}`"
    if kind == "llama3" and architecture not in SCALED_BY_TENSOR:
        return f"llama.cpp's architecture `{architecture}` has no RoPE scaling `llama3`"
    if kind == "yarn":
        others = {key: value for key, value in BETAS.items() if (found.get(key) or value) != value}
        if others or found.get("truncate") is False or found["factor"] is None:
            return "its YaRN has other parameters than llama.cpp's (beta_fast 32, beta_slow 1, truncated)"
    if kind not in ("default", "linear", "llama3", "yarn"):
        return f"RoPE scaling `{kind}` is not written (default, linear, llama3 and yarn are)"
    return None


def add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the metadata of RoPE for a config that `refusal` does not refuse."""
    import gguf

    found, local = parameters(config), parameters(config, "sliding_attention")
    writer.add_rope_freq_base(found["rope_theta"])
    if local is not found:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if found["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(found["factor"])
    elif found["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(found["factor"])
        writer.add_rope_scaling_orig_ctx_len(found["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(_attention_factor(config) / _magnitude(found["factor"]))


def frequency_factors(config: Any) -> torch.Tensor | None:
    """Compute by how much Llama 3 lowers each frequency, float32 ``(head size / 2,)``; None for other scalings."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = parameters(config)
    if found["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    factors: torch.Tensor = 1.0 / (found["rope_theta"] ** exponents) / scaled
    return factors


def _attention_factor(config: Any) -> float:
    """Return by how much YaRN scales queries and keys in transformers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return float(ROPE_INIT_FUNCTIONS["yarn"](config)[1])


def _magnitude(factor: float) -> float:
    """Return by how much llama.cpp scales them for a stretch by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
