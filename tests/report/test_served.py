"""Tells of files as they are served: the table and the commands."""

import re
from typing import Any

import pytest
from made_run import results_of, row_of, searched_row, snapshot

from qpruner.export.commands import commands
from qpruner.report.content import report_md
from qpruner.report.sections import sections
from qpruner.report.served import decode_in_llama_cpp, served
from qpruner.runs.records import BASE, SEARCHED, Results, ServedRow, ServeRecord, ServeSetting


def row(name: str, form: Any, format: str, bits: float, decode: float, **changes: Any) -> ServedRow:
    speeds = {
        "prefill_tokens_per_second": (decode * 8,) * 3,
        "decode_tokens_per_second": (decode - 1, decode, decode),
    }
    given = {"file_bytes": 100_000_000, "loss": 2.5, "mean_bits": bits}
    return ServedRow(name=name, form=form, format=format, **given | speeds | changes)


ROWS = (
    row(BASE, "gguf", "f16", 16.0, 20.0),
    row("unpruned-uniform", "gguf", "plan", 4.0, 80.0),
    row(SEARCHED, "gguf", "plan", 6.0, 50.0, has_adapter=True,
        files=("serve/gguf/my run-adapter.gguf", "serve/gguf/my run.gguf")),
    row(SEARCHED, "gguf_merged", "plan", 6.0, 64.0, loss=2.6, files=("serve/gguf_merged/a.gguf",)),
    row(SEARCHED, "vllm", "plan", 6.0, 2.0, has_adapter=True, prefill_tokens_per_second=(),
        decode_tokens_per_second=(), loss=None,
        recoded={"model.embed_tokens": "bf16"}, check="loaded by transformers"),
)  # fmt: skip


@pytest.fixture
def results() -> Results:
    setting = ServeSetting(
        threads=2, build="xllamacpp 1.0", prompt_tokens=128, new_tokens=32, num_rows=24
    )
    record = ServeRecord(digest="0", seconds=1.0, rows=ROWS, setting=setting)
    return results_of([*row_of(BASE, [1.0]), *searched_row([1.0])]).model_copy(
        update={"serve": record}
    )


def test_every_row_shows_what_was_measured_of_its_files(results: Results) -> None:
    assert results.serve
    table = served(results, results.serve)
    assert "2 CPU threads" in table.caption
    by_form = {line[1]: line[2:] for line in table.rows}
    assert by_form.keys() == {
        "GGUF F16",
        "GGUF",
        "GGUF, adapter beside it",
        "GGUF, adapter merged",
        "vLLM, adapter beside it",
    }
    assert by_form["GGUF F16"] == (
        "100.0 MB",
        "16.00",
        "2.5000",
        "160 (160-160)",
        "20.0 (19.0-20.0)",
        "-",
        "-",
    )
    assert by_form["vLLM, adapter beside it"] == (
        "100.0 MB",
        "6.00",
        *"---",
        "1 to bf16",
        "loaded by transformers",
    )
    setting = ServeSetting(threads=2, build="", prompt_tokens=0, new_tokens=0, num_rows=0)
    unmeasured = ServeRecord(digest="0", seconds=1.0, rows=ROWS[-1:], setting=setting)
    table = served(results, unmeasured)
    assert "not measured" in table.caption
    assert not re.search("[0-9]", table.caption)
    assert table.headings == ("row", "served as", "files", "mean bits", "recoded", "checked")


def test_the_speed_is_that_of_the_best_file_and_of_the_others(results: Results) -> None:
    assert decode_in_llama_cpp(results, SEARCHED) == 50.0, "the merged file is faster, and worse"
    assert decode_in_llama_cpp(results, BASE) == 20.0
    assert decode_in_llama_cpp(results, "unpruned-uniform") == 80.0
    assert decode_in_llama_cpp(results, "unpruned-knapsack") is None, "not served, so not measured"
    assert decode_in_llama_cpp(results_of(searched_row([1.0])), BASE) is None
    run = snapshot(results)
    page = report_md(run, sections(run), "pictures")
    assert "| tokens/s, llama.cpp | 50.0 | 20.0 (2.50x) |" in page
    assert "As served, on 2 CPU threads" in page


def test_commands_name_the_best_files_of_the_run(results: Results) -> None:
    assert commands(results.serve, "runs/my run") == [
        (
            "llama-cli -m 'runs/my run/serve/gguf/my run.gguf' "
            "--lora 'runs/my run/serve/gguf/my run-adapter.gguf'"
        ),
        "ollama create my-run -f 'runs/my run/serve/gguf/Modelfile'",
    ]
    assert commands(None, "runs/mine") == []
    assert commands(results.serve, "s3://runs/mine?region=x")[:2] == [
        "qpruner export 's3://runs/mine?region=x' --to gguf --out FOLDER",
        "llama-cli -m 'FOLDER/my run.gguf' --lora 'FOLDER/my run-adapter.gguf'",
    ], "servers read no object store"
