"""Estimate the peak memory of each kind of work, by part, from the shapes.

For each token, an adapted layer of r rows and c columns keeps for the backward pass its input in
float32 (4 c), the adapter's inner values (4 x rank), and about e (r + c) for input and output in
elements of e bytes; within 15 % of autograd's, 25 % on a CPU without bfloat16. With gradient
checkpointing every block keeps its input, and one block all of this. Packed layers keep no input,
and unpack their weight in each pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from qpruner.config.schema import EXPANSION, INFORMATION, MEASUREMENT, PruneConfig, RunConfig
from qpruner.models.layout import skeleton
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import most_labelled
from qpruner.plans.plan import EMBEDDINGS, HEAD, Group, Layout, LinearShape
from qpruner.pruning.grams import gram_bytes
from qpruner.pruning.settings import cuttable_layers
from qpruner.pruning.units import available, unit_sizes
from qpruner.quantization.formats import format_of
from qpruner.quantization.formats.layers import PIECE
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
    about, layout = (
        "(`training.micro_batch_size`), in the final fine-tune too",
        _largest_trial(config, inspection),
    )
    return _step(config, inspection, layout, _trial_bytes(layout, inspection), about)


def comparison_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate the memory of `finetune.compare`.

    Its largest step trains the base model, neither pruned nor quantized.
    """
    base = inspection.base
    about = "of the base model, unpacked (`finetune.compare`, `training.micro_batch_size`)"
    return _step(config, inspection, base, base.plan_bytes(base.dense()), about)


def _step(
    config: RunConfig, inspection: Inspection, layout: Layout, plan_bytes: int, about: str
) -> Memory:
    """Estimate a training step of a model whose weights and adapters take `plan_bytes`."""
    training, hidden_size = config.training, int(inspection.model_config.hidden_size)
    rows, length = training.micro_batch_size, config.data.max_length
    labelled = rows * most_labelled(inspection.examples.get("train"), config.data)
    rank, checkpointing = config.lora.rank, training.gradient_checkpointing
    activations = activation_bytes(layout, hidden_size, rows * length, rank, checkpointing)
    parts = {"activations": activations, "logits": logit_bytes(inspection, labelled)}
    parts |= _unpacked(layout, plan_bytes)
    return Memory(
        f"a step of {rows} rows x {length} tokens {about}", _held(layout, plan_bytes) | parts
    )


def scoring_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate the scoring of a trial at a rung, beside the state of its optimizer."""
    layout, rows, length = (
        _largest_trial(config, inspection),
        config.evaluate.batch_size,
        config.data.max_length,
    )
    labelled = length  # of tasks: lm-eval pads answers
    if not config.search.tasks:
        labelled = max(most_labelled(inspection.examples.get(name), config.data) for name in SCORED)
    a_logit, vocabulary = (
        inspection.base.element_bytes + 2 * FLOAT32_BYTES,
        int(inspection.model_config.vocab_size),
    )
    scored = {
        "activations": _widest(layout, rows * length),
        "logits": a_logit * rows * labelled * vocabulary,
    }
    about, size = (
        f"scoring {rows} rows x {length} tokens (`evaluate.batch_size`)",
        _trial_bytes(layout, inspection),
    )
    return Memory(about, _held(layout, size) | scored | _unpacked(layout, size))


def _largest_trial(config: RunConfig, inspection: Inspection) -> Layout:
    return inspection.base if config.is_searched else inspection.reference


def _trial_bytes(layout: Layout, inspection: Inspection) -> int:
    smallest, largest = (layout.plan_bytes(plan) for plan in (layout.smallest(), layout.largest()))
    return min(max(inspection.budget_bytes, smallest), largest)


def _held(layout: Layout, plan_bytes: int) -> dict[str, int]:
    """Return the bytes by part that training always holds; adapters are trained in float32."""
    size, weights = layout.trained_bytes, plan_bytes - layout.adapter_bytes
    return {"weights": weights, "adapters": size, "gradients": size, "optimizer": 2 * size}


def _unpacked(layout: Layout, plan_bytes: int) -> dict[str, int]:
    """Count the bytes of unpacked weights in a pass through packed layers.

    bitsandbytes unpacks all weights of a layer; other formats unpack a piece of them, with copies.
    """
    if plan_bytes >= layout.plan_bytes(layout.dense()):
        return {}
    largest, piece = (
        _largest(_blocks(layout)),
        PIECE["other" if torch.cuda.is_available() else "cpu"],
    )
    in_pieces = min(largest, piece) * (layout.element_bytes + 2 * FLOAT32_BYTES)
    return {"unpacked weights": max(largest * layout.element_bytes, in_pieces)}


def prune_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate the cut: the dense model, and the larger of importance and compensation."""
    if not (
        settings := [cut.settings for cut in inspection.cuts.values() if not cut.settings.is_off]
    ):
        return Memory("the base model", _weights(inspection.base))
    works = [_importance_memory(config, inspection, each) for each in settings]
    works += [
        _compensation_memory(config, inspection, each)
        for each in settings
        if each.compensates_by != "none"
    ]
    return max(works, key=lambda memory: memory.total)


