"""Build bitsandbytes layers of several bit-widths in one model, and register them with transformers.

`BitsAndBytesConfig` does not allow 4 and 8 bits in one model, so this module registers a quantization method `qpruner`.
It builds each linear layer at its own bit-width; transformers and bitsandbytes read and write the packed tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
from bitsandbytes.functional import quantize_4bit as bnb_quantize_4bit
from transformers.core_model_loading import ConversionOps
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from qpruner.plans.plan import FULL_BITS, NF4_BLOCK_SIZE, LinearShape, check_cpu_widths

METHOD = "qpruner"

# bitsandbytes warns at every call that 8-bit layers cast their inputs to float16.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: not record.getMessage().startswith("MatMul8bitLt: inputs will be cast")
)


def pack(weight: torch.Tensor, bits: int, double_quant: bool) -> dict[str, torch.Tensor]:
    """Quantize a weight ``(rows, columns)`` into the tensors (name -> tensor) that bitsandbytes saves to disk.

    4 bits are NF4 with a scale per block of 64 weights; `double_quant` also quantizes these scales. 8 bits are LLM.int8
    with a scale per row.
    """
    if bits == 8:
        codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    codes, state = bnb_quantize_4bit(
        weight, blocksize=NF4_BLOCK_SIZE, compress_statistics=double_quant, quant_type="nf4"
    )
    tensors = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **tensors}


def unpack(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Dequantize the tensors that `pack` returned into a weight ``(rows, columns)`` of type `dtype`."""
    if "SCB" in tensors:
        weight: torch.Tensor = int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
        return weight.to(dtype)
    state = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
    device = tensors["weight"].device
    decoded: torch.Tensor = dequantize_4bit(tensors["weight"], QuantState.from_dict(state, device=device))
    return decoded.to(dtype)


def layer_tensors(tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Select the tensors named `<path>.<name>` of one layer, and return them by `<name>`."""
    return {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}


class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """An 8-bit layer that moves all its tensors when its parent module is moved to another device.

    With bitsandbytes 0.50 a parent's `.to` moves only the weight. The scales (`SCB`) and `CB`, a second reference to
    the weight's 8-bit numbers, stay on the old device.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for holder in (self.weight, self.state):
            if getattr(holder, "CB", None) is not None:
                holder.CB = self.weight.data
            if getattr(holder, "SCB", None) is not None and not holder.SCB.is_meta:
                holder.SCB = holder.SCB.to(self.weight.device)
        return self


def packed_layer(
    linear: torch.nn.Linear, bits: int, tensors: dict[str, torch.Tensor], dtype: torch.dtype, double_quant: bool
) -> torch.nn.Module:
    """Build a bitsandbytes layer from the tensors that `pack` returned, as `from_pretrained` would.

    The layer has the size, bias and device of `linear`, and computes in `dtype`.
    """
    device = linear.weight.device
    with torch.device("meta"):
        layer = _empty_layer(linear, bits, dtype, double_quant)
    stored = dict(tensors)
    codes = stored.pop("weight").to(device)
    if bits == 8:
        layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, SCB=stored["SCB"].to(device)).to(device)
    else:
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            data=codes, quantized_stats=stored, requires_grad=False, device=device, module=layer
        )
    layer.bias = linear.bias  # type: ignore[assignment]
    return layer.requires_grad_(False).train(linear.training)


def dense_layer(linear: torch.nn.Linear, weight: torch.Tensor) -> torch.nn.Module:
    """Build an `nn.Linear` with a weight ``(rows, columns)``, and with the bias and the device of `linear`."""
    with torch.device("meta"):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.to(linear.weight.device), requires_grad=False)
    layer.bias = linear.bias  # type: ignore[assignment]
    return layer.train(linear.training)


def _empty_layer(linear: torch.nn.Linear, bits: int, dtype: torch.dtype, double_quant: bool) -> torch.nn.Linear:
    has_bias = linear.bias is not None
    if bits == 8:
        layer: torch.nn.Linear = Int8Linear(
            linear.in_features, linear.out_features, has_bias, has_fp16_weights=False, threshold=6.0
        )
        layer.weight.data = layer.weight.data.to(torch.int8)
        return layer
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, dtype, compress_statistics=double_quant, quant_type="nf4"
    )
    layer.weight.data = layer.weight.data.to(torch.uint8)
    # On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks a layer at its first evaluation. That changes the model (it
    # rounds the scales to bf16), and fails for widths that are no multiple of 32, which pruned layers can have.
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return layer


@register_quantization_config(METHOD)
class MixedPrecisionConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a mixed-precision checkpoint: `bits` maps layer paths to 4 or 8."""

    def __init__(self, bits: dict[str, int], double_quant: bool = False, **_: Any) -> None:
        self.quant_method = METHOD
        self.bits = {path: width for path, width in bits.items() if width != FULL_BITS}
        self.double_quant = double_quant


class _Deserialize(ConversionOps):  # type: ignore[misc]
    """Pass the packed tensors of a layer to the 4-bit or 8-bit reader of transformers."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        # Without an attribute of this name transformers 5.24 casts packed tensors, even the 8-bit scales to int8.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Deserialize:
        """Return itself: transformers copies this object for each layer, and a copy would include the whole config."""
        return self

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Convert the stored tensors of one layer into its parameters."""
        reader = Bnb8bitDeserialize if "SCB" in input_dict else Bnb4bitDeserialize
        result: dict[str, Any] = reader(self.hf_quantizer).convert(input_dict, **kwargs)
        return result


@register_quantizer(METHOD)
class MixedPrecisionQuantizer(HfQuantizer):  # type: ignore[misc]
    """Build a mixed-precision model in `from_pretrained`, and allow `save_pretrained` to save it."""

    requires_calibration = True
    _parts = ("nested_absmax", "nested_quant_map", "quant_map", "absmax", "quant_state.bitsandbytes__nf4")
    serialized_names = {"weight": ["weight", *[f"weight.{part}" for part in _parts], "SCB", "weight_format"]}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return True if the parameter belongs to a packed layer and is no bias."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and name != "bias"

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # The model is on the meta device here: transformers loads the weights afterwards.
        for path, bits in self.quantization_config.bits.items():
            linear = model.get_submodule(path)
            if bits == 4 and not torch.cuda.is_available():
                check_cpu_widths([LinearShape(path, linear.out_features, linear.in_features)])
            with torch.device("meta"):
                layer = _empty_layer(linear, bits, model.dtype, self.quantization_config.double_quant)
            layer.source_cls = torch.nn.Linear  # type: ignore[assignment]
            model.set_submodule(path, layer.requires_grad_(False))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # peft uses its 4-bit and 8-bit LoRA layers only if the model has these flags.
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
        # Packed tensors are saved unchanged; transformers 5.24 would ask _Deserialize for an inverse and fail.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(operation, _Deserialize) for operation in getattr(conversion, "operations", ()))
        ]
        return model

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return the operation by which transformers turns the packed tensors of a layer into parameters."""
        return {"deserialize": _Deserialize}

    def is_serializable(self) -> bool:
        """Return True: transformers can save a mixed-precision model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True, because adapters on a mixed-precision model can be trained."""
        return True
