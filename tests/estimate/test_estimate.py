"""What `qpruner check` says that a run will take: against what autograd keeps, what ASHA does, what a row took."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import raw_config, with_key

from qpruner import estimate
from qpruner.cli.main import main
from qpruner.config.schema import LoraConfig, PruneConfig, RunConfig, TrainingConfig, validate_config
from qpruner.data.rows import encode
from qpruner.errors import UserError
from qpruner.estimate import memory, work
from qpruner.models.cpu import has_bfloat16
from qpruner.models.layout import layout_of
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline import preflight, run
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import most_labelled
from qpruner.pruning.best_cut import Cut
from qpruner.quantization.assembly import attach_adapters
from qpruner.runs.lock import hold_run
from qpruner.training.finetune import Share, _Batches

RATES = work.Rates(1e12, 2e12, "made up")


@pytest.fixture(scope="module")
def raw(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return raw_config(tiny_model, tmp_path_factory.mktemp("estimate") / "run")


@pytest.fixture(scope="module")
def inspection(raw: dict[str, Any]) -> Inspection:
    return preflight.inspect(validate_config(raw))


@pytest.fixture
def changed(raw: dict[str, Any]) -> Callable[..., RunConfig]:
    """The configuration with other keys; `section__key=value`."""

    def change(**keys: Any) -> RunConfig:
        config = raw
        for key, value in keys.items():
            config = with_key(config, key.replace("__", "."), value)
        return validate_config(config)

    return change


def inspected(config: RunConfig, inspection: Inspection) -> tuple[RunConfig, Inspection]:
    """A configuration with what an inspection would be under its settings of the cut."""
    return config, replace(
        inspection,
        cuts=(Cut(config.prune, inspection.cuts[0].expected),),
        counts=replace(inspection.counts, sample_length=config.calibration.max_length),
    )


# ---- memory


def kept_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """What autograd keeps for the backward pass, without the weights."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_activations_are_near_to_what_autograd_keeps(family: str) -> None:
    """Attention in float32, on a CPU without bfloat16 instructions, is not counted."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapted = attach_adapters(model, {}, LoraConfig(rank=8), "block", seed=0).train()
    ids = torch.randint(0, 512, (2, 64))
    own = layout_of(config, "block", 2, False, 8)
    found = memory.activation_bytes(own, config.hidden_size, ids.numel(), 8, checkpointing=False)
    assert found == pytest.approx(kept_bytes(adapted, ids), rel=0.15 if has_bfloat16() else 0.25)


def test_memory_grows_with_what_it_is_made_of(inspection: Inspection, changed: Callable[..., RunConfig]) -> None:
    before = memory.training_memory(changed(), inspection)
    longer = memory.training_memory(changed(data__max_length=128), inspection)
    assert longer.parts["activations"] == 2 * before.parts["activations"]
    assert longer.parts["optimizer"] == 2 * before.parts["adapters"] == 2 * inspection.pruned.adapter_bytes
    assert before.parts["weights"] + before.parts["adapters"] == inspection.budget_bytes
    thrifty = memory.training_memory(changed(training__gradient_checkpointing=True), inspection)
    assert thrifty.parts["activations"] < before.parts["activations"]
    wide = memory.scoring_memory(changed(evaluate__batch_size=32), inspection)
    assert wide.parts["logits"] == 4 * memory.scoring_memory(changed(), inspection).parts["logits"]
    assert wide.total == sum(wide.parts.values())


def test_logits_are_counted_at_as_many_tokens_as_can_be_labelled(
    inspection: Inspection, changed: Callable[..., RunConfig], tiny_model: Path
) -> None:
    """No row has more, however short its tokens; where its rows are packed or unknown, each may have full length."""
    config, tokenizer = changed(), load_tokenizer(str(tiny_model))
    for rows in inspection.examples.values():
        encoded = encode(rows, tokenizer, 64, config.data.template, response_only=True)
        longest = max(sum(label != -100 for label in row["labels"]) for row in encoded)
        assert longest <= most_labelled(rows, config.data) < 64
    every = {"training": 12 * 4 * 64 * 512, "scoring": (2 + 8) * 8 * 64 * 512}

    def logits(found: Inspection, **keys: Any) -> dict[str, int]:
        works = {"training": memory.training_memory, "scoring": memory.scoring_memory}
        return {name: work(changed(**keys), found).parts["logits"] for name, work in works.items()}

    assert all(size < every[name] for name, size in logits(inspection).items())
    assert every == logits(inspection, data__response_only=False) == logits(inspection, data__packing=True)
    assert every == logits(replace(inspection, examples={}))
    tasks = {"metric": "accuracy", "tasks": ["qpruner_everyday_validation"], "limit": 4}
    by_questions = logits(inspection, search=changed().search.model_dump(exclude_unset=True) | tasks)
    assert by_questions == logits(inspection) | {"scoring": every["scoring"]}, "lm-eval pads answers"


def test_the_comparison_trains_the_base_model_at_16_bits(
    inspection: Inspection, changed: Callable[..., RunConfig]
) -> None:
    config = changed()
    found = estimate.facts(config, inspection, RATES, 2, {}, 0.5)
    parts = found["memory"]["comparison"]["parts"]
    assert parts["weights"] == inspection.base.num_parameters * 2
    assert parts["adapters"] == inspection.base.adapter_bytes > inspection.pruned.adapter_bytes
    assert parts["activations"] > memory.training_memory(config, inspection).parts["activations"]
    most = max(each["total"] for name, each in found["memory"].items() if name.startswith(("trial", "comparison")))
    assert found["memory_at_once"] >= 2 * most, "two slots share a GPU"
    assert "comparison" not in estimate.works(changed(finetune={"steps": 4}))


@pytest.fixture
def cut(inspection: Inspection, changed: Callable[..., RunConfig]) -> Callable[..., memory.Memory]:
    """The cut's peak with other keys."""
    return lambda **keys: memory.prune_memory(*inspected(changed(**keys), inspection))


