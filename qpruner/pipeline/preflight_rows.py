"""Check the rows of a run before it begins: they exist, no two uses share any, and they can be encoded."""

from __future__ import annotations

import math
from collections import Counter
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

CHARACTERS_A_TOKEN = 4
"""About, in English."""
ALPACA_TOKENS, QUESTION_TOKENS = 40, 4
"""Of the template around an instruction, and around a question."""
TEMPLATE_END = 8
"""Tokens that a template puts behind a response at most."""
SPLITS = ("train", "validation", "confirmation")
MOST_LOST = 0.05
"""Share of rows that may lose all of their response without a word. Rows that lose their ends alone are counted by
`check`: cut at 256 tokens, as published, 9 of 102 rows of cleaned Alpaca do."""
FEW_TOKENS = 500
"""A mean loss over fewer is mostly about which rows they are: on 143 (64 questions) eight bits came out behind four
(LOG.md, 2026-11-27)."""
FEW_QUESTIONS = 40
"""An accuracy over fewer has a standard error of up to 0.08 and more, beyond most differences between plans."""
LONGEST_HEADING = 5
"""Words of a line that may stand in two texts."""


@dataclass(frozen=True)
class Rows:
    """Rows by split; questions, and the metrics that score them, by use.

    Questions score trials (`search`), choose the winner (`fresh`) or test models (`evaluate`).
    """

    examples: dict[str, list[Example]]
    questions: dict[str, list[str]]
    num_questions: dict[str, dict[str, int]]
    """By use (`search`, `fresh`, `test`) and task."""
    metrics: dict[str, dict[str, str]]
    warnings: tuple[str, ...]


def check_rows(config: RunConfig) -> Rows:
    """Read every row and question that the run will use."""
    loaded: tuple[dict[str, list[Example]], list[str]]
    tasks: dict[str, dict[str, TaskQuestions]]
    loaded, tasks = together(lambda: _load_splits(config), lambda: _tasks(config))
    examples, left_out = loaded
    limit = config.search.limit
    asked = {
        "search": {name: task.texts[:limit] for name, task in tasks["search"].items()},
        "fresh": {name: task.texts[limit:] for name, task in tasks["search"].items() if config.search.by_accuracy},
        "evaluate": {name: task.texts for name, task in tasks["evaluate"].items()},
    }
    words = {use: [normalized(text) for texts in asked[use].values() for text in texts] for use in asked}
    _check_overlap(config, examples, words)
    uses = {"search": "search", "fresh": "fresh", "evaluate": "test"}
    numbers = {name: {task: len(texts) for task, texts in asked[use].items()} for use, name in uses.items()}
    doubtful = (*_remarks_on_splits(config, examples), *_few_tokens(config, examples), *_few_questions(words))
    if shared := set(words["search"]) & set(words["fresh"]):
        left_out.append(
            f"`search.tasks` repeat {counted(len(shared), 'question')}, such as {min(shared)[:90]!r}, which the trials "
            "are asked and the winner is chosen by: another `search.limit` parts them elsewhere"
        )
    metrics = {use: {name: task.metric for name, task in of_use.items()} for use, of_use in tasks.items()}
    return Rows(examples, words, numbers, metrics, (*left_out, *doubtful))


def _load_splits(config: RunConfig) -> tuple[dict[str, list[Example]], list[str]]:
    """Load rows by split, with a sentence on those that are left out."""
    sources = {name: (getattr(config.data, name), f"data.{name}") for name in SPLITS}
    sources["calibration"] = (config.calibration.data, "calibration.data")
    sources["text"] = (config.evaluate.text, "evaluate.text")
    given = {name: each for name, each in sources.items() if each[0]}
    loaded = together(*(partial(load_examples, *each) for each in given.values()))
    examples: dict[str, list[Example]] = dict(zip(given, loaded, strict=True))
    examples.setdefault("calibration", examples["train"])
    examples["confirmation"], left_out = _without_repeats(examples["confirmation"])
    if len(examples["confirmation"]) < 2:
        raise UserError(
            "`data.confirmation` must have at least 2 rows that differ, one to choose the winner by and one to judge "
            "it by, got 1: name a source that has more, or raise its `limit`"
        )
    return examples, left_out


