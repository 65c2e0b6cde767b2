"""Shows a run's files for other servers: their sizes, and their loss and speed as served."""

import statistics
from collections import Counter

from qpruner.report.content import Table
from qpruner.report.results import speed_text
from qpruner.runs.records import SEARCHED, Results, ServeRecord
from qpruner.search.roles import title_of
from qpruner.wording import counted

HEADINGS = (
    "row",
    "served as",
    "files",
    "mean bits",
    "confirmation loss",
    "prefill tokens/s",
    "decode tokens/s",
    "recoded",
    "checked",
)


def served(results: Results, record: ServeRecord) -> Table:
    """Build the table of the final model and the base model as they are served."""
    body = []
    for row in record.rows:
        recoded = Counter(row.recoded.values()).items()
        body.append(
            (
                title_of(row.name, results.search),
                row.title,
                f"{row.file_bytes / 1e6:.1f} MB",
                f"{row.mean_bits:.2f}",
                "-" if row.loss is None else f"{row.loss:.4f}",
                speed_text(row.prefill_tokens_per_second),
                speed_text(row.decode_tokens_per_second),
                ", ".join(f"{number} to {name}" for name, number in recoded) or "-",
                row.check or "-",
            )
        )
    setting = record.setting
    caption = "As served: sizes alone, as loss and speed in vLLM are not measured"
    if setting.build:
        caption = (
            f"As served, on {counted(setting.threads, 'CPU thread')} each, measured in turns in "
            f"one process: {setting.prompt_tokens} tokens read (prefill), {setting.new_tokens} "
            f"written (decode), loss on {counted(setting.num_rows, 'confirmation row')}. The base "
            "has no fine-tune; recoded layers cannot have the plan's format"
        )
    return Table(caption, HEADINGS, body).without_empty_columns()


def decode_in_llama_cpp(results: Results, name: str) -> float | None:
    """Return the median decoding speed in llama.cpp of a row's model, in tokens per second.

    The final model may be served in two forms: with its adapter merged into the weights, and with
    the adapter in a separate file. If both were measured, the form with the lower loss counts.
    Returns None if the speed was not measured.
    """
    if results.serve is None or results.serve.best is None:
        return None
    rows = {row.name: row for row in results.serve.rows} | {SEARCHED: results.serve.best}
    if name not in rows or not rows[name].decode_tokens_per_second:
        return None
    return statistics.median(rows[name].decode_tokens_per_second)
