"""The one-time stages around the cut: prepare, bank, sensitivity."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.cluster.workshop import Bench
from qpruner.config.schema import EXPANSION, INFORMATION, MEASUREMENT, DataSource, ModelConfig, RunConfig
from qpruner.errors import CorruptFile
from qpruner.pipeline.context import Context
from qpruner.pipeline.stage import Stage, run_stage
from qpruner.runs.events import Emit, Message, Progress
from qpruner.runs.records import BankRecord, MethodScores, PrepareRecord, PruneRecord, SensitivityRecord, digest_of
from qpruner.runs.storage import (
    children,
    exists,
    fetch,
    file_digest,
    quarantine,
    read_json,
    remove,
    require_arrived,
    write_json,
    writing_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qpruner.data.sources import Example
    from qpruner.models.checkpoint import Base
    from qpruner.models.loading import OnLoading
    from qpruner.sensitivity.measurement import Measurement
    from qpruner.sensitivity.methods import Subject


def prepare(context: Context) -> PrepareRecord:
    """The base model as a folder, and every split encoded once."""
    stage = prepare_stage(context)

    def work(scratch: Path) -> dict[str, Any]:
        is_shared = bool(context.address) or context.run_dir.storage.is_read_anywhere
        job = BaseJob(context.worker_config.model, scratch / "model", is_shared)
        base = context.workshop.do(bring_base, job, context.emit)
        if base.converted:
            require_arrived(job.folder)
        counts = _encode_splits(context, str(fetch(Path(base.path))), scratch / "data")
        return {
            # In the run's own folder, which has another path on each machine and may be moved.
            "model_path": "prepare/model" if base.converted else str(base.path),
            "converted": base.converted,
            "source_bytes": base.source_bytes,
            "num_rows": counts,
        }

    def figures(record: PrepareRecord) -> str:
        return ", ".join(f"{count} {name}" for name, count in record.num_rows.items()) + " rows"

    return run_stage(context, stage, PrepareRecord, work, figures)


def prepare_stage(context: Context) -> Stage:
    """What `prepare` depends on."""
    config = context.config
    inputs = (config.model, config.data, config.calibration, config.seed, *_source_digests(context))
    return Stage("prepare", f"base model {config.model.source}, encoding the data", inputs)


@dataclass(frozen=True)
class BaseJob:
    """Where the base model is to be.

    Attributes:
        model: The configuration's section.
        folder: Where its files go if it is none yet.
        is_shared: Other machines read it too, and see the run's storage, but not each other's caches of the hub.
    """

    model: ModelConfig
    folder: Path
    is_shared: bool


def bring_base(job: BaseJob, bench: Bench, emit: Emit) -> Base:
    """The base model as a folder."""
    from qpruner.models.checkpoint import prepare_base

    with writing_folder(job.folder) as folder:
        base = prepare_base(job.model, folder, job.is_shared, telling(emit, "prepare"))
    return replace(base, path=str(job.folder)) if base.converted else base


def telling(emit: Emit, stage: str) -> OnLoading:
    """Tells of weights on their way as a stage's progress."""
    return lambda what, done, total: emit(Progress(stage, done, total, what))


def sensitivity(context: Context, pruned: PruneRecord, banked: BankRecord) -> SensitivityRecord:
    """How much each group suffers at fewer bits, method by method; scores of the same inputs are taken over."""
    config = context.config
    stage = sensitivity_stage(context, pruned, banked)
    digest = stage.inputs[0]

    def work(scratch: Path) -> dict[str, Any]:
        for name, scores in _earlier_scores(context, scratch, digest):
            write_json(scratch / name, scores)
        files: dict[str, Path] = {method: scratch / f"{method}-{digest}.json" for method in config.measured_methods}
        missing = {method for method, file in files.items() if not exists(file)}
        for method, scores in _scored(context, missing):
            write_json(scratch / f"{method}-{digest}.json", scores)
            context.emit(Message("sensitivity", f"{_range(method, scores)} {scores.unit}, {scores.seconds:.1f} s"))
        methods = {method: read_json(file, MethodScores) for method, file in files.items()}
        return {"groups": tuple(group.name for group in context.layout.groups), "methods": methods}

    def figures(record: SensitivityRecord) -> str:
        ranges = ", ".join(_range(method, scores) for method, scores in record.methods.items())
        bits = config.quantize.bits
        about = f"{min(bits)} less {max(bits)} bits: {ranges}" if ranges else "nothing measured"
        return f"{len(record.groups)} groups, {about}"

    record = run_stage(context, stage, SensitivityRecord, work, figures)
    # Its memory is needed before the trials start.
    context.workshop.close()
    return record


