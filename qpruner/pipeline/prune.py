"""The prune stage: make every cut of the base model and record the width of every block."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.cluster.executor import ModelCache
from qpruner.config.schema import PruneConfig, RunConfig
from qpruner.data.encoding import load_encoded
from qpruner.errors import CorruptFile, UserError
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.families import ATTENTION, MLP, family_of
from qpruner.models.layout import multiply_adds
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.models.memory import PeakMemory, copy_weights
from qpruner.pipeline.preflight import DTYPE_BYTES, PRUNED_EARLIER, is_pruned, left_out_text, uncut
from qpruner.pipeline.prepare import loading_progress
from qpruner.pipeline.stage import Stage
from qpruner.plans.plan import UNPRUNED, cut_title
from qpruner.pruning.settings import settled
from qpruner.runs.events import Emit, Message
from qpruner.runs.records import CutRecord, LayerWidths, PrepareRecord, PruneRecord, digest_of
from qpruner.runs.storage import (
    Storage,
    fetch,
    read_json,
    remove,
    require_arrived,
    retry_storage,
    storage_at,
    write_json,
    writing_folder,
)
from qpruner.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qpruner.data.losses import Rows
    from qpruner.pruning.prune import Pruned

CUT_FILE = "cut.json"  # name of the record in the folder of a cut, which is written last


@dataclass(frozen=True)
class Wanted:
    """A cut to make: its settings, its digest, and its folder, None if it is not to be saved."""

    settings: PruneConfig
    digest: str
    folder: Path | None


Made = tuple[dict[str, CutRecord], dict[str, str]]
"""Records of the cuts that were made, and reasons why the others could not be made, by name."""


class Prune(Stage[PruneRecord]):
    """Make each cut: score all units, select the units to keep, compensate, cut and save the model.

    The importance of the first step is measured once for all cuts. A cut that an earlier command made is reused.
    """

    name = "prune"
    help = "Run up to the pruned checkpoints."
    record = PruneRecord
    keeps_files = False
    repairs_files = True
    starts_ray = False
    memory_keys = "`calibration.batch_size` or `calibration.max_length`"

    def warnings(self) -> Iterable[str]:
        return [left_out_text(*each) for each in self.context.inspection.left_out.items()]

    def inputs(self) -> tuple[Any, ...]:
        return ({name: each.digest for name, each in self._wanted().items()},)

    def _asked(self) -> dict[str, PruneConfig]:
        """Return the settings of the cuts, the one that removes least first; the base model is always among them."""
        of_cuts = {name: cut.settings for name, cut in self.context.inspection.cuts.items()}
        return {UNPRUNED: uncut(self.config.prune)} | of_cuts

    def _wanted(self) -> dict[str, Wanted]:
        context, model_config = self.context, self.context.inspection.model_config
        prepared = context.record(PrepareRecord).digest
        return {
            name: Wanted(
                settings,
                digest_of("cut", prepared, settled(model_config, settings)),
                None if name == UNPRUNED else context.run_dir.cut(name),
            )
            for name, settings in self._asked().items()
        }

    def detail(self) -> str:
        names = list(self.context.inspection.cuts)
        before = f"{', '.join(map(cut_title, names[:-1]))} and " if len(names) > 1 else ""
        return before + describe(self.context.inspection.cuts[names[-1]].settings)

    def run(self, scratch: Path) -> dict[str, Any]:
        context, wanted = self.context, self._wanted()
        self._report_earlier_cut()
        made = self._made_earlier(wanted)
        missing = {name: each for name, each in wanted.items() if name not in made}
        left_out = dict[str, str]()
        if missing:
            saved = [context.run_dir.cut(name) for name in made if name != UNPRUNED]
            work = partial(make_and_save, self.config, context.model_folder(UNPRUNED), context.data, missing, saved)
            new, left_out = context.executor.run(work, context.emit)
            for name in new.keys() - {UNPRUNED}:
                require_arrived(context.run_dir.cut(name))
            made |= new
        return self._fields(made, left_out)

    def _fields(self, made: Mapping[str, CutRecord], left_out: Mapping[str, str]) -> dict[str, Any]:
        """Return the fields of the record; raise an error if no cut that the search may choose could be made."""
        if not made.keys() & self.context.inspection.cuts.keys():
            raise UserError(next(iter(left_out.values())))
        for name, reason in left_out.items():
            self.notify(f"warning: {left_out_text(name, reason)}")
        cuts = {name: made[name] for name in self._asked() if name in made}
        return {"cuts": cuts, "left_out": {**self.context.inspection.left_out, **left_out}}

    def _made_earlier(self, wanted: Mapping[str, Wanted]) -> dict[str, CutRecord]:
        """Return the records of the cuts that earlier commands made with equal inputs and whose files are intact."""
        run, found, earlier = self.context.run_dir, dict[str, CutRecord](), None
        with suppress(CorruptFile):
            earlier = run.read_record(self.name, PruneRecord)
        for name, each in wanted.items():
            record = None if each.folder or not earlier else earlier.cuts.get(name)
            if each.folder and super().is_complete(each.folder) and storage_at(each.folder).read_list():
                record = self.read_intact(each.folder / CUT_FILE, CutRecord, run.root, "the cut is made again")
            if record and record.digest == each.digest:
                found[name] = record
        return found

    def summary(self, record: PruneRecord) -> str:
        shown = [cut for name, cut in record.cuts.items() if name in self.context.cuts]
        sizes = ", ".join(f"{each.parameters_after / 1e6:.1f}M" for each in shown)
        before = record.cuts[UNPRUNED].parameters_before
        if len(shown) > 1:
            return f"{before / 1e6:.1f}M -> {sizes} parameters in {counted(len(shown), 'cut')}"
        return f"{before / 1e6:.1f}M -> {sizes} parameters ({shown[0].target}, {shown[0].achieved})"

    def matching_record(self, digest: str) -> PruneRecord | None:
        record = super().matching_record(digest)
        cuts = {name: cut for name, cut in record.cuts.items() if name != UNPRUNED} if record else {}
        # A killed command may have made other cuts since.
        return record if all(read_cut(self.context.run_dir.cut(name)) == cut for name, cut in cuts.items()) else None

    def is_complete(self, folder: Path) -> bool:
        cuts = [self.context.run_dir.cut(name) for name in self.context.inspection.cuts if name != UNPRUNED]
        are_intact = [super(Prune, self).is_complete(each) for each in cuts]  # each damaged one is set aside
        return all(are_intact)

    def share_done(self) -> float:
        wanted = [each for each in self._wanted().values() if each.folder]
        return sum(made_cut(each) is not None for each in wanted) / max(len(wanted), 1)

    def disk_bytes(self) -> int:
        layouts = self.context.inspection.layouts.values()
        return sum(each.num_parameters * each.element_bytes for each in layouts if each.cut != UNPRUNED)

    def _report_earlier_cut(self) -> None:
        if is_pruned(self.context.inspection.model_config):
            self.notify(f"the model was {PRUNED_EARLIER}")


def read_cut(folder: Path) -> CutRecord | None:
    """Read the record of a saved cut; None if there is none, or if its files have no list."""
    with suppress(CorruptFile):
        return read_json(folder / CUT_FILE, CutRecord) if storage_at(folder).read_list() else None
    return None


def made_cut(wanted: Wanted) -> CutRecord | None:
    """Read the record of a saved cut; None if it was not made, or under other inputs."""
    record = read_cut(wanted.folder) if wanted.folder else None
    return record if record and record.digest == wanted.digest else None


def make_and_save(
    config: RunConfig,
    base: Path,
    data: Path,
    wanted: Mapping[str, Wanted],
    saved: Sequence[Path],
    cache: ModelCache,
    emit: Emit,
) -> Made:
    """Make the cuts of the base model, each in its folder; the importances in the folders `saved` are used again."""
    source = str(fetch(base))
    # Lists, because a stored exception would keep a mapped file open.
    samples, rows = (list(load_encoded(data / name)) for name in ("importance", "sensitivity"))
    return Cutter(config, source, samples, rows, cache, emit, saved).make(wanted)


class Cutter:
    """Makes cuts of a base model, one after the other; one model is in memory."""

    def __init__(
        self,
        config: RunConfig,
        source: str,
        samples: Rows,
        rows: Rows,
        cache: ModelCache,
        emit: Emit,
        saved: Sequence[Path],
    ) -> None:
        from qpruner.data.calibration import Samples
        from qpruner.pruning.prune import FirstScores, load_importance

        self._config, self._source, self._rows, self._cache, self._emit = config, source, rows, cache, emit
        self._tokenizer, self._on_work = load_tokenizer(source), loading_progress(emit, "prune")
        self._pad_id = int(self._tokenizer.pad_token_id)
        self._samples = Samples(samples, self._pad_id, config.calibration.batch_size)
        self._made, self._left_out = dict[str, CutRecord](), dict[str, str]()
        self._first = FirstScores()
        for folder in saved:
            if record := read_cut(folder):
                self._first.add(load_importance(fetch(folder)), record.dropped_blocks)

    def make(self, wanted: Mapping[str, Wanted]) -> Made:
        """Make the cuts that can be made, the one that removes least last, so that its model stays in the cache."""
        for name in reversed(list(wanted)):  # the base comes last, if no cut has measured it
            if name not in self._made:
                self._make(name, wanted)
        return self._made, self._left_out

    def _make(self, name: str, wanted: Mapping[str, Wanted]) -> None:
        """Load the base model, measure its loss if that is wanted, and make one cut."""
        config, folder = self._config, wanted[name].folder
        if made := made_cut(wanted[name]):  # by a process that has died
            self._made[name] = made
            return
        self._cache.clear()
        model = load_dense(self._source, config.model.dtype, config.model, self._on_work)
        copy_weights(model)
        if UNPRUNED in wanted and UNPRUNED not in self._made:
            self._made[UNPRUNED] = self._cut(model, wanted[UNPRUNED])[1]
        if name == UNPRUNED:
            return
        try:
            pruned, record = self._cut(model, wanted[name])
        except UserError as error:
            self._left_out[name] = str(error)
            return
        if folder:
            record = record.model_copy(update={"weights": self._save(pruned, folder)})
            self._cache.keep(folder, pruned.model)
            write_json(folder / CUT_FILE, record)
        self._made[name] = record
        after = f"{pruned.parameters_after / 1e6:.1f}M parameters, loss {record.loss:.4f}"
        self._emit(Message("prune", f"{cut_title(name)}: {after}"))

    def _save(self, pruned: Pruned, folder: Path) -> str:
        """Save model, tokenizer and importances; return the digest of the weight files."""
        from qpruner.pruning.prune import save_importance

        remove(folder)
        with writing_folder(folder) as here:
            here.mkdir(parents=True, exist_ok=True)
            save_checkpoint(pruned.model, self._tokenizer, here, self._on_work)
            retry_storage(lambda: save_importance(here, pruned.scores, pruned.block_scores), here)
        listed = Storage(folder).read_list()
        assert listed, "writing_folder wrote the list"
        return digest_of({name: sha256 for name, sha256 in listed.sha256.items() if name.endswith(".safetensors")})

    def _cut(self, model: PreTrainedModel, wanted: Wanted) -> tuple[Pruned, CutRecord]:
        """Cut a model in place; return the result of `prune` and the record."""
        from qpruner.data.losses import mean_loss
        from qpruner.pruning.prune import block_sizes, prune

        config, settings, started = self._config, wanted.settings, time.monotonic()
        base_config = copy.deepcopy(model.config)
        block_parameters = block_sizes(model, range(base_config.num_hidden_layers))
        memory = PeakMemory()
        pruned = prune(model, settings, self._samples, config.seed, self._on_work, self._first)
        peak_bytes = memory.bytes()
        if pruned.parameters_after == pruned.parameters_before and not settings.is_off:
            why = f"{target_text(settings)} is under half of the smallest cut; raise it"
            self._emit(Message("prune", f"warning: nothing was cut: {why}"))
        loss = mean_loss(pruned.model, self._rows, self._pad_id, config.calibration.batch_size).mean
        element_bytes = DTYPE_BYTES[config.model.dtype]
        return pruned, CutRecord(
            digest=wanted.digest,
            seconds=time.monotonic() - started,
            importance=settings.criterion,
            selection=settings.selection,
            compensation=settings.compensates_by,
            target=target_text(settings),
            target_rate=settings.rate,
            achieved_rate=(pruned.parameters_before - pruned.parameters_after) / pruned.parameters_before,
            parameters_before=pruned.parameters_before,
            parameters_after=pruned.parameters_after,
            bytes_before=pruned.parameters_before * element_bytes,
            bytes_after=pruned.parameters_after * element_bytes,
            peak_memory_bytes=peak_bytes,
            memory_counter=memory.counter,
            dropped_blocks=pruned.dropped_blocks,
            layers=layer_widths(base_config, pruned, block_parameters),
            multiply_adds=multiply_adds(pruned.model),
            loss=loss,
        )


def describe(settings: PruneConfig) -> str:
    """Describe the cut in one line."""
    if settings.is_off:
        return target_text(settings)
    parts = [target_text(settings), f"by {settings.criterion.replace('_', ' ')}", settings.selection]
    if settings.drops_blocks:
        parts.append("whole blocks first" if settings.width_units else "whole blocks only")
    if settings.num_steps > 1:
        parts.append(f"in {settings.num_steps} steps")
    if settings.compensates_by != "none":
        parts.append(f"{settings.compensates_by.replace('_', ' ')} compensation")
    return ", ".join(parts)


def target_text(settings: PruneConfig) -> str:
    """Describe the target rate, such as `target 20.00% of all parameters`."""
    if settings.is_off:
        return "no cut"
    if settings.layer_rate is not None:
        return f"target {settings.layer_rate:.2%} of each block's {' and '.join(settings.width_units)} units"
    return f"target {settings.rate or 0:.2%} of all parameters"


def layer_widths(base: Any, pruned: Pruned, before: list[int]) -> tuple[LayerWidths, ...]:
    """List the kept units (indices) and parameters of each block; `before` has their parameters before the cut."""
    from qpruner.pruning.prune import block_sizes

    family, after = family_of(base), block_sizes(pruned.model, range(pruned.model.config.num_hidden_layers))
    position = {old: new for new, old in enumerate(sorted(set(range(len(before))) - set(pruned.dropped_blocks)))}
    layers = []
    for index, parameters in enumerate(before):
        layer_config = base.per_layer_config[index]
        kinds = {kind.name: kind for kind in family.unit_kinds(layer_config)}
        is_dropped = index in pruned.dropped_blocks
        kept = {name: () if is_dropped else tuple(range(kind.num_units)) for name, kind in kinds.items()}
        kept |= {} if is_dropped else pruned.kept.get(index, {})
        layers.append(
            LayerWidths(
                layer=index,
                kept_kv_groups=kept[ATTENTION],
                kept_mlp_channels=kept[MLP],
                base_kv_groups=kinds[ATTENTION].num_units,
                base_mlp_channels=kinds[MLP].num_units,
                heads_per_group=layer_config.num_attention_heads // kinds[ATTENTION].num_units,
                base_parameters=parameters,
                kept_parameters=0 if is_dropped else after[position[index]],
            )
        )
    return tuple(layers)
