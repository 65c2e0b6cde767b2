"""Compares the searched rows of two runs, where both were measured on the same questions and rows."""

from __future__ import annotations

from dataclasses import dataclass

from qpruner.report.results import SEARCHED, fine_tunes
from qpruner.report.statistics import (
    Difference,
    difference_text,
    more_bytes,
    over_confirmation_rows,
    over_questions,
    paired,
    seeds_of,
    seeds_text,
)
from qpruner.runs.records import Results


@dataclass(frozen=True)
class Against:
    """A run's searched row less another run's, both after their fine-tunes, under the training seeds both have.

    `no_figures` says why there is no difference, `differ` what the two were measured on and is not the same.
    """

    seeds: tuple[int, ...]
    more_bytes: float | None
    no_figures: str | None
    differ: tuple[str, ...]
    differences: tuple[Difference, ...]


def against(run: Results, other: Results) -> Against:
    """Pair two runs by training seed, and by question or confirmation row; they are compared where digests agree."""
    if run.finetune is None or other.finetune is None or run.evaluate is None or other.evaluate is None:
        return Against((), None, "the final table of one of them is not there yet", (), ())
    pairs = paired(fine_tunes(run)[SEARCHED], fine_tunes(other)[SEARCHED])
    if not pairs:
        return Against((), None, "they have no training seed in common", (), ())
    share = more_bytes([(theirs, ours) for ours, theirs in pairs])
    same = [(one.plan, one.adapter_sha256) == (two.plan, two.adapter_sha256) for (one, _), (two, _) in pairs]
    if all(same) and all(one.adapter_sha256 for (one, _), _ in pairs):
        return Against(seeds_of(pairs), share, "it is the same fine-tuned model", (), ())
    tested = [record.tested for record in (run.evaluate, other.evaluate)]
    prepared = [each.prepare.digest if each.prepare else None for each in (run, other)]
    measured: dict[str, list[Difference] | None] = {
        "test questions": over_questions(pairs) if tested[0] == tested[1] else None,
        "confirmation rows": [over_confirmation_rows(pairs)] if prepared[0] == prepared[1] else None,
    }
    differ = tuple(name for name, differences in measured.items() if differences is None)
    if len(differ) == len(measured):
        return Against(seeds_of(pairs), share, f"{' and '.join(differ)} are others", (), ())
    found = tuple(each for differences in measured.values() for each in differences or ())
    return Against(seeds_of(pairs), share, None, differ, found)


def against_text(found: Against) -> str:
    """Describe the differences."""
    if found.no_figures:
        return f"nothing to pair, {found.no_figures}"
    differences = "; ".join(map(difference_text, found.differences))
    differ = "".join(f"; their {name} are others, so they are not compared" for name in found.differ)
    return f"{found.more_bytes:+.2%} bytes, {seeds_text(found.seeds)}: {differences}{differ}"


def shared_stages(runs: list[Results]) -> list[str]:
    """Return the stages whose record is one and the same in several runs, as in a folder and its copy."""
    found = []
    for stage in Results.model_fields:
        records = [record for run in runs if (record := getattr(run, stage))]
        if len({(record.digest, record.seconds) for record in records}) < len(records):
            found.append(stage)
    return found