def sensitivity_stage(context: Context, pruned: PruneRecord, banked: BankRecord) -> Stage:
    """What `sensitivity` depends on: the digest of every method's scores, and which methods are asked for."""
    config, settings = context.config, context.config.sensitivity
    inputs = (
        pruned.digest,
        banked.digest,
        settings.model_copy(update={"methods": ()}),
        config.quantize.group,
        config.quantize.bits,
        config.seed,
    )
    named = ", ".join(config.measured_methods) or "nothing to measure"
    return Stage("sensitivity", named, (digest_of("scores", *inputs), config.measured_methods), resumes=True)


def _earlier_scores(context: Context, scratch: Path, digest: str) -> Iterator[tuple[str, MethodScores]]:
    """Scores of the same inputs by the name of their file, of an earlier stage and of a killed command, which leaves
    nothing else; one that is damaged is set aside."""
    stage, is_wanted = context.run_dir.stage("sensitivity"), f"-{digest}.json"
    if scratch != stage:  # as at a URI
        for name in children(scratch):
            if not name.endswith(is_wanted):
                remove(scratch / name)
    files = {name: folder / name for folder in (stage, scratch) for name in children(folder)}
    for file in (file for name, file in files.items() if name.endswith(is_wanted)):
        try:
            scores = read_json(file, MethodScores)
        except CorruptFile as error:
            where = quarantine(file, context.run_dir.root)
            context.emit(Message("sensitivity", f"warning: {error}; set aside in {where}, its scores are made anew"))
            continue
        if scores:
            yield file.name, scores


def _range(method: str, scores: MethodScores) -> str:
    lowest, highest = (scores.values[level(scores.values)] for level in (min, max))
    rises = [low - high for low, high in zip(lowest, highest, strict=True)]
    return f"{method} {min(rises):.3g} to {max(rises):.3g}"


def _scored(context: Context, missing: set[str]) -> Iterator[tuple[str, MethodScores]]:
    """Scores of the methods that are missing, and of those that come from the same passes."""
    from qpruner.data.encoding import load_encoded
    from qpruner.models.loading import load_tokenizer
    from qpruner.sensitivity import methods as scoring

    config = context.config
    subject = scoring.Subject(
        rows=list(load_encoded(context.data / "sensitivity")),  # they travel to other machines, a mapped file does not
        pad_id=int(load_tokenizer(str(context.checkpoint)).pad_token_id),
        group=config.quantize.group,
        levels=config.quantize.bits,
        bank=context.bank,
        scaling=config.lora.alpha / config.lora.rank,
    )
    job = ScoringJob(config, context.checkpoint, subject)
    for methods, score in ((INFORMATION, score_information), (EXPANSION, score_expansion)):
        if missing.intersection(methods):
            yield from context.workshop.do(score, job, context.emit).items()
    if missing.intersection(MEASUREMENT):
        started = time.monotonic()
        found = _measured(context, job)
        yield from scoring.by_measurement(found, subject.levels, time.monotonic() - started).items()


@dataclass(frozen=True)
class ScoringJob:
    """What a sensitivity needs, wherever the pruned model is.

    Attributes:
        config: The run's configuration.
        checkpoint: Folder of the pruned model.
        subject: What is scored, and on what.
    """

    config: RunConfig
    checkpoint: Path
    subject: Subject

    def model(self, bench: Bench, emit: Emit) -> PreTrainedModel:
        return bench.pruned_model(self.checkpoint, self.config.model.dtype, telling(emit, "sensitivity"))


def score_information(job: ScoringJob, bench: Bench, emit: Emit) -> dict[str, MethodScores]:
    from qpruner.sensitivity import methods as scoring

    config, model = job.config, job.model(bench, emit)
    told, samples = _teller(emit, INFORMATION), _teller(emit, (*INFORMATION, "samples"))
    return scoring.by_information(model, job.subject, config.sensitivity, config.seed, told, samples)


def score_expansion(job: ScoringJob, bench: Bench, emit: Emit) -> dict[str, MethodScores]:
    from qpruner.sensitivity import methods as scoring

    told = _teller(emit, EXPANSION)
    return scoring.by_expansion(job.model(bench, emit), job.subject, job.config.sensitivity.batch_size, told)


def measure_all(job: ScoringJob, bench: Bench, emit: Emit) -> Measurement:
    """KL and loss of every group, on every sample."""
    from qpruner.sensitivity.measurement import measure

    model, settings = job.model(bench, emit), job.config.sensitivity
    samples = job.subject.samples(settings.batch_size, settings.num_measured_samples)
    return measure(model, samples.by_length, job.subject.starts(model), _teller(emit, MEASUREMENT))


