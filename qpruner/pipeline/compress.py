"""The one-time stages around the cut: prepare, sensitivity, bank."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.config import DataSource
from qpruner.events import Progress
from qpruner.pipeline.context import Context
from qpruner.pipeline.stage import Stage, run_stage
from qpruner.plan import FULL_BITS, check_cpu_widths
from qpruner.records import BankRecord, PrepareRecord, PruneRecord, SensitivityRecord
from qpruner.rundir import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qpruner.data import Example


def prepare(context: Context) -> PrepareRecord:
    """The base model as a folder, and every split encoded once."""
    config = context.config
    inputs = (config.model, config.data, config.calibration, config.seed, *_source_digests(context))
    stage = Stage("prepare", f"base model {config.model.source}, encoding the data", inputs)

    def work(scratch: Path) -> dict[str, Any]:
        from qpruner.models.checkpoint import prepare_base

        base = prepare_base(config.model, scratch / "model")
        counts = _encode_splits(context, base.path, scratch / "data")
        # The scratch folder is about to get the stage's name.
        path = context.run_dir.stage("prepare") / "model" if base.converted else base.path
        return {"model_path": str(path), "converted": base.converted, "num_rows": counts}

    def figures(record: PrepareRecord) -> str:
        return ", ".join(f"{count} {name}" for name, count in record.num_rows.items()) + " rows"

    return run_stage(context.run_dir, stage, PrepareRecord, work, figures, context.emit)


def sensitivity(context: Context, pruned: PruneRecord) -> SensitivityRecord:
    """Mutual information of each group with the prediction."""
    config = context.config
    inputs = (pruned.digest, config.sensitivity, config.quantize.group, config.seed, config.evaluate.batch_size)
    stage = Stage("sensitivity", "mutual information between group outputs and the prediction", inputs)

    def work(scratch: Path) -> dict[str, Any]:
        from qpruner.data import load_encoded
        from qpruner.models.loading import load_tokenizer
        from qpruner.sensitivity import mutual_information as mi

        found = mi.measure(
            context.pruned_model(),
            load_encoded(context.data / "sensitivity"),
            config.quantize.group,
            config.sensitivity,
            pad_id=int(load_tokenizer(str(context.checkpoint)).pad_token_id),
            batch_size=config.evaluate.batch_size,
            seed=config.seed,
            on_group=lambda done, total: context.emit(Progress("sensitivity", done, total)),
        )
        return {
            "estimator": mi.ESTIMATOR,
            "source": mi.SOURCE,
            "bias": mi.BIAS,
            "num_positions": found.num_positions,
            "num_classes": found.num_classes,
            "groups": found.groups,
            "mutual_information_nats": found.values,
            "raw_nats": found.raw,
            "baseline_nats": found.baseline,
        }

    def figures(record: SensitivityRecord) -> str:
        values = record.mutual_information_nats
        return (
            f"{min(values):.3f} to {max(values):.3f} nats over {len(values)} groups "
            f"({record.num_positions} positions, {record.num_classes} tokens)"
        )

    return run_stage(context.run_dir, stage, SensitivityRecord, work, figures, context.emit)


def bank(context: Context, pruned: PruneRecord) -> BankRecord:
    """Packed weights and adapter starts of every (group, bits)."""
    config, quantize = context.config, context.config.quantize
    levels = tuple(bits for bits in quantize.bits if bits != FULL_BITS)
    starts = config.lora.model_copy(update={"dropout": 0.0})
    inputs = (pruned.digest, quantize.group, levels, quantize.double_quant, starts, config.seed)
    named = ", ".join(map(str, levels))
    stage = Stage("bank", f"packing every group at {named} bits, {config.lora.init} start", inputs)

    def work(scratch: Path) -> dict[str, Any]:
        from qpruner.models.layout import group_linears
        from qpruner.quantization.bank import EntrySettings, build_entry, write_entry

        model = context.pruned_model()
        if 4 in levels and model.device.type != "cuda":
            check_cpu_widths([linear for group in context.layout.groups for linear in group.linears])
        settings = EntrySettings(config.lora, quantize.double_quant, config.seed)
        groups = group_linears(model.config, quantize.group)
        files: dict[str, str] = {}
        ratios: dict[str, dict[str, float]] = {str(bits): {} for bits in levels}
        for position, (name, paths) in enumerate(groups.items()):
            weights = {path: model.get_submodule(path).weight for path in paths}
            for bits in levels:
                entry = build_entry(weights, bits, settings)
                file = write_entry(scratch, name, bits, entry)
                files[str(file.relative_to(scratch))] = file_digest(file)
                ratios[str(bits)][name] = entry.residual_ratio
            context.emit(Progress("bank", position + 1, len(groups)))
        size = sum((scratch / name).stat().st_size for name in files)
        return {"files": files, "bytes": size, "residual_ratio": ratios}

    def figures(record: BankRecord) -> str:
        left = ", ".join(
            f"{bits}-bit {sum(ratio.values()) / len(ratio):.3f}" for bits, ratio in record.residual_ratio.items()
        )
        return f"{len(record.files)} entries, {record.bytes / 1e6:.0f} MB; share of the error left: {left}"

    record = run_stage(context.run_dir, stage, BankRecord, work, figures, context.emit)
    context.drop_pruned_model()
    return record


def _encode_splits(context: Context, model_path: str, folder: Path) -> dict[str, int]:
    """Encode every split and the calibration samples; returns rows by split."""
    from qpruner.data import encode, pack, save_encoded
    from qpruner.models.loading import load_tokenizer

    config, settings = context.config, context.config.data
    tokenizer = load_tokenizer(model_path)
    examples = context.inspection.examples
    splits = {
        name: encode(examples[name], tokenizer, settings.max_length, settings.template, settings.response_only)
        for name in ("train", "validation", "confirmation")
    }
    if settings.packing:
        splits["train"] = pack(splits["train"], settings.max_length)
    splits["importance"] = importance_samples(context, tokenizer)
    # Importance is the whole text's loss, as in LLM-Pruner; sensitivity looks where an answer is predicted.
    sensitivity = _shuffled_calibration(context)[: config.calibration.num_sensitivity_samples]
    splits["sensitivity"] = encode(sensitivity, tokenizer, settings.max_length, settings.template)
    for name, rows in splits.items():
        save_encoded(rows, folder / name)
    return {name: len(rows) for name, rows in splits.items()}


def importance_samples(context: Context, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """What importance is measured on: given token ids, packed windows, or the first rows of a shuffle."""
    from qpruner.data import encode, load_token_ids, windows

    settings, template = context.config.calibration, context.config.data.template
    if settings.token_ids:
        return load_token_ids(Path(settings.token_ids), context.inspection.model_config.vocab_size)
    rows = _shuffled_calibration(context)
    if settings.packing:
        return windows(rows, tokenizer, settings.num_samples, settings.max_length, template)
    return encode(rows[: settings.num_samples], tokenizer, settings.max_length, template, response_only=False)


def _shuffled_calibration(context: Context) -> list[Example]:
    rows = list(context.inspection.examples["calibration"])
    random.Random(context.config.seed).shuffle(rows)
    return rows


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
