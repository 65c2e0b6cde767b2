"""NF4 of bitsandbytes (QLoRA, arXiv 2305.14314, section 3): a scale for every 64 weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qpruner.quantization.formats.format import Capability, Format, Tensors

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 64  # weights that share one scale
NESTED_BLOCK_SIZE = 256  # scales that share one nested scale under double quantization
NEEDED_CAPABILITY = (6, 0)  # of bitsandbytes' kernels
STATE = "weight.quant_state.bitsandbytes__nf4"  # JSON as bytes: block sizes, shape and type


@dataclass(frozen=True, kw_only=True)
class Nf4(Format):
    """4-bit codes of a table of normal quantiles, in the tensors and the layer of bitsandbytes."""

    bits: float = 4
    package: str = "bitsandbytes"
    holds_embeddings: bool = False
    more_tensors: tuple[str, ...] = (
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_map",
        "weight.absmax",
        STATE,
    )
    uncounted: tuple[str, ...] = (STATE,)
    peft_flag: str = "is_loaded_in_4bit"
    double_quant: bool  # whether the scales are quantized too, to 8 bits

    def packed_bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        num_scales = math.ceil(rows * columns / BLOCK_SIZE)
        codes_and_table = math.ceil(rows * columns / 2) + 16 * 4
        if not self.double_quant:
            return codes_and_table + 4 * num_scales
        num_nested = math.ceil(num_scales / NESTED_BLOCK_SIZE)
        return codes_and_table + num_scales + 4 * num_nested + 256 * 4

    def refusal(self, columns: int, capability: Capability | None) -> str | None:
        """Refuse old GPUs, and widths that the CPU kernel decodes wrongly.

        The kernel of bitsandbytes 0.50.2 decodes them to noise, with an error of 0.25.
        """
        if capability is None and columns % 16 == 0 and columns % BLOCK_SIZE != 0:
            return (
                f"on a CPU bitsandbytes decodes {columns} columns wrongly, "
                f"a multiple of 16 but not of {BLOCK_SIZE}"
            )
        if capability is not None and capability < NEEDED_CAPABILITY:
            return "it needs a GPU of compute capability {}.{}".format(*NEEDED_CAPABILITY)
        return None

    def pack(self, weight: torch.Tensor) -> Tensors:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(
            weight,
            blocksize=BLOCK_SIZE,
            compress_statistics=self.double_quant,
            quant_type="nf4",
        )
        tensors = {"weight": codes}
        for name, tensor in state.as_dict(packed=True).items():
            tensors[f"weight.{name}"] = tensor
        return tensors

    def unpack(self, tensors: Tensors, columns: int, dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
        codes = state.pop("weight")
        quant_state = QuantState.from_dict(state, device=codes.device)
        weight: torch.Tensor = dequantize_4bit(codes, quant_state)
        return weight.to(dtype)

    def empty_layer(self, linear: Any, dtype: torch.dtype) -> torch.nn.Module:
        import bitsandbytes as bnb
        import torch

        layer: torch.nn.Linear = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            dtype,
            compress_statistics=self.double_quant,
            quant_type="nf4",
        )
        layer.weight.data = layer.weight.data.to(torch.uint8)
        # On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks a layer at its first evaluation. That
        # changes the model (it rounds the scales to bf16), and fails for widths that are no
        # multiple of 32, which pruned layers can have.
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return layer.requires_grad_(False)

    def fill(self, layer: Any, tensors: Tensors) -> None:
        import bitsandbytes as bnb

        codes = tensors["weight"]
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            data=codes,
            quantized_stats={name: tensor for name, tensor in tensors.items() if name != "weight"},
            requires_grad=False,
            device=codes.device,
            module=layer,
        )


NF4_DOUBLE = Nf4(name="nf4_double", letter="d", colour="#e6eff8", double_quant=True)
NF4 = Nf4(name="nf4", letter="4", colour="#d3e5f5", double_quant=False, doubled=NF4_DOUBLE.name)
