"""Run one trial: fine-tune a plan for a few steps and score it at every rung.

Nothing here knows of Ray.
"""

import threading
from pathlib import Path
from typing import Any

import torch

from qpruner.config.schema import RunConfig
from qpruner.data.encoding import load_encoded
from qpruner.data.losses import Rows, mean_loss
from qpruner.data.measures import over_tasks
from qpruner.errors import TrainingDiverged
from qpruner.models.loading import load_tokenizer
from qpruner.quantization.assembly import plan_model
from qpruner.quantization.formats import trained_by
from qpruner.runs.records import RungResult
from qpruner.runs.storage import fetch, working_folder
from qpruner.search.trial_records import Progress, Report, TrialJob
from qpruner.training.evaluate import score_tasks
from qpruner.training.finetune import Listener, Schedule, finetune, step_losses


def run_trial(
    job: TrialJob, start: Path | None, report: Report, progress: Progress = lambda step: None
) -> None:
    """Assemble the plan's model, fine-tune it and score it at every rung.

    The fine-tune begins from `start`, if any. Rungs and checkpoints are reported.
    """
    config = job.config
    materials = job.materials
    one_at_a_time = threading.Lock()  # several threads read files

    def on_read() -> None:
        with one_at_a_time:
            progress(0)

    start = fetch(start) if start else None
    bank = materials.banks[job.cut]
    # One seed for adapters, data order and dropout of all trials: another order moves the loss more
    # than most plans do.
    peft_model = plan_model(bank, job.plan, config.seed, on_read)
    progress(0)
    tokenizer = load_tokenizer(str(bank.checkpoint))
    pad_id = int(tokenizer.pad_token_id)
    validation = load_encoded(materials.data / "validation")
    rungs = config.search.rungs
    done = 0

    def on_step(step: int, total: int, loss: float) -> None:
        nonlocal done
        done = step

    def on_save(checkpoint: Path) -> None:
        if done not in rungs:
            report(None, checkpoint)

    def on_rung(step: int, checkpoint: Path, train_loss: float) -> None:
        try:
            result = score(peft_model, tokenizer, validation, config, step, train_loss)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error} at step {step}") from error
        since = max((rung for rung in rungs if rung < step), default=0)
        train_losses = tuple(round(loss, 4) for loss in step_losses(checkpoint)[since:])
        report(result.model_copy(update={"train_losses": train_losses}), checkpoint)

    # Training, scoring and lm-eval all call the model, so one hook reports progress of all.
    with (
        working_folder("qpruner-trial-") as work,
        peft_model.register_forward_pre_hook(lambda *_: progress(done)),
    ):
        schedule = Schedule(config.search.steps, rungs=rungs, save_seconds=job.save_seconds)
        listener = Listener(on_rung, on_step, on_save=on_save)
        train = load_encoded(materials.data / "train")
        training = config.training.of(trained_by(config.training.method, job.plan.values()))
        finetune(peft_model, train, training, schedule, work, config.seed, pad_id, start, listener)


def score(
    model: torch.nn.Module,
    tokenizer: Any,
    validation: Rows,
    config: RunConfig,
    step: int,
    train_loss: float,
) -> RungResult:
    """Score a rung: the validation loss and, if the search has tasks, their mean accuracy."""
    search = config.search
    settings = config.evaluate
    # Scoring must not change the random state of dropout and data order.
    with torch.random.fork_rng():
        loss = mean_loss(model, validation, int(tokenizer.pad_token_id), settings.batch_size).mean
        result = RungResult(step=step, loss=loss, train_loss=train_loss)
        if not search.tasks:
            return result
        scores = score_tasks(
            model, tokenizer, search.tasks, settings, search.limit, metric=search.named_metric
        )
    accuracy, stderr = over_tasks([each.correct for each in scores])
    return result.model_copy(update={"accuracy": accuracy, "accuracy_stderr": stderr})
