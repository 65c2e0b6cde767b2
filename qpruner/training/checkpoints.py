"""Decide when to save a training, and store a fine-tune's checkpoints and what it trained.

Only one process may write them (see `Ownership`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.errors import CorruptFile, TakenOver
from qpruner.quantization.formats import Method
from qpruner.runs import storage
from qpruner.runs.records import Recorded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TRAINED_WEIGHTS: Mapping[Method, str] = {
    "adapter": "adapter_model.safetensors",
    "scales": "scale_changes.safetensors",
}
"""The file with what each method has trained, in checkpoints and in the folder of a fine-tune."""
SECONDS = 30.0
"""Seconds of training between two saves; more if saving takes longer than this over `COST`."""

COST = 20
"""How many times as long as a save training lasts before the next one, at least."""


class SaveClock:
    """Says when a training is due to be saved: every `seconds`, less often if saving is slow."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pause = seconds
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return True if enough time has passed since the last save.

        Enough is the given number of seconds or `COST` times the duration of that save, whichever
        is longer.
        """
        return time.monotonic() - self._last >= self._pause

    def saved(self, since: float) -> None:
        """Record that a save of the training has just finished.

        Args:
            since: When that save began, in seconds of the monotonic clock.
        """
        self._last = time.monotonic()
        self._pause = max(self._seconds, COST * (self._last - since))


class _Owner(Recorded):
    """The file that names the owner of a fine-tune."""

    worker: str
    """The latest process of the fine-tune or, in a group, the process of rank 0."""


class Ownership:
    """Lets only the latest process of a fine-tune write.

    An earlier process that seemed dead may still be running.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.worker = uuid.uuid4().hex

    def take(self) -> None:
        """Make this process the owner."""
        storage.write_json(self._path, _Owner(worker=self.worker))

    def check(self) -> None:
        """Raise `TakenOver` if another process has become the owner."""
        if storage.read_existing(self._path, _Owner).worker != self.worker:
            raise TakenOver


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest intact checkpoint of a fine-tune, or None if there is none.

    A checkpoint in an object store is fetched.
    """
    steps = []
    for name in storage.children(folder):
        if name.startswith("checkpoint-") and name.endswith(storage.FILES):
            steps.append(int(name.removeprefix("checkpoint-").removesuffix(storage.FILES)))

    for step in sorted(steps, reverse=True):
        checkpoint = folder / f"checkpoint-{step}"
        if not is_damaged(checkpoint):
            return storage.fetch(checkpoint)
    return None


def is_damaged(checkpoint: Path) -> bool:
    """Return True if a checkpoint's files differ from its list of files.

    A checkpoint without such a list does not count as damaged.
    """
    try:
        storage.storage_at(checkpoint).verify()
    except CorruptFile:
        return True
    return False


def keep_checkpoint(checkpoint: Path, folder: Path, ownership: Ownership) -> None:
    """Publish a checkpoint in the fine-tune's folder, then remove the earlier ones.

    In an object store the checkpoint lacks the random states of workers on other machines, so that
    their dropout starts from the seed after a resume.

    Raises:
        TakenOver: Another process has become the owner of the fine-tune.
    """
    from torch import distributed

    from qpruner.training.finetune import Share

    share = Share.own()
    if share.processes > 1:
        distributed.barrier()  # wait until every process has saved its random state
    if share.rank > 0:
        return
    ownership.check()  # the owner may have changed during the save
    storage.storage_at(folder / checkpoint.name).put_folder(checkpoint)
    ownership.check()  # or while the checkpoint was published
    for old in storage.published_folders(folder):
        if old.name != checkpoint.name:
            storage.remove(old)


def save_trained(model: PeftModel | PreTrainedModel, folder: Path) -> None:
    """Save the adapter of a model, or the changes of its scales, to a folder."""
    from peft import PeftModel
    from safetensors.torch import save_file

    from qpruner.quantization.scales import changes_of

    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(changes_of(model), folder / TRAINED_WEIGHTS["scales"])


def publish_trained(
    model: PeftModel | PreTrainedModel, trained: Path, checkpoints: Path, ownership: Ownership
) -> str:
    """Save what was trained to a temporary folder in `checkpoints`, and move it to `trained`.

    Returns:
        The sha256 of its weights.

    Raises:
        TakenOver: Another process has become the owner of the fine-tune.
    """
    aside = storage.storage_at(checkpoints / f"trained-{ownership.worker}").staging
    with storage.writing_folder(aside):
        storage.retry_storage(lambda: save_trained(model, aside), aside)
    [weights] = [aside / name for name in TRAINED_WEIGHTS.values() if (aside / name).exists()]
    digest = storage.file_digest(weights)
    ownership.check()
    storage.storage_at(trained).publish(aside)
    return digest


def load_trained(model: PeftModel | PreTrainedModel, folder: Path) -> None:
    """Load a saved adapter in the dtype in which it is served, or write saved scales into a model.

    A model that is not one of peft gets scales.

    Raises:
        CorruptFile: The file is missing, cut short or of another model.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from qpruner.quantization import scales
    from qpruner.quantization.assembly import cast_adapters

    folder = storage.fetch(folder)
    if not isinstance(model, PeftModel):
        scales.make_trainable(model)
        scales.load_changes(model, folder / TRAINED_WEIGHTS["scales"])
        scales.fold(model)
        return
    path = folder / TRAINED_WEIGHTS["adapter"]
    try:
        state: dict[str, Any] = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CorruptFile(f"adapter {path} cannot be read: {error}", path) from error
    set_peft_model_state_dict(model, state)
    cast_adapters(model)
