"""Measure the loss and the speed of GGUF files in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qpruner.export.gguf import running
from qpruner.export.gguf.isolation import isolated
from qpruner.models.loading import OnWork, ignore_progress

if TYPE_CHECKING:
    from qpruner.data.losses import LossResult, Rows

Files = tuple[Path, Path | None]
"""The files of a model and its adapter."""


def loss(
    files: Files,
    rows: Rows,
    threads: int = 1,
    on_progress: OnWork = ignore_progress,
    library: Path | None = None,
) -> LossResult:
    """Compute the loss of encoded rows in llama.cpp, in nats per labelled token, as `mean_loss` computes it."""
    from qpruner.data.encoding import IGNORED_LABEL
    from qpruner.data.losses import loss_result

    pairs = [(list(row["input_ids"]), list(row["labels"])) for row in rows]
    found = []
    for each in isolated(running.row_losses, *files, pairs, threads, IGNORED_LABEL, library):
        found.append(each)
        on_progress("scoring in llama.cpp", len(found), len(rows))
    sums, counts = zip(*found, strict=True)
    return loss_result(sums, counts)


def measure_speed(
    models: Sequence[Files],
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    turns: int = 3,
    threads: int = 1,
    on_progress: OnWork = ignore_progress,
    library: Path | None = None,
) -> list[tuple[running.Speed, ...]]:
    """Measure models in turns in one process, each warmed up.

    Returns:
        For each model, its speed in each turn: prefill of the prompt and decode of new tokens, in tokens per second.
    """
    speeds: list[list[running.Speed]] = [[] for _ in models]
    arguments = (list(models), prompt_tokens, new_tokens, turns, threads, library)
    for done, (number, speed) in enumerate(isolated(running.timings, *arguments), 1):
        speeds[number].append(speed)
        on_progress("measuring speed in llama.cpp", done, turns * len(models))
    return [tuple(each) for each in speeds]
