"""Load config, tokenizer and unquantized weights of a model.

The source is a hub id, a local folder, a `.gguf` file or `package:NAME/FILE`. Weights are read from
safetensors or GGUF only, never from a pickle; packages are found without importing them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qpruner.config.schema import HUB_ID, ModelConfig
from qpruner.errors import CorruptFile, UserError, first_line
from qpruner.models import gguf_reader, ragged
from qpruner.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


CONVERT = (
    "convert them with transformers' save_pretrained "
    "(transformers 4: with `safe_serialization=True`)"
)
"""Remedy for pickled weights in error messages."""

OnWork = Callable[[str, int, int], None]
"""Callback for progress: it gets the name of the work, the amount done and the total."""


def ignore_progress(what: str, done: int, total: int) -> None:
    """Ignore a progress report."""


def resolve_source(source: str, key: str) -> str:
    """Resolve `package:NAME/PATH` and a leading `~` to a path; leave any other source unchanged."""
    if source.startswith("~"):
        return os.path.expanduser(source)  # unchanged if there is no such user
    if not source.startswith("package:"):
        return source
    package, _, inner = source.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"`{key}`: Python package `{package}` is not installed; "
            "install it or name another source"
        )
    folder = Path(spec.submodule_search_locations[0])
    path = folder / inner
    if not path.exists():
        raise UserError(
            f"`{key}`: package `{package}` has no file `{inner}`; name one below {folder}"
        )
    return str(path)


def absolute_source(source: str) -> str:
    """Make a local path absolute, for processes with another working folder.

    Any other source is returned unchanged.
    """
    return str(Path(source).absolute()) if Path(source).exists() else source


def check_source(model: ModelConfig) -> str:
    """Resolve and check the model source without loading weights."""
    source = resolve_source(model.source, "model.source")
    path = Path(source)
    remedy = "name a model folder, .gguf file or hub id"
    if source.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"`model.source`: file {source} does not exist; {remedy}")
        if importlib.util.find_spec("gguf") is None:
            raise UserError(
                "`model.source`: reading .gguf files needs the gguf package: "
                "pip install 'qpruner[gguf]'"
            )
    elif path.is_dir():
        check_folder(path, "`model.source`")
    elif path.exists():
        raise UserError(f"`model.source`: {source} is a file, but not a .gguf file; {remedy}")
    elif not HUB_ID.fullmatch(source):
        raise UserError(
            f"`model.source`: folder {path.absolute()} does not exist, "
            f"and {source} is no hub id (OWNER/NAME); {remedy}"
        )
    return source


def load_model_config(model: ModelConfig) -> Any:
    """Read the transformers config of a model, but no weights."""
    from transformers import AutoConfig

    source = check_source(model)
    try:
        config = AutoConfig.from_pretrained(**_options(source, model))
    except Exception as error:  # a broken config or .gguf header ends in many types
        path = Path(source).absolute()
        if not path.exists():
            remedy = (
                "check that the hub has this id and answers, "
                f"or name a model folder ({path} does not exist)"
            )
        elif source.endswith(".gguf"):
            remedy = "the file may be truncated: fetch it again"
        else:
            remedy = "repair its config.json"
        raise UserError(
            f"`model.source`: no model config can be read from {model.source!r}: "
            f"{_reason(error)}; {remedy}"
        ) from error
    if getattr(config, "quantization_config", None) is not None and not source.endswith(".gguf"):
        raise UserError(
            f"`model.source`: {model.source} is already quantized; "
            "give the full-precision checkpoint"
        )
    if not Path(source).exists():
        check_hub_files(model)
    return config


def check_hub_files(model: ModelConfig) -> None:
    """Refuse a hub model that has no safetensors weights; do nothing if the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().model_info(model.source, revision=model.revision, timeout=10).siblings
    except Exception:  # the client changes its error types between releases
        return
    if files is None:
        return
    names = [file.rfilename for file in files]
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise UserError(
            f"`model.source`: {model.source} on the hub has no .safetensors weights in revision "
            f"{model.revision or 'main'}; name one that has them in `model.revision`, "
            f"or {CONVERT} and name the new folder"
        )