def test_importance_without_gradients_needs_no_activations(
    inspection: Inspection, changed: Callable[..., RunConfig], cut: Callable[..., memory.Memory]
) -> None:
    by_gradient, by_weights = cut(), cut(prune__importance="magnitude")
    assert by_weights.total < by_gradient.total
    assert "logits" in by_gradient.parts and "logits" not in by_weights.parts

    def by_blocks(criterion: str) -> memory.Memory:
        settings = {"prune__units": ["block"], "prune__rate": 0.5, "prune__depth_importance": criterion}
        return cut(**settings, prune__compensation="none")

    assert "logits" not in by_blocks("block_influence").parts
    assert "logits" in by_blocks("taylor").parts
    assert set(cut(prune__rate=0.0).parts) == {"weights"}, "nothing is cut"


def test_each_sensitivity_counts_what_its_passes_hold(
    inspection: Inspection, changed: Callable[..., RunConfig]
) -> None:
    """What they hold in truth: tests/sensitivity/test_memory.py."""

    def of(*methods: str, rows: int = 4, vocabulary: int = 512) -> memory.Memory:
        config = changed(sensitivity__methods=methods, sensitivity__batch_size=rows, evaluate__batch_size=64)
        own = copy.deepcopy(inspection.model_config)
        own.vocab_size = vocabulary
        return memory.sensitivity_memory(config, replace(inspection, model_config=own))

    assert of("kl").about == "passes of 4 rows x 64 tokens (`sensitivity.batch_size`)"
    assert of("kl", rows=8).parts["block outputs"] == 2 * of("kl").parts["block outputs"] == 2 * 2 * 4 * 64 * 64 * 2
    assert of("fisher").parts["logits"] == 12 * 4 * 64 * 512
    words = 152_000
    assert of("kl", vocabulary=words).parts["log-probabilities"] == (4 + 2 + 16) * 4 * 64 * words
    assert of("kl", rows=64, vocabulary=words).parts["log-probabilities"] == (2 + 4 + 4) * 64 * 64 * words
    several = of("mutual_information", "fisher", "kl")
    assert several.total == max(of(method).total for method in ("mutual_information", "fisher", "kl"))
    assert set(of().parts) == {"weights"}


def test_a_cut_counts_what_is_held_of_all_samples_and_of_every_weight(
    inspection: Inspection, cut: Callable[..., memory.Memory]
) -> None:
    """Compensation comes after importance: the larger of the two is the peak."""
    samples = inspection.counts.samples["importance"]
    by_weights = {"prune__importance": "magnitude", "calibration__max_length": 48}
    solved = cut(**by_weights, prune__compensation="least_squares")
    assert solved.parts["hidden states"] == samples * 48 * (64 * 2 + 48)
    assert solved.parts["Gram matrix"] == 2 * 4 * 256**2
    assert solved.parts["solution"] == 3 * 4 * 64 * 256
    assert "hidden states" not in cut(**by_weights, prune__compensation="none").parts
    first, mixed, vector = (
        cut(prune__importance="taylor", **keys)
        for keys in ({}, {"prune__order": "mixed"}, {"prune__order": "mixed", "prune__aggregation": "vector"})
    )
    linears = sum(group.num_weights for group in inspection.base.groups)
    assert mixed.parts["mean squares"] == 4 * linears
    assert "mean squares" not in first.parts | vector.parts


# ---- time


