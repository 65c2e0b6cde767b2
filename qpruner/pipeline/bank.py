"""The bank stage: pack every group of the reference cut once for all trials.

A group is the layers that share a format. It also gathers the Gram matrices by which GPTQ rounds.
All other entries are made by whoever reads them first, see `quantization.bank.read_plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.cluster.executor import run_streamed
from qpruner.config.schema import MUTUAL_INFORMATION, RunConfig
from qpruner.data.encoding import load_encoded
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.pipeline.prepare import loading_progress
from qpruner.pipeline.shapes import Shapes, left_out_text
from qpruner.pipeline.stage import Stage, disk_bytes_in
from qpruner.plans.plan import UNPRUNED, Layout
from qpruner.quantization.formats import PAPER, format_of, trained_by
from qpruner.runs.events import Emit, Event, GroupPacked, Progress
from qpruner.runs.records import BankRecord
from qpruner.runs.storage import fetch, files_in, for_each, remove

if TYPE_CHECKING:
    from qpruner.quantization.bank import BankSource, EntryRecord

Wanted = Mapping[str, tuple[str, ...]]  # group -> formats to pack it in
Made = dict[tuple[str, str], "EntryRecord"]  # (group, format) -> its entry


class Bank(Stage[BankRecord]):
    """Write one entry, a file, for each group and format.

    An entry has the packed weights, and the initial weights of the adapter.
    """

    name = "bank"
    help = "Run up to the bank of packed weights and adapter starts."
    record = BankRecord
    keeps_files = False

    @property
    def _layout(self) -> Layout:
        return self.context.shapes.reference

    @property
    def _bank(self) -> BankSource:
        return self.context.places.bank_of(self.context.shapes.reference.cut)

    @property
    def _wanted(self) -> Wanted:
        """Every group in every packed format that it takes."""
        return {group.name: group.packed for group in self._layout.groups}

    @property
    def _banks(self) -> list[BankSource]:
        """The banks of all cuts that the search or its controls use."""
        cuts = dict.fromkeys((*self.context.shapes.cuts, UNPRUNED))
        return [self.context.places.bank_of(cut) for cut in cuts]

    @property
    def _unfit(self) -> dict[str, str]:
        """The cuts that were made, but whose widths the formats cannot hold, and the reason."""
        shapes = self.context.shapes
        expected = self.context.inspection.shapes.cuts
        unfit = [cut for cut in expected if cut in shapes.made and cut not in shapes.cuts]
        return {cut: shapes.left_out[cut] for cut in unfit}

    def inputs(self) -> tuple[Any, ...]:
        # The trials of controls depend on this digest too, and need entries of other formats.
        levels = {*self._layout.levels, *self.context.shapes.base.levels, *PAPER}
        return (self._bank.inputs, self._wanted, self._bank.digests(levels), self._unfit)

    @property
    def _levels(self) -> tuple[str, ...]:
        return tuple(level for level in self._layout.levels if format_of(level).is_packed)

    def is_complete(self, folder: Path) -> bool:
        """Return True if the Gram matrices for GPTQ are intact.

        Whoever reads a damaged entry makes it again.
        """
        return all(bank.has_grams() for bank in self._banks)

    def detail(self) -> str:
        rounding = ", GPTQ" if self.config.quantize.uses_grams else ""
        start = f", {self.config.lora.init} start" if self._has_adapters else ""
        return f"packing every group as {', '.join(self._levels) or 'it is'}{rounding}{start}"

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        for cut, reason in self._unfit.items():
            self.notify(f"warning: {left_out_text(cut, reason)}")
        context.shapes.check_budget()  # the widths are known now
        for bank in self._banks:
            _remove_stale(bank)
            if not bank.has_grams():
                gather = partial(_gather_grams, bank, self.config, context.places.data)
                context.machines.executor.run(gather, context.emit)
        bank = self._bank
        entries = self._fill()
        files = {
            str(bank.file(*key).relative_to(bank.folder)): entry.sha256
            for key, entry in entries.items()
        }
        sizes = files_in(bank.folder)
        ratios: dict[str, dict[str, float]] = {level: {} for level in self._levels}
        errors: dict[str, dict[str, float]] = {level: {} for level in self._levels}
        for (group, level), entry in entries.items():
            ratios[level][group] = entry.residual_ratio
            errors[level][group] = entry.error
        return {
            "cut": context.shapes.reference.cut,
            "left_out": self._unfit,
            "files": files,
            "bytes": sum(sizes[name] for name in files),
            "residual_ratio": ratios,
            "error": errors,
        }

    def _fill(self) -> Made:
        """Make the wanted entries that the bank lacks, and return all wanted."""
        bank = self._bank
        wanted = [(group, level) for group, levels in self._wanted.items() for level in levels]
        entries: Made = {}
        missing: dict[str, tuple[str, ...]] = {}
        earlier = for_each(lambda key: bank.entry(*key), wanted)
        for (group, level), entry in zip(wanted, earlier, strict=True):
            if entry:
                entries[group, level] = entry
            else:
                missing[group] = (*missing.get(group, ()), level)
        if missing:
            self.notify(f"{len(wanted) - len(entries)} entries to make")
            entries |= self._make(missing)
        return {key: entries[key] for key in wanted}

    def _make(self, missing: Wanted) -> Made:
        """Make the missing entries, on several workers if that saves time."""
        from qpruner.quantization.bank import FEW_WEIGHTS

        context = self.context
        machines = context.machines
        done = 0

        def emit(event: Event) -> None:
            nonlocal done
            if isinstance(event, GroupPacked):
                done += 1
                event = Progress(self.name, done, len(missing), event.group)
            context.emit(event)

        sizes = {group.name: group.num_weights for group in self._layout.groups}
        is_small = sum(sizes.values()) < FEW_WEIGHTS and not context.address
        resources: dict[str, float] = {}
        concurrent = 1
        if not is_small:
            resources, concurrent = machines.task_resources(len(missing))
        if concurrent <= 1:
            return machines.executor.run(partial(fill, FillJob(self._bank, missing)), emit)
        # Each worker gets as many large groups as the others: a process with a GPU serves one job.
        by_size = sorted(missing, key=sizes.__getitem__, reverse=True)
        shares = [
            {group: missing[group] for group in by_size[first::concurrent]}
            for first in range(concurrent)
        ]
        streamed = partial(run_streamed, int(resources.get("cpu", 1)))
        jobs = [partial(fill, FillJob(self._bank, share)) for share in shares]
        made: Made = {}
        ran = machines.run_tasks(
            streamed,
            jobs,
            resources,
            concurrent,
            on_held=machines.gpu_time.add,
            on_event=emit,
        )
        for _, entries in ran:
            made |= entries
        return made

    def summary(self, record: BankRecord) -> str:
        means = {level: sum(of.values()) / len(of) for level, of in record.error.items() if of}
        left = ", ".join(f"{level} {mean**0.5:.3f}" for level, mean in means.items())
        size = f"{len(record.files)} entries, {record.bytes / 1e6:.0f} MB"
        adapted = " with adapters" if self._has_adapters else ""
        return f"{size}; relative error of the weights{adapted}: {left}" if left else size

    @property
    def _has_adapters(self) -> bool:
        return self.config.training.method == "adapter"

    def disk_used(self) -> int:
        # After a search the entries are there that its plans need, not all that could be needed.
        return (
            self.disk_bytes()
            if self.context.records.search
            else disk_bytes_in(self.context.run_dir.root / "banks")
        )

    def disk_bytes(self) -> int:
        from qpruner.pruning.grams import gram_bytes

        shapes = self.context.inspection.shapes
        size = bank_bytes(self.config, shapes)
        if self.config.quantize.uses_grams:
            model_configs = {name: cut.model_config for name, cut in shapes.cuts.items()}
            model_configs[UNPRUNED] = shapes.model_config
            for name, model_config in model_configs.items():
                size += sum(gram_bytes(shapes.layout_of(name), model_config))
        return size


def bank_bytes(config: RunConfig, shapes: Shapes) -> int:
    """Estimate the bytes of all entries that a run may make.

    Those are the entries of each cut in every format. Adapters are in float32.
    """
    base = shapes.base
    pruned = shapes.reference
    size = 0
    for layout in shapes.layouts.values():
        for level in layout.levels:
            if format_of(level).is_packed:
                size += sum(sizes.get(level, 0) for sizes in layout.sizes)
                if trained_by(layout.method, [level]) == "adapter":
                    size += layout.start_bytes
    extra = [level for level in PAPER if level not in pruned.levels]
    # one plan of formats that are not the run's
    if extra and MUTUAL_INFORMATION in config.measured_methods:
        blocks = [group for group in pruned.groups if not group.is_table]
        size += (
            sum(group.packed_bytes(extra[-1], pruned.element_bytes) for group in blocks)
            + pruned.start_bytes
        )
    if UNPRUNED not in shapes.layouts:  # two plans, each in the budget or the smallest
        smallest = base.plan_bytes(base.smallest())
        largest = base.plan_bytes(base.largest())
        plan_bytes = max(smallest, min(shapes.budget_bytes, largest))
        size += 2 * (plan_bytes - base.adapter_bytes + base.start_bytes)
    return size


@dataclass(frozen=True)
class FillJob:
    """Groups to pack, each in the formats that it lacks, in one process."""

    bank: BankSource
    missing: Wanted


def fill(job: FillJob, emit: Emit) -> Made:
    """Make the entries of a job, and return their records.

    Those that a worker made before it died are not made again.
    """
    from qpruner.quantization.bank import make_entries

    made: Made = {}
    for group, levels in job.missing.items():
        left = []
        for level in levels:
            entry = job.bank.entry(group, level)
            if entry:
                made[group, level] = entry
            else:
                left.append(level)
        if left:
            for level, (entry, _) in zip(left, make_entries(job.bank, group, left), strict=True):
                made[group, level] = entry
        emit(GroupPacked(group))
    return made


def _gather_grams(bank: BankSource, config: RunConfig, data: Path, emit: Emit) -> None:
    """Write the Gram matrices of the inputs of a model's layers.

    They are those of all layers in the blocks of a cut's model, and of its head.
    """
    from qpruner.data.calibration import Samples
    from qpruner.pruning.grams import gather
    from qpruner.quantization.bank import write_grams

    on_progress = loading_progress(emit, "bank")
    model = load_dense(str(fetch(bank.checkpoint)), bank.dtype, on_progress=on_progress)
    pad_id = int(load_tokenizer(str(bank.checkpoint)).pad_token_id)
    samples = Samples(
        list(load_encoded(data / "importance")), pad_id, config.calibration.batch_size
    )
    samples = replace(samples, on_progress=partial(on_progress, "inputs of the layers"))
    for grams in gather(model, samples):
        write_grams(bank, grams)


def _remove_stale(bank: BankSource) -> None:
    """Remove stale files from a bank's folder.

    Those are entries of other inputs or formats, and unfinished files of killed processes.
    """
    kept = set()
    files = files_in(bank.folder)
    for name in files:
        path = bank.folder / name
        if (
            path.suffix == ".safetensors"
            and not path.name.startswith(".")
            and bank.is_current(path)
        ):
            kept |= {path, path.with_suffix(".json")}
    for_each(remove, [bank.folder / name for name in files if bank.folder / name not in kept])
