"""Run calibration samples through a model, and call a visitor on every batch.

Visitors get gradients, inputs or outputs of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from qpruner.data.losses import Rows, batches, hooked, predicted_logits, predicting, token_losses
from qpruner.errors import TrainingDiverged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnProgress = Callable[[int, int], None]
"""Callback for progress: it gets the number of finished steps and the total number."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Function that computes the loss of a batch from token losses ``(samples, seq)``.

Its second argument is the number of labelled tokens of each sample.
"""


@dataclass(frozen=True)
class Samples:
    """Hold encoded calibration samples, the size of their batches, and a callback for progress.

    `on_progress` counts batches, or blocks or groups of layers in loops over these.
    """

    rows: Rows
    pad_id: int
    batch_size: int
    on_progress: OnProgress = lambda done, total: None

    @property
    def by_length(self) -> Samples:
        """The same samples sorted by length, which keeps padding small."""
        return replace(self, rows=sorted(self.rows, key=lambda row: len(row["input_ids"])))

    def batches(self, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Yield padded batches on a device, in order, and report progress after each."""
        total = -(-len(self.rows) // self.batch_size)
        for done, batch in enumerate(batches(self.rows, self.batch_size, self.pad_id, device), 1):
            yield batch
            self.on_progress(done, total)


def visit_gradients(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    samples: Samples,
    visit: Callable[[str, nn.Parameter, Tensor], None],
) -> None:
    """Visit each parameter with its gradient of the mean loss of each batch.

    One gradient is held in memory at a time. Raise `TrainingDiverged` if a gradient is NaN or
    infinite.
    """

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            assert gradient is not None
            # A NaN or infinity makes the sum NaN or infinite; testing each entry takes a tenth of a
            # pass on a CPU.
            _require_finite(gradient.sum(dtype=torch.float32), f"gradient of {name}")
            visit(name, parameter, gradient)  # type: ignore[arg-type]

        return hook

    with _gradients_of(model, parameters.values()):
        hooks = []
        for name, parameter in parameters.items():
            register = parameter.register_post_accumulate_grad_hook
            hooks.append(register(hook_for(name)))  # type: ignore[no-untyped-call]
        with hooked(hooks):
            for batch in samples.batches(model.device):
                _backward(model, batch, lambda losses, counts: losses.sum() / counts.sum())


def visit_mask_gradients(
    model: PreTrainedModel,
    linears: Mapping[str, tuple[nn.Linear, int]],
    samples: Samples,
    visit: Callable[[str, Tensor], None],
) -> None:
    """Visit ``sum w_ij dL/dw_ij`` over the rows or columns of linear layers, for each sample.

    Values are float32 ``(samples, rows or columns)``: the gradient of a sample's mean loss L at a
    mask factor. With ``y = W x + b``, token t adds ``(y_ti - b_i) dL/dy_ti`` to row i and ``x_tj
    dL/dx_tj`` to column j: one backward pass gives a whole batch. `linears` maps names to a layer
    and 0 (rows) or 1 (columns). Raise `TrainingDiverged` if a value is NaN or infinite.
    """

    def visit_both(name: str, values: Tensor, gradients: Tensor) -> None:
        linear, dim = linears[name]
        masked = values.float()
        if dim == 0 and linear.bias is not None:
            masked = masked - linear.bias.float()
        by_sample = (masked * gradients.float()).sum(dim=1)
        _require_finite(by_sample, f"gradient at {name}")
        visit(name, by_sample)

    def sum_of_means(losses: Tensor, counts: Tensor) -> Tensor:
        return (losses.sum(dim=1) / counts).sum()

    places = {}
    for name, (linear, dim) in linears.items():
        is_of_inputs = dim == 1
        places[name] = _Place(linear, values=is_of_inputs, gradients=is_of_inputs)
    _visit_activations(model, places, samples, sum_of_means, visit_both)


def visit_linear_gradients(
    model: PreTrainedModel,
    linears: Mapping[str, nn.Linear],
    samples: Samples,
    visit: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Visit the inputs of linear layers, and the gradients of the loss at their outputs.

    Inputs are ``(samples, seq, columns)``, gradients ``(samples, seq, rows)``.
    """
    places = {
        name: _Place(linear, values=True, gradients=False) for name, linear in linears.items()
    }
    _visit_activations(model, places, samples, lambda losses, counts: losses.sum(), visit)


class _Place(NamedTuple):
    """Says whether the values, and the gradients, of a linear layer are visited at its inputs.

    Those that are False are visited at its outputs.
    """

    linear: nn.Linear
    values: bool
    gradients: bool


def _visit_activations(
    model: PreTrainedModel,
    places: Mapping[str, _Place],
    samples: Samples,
    loss: Loss,
    visit: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Visit activations and gradients ``(samples, seq, features)`` of linear layers."""
    num_rows = 0

    def by_row(states: Tensor) -> Tensor:
        return states.reshape(num_rows, -1, states.shape[-1])

    def hook_for(name: str, place: _Place) -> Callable[..., None]:
        def listen(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Detached: a hook with a reference to its own tensor would keep the graph alive until
            # garbage collection.
            values = (inputs[0] if place.values else output).detach()

            def on_gradient(gradient: Tensor) -> None:
                visit(name, by_row(values), by_row(gradient))

            visited = inputs[0] if place.gradients else output
            visited.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return listen

    # Gradients must flow although no parameter needs one.
    embeddings = model.get_input_embeddings()
    hooks = [embeddings.register_forward_hook(lambda _, inputs, output: output.requires_grad_())]
    for name, place in places.items():
        hooks.append(place.linear.register_forward_hook(hook_for(name, place)))
    with hooked(hooks), _gradients_of(model, ()):
        for batch in samples.batches(model.device):
            num_rows = len(batch["input_ids"])
            _backward(model, batch, loss)


def _require_finite(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise TrainingDiverged(f"the {what} is NaN or infinite on the calibration samples")


def _backward(model: PreTrainedModel, batch: dict[str, Tensor], loss: Loss) -> None:
    """Run one forward and backward pass; all activations are freed on return."""
    losses = token_losses(model, batch)
    counts = predicting(batch["labels"]).sum(dim=1).to(losses.device)
    loss(losses, counts).backward()  # type: ignore[no-untyped-call]


@contextmanager
def _gradients_of(model: PreTrainedModel, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Enable gradients for these parameters only, and restore all flags afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class InputMoments:
    """Keep the mean and mean square over tokens of each input feature of a layer.

    Both are float64 tensors ``(features,)`` on the CPU.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sum = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        """Add the inputs ``(tokens, features)`` of a batch."""
        self._count += len(inputs)
        self._sum = self._sum + inputs.sum(dim=0, dtype=torch.float32).double().cpu()
        self._squares = self._squares + inputs.float().square().sum(dim=0).double().cpu()

    @property
    def mean(self) -> Tensor:
        """Mean of each feature, ``(features,)``."""
        return self._sum / self._count

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each feature, ``(features,)``."""
        return self._squares / self._count

    @property
    def variance(self) -> Tensor:
        """Variance of each feature, ``(features,)``; rounding cannot make it negative."""
        return (self.mean_square - self.mean.square()).clamp(min=0)


@torch.no_grad()
def visit_inputs(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    samples: Samples,
    visit: Callable[[str, Tensor], None],
) -> None:
    """Run the samples forward and visit the inputs ``(tokens, features)`` of each module.

    Padding tokens are left out.
    """
    tokens = torch.empty(0, dtype=torch.bool)

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, inputs: visit(name, at_tokens(inputs[0], tokens))

    with hooked(
        module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()
    ):
        for batch in samples.batches(model.device):
            tokens = batch["attention_mask"].bool()
            run_base(model, batch)


def run_base(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Run a batch without the head of a model, and return the inputs of the head."""
    states: Tensor = model.base_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )[0]
    return states


def block_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states ``(batch, seq, hidden)`` from the arguments of a decoder block."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def block_output(output: Any) -> Tensor:
    """Return the hidden states ``(batch, seq, hidden)`` from the output of a decoder block."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def at_tokens(inputs: Tensor, tokens: Tensor) -> Tensor:
    """Select the rows of `inputs` where `tokens` ``(batch, seq)`` is True.

    `inputs` are ``(batch, seq, features)`` or ``(batch * seq, features)``; the result is ``(tokens,
    features)``.
    """
    return inputs.reshape(-1, inputs.shape[-1])[tokens.flatten().to(inputs.device)]


@torch.no_grad()
def visit_outputs(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    samples: Samples,
    visit: Callable[[dict[str, Tensor], Tensor], None],
) -> None:
    """Visit the outputs of modules and the likeliest tokens, where the next token has a label.

    Outputs are float32 ``(positions, features)`` on the CPU. Raise `TrainingDiverged` if one of
    them or a logit is NaN or infinite.
    """
    outputs: dict[str, Tensor] = {}
    positions = torch.empty(0, dtype=torch.bool)

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            states = block_output(output)
            outputs[name] = states[positions.to(states.device)].float().cpu()

        return hook

    with hooked(module.register_forward_hook(hook_for(name)) for name, module in modules.items()):
        for batch in samples.batches(model.device):
            positions = predicting(batch["labels"])
            logits = predicted_logits(model, batch)
            checked = outputs | {"model.lm_head": logits}
            for name, output in checked.items():
                _require_finite(output, f"output of {name}")
            visit(outputs, logits.argmax(dim=-1).cpu())
            outputs.clear()
