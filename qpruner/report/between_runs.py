"""What the searched rows of two runs differ by, where both were measured on the same questions and rows."""

from __future__ import annotations

from dataclasses import dataclass

from qpruner.report.differences import (
    Difference,
    Pair,
    difference_text,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    seeds_text,
)
from qpruner.report.results import SEARCHED, fine_tunes
from qpruner.runs.records import EvalRecord, Results


@dataclass(frozen=True)
class Against:
    """A run's searched row less another run's, both after their fine-tunes.

    Attributes:
        seeds: Training seeds both have.
        more_bytes: The run's bytes above the other's, as a share of these, of the seed where they differ most; None
            without a row in both.
        no_figures: Why nothing is told; None where something is.
        differ: What the two were measured on and is not the same, so that nothing is told of it.
        differences: By measure, of those that were measured alike in both.
    """

    seeds: tuple[int, ...]
    more_bytes: float | None
    no_figures: str | None
    differ: tuple[str, ...]
    differences: tuple[Difference, ...]


def against(run: Results, other: Results) -> Against:
    """Pair two runs by training seed, and by question or confirmation row, of which digests tell whether they are the
    same: the latter where data, base model, calibration and seed are."""
    if run.finetune is None or other.finetune is None or run.evaluate is None or other.evaluate is None:
        return Against((), None, "the final table of one of them is not there yet", (), ())
    pairs = paired(fine_tunes(run)[SEARCHED], fine_tunes(other)[SEARCHED])
    if not pairs:
        return Against((), None, "they have no training seed in common", (), ())
    seeds = tuple(dict.fromkeys(ours.seed for (ours, _), _ in pairs))
    share = more_bytes([(theirs, ours) for ours, theirs in pairs])
    if all(_is_same_model(pair) for pair in pairs):
        return Against(seeds, share, "it is the same fine-tuned model", (), ())
    measured: dict[str, list[Difference] | None] = {
        "test questions": over_questions(pairs) if _tested(run.evaluate) == _tested(other.evaluate) else None,
        "confirmation rows": [over_confirmation_rows(pairs)] if _prepared(run) == _prepared(other) else None,
    }
    differ = tuple(name for name, differences in measured.items() if differences is None)
    reason = f"{' and '.join(differ)} are others" if len(differ) == len(measured) else None
    found = tuple(each for differences in measured.values() for each in differences or ())
    return Against(seeds, share, reason, () if reason else differ, found)


def _tested(record: EvalRecord) -> str:
    """What the final models were asked; older records tell it with what trials were asked, and the text."""
    return record.tested or record.rows[-1].digest


def _prepared(run: Results) -> str | None:
    return run.prepare.digest if run.prepare else None


def _is_same_model(pair: Pair) -> bool:
    (ours, _), (theirs, _) = pair
    return bool(ours.adapter_sha256) and (ours.plan, ours.adapter_sha256) == (theirs.plan, theirs.adapter_sha256)


def against_text(found: Against) -> str:
    """The differences in words."""
    if found.no_figures:
        return f"nothing to pair, {found.no_figures}"
    differences = "; ".join(map(difference_text, found.differences))
    differ = "".join(f"; their {name} are others, so nothing is told of them" for name in found.differ)
    return f"{found.more_bytes:+.2%} bytes, {seeds_text(found.seeds)}: {differences}{differ}"


def shared_stages(runs: list[Results]) -> list[str]:
    """Stages whose record is one and the same in several runs, as in a folder and its copy."""
    found = []
    for stage in Results.model_fields:
        records = [record for run in runs if (record := getattr(run, stage))]
        if len({(record.digest, record.seconds) for record in records}) < len(records):
            found.append(stage)
    return found
