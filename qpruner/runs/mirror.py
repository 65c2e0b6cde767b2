"""Folders of a run and the lists that vouch for their files; this machine's copies of those in an object store.

A store has no rename. A folder's files are put first and the list of their digests last, beside it: without the list
there is no folder, and what is fetched is compared with it. A folder on disk that was `written`, and this machine's
copy of one in a store, has the same list beside it, and each process compares it once, before it uses what lies there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from qpruner.errors import CorruptFile, StorageError
from qpruner.runs.object_store import Objects, OnPiece, each, is_mirror, name_of, objects_at, scratch_of, sha256_of
from qpruner.runs.retry import patiently

FILES = ".files.json"
"""Ending of a folder's list: `prune.files.json` beside `prune/`."""
WAITING_SECONDS = 0.1


class FileList(BaseModel):
    """A folder is what this says: sha256 of each file, by its name from there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: dict[str, str]


logger = logging.getLogger(__name__)

_found_whole: dict[Path, FileList] = {}
"""Folders on disk that this process wrote or has compared, with what their lists said."""


def put_folder(folder: Path, target: Path) -> FileList:
    """Put the files of a folder on this machine to where the target stands for, and their list last.

    What lay there has no list meanwhile, so that nobody takes it for whole.
    """
    there = objects_at(target)
    assert there is not None
    listed = list_of(there)
    patiently(listed.delete, target)
    names = _files_of(folder)
    digests = each(lambda name: patiently(lambda: (there / name).upload(folder / name), target / name), names)
    found = FileList(sha256=dict(zip(names, digests, strict=True)))
    patiently(lambda: listed.write(found.model_dump_json().encode()), target)
    stale = sorted(set(patiently(there.files, target)) - set(names))
    each(lambda name: patiently((there / name).delete, target), stale)
    return found


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A place on this machine to write the folder that is to lie at `target`.

    On disk that is the target itself; its list is made when it is done, while the files are still in memory. For an
    object store it is sent then, if anything was written, and stays as this machine's copy.
    """
    if not is_mirror(target):
        list_beside(target).unlink(missing_ok=True)
        yield target
        if target.is_dir():
            share_files(target)
            patiently(lambda: _list_files(target), target)
        return
    here = scratch_of(target)
    shutil.rmtree(here, ignore_errors=True)
    here.parent.mkdir(parents=True, exist_ok=True)
    yield here
    if here.is_dir():
        files = put_folder(here, target)
        with one_at_a_time(target):
            _keep(here, target, files)


def fetch(folder: Path, on_piece: OnPiece = lambda: None) -> Path:
    """Have a folder of a run on this machine, whole; returns its path, which stays what it was.

    A folder of a run on disk is there already, and is compared with its list once a process; one without a list is
    taken as it is. Of an object store's, a machine has one copy for all its processes, for as long as the list of its
    files is the same; each process compares it once, several at a time, and fetches it anew where it is damaged.

    Args:
        folder: Where it lies, or is to lie.
        on_piece: Hears that something moves.

    Raises:
        CorruptFile: Naming the file or object that is missing or not as it was written.
    """
    there = objects_at(folder)
    if there is None:
        if read_list(folder) != _found_whole.get(folder):
            check(folder, on_piece)
        return folder
    wanted = _listed(there, folder)
    while True:
        with one_at_a_time(folder, on_piece, fcntl.LOCK_SH):
            if _is_kept(folder, wanted, on_piece):
                return folder
            seen = _state_of(list_beside(folder))
        with one_at_a_time(folder, on_piece):
            if seen == _state_of(list_beside(folder)):  # else another process has fetched it since
                _bring(there, folder, wanted, on_piece)
                return folder


def _is_kept(folder: Path, wanted: FileList, on_piece: OnPiece) -> bool:
    """Whether this machine's copy is whole and of the folder as it is in the store now."""
    if not folder.is_dir() or _kept(folder) != wanted:
        return False
    if _found_whole.get(folder) != wanted:
        try:
            _check_files(wanted, folder, on_piece)
        except CorruptFile as error:
            logger.warning("%s is not as it was fetched: all of %s is fetched again", error.path, name_of(folder))
            return False
    return True


def _bring(there: Objects, folder: Path, wanted: FileList, on_piece: OnPiece) -> None:
    """Fetch a folder in place of what this machine has of it."""
    here = emptied(scratch_of(folder))

    def bring(name: str) -> str | None:
        try:
            return patiently(lambda: (there / name).download(here / name, on_piece), folder / name)
        except FileNotFoundError:
            return None

    _compare(wanted, each(bring, list(wanted.sha256)), folder)
    _keep(here, folder, wanted)


def check(folder: Path, on_piece: OnPiece = lambda: None) -> None:
    """Compare a folder with its list, if it has one, whatever this process knows of it.

    Of objects those are read that were put no sooner than their list: the others have not changed since.

    Raises:
        CorruptFile: Naming the file or object that is missing or not as it was written.
    """
    there = objects_at(folder)
    if there:
        if patiently(list_of(there).is_object, folder):
            _check_objects(there, folder)
    elif listed := read_list(folder):
        _check_files(listed, folder, on_piece)


def _check_files(listed: FileList, folder: Path, on_piece: OnPiece) -> None:
    """Compare files of this machine, or that it sees, with their list."""
    _compare(listed, each(lambda name: _digest(folder / name, on_piece), list(listed.sha256)), folder)
    _found_whole[folder] = listed


