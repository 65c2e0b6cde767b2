"""Fine-tunes and their scores, on real files: a model has its own adapter, or no score."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    DEMO_DATA,
    demo_rows,
    disk_of,
    flip_a_byte,
    full_until_noticed,
    raw_config,
    with_key,
)
from mixed_models import held_out_scoring, job_in, row_job
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qpruner.config.load import validate_config
from qpruner.config.schema import RunConfig
from qpruner.data.encoding import load_encoded, load_scored, save_encoded, text_windows
from qpruner.data.losses import Rows, mean_loss
from qpruner.errors import CorruptFile, StorageError
from qpruner.models.layout import layout_of
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.pipeline.run import run
from qpruner.plans.plan import PrecisionPlan
from qpruner.quantization.assembly import measured_bytes
from qpruner.runs.records import CONFIRMATION, SELECTION, FineTune
from qpruner.training.checkpoints import (
    Ownership,
    SaveClock,
    is_damaged,
    keep_checkpoint,
    latest_checkpoint,
    load_trained,
)
from qpruner.training.evaluate import score_tasks
from qpruner.training.finetune import Schedule
from qpruner.training.inference import InferenceJob, measure_inference, take_turn
from qpruner.training.jobs import FineTuneJob, Scoring, build, score, tune

Tuned = tuple[FineTuneJob, FineTune]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return a configuration whose run is done up to the stage `bank`."""
    raw = raw_config(tiny_model, tmp_path_factory.mktemp("candidates") / "run")
    raw = with_key(raw, "evaluate.include_path", str(DEMO_DATA.parent / "tasks"))
    config = validate_config(with_key(raw, "training.learning_rate", 0.01))
    run(config, lambda event: None, until="bank")
    return config