def _without_repeats(rows: list[Example]) -> tuple[list[Example], list[str]]:
    """Drop repeated confirmation rows: every other one chooses, and a repeated one might judge as well."""
    different: dict[str | int, Example] = {}
    for position, row in enumerate(rows):
        different.setdefault(row.identity or position, row)
    if len(different) == len(rows):
        return rows, []
    [(again, _)] = Counter(row.identity for row in rows if row.identity).most_common(1)
    return list(different.values()), [
        f"{counted(len(rows) - len(different), 'row')} of `data.confirmation` left out, since the same row stands "
        f"there before, such as {again[:90]!r}: none may both choose the winner and judge it"
    ]


def _remarks_on_splits(config: RunConfig, examples: dict[str, list[Example]]) -> Iterator[str]:
    """Warn of rows without an answer, and of prompts that leave no room for one, by about how many tokens they have."""
    longest = config.data.max_length
    for split in SPLITS:
        rows = examples[split]
        empty = [row for row in rows if row.format != "text" and not row.response.strip()]
        if empty:
            yield (
                f"{counted(len(empty), 'row')} of `data.{split}` of {len(rows)} have no response, such as "
                f"{empty[0].prompt[:90]!r}: they teach to say nothing; fill them or leave them out"
            )
        lost = sum(about_tokens(row)[0] >= longest for row in rows)
        if lost > MOST_LOST * len(rows):
            yield (
                f"about {lost} of {counted(len(rows), 'row')} of `data.{split}` lose all of their response: their "
                f"prompts have `data.max_length` of {longest} tokens or more; make it longer"
            )


def num_cut(rows: list[Example], longest: int) -> int:
    """Estimate how many rows have more tokens than this and lose their ends."""
    return sum(sum(about_tokens(row)) > longest for row in rows)


def about_tokens(row: Example) -> tuple[int, int]:
    """Estimate the tokens of a row's prompt, with its template, and of its response."""
    template = {"instruction": ALPACA_TOKENS, "multiple_choice": QUESTION_TOKENS}.get(row.format, 0)
    return template + _tokens_of(f"{row.prompt}{row.context}"), _tokens_of(row.response)


def about_labelled(row: Example, data: DataConfig) -> int:
    """Estimate how many tokens of a row have a label."""
    prompt, response = about_tokens(row)
    return max(0, min(prompt + response, data.max_length) - (prompt if data.response_only else 0))


def most_labelled(rows: Sequence[Example] | None, data: DataConfig) -> int:
    """Return how many tokens of a row have a label at most, in a language of twice the tokens of English.

    Where the rows are not known, are packed or are labelled throughout, all tokens may have one.
    """
    if not rows or data.packing or not data.response_only:
        return data.max_length
    return min(data.max_length, TEMPLATE_END + 2 * max(about_tokens(row)[1] for row in rows))


def _few_tokens(config: RunConfig, examples: dict[str, list[Example]]) -> Iterator[str]:
    """Warn that losses are means over too few tokens to tell plans apart; every other confirmation row chooses."""
    if config.search.metric != "loss" or not config.is_searched:
        return
    # The smaller half judges the winner.
    uses = {
        "`data.validation` scores the trials": examples["validation"],
        "half of `data.confirmation` chooses the winner, and half judges it,": examples["confirmation"][1::2],
    }
    for use, rows in uses.items():
        tokens = sum(about_labelled(row, config.data) for row in rows)
        if tokens < FEW_TOKENS:
            yield (
                f"{use} on about {tokens} tokens of {counted(len(rows), 'row')}: too few to tell plans apart; give "
                f"{FEW_TOKENS} tokens at least, by more rows or by rows with longer responses"
            )


def _few_questions(words: dict[str, list[str]]) -> Iterator[str]:
    """Warn that accuracies are over too few questions to tell models apart."""
    uses = {"search": "`search.tasks` score the trials", "evaluate": "`evaluate.tasks` test the models"}
    for section, use in uses.items():
        asked = len(words[section])
        if 0 < asked < FEW_QUESTIONS:
            yield (
                f"{use} on {counted(asked, 'question')}: an accuracy over so few has a standard error of up to "
                f"{0.5 / math.sqrt(asked):.2f}; ask {FEW_QUESTIONS} at least: a higher `{section}.limit`, or more tasks"
            )


