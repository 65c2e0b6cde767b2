"""What is said of a winner that no other plan had the same fine-tune as, and how to have them compared."""

from __future__ import annotations

from qpruner.data.measures import accuracy_in_full
from qpruner.report.results import rows, untuned_accuracies
from qpruner.report.search_summary import margin
from qpruner.runs.records import Results


def told_alone(results: Results, winner: str) -> str:
    """Its size, losses and accuracy beside those of the model before any fine-tune: a line; then as a list what fresh
    rows say of it against the controls, and what was not compared.

    Args:
        results: Of a run without a comparison.
        winner: Which plan it is, as a sentence.
    """
    assert results.search and results.prune and results.evaluate
    [row] = rows(results)
    untuned = "".join(f", {name} {accuracy:.3f}" for name, accuracy in untuned_accuracies(results).items())
    lead = (
        f"{winner} It is {results.prune.bytes_before / row.measured_bytes:.1f} times smaller than the base model. "
        f"After its fine-tune its validation loss is {row.validation_loss:.4f} and its confirmation loss "
        f"{row.confirmation_loss:.4f} nats per token, and its test {accuracy_in_full(results.evaluate.metrics)} "
        f"{row.accuracy:.3f} (without a fine-tune"
        f"{untuned})."
    )
    fresh = [f"- On the search's fresh rows, before this fine-tune: {told}" for told in margin(results.search)]
    return "\n".join([lead, *fresh, "- No other plan had this fine-tune, so nothing is claimed at equal bytes."])


def to_compare(command: str) -> str:
    """How the comparison is added to a finished run, as a sentence."""
    return (
        "The comparison with the base, uniform bits, seed and random plans after the same fine-tune is added by "
        f"`{command} --set finetune.compare=true`; the winner's own fine-tune is kept."
    )
