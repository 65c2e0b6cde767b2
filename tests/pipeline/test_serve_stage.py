"""The serve stage: files for llama.cpp beside the base model, and its refusals before the run."""

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import command, flip_a_byte, with_keys
from made_records import made_fine_tune
from mixed_models import bank_source, final_model, groups_of, job_in, mixed_plan, plan_job
from searched_runs import a_winner, with_records

from qpruner.config.load import validate_config
from qpruner.errors import UserError
from qpruner.export import forms
from qpruner.export.gguf import llama_cpp
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline import serve, served_rows
from qpruner.pipeline.context import Context
from qpruner.pipeline.flow import run_stage
from qpruner.pipeline.serve import Serve
from qpruner.runs.events import Event, Message, StageSkipped
from qpruner.runs.records import BASE, SEARCHED, FinetuneRecord
from qpruner.runs.run_dir import RunDir


@pytest.fixture
def finished(
    context: Context, sensed_raw: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> Context:
    """A run in a folder of its own, with a final model, that is to be served."""
    root = tmp_path / "mine"
    shutil.copytree(context.run_dir.root, root)
    final_model(tiny_model, root)
    config = validate_config(with_keys(sensed_raw, **{"output": str(root), "serve.to": ["gguf"]}))
    winner = made_fine_tune(SEARCHED, a_winner(context).as_dict())
    tuned = FinetuneRecord(digest="1" * 16, seconds=1.0, winner=winner)
    return replace(with_records(context, finetune=tuned), config=config, run_dir=RunDir(root))


def test_rows_are_written_measured_and_kept(finished: Context) -> None:
    events: list[Event] = []
    finished.emit = events.append
    run_stage(Serve(finished))
    record = finished.records.serve
    assert record and record.setting.threads == 1 and "xllamacpp" in record.setting.build
    assert [(row.name, row.form, row.format) for row in record.rows] == [
        (BASE, "gguf", "f16"),
        (SEARCHED, "gguf", "plan"),
    ]
    assert all(
        len(row.decode_tokens_per_second) == len(row.prefill_tokens_per_second) == 3
        for row in record.rows
    )
    root, (base, row) = finished.run_dir.root, record.rows
    assert base.loss and row.loss and base.file_bytes > row.file_bytes
    assert {Path(name).name for name in row.files} >= {"mine.gguf", "mine-adapter.gguf"}
    assert all((root / name).is_file() for name in row.files)
    assert not list(root.rglob("base-*.gguf")), "files of the base model are removed"
    assert any(isinstance(event, Message) and event.text.startswith("gguf: ") for event in events)
    run_stage(Serve(finished))
    assert isinstance(events[-1], StageSkipped)
    flip_a_byte(root / "serve" / "gguf" / "mine.gguf")
    assert not Serve(finished).is_complete(root / "serve"), "a damaged file is made again"


@pytest.mark.parametrize(
    ("formats", "is_served"), [(("q4_0", "q8_0"), True), (("nf4",), False)], ids=str
)
def test_the_best_simple_alternative_is_served_in_formats_of_llama_cpp(
    formats: tuple[str, ...],
    is_served: bool,
    sensed_raw: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    bank = bank_source(tiny_model, tmp_path / "bank")
    plan = mixed_plan(groups_of(bank), formats)
    named = {"name": "unpruned-uniform", "mean_bits": 4.5}
    job = plan_job(validate_config(sensed_raw), bank, tmp_path, plan, tmp_path / "row")
    rival = job_in(job, job.folder, **named)
    shutil.copytree(final_model(tiny_model, tmp_path), rival.trained)
    found = served_rows.write_fine_tuned(rival, tmp_path / "served", lambda *_: None)
    assert [each.row.name for each in found] == ["unpruned-uniform"] * is_served
    for each in found:
        assert each.model and each.adapter and each.adapter.stat().st_size > 0
        files = each.model.stat().st_size + each.adapter.stat().st_size
        assert each.row.file_bytes == files and each.row.mean_bits == 4.5


def test_what_cannot_be_written_is_refused_before_the_run(
    changed: Callable[[str, Any], Context],
) -> None:
    context = changed("serve.to", ["gguf"])
    Serve(context).check()
    from transformers import Phi3Config

    phi3 = Phi3Config(num_hidden_layers=2)
    shapes = replace(context.inspection.shapes, model_config=phi3)
    other = replace(context.inspection, shapes=shapes)
    with pytest.raises(
        UserError,
        match=r"`serve.to`: gguf cannot be written: `phi3` models .* `--set serve.to=\[\]`",
    ):
        Serve(replace(context, inspection=other)).check()
    Serve(replace(changed("serve.to", []), inspection=other)).check()


def test_the_end_in_the_config_of_the_model_counts(
    changed: Callable[[str, Any], Context], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.eos_token = None
    monkeypatch.setattr(serve, "load_tokenizer", lambda *_: tokenizer)
    Serve(changed("serve.to", ["gguf"])).check()


def test_formats_that_llama_cpp_lacks_are_told_before_the_run(
    changed: Callable[[str, Any], Context],
) -> None:
    said = list(Serve(changed("serve.to", ["gguf"])).warnings())
    assert any(re.search(r"llama.cpp has no format nf4: its layers get q4_", line) for line in said)
    assert not list(Serve(changed("serve.to", [])).warnings())


def test_check_tells_them_too(sensed_raw: dict[str, Any], write_yaml: Callable[..., Path]) -> None:
    done = command("check", write_yaml(with_keys(sensed_raw, **{"serve.to": ["gguf"]})))
    assert done.exit_code == 0 and "llama.cpp has no format nf4: its layers get q4_" in done.output


def test_work_that_starts_again_replaces_what_a_dead_worker_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gguf").mkdir()

    def exported(run: RunDir, form: str, folder: Path, on_progress: Any) -> None:
        raise UserError("exists" if folder.exists() else "begun")

    monkeypatch.setattr(forms, "export", exported)
    job: Any = SimpleNamespace(scratch=tmp_path, root=tmp_path)
    with pytest.raises(UserError, match="begun"):
        served_rows._export(job, "gguf", print, print)


def test_a_base_model_too_large_for_float16_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(nullcontext[Any]):
        def __init__(self, *_: Any) -> None:
            super().__init__(self)

        def loss(self, ids: list[int], labels: list[int]) -> tuple[float, int]:
            return float("nan"), len(labels)

    monkeypatch.setattr(llama_cpp, "Llama", Overflowing)
    job: Any = SimpleNamespace(threads=1)
    served: Any = SimpleNamespace(model=Path("base-f16.gguf"), adapter=None)
    assert served_rows._loss(job, served, [{"input_ids": [1, 2], "labels": [1, 2]}]) is None
