"""What the process of llama.cpp runs: generator functions for `isolated`. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy

from qpruner.export.gguf.llama_cpp import Llama, build

Loss = tuple[float, int]
"""Sum of losses in nats of a row, and number of its tokens that have a label."""
Speed = tuple[float, float]
"""Prefill and decode, in tokens per second."""
WARM_UP = 8


def token_differences(model: Path, tokenizer: Path, library: Path | None) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield texts whose token ids differ from the tokenizer's, with the ids of llama.cpp and the tokenizer."""
    from qpruner.export.gguf.same_tokens import different_tokens
    from qpruner.models.loading import load_tokenizer

    with Llama(model, library=library) as llama:
        yield from different_tokens(llama, load_tokenizer(str(tokenizer)))


def row_logits(
    model: Path, adapter: Path | None, rows: Sequence[Sequence[int]], library: Path | None
) -> Iterator[numpy.ndarray]:
    """Yield the logits ``(positions, vocabulary)`` of each row."""
    with Llama(model, adapter, context_length=max(map(len, rows)), library=library) as llama:
        for row in rows:
            yield llama.logits(row)


def row_losses(
    model: Path,
    adapter: Path | None,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    threads: int,
    ignored: int,
    library: Path | None,
) -> Iterator[Loss]:
    """Yield the loss of each row, given by its token ids and their labels, on tokens whose label is not `ignored`.

    Rows are read one by one: in batches of 512 tokens a processor second reads 10 % more (362 tokens against 321 in
    the demo's rows of 65, 2026-11-29).
    """
    with Llama(model, adapter, threads, max(len(ids) for ids, _ in rows), library) as llama:
        for ids, labels in rows:
            labels_of_next = numpy.append(numpy.asarray(labels)[1:], ignored)
            wanted = labels_of_next != ignored
            yield _loss(llama.logits(ids, wanted), labels_of_next[wanted]), int(wanted.sum())


def _loss(logits: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Sum the cross entropy of labels ``(positions,)``."""
    largest = logits.max(axis=1, keepdims=True)
    sums = numpy.exp(logits - largest).sum(axis=1, dtype=numpy.float64)
    return float((numpy.log(sums) + largest[:, 0] - logits[numpy.arange(len(labels)), labels]).sum())


def timings(
    models: Sequence[tuple[Path, Path | None]], prompt: int, new: int, turns: int, threads: int, library: Path | None
) -> Iterator[tuple[int, Speed]]:
    """Yield the number of a model and its speed, every model once a turn; one is in memory at a time."""
    for _ in range(turns):
        for number, (model, adapter) in enumerate(models):
            with Llama(model, adapter, threads, prompt + new, library) as llama:
                ids = [position % llama.vocab_size for position in range(prompt)]
                llama.prefill(ids)
                llama.decode(min(WARM_UP, new))
                yield number, (prompt / llama.prefill(ids), new / llama.decode(new))


def builds(library: Path | None) -> Iterator[str]:
    """Yield the name of the build."""
    yield build(library)
