"""An event as a line, for a terminal and for the log."""

from __future__ import annotations

from qpruner import events
from qpruner.report.standing import told


def line_of(event: events.Event, steps: int) -> str | None:
    """The line; None for what is no news by itself.

    Args:
        event: What happened.
        steps: Of a trial that runs to its end.
    """
    match event:
        case events.StageStarted(stage, detail):
            return f"[{stage}] {detail} ..."
        case events.StageFinished(stage, seconds, figures):
            return f"[{stage}] done in {seconds:.1f} s: {figures}"
        case events.StageSkipped(stage, figures):
            return f"[{stage}] already recorded: {figures}"
        case events.Message(stage, text):
            return f"[{stage}] {text}"
        case events.TrialChanged(trial) if trial.is_over or trial.rungs:
            return f"[search] {told(trial, steps)}"
    return None
