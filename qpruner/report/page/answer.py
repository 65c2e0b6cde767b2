"""The page's first lines: how large, how good, which plan, how sure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qpruner.data.measures import ACCURACY, Z_95, accuracy_in_full, accuracy_name
from qpruner.report import sections
from qpruner.report.claim import beside_base, comparisons, tally
from qpruner.report.results import BASE, BEST_SEED, SEARCHED, Row, rows, untuned_accuracies
from qpruner.report.search_progress import best_of, cost, score, score_name
from qpruner.report.search_summary import margin_error, rivals
from qpruner.report.snapshot import Snapshot
from qpruner.runs.records import plan_group_bytes


@dataclass(frozen=True)
class Tile:
    """One figure and what stands under it."""

    heading: str
    figure: str
    lines: tuple[str, ...]


def tiles(run: Snapshot) -> list[Tile]:
    """The answer of a whole run; of another one how far it came."""
    return list(_whole(run) if run.is_whole else _so_far(run))


def _whole(run: Snapshot) -> Iterator[Tile]:
    assert run.results.search and run.results.prune and run.results.evaluate
    measure = accuracy_name(run.results.evaluate.metrics)
    table, before = {row.name: row for row in rows(run.results)}, untuned_accuracies(run.results)
    winner, base_bytes = table[SEARCHED], run.results.prune.bytes_before
    yield Tile(
        "Size",
        _megabytes(winner.measured_bytes),
        (
            f"{base_bytes / winner.measured_bytes:.1f} times smaller than the base model's {_megabytes(base_bytes)}"
            + _with_adapter(table.get(BASE)),
            f"{_megabytes(run.results.prune.bytes_after)} after pruning",
            f"budget {_megabytes(run.results.search.budget_bytes)} ({_budget(run)}), adapter included",
            f"{winner.num_parameters / 1e6:.1f} M of {run.results.prune.parameters_before / 1e6:.1f} M parameters",
            *_parts(run, winner),
        ),
    )
    yield Tile(
        f"Test {measure}",
        f"{winner.accuracy:.3f}",
        (
            _interval(winner),
            *([accuracy_in_full(run.results.evaluate.metrics)] if measure == ACCURACY else []),
            *(f"{name}, not fine-tuned: {value:.3f}" for name, value in before.items() if name not in table),
            *_beside_base(run),
        ),
    )
    plan = run.results.search.best_plan
    counts = (f"{list(plan.values()).count(bits)} at {bits} bits" for bits in sorted(set(plan.values())))
    yield Tile(
        "Plan",
        f"{winner.mean_bits:.2f} mean bits",
        (
            f"{len(plan)} groups: {', '.join(counts)}",
            f"{8 * winner.measured_bytes / winner.num_parameters:.1f} bits a parameter, adapter and all included",
            winner.origin if run.is_given else f"found by {winner.origin}",
        ),
    )
    yield from _in_use(run, winner, table.get(BASE))
    yield _certainty(run)


def _parts(run: Snapshot, winner: Row) -> Iterator[str]:
    """What of the size the plan decides on, and where the base's weights came from, where records tell."""
    results = run.results
    if results.bank and results.search and results.bank.group_bytes:
        grouped = plan_group_bytes(results.bank.group_bytes, results.search.best_plan)
        yield (
            f"{_megabytes(grouped)} in the plan's groups; {_megabytes(winner.measured_bytes - grouped)} besides "
            "(embeddings, norms, head, adapter), whatever the plan"
        )
    if results.prepare and results.prepare.source_bytes:
        source, size = run.state.config["model"]["source"], _megabytes(results.prepare.source_bytes)
        yield f"the base was expanded from a file of {size}, {Path(source).name}"


def _with_adapter(base: Row | None) -> str:
    """The base's size in the table, which is of a fine-tuned one."""
    return f" ({_megabytes(base.measured_bytes)} with such an adapter)" if base else ""


def _budget(run: Snapshot) -> str:
    """The budget as the configuration has it."""
    given = run.state.config["quantize"]["budget"]
    return "quantize.budget: " + ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)


