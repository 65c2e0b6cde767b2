"""ASHA that spares the controls and goes on from records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from qpruner.config import RunConfig
from qpruner.records import TrialRecord, is_control
from qpruner.search.trial_records import objective


class RecordedAsha(ASHAScheduler):  # type: ignore[misc]
    """ASHA (Li et al., arXiv 1810.05934) that spares controls and knows what earlier sessions recorded."""

    def __init__(self, config: RunConfig, recorded: Sequence[TrialRecord], metric: str, time_attribute: str) -> None:
        search_config = config.search
        super().__init__(
            time_attr=time_attribute,
            metric=metric,
            mode="min",
            max_t=search_config.steps,
            grace_period=search_config.first_rung,
            reduction_factor=search_config.reduction_factor,
        )
        bracket = self._brackets[0]
        for record in recorded:
            # The last rung of a running trial is reported, and decided on, again.
            decided = record.rungs[:-1] if record.status == "running" else record.rungs
            for rung in decided:
                bracket.on_result(_Recorded(f"recorded-{record.index}"), rung.step, -objective(rung, config))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action: str = super().on_trial_result(tune_controller, trial, result)
        if is_control(trial.config["origin"]) and result[self._time_attr] < self._max_t:
            return str(TrialScheduler.CONTINUE)
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Rungs were recorded when reported; Ray would enter a stopped trial's last score again, lower down."""
        self._trial_info.pop(trial.trial_id, None)


@dataclass(frozen=True)
class _Recorded:
    """Stands for a trial of an earlier session in ASHA's rungs, which look at nothing but the id."""

    trial_id: str
