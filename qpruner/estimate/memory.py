"""Estimate the peak memory of each kind of work, by part, from the shapes.

For each token, an adapted layer of r rows and c columns keeps for the backward pass its input in
float32 (4 c), the adapter's inner values (4 x rank), and about e (r + c) for input and output in
elements of e bytes; within 15 % of autograd's, 25 % on a CPU without bfloat16. With gradient
checkpointing every block keeps its input, and one block all of this. Packed layers keep no input,
and unpack their weight in each pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from qpruner.config.schema import (
    EXPANSION,
    INFORMATION,
    MEASUREMENT,
    PruneConfig,
    RunConfig,
    TrainingConfig,
)
from qpruner.models.layout import skeleton
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import most_labelled
from qpruner.pipeline.shapes import Shapes
from qpruner.plans.plan import Group, Layout, LinearShape
from qpruner.pruning.grams import gram_bytes
from qpruner.pruning.settings import cuttable_layers
from qpruner.pruning.units import available, unit_sizes
from qpruner.quantization.formats.layers import PIECE
from qpruner.quantization.tuned import BATCH_SIZE, MOST_TOKENS
from qpruner.sensitivity.expansion import BYTES_A_WEIGHT
from qpruner.sensitivity.measurement import POSITIONS

LOGIT_BYTES = 12
"""Bytes of training per logit, at tokens that may have a label: float32 copies for the loss, and
two gradients."""
SCORED = ("validation", "confirmation")
PREDICTION_BYTES = 9
"""Maximum bytes per logit in a pass without a loss: the logit, a copy, and the check that it is
finite."""
DENSE = 1.5
"""Bytes that a dense model keeps for the backward pass, relative to inputs and outputs of its
linear layers: float32 norms and gates add some. Measured 0.7 (OPT), 1.13 (Llama), 1.29 (Qwen3),
1.48 (Gemma 3), 1.53 (Phi-3), 2026-11."""
FLOAT32_BYTES = 4
COMPONENT_BYTES = 32
"""Bytes per output value for principal components in float64: value, copy for LAPACK, vectors and a
spare copy."""

TUNED_BYTES = 20
"""Bytes per weight of a block whose codes are tuned: its start, its move, the gradient of that, and
Adam's two averages, in float32."""
ROUNDED_BYTES = 16
"""Bytes per weight of the layer that is being rounded: where it starts, its codes and values, and
how far rounding moves it."""


@dataclass(frozen=True)
class Memory:
    """The peak memory of one kind of work, in bytes by part; `about` says what was counted."""

    about: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        return sum(self.parts.values())


def training_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate a training step of the largest trials.

    These are trials of the unpruned model, with a plan as large as the budget.
    """
    shapes = inspection.shapes
    layout = _largest_trial(config, shapes)
    plan_bytes = shapes.most_plan_bytes(layout)
    about = "(`training.micro_batch_size`), in the final fine-tune too"
    return _step(config, inspection, layout, plan_bytes, about)


def comparison_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate the memory of `finetune.compare`.

    Its largest step trains the base model, neither pruned nor quantized.
    """
    shapes = inspection.shapes
    base = replace(shapes.base, method="adapter")  # an unpacked model stores no scales
    about = "of the base model, unpacked (`finetune.compare`, `training.micro_batch_size`)"
    return _step(config, inspection, base, base.plan_bytes(base.dense()), about)


def _step(
    config: RunConfig, inspection: Inspection, layout: Layout, plan_bytes: int, about: str
) -> Memory:
    """Estimate a training step of a model whose weights and adapters take `plan_bytes`."""
    shapes = inspection.shapes
    training = config.training
    rows = training.micro_batch_size
    length = config.data.max_length
    labelled = rows * most_labelled(inspection.rows.examples.get("train"), config.data)
    parts = _held(layout, plan_bytes, config.training)
    parts["activations"] = activation_bytes(
        layout,
        hidden_size=int(shapes.model_config.hidden_size),
        tokens=rows * length,
        rank=config.lora.rank if layout.method == "adapter" else None,
        checkpointing=training.gradient_checkpointing,
    )
    parts["logits"] = logit_bytes(shapes, labelled)
    parts |= _unpacked(layout, plan_bytes)
    return Memory(f"a step of {rows} rows x {length} tokens {about}", parts)


