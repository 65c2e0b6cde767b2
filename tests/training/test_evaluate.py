"""Scores of real lm-eval tasks: which metrics are recorded, and which metric tables and searches
use."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qpruner.config.schema import EvaluateConfig
from qpruner.errors import UserError
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.runs.records import TaskScore
from qpruner.training.evaluate import score_tasks, task_questions

NUM_QUESTIONS = 24
ROWS = f'''
import datasets

def load(**_):
    """Make questions whose long first choice is right in two of three, \
so that acc and acc_norm differ."""
    rows = [
        {{"question": f"What is {{n}}?", "choices": [f"the one that comes after {{n - 1}}", str(n)],
          "answer": int(n % 3 == 0), "text": "[invalid]"}}
        for n in range({NUM_QUESTIONS})
    ]
    return {{"test": datasets.Dataset.from_list(rows)}}
'''
HEAD = """
custom_dataset: !function rows.load
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
"""
CHOICES = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
WRITTEN = """
output_type: generate_until
doc_to_target: text
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "the answer is (.*)"}, {function: take_first}]
  - name: whole
    filter: [{function: take_first}]
"""
TASKS = {
    "toy_acc": (CHOICES, ("acc",)),
    "toy_both": (CHOICES, ("acc", "acc_norm", "brier_score")),
    "toy_norm": (CHOICES, ("acc_norm",)),
    "toy_written": (WRITTEN, ("exact_match",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a folder of tasks that ask the same questions and report different metrics."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "rows.py").write_text(ROWS)
    for task, (kind, metrics) in TASKS.items():
        listed = "".join(f"  - metric: {metric}\n" for metric in metrics)
        (made / f"{task}.yaml").write_text(f"task: {task}{HEAD}{kind}metric_list:\n{listed}")
    return str(made)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> tuple[Any, Any]:
    return load_dense(str(tiny_model), "float32"), load_tokenizer(str(tiny_model))


def scores_of(
    model: tuple[Any, Any], folder: str, *tasks: str, limit: int | None = None, **options: Any
) -> dict[str, TaskScore]:
    settings = EvaluateConfig(tasks=tasks, include_path=folder, batch_size=8)
    scores = score_tasks(*model, tasks, settings, limit, **options)
    return {score.task: score for score in scores}


@pytest.fixture(scope="module")
def positions(model: tuple[Any, Any]) -> list[int]:
    """Collect, for each pass, the number of tokens for which the model's head ran."""
    counts: list[int] = []
    model[0].get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: counts.append(inputs[0][..., 0].numel())
    )
    return counts


@pytest.fixture(scope="module")
def scores(model: tuple[Any, Any], folder: str) -> dict[str, TaskScore]:
    return scores_of(model, folder, *TASKS)


def likelihoods(model: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Compute log-likelihoods ``(questions, choices)`` by lm-eval's own model, and the lengths of
    choices."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    space: dict[str, Any] = {}
    exec(ROWS, space)
    rows = space["load"]()["test"]
    requests = [
        Instance("loglikelihood", {}, (f"Question: {row['question']}\nAnswer:", f" {choice}"), 0)
        for row in rows
        for choice in row["choices"]
    ]
    lm = HFLM(pretrained=model[0], tokenizer=model[1], batch_size=8, softmax_dtype="float32")
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    lengths = np.array([[len(choice) for choice in row["choices"]] for row in rows])
    return np.array([value for value, _ in answers]).reshape(lengths.shape), lengths


def test_tables_prefer_acc_norm_and_know_acc(
    model: tuple[Any, Any], folder: str, positions: list[int], scores: dict[str, TaskScore]
) -> None:
    """Scores equal those of lm-eval's own model, which also computes the logits of all question
    tokens."""
    positions.clear()
    scores_of(model, folder, "toy_acc")
    num_ours = sum(positions)
    positions.clear()
    likelihood, lengths = likelihoods(model)
    assert num_ours < 0.8 * sum(positions)
    right = (np.arange(NUM_QUESTIONS) % 3 == 0).astype(int)
    acc = likelihood.argmax(axis=1) == right
    acc_norm = (likelihood / lengths).argmax(axis=1) == right
    assert acc.mean() != acc_norm.mean(), "else the test could not tell them apart"
    both = scores["toy_both"]
    assert both.metric == "acc_norm"
    assert both.correct == tuple(acc_norm)
    assert both.value == acc_norm.mean()
    assert both.stderr == pytest.approx(acc_norm.std(ddof=1) / math.sqrt(NUM_QUESTIONS))
    assert scores["toy_acc"].value == acc.mean()
    losses = -likelihood[range(NUM_QUESTIONS), right]
    assert both.answer_loss == scores["toy_acc"].answer_loss == pytest.approx(losses, rel=1e-5)
    assert scores["toy_norm"].metric == "acc_norm"
    assert scores["toy_norm"].correct == both.correct


def test_answers_that_a_task_filters_count_once(scores: dict[str, TaskScore]) -> None:
    """lm-eval logs a question once for each filter; the first filter counts."""
    written = scores["toy_written"]
    assert written.metric == "exact_match,strict"
    assert written.value == 1.0
    assert written.num_questions == NUM_QUESTIONS


@pytest.mark.parametrize(("asked", "metric"), [("acc", "acc"), (None, "acc_norm")])
def test_a_search_may_name_its_metric(
    asked: str | None, metric: str, model: tuple[Any, Any], folder: str
) -> None:
    scores = scores_of(model, folder, "toy_both", metric=asked, limit=6, skip=6)
    assert scores["toy_both"].metric == metric
    questions = task_questions(["toy_both"], folder, "search.tasks", 6, asked)
    assert questions["toy_both"].metric == metric


def test_a_metric_that_a_task_does_not_report_is_refused(folder: str) -> None:
    message = "`search.metric` .*`search.tasks` .*got acc_norm, but `toy_acc` reports acc: set one"
    with pytest.raises(UserError, match=message):
        task_questions(["toy_both", "toy_acc"], folder, "search.tasks", 6, "acc_norm")
