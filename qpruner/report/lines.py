"""What happens in lines, for a terminal and for the log."""

from __future__ import annotations

from qpruner.report.standing import told
from qpruner.runs import events


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


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
