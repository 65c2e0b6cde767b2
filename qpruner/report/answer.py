"""Makes the page's first figures: how large, how good, which plan, how fast, how sure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qpruner.data.measures import ACCURACY, Z_95, accuracy_in_full, accuracy_name
from qpruner.report.claim import RIVALS, comparisons, tally
from qpruner.report.content import Tile
from qpruner.report.results import BASE, SEARCHED, Row, beside_base, rows, untuned_accuracies
from qpruner.report.search_progress import best_of, cost, score, score_name
from qpruner.report.search_summary import margin_error, rivals
from qpruner.report.snapshot import STATUSES, Snapshot
from qpruner.report.tables import turns_text
from qpruner.runs.records import plan_group_bytes


def tiles(run: Snapshot) -> list[Tile]:
    """Return the answer of a whole run; of another one how far it came."""
    if not run.is_whole:
        return list(_so_far(run))
    table = {row.name: row for row in rows(run.results)}
    winner, base = table[SEARCHED], table.get(BASE)
    first = (_size(run, winner, base), _accuracy(run, winner), _plan(run, winner))
    return [*first, *_speed(run, winner, base), _sure(run)]


def _size(run: Snapshot, winner: Row, base: Row | None) -> Tile:
    assert run.results.search and run.results.prune
    prune, budget = run.results.prune, run.state.config["quantize"]["budget"]
    with_adapter = f" ({_megabytes(base.measured_bytes)} with such an adapter)" if base else ""
    asked = ", ".join(f"{name} {value}" for name, value in budget.items() if value is not None)
    lines = [
        f"{prune.bytes_before / winner.measured_bytes:.1f} times smaller than the base model's "
        f"{_megabytes(prune.bytes_before)}{with_adapter}",
        f"{_megabytes(prune.bytes_after)} after pruning",
        f"budget {_megabytes(run.results.search.budget_bytes)} (quantize.budget: {asked}), adapter included",
        f"{winner.num_parameters / 1e6:.1f} M of {prune.parameters_before / 1e6:.1f} M parameters",
    ]
    if run.results.bank and run.results.bank.group_bytes:
        grouped = plan_group_bytes(run.results.bank.group_bytes, run.results.search.best_plan)
        others = _megabytes(winner.measured_bytes - grouped)
        lines.append(
            f"{_megabytes(grouped)} in the plan's groups; {others} besides (embeddings, norms, head, adapter), "
            "whatever the plan"
        )
    if run.results.prepare and run.results.prepare.source_bytes:
        source, size = run.state.config["model"]["source"], _megabytes(run.results.prepare.source_bytes)
        lines.append(f"the base was expanded from a file of {size}, {Path(source).name}")
    return Tile("Size", _megabytes(winner.measured_bytes), tuple(lines))


def _accuracy(run: Snapshot, winner: Row) -> Tile:
    assert run.results.evaluate
    metrics, names = run.results.evaluate.metrics, [row.name for row in rows(run.results)]
    measure, half_width = accuracy_name(metrics), Z_95 * winner.accuracy_stderr
    low, high = max(0.0, winner.accuracy - half_width), min(1.0, winner.accuracy + half_width)
    lines = [f"95 % interval over questions {low:.3f} to {high:.3f}"]
    lines += [accuracy_in_full(metrics)] if measure == ACCURACY else []
    untuned = untuned_accuracies(run.results).items()
    lines += [f"{name}, not fine-tuned: {value:.3f}" for name, value in untuned if name not in names]
    (alike, *others), under = beside_base(run.results)
    if others:
        beside = "".join(f", {other.name} {other.accuracy:.3f}" for other in others)
        lines.append(f"{measure}{under}: {alike.accuracy:.3f}{beside}")
    if alike.answer_loss is not None:
        beside = "".join(f", {each.name} {each.answer_loss:.3f}" for each in others if each.answer_loss is not None)
        lines.append(f"answer loss{under}: {alike.answer_loss:.3f}{beside}")
    return Tile(f"Test {measure}", f"{winner.accuracy:.3f}", tuple(lines))


def _plan(run: Snapshot, winner: Row) -> Tile:
    assert run.results.search
    bits = list(run.results.search.best_plan.values())
    counts = ", ".join(f"{bits.count(level)} at {level} bits" for level in sorted(set(bits)))
    lines = (
        f"{len(bits)} groups: {counts}",
        f"{8 * winner.measured_bytes / winner.num_parameters:.1f} bits a parameter, adapter and all included",
        winner.origin if run.is_given else f"found by {winner.origin}",
    )
    return Tile("Plan", f"{winner.mean_bits:.2f} mean bits", lines)


def _speed(run: Snapshot, winner: Row, base: Row | None) -> Iterator[Tile]:
    """Yield speed and memory of a generation, beside the base's: fewer bytes do not mean faster."""
    setting, figures, others = run.results.inference, _generation(winner), _generation(base)
    if setting is None or not figures or not winner.decode_tokens_per_second:
        return
    beside = [f", base {other}" for other in others] or [""] * len(figures)
    names = zip(("writes", "reads", "takes"), figures, beside, strict=True)
    lines = [f"{name} {figure}{other}" for name, figure, other in names]
    device = f"on {setting.device}, one sequence, adapter on; in brackets the least and the most of the turns"
    yield Tile("Speed in use", f"{winner.decode_tokens_per_second[0]:.1f} tokens/s", (*lines, device))