def test_stops_are_those_of_asha(changed: Callable[..., RunConfig]) -> None:
    """Trials one after another, each going on where it is among the best half so far: a few more than the shares."""
    config = changed(search__max_trials=400, search__steps=16, search__first_rung=2, sensitivity__methods=[])
    generator, seen, steps = np.random.default_rng(0), {rung: [] for rung in config.search.rungs}, 16.0
    for score in generator.random(399):
        for rung in config.search.rungs:
            seen[rung].append(score)
            if rung == 16 or score > np.quantile(seen[rung], 0.5):
                steps += rung
                break
    expected = work.expected_steps(config).steps
    assert expected <= steps <= 1.25 * expected
    assert expected < 400 * 16 / 2


def test_every_trial_that_is_a_control_runs_to_its_end(changed: Callable[..., RunConfig]) -> None:
    config = changed(search__max_trials=3)
    assert work.expected_steps(config).steps == 3 * config.search.steps
    assert work.expected_steps(config).rungs == 3 * len(config.search.rungs)


def test_hours_follow_what_is_asked_for(inspection: Inspection, changed: Callable[..., RunConfig]) -> None:
    def of(rates: work.Rates = RATES, slots: int = 1, **keys: Any) -> work.Hours:
        return work.hours(*inspected(changed(search__max_trials=40, **keys), inspection), rates, slots)

    once = of()
    assert once.total < once.at_most, "ASHA spares something"
    assert once.wall == pytest.approx(once.total)
    assert of(work.Rates(2e12, 4e12, "")).total == pytest.approx(once.total / 2)
    assert of(slots=4).wall < once.wall and of(slots=4).total == once.total
    alone = {"finetune": {"steps": 4, "compare": False}, "training__micro_batch_size": 1}
    shared = alone | {"finetune": {"steps": 4, "compare": False, "num_workers": 4}}
    assert of(slots=4, **shared).wall < of(slots=4, **alone).wall, "one row on four workers"
    assert of(slots=4, **shared).total == of(slots=4, **alone).total
    longer = of(finetune__steps=8)
    assert longer.stages["finetune"] > once.stages["finetune"]
    assert {name for name in once.stages if longer.stages[name] != once.stages[name]} == {*("finetune", "comparison")}
    assert of(prune__rate=0).stages["prune"] == 0

    def with_blocks(**keys: Any) -> float:
        return of(prune__units=["block", "mlp"], **keys).stages["prune"]

    units = once.stages["prune"]
    assert units < with_blocks() < with_blocks(prune__depth_importance="taylor"), (
        "blocks are ranked and made up for, too"
    )
    assert with_blocks(prune__compensation="none") == pytest.approx(units * (6 + 2) / (6 + 4)), (
        "Fisher, and a pass forward"
    )
    half = work.hours(changed(search__max_trials=40), inspection, RATES, 2, {"prune": 1.0, "search": 0.5})
    assert half.done == pytest.approx(half.stages["prune"] + half.stages["search"] / 2)
    assert half.wall - half.wall_left == pytest.approx(half.stages["prune"] + half.stages["search"] / 4)
    assert once.done == 0 and once.wall_left == once.wall
    fewer = of(sensitivity__methods=["mutual_information", "fisher"])
    assert fewer.stages["sensitivity"] < once.stages["sensitivity"], "KL and loss take most of it"


def test_padding_is_that_of_the_micro_batches() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 0.7, 75).astype(int).tolist()
    dealt = list(_Batches(lengths, TrainingConfig(batch_size=16, micro_batch_size=4), 0, Share(0, 1)))
    in_order = [lengths[row] for micro_batch in dealt for row in micro_batch]
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in dealt)
    assert work._padded(in_order, 16, 4) == pytest.approx(padded / 75)
    assert sum(lengths) < padded < 1.3 * sum(lengths)


def test_the_head_is_counted_at_labelled_tokens(inspection: Inspection, changed: Callable[..., RunConfig]) -> None:
    """Prompts are not predicted unless `data.response_only` is false; a rate that was timed so is counted so, too."""
    answers, all_tokens = changed(), changed(data__response_only=False)
    some, every = (work.hours(config, inspection, RATES, 1).stages["finetune"] for config in (answers, all_tokens))
    head = inspection.model_config.vocab_size * inspection.model_config.hidden_size
    whole = inspection.pruned.num_parameters
    assert work.share_labelled(all_tokens, inspection) == 1
    assert 0 < work.share_labelled(answers, inspection) < 0.5
    assert (whole - head) / whole < some / every < 1 - head / whole / 2
    timed = [work.measured_rates(config, inspection, 1.0, 0.5, "here") for config in (answers, all_tokens)]
    assert timed[0].training / timed[1].training == timed[0].scoring / timed[1].scoring
    assert timed[0].training / timed[1].training == pytest.approx(some / every, rel=0.1)


