"""The prepare stage: provide the base model in a folder and encode the data."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qpruner.config.schema import DataSource, ModelConfig, RunConfig
from qpruner.data.encoding import (
    encode,
    importance_samples,
    pack,
    save_encoded,
    sensitivity_samples,
)
from qpruner.models.checkpoint import Base, prepare_base
from qpruner.models.loading import OnWork, load_tokenizer, resolve_source
from qpruner.pipeline.context import Context
from qpruner.pipeline.preflight_rows import SPLITS
from qpruner.pipeline.stage import Stage
from qpruner.runs.events import Emit, Progress
from qpruner.runs.records import PrepareRecord
from qpruner.runs.storage import fetch, file_digest, require_arrived, writing_folder


class Prepare(Stage[PrepareRecord]):
    """Provide the base model in a folder and encode the data."""

    name = "prepare"
    help = "Provide the base model in a folder and encode the data."
    record = PrepareRecord
    starts_ray = False

    def inputs(self) -> tuple[Any, ...]:
        config = self.config
        return (
            config.model,
            config.data,
            config.calibration,
            config.seed,
            *_source_digests(config),
        )

    def detail(self) -> str:
        return f"base model {self.config.model.source}, encoding the data"

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        folder = scratch / "model"
        # Other machines see the storage of the run, but not the hub cache of this machine.
        is_shared = bool(context.address) or not context.run_dir.storage.fills_this_disk
        provide = partial(_provide_base, context.worker_config.model, folder, is_shared)
        base = context.machines.executor.run(provide, context.emit)
        if base.converted:
            require_arrived(folder)
        return {
            # Relative to the run folder, whose path differs between machines.
            "model_path": "prepare/model" if base.converted else str(base.path),
            "converted": base.converted,
            "num_rows": _encode_splits(context, str(fetch(Path(base.path))), scratch / "data"),
        }

    def summary(self, record: PrepareRecord) -> str:
        return ", ".join(f"{count} {name}" for name, count in record.num_rows.items()) + " rows"

    def disk_bytes(self) -> int:
        base = self.context.inspection.shapes.base
        return base.num_parameters * base.element_bytes


def _provide_base(model: ModelConfig, target: Path, is_shared: bool, emit: Emit) -> Base:
    """Load the base model.

    Write to `target` what was converted from .gguf, or a hub model if nodes share the run.
    """
    with writing_folder(target) as folder:
        base = prepare_base(model, folder, is_shared, loading_progress(emit, "prepare"))
    return replace(base, path=str(target)) if base.converted else base


def loading_progress(emit: Emit, stage: str) -> OnWork:
    """Return a callback that reports the progress of named work as progress of a stage.

    Such work is, for example, loading weights.
    """
    return lambda what, done, total: emit(Progress(stage, done, total, what))


def _encode_splits(context: Context, model_path: str, folder: Path) -> dict[str, int]:
    """Encode every split and the calibration samples; return the number of rows by split."""
    config = context.config
    settings = config.data
    tokenizer = load_tokenizer(model_path)
    examples = context.inspection.rows.examples
    splits = {}
    for name in SPLITS:
        splits[name] = encode(
            examples[name],
            tokenizer,
            settings.max_length,
            settings.template,
            settings.response_only,
        )
    if settings.packing:
        splits["train"] = pack(splits["train"], settings.max_length)
    splits["importance"] = importance_samples(config, examples["calibration"], tokenizer)
    splits["sensitivity"] = sensitivity_samples(config, examples["train"], tokenizer)
    for name, rows in splits.items():
        save_encoded(rows, folder / name)
    return {name: len(rows) for name, rows in splits.items()}


def _source_digests(config: RunConfig) -> list[str]:
    """List the sha256 of every local file that the stage reads; sources on the hub have none."""
    sources: list[DataSource] = [
        *config.data.train,
        *config.data.validation,
        *config.data.confirmation,
    ]
    sources += config.calibration.data or ()
    names = [source.source for source in sources] + [config.model.source]
    paths = [Path(resolve_source(name, "source")) for name in names]
    files = [path for path in paths if path.is_file()]
    if paths[-1].is_dir():
        files += sorted(path for path in paths[-1].rglob("*") if path.is_file())
    return [file_digest(path) for path in files]
