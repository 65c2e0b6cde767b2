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

from qpruner.config.schema import PruneConfig, RunConfig
from qpruner.data.encoding import load_encoded
from qpruner.errors import CorruptFile, TrainingDiverged, UserError
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.families import ATTENTION, MLP, family_of
from qpruner.models.layout import multiply_adds
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.models.memory import PeakMemory, copy_weights, release
from qpruner.pipeline.preflight import PRUNED_EARLIER
from qpruner.pipeline.prepare import loading_progress
from qpruner.pipeline.shapes import DTYPE_BYTES, Shapes, is_pruned, left_out_text, uncut
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

    from qpruner.pruning.prune import Pruned

CUT_FILE = "cut.json"  # name of the record in the folder of a cut, which is written last


@dataclass(frozen=True)
class Wanted:
    """A cut to make: its settings, its digest and its folder.

    If nothing is cut, the folder has only the record.
    """

    settings: PruneConfig
    digest: str
    folder: Path


Made = tuple[dict[str, CutRecord], dict[str, str]]
"""Records of the cuts that were made, and reasons why the others could not be made, by name."""


class Prune(Stage[PruneRecord]):
    """Make each cut: score all units, select the units to keep, compensate, cut and save the model.

    The importance of the first step is measured once for all cuts. A cut that an earlier command
    made is reused.
    """

    name = "prune"
    help = "Run up to the pruned checkpoints."
    record = PruneRecord
    keeps_files = False
    starts_ray = False
    memory_keys = "`calibration.batch_size` or `calibration.max_length`"

    @property
    def _expected(self) -> Shapes:
        return self.context.inspection.shapes

    def warnings(self) -> Iterable[str]:
        return [left_out_text(*each) for each in self._expected.left_out.items()]

    def inputs(self) -> tuple[Any, ...]:
        return ({name: each.digest for name, each in self._wanted().items()},)

    def _wanted(self) -> dict[str, Wanted]:
        """Describe the cuts, the one that removes least first.

        The base model is always among them.
        """
        expected = self._expected
        prepared = self.context.record(PrepareRecord).digest
        planned = {UNPRUNED: uncut(self.config.prune)}
        planned |= {name: cut.settings for name, cut in expected.cuts.items()}
        wanted = {}
        for name, settings in planned.items():
            digest = digest_of("cut", prepared, settled(expected.model_config, settings))
            wanted[name] = Wanted(settings, digest, self.context.run_dir.cut(name))
        return wanted

    def detail(self) -> str:
        cuts = self._expected.cuts
        most = list(cuts.values())[-1].settings
        if len(cuts) > 1:
            return describe(most, ", ".join(map(cut_title, cuts)))
        return describe(most, target_text(most))

    def run(self, scratch: Path) -> dict[str, Any]:
        context = self.context
        places = context.places
        wanted = self._wanted()
        if is_pruned(self._expected.model_config):
            self.notify(f"the model was {PRUNED_EARLIER}")
        made = self._made_earlier(wanted)
        left_out: dict[str, str] = {}
        missing = {name: cut for name, cut in wanted.items() if name not in made}
        if missing:
            saved = [wanted[name].folder for name in made if name != UNPRUNED]
            base = places.model_folder(UNPRUNED)
            work = partial(make_cuts, self.config, base, places.data, missing, saved)
            new, left_out = context.machines.executor.run(work, context.emit)
            for name in new:
                require_arrived(wanted[name].folder)
            made |= new
        if not made.keys() & self._expected.cuts.keys():
            raise UserError(next(iter(left_out.values())))
        for name, reason in left_out.items():
            self.notify(f"warning: {left_out_text(name, reason)}")
        cuts = {name: made[name] for name in wanted if name in made}
        return {"cuts": cuts, "left_out": {**self._expected.left_out, **left_out}}

    def _made_earlier(self, wanted: Mapping[str, Wanted]) -> dict[str, CutRecord]:
        """Return the records of the cuts that earlier commands made.

        Their inputs were equal, and their files are intact.
        """
        root = self.context.run_dir.root
        found: dict[str, CutRecord] = {}
        for name, each in wanted.items():
            if super().is_complete(each.folder) and storage_at(each.folder).read_list():
                record = self.read_intact(
                    each.folder / CUT_FILE, CutRecord, root, "the cut is made again"
                )
                if record and record.digest == each.digest:
                    found[name] = record
        return found

    def summary(self, record: PruneRecord) -> str:
        # Without stages that pack, no machine here needs to be able to run a trial.
        expected = self._expected
        usable = self.context.shapes.cuts if expected.packs else expected.cuts
        shown = [cut for name, cut in record.cuts.items() if name in usable]
        sizes = ", ".join(f"{each.parameters_after / 1e6:.1f}M" for each in shown)
        before = record.cuts[UNPRUNED].parameters_before
        if len(shown) > 1:
            return f"{before / 1e6:.1f}M -> {sizes} parameters in {counted(len(shown), 'cut')}"
        return f"{before / 1e6:.1f}M -> {sizes} parameters ({shown[0].target}, {shown[0].achieved})"

    def matching_record(self, digest: str) -> PruneRecord | None:
        record = super().matching_record(digest)
        if record is None:
            return None
        # A killed command may have made other cuts since.
        folder = self.context.run_dir.cut
        is_same = all(read_cut(folder(name)) == cut for name, cut in record.cuts.items())
        return record if is_same else None

    def is_complete(self, folder: Path) -> bool:
        # each damaged one is set aside
        are_intact = [super(Prune, self).is_complete(cut) for cut in self._folders]
        return all(are_intact)

    def unfinished(self) -> Iterable[Path]:
        return [*super().unfinished(), *self._folders]

    @property
    def _folders(self) -> list[Path]:
        return [self.context.run_dir.cut(name) for name in self._expected.cuts]

    def disk_bytes(self) -> int:
        layouts = [each for each in self._expected.layouts.values() if each.cut != UNPRUNED]
        return sum(layout.num_parameters * layout.element_bytes for layout in layouts)


