"""Writes the claim: how the searched plan compares with others, as far as the measured spread allows a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qpruner.data.measures import Z_95, accuracy_in_full, over_tasks
from qpruner.plans.plan import UNPRUNED
from qpruner.report.instead import best_control_text
from qpruner.report.results import (
    BASE,
    BEST_SEED,
    CONTROLS,
    PRUNED,
    RANDOM,
    SEARCHED,
    UNIFORM,
    control_title,
    fine_tunes,
    rows,
    title_of,
    under_first_seed,
)
from qpruner.report.search_progress import cost, score, score_name
from qpruner.report.statistics import (
    SAME,
    Difference,
    difference_text,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    paired_losses,
    seeds_of,
    seeds_text,
)
from qpruner.runs.records import GIVEN, Confirmation, Results, SearchRecord
from qpruner.search.choice import SAME_BYTES

RIVALS = {BEST_SEED: "the best seed", RANDOM: "random plans of equal bytes"}


@dataclass(frozen=True)
class Comparison:
    """The row `searched` of the final table compared with `other`: a control, `best seed` or `random`.

    The control is the best of those in the budget that users would try instead of a search. The plan of `best seed` is
    the best of those that sensitivities suggest. `origin` says what suggested the plan of `other`. `more_bytes` is how
    many bytes more `other` takes, as a share of the bytes of `searched`. `no_claim` says why nothing is claimed, for
    example because `other` is missing.
    """

    other: str
    origin: str
    seeds: tuple[int, ...]
    more_bytes: float | None
    no_claim: str | None
    differences: tuple[Difference, ...]


def comparisons(results: Results) -> list[Comparison]:
    """Compare the searched plan with the best control that users would try instead, then with plans of equal bytes.

    These are the best seed plan (a sensitivity's) and random plans. There are no comparisons without other rows.
    """
    if set(fine_tunes(results)) == {SEARCHED}:
        return []
    control = _best_control(results)
    # The spread of random plans needs at least two of them.
    several = len({tuple(record.plan.items()) for record, _ in fine_tunes(results).get(RANDOM, ())}) > 1
    rivals = (*filter(None, [control]), BEST_SEED, *([RANDOM] if several else []))
    return [_compared(results, other) for other in rivals]


def _best_control(results: Results) -> str | None:
    """Name the row of the control in the budget with the least validation loss, by which nothing is claimed."""
    assert results.search
    by_name = {name: tuned[0][0] for name, tuned in fine_tunes(results).items()}
    winner, budget = by_name[SEARCHED], results.search.budget_bytes
    losses = {
        name: record.validation_loss
        for name, record in by_name.items()
        if (name in CONTROLS or name.startswith((UNIFORM, "unpruned-")))
        and record.plan_bytes <= budget
        and (record.cut, record.plan) != (winner.cut, winner.plan)
    }
    return min(losses, key=losses.__getitem__, default=None)


def claim(results: Results) -> str:
    """State how the searched plan compares with what users would do instead, and with other plans of equal bytes.

    The first line is a paragraph. Each of the other lines states one fact behind the claim and begins with a dash.
    """
    assert results.search
    search = results.search
    found, winner, instead = comparisons(results), _winner(results, search), best_control_text(search)
    if found:
        lead = f"{winner}{_verdicts(found)}{_against_other_rows(results)}"
        return "\n".join([lead, *map(_item, found), *([f"- {instead}"] if instead else [])])
    items = ["No other plan had this fine-tune, so nothing is claimed at equal bytes."]
    if (search.control_won or not instead) and (fresh := margin_text(search)):
        items.insert(0, f"On the search's fresh rows, before this fine-tune: i{fresh[1:]}")
    return "\n- ".join([f"{winner}{' ' * bool(instead)}{instead}{_alone(results)}", *items])


def how_to_compare(command: str) -> str:
    """State how to compare a finished run's winner with other plans; `command` is the command line of that run."""
    return (
        "To compare the winner with the base, the controls, seed and random plans after the same fine-tune, run "
        f"`{command} --set finetune.compare=true`; the winner's own fine-tune is kept."
    )


def _winner(results: Results, search: SearchRecord) -> str:
    record, _ = fine_tunes(results)[SEARCHED][0]
    size, title = f"{record.measured_bytes / 1e6:.2f} MB", title_of(SEARCHED, search)
    if search.control_won:
        return (
            f"No searched plan beat the best control on fresh rows, so the search returned the control "
            f"{control_title(search.best_origin)} ({size}); its row is `{title}`."
        )
    return f"{title.capitalize()}: {record.origin}, {size}."


def _alone(results: Results) -> str:
    """Describe the winner of a run that fine-tuned no other plan."""
    assert results.prune and results.evaluate
    [row], base_bytes = rows(results), results.prune.cuts[UNPRUNED].bytes_before
    untuned = "".join(
        f", {each.name} {over_tasks([score.correct for score in each.scores]).mean:.3f}"
        for each in results.scores
        if each.seed is None and each.name != SEARCHED
    )
    return (
        f" It is {base_bytes / row.measured_bytes:.1f} times smaller than the base model. "
        f"After its fine-tune its validation loss is {row.validation_loss:.4f} and its confirmation loss "
        f"{row.confirmation_loss:.4f} nats per token, and its test {accuracy_in_full(results.evaluate.metrics)} "
        f"{row.accuracy:.3f} (without a fine-tune{untuned})."
    )


def margin_text(search: SearchRecord) -> str:
    """Describe a winner's lead on new rows over controls (plans without a search), a control's over searched plans."""
    best = next(each for each in search.confirmations if each.index == search.best_index)
    in_budget = [each for each in search.confirmations if each.fits and each != best]
    others = [each for each in in_budget if each.control != search.control_won]
    if not others:
        return ""
    rival = min(others, key=lambda each: (cost(each, search.metric), each.index))
    ours, theirs = (score(each, search.metric) for each in (best, rival))
    is_behind = cost(best, search.metric) > cost(rival, search.metric)
    return (
        f"Its selection {score_name(search)} is {ours:.4f}, that of the best "
        f"{'searched plan' if search.control_won else 'control'} {theirs:.4f} (trial {rival.index}, "
        f"{rival.origin}): {'behind by' if is_behind else 'a margin of'} {abs(ours - theirs):.4f}"
        f"{_margin_error(best, rival, search.metric)}."
    )


def _margin_error(one: Confirmation, other: Confirmation, metric: str) -> str:
    """Describe the standard error of a margin; if losses by row are unknown, the standard error of each score."""
    apart = paired_losses(one, other) if metric == "loss" else None
    if apart:
        verdict = ", so it may be chance" if abs(apart.mean) < Z_95 * apart.stderr else ""
        return f" (standard error {apart.stderr:.4f}, paired over {len(one.losses)} rows{verdict})"
    errors = [each.stderr if metric == "loss" else each.accuracy_stderr for each in (one, other)]
    known = [f"{error:.4f}" for error in errors if error is not None and not math.isnan(error)]
    return f" (standard errors {' and '.join(known)})" if len(known) == 2 else ""


def _compared(results: Results, other: str) -> Comparison:
    by_name = fine_tunes(results)
    pairs = paired(by_name[SEARCHED], by_name.get(other, ()))
    if not pairs:
        given = results.search is not None and results.search.best_origin == GIVEN
        reason = "a plan was given, and no seed plan of this budget has finished in this folder"
        return Comparison(other, "", (), None, reason if given else "no seed plan was confirmed", ())
    share, origin, seeds = more_bytes(pairs), pairs[0][1][0].origin, seeds_of(pairs)
    reason = ""
    if all((ours.cut, ours.plan) == (theirs.cut, theirs.plan) for (ours, _), (theirs, _) in pairs):
        reason = "it is the winner's own plan, so there is no gain to claim"
    elif other in (BEST_SEED, RANDOM) and abs(share) > SAME_BYTES:
        reason = f"no claim at equal bytes, because it takes {abs(share):.1%} {'more' if share > 0 else 'fewer'} bytes"
    found = () if reason else (*over_questions(pairs), over_confirmation_rows(pairs))
    return Comparison(other, origin, seeds, share, reason or None, found)


def _against_other_rows(results: Results) -> str:
    """Compare the winner with those of base, pruned model and uniform plans that had the same fine-tune."""
    assert results.evaluate
    by_name = {row.name: row for row in under_first_seed(results)}
    winner, text = by_name[SEARCHED], ""
    if BASE in by_name and PRUNED in by_name:
        three = [winner, by_name[BASE], by_name[PRUNED]]
        figures = f"test {accuracy_in_full(results.evaluate.metrics)}"
        figures += " is {:.3f} (base {:.3f}, pruned {:.3f})".format(*(row.accuracy for row in three))
        losses = [row.answer_loss for row in three if row.answer_loss is not None]
        if len(losses) == len(three):
            figures += " and its answer loss {:.3f} (base {:.3f}, pruned {:.3f})".format(*losses)
        several = any(len(row.seeds) > 1 for row in rows(results))
        under = f" under training seed {winner.seeds[0]}" if several else ""
        text = (
            f" At {winner.measured_bytes / three[1].measured_bytes:.1%} of the base model's bytes (adapters included), "
            f"its {figures}, all after the same fine-tune{under}."
        )
    uniform = [row for row in by_name.values() if row.origin == UNIFORM and row.plans != winner.plans]
    if uniform:
        others = [f"{row.title} {row.confirmation_loss:.3f} at {row.measured_bytes / 1e6:.1f} MB" for row in uniform]
        text += (
            f" Its confirmation loss is {winner.confirmation_loss:.3f} at {winner.measured_bytes / 1e6:.1f} MB "
            f"({', '.join(others)}), under the same training seed."
        )
    return text


def _verdicts(found: Sequence[Comparison]) -> str:
    """Say in which measures the winner is better or worse, and in how many of all comparisons."""
    parts, verdicts = [], [difference.verdict for each in found for difference in each.differences]
    shown = ("better", "worse")
    for each in (each for each in found if each.differences):
        rival = _rival(each)
        measures = {word: [one.measure for one in each.differences if one.verdict == word] for word in shown}
        phrases = [f"is {word} than {rival} in {' and '.join(names)}" for word, names in measures.items() if names]
        parts.append(" and ".join(phrases) or f"is {SAME} from {rival}")
    if not parts:
        return ""
    counts = [f"{word} in {verdicts.count(word)}" for word in shown if word in verdicts]
    headline = f"{' and '.join(counts)} of {len(verdicts)}" if counts else "no difference shown"
    return f" It {'; it '.join(parts)}. Over {len(verdicts)} comparisons, each at 95 % by itself: {headline}."


def _rival(found: Comparison) -> str:
    return RIVALS.get(found.other) or f"the best control in the budget ({title_of(found.other, None)})"


def _item(found: Comparison) -> str:
    rival = _rival(found)
    if found.more_bytes is None:
        return f"- Against {rival}: no claim, {found.no_claim}."
    against = f"- Against {rival} ({found.origin}, {found.more_bytes:+.2%} bytes)"
    if found.no_claim:
        return f"{against}: {found.no_claim}."
    return f"{against}, {seeds_text(found.seeds)}: {'; '.join(map(difference_text, found.differences))}."
