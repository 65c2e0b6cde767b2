"""The bank stage: pack every group (layers that share a format) once for all trials; reuse an earlier bank.

The entries of the unpruned model are made when a plan first needs them, see `add_entries`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.cluster.executor import ModelCache
from qpruner.config.schema import RunConfig
from qpruner.data.encoding import load_encoded
from qpruner.errors import CorruptFile
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline.context import Context
from qpruner.pipeline.preflight import Inspection, check_offers, check_quantizable
from qpruner.pipeline.prepare import loading_progress
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import EMBEDDINGS, HEAD, UNPRUNED, Layout, PrecisionPlan
from qpruner.quantization.formats import PAPER, format_of, formats
from qpruner.report.results import MUTUAL_INFORMATION
from qpruner.runs.events import Emit, Progress
from qpruner.runs.records import BankRecord, PrepareRecord, PruneRecord, digest_of
from qpruner.runs.storage import display_name, files_in, remove, write_json, writing_folder

if TYPE_CHECKING:
    from qpruner.quantization.bank import BankIndex, GroupJob, IndexEntry

Wanted = Mapping[str, tuple[str, ...]]
"""Group -> formats to pack it in."""


class Bank(Stage[BankRecord]):
    """Write one entry (a file) for each group and format: packed weights and initial weights of the adapter."""

    name = "bank"
    help = "Run up to the bank of packed weights and adapter starts."
    record = BankRecord
    keeps_scratch = True
    repairs_files = True

    @property
    def _layout(self) -> Layout:
        return self.context.layout_of(self.context.reference)

    @property
    def _wanted(self) -> Wanted:
        """Every group in every packed format that it takes."""
        return {
            group.name: tuple(level for level in group.formats if format_of(level).is_packed)
            for group in self._layout.groups
        }

    def inputs(self) -> tuple[Any, ...]:
        from qpruner.quantization.bank import entry_digest

        context = self.context
        # The trials of controls depend on this digest too, and need entries of other formats.
        levels = {*self._layout.levels, *context.layout_of(UNPRUNED).levels, *PAPER}
        packed = sorted(level for level in levels if format_of(level).is_packed)
        return (made_from(context, context.reference), self._wanted, [entry_digest("", level) for level in packed])

    @property
    def _levels(self) -> tuple[str, ...]:
        return tuple(level for level in self._layout.levels if format_of(level).is_packed)

    def check(self) -> None:
        check_quantizable(self.context.inspection.model_config)

    def begin(self) -> None:
        """Restore a damaged index `bank.json` from the record. Delete the record if an entry is, to rerun the stage."""
        from qpruner.quantization import bank as store

        bank, record, index = self.context.bank_of(self.context.reference), None, None
        with suppress(CorruptFile):  # `run_stage` reports it
            record = self.matching_record(self.digest)
        if record is None:
            return
        with suppress(CorruptFile):
            index = store.read_index(bank)
        if index is None or index.digest != record.digest:
            path = bank / store.INDEX
            self.notify(f"{display_name(path)} is missing, damaged or of another bank; it is made from the record")
            write_json(path, self._index_from(record))
        intact = store.intact_files(bank, record.files)
        damaged = [name for name in record.files if name not in intact]
        for name in damaged:
            self.notify(f"{display_name(bank / name)} is missing or damaged; only this file is built again")
        if damaged:
            self.context.forget(self.name)

    def _index_from(self, record: BankRecord) -> BankIndex:
        """Make `bank.json` from the bank's record: inputs, sha256 and errors of each entry."""
        from qpruner.quantization import bank as store

        files, inputs = {}, made_from(self.context, self.context.reference)
        for level, by_group in record.residual_ratio.items():
            for group, ratio in by_group.items():
                name, error = str(store.entry_file(Path(), group, level)), record.error[level][group]
                errors = {"residual_ratio": ratio, "error": error}
                digest = store.entry_digest(inputs, level)
                files[name] = store.IndexEntry(inputs=digest, sha256=record.files[name], **errors)
        return store.BankIndex(digest=record.digest, files=files)

    def detail(self) -> str:
        rounding = ", GPTQ" if self.config.quantize.rounding == "gptq" else ""
        return f"packing every group as {', '.join(self._levels) or 'it is'}{rounding}, {self.config.lora.init} start"

    def run(self, scratch: Path) -> dict[str, Any]:
        from qpruner.quantization import bank as store

        context, wanted, layout = self.context, self._wanted, self._layout
        check_offers(self.config, layout, context.on_gpu)
        files = _reuse_entries(context.bank_of(context.reference), scratch, made_from(context, context.reference))
        index = store.BankIndex(digest=self.digest, files=files)
        write_json(scratch / store.INDEX, index)
        built = _add(self, scratch, context.reference, wanted, index)
        files = {name: built[name] for name in sorted(_names(wanted))}
        sizes = files_in(scratch)
        by_level: dict[str, dict[str, IndexEntry]] = {level: {} for level in self._levels}
        for group, levels in wanted.items():
            for level in levels:
                by_level[level][group] = files[str(store.entry_file(Path(), group, level))]
        packed = {level: layout.group_bytes(level) for level in layout.levels}
        names = [group.name for group in layout.groups]
        return {
            "cut": context.reference,
            "files": {name: entry.sha256 for name, entry in files.items()},
            "bytes": sum(sizes[name] for name in files),
            "residual_ratio": {
                level: {name: each.residual_ratio for name, each in of.items()} for level, of in by_level.items()
            },
            "error": {level: {name: each.error for name, each in of.items()} for level, of in by_level.items()},
            "group_bytes": {
                level: {name: size for name, size in zip(names, sizes, strict=True) if size is not None}
                for level, sizes in packed.items()
            },
        }

    def summary(self, record: BankRecord) -> str:
        means = {level: sum(of.values()) / len(of) for level, of in record.error.items() if of}
        left = ", ".join(f"{level} {mean**0.5:.3f}" for level, mean in means.items())
        size = f"{len(record.files)} entries, {record.bytes / 1e6:.0f} MB"
        return f"{size}; relative error of the weights with adapters: {left}" if left else size

    def disk_bytes(self) -> int:
        from qpruner.pruning.grams import gram_bytes

        inspection, gptq = self.context.inspection, self.config.quantize.rounding == "gptq"
        grams = sum(gram_bytes(inspection.base, inspection.model_config)) if gptq else 0
        return bank_bytes(self.config, inspection) + grams