def load_tokenizer(source: str, model: ModelConfig | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer; pad with the end-of-text token if it has no padding token."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**_options(source, model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_dense(
    source: str, dtype: str, model: ModelConfig | None = None, on_progress: OnWork = ignore_progress
) -> PreTrainedModel:
    """Load an unquantized model.

    Revision and device map are those of `model`; without it they are the main revision and one
    device.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from qpruner.models import cpu

    ragged.install()
    cpu.install()
    is_spread = model is not None and model.device_map == "auto"
    options = _options(source, model)
    options["dtype"] = getattr(torch, dtype)
    options["device_map"] = "auto" if is_spread else None
    if source.endswith(".gguf"):
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    try:
        with reporting_tensors(on_progress):
            loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**options)
    except (SafetensorError, OSError) as error:
        # An error of the disk has a number; transformers' "no such file" has none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(Path(source), error) from error
    if not is_spread:
        return loaded.to(device())
    check_reachable(loaded)
    return loaded


def check_reachable(model: PreTrainedModel) -> None:
    """Refuse a model that accelerate left partly on disk, or in host memory beside GPUs."""
    places = {name: str(place) for name, place in getattr(model, "hf_device_map", {}).items()}
    unreachable = {"disk"} if set(places.values()) <= {"cpu", "disk"} else {"cpu", "disk"}
    for name, place in places.items():
        if place in unreachable:
            raise UserError(
                f"`model.device_map`: auto left {name or 'the model'} on {place}, where weights "
                "cannot be scored or cut, as the devices have no room; use more or larger GPUs, "
                "or hide all (`CUDA_VISIBLE_DEVICES=`) and prune on a CPU"
            )


@contextmanager
def reporting_tensors(on_progress: OnWork) -> Iterator[None]:
    """Report the tensors that transformers loads and the files it saves; hide its progress bars."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(
        lambda factory, args, kwargs: _reported(on_progress, *args, **kwargs)
    )
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _reported(
    on_progress: OnWork, items: Collection[Any] = (), desc: str | None = None, **ignored: Any
) -> Iterator[Any]:
    """Yield items and report each; `desc` is transformers' title of the progress bar."""
    what = "loading weights"
    if desc and "GGUF" in desc:
        what = "reading GGUF"
    elif desc and "Writing" in desc:
        what = "saving weights"
    for done, item in enumerate(items, 1):
        yield item
        on_progress(what, done, len(items))


def checkpoint_config(folder: Path) -> Any:
    """Read the transformers config of a checkpoint; raise `CorruptFile` if that fails."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> CorruptFile:
    """Build an error that names the first unreadable file of a checkpoint.

    If all can be read, it names the folder.
    """
    config = folder / "config.json"
    weights = sorted(folder.glob("*.safetensors"))
    damaged = [file for file in weights if not _is_complete(file)]
    if not weights:
        damaged.append(folder / "model.safetensors")
    try:
        json.loads(config.read_bytes())
    except (OSError, ValueError):
        damaged.insert(0, config)
    path = damaged[0] if damaged else folder
    return CorruptFile(f"{path} is missing or damaged: {_reason(error)}", path)


def device() -> str:
    """Return `cuda` when torch sees a GPU, `cpu` otherwise."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _options(source: str, model: ModelConfig | None) -> dict[str, Any]:
    """Return the keyword arguments with which `from_pretrained` reads a source."""
    options: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if source.endswith(".gguf"):
        gguf_reader.install()
        options["pretrained_model_name_or_path"] = str(Path(source).parent)
        options["gguf_file"] = Path(source).name
    if model:
        options["revision"] = model.revision
        options["trust_remote_code"] = model.trust_remote_code
    return options


def check_folder(path: Path, named: str) -> None:
    """Refuse a folder without a config or with incomplete safetensors files.

    Messages begin with `named`.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{named}: folder {path} has no config.json; name a model folder")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{named}: folder {path} has no .safetensors weights "
            f"(pickled .bin weights are not read; {CONVERT})"
        )
    index = path / "model.safetensors.index.json"
    has_one_file = (path / "model.safetensors").is_file()  # which transformers prefers to an index
    if index.is_file() and not has_one_file:
        _check_shards(index, named)
    for file in sorted(path.glob("*.safetensors")):
        if not _is_complete(file):
            raise UserError(f"{named}: weight file {file} is truncated or damaged; fetch it again")


def _check_shards(index: Path, named: str) -> None:
    """Refuse a folder that lacks files which the index of its weights lists."""
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{named}: {index} is not valid JSON with a `weight_map`; fetch it again"
        ) from error
    folder = index.parent
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        files = f"{counted(len(missing), 'weight file')}: {', '.join(missing)}"
        raise UserError(f"{named}: folder {folder} lacks {files}; fetch the model again")


def _is_complete(file: Path) -> bool:
    """Return True if a file is as long as its header says.

    `safe_open` would map all of it, which may not fit into memory.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        header.pop("__metadata__", None)
        data_bytes = max(entry["data_offsets"][1] for entry in header.values())
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(8 + length + data_bytes == file.stat().st_size)


def _reason(error: Exception) -> str:
    """Return the first line of an error, or the last line of a validation error."""
    first = first_line(error)
    if "alidation" in first:
        return str(error).strip().splitlines()[-1].strip()
    return first