def _generation(row: Row | None) -> list[str]:
    if row is None or row.inference_memory_bytes is None:
        return []
    speeds = (row.decode_tokens_per_second, row.prefill_tokens_per_second)
    return [*(f"{turns_text(speed)} tokens/s" for speed in speeds), _megabytes(row.inference_memory_bytes)]


def _sure(run: Snapshot) -> Tile:
    """Return the claim in a few words."""
    found = comparisons(run.results)
    if not found:
        return _on_fresh_rows(run)
    if not any(each.differences for each in found):
        return Tile("How sure", "no claim", ("there is nothing of equal bytes to compare with",))
    headline, among = tally(found)
    lines = [among]
    for each in found:
        told = "; ".join(f"{verdict} in {', '.join(measures)}" for verdict, measures in each.by_verdict().items())
        lines.append(f"against {RIVALS[each.other]}: {told or each.no_claim}")
    return Tile("How sure", headline, tuple(lines))


def _on_fresh_rows(run: Snapshot) -> Tile:
    """Return how far the winner is from the best of the other kind on the search's fresh rows."""
    assert run.results.search
    search = run.results.search
    best, rival = rivals(search)
    hint = "finetune.compare gives other plans the same fine-tune"
    if rival is None:
        return Tile("How sure, on fresh rows", "nothing beside", ("no control was scored there", hint))
    apart = cost(rival, search.metric) - cost(best, search.metric)
    lines = (
        f"selection {score_name(search)} of trial {best.index} ({best.origin}) against trial {rival.index} "
        f"({rival.origin})",
        margin_error(best, rival, search.metric).strip(" ()"),
        hint,
    )
    figure = f"{abs(apart):.4f} {'worse' if apart < 0 else 'better'}"
    return Tile("How sure, on fresh rows", figure, tuple(filter(None, lines)))


def _so_far(run: Snapshot) -> Iterator[Tile]:
    prune, search, best = run.results.prune, run.state.search, run.best_trial
    if prune:
        lines = (f"from {_megabytes(prune.bytes_before)}", f"{prune.achieved_rate:.1%} of the parameters cut")
        yield Tile("Pruned, not quantized", _megabytes(prune.bytes_after), lines)
    if search:
        over = [trial for trial in run.own_trials if trial.is_over]
        counts = {word: sum(trial.status == status for trial in over) for status, word in STATUSES.items()}
        told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        yield Tile("Trials", f"{len(over)} of {search.max_trials}", (told,))
    if best:
        title = f"{'The winner' if run.results.search else 'Best so far'}: {run.metric_title}"
        about = f"trial {best.index}, {best.origin}, {_megabytes(best.plan_bytes)}"
        yield Tile(title, f"{score(best.rungs[-1], run.metric):.4f}", (about, *_best_control(run)))
    if run.results.finetune:
        losses = [each.validation_loss for each in run.results.finetune.candidates if each.name == SEARCHED]
        lines = ("validation loss of the winner", "not measured on held-out tasks yet")
        yield Tile("Fine-tuned", f"{losses[0]:.4f}", lines)


def _best_control(run: Snapshot) -> Iterator[str]:
    controls = [trial for trial in run.own_trials if trial.is_control and trial.status == "finished"]
    best = best_of(controls, run.metric)
    if best and best != run.best_trial:
        reached = f"{score(best.rungs[-1], run.metric):.4f}"
        yield f"best control: {reached} ({best.origin}, {_megabytes(best.plan_bytes)})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
