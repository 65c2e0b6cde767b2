"""Choose llama.cpp's architecture for a model, or say why there is none.

Blocks alike take the architecture of their family. Blocks of different widths take `deci`, whose blocks each have
their own numbers of heads and channels, or `openelm`, which has norms of queries and keys too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from qpruner.export.gguf import rope
from qpruner.models.families import families
from qpruner.models.ragged import OUTPUT_BIASES

WRITTEN = "Llama, Mistral, Qwen2, Qwen3 and Gemma"
ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}
"""Activation that llama.cpp computes in the MLP; SiLU where it is not listed."""
ALL_BIASES = ("llama", "deci")
"""Architectures with optional biases on every linear layer."""
UNIFORM = "set `prune.uniform: true`, so that all blocks have the same widths"
NO_BIASES = "set `prune.compensation: least_squares`"
ELSEWHERE = "use another form: `qpruner export RUN --to merged`"
# llama.cpp knows 27B models of Gemma by their number of blocks, and scales their attention by another rule.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


class Widths(NamedTuple):
    """Numbers of heads and MLP channels of one block."""

    heads: int
    key_value_heads: int
    channels: int


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, and what its files have that differs from our checkpoints."""

    name: str

    @property
    def is_ragged(self) -> bool:
        """Whether every block has its own widths."""
        return self.name in ("deci", "openelm")

    @property
    def is_gemma(self) -> bool:
        """Whether norms, windows and caps are Gemma's."""
        return self.name.startswith("gemma")

    @property
    def interleaves(self) -> bool:
        """Whether RoPE turns neighbouring rows of a head as pairs, and not rows half a head apart."""
        return self.name in ("llama", "deci")

    @property
    def fuses_qkv(self) -> bool:
        """Whether q, k and v are one weight."""
        return self.name == "openelm"

    @property
    def adds_to_norms(self) -> float:
        """What is added to the weights of norms: Gemma computes ``1 + weight``, llama.cpp ``weight``."""
        return 1.0 if self.is_gemma else 0.0


def block_widths(config: Any) -> list[Widths]:
    """List the widths of all blocks."""
    key = families()[config.model_type].channels_key
    each = (config.per_layer_config[index] for index in range(config.num_hidden_layers))
    return [Widths(one.num_attention_heads, one.num_key_value_heads, getattr(one, key)) for one in each]


def head_size(config: Any) -> int:
    """Return the size of a head."""
    return families()[config.model_type].head_dim(config.per_layer_config[0])


def architecture_of(config: Any, ragged: bool = False, biases: bool = False) -> Architecture:
    """Return llama.cpp's architecture for a config that `refusal` does not refuse.

    `ragged`: blocks will have different widths; `biases`: output projections will have biases.
    """
    family, widths = families()[config.model_type], block_widths(config)
    alike = not ragged and len(set(widths)) == 1
    if alike and family.gguf == "qwen2":  # llama.cpp wants square q and o, and no biases but those of q, k and v
        alike = widths[0].heads * head_size(config) == config.hidden_size and not (biases or _has_output_biases(config))
    return Architecture(family.gguf if alike else family.gguf_ragged)


def refusal(config: Any, ragged: bool = False, biases: bool = False) -> str | None:
    """Say why a model cannot be written as a GGUF file, and what would work; None if it can.

    `ragged` and `biases` are as in `architecture_of`, for a model that is not cut yet.
    """
    family = families().get(config.model_type)
    if family is None or not family.gguf:
        kind = "models with experts" if family and family.unquantizable else f"`{config.model_type}` models"
        return f"{kind} are not written as GGUF files, only {WRITTEN} are; {ELSEWHERE}"
    architecture = architecture_of(config, ragged, biases).name
    if not architecture:
        return f"llama.cpp loads no `{family.gguf}` model with blocks of different widths; {UNIFORM}"
    return _width_refusal(config, architecture, biases) or _refusal(config, architecture)


def context_length(config: Any) -> int:
    """Return the longest context in which llama.cpp computes what transformers does.

    llama.cpp has sliding windows for Gemma only; up to the window's length all attend to the same tokens without it.
    """
    length = int(config.max_position_embeddings)
    return length if _has_windows_in_llama_cpp(config) else min(length, _window(config) or length)


def remark(config: Any) -> str | None:
    """Say what is lost in the file; None if nothing is."""
    if (length := context_length(config)) < config.max_position_embeddings:
        return (
            f"the file states a context of {length} tokens, not {config.max_position_embeddings}: llama.cpp has no "
            f"sliding window for `{config.model_type}`"
        )
    return None


def _has_windows_in_llama_cpp(config: Any) -> bool:
    return families()[config.model_type].gguf.startswith("gemma")


def _window(config: Any) -> int | None:
    """Return the length of the sliding window; None if no block has one."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return window if types is None or "sliding_attention" in types else None


def _has_output_biases(config: Any) -> bool:
    keys = (OUTPUT_BIASES, "attention_bias", "mlp_bias")
    return any(bool(getattr(config, key, None)) for key in keys)


def _width_refusal(config: Any, architecture: str, biases: bool) -> str | None:
    """Refuse what an architecture cannot have: biases of outputs, an untied head, heads of several sizes."""
    if (biases or _has_output_biases(config)) and architecture not in ALL_BIASES:
        remedy = NO_BIASES if biases or getattr(config, OUTPUT_BIASES, None) else ELSEWHERE
        return f"llama.cpp's architecture `{architecture}` has no biases on attention and MLP outputs; {remedy}"
    if architecture in ("openelm", "gemma2") and not config.tie_word_embeddings:
        remedy = UNIFORM if architecture == "openelm" else ELSEWHERE
        return f"llama.cpp's architecture `{architecture}` has no head of its own beside the embeddings; {remedy}"
    family = families()[config.model_type]
    sizes = {family.head_dim(config.per_layer_config[index]) for index in range(config.num_hidden_layers)}
    if len(sizes) > 1:
        return f"its blocks have heads of several sizes ({sorted(sizes)}), llama.cpp loads one; {UNIFORM}"
    return None


def _refusal(config: Any, architecture: str) -> str | None:
    """Refuse what llama.cpp would compute differently, whatever the widths."""
    wanted = ACTIVATIONS.get(architecture, "silu")
    found = getattr(config, "hidden_activation", None) or config.hidden_act
    if found != wanted:
        return f"llama.cpp computes `{wanted}` in its MLP, the model `{found}`; {ELSEWHERE}"
    reason = rope.refusal(config, architecture) or _gemma_refusal(config, architecture)
    return f"{reason}; {ELSEWHERE}" if reason else None


def _gemma_refusal(config: Any, architecture: str) -> str | None:
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention looks ahead"
    if architecture == "gemma2":
        if None in (config.attn_logit_softcapping, config.final_logit_softcapping):
            return "llama.cpp caps the logits of every Gemma 2, this model does not"
        if abs(query_scale(config, architecture) - 1) > 1e-6:
            return f"llama.cpp scales attention otherwise than `query_pre_attn_scalar: {config.query_pre_attn_scalar}`"
    return None


def query_scale(config: Any, architecture: str) -> float:
    """Return by how much the attention logits of a Gemma are larger in transformers than in llama.cpp."""
    if config.num_hidden_layers == GEMMA_27B[architecture]:
        divisor = config.hidden_size // block_widths(config)[0].heads
    else:
        divisor = head_size(config)
    return float((divisor / config.query_pre_attn_scalar) ** 0.5)
