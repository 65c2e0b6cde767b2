"""A search's record as a stage would leave it, made without a search; tests change what they look at."""

from __future__ import annotations

from typing import Any

from qpruner.runs.records import Confirmation, SearchRecord


def made_search(plan: dict[str, int], **changes: Any) -> SearchRecord:
    """Nine trials of `gp`, of which trial 7, with that plan, won against the control of trial 2."""
    fields: dict[str, Any] = {
        "digest": "c" * 16,
        "seconds": 600.0,
        "trials_digest": "1" * 16,
        "searcher": "gp",
        "metric": "loss",
        "budget_bytes": 101_500_000,
        "num_trials": 9,
        "num_finished": 6,
        "num_stopped": 2,
        "num_failed": 1,
        "num_taken_over": 0,
        "ended": "all 9 trials were spent (`search.max_trials`)",
        "search_seconds": 500.0,
        "gpu_seconds": 0.0,
        "confirmations": (made_confirmation(2, "seed-kl", 2.125), made_confirmation(7, "gp", 2.0625)),
        "best_index": 7,
        "best_origin": "gp",
        "best_plan": plan,
        "best_control": 2,
        "control_won": False,
        "front": (),
        "resumed": 0,
    }
    return SearchRecord(**fields | changes)


def made_confirmation(index: int, origin: str, loss: float, **changes: Any) -> Confirmation:
    """A trial on fresh rows; a control where a control's name is its origin."""
    fields = {"control": origin.startswith(("uniform-", "seed-")), "taken_over": False, "stderr": 0.0625}
    return Confirmation(index=index, origin=origin, loss=loss, **fields | changes)