def _importance_memory(config: RunConfig, inspection: Inspection, settings: PruneConfig) -> Memory:
    """Estimate the memory of importance.

    Gradients are counted if the criterion needs them, and a float32 per weight for `order: mixed`
    with `aggregation: element`.
    """
    calibration, base = config.calibration, inspection.base
    parts = _weights(base)
    if not settings.width_units or settings.importance not in ("fisher", "taylor"):
        return Memory(f"the base model, importance by {settings.criterion}", parts)
    if settings.order == "mixed" and settings.aggregation == "element":
        layers = cuttable_layers(inspection.model_config, settings)
        sizes = unit_sizes(skeleton(inspection.model_config), layers, settings.width_units)
        parts["mean squares"] = FLOAT32_BYTES * available(sizes)
    length, tokens = calibration.max_length, calibration.batch_size * calibration.max_length
    parts["gradient"] = FLOAT32_BYTES * _largest(
        _blocks(base)
    )  # only one parameter's gradient is held at a time
    parts |= {"activations": _kept_dense(base, tokens), "logits": logit_bytes(inspection, tokens)}
    return Memory(
        f"gradients of {calibration.batch_size} rows x {length} tokens (`calibration.batch_size`)",
        parts,
    )


def _compensation_memory(
    config: RunConfig, inspection: Inspection, settings: PruneConfig
) -> Memory:
    parts, widest = _by_block(config, inspection), _widest_input(inspection.base)
    if settings.compensates_by == "least_squares":
        parts["Gram matrix"] = 2 * FLOAT32_BYTES * widest**2
        # The output that the projection should have, the change of its weights, and its weights in
        # float32.
        parts["solution"] = 3 * FLOAT32_BYTES * int(inspection.model_config.hidden_size) * widest
    return Memory(f"compensation on {_samples(config)} (`calibration.num_samples`)", parts)


def rounding_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate how the Gram matrices of GPTQ are gathered: all matrices of one block at a time."""
    parts, base = _by_block(config, inspection), inspection.base
    tokens = config.calibration.batch_size * config.calibration.max_length
    parts["activations"] += FLOAT32_BYTES * tokens * _widest_input(base)
    parts["Gram matrices"] = 2 * max(gram_bytes(base, inspection.model_config))
    return Memory(f"inputs of {_samples(config)} (`quantize.rounding`)", parts)


def _by_block(config: RunConfig, inspection: Inspection) -> dict[str, int]:
    """Count a pass of all samples through one block after the other.

    Attention masks take one byte per pair of tokens.
    """
    length, base = config.calibration.max_length, inspection.base
    each = length * (int(inspection.model_config.hidden_size) * base.element_bytes + length)
    return _weights(base) | {
        "hidden states": config.calibration.num_samples * each,
        "activations": _widest(base, config.calibration.batch_size * length),
    }


def _samples(config: RunConfig) -> str:
    return f"{config.calibration.num_samples} samples x {config.calibration.max_length} tokens"


def _widest_input(layout: Layout) -> int:
    return max(linear.columns for group in _blocks(layout) for linear in group.linears)


def sensitivity_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Estimate the sensitivities: the dense pruned model, and the largest pass of any method."""
    dense, settings = inspection.reference, config.sensitivity
    tokens = settings.batch_size * config.data.max_length
    weights = _weights(dense)
    works = [weights]
    if set(settings.methods) & set(INFORMATION):
        works.append(weights | _by_information(config, inspection, tokens))
    measured = [
        group for group in dense.groups if any(format_of(name).is_packed for name in group.formats)
    ]
    if not set(settings.methods) & set(
        MEASUREMENT
    ):  # embeddings and head take their place in no other pass
        measured = [group for group in measured if group.name in (EMBEDDINGS, HEAD)]
    if set(settings.methods) & set(EXPANSION):
        # The gradients of the logits are freed before those of the layers are needed.
        largest = max(logit_bytes(inspection, tokens), BYTES_A_WEIGHT * _largest(_blocks(dense)))
        works.append(
            weights | {"activations": _kept_dense(dense, tokens), "logits or gradients": largest}
        )
    if measured and set(settings.methods) & {*MEASUREMENT, *EXPANSION}:
        works.append(weights | _by_measurement(inspection, measured, tokens))
    about = (
        f"passes of {settings.batch_size} rows x {config.data.max_length} tokens "
        "(`sensitivity.batch_size`)"
    )
    return Memory(about, max(works, key=lambda parts: sum(parts.values())))


