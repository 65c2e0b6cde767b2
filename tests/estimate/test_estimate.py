"""The estimates of memory and hours are compared with autograd, ASHA and a real fine-tune; real
steps are timed."""

import itertools
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
    shapes = inspection.shapes
    reference = shapes.reference.cut
    cuts = {reference: Cut(config.prune, shapes.cuts[reference].model_config)}
    return config, replace(inspection, shapes=replace(shapes, cuts=cuts))


@pytest.fixture
def cut(inspection: Inspection, changed: Changed) -> Callable[..., dict[str, int]]:
    """Estimate the parts of the memory of the cut with changed keys."""

    def parts(**keys: Any) -> dict[str, int]:
        estimated = memory.prune_memory(*inspected(changed(**keys), inspection))
        assert estimated.total == sum(estimated.parts.values())
        return estimated.parts

    return parts


# ---- memory


def kept_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Return the bytes that autograd keeps for the backward pass, without the weights."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for weight in (*model.parameters(), *model.buffers()):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("level", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_activations_match_autograd(family: str, level: str) -> None:
    """Packed layers keep no more than others.

    Attention in float32, on a CPU without bfloat16, is not included.
    """
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
    if level != "bf16":
        packing = format_of(level)
        for path in itertools.chain(*group_linears(config, "block").values()):
            linear = model.get_submodule(path)
            tensors = packing.pack(linear.weight.data)
            model.set_submodule(path, packed_layer(linear, packing, tensors, torch.bfloat16))
    adapted = attach_adapters(model, {}, LoraConfig(rank=8), "block", seed=0).train()
    ids = torch.randint(0, 512, (2, 64))
    own = layout_of(config, QuantizeConfig(), 2, 8, on_gpu=False)
    estimated = memory.activation_bytes(own, config.hidden_size, ids.numel(), 8, False)
    tolerance = 0.15 if has_bfloat16() else 0.25
    assert estimated == pytest.approx(kept_bytes(adapted, ids), rel=tolerance)


def test_memory_grows_with_length_and_batch(inspection: Inspection, changed: Changed) -> None:
    def training(**keys: Any) -> Any:
        return memory.training_memory(changed(**keys), inspection).parts

    base = inspection.shapes.base
    before = training()
    assert training(data__max_length=128)["activations"] == 2 * before["activations"]
    assert before["optimizer"] == 2 * before["adapters"] == 4 * base.adapter_bytes
    smallest = base.plan_bytes(base.smallest())
    assert before["weights"] + base.adapter_bytes == max(inspection.shapes.budget_bytes, smallest)
    quarter = training(training__optimizer="adamw_8bit")
    assert 4 * quarter["optimizer"] == before["optimizer"]
    thrifty = training(training__gradient_checkpointing=True)
    assert thrifty["activations"] < before["activations"]
    scoring = memory.scoring_memory(changed(), inspection)
    wide = memory.scoring_memory(changed(evaluate__batch_size=32), inspection)
    assert wide.parts["logits"] == 4 * scoring.parts["logits"]
    assert wide.total == sum(wide.parts.values())


def test_labelled_tokens_are_not_underestimated(
    inspection: Inspection, changed: Changed, tiny_model: Path
) -> None:
    data = changed().data
    tokenizer = load_tokenizer(str(tiny_model))
    for rows in inspection.rows.examples.values():
        encoded = encode(rows, tokenizer, 64, data.template, response_only=True)
        longest = max(sum(label != -100 for label in row["labels"]) for row in encoded)
        assert longest <= most_labelled(rows, data) < 64


def test_logits_are_counted_at_labelled_tokens(inspection: Inspection, changed: Changed) -> None:
    """Packed or unknown rows count with full length."""
    every = [12 * 4 * 64 * 512, (2 + 8) * 8 * 64 * 512]

    def logits(inspection: Inspection, **keys: Any) -> list[int]:
        config = changed(**keys)
        training = memory.training_memory(config, inspection).parts["logits"]
        return [training, memory.scoring_memory(config, inspection).parts["logits"]]

    training, scoring = logits(inspection)
    assert training < every[0]
    assert scoring < every[1]
    assert logits(inspection, data__response_only=False) == every
    assert logits(inspection, data__packing=True) == every
    assert logits(replace(inspection, rows=replace(inspection.rows, examples={}))) == every
    tasks = ["qpruner_everyday_validation"]
    accuracy = {"search__tasks": tasks, "search__limit": 4, "search__metric": "accuracy"}
    assert logits(inspection, **accuracy) == [training, every[1]], "lm-eval pads answers"


def test_the_comparison_trains_the_base_model_unpacked(
    inspection: Inspection, changed: Changed
) -> None:
    base = inspection.shapes.base
    facts = estimate.facts(changed(), inspection, RATES, 2, 0.5)
    parts = facts["memory"]["comparison"]["parts"]
    assert parts["weights"] == base.num_parameters * 2
    assert parts["adapters"] == 2 * base.adapter_bytes, "in float32"
    assert base.adapter_bytes > inspection.shapes.reference.adapter_bytes
    trial = memory.training_memory(changed(), inspection).parts
    assert parts["activations"] == trial["activations"], "the search tries the base model too"
    assert "unpacked weights" in trial
    assert "unpacked weights" not in parts
    trained = [name for name in facts["memory"] if name.startswith(("trial", "comparison"))]
    most = max(facts["memory"][name]["total"] for name in trained)
    assert facts["memory_at_once"] >= 2 * most, "two slots share a GPU"
    assert "comparison" not in estimate.works(changed(finetune={"steps": 4}))


