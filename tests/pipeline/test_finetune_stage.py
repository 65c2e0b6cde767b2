"""The fine-tunes of the winner and of other rows: none runs twice, and the final folder holds the
winner."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import disk_of, flip_a_byte, with_key
from made_records import made_fine_tune
from searched_runs import a_winner, folders, progress_of, rows_of, told, with_winner

from qpruner.config.load import validate_config
from qpruner.errors import CorruptFile, StageError
from qpruner.pipeline.comparison import Comparison
from qpruner.pipeline.context import Context
from qpruner.pipeline.evaluate import Evaluate, scores_digest
from qpruner.pipeline.finetune import Finetune
from qpruner.pipeline.flow import run_stage
from qpruner.pipeline.tuning import setting_aside_damaged_folder, tune_all
from qpruner.runs.events import Event, StageSkipped
from qpruner.runs.records import CONFIRMATION, EvalRecord, FineTune, FinetuneRecord, TaskScore
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import file_digest, write_json, writing_folder


@pytest.mark.parametrize("settings", [{"seeds": 5}, {"compare": False, "random_plans": 1}], ids=str)
def test_the_comparison_changes_nothing_of_the_winner(
    settings: dict[str, Any], context: Context, changed: Callable[[str, Any], Context]
) -> None:
    """The record of the finetune stage stays valid when a comparison is added or removed."""
    other = changed("finetune", {"steps": 4} | settings)
    assert Finetune(context).digest == Finetune(other).digest
    assert Finetune(context).detail().endswith(", and so another loss, than in its trial"), (
        "it may be 0.3 worse"
    )


@pytest.mark.slow
def test_an_interrupted_comparison_is_completed(
    context: Context, changed: Callable[[str, Any], Context]
) -> None:
    """Only the missing and the damaged row are fine-tuned; fewer seeds need no fine-tune."""
    events: list[Event] = []
    one_plan, two_seeds = (
        {"steps": 4, "random_plans": 1},
        {"steps": 4, "random_plans": 1, "seeds": 2},
    )
    whole, fewer = (
        replace(changed("finetune", each), emit=events.append) for each in (one_plan, two_seeds)
    )
    jobs = folders(rows_of(whole, a_winner(context)))
    seeds = {folder: seed for (_, seed), folder in jobs.items()}
    recorded = sorted(set(seeds) - {jobs["random", 2]})
    for number, folder in enumerate(recorded):
        (folder / "trained").mkdir(parents=True)
        (folder / "trained" / "adapter_model.safetensors").touch()
        write_json(folder / "record.json", a_record(folder, seeds[folder], 2.0 + number))
    # its driver was killed just then
    (recorded[0] / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    with writing_folder(jobs["random", 2] / "checkpoints" / "checkpoint-2") as checkpoint:
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"moments")
    flip_a_byte(checkpoint / "optimizer.pt")

    def finetune_all(context: Context) -> list[FineTune]:
        events.clear()
        return tune_all(Comparison(context), Comparison(context).jobs, own_process=True)

    try:
        records = finetune_all(whole)
        assert not list(whole.run_dir.candidates.glob("*/checkpoints")), (
            "a recorded fine-tune needs no checkpoints"
        )
        assert told(events, "comparison") == ["warning", "random, training seed 2"]
        assert any(
            "checkpoint-2 is damaged; random, training seed 2 does not resume" in str(each)
            for each in events
        )
        counted = progress_of(events, "comparison")
        assert list(counted) == ["steps"]
        assert counted["steps"][-1] == (4 * len(set(jobs.values())),) * 2, (
            "those that were recorded are done"
        )
        assert counted["steps"] == sorted(set(counted["steps"]))
        assert [(each.name, each.seed) for each in records] == list(jobs)
        for each in records:
            folder = jobs[each.name, each.seed]
            assert folder not in recorded or each.confirmation.mean == 2.0 + recorded.index(folder)

        weights = jobs["random", 2] / "trained" / "adapter_model.safetensors"
        flip_a_byte(weights)
        mended = finetune_all(whole)
        assert told(events, "comparison") == ["warning", "random, training seed 2"], (
            "only what was damaged"
        )
        assert any(
            f"{weights} is damaged, " in str(event) and "set aside in " in str(event)
            for event in events
        )
        trained = next(each for each in mended if (each.name, each.seed) == ("random", 2))
        assert trained.trained_sha256 == file_digest(weights)

        again = finetune_all(fewer)
        assert [(each.name, each.seed) for each in again] == [
            job for job in jobs if job[1] in (1, 2)
        ]
        assert told(events, "comparison") == [], "nothing was trained again"
    finally:
        whole.close()
        for folder in set(jobs.values()):
            shutil.rmtree(folder)


@pytest.mark.slow
def test_the_winner_is_trained_and_scored_once(
    context: Context, changed: Callable[[str, Any], Context]
) -> None:
    """A damaged adapter is trained again, and a damaged final folder is written again."""
    events: list[Event] = []
    alone = replace(changed("finetune", {"steps": 4}), emit=events.append)
    job = Finetune(alone).job
    weights, final = (
        folder / "adapter_model.safetensors"
        for folder in (job.trained, alone.run_dir.root / "final")
    )

    def messages() -> list[str]:
        events.clear()
        run_stage(Finetune(alone))
        return told(events, "finetune")

    try:
        assert messages() == ["searched, training seed 1"]
        counted = progress_of(events, "finetune")
        assert list(counted) == ["steps", "loading weights", "saving weights"]
        assert all(
            steps[-1][0] == steps[-1][1] and steps == sorted(set(steps))
            for steps in counted.values()
        )
        flip_a_byte(weights)
        assert messages() == ["warning", "searched, training seed 1"]
        written = file_digest(final)
        flip_a_byte(final)
        assert messages() == ["warning"] and file_digest(final) == written, (
            "made again, nothing trained"
        )
        assert messages() == [], "whole again"

        (alone.run_dir.root / "final" / "README.md").write_text("A card, which comes later.")
        assert messages() == [] and isinstance(events[0], StageSkipped)
        tasks = (
            TaskScore(
                task="arc", metric="acc", value=0.5, stderr=0.5, num_questions=1, correct=(1.0,)
            ),
        )
        scores = {"scored": scores_digest(alone), "tasks": tasks, "accuracy": 0.5}
        for untuned in Evaluate(alone).jobs[:-1]:
            record = untuned.record.model_copy(update=scores)
            write_json(untuned.folder / "record.json", record)
        events.clear()
        run_stage(Evaluate(alone))
        scored = alone.record(EvalRecord)
        assert [(row.name, row.seed) for row in scored.rows] == [
            *(("base", None), ("pruned", None), ("searched", None)),
            ("searched", 1),
        ]
        assert [row.tasks for row in scored.untuned] == [tasks] * 3
        winner = alone.record(FinetuneRecord).winner
        [judged] = scored.tuned
        assert (judged.digest, judged.losses, judged.seconds) == (
            winner.digest,
            winner.losses,
            winner.seconds,
        ), "its training is recorded once"
        assert judged.scoring_seconds > 0 == winner.scoring_seconds
        assert told(events, "evaluate") == ["searched, training seed 1", "1 model in turns"]
        counted = progress_of(events, "evaluate")
        assert counted["answers"][-1] == (32, 32), (
            "of four models, two questions each with four answers"
        )
        assert counted["memory and tokens a second"][-1] == (3, 3)
        assert [row.inference is None for row in scored.rows] == [True, True, True, False], (
            "only what is handed over is timed"
        )
        assert scored.text is None and scored.inference, "answers to questions have no perplexity"
        alone.run_dir.forget("evaluate")
        run_stage(Evaluate(alone))
        again_scored = alone.record(EvalRecord)
        assert [row.tasks for row in again_scored.rows] == [row.tasks for row in scored.rows]
        assert told(events, "evaluate")[2:] == ["1 model in turns"], "nothing was scored again"
        assert told(events, "finetune") == []
    finally:
        alone.close()


@pytest.mark.slow
def test_the_final_folder_is_the_recorded_winners(
    context: Context, changed: Callable[[str, Any], Context], tmp_path: Path
) -> None:
    """A command for another winner overwrites the final folder but fails to write its record."""
    alone = changed("finetune", {"steps": 4})
    weights, records = (
        alone.run_dir.root / name for name in ("final/model.safetensors", "records")
    )
    try:
        run_stage(Finetune(alone))
        alone.close()  # each context has a Ray of its own
        whole = weights.read_bytes()
        records.rename(aside := tmp_path / "records")
        with disk_of("8m", records):
            shutil.copytree(aside, records, dirs_exist_ok=True)
            alone.run_dir.forget("finetune")
            with suppress(OSError), (records / "filler").open("wb", buffering=0) as filler:
                while filler.write(b"\0" * 4096):
                    pass
            with pytest.raises(StageError, match="no space left for"):
                run_stage(
                    Finetune(
                        other := with_winner(alone, context.shapes.space.spaces[0].uniform("nf4"))
                    )
                )
            other.close()
            assert weights.read_bytes() != whole
            (records / "filler").unlink()
            run_stage(Finetune(alone))
            assert weights.read_bytes() == whole
        records.rmdir()
        aside.rename(records)
    finally:
        alone.close()


@pytest.mark.slow
def test_two_workers_fine_tune_what_one_does(
    changed: Callable[[str, Any], Context], sensed_raw: dict[str, Any]
) -> None:
    """Ray Train runs both workers on packed 4- and 8-bit layers in bfloat16, so about three digits
    agree."""
    found = {}
    for workers in (2, 1):
        whole = with_key(sensed_raw, "training.micro_batch_size", 2)
        config = validate_config(with_key(whole, "finetune", {"steps": 14, "num_workers": workers}))
        context = replace(changed("finetune", {"steps": 14}), config=config)
        try:
            run_stage(Finetune(context))
            found[workers] = context.record(FinetuneRecord).winner
            folder = Finetune(context).job.folder
        finally:
            context.close()
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["owner.json", "progress", "record.json", "trained", "trained.files.json"]
        assert folder.joinpath("progress").read_text() == "14 14"
        assert not list(context.run_dir.root.glob(".scratch*"))
        shutil.rmtree(folder)
        context.run_dir.forget("finetune")
    one, two = found[1], found[2]
    assert two.digest == one.digest and two.steps == one.steps == 14
    assert two.measured_bytes == one.measured_bytes
    assert two.train_loss == pytest.approx(one.train_loss, rel=1e-3)
    assert two.confirmation.mean == pytest.approx(one.confirmation.mean, rel=1e-3)


def test_an_intact_row_is_not_set_aside(tmp_path: Path) -> None:
    """A machine that cannot read the row may not see the storage."""
    run_dir = RunDir(tmp_path)
    folder = run_dir.candidates / "0123abcd"
    (weights := folder / "trained" / "adapter_model.safetensors").parent.mkdir(parents=True)
    weights.touch()
    write_json(folder / "record.json", a_record(folder, 1, 2.0))
    with (
        pytest.raises(StageError, match="visible to all"),
        setting_aside_damaged_folder(run_dir, "evaluate"),
    ):
        raise CorruptFile(f"adapter {weights} cannot be read", weights)
    assert weights.exists()


def a_record(folder: Path, seed: int | None, loss: float) -> FineTune:
    """Make the record of a fine-tuned row."""
    return made_fine_tune(
        "",
        {"layers.0": "nf4"},
        seed,
        {CONFIRMATION: (loss,)},
        digest=folder.name,
        trained_sha256="1",
    )
