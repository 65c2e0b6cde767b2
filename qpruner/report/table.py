"""The final table and the claim under it, from records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qpruner.plan import PrecisionPlan
from qpruner.records import GIVEN, CandidateRecord, Results, RowScores, SearchRecord, StandardError, TaskScore
from qpruner.search.random_plans import SAME_BYTES
from qpruner.wording import counted

BASE, PRUNED, BEST_SEED, RANDOM, SEARCHED = "base", "pruned", "best seed", "random", "searched"
UNIFORM = "uniform"
"""Origin of the rows whose groups are all at the same bits."""
ONE_RANDOM_PLAN = "random plan"
"""Origin of the random row where it is about a single plan."""
MUTUAL_INFORMATION = "mutual_information"
Z_95 = 1.96
SAME = "not distinguishable"
ACCURACY, ANSWER_LOSS, CONFIRMATION_LOSS = "accuracy", "answer loss", "confirmation loss"


Cell = tuple[int, tuple[int, ...]]
"""A fine-tune that is compared: its training seed, and the other row's plan."""


@dataclass(frozen=True)
class Row:
    """One row of the table: means over its fine-tunes, spreads as their standard deviation (None with one).

    A row's fine-tunes differ by the training seed, and in the random row by the plan besides.

    Attributes:
        name: As the fine-tune has it; `searched` is the winner's, whoever found it.
        title: As people read it.
        origin: Where the plan came from.
        seeds: Training seeds.
        plans: Bits as a bar, one character a group; several where plans are random.
        num_parameters: Without adapters.
        measured_bytes: Of the packed tensors; a mean where plans differ.
        mean_bits: Per grouped weight.
        peak_memory_bytes: The most of any fine-tune.
        validation_loss: In nats per token.
        validation_loss_spread: Over fine-tunes.
        confirmation_loss: In nats per token, on rows that no trial was scored on and that chose nothing.
        confirmation_loss_spread: Over fine-tunes.
        accuracy: Unweighted mean over the held-out tasks.
        accuracy_spread: Over fine-tunes.
        accuracy_stderr: Over questions, of one training seed.
        answer_loss: Mean negative log-likelihood of the right answers in nats; None where a task has no choices.
        answer_loss_spread: Over fine-tunes.
        perplexity: On the held-out text; None without one.
        perplexity_spread: Over fine-tunes.
        inference_memory_bytes: The most of a generation.
        prefill_tokens_per_second: Of one sequence: median, least and most over the turns of its models.
        decode_tokens_per_second: The same of the tokens written.
    """

    name: str
    title: str
    origin: str
    seeds: tuple[int, ...]
    plans: tuple[str, ...]
    num_parameters: int
    measured_bytes: int
    mean_bits: float
    peak_memory_bytes: int
    validation_loss: float
    validation_loss_spread: float | None
    confirmation_loss: float
    confirmation_loss_spread: float | None
    accuracy: float
    accuracy_spread: float | None
    accuracy_stderr: StandardError
    answer_loss: float | None
    answer_loss_spread: float | None
    perplexity: float | None
    perplexity_spread: float | None
    inference_memory_bytes: int | None
    prefill_tokens_per_second: tuple[float, float, float] | None
    decode_tokens_per_second: tuple[float, float, float] | None


@dataclass(frozen=True)
class Difference:
    """The searched row less another one in one measure, paired by training seed and by question or confirmation row.

    Attributes:
        measure: Accuracy (over all questions of all tasks), answer loss or confirmation loss.
        mean: Mean over training seeds.
        spread: Standard deviation over training seeds; None with one.
        half_width: Of the 95 % interval: the widest of Student's t over seeds and over the other row's plans (n - 1
            degrees of freedom, of their means) and the normal one over questions or rows; None where none can be told.
        num_pairs: Questions or confirmation rows; None where records of older versions do not have the rows.
        verdict: `better` or `worse` beyond the interval, else `not distinguishable`.
    """

    measure: str
    mean: float
    spread: float | None
    half_width: float | None
    num_pairs: int | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """The searched row against another one.

    Attributes:
        other: That row.
        origin: Where its plans came from; empty without such a row.
        seeds: Training seeds both have.
        more_bytes: Its bytes above the searched plan's, as a share of these, of the seed where they differ most.
        no_claim: Why nothing can be claimed; None where something can.
        differences: By measure; empty where nothing can be claimed.
    """

    other: str
    origin: str
    seeds: tuple[int, ...]
    more_bytes: float | None
    no_claim: str | None
    differences: tuple[Difference, ...]