def scoring_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate the scoring of a trial at a rung, beside the state of its optimizer."""
    shapes = inspection.shapes
    layout = _largest_trial(config, shapes)
    plan_bytes = shapes.most_plan_bytes(layout)
    rows = config.evaluate.batch_size
    length = config.data.max_length
    labelled = length  # of tasks: lm-eval pads answers
    if not config.search.tasks:
        labelled = max(
            most_labelled(inspection.rows.examples.get(name), config.data) for name in SCORED
        )

    num_logits = rows * labelled * int(shapes.model_config.vocab_size)
    parts = _held(layout, plan_bytes, config.training)
    parts["activations"] = _widest(layout, rows * length)
    parts["logits"] = num_logits * (shapes.base.element_bytes + 2 * FLOAT32_BYTES)
    parts |= _unpacked(layout, plan_bytes)
    return Memory(f"scoring {rows} rows x {length} tokens (`evaluate.batch_size`)", parts)


def _largest_trial(config: RunConfig, shapes: Shapes) -> Layout:
    return shapes.base if config.is_searched else shapes.reference


def _held(layout: Layout, plan_bytes: int, training: TrainingConfig) -> dict[str, int]:
    """Return the bytes by part that training always holds.

    Adapters, or changes of scales, are trained in float32.
    """
    is_adapter = layout.method == "adapter"
    trained = layout.trained_bytes
    return {
        "weights": plan_bytes - (layout.adapter_bytes if is_adapter else 0),
        "adapters" if is_adapter else "scales": trained,
        "gradients": trained,
        "optimizer": trained // FLOAT32_BYTES * training.moment_bytes,
    }


def _unpacked(layout: Layout, plan_bytes: int) -> dict[str, int]:
    """Count the bytes of unpacked weights in a pass through packed layers.

    bitsandbytes unpacks all weights of a layer; other formats unpack a piece of them, with copies.
    """
    if plan_bytes >= layout.plan_bytes(layout.dense()):
        return {}
    largest = _largest(_blocks(layout))
    piece = PIECE["other" if torch.cuda.is_available() else "cpu"]
    in_pieces = min(largest, piece) * (layout.element_bytes + 2 * FLOAT32_BYTES)
    if layout.method == "scales":  # the gradient of a piece, and its product with the weights
        in_pieces += 2 * min(largest, piece) * layout.element_bytes
    return {"unpacked weights": max(largest * layout.element_bytes, in_pieces)}


def prune_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate the cut: the dense model, and the larger of importance and compensation."""
    shapes = inspection.shapes
    works = []
    compensations = []
    for cut in shapes.cuts.values():
        if cut.settings.is_off:
            continue
        works.append(_importance_memory(config, shapes, cut.settings))
        if cut.settings.compensates_by != "none":
            compensations.append(_compensation_memory(config, shapes, cut.settings))
    if not works:
        return Memory("the base model", _weights(shapes.base))
    return max([*works, *compensations], key=lambda memory: memory.total)


def _importance_memory(config: RunConfig, shapes: Shapes, settings: PruneConfig) -> Memory:
    """Estimate the memory of importance.

    Gradients are counted if the criterion needs them, and a float32 per weight for `order: mixed`
    with `aggregation: element`.
    """
    base = shapes.base
    parts = _weights(base)
    if not settings.width_units or settings.importance not in ("fisher", "taylor"):
        return Memory(f"the base model, importance by {settings.criterion}", parts)
    if settings.order == "mixed" and settings.aggregation == "element":
        layers = cuttable_layers(shapes.model_config, settings)
        sizes = unit_sizes(skeleton(shapes.model_config), layers, settings.width_units)
        parts["mean squares"] = FLOAT32_BYTES * available(sizes)

    rows = config.calibration.batch_size
    length = config.calibration.max_length
    # Only one parameter's gradient is held at a time.
    parts["gradient"] = FLOAT32_BYTES * _largest(_blocks(base))
    parts["activations"] = _kept_dense(base, rows * length)
    parts["logits"] = logit_bytes(shapes, rows * length)
    return Memory(
        f"gradients of {rows} rows x {length} tokens (`calibration.batch_size`)",
        parts,
    )


def _compensation_memory(config: RunConfig, shapes: Shapes, settings: PruneConfig) -> Memory:
    parts = _by_block(shapes, *_calibration(config))
    if settings.compensates_by == "least_squares":
        widest = _widest_input(shapes.base)
        hidden_size = int(shapes.model_config.hidden_size)
        parts["Gram matrix"] = 2 * FLOAT32_BYTES * widest**2
        # The output that the projection should have, the change of its weights, and its weights in
        # float32.
        parts["solution"] = 3 * FLOAT32_BYTES * hidden_size * widest
    return Memory(f"compensation on {_samples(config)} (`calibration.num_samples`)", parts)


