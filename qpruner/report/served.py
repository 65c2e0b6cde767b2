"""Tells of a run's files for other servers: their size, loss and speed as served, and the commands that use them."""

import re
import shlex
import statistics
from collections import Counter
from pathlib import PurePath

from qpruner.report.content import Table
from qpruner.report.results import BASE, SEARCHED, speed_text, title_of
from qpruner.runs.records import Results, ServedRow, ServeRecord
from qpruner.wording import counted

FORMS = {
    "gguf": "GGUF, adapter beside it",
    "gguf_merged": "GGUF, adapter merged",
    "vllm": "vLLM, adapter beside it",
    "vllm_merged": "vLLM, adapter merged",
}
HEADINGS = (
    *("row", "served as", "files", "mean bits", "confirmation loss", "prefill tokens/s", "decode tokens/s"),
    *("recoded", "checked"),
)


def served(results: Results) -> Table | None:
    """Build the table of the final model and the base model as they are served; None without stage serve."""
    if (record := results.serve) is None:
        return None
    body = [
        (
            title_of(row.name, results.search),
            form_text(row),
            f"{row.file_bytes / 1e6:.1f} MB",
            f"{row.mean_bits:.2f}",
            "-" if row.loss is None else f"{row.loss:.4f}",
            speed_text(row.prefill_tokens_per_second),
            speed_text(row.decode_tokens_per_second),
            ", ".join(f"{number} to {name}" for name, number in Counter(row.recoded.values()).items()) or "-",
            row.check or "-",
        )
        for row in record.rows
    ]
    setting = record.setting
    if not setting.build:
        caption = "As served: sizes alone, as loss and speed in vLLM are not measured"
        return Table(caption, HEADINGS, body).without_empty_columns()
    caption = (
        f"As served, on {counted(setting.threads, 'CPU thread')} each, measured in turns in one process: "
        f"{setting.prompt_tokens} tokens read (prefill), {setting.new_tokens} written (decode), loss on "
        f"{counted(setting.num_rows, 'confirmation row')}. The base has no fine-tune; recoded layers cannot "
        "have the plan's format"
    )
    return Table(caption, HEADINGS, body).without_empty_columns()


def form_text(row: ServedRow) -> str:
    """Name server and files of a row, such as `GGUF Q4_0`."""
    return f"GGUF {row.format.upper()}" if row.name == BASE else FORMS[row.form]


def _decode(row: ServedRow) -> float | None:
    return statistics.median(row.decode_tokens_per_second) if row.decode_tokens_per_second else None


def decode_in_llama_cpp(results: Results, name: str) -> float | None:
    """Return tokens/s of the final model's files with the least loss, or of another row's file."""
    best, of_all = _best(results.serve), results.serve.rows if results.serve else ()
    row = best if name == SEARCHED else next((row for row in of_all if row.name == name), None)
    return _decode(row) if best and row else None


def _best(record: ServeRecord | None) -> ServedRow | None:
    """Return the final model's row with the least loss of those that llama.cpp has measured."""
    rows = [row for row in record.rows if row.name == SEARCHED and row.loss is not None] if record else []
    return min(rows, key=lambda row: row.loss or 0.0, default=None)


def commands(record: ServeRecord | None, run: str) -> list[str]:
    """Return the commands that talk to the files with the least loss in the run folder `run`; empty without any."""
    if (row := _best(record)) is None:
        return []
    folder, first = f"{run}/{PurePath(row.files[0]).parent}", []
    if "://" in run:  # servers read files of this machine alone
        merge = " --merge" if row.form.endswith("merged") else ""
        folder, first = "FOLDER", [f"qpruner export {shlex.quote(run)} --to gguf{merge} --out FOLDER"]
    names = [PurePath(file).name for file in sorted(row.files, key=len) if file.endswith(".gguf")]
    model, *adapter = (shlex.quote(f"{folder}/{name}") for name in names)
    lora = f" --lora {adapter[0]}" if adapter else ""
    called = re.sub(r"\W+", "-", PurePath(names[0]).stem, flags=re.ASCII).strip("-") or "model"
    create = f"ollama create {called} -f {shlex.quote(f'{folder}/Modelfile')}"
    return [*first, f"llama-cli -m {model}{lora}", create]
