"""Peak memory of each kind of work, by part, counted from the shapes.

For n tokens in a forward pass (rows x length), a vocabulary of V and elements of e bytes:

- An adapted layer of r rows and c columns keeps for its backward pass its input in float32 for the adapter (4 c), the
  adapter's inner values (4 x rank), and about e (r + c) of what lies between layers; a layer without adapter the last
  alone. Autograd keeps within 15 % of this (Llama, Qwen3, Gemma 3: tests/test_estimate.py), within 25 % on a CPU that
  computes attention in float32 for want of bfloat16. With gradient checkpointing every block keeps its input, and one
  block all of this.
- Logits: 12 n V. The loss is taken in float32: the loss's own copy, its gradient and the gradient of the logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qpruner.config import PruneConfig, RunConfig
from qpruner.models.layout import num_layers, skeleton
from qpruner.plan import Layout, LinearShape
from qpruner.preflight import Inspection
from qpruner.pruning.prune import cuttable_layers
from qpruner.pruning.selection import available, unit_sizes

LOGIT_BYTES = 12
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one piece of work, by part.

    Attributes:
        about: What is worked on, in words.
        parts: Name -> bytes, all held at once at the highest point.
    """

    about: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def training_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Peak of a training step of a trial, or of the final fine-tune, with the budget's plan and rows of full length."""
    training, length = config.training, config.data.max_length
    tokens = training.micro_batch_size * length
    return Memory(
        f"a step of {training.micro_batch_size} rows x {length} tokens (`training.micro_batch_size`), the final "
        "fine-tune's, too",
        _held(config, inspection)
        | {
            "activations": activation_bytes(inspection, tokens, config.lora.rank, training.gradient_checkpointing),
            "logits": logit_bytes(inspection, tokens),
        },
    )


def scoring_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Peak of scoring a trial at a rung, which its optimizer's state outlasts."""
    rows, length = config.evaluate.batch_size, config.data.max_length
    tokens = rows * length
    return Memory(
        f"scoring {rows} rows x {length} tokens (`evaluate.batch_size`)",
        _held(config, inspection)
        | {"activations": _widest(inspection.pruned, tokens), "logits": logit_bytes(inspection, tokens)},
    )


def _held(config: RunConfig, inspection: Inspection) -> dict[str, int]:
    """What a trial holds all the time."""
    layout = inspection.pruned
    largest, adapters = layout.plan_bytes(layout.uniform(config.quantize.bits[-1])), layout.adapter_bytes
    return {
        "weights": min(inspection.budget_bytes, largest) - adapters,
        "adapters": adapters,
        "gradients": adapters,
        "optimizer": 2 * adapters,
    }