def _check_objects(there: Objects, folder: Path) -> None:
    listed, put = _listed(there, folder), patiently(there.times, folder)
    since = patiently(list_of(there).modified, folder)
    doubtful = {name: sha256 for name, sha256 in listed.sha256.items() if put.get(name, since) >= since}

    def digest(name: str) -> str | None:
        return patiently((there / name).digest, folder / name) if name in put else None

    _compare(FileList(sha256=doubtful), each(digest, list(doubtful)), folder)


def check_arrived(folder: Path) -> None:
    """Refuse a folder that another machine was to write if it is not here: it may have gone to that one's own disk.

    Raises:
        StorageError: If its list, which comes last, is still missing after a while.
    """
    if is_mirror(folder):
        return
    listed = list_beside(folder)
    try:
        patiently(listed.stat, listed, was_there=True)
    except FileNotFoundError as error:
        raise StorageError(
            f"{folder} was written on another machine and is not here",
            "mount the folder of `output` there again, or take it out of the cluster, then repeat the command",
        ) from error


def read_list(folder: Path) -> FileList | None:
    """The list beside a folder on disk, or of this machine's copy; None where there is none."""
    listed = list_beside(folder)
    try:
        return FileList.model_validate_json(patiently(listed.read_bytes, listed))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CorruptFile(f"{listed} is damaged", listed) from error


def adopt_list(scratch: Path, target: Path) -> None:
    """Move the list of a folder that was just written to where the folder is now, which need not be read for it."""
    listed = read_list(scratch)
    if listed:
        rename(list_beside(scratch), list_beside(target))
        _found_whole[target] = listed


def rename(path: Path, target: Path) -> None:
    """Rename what is known to be there. A storage that goes away may do so and not answer; a repetition, its own or
    ours, is then told that there is nothing of that name."""
    try:
        path.replace(target)
    except FileNotFoundError:
        target.stat()


def share_files(folder: Path) -> None:
    """Let those who may read a folder read its files, too: safetensors writes for its owner alone."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readable)


def put_folders(parent: Path) -> list[Path]:
    """The folders in one that were put there whole."""
    there = objects_at(parent)
    if there:
        names = patiently(there.names, parent)
        return [parent / name.removesuffix(FILES) for name in names if name.endswith(FILES)]
    return [path for path in parent.glob("*") if path.is_dir()]


def emptied(folder: Path) -> Path:
    """A folder on this machine with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def workplace(folder: Path) -> Path:
    """Where a process writes what it sends piece by piece: the folder itself, or scratch on this machine for it."""
    return scratch_of(folder) if is_mirror(folder) else folder


@contextmanager
def one_at_a_time(path: Path, on_piece: OnPiece = lambda: None, lock: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the folder that something is to lie in, so that the processes of this machine fetch it once; those that wait
    say so, since they are not what hangs. With `LOCK_SH` others that only read may hold it, too."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        while not _taken(descriptor, lock):
            on_piece()
            time.sleep(WAITING_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int, lock: int) -> bool:
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def list_of(there: Objects) -> Objects:
    """What lists the files of a folder, and vouches for it."""
    return Objects(there.scheme, there.bucket, there.query, there.key + FILES)


def list_beside(folder: Path) -> Path:
    """The list of a folder on disk."""
    return folder.with_name(folder.name + FILES)


def _listed(there: Objects, folder: Path) -> FileList:
    """The list as it is in the store."""
    try:
        return FileList.model_validate_json(patiently(list_of(there).read, folder))
    except FileNotFoundError as error:
        message = f"{there} is not there, or was not put whole: it has no {list_of(there)}"
        raise CorruptFile(message, folder) from error
    except ValidationError as error:
        raise CorruptFile(f"{list_of(there)} is damaged", folder) from error


def _keep(here: Path, folder: Path, files: FileList) -> None:
    """Make a folder this machine's copy; the list goes first and comes last, when the files are on the disk."""
    mark = list_beside(folder)
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in (here, *here.rglob("*")):
        sync(path)
    here.rename(folder)
    sync(folder.parent)
    mark.write_text(files.model_dump_json(), encoding="utf-8")
    _found_whole[folder] = files


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state_of(file: Path) -> tuple[int, int] | None:
    """What tells a file from one that was written in its place; None where there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _kept(folder: Path) -> FileList | None:
    """The list of this machine's copy."""
    try:
        return read_list(folder)
    except CorruptFile:
        return None


def _files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _list_files(folder: Path) -> None:
    names = _files_of(folder)
    digests = each(lambda name: sha256_of(folder / name), names)
    listed = FileList(sha256=dict(zip(names, digests, strict=True)))
    list_beside(folder).write_text(listed.model_dump_json(), encoding="utf-8")
    _found_whole[folder] = listed


def _digest(file: Path, on_piece: OnPiece) -> str | None:
    try:
        return patiently(lambda: sha256_of(file, on_piece), file)
    except FileNotFoundError:
        return None


def _compare(wanted: FileList, found: list[str | None], folder: Path) -> None:
    """Name the first file that is not as its list says."""
    for (name, sha256), digest in zip(wanted.sha256.items(), found, strict=True):
        if digest != sha256:
            state = "missing" if digest is None else "damaged"
            text = f"{name_of(folder / name)} is {state}: its sha256 is not what {name_of(list_beside(folder))} says"
            raise CorruptFile(text, folder / name)
