"""Builds the first screen: the winner beside the base and the best simple alternative."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qpruner.data.measures import accuracy_name
from qpruner.plans.plan import UNPRUNED, cut_title, formats_text
from qpruner.report.claim import compared, difference_from
from qpruner.report.content import ComparedCell, Paragraph, Table
from qpruner.report.results import TableRow, rows
from qpruner.report.served import decode_in_llama_cpp
from qpruner.report.statistics import ANSWER_LOSS, CONFIRMATION_LOSS, SELECTION_LOSS, Difference
from qpruner.runs.records import BASE, SEARCHED, Finalist, Results
from qpruner.search.roles import control_title, rival_row
from qpruner.wording import counted

SIZE = "size, MB"
PERPLEXITY = "perplexity"
LLAMA_CPP = "tokens/s, llama.cpp"
TRANSFORMERS = "tokens/s, transformers"
DIGITS = {SIZE: 1, PERPLEXITY: 2, LLAMA_CPP: 1, TRANSFORMERS: 1}
"""Digits after the point of figures that are not shown with three."""

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class _Rival:
    """A column of the first screen: a model's figures and the winner's differences from it.

    `num_seeds` is the number of training seeds behind the differences.
    """

    heading: str
    figures: Figures
    differences: Sequence[Difference] = ()
    num_seeds: int = 1

    def cell(self, measure: str, ours: float) -> ComparedCell | str:
        """Show the figure beside the winner's."""
        theirs = self.figures.get(measure)
        if theirs is None:
            return "-"
        return ComparedCell(
            figure=_text(measure, theirs),
            times=f"{ours / theirs:.2f}x" if theirs else "",
            difference=next(
                (found for found in self.differences if found.measure == measure), None
            ),
        )


def overview(results: Results) -> Iterator[Paragraph | Table]:
    """Yield the winner's plan, its figures beside its rivals' in a table, and how sure they are."""
    assert results.search and results.evaluate
    search = results.search
    by_name = {row.name: row for row in rows(results)}
    winner = by_name[SEARCHED]
    yield Paragraph(
        f"{winner.title.capitalize()} ({winner.origin}): {cut_title(winner.cut)}, "
        f"{formats_text(search.winner.plan)}. Budget {search.budget_bytes / 1e6:.1f} MB, any "
        "adapter included.",
        is_note=True,
    )
    rivals = list(_rivals(results, by_name))
    yield _figures_table(results, winner, rivals)
    yield Paragraph(_how_sure(rivals), is_note=True)


def _figures_table(results: Results, winner: TableRow, rivals: Sequence[_Rival]) -> Table:
    """Build the table of all figures that the winner and one of its rivals have."""
    assert results.search and results.evaluate
    metric = accuracy_name(results.evaluate.metrics)
    ours = {
        **_figures(winner, results),
        SELECTION_LOSS: results.search.winner.as_trial.selection.loss,
    }
    body = []
    for measure, value in ours.items():
        if value is None:
            continue
        cells = [rival.cell(measure, value) for rival in rivals]
        if any(cell != "-" for cell in cells):
            heading = f"test {metric}" if measure == metric else measure
            body.append((heading, _text(measure, value), *cells))
    headings = ("measure", "this model", *(rival.heading for rival in rivals))
    return Table("This model beside the base and the plan that it has to beat", headings, body)


def _rivals(results: Results, by_name: Mapping[str, TableRow]) -> Iterator[_Rival]:
    """Yield the base and the winner's rival.

    They are compared after the same fine-tune if they had it. Otherwise the base is shown as it is,
    and the rival is compared as a trial.
    """
    assert results.search and results.prune and results.evaluate
    for base in results.evaluate.untuned:
        if base.name != BASE or BASE in by_name:
            continue
        figures = {
            SIZE: results.prune.cuts[UNPRUNED].bytes_before / 1e6,
            accuracy_name(results.evaluate.metrics): base.accuracy,
            PERPLEXITY: None if base.text_loss is None else math.exp(base.text_loss),
            LLAMA_CPP: decode_in_llama_cpp(results, BASE),
        }
        yield _Rival("base\nno fine-tune", figures)
    if BASE in by_name:
        yield _tuned_rival("base\nsame fine-tune", by_name[BASE], results)

    rival = results.search.rival_as_trial
    if rival is None:
        return
    row = rival_row(results)
    if row is None:
        difference = difference_from(rival, results.search)
        assert difference, "the rival is not the winner"
        figures = {SIZE: rival.plan_bytes / 1e6, SELECTION_LOSS: rival.as_trial.selection.loss}
        heading = f"{_heading(rival)}, as a trial"
        yield _Rival(heading, figures, (difference,), len(difference.seeds))
    elif row != BASE:
        yield _tuned_rival(_heading(rival), by_name[row], results)


def _heading(rival: Finalist) -> str:
    if rival.control:
        return f"best simple alternative\n{control_title(rival.origin)}"
    return "best searched plan"


def _tuned_rival(heading: str, row: TableRow, results: Results) -> _Rival:
    """Compare the winner with another row of the final table."""
    comparison = compared(results, row.name)
    figures = _figures(row, results)
    return _Rival(heading, figures, comparison.differences, len(comparison.seeds))


def _figures(row: TableRow, results: Results) -> Figures:
    """Return a row's figures by the names of `Difference.measure`, in the order of the table."""
    assert results.evaluate
    speeds = row.decode_tokens_per_second
    return {
        SIZE: row.measured_bytes / 1e6,
        CONFIRMATION_LOSS: row.confirmation_loss,
        accuracy_name(results.evaluate.metrics): row.accuracy,
        ANSWER_LOSS: row.answer_loss,
        PERPLEXITY: row.perplexity,
        LLAMA_CPP: decode_in_llama_cpp(results, row.name),
        TRANSFORMERS: statistics.median(speeds) if speeds else None,
    }


def _text(measure: str, value: float) -> str:
    return f"{value:.{DIGITS.get(measure, 3)}f}"


def _how_sure(rivals: Sequence[_Rival]) -> str:
    """Explain the bars: how much data they rest on, and what they leave out."""
    if not rivals or not rivals[-1].differences:
        return "How sure: nothing that one would do instead was measured beside it."
    last = rivals[-1]
    numbers = {found.noun: found.num_pairs for found in last.differences if found.num_pairs}
    seeds = "one training seed, whose luck is in no bar"
    if last.num_seeds > 1:
        seeds = f"{last.num_seeds} training seeds"
    behind = ", ".join([*(counted(number, noun) for noun, number in numbers.items()), seeds])
    return (
        "How sure: a bar is this model's difference with its 95 % interval, on its own scale: "
        f"right of the line is better. Behind them: {behind}. The factors are this model's figure "
        "over the other's."
    )