def rows(results: Results) -> list[Row]:
    """The table's rows, in the order of the fine-tunes; a seed or uniform plan that is the best seed's says so."""
    found = [
        _row(title_of(name, results.search), tuned, _evaluated(results, name))
        for name, tuned in _by_name(results).items()
    ]
    best = [row.plans for row in found if row.name == BEST_SEED]
    apart = (BASE, PRUNED, BEST_SEED, RANDOM, SEARCHED)
    return [
        replace(row, title=f"{row.title} = {BEST_SEED}") if row.name not in apart and row.plans in best else row
        for row in found
    ]


def under_first_seed(results: Results) -> list[Row]:
    """The same rows under the first training seed alone, which every row had."""
    assert results.finetune and results.evaluate
    seed = min(record.seed for record in results.finetune.candidates)
    tuned = tuple(record for record in results.finetune.candidates if record.seed == seed)
    scored = tuple(row for row in results.evaluate.rows if row.seed == seed)
    alone = {
        "finetune": results.finetune.model_copy(update={"candidates": tuned}),
        "evaluate": results.evaluate.model_copy(update={"rows": scored}),
    }
    return rows(results.model_copy(update=alone))


def title_of(name: str, search: SearchRecord | None) -> str:
    """What people read where the records have a row's name: a plan that no search found is not called searched."""
    if name != SEARCHED or search is None:
        return name
    if search.best_origin == GIVEN:
        return "given plan"
    return f"winner ({search.best_origin})" if search.control_won else name


def model_title(row: RowScores, search: SearchRecord | None) -> str:
    """The same with what tells the model before any fine-tune from the row of that name."""
    title = title_of(row.name, search)
    return f"{title} (no fine-tune)" if row.seed is None else title


def comparisons(results: Results) -> list[Comparison]:
    """The searched plan against the best seed and against random plans of equal bytes; empty without such rows."""
    if set(_by_name(results)) == {SEARCHED}:
        return []
    return [_compared(results, other) for other in (BEST_SEED, RANDOM)]


def claim(results: Results) -> str:
    """What the searched plan lost against the base and the pruned model, and what can be said of it at equal bytes,
    never more than the spread allows: a line, then a list."""
    assert results.search
    found = comparisons(results)
    if not found:
        return "No claim is made: no other plan had the same fine-tune."
    winner = _winner(results.search, _by_name(results)[SEARCHED][0])
    lead = f"{winner}{_lost(results)}{_beside_uniform(results)}{_in_words(found)}"
    return "\n".join([lead, *map(_stated, found)])


def tally(found: Sequence[Comparison]) -> tuple[str, str]:
    """In how many of all comparisons the searched plan is better or worse, and how many these are: of several one may
    show a difference by chance."""
    verdicts = [difference.verdict for each in found for difference in each.differences]
    told = [f"{verdict} in {verdicts.count(verdict)}" for verdict in ("better", "worse") if verdict in verdicts]
    headline = f"{' and '.join(told)} of {len(verdicts)}" if told else "no difference shown"
    return headline, f"{len(verdicts)} comparisons, each at 95 % by itself"


def _by_name(results: Results) -> dict[str, list[CandidateRecord]]:
    assert results.finetune
    names = dict.fromkeys(record.name for record in results.finetune.candidates)
    return {name: [record for record in results.finetune.candidates if record.name == name] for name in names}


