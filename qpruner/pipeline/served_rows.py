"""Write models for other servers, and measure the rows of stage serve.

They are measured in turns in one new process.
"""

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner.config.schema import RunConfig
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import OnWork, load_dense, load_tokenizer
from qpruner.pipeline.final_model import write_final
from qpruner.pipeline.prepare import loading_progress
from qpruner.plans.plan import Layout
from qpruner.quantization.formats import format_of
from qpruner.runs.events import Emit, Message, Progress
from qpruner.runs.records import (
    BASE,
    CONFIRMATION,
    SEARCHED,
    FineTune,
    ServedForm,
    ServedRow,
    ServeSetting,
)
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import empty_folder, fetch, remove, storage_at, writing_folder
from qpruner.training.jobs import FineTuneJob
from qpruner.wording import counted

UNPACKED = "f16"  # format of the base model's file
PROMPT_TOKENS, NEW_TOKENS, WARM_UP_TOKENS = 128, 32, 16
NUM_TURNS = 3
PLAN = "plan"  # `ServedRow.format` of a fine-tuned model
# tokens per second of prefill and of decode, and the loss in the first turn
Turn = tuple[float, float, float | None]


@dataclass(frozen=True)
class Served:
    """A row, and the files that llama.cpp loads to measure it, if any."""

    row: ServedRow
    model: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class ServeJob:
    """The work of the stage.

    It has folders, the winner, and the fine-tuned models that are measured beside it.
    """

    config: RunConfig
    root: Path
    base: Path
    data: Path
    scratch: Path
    threads: int
    layout: Layout
    winner: FineTune
    others: tuple[FineTuneJob, ...] = ()