def _tokens_of(text: str) -> int:
    """Estimate the tokens of a text; letters of other scripts than the Latin one are tokens of their own."""
    num_latin = len(text.encode("ascii", "ignore"))
    return len(text) - num_latin + num_latin // CHARACTERS_A_TOKEN


def _check_overlap(config: RunConfig, examples: dict[str, list[Example]], words: dict[str, list[str]]) -> None:
    """Refuse rows that teach and measure, or that choose and judge."""
    identities = {f"`data.{name}`": [row.identity for row in examples[name]] for name in SPLITS}
    # Trials may be scored on the same questions twice, as loss and as accuracy: both are validation.
    identities["`evaluate.tasks`"] = words["evaluate"]
    check_disjoint(identities)
    others = {name: rows for name, rows in identities.items() if name != "`data.validation`"}
    check_disjoint({"`search.tasks`": [*words["search"], *words["fresh"]], **others})
    if config.calibration.data:
        rows = [row.identity for row in examples["calibration"]]
        for name in ("`data.validation`", "`data.confirmation`", "`evaluate.tasks`"):
            check_disjoint({"`calibration.data`": rows, name: identities[name]})
    # Headings come again in any text.
    text = [row.identity for row in examples.get("text", ()) if len(row.identity.split()) > LONGEST_HEADING]
    for name in SPLITS:
        check_disjoint({f"`data.{name}`": identities[f"`data.{name}`"], "`evaluate.text`": text})


def include_path(config: RunConfig) -> str | None:
    """Return the absolute path of the folder of further lm-eval tasks."""
    source = config.evaluate.include_path
    if source is None:
        return None
    path = resolve_source(source, "evaluate.include_path")
    if not Path(path).is_dir():
        state = "is a file" if Path(path).exists() else "does not exist"
        raise UserError(
            f"`evaluate.include_path`: {Path(path).absolute()} {state}; name a folder of lm-eval task files"
        )
    return absolute_source(path)


def _tasks(config: RunConfig) -> dict[str, dict[str, TaskQuestions]]:
    """Load the tasks of `search` and of `evaluate` with the questions that the run uses."""
    search, evaluate, folder = config.search, config.evaluate, include_path(config)
    loads = {}
    if search.tasks:
        wanted = (search.num_questions, search.named_metric)
        loads["search"] = partial(task_questions, search.tasks, folder, "search.tasks", *wanted)
    loads["evaluate"] = partial(task_questions, evaluate.tasks, folder, "evaluate.tasks", evaluate.limit)
    found: dict[str, dict[str, TaskQuestions]] = {"search": {}}
    found |= zip(loads, together(*loads.values()), strict=True)
    for name, task in found["search"].items() if search.by_accuracy else ():
        if search.limit is not None and len(task.texts) < 2 * search.limit:
            raise UserError(
                f"`search.limit` must leave as many questions of every task again to choose the winner by: {name} has "
                f"{len(task.texts)}, got {search.limit}; lower it to {len(task.texts) // 2} or less"
            )
    return found


def check_encoding(config: RunConfig, examples: dict[str, list[Example]], vocabulary: int) -> None:
    """Refuse a tokenizer that cannot write the rows, and calibration text that is too short.

    A .gguf file's tokenizer takes 15 s to convert: that is left to `prepare`.
    """
    source, settings = check_source(config.model), config.data
    if source.endswith(".gguf"):
        return
    try:
        tokenizer = load_tokenizer(source, config.model)
    except Exception as error:  # missing and broken tokenizer files raise many types
        reason = first_line(error)
        raise UserError(
            f"`model.source`: no tokenizer can be loaded from {source}: {reason}; put the model's tokenizer files there"
        ) from error
    for rows in examples.values():
        # The first rows and one of each format are enough, unless all of them are too long.
        sample = [*rows[:64], *{row.format: row for row in rows}.values()]
        try:
            encode(sample, tokenizer, settings.max_length, settings.template, settings.response_only)
        except UserError:
            encode(rows, tokenizer, settings.max_length, settings.template, settings.response_only)
    importance_samples(config, examples["calibration"], vocabulary, tokenizer)
    sensitivity_samples(config, examples["train"], tokenizer)
