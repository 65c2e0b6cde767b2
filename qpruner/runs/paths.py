"""The run's storage, a folder or the URI of an object store: one class that owns every path, and the only code that
reads, lists, writes and commits what lies there.

In a folder a stage writes into a scratch folder; `commit` makes the files durable, renames the folder into place and
writes the stage's record last. An object store has no rename: the files are put where they belong, then a list of their
digests beside them, then the record. Either way a record that can be read vouches for whole files, whatever was killed
and when. Paths of a run at a URI lie in its mirror on this machine (`objects`, `mirror`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qpruner.errors import CorruptFile, StorageError, UserError
from qpruner.runs.mirror import FILES, adopt_list, emptied, list_beside, list_of, put_folder, rename, share_files, sync
from qpruner.runs.object_store import (
    OnPiece,
    address_of,
    copy_file,
    each,
    is_mirror,
    mirror_of,
    name_of,
    objects_at,
    scratch_of,
    sha256_of,
)
from qpruner.runs.records import RUN_ID, PrepareRecord, digest_of
from qpruner.runs.retry import patiently

STATE, LOG = "run.json", "qpruner.log"
BANK_CACHE = "QPRUNER_BANK_CACHE"
"""Environment variable: a folder on this machine that keeps a copy of every file of a bank that its workers read."""

OWN_DIGEST = "record_digest"
"""Key of a record's file: digest of all its other keys, since with a flipped bit JSON may well be JSON still."""

SIGN_SECONDS, SIGN_SECONDS_AT_URI = 1.0, 5.0

RecordType = TypeVar("RecordType", bound=BaseModel)
Result = TypeVar("Result")


class RunDir:
    """Paths and records of one run.

    Args:
        root: The folder or URI; the mirror of a URI, too.
        create: Make the folder when it is missing; else it is one that a person looks for.

    Raises:
        UserError: If it is a file, or a URI that cannot be one of a run or is not answered at.
    """

    def __init__(self, root: str | Path, create: bool = True) -> None:
        self.root = run_root(root, is_sought=not create)
        if create:
            self.root.mkdir(parents=True, exist_ok=True)

    @property
    def place(self) -> str:
        """Where the run is, as a person knows it."""
        return name_of(self.root)

    @property
    def address(self) -> str:
        """What a command takes for the run, a URI with all that it needs to be reached."""
        return address_of(self.root)

    @property
    def is_at_uri(self) -> bool:
        """Whether it lies in an object store, so that any machine may take it up."""
        return is_mirror(self.root)

    @property
    def id(self) -> str:
        """The folder's own, made when it is first asked for: another run in a folder of the same name has another."""
        path = self.root / RUN_ID
        found = read_text(path)
        if found is None:
            found = uuid.uuid4().hex[:12]
            write_text(path, found)
        return found

    def stage(self, name: str) -> Path:
        """The committed folder of a stage."""
        return self.root / name

    def base_model(self, prepared: PrepareRecord) -> Path:
        """Folder of the base model: where it was found, or, if `prepare` wrote it, in this run, which may have been
        moved or copied since."""
        return self.stage("prepare") / "model" if prepared.converted else Path(prepared.model_path)

    @property
    def trials(self) -> Path:
        """One folder a trial: its record and its last checkpoint."""
        return self.root / "trials"

    @property
    def candidates(self) -> Path:
        """One folder a row of the final table."""
        return self.root / "candidates"

    @property
    def tune(self) -> Path:
        """Ray Tune's own experiment folders, on this machine: scratch, never read back."""
        return scratch_of(self.root / "tune") if self.is_at_uri else self.root / "tune"

    def scratch_path(self, name: str) -> Path:
        """Where this machine prepares a folder, what a killed command left of it included."""
        return scratch_of(self.root / name) if self.is_at_uri else self.root / f".scratch-{name}"

    def scratch(self, name: str) -> Path:
        """An empty folder on this machine, for what `publish_folder` is to move."""
        return emptied(self.scratch_path(name))

    def begin(self, name: str, goes_on: bool = False) -> Path:
        """Where a stage writes: a scratch folder beside its own, or at a URI its own, from which its record is gone.

        Args:
            name: The stage.
            goes_on: Whether it takes over what a killed command left in the scratch folder.
        """
        if self.is_at_uri:
            self.forget(name)
            return self.stage(name)
        if not goes_on:
            return self.scratch(name)
        scratch = self.scratch_path(name)
        scratch.mkdir(exist_ok=True)
        return scratch

    def commit(self, name: str, scratch: Path, record: BaseModel) -> None:
        """Make a stage's scratch folder its folder and write the record, in that order."""
        if not self.is_at_uri:
            self.forget(name)
            publish_folder(scratch, self.stage(name))
        self.write_record(name, record)

    def has_folder(self, name: str) -> bool:
        """Whether a recorded stage has its folder; an object store has no empty ones, so there the record suffices."""
        return self.is_at_uri or self.stage(name).is_dir()

    def write_record(self, name: str, record: BaseModel) -> None:
        write_json(self.record_path(name), record)

    def read_record(self, name: str, kind: type[RecordType]) -> RecordType | None:
        """A stage's record, or None when there is none; raises `CorruptFile` when it cannot be read."""
        return read_json(self.record_path(name), kind)

    def write_state(self, state: BaseModel) -> None:
        """Say where the present command stands; nobody waits for room to do so."""
        write_json(self.root / STATE, state, patience_seconds=0.0)

    def read_state(self, kind: type[RecordType]) -> RecordType | None:
        """Where the latest command stands or how it ended; None before the first."""
        return read_json(self.root / STATE, kind)

    def forget(self, name: str) -> None:
        """Drop a stage's record, so that it is run again."""
        remove(self.record_path(name))

    def final_digests(self) -> dict[str, str]:
        """What tells the final model from an earlier one: sha256 of the adapter, and of config.json with its plan."""
        return {name: file_digest(self.root / "final" / name) for name in ("adapter_model.safetensors", "config.json")}

    def record_path(self, name: str) -> Path:
        """A stage's record."""
        return self.root / "records" / f"{name}.json"


