"""The run folder: one class that owns every path, and the only code that commits files to it.

A stage writes into a scratch folder; `commit` makes the files durable, renames the folder into place and writes the
stage's record last. A record that can be read therefore vouches for whole files, whatever was killed and when.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from qpruner.errors import CorruptFile, UserError
from qpruner.patience import patiently

STATE = "run.json"
BANK_CACHE = "QPRUNER_BANK_CACHE"
"""Environment variable: a folder on this machine that keeps a copy of every file of a bank that its workers read."""

RecordType = TypeVar("RecordType", bound=BaseModel)


class RunDir:
    """Paths and records of one run.

    Args:
        root: The folder.
        create: Make it when it is missing.
    """

    def __init__(self, root: Path, create: bool = True) -> None:
        self.root = run_root(root)
        if create:
            self.root.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str) -> Path:
        """The committed folder of a stage."""
        return self.root / name

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
        """Ray Tune's own experiment folders: scratch, never read back."""
        return self.root / "tune"

    def scratch(self, name: str) -> Path:
        """An empty folder beside the stage's own."""
        folder = self.root / f".scratch-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit(self, name: str, scratch: Path, record: BaseModel) -> None:
        """Make a stage's scratch folder its folder and write the record, in that order."""
        self._record_path(name).unlink(missing_ok=True)
        publish_folder(scratch, self.stage(name))
        self.write_record(name, record)

    def write_record(self, name: str, record: BaseModel) -> None:
        write_json(self._record_path(name), record)

    def read_record(self, name: str, kind: type[RecordType]) -> RecordType | None:
        """A stage's record, or None when there is none; raises `CorruptFile` when it cannot be read."""
        return read_json(self._record_path(name), kind)

    def write_state(self, state: BaseModel) -> None:
        """Say where the present command stands; nobody waits for room to do so."""
        write_json(self.root / STATE, state, patience_seconds=0.0)

    def read_state(self, kind: type[RecordType]) -> RecordType | None:
        """Where the latest command stands or how it ended; None before the first."""
        return read_json(self.root / STATE, kind)

    def forget(self, name: str) -> None:
        """Drop a stage's record, so that it is run again."""
        self._record_path(name).unlink(missing_ok=True)

    def _record_path(self, name: str) -> Path:
        return self.root / "records" / f"{name}.json"


def run_root(output: Path) -> Path:
    """The run folder as a full path; `UserError` when it, or what should hold it, is a file."""
    root = output.expanduser().resolve()
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"`output`: {existing} is a file; name a folder")
    return root


def write_json(path: Path, data: BaseModel, patience_seconds: float | None = None) -> None:
    """Write a record, as `write_text` does."""
    write_text(path, data.model_dump_json(indent=2) + "\n", patience_seconds)


def write_text(path: Path, text: str, patience_seconds: float | None = None) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it; waits as `patiently` does."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)

    patiently(write, path, patience_seconds)


def read_written(path: Path, kind: type[RecordType]) -> RecordType:
    """Read a record that was written before: one that is missing means that the storage is away."""

    def read() -> RecordType:
        record = read_json(path, kind)
        if record is None:
            raise OSError(errno.EIO, "was written and is missing", str(path))
        return record

    return patiently(read, path)


def read_json(path: Path, kind: type[RecordType]) -> RecordType | None:
    """Read what `write_json` wrote; None when the file is missing, `CorruptFile` when it is not a `kind`."""
    try:
        return kind.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise CorruptFile(f"{path} is not a {kind.__name__}: {place}: {problem['msg']}", path) from error
    except ValueError as error:  # not JSON, or not even text
        raise CorruptFile(f"{path} is not a {kind.__name__}: {error}", path) from error


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def publish_folder(scratch: Path, target: Path) -> None:
    """Make a finished folder durable and move it to its name, which must be free or hold an unfinished attempt."""

    def make_durable() -> None:
        for path in (scratch, *scratch.rglob("*")):
            _sync(path)

    def move() -> None:
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)

    for step in (make_durable, move, lambda: _sync(target.parent)):
        patiently(step, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
