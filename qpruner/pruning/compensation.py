"""What the layers that stay do for what was cut: nothing, a bias, or weights solved anew.

Every removed unit ends in columns of an output projection (o, down). Before the cut those columns are set to zero, and
what they gave is handed to the bias (FLAP, arXiv 2312.11983, section 3.3) or to the columns that stay (least squares,
as in SliceGPT, ZipLM and SoBP): the cut itself then changes nothing. What whole blocks add is handed to the output
projection in front of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch

from qpruner.data.calibration import InputMoments, Samples, at_tokens, block_inputs, hooked
from qpruner.data.losses import batches
from qpruner.errors import TrainingDiverged
from qpruner.models import ragged
from qpruner.models.families import family_of
from qpruner.pruning.surgery import unit_indices
from qpruner.pruning.units import Kept, unit_kinds_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _InputsSeen(Exception):
    """Stops a block once its inputs were seen: the rest need not run."""


class BlockStream:
    """Hidden states ``(batch, seq, hidden)`` in front of one block, and what every block is called with.

    What a block is given besides its hidden states (masks, positions, windows by layer type) does not depend on them,
    so it is caught once in a pass through the whole model; after that each block runs by itself, however often it is
    changed in between. A model of L blocks costs a few times L block passes, not L squared; of all samples the hidden
    states in front of one block are held.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, samples: Samples) -> None:
        path = family_of(model.config).block_path
        self._model = model
        self._paths = [path(index) for index in range(model.config.num_hidden_layers)]
        self._on_progress = samples.on_progress
        self._hidden: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []
        self._calls: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = []

        def hook_for(index: int) -> Callable[..., None]:
            def hook(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if index == 0:
                    self._hidden.append(block_inputs(args, kwargs))
                others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                self._calls[-1][index] = (args[1:], others)

            return hook

        hooks = (
            model.get_submodule(path).register_forward_pre_hook(hook_for(index), with_kwargs=True)
            for index, path in enumerate(self._paths)
        )
        with hooked(hooks):
            for batch in batches(samples.rows, samples.batch_size, samples.pad_id, model.device):
                self._tokens.append(batch["attention_mask"].bool())
                self._calls.append({})
                # Without the head: nobody reads the logits.
                model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    @torch.no_grad()
    def visit(self, index: int, linear: str, visit: Callable[..., None], behind: Sequence[int] = ()) -> None:
        """Run one block, no further than need be, and visit the inputs of one of its linear layers, batch by batch.

        `visit` is called with inputs ``(tokens, features)``, padding left out, and where there are blocks `behind`, in
        order, also with the sum ``(tokens, hidden)`` of what those add to the hidden states.
        """
        layer = self._model.get_submodule(f"{self._paths[index]}.{linear}")
        for batch, tokens in enumerate(self._tokens):
            seen: list[torch.Tensor] = []

            def hook(module: torch.nn.Module, args: tuple[Any, ...], seen: list[torch.Tensor] = seen) -> None:
                seen.append(args[0])
                if not behind:
                    raise _InputsSeen

            added = []
            with hooked([layer.register_forward_pre_hook(hook)]), suppress(_InputsSeen):
                before = after = self._run(index, batch, self._hidden[batch])
                for other in behind:
                    after = self._run(other, batch, after)
                added = [at_tokens(after.to(before.device).float() - before.float(), tokens)]
            visit(at_tokens(seen[0], tokens), *added)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Take the hidden states through a block, each batch's in the place of what they were."""
        for batch, hidden in enumerate(self._hidden):
            self._hidden[batch] = self._run(index, batch, hidden)
        self._on_progress(index + 1, len(self._paths))

    def _run(self, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._calls[batch][index]
        output = self._model.get_submodule(self._paths[index])(hidden, *args, **kwargs)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found


class _Gram:
    """Sums in float32: of inputs ``(features, features)``, of targets with inputs ``(outputs, features)``."""

    matrix: torch.Tensor
    targets: torch.Tensor

    def add(self, inputs: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Add inputs ``(tokens, features)`` and targets ``(tokens, outputs)``."""
        inputs = inputs.float()
        if hasattr(self, "matrix"):
            self.matrix.addmm_(inputs.T, inputs)
        else:
            self.matrix = inputs.T @ inputs
        if targets is not None:
            product = targets.float().T.to(inputs.device) @ inputs
            self.targets = self.targets.add_(product) if hasattr(self, "targets") else product


def compensate_blocks(
    model: PreTrainedModel, gone: Collection[int], layers: Collection[int], ridge: float, samples: Samples
) -> None:
    """Solve the MLP output in front of blocks that go whole, so that it adds what they added.

    With X the inputs of its output projection (down) over the calibration tokens, and D what the blocks that go add to
    the residual stream, its weights become the ``W'`` that minimize ``|X (W' - W)^T - D|^2 + lambda |W' - W|^2``:
    ``W + D^T X (X^T X + lambda I)^-1``. Where the family has a norm behind that projection, or stacked experts in its
    place, blocks go without. `ridge` is lambda, relative to the mean square of the inputs.
    """
    family, count = family_of(model.config), model.config.num_hidden_layers
    factor = family.residual_factor(model.config)
    if factor is None:
        return
    stream = BlockStream(model, samples)
    for index in (index for index in range(count) if index not in gone):
        behind = list(itertools.takewhile(lambda other: other in gone, range(index + 1, count)))
        if behind and index in layers:
            linear = unit_kinds_of(model.config, [index])[index][-1].output_linear
            assert linear is not None, "a residual factor says that there is one"
            gram = _Gram()
            stream.visit(index, linear, gram.add, behind)
            name = f"{family.block_path(index)}.{linear}"
            change = _ridge_solution(gram.matrix, gram.targets / factor, ridge, name)
            weight = model.get_parameter(f"{name}.weight").data
            weight.copy_(weight.float() + change.to(weight.device))
        stream.advance(index)
    if count - 1 in gone:
        samples.on_progress(count, count)


def compensate(model: PreTrainedModel, kept: Kept, method: str, ridge: float, samples: Samples) -> None:
    """Zero the columns of the units that go and make up for them, block by block with the already pruned inputs.

    `method` is `bias` or `least_squares`; `ridge` is as in `compensate_blocks`.
    """
    family = family_of(model.config)
    stream = BlockStream(model, samples)
    biased: set[str] = set()
    for index in range(model.config.num_hidden_layers):
        kinds = unit_kinds_of(model.config, [index], kept.get(index, ()))[index]
        block = model.get_submodule(family.block_path(index))
        with ExitStack() as as_cut:
            # Attention first: the MLP's inputs are those behind the pruned attention.
            for kind in kinds:
                units, linear = kept[index][kind.name], kind.output_linear
                assert linear is not None, "preflight refuses to compensate what has no output projection"
                module = block.get_submodule(linear)
                if method == "bias" and module.bias is None:
                    biased.add(linear)
                if len(units) == kind.num_units:
                    continue
                as_cut.enter_context(family.as_cut(block, kind, units))
                output = next(item for item in kind.slices if item.parameter == f"{linear}.weight")
                stays, weight = unit_indices(output, units), module.weight.data
                is_removed = torch.ones(module.in_features, dtype=torch.bool)
                is_removed[stays] = False
                removed = is_removed.nonzero().flatten()
                if method == "bias":
                    # What the removed columns gave on average: ``b += W_R mean(x_R)`` (FLAP, eq. 5).
                    moments = InputMoments()
                    stream.visit(index, linear, moments.add)
                    ragged.add_output_biases(block, [linear])
                    given = weight[:, removed].float() @ moments.mean[removed].float().to(weight.device)
                    module.bias.data.add_(given.to(module.bias.dtype))
                else:
                    gram = _Gram()
                    stream.visit(index, linear, gram.add)
                    _solve(weight, stays, removed, gram.matrix, ridge, f"{family.block_path(index)}.{linear}")
                weight[:, removed] = 0
            stream.advance(index)
    declare_biases(model, sorted(biased))


def _solve(
    weight: torch.Tensor, stays: torch.Tensor, removed: torch.Tensor, gram: torch.Tensor, ridge: float, name: str
) -> None:
    """Solve the columns that stay anew.

    With ``G = X^T X`` over the calibration tokens, S the columns that stay and R those that go, the weights ``W'`` that
    minimize ``|X W^T - X_S W'^T|^2 + lambda |W' - W_S|^2`` are ``W_S + W_R G_RS (G_SS + lambda I)^-1``.
    """
    stays, removed = stays.to(gram.device), removed.to(gram.device)
    given = weight[:, removed].float() @ gram[removed][:, stays]
    change = _ridge_solution(gram[stays][:, stays], given, ridge, name)
    weight[:, stays] = (weight[:, stays].float() + change).to(weight.dtype)


def _ridge_solution(gram: torch.Tensor, given: torch.Tensor, ridge: float, name: str) -> torch.Tensor:
    """``given (gram + lambda I)^-1``, ``(outputs, features)``; lambda is `ridge` times the mean of gram's diagonal."""
    penalty = max(ridge * float(gram.diagonal().mean()), torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    change = torch.cholesky_solve(given.T, factor).T
    if failed or not torch.isfinite(change).all():
        raise TrainingDiverged(
            f"the least-squares weights of {name} are NaN or infinite; raise `prune.ridge` or give more text"
        )
    return change


def declare_biases(model: PreTrainedModel, linears: Sequence[str]) -> None:
    """Give layers a bias in every block, and say so in the config, from which blocks are built."""
    if not linears:
        return
    family = family_of(model.config)
    for index in range(model.config.num_hidden_layers):
        ragged.add_output_biases(model.get_submodule(family.block_path(index)), linears)
    known = set(getattr(model.config, ragged.OUTPUT_BIASES, ()))
    setattr(model.config, ragged.OUTPUT_BIASES, sorted(known | set(linears)))