def run_root(output: str | Path, is_sought: bool = False) -> Path:
    """The run folder as a full path, or the mirror of a URI whose bucket answers.

    Args:
        output: The folder or URI.
        is_sought: It is one that a person looks for, not the `output` of a configuration.

    Raises:
        UserError: If the folder, or what should hold it, is a file; or if there is no such URI or bucket.
    """
    if isinstance(output, str) and "://" in output:
        root = mirror_of(output)
        _check_answers(root)
        return root
    root = Path(output).expanduser().resolve()
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir() and is_sought:
        raise UserError(
            f"{existing} is a file, and a run is a folder: of a configuration give the folder that its `output` names"
        )
    if not existing.is_dir():
        raise UserError(f"`output`: {existing} is a file; name a folder")
    return root


@functools.cache
def _check_answers(root: Path) -> None:
    there = objects_at(root)
    assert there is not None
    there.check_bucket()


# ---- one file


def write_json(path: Path, data: BaseModel, patience_seconds: float | None = None) -> None:
    """Write a record with a digest of its own, as `write_text` does."""
    fields = json.loads(data.model_dump_json())
    text = json.dumps(fields | {OWN_DIGEST: digest_of(fields)}, indent=2, ensure_ascii=False)
    write_text(path, text + "\n", patience_seconds)


def write_text(path: Path, text: str, patience_seconds: float | None = None) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it; waits as `patiently` does."""
    there = objects_at(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")

    def write() -> None:
        if there:
            there.write(text.encode())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        rename(aside, path)
        sync(path.parent)

    patiently(write, path, patience_seconds)


def read_text(path: Path) -> str | None:
    """What `write_text` wrote; None when the file is missing."""
    there = objects_at(path)
    try:
        return patiently(there.read, path).decode() if there else path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def read_written(path: Path, kind: type[RecordType]) -> RecordType:
    """Read a record that was written before: one that is missing means that the storage is away."""

    def read() -> RecordType:
        record = read_json(path, kind)
        if record is None:
            raise OSError(errno.EIO, "was written and is missing", name_of(path))
        return record

    return patiently(read, path)


def read_json(path: Path, kind: type[RecordType]) -> RecordType | None:
    """Read what `write_json` wrote, of older versions, too; None when the file is missing.

    Raises:
        CorruptFile: If it is not a `kind`, or not as it was written.
    """
    try:
        text = read_text(path)
        return None if text is None else kind.model_validate(_as_written(text))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise CorruptFile(f"{name_of(path)} is not a {kind.__name__}: {place}: {problem['msg']}", path) from error
    except ValueError as error:  # not JSON, or not even text
        raise CorruptFile(f"{name_of(path)} is not a {kind.__name__}: {error}", path) from error


def _as_written(text: str) -> Any:
    """What a record's file holds; of those that older versions wrote none has a digest of its own."""
    found = json.loads(text)
    if isinstance(found, dict) and OWN_DIGEST in found:
        told = found.pop(OWN_DIGEST)
        if told != digest_of(found):
            raise ValueError(f"it is not as it was written, as its `{OWN_DIGEST}` tells")
    return found


def for_each(action: Callable[[Path], Result], paths: Sequence[Path]) -> list[Result]:
    """Do something for each of a run's paths; requests to an object store are on their way together."""
    if paths and is_mirror(paths[0]):
        return each(action, list(paths))
    return [action(path) for path in paths]


def sign_seconds(path: Path) -> float:
    """How often a sign of life is worth its writing: a store takes money for each."""
    return SIGN_SECONDS_AT_URI if is_mirror(path) else SIGN_SECONDS


