"""ASHA of Ray Tune, resumed from recorded trials."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from qpruner.cluster.ray_private import AshaBracket
from qpruner.cluster.tune.callbacks import Hold
from qpruner.cluster.tune.job import METRIC, TIME, params_to_plan
from qpruner.config.schema import RunConfig
from qpruner.plans.plan import PrecisionPlan, plan_of
from qpruner.plans.space import SearchSpace
from qpruner.runs.records import TrialRecord
from qpruner.search.rungs import Rungs


class RecordedAsha(ASHAScheduler):  # type: ignore[misc]
    """ASHA (Li et al., arXiv 1810.05934), resumed from the records of trials.

    A control may be outside the space or over the budget; it then enters no rung, so no trial is
    compared with it. Any other control is compared like a trial of the search, but never stopped.

    Args:
        config: The configuration of the run.
        space: The plans that are compared at rungs.
        controls: Plans made without a search; their trials always run to the last rung.
        recorded: The records of earlier sessions.
        is_cancelled: Takes the id of a waiting trial; returns True if it must not start any more.
        on_error: Called when a trial fails, before the searcher is told. Takes the trial's id, the
            text of the error, and a function that keeps the device of the trial's worker reserved.
    """

    def __init__(
        self,
        config: RunConfig,
        space: SearchSpace,
        controls: Collection[PrecisionPlan],
        recorded: Sequence[TrialRecord],
        is_cancelled: Callable[[str], bool],
        on_error: Callable[[str, str, Hold], None] = lambda trial_id, error, hold: None,
    ) -> None:
        settings = config.search
        super().__init__(
            time_attr=TIME,
            metric=METRIC,
            mode="min",
            max_t=settings.steps,
            grace_period=settings.first_rung,
            reduction_factor=settings.reduction_factor,
        )
        self._space = space
        self._controls = frozenset(controls)
        self._is_cancelled = is_cancelled
        self._on_error = on_error
        bracket = _RungsByNumber(
            settings.first_rung, settings.steps, settings.reduction_factor, s=0
        )
        self._brackets = [bracket]
        self._rungs = Rungs(space.cuts, settings.steps)

        for record in recorded:
            if not space.is_feasible(plan_of(record)):
                continue
            rungs = record.rungs
            if record.status == "running":
                rungs = rungs[:-1]  # the resumed trial reports its last rung again
            trial = SimpleNamespace(config={"trial": record.index, "cut": record.cut})
            for rung in rungs:
                cost = rung.cost(settings.metric)
                self._rungs.add(record.index, record.cut, rung.step, cost)
                bracket.on_result(trial, rung.step, -cost)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Stop cancelled trials that have not started, then choose the next trial.

        Tune can stop them in no other hook.
        """
        for trial in list(tune_controller.get_live_trials()):
            if trial.status == Trial.PENDING and self._is_cancelled(trial.trial_id):
                tune_controller.stop_trial(trial)
        return super().choose_trial_to_run(tune_controller)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass the text of the error to `on_error`, with a function that holds the worker.

        See `ActorManager.hold`.
        """
        super().on_trial_error(tune_controller, trial)
        # Tune (2.60) tells schedulers alone which worker a trial has.
        worker = tune_controller._trial_to_actor.get(trial)
        hold = partial(tune_controller._actor_manager.hold, worker)
        # Only this file has the text. If Tune could not write the file, its session has ended
        # before this call.
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
        self._on_error(trial.trial_id, text, hold)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial continues after a rung.

        Controls and protected trials continue until the last rung.
        """
        index = trial.config["trial"]
        plan = params_to_plan(trial.config)
        step = result[self._time_attr]
        is_last = step >= self._max_t
        if not self._space.is_feasible(plan):
            return str(TrialScheduler.STOP if is_last else TrialScheduler.CONTINUE)

        self._rungs.add(index, plan.cut, step, result[METRIC])
        action: str = super().on_trial_result(tune_controller, trial, result)
        if not is_last and (plan in self._controls or self._rungs.protects(index, step)):
            return str(TrialScheduler.CONTINUE)
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Forget the trial.

        Otherwise Ray would enter the last score of a stopped trial again, at a lower rung.
        """
        self._trial_info.pop(trial.trial_id, None)


class _RungsByNumber(AshaBracket):  # type: ignore[misc]
    """Rungs of ASHA that identify trials by number, because a resumed trial gets a new id from Ray.

    A trial passes if it is among the best of all trials and among the best of its cut. Ranked among
    all alone, nearly every trial of the best cut passes, because controls of poor cuts rank below
    it: 16 to 53 % of the trials were stopped on SmolLM2's joint table instead of 44 to 57 %
    (2026-11).
    """

    _cut = ""  # of the trial that enters a rung

    def on_result(self, trial: Any, cur_iter: int, cur_rew: float) -> str:
        self._cut = trial.config["cut"]
        # The rungs read nothing but the id.
        numbered = SimpleNamespace(trial_id=(trial.config["trial"], self._cut))
        action: str = super().on_result(numbered, cur_iter, cur_rew)
        return action

    def cutoff(self, recorded: dict[tuple[int, str], float]) -> float | None:
        of_cut = {key: reward for key, reward in recorded.items() if key[1] == self._cut}
        limits = [super().cutoff(recorded), super().cutoff(of_cut)]
        return max((limit for limit in limits if limit is not None), default=None)