def bank_bytes(config: RunConfig, inspection: Inspection) -> int:
    """Estimate the bytes of the entries of a run, those of its controls included; adapters are in float32."""
    base, pruned, size = inspection.base, inspection.reference, 0
    for layout in inspection.layouts.values():
        for level in layout.levels:
            if format_of(level).is_packed:
                size += sum(each or 0 for each in layout.group_bytes(level)) + layout.trained_bytes
    extra = [level for level in PAPER if level not in pruned.levels]
    if extra and MUTUAL_INFORMATION in config.measured_methods:  # one plan of formats that are not the run's
        blocks = [group for group in pruned.groups if group.name not in (EMBEDDINGS, HEAD)]
        size += sum(group.packed_bytes(extra[-1], pruned.element_bytes) for group in blocks) + pruned.trained_bytes
    if not config.prune.is_off:  # two plans, each in the budget or the smallest
        smallest, largest = base.plan_bytes(base.smallest()), base.plan_bytes(base.largest())
        plan_bytes = max(smallest, min(inspection.budget_bytes, largest))
        size += 2 * (plan_bytes - base.adapter_bytes + base.trained_bytes)
    return size


def made_from(context: Context, cut: str) -> str:
    """Compute the digest of everything that entries of a cut's bank depend on, besides their formats."""
    from qpruner.quantization.bank import VERSION

    config, quantize, made = context.config, context.config.quantize, context.record(PruneRecord).cuts[cut]
    model = (made.digest, made.weights)
    starts = config.lora.model_copy(update={"dropout": 0.0})
    calibration = (config.calibration, context.record(PrepareRecord).digest) if quantize.rounding == "gptq" else ()
    settings = (quantize.group, quantize.rounding, calibration, starts, config.seed, VERSION)
    return digest_of(cut, *model, *settings)