def test_a_cut_counts_gradients_if_importance_needs_them(
    cut: Callable[..., dict[str, int]],
) -> None:
    by_weights = cut(prune__importance="magnitude")
    assert sum(by_weights.values()) < sum(cut().values())
    assert "logits" in cut()
    assert "logits" not in by_weights
    blocks = {"prune__units": ["block"], "prune__rate": 0.5}
    assert "logits" not in cut(**blocks, prune__compensation="none")
    assert set(cut(prune__rate=0.0)) == {"weights"}, "nothing is cut"


def test_a_compensated_cut_counts_all_samples(cut: Callable[..., dict[str, int]]) -> None:
    """The larger of scores and compensation is the peak."""
    samples = 8  # `calibration.num_samples`
    short = {"prune__importance": "magnitude", "calibration__max_length": 48}
    solved = cut(**short, prune__compensation="least_squares")
    assert solved["hidden states"] == samples * 48 * (64 * 2 + 48)
    assert solved["Gram matrix"] == 2 * 4 * 256**2
    assert solved["solution"] == 3 * 4 * 64 * 256
    assert "hidden states" not in cut(**short, prune__compensation="none")


def test_mixed_order_counts_the_mean_of_squares(
    inspection: Inspection, cut: Callable[..., dict[str, int]]
) -> None:
    mixed = {"prune__importance": "taylor", "prune__order": "mixed"}
    weights = {group.name: group.num_weights for group in inspection.shapes.base.groups}
    del weights[EMBEDDINGS]
    assert cut(**mixed)["mean squares"] == 4 * sum(weights.values())
    assert "mean squares" not in cut(**mixed, prune__aggregation="vector")


# ---- hours


def test_expected_steps_match_asha(changed: Changed) -> None:
    """A simulated ASHA, where a trial continues while it is in the best half so far, takes few
    steps more."""
    config = changed(
        search__max_trials=400, search__steps=16, search__first_rung=2, sensitivity__methods=[]
    )
    controls = preflight.most_controls(config)
    seen: dict[int, list[float]] = {rung: [] for rung in config.search.rungs}
    steps = 16 * controls
    for score in np.random.default_rng(0).random(400 - controls):
        for rung in config.search.rungs:
            seen[rung].append(score)
            if rung == 16 or score > np.quantile(seen[rung], 0.5):
                steps += rung
                break
    expected, _ = hours.expected_steps(config)
    assert expected <= steps <= 1.25 * expected
    assert expected < 400 * 16 / 2
    only_controls = hours.expected_steps(changed(search__max_trials=3))
    assert only_controls == (3 * 4, 3 * 3), "they run to the end"


def hours_of(
    config: RunConfig, inspection: Inspection, rates: hours.Rates = RATES
) -> dict[str, float]:
    times = hours.stage_times(config, inspection, rates, slots=1)
    return {stage: time.hours for stage, time in times.items()}


def test_hours_follow_the_configuration(inspection: Inspection, changed: Changed) -> None:
    def of(rates: hours.Rates = RATES, **keys: Any) -> dict[str, float]:
        return hours_of(*inspected(changed(search__max_trials=40, **keys), inspection), rates)

    once = of()
    twice = of(hours.Rates(1e-3, 5e-4, ""))
    assert sum(twice.values()) == pytest.approx(sum(once.values()) / 2)
    longer = of(finetune__steps=8)
    assert {name for name in once if longer[name] > once[name]} == {"finetune", "comparison"}
    formats = {"quantize__bits": None, "quantize__formats": ["q4_0", "q8_0"]}
    untuned = of(**formats)
    tuned = of(**formats, quantize__rounding="tuned")
    assert {name for name in once if tuned[name] > untuned[name]} == {"finetune", "comparison"}
    assert of(prune__rate=0)["prune"] == 0
    assert once["prune"] < of(prune__units=["block", "mlp"])["prune"]


def test_gpu_hours_count_the_gpus_of_a_trial(inspection: Inspection, changed: Changed) -> None:
    """Half a GPU is half as fast; two GPUs are no faster but count twice."""

    def hours(slots: int, gpus: float | None) -> tuple[float, float]:
        facts = estimate.facts(changed(), inspection, RATES, slots, gpus)["hours"]
        return facts["wall"], facts["total"]

    wall, total = hours(2, 1.0)
    assert hours(2, 0.5) == pytest.approx((2 * wall, total))
    assert hours(2, 2.0) == pytest.approx((wall, 2 * total))
    alone, of_alone = hours(1, None)
    assert of_alone == pytest.approx(alone)
    assert hours(4, None)[0] < alone


def test_the_comparison_is_a_fine_tune_for_each_row_and_seed(
    inspection: Inspection, changed: Changed
) -> None:
    """The first fine-tune of the winner is not part of the comparison."""
    asked = hours_of(changed(), inspection)
    alone = hours_of(changed(finetune={"steps": 4}), inspection)
    one = alone["finetune"] + alone["evaluate"] / (1 + hours.UNTUNED)
    assert asked.pop("comparison") == pytest.approx(hours.num_compared(changed()) * one)
    assert asked == alone
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
    sizes = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6}
    config = AutoConfig.from_pretrained(tiny_model, intermediate_size=704, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "model")
    # Packed rows have full length and every token a label, and the model is not cut, as the
    # estimate assumes.
    changes = (
        "data.max_length=128; data.packing=true; data.response_only=false; prune.rate=0; "
        "training.batch_size=16; training.micro_batch_size=16; finetune.steps=6; "
        "quantize.group=block"
    )
    raw = changed_by(changes, raw_config(folder / "model", folder / "run"))
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
    memory_bytes = facts["memory"]["trial, training"]["total"]
    seconds = facts["hours"]["stages"]["finetune"] * 3600
    print(f"estimated {memory_bytes} bytes and {seconds} s; took {took}")
    assert memory_bytes / 1.25 < took["peak"] < memory_bytes * 1.25
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