def _evaluated(results: Results, name: str) -> list[RowScores]:
    """What was measured of a fine-tuned row, by training seed in the order of its records."""
    assert results.evaluate
    return [row for row in results.evaluate.rows if row.name == name and row.seed is not None]


def _scores(results: Results, name: str) -> list[tuple[TaskScore, ...]]:
    return [row.scores for row in _evaluated(results, name)]


def _winner(search: SearchRecord, winner: CandidateRecord) -> str:
    size, title = f"{winner.measured_bytes / 1e6:.2f} MB", title_of(SEARCHED, search)
    if search.control_won:
        return (
            f"No searched plan beat the best control on fresh rows: the control {search.best_origin} ({size}) is what "
            f"the search returned, in the row `{title}`."
        )
    return f"{title.capitalize()}: {winner.origin}, {size}."


def _compared(results: Results, other: str) -> Comparison:
    by_name = _by_name(results)
    pairs = [
        (ours, theirs, our_scores, their_scores)
        for ours, our_scores in zip(by_name[SEARCHED], _scores(results, SEARCHED), strict=True)
        for theirs, their_scores in zip(by_name.get(other, ()), _scores(results, other), strict=True)
        if ours.seed == theirs.seed
    ]
    if not pairs:
        return Comparison(other, "", (), None, _missing(other, results.search), ())
    shares = [(theirs.measured_bytes - ours.measured_bytes) / ours.measured_bytes for ours, theirs, _, _ in pairs]
    share = max(shares, key=abs)
    reason = None
    if all(ours.plan == theirs.plan for ours, theirs, _, _ in pairs):
        reason = "it is the winner's plan itself, so there is no gain to claim"
    elif abs(share) > SAME_BYTES:
        reason = f"no claim at equal bytes, it takes {abs(share):.1%} {'more' if share > 0 else 'fewer'}"
    differences: list[Difference | None] = []
    if reason is None:
        scores = [(ours, theirs) for _, _, ours, theirs in pairs]
        cells = [(theirs.seed, tuple(theirs.plan.values())) for _, theirs, _, _ in pairs]
        differences = [
            _over_questions(ACCURACY, cells, scores, "correct"),
            _over_questions(ANSWER_LOSS, cells, scores, "answer_loss"),
            _over_confirmation_rows(cells, [(ours, theirs) for ours, theirs, _, _ in pairs]),
        ]
    seeds = tuple(dict.fromkeys(ours.seed for ours, _, _, _ in pairs))
    return Comparison(other, pairs[0][1].origin, seeds, share, reason, tuple(each for each in differences if each))


def _missing(other: str, search: SearchRecord | None) -> str:
    """Why there is no such row."""
    if other == RANDOM:
        return "no other plan of equal bytes was found"
    if search and search.best_origin == GIVEN:
        return "a plan was given, and no seed plan of this budget has finished in this folder"
    return "no seed plan was confirmed"


def _over_questions(
    measure: str,
    cells: Sequence[Cell],
    scores: Sequence[tuple[tuple[TaskScore, ...], tuple[TaskScore, ...]]],
    value: str,
) -> Difference | None:
    """The difference over every question of every task; None where a task has no such values."""
    by_cell = []
    for ours, theirs in scores:
        paired = [(getattr(one, value), getattr(other, value)) for one, other in zip(ours, theirs, strict=True)]
        if not all(left and right for left, right in paired):
            return None
        by_cell.append([a - b for left, right in paired for a, b in zip(left, right, strict=True)])
    return _difference(measure, cells, [statistics.fmean(values) for values in by_cell], by_cell)


def _over_confirmation_rows(
    cells: Sequence[Cell], pairs: Sequence[tuple[CandidateRecord, CandidateRecord]]
) -> Difference:
    values = [ours.confirmation_loss - theirs.confirmation_loss for ours, theirs in pairs]
    both = [(ours.confirmation_losses, theirs.confirmation_losses) for ours, theirs in pairs]
    by_cell = [[a - b for a, b in zip(*each, strict=True)] for each in both if all(each)]
    return _difference(CONFIRMATION_LOSS, cells, values, by_cell if len(by_cell) == len(cells) else [])


