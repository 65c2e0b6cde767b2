"""Check the rows and questions of a run.

They must exist, must not overlap between uses, and must be such as can be encoded.
"""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qpruner.config.schema import DataConfig, RunConfig
from qpruner.data.encoding import encode, importance_samples, sensitivity_samples
from qpruner.data.sources import Example, check_disjoint, load_examples, normalized
from qpruner.errors import UserError, first_line, together
from qpruner.models.loading import absolute_source, check_source, load_tokenizer, resolve_source
from qpruner.training.evaluate import TaskQuestions, task_questions
from qpruner.wording import counted

CHARACTERS_A_TOKEN = 4  # estimated characters of a token in English
ALPACA_TOKENS, QUESTION_TOKENS = 40, 4
"""Number of tokens that the template adds to an instruction, and to a question."""
TEMPLATE_END = 8  # maximum number of tokens that a template appends to a response
SPLITS = ("train", "validation", "confirmation")
FEW_TOKENS = 500
"""A mean loss over fewer tokens is too noisy: on 143 tokens 8 bits were worse than 4 bits (LOG.md,
2026-11-27)."""
LONGEST_HEADING = 5
"""Rows of `evaluate.text` with at most this many words, such as headings, may also occur in the
data."""


@dataclass(frozen=True)
class Rows:
    """Rows by split, and questions by use.

    Questions score trials (`search`), choose the winner (`fresh`) and test models (`evaluate`).
    """

    examples: dict[str, list[Example]]
    questions: dict[str, list[str]]
    # number of questions by use (`search`, `fresh`, `test`) and task
    num_questions: dict[str, dict[str, int]]
    metrics: dict[str, dict[str, str]]
    warnings: tuple[str, ...]


def check_rows(config: RunConfig) -> Rows:
    """Load all rows and questions of the run, with warnings.

    Raise an error if two uses of the data overlap.
    """
    check_cache()
    examples: dict[str, list[Example]]
    examples, tasks = together(lambda: _load_splits(config), lambda: _tasks(config))
    scoring, testing = tasks
    by_task: dict[str, dict[str, list[str]]] = {"search": {}, "fresh": {}, "evaluate": {}}
    limit = config.search.limit
    for name, task in scoring.items():
        by_task["search"][name] = task.texts[:limit]
        if config.search.by_accuracy:
            by_task["fresh"][name] = task.texts[limit:]
    for name, task in testing.items():
        by_task["evaluate"][name] = task.texts

    questions = {}
    num_questions = {}
    for use, texts in by_task.items():
        questions[use] = list(map(normalized, itertools.chain(*texts.values())))
        title = "test" if use == "evaluate" else use
        num_questions[title] = {name: len(of_task) for name, of_task in texts.items()}
    _check_overlap(config, examples, questions)
    return Rows(
        examples=examples,
        questions=questions,
        num_questions=num_questions,
        metrics={
            "search": {name: task.metric for name, task in scoring.items()},
            "evaluate": {name: task.metric for name, task in testing.items()},
        },
        warnings=(*_doubtful_rows(examples), *_few_tokens(config, examples)),
    )


def check_cache() -> None:
    """Raise a `UserError` if the libraries of Hugging Face cannot write to their cache.

    All rows go through that cache.
    """
    from datasets.config import HF_DATASETS_CACHE

    try:
        Path(HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=HF_DATASETS_CACHE).close()
    except OSError as error:
        raise UserError(
            f"the cache of Hugging Face libraries, {HF_DATASETS_CACHE}, cannot be written "
            f"({error.strerror}): set the environment variable HF_HOME to a folder that can be"
        ) from error


def _load_splits(config: RunConfig) -> dict[str, list[Example]]:
    """Load the rows; return them by split."""
    loads = {}
    for name in SPLITS:
        loads[name] = partial(load_examples, getattr(config.data, name), f"data.{name}")
    if config.calibration.data:
        loads["calibration"] = partial(load_examples, config.calibration.data, "calibration.data")
    if config.evaluate.text:
        loads["text"] = partial(load_examples, config.evaluate.text, "evaluate.text")
    loaded = together(*loads.values())
    examples: dict[str, list[Example]] = dict(zip(loads, loaded, strict=True))
    examples.setdefault("calibration", examples["train"])
    # Without repeated rows, because half of the rows choose the winner and half judge it.
    different: dict[str | int, Example] = {}
    for position, row in enumerate(examples["confirmation"]):
        different.setdefault(row.identity or position, row)
    examples["confirmation"] = list(different.values())
    if len(examples["confirmation"]) < 2:
        raise UserError(
            "`data.confirmation` must have at least 2 different rows, one to choose the winner "
            "and one to judge it, got 1: name a source with more rows, or raise its `limit`"
        )
    return examples


def _doubtful_rows(examples: dict[str, list[Example]]) -> Iterator[str]:
    """Warn about rows without a response."""
    for split in SPLITS:
        rows = examples[split]
        empty = [row for row in rows if row.format != "text" and not row.response.strip()]
        if empty:
            yield (
                f"{counted(len(empty), 'row')} of `data.{split}` of {len(rows)} have no response, "
                f"such as {empty[0].prompt[:90]!r}: they train the model to say nothing; add "
                "responses or remove the rows"
            )


def num_cut(rows: list[Example], longest: int) -> int:
    """Estimate how many rows have more than `longest` tokens and lose their ends."""
    return sum(sum(about_tokens(row)) > longest for row in rows)


def about_tokens(row: Example) -> tuple[int, int]:
    """Estimate how many tokens the prompt (with its template) and the response of a row have."""
    template = {"instruction": ALPACA_TOKENS, "multiple_choice": QUESTION_TOKENS}.get(row.format, 0)
    return template + _tokens_of(f"{row.prompt}{row.context}"), _tokens_of(row.response)


