"""Reads and writes the files of a run, in a folder or in an object store.

Operations wait while the storage is full or away. Every file has a path on this machine; for a run
in an object store, that path holds a local copy of the object.
"""

import contextlib
import errno
import functools
import json
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from qpruner.errors import CorruptFile, StorageError, UserError
from qpruner.runs.records import digest_of
from qpruner.runs.storage.base import FILES as FILES
from qpruner.runs.storage.base import OnPiece as OnPiece
from qpruner.runs.storage.base import Storage as Storage
from qpruner.runs.storage.base import empty_folder as empty_folder
from qpruner.runs.storage.base import exclusive as exclusive
from qpruner.runs.storage.base import for_each as for_each
from qpruner.runs.storage.base import keep_copy, list_path
from qpruner.runs.storage.base import working_folder as working_folder
from qpruner.runs.storage.objects import CACHE as CACHE
from qpruner.runs.storage.objects import cache_root as cache_root
from qpruner.runs.storage.objects import mirror_of, objects_at
from qpruner.runs.storage.retry import retry_storage as retry_storage
from qpruner.runs.storage.retry import storage_error as storage_error

OWN_DIGEST = "record_digest"
"""Key in a record file for the digest of all other keys.

It is needed because damaged JSON may still be valid JSON.
"""

RecordType = TypeVar("RecordType", bound=BaseModel)


def storage_at(path: Path) -> Storage:
    """Return the storage of a path.

    It is in an object store if the path belongs to a run at a URI, and else the path itself.
    """
    return objects_at(path) or Storage(path)


def run_path(output: str | Path) -> Path:
    """Return the path on this machine for the folder or URI of a run.

    Raises:
        UserError: If the folder or URI is invalid.
    """
    if isinstance(output, str) and "://" in output:
        return mirror_of(output)
    root = Path(output).expanduser().resolve()
    for path in (root, *root.parents):
        if path.exists():
            break
    if not path.is_dir():
        raise UserError(
            f"`output`: {path} is a file, but a run is a folder; name the folder of the run"
        )
    return root


def run_root(output: str | Path) -> Path:
    """Return the path on this machine for the folder or URI of a run.

    Raises:
        UserError: If the folder or URI is invalid, or if the bucket of the URI does not answer.
    """
    root = run_path(output)
    if not isinstance(output, Path):
        _check_reachable(root)
    return root


@functools.cache
def _check_reachable(root: Path) -> None:
    objects = objects_at(root)
    if objects:
        objects.check_reachable()


def display_name(path: Path) -> str:
    """Return the path or URI that messages show for a path of a run."""
    return storage_at(path).name


def export_command(root: Path) -> str:
    """Return the command that exports the final model of a run to a folder.

    It is empty if the run is in a folder already.
    """
    storage = storage_at(root)
    if storage.fills_this_disk:
        return ""
    return f"qpruner export {shlex.quote(storage.address)} --to peft --out FOLDER"


def write_json(path: Path, data: BaseModel, patience_seconds: float | None = None) -> None:
    """Write a record as JSON with its own digest.

    A reader sees the old file or the new one, never a part.
    """
    fields = json.loads(data.model_dump_json())
    fields[OWN_DIGEST] = digest_of(fields)
    text = json.dumps(fields, indent=2, ensure_ascii=False)
    write_text(path, text + "\n", patience_seconds)


def write_text(path: Path, text: str, patience_seconds: float | None = None) -> None:
    """Write a text file; a reader sees the old file or the new one, never a part."""
    retry_storage(lambda: storage_at(path).write(text.encode()), path, patience_seconds)


def read_text(path: Path) -> str | None:
    """Read a text file; return None if it is missing."""
    try:
        return retry_storage(storage_at(path).read, path).decode()
    except FileNotFoundError:
        return None


def read_existing(path: Path, kind: type[RecordType]) -> RecordType:
    """Read a record that is known to exist.

    If it is missing, the storage must be away, so reading is tried again.
    """

    def read() -> RecordType:
        record = read_json(path, kind)
        if record is None:
            raise OSError(errno.EIO, "was written before and is missing now", display_name(path))
        return record

    return retry_storage(read, path)