def _difference(
    measure: str, cells: Sequence[Cell], values: Sequence[float], by_cell: Sequence[Sequence[float]]
) -> Difference:
    """The difference whose cells have these values, each over the same questions or rows, where those are known."""
    from scipy.stats import t

    by_seed, by_plan = (_means(values, [cell[axis] for cell in cells]) for axis in (0, 1))
    widths = []
    for means in (by_seed, by_plan):
        if len(means) > 1:
            widths.append(float(t.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / math.sqrt(len(means)))
    by_pair = [statistics.fmean(each) for each in zip(*by_cell, strict=True)]
    if len(by_pair) > 1:  # one question has no spread
        widths.append(Z_95 * statistics.stdev(by_pair) / math.sqrt(len(by_pair)))
    mean, half_width = statistics.fmean(values), max(widths, default=None)
    verdict = SAME
    # Seeds that agree to the last bit are no evidence of a spread of zero.
    if half_width and abs(mean) > half_width:
        verdict = "better" if (mean > 0) == (measure == ACCURACY) else "worse"
    return Difference(measure, mean, _spread(by_seed), half_width, len(by_pair) or None, verdict)


def _means(values: Sequence[float], keys: Sequence[object]) -> list[float]:
    grouped: dict[object, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        grouped.setdefault(key, []).append(value)
    return [statistics.fmean(each) for each in grouped.values()]


def _rival(found: Comparison) -> str:
    if found.other == BEST_SEED:
        return "the best seed"
    return "one random plan of equal bytes" if found.origin == ONE_RANDOM_PLAN else "random plans of equal bytes"


def beside_base(results: Results) -> tuple[list[Row], str]:
    """The searched row, then the base's and the pruned model's as far as there are such, all under the training seed
    that each had, and that seed in words; no words where no row had more."""
    alike = {row.name: row for row in under_first_seed(results)}
    found = [alike[name] for name in (SEARCHED, BASE, PRUNED) if name in alike]
    several = any(len(row.seeds) > 1 for row in rows(results))
    return found, f" under training seed {found[0].seeds[0]}" if several else ""


def _lost(results: Results) -> str:
    """What the winner weighs and knows beside the base and the pruned model, as a sentence; nothing without them."""
    three, under = beside_base(results)
    if len(three) < 3:
        return ""
    winner, base, _ = three
    told = "test accuracy is {:.3f} (base {:.3f}, pruned {:.3f})".format(*(row.accuracy for row in three))
    losses = [row.answer_loss for row in three if row.answer_loss is not None]
    if len(losses) == len(three):
        told += " and its answer loss {:.3f} (base {:.3f}, pruned {:.3f})".format(*losses)
    return (
        f" At {winner.measured_bytes / base.measured_bytes:.1%} of the bytes of the base with such an adapter, its "
        f"{told}, all after the same fine-tune{under}."
    )


def _beside_uniform(results: Results) -> str:
    """What the winner weighs and knows beside uniform bits, as a sentence; nothing without such rows."""
    alike = {row.name: row for row in under_first_seed(results)}
    winner = alike[SEARCHED]
    uniform = [row for row in alike.values() if row.origin == UNIFORM and row.plans != winner.plans]
    if not uniform:
        return ""
    told = [f"{row.title} {row.confirmation_loss:.3f} at {row.measured_bytes / 1e6:.1f} MB" for row in uniform]
    return (
        f" Its confirmation loss is {winner.confirmation_loss:.3f} at {winner.measured_bytes / 1e6:.1f} MB "
        f"({', '.join(told)}), under the same training seed."
    )


def _in_words(found: Sequence[Comparison]) -> str:
    """The verdicts as a sentence, and how many they are; nothing where there are none."""
    parts = []
    for each in (each for each in found if each.differences):
        by_verdict = {
            verdict: " and ".join(one.measure for one in each.differences if one.verdict == verdict)
            for verdict in ("better", "worse")
        }
        told = [
            f"is {verdict} than {_rival(each)} in {measures}" for verdict, measures in by_verdict.items() if measures
        ]
        parts.append(" and ".join(told) or f"cannot be told from {_rival(each)}")
    if not parts:
        return ""
    headline, among = tally(found)
    return f" It {'; it '.join(parts)}. Over {among}: {headline}."


def _stated(found: Comparison) -> str:
    named = _rival(found)
    if found.more_bytes is None:
        return f"- Against {named}: no claim, {found.no_claim}."
    against = f"- Against {named} ({found.origin}, {found.more_bytes:+.2%} bytes)"
    if found.no_claim:
        return f"{against}: {found.no_claim}."
    count = len(found.seeds)
    over = f"{count} training seeds, paired" if count > 1 else "one training seed, paired by question and row"
    return f"{against}, {over}: {'; '.join(map(_told, found.differences))}."


def _told(found: Difference) -> str:
    unit = "" if found.measure == ACCURACY else " nats"
    about = []
    if found.spread is not None:
        about.append(f"± {found.spread:.4f} over seeds")
    if found.num_pairs:
        about.append(counted(found.num_pairs, "row" if found.measure == CONFIRMATION_LOSS else "question"))
    low_high = "no interval"
    if found.half_width is not None:
        low_high = f"95 % interval {found.mean - found.half_width:+.4f} to {found.mean + found.half_width:+.4f}"
    return f"{found.measure} {found.mean:+.4f}{unit} ({', '.join([*about, low_high])}), {found.verdict}"


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _row(title: str, tuned: list[CandidateRecord], evaluated: list[RowScores]) -> Row:
    scored = [row.scores for row in evaluated]
    perplexities = [math.exp(row.text_loss) for row in evaluated if row.text_loss is not None]
    taken = list(dict.fromkeys(row.inference for row in evaluated if row.inference))
    accuracies = [statistics.fmean(score.value for score in scores) for scores in scored]
    stderrs = [math.sqrt(sum(score.stderr**2 for score in scores)) / len(scores) for scores in scored]
    has_choices = all(score.answer_loss for scores in scored for score in scores)
    answers = [
        statistics.fmean(statistics.fmean(score.answer_loss) for score in scores) for scores in scored if has_choices
    ]
    validation = [record.validation_loss for record in tuned]
    confirmation = [record.confirmation_loss for record in tuned]
    bars = (str(PrecisionPlan.from_dict(record.plan)) for record in tuned)
    return Row(
        name=tuned[0].name,
        title=title,
        origin=tuned[0].origin,
        seeds=tuple(dict.fromkeys(record.seed for record in tuned)),
        plans=tuple(dict.fromkeys(bars)),
        num_parameters=tuned[0].num_parameters,
        measured_bytes=round(statistics.fmean(record.measured_bytes for record in tuned)),
        mean_bits=statistics.fmean(record.mean_bits for record in tuned),
        peak_memory_bytes=max(record.peak_memory_bytes for record in tuned),
        validation_loss=statistics.fmean(validation),
        validation_loss_spread=_spread(validation),
        confirmation_loss=statistics.fmean(confirmation),
        confirmation_loss_spread=_spread(confirmation),
        accuracy=statistics.fmean(accuracies),
        accuracy_spread=_spread(accuracies),
        accuracy_stderr=statistics.fmean(stderrs),
        answer_loss=statistics.fmean(answers) if answers else None,
        answer_loss_spread=_spread(answers),
        perplexity=statistics.fmean(perplexities) if perplexities else None,
        perplexity_spread=_spread(perplexities),
        inference_memory_bytes=max((each.memory_bytes for each in taken), default=None),
        prefill_tokens_per_second=_median_range([turn for each in taken for turn in each.prefill_tokens_per_second]),
        decode_tokens_per_second=_median_range([turn for each in taken for turn in each.decode_tokens_per_second]),
    )


def _median_range(values: Sequence[float]) -> tuple[float, float, float] | None:
    return (statistics.median(values), min(values), max(values)) if values else None