def about_labelled(row: Example, data: DataConfig) -> int:
    """Estimate how many tokens of a row are labelled, which means counted in the loss."""
    prompt, response = about_tokens(row)
    return max(0, min(prompt + response, data.max_length) - (prompt if data.response_only else 0))


def most_labelled(rows: Sequence[Example] | None, data: DataConfig) -> int:
    """Bound the labelled tokens of every row from above.

    The bound is twice the tokens per character of English text.
    """
    if not rows or data.packing or not data.response_only:
        return data.max_length
    return min(data.max_length, TEMPLATE_END + 2 * max(about_tokens(row)[1] for row in rows))


def _few_tokens(config: RunConfig, examples: dict[str, list[Example]]) -> Iterator[str]:
    """Warn if the losses are means over too few tokens to tell plans apart."""
    if config.search.metric != "loss" or not config.is_searched:
        return
    uses = {
        "`data.validation` scores the trials": examples["validation"],
        "half of `data.confirmation` chooses the winner, and half judges it,": examples[
            "confirmation"
        ][1::2],
    }
    for use, rows in uses.items():
        tokens = sum(about_labelled(row, config.data) for row in rows)
        if tokens < FEW_TOKENS:
            yield (
                f"{use} on about {tokens} tokens of {counted(len(rows), 'row')}: too few to tell "
                f"plans apart; use at least {FEW_TOKENS} tokens, with more rows or longer responses"
            )


def _tokens_of(text: str) -> int:
    """Estimate the number of tokens of a text; each letter outside ASCII counts as a token."""
    num_latin = len(text.encode("ascii", "ignore"))
    return len(text) - num_latin + num_latin // CHARACTERS_A_TOKEN


def _check_overlap(
    config: RunConfig, examples: dict[str, list[Example]], questions: dict[str, list[str]]
) -> None:
    """Raise an error if two uses of the data share rows, such as training and testing."""
    identities = {f"`data.{name}`": [row.identity for row in examples[name]] for name in SPLITS}
    identities["`evaluate.tasks`"] = questions["evaluate"]
    check_disjoint(identities)
    # Search tasks and validation rows both score trials, so they may overlap.
    others = {name: rows for name, rows in identities.items() if name != "`data.validation`"}
    check_disjoint({"`search.tasks`": [*questions["search"], *questions["fresh"]], **others})
    if config.calibration.data:
        rows = [row.identity for row in examples["calibration"]]
        for name in ("`data.validation`", "`data.confirmation`", "`evaluate.tasks`"):
            check_disjoint({"`calibration.data`": rows, name: identities[name]})
    # Many texts share short lines, such as headings.
    text = [
        row.identity
        for row in examples.get("text", ())
        if len(row.identity.split()) > LONGEST_HEADING
    ]
    for name in SPLITS:
        check_disjoint({f"`data.{name}`": identities[f"`data.{name}`"], "`evaluate.text`": text})


def include_path(config: RunConfig) -> str | None:
    """Return the absolute path of the folder of additional lm-eval tasks."""
    source = config.evaluate.include_path
    if source is None:
        return None
    path = resolve_source(source, "evaluate.include_path")
    if not Path(path).is_dir():
        state = "is a file" if Path(path).exists() else "does not exist"
        raise UserError(
            f"`evaluate.include_path`: {Path(path).absolute()} {state}; "
            "name a folder of lm-eval task files"
        )
    return absolute_source(path)


def _tasks(config: RunConfig) -> list[dict[str, TaskQuestions]]:
    """Load the questions of `search.tasks` and of `evaluate.tasks`, by task."""
    search = config.search
    evaluate = config.evaluate
    folder = include_path(config)

    def scoring() -> dict[str, TaskQuestions]:
        if not search.tasks:
            return {}
        return task_questions(
            search.tasks, folder, "search.tasks", search.num_questions, search.named_metric
        )

    def testing() -> dict[str, TaskQuestions]:
        return task_questions(evaluate.tasks, folder, "evaluate.tasks", evaluate.limit)

    tasks = together(scoring, testing)
    if search.by_accuracy and search.limit is not None:
        for name, task in tasks[0].items():
            if len(task.texts) < 2 * search.limit:
                raise UserError(
                    "`search.limit` must be at most half of the questions of a task, because "
                    f"equally many others choose the winner; {name} has {len(task.texts)}, got "
                    f"{search.limit}; lower it to {len(task.texts) // 2}"
                )
    return tasks


def check_encoding(config: RunConfig, examples: dict[str, list[Example]]) -> None:
    """Raise an error if the tokenizer cannot encode the rows or the calibration text is too short.

    The tokenizer of a .gguf file takes 15 s to convert, so only `prepare` checks it.
    """
    source = check_source(config.model)
    if source.endswith(".gguf"):
        return
    try:
        tokenizer = load_tokenizer(source, config.model)
    except Exception as error:  # broken tokenizer files raise many types of errors
        reason = first_line(error)
        raise UserError(
            f"`model.source`: no tokenizer can be loaded from {source}: {reason}; "
            "name a model with a tokenizer"
        ) from error
    check = partial(
        encode,
        tokenizer=tokenizer,
        max_length=config.data.max_length,
        template=config.data.template,
        response_only=config.data.response_only,
    )
    for rows in examples.values():
        # Encode a few rows of each format, or all rows if none of these fits.
        sample = [*rows[:64], *{row.format: row for row in rows}.values()]
        try:
            check(sample)
        except UserError:
            check(rows)
    importance_samples(config, examples["calibration"], tokenizer)
    sensitivity_samples(config, examples["train"], tokenizer)
