"""Run calibration samples through a model and visit gradients, inputs and outputs, batch by batch.

Nothing is kept longer than its visit: a gradient is dropped in its own hook, inputs are reduced as they come. Outputs
are collected, and the head runs, only where a labelled token is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qpruner.data.losses import Rows, batches, predicted_logits, predicting, token_losses
from qpruner.errors import TrainingDiverged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnProgress = Callable[[int, int], None]
"""Called with how many of how many are done."""


@dataclass(frozen=True)
class Samples:
    """Encoded calibration samples and how they go through a model.

    Progress counts batches; where the samples go block by block, blocks.
    """

    rows: Rows
    pad_id: int
    batch_size: int
    on_progress: OnProgress = lambda done, total: None

    @property
    def one_by_one(self) -> Samples:
        """The same samples, each in a pass of its own."""
        return replace(self, batch_size=1)

    @property
    def by_length(self) -> Samples:
        """The same samples, the shortest first, so that little is spent on padding."""
        return replace(self, rows=sorted(self.rows, key=lambda row: len(row["input_ids"])))

    def batches(self, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """Yield padded batches on the model's device, in order."""
        total = -(-len(self.rows) // self.batch_size)
        for done, batch in enumerate(batches(self.rows, self.batch_size, self.pad_id, device), 1):
            yield batch
            self.on_progress(done, total)

    def split(self) -> Iterator[Samples]:
        """Yield the samples of one batch after the other."""
        for start in range(0, len(self.rows), self.batch_size):
            yield replace(self, rows=self.rows[start : start + self.batch_size])


def visit_gradients(
    model: PreTrainedModel,
    parameters: Mapping[str, torch.nn.Parameter],
    samples: Samples,
    visit: Callable[[str, torch.nn.Parameter, torch.Tensor], None],
) -> None:
    """Run the loss backward batch by batch and visit each parameter's gradient before it is dropped.

    A batch's loss is the mean over its tokens. The peak above the weights is one parameter's gradient plus the
    activations of one batch.

    Args:
        model: A dense model.
        parameters: The parameters to visit, by name.
        samples: The samples.
        visit: Called with name, parameter and gradient ``(rows, columns)`` once per batch.

    Raises:
        TrainingDiverged: Naming the parameter whose gradient is NaN or infinite.
    """

    def hook_for(name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            assert gradient is not None
            # One NaN or infinity makes the sum one; a look at each entry takes a tenth of a pass on a CPU.
            if not gradient.sum(dtype=torch.float32).isfinite():
                raise TrainingDiverged(f"the gradient of {name} is NaN or infinite on the calibration samples")
            visit(name, parameter, gradient)  # type: ignore[arg-type]

        return hook

    handles: list[Any] = []
    with _gradients_of(model, parameters.values(), handles):
        for name, parameter in parameters.items():
            handles.append(parameter.register_post_accumulate_grad_hook(hook_for(name)))  # type: ignore[no-untyped-call]
        for batch in samples.batches(model.device):
            _backward(model, batch, lambda losses, counts: losses.sum() / counts.sum())


def visit_mask_gradients(
    model: PreTrainedModel,
    linears: Mapping[str, tuple[torch.nn.Linear, int]],
    samples: Samples,
    visit: Callable[[str, torch.Tensor], None],
) -> None:
    """Visit ``sum_j w_ij dL/dw_ij`` for every row, or ``sum_i`` for every column, of linear layers, by sample.

    It is the gradient of a sample's mean loss L with respect to a factor (a mask) on the row or column, and needs no
    gradient of any weight: with ``y = W x + b`` token t adds ``(y_ti - b_i) dL/dy_ti`` to a row's and ``x_tj dL/dx_tj``
    to a column's. So a batch gives every sample's own in one backward pass.

    Args:
        model: A dense model.
        linears: Name -> the layer, and 0 for its rows or 1 for its columns.
        samples: The samples.
        visit: Called per batch with name and values ``(samples, rows or columns)`` float32.

    Raises:
        TrainingDiverged: Naming the layer whose gradient is NaN or infinite.
    """
    num_rows = 0

    def hook_for(name: str, dim: int) -> Callable[..., None]:
        def listen(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            features = inputs[0] if dim == 1 else output
            # A hook that refers to its own tensor would keep it, and all behind it, until the cycle collector comes.
            values, bias = features.detach(), module.bias if dim == 0 else None

            def on_gradient(gradient: torch.Tensor) -> None:
                masked = values.float() if bias is None else values.float() - bias.float()
                by_sample = (masked * gradient.float()).reshape(num_rows, -1, gradient.shape[-1]).sum(dim=1)
                if not torch.isfinite(by_sample).all():
                    raise TrainingDiverged(f"the gradient at {name} is NaN or infinite on the calibration samples")
                visit(name, by_sample)

            features.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return listen

    hooks = [(linear, hook_for(name, dim)) for name, (linear, dim) in linears.items()]
    with _activation_gradients(model, hooks):
        for batch in samples.batches(model.device):
            num_rows = len(batch["input_ids"])
            _backward(model, batch, lambda losses, counts: (losses.sum(dim=1) / counts).sum())


def visit_linear_gradients(
    model: PreTrainedModel,
    linears: Mapping[str, torch.nn.Linear],
    samples: Samples,
    visit: Callable[[str, torch.Tensor, torch.Tensor], None],
) -> None:
    """Visit linear layers' inputs and the gradients at their outputs, batch by batch.

    The weight's gradient of sample s is ``gradients[s].T @ inputs[s]``: every sample's own, from one backward pass.
    The loss of a sample is the sum over its labelled tokens; at padding the gradient is zero.

    Args:
        model: A dense model.
        linears: The layers, by name.
        samples: The samples.
        visit: Called per batch with name, inputs ``(samples, seq, columns)`` and gradients ``(samples, seq, rows)``.
    """
    num_rows = 0

    def hook_for(name: str) -> Callable[..., None]:
        def listen(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            features = inputs[0].detach()

            def on_gradient(gradient: torch.Tensor) -> None:
                by_sample = [values.reshape(num_rows, -1, values.shape[-1]) for values in (features, gradient)]
                visit(name, *by_sample)

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return listen

    with _activation_gradients(model, [(linear, hook_for(name)) for name, linear in linears.items()]):
        for batch in samples.batches(model.device):
            num_rows = len(batch["input_ids"])
            _backward(model, batch, lambda losses, counts: losses.sum())


def _backward(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Run one pass forward and backward; nothing of it is left before the next begins.

    `loss` takes each token's loss ``(samples, seq)`` and the number of labelled tokens of each sample.
    """
    losses = token_losses(model, batch)
    counts = predicting(batch["labels"]).sum(dim=1).to(losses.device)
    loss(losses, counts).backward()  # type: ignore[no-untyped-call]


@contextmanager
def _gradients_of(model: PreTrainedModel, parameters: Any, handles: list[Any]) -> Iterator[None]:
    """Let these parameters alone have gradients; flags are restored and hooks removed at the end."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = {id(parameter) for parameter in parameters}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


@contextmanager
def _activation_gradients(
    model: PreTrainedModel, hooks: Sequence[tuple[torch.nn.Module, Callable[..., None]]]
) -> Iterator[None]:
    """Let gradients reach activations, from the embeddings on, but no weight; forward hooks are set meanwhile."""
    embeddings = model.get_input_embeddings()
    handles = [embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))]
    handles += [module.register_forward_hook(hook) for module, hook in hooks]
    with _gradients_of(model, (), handles):
        yield


class InputMoments:
    """Running mean and mean square of a layer's input features, over tokens; float64 on the CPU."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs ``(tokens, features)``."""
        self._count += len(inputs)
        self._sum = self._sum + inputs.sum(dim=0, dtype=torch.float32).double().cpu()
        self._squares = self._squares + inputs.float().square().sum(dim=0).double().cpu()

    @property
    def mean(self) -> torch.Tensor:
        """``(features,)``."""
        return self._sum / self._count

    @property
    def mean_square(self) -> torch.Tensor:
        """``(features,)``."""
        return self._squares / self._count

    @property
    def variance(self) -> torch.Tensor:
        """``(features,)``, never below zero."""
        return (self.mean_square - self.mean.square()).clamp(min=0)


@torch.no_grad()
def visit_inputs(
    model: PreTrainedModel,
    modules: Mapping[str, torch.nn.Module],
    samples: Samples,
    visit: Callable[[str, torch.Tensor], None],
) -> None:
    """Run the samples forward and visit each module's inputs ``(tokens, features)``, without padding, by batch."""
    tokens = torch.empty(0, dtype=torch.bool)

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            visit(name, at_tokens(inputs[0], tokens))

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    try:
        for batch in samples.batches(model.device):
            tokens = batch["attention_mask"].bool()
            # Without the head: nobody reads the logits.
            model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def block_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Find the hidden states ``(batch, seq, hidden)`` among the arguments of a decoder block."""
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def at_tokens(inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Select inputs ``(batch, seq, features)``, or with batch and sequence in one, at the tokens ``(batch, seq)``."""
    return inputs.reshape(-1, inputs.shape[-1])[tokens.flatten().to(inputs.device)]


@torch.no_grad()
def visit_outputs(
    model: PreTrainedModel,
    modules: Mapping[str, torch.nn.Module],
    rows: Rows,
    pad_id: int,
    visit: Callable[[dict[str, torch.Tensor], torch.Tensor], None],
    batch_size: int,
) -> None:
    """Run the samples forward and visit each module's output where the model predicts a labelled token.

    Args:
        model: The model.
        modules: The modules to listen to, by name.
        rows: Encoded samples.
        pad_id: Padding token.
        visit: Called per batch with name -> outputs ``(positions, features)`` float32 and the model's predicted token
            ids ``(positions,)``.
        batch_size: Samples per forward pass.
    """
    outputs: dict[str, torch.Tensor] = {}
    positions = torch.empty(0, dtype=torch.bool)

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: object, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            outputs[name] = states[positions.to(states.device)].float().cpu()

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        for batch in batches(rows, batch_size, pad_id, model.device):
            positions = predicting(batch["labels"])
            logits = predicted_logits(model, batch)
            for name, output in (outputs | {"model.lm_head": logits}).items():
                if not torch.isfinite(output).all():
                    raise TrainingDiverged(f"the output of {name} is NaN or infinite on the calibration samples")
            visit(outputs, logits.argmax(dim=-1).cpu())
            outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