def add_entries(stage: Stage[Any], plans: Iterable[PrecisionPlan]) -> None:
    """Add the entries that plans need and that the banks of their cuts lack, or have damaged."""
    from qpruner.quantization import bank as store

    wanted: dict[str, dict[str, tuple[str, ...]]] = {}
    for plan in plans:
        of_cut = wanted.setdefault(plan.cut, {})
        for group, level in plan.as_dict().items():
            if format_of(level).is_packed:
                of_cut[group] = tuple(dict.fromkeys((*of_cut.get(group, ()), level)))
    for cut, of_cut in wanted.items():
        folder, inputs = stage.context.bank_of(cut), made_from(stage.context, cut)
        index = store.BankIndex(digest=inputs, files={})
        with suppress(CorruptFile):
            index = store.read_index(folder)
        needed = _names(of_cut) & index.files.keys()
        lost = needed - _intact(folder, {name: index.files[name] for name in needed}, inputs).keys()
        kept = {name: each for name, each in index.files.items() if name not in lost}
        digest = index.digest if cut == stage.context.reference else inputs
        files = _add(stage, folder, cut, of_cut, store.BankIndex(digest=digest, files=kept))
        if files.keys() != kept.keys():
            stage.context.executor.close()  # the models that need the entries need its memory


def _add(stage: Stage[Any], folder: Path, cut: str, wanted: Wanted, index: BankIndex) -> dict[str, IndexEntry]:
    """Build the wanted entries that an index of a cut's bank lacks; return the index entries of all its files."""
    from qpruner.quantization import bank as store

    context, files = stage.context, dict(index.files)
    jobs = _group_jobs(context, folder, cut, wanted, set(files))
    grams = context.run_dir.root / f"grams-{cut}"
    if not jobs:
        remove(grams)  # a killed command may have left it
        return files
    write_json(folder / store.INDEX, index)
    stage.notify(f"{sum(len(job.levels) for job in jobs)} entries to build")
    if context.config.quantize.rounding == "gptq":
        gather = partial(_gather_grams, context.checkpoint_of(cut), context.config, context.data, grams)
        context.executor.run(gather, context.emit)
        jobs = [job if job.lora is None else replace(job, grams=grams / _gram_file(job.paths[0])) for job in jobs]
    for done, (job, built) in enumerate(_built(context, jobs), 1):
        files |= built
        write_json(folder / store.INDEX, index.model_copy(update={"files": files}))
        context.emit(Progress(stage.name, done, len(jobs), job.group))
    remove(grams)
    return files


def _gram_file(path: str) -> str:
    """Name the file with the Gram matrices of the block that a layer is in, such as `model.layers.3.safetensors`."""
    parts = path.split(".")
    number = next(at for at, part in enumerate(parts) if part.isdigit())
    return f"{'.'.join(parts[: number + 1])}.safetensors"


def _gather_grams(checkpoint: Path, config: RunConfig, data: Path, folder: Path, cache: ModelCache, emit: Emit) -> None:
    """Write the Gram matrices of the inputs of all layers in the blocks of a model, one file a block."""
    from qpruner.data.calibration import Samples
    from qpruner.pruning.grams import gather
    from qpruner.quantization.bank import write_grams

    on_progress = loading_progress(emit, "bank")
    model = cache.model(checkpoint, config.model.dtype, on_progress)
    pad_id = int(load_tokenizer(str(checkpoint)).pad_token_id)
    samples = Samples(list(load_encoded(data / "importance")), pad_id, config.calibration.batch_size)
    samples = replace(samples, on_progress=partial(on_progress, "inputs of the layers"))
    with writing_folder(folder) as scratch:
        scratch.mkdir(parents=True, exist_ok=True)
        for grams in gather(model, samples):
            write_grams(scratch / _gram_file(next(iter(grams))[0]), grams)