def read_cut(folder: Path) -> CutRecord | None:
    """Read the record of a saved cut; None if there is none, or if its files have no list."""
    with suppress(CorruptFile):
        return read_json(folder / CUT_FILE, CutRecord) if storage_at(folder).read_list() else None
    return None


def make_cuts(
    config: RunConfig,
    base: Path,
    data: Path,
    wanted: Mapping[str, Wanted],
    saved: Sequence[Path],
    emit: Emit,
) -> Made:
    """Make the cuts of the base model, each in its folder.

    The importances in the folders `saved` are used again.
    """
    made: dict[str, CutRecord] = {}
    left_out: dict[str, str] = {}
    cutter = Cutter(config, base, data, saved, emit)
    model = None
    for name, cut in wanted.items():
        record = read_cut(cut.folder)
        if record and record.digest == cut.digest:  # made by a process that has died
            made[name] = record
            continue
        model = model or cutter.load()
        try:
            made[name] = cutter.make(name, model, cut)
        except (UserError, TrainingDiverged) as error:
            if name == UNPRUNED and isinstance(error, TrainingDiverged):
                raise
            left_out[name] = str(error)
        if name != UNPRUNED:
            model = None
    return made, left_out


class Cutter:
    """Makes cuts of a base model, one after the other; one model is in memory."""

    def __init__(
        self, config: RunConfig, base: Path, data: Path, saved: Sequence[Path], emit: Emit
    ) -> None:
        from qpruner.data.calibration import Samples
        from qpruner.pruning.prune import FirstScores, load_importance

        self._config = config
        self._source = str(fetch(base))
        self._emit = emit
        self._on_work = loading_progress(emit, "prune")
        self._tokenizer = load_tokenizer(self._source)
        self._pad_id = int(self._tokenizer.pad_token_id)
        # Lists, because a stored exception would keep a mapped file open.
        samples = list(load_encoded(data / "importance"))
        self._samples = Samples(samples, self._pad_id, config.calibration.batch_size)
        self._rows = list(load_encoded(data / "sensitivity"))
        self._first = FirstScores()
        for folder in saved:
            record = read_cut(folder)
            if record:
                self._first.add(load_importance(fetch(folder)), record.dropped_blocks)

    def load(self) -> PreTrainedModel:
        """Load the base model, into memory of its own."""
        release()  # the cut before
        model = load_dense(
            self._source, self._config.model.dtype, self._config.model, self._on_work
        )
        copy_weights(model)
        return model

    def make(self, name: str, model: PreTrainedModel, wanted: Wanted) -> CutRecord:
        """Cut the base model in place, save it, and return the record.

        It is not saved if it is the base itself.
        """
        from qpruner.pruning.prune import save_importance

        pruned, record = self._cut(model, wanted)
        remove(wanted.folder)
        with writing_folder(wanted.folder) as here:
            here.mkdir(parents=True, exist_ok=True)
            if name != UNPRUNED:
                save_checkpoint(pruned.model, self._tokenizer, here, self._on_work)
                retry_storage(
                    lambda: save_importance(here, pruned.scores, pruned.block_scores), here
                )
        if name != UNPRUNED:
            listed = Storage(wanted.folder).read_list()
            assert listed, "writing_folder wrote the list"
            digests = listed.sha256.items()
            weights = {file: sha256 for file, sha256 in digests if file.endswith(".safetensors")}
            record = record.model_copy(update={"weights": digest_of(weights)})
            after = f"{pruned.parameters_after / 1e6:.1f}M parameters, loss {record.loss:.4f}"
            self._emit(Message("prune", f"{cut_title(name)}: {after}"))
        write_json(wanted.folder / CUT_FILE, record)
        return record

    def _cut(self, model: PreTrainedModel, wanted: Wanted) -> tuple[Pruned, CutRecord]:
        """Cut a model in place; return the result of `prune` and the record."""
        from qpruner.data.losses import mean_loss
        from qpruner.pruning.prune import block_sizes, prune

        config = self._config
        settings = wanted.settings
        started = time.monotonic()
        base_config = copy.deepcopy(model.config)
        block_parameters = block_sizes(model, range(base_config.num_hidden_layers))
        memory = PeakMemory()
        pruned = prune(model, settings, self._samples, config.seed, self._on_work, self._first)
        peak_bytes = memory.bytes()
        loss = mean_loss(pruned.model, self._rows, self._pad_id, config.calibration.batch_size).mean
        element_bytes = DTYPE_BYTES[config.model.dtype]
        num_removed = pruned.parameters_before - pruned.parameters_after
        return pruned, CutRecord(
            digest=wanted.digest,
            seconds=time.monotonic() - started,
            importance=settings.criterion,
            selection=settings.selection,
            compensation=settings.compensates_by,
            target=target_text(settings),
            achieved_rate=num_removed / pruned.parameters_before,
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


def describe(settings: PruneConfig, target: str) -> str:
    """Describe a cut in one line, or several by their `target`.

    If there are several, `settings` are those of the largest.
    """
    if settings.is_off:
        return target
    parts = [target, f"by {settings.criterion.replace('_', ' ')}", settings.selection]
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
        return (
            f"target {settings.layer_rate:.2%} of each block's "
            f"{' and '.join(settings.width_units)} units"
        )
    return f"target {settings.rate or 0:.2%} of all parameters"


def layer_widths(base: Any, pruned: Pruned, before: list[int]) -> tuple[LayerWidths, ...]:
    """List the kept units (indices) and parameters of each block.

    `before` has the parameters of the blocks before the cut.
    """
    from qpruner.pruning.prune import block_sizes

    family = family_of(base)
    after = iter(block_sizes(pruned.model, range(pruned.model.config.num_hidden_layers)))
    layers = []
    for index, parameters in enumerate(before):
        layer_config = base.per_layer_config[index]
        kinds = {kind.name: kind for kind in family.unit_kinds(layer_config)}
        kept: dict[str, tuple[int, ...]] = dict.fromkeys(kinds, ())
        kept_parameters = 0
        if index not in pruned.dropped_blocks:
            kept = {name: tuple(range(kind.num_units)) for name, kind in kinds.items()}
            kept |= pruned.kept.get(index, {})
            kept_parameters = next(after)
        layers.append(
            LayerWidths(
                layer=index,
                kept_kv_groups=kept[ATTENTION],
                kept_mlp_channels=kept[MLP],
                base_kv_groups=kinds[ATTENTION].num_units,
                base_mlp_channels=kinds[MLP].num_units,
                heads_per_group=layer_config.num_attention_heads // kinds[ATTENTION].num_units,
                base_parameters=parameters,
                kept_parameters=kept_parameters,
            )
        )
    return tuple(layers)
