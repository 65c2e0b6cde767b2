"""Compares the winner of a search with the other finalists, trials of equally many steps, on fresh
rows."""

from dataclasses import dataclass
from statistics import fmean

from qpruner.plans.plan import formats_text
from qpruner.report.statistics import SELECTION_LOSS, Difference, verdict_of
from qpruner.runs.records import SEARCHED, Confirmation, SearchRecord
from qpruner.search.roles import compared, title_of


@dataclass(frozen=True)
class Finalist:
    """A finalist, as a trial of `SearchRecord.steps` steps scored on the fresh rows that chose the
    winner.

    `name` is its origin, which `title` puts into words, `trial` its number; users would try a
    `control` instead of a search. `fits`: whether it may win. `loss` is that under the training
    seed of all trials, in nats per token; of a finalist that was trained under further seeds too,
    `mean_loss` is the mean over its `num_seeds`. `difference` is the winner's loss less this one's,
    on the seeds that both have; None for the winner itself. Its interval holds all pairs of
    finalists together.
    """

    name: str
    title: str
    trial: int
    control: bool
    cut: str
    formats: str
    plan_bytes: int
    fits: bool
    loss: float
    mean_loss: float
    num_seeds: int
    difference: Difference | None


def finalists(search: SearchRecord) -> list[Finalist]:
    """List the winner, then the other finalists in the budget by their loss, then those that exceed
    it."""
    found = [_finalist(each, search) for each in search.confirmations]
    return sorted(
        found, key=lambda each: (each.difference is not None, not each.fits, each.loss, each.trial)
    )


def rival_as_trial(search: SearchRecord) -> Finalist | None:
    """Return the finalist that the winner is compared with; None without one."""
    return next((each for each in finalists(search) if each.trial == search.rival), None)


def _finalist(finalist: Confirmation, search: SearchRecord) -> Finalist:
    is_winner = finalist.index == search.best_index
    of_trial, *_ = finalist.losses.values()
    return Finalist(
        name=finalist.origin,
        title=title_of(SEARCHED if is_winner else finalist.origin, search),
        trial=finalist.index,
        control=finalist.control,
        cut=finalist.cut,
        formats=formats_text(finalist.plan),
        plan_bytes=finalist.plan_bytes,
        fits=finalist.fits,
        loss=fmean(of_trial),
        mean_loss=finalist.loss,
        num_seeds=len(finalist.losses),
        difference=None if is_winner else _difference(finalist, search),
    )


def _difference(finalist: Confirmation, search: SearchRecord) -> Difference:
    """Return the loss of the winner less that of another finalist; it decides nothing in a search
    by accuracy."""
    paired = compared(search.winner, finalist, len(search.confirmations))
    return Difference(
        measure=SELECTION_LOSS,
        mean=paired.less.mean,
        spread=None,
        half_width=paired.less.half_width,
        num_pairs=len(next(iter(finalist.losses.values()))),
        seeds=paired.seeds,
        verdict=None if search.by_accuracy else verdict_of(SELECTION_LOSS, paired.less),
    )