def write_sign(path: Path, text: str) -> bool:
    """Tell of progress; not made durable, since it says nothing after a crash, and not waited for: a full disk is met,
    waited for and told of where results are written. Returns whether it was written."""
    there, aside = objects_at(path), path.with_suffix(".new")
    with contextlib.suppress(OSError, StorageError):
        if there:
            there.write(text.encode())
        else:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        return True
    return False


def read_sign(path: Path) -> str | None:
    """What `write_sign` wrote last; None before the first, and while the storage is away."""
    there = objects_at(path)
    with contextlib.suppress(OSError, StorageError):
        return there.read().decode() if there else path.read_text(encoding="utf-8")
    return None


def exists(path: Path) -> bool:
    """Whether there is a file of that name; waits as `patiently` does."""
    there = objects_at(path)

    def is_file() -> bool:
        # `Path.is_file` takes a storage that is away for a no from Python 3.14 on.
        try:
            return stat.S_ISREG(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    return patiently(there.is_object if there else is_file, path)


def file_digest(path: Path) -> str:
    """sha256 of a file as the storage has it, in hex; `FileNotFoundError` where there is none."""
    there = objects_at(path)
    return patiently(there.digest if there else functools.partial(sha256_of, path), path)


def fetch_file(path: Path, to: Path, on_piece: OnPiece = lambda: None) -> str:
    """Copy a file of a run to this machine; returns the sha256 of the copy. Waits as `patiently` does; no half is left.

    Args:
        path: The file.
        to: Where the copy goes.
        on_piece: Hears that something moves.
    """
    there = objects_at(path)
    try:
        return patiently(lambda: there.download(to, on_piece) if there else copy_file(path, to, on_piece), path)
    except Exception:
        to.unlink(missing_ok=True)
        raise


def put_file(file: Path, target: Path) -> str:
    """Move a file of this machine to where it belongs, if it does not lie there already; returns its sha256."""
    there = objects_at(target)
    if there is None:
        assert file == target
        return file_digest(file)
    sha256 = patiently(lambda: there.upload(file), target)
    file.unlink()
    return sha256


def send_file(path: Path) -> None:
    """Send a file that lies in the mirror, such as a log, once; `OSError` or `StorageError` if that fails."""
    there = objects_at(path)
    assert there is not None
    there.upload(path)


# ---- folders


def children(folder: Path) -> list[str]:
    """Names of what lies in a folder, sorted; none where there is no folder."""
    there = objects_at(folder)
    if there:
        return patiently(there.names, folder)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def files_in(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder and below, by its path from there."""
    there = objects_at(folder)
    if there:
        return patiently(there.files, folder)
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder as the storage has it, by its path from there."""
    names = sorted(files_in(folder))
    return dict(zip(names, for_each(file_digest, [folder / name for name in names]), strict=True))


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there; half a folder is never taken for the whole."""
    there = objects_at(path)
    if there:
        lists = [there / name for name in files_in(path) if name.endswith(FILES)]
        for doomed in (*lists, list_of(there), there):
            patiently(doomed.delete, path)

    def delete() -> None:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        list_beside(path).unlink(missing_ok=True)
        aside = path.with_name(f".{path.name}.doomed")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    patiently(delete, path)


def move(path: Path, target: Path) -> Path:
    """Move a file or folder of the run; returns where it is now."""
    there, to = objects_at(path), objects_at(target)
    if there and to:
        patiently(lambda: there.move(to), path)
        with contextlib.suppress(FileNotFoundError):
            patiently(lambda: list_of(there).move(list_of(to)), path)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)  # first: what lies somewhere without its list is taken as it is
    with contextlib.suppress(FileNotFoundError):
        list_beside(path).rename(list_beside(target))
    return target


def set_aside(path: Path, place: Path) -> str:
    """Move a damaged file or folder somewhere in `place` into its `damaged/`; tells where it is now."""
    name = "-".join(path.relative_to(place).parts)
    return name_of(move(path, place / "damaged" / f"{name}-{time.time_ns()}"))


def publish_folder(scratch: Path, target: Path) -> None:
    """Make a finished folder durable and move it to its name, which must be free or hold an unfinished attempt."""
    if is_mirror(target):
        put_folder(scratch, target)
        shutil.rmtree(scratch)
        list_beside(scratch).unlink(missing_ok=True)
        return

    def make_durable() -> None:
        share_files(scratch)
        for path in (scratch, *scratch.rglob("*")):
            sync(path)
        if list_beside(scratch).exists():
            sync(list_beside(scratch))

    def move() -> None:
        if scratch.exists():  # else it lies at its target by now
            list_beside(target).unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
        rename(scratch, target)

    for step in (make_durable, move, lambda: adopt_list(scratch, target), lambda: sync(target.parent)):
        patiently(step, target)