def rounding_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate how the Gram matrices of GPTQ are gathered: all matrices of one block at a time."""
    shapes = inspection.shapes
    base = shapes.base
    tokens = config.calibration.batch_size * config.calibration.max_length
    parts = _by_block(shapes, *_calibration(config))
    parts["activations"] += FLOAT32_BYTES * tokens * _widest_input(base)
    parts["Gram matrices"] = 2 * max(gram_bytes(base, shapes.model_config))
    return Memory(f"inputs of {_samples(config)} (`quantize.rounding`)", parts)


def tuned_rounding_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate how codes are tuned: one block of the dense model at a time.

    The unquantized model and the one whose blocks are tuned have hidden states of their own.
    """
    shapes = inspection.shapes
    base = shapes.base
    rows = config.quantize.tuning.rows
    parts = _by_block(shapes, rows, MOST_TOKENS, BATCH_SIZE)
    parts["hidden states"] += rows * MOST_TOKENS * _bytes_a_token(shapes)
    weights = [sum(group.num_weights for group in block) for block in _by_number(base).values()]
    parts["packed weights"] = shapes.most_plan_bytes(base)
    parts["codes, gradients and optimizer"] = (TUNED_BYTES + base.element_bytes) * max(weights)
    parts["rounding"] = ROUNDED_BYTES * _largest(_blocks(base))
    parts["activations"] = _kept_dense(base, BATCH_SIZE * MOST_TOKENS) // len(weights)
    parts["Gram matrices"] = max(gram_bytes(base, shapes.model_config))
    about = f"steps of {BATCH_SIZE} rows x {MOST_TOKENS} tokens (`quantize.rounding: tuned`)"
    return Memory(about, parts)


def _calibration(config: RunConfig) -> tuple[int, int, int]:
    calibration = config.calibration
    return calibration.num_samples, calibration.max_length, calibration.batch_size


def _by_block(shapes: Shapes, num_samples: int, length: int, batch_size: int) -> dict[str, int]:
    """Count a pass of all samples through one block after the other.

    Attention masks take one byte per pair of tokens.
    """
    base = shapes.base
    parts = _weights(base)
    parts["hidden states"] = num_samples * length * (_bytes_a_token(shapes) + length)
    parts["activations"] = _widest(base, batch_size * length)
    return parts


def _bytes_a_token(shapes: Shapes) -> int:
    return int(shapes.model_config.hidden_size) * shapes.base.element_bytes


def _samples(config: RunConfig) -> str:
    return f"{config.calibration.num_samples} samples x {config.calibration.max_length} tokens"


def _widest_input(layout: Layout) -> int:
    return max(linear.columns for group in _blocks(layout) for linear in group.linears)


