"""Check GGUF files by loading them in llama.cpp, and compare them with the checkpoint from which they were written.

Three checks see different faults. The bytes of every tensor are read again from disk and compared. Token ids are
compared on 1,000 texts. Predictions of llama.cpp are compared with those of transformers, which computes in float32
here: this sees what is written as wanted but means something else to llama.cpp, such as rows in a wrong order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpruner.data.losses import hooked
from qpruner.errors import StageError
from qpruner.export.compare import Likeness
from qpruner.export.gguf import running
from qpruner.export.gguf.isolation import isolated
from qpruner.export.gguf.writing import adapter_tensors, base_tensors
from qpruner.models.loading import OnWork, checkpoint_config, ignore_progress

if TYPE_CHECKING:
    import torch

LONGEST = 256
"""Tokens of a row that are compared: logits of more take gigabytes with large vocabularies."""
MOST_DIVERGENCE, LEAST_LIMIT = 3.0, 5e-4
"""Largest allowed KL divergence: in units of the divergence that rounding makes, and at least, in nats per token.

llama.cpp rounds the inputs of packed layers to 8 bits and those of others to 16. How much this changes predictions
depends on the model, so it is measured: transformers computes once more with inputs rounded as much. That result is no
closer to llama.cpp's than the exact one, because errors of rounding are chaotic.

SmolLM2 with adapter, 567 tokens, 2026-11-29: a plan of q4_0 and q5_0 diverges by 0.0033 (0.86 of what rounding makes),
q4_0 0.0039 (1.01), q8_0 0.0040 (1.12), with q4_k 0.0059 (1.03), with q2_k 0.022 (1.06), bf16 0.00013 (1.05), f16
0.000003. Faults in that plan: q in the wrong order in the first of 30 blocks 2.3, in block 15 0.13, in the last 0.03;
rows of the embeddings shifted by one 7.3; no adapter 0.15, none in the first block 0.010, none in block 15 0.005. The
last two pass here, which is why bytes are compared too (in bf16 even 0.0006 of one lost layer is above the limit).
"""
MOST_PERPLEXITY = 0.01
"""Largest allowed change of the perplexity, beyond three standard errors."""
LEAST_SHARE, LARGEST_SHARE = 0.75, 1.25
"""Allowed effect of the adapter, as a share of that in transformers (0.99 in the demo, 2026-11-29)."""
LEAST_EFFECT = 0.25
"""Smallest effect of an adapter that is checked, as a share of the error of all log-probabilities."""
REMEDY = "repeat the command; if it fails again, report it with the run's results.json and the version of `xllamacpp`"


@dataclass(frozen=True)
class Served(Likeness):
    """What was found: the loss in nats per token of llama.cpp and of transformers, both on the compared rows.

    `stderr` is the standard error of the difference of losses. `adapter_share` is the effect of the adapter, as a share
    of that in transformers; None without adapter, or if its effect is too small to be seen.
    """

    loss: float
    expected_loss: float
    stderr: float
    adapter_share: float | None
    build: str


def check(
    checkpoint: Path,
    model: Path,
    adapter: Path | None,
    rows: Sequence[Sequence[int]],
    on_progress: OnWork = ignore_progress,
    library: Path | None = None,
) -> Served:
    """Compare the files of a model and its adapter with their checkpoint, on rows of token ids.

    Raises:
        StageError: If llama.cpp refuses or crashes, or if bytes, token ids or predictions differ.
        UserError: If `xllamacpp` is missing.
    """
    check_bytes(checkpoint, model, adapter, on_progress)
    check_tokens(checkpoint, model, library)
    return check_predictions(checkpoint, model, adapter, rows, on_progress, library)


def check_bytes(checkpoint: Path, model: Path, adapter: Path | None, on_progress: OnWork = ignore_progress) -> None:
    """Read the files again, and compare types and bytes of all tensors with the checkpoint."""
    import gguf
    import numpy

    config = checkpoint_config(checkpoint)
    for file, tensors in ((model, base_tensors), (adapter, adapter_tensors)):
        if file is None:
            continue
        found = {each.name: each for each in gguf.GGUFReader(file).tensors}
        expected = list(tensors(checkpoint, config))
        for done, (name, type_name, data) in enumerate(expected, 1):
            stored = found.pop(name, None)
            if stored is None:
                raise _differs(file, f"has no tensor `{name}`")
            same_type = stored.tensor_type.name == type_name
            if not same_type or not numpy.array_equal(stored.data.view(numpy.uint8).ravel(), data.ravel()):
                raise _differs(file, f"has other bytes in `{name}`")
            on_progress("reading the file again", done, len(expected))
        if found:
            raise _differs(file, f"has a tensor that the checkpoint lacks: `{min(found)}`")


def check_tokens(checkpoint: Path, model: Path, library: Path | None = None) -> None:
    """Compare token ids on 1,000 texts."""
    for text, found, expected in isolated(running.token_differences, model, checkpoint, library):
        raise _differs(model, f"makes other tokens of {text[:60]!r}: {found[:8]} instead of {expected[:8]}")


def check_predictions(
    checkpoint: Path,
    model: Path,
    adapter: Path | None,
    rows: Sequence[Sequence[int]],
    on_progress: OnWork = ignore_progress,
    library: Path | None = None,
) -> Served:
    """Compare log-probabilities at all positions of rows."""
    import torch

    compared = [list(row[:LONGEST]) for row in rows]
    (build,) = isolated(running.builds, library)
    divergence, rounding, num_agreeing, effects, losses = 0.0, 0.0, 0, torch.zeros(3), []
    for row, found, (expected, rounded, without) in _predictions(
        checkpoint, model, adapter, compared, on_progress, library
    ):
        divergence += float((expected.exp() * (expected - found)).sum())
        rounding += float((expected.exp() * (expected - rounded)).sum())
        num_agreeing += int((expected.argmax(-1) == found.argmax(-1)).sum())
        if adapter:
            added, error = expected - without, found - expected
            effects += torch.stack([(error * added).sum(), added.square().sum(), error.square().sum()])
        next_tokens = torch.tensor(row[1:])[:, None]
        losses.append(-torch.cat([each[:-1].gather(1, next_tokens) for each in (found, expected)], 1).double())
    both, count = torch.cat(losses), sum(map(len, compared))
    served = Served(
        divergence=divergence / count,
        agreement=num_agreeing / count,
        num_positions=count,
        loss=float(both[:, 0].mean()),
        expected_loss=float(both[:, 1].mean()),
        stderr=float((both[:, 0] - both[:, 1]).std() / len(both) ** 0.5),
        adapter_share=_share(*effects.tolist()) if adapter else None,
        build=build,
    )
    _judge(served, model, max(LEAST_LIMIT, MOST_DIVERGENCE * rounding / count))
    return served


def _predictions(
    checkpoint: Path,
    model: Path,
    adapter: Path | None,
    rows: list[list[int]],
    on_progress: OnWork,
    library: Path | None,
) -> Iterator[tuple[list[int], torch.Tensor, list[torch.Tensor]]]:
    """Yield rows with log-probabilities ``(seq, vocabulary)``.

    They are llama.cpp's, and those expected: as they are, with rounded inputs, and without adapter.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    from qpruner.hf import load

    loaded = load(checkpoint, on_progress).eval()
    dtype = loaded.dtype
    # transformers forbids `model.float()` for packed layers; ours compute in the type of their inputs.
    expecting = torch.nn.Module.float(loaded)
    adapters = [layer for layer in expecting.modules() if isinstance(layer, BaseTunerLayer)] if adapter else []

    @torch.no_grad()
    def expected(row: list[int]) -> torch.Tensor:
        logits: torch.Tensor = expecting(torch.tensor([row], device=expecting.device)).logits[0]
        return logits.float().log_softmax(-1).cpu()

    answers = isolated(running.row_logits, model, adapter, rows, library)
    for done, (row, logits) in enumerate(zip(rows, answers, strict=True), 1):
        as_it_is, found = expected(row), torch.from_numpy(logits).log_softmax(-1)
        if found.shape != as_it_is.shape:
            raise _differs(model, f"has {found.shape[1]} tokens, the checkpoint {as_it_is.shape[1]}")
        with hooked(_rounding_inputs(expecting, dtype)):
            rounded = expected(row)
        for layer in adapters:
            layer.enable_adapters(False)
        without = expected(row) if adapters else as_it_is
        for layer in adapters:
            layer.enable_adapters(True)
        yield row, found, [as_it_is, rounded, without]
        on_progress("comparing with llama.cpp", done, len(rows))


