"""The base class of the stages."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from qpruner.config.schema import RunConfig
from qpruner.errors import CorruptFile
from qpruner.pipeline.context import Context
from qpruner.runs.events import Message
from qpruner.runs.records import RecordType, digest_of
from qpruner.runs.storage import FILES, Storage, files_in, quarantine, read_json, storage_at

FileType = TypeVar("FileType", bound=BaseModel)


class Stage(ABC, Generic[RecordType]):
    """A step of the flow that leaves a record.

    The command line imports every stage, so torch, transformers and Ray are imported inside
    functions only.
    """

    name: ClassVar[str]  # name of the stage and of its folder, record and subcommand
    help: ClassVar[str] = ""  # help text of the subcommand; empty if the stage has none
    record: type[RecordType] | None = None  # class of the record; None for a stage that always runs
    keeps_files: ClassVar[bool] = True  # whether the stage leaves a folder of its name
    starts_ray: ClassVar[bool] = True  # whether the stage may start Ray on this machine
    trains: ClassVar[bool] = False
    """Whether the stage trains; only then may training settings be the cause of a loss that is NaN
    or infinite."""
    memory_keys: ClassVar[str] = (
        "`training.micro_batch_size` or `data.max_length`, or set `training.gradient_checkpointing`"
    )
    """Advice if memory runs out, to follow the word `lower`."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = context.config

    @classmethod
    def is_wanted(cls, config: RunConfig) -> bool:
        """Return True if the configuration asks for this stage."""
        return True

    def warnings(self) -> Iterable[str]:
        """Return warnings to show before the first stage starts."""
        return ()

    def check(self) -> None:
        """Raise a `UserError` before the first stage starts if this stage cannot work."""

    def begin(self) -> None:
        """Delete the record if files that it describes are damaged or missing."""

    def inputs(self) -> tuple[Any, ...]:
        """Return everything that the record depends on, for the digest of the stage."""
        return ()

    @property
    def digest(self) -> str:
        """Digest of the name and inputs of the stage."""
        return digest_of(self.name, *self.inputs())

    @abstractmethod
    def detail(self) -> str:
        """Describe the work of the stage in one line, before it starts."""

    @abstractmethod
    def run(self, scratch: Path) -> dict[str, Any]:
        """Write the files of the stage into `scratch` and return the fields of its record."""

    @abstractmethod
    def summary(self, record: RecordType) -> str:
        """Describe the record in one line."""

    def disk_bytes(self) -> int:
        """Estimate how many bytes the stage leaves on this machine."""
        return 0

    def unfinished(self) -> Iterable[Path]:
        """List the folders that may have files of a stage without a record."""
        return [self.context.run_dir.scratch_path(self.name)]

    def disk_used(self) -> int:
        """Count how many of the `disk_bytes` are taken, all of them by a recorded stage."""
        is_recorded = getattr(self.context.records, self.name) is not None
        return self.disk_bytes() if is_recorded else sum(map(disk_bytes_in, self.unfinished()))

    def matching_record(self, digest: str) -> RecordType | None:
        """Return the record if its digest matches and its folder exists.

        Raise `CorruptFile` for a damaged record.
        """
        run = self.context.run_dir
        record = run.read_record(self.name, self.record) if self.record else None
        is_there = (
            not self.keeps_files or not run.storage.fills_this_disk or run.stage(self.name).is_dir()
        )
        return record if record and record.digest == digest and is_there else None

    def is_complete(self, folder: Path) -> bool:
        """Return True if the checksums of a folder and its subfolders match.

        Otherwise set the damaged folder aside.
        """
        inner = [
            folder / name.removesuffix(FILES) for name in files_in(folder) if name.endswith(FILES)
        ]
        for part in (folder, *inner):
            try:
                storage_at(part).verify()
            except CorruptFile as error:
                where = (
                    f"set aside in {quarantine(part, self.context.run_dir.root)}, "
                    if files_in(part)
                    else ""
                )
                self.notify(f"warning: {error}; {where}the stage runs again")
                return False
        return True

    def read_intact(
        self, file: Path, kind: type[FileType], place: Path, remedy: str
    ) -> FileType | None:
        """Read a JSON file; return None if it is missing or damaged.

        A damaged file is set aside in `place`.
        """
        try:
            return read_json(file, kind)
        except CorruptFile as error:
            self.notify(f"warning: {error}; set aside in {quarantine(file, place)}, {remedy}")
            return None

    def notify(self, text: str) -> None:
        """Emit a message of this stage."""
        self.context.emit(Message(self.name, text))


def disk_bytes_in(folder: Path) -> int:
    """Count the bytes of the files in a folder of this machine."""
    with suppress(FileNotFoundError):  # another driver may remove files
        return sum(Storage(folder).files().values())
    return 0
