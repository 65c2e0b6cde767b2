"""What the searched rows of two runs differ by, where both were measured on the same questions and rows."""

from __future__ import annotations

from dataclasses import dataclass

from qpruner.records import Results
from qpruner.report.paired import (
    Difference,
    Pair,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    told_difference,
    told_seeds,
)
from qpruner.report.table import SEARCHED, fine_tunes


@dataclass(frozen=True)
class Against:
    """A run's searched row less another run's, both after their fine-tunes.

    Attributes:
        seeds: Training seeds both have.
        more_bytes: The run's bytes above the other's, as a share of these, of the seed where they differ most; None
            without a row in both.
        no_figures: Why nothing is told; None where something is.
        differences: By measure, of those that were measured alike in both.
    """

    seeds: tuple[int, ...]
    more_bytes: float | None
    no_figures: str | None
    differences: tuple[Difference, ...]


def against(run: Results, other: Results) -> Against:
    """Pair two runs by training seed, and by question or confirmation row.

    Questions are the same where tasks, text and settings of `evaluate` are, confirmation rows where data, base model,
    calibration and seed are: records tell by digests.
    """
    if any(each.finetune is None or each.evaluate is None for each in (run, other)):
        return Against((), None, "the final table of one of them is not there yet", ())
    pairs = paired(fine_tunes(run)[SEARCHED], fine_tunes(other)[SEARCHED])
    if not pairs:
        return Against((), None, "they have no training seed in common", ())
    seeds = tuple(dict.fromkeys(ours.seed for (ours, _), _ in pairs))
    share = more_bytes([(theirs, ours) for ours, theirs in pairs])
    if all(_is_same_model(pair) for pair in pairs):
        return Against(seeds, share, "it is the same fine-tuned model", ())
    found = over_questions(pairs) if all(ours.digest == theirs.digest for (_, ours), (_, theirs) in pairs) else []
    if run.prepare and other.prepare and run.prepare.digest == other.prepare.digest:
        found = [*found, over_confirmation_rows(pairs)]
    reason = None if found else "test questions and confirmation rows are others"
    return Against(seeds, share, reason, tuple(found))


def _is_same_model(pair: Pair) -> bool:
    (ours, _), (theirs, _) = pair
    return bool(ours.adapter_sha256) and (ours.plan, ours.adapter_sha256) == (theirs.plan, theirs.adapter_sha256)


def told_against(found: Against) -> str:
    """The differences in words."""
    if found.no_figures:
        return f"nothing to pair, {found.no_figures}"
    differences = "; ".join(map(told_difference, found.differences))
    return f"{found.more_bytes:+.2%} bytes, {told_seeds(found.seeds)}: {differences}"


def shared_stages(runs: list[Results]) -> list[str]:
    """Stages whose record is one and the same in several runs, as in a folder and its copy."""
    found = []
    for stage in Results.model_fields:
        records = [record for run in runs if (record := getattr(run, stage))]
        if len({(record.digest, record.seconds) for record in records}) < len(records):
            found.append(stage)
    return found
