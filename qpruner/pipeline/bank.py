"""The bank stage: pack every group (layers that share a bit-width) once for all trials; reuse an earlier bank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.errors import CorruptFile
from qpruner.pipeline.context import Context
from qpruner.pipeline.preflight import check_quantizable
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import FULL_BITS, check_cpu_widths
from qpruner.runs.events import Progress
from qpruner.runs.records import BankRecord, PruneRecord, digest_of
from qpruner.runs.storage import display_name, files_in, remove, write_json

if TYPE_CHECKING:
    from qpruner.quantization.bank import BankIndex, GroupJob, IndexEntry


class Bank(Stage[BankRecord]):
    """Write one entry (a file) for each group and bit-width: packed weights and initial weights of the adapter."""

    name = "bank"
    help = "Run up to the bank of packed weights and adapter starts."
    record = BankRecord
    keeps_scratch = True
    repairs_files = True

    @property
    def _levels(self) -> tuple[int, ...]:
        """The bit-widths of `quantize.bits` below 16; weights at 16 bits are not packed."""
        return tuple(bits for bits in self.config.quantize.bits if bits != FULL_BITS)

    def _made_from(self) -> tuple[Any, ...]:
        """Return everything that an entry of the bank depends on, for a digest."""
        from qpruner.quantization.bank import FORMAT

        config, quantize, pruned = self.config, self.config.quantize, self.context.record(PruneRecord)
        model = (pruned.digest, *([pruned.weights] if pruned.weights else []))
        starts = config.lora.model_copy(update={"dropout": 0.0})
        return (*model, quantize.group, quantize.double_quant, starts, config.seed, FORMAT, version("bitsandbytes"))

    def inputs(self) -> tuple[Any, ...]:
        return (*self._made_from(), self._levels)

    def check(self) -> None:
        check_quantizable(self.context.inspection.model_config)

    def begin(self) -> None:
        """Restore a damaged index `bank.json` from the record. Delete the record if an entry is, to rerun the stage."""
        from qpruner.quantization import bank as store

        bank, record, index = self.context.bank, None, None
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
        """Make `bank.json` from the bank's record: inputs, sha256 and remaining quantization error of each entry."""
        from qpruner.quantization import bank as store

        files, made_from = {}, digest_of(*self._made_from())
        for bits, by_group in record.residual_ratio.items():
            for group, ratio in by_group.items():
                name = str(store.entry_file(Path(), group, int(bits)))
                files[name] = store.IndexEntry(inputs=made_from, sha256=record.files[name], residual_ratio=ratio)
        return store.BankIndex(digest=record.digest, files=files)

    def detail(self) -> str:
        return f"packing every group at {', '.join(map(str, self._levels))} bits, {self.config.lora.init} start"

    def run(self, scratch: Path) -> dict[str, Any]:
        from qpruner.quantization import bank as store

        context, levels, layout = self.context, self._levels, self.context.layout
        if 4 in levels and not context.trial_resources.get("gpu"):
            check_cpu_widths([linear for group in layout.groups for linear in group.linears])
        made_from = digest_of(*self._made_from())
        files = _reuse_entries(context.bank, scratch, made_from, levels)
        write_json(scratch / store.INDEX, store.BankIndex(digest=self.digest, files=files))
        jobs = _group_jobs(context, scratch, levels, set(files), made_from)
        self.notify(f"{sum(len(job.bits) for job in jobs)} entries to build")
        for done, (job, built) in enumerate(_built(context, jobs), 1):
            files |= built
            write_json(scratch / store.INDEX, store.BankIndex(digest=self.digest, files=files))
            context.emit(Progress(self.name, done, len(jobs), job.group))
        names, sizes = [group.name for group in layout.groups], files_in(scratch)
        ratios = {
            str(bits): {name: files[str(store.entry_file(Path(), name, bits))].residual_ratio for name in names}
            for bits in levels
        }
        all_levels = self.config.quantize.bits
        return {
            "files": {name: entry.sha256 for name, entry in files.items()},
            "bytes": sum(sizes[name] for name in files),
            "residual_ratio": ratios,
            "group_bytes": {str(bits): dict(zip(names, layout.group_bytes(bits), strict=True)) for bits in all_levels},
        }

    def summary(self, record: BankRecord) -> str:
        means = {bits: sum(ratio.values()) / len(ratio) for bits, ratio in record.residual_ratio.items()}
        left = ", ".join(f"{bits}-bit {mean:.3f}" for bits, mean in means.items())
        size = f"{len(record.files)} entries, {record.bytes / 1e6:.0f} MB"
        return f"{size}; share of the quantization error that LoftQ leaves: {left}"

    def disk_bytes(self) -> int:
        pruned = self.context.inspection.pruned
        return sum(pruned.plan_bytes(pruned.uniform(bits)) for bits in self.config.quantize.bits)


def _reuse_entries(bank: Path, scratch: Path, inputs: str, levels: tuple[int, ...]) -> dict[str, IndexEntry]:
    """Link intact files of `bank` with these inputs and bit-widths into `scratch`; return their index entries.

    Such files that a killed command left in `scratch` are kept and count too. All others are removed from `scratch`:
    some may be links, and writing to a link would change the earlier bank.
    """
    from qpruner.quantization import bank as store

    kept = _fitting(scratch, inputs, levels)
    for name in set(files_in(scratch)) - {*kept, store.INDEX}:
        remove(scratch / name)
    earlier = {} if scratch == bank else _fitting(bank, inputs, levels)  # equal for a run at a URI
    for name in earlier.keys() - kept.keys():
        (scratch / name).parent.mkdir(exist_ok=True)
        (scratch / name).hardlink_to(bank / name)
    return earlier | kept


def _fitting(bank: Path, inputs: str, levels: tuple[int, ...]) -> dict[str, IndexEntry]:
    """Return the index entries of intact files in `bank` that have these bit-widths and this digest of inputs."""
    from qpruner.quantization import bank as store

    try:
        index = store.read_index(bank)
    except CorruptFile:
        return {}
    wanted = {f"{bits}bit" for bits in levels}
    fitting = {
        name: entry for name, entry in index.files.items() if entry.inputs == inputs and Path(name).parts[0] in wanted
    }
    intact = store.intact_files(bank, {name: entry.sha256 for name, entry in fitting.items()})
    return {name: fitting[name] for name in intact}


def _group_jobs(
    context: Context, scratch: Path, levels: tuple[int, ...], kept: set[str], inputs: str
) -> list[GroupJob]:
    """Make a job for each group that lacks entries; `kept` has the names of the existing entries."""
    from qpruner.quantization import bank as store

    config, jobs = context.config, []
    settings = (config.model.dtype, config.lora, config.quantize.double_quant, config.seed, inputs)
    for group in context.layout.groups:
        left = tuple(bits for bits in levels if str(store.entry_file(Path(), group.name, bits)) not in kept)
        if left:
            paths = tuple(linear.name for linear in group.linears)
            jobs.append(store.GroupJob(group.name, paths, left, context.checkpoint, scratch, *settings))
    return jobs


def _built(context: Context, jobs: list[GroupJob]) -> Iterator[tuple[GroupJob, dict[str, IndexEntry]]]:
    """Build the groups, on several workers if that saves time; yield each finished job with its new index entries."""
    from qpruner.quantization.bank import FEW_WEIGHTS, build_group

    def build_here(job: GroupJob) -> dict[str, IndexEntry]:
        return context.executor.run(lambda cache, emit: build_group(job), context.emit)

    is_small = sum(group.num_weights for group in context.layout.groups) < FEW_WEIGHTS and not context.address
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
