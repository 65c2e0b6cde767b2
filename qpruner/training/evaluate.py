"""Score models on lm-eval tasks, both built-in tasks and tasks from a folder."""

from __future__ import annotations

import difflib
import functools
import itertools
import logging
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from qpruner.config.schema import AccuracyMetric, EvaluateConfig
from qpruner.data import measures
from qpruner.errors import UserError, first_line
from qpruner.runs.records import TaskScore

if TYPE_CHECKING:
    from qpruner.data.calibration import OnProgress

METRICS: tuple[str, ...] = get_args(AccuracyMetric)
"""The accuracy metrics of lm-eval, in order of preference."""


@dataclass(frozen=True)
class TaskQuestions:
    """The questions of a task, and how they are scored."""

    texts: list[str]
    """The text of each question, to look for it in the training rows."""
    metric: str
    """The metric of lm-eval that scores the task."""


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: EvaluateConfig,
    limit: int | None,
    num_fewshot: int = 0,
    skip: int = 0,
    metric: str | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> tuple[TaskScore, ...]:
    """Run lm-eval on a model in memory.

    Args:
        model: A model of transformers, which stays where it is.
        tokenizer: The tokenizer of the model.
        tasks: Names of tasks or of groups of tasks.
        settings: The batch size, and the folder of the user's own tasks.
        limit: How many questions of each task are scored; None scores all.
        num_fewshot: How many answered questions come before each question.
        skip: How many questions at the beginning of each task are left out.
        metric: The metric that scores; None takes the first of `METRICS` that a task reports.
        on_progress: Gets the number of answered and of all requests, one per choice or generation.

    Returns:
        A score for each task; for a group of tasks a score for each subtask.

    Raises:
        UserError: A task reports no accuracy, or not `metric`.
    """
    from lm_eval import simple_evaluate

    manager = _task_manager(settings.include_path, tuple(tasks))
    samples = None
    if skip:
        stop = None if limit is None else skip + limit
        samples = {}
        for name, task in manager.load(list(tasks))["tasks"].items():
            samples[name] = list(range(len(task.eval_docs)))[skip:stop]
    # In bf16 a log-probability of -6 is rounded to steps of 0.03, and most plans differ by less.
    evaluated = _counting_model(on_progress)(
        tokenizer=tokenizer,
        pretrained=model,
        batch_size=settings.batch_size,
        softmax_dtype="float32",
    )
    was_training = model.training
    model.eval()
    results: Any = simple_evaluate(
        model=evaluated,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=None if skip else limit,
        samples=samples,
        bootstrap_iters=0,
        log_samples=True,
    )
    model.train(was_training)
    return tuple(_score(task, logged, metric) for task, logged in results["samples"].items())


