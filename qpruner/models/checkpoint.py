"""Provide the base model as a folder, write pruned checkpoints, and read their tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from qpruner.config.schema import ModelConfig
from qpruner.errors import CorruptFile, UserError
from qpruner.models.loading import (
    OnWork,
    check_folder,
    check_hub_files,
    check_source,
    ignore_progress,
    load_dense,
    load_tokenizer,
    reporting_tensors,
)
from qpruner.runs.storage import OnPiece, retry_storage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


RENAMED = ("embed_out.", "lm_head.")
"""Prefixes of the head of GPT-NeoX in files and in the model.

transformers renames it when it loads and saves.
"""


@dataclass(frozen=True)
class Base:
    """The local folder of the base model, and whether this run wrote its files."""

    path: str
    converted: bool


def prepare_base(
    model: ModelConfig, folder: Path, is_shared: bool = False, on_progress: OnWork = ignore_progress
) -> Base:
    """Provide the base model as a local folder with safetensors weights.

    A local folder is used in place. A hub model is downloaded into the hub cache, with the model
    card that states its license, or into `folder` if other machines need it (`is_shared`). A .gguf
    file is dequantized into `folder`.
    """
    source = check_source(model)
    if Path(source).is_dir():
        return Base(str(Path(source).absolute()), converted=False)
    if source.endswith(".gguf"):
        loaded = load_dense(source, model.dtype, on_progress=on_progress)
        save_checkpoint(loaded, load_tokenizer(source), folder, on_progress)
        return Base(str(folder), converted=True)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]
    if model.trust_remote_code:
        patterns.append("*.py")
    fetched = folder
    with suppress(LocalEntryNotFoundError):
        path = snapshot_download(
            source,
            revision=model.revision,
            allow_patterns=patterns,
            local_dir=folder if is_shared else None,
            tqdm_class=_reporting_bar(on_progress),
        )
        fetched = Path(path).absolute()
    if not any(fetched.glob("*.safetensors")):
        check_hub_files(model)
        revision = f" --revision {model.revision}" if model.revision else ""
        raise UserError(
            "`model.source`: the hub does not answer, and the cache of this machine lacks files of "
            f"{model.source} (.safetensors weights, config, tokenizer); download it where the hub "
            f"answers: `qpruner prepare CONFIG`, or `hf download {model.source}{revision}` into a "
            "cache (`HF_HOME`) that this machine can read"
        )
    check_folder(fetched, "`model.source`")
    return Base(str(fetched), converted=is_shared)


def _reporting_bar(on_progress: OnWork) -> Any:
    """Create a class of invisible progress bars that report the megabytes downloaded."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc,type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._is_total = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self._num_bytes = 0.0
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            self._num_bytes += n or 0
            if self._is_total and self.total:
                on_progress("fetching MB", round(self._num_bytes / 1e6), round(self.total / 1e6))

    return Bar


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    on_progress: OnWork = ignore_progress,
) -> None:
    """Write weights (as safetensors shards), config (with `per_layer_config`) and tokenizer."""
    with reporting_tensors(on_progress):
        retry_storage(lambda: model.save_pretrained(folder, max_shard_size="1GB"), folder)
    retry_storage(lambda: tokenizer.save_pretrained(folder), folder)


def read_tensors(
    checkpoint: Path, wanted: Callable[[str], bool], on_piece: OnPiece = lambda: None
) -> dict[str, torch.Tensor]:
    """Read the tensors whose names in the model are `wanted`, and call `on_piece` after each.

    Raises:
        CorruptFile: A weight file is missing or damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    in_files, in_model = RENAMED
    shards = sorted(checkpoint.glob("*.safetensors"))
    if not shards:
        shards.append(checkpoint / "model.safetensors")  # which the error will name
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118
                    is_head = stored.startswith(in_files)
                    name = in_model + stored.removeprefix(in_files) if is_head else stored
                    if wanted(name):
                        tensors[name] = file.get_tensor(stored)
                        on_piece()
        except (FileNotFoundError, SafetensorError) as error:
            raise CorruptFile(
                f"weight file {shard} is missing or damaged: {error}; "
                "in a run, `qpruner run CONFIG` repairs it",
                shard,
            ) from error
    return tensors
