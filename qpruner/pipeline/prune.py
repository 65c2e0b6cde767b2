"""The prune stage: cut the base model and record the width of every block."""

from __future__ import annotations

import copy
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.cluster.executor import ModelCache
from qpruner.config.schema import PruneConfig, RunConfig
from qpruner.data.encoding import importance_samples, load_encoded
from qpruner.data.sources import Example
from qpruner.models.checkpoint import prepare_base, save_checkpoint
from qpruner.models.families import ATTENTION, EXPERT, MLP, family_of
from qpruner.models.loading import load_dense, load_model_config, load_tokenizer
from qpruner.models.memory import PeakMemory, copy_weights
from qpruner.pipeline.preflight import DTYPE_BYTES, PRUNED_EARLIER, is_pruned
from qpruner.pipeline.prepare import loading_progress
from qpruner.pipeline.stage import Stage
from qpruner.pruning.settings import settled
from qpruner.runs.events import Emit, Message, StageStarted
from qpruner.runs.records import LayerWidths, PrepareRecord, PruneRecord, digest_of
from qpruner.runs.storage import Storage, fetch, require_arrived, retry_storage, writing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qpruner.data.losses import Rows
    from qpruner.pruning.prune import Pruned


class Prune(Stage[PruneRecord]):
    """Score all units, select the units to keep, compensate, cut and save the model."""

    name = "prune"
    help = "Run up to the pruned checkpoint."
    record = PruneRecord
    repairs_files = True
    starts_ray = False
    memory_keys = "`calibration.batch_size` or `calibration.max_length`"

    def inputs(self) -> tuple[Any, ...]:
        inspection = self.context.inspection
        return (self.context.record(PrepareRecord).digest, settled(inspection.model_config, self.config.prune))

    def detail(self) -> str:
        return describe(self.context.inspection.cuts[0].settings)

    def run(self, scratch: Path) -> dict[str, Any]:
        context, settings = self.context, self.context.inspection.cuts[0].settings
        self._report_earlier_cut()
        base = context.run_dir.base_model(context.record(PrepareRecord))
        cut = partial(cut_and_save, self.config, settings, base, context.data / "importance", scratch)
        fields = context.executor.run(cut, context.emit)
        require_arrived(scratch)
        return fields

    def summary(self, record: PruneRecord) -> str:
        sizes = f"{record.parameters_before / 1e6:.1f}M -> {record.parameters_after / 1e6:.1f}M parameters"
        return f"{sizes} ({record.target}, {record.achieved})"

    def disk_bytes(self) -> int:
        base = self.context.inspection.base
        return base.num_parameters * base.element_bytes

    def preview(self) -> PruneRecord:
        """Cut the model in memory and return the record; nothing is written."""
        context, settings = self.context, self.context.inspection.cuts[0].settings
        context.emit(StageStarted(self.name, f"{self.detail()}; nothing is written"))
        self._report_earlier_cut()
        cut = partial(cut_in_memory, context.worker_config, settings, context.inspection.examples["calibration"])
        return PruneRecord(digest="", **context.executor.run(cut, context.emit))

    def _report_earlier_cut(self) -> None:
        if is_pruned(self.context.inspection.model_config):
            self.notify(f"the model was {PRUNED_EARLIER}")


def cut_and_save(
    config: RunConfig, settings: PruneConfig, base: Path, rows: Path, scratch: Path, cache: ModelCache, emit: Emit
) -> dict[str, Any]:
    """Cut the base model, save it in `scratch` and keep it in the cache; return the fields of the record."""
    from qpruner.report.plots.model import save_importance

    source, on_weights = str(fetch(base)), loading_progress(emit, "prune")
    tokenizer = load_tokenizer(source)
    # A list, because a stored exception would keep a mapped file open.
    samples = list(load_encoded(rows))
    cache.clear()
    model = load_dense(source, config.model.dtype, config.model, on_weights)
    pruned, fields = _cut(config, settings, model, samples, int(tokenizer.pad_token_id), emit)
    with writing_folder(scratch) as folder:
        save_checkpoint(pruned.model, tokenizer, folder, on_weights)
        retry_storage(lambda: save_importance(folder, pruned.scores, pruned.block_scores), folder)
    cache.keep(pruned.model)
    listed = Storage(scratch).read_list()
    assert listed, "writing_folder wrote the list"
    weights = {name: sha256 for name, sha256 in listed.sha256.items() if name.endswith(".safetensors")}
    return fields | {"weights": digest_of(weights)}