def read_json(path: Path, kind: type[RecordType]) -> RecordType | None:
    """Read a record of this kind; return None if the file is missing.

    Raises:
        CorruptFile: If the file is damaged.
    """
    try:
        text = read_text(path)
        if text is None:
            return None
        fields = json.loads(text)
        if isinstance(fields, dict) and fields.pop(OWN_DIGEST, None) != digest_of(fields):
            raise ValueError(
                "the file was damaged or edited, because its contents differ from its "
                f"`{OWN_DIGEST}`"
            )
        return kind.model_validate(fields)
    except ValueError as error:  # no text, no JSON or no such record
        why = str(error)
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"])) or "its contents"
            why = f"{place}: {problem['msg']}"
            if isinstance(fields, dict):  # with the right digest, so the file is as it was written
                why += (
                    "; an earlier version of qpruner wrote it, and repeating `qpruner run` "
                    "makes it again"
                )
        raise CorruptFile(f"{display_name(path)} is not a {kind.__name__}: {why}", path) from error


def progress_seconds(path: Path) -> float:
    """Return the seconds between two writes of progress.

    The interval is longer in an object store, which charges for each write.
    """
    return 1.0 if storage_at(path).fills_this_disk else 5.0


def write_progress(path: Path, text: str) -> bool:
    """Write progress to a file without trying again; return True if that worked.

    Every other function that writes tries again while the storage is full or away.
    """
    with contextlib.suppress(OSError, StorageError):
        storage_at(path).write(text.encode(), durable=False)
        return True
    return False


def read_progress(path: Path) -> str | None:
    """Read the latest progress; return None if there is none or the storage is away."""
    with contextlib.suppress(OSError, StorageError):
        return storage_at(path).read().decode()
    return None


def exists(path: Path) -> bool:
    """Return True if there is a file at this path."""
    return retry_storage(storage_at(path).stat, path) is not None


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, read from the storage itself and not from a local copy."""
    return retry_storage(storage_at(path).digest, path)


def fetch_file(path: Path, to: Path, on_piece: OnPiece = lambda: None) -> str:
    """Copy a file of a run to this machine and return its sha256.

    A failure leaves no partial file.
    """
    try:
        return retry_storage(lambda: storage_at(path).download(to, on_piece), path)
    except Exception:
        to.unlink(missing_ok=True)
        raise


def children(folder: Path) -> list[str]:
    """List the names in a folder, sorted; empty if there is no folder."""
    return retry_storage(storage_at(folder).names, folder)


def files_in(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file in a folder and its subfolders."""
    return retry_storage(storage_at(folder).files, folder)


def folder_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder and its subfolders.

    The files are read from the storage itself.
    """
    return storage_at(folder).digests()


def published_folders(parent: Path) -> list[Path]:
    """List the complete folders inside a folder.

    On a disk these are all folders; in an object store, those with a file list.
    """
    names = children(parent)
    if storage_at(parent).fills_this_disk:
        return [parent / name for name in names if (parent / name).is_dir()]
    return [parent / name.removesuffix(FILES) for name in names if name.endswith(FILES)]


def remove(path: Path) -> None:
    """Delete a file or folder if it exists; a folder deleted in part never counts as complete."""
    retry_storage(storage_at(path).delete, path)


def quarantine(path: Path, place: Path) -> str:
    """Move a damaged file or folder below `place` to `place/damaged/`.

    Return the new path or URI.
    """
    target = place / "damaged" / f"{'-'.join(path.relative_to(place).parts)}-{time.time_ns()}"
    retry_storage(lambda: storage_at(path).move(target), path)
    return display_name(target)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """Yield a folder on this machine to write to.

    At the end of the block, write its file list and, if the run is at a URI, upload all files.
    """
    storage = storage_at(target)
    here = storage.staging
    if here == target:
        list_path(target).unlink(missing_ok=True)
    else:
        shutil.rmtree(here, ignore_errors=True)
        here.parent.mkdir(parents=True, exist_ok=True)
    yield here
    if here.is_dir():
        listed = storage.put_folder(here)
        if here != target:
            with exclusive(target):
                keep_copy(here, target, listed)


def fetch(folder: Path, on_piece: OnPiece = lambda: None) -> Path:
    """Make a folder of a run available on this machine, and return its path.

    The folder is compared once with its file list. A damaged local copy is downloaded again.

    Raises:
        CorruptFile: If the folder is damaged in the storage itself.
    """
    storage_at(folder).fetch(on_piece)
    return folder


def require_arrived(folder: Path) -> None:
    """Raise `StorageError` if a folder that another machine wrote is missing here.

    That is so on a disk that is not shared.
    """
    if not storage_at(folder).fills_this_disk:
        return
    file_list = list_path(folder)
    try:
        retry_storage(file_list.stat, file_list, was_there=True)
    except FileNotFoundError as error:
        raise StorageError(
            f"{folder} was written on another machine and is missing here",
            "share `output` between both machines, or take the other out of the cluster, "
            "then repeat the command",
        ) from error
