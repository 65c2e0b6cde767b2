"""Check a configuration against its model, rows, tasks and device before any weights are loaded.

`qpruner check` prints the result of `inspect`, and `qpruner run` starts with this check.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qpruner.config.schema import RunConfig
from qpruner.errors import UserError, together
from qpruner.models.families import family_of
from qpruner.pipeline.preflight_rows import Rows, check_encoding, check_rows
from qpruner.pipeline.shapes import GIB, Shapes, expected_shapes
from qpruner.plans.plan import UNPRUNED
from qpruner.quantization.formats import Capability, format_of
from qpruner.runs.storage import run_root

PRUNED_EARLIER = "pruned earlier: the cut is skipped"


@dataclass(frozen=True)
class Inspection:
    """Everything known about a run before its first stage."""

    shapes: Shapes
    rows: Rows
    warnings: tuple[str, ...] = ()


def inspect(config: RunConfig, works_here: bool = True, packs: bool = True) -> Inspection:
    """Validate a configuration against model, data and tasks.

    With `works_here` the stages run on this machine, so it is checked too; `packs` is False if they
    pack no weights.
    """
    import torch

    has_gpu = torch.cuda.is_available()

    def check_shapes() -> Shapes:
        if works_here:
            check_device(torch.cuda.get_device_capability() if has_gpu else None, config, packs)
        return expected_shapes(config, on_gpu=has_gpu or not works_here, packs=packs)

    _, shapes, rows = together(
        lambda: run_root(config.output), check_shapes, lambda: check_rows(config)
    )
    _check_positions(config, shapes)
    check_encoding(config, rows.examples)
    return Inspection(shapes, rows, (*rows.warnings, *_doubts(config, shapes)))


def _check_positions(config: RunConfig, shapes: Shapes) -> None:
    """Raise an error if rows or samples are longer than the learned position table of the model."""
    model_config = shapes.model_config
    if not family_of(model_config).has_learned_positions:
        return
    lengths = {"data.max_length": config.data.max_length}
    if not all(cut.settings.is_off for cut in shapes.cuts.values()):
        lengths["calibration.max_length"] = config.calibration.max_length
    most = int(model_config.max_position_embeddings)
    for name, length in lengths.items():
        if length > most:
            raise UserError(
                f"`{name}`: {length} tokens are more than the {most} positions that this "
                f"{model_config.model_type} model has learned: use at most {most}"
            )


def _doubts(config: RunConfig, shapes: Shapes) -> Iterator[str]:
    """Warn if all plans fit, or if the plans to beat may use up all trials.

    The plans to beat (`pipeline/controls.py`) run first.
    """
    largest = shapes.base.plan_bytes(shapes.base.largest())
    if config.quantize.has_choice and largest <= shapes.budget_bytes:
        yield (
            f"`quantize.budget`: every plan fits, as the largest takes {largest / 1e6:.1f} MB: "
            "ask for fewer bytes"
        )
    trials = config.search.max_trials
    num_controls = most_controls(config)
    if num_controls >= trials and config.is_searched:
        yield (
            f"up to {num_controls} plans to beat (two of each cut, the paper's) run first and may "
            f"leave none of {trials} trials (`search.max_trials`) to the searcher: allow more"
        )


def most_controls(config: RunConfig) -> int:
    """Count the plans to beat: two of the base model and of each cut, and the paper's."""
    return 2 * len({UNPRUNED, *config.prune.cuts}) + 1


def amount(size: int) -> str:
    """Format bytes as GiB, such as `1.5 GiB`, or as MiB below one GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{-(-size * 10 // 1024**2) / 10:.1f} MiB"


def check_gpu(config: RunConfig, capability: Capability) -> None:
    """Raise an error if a GPU of this compute capability cannot run one of the formats."""
    for name in {*config.quantize.levels, *config.quantize.embedding_levels}:
        reason = format_of(name).refusal(4096, capability)
        if reason:
            has = ".".join(map(str, capability))
            raise UserError(
                f"`quantize.formats`: a GPU of compute capability {has} cannot run {name}: "
                f"{reason}; leave {name} out"
            )


def check_device(capability: Capability | None, config: RunConfig, packs: bool) -> None:
    """Raise an error if a device cannot run type and formats of a model.

    The device is a GPU of this compute capability, or a CPU (None).
    """
    if capability is None and config.model.dtype == "float16":
        raise UserError(
            "`model.dtype`: float16 cannot be trained on a CPU; use bfloat16 or float32"
        )
    if packs and capability is not None:
        check_gpu(config, capability)
