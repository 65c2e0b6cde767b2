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
    model = family_model(name, 0, **sizes | {"tie_word_embeddings": is_tied})
    samples = samples_of(batch_size=2)
    grams: dict[tuple[str, ...], torch.Tensor] = {}
    for part in gather(model, samples):
        grams |= part
    last = logits_path(model.config)
    head = family_of(model.config).head
    assert (last == head) is not is_tied
    *_, final = grams
    assert final[0] == last
    for (path, *_), gram in grams.items():
        inputs = stacked_inputs(model, head if path == last else path, samples)
        expected = inputs.T @ inputs / len(inputs)
        if path == last and is_tied:
            expected += LOOKUPS * expected.diagonal().mean() * torch.eye(len(expected))
        tolerance = 1e-3 * float(expected.diagonal().mean())
        torch.testing.assert_close(gram.double(), expected, rtol=1e-3, atol=tolerance)
