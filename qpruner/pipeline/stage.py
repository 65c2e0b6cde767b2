"""What a stage of the flow is: one step that leaves a record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile
from qpruner.pipeline.context import Context
from qpruner.runs.events import Message
from qpruner.runs.records import Record, digest_of
from qpruner.runs.storage import FILES, files_in, quarantine, read_json, storage_at

RecordType = TypeVar("RecordType", bound=Record)
FileType = TypeVar("FileType", bound=BaseModel)


class Stage(ABC, Generic[RecordType]):
    """One stage at work on one run.

    Its module is imported by the command line for its name and help, so it imports torch, transformers and Ray inside
    functions only.
    """

    name: ClassVar[str]
    """Its folder, record and verb, and the function of the API."""
    help: ClassVar[str] = ""
    """What the verb does, in one sentence; empty where there is no such verb."""
    record: type[RecordType] | None = None
    """Class of its record; None of a stage that runs every time."""
    keeps_scratch: ClassVar[bool] = False
    """Whether it uses what a killed command left in its scratch folder."""
    repairs_files: ClassVar[bool] = False
    """Whether a command that begins compares its files with their checksums and makes damaged ones again."""
    starts_ray: ClassVar[bool] = True
    """Whether Ray may be started on this machine for it."""
    trains: ClassVar[bool] = False
    """Whether a loss that is no number comes from training, not from the weights of the base model."""
    memory_keys: ClassVar[str] = (
        "`training.micro_batch_size` or `data.max_length`, or set `training.gradient_checkpointing`"
    )
    """What to lower where memory runs out."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = context.config

    @classmethod
    def is_wanted(cls, config: RunConfig) -> bool:
        """Whether the configuration asks for this stage."""
        return True

    def warnings(self) -> Iterable[str]:
        """Warn before the first stage of what this one will meet."""
        return ()

    def check(self) -> None:
        """Refuse before the first stage what cannot work in this one, with a `UserError`."""

    def begin(self) -> None:
        """Forget the record where files that it vouches for are damaged or gone."""

    def inputs(self) -> tuple[Any, ...]:
        """Everything that the record depends on."""
        return ()

    @property
    def digest(self) -> str:
        """Digest of its name and inputs."""
        return digest_of(self.name, *self.inputs())

    @abstractmethod
    def detail(self) -> str:
        """Describe the work that begins."""

    @abstractmethod
    def run(self, scratch: Path) -> dict[str, Any]:
        """Write the stage's files into `scratch` and return the fields of its record."""

    @abstractmethod
    def summary(self, record: RecordType) -> str:
        """Describe the record in one line."""

    def share_done(self) -> float:
        """How much of a stage without a record is done, from 0 to 1."""
        return 0.0

    def disk_bytes(self) -> int:
        """About the bytes that it leaves on this machine."""
        return 0

    def matching_record(self, digest: str) -> RecordType | None:
        """Read the record if it has this digest and its folder is there; `CorruptFile` if it cannot be read."""
        run = self.context.run_dir
        record = run.read_record(self.name, self.record) if self.record else None
        return record if record and record.digest == digest and run.has_folder(self.name) else None

    def is_whole(self, folder: Path) -> bool:
        """Whether a folder and those in it are as their lists of checksums say; the first damaged one is set aside."""
        inner = [folder / name.removesuffix(FILES) for name in files_in(folder) if name.endswith(FILES)]
        for part in (folder, *inner):
            try:
                storage_at(part).verify()
            except CorruptFile as error:
                where = f"set aside in {quarantine(part, self.context.run_dir.root)}, " if files_in(part) else ""
                self.notify(f"warning: {error}; {where}the stage is run again")
                return False
        return True

    def read_intact(self, file: Path, kind: type[FileType], place: Path, remedy: str) -> FileType | None:
        """Read a JSON file; a damaged one is set aside in `place` and counts as missing."""
        try:
            return read_json(file, kind)
        except CorruptFile as error:
            self.notify(f"warning: {error}; set aside in {quarantine(file, place)}, {remedy}")
            return None

    def notify(self, text: str) -> None:
        """Emit a message of this stage."""
        self.context.emit(Message(self.name, text))
