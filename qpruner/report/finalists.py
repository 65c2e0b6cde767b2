"""Compares the winner of a search with the other finalists, trials of equally many steps, on fresh rows."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from qpruner.data.measures import Z_95, paired
from qpruner.plans.plan import EMBEDDINGS, HEAD
from qpruner.quantization.formats import by_size
from qpruner.report.results import SEARCHED, title_of
from qpruner.report.search_progress import cost
from qpruner.report.statistics import SAME, SELECTION_LOSS, Difference
from qpruner.runs.records import Confirmation, SearchRecord
from qpruner.search.choice import winner_position


@dataclass(frozen=True)
class Finalist:
    """A finalist, as a trial of `SearchRecord.steps` steps scored on fresh rows.

    `name` is its origin, which `title` puts into words, `trial` its number; users would try a `control` instead of a
    search. `fits`: whether it may win. `more_loss`: by how much `loss` (nats per token) exceeds the winner's, with half
    of the 95 % interval paired by row, `half_width`; `verdict`: `better` or `worse` if that excludes 0.
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
    more_loss: float | None
    half_width: float | None
    num_rows: int
    verdict: str | None

    @property
    def difference(self) -> Difference | None:
        """The winner's difference from this finalist; None for the winner itself."""
        if self.more_loss is None:
            return None
        verdict = {"better": "worse", "worse": "better"}.get(self.verdict or "", SAME)
        return Difference(SELECTION_LOSS, -self.more_loss, None, self.half_width, self.num_rows or None, verdict)


def finalists(search: SearchRecord) -> list[Finalist]:
    """List the winner, then the other finalists in the budget by their loss, then those that exceed it."""
    best = next(each for each in search.confirmations if each.index == search.best_index)
    others = sorted(
        (each for each in search.confirmations if each != best), key=lambda each: (not each.fits, each.loss, each.index)
    )
    return [_compared(each, best, search) for each in (best, *others)]


def rival_of(search: SearchRecord) -> Confirmation | None:
    """Return the best control in the budget but the winner, by the rule that chose the winner; None without any."""
    controls = [each for each in search.confirmations if each.control and each.fits and each.index != search.best_index]
    scores, num_seeds = [cost(each, search.metric) for each in controls], [len(each.seed_losses) for each in controls]
    position = winner_position(scores, [True] * len(controls), num_seeds)
    return None if position is None else controls[position]


def lost_controls(search: SearchRecord) -> list[Confirmation]:
    """List the controls in the budget that were worse as trials than the best of them, beyond the 95 % interval."""
    best, controls = rival_of(search), [each for each in search.confirmations if each.control and each.fits]
    return [each for each in controls if best and _compared(each, best, search).verdict == "worse"]


def rival_as_trial(search: SearchRecord) -> Finalist | None:
    """Return the finalist that `rival_of` found."""
    rival = rival_of(search)
    return next((each for each in finalists(search) if rival and each.trial == rival.index), None)


def formats_text(plan: Mapping[str, str]) -> str:
    """Describe a plan in short: `40 nf4, 20 int8, embeddings q8_0`, or `nf4` for blocks of one format."""
    counts = Counter(name for group, name in plan.items() if group not in (EMBEDDINGS, HEAD))
    of_blocks = list(counts) if len(counts) == 1 else [f"{counts[name]} {name}" for name in by_size(tuple(counts))]
    return ", ".join([*of_blocks, *(f"{group} {plan[group]}" for group in (EMBEDDINGS, HEAD) if group in plan)])


def _compared(each: Confirmation, best: Confirmation, search: SearchRecord) -> Finalist:
    is_best = each == best
    apart = None if is_best else paired(each.losses, best.losses)
    more = None if is_best else apart.mean if apart else each.loss - best.loss
    half_width, verdict = Z_95 * apart.stderr if apart else None, None if is_best else SAME
    if more is not None and half_width and abs(more) > half_width:
        verdict = "better" if more < 0 else "worse"
    return Finalist(
        name=each.origin,
        title=title_of(SEARCHED if is_best else each.origin, search),
        trial=each.index,
        control=each.control,
        cut=each.cut,
        formats=formats_text(each.plan),
        plan_bytes=each.plan_bytes,
        fits=each.fits,
        loss=each.loss,
        more_loss=more,
        half_width=half_width,
        num_rows=len(each.losses),
        verdict=verdict,
    )
