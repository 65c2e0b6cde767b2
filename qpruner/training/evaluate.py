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

METRICS: tuple[str, ...] = get_args(
    AccuracyMetric
)  # lm-eval's accuracy metrics, in order of preference


@dataclass(frozen=True)
class TaskQuestions:
    """The texts of a task's questions, to look for them in the training rows, and the metric that
    scores the task."""

    texts: list[str]
    metric: str


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
    """Run lm-eval on a model in memory; return one score per task, of a group of tasks one per
    subtask.

    The first `skip` questions are left out; the next `limit` (None: all) are scored, by `metric` or
    else the first of `METRICS` that a task reports. `on_progress` counts requests (one per choice
    or generation).
    """
    from lm_eval import simple_evaluate

    manager, samples = _task_manager(settings.include_path, tuple(tasks)), None
    if skip:
        stop, loaded = None if limit is None else skip + limit, manager.load(list(tasks))["tasks"]
        samples = {
            name: list(range(len(task.eval_docs)))[skip:stop] for name, task in loaded.items()
        }
    # In bf16 a log-probability of -6 is rounded to steps of 0.03, and most plans differ by less.
    options = {"pretrained": model, "batch_size": settings.batch_size, "softmax_dtype": "float32"}
    was_training = model.training
    model.eval()
    results: Any = simple_evaluate(
        model=_counting_model(on_progress)(tokenizer=tokenizer, **options),
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
    """Derive a class from lm-eval's model that counts answers (by its cache hook) and computes only
    their logits."""
    import torch
    from lm_eval.api.model import CacheHook
    from lm_eval.models.huggingface import HFLM

    class Counter(CacheHook):  # type: ignore[misc]
        done = total = 0

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            self.done += 1
            on_progress(self.done, max(self.done, self.total))

    class CountingModel(HFLM):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.counter = Counter(None)
            self.set_cache_hook(self.counter)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.longest_answer = max((len(answer) for _, _, answer in requests), default=0)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            ends = ((inps != 0) * torch.arange(1, inps.shape[1] + 1, device=inps.device)).amax(
                dim=1
            )  # padding is 0
            padding = inps.shape[1] - int(ends.min())
            with torch.no_grad():
                return self.model(inps, logits_to_keep=padding + self.longest_answer).logits

        def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.counter.total += len(requests)
            return super().loglikelihood(requests, *args, **kwargs)

        def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.counter.total += len(requests)
            return super().generate_until(requests, *args, **kwargs)

    return CountingModel


def task_questions(
    tasks: Sequence[str],
    include_path: str | None,
    key: str,
    limit: int | None,
    metric: str | None = None,
) -> dict[str, TaskQuestions]:
    """Load the first `limit` questions of each task, and check tasks and metric; errors name the
    key `key`."""
    known = _task_manager(include_path, tuple(tasks)).all_tasks
    for task in (task for task in tasks if task not in known):
        folder = f" --include_path {shlex.quote(include_path)}" if include_path else ""
        nearest = ", ".join(difflib.get_close_matches(task, known, n=3))
        hint = (
            f"did you mean {nearest}?"
            if nearest
            else f"`lm_eval ls tasks{folder}` lists the known ones"
        )
        raise UserError(f"`{key}`: lm-eval has no task `{task}`; {hint}")
    try:
        loaded = _task_manager(include_path, tuple(tasks)).load(list(tasks))["tasks"]
    except Exception as error:  # the loaders of many data sets raise many types
        why = f"the rows of {', '.join(tasks)} cannot be loaded: {first_line(error.__cause__ or error)}"
        raise UserError(
            f"`{key}`: {why}; fix the task's file or data, or name another task"
        ) from error
    used = {
        name: _used_metric(name, task.aggregation(), metric, key) for name, task in loaded.items()
    }
    questions = {name: TaskQuestions([], metric) for name, metric in used.items()}
    for name, task in loaded.items():
        questions[name].texts.extend(
            _question(task, doc) for doc in itertools.islice(task.eval_docs, limit)
        )
    return questions


def _used_metric(task: str, reported: Collection[str], wanted: str | None, key: str) -> str:
    """Choose the metric that scores a task: `wanted`, or else the first of `METRICS` that the task
    reports."""
    accuracies = [name for name in METRICS if name in reported]
    if not accuracies:
        rule = f"must report one of {', '.join(METRICS)}, but reports {', '.join(reported)}"
        raise UserError(f"`{key}`: task `{task}` {rule}: name a task that reports an accuracy")
    if wanted and wanted not in accuracies:
        rule = f"must be a metric that every task of `{key}` reports, got {wanted}, but `{task}` reports"
        raise UserError(
            f"`search.metric` {rule} {', '.join(accuracies)}: set one that all report, or `accuracy`"
        )
    return wanted or accuracies[0]


@functools.lru_cache(maxsize=4)
def _task_manager(include_path: str | None, tasks: tuple[str, ...]) -> Any:
    """Read lm-eval's index of tasks; read its built-in tasks (6 s) only if `include_path` lacks one
    of `tasks`."""
    # lm-eval draws progress bars and logs every request it builds; the stages emit their own
    # events.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):  # a group may name built-in tasks
            return own
    return TaskManager(include_path=include_path)


def _question(task: Any, doc: dict[str, Any]) -> str:
    """Return a question's text: the column with the question if the row has one, else the task's
    full prompt."""
    for column in ("question", "goal", "query", "ctx", "sentence"):
        if isinstance(doc.get(column), str):
            return f"{doc[column]} {doc.get('passage', '')}".strip()
    return str(task.doc_to_text(doc))


def _score(task: str, samples: list[dict[str, Any]], wanted: str | None) -> TaskScore:
    """Compute a task's score from lm-eval's log, which has an entry for each question and each
    answer filter."""
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        by_filter.setdefault(sample["filter"], []).append(sample)
    keys = [(metric, name) for name, found in by_filter.items() for metric in found[0]["metrics"]]
    metric = _used_metric(task, dict(keys), wanted, "tasks")
    name = next(name for reported, name in keys if reported == metric)
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
    """Return each right choice's negative log-likelihood in nats; empty if a question has no
    choices."""
    losses = []
    for sample in samples:
        responses, target = sample["filtered_resps"], sample["target"]
        if not str(target).isdigit() or len(responses) < 2 or int(target) >= len(responses):
            return ()
        losses.append(-float(responses[int(target)][0]))
    return tuple(losses)