@pytest.fixture(scope="module")
def tuned(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Fine-tune a row; return its job and its record."""
    job = row_job(config, tmp_path_factory.mktemp("tuned") / "searched")
    return job, tune(job)[0]


@pytest.fixture
def copied(tuned: Tuned, tmp_path: Path) -> FineTuneJob:
    """Return the fine-tuned row in a copy of its folder, which a test may damage."""
    return job_in(tuned[0], shutil.copytree(tuned[0].folder, tmp_path / "searched"))


def tuned_model(job: FineTuneJob) -> PeftModel:
    model = build(job)
    load_trained(model, job.trained)
    return model


def tokenizer_of(job: FineTuneJob) -> Any:
    return load_tokenizer(str(job.bank.checkpoint))


def loss_on(job: FineTuneJob, model: torch.nn.Module, rows: Rows) -> Any:
    return mean_loss(
        model, rows, int(tokenizer_of(job).pad_token_id), job.config.evaluate.batch_size
    )


# Fine-tuning


def test_a_fine_tune_leaves_its_adapter_and_its_last_step(tuned: Tuned) -> None:
    job, outcome = tuned
    rows, judging = load_encoded(job.data / "validation"), load_scored(job.data, CONFIRMATION)
    assert loss_on(job, tuned_model(job), judging).mean == pytest.approx(
        outcome.confirmation.mean, abs=1e-6
    )
    assert loss_on(job, tuned_model(job), rows).mean < loss_on(job, build(job), rows).mean
    left = sorted(path.name for path in job.folder.iterdir())
    assert left == ["checkpoints", "owner.json", "progress", "trained", "trained.files.json"]
    kept = sorted(path.name for path in job.checkpoints.iterdir())
    assert kept == ["checkpoint-4", "checkpoint-4.files.json"]
    assert outcome.steps == 4
    model_config = AutoConfig.from_pretrained(job.bank.checkpoint)
    layout = layout_of(model_config, job.config.quantize, 2, job.config.lora.rank, on_gpu=False)
    plan = PrecisionPlan.from_dict(
        {group.name: job.record.plan.get(group.name, "bf16") for group in layout.groups}
    )
    assert outcome.measured_bytes == layout.plan_bytes(plan)


def test_a_finished_unrecorded_fine_tune_takes_no_step(tuned: Tuned, copied: FineTuneJob) -> None:
    """The driver was killed before it recorded the fine-tune, and the adapter is missing."""
    shutil.rmtree(copied.trained)
    copied.progress.unlink()
    again, _ = tune(copied)
    assert not copied.progress.exists(), "no step was reported"
    figures = ("steps", "train_loss", "losses", "trained_sha256")
    assert [getattr(again, name) for name in figures] == [
        getattr(tuned[1], name) for name in figures
    ]


def test_training_seeds_share_the_start(tuned: Tuned, tmp_path: Path) -> None:
    """Training seeds differ in data order only; different starts would add noise between plans."""
    job, outcome = tuned
    other = job_in(job, tmp_path / "other", seed=1)
    assert tune(other)[0].confirmation.mean != outcome.confirmation.mean
    starts = [build(each).state_dict() for each in (job, other)]
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())


def test_the_newest_intact_checkpoint_is_resumed(tmp_path: Path) -> None:
    """A checkpoint without a list of its files is ignored, because its process was killed.

    One with a list counts before the earlier one is removed, even if that cannot be: a mounted
    folder is busy.
    """
    assert latest_checkpoint(tmp_path / "none") is None
    claim = Ownership(tmp_path / "owner.json")
    claim.take()

    def saved(step: int) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        for name in (ADAPTER, "optimizer.pt"):
            (folder / name).write_bytes(b"moments of the gradients")
        (folder / ADAPTER).chmod(0o600)  # as safetensors leaves it
        return folder

    with disk_of("1m", tmp_path / "checkpoint-9") as earlier:
        keep_checkpoint(saved(9), tmp_path, claim)
        newest = saved(10)
        with pytest.raises(OSError, match="busy"):
            keep_checkpoint(newest, tmp_path, claim)
        assert earlier.exists() and latest_checkpoint(tmp_path) == newest
    keep_checkpoint(newest, tmp_path, claim)
    saved(11)
    assert (newest / ADAPTER).stat().st_mode & 0o444 == newest.stat().st_mode & 0o444, (
        "a team goes on from it"
    )
    assert not earlier.exists() and latest_checkpoint(tmp_path) == newest and not is_damaged(newest)
    flip_a_byte(newest / "optimizer.pt")
    assert is_damaged(newest) and latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-10.files.json").write_text('{"sha256"')
    assert is_damaged(newest), "what vouches for it is damaged"


def test_a_fine_tune_waits_for_room_or_fails_and_resumes(tuned: Tuned, tmp_path: Path) -> None:
    job, undisturbed = tuned
    with disk_of("16m", tmp_path / "disk") as disk:
        waits, fails = (job_in(job, disk / name) for name in ("waits", "fails"))
        waits.folder.mkdir()
        with full_until_noticed(disk) as filler:
            assert tune(waits)[0].losses == undisturbed.losses
            assert not filler.exists()
        shutil.rmtree(waits.folder)
        fails.folder.mkdir()
        (disk / "filler").write_bytes(b"\0" * shutil.disk_usage(disk).free)
        with pytest.raises(
            StorageError, match=r"no space left for .*\n.*make room, then repeat the command"
        ):
            tune(fails)
        (disk / "filler").unlink()
        assert tune(fails)[0].losses == undisturbed.losses


# Scoring


def test_a_row_is_scored_with_its_own_adapter_or_start(config: RunConfig, tuned: Tuned) -> None:
    """A row without fine-tune does not use the adapter that a fine-tune left in its folder."""
    job = replace(tuned[0], scoring=held_out_scoring(config))
    started = job_in(job, job.folder, seed=None)
    whole_job = row_job(config, job.folder, pattern=("bf16",), seed=None)
    dense = replace(whole_job, scoring=job.scoring)
    start = build(job)
    assert "nf4" in job.record.plan.values()
    whole = load_dense(str(dense.bank.checkpoint), "bfloat16")
    settings, losses = job.config.evaluate, []
    for row, model in ((job, tuned_model(job)), (started, start), (dense, whole)):
        found = score(row)
        model.eval()
        assert found.tasks == score_tasks(
            model, tokenizer_of(row), settings.tasks, settings, settings.limit
        )
        assert [task.task for task in found.tasks] == ["qpruner_everyday_test"]
        assert found.accuracy == np.mean(found.tasks[0].correct)
        assert found.text_loss is None and found.losses == row.record.losses
        losses.append(found.tasks[0].answer_loss)
    assert job.progress.read_text() == "32 32", "8 questions with 4 answers each"
    assert len(losses[0]) == 8 and sum(losses[0]) < sum(losses[1]), "it learned how an answer looks"
    start.disable_adapter_layers()
    without = score_tasks(start, tokenizer_of(job), settings.tasks, settings, settings.limit)
    assert without[0].answer_loss != losses[1], "the initial adapter has an effect"


def test_the_loss_on_a_text_covers_all_its_windows(tuned: Tuned, tmp_path: Path) -> None:
    """The loss equals transformers' own, computed window by window with the adapter."""
    job, tokenizer = tuned[0], tokenizer_of(tuned[0])
    texts = [row["question"] for row in demo_rows("questions_confirmation.jsonl")]
    rows = text_windows(texts, tokenizer, 32)
    save_encoded(rows, tmp_path / "text")
    scoring = held_out_scoring(job.config, tmp_path / "text")
    record = score(replace(job, scoring=scoring))
    found = record.text_loss
    model = tuned_model(job)
    model.eval()
    losses, weights = [], [len(row["input_ids"]) - 1 for row in rows]
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert found == pytest.approx(np.average(losses, weights=weights), rel=1e-3)
    assert weights[:-1] == [31] * (len(rows) - 1)
    every = [token for row in rows for token in row["input_ids"]]
    assert every == tokenizer("\n\n".join(texts))["input_ids"], "nothing is cut off"
    without = score(replace(job, record=record, scoring=Scoring(rows=SELECTION)))
    assert without.text_loss is None and not without.tasks, "scores of another scoring are gone"


def test_rows_take_turns_at_inference(tuned: Tuned, tmp_path: Path) -> None:
    """An unquantized row takes turns with the quantized one; both have the same adapter."""
    job = tuned[0]
    dense = job_in(job, job.folder, plan=dict.fromkeys(job.record.plan, "bf16"))
    signs = tmp_path / "turns"
    task = InferenceJob((job, dense), job.data, threads=1, progress=signs)
    setting, (packed, full) = measure_inference(task)
    assert signs.read_text() == "6 6", "three turns each"
    assert (setting.prompt_tokens, setting.new_tokens) == (128, 16)
    assert setting.memory_counter == "tensors of the model, and rise of resident memory"
    for each in (packed, full):
        assert len(each.prefill_tokens_per_second) == len(each.decode_tokens_per_second) == 3
        assert min(each.prefill_tokens_per_second) > 0 and min(each.decode_tokens_per_second) > 0
    model_config = AutoConfig.from_pretrained(job.bank.checkpoint)
    layout = layout_of(model_config, job.config.quantize, 2, 4, on_gpu=False)
    assert packed.memory_bytes >= tuned[1].measured_bytes
    assert full.memory_bytes >= layout.plan_bytes(layout.dense())


def test_mapped_weights_are_counted_once(tmp_path: Path) -> None:
    """The generation is the first to read them, but they already count as the model's bytes."""
    config = LlamaConfig(hidden_size=512, num_hidden_layers=2, num_attention_heads=8)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    weights = measured_bytes(model)
    assert weights > 50e6, "of which the generation's own part is little"
    _, _, memory_bytes = take_turn(model, list(range(32)), 4)
    assert weights <= memory_bytes < 1.5 * weights


DAMAGES: tuple[Callable[[Path], object], ...] = (
    shutil.rmtree,
    lambda adapter: os.truncate(adapter / ADAPTER, 1000),
)


@pytest.mark.parametrize("damage", DAMAGES, ids=["missing", "truncated"])
def test_a_fine_tuned_row_without_its_adapter_is_not_scored(
    copied: FineTuneJob, damage: Callable[[Path], object]
) -> None:
    """Else the table would show the untuned model's accuracy as that of the fine-tuned model."""
    damage(copied.trained)
    with pytest.raises(CorruptFile) as caught:
        score(replace(copied, scoring=held_out_scoring(copied.config)))
    assert caught.value.path and caught.value.path.parent == copied.trained
    assert str(caught.value.path) in str(caught.value)


def test_a_confirmation_scores_the_last_rungs_adapter(tuned: Tuned) -> None:
    job, outcome = tuned
    model, rows = tuned_model(job), load_encoded(job.data / "confirmation")
    choosing, judging = (loss_on(job, model, rows[part::2]) for part in (0, 1))
    as_trial = replace(job, scoring=Scoring(rows=SELECTION))
    found = score(replace(as_trial, record=outcome))
    assert found.selection.loss == pytest.approx(choosing.mean, abs=1e-6)
    assert found.losses[SELECTION].by_row == pytest.approx(choosing.by_row, abs=1e-4), (
        "so that finalists can be paired by row"
    )
    # What the claim is told in is on rows that chose nothing.
    assert outcome.confirmation.mean == pytest.approx(judging.mean, abs=1e-6)
    assert choosing.mean != pytest.approx(judging.mean)
    assert outcome.confirmation.by_row == pytest.approx(judging.by_row, abs=1e-4)
    lengths = sorted(range(8), key=lambda index: len(rows[1::2][index]["input_ids"]))
    assert lengths != list(range(8)), "rows are batched by length, and yet told in their order"
    alone = [loss_on(job, model, [row]).mean for row in rows[1::2]]
    assert np.corrcoef(alone, outcome.confirmation.by_row)[0, 1] > 0.9
    assert found.confirmation == outcome.confirmation, "the other half keeps its losses"
    with pytest.raises(CorruptFile, match="adapter"):
        score(replace(as_trial, trained=job.folder))


def test_accuracy_is_confirmed_on_later_questions(tuned: Tuned) -> None:
    job, task = tuned[0], "qpruner_everyday_validation"
    (judged,) = score_tasks(tuned_model(job), tokenizer_of(job), [task], job.config.evaluate, 60)

    def accuracy(begin: int, end: int) -> float:
        return float(np.mean(judged.correct[begin:end]))

    # So many that other questions would tell.
    limit = next(
        n for n in range(4, 31) if accuracy(n, 2 * n) not in (accuracy(0, n), accuracy(n, 60))
    )
    scoring = Scoring(rows=SELECTION, tasks=(task,), limit=limit, skip=limit)
    found = score(replace(job, scoring=scoring))
    assert found.accuracy == pytest.approx(accuracy(limit, 2 * limit))
    assert found.selection.accuracy == found.accuracy


def test_saving_takes_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("qpruner.training.checkpoints.time.monotonic", lambda: now)
    clock, due = SaveClock(Schedule(1).save_seconds), list[float]()
    for now in (129.0, 130.0):
        due += [now] * clock.is_due()
    clock.saved(since=now - 5)
    for now in (229.0, 230.0):
        due += [now] * clock.is_due()
    assert due == [130.0, 230.0]