def _by_information(config: RunConfig, inspection: Inspection, tokens: int) -> dict[str, int]:
    """Count the memory of mutual information by part.

    The outputs of all groups are kept at all drawn positions; those of one batch are in float32.
    """
    dense, positions = inspection.reference, config.sensitivity.max_positions
    features = [int(inspection.model_config.hidden_size)] * len(_blocks(dense))
    if config.quantize.group == "projection":
        features = [sum(linear.rows for linear in group.linears) for group in _blocks(dense)]
    drawn = min(tokens, positions)
    logits = PREDICTION_BYTES * drawn * int(inspection.model_config.vocab_size)
    return {
        "outputs": (positions * dense.element_bytes + drawn * FLOAT32_BYTES) * sum(features),
        "activations": _widest(dense, tokens),
        "logits or components": max(logits, COMPONENT_BYTES * positions * max(features)),
    }


def _by_measurement(inspection: Inspection, groups: Sequence[Group], tokens: int) -> dict[str, int]:
    """Count the memory of measuring KL and loss by part.

    `quantized group` includes the largest layer of the group, unpacked. `log-probabilities` is the
    larger of two peaks: when those of the unquantized model are made, or compared.
    """
    dense, config = inspection.reference, inspection.model_config
    quantized = [
        dense.element_bytes * each.num_weights + (2 * FLOAT32_BYTES + 1) * _largest([each])
        for each in groups
    ]
    making = (dense.element_bytes + 2 * FLOAT32_BYTES) * tokens
    comparing = (dense.element_bytes + FLOAT32_BYTES) * tokens + 4 * FLOAT32_BYTES * min(
        tokens, POSITIONS
    )
    return {
        "block outputs": int(config.num_hidden_layers)
        * tokens
        * int(config.hidden_size)
        * dense.element_bytes,
        "activations": _widest(dense, tokens),
        "quantized group": max(quantized),
        "log-probabilities": int(config.vocab_size) * max(making, comparing),
    }


def activation_bytes(
    layout: Layout, hidden_size: int, tokens: int, rank: int, checkpointing: bool
) -> int:
    """Count the bytes that a forward pass with adapters keeps for the backward pass."""
    blocks: dict[str, list[LinearShape]] = {}  # a group's name begins with its block's, `layers.07`
    for group in _blocks(layout):
        blocks.setdefault(".".join(group.name.split(".")[:2]), []).extend(group.linears)
    kept = [_kept(linears, tokens, layout.element_bytes, rank) for linears in blocks.values()]
    if not checkpointing:
        return sum(kept)
    return len(blocks) * tokens * hidden_size * layout.element_bytes + max(kept)


def logit_bytes(inspection: Inspection, tokens: int) -> int:
    """Count the bytes of the logits and of their gradients in a training step."""
    return LOGIT_BYTES * tokens * int(inspection.model_config.vocab_size)


def _kept(linears: Iterable[LinearShape], tokens: int, element_bytes: int, rank: int | None) -> int:
    """Count the bytes that layers keep for the backward pass.

    Without a rank they have no adapters.
    """
    adapter = 0 if rank is None else FLOAT32_BYTES
    return tokens * sum(
        element_bytes * (linear.rows + linear.columns) + adapter * (linear.columns + (rank or 0))
        for linear in linears
    )


def _kept_dense(dense: Layout, tokens: int) -> int:
    """Count the bytes that a model without adapters keeps for the backward pass."""
    return int(
        DENSE
        * sum(_kept(group.linears, tokens, dense.element_bytes, None) for group in _blocks(dense))
    )


def _weights(dense: Layout) -> dict[str, int]:
    return {"weights": dense.num_parameters * dense.element_bytes}


def _blocks(layout: Layout) -> list[Group]:
    """Return the groups inside of blocks, whose layers have adapters."""
    return [group for group in layout.groups if group.name not in (EMBEDDINGS, HEAD)]


def _largest(groups: Iterable[Group]) -> int:
    """Return the number of weights of the largest layer."""
    return max(linear.num_weights for group in groups for linear in group.linears)


def _widest(layout: Layout, tokens: int) -> int:
    """Count the bytes that a pass without gradients holds at once.

    These are the inputs and outputs of the widest group's layers.
    """
    return max(
        _kept(group.linears, tokens, layout.element_bytes, None) for group in _blocks(layout)
    )
