"""Calibration samples on their way down the model, one block at a time.

What a block is given besides its hidden states (masks, positions, windows by layer type) does not depend on them, so it
is caught once in a pass through the whole model; after that each block runs by itself, however often it is changed in
between. A model of L blocks costs a few times L block passes, not L squared; of all samples the hidden states in front
of one block are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qpruner.data.calibration import Samples, at_tokens, block_inputs
from qpruner.data.losses import batches
from qpruner.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _InputsSeen(Exception):
    """Stops a block once its inputs were seen: the rest need not run."""


class BlockStream:
    """Hidden states ``(batch, seq, hidden)`` in front of one block, and what every block is called with.

    Args:
        model: Dense model.
        samples: The samples that go down it.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, samples: Samples) -> None:
        self._model = model
        self._path = family_of(model.config).block_path
        self._num_blocks = model.config.num_hidden_layers
        self._on_progress = samples.on_progress
        self._hidden: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []
        self._calls: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = []
        for batch in batches(samples.rows, samples.batch_size, samples.pad_id, model.device):
            self._tokens.append(batch["attention_mask"].bool())
            self._calls.append({})
            with self._caught():
                # Without the head: nobody reads the logits.
                model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    @torch.no_grad()
    def visit_inputs(self, index: int, linear: str, visit: Callable[[torch.Tensor], None]) -> None:
        """Run one block as far as one of its linear layers and hand that layer's inputs over, batch by batch.

        Args:
            index: The block that the hidden states stand in front of.
            linear: Path of the layer inside the block.
            visit: Called with inputs ``(tokens, features)``, padding left out.
        """
        block = self._model.get_submodule(self._path(index))
        for batch, tokens in enumerate(self._tokens):

            def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], at: torch.Tensor = tokens) -> None:
                visit(at_tokens(inputs[0], at))
                raise _InputsSeen

            handle = block.get_submodule(linear).register_forward_pre_hook(hook)
            try:
                self._run(index, batch, self._hidden[batch])
            except _InputsSeen:
                pass
            finally:
                handle.remove()

    @torch.no_grad()
    def visit_effect(
        self, index: int, linear: str, effect: Sequence[int], visit: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Hand over the inputs of one block's linear layer with what the blocks behind it add to the hidden states.

        Args:
            index: The block that the hidden states stand in front of.
            linear: Path of the layer inside the block.
            effect: The blocks behind it, in order.
            visit: Called with inputs ``(tokens, features)`` and the sum ``(tokens, hidden)`` of what those blocks add.
        """
        layer = self._model.get_submodule(f"{self._path(index)}.{linear}")
        for batch, tokens in enumerate(self._tokens):
            inputs: list[torch.Tensor] = []
            handle = layer.register_forward_pre_hook(lambda module, args, seen=inputs: seen.append(args[0]))
            try:
                before = after = self._run(index, batch, self._hidden[batch])
            finally:
                handle.remove()
            for other in effect:
                after = self._run(other, batch, after)
            added = after.to(before.device).float() - before.float()
            visit(at_tokens(inputs[0], tokens), at_tokens(added, tokens))

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Take the hidden states through a block, each batch's in the place of what they were."""
        for batch, hidden in enumerate(self._hidden):
            self._hidden[batch] = self._run(index, batch, hidden)
        self._on_progress(index + 1, self._num_blocks)

    def _run(self, index: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._calls[batch][index]
        output = self._model.get_submodule(self._path(index))(hidden, *args, **kwargs)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    @contextmanager
    def _caught(self) -> Iterator[None]:
        """Note the first block's hidden states and every block's other arguments while the model runs."""

        def hook_for(index: int) -> Callable[..., None]:
            def hook(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if index == 0:
                    self._hidden.append(block_inputs(args, kwargs))
                others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                self._calls[-1][index] = (args[1:], others)

            return hook

        handles = [
            self._model.get_submodule(self._path(index)).register_forward_pre_hook(hook_for(index), with_kwargs=True)
            for index in range(self._num_blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
