"""The run folder: one class that names every path of a run, and reads and writes its records.

A stage's record is written last, so a record that can be read vouches for complete files, whatever was killed and when.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pydantic import BaseModel

from qpruner.errors import UserError
from qpruner.runs.records import RUN_ID, PrepareRecord
from qpruner.runs.storage import (
    RecordType,
    Storage,
    empty_folder,
    file_digest,
    read_json,
    read_text,
    remove,
    run_root,
    storage_at,
    write_json,
    write_text,
)

STATE, LOG = "run.json", "qpruner.log"
BANK_CACHE = "QPRUNER_BANK_CACHE"
"""Environment variable: a folder on this machine that keeps a copy of every file of a bank that its workers read."""


class RunDir:
    """Paths and records of one run: `root` is its folder or URI, or the path that `run_root` makes of it.

    Raises:
        UserError: If it is a file, or a URI that cannot be one of a run or does not answer.
    """

    def __init__(self, root: str | Path, create: bool = True) -> None:
        self.root = run_root(root)
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        self.trials = self.root / "trials"
        self.candidates = self.root / "candidates"

    @property
    def storage(self) -> Storage:
        """Where the run is kept."""
        return storage_at(self.root)

    @property
    def place(self) -> str:
        """Where the run is, as a person knows it."""
        return self.storage.name

    def require_folder(self, remedy: str) -> Path:
        """Return the run's folder; `UserError` with the remedy if its files are in an object store."""
        if not self.storage.fills_this_disk:
            raise UserError(f"{self.place} is in an object store: {remedy}")
        return self.root

    @property
    def id(self) -> str:
        """The run's own name, made when it is first asked for: another run in a folder of this name has another."""
        path = self.root / RUN_ID
        found = read_text(path)
        if found is None:
            found = uuid.uuid4().hex[:12]
            write_text(path, found)
        return found

    def stage(self, name: str) -> Path:
        """Name the committed folder of a stage."""
        return self.root / name

    def base_model(self, prepared: PrepareRecord) -> Path:
        """Name the folder of the base model: where it was found, or in this run, which may have moved since."""
        return self.stage("prepare") / "model" if prepared.converted else Path(prepared.model_path)

    @property
    def tune(self) -> Path:
        """Ray Tune's own experiment folders, on this machine; nothing reads them back."""
        return storage_at(self.root / "tune").staging

    def scratch_path(self, name: str) -> Path:
        """Name the folder of this machine in which a folder is prepared."""
        if self.storage.fills_this_disk:
            return self.root / f".scratch-{name}"
        return storage_at(self.stage(name)).staging

    def scratch(self, name: str) -> Path:
        """Make an empty folder on this machine, which is published when it is finished."""
        return empty_folder(self.scratch_path(name))

    def begin(self, name: str, resume: bool = False) -> Path:
        """Make the folder that a stage writes into; with `resume` what a killed command left is kept."""
        if not self.storage.fills_this_disk:  # files are sent one by one, and the record vouches for them
            self.forget(name)
            return self.stage(name)
        if not resume:
            return self.scratch(name)
        folder = self.scratch_path(name)
        folder.mkdir(exist_ok=True)
        return folder

    def commit(self, name: str, written: Path, record: BaseModel) -> None:
        """Publish what a stage wrote as its folder, then write its record."""
        if written != self.stage(name):
            self.forget(name)
            storage_at(self.stage(name)).publish(written)
        self.write_record(name, record)

    def has_folder(self, name: str) -> bool:
        """Whether a recorded stage still has its folder; an object store keeps no empty folders to tell."""
        return not self.storage.fills_this_disk or self.stage(name).is_dir()

    def write_record(self, name: str, record: BaseModel) -> None:
        """Write a stage's record."""
        write_json(self.record_path(name), record)

    def read_record(self, name: str, kind: type[RecordType]) -> RecordType | None:
        """Read a stage's record; None when there is none. `CorruptFile` when it cannot be read."""
        return read_json(self.record_path(name), kind)

    def write_state(self, state: BaseModel) -> None:
        """Write where the present command stands; nobody waits for room to do so."""
        write_json(self.root / STATE, state, patience_seconds=0.0)

    def read_state(self, kind: type[RecordType]) -> RecordType | None:
        """Read where the latest command stands or how it ended; None before the first."""
        return read_json(self.root / STATE, kind)

    def forget(self, name: str) -> None:
        """Delete a stage's record, so that the stage runs again."""
        remove(self.record_path(name))

    def final_digests(self) -> dict[str, str]:
        """Digest what tells the final model from an earlier one: the adapter, and config.json with its plan."""
        return {name: file_digest(self.root / "final" / name) for name in ("adapter_model.safetensors", "config.json")}

    def record_path(self, name: str) -> Path:
        """Name a stage's record."""
        return self.root / "records" / f"{name}.json"
