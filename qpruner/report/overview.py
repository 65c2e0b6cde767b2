"""Builds the first screen: the winner beside the base and the best simple alternative.

It also tells how sure the differences are.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qpruner.data.measures import accuracy_name
from qpruner.plans.plan import UNPRUNED, cut_title, formats_text
from qpruner.report.claim import compared, difference_from
from qpruner.report.content import Compared, Paragraph, Table
from qpruner.report.results import Row, rows
from qpruner.report.served import decode_in_llama_cpp
from qpruner.report.statistics import ANSWER_LOSS, CONFIRMATION_LOSS, SELECTION_LOSS, Difference
from qpruner.runs.records import BASE, SEARCHED, Results
from qpruner.search.roles import control_title, rival_row
from qpruner.wording import counted

SIZE, PERPLEXITY, LLAMA_CPP, TRANSFORMERS = (
    "size, MB",
    "perplexity",
    "tokens/s, llama.cpp",
    "tokens/s, transformers",
)
DIGITS = {SIZE: 1, PERPLEXITY: 2, LLAMA_CPP: 1, TRANSFORMERS: 1}  # of the others: 3
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class _Rival:
    """A column of the first screen: a model's figures and the winner's differences from it.

    It also has the number of training seeds behind them.
    """

    heading: str
    figures: Figures
    differences: Sequence[Difference] = ()
    num_seeds: int = 1

    def cell(self, measure: str, ours: float) -> Compared | str:
        """Show the figure beside the winner's."""
        if (theirs := self.figures.get(measure)) is None:
            return "-"
        difference = next((each for each in self.differences if each.measure == measure), None)
        return Compared(
            _text(measure, theirs), f"{ours / theirs:.2f}x" if theirs else "", difference
        )


def overview(results: Results) -> Iterator[Paragraph | Table]:
    """Yield the winner's plan, its figures beside those of its rivals, and how sure they are.

    The figures are in one table.
    """
    assert results.search and results.evaluate
    search, row = results.search, next(row for row in rows(results) if row.name == SEARCHED)
    about = (
        f"{row.title.capitalize()} ({row.origin}): {cut_title(row.cut)}, "
        f"{formats_text(search.best_plan)}"
    )
    yield Paragraph(
        f"{about}. Budget {search.budget_bytes / 1e6:.1f} MB, adapter included.", is_note=True
    )
    rivals = list(_rivals(results))
    ours = {**_figures(row, results), SELECTION_LOSS: search.winner.as_trial.selection.loss}
    metric, body = accuracy_name(results.evaluate.metrics), []
    for measure, value in ours.items():
        cells = [rival.cell(measure, value) for rival in rivals] if value is not None else []
        if any(cell != "-" for cell in cells):
            body.append(
                (
                    f"test {metric}" if measure == metric else measure,
                    _text(measure, value or 0.0),
                    *cells,
                )
            )
    headings = ("measure", "this model", *(rival.heading for rival in rivals))
    yield Table("This model beside the base and the plan that it has to beat", headings, body)
    yield Paragraph(_how_sure(rivals), is_note=True)


def _rivals(results: Results) -> Iterator[_Rival]:
    """Yield the base and the winner's rival.

    They are compared after the same fine-tune if they had it; else the rival is compared as a
    trial.
    """
    assert results.search and results.prune and results.evaluate
    tuned = {"base\nsame fine-tune": BASE}
    rival, row = results.search.rival_as_trial, rival_row(results)
    heading = (
        f"best simple alternative\n{control_title(rival.origin)}"
        if rival and rival.control
        else "best searched plan"
    )
    if row not in (None, BASE):
        tuned[heading] = row
    by_name = {row.name: row for row in rows(results)}
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
    for title, name in tuned.items():
        if name in by_name:
            found = compared(results, name)
            yield _Rival(
                title, _figures(by_name[name], results), found.differences, len(found.seeds)
            )
    if row is None and rival and (difference := difference_from(rival, results.search)):
        figures = {SIZE: rival.plan_bytes / 1e6, SELECTION_LOSS: rival.as_trial.selection.loss}
        yield _Rival(f"{heading}, as a trial", figures, (difference,), len(difference.seeds))


def _figures(row: Row, results: Results) -> Figures:
    """Return a row's figures by the names of `Difference.measure`, in the order of the table."""
    assert results.evaluate
    return {
        SIZE: row.measured_bytes / 1e6,
        CONFIRMATION_LOSS: row.confirmation_loss,
        accuracy_name(results.evaluate.metrics): row.accuracy,
        ANSWER_LOSS: row.answer_loss,
        PERPLEXITY: row.perplexity,
        LLAMA_CPP: decode_in_llama_cpp(results, row.name),
        TRANSFORMERS: row.decode_tokens_per_second
        and statistics.median(row.decode_tokens_per_second),
    }


def _text(measure: str, value: float) -> str:
    return f"{value:.{DIGITS.get(measure, 3)}f}"


def _how_sure(rivals: Sequence[_Rival]) -> str:
    """Explain the bars: on how much data they rest, and what they leave out."""
    *_, last = (_Rival("", {}), *rivals)
    if not last.differences:
        return "How sure: nothing that one would do instead was measured beside it."
    numbers = {each.noun: each.num_pairs for each in last.differences if each.num_pairs}
    seeds = (
        f"{last.num_seeds} training seeds"
        if last.num_seeds > 1
        else "one training seed, whose luck is in no bar"
    )
    behind = ", ".join([*(counted(number, noun) for noun, number in numbers.items()), seeds])
    return (
        "How sure: a bar is this model's difference with its 95 % interval, on its own scale: "
        f"right of the line is better. Behind them: {behind}. The factors are this model's figure "
        "over the other's."
    )
