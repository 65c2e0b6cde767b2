"""Build layers of several formats in one model, and register them with transformers.

This module registers a quantization method `qpruner`. It builds each layer in its own format;
transformers reads and writes the packed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from qpruner.errors import UserError
from qpruner.quantization.formats import Format, format_of, formats
from qpruner.quantization.formats.layers import PackedEmbedding, PackedLinear

METHOD = "qpruner"


def layer_tensors(tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Select the tensors `<path>.<name>` of one layer, and return them by `<name>`."""
    return {
        name.removeprefix(f"{path}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{path}.")
    }


def packed_layer(
    module: torch.nn.Module,
    layer_format: Format,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> torch.nn.Module:
    """Build a layer from the tensors that `Format.pack` returned, as `from_pretrained` would.

    The layer has the size, bias and device of `module`, a linear layer or an embedding, in a model
    of type `dtype`.
    """
    device = module.get_parameter("weight").device
    with torch.device("meta"):
        layer = layer_format.empty_layer(module, dtype)
    layer_format.fill(layer, {name: tensor.to(device) for name, tensor in tensors.items()})
    if isinstance(module, torch.nn.Linear):
        layer.bias = module.bias
    return layer.requires_grad_(False).train(module.training)


def flag_for_peft(model: Any) -> None:
    """Let peft recognize the layers of every format.

    All formats are flagged, because the model of the next plan may have some that this model lacks.
    """
    for layer_format in formats().values():
        if layer_format.peft_flag:
            setattr(model, layer_format.peft_flag, True)


@register_quantization_config(METHOD)
class MixedPrecisionConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint.

    `formats` maps the paths of packed layers to the names of their formats. A head that is tied to
    a packed embedding is not listed.
    """

    def __init__(self, formats: Mapping[str, str], quant_method: str = METHOD, **_: Any) -> None:
        self.quant_method = quant_method
        self.formats = {
            path: name for path, name in formats.items() if _known(name, path).is_packed
        }


def _known(name: str, path: str) -> Format:
    if name not in formats():
        raise UserError(
            f"{path} has the format {name}, which this version of qpruner does not know (it has "
            f"{', '.join(formats())}); install the version that wrote the model"
        )
    return format_of(name)


def _usable(name: str, path: str, module: Any) -> Format:
    """Return the format of a layer.

    Raises:
        UserError: Its package is missing, or it cannot hold this layer on this device.
    """
    layer_format = _known(name, path)
    is_table = isinstance(module, torch.nn.Embedding)
    columns = module.embedding_dim if is_table else module.in_features
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    reason = layer_format.missing() or layer_format.refusal(columns, capability)
    if is_table and not layer_format.holds_embeddings:
        reason = "single rows of an embedding cannot be unpacked from it"
    if reason:
        raise UserError(f"{path} has the format {name}, but {reason}")
    return layer_format


class _Deserialize(ConversionOps):  # type: ignore[misc]
    """Fills a layer whose format stores more than one tensor, and passes other tensors through."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self._formats: dict[str, str] = hf_quantizer.quantization_config.formats

    def __deepcopy__(self, memo: dict[int, Any]) -> _Deserialize:
        """Return itself: transformers copies this object for each layer, and the config with it."""
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Convert the stored tensors of one layer into its parameters."""
        if len(input_dict) == 1:
            return input_dict
        tensors = {
            name: read[0] if isinstance(read, list) else read for name, read in input_dict.items()
        }
        layer, _ = get_module_from_name(model, full_layer_name)
        layer_format = format_of(self._formats[full_layer_name.removesuffix(".weight")])
        layer_format.fill(layer, tensors)
        layer._is_hf_initialized = True
        return {"weight": layer.weight}


def _tensor_names() -> list[str]:
    """List the names of all tensors that a packed layer of any format may have, without repeats."""
    names = dict.fromkeys(["weight"])
    for layer_format in formats().values():
        names |= dict.fromkeys(layer_format.more_tensors)
    return list(names)


@register_quantizer(METHOD)
class MixedPrecisionQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds a mixed-precision model in `from_pretrained`, and lets `save_pretrained` save it."""

    requires_calibration = True
    serialized_names = {"weight": _tensor_names()}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return True for packed weights, whose shape may differ from that of the empty layer."""
        module, name = get_module_from_name(model, param_name)
        if name != "weight" or isinstance(module, PackedLinear | PackedEmbedding):
            return False
        return not module.weight.is_floating_point()

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Cast unpacked weights only, because packed layers hold whole numbers.

        `dtype` is that of the parameter in the empty layer.
        """
        return dtype if dtype is not None and dtype.is_floating_point else None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # The model is on the meta device here: transformers loads the weights, and ties the head,
        # afterwards.
        dtype = model.dtype
        names = dict(self.quantization_config.formats)
        for head, source in model.all_tied_weights_keys.items():
            embeddings = source.removesuffix(".weight")
            if embeddings in names:
                names[head.removesuffix(".weight")] = names[embeddings]
        for path, name in names.items():
            module = model.get_submodule(path)
            with torch.device("meta"):
                layer = _usable(name, path, module).empty_layer(module, dtype)
            model.set_submodule(path, layer.requires_grad_(False))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        flag_for_peft(model)
        # Packed tensors are saved unchanged; transformers 5.24 would ask _Deserialize for an
        # inverse and fail.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if _Deserialize not in map(type, getattr(conversion, "operations", ()))
        ]
        return model

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return the operation by which transformers makes parameters of packed tensors."""
        return {"deserialize": _Deserialize}

    def is_serializable(self) -> bool:
        """Return True: transformers can save a mixed-precision model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell transformers that adapters on a mixed-precision model can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Tell transformers that scales of a mixed-precision model can be trained."""
        return True
