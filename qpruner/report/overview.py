"""Builds the first screen: what the winner is, beside the base and the best simple alternative, and how sure that is."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qpruner.data.measures import accuracy_name, over_tasks
from qpruner.plans.plan import UNPRUNED, cut_title
from qpruner.report.claim import best_control, compared
from qpruner.report.content import Compared, Paragraph, Table
from qpruner.report.finalists import against_rival, finalists, formats_text
from qpruner.report.results import BASE, SEARCHED, Row, control_title, rows
from qpruner.report.served import decode_in_llama_cpp
from qpruner.report.statistics import ANSWER_LOSS, CONFIRMATION_LOSS, LOSSES, SELECTION_LOSS, Difference
from qpruner.runs.records import Results
from qpruner.wording import counted

SIZE, PERPLEXITY, LLAMA_CPP, TRANSFORMERS = "size, MB", "perplexity", "tokens/s, llama.cpp", "tokens/s, transformers"
DIGITS = {SIZE: 1, PERPLEXITY: 2, LLAMA_CPP: 1, TRANSFORMERS: 1}  # of the others: 3
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class _Rival:
    """A column: a model's figures, the winner's differences from it, and the number of training seeds behind them."""

    heading: str
    figures: Figures
    differences: Sequence[Difference] = ()
    num_seeds: int = 1

    def cell(self, measure: str, ours: float) -> Compared | str:
        """Show the figure beside the winner's."""
        theirs = self.figures.get(measure)
        if theirs is None:
            return "-"
        difference = next((each for each in self.differences if each.measure == measure), None)
        return Compared(_text(measure, theirs), f"{ours / theirs:.2f}×" if theirs else "", difference)


def overview(results: Results) -> Iterator[Paragraph | Table]:
    """Yield the winner's plan, the table of its figures beside those of its rivals, and how sure they are."""
    assert results.search and results.evaluate
    search, row = results.search, next(row for row in rows(results) if row.name == SEARCHED)
    about = f"{row.title.capitalize()} ({row.origin}): {cut_title(row.cut)}, {formats_text(search.best_plan)}"
    yield Paragraph(f"{about}. Budget {search.budget_bytes / 1e6:.1f} MB, adapter included.", is_note=True)
    rivals = list(_rivals(results))
    ours = {**_figures(row, results), SELECTION_LOSS: finalists(search)[0].loss}
    metric, body = accuracy_name(results.evaluate.metrics), []
    for measure, value in ours.items():
        cells = [rival.cell(measure, value) for rival in rivals] if value is not None else []
        if any(cell != "-" for cell in cells):
            body.append((f"test {metric}" if measure == metric else measure, _text(measure, value or 0.0), *cells))
    headings = ("measure", "this model", *(rival.heading for rival in rivals))
    yield Table("This model beside the base and the best simple alternative", headings, body)
    yield Paragraph(_how_sure(rivals), is_note=True)


def _rivals(results: Results) -> Iterator[_Rival]:
    """Yield the base and the best control: after the same fine-tune if they had it, else the control as a trial."""
    assert results.search and results.prune and results.evaluate
    by_name, control = {row.name: row for row in rows(results)}, best_control(results)
    if BASE in by_name:
        yield _fine_tuned("base\nsame fine-tune", BASE, results)
    else:
        [base] = [row for row in results.scores if row.name == BASE and row.seed is None]
        figures = {
            SIZE: results.prune.cuts[UNPRUNED].bytes_before / 1e6,
            accuracy_name(results.evaluate.metrics): over_tasks([score.correct for score in base.scores]).mean,
            PERPLEXITY: None if base.text_loss is None else math.exp(base.text_loss),
            LLAMA_CPP: decode_in_llama_cpp(results, BASE),
        }
        yield _Rival("base\nno fine-tune", figures)
    if control:
        yield _fine_tuned(f"best simple alternative\n{control_title(control)}", control, results)
    elif found := against_rival(results.search):
        rival, difference = found
        figures = {SIZE: rival.plan_bytes / 1e6, SELECTION_LOSS: rival.loss}
        yield _Rival(f"best simple alternative\n{rival.title}, as a trial", figures, (difference,))


def _fine_tuned(heading: str, name: str, results: Results) -> _Rival:
    row, found = next(row for row in rows(results) if row.name == name), compared(results, name)
    return _Rival(heading, _figures(row, results), found.differences, len(found.seeds))


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
        TRANSFORMERS: row.decode_tokens_per_second and statistics.median(row.decode_tokens_per_second),
    }


def _text(measure: str, value: float) -> str:
    return f"{value:.{DIGITS.get(measure, 3)}f}"


def _how_sure(rivals: Sequence[_Rival]) -> str:
    """Explain the bars: on how much data they rest, and what they leave out."""
    last = rivals[-1]
    if not last.differences:
        return "Nothing was compared, so there is no interval."
    data = {each.measure in LOSSES and each.measure != ANSWER_LOSS: each.num_pairs for each in last.differences}
    on = [counted(number, noun) for noun, number in (("question", data.get(False)), ("row", data.get(True))) if number]
    seeds = "one training seed: that seed's luck is in no bar"
    if last.num_seeds > 1:
        seeds = f"{last.num_seeds} training seeds"
    return (
        "How sure: a bar is this model's difference with its 95 % interval, on a scale of its own: right of the line is better. "
        f"Behind them are {' and '.join(on)}, and {seeds}. × is this model's figure over the other's."
    )
