"""Run the blocks of a model one after the other on calibration samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from qpruner.data.calibration import Samples, at_tokens, block_inputs, block_output, run_base
from qpruner.data.losses import batches, hooked, returning
from qpruner.models.families import block_paths


class _InputsCaptured(Exception):
    """Stop the forward pass of a block once the inputs of a layer are captured."""


class BlockStream:
    """Run the blocks of a model one by one on the hidden states of calibration samples.

    A pass in which blocks return their inputs captures masks and positions, which do not depend on
    hidden states ``(batch, seq, hidden)``. Each block then runs by itself, also after its weights
    changed. Memory holds the hidden states before one block only: `hidden` has those of each batch,
    and `tokens` says, ``(batch, seq)``, which of them are not padding.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, samples: Samples) -> None:
        self._model = model
        self._blocks = list(map(model.get_submodule, block_paths(model.config)))
        self._on_progress = samples.on_progress
        self.hidden: list[torch.Tensor] = []
        self._batches = list(
            batches(samples.rows, samples.batch_size, samples.pad_id, model.device)
        )
        self.tokens = [batch["attention_mask"].bool() for batch in self._batches]
        self._calls: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = []

        def capture_for(index: int) -> Callable[..., torch.Tensor]:
            def capture(*args: Any, **kwargs: Any) -> torch.Tensor:
                hidden = block_inputs(args, kwargs)
                if index == 0:
                    self.hidden.append(hidden)
                others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                self._calls[-1][index] = (args[1:], others)
                return hidden

            return capture

        with returning(self._blocks, map(capture_for, range(len(self._blocks)))):
            for batch in self._batches:
                self._calls.append({})
                run_base(model, batch)

    @torch.no_grad()
    def visit(
        self, index: int, linear: str, visit: Callable[..., None], behind: Sequence[int] = ()
    ) -> None:
        """Run block `index`, and give the inputs of one of its linear layers to `visit`.

        `visit` is called once for each batch, with inputs ``(tokens, features)``. If `behind` names
        blocks that follow, `visit` also gets the sum ``(tokens, hidden)`` of what they add to the
        hidden states.
        """
        layer = self._blocks[index].get_submodule(linear)
        for batch, tokens in enumerate(self.tokens):
            captured = self._captured(layer, index, batch, behind)
            visit(*(at_tokens(states, tokens) for states in captured))

    def _captured(
        self, layer: torch.nn.Module, index: int, batch: int, behind: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the inputs of `layer` in block `index`, and what the blocks `behind` it add."""
        captured: list[torch.Tensor] = []

        def capture(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            captured.append(args[0])
            if not behind:
                raise _InputsCaptured

        with hooked([layer.register_forward_pre_hook(capture)]), suppress(_InputsCaptured):
            before = self.run(index, batch, self.hidden[batch])
            after = before
            for follower in behind:
                after = self.run(follower, batch, after)
            captured.append(after.to(before.device).float() - before.float())
        return captured

    @torch.no_grad()
    def advance(
        self, index: int, on_batch: Callable[[torch.Tensor], None] = lambda tokens: None
    ) -> None:
        """Replace the hidden states before block `index` by those after it.

        `on_batch` gets the mask of the tokens of each batch after the block has run on it.
        """
        for batch, hidden in enumerate(self.hidden):
            self.hidden[batch] = self.run(index, batch, hidden)
            on_batch(self.tokens[batch])
        self._on_progress(index + 1, len(self._blocks))

    @torch.no_grad()
    def head_inputs(self) -> Iterator[torch.Tensor]:
        """Yield the inputs ``(tokens, features)`` of the head by batch, after the last block."""
        for inputs, tokens, hidden in zip(self._batches, self.tokens, self.hidden, strict=True):
            # The base model applies what lies between the blocks and the head, such as a norm.
            skipped = [lambda *args, hidden=hidden, **kwargs: hidden] * len(self._blocks)
            with returning(self._blocks, skipped):
                states = run_base(self._model, inputs)
            yield at_tokens(states, tokens)

    def run(
        self,
        index: int,
        batch: int,
        hidden: torch.Tensor,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run block `index` on hidden states before it, with the masks of a batch.

        `weights` take the place of parameters, by their names in the block.
        """
        args, kwargs = self._calls[batch][index]
        block = self._blocks[index]
        if weights is None:
            return block_output(block(hidden, *args, **kwargs))
        return block_output(functional_call(block, dict(weights), (hidden, *args), kwargs))
