"""The estimates of memory and hours are compared with autograd, ASHA and a real fine-tune; real
steps are timed."""

import json
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
from conftest import changed_by, raw_config, with_keys
from tiny_families import family_model, kept_of

from qpruner import estimate
from qpruner.config.load import validate_config
from qpruner.config.schema import LoraConfig, QuantizeConfig, RunConfig
from qpruner.data.encoding import encode
from qpruner.estimate import hours, memory, step_times
from qpruner.models.cpu import has_bfloat16
from qpruner.models.layout import group_linears, layout_of
from qpruner.models.loading import load_tokenizer
from qpruner.pipeline import preflight
from qpruner.pipeline.preflight import Inspection
from qpruner.pipeline.preflight_rows import most_labelled
from qpruner.pipeline.run import run
from qpruner.plans.plan import EMBEDDINGS
from qpruner.pruning import surgery
from qpruner.pruning.prune import Cut
from qpruner.quantization.assembly import attach_adapters
from qpruner.quantization.formats import format_of
from qpruner.quantization.mixed import packed_layer

Changed = Callable[..., RunConfig]
RATES = hours.Rates(2e-3, 1e-3, "made up")


@pytest.fixture(scope="module")
def raw(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return raw_config(tiny_model, tmp_path_factory.mktemp("estimate") / "run")


@pytest.fixture(scope="module")
def inspection(raw: dict[str, Any]) -> Inspection:
    return preflight.inspect(validate_config(raw))


@pytest.fixture
def changed(raw: dict[str, Any]) -> Changed:
    """Return the configuration with changed keys, given as `section__key=value`."""
    return lambda **keys: validate_config(with_keys(raw, **keys))


def inspected(config: RunConfig, inspection: Inspection) -> tuple[RunConfig, Inspection]:
    """Return a configuration and the inspection changed to its settings of the cut."""
    cuts = {inspection.reference.cut: Cut(config.prune, inspection.expected)}
    return config, replace(inspection, cuts=cuts)


@pytest.fixture
def cut(inspection: Inspection, changed: Changed) -> Callable[..., memory.Memory]:
    """Estimate the memory of the cut with changed keys."""
    return lambda **keys: memory.prune_memory(*inspected(changed(**keys), inspection))


# ---- memory


def kept_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Return the bytes that autograd keeps for the backward pass, without the weights."""
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


@pytest.mark.parametrize("level", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_activations_match_autograd(family: str, level: str) -> None:
    """Packed layers keep no more than others.

    Attention in float32, on a CPU without bfloat16, is not included.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 3,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = AutoConfig.for_model(family, **sizes, **heads)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path in (
        path
        for paths in group_linears(config, "block").values()
        for path in paths
        if level != "bf16"
    ):
        linear = model.get_submodule(path)
        tensors = format_of(level).pack(linear.weight.data)
        model.set_submodule(path, packed_layer(linear, level, tensors, torch.bfloat16))
    adapted = attach_adapters(model, {}, LoraConfig(rank=8), "block", seed=0).train()
    ids = torch.randint(0, 512, (2, 64))
    own = layout_of(config, QuantizeConfig(), 2, 8, on_gpu=False)
    found = memory.activation_bytes(own, config.hidden_size, ids.numel(), 8, checkpointing=False)
    assert found == pytest.approx(kept_bytes(adapted, ids), rel=0.15 if has_bfloat16() else 0.25)


def test_memory_grows_with_length_and_batch(inspection: Inspection, changed: Changed) -> None:
    before = memory.training_memory(changed(), inspection)
    longer = memory.training_memory(changed(data__max_length=128), inspection)
    assert longer.parts["activations"] == 2 * before.parts["activations"]
    assert (
        longer.parts["optimizer"]
        == 2 * before.parts["adapters"]
        == 4 * inspection.base.adapter_bytes
    )
    smallest = inspection.base.plan_bytes(inspection.base.smallest())
    assert before.parts["weights"] + inspection.base.adapter_bytes == max(
        inspection.budget_bytes, smallest
    )
    thrifty = memory.training_memory(changed(training__gradient_checkpointing=True), inspection)
    assert thrifty.parts["activations"] < before.parts["activations"]
    wide = memory.scoring_memory(changed(evaluate__batch_size=32), inspection)
    assert wide.parts["logits"] == 4 * memory.scoring_memory(changed(), inspection).parts["logits"]
    assert wide.total == sum(wide.parts.values())


def test_logits_are_counted_at_labelled_tokens(
    inspection: Inspection, changed: Changed, tiny_model: Path
) -> None:
    """The count is an upper bound for real rows; packed or unknown rows count with full length."""
    config, tokenizer = changed(), load_tokenizer(str(tiny_model))
    for rows in inspection.examples.values():
        encoded = encode(rows, tokenizer, 64, config.data.template, response_only=True)
        longest = max(sum(label != -100 for label in row["labels"]) for row in encoded)
        assert longest <= most_labelled(rows, config.data) < 64
    every = [12 * 4 * 64 * 512, (2 + 8) * 8 * 64 * 512]

    def logits(found: Inspection, **keys: Any) -> list[int]:
        works = (memory.training_memory, memory.scoring_memory)
        return [work(changed(**keys), found).parts["logits"] for work in works]

    training, scoring = logits(inspection)
    assert training < every[0] and scoring < every[1]
    assert (
        every
        == logits(inspection, data__response_only=False)
        == logits(inspection, data__packing=True)
    )
    assert every == logits(replace(inspection, examples={}))
    tasks = {
        "search__tasks": ["qpruner_everyday_validation"],
        "search__limit": 4,
        "search__metric": "accuracy",
    }
    assert logits(inspection, **tasks) == [training, every[1]], "lm-eval pads answers"


def test_the_comparison_trains_the_base_model_unpacked(
    inspection: Inspection, changed: Changed
) -> None:
    config = changed()
    found = estimate.facts(config, inspection, RATES, 2, 0.5)
    parts = found["memory"]["comparison"]["parts"]
    assert parts["weights"] == inspection.base.num_parameters * 2
    assert (
        parts["adapters"]
        == 2 * inspection.base.adapter_bytes
        > 2 * inspection.reference.adapter_bytes
    ), "in float32"
    trial = memory.training_memory(config, inspection).parts
    assert parts["activations"] == trial["activations"], "the search tries the base model too"
    assert "unpacked weights" in trial and "unpacked weights" not in parts
    most = max(
        each["total"]
        for name, each in found["memory"].items()
        if name.startswith(("trial", "comparison"))
    )
    assert found["memory_at_once"] >= 2 * most, "two slots share a GPU"
    assert "comparison" not in estimate.works(changed(finetune={"steps": 4}))


def test_the_cut_counts_gradients_and_samples(
    inspection: Inspection, cut: Callable[..., memory.Memory]
) -> None:
    """Gradients count only if importance needs them; compensation counts all samples; the larger
    one is the peak."""
    by_gradient, by_weights = cut(), cut(prune__importance="magnitude")
    assert by_weights.total < by_gradient.total
    assert "logits" in by_gradient.parts and "logits" not in by_weights.parts
    assert (
        "logits"
        not in cut(prune__units=["block"], prune__rate=0.5, prune__compensation="none").parts
    )
    assert set(cut(prune__rate=0.0).parts) == {"weights"}, "nothing is cut"
    samples = 8  # `calibration.num_samples`
    short = {"prune__importance": "magnitude", "calibration__max_length": 48}
    solved = cut(**short, prune__compensation="least_squares")
    assert solved.parts["hidden states"] == samples * 48 * (64 * 2 + 48)
    assert (
        solved.parts["Gram matrix"] == 2 * 4 * 256**2
        and solved.parts["solution"] == 3 * 4 * 64 * 256
    )
    assert "hidden states" not in cut(**short, prune__compensation="none").parts
    mixed = {"prune__importance": "taylor", "prune__order": "mixed"}
    assert cut(**mixed).parts["mean squares"] == 4 * sum(
        group.num_weights for group in inspection.base.groups if group.name != EMBEDDINGS
    )
    assert "mean squares" not in cut(**mixed, prune__aggregation="vector").parts


# ---- hours


def test_expected_steps_match_asha(changed: Changed) -> None:
    """A simulated ASHA, where a trial continues while it is in the best half so far, takes few
    steps more."""
    config = changed(
        search__max_trials=400, search__steps=16, search__first_rung=2, sensitivity__methods=[]
    )
    controls = preflight.most_controls(config)
    generator, seen, steps = (
        np.random.default_rng(0),
        {rung: [] for rung in config.search.rungs},
        16.0 * controls,
    )
    for score in generator.random(400 - controls):
        for rung in config.search.rungs:
            seen[rung].append(score)
            if rung == 16 or score > np.quantile(seen[rung], 0.5):
                steps += rung
                break
    expected, _ = hours.expected_steps(config)
    assert expected <= steps <= 1.25 * expected
    assert expected < 400 * 16 / 2
    assert hours.expected_steps(changed(search__max_trials=3)) == (3 * 4, 3 * 3), (
        "controls run to the end"
    )


def hours_of(
    config: RunConfig, inspection: Inspection, rates: hours.Rates = RATES
) -> dict[str, float]:
    return {
        name: each.hours
        for name, each in hours.stage_times(config, inspection, rates, slots=1).items()
    }


def test_hours_follow_the_configuration(inspection: Inspection, changed: Changed) -> None:
    def of(rates: hours.Rates = RATES, **keys: Any) -> dict[str, float]:
        return hours_of(*inspected(changed(search__max_trials=40, **keys), inspection), rates)

    once = of()
    twice = of(hours.Rates(1e-3, 5e-4, ""))
    assert sum(twice.values()) == pytest.approx(sum(once.values()) / 2)
    longer = of(finetune__steps=8)
    assert {name for name in once if longer[name] > once[name]} == {"finetune", "comparison"}
    assert of(prune__rate=0)["prune"] == 0
    assert once["prune"] < of(prune__units=["block", "mlp"])["prune"]


def test_gpu_hours_count_the_gpus_of_a_trial(inspection: Inspection, changed: Changed) -> None:
    """Half a GPU is half as fast; two GPUs are no faster but count twice."""
    half, whole, two = (
        estimate.facts(changed(), inspection, RATES, 2, gpus)["hours"] for gpus in (0.5, 1.0, 2.0)
    )
    assert half["wall"] == pytest.approx(2 * whole["wall"]) and half["total"] == pytest.approx(
        whole["total"]
    )
    assert two["wall"] == pytest.approx(whole["wall"]) and two["total"] == pytest.approx(
        2 * whole["total"]
    )
    alone, four = (
        estimate.facts(changed(), inspection, RATES, slots, None)["hours"] for slots in (1, 4)
    )
    assert alone["total"] == pytest.approx(alone["wall"]) and four["wall"] < alone["wall"]


def test_the_comparison_is_a_fine_tune_for_each_row_and_seed(
    inspection: Inspection, changed: Changed
) -> None:
    """The first fine-tune of the winner is not part of the comparison."""
    asked, alone = (
        hours_of(changed(**keys), inspection) for keys in ({}, {"finetune": {"steps": 4}})
    )
    assert {name: each for name, each in asked.items() if name != "comparison"} == alone
    one = alone["finetune"] + alone["evaluate"] / (1 + hours.UNTUNED)
    assert asked["comparison"] == pytest.approx(hours.num_compared(changed()) * one)
    fewer = changed(finetune={"steps": 4, "compare": True, "seeds": 1, "random_plans": 1})
    # two seeds less for the winner, the best control and random plans
    assert hours.num_compared(fewer) == hours.num_compared(changed()) - 12


# ---- against reality

FINETUNE = """
import json, sys
from pathlib import Path
from qpruner.training.jobs import tune
from qpruner.config.load import load_config
from qpruner.runs.run_dir import RunDir
sys.path.insert(0, "tests")
from mixed_models import bank_of_run, groups_of, plan_job
config = load_config(Path(sys.argv[1]))
run, bank = RunDir(Path(config.output)), bank_of_run(config)
plan = {"embeddings": "bf16"} \
| {name: ("nf4", "int8")[at % 2] for at, name in enumerate(groups_of(bank))}
tuned, _ = tune(plan_job(config, bank, run.stage("prepare") / "data", plan, Path(sys.argv[2])))
print(json.dumps({"peak": tuned.peak_memory_bytes, "seconds": tuned.seconds}))
"""


@pytest.fixture(scope="module")
def real(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its bank, with a model large enough to stand out from the memory of the process
    itself."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("real")
    config = AutoConfig.from_pretrained(tiny_model)
    config.update(
        {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "model")
    # Packed rows have full length and every token a label, and the model is not cut, as the
    # estimate assumes.
    rows = {
        "data__max_length": 128,
        "data__packing": True,
        "data__response_only": False,
        "prune__rate": 0.0,
    }
    batches = {"training__batch_size": 16, "training__micro_batch_size": 16, "finetune__steps": 6}
    raw = with_keys(
        raw_config(folder / "model", folder / "run"), **rows, **batches, quantize__group="block"
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    run(validate_config(raw), lambda event: None, until="bank")
    return path


@pytest.mark.slow
def test_a_fine_tune_takes_the_estimated_memory_and_time(real: Path, tmp_path: Path) -> None:
    """Memory matches within a factor of 1.25; time without loading, on a machine with other load,
    within 3."""

    def last_line(*command: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=True, timeout=600
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))

    took = last_line("-c", FINETUNE, str(real), str(tmp_path / "row"))
    facts = last_line("-m", "qpruner", "check", str(real), "--measure", "--json")
    expected, seconds = (
        facts["memory"]["trial, training"]["total"],
        facts["hours"]["stages"]["finetune"] * 3600,
    )
    print(f"memory: told {expected / 1e6:.0f} MB, took {took['peak'] / 1e6:.0f} MB")
    print(f"time: told {seconds:.1f} s, took {took['seconds']:.1f} s; {facts['hours']['rates']}")
    assert expected / 1.25 < took["peak"] < expected * 1.25
    assert seconds / 3 < took["seconds"] < seconds * 3


# ---- timed steps


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_a_cut_model_of_the_family_is_timed(name: str) -> None:
    """The families have two kinds of layers, fused projections and a head that is tied or not;
    times depend on load."""
    changes = "data.max_length=16; lora.dropout=0.1; training.gradient_checkpointing=true"
    changes += "; quantize.embeddings=[int8]; quantize.budget={bytes: 100000}"
    raw = changed_by(changes, raw_config(Path("a-model"), Path("a-run")))
    config = surgery.cut(family_model(name), kept_of(name)).config
    times = step_times.measure(validate_config(raw), config, share_labelled=0.25, threads=1)
    assert all(value > 0 for value in times)
    assert config.num_hidden_layers == 3, "the config is not changed"