def cut_in_memory(
    config: RunConfig, settings: PruneConfig, examples: list[Example], cache: ModelCache, emit: Emit
) -> dict[str, Any]:
    """Cut the base model without saving it; return the fields of the record."""
    with tempfile.TemporaryDirectory() as scratch:
        base = prepare_base(config.model, Path(scratch), on_progress=loading_progress(emit, "prune"))
        tokenizer = load_tokenizer(base.path)
        samples = importance_samples(config, examples, load_model_config(config.model).vocab_size, tokenizer)
        started = time.monotonic()  # without the work of the prepare stage
        model = load_dense(base.path, config.model.dtype, config.model, loading_progress(emit, "prune"))
        _, fields = _cut(config, settings, model, samples, int(tokenizer.pad_token_id), emit)
        return fields | {"seconds": time.monotonic() - started}


def _cut(
    config: RunConfig, settings: PruneConfig, model: PreTrainedModel, rows: Rows, pad_id: int, emit: Emit
) -> tuple[Pruned, dict[str, Any]]:
    """Cut a model in place; return the result of `prune` and the fields of the record."""
    from qpruner.data.calibration import Samples
    from qpruner.pruning.prune import block_sizes, prune

    samples = Samples(rows, pad_id, config.calibration.batch_size)
    copy_weights(model)
    base_config = copy.deepcopy(model.config)
    block_parameters = block_sizes(model, range(base_config.num_hidden_layers))
    memory = PeakMemory()
    pruned = prune(model, settings, samples, config.seed, loading_progress(emit, "prune"))
    peak_bytes = memory.bytes()
    if pruned.parameters_after == pruned.parameters_before and not settings.is_off:
        emit(Message("prune", "warning: nothing was cut: `prune.rate` is under half of the smallest cut; raise it"))
    element_bytes = DTYPE_BYTES[config.model.dtype]
    fields = {
        "importance": settings.criterion,
        "selection": settings.selection,
        "compensation": settings.compensates_by,
        "target": target_text(settings),
        "target_rate": settings.rate,
        "achieved_rate": (pruned.parameters_before - pruned.parameters_after) / pruned.parameters_before,
        "parameters_before": pruned.parameters_before,
        "parameters_after": pruned.parameters_after,
        "bytes_before": pruned.parameters_before * element_bytes,
        "bytes_after": pruned.parameters_after * element_bytes,
        "peak_memory_bytes": peak_bytes,
        "memory_counter": memory.counter,
        "dropped_blocks": pruned.dropped_blocks,
        "layers": layer_widths(base_config, pruned, block_parameters),
    }
    return pruned, fields


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


def layer_widths(base: Any, pruned: Pruned, before: list[int]) -> list[LayerWidths]:
    """List the kept units (indices) and parameters of each block; `before` has their parameters before the cut."""
    from qpruner.pruning.prune import block_sizes

    family, after = family_of(base), block_sizes(pruned.model, range(pruned.model.config.num_hidden_layers))
    position = {old: new for new, old in enumerate(sorted(set(range(len(before))) - set(pruned.dropped_blocks)))}
    layers = []
    for index, parameters in enumerate(before):
        layer_config = base.per_layer_config[index]
        kinds = {kind.name: kind for kind in family.unit_kinds(layer_config, index)}
        is_dropped = index in pruned.dropped_blocks
        kept = {name: () if is_dropped else tuple(range(kind.num_units)) for name, kind in kinds.items()}
        kept |= {} if is_dropped else pruned.kept.get(index, {})
        if EXPERT in kinds:
            experts, size = set(kept[EXPERT]), kinds[MLP].units_per_partition
            kept[MLP] = tuple(channel for channel in kept[MLP] if channel // size in experts)
        layers.append(
            LayerWidths(
                layer=index,
                kept_kv_groups=kept[ATTENTION],
                kept_mlp_channels=kept[MLP],
                kept_experts=kept.get(EXPERT),
                base_kv_groups=kinds[ATTENTION].num_units,
                base_mlp_channels=kinds[MLP].num_units,
                base_experts=kinds[EXPERT].num_units if EXPERT in kinds else None,
                heads_per_group=layer_config.num_attention_heads // kinds[ATTENTION].num_units,
                base_parameters=parameters,
                kept_parameters=0 if is_dropped else after[position[index]],
            )
        )
    return layers
