"""Gram matrices are those of the inputs that layers and the head see when the whole model runs."""

import pytest
import torch
from tiny_decoders import FAMILIES, SIZES, VOCABULARY, samples_of, stacked_inputs
from tiny_families import family_model

from qpruner.models.families import family_of
from qpruner.models.layout import logits_path
from qpruner.pruning.grams import LOOKUPS, gather


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", [*FAMILIES, "opt-350m"])
def test_gram_matrices_of_every_input(name: str, is_tied: bool) -> None:
    """opt-350m has embeddings and a head narrower than its hidden states."""
    sizes = {"vocab_size": VOCABULARY} if name == "opt-350m" else SIZES | FAMILIES[name]
    model, samples = (
        family_model(name, 0, **sizes | {"tie_word_embeddings": is_tied}),
        samples_of(batch_size=2),
    )
    found = {paths[0]: gram for grams in gather(model, samples) for paths, gram in grams.items()}
    last, head = logits_path(model.config), family_of(model.config).head
    assert last == list(found)[-1] and (last == head) is not is_tied
    for path, gram in found.items():
        inputs = stacked_inputs(model, head if path == last else path, samples)
        expected = inputs.T @ inputs / len(inputs)
        if path == last and is_tied:
            expected += LOOKUPS * expected.diagonal().mean() * torch.eye(len(expected))
        assert torch.allclose(
            gram.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.diagonal().mean())
        ), path
