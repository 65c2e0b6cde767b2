"""A run's files, wherever they are kept: in a folder, or in an object store.

Every file of a run has a path on this machine. `storage_at` finds what is behind it: the file itself, or the object of
which the path holds this machine's copy. No other package asks which. The functions here repeat what fails while the
storage is full or away, as `retry_storage` does.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qpruner.errors import CorruptFile, StorageError, UserError
from qpruner.runs.records import digest_of
from qpruner.runs.storage.base import Storage as Storage
from qpruner.runs.storage.bucket import CACHE as CACHE
from qpruner.runs.storage.bucket import cache_root as cache_root
from qpruner.runs.storage.bucket import mirror_of
from qpruner.runs.storage.files import FILES as FILES
from qpruner.runs.storage.files import FileList as FileList
from qpruner.runs.storage.files import OnPiece as OnPiece
from qpruner.runs.storage.files import empty_folder as empty_folder
from qpruner.runs.storage.files import exclusive as exclusive
from qpruner.runs.storage.files import in_parallel
from qpruner.runs.storage.files import list_path as list_path
from qpruner.runs.storage.files import read_list as read_list
from qpruner.runs.storage.files import share_files as share_files
from qpruner.runs.storage.folder import FolderStorage
from qpruner.runs.storage.objects import objects_at
from qpruner.runs.storage.retry import retry_storage as retry_storage
from qpruner.runs.storage.retry import storage_error as storage_error

OWN_DIGEST = "record_digest"
"""Key of a record's file: the digest of all other keys, since JSON with a flipped bit may still be JSON."""

RecordType = TypeVar("RecordType", bound=BaseModel)
Result = TypeVar("Result")


def storage_at(path: Path) -> Storage:
    """Find what is behind a path of a run."""
    return objects_at(path) or FolderStorage(path)


def run_path(output: str | Path, is_sought: bool = False) -> Path:
    """Turn a run's folder or URI into its path on this machine; the storage is not asked.

    Args:
        output: The folder or URI.
        is_sought: Whether a person looks for it, so that it is not the `output` of a configuration.

    Raises:
        UserError: If the folder, or what should hold it, is a file; or if there is no such URI.
    """
    if isinstance(output, str) and "://" in output:
        return mirror_of(output)
    root = Path(output).expanduser().resolve()
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir() and is_sought:
        raise UserError(
            f"{existing} is a file, and a run is a folder: of a configuration give the folder that its `output` names"
        )
    if not existing.is_dir():
        raise UserError(f"`output`: {existing} is a file; name a folder")
    return root


def run_root(output: str | Path, is_sought: bool = False) -> Path:
    """Turn a run's folder or URI into its path, as `run_path` does, and check that its bucket answers."""
    root = run_path(output, is_sought)
    if not isinstance(output, Path):
        _check_reachable(root)
    return root


@functools.cache
def _check_reachable(root: Path) -> None:
    storage_at(root).check_reachable()


def display_name(path: Path) -> str:
    """Name a path as a person knows it: a folder's path, or a URI."""
    return storage_at(path).name


def address_of(path: Path) -> str:
    """Name a path as a command takes it, a URI with the options that reach its store."""
    return storage_at(path).address


# ---- one file


def write_json(path: Path, data: BaseModel, patience_seconds: float | None = None) -> None:
    """Write a record with a digest of its own, as `write_text` does."""
    fields = json.loads(data.model_dump_json())
    text = json.dumps(fields | {OWN_DIGEST: digest_of(fields)}, indent=2, ensure_ascii=False)
    write_text(path, text + "\n", patience_seconds)


def write_text(path: Path, text: str, patience_seconds: float | None = None) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    storage = storage_at(path)
    retry_storage(lambda: storage.write(text.encode()), path, patience_seconds)


def read_text(path: Path) -> str | None:
    """Read what `write_text` wrote; None when the file is missing."""
    try:
        return retry_storage(storage_at(path).read, path).decode()
    except FileNotFoundError:
        return None


def read_existing(path: Path, kind: type[RecordType]) -> RecordType:
    """Read a record that is known to exist: a missing one means that the storage is away."""

    def read() -> RecordType:
        record = read_json(path, kind)
        if record is None:
            raise OSError(errno.EIO, "was written and is missing", display_name(path))
        return record

    return retry_storage(read, path)


def read_json(path: Path, kind: type[RecordType]) -> RecordType | None:
    """Read what `write_json` wrote; None when the file is missing.

    Raises:
        CorruptFile: If it is not a `kind`, or not as it was written.
    """
    try:
        text = read_text(path)
        return None if text is None else kind.model_validate(_without_digest(text))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise CorruptFile(f"{display_name(path)} is not a {kind.__name__}: {place}: {problem['msg']}", path) from error
    except ValueError as error:  # not JSON, or not even text
        raise CorruptFile(f"{display_name(path)} is not a {kind.__name__}: {error}", path) from error


