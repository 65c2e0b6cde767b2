"""The bank stage: what is packed once, where it is packed, and what of an earlier bank still serves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.cluster.workshop import Bench
from qpruner.errors import CorruptFile, StageError
from qpruner.pipeline.context import Context
from qpruner.pipeline.stage import Stage, run_stage
from qpruner.plans.plan import FULL_BITS, check_cpu_widths
from qpruner.runs.events import Emit, Message, Progress
from qpruner.runs.records import BankRecord, PruneRecord, digest_of
from qpruner.runs.storage import display_name, files_in, remove

if TYPE_CHECKING:
    from qpruner.quantization.bank import BankIndex, GroupJob, IndexEntry


def bank(context: Context, pruned: PruneRecord) -> BankRecord:
    """Packed weights and adapter starts of every (group, bits)."""
    from qpruner.quantization import bank as store

    quantize, stage = context.config.quantize, bank_stage(context, pruned)
    *_, library, levels = stage.inputs
    inputs = _made_from(stage)
    _forget_damaged_bank(context, stage)

    def work(scratch: Path) -> dict[str, Any]:
        if 4 in levels and not context.trial_resources.get("gpu"):
            check_cpu_widths([linear for group in context.layout.groups for linear in group.linears])
        files = _reused_files(context.bank, scratch, inputs, levels)

        def write_index() -> None:
            store.write_index(scratch, store.BankIndex(digest=stage.digest, bitsandbytes=library, files=files))

        write_index()
        jobs = _group_jobs(context, scratch, levels, set(files))
        _check_room(context, scratch, jobs)
        for done, (job, built) in enumerate(_built(context, jobs), 1):
            for name, (sha256, ratio) in built.items():
                files[name] = store.IndexEntry(inputs=inputs, sha256=sha256, residual_ratio=ratio)
            write_index()
            context.emit(Progress("bank", done, len(jobs), job.group))
        groups, sizes = context.layout.groups, files_in(scratch)
        ratios: dict[str, dict[str, float]] = {}
        for bits in levels:
            by_group = {group.name: store.entry_file(Path(), group.name, bits) for group in groups}
            ratios[str(bits)] = {name: files[str(file)].residual_ratio for name, file in by_group.items()}
        return {
            "files": {name: entry.sha256 for name, entry in files.items()},
            "bytes": sum(sizes[name] for name in files),
            "residual_ratio": ratios,
            "group_bytes": {
                str(bits): dict(zip((group.name for group in groups), context.layout.group_bytes(bits), strict=True))
                for bits in quantize.bits
            },
        }

    def figures(record: BankRecord) -> str:
        left = ", ".join(
            f"{bits}-bit {sum(ratio.values()) / len(ratio):.3f}" for bits, ratio in record.residual_ratio.items()
        )
        size = f"{len(record.files)} entries, {record.bytes / 1e6:.0f} MB"
        return f"{size}; share of the quantization error that LoftQ leaves: {left}"

    return run_stage(context, stage, BankRecord, work, figures)


def bank_stage(context: Context, pruned: PruneRecord) -> Stage:
    """What `bank` depends on: what every entry is made from, last the packing library's version, and the levels."""
    from qpruner.quantization.bank import FORMAT

    config, quantize = context.config, context.config.quantize
    levels = tuple(bits for bits in quantize.bits if bits != FULL_BITS)
    starts = config.lora.model_copy(update={"dropout": 0.0})
    library = version("bitsandbytes")
    model = (pruned.digest, *([pruned.weights] if pruned.weights else []))
    made_from = (*model, quantize.group, quantize.double_quant, starts, config.seed, FORMAT, library)
    named = ", ".join(map(str, levels))
    detail = f"packing every group at {named} bits, {config.lora.init} start"
    return Stage("bank", detail, (*made_from, levels), resumes=True)


def _made_from(stage: Stage) -> str:
    """Digest of what every entry is made from."""
    *made_from, _ = stage.inputs
    return digest_of(*made_from)


def _index_of(record: BankRecord, stage: Stage) -> BankIndex:
    """The index of a recorded bank."""
    from qpruner.quantization import bank as store

    inputs, library = _made_from(stage), stage.inputs[-2]
    files = {}
    for bits, by_group in record.residual_ratio.items():
        for group, ratio in by_group.items():
            name = str(store.entry_file(Path(), group, int(bits)))
            files[name] = store.IndexEntry(inputs=inputs, sha256=record.files[name], residual_ratio=ratio)
    return store.BankIndex(digest=record.digest, bitsandbytes=library, files=files)