def serve(job: ServeJob, emit: Emit) -> dict[str, Any]:
    """Write every form and the base model, then measure them; return fields of `ServeRecord`."""
    from qpruner.export.gguf.isolation import isolated

    on_progress, settings = loading_progress(emit, "serve"), job.config.serve
    forms = [_export(job, form, emit, on_progress) for form in settings.to]
    if not settings.uses_llama_cpp:
        setting = ServeSetting(
            threads=job.threads, build="", prompt_tokens=0, new_tokens=0, num_rows=0
        )
        return {"rows": [each.row for each in forms], "setting": setting}
    work = storage_at(job.scratch / "base").staging
    try:
        rows = [write_base(job.config, fetch(job.base), empty_folder(work), on_progress)]
        for other in job.others:
            rows += write_fine_tuned(other, work / other.record.name, on_progress)
        for each in isolated(measure_in_turns, job, [*rows, *forms]):
            if isinstance(each, dict):
                return each
            emit(Progress("serve", *each, "turns of loss and speed"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    raise AssertionError("the last step has the results")


def _export(job: ServeJob, form: ServedForm, emit: Emit, on_progress: OnWork) -> Served:
    """Write the final model in one form, and check it; return its row."""
    from qpruner.export.forms import export

    place = job.scratch / form
    remove(place)  # of a worker that died
    with writing_folder(place) as folder:
        done = export(RunDir(job.root, create=False), form, folder, on_progress)
    names = [
        path.relative_to(place).as_posix() for path in sorted(place.rglob("*")) if path.is_file()
    ]
    same = f"{done.agreement:.1%} of {counted(done.num_positions, 'prediction')}"
    alike = f"{same} are those of the same weights in transformers"
    row = ServedRow(
        name=SEARCHED,
        form=form,
        format=PLAN,
        has_adapter=job.winner.method == "adapter" and not form.endswith("_merged"),
        files=tuple(f"serve/{form}/{name}" for name in names),
        file_bytes=done.file_bytes,
        mean_bits=_mean_bits(job, done.recoded),
        check=f"loaded again by {done.by}: {alike}, KL divergence {done.divergence:.2g} nats",
        recoded=dict(done.recoded),
    )
    emit(
        Message(
            "serve",
            f"{form}: {row.file_bytes / 1e6:.1f} MB, {'; '.join((row.check, *done.remarks))}",
        )
    )
    return Served(row, *(place / name for name in sorted(names, key=len) if name.endswith(".gguf")))


def _mean_bits(job: ServeJob, recoded: Mapping[str, str]) -> float:
    """Return the mean bits of the blocks' weights in files.

    Some layers have another format in the files.
    """
    bits, total = 0.0, 0
    for group in job.layout.groups:
        for linear in group.linears if not group.is_table else ():
            bits += (
                linear.num_weights
                * format_of(recoded.get(linear.name, job.winner.plan[group.name])).bits
            )
            total += linear.num_weights
    return bits / total


# ---- files of the base model


def write_base(config: RunConfig, base: Path, folder: Path, on_progress: OnWork) -> Served:
    """Write the base model as a GGUF file in float16."""
    from qpruner.export.gguf.writing import write_gguf

    model = load_dense(str(base), config.model.dtype, config.model, on_progress)
    tokenizer = load_tokenizer(str(base))
    file = folder / f"base-{UNPACKED}.gguf"
    save_checkpoint(model.half(), tokenizer, folder / UNPACKED)
    del model
    write_gguf(folder / UNPACKED, file, file.stem, on_progress)
    return _in_llama_cpp(BASE, UNPACKED, 16.0, file)


def write_fine_tuned(job: FineTuneJob, folder: Path, on_progress: OnWork) -> list[Served]:
    """Write a fine-tuned model as GGUF files.

    No row is returned if llama.cpp lacks its formats.
    """
    from qpruner.export.gguf import writing

    record = job.record
    formats = map(format_of, record.plan.values())
    if any(chosen.is_packed and not chosen.ggml_type for chosen in formats):
        return []
    folder.mkdir(parents=True)
    if job.merges:
        checkpoint = fetch(job.trained)
    else:
        checkpoint = folder / PLAN
        write_final(job, checkpoint, lambda event: None)
    files = [folder / "model.gguf"]
    writing.write_gguf(checkpoint, files[0], record.name, on_progress)
    if record.method == "adapter" and not job.merges:
        files.append(folder / "adapter.gguf")
        writing.write_adapter(checkpoint, files[1], on_progress)
    return [_in_llama_cpp(record.name, PLAN, record.mean_bits, *files)]


def _in_llama_cpp(name: str, format_name: str, mean_bits: float, *files: Path) -> Served:
    row = ServedRow(
        name=name,
        form="gguf",
        format=format_name,
        has_adapter=len(files) > 1,
        mean_bits=mean_bits,
        file_bytes=sum(file.stat().st_size for file in files),
    )
    return Served(row, *files)


# ---- measurement


def measure_in_turns(
    job: ServeJob, served: Sequence[Served]
) -> Iterator[tuple[int, int] | dict[str, Any]]:
    """Measure speed, and the loss in the first turn.

    Yield done and total turns, then the setting and all rows.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # llama.cpp may be a build for GPUs
    from qpruner.data.encoding import load_encoded, load_scored
    from qpruner.export.gguf.llama_cpp import build

    ids = [token for row in load_encoded(job.data / "confirmation") for token in row["input_ids"]]
    prompt = (ids * -(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]
    judging = load_scored(job.data, CONFIRMATION)
    measured = [each for each in served if each.model]
    turns: list[list[Turn]] = [[] for _ in measured]
    total = NUM_TURNS * len(measured)
    yield 0, total
    for turn in range(total):
        position = turn % len(measured)
        rows = judging if turn < len(measured) else []
        turns[position].append(_take_turn(job, measured[position], prompt, rows))
        yield turn + 1, total
    found = {}
    for each, of_row in zip(measured, turns, strict=True):
        prefill, decode, losses = zip(*of_row, strict=True)
        speeds = {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
        found[id(each)] = each.row.model_copy(update={"loss": losses[0], **speeds})
    about = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "num_rows": len(judging)}
    setting = ServeSetting(threads=job.threads, build=build(), **about)
    yield {"rows": [found.get(id(each), each.row) for each in served], "setting": setting}


def _take_turn(job: ServeJob, served: Served, prompt: list[int], rows: Sequence[Any]) -> Turn:
    from qpruner.export.gguf.llama_cpp import Llama

    assert served.model
    loss = _loss(job, served, rows) if rows else None
    with Llama(served.model, served.adapter, job.threads, PROMPT_TOKENS + NEW_TOKENS) as llama:
        llama.prefill(prompt[:WARM_UP_TOKENS])
        llama.decode(1)
        start = time.perf_counter()
        llama.prefill(prompt)
        read = time.perf_counter()
        llama.decode(NEW_TOKENS)
        return PROMPT_TOKENS / (read - start), NEW_TOKENS / (time.perf_counter() - read), loss


def _loss(job: ServeJob, served: Served, rows: Sequence[Any]) -> float | None:
    from qpruner.data.losses import loss_result
    from qpruner.export.gguf.llama_cpp import Llama

    assert served.model
    with Llama(
        served.model, served.adapter, job.threads, max(len(row["input_ids"]) for row in rows)
    ) as llama:
        found = [llama.loss(row["input_ids"], row["labels"]) for row in rows]
    if not all(math.isfinite(total) for total, _ in found):
        # llama.cpp rounds the inputs of F16 weights to F16, where those of some models are infinite
        return None
    return loss_result(*zip(*found, strict=True)).mean