def _interval(winner: Row) -> str:
    half_width = Z_95 * winner.accuracy_stderr
    low, high = max(0.0, winner.accuracy - half_width), min(1.0, winner.accuracy + half_width)
    return f"95 % interval over questions {low:.3f} to {high:.3f}"


def _in_use(run: Snapshot, winner: Row, base: Row | None) -> Iterator[Tile]:
    """Speed and memory of a generation, beside the base's: of few bytes does not mean fast."""
    setting = run.results.inference
    figures, others = _generation(winner), base and _generation(base)
    if setting is None or figures is None:
        return
    beside = [f", base {other}" for other in others] if others else [""] * len(figures)
    written, read, memory = (f"{figure}{told}" for figure, told in zip(figures, beside, strict=True))
    device = f"on {setting.device}, one sequence, adapter on; in brackets the least and the most of the turns"
    assert winner.decode_tokens_per_second, "else there were no figures"
    median = f"{winner.decode_tokens_per_second[0]:.1f} tokens/s"
    yield Tile("Speed in use", median, (f"writes {written}", f"reads {read}", f"takes {memory}", device))


def _generation(row: Row) -> tuple[str, str, str] | None:
    """What a row writes and reads, and the memory that this takes."""
    written, read, memory = row.decode_tokens_per_second, row.prefill_tokens_per_second, row.inference_memory_bytes
    if written is None or read is None or memory is None:
        return None
    return f"{sections.turns(written)} tokens/s", f"{sections.turns(read)} tokens/s", _megabytes(memory)


def _beside_base(run: Snapshot) -> Iterator[str]:
    """Accuracy and answer loss beside those of base and pruned model; the answer loss alone where these are no rows."""
    assert run.results.evaluate
    (winner, *others), under = beside_base(run.results)
    if others:
        told = "".join(f", {other.name} {other.accuracy:.3f}" for other in others)
        yield f"{accuracy_name(run.results.evaluate.metrics)}{under}: {winner.accuracy:.3f}{told}"
    if winner.answer_loss is not None:
        told = "".join(f", {other.name} {other.answer_loss:.3f}" for other in others if other.answer_loss is not None)
        yield f"answer loss{under}: {winner.answer_loss:.3f}{told}"


def _certainty(run: Snapshot) -> Tile:
    """The claim in a few words."""
    found = comparisons(run.results)
    if not found:
        return _on_fresh_rows(run)
    if not any(each.differences for each in found):
        return Tile("How sure", "no claim", ("there is nothing of equal bytes to compare with",))
    lines = []
    for each in found:
        named = "best seed" if each.other == BEST_SEED else "random plans"
        by_verdict: dict[str, list[str]] = {}
        for difference in each.differences:
            by_verdict.setdefault(difference.verdict, []).append(difference.measure)
        told = "; ".join(f"{verdict} in {', '.join(measures)}" for verdict, measures in by_verdict.items())
        lines.append(f"against {named}: {told or each.no_claim}")
    headline, among = tally(found)
    return Tile("How sure, at equal bytes", headline, (among, *lines))


def _on_fresh_rows(run: Snapshot) -> Tile:
    """What was compared where no other plan had the winner's fine-tune: the finalists, as trials."""
    search, hint = run.results.search, "finetune.compare gives other plans the same fine-tune"
    assert search
    best, rival = rivals(search)
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
    prune, search = run.results.prune, run.state.search
    if prune:
        lines = (f"from {_megabytes(prune.bytes_before)}", f"{prune.achieved_rate:.1%} of the parameters cut")
        yield Tile("Pruned, not quantized", _megabytes(prune.bytes_after), lines)
    if search:
        over = [trial for trial in run.own_trials if trial.is_over]
        counts = {word: sum(trial.status == status for trial in over) for status, word in sections.STATUSES.items()}
        told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        yield Tile("Trials", f"{len(over)} of {search.max_trials}", (told,))
    if run.best_trial:
        best = run.best_trial
        yield Tile(
            f"{'The winner' if run.results.search else 'Best so far'}: {run.metric_title}",
            f"{score(best.rungs[-1], run.metric):.4f}",
            (f"trial {best.index}, {best.origin}, {_megabytes(best.plan_bytes)}", *_best_control(run)),
        )
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
