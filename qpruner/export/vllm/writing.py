"""Write a checkpoint in the layout of compressed-tensors, which vLLM and transformers read.

Formats of `quantization/formats/compressed_tensors.py` are sliced into its tensors; each is one of
its config groups.

Embeddings and head are unpacked, which changes no weight. vLLM 0.34 (its file
`compressed_tensors_embedding.py`) reads packed embeddings on GPUs only. Their codes must have 2, 4
or 8 bits and no zeros, but our formats have zeros. A head cannot be tied to them: it takes their
attribute `weight`, which they lack.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from qpruner.export.recode import (
    columns_of,
    copy_adapter,
    copy_other_files,
    formats_of,
    has_adapter,
    read_settings,
    take_weight,
    weights_of,
    write_settings,
    write_tensors,
)
from qpruner.models.families import family_of
from qpruner.models.layout import skeleton, table_paths
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress
from qpruner.quantization.formats import DENSE, Format, format_of, nearest_format
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
        f"vLLM: packed layers of the family {config.model_type} are not written yet, "
        f"those of {', '.join(SERVED)} are; use `--to merged`"
    )


def vllm_format(name: str, columns: int) -> str:
    """Return a format that vLLM reads: the same, or the nearest in bytes, or dense.

    The nearest is taken among those that can have these columns.
    """
    old = format_of(name)
    if isinstance(old, Packed) and not old.refusal(columns, None):
        return name

    def is_offered(candidate: Format) -> bool:
        # HQQ has the smaller error where codes are few.
        return isinstance(candidate, Packed) and candidate.half_quadratic == (candidate.bits <= 4)

    return nearest_format(name, columns, is_offered)


def dense_paths(config: Any) -> dict[str, str]:
    """List the packed layers that must be dense in vLLM.

    These are embeddings, head, and fused layers whose zeros fill no word.
    """
    old = formats_of(config)
    shapes = {name: parameter.shape for name, parameter in skeleton(config).named_parameters()}
    paths = list(table_paths(config).values())
    for fused in _fused(config):
        packed = [path for path in fused if path in old]
        if len(packed) < 2:
            continue
        for path in packed:
            rows, columns = shapes[f"{path}.weight"]
            bits = int(format_of(vllm_format(old[path], columns)).bits)
            if rows * bits % WORD_BITS:
                paths += packed
                break
    return {path: DENSE for path in paths if path in old}


def _fused(config: Any) -> Iterator[tuple[str, ...]]:
    """Yield the paths of layers that vLLM loads into one."""
    family = family_of(config)
    projections = family.projections().values()
    for index in range(config.num_hidden_layers):
        block = family.block_path(index)
        for paths in projections:
            yield tuple(f"{block}.{path}" for path in paths)


def write_vllm(
    checkpoint: Path, folder: Path, target: Path, on_progress: OnWork = ignore_progress
) -> None:
    """Write a checkpoint for vLLM into `folder`, and its adapter if it has one.

    Every packed layer must have a format that vLLM supports. The export will be moved to `target`
    later, so the adapter's config names that path as the path of its base model.
    """
    config = checkpoint_config(checkpoint)
    formats = formats_of(config)
    for paths in _fused(config):
        names = {formats.get(path) for path in paths}
        assert len(names) == 1, f"vLLM loads {', '.join(paths)} into one layer"

    copy_other_files(checkpoint, folder)
    if has_adapter(checkpoint):
        copy_adapter(checkpoint, folder / ADAPTER_FOLDER, target)

    state = weights_of(checkpoint)
    widths = columns_of(config)
    for done, (path, name) in enumerate(formats.items(), 1):
        packed = take_weight(state, path)
        for part, tensor in _format(name).parts(packed, widths[path]).items():
            state[f"{path}.{part}"] = tensor
        on_progress("writing for vLLM", done, len(formats))
    write_tensors(state, folder)

    described = read_settings(checkpoint / "config.json")
    described.pop("quantization_config", None)
    if formats:
        described["quantization_config"] = _quantization_config(config, formats)
    write_config(described, config, folder)


def _format(name: str) -> Packed:
    packed = format_of(name)
    assert isinstance(packed, Packed), f"vLLM has no format {name}"
    return packed


def _quantization_config(config: Any, formats: Mapping[str, str]) -> dict[str, Any]:
    """Describe the layers of each format as a group of compressed-tensors."""
    groups = {}
    for name in dict.fromkeys(formats.values()):
        packed = _format(name)
        weights = {
            "num_bits": packed.bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "dynamic": False,
            "group_size": packed.group_size,
        }
        targets = [path for path, of_path in formats.items() if of_path == name]
        groups[name] = {"targets": targets, "weights": weights, "format": "pack-quantized"}

    # vLLM and transformers leave out the layers that no group names.
    family = family_of(config)
    paths = [path for fused in _fused(config) for path in fused]
    paths += [family.head, family.embeddings]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [path for path in paths if path not in formats],
    }


def write_config(described: dict[str, Any], config: Any, folder: Path) -> None:
    """Write config.json for the exported model.

    If blocks differ in size, also copy `modeling_ragged.py` and register it in config.json.
    """
    if needs_modeling(config):
        model = f"Ragged{MODEL_MAPPING[type(config)].__name__}"
        causal_model = f"Ragged{MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__}"
        module = MODELING.removesuffix(".py")
        described["auto_map"] = {
            "AutoModel": f"{module}.{model}",
            "AutoModelForCausalLM": f"{module}.{causal_model}",
        }
        # vLLM takes its own class by this name, which would build blocks alike.
        described["architectures"] = [causal_model]
        # Of Granite; vLLM's class for all models reads it by this name.
        scaling = getattr(config, "logits_scaling", None)
        if scaling:
            described["logit_scale"] = 1 / scaling
        shutil.copyfile(Path(__file__).with_name(MODELING), folder / MODELING)
    elif config.model_type == "qwen2":
        size = config.num_attention_heads * family_of(config).head_dim(config)
        if size != config.hidden_size:
            # vLLM 0.32's own class for Qwen2 reads no `head_dim`; this one builds transformers'
            # classes.
            described["architectures"] = ["TransformersForCausalLM"]
    write_settings(described, folder / "config.json")


def needs_modeling(config: Any) -> bool:
    """Return True if transformers needs `modeling_ragged.py`, because blocks differ."""
    return bool(config.is_heterogeneous) and config.model_type in SERVED
