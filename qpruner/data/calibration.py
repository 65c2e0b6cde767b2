"""Calibration samples and what is read off a model with them: gradients, inputs, outputs and losses, batch by batch.

Nothing here keeps more than it was asked for: a gradient is handed over in its own hook and dropped at once, inputs of
layers are reduced as they come. Outputs are kept, and the head is run, only where a labelled token is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qpruner.data import measures
from qpruner.data.rows import IGNORED_LABEL, collate, row_lengths
from qpruner.errors import TrainingDiverged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Sequence[Mapping[str, list[int]]]
OnProgress = Callable[[int, int], None]
"""Told how many of how many are done."""


@dataclass(frozen=True)
class Samples:
    """Encoded calibration samples and how they go through a model.

    Attributes:
        rows: Token ids and labels; the loss is over every token that has a label.
        pad_id: Padding token.
        batch_size: Samples a pass.
        told: Told how many batches of how many are through; of what goes down block by block, how many blocks.
    """

    rows: Rows
    pad_id: int
    batch_size: int
    told: OnProgress = lambda done, total: None

    @property
    def one_by_one(self) -> Samples:
        """The same samples, each in a pass of its own."""
        return replace(self, batch_size=1)

    @property
    def by_length(self) -> Samples:
        """The same samples, the shortest first, so that little is spent on padding."""
        return replace(self, rows=sorted(self.rows, key=lambda row: len(row["input_ids"])))

    def batches(self, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """Padded batches on the model's device, in order."""
        total = -(-len(self.rows) // self.batch_size)
        for done, batch in enumerate(batches(self.rows, self.batch_size, self.pad_id, device), 1):
            yield batch
            self.told(done, total)

    def split(self) -> Iterator[Samples]:
        """One batch after the other."""
        for start in range(0, len(self.rows), self.batch_size):
            yield replace(self, rows=self.rows[start : start + self.batch_size])


@dataclass(frozen=True)
class LossResult:
    """Loss in nats per predicted token, with its standard error over rows (a ratio estimator).

    Attributes:
        mean: Over all predicted tokens.
        by_row: What each row says of the mean, in the order given: the rows' mean is `mean`, and their spread its
            standard error, although rows have more and fewer tokens.
    """

    mean: float
    by_row: tuple[float, ...]

    @property
    def stderr(self) -> float:
        """Standard error of the mean over rows; NaN with one row."""
        return measures.over_questions(self.by_row).stderr


def batches(rows: Rows, batch_size: int, pad_id: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches on the model's device, in order."""
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def visit_gradients(
    model: PreTrainedModel,
    parameters: Mapping[str, torch.nn.Parameter],
    samples: Samples,
    visit: Callable[[str, torch.nn.Parameter, torch.Tensor], None],
) -> None:
    """Run the loss backward batch by batch and hand each parameter's gradient over before it is dropped.

    The peak above the weights is one parameter's gradient plus the activations of one batch.

    Args:
        model: A dense model; its `requires_grad` flags are restored afterwards.
        parameters: The parameters to visit, by name.
        samples: The samples; a batch's loss is the mean over its tokens.
        visit: Called with name, parameter and gradient ``(rows, columns)`` once per batch.

    Raises:
        TrainingDiverged: Naming the parameter whose gradient is NaN or infinite.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = {id(parameter) for parameter in parameters.values()}
    handles = []

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

    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        for name, parameter in parameters.items():
            handles.append(parameter.register_post_accumulate_grad_hook(hook_for(name)))  # type: ignore[no-untyped-call]
        for batch in samples.batches(model.device):
            _backward(model, batch, lambda losses, counts: losses.sum() / counts.sum())
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


def visit_mask_gradients(
    model: PreTrainedModel,
    linears: Mapping[str, tuple[torch.nn.Linear, int]],
    samples: Samples,
    visit: Callable[[str, torch.Tensor], None],
) -> None:
    """Hand over ``sum_j w_ij dL/dw_ij`` for every row, or ``sum_i`` for every column, of linear layers, by sample.

    It is the gradient of a sample's mean loss L with respect to a factor (a mask) on the row or column, and needs no
    gradient of any weight: with ``y = W x + b`` token t adds ``(y_ti - b_i) dL/dy_ti`` to a row's and ``x_tj dL/dx_tj``
    to a column's. So a batch gives every sample's own in one backward pass.

    Args:
        model: A dense model; its `requires_grad` flags are restored afterwards.
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
    """Hand over what goes into linear layers and the gradient at what comes out, batch by batch, sample by sample.

    The weight's gradient of sample s is ``gradients[s].T @ inputs[s]``: every sample's own, out of one backward pass.
    The loss of a sample is the sum over its labelled tokens; at padding the gradient is zero.

    Args:
        model: A dense model; its `requires_grad` flags are restored afterwards.
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
    """One pass forward and backward, of which nothing is left before the next begins.

    Args:
        model: The model.
        batch: Rows, padded.
        loss: From each token's loss ``(samples, seq)`` and how many tokens of each sample are labelled.
    """
    losses = token_losses(model, batch)
    counts = predicting(batch["labels"]).sum(dim=1).to(losses.device)
    loss(losses, counts).backward()  # type: ignore[no-untyped-call]


@contextmanager
def _activation_gradients(
    model: PreTrainedModel, hooks: Sequence[tuple[torch.nn.Module, Callable[..., None]]]
) -> Iterator[None]:
    """Gradients reach activations, from the embeddings on, but no weight; forward hooks are set meanwhile."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    embeddings = model.get_input_embeddings()
    handles = [embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))]
    handles += [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


class InputMoments:
    """Running mean and mean square of a layer's input features, over tokens; float64 on the CPU."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, inputs: torch.Tensor) -> None:
        """Count inputs ``(tokens, features)`` in."""
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
    """Run the samples forward and hand over each module's inputs, padding left out, as they come.

    Args:
        model: The model.
        modules: The modules to listen to, by name.
        samples: The samples.
        visit: Called per batch and module with name and inputs ``(tokens, features)``.
    """
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


def entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states ``(batch, seq, hidden)`` that a decoder block was called with."""
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def at_tokens(inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Inputs ``(batch, seq, features)``, or with batch and sequence in one, at the tokens ``(batch, seq)``."""
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
    """Run the samples forward and hand over each module's output where the model predicts a labelled token.

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
            for name, output in outputs.items():
                if not torch.isfinite(output).all():
                    raise TrainingDiverged(f"the output of {name} is NaN or infinite on the calibration samples")
            if not torch.isfinite(logits).all():
                raise TrainingDiverged("the output of model.lm_head is NaN or infinite on the calibration samples")
            visit(outputs, logits.argmax(dim=-1).cpu())
            outputs.clear()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Rows, pad_id: int, batch_size: int) -> LossResult:
    """Cross entropy on the labelled tokens, in nats.

    Raises:
        TrainingDiverged: If it is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # Rows of like length together, so that little is spent on padding.
    lengths = row_lengths(rows)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    sums: list[float] = []
    counts: list[int] = []
    for batch in batches([rows[index] for index in order], batch_size, pad_id, device):
        sums.extend(token_losses(model, batch).sum(dim=1).tolist())
        counts.extend(predicting(batch["labels"]).sum(dim=1).tolist())
    model.train(was_training)
    total, tokens = sum(sums), sum(counts)
    mean = total / tokens
    if not math.isfinite(mean):
        raise TrainingDiverged(f"the validation loss is {mean}")
    off = [row - mean * count for row, count in zip(sums, counts, strict=True)]
    by_row = dict(zip(order, (mean + each * len(rows) / tokens for each in off), strict=True))
    return LossResult(mean, tuple(by_row[index] for index in range(len(rows))))


def token_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of each next token in nats, ``(batch, seq)`` float32; zero where no labelled token is predicted."""
    logits = predicted_logits(model, batch)
    positions = predicting(batch["labels"]).to(logits.device)
    losses = torch.zeros(positions.shape, device=logits.device)
    losses[positions] = torch.nn.functional.cross_entropy(
        logits.float(), predicted_labels(batch["labels"]).to(logits.device), reduction="none"
    )
    return losses


def predicted_logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits ``(positions, vocabulary)`` where a labelled token is predicted, all samples in one."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with labelled_only(model, batch["labels"]):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


@contextmanager
def labelled_only(model: torch.nn.Module, labels: torch.Tensor) -> Iterator[None]:
    """Run the head only where a labelled token is predicted: logits are ``(positions, vocabulary)`` meanwhile.

    Args:
        model: A causal language model of any family, with or without adapters.
        labels: Those of the batch that goes through it, ``(batch, seq)``.
    """
    positions = predicting(labels)
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, inputs: inputs[0][positions.to(inputs[0].device)])
    try:
        yield
    finally:
        handle.remove()


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Positions whose next token has a label: ``(batch, seq)`` bool."""
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))


def predicted_labels(labels: torch.Tensor) -> torch.Tensor:
    """The labels at these positions, in the order of `predicted_logits`: ``(positions,)``."""
    return labels[:, 1:][labels[:, 1:] != IGNORED_LABEL]


def count_labels(labels: torch.Tensor) -> int:
    """Tokens that are predicted in a batch of labels ``(batch, seq)``."""
    return int(predicting(labels).sum())
