"""From a user's model source to a config, a tokenizer and dense weights.

Sources: a hub id, a local folder, a `.gguf` file, or `package:NAME/FILE` for a file inside an installed package (found
without importing it). Weights are read from safetensors or GGUF only, never from a pickle.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.errors import CorruptFile, UserError
from qpruner.models import ragged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qpruner.config import ModelConfig


def resolve_source(source: str, key: str) -> str:
    """Turn `package:NAME/PATH` into a path; other sources are returned as they are.

    Args:
        source: What the user wrote.
        key: The config key it came from, for the error.

    Raises:
        UserError: If the package is not installed or has no such file.
    """
    if not source.startswith("package:"):
        return source
    package, _, inner = source.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"`{key}`: Python package `{package}` is not installed; install it or name another source")
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if not path.exists():
        raise UserError(f"`{key}`: package `{package}` has no file `{inner}`")
    return str(path)


def check_source(model: ModelConfig) -> str:
    """Resolve and check the model source without loading weights."""
    source = resolve_source(model.source, "model.source")
    path = Path(source)
    if source.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"`model.source`: file {source} does not exist")
        if importlib.util.find_spec("gguf") is None:
            raise UserError("`model.source`: reading .gguf files needs the gguf package: pip install 'qpruner[gguf]'")
    elif path.is_dir():
        _check_folder(path)
    elif source.startswith((".", "/", "~")):
        raise UserError(f"`model.source`: folder {source} does not exist")
    return source


def load_model_config(model: ModelConfig) -> Any:
    """The model's transformers config; no weights are read."""
    from transformers import AutoConfig

    source = check_source(model)
    try:
        config = AutoConfig.from_pretrained(
            **_where(source), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"`model.source`: no model config can be read from {model.source!r}: {_first_line(error)}"
        ) from error
    if getattr(config, "quantization_config", None) is not None and not source.endswith(".gguf"):
        raise UserError(f"`model.source`: {model.source} is already quantized; give the full-precision checkpoint")
    return config


def load_tokenizer(source: str, model: ModelConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer; its padding token is set when it has none."""
    from transformers import AutoTokenizer

    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code} if model else {}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**_where(source), **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_dense(source: str, dtype: str, model: ModelConfig | None = None) -> PreTrainedModel:
    """Dense weights on the best device, pruned widths included.

    Args:
        source: A folder, hub id or .gguf file (already resolved).
        dtype: Name of the torch dtype of the weights.
        model: Revision and trust settings for a hub model.

    Raises:
        CorruptFile: If a weight file is truncated.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    ragged.install()
    options: dict[str, Any] = (
        {"quantization_config": GgufConfig(dequantize=True)} if source.endswith(".gguf") else {"use_safetensors": True}
    )
    if model:
        options |= {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            **_where(source), dtype=getattr(torch, dtype), **options
        )
    except SafetensorError as error:
        raise CorruptFile(f"weights in {source} cannot be read: {error}; fetch or write that file again") from error
    return loaded.to(device())


def device() -> str:
    """`cuda` when torch sees a GPU, `cpu` otherwise."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _where(source: str) -> dict[str, str]:
    path = Path(source)
    if source.endswith(".gguf"):
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": source}


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise UserError(f"`model.source`: folder {path} has no config.json; name a model folder")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"`model.source`: folder {path} has no .safetensors weights (pickled .bin weights are not read; convert "
            "them with transformers' save_pretrained)"
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
        if missing:
            raise UserError(f"`model.source`: folder {path} lacks the weight file(s) {', '.join(missing)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
