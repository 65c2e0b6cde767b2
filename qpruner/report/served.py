"""Tells of a run's files for other servers, and the commands that use them.

Of each file it tells the size, and the loss and speed as served.
"""

import statistics
from collections import Counter

from qpruner.report.content import Table
from qpruner.report.results import speed_text
from qpruner.runs.records import SEARCHED, Results, ServedRow
from qpruner.search.roles import title_of
from qpruner.wording import counted

HEADINGS = (
    *(
        "row",
        "served as",
        "files",
        "mean bits",
        "confirmation loss",
        "prefill tokens/s",
        "decode tokens/s",
    ),
    *("recoded", "checked"),
)


def served(results: Results) -> Table | None:
    """Build the table of the final model and the base model as they are served.

    Returns None without stage serve.
    """
    if (record := results.serve) is None:
        return None
    body = [
        (
            title_of(row.name, results.search),
            row.title,
            f"{row.file_bytes / 1e6:.1f} MB",
            f"{row.mean_bits:.2f}",
            "-" if row.loss is None else f"{row.loss:.4f}",
            speed_text(row.prefill_tokens_per_second),
            speed_text(row.decode_tokens_per_second),
            ", ".join(
                f"{number} to {name}" for name, number in Counter(row.recoded.values()).items()
            )
            or "-",
            row.check or "-",
        )
        for row in record.rows
    ]
    setting = record.setting
    if not setting.build:
        caption = "As served: sizes alone, as loss and speed in vLLM are not measured"
        return Table(caption, HEADINGS, body).without_empty_columns()
    caption = (
        f"As served, on {counted(setting.threads, 'CPU thread')} each, measured in turns in one "
        f"process: {setting.prompt_tokens} tokens read (prefill), {setting.new_tokens} written "
        f"(decode), loss on {counted(setting.num_rows, 'confirmation row')}. The base has no "
        "fine-tune; recoded layers cannot have the plan's format"
    )
    return Table(caption, HEADINGS, body).without_empty_columns()


def _decode(row: ServedRow) -> float | None:
    return statistics.median(row.decode_tokens_per_second) if row.decode_tokens_per_second else None


def decode_in_llama_cpp(results: Results, name: str) -> float | None:
    """Return tokens/s of the final model's files with the least loss, or of another row's file."""
    if results.serve is None or results.serve.best is None:
        return None
    if name == SEARCHED:
        return _decode(results.serve.best)
    row = next((row for row in results.serve.rows if row.name == name), None)
    return _decode(row) if row else None