def test_the_comparison_is_told_whether_or_not_it_is_asked_for(
    inspection: Inspection, changed: Callable[..., RunConfig]
) -> None:
    """It is a fine-tune and its scores for each row and seed but the winner's first, which no comparison changes."""

    def of(**keys: Any) -> work.Hours:
        return work.hours(changed(**keys), inspection, RATES, 2)

    asked, alone = of(), of(finetune={"steps": 4})
    assert "comparison" not in alone.stages and asked.stages["comparison"] == asked.comparison == alone.comparison
    assert asked.total == pytest.approx(alone.total + alone.comparison)
    assert asked.wall == pytest.approx(alone.wall + alone.comparison / 2), "on both slots"
    assert {name: hours for name, hours in asked.stages.items() if name != "comparison"} == alone.stages
    one = alone.stages["finetune"] + alone.stages["evaluate"] / (1 + work.UNTUNED)
    assert asked.comparison == pytest.approx(work.num_compared(changed()) * one)
    fewer = of(finetune={"steps": 4, "compare": True, "seeds": 1, "random_plans": 1})
    assert fewer.comparison == pytest.approx(asked.comparison - 12 * one), "two seeds of winner, best seed and 4 plans"


def test_check_tells_the_comparisons_share_of_the_hours(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    lines, facts = {}, {}
    for compare in ("true", "false"):
        options = ["--gpu", "A100", "--set", f"finetune.compare={compare}"]
        *text, last = CliRunner().invoke(main, ["check", "config.yaml", "--json", *options]).stdout.splitlines()
        facts[compare] = json.loads(last)
        [lines[compare]] = [line for line in text if line.startswith("comparison:  ")]
    hours, number = facts["true"]["hours"], facts["true"]["num_compared"]
    share = hours["stages"]["comparison"] / hours["total"]
    assert lines["true"].startswith(f"comparison:  {share:.0%} of the GPU time, ")
    assert lines["true"].endswith(f": {number} fine-tunes, after the winner's report")
    assert lines["false"].startswith(f"comparison:  off; `finetune.compare=true` would add {number} fine-tunes, ")
    assert facts["false"]["hours"]["comparison"] == hours["comparison"]


def test_check_counts_what_is_no_warning(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trials than unknowns (two blocks of four projections at two levels are eight), and rows that are cut."""
    monkeypatch.chdir(tmp_path)
    said = []
    for trials, longest in ((8, 800), (7, 256)):
        changed = with_key(with_key(raw, "search.max_trials", trials), "data.max_length", longest)
        changed = with_key(changed, "data.validation", [{"source": "rows.jsonl", "format": "text"}])
        Path("rows.jsonl").write_text("".join(f'{{"text": "{number} {"word " * 400}"}}\n' for number in range(3)))
        Path("config.yaml").write_text(yaml.safe_dump(with_key(changed, "sensitivity.methods", ["fisher"])))
        said.append(CliRunner().invoke(main, ["check", "config.yaml", "--gpu", "A100"]).output)
        assert not re.search(r"warning:.*(values to estimate|lose their ends)", said[-1])
    enough, few = said
    assert "The configuration is valid" in enough and "to estimate" not in enough and "lose their ends" not in enough
    assert "; fewer than the 8 values to estimate, so the sensitivities guide the search" in few
    unmeasured = ["check", "config.yaml", "--gpu", "A100", "--set", "sensitivity={methods: []}"]
    text = CliRunner().invoke(main, unmeasured).output
    assert "The configuration is valid" in text and "values to estimate" not in text and "guide" not in text
    assert "; about 3 validation lose their ends (`data.max_length` 256)" in few


def test_the_bank_is_told_by_packing_and_by_the_starts_of_its_workers(
    inspection: Inspection, changed: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bank(slots: int = 2, packing: float | None = 1e9, has_gpus: bool = False) -> float:
        rates = work.Rates(1e12, 2e12, "made up", packing)
        return work.hours(changed(), inspection, rates, slots, has_gpus=has_gpus).stages["bank"] * 3600

    small = bank()
    assert small == pytest.approx(2 * bank(packing=2e9)) == pytest.approx(2000 * bank(packing=None))
    monkeypatch.setattr("qpruner.quantization.bank.FEW_WEIGHTS", 0)
    assert bank() == pytest.approx(small + 2 * work.START_SECONDS)
    assert bank(slots=1) == bank(has_gpus=True) == small, "no worker is started, or its start is not what counts"


@pytest.mark.parametrize(("load", "is_busy"), [(9.3, True), (0.2, False)])
def test_check_says_that_the_machine_is_busy(
    load: float, is_busy: bool, raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    said = CliRunner().invoke(main, ["check", "config.yaml"]).stdout
    line = "    this machine is busy (load 9.3 on 2 cores): all but the bank is told as if it were free"
    assert "estimated by" in said and (line in said) == is_busy
    assert "busy (load" not in CliRunner().invoke(main, ["check", "config.yaml", "--gpu", "A100"]).stdout


@pytest.mark.parametrize(("gpus", "pace"), [(0.5, 0.5), (1.0, 1.0), (2.0, 1.0)])
def test_gpu_hours_count_what_a_trial_holds(
    gpus: float, pace: float, inspection: Inspection, raw: dict[str, Any]
) -> None:
    """Half a GPU is half as fast, two are paid for and no faster."""
    done = {"prune": 1.0}
    config = validate_config(raw)
    slot = work.hours(config, inspection, RATES, 2, done, has_gpus=True)
    told = estimate.facts(config, inspection, RATES, 2, done, gpus)["hours"]
    assert told["wall"] == pytest.approx(slot.wall / pace)
    for name in ("total", "done", "at_most"):
        assert told[name] == pytest.approx(getattr(slot, name) * gpus / pace), name
    assert sum(told["stages"].values()) == pytest.approx(told["total"])
    assert ("0.5 of a GPU a slot" in told["rates"]) == (gpus < 1)


def test_check_tells_memory_hours_and_what_was_assumed(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(main, ["check", "config.yaml", "--json", "--gpu", "A100"])
    assert done.exit_code == 0, done.output
    *text, line = done.output.strip().splitlines()
    told = json.loads(line)
    assert list(told["memory"]) == ["trial, training", "trial, scoring", "prune", "sensitivity", "comparison"]
    assert all(each["total"] == sum(each["parts"].values()) for each in told["memory"].values())
    assert told["hours"]["total"] == pytest.approx(sum(told["hours"]["stages"].values()))
    shown = "\n".join(text)
    assert "assumed: A100, 312 TFLOP/s x 25% utilization" in shown and " of GPU time (at most" in shown
    assert "prune < 1 s, " in shown and " 0 s" not in shown, "a stage that takes something is not told to take nothing"
    assert set(told["hours"]["share_done"].values()) == {0.0} and "done" not in shown
    parts = told["memory"]["trial, training"]["parts"]
    assert list(parts) == ["weights", "adapters", "gradients", "optimizer", "activations", "logits"]
    assert re.search(r"trial, training +\S+ MB: a step of 4 rows x 64 tokens .*, the final fine-tune's, too\n", shown)
    start = next(index for index, each in enumerate(text) if each.startswith("    trial, training"))
    sizes = re.findall(r"(\w+) ([\d.]+) MB", text[start + 1])
    assert {name: float(size) for name, size in sizes} == {name: round(size / 1e6, 1) for name, size in parts.items()}
    assert max(map(len, text[start : start + 8])) <= 120, "a terminal of usual width does not fold it"
    assert [float(size) for _, size in sizes] == sorted((float(size) for _, size in sizes), reverse=True)
    assert told["memory_free"] is None and "free here" not in shown, "an A100 is not here"
    refused = CliRunner().invoke(main, ["check", "config.yaml", "--gpu", "A100", "--measure"])
    assert refused.exit_code == 2
    refused = CliRunner().invoke(main, ["check", "config.yaml", "--gpu", "Abacus"])
    assert refused.exit_code == 2 and "knows H200, H100, A100" in refused.output


def test_a_gpu_elsewhere_takes_what_a_machine_without_one_would_refuse(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/cluster.md recommends for a cluster is checked on a laptop."""
    monkeypatch.chdir(tmp_path)
    for key, value in {
        "search.max_gpu_hours": 2,
        "search.resources_per_trial": {"cpu": 4, "gpu": 1},
        "finetune.num_workers": 4,
        "training.micro_batch_size": 1,
        "model.dtype": "float16",
    }.items():
        raw = with_key(raw, key, value)
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(main, ["check", "config.yaml", "--json", "--gpu", "L40S"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["concurrent_trials"] == 1, "its hours are those of one such GPU"
    halves = with_key(with_key(raw, "finetune.num_workers", 1), "search.resources_per_trial", {"cpu": 4, "gpu": 0.5})
    Path("config.yaml").write_text(yaml.safe_dump(halves))
    done = CliRunner().invoke(main, ["check", "config.yaml", "--json", "--gpu", "L40S"])
    assert json.loads(done.output.splitlines()[-1])["concurrent_trials"] == 2
    Path("config.yaml").write_text(yaml.safe_dump(with_key(raw, "search.resources_per_trial", {"gpu": 0})))
    done = CliRunner().invoke(main, ["check", "config.yaml", "--gpu", "L40S"])
    assert done.exit_code == 2 and "use `search.max_hours`" in done.output, "trials that hold no GPU anywhere"


def test_the_answer_comes_last_and_the_configuration_when_it_is_asked_for(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))  # a busy machine has a line more
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(main, ["check", "config.yaml"])
    assert done.stderr == "[check] model, rows, tasks and machine of config.yaml ...\n"
    short = done.stdout.splitlines()
    # Two warnings of few rows to score on, and one of a test of few questions.
    told = [line for line in short if " tokens of " not in line and "over so few" not in line]
    assert len(told) < 27 and short[-1] == "The configuration is valid; `--show-config` prints every key in effect."
    assert any(each.startswith("    estimated by bfloat16 matrix products timed on this machine's ") for each in short)
    whole = CliRunner().invoke(main, ["check", "config.yaml", "--show-config"]).stdout
    keys, _, answer = whole.partition("\n\n")
    assert yaml.safe_load(keys) == validate_config(raw).model_dump(mode="json")
    assert answer.splitlines()[-1] == "The configuration is valid."
    quiet = CliRunner().invoke(main, ["check", "config.yaml", "--quiet", "--set", "search.max_trials=2"])
    assert quiet.stdout == "The configuration is valid.\n"
    assert quiet.stderr.startswith("warning:     ") and "`search.max_trials`" in quiet.stderr
    assert CliRunner().invoke(main, ["check", "config.yaml", "--json"]).stderr == ""


def test_check_tells_of_a_driver_at_work_and_of_a_cut_that_is_skipped(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for key, value in {"output": str(tmp_path / "run"), "prune.rate": 0.2, "prune.first_layer": 1}.items():
        raw = with_key(raw, key, value)
    run(validate_config(raw), lambda event: None, until="prune")
    with hold_run(tmp_path / "run", print):
        said = _checked(raw)
    assert f"warning:     process {os.getpid()} on {socket.gethostname()} works on {tmp_path / 'run'}: `qpruner" in said
    assert "works on" not in _checked(raw)
    again = with_key(with_key(raw, "output", "again"), "model.source", "run/prune")
    said = _checked(again)
    assert re.search(r"parameters: +(\S+ M) -> \1 \(pruned earlier: the cut is skipped\)\n", said)
    assert re.search(r"prune +0 s", said), "no time is told for it"
    assert (
        "`prune.rate` is 0.2, but run/prune was pruned earlier" in said and "set `prune.rate: 0`, or name the" in said
    )
    for keys in ({"rate": 0}, {"first_layer": 1}):
        assert "`prune.rate` is" not in _checked(with_key(again, "prune", keys)), "nobody asked for a cut"
    done = CliRunner().invoke(main, ["prune", "config.yaml", "--dry-run"])
    assert done.exit_code == 0 and "target" not in done.output, done.output
    assert "pruned earlier: the cut is skipped" in done.output and "no cut, achieved 0.00%" in done.output


def _checked(raw: dict[str, Any]) -> str:
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(main, ["check", "config.yaml"])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_check_counts_what_every_step_goes_by(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def check(**keys: Any) -> tuple[str, dict[str, Any]]:
        config = raw
        for key, value in keys.items():
            config = with_key(config, key.replace("__", "."), value)
        Path("config.yaml").write_text(yaml.safe_dump(config))
        done = CliRunner().invoke(main, ["check", "config.yaml", "--json", "--gpu", "A100"])
        assert done.exit_code == 0, done.output
        return done.stdout, json.loads(done.stdout.splitlines()[-1])

    said, told = check(data__confirmation__0__limit=15)
    assert "48 train, 16 validation, 15 confirmation (8 fresh ones choose the winner, 7 judge it)" in said
    assert "8 samples of 128 tokens packed from the 48 rows of `data.train` for importance; 32 rows of" in said
    assert "test:        8 questions (qpruner_everyday_test 8)\n" in said and "search:" not in said
    assert told["samples"] == {"importance": 8, "sensitivity": 32}
    assert told["questions"] == {"search": {}, "fresh": {}, "test": {"qpruner_everyday_test": 8}}
    Path("ids.json").write_text("[[1, 2, 3], [4, 5]]")
    tasks = {"search__tasks": ["qpruner_everyday_validation"], "search__limit": 6, "search__metric": "accuracy"}
    said, told = check(calibration__token_ids="ids.json", **tasks)
    assert "2 samples of token ids for importance" in said
    six = "6 questions (qpruner_everyday_validation 6)"
    assert f"search:      {six} score the trials; {six}, fresh, choose the winner\n" in said
    assert told["questions"]["fresh"] == {"qpruner_everyday_validation": 6}


def test_more_memory_than_is_free_is_a_warning(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of batches that no machine of ours holds."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(yaml.safe_dump(with_key(raw, "evaluate.batch_size", 10**8)))
    done = CliRunner().invoke(main, ["check", "config.yaml"])
    assert done.exit_code == 0, done.output
    assert re.search(
        r"warning: +\S+ GB of memory are needed at most, and \S+ GB are free here: lower `eval", done.stdout
    )


def test_check_tells_what_is_done_and_compares_a_plan_with_what_was_cut(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Global selection leaves the widths open until then."""
    monkeypatch.chdir(tmp_path)

    def check(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["check", "config.yaml", *options])
        return done.exit_code, done.output

    raw = with_key(raw, "output", str(tmp_path / "run"))
    Path("config.yaml").write_text(yaml.safe_dump(raw))
    groups = [group.name for group in preflight.inspect(validate_config(raw)).pruned.groups]
    for bits in (4, 8):
        Path(f"{bits}.yaml").write_text(yaml.safe_dump(dict.fromkeys(groups, bits)))
    code, told = check("--plan", "8.yaml")
    assert code == 0 and "its bytes are compared with the budget once the model is pruned" in told
    # So many slots of so slow a kind that nothing rounds to 0 s.
    monkeypatch.setattr(work, "BESIDE_PRODUCTS", 64e-6)
    run(validate_config(raw), lambda event: None, until="prune")
    code, told = check("--json")
    hours = json.loads(told.splitlines()[-1])["hours"]
    assert {name for name, share in hours["share_done"].items() if share} == {"prune"}
    assert hours["share_done"]["prune"] == 1 and hours["done"] == hours["stages"]["prune"] > 0
    assert re.search(r"time: +about .* of it left; \d.* of slot time, \d.* of it done \(at most", told)
    assert re.search(r"on 1 slot: prune \d+ (s|min|h).* \(100% done\), sens.*\n +shared by \d+ slots: bank", told)
    shared, stages = hours["shared"], hours["stages"]
    assert hours["wall"] == pytest.approx(sum(taken / shared[stage] for stage, taken in stages.items()))
    assert "(estimate" not in told, "the widths are those of the pruned model"
    code, told = check("--set", "prune.importance=magnitude", "--json")
    assert not any(json.loads(told.splitlines()[-1])["hours"]["share_done"].values()), "it would be cut again"
    code, told = check("--plan", "4.yaml")
    assert code == 0 and "left of the budget" in told and "compared" not in told
    code, told = check("--plan", "4.yaml", "--json")
    told_of_plan = json.loads(told.splitlines()[-1])
    assert told_of_plan["concurrent_trials"] == 1 and shared["comparison"] > 1
    assert told_of_plan["hours"]["shared"] == shared | {"search": 1}, "rows are fine-tuned side by side all the same"
    code, told = check("--plan", "8.yaml")
    assert code == 2 and "more than the budget of" in told


def test_a_plan_is_read_at_once_where_it_is_known_how_many_blocks_go(raw: dict[str, Any], tmp_path: Path) -> None:
    """Groups are named after the blocks that stay; whichever go, of blocks that are alike it is the same number."""
    raw = with_key(with_key(raw, "prune.units", ["block", "mlp"]), "prune.depth_share", 0.5)
    raw = with_key(raw, "prune.rate", 0.5)
    inspection = preflight.inspect(validate_config(raw))
    before, after = ([group.name for group in layout.groups] for layout in (inspection.base, inspection.pruned))
    assert before[: len(after)] == after and len(after) == len(before) // 2
    plan = tmp_path / "plan.yaml"
    raw = with_key(raw, "search.plan", str(plan))
    plan.write_text(yaml.safe_dump(dict.fromkeys(after, 4)))
    read = preflight.inspect(validate_config(raw)).plan
    assert read and read.as_dict() == dict.fromkeys(after, 4)
    plan.write_text(yaml.safe_dump(dict.fromkeys(before, 4)))
    with pytest.raises(UserError, match=f"`{before[len(after)]}` is no group of this model"):
        preflight.inspect(validate_config(raw))


def test_check_tells_how_many_blocks_go_and_asks_for_no_width_where_none_is_cut(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    """A multiple of 64 is what 4-bit layers on a CPU need of channels that stay."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(with_key(with_key(raw, "prune.units", ["block"]), "prune.rate", 0.5)))
    narrow = ("--set", "prune.round_to=32")
    done = CliRunner().invoke(main, ["check", str(config)])
    assert done.exit_code == 0, done.output
    assert re.search(r"^parameters: .* M -> \S+ M, 2 -> 1 blocks$", done.stdout, re.MULTILINE)
    cut = ("--set", "prune.units=[mlp]", "--set", "prune.rate=0.2")
    refused = CliRunner().invoke(main, ["check", str(config), *narrow, *cut])
    assert refused.exit_code == 2 and "`prune.round_to: 64` for MLP channels" in refused.output


def test_a_plan_over_the_budget_is_refused_at_once_where_the_cut_is_known(raw: dict[str, Any], tmp_path: Path) -> None:
    """By the name under which it was given."""
    raw = with_key(raw, "prune.selection", "per_layer")
    inspection = preflight.inspect(validate_config(raw))
    assert not inspection.is_estimate
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({group.name: 8 for group in inspection.pruned.groups}))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    for options, key in ((("--plan", plan), "--plan"), (("--set", f"search.plan={plan}"), "search.plan")):
        for verb in ("check", "run"):
            refused = CliRunner().invoke(main, [verb, str(config), *map(str, options)])
            assert refused.exit_code == 2
            begins = f"error: `{key}`: the plan in {plan} takes "
            assert begins in refused.output
            told = re.search(r"takes [\d.]+ MB, ([\d.]+) MB more than the budget of", refused.output)
            over = inspection.pruned.plan_bytes(inspection.pruned.uniform(8)) - inspection.budget_bytes
            assert told and 0 <= float(told[1]) * 1e6 - over < 101, "never too little"
            elsewhere = ("--set", "data.train.0.source=/no/rows.jsonl")
            both = CliRunner().invoke(main, [verb, str(config), *map(str, options), *elsewhere])
            assert both.exit_code == 2 and "2 problems" in both.output and "/no/rows.jsonl" in both.output
            assert f"  - `{key}`: the plan in {plan} takes " in both.output


# ---- against reality

FINETUNE = """
import json, sys
from pathlib import Path
from qpruner.training.candidates import Candidate, CandidateJob, finetune_candidate
from qpruner.config.schema import load_config
from qpruner.runs.run_dir import RunDir
config = load_config(Path(sys.argv[1]))
run = RunDir(Path(config.output))
names = sorted(path.stem for path in (run.stage("bank") / "4bit").iterdir())
plan = {name: (4, 8)[position % 2] for position, name in enumerate(names)}
row = Candidate("searched", "searched", run.stage("prune"), run.stage("bank"), plan, Path(sys.argv[2]), 0)
done = finetune_candidate(CandidateJob(config, row, run.stage("prepare") / "data", threads=1))
print(json.dumps({"peak": done.peak_memory_bytes, "seconds": done.seconds}))
"""


@pytest.fixture(scope="module")
def real(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run up to its bank, of a model whose logits and activations stand out from what a process takes anyway."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qpruner.pipeline import run

    folder = tmp_path_factory.mktemp("real")
    config = AutoConfig.from_pretrained(tiny_model)
    config.update({"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "model")
    raw = raw_config(folder / "model", folder / "run")
    # Packed rows are of full length, which is what the estimate is for.
    for key, value in {
        "data.max_length": 128,
        "data.packing": True,
        "training.batch_size": 16,
        "training.micro_batch_size": 16,
        "finetune.steps": 6,
        "quantize.group": "block",
    }.items():
        raw = with_key(raw, key, value)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    checked = validate_config(raw)
    run(checked, lambda event: None, until="bank")
    return checked, path


@pytest.mark.slow
def test_a_fine_tune_takes_the_memory_and_the_time_that_were_told(real: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """Memory within a factor of 1.5; time, of which loading is no part and other work on the machine is, within 3."""
    _, path = real
    command = [sys.executable, "-c", FINETUNE, str(path), str(tmp_path / "row")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    took = json.loads(done.stdout.splitlines()[-1])
    told = subprocess.run(
        [sys.executable, "-m", "qpruner", "check", str(path), "--measure", "--json"],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    facts = json.loads(told.stdout.splitlines()[-1])
    expected = facts["memory"]["trial, training"]["total"]
    seconds = facts["hours"]["stages"]["finetune"] * 3600
    print(f"memory: told {expected / 1e6:.0f} MB, took {took['peak'] / 1e6:.0f} MB")
    print(f"time: told {seconds:.1f} s, took {took['seconds']:.1f} s; {facts['hours']['rates']}")
    assert expected / 1.5 < took["peak"] < expected * 1.5
    assert seconds / 3 < took["seconds"] < seconds * 3


def test_a_choice_of_two_cuts_takes_both_and_the_passes_that_compare_them(
    inspection: Inspection, changed: Callable[..., RunConfig]
) -> None:
    def seconds(config: RunConfig, *settings: PruneConfig) -> float:
        cuts = tuple(Cut(each, inspection.cuts[0].expected) for each in settings)
        return work.hours(config, replace(inspection, cuts=cuts), RATES, 2).stages["prune"]

    config = changed()
    beside = config.prune.model_copy(update={"units": ("block", "attention", "mlp")})
    both = seconds(config, config.prune, beside)
    alone = seconds(config, config.prune) + seconds(config, beside)
    assert alone < both < 1.5 * alone


def test_rows_that_cuts_are_compared_on_may_take_the_most_memory(
    inspection: Inspection, changed: Callable[..., RunConfig]
) -> None:
    cut = inspection.cuts[0]
    short, long = (changed(data__max_length=length, prune__aggregation="vector") for length in (64, 4096))
    two = replace(inspection, cuts=(cut, cut))
    assert memory.prune_memory(long, inspection) == memory.prune_memory(short, inspection)
    assert memory.prune_memory(short, two) == memory.prune_memory(short, inspection)
    assert memory.prune_memory(long, two).about == "passes of 8 rows x 4096 tokens (`evaluate.batch_size`)"
