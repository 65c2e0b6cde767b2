"""Explains the final table: what its rows are and what its figures mean."""

from __future__ import annotations

from qpruner.data.measures import accuracy_in_full
from qpruner.report.results import BASE, BEST_SEED, PRUNED, RANDOM, SEARCHED, rows
from qpruner.runs.records import EvalRecord, InferenceSetting, Results
from qpruner.search.choice import SAME_BYTES

TITLE = "How to read the table"
ROWS = {
    BASE: "the base model, neither pruned nor quantized.",
    PRUNED: "the pruned model, not quantized.",
    "uniform": "the pruned model, every group at the same bits.",
    "seed": "the plan that a sensitivity finds by itself, without a search, at the winner's bytes.",
    BEST_SEED: "that of the sensitivity whose plan was best on fresh rows.",
    RANDOM: f"plans drawn at random among those of the winner's bytes, to within {SAME_BYTES:.0%}.",
    SEARCHED: "the winner, the plan that was best on fresh rows; `winner (…)` where that is a control, which no "
    "searched plan beat, and `given plan` where it was given.",
}
"""By what rows' names hold."""
FIGURES = {
    "seeds": "training seeds: how many, and in brackets which; none is the trials', so a plan's loss as a trial does "
    "not compare with its loss here. With several, figures are means ± standard deviation, of the random row over its "
    "plans, too.",
    "bytes": "the packed tensors, scales, unquantized rest and adapters.",
    "mean bits": "over the grouped weights.",
    "answer loss": "the negative log-likelihood of the right answer given the question, in nats per answer (not per "
    "token), a mean over tasks: lower is better, and finer than the accuracy.",
    "validation loss": "in nats per token, on the rows that trials are scored on.",
    "selection loss": "in nats per token, on the half of the confirmation rows that chose the best seed and, in a "
    "search, the winner.",
    "confirmation loss": "in nats per token, on the other half of these rows, which chose nothing.",
    "peak memory": "that of the fine-tune, in a process of its own.",
}
INTERVAL = (
    "in the claim, against the best seed the wider of Student's over seeds and the paired one over questions or "
    "confirmation rows; against random plans the one in which a further random plan would lie. Under one training seed "
    "it leaves out that seed's luck. Each is at 95 % by itself, so of several one may leave zero out by chance."
)
COUNTED = {
    "acc_norm": "has the highest log-likelihood a character",
    "acc": "has the highest log-likelihood",
    "exact_match": "is what the model writes",
}
"""lm-eval's metric -> when it counts a question: its right answer ..."""


def terms(results: Results) -> list[tuple[str, str]]:
    """List terms and meanings: of the rows that exist, and of the figures with what they were measured on."""
    assert results.evaluate
    names, metrics = [row.name for row in rows(results)], results.evaluate.metrics
    return [
        *((term, meaning) for term, meaning in ROWS.items() if any(term in name for name in names)),
        *FIGURES.items(),
        (f"test {accuracy_in_full(metrics)}", _accuracy(results.evaluate)),
        ("perplexity", _perplexity(results.evaluate)),
        *([("interval", INTERVAL)] if len(names) > 1 else []),
        *([("inference memory and tokens/s", _in_use(results.inference))] if results.inference else []),
    ]


def _accuracy(record: EvalRecord) -> str:
    names = dict.fromkeys(record.metrics.values())
    counted = "; ".join(f"{COUNTED[name.partition(',')[0]]} ({name})" for name in names)
    return (
        "the share of right answers on the held-out tasks, which have chosen nothing: the mean over tasks of the mean "
        f"over a task's questions; se is its standard error over questions. A right answer {counted}."
    )


def _perplexity(record: EvalRecord) -> str:
    if record.text:
        return f"the exponential of the mean loss a token on {record.text}."
    return "none: the confirmation rows are multiple-choice; `evaluate.text` names a text to measure it on."


def _in_use(setting: InferenceSetting) -> str:
    return (
        f"those of a generation of one sequence on {setting.device}, adapter on: {setting.prompt_tokens} tokens read "
        f"(prefill), {setting.new_tokens} written (decode). The rows took turns: the median, in brackets the least and "
        f"the most. The memory is the {setting.memory_counter}."
    )