def _teller(emit: Emit, methods: Sequence[str]) -> Callable[[int, int], None]:
    return lambda done, total: emit(Progress("sensitivity", done, total, ", ".join(methods)))


def _measured(context: Context, job: ScoringJob) -> Measurement:
    """KL and loss of every group, the samples shared among the slots where several are there."""
    from qpruner.cluster.cluster import run_tasks
    from qpruner.sensitivity.measurement import Measurement
    from qpruner.sensitivity.methods import MeasurementJob, measure_share

    slots = context.known_slots
    num_slots = slots.fits(context.trial_resources) if context.address else int(slots.gpus)
    if num_slots <= 1:
        return context.workshop.do(measure_all, job, context.emit)
    # Every slot loads the model, the one that held it too.
    context.workshop.close()
    settings = context.config.sensitivity
    samples = job.subject.samples(settings.batch_size, settings.num_measured_samples).by_length
    resources, num_shares = context.task_resources(min(num_slots, len(samples.rows)))
    jobs = [
        MeasurementJob(
            checkpoint=context.checkpoint,
            dtype=context.config.model.dtype,
            subject=replace(job.subject, rows=samples.rows[share::num_shares]),
            batch_size=settings.batch_size,
            threads=int(resources.get("cpu", 1)),
        )
        for share in range(num_shares)
    ]
    told, parts = _teller(context.emit, MEASUREMENT), dict[int, Measurement]()
    for position, part in run_tasks(
        measure_share,
        jobs,
        resources,
        num_shares,
        fresh=False,
        check_node=context.check_node,
        on_held=context.gpu_time.add,
    ):
        parts[position] = part
        told(len(parts), num_shares)
    return Measurement.joined([parts[position] for position in sorted(parts)])


def _encode_splits(context: Context, model_path: str, folder: Path) -> dict[str, int]:
    """Encode every split and the calibration samples; returns rows by split."""
    from qpruner.data.encoding import SENSITIVITY_KEYS, pack, row_samples, save_encoded, shuffled
    from qpruner.models.loading import load_tokenizer

    config, settings = context.config, context.config.data
    tokenizer = load_tokenizer(model_path)
    examples = context.inspection.examples
    splits = {name: encode_split(config, examples[name], tokenizer) for name in ("train", "validation", "confirmation")}
    if settings.packing:
        splits["train"] = pack(splits["train"], settings.max_length)
    vocabulary = context.inspection.model_config.vocab_size
    splits["importance"] = importance_samples(config, examples["calibration"], vocabulary, tokenizer)
    # Sensitivities are about the target task, so they take training rows whatever importance is calibrated on.
    task_rows, number = shuffled(examples["train"], config.seed), config.calibration.num_sensitivity_samples
    splits["sensitivity"] = row_samples(
        task_rows, tokenizer, number, settings.max_length, settings.template, True, SENSITIVITY_KEYS
    )
    for name, rows in splits.items():
        save_encoded(rows, folder / name)
    return {name: len(rows) for name, rows in splits.items()}


def encode_split(
    config: RunConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, list[int]]]:
    """Rows of a split as the model sees them, one an example."""
    from qpruner.data.encoding import encode

    settings = config.data
    return encode(examples, tokenizer, settings.max_length, settings.template, settings.response_only)


def importance_samples(
    config: RunConfig, examples: Sequence[Example], vocabulary: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, list[int]]]:
    """What importance is measured on: given token ids, or packed samples or rows in the order of a shuffle."""
    from qpruner.data.encoding import load_token_ids, packed_samples, row_samples, shuffled

    settings, data = config.calibration, config.data
    if settings.token_ids:
        return load_token_ids(Path(settings.token_ids), vocabulary)
    rows = shuffled(examples, config.seed)
    take = packed_samples if settings.packing else row_samples
    return take(rows, tokenizer, settings.num_samples, settings.max_length, data.template, data.response_only)


def _source_digests(context: Context) -> list[str]:
    """sha256 of every local file the stage reads; hub sources are told by id, revision and split."""
    from qpruner.models.loading import resolve_source

    config = context.config
    sources: list[DataSource] = [*config.data.train, *config.data.validation, *config.data.confirmation]
    sources += config.calibration.data or ()
    names = [source.source for source in sources] + [config.model.source]
    paths = [Path(resolve_source(name, "source")) for name in names]
    files = [path for path in paths if path.is_file()]
    if config.calibration.token_ids:
        files.append(Path(config.calibration.token_ids))
    folder = paths[-1]
    if folder.is_dir():
        files += sorted(path for path in folder.rglob("*") if path.is_file())
    return [file_digest(path) for path in files]