def _reuse_entries(bank: Path, scratch: Path, inputs: str) -> dict[str, IndexEntry]:
    """Link intact files of `bank` with these inputs into `scratch`; return their index entries.

    Entries of controls, which the stage itself does not build, are kept too. Such files that a killed command left in
    `scratch` are kept and count too. All others are removed from `scratch`: some may be links, and writing to a link
    would change the earlier bank.
    """
    from qpruner.quantization import bank as store

    kept = _fitting(scratch, inputs)
    for name in set(files_in(scratch)) - {*kept, store.INDEX}:
        remove(scratch / name)
    earlier = {} if scratch == bank else _fitting(bank, inputs)  # equal for a run at a URI
    for name in earlier.keys() - kept.keys():
        (scratch / name).parent.mkdir(exist_ok=True)
        (scratch / name).hardlink_to(bank / name)
    return earlier | kept


def _fitting(bank: Path, inputs: str) -> dict[str, IndexEntry]:
    """Return the index entries of intact files in `bank` that have this digest of inputs."""
    from qpruner.quantization import bank as store

    try:
        return _intact(bank, store.read_index(bank).files, inputs)
    except CorruptFile:
        return {}


def _intact(bank: Path, entries: Mapping[str, IndexEntry], inputs: str) -> dict[str, IndexEntry]:
    """Return those entries of a bank that have this digest of inputs and whose files are intact."""
    from qpruner.quantization import bank as store

    levels = {Path(name).parent.name for name in entries} & formats().keys()
    digests = {level: store.entry_digest(inputs, level) for level in levels if not format_of(level).missing()}
    fitting = {name: each for name, each in entries.items() if each.inputs == digests.get(Path(name).parent.name)}
    intact = store.intact_files(bank, {name: each.sha256 for name, each in fitting.items()})
    return {name: fitting[name] for name in intact}


def _names(wanted: Wanted) -> set[str]:
    """Name the files of the wanted entries."""
    from qpruner.quantization.bank import entry_file

    return {str(entry_file(Path(), group, level)) for group, levels in wanted.items() for level in levels}


def _group_jobs(context: Context, folder: Path, cut: str, wanted: Wanted, kept: set[str]) -> list[GroupJob]:
    """Make a job for each group that lacks entries; `kept` has the names of the existing entries."""
    from qpruner.quantization import bank as store

    config, jobs, inputs = context.config, [], made_from(context, cut)
    groups = {group.name: group for group in context.layout_of(cut).groups}
    for name, levels in wanted.items():
        left = tuple(level for level in levels if str(store.entry_file(Path(), name, level)) not in kept)
        if left:
            paths = tuple(linear.name for linear in groups[name].linears)
            lora = None if name in (EMBEDDINGS, HEAD) else config.lora
            settings = (context.checkpoint_of(cut), folder, config.model.dtype, lora, config.seed, inputs)
            jobs.append(store.GroupJob(name, paths, left, *settings))
    return jobs


def _built(context: Context, jobs: list[GroupJob]) -> Iterator[tuple[GroupJob, dict[str, IndexEntry]]]:
    """Build the groups, on several workers if that saves time; yield each finished job with its new index entries."""
    from qpruner.quantization.bank import FEW_WEIGHTS, build_group

    def build_here(job: GroupJob) -> dict[str, IndexEntry]:
        return context.executor.run(lambda cache, emit: build_group(job), context.emit)

    is_small = (
        sum(group.num_weights for group in context.layout_of(context.reference).groups) < FEW_WEIGHTS
        and not context.address
    )
    resources, concurrent = ({}, 1) if is_small else context.task_resources(len(jobs))
    if concurrent <= 1:
        for job in jobs:
            yield job, build_here(job)
        return
    if context.address:
        # Free the machine of the executor for a worker; the sensitivity stage loads the model again.
        context.executor.close()
    jobs = [replace(job, threads=int(resources.get("cpu", 1))) for job in jobs]
    for position, built in context.run_tasks(build_group, jobs, resources, concurrent, on_held=context.gpu_time.add):
        yield jobs[position], built