def _forget_damaged_bank(context: Context, stage: Stage) -> None:
    """Have a recorded bank made whole again where a file of it is missing or damaged.

    Raises:
        StageError: If the folder holds a bank that is not the recorded one.
    """
    from qpruner.quantization import bank as store

    try:
        record = context.run_dir.read_record("bank", BankRecord)
    except CorruptFile:  # told where the stage asks for its record
        return
    if record is None or record.digest != stage.digest or not context.run_dir.has_folder("bank"):
        return
    try:
        index = store.read_index(context.bank)
    except CorruptFile as error:
        context.emit(Message("bank", f"{error}; it is made again from the stage's record"))
        index = _index_of(record, stage)
        store.write_index(context.bank, index)
    if index.digest != record.digest:
        raise StageError(
            "bank",
            f"{display_name(context.bank)} was built for other weights, settings or versions (digest {index.digest}, "
            f"not {record.digest})",
            "delete that folder, then repeat the command",
        )
    intact = store.intact_files(context.bank, index)
    damaged = [name for name in index.files if name not in intact]
    for name in damaged:
        text = f"{display_name(context.bank / name)} is missing or damaged; it alone is built again"
        context.emit(Message("bank", text))
    if damaged:
        context.forget("bank")


def _reused_files(bank: Path, scratch: Path, inputs: str, levels: tuple[int, ...]) -> dict[str, IndexEntry]:
    """The intact files of an earlier bank, and of what a killed command left, that were made from the same.

    Those of a bank in a folder are linked. Nothing else stays in `scratch`: a link of one that does not fit any more
    may be written through, into that bank.
    """
    from qpruner.quantization import bank as store

    kept = _fitting(scratch, inputs, levels)
    for name in set(files_in(scratch)) - {*kept, store.INDEX}:
        remove(scratch / name)
    if scratch == bank:  # as at a URI
        return kept
    for name, entry in _fitting(bank, inputs, levels).items():
        if name not in kept:
            kept[name] = entry
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).hardlink_to(bank / name)
    return kept


def _fitting(bank: Path, inputs: str, levels: tuple[int, ...]) -> dict[str, IndexEntry]:
    """A bank's intact files of these levels that were made from the same."""
    from qpruner.quantization import bank as store

    try:
        index = store.read_index(bank)
    except CorruptFile:
        return {}
    wanted = {f"{bits}bit" for bits in levels}
    fitting = {
        name: entry for name, entry in index.files.items() if entry.inputs == inputs and Path(name).parts[0] in wanted
    }
    return {name: fitting[name] for name in store.intact_files(bank, index.model_copy(update={"files": fitting}))}


def _group_jobs(context: Context, scratch: Path, levels: tuple[int, ...], kept: set[str]) -> list[GroupJob]:
    """What is left to build, a job a group."""
    from qpruner.quantization import bank as store

    config = context.config
    settings = store.EntrySettings(config.lora, config.quantize.double_quant, config.seed)
    jobs = []
    for group in context.layout.groups:
        left = tuple(bits for bits in levels if str(store.entry_file(Path(), group.name, bits)) not in kept)
        if left:
            paths = tuple(linear.name for linear in group.linears)
            job = store.GroupJob(context.checkpoint, scratch, group.name, paths, left, config.model.dtype, settings)
            jobs.append(job)
    return jobs


def _check_room(context: Context, scratch: Path, jobs: list[GroupJob]) -> None:
    """Tell how large the bank will be, and refuse a disk that cannot hold it.

    Raises:
        StageError: Naming the bytes that are needed and those that are free.
    """
    layout = context.layout
    groups = {group.name: group for group in layout.groups}
    packed = sum(
        groups[job.group].bytes_at(bits, layout.element_bytes, layout.double_quant) for job in jobs for bits in job.bits
    )
    num_sets = len({bits for job in jobs for bits in job.bits})
    needed = packed + num_sets * layout.adapter_bytes
    num_entries = sum(len(job.bits) for job in jobs)
    context.emit(Message("bank", f"{num_entries} entries to build, {needed / 1e6:.1f} MB"))
    if not context.run_dir.storage.fills_this_disk:
        return
    free = shutil.disk_usage(scratch).free
    if free < needed:
        root = context.run_dir.root
        cause = f"no space left for the bank in {root}: it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise StageError("bank", cause, "make room, then repeat the command")


def _built(context: Context, jobs: list[GroupJob]) -> Iterator[tuple[GroupJob, dict[str, tuple[str, float]]]]:
    """Build the groups: on the cluster's workers where that is worth starting them and there are or may be several."""
    from qpruner.quantization.bank import build_group, is_soon_packed

    is_small = is_soon_packed(context.layout) and not context.address
    resources, concurrent = ({}, 1) if is_small else context.task_resources(len(jobs))
    if concurrent <= 1:
        for job in jobs:
            yield job, context.workshop.do(build_here, job, context.emit)
        return
    if context.address:
        # Its machine builds, too; the sensitivities load the model again.
        context.workshop.close()
    from qpruner.cluster.cluster import run_tasks

    jobs = [replace(job, threads=int(resources.get("cpu", 1))) for job in jobs]
    for position, built in run_tasks(
        build_group,
        jobs,
        resources,
        concurrent,
        fresh=False,
        check_node=context.check_node,
        on_held=context.gpu_time.add,
    ):
        yield jobs[position], built


def build_here(job: GroupJob, bench: Bench, emit: Emit) -> dict[str, tuple[str, float]]:
    """A group beside the pruned model, which stays for the sensitivities."""
    from qpruner.quantization.bank import build_group

    return build_group(job)
