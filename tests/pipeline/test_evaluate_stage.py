"""The evaluate stage: its GPU seconds, and the text for perplexity."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ignore, with_key
from searched_runs import with_winner

from qpruner.config.load import validate_config
from qpruner.data.encoding import load_encoded
from qpruner.pipeline import preflight
from qpruner.pipeline.comparison import Comparison
from qpruner.pipeline.context import Context
from qpruner.pipeline.controls import controls
from qpruner.pipeline.evaluate import Evaluate, held_out_text
from qpruner.pipeline.finetune import Finetune
from qpruner.pipeline.flow import run_stage
from qpruner.pipeline.machines import Machines
from qpruner.pipeline.run import run
from qpruner.runs.records import CONFIRMATION, Inference, InferenceSetting, RowLosses, TaskScore
from qpruner.runs.run_dir import RunDir
from qpruner.training.jobs import score, tune


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are faked: each reserves half a GPU for 8 seconds."""

    def run_tasks(
        function: Any, jobs: Sequence[Any], resources: dict[str, float], *_: Any, **more: Any
    ) -> Any:
        assert resources["gpu"] == 0.5
        for position, job in enumerate(jobs):
            if function is tune:
                job.trained.mkdir(parents=True)
                (job.trained / "adapter_model.safetensors").touch()
                losses = {CONFIRMATION: RowLosses(mean=2.0, by_row=(2.0,))}
                measured = {"seconds": 8.0, "steps": 4, "trained_sha256": "1", "losses": losses}
                yield position, (job.record.model_copy(update=measured), [])
            elif function is score:
                tasks = (
                    TaskScore(
                        task="arc",
                        metric="acc",
                        value=0.5,
                        stderr=0.5,
                        num_questions=1,
                        correct=(1.0,),
                    ),
                )
                scores = {"scored": job.scoring.digest, "tasks": tasks, "scoring_seconds": 8.0}
                yield position, job.record.model_copy(update=scores)
            else:
                more["on_held"](100.0)
                setting = InferenceSetting(
                    device="a GPU", prompt_tokens=1, new_tokens=1, memory_counter="rss"
                )
                taken = Inference(
                    memory_bytes=1,
                    prefill_tokens_per_second=(1.0,),
                    decode_tokens_per_second=(1.0,),
                )
                yield position, (setting, [taken] * len(job.models))

    monkeypatch.setattr("qpruner.cluster.tasks.run_tasks", run_tasks)
    monkeypatch.setattr(
        Machines, "task_resources", lambda own, tasks, workers=1: (own.trial_resources, 1)
    )
    monkeypatch.setattr("qpruner.pipeline.finetune.write_final", lambda *given: None)


def forget(context: Context) -> None:
    for stage in (Finetune, Evaluate, Comparison):
        context.run_dir.forget(stage.name)


@pytest.mark.usefixtures("faked")
def test_gpu_seconds_of_each_job_are_counted_once(
    context: Context, changed: Callable[[str, Any], Context]
) -> None:
    """Rows that share a model count once."""
    winner = dict(controls(context))["cut-20-uniform"]
    context = with_winner(changed("training.learning_rate", 0.003), winner)
    context.machines.__dict__["trial_resources"] = {"cpu": 1.0, "gpu": 0.5}

    try:
        for stage in (Finetune, Evaluate, Comparison):
            run_stage(stage(context))
        records = context.records
        tuned, scored, compared = records.finetune, records.evaluate, records.comparison
        assert tuned and scored and compared
        assert tuned.winner.gpu_seconds == 4.0
        assert tuned.gpu_seconds == pytest.approx(4.0, abs=0.1)
        untuned = len(scored.untuned)
        assert scored.gpu_seconds == pytest.approx(4.0 * (1 + untuned) + 100.0, abs=0.1)
        others = len({row.digest for row in compared.rows}) - 1
        assert others < len(compared.rows) - 1
        assert compared.gpu_seconds == pytest.approx(2 * 4.0 * others + 100.0, abs=0.1), (
            "without the winner"
        )
        assert context.machines.gpus_held(2) == 2.0, "workers of one model have whole GPUs"
    finally:
        forget(context)


def test_the_text_is_described(
    context: Context, sensed_raw: dict[str, Any], tmp_path: Path
) -> None:
    """Responses and `evaluate.text` have a perplexity, answers to questions have none."""
    source = "package:qpruner/demo/data"
    text = {
        "source": f"{source}/questions_test.jsonl",
        "format": "text",
        "columns": {"text": "question"},
    }

    def found(raw: dict[str, Any], name: str) -> tuple[str | None, Path | None]:
        config = validate_config(raw)
        run_dir = RunDir(Path(config.output))
        own = replace(context, config=config, run_dir=run_dir, inspection=preflight.inspect(config))
        return held_out_text(own, tmp_path / name)

    assert found(sensed_raw, "none") == (None, None)
    told, folder = found(with_key(sensed_raw, "evaluate.text", [text]), "text")
    assert folder and told == f"`evaluate.text` in {len(load_encoded(folder))} windows of 64 tokens"
    raw = with_key(
        with_key(sensed_raw, "output", str(tmp_path / "responses")), "data.max_length", 256
    )
    raw = with_key(
        raw, "data.confirmation", [{"source": f"{source}/instructions.jsonl", "limit": 16}]
    )
    run(validate_config(raw), ignore, until="prepare")
    told, folder = found(raw, "rows")
    assert (
        folder
        and told
        == f"the responses of the {len(load_encoded(folder))} confirmation rows that chose nothing"
    )
    assert len(load_encoded(folder)) == 8, "half of 16"
