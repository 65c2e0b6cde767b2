"""Decides which finalist a winner is compared with, and compares finalists on fresh rows.

Finalists are trials of equally many steps. Some are trained again under further seeds
(`search.confirm_seeds`), and another seed moves the losses of all plans together, so two finalists
are compared on the seeds that both have.
"""

from collections.abc import Sequence
from typing import NamedTuple

from qpruner.data.measures import Interval, interval, less
from qpruner.plans.plan import UNPRUNED, cut_title, plan_of
from qpruner.runs.records import (
    BEST_SEARCHED,
    GIVEN,
    MERGED,
    PAPER,
    RANDOM,
    SEARCHED,
    Finalist,
    Results,
    SearchRecord,
    is_control,
)
from qpruner.search.choice import winner_position


class Paired(NamedTuple):
    """The mean loss of one finalist less that of another on the same rows.

    It also has the training seeds behind the difference.
    """

    seeds: tuple[int, ...]
    less: Interval


def best_of(finalists: Sequence[Finalist], metric: str) -> Finalist | None:
    """Return the finalist with the best score; None without finalists.

    `choice.winner_position` tells which score is the best.
    """
    position = winner_position(
        [finalist.mean.cost(metric) for finalist in finalists],
        [finalist.control for finalist in finalists],
        [len(finalist.fine_tunes) for finalist in finalists],
    )
    return None if position is None else finalists[position]


def rival_of(finalists: Sequence[Finalist], winner: Finalist, metric: str) -> Finalist | None:
    """Return the finalist that the winner has to be compared with; None if no other may win.

    It is the best control if a searched plan won, and the best searched plan if a control won. If a
    control won and no searched plan is left, it is the best other control.
    """
    others = [each for each in finalists if each.fits and each.index != winner.index]
    searched = [each for each in others if not each.control] if winner.control else []
    return best_of(searched or [each for each in others if each.control], metric)


def compared_as_trials(ours: Finalist, theirs: Finalist, num_finalists: int) -> Paired:
    """Compare the losses of two finalists, paired by training seed and row.

    Every two of the finalists may be compared, so their intervals hold all pairs together.
    """
    seeds = tuple(seed for seed in ours.losses if seed in theirs.losses)
    by_seed = [[less(ours.losses[seed], theirs.losses[seed])] for seed in seeds]
    return Paired(seeds, interval(by_seed, max(1, num_finalists * (num_finalists - 1) // 2)))


def is_beaten(finalist: Finalist, search: SearchRecord) -> bool:
    """Return True if a finalist's loss was above the winner's by more than the interval allows.

    The interval is that of their difference. In a search by accuracy no loss says that a finalist
    is worse.
    """
    if search.by_accuracy:
        return False
    more = compared_as_trials(finalist, search.winner, len(search.finalists)).less
    return more.mean > 0 and more.excludes_zero


def rival_row(results: Results) -> str | None:
    """Name the row of the final table that has the rival's plan; None if its plan had no fine-tune.

    The search chose the rival, on other rows than those that judge it there.
    """
    assert results.search
    rival = results.search.rival_as_trial
    if rival is None:
        return None
    for tuned in results.fine_tunes:
        if tuned.name not in (SEARCHED, RANDOM, MERGED) and plan_of(tuned) == plan_of(rival):
            return tuned.name
    return None


def title_of(name: str, search: SearchRecord | None) -> str:
    """Return the name that reports give to a row.

    The row `searched` holds the winner. It is called `given plan` if the user gave the winner's
    plan, `winner (CONTROL)` if the winner is a control, and otherwise `searched`. Other rows get
    the title of `control_title`.
    """
    if name != SEARCHED or search is None:
        return control_title(name)
    winner = search.winner
    if winner.origin == GIVEN:
        return "given plan"
    return f"winner ({control_title(winner.origin)})" if winner.control else name


def finalist_title(finalist: Finalist, search: SearchRecord) -> str:
    """Return a finalist's name in reports."""
    is_winner = finalist.index == search.best_index
    return title_of(SEARCHED if is_winner else finalist.origin, search)


def control_title(name: str) -> str:
    """Return a control's name in reports, such as `not pruned, uniform`; other names stay."""
    if name == PAPER:
        return "the paper's flow"
    if name == BEST_SEARCHED:
        return "best searched plan"
    if name == MERGED:
        return "merged, then rounded"
    cut, _, kind = name.rpartition("-")
    return (
        f"{cut_title(UNPRUNED if cut == 'unpruned' else cut)}, {kind}" if is_control(name) else name
    )
