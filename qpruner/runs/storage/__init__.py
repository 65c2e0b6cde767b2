"""A run's files, wherever they are kept: in a folder, or in an object store.

Every file of a run has a path on this machine. `storage_at` finds what is behind it: the file itself, or the object of
which the path holds this machine's copy. The functions here repeat what fails while the storage is full or away, as
`retry_storage` does.
"""

from __future__ import annotations

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
"""Key of a record's file: the digest of all other keys, since JSON with a flipped bit may still be JSON."""

RecordType = TypeVar("RecordType", bound=BaseModel)


def storage_at(path: Path) -> Storage:
    """Find what is behind a path of a run."""
    return objects_at(path) or Storage(path)


def run_path(output: str | Path) -> Path:
    """Turn a run's folder or URI into its path on this machine; the storage is not asked.

    Raises:
        UserError: If the folder, or what should hold it, is a file; or if there is no such URI.
    """
    if isinstance(output, str) and "://" in output:
        return mirror_of(output)
    root = Path(output).expanduser().resolve()
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir():
        what = "a run is a folder: name a folder, of a configuration the one that its `output` names"
        raise UserError(f"`output`: {existing} is a file, and {what}")
    return root


def run_root(output: str | Path) -> Path:
    """Turn a run's folder or URI into its path, as `run_path` does, and check that its bucket answers."""
    root = run_path(output)
    if not isinstance(output, Path):
        _check_reachable(root)
    return root


@functools.cache
def _check_reachable(root: Path) -> None:
    if there := objects_at(root):
        there.check_reachable()


def display_name(path: Path) -> str:
    """Name a path as a person knows it: a folder's path, or a URI."""
    return storage_at(path).name


def export_command(root: Path) -> str:
    """Name the command that brings a run's final model to a folder; empty where it lies in one."""
    storage = storage_at(root)
    return "" if storage.fills_this_disk else f"qpruner export {shlex.quote(storage.address)} --to peft --out FOLDER"


# ---- one file


def write_json(path: Path, data: BaseModel, patience_seconds: float | None = None) -> None:
    """Write a record with a digest of its own, as `write_text` does."""
    fields = json.loads(data.model_dump_json())
    text = json.dumps(fields | {OWN_DIGEST: digest_of(fields)}, indent=2, ensure_ascii=False)
    write_text(path, text + "\n", patience_seconds)


def write_text(path: Path, text: str, patience_seconds: float | None = None) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    retry_storage(lambda: storage_at(path).write(text.encode()), path, patience_seconds)


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
        if text is None:
            return None
        found = json.loads(text)
        if isinstance(found, dict) and found.pop(OWN_DIGEST, None) != digest_of(found):
            raise ValueError(f"it is not as it was written, by its `{OWN_DIGEST}`")
        return kind.model_validate(found)
    except ValueError as error:  # also one of pydantic; not JSON, or not even text
        why = f"{error}"
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            why = f"{'.'.join(str(part) for part in problem['loc']) or 'the whole'}: {problem['msg']}"
        raise CorruptFile(f"{display_name(path)} is not a {kind.__name__}: {why}", path) from error


def progress_seconds(path: Path) -> float:
    """Return the pause between two writes of progress to a file: an object store charges for each."""
    return 1.0 if storage_at(path).fills_this_disk else 5.0


def write_progress(path: Path, text: str) -> bool:
    """Write progress to a file, which is not durable and waits for no room; return whether that worked."""
    with contextlib.suppress(OSError, StorageError):
        storage_at(path).write(text.encode(), durable=False)
        return True
    return False


def read_progress(path: Path) -> str | None:
    """Read what `write_progress` wrote last; None before the first, and while the storage is away."""
    with contextlib.suppress(OSError, StorageError):
        return storage_at(path).read().decode()
    return None


def exists(path: Path) -> bool:
    """Whether there is a file of that name."""
    return retry_storage(storage_at(path).stat, path) is not None


def file_digest(path: Path) -> str:
    """Digest a file as the storage has it: sha256 in hex."""
    return retry_storage(storage_at(path).digest, path)


def fetch_file(path: Path, to: Path, on_piece: OnPiece = lambda: None) -> str:
    """Copy a file of a run to this machine; return the sha256. No half is left."""
    try:
        return retry_storage(lambda: storage_at(path).download(to, on_piece), path)
    except Exception:
        to.unlink(missing_ok=True)
        raise


def put_file(file: Path, target: Path) -> str:
    """Move a file from where a target is staged to the target; return its sha256."""
    sha256 = retry_storage(lambda: storage_at(target).put(file), target)
    if file != target:
        file.unlink()
    return sha256


# ---- folders


def children(folder: Path) -> list[str]:
    """Name what lies in a folder, sorted; nothing where there is no folder."""
    return retry_storage(storage_at(folder).names, folder)


def files_in(folder: Path) -> dict[str, int]:
    """Map every file in a folder and below to its bytes."""
    return retry_storage(storage_at(folder).files, folder)


def folder_digests(folder: Path) -> dict[str, str]:
    """Digest every file in a folder as the storage has it."""
    return storage_at(folder).digests()


def published_folders(parent: Path) -> list[Path]:
    """List the folders in one that are complete; in an object store those with a list."""
    names = children(parent)
    if storage_at(parent).fills_this_disk:
        return [parent / name for name in names if (parent / name).is_dir()]
    return [parent / name.removesuffix(FILES) for name in names if name.endswith(FILES)]


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there; half a folder is never taken for a complete one."""
    retry_storage(storage_at(path).delete, path)


def quarantine(path: Path, place: Path) -> str:
    """Move a damaged file or folder somewhere in `place` to its `damaged/`; return the new name."""
    target = place / "damaged" / f"{'-'.join(path.relative_to(place).parts)}-{time.time_ns()}"
    retry_storage(lambda: storage_at(path).move(target), path)
    return display_name(target)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """Yield the folder on this machine to write; its files are listed, and sent, when it is done."""
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
    """Have a folder of a run complete on this machine; return its path, which stays what it was.

    Each process compares the folder with its list once. A damaged copy is fetched again.

    Raises:
        CorruptFile: Naming the file or object that is missing or not as it was written.
    """
    storage_at(folder).fetch(on_piece)
    return folder


def require_arrived(folder: Path) -> None:
    """Raise `StorageError` if a folder that another machine wrote is not here: it may be on that machine's own disk."""
    if storage_at(folder).fills_this_disk:
        listed = list_path(folder)
        try:
            retry_storage(listed.stat, listed, was_there=True)
        except FileNotFoundError as error:
            raise StorageError(
                f"{folder} was written on another machine and is not here",
                "mount the folder of `output` there again, or take it out of the cluster, then repeat the command",
            ) from error
