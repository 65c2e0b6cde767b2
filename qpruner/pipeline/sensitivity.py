"""The sensitivity stage: how much each group suffers at fewer bits, method by method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from qpruner.config.schema import EXPANSION, INFORMATION, MEASUREMENT, RunConfig
from qpruner.errors import CorruptFile
from qpruner.pipeline.prepare import telling
from qpruner.pipeline.stage import Stage
from qpruner.runs.events import Emit, Message, Progress
from qpruner.runs.records import BankRecord, MethodScores, PruneRecord, SensitivityRecord, digest_of
from qpruner.runs.storage import children, exists, quarantine, read_json, remove, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qpruner.cluster.executor import ModelCache
    from qpruner.pipeline.context import Context
    from qpruner.sensitivity.measurement import Measurement
    from qpruner.sensitivity.methods import Subject


class Sensitivity(Stage[SensitivityRecord]):
    """Score how much each group suffers at fewer bits; scores of the same inputs are reused."""

    name = "sensitivity"
    help = "Run up to the sensitivities."
    record = SensitivityRecord
    keeps_scratch = True
    memory_keys = "`sensitivity.batch_size` or `data.max_length`"

    @override
    def inputs(self) -> tuple[Any, ...]:
        return (self._scores_digest(), self.config.measured_methods)

    def _scores_digest(self) -> str:
        """Digest of what every method's scores depend on."""
        config = self.config
        return digest_of(
            "scores",
            self.context.record(PruneRecord).digest,
            self.context.record(BankRecord).digest,
            config.sensitivity.model_copy(update={"methods": ()}),
            config.quantize.group,
            config.quantize.bits,
            config.seed,
        )

    @override
    def detail(self) -> str:
        return ", ".join(self.config.measured_methods) or "nothing to measure"

    @override
    def run(self, scratch: Path) -> dict[str, Any]:
        context, digest = self.context, self._scores_digest()
        for name, scores in _earlier_scores(context, scratch, digest):
            write_json(scratch / name, scores)
        files = {method: scratch / f"{method}-{digest}.json" for method in self.config.measured_methods}
        missing = {method for method, file in files.items() if not exists(file)}
        for method, scores in _scored(context, missing):
            write_json(scratch / f"{method}-{digest}.json", scores)
            self.tell(f"{_range(method, scores)} {scores.unit}, {scores.seconds:.1f} s")
        methods = {method: read_json(file, MethodScores) for method, file in files.items()}
        return {"groups": tuple(group.name for group in context.layout.groups), "methods": methods}

    @override
    def summary(self, record: SensitivityRecord) -> str:
        ranges = ", ".join(_range(method, scores) for method, scores in record.methods.items())
        bits = self.config.quantize.bits
        about = f"{min(bits)} less {max(bits)} bits: {ranges}" if ranges else "nothing measured"
        return f"{len(record.groups)} groups, {about}"


def _earlier_scores(context: Context, scratch: Path, digest: str) -> Iterator[tuple[str, MethodScores]]:
    """Yield scores of the same inputs that an earlier stage or a killed command left; a damaged file is set aside."""
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
            text = f"warning: {error}; set aside in {where}, its scores are made anew"
            context.emit(Message("sensitivity", text))
            continue
        if scores:
            yield file.name, scores


def _range(method: str, scores: MethodScores) -> str:
    lowest, highest = (scores.values[level(scores.values)] for level in (min, max))
    rises = [low - high for low, high in zip(lowest, highest, strict=True)]
    return f"{method} {min(rises):.3g} to {max(rises):.3g}"


def _scored(context: Context, missing: set[str]) -> Iterator[tuple[str, MethodScores]]:
    """Compute the scores of the missing methods, and of those that come from the same passes."""
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
            yield from context.executor.run(score, job, context.emit).items()
    if missing.intersection(MEASUREMENT):
        started = time.monotonic()
        found = _measured(context, job)
        yield from scoring.by_measurement(found, subject.levels, time.monotonic() - started).items()


@dataclass(frozen=True)
class ScoringJob:
    """What a sensitivity is computed from, wherever the pruned model is."""

    config: RunConfig
    checkpoint: Path
    subject: Subject

    def model(self, cache: ModelCache, emit: Emit) -> PreTrainedModel:
        """Load the pruned model, or take the one that is at hand."""
        return cache.pruned_model(self.checkpoint, self.config.model.dtype, telling(emit, "sensitivity"))


def score_information(job: ScoringJob, cache: ModelCache, emit: Emit) -> dict[str, MethodScores]:
    """Score the groups by mutual information."""
    from qpruner.sensitivity import methods as scoring

    config, model = job.config, job.model(cache, emit)
    told, samples = _teller(emit, INFORMATION), _teller(emit, (*INFORMATION, "samples"))
    return scoring.by_information(model, job.subject, config.sensitivity, config.seed, told, samples)


def score_expansion(job: ScoringJob, cache: ModelCache, emit: Emit) -> dict[str, MethodScores]:
    """Score the groups by the Taylor expansion of the loss."""
    from qpruner.sensitivity import methods as scoring

    told = _teller(emit, EXPANSION)
    return scoring.by_expansion(job.model(cache, emit), job.subject, job.config.sensitivity.batch_size, told)


def measure_all(job: ScoringJob, cache: ModelCache, emit: Emit) -> Measurement:
    """Measure KL and loss of every group, on every sample."""
    from qpruner.sensitivity.measurement import measure

    model, settings = job.model(cache, emit), job.config.sensitivity
    samples = job.subject.samples(settings.batch_size, settings.num_measured_samples)
    return measure(model, samples.by_length, job.subject.starts(model), _teller(emit, MEASUREMENT))


def _teller(emit: Emit, methods: Sequence[str]) -> Callable[[int, int], None]:
    return lambda done, total: emit(Progress("sensitivity", done, total, ", ".join(methods)))


def _measured(context: Context, job: ScoringJob) -> Measurement:
    """Measure KL and loss of every group, the samples shared among the slots."""
    from qpruner.cluster.tasks import run_tasks
    from qpruner.sensitivity.measurement import Measurement
    from qpruner.sensitivity.methods import MeasurementJob, measure_share

    slots = context.known_slots
    num_slots = slots.fits(context.trial_resources) if context.address else int(slots.gpus)
    if num_slots <= 1:
        return context.executor.run(measure_all, job, context.emit)
    # Every slot loads the model, the one that held it too.
    context.executor.close()
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
