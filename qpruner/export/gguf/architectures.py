"""Choose llama.cpp's architecture for a model, or say why there is none.

Blocks of different widths take `deci`, or `openelm`, which has norms of queries and keys.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from qpruner.models.families import families, family_of
from qpruner.quantization.formats import nearest_format

RAGGED = ("deci", "openelm")  # architectures whose blocks have widths of their own
LLAMAS = ("llama", "deci")
"""Architectures that rotate neighbouring rows of a head as pairs, not rows half a head apart. Only
these have optional biases on every linear layer, and a factor for each frequency of RoPE."""
ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}
"""Activation that llama.cpp computes in the MLP; SiLU where it is not listed."""
# llama.cpp knows 27B models of Gemma by their number of blocks, and scales their attention by
# another rule.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
UNIFORM = "set `prune.uniform: true`, so that all blocks have the same widths"
ELSEWHERE = "use another form: `qpruner export RUN --to merged`"


class Widths(NamedTuple):
    """Numbers of heads and MLP channels of one block."""

    heads: int
    key_value_heads: int
    channels: int


def block_widths(config: Any) -> list[Widths]:
    """Return the numbers of heads and MLP channels of each block."""
    key = family_of(config).channels_key
    blocks = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    return [
        Widths(block.num_attention_heads, block.num_key_value_heads, getattr(block, key))
        for block in blocks
    ]


def head_size(config: Any, block: int = 0) -> int:
    """Return the size of a head."""
    return family_of(config).head_dim(config.per_layer_config[block])


def rope_parameters(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """Return the RoPE parameters of a config, of one type of layer if types differ."""
    parameters: dict[str, Any] = config.rope_parameters
    of_type: dict[str, Any] = parameters.get(layer_type, parameters)
    return of_type


def query_scale(config: Any, architecture: str) -> float:
    """Return the scale of a Gemma's attention logits in transformers, relative to llama.cpp's."""
    divisor = head_size(config)
    if config.num_hidden_layers == GEMMA_27B[architecture]:
        divisor = config.hidden_size // block_widths(config)[0].heads
    return float((divisor / config.query_pre_attn_scalar) ** 0.5)


def context_length(config: Any) -> int:
    """Return the longest context in tokens that llama.cpp computes as transformers does.

    llama.cpp has sliding windows for Gemma only.
    """
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if not window or config.model_type.startswith("gemma"):
        return longest
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None or "sliding_attention" in layer_types:
        return min(longest, int(window))
    return longest


def remark(config: Any) -> str | None:
    """Say what is lost in the file; return None if nothing is."""
    length = context_length(config)
    longest = config.max_position_embeddings
    if length >= longest:
        return None
    why = f"llama.cpp has no sliding window for `{config.model_type}`"
    return f"the file states a context of {length} tokens, not {longest}: {why}"


def architecture_of(config: Any, ragged: bool = False) -> str:
    """Return llama.cpp's architecture for a config that `refusal` does not refuse.

    `ragged`: blocks will have different widths.
    """
    family = family_of(config)
    widths = block_widths(config)
    if ragged or len(set(widths)) > 1:
        return family.gguf_ragged
    if family.gguf == "qwen2":
        # llama.cpp wants square q and o, and no biases but those of q, k and v.
        is_square = widths[0].heads * head_size(config) == config.hidden_size
        if not is_square or _has_output_biases(config):
            return family.gguf_ragged
    return family.gguf


def llama_cpp_format(name: str, columns: int) -> str:
    """Return the format itself if llama.cpp has it, else llama.cpp's format with the nearest bytes.

    Of two formats with the same bytes this is the k-quant, the last by name, whose error is
    smaller: on the pruned SmolLM2's down projections 0.061 for q4_k, 0.089 for q4_0, 0.094 for nf4
    (2026-11-29).
    """
    return nearest_format(name, columns, lambda candidate: bool(candidate.ggml_type))


def refusal(config: Any, ragged: bool = False, uniform: str = UNIFORM) -> str | None:
    """Say why a model cannot be written as a GGUF file, and what would work.

    Args:
        config: The config of the model.
        ragged: Blocks will have different widths (see `architecture_of`).
        uniform: Says how to prune the model so that all blocks have the same widths.

    Returns:
        The reason and the remedy, or None if the model can be written.
    """
    family = families().get(config.model_type)
    if family is None or not family.gguf:
        written = "Llama, Mistral, Qwen2, Qwen3 and Gemma"
        return (
            f"`{config.model_type}` models are not written as GGUF files, only {written} are; "
            f"{ELSEWHERE}"
        )
    architecture = architecture_of(config, ragged)
    if not architecture:
        return (
            f"llama.cpp loads no `{family.gguf}` model with blocks of different widths; {uniform}"
        )
    for reason in _width_reasons(config, architecture, uniform):
        return reason
    for reason in _reasons(config, architecture):
        return f"{reason}; {ELSEWHERE}"
    return None


def _has_output_biases(config: Any) -> bool:
    return any(getattr(config, key, None) for key in ("attention_bias", "mlp_bias"))


def _width_reasons(config: Any, architecture: str, uniform: str) -> Iterator[str]:
    """Yield what an architecture cannot have, with a remedy.

    These are biases of outputs, a head that is not tied to the embeddings, and heads of several
    sizes.
    """
    if _has_output_biases(config) and architecture not in LLAMAS:
        yield (
            f"llama.cpp's architecture `{architecture}` has no biases on attention and MLP "
            f"outputs; {ELSEWHERE}"
        )
    if architecture in ("openelm", "gemma2") and not config.tie_word_embeddings:
        remedy = uniform if architecture == "openelm" else ELSEWHERE
        yield (
            f"llama.cpp's architecture `{architecture}` has no head of its own beside the "
            f"embeddings; {remedy}"
        )
    sizes = {head_size(config, block) for block in range(config.num_hidden_layers)}
    if len(sizes) > 1:
        yield (
            f"its blocks have heads of several sizes ({sorted(sizes)}), llama.cpp loads one; "
            f"{uniform}"
        )


def _reasons(config: Any, architecture: str) -> Iterator[str]:
    """Yield what llama.cpp would compute differently, whatever the widths."""
    expected = ACTIVATIONS.get(architecture, "silu")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != expected:
        yield f"llama.cpp computes `{expected}` in its MLP, the model `{activation}`"
    local = rope_parameters(config, "sliding_attention")
    yield from _rope_reasons(architecture, rope_parameters(config), local)
    if getattr(config, "use_bidirectional_attention", None):
        yield "its attention looks ahead"
    if architecture == "gemma2":
        yield from _gemma2_reasons(config)


def _gemma2_reasons(config: Any) -> Iterator[str]:
    if "sliding_attention" not in config.layer_types:  # llama.cpp aborts (2026-11-29)
        yield "llama.cpp loads no Gemma 2 in which no block has a sliding window"
    if None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        yield "llama.cpp caps the logits of every Gemma 2, this model does not"
    if abs(query_scale(config, "gemma2") - 1) > 1e-6:
        scalar = config.query_pre_attn_scalar
        yield f"llama.cpp scales attention otherwise than `query_pre_attn_scalar: {scalar}`"


def _rope_reasons(architecture: str, rope: dict[str, Any], local: dict[str, Any]) -> Iterator[str]:
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "only a part of each head is rotated by position"
    if local is not rope and local["rope_type"] != "default":
        yield f"layers with a sliding window have RoPE scaling `{local['rope_type']}`"
    if kind == "llama3" and architecture not in LLAMAS:
        yield f"llama.cpp's architecture `{architecture}` has no RoPE scaling `llama3`"
    if kind not in ("default", "linear", "llama3"):
        yield f"RoPE scaling `{kind}` is not written (default, linear and llama3 are)"
