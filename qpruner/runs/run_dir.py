"""Name the paths of a run folder, and read and write its records.

The record of a stage is written after the files of the stage, so the files are complete once the
record exists.
"""

import uuid
from pathlib import Path

from pydantic import BaseModel

from qpruner.errors import UserError
from qpruner.runs import storage
from qpruner.runs.records import RUN_ID, PrepareRecord
from qpruner.runs.storage import RecordType, Storage

STATE = "run.json"
LOG = "qpruner.log"
BANK_CACHE = "QPRUNER_BANK_CACHE"
"""Environment variable with the folder where workers of this machine keep copies of the bank.

See `BankRecord`.
"""


class RunDir:
    """Paths and records of one run.

    `root` is the folder or URI of the run, or the path that `run_root` returned for either.
    """

    def __init__(self, root: str | Path, create: bool = True) -> None:
        self.root = storage.run_root(root)
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        self.trials = self.root / "trials"
        self.candidates = self.root / "candidates"
        self.tuned = self.root / "tuned"

    @property
    def storage(self) -> Storage:
        """The storage of the run folder."""
        return storage.storage_at(self.root)

    @property
    def place(self) -> str:
        """The folder or URI of the run, as messages name it."""
        return self.storage.name

    def require_folder(self, remedy: str) -> Path:
        """Return the run folder.

        Raises:
            UserError: If the run is in an object store; the error has the remedy.
        """
        if not self.storage.fills_this_disk:
            raise UserError(f"{self.place} is in an object store: {remedy}")
        return self.root

    @property
    def id(self) -> str:
        """The random id of the run, made at its first use.

        A later run in the same folder has another id.
        """
        path = self.root / RUN_ID
        run_id = storage.read_text(path)
        if run_id is None:
            run_id = uuid.uuid4().hex[:12]
            storage.write_text(path, run_id)
        return run_id

    def stage(self, name: str) -> Path:
        """Return the folder of a finished stage."""
        return self.root / name

    def cut(self, name: str) -> Path:
        """Return the folder of a cut: the pruned model, its tokenizer and its record.

        The cut `base` has no folder.
        """
        return self.root / "cuts" / name

    def bank(self, cut: str) -> Path:
        """Return the folder of a cut's bank."""
        return self.root / "banks" / cut

    def base_model(self, prepared: PrepareRecord) -> Path:
        """Return the folder of the base model.

        It is inside this run if the model was converted, else where the model was found.
        """
        if prepared.converted:
            return self.stage("prepare") / "model"
        return Path(prepared.model_path)

    @property
    def tune(self) -> Path:
        """The folder on this machine for the files of Ray Tune, which nothing reads back."""
        return storage.storage_at(self.root / "tune").staging

    def scratch_path(self, name: str) -> Path:
        """Return where on this machine a folder of the run is prepared before it is published."""
        if self.storage.fills_this_disk:
            return self.root / f".scratch-{name}"
        return storage.storage_at(self.stage(name)).staging

    def scratch(self, name: str) -> Path:
        """Make an empty folder in which to prepare the run's folder `name`, at its `scratch_path`.

        Anything already there is deleted.
        """
        return storage.empty_folder(self.scratch_path(name))

    def begin(self, name: str) -> Path:
        """Make the folder for a stage to write to."""
        if self.storage.fills_this_disk:
            return self.scratch(name)
        # Files are uploaded one by one; they count once the record is there.
        self.forget(name)
        return self.stage(name)

    def commit(self, name: str, written: Path, record: BaseModel, keeps_files: bool = True) -> None:
        """Publish the files that a stage wrote, unless it keeps none, then write its record."""
        if written != self.stage(name):
            self.forget(name)
            if keeps_files:
                storage.storage_at(self.stage(name)).publish(written)
            else:
                storage.for_each(storage.remove, [written, self.stage(name)])
        self.write_record(name, record)

    def write_record(self, name: str, record: BaseModel) -> None:
        """Write the record of a stage."""
        storage.write_json(self.record_path(name), record)

    def read_record(self, name: str, kind: type[RecordType]) -> RecordType | None:
        """Read the record of a stage; return None if there is none.

        Raises:
            CorruptFile: If the record is damaged.
        """
        return storage.read_json(self.record_path(name), kind)

    def write_state(self, state: BaseModel) -> None:
        """Write the state of the present command.

        Fail at once if the storage is full or cannot be reached.
        """
        storage.write_json(self.root / STATE, state, patience_seconds=0.0)

    def read_state(self, kind: type[RecordType]) -> RecordType | None:
        """Read the state of the latest command; return None before the first command."""
        return storage.read_json(self.root / STATE, kind)

    def forget(self, name: str) -> None:
        """Delete the record of a stage, so that the stage runs again."""
        storage.remove(self.record_path(name))

    def final_digests(self) -> dict[str, str]:
        """Return the sha256 of the files that differ between final models, by name.

        They are the config.json with the plan, and what was trained: the adapter or, in a model
        without one, the weights.
        """
        final = self.root / "final"
        weights = [name for name in storage.children(final) if name.endswith(".safetensors")]
        adapters = [name for name in weights if name.startswith("adapter")]
        names = ["config.json", *(adapters or sorted(weights))]
        return {name: storage.file_digest(final / name) for name in names}

    def record_path(self, name: str) -> Path:
        """Return the path of the record of a stage."""
        return self.root / "records" / f"{name}.json"
