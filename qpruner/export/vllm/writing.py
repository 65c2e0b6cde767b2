"""Write a checkpoint in the layout of compressed-tensors, which vLLM and transformers read.

Formats of `quantization/formats/compressed_tensors.py` are sliced into its tensors; each is one of
its config groups. Embeddings and head are unpacked, which changes no weight: vLLM before 0.32 reads
no packed embeddings.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from qpruner.export.compare import PEFT_PREFIX
from qpruner.export.recode import (
    ADAPTER_FILES,
    columns_of,
    copy_adapter,
    copy_other_files,
    formats_of,
    plain_description,
    take_weight,
    write_tensors,
)
from qpruner.models.checkpoint import read_tensors
from qpruner.models.families import family_of
from qpruner.models.layout import skeleton, table_paths
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress
from qpruner.quantization.formats import DENSE, format_of, nearest_format
from qpruner.quantization.formats.compressed_tensors import Packed

MODELING = "modeling_ragged.py"
ADAPTER_FOLDER = "adapter"
SERVED: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite")
"""Families whose packed layers vLLM loads one by one, and whose blocks `modeling_ragged.py` can
build."""
WORD_BITS = 32  # zeros of so many bits are packed along the rows


def refusal(config: Any) -> str | None:
    """Say why a model cannot be written for vLLM, and what would work; None if it can."""
    if config.model_type in SERVED:
        return None
    return (
        f"vLLM: packed layers of the family {config.model_type} are not written yet, those of "
        f"{', '.join(SERVED)} are; "
        "use `--to merged`"
    )


def vllm_format(name: str, columns: int) -> str:
    """Return a format that vLLM reads: the same, or the nearest in bytes, or dense.

    The nearest is taken among those that can have these columns.
    """
    old = format_of(name)
    if isinstance(old, Packed) and not old.refusal(columns, None):
        return name
    # HQQ has the smaller error where codes are few.
    return nearest_format(
        name,
        columns,
        lambda each: isinstance(each, Packed) and each.half_quadratic == (each.bits <= 4),
    )


def dense_paths(config: Any) -> dict[str, str]:
    """List the packed layers that must be dense in vLLM.

    These are embeddings, head, and fused layers whose zeros fill no word.
    """
    old, found = formats_of(config), dict.fromkeys(table_paths(config).values(), DENSE)
    shapes = {name: parameter.shape for name, parameter in skeleton(config).named_parameters()}
    for paths in _fused(config):
        sizes = {path: shapes[f"{path}.weight"] for path in paths if path in old}
        widths = {
            path: int(format_of(vllm_format(old[path], size[1])).bits)
            for path, size in sizes.items()
        }
        if len(widths) > 1 and any(
            sizes[path][0] * width % WORD_BITS for path, width in widths.items()
        ):
            found |= dict.fromkeys(widths, DENSE)
    return {path: name for path, name in found.items() if path in old}


def _fused(config: Any) -> Iterator[tuple[str, ...]]:
    """Yield the paths of layers that vLLM loads into one."""
    family = family_of(config)
    for index in range(config.num_hidden_layers):
        for paths in family.projections().values():
            yield tuple(f"{family.block_path(index)}.{path}" for path in paths)


def write_vllm(
    checkpoint: Path, folder: Path, target: Path, on_progress: OnWork = ignore_progress
) -> None:
    """Write a checkpoint whose packed layers have formats of vLLM, and its adapter.

    The adapter names `target` as the folder of its base.
    """
    config = checkpoint_config(checkpoint)
    named = formats_of(config)
    for paths in _fused(config):
        assert len({named.get(path) for path in paths}) == 1, (
            f"vLLM loads {', '.join(paths)} into one layer"
        )
    copy_other_files(checkpoint, folder)
    if (checkpoint / ADAPTER_FILES[0]).is_file():
        copy_adapter(checkpoint, folder / ADAPTER_FOLDER, target)
    state, widths = (
        read_tensors(checkpoint, lambda name: not name.startswith(PEFT_PREFIX)),
        columns_of(config),
    )
    for done, (path, name) in enumerate(named.items(), 1):
        found = format_of(name)
        assert isinstance(found, Packed), f"{path} has the format {name}"
        parts = found.parts(take_weight(state, path), widths[path])
        state |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
        on_progress("writing for vLLM", done, len(named))
    write_tensors(state, folder)
    # vLLM and transformers leave out the layers that no group names.
    linears = [path for paths in _fused(config) for path in paths]
    dense = [
        path
        for path in (*linears, family_of(config).head, family_of(config).embeddings)
        if path not in named
    ]
    described = plain_description(checkpoint)
    if named:
        described["quantization_config"] = _quantization_config(named, dense)
    write_config(described, config, folder)


def _quantization_config(named: Mapping[str, str], dense: list[str]) -> dict[str, Any]:
    """Describe the layers of each format as a group of compressed-tensors."""
    groups = {}
    for name in dict.fromkeys(named.values()):
        found = format_of(name)
        assert isinstance(found, Packed)
        weights = {
            "num_bits": found.bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "dynamic": False,
        }
        targets = [path for path, each in named.items() if each == name]
        weights |= {"group_size": found.group_size}
        groups[name] = {"targets": targets, "weights": weights, "format": "pack-quantized"}
    about = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
    }
    return about | {"config_groups": groups, "ignore": dense}


def write_config(described: dict[str, Any], config: Any, folder: Path) -> None:
    """Write config.json, and `modeling_ragged.py` with its entry there if blocks differ."""
    if needs_modeling(config):
        names = {
            auto: f"Ragged{mapping[type(config)].__name__}"
            for auto, mapping in (
                ("AutoModel", MODEL_MAPPING),
                ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING),
            )
        }
        module = MODELING.removesuffix(".py")
        described["auto_map"] = {auto: f"{module}.{name}" for auto, name in names.items()}
        # vLLM takes its own class by this name, which would build blocks alike.
        described["architectures"] = [names["AutoModelForCausalLM"]]
        if scaling := getattr(
            config, "logits_scaling", None
        ):  # of Granite, which vLLM's class for all models reads so
            described["logit_scale"] = 1 / scaling
        shutil.copyfile(Path(__file__).with_name(MODELING), folder / MODELING)
    elif (
        config.model_type == "qwen2"
        and config.num_attention_heads * family_of(config).head_dim(config) != config.hidden_size
    ):
        # vLLM 0.32's own class for Qwen2 reads no `head_dim`; this one builds transformers'
        # classes.
        described["architectures"] = ["TransformersForCausalLM"]
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def needs_modeling(config: Any) -> bool:
    """Return True if transformers needs `modeling_ragged.py`, because blocks differ."""
    return bool(config.is_heterogeneous) and config.model_type in SERVED