def prune_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Peak of the cut: what importance, compensation, or the comparison of two cuts holds beside the dense model."""
    settings = [cut.settings for cut in inspection.cuts]
    weights = {"weights": inspection.base.num_parameters * inspection.base.element_bytes}
    if settings[0].is_off:
        return Memory("the base model", weights)
    works = [_importance_memory(config, inspection, each) for each in settings]
    works += [_compensation_memory(config, inspection, each) for each in settings if each.compensates_by != "none"]
    if len(settings) > 1:
        rows, length = config.evaluate.batch_size, config.data.max_length
        parts = {
            "activations": _widest(inspection.base, rows * length),
            "logits": logit_bytes(inspection, rows * length),
        }
        works.append(Memory(f"passes of {rows} rows x {length} tokens (`evaluate.batch_size`)", weights | parts))
    return max(works, key=lambda memory: memory.total)


def _importance_memory(config: RunConfig, inspection: Inspection, settings: PruneConfig) -> Memory:
    """Where importance asks for gradients, those of one batch; `mixed` by element keeps a float32 for every weight."""
    calibration, base = config.calibration, inspection.base
    parts = {"weights": base.num_parameters * base.element_bytes}
    by_gradient = bool(settings.width_units) and settings.importance in ("fisher", "taylor")
    if not by_gradient and not (settings.drops_blocks and settings.depth_importance == "taylor"):
        return Memory(f"the base model, importance by {settings.criterion}", parts)
    if settings.order == "mixed" and settings.aggregation == "element":
        sizes = unit_sizes(
            skeleton(inspection.model_config), cuttable_layers(inspection.model_config, settings), settings.width_units
        )
        parts["mean squares"] = FLOAT32_BYTES * available(sizes)
    length = inspection.counts.sample_length
    tokens = calibration.batch_size * length
    return Memory(
        f"gradients of {calibration.batch_size} rows x {length} tokens (`calibration.batch_size`)",
        parts | _by_gradient(inspection, base, tokens),
    )


def _compensation_memory(config: RunConfig, inspection: Inspection, settings: PruneConfig) -> Memory:
    """The hidden states of all samples in front of one block, with a mask of a byte for every pair of tokens."""
    calibration, base = config.calibration, inspection.base
    samples, length = inspection.counts.samples["importance"], inspection.counts.sample_length
    hidden_bytes = int(inspection.model_config.hidden_size) * base.element_bytes
    parts = {
        "weights": base.num_parameters * base.element_bytes,
        "hidden states": samples * length * (hidden_bytes + length),
        "activations": _widest(base, calibration.batch_size * length),
    }
    if settings.compensates_by == "least_squares":
        widest = max(linear.columns for group in base.groups for linear in group.linears)
        parts["Gram matrix"] = 2 * FLOAT32_BYTES * widest**2
        # What is asked of the projection, the change that gives it, and its weights in float32.
        parts["solution"] = 3 * FLOAT32_BYTES * int(inspection.model_config.hidden_size) * widest
    return Memory(f"compensation on {samples} samples x {length} tokens (`calibration.num_samples`)", parts)


def sensitivity_memory(config: RunConfig, inspection: Inspection) -> Memory:
    """Peak of the sensitivities: the dense pruned model, and gradients of one batch where a method asks for them."""
    layout, length = inspection.pruned, config.data.max_length
    weights = {"weights": layout.num_parameters * layout.element_bytes}
    has_gradients = not {"first_order", "fisher", "second_order"}.isdisjoint(config.sensitivity.methods)
    rows = config.calibration.batch_size if has_gradients else config.evaluate.batch_size
    tokens = rows * length
    if not has_gradients:
        hidden_bytes = int(inspection.model_config.hidden_size) * layout.element_bytes
        parts = {
            "block outputs": num_layers(inspection.model_config) * tokens * hidden_bytes,
            "activations": _widest(layout, tokens),
            "logits": logit_bytes(inspection, tokens),
        }
        return Memory(f"forward passes of {rows} rows x {length} tokens", weights | parts)
    return Memory(
        f"gradients of {rows} rows x {length} tokens",
        weights | _by_gradient(inspection, layout, tokens),
    )


def _by_gradient(inspection: Inspection, dense: Layout, tokens: int) -> dict[str, int]:
    """What a backward pass through a dense model takes whose gradients are dropped one parameter at a time."""
    return {
        "gradient": FLOAT32_BYTES * max(linear.num_weights for group in dense.groups for linear in group.linears),
        "activations": sum(_kept(group.linears, tokens, dense.element_bytes, None) for group in dense.groups),
        "logits": logit_bytes(inspection, tokens),
    }


def activation_bytes(inspection: Inspection, tokens: int, rank: int, checkpointing: bool) -> int:
    """What is kept for the backward pass of a forward pass with adapters."""
    layout = inspection.pruned
    blocks = _by_block(layout)
    kept = [_kept(linears, tokens, layout.element_bytes, rank) for linears in blocks]
    if not checkpointing:
        return sum(kept)
    return len(blocks) * tokens * int(inspection.model_config.hidden_size) * layout.element_bytes + max(kept)


def logit_bytes(inspection: Inspection, tokens: int) -> int:
    """Logits and the gradients of the loss."""
    return LOGIT_BYTES * tokens * int(inspection.model_config.vocab_size)


def _kept(linears: Iterable[LinearShape], tokens: int, element_bytes: int, rank: int | None) -> int:
    """What layers keep for the backward pass; without a rank they have no adapter."""
    adapter = 0 if rank is None else FLOAT32_BYTES
    return tokens * sum(
        element_bytes * (linear.rows + linear.columns) + adapter * (linear.columns + (rank or 0)) for linear in linears
    )


def _widest(layout: Layout, tokens: int) -> int:
    """What a forward pass holds at once: the inputs and outputs of the widest group's layers."""
    return max(_kept(group.linears, tokens, layout.element_bytes, None) for group in layout.groups)


def _by_block(layout: Layout) -> list[list[LinearShape]]:
    """The linear layers of each block; a group's name begins with its block's, `layers.07`."""
    blocks: dict[str, list[LinearShape]] = {}
    for group in layout.groups:
        blocks.setdefault(".".join(group.name.split(".")[:2]), []).extend(group.linears)
    return list(blocks.values())
