"""Write fine-tuned models as checkpoints: as they are, or merged and then rounded.

Worker processes run this.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.layout import group_paths
from qpruner.models.loading import checkpoint_config, load_tokenizer, reporting_tensors
from qpruner.models.memory import begin_job
from qpruner.pipeline.prepare import loading_progress
from qpruner.runs import storage
from qpruner.runs.events import Emit
from qpruner.runs.records import FineTune
from qpruner.training.checkpoints import TRAINED_WEIGHTS, load_trained
from qpruner.training.jobs import FineTuneJob, score


def write_final(job: FineTuneJob, folder: Path, emit: Emit) -> None:
    """Write packed weights, tokenizer and any adapter of a fine-tuned model in a folder.

    Transformers loads the folder after `import qpruner.hf`.
    """
    from qpruner.quantization.assembly import assemble

    on_progress, trained = loading_progress(emit, "finetune"), storage.fetch(job.trained)
    with reporting_tensors(on_progress):
        model, _ = assemble(job.bank, job.record.plan, tuned=job.tuned)
    if job.record.method == "scales":
        load_trained(model, trained)
    scratch = storage.empty_folder(storage.storage_at(folder.with_name(f".{folder.name}")).staging)
    with storage.writing_folder(scratch):
        save_checkpoint(model, load_tokenizer(str(job.bank.checkpoint)), scratch, on_progress)
        if job.record.method == "adapter":
            for file in ("adapter_config.json", TRAINED_WEIGHTS["adapter"]):
                shutil.copy2(trained / file, scratch / file)
    storage.storage_at(folder).publish(scratch)


def merge(job: FineTuneJob) -> FineTune:
    """Write the model of a merging job, and score it.

    Returns:
        The record, with the figures of the fine-tune that it comes from.
    """
    from qpruner.export.recode import recode

    assert job.merges is not None
    started = time.monotonic()
    begin_job(job.threads)
    trained = storage.read_existing(job.merges.folder / "record.json", FineTune)
    unpacked = job.folder / "unpacked"
    write_final(job.merges, unpacked, lambda event: None)

    source = storage.fetch(unpacked)
    paths = group_paths(checkpoint_config(source), job.bank.grouping)
    formats = {path: name for group, name in job.record.plan.items() for path in paths[group]}
    scratch = storage.empty_folder(storage.storage_at(job.folder / "merging").staging)
    with storage.writing_folder(scratch):
        recode(source, scratch, lambda name, columns: name, merge=True, fixed=formats)
    storage.storage_at(job.trained).publish(scratch)
    storage.remove(unpacked)

    of_training = {
        "steps": trained.steps,
        "train_loss": trained.train_loss,
        "peak_memory_bytes": trained.peak_memory_bytes,
        "memory_counter": trained.memory_counter,
        "trained_sha256": trained.trained_sha256,
        "seconds": time.monotonic() - started,
    }
    return score(replace(job, record=job.record.model_copy(update=of_training)))