def _counting_model(on_progress: OnProgress) -> Any:
    """Derive a class from lm-eval's model that counts answers and computes only their logits.

    It is its own cache hook, which lm-eval calls with every answer.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    class CountingModel(HFLM):  # type: ignore[misc]
        done = 0
        total = 0

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.set_cache_hook(self)

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            self.done += 1
            on_progress(self.done, max(self.done, self.total))

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.total += len(requests)
            self.longest_answer = max((len(answer) for _, _, answer in requests), default=0)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            # `inps` are ids int64 ``(batch, positions)``, padded by 0 on the right.
            positions = torch.arange(1, inps.shape[1] + 1, device=inps.device)
            ends = ((inps != 0) * positions).amax(dim=1)
            padding = inps.shape[1] - int(ends.min())
            with torch.no_grad():
                return self.model(inps, logits_to_keep=padding + self.longest_answer).logits

        def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.total += len(requests)
            return super().generate_until(requests, *args, **kwargs)

    return CountingModel


def task_questions(
    tasks: Sequence[str],
    include_path: str | None,
    key: str,
    limit: int | None,
    metric: str | None = None,
) -> dict[str, TaskQuestions]:
    """Load the questions of tasks, and check that lm-eval has the tasks and their metric.

    Args:
        tasks: Names of tasks or of groups of tasks.
        include_path: The folder of the user's own tasks.
        key: The key of the configuration that names the tasks, for errors.
        limit: How many questions of each task are loaded; None loads all.
        metric: The metric that every task must report; None accepts any of `METRICS`.

    Raises:
        UserError: A task is unknown, cannot be loaded, or reports no accuracy or not `metric`.
    """
    manager = _task_manager(include_path, tuple(tasks))
    for task in tasks:
        if task not in manager.all_tasks:
            hint = _hint(task, manager.all_tasks, include_path)
            raise UserError(f"`{key}`: lm-eval has no task `{task}`; {hint}")
    try:
        loaded = manager.load(list(tasks))["tasks"]
    except Exception as error:  # the loaders of many data sets raise many types
        cause = first_line(error.__cause__ or error)
        raise UserError(
            f"`{key}`: the rows of {', '.join(tasks)} cannot be loaded: {cause}; "
            "fix the task's file or data, or name another task"
        ) from error

    metrics = {
        name: _used_metric(name, task.aggregation(), metric, key) for name, task in loaded.items()
    }
    questions = {}
    for name, task in loaded.items():
        docs = itertools.islice(task.eval_docs, limit)
        questions[name] = TaskQuestions([_question(task, doc) for doc in docs], metrics[name])
    return questions


def _hint(task: str, known: Collection[str], include_path: str | None) -> str:
    """Say which tasks have a name like that of an unknown task, or how to list all tasks."""
    nearest = ", ".join(difflib.get_close_matches(task, known, n=3))
    if nearest:
        return f"did you mean {nearest}?"
    folder = f" --include_path {shlex.quote(include_path)}" if include_path else ""
    return f"`lm_eval ls tasks{folder}` lists the known ones"


def _used_metric(task: str, reported: Collection[str], wanted: str | None, key: str) -> str:
    """Choose the metric that scores a task.

    This is `wanted`, or else the first of `METRICS` that the task reports.
    """
    accuracies = [name for name in METRICS if name in reported]
    if not accuracies:
        raise UserError(
            f"`{key}`: task `{task}` must report one of {', '.join(METRICS)}, but reports "
            f"{', '.join(reported)}: name a task that reports an accuracy"
        )
    if wanted and wanted not in accuracies:
        raise UserError(
            f"`search.metric` must be a metric that every task of `{key}` reports, got {wanted}, "
            f"but `{task}` reports {', '.join(accuracies)}: set one that all report, or `accuracy`"
        )
    return wanted or accuracies[0]


@functools.lru_cache(maxsize=4)
def _task_manager(include_path: str | None, tasks: tuple[str, ...]) -> Any:
    """Read lm-eval's index of tasks.

    Its built-in tasks, which take 6 s, are read only if `include_path` lacks one of `tasks`.
    """
    # lm-eval draws progress bars and logs each request; the stages emit events of their own.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):  # a group may name built-in tasks
            return own
    return TaskManager(include_path=include_path)


def _question(task: Any, doc: dict[str, Any]) -> str:
    """Return a question's text: its column if the row has one, or else the task's full prompt."""
    for column in ("question", "goal", "query", "ctx", "sentence"):
        if isinstance(doc.get(column), str):
            return f"{doc[column]} {doc.get('passage', '')}".strip()
    return str(task.doc_to_text(doc))


def _score(task: str, samples: list[dict[str, Any]], wanted: str | None) -> TaskScore:
    """Compute a task's score from lm-eval's log.

    The log has an entry for each question and each answer filter.
    """
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        by_filter.setdefault(sample["filter"], []).append(sample)
    filter_of: dict[str, str] = {}
    for name, logged in by_filter.items():
        for reported in logged[0]["metrics"]:
            filter_of.setdefault(reported, name)

    metric = _used_metric(task, filter_of, wanted, "tasks")
    name = filter_of[metric]
    correct = tuple(float(sample[metric]) for sample in by_filter[name])
    value, stderr = measures.over_questions(correct)
    return TaskScore(
        task=task,
        metric=metric if name == "none" else f"{metric},{name}",
        value=value,
        stderr=stderr,
        num_questions=len(correct),
        correct=correct,
        answer_loss=_answer_losses(by_filter[name]),
    )


def _answer_losses(samples: list[dict[str, Any]]) -> tuple[float, ...]:
    """Return the negative log-likelihood of each right choice, in nats.

    The result is empty if a question has no choices.
    """
    losses = []
    for sample in samples:
        responses = sample["filtered_resps"]
        target = sample["target"]
        if not str(target).isdigit() or len(responses) < 2 or int(target) >= len(responses):
            return ()
        losses.append(-float(responses[int(target)][0]))
    return tuple(losses)