def _rounding_inputs(model: torch.nn.Module, dtype: torch.dtype) -> list[Any]:
    """Make linear layers round their inputs as llama.cpp does: to 8 bits if packed, else to the type of the model."""
    import torch

    from qpruner.quantization.formats.layers import PackedLinear

    def to_dtype(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0].to(dtype).float(),)

    def to_8_bits(layer: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        # Blocks of 256 (Q8_K) for K-quants, of 32 (Q8_0) for others.
        size = 256 if layer.format.name.endswith("_k") else 32
        blocks = inputs[0].reshape(*inputs[0].shape[:-1], -1, size)
        steps = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (((blocks / steps).round() * steps).flatten(-2),)

    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return [
        each.register_forward_pre_hook(to_8_bits if isinstance(each, PackedLinear) else to_dtype) for each in linears
    ]


def _share(overlap: float, added: float, error: float) -> float | None:
    """Return the effect of the adapter as a share of that expected: errors of rounding do not point along it."""
    return 1 + overlap / added if added > LEAST_EFFECT**2 * error else None


def _judge(served: Served, model: Path, most_divergence: float) -> None:
    """Raise `StageError` if predictions differ by more than rounding explains."""
    if not served.divergence <= most_divergence:
        told = f"{served.divergence:.2g} nats per token, more than {most_divergence:.2g}"
        raise _differs(model, f"has predictions that diverge by {told}")
    if served.adapter_share is not None and not LEAST_SHARE <= served.adapter_share <= LARGEST_SHARE:
        raise _differs(model, f"shows {served.adapter_share:.0%} of its adapter's effect")
    excess = abs(served.loss - served.expected_loss) - 3 * served.stderr
    if not excess <= math.log1p(MOST_PERPLEXITY):
        change = math.expm1(served.loss - served.expected_loss)
        raise _differs(model, f"has a perplexity that differs by {change:+.1%}, more than {MOST_PERPLEXITY:.0%}")


def _differs(file: Path, how: str) -> StageError:
    return StageError("export", f"{file.name} differs from the model, as llama.cpp reads it: it {how}", REMEDY)