def sensitivity_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate the sensitivities: the dense pruned model, and the largest pass of any method."""
    shapes = inspection.shapes
    dense = shapes.reference
    settings = config.sensitivity
    methods = set(settings.methods)
    tokens = settings.batch_size * config.data.max_length
    weights = _weights(dense)
    passes = [weights]
    if methods.intersection(INFORMATION):
        passes.append(weights | _by_information(config, shapes, tokens))
    if methods.intersection(EXPANSION):
        # The gradients of the logits are freed before those of the layers are needed.
        gradients = BYTES_A_WEIGHT * _largest(_blocks(dense))
        activations = _kept_dense(dense, tokens)
        largest = max(logit_bytes(shapes, tokens), gradients)
        passes.append(weights | {"activations": activations, "logits or gradients": largest})
    measured = _measured_groups(dense, is_all=bool(methods.intersection(MEASUREMENT)))
    if measured and methods.intersection([*MEASUREMENT, *EXPANSION]):
        passes.append(weights | _by_measurement(shapes, measured, tokens))
    about = (
        f"passes of {settings.batch_size} rows x {config.data.max_length} tokens "
        "(`sensitivity.batch_size`)"
    )
    return Memory(about, max(passes, key=lambda parts: sum(parts.values())))


def _measured_groups(dense: Layout, is_all: bool) -> list[Group]:
    """List the groups that have packed formats: all, or embeddings and head.

    Embeddings and head take their place in no other pass.
    """
    return [group for group in dense.groups if group.packed and (is_all or group.is_table)]


def _by_information(config: RunConfig, shapes: Shapes, tokens: int) -> dict[str, int]:
    """Count the memory of mutual information by part.

    The outputs of all groups are kept at all drawn positions; those of one batch are in float32.
    """
    dense = shapes.reference
    blocks = _blocks(dense)
    widths = [int(shapes.model_config.hidden_size)] * len(blocks)
    if config.quantize.group == "projection":
        widths = [sum(linear.rows for linear in group.linears) for group in blocks]

    positions = config.sensitivity.max_positions
    drawn = min(tokens, positions)
    logits = PREDICTION_BYTES * drawn * int(shapes.model_config.vocab_size)
    components = COMPONENT_BYTES * positions * max(widths)
    bytes_an_output = positions * dense.element_bytes + drawn * FLOAT32_BYTES
    return {
        "outputs": bytes_an_output * sum(widths),
        "activations": _widest(dense, tokens),
        "logits or components": max(logits, components),
    }


def _by_measurement(shapes: Shapes, groups: Sequence[Group], tokens: int) -> dict[str, int]:
    """Count the memory of measuring KL and loss by part.

    `quantized group` includes the largest layer of the group, unpacked. `log-probabilities` is the
    larger of two peaks: when those of the unquantized model are made, or compared.
    """
    dense = shapes.reference
    config = shapes.model_config
    element_bytes = dense.element_bytes
    quantized = [
        element_bytes * group.num_weights + (2 * FLOAT32_BYTES + 1) * _largest([group])
        for group in groups
    ]
    making = (element_bytes + 2 * FLOAT32_BYTES) * tokens
    comparing = (element_bytes + FLOAT32_BYTES) * tokens
    comparing += 4 * FLOAT32_BYTES * min(tokens, POSITIONS)
    outputs = tokens * int(config.hidden_size) * element_bytes
    return {
        "block outputs": int(config.num_hidden_layers) * outputs,
        "activations": _widest(dense, tokens),
        "quantized group": max(quantized),
        "log-probabilities": int(config.vocab_size) * max(making, comparing),
    }


def activation_bytes(
    layout: Layout, hidden_size: int, tokens: int, rank: int | None, checkpointing: bool
) -> int:
    """Count the bytes that a forward pass keeps for the backward pass.

    `rank` is that of adapters; None if scales are trained.
    """
    blocks = _by_number(layout).values()
    kept = [
        _kept(
            [linear for group in block for linear in group.linears],
            tokens,
            layout.element_bytes,
            rank,
        )
        for block in blocks
    ]
    if not checkpointing:
        return sum(kept)
    inputs = len(blocks) * tokens * hidden_size * layout.element_bytes
    return inputs + max(kept)


def logit_bytes(shapes: Shapes, tokens: int) -> int:
    """Count the bytes of the logits and of their gradients in a training step."""
    return LOGIT_BYTES * tokens * int(shapes.model_config.vocab_size)


def _kept(linears: Iterable[LinearShape], tokens: int, element_bytes: int, rank: int | None) -> int:
    """Count the bytes that layers keep for the backward pass.

    Without a rank they have no adapters.
    """
    bytes_a_token = 0
    for linear in linears:
        bytes_a_token += element_bytes * (linear.rows + linear.columns)
        if rank is not None:
            bytes_a_token += FLOAT32_BYTES * (linear.columns + rank)
    return tokens * bytes_a_token


def _kept_dense(dense: Layout, tokens: int) -> int:
    """Count the bytes that a model without adapters keeps for the backward pass."""
    kept = [_kept(group.linears, tokens, dense.element_bytes, None) for group in _blocks(dense)]
    return int(DENSE * sum(kept))


def _weights(dense: Layout) -> dict[str, int]:
    return {"weights": dense.num_parameters * dense.element_bytes}


def _blocks(layout: Layout) -> list[Group]:
    """Return the groups inside of blocks, whose layers have adapters."""
    return [group for group in layout.groups if not group.is_table]


def _by_number(layout: Layout) -> dict[str, list[Group]]:
    """Return the groups of each block, such as `layers.07`."""
    blocks: dict[str, list[Group]] = {}
    for group in _blocks(layout):
        block = ".".join(group.name.split(".")[:2])
        blocks.setdefault(block, []).append(group)
    return blocks


def _largest(groups: Iterable[Group]) -> int:
    """Return the number of weights of the largest layer."""
    return max(linear.num_weights for group in groups for linear in group.linears)


def _widest(layout: Layout, tokens: int) -> int:
    """Count the bytes that a pass without gradients holds at once.

    These are the inputs and outputs of the widest group's layers.
    """
    return max(
        _kept(group.linears, tokens, layout.element_bytes, rank=None) for group in _blocks(layout)
    )