def _without_digest(text: str) -> Any:
    """Parse a record's file, and compare it with its own digest, which a list of files has none of."""
    found = json.loads(text)
    if isinstance(found, dict) and OWN_DIGEST in found:
        digest = found.pop(OWN_DIGEST)
        if digest != digest_of(found):
            raise ValueError(f"it is not as it was written, by its `{OWN_DIGEST}`")
    return found


def for_each(action: Callable[[Path], Result], paths: Sequence[Path]) -> list[Result]:
    """Apply a function to each of a run's paths; requests to an object store overlap."""
    if paths and storage_at(paths[0]).requests_at_once > 1:
        return in_parallel(action, paths)
    return [action(path) for path in paths]


def progress_seconds(path: Path) -> float:
    """Return the pause between two writes of progress to a file."""
    return storage_at(path).progress_seconds


def write_progress(path: Path, text: str) -> bool:
    """Write progress to a file; return whether that worked.

    It is not durable, since it says nothing after a crash, and waits for no room: results wait for that.
    """
    with contextlib.suppress(OSError, StorageError):
        storage_at(path).write_progress(text.encode())
        return True
    return False


def read_progress(path: Path) -> str | None:
    """Read what `write_progress` wrote last; None before the first, and while the storage is away."""
    with contextlib.suppress(OSError, StorageError):
        return storage_at(path).read().decode()
    return None


def exists(path: Path) -> bool:
    """Whether there is a file of that name."""
    return retry_storage(storage_at(path).is_file, path)


def file_digest(path: Path) -> str:
    """Digest a file as the storage has it: sha256 in hex."""
    return retry_storage(storage_at(path).digest, path)


def fetch_file(path: Path, to: Path, on_piece: OnPiece = lambda: None) -> str:
    """Copy a file of a run to this machine; return the sha256. No half is left.

    Args:
        path: The file.
        to: Where the copy goes.
        on_piece: Called after each piece.
    """
    try:
        return retry_storage(lambda: storage_at(path).download(to, on_piece), path)
    except Exception:
        to.unlink(missing_ok=True)
        raise


def put_file(file: Path, target: Path) -> str:
    """Move a file from the `staging_path` of a target there; return its sha256."""
    return retry_storage(lambda: storage_at(target).upload(file), target)


# ---- folders


def children(folder: Path) -> list[str]:
    """Name what lies in a folder, sorted; nothing where there is no folder."""
    return retry_storage(storage_at(folder).names, folder)


def files_in(folder: Path) -> dict[str, int]:
    """Map every file in a folder and below to its bytes."""
    return retry_storage(storage_at(folder).files, folder)


def folder_digests(folder: Path) -> dict[str, str]:
    """Digest every file in a folder as the storage has it."""
    names = sorted(files_in(folder))
    return dict(zip(names, for_each(file_digest, [folder / name for name in names]), strict=True))


def published_folders(parent: Path) -> list[Path]:
    """List the folders in one that are complete."""
    return retry_storage(storage_at(parent).published_folders, parent)


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there; half a folder is never taken for a complete one."""
    retry_storage(storage_at(path).delete, path)


def move(path: Path, target: Path) -> Path:
    """Move a file or folder of the run; return where it is now."""
    retry_storage(lambda: storage_at(path).move(target), path)
    return target


def quarantine(path: Path, place: Path) -> str:
    """Move a damaged file or folder somewhere in `place` to its `damaged/`; return the new name."""
    name = "-".join(path.relative_to(place).parts)
    return display_name(move(path, place / "damaged" / f"{name}-{time.time_ns()}"))


def staging_path(folder: Path) -> Path:
    """Where a process writes what it sends file by file: the folder itself, or a folder of this machine for it."""
    return storage_at(folder).staging


def writing_folder(target: Path) -> AbstractContextManager[Path]:
    """Yield the folder on this machine to write; its files are listed, and sent, when it is done."""
    return storage_at(target).writing()


def publish_folder(folder: Path, target: Path) -> None:
    """Make a finished folder durable and move it to its name, which is free or holds an unfinished attempt."""
    storage_at(target).publish(folder)


def put_folder(folder: Path, target: Path) -> FileList:
    """Copy a folder of this machine to a target, its list last; without a list nobody takes it for complete."""
    return storage_at(target).put_folder(folder)


def fetch(folder: Path, on_piece: OnPiece = lambda: None) -> Path:
    """Have a folder of a run complete on this machine; return its path, which stays what it was.

    Each process compares the folder with its list once. A copy that is damaged is fetched again.

    Args:
        folder: Where it lies, or is to lie.
        on_piece: Called after each piece.

    Raises:
        CorruptFile: Naming the file or object that is missing or not as it was written.
    """
    storage_at(folder).fetch(on_piece)
    return folder


def verify_folder(folder: Path, on_piece: OnPiece = lambda: None) -> None:
    """Compare a folder with its list, if it has one, whatever this process knows of it.

    Raises:
        CorruptFile: Naming the file or object that is missing or not as it was written.
    """
    storage_at(folder).verify(on_piece)


def require_arrived(folder: Path) -> None:
    """Raise `StorageError` if a folder that another machine wrote is not here: it may be on that machine's own disk."""
    storage_at(folder).require_arrived()
