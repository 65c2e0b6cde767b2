"""The interface of a run's storage: one object for each file or folder of a run, bound to its path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from qpruner.runs.storage.files import FileList, OnPiece


class Storage(ABC):
    """A file or folder of a run, wherever it is kept.

    Reads and writes raise `FileNotFoundError` for what is not there, and an `OSError` with a number where the storage
    is full or away; `retry_storage` repeats those.

    Args:
        path: Its path on this machine; of an object that of this machine's copy.
    """

    fills_this_disk: bool
    """Whether what is written here takes room on a disk of this machine."""
    is_read_anywhere: bool
    """Whether a machine that shares no folder with this one can resume the run."""
    progress_seconds: float
    """Pause between two writes of a worker's progress: an object store charges for each."""
    requests_at_once: int
    access_remedy: str
    """What to do about a node that cannot use the storage."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # ---- names

    @property
    @abstractmethod
    def name(self) -> str:
        """The path or URI as a person knows it."""

    @property
    @abstractmethod
    def address(self) -> str:
        """What a command on another machine takes: a URI with its options."""

    @property
    @abstractmethod
    def export_command(self) -> str:
        """The command that brings a run's final model to a folder; empty where it lies in one."""

    @property
    @abstractmethod
    def staging(self) -> Path:
        """Where a process of this machine writes what belongs here."""

    @property
    @abstractmethod
    def scratch(self) -> Path:
        """A folder of this machine for an unfinished attempt at this folder."""

    @abstractmethod
    def copies(self) -> dict[str, list[str]]:
        """Map the environment variable of a cache to patterns of the files there that are copies of this run."""

    @property
    @abstractmethod
    def bank_copies(self) -> Path | None:
        """Where this machine keeps copies of a bank's files; None where they are read in place."""

    # ---- one file

    @abstractmethod
    def read(self) -> bytes:
        """Read the file as one writer wrote it."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Write the file durably; a reader sees the old contents or the new."""

    @abstractmethod
    def write_progress(self, data: bytes) -> None:
        """Write the file for whoever reads it while this process lives."""

    @abstractmethod
    def renew(self, data: bytes) -> None:
        """Set the file's time of change to now, where its contents are these."""

    @abstractmethod
    def is_file(self) -> bool:
        """Whether there is a file of this very name."""

    @abstractmethod
    def modified(self) -> float:
        """Return the time of change, in seconds on the storage's clock."""

    @abstractmethod
    def digest(self) -> str:
        """Digest the file as the storage has it."""

    @abstractmethod
    def download(self, target: Path, on_piece: OnPiece) -> str:
        """Copy the file to one of this machine; return its sha256."""

    @abstractmethod
    def upload(self, file: Path) -> str:
        """Move a file of this machine from `staging` here; return its sha256."""

    @abstractmethod
    def send(self) -> None:
        """Put what this machine's copy holds, such as a growing log, in the storage."""

    @abstractmethod
    def resume_local(self) -> None:
        """Bring this machine's copy of a growing file up to what other machines wrote."""

    # ---- folders

    @abstractmethod
    def names(self) -> list[str]:
        """Name what lies directly in the folder, sorted; nothing where there is no folder."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """Map every file in the folder and below to its bytes."""

    @abstractmethod
    def published_folders(self) -> list[Path]:
        """List the complete folders in this one."""

    @abstractmethod
    def is_published(self) -> bool:
        """Whether the folder is there and complete."""

    @abstractmethod
    def has_lost_folder(self) -> bool:
        """Whether the folder of a recorded stage is gone; an object store keeps no empty folders to tell."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the file or folder; half a folder is never taken for a complete one."""

    @abstractmethod
    def move(self, target: Path) -> None:
        """Move the file or folder, with its list, to another path of the run."""

    @abstractmethod
    def publish(self, folder: Path) -> None:
        """Move a finished folder of this machine here, durably, with its list."""

    @abstractmethod
    def put_folder(self, folder: Path) -> FileList:
        """Copy a folder of this machine here, its list last."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[Path]:
        """Yield the folder of this machine to write; list its files, and send them, at the end."""

    @abstractmethod
    def fetch(self, on_piece: OnPiece) -> None:
        """Have the folder complete on this machine, compared with its list."""

    @abstractmethod
    def verify(self, on_piece: OnPiece) -> None:
        """Compare the folder with its list, if it has one."""

    @abstractmethod
    def require_arrived(self) -> None:
        """Raise `StorageError` if a folder that another machine wrote is not here."""

    @abstractmethod
    def bytes_to_copy(self) -> int:
        """Count the folder's bytes that this machine still has to copy before it can use them."""

    # ---- a stage's folder and the run's lock

    @abstractmethod
    def begin_stage(self, record: Path, resume: bool) -> Path:
        """Make the folder that a stage writes into.

        Args:
            record: The stage's record.
            resume: Whether to keep what a killed attempt left.
        """

    @abstractmethod
    def commit_stage(self, written: Path, record: Path) -> None:
        """Delete the stage's old record, and publish what it wrote."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other processes from judging or changing the lock meanwhile."""

    @abstractmethod
    def check_reachable(self) -> None:
        """Raise `UserError` if the storage does not answer, or refuses access."""

    @abstractmethod
    def forget_staging(self) -> None:
        """Delete what this machine still holds in a staging folder of its own."""

    @abstractmethod
    def forget_local(self) -> None:
        """Delete this machine's copy of the folder."""
