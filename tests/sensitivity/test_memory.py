"""Compare the peak memory of sensitivities, scoring, GPTQ's inputs and tuned rounding with the
prediction of `qpruner check`."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from banked_decoders import BUDGET, LEVELS, Banked, banked, samples_of
from conftest import changed_by, raw_config, with_key, with_keys
from mixed_models import bank_source
from tiny_decoders import rows_of
from torch.profiler import ProfilerActivity, profile

from qpruner.config.load import validate_config
from qpruner.config.schema import QuantizeConfig, RunConfig, SensitivityConfig
from qpruner.data.calibration import Samples
from qpruner.data.encoding import save_encoded
from qpruner.data.losses import mean_loss
from qpruner.estimate.memory import (
    rounding_memory,
    scoring_memory,
    sensitivity_memory,
    tuned_rounding_memory,
)
from qpruner.models.cpu import has_bfloat16
from qpruner.models.layout import layout_of
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.pipeline import preflight
from qpruner.pipeline.preflight import Inspection
from qpruner.pruning.grams import Grams, gather, gram_bytes
from qpruner.quantization.bank import write_grams
from qpruner.quantization.tuned import MOST_TOKENS, TunedPlan
from qpruner.sensitivity.expansion import expand
from qpruner.sensitivity.measurement import measure
from qpruner.sensitivity.methods import by_information

LENGTH = 64
SHAPES: dict[str, dict[str, Any]] = {
    "many weights": {"hidden_size": 512, "intermediate_size": 1408},  # Llama-2-7B's proportions
    "many words": {"vocab_size": 16000},
}


def gather_of(banked: Banked, batch_size: int) -> Iterator[Grams]:
    """Gather the Gram matrices of the layers' inputs."""
    return gather(banked.model, replace(banked.subject.samples, batch_size=batch_size))


METHODS: dict[str, Callable[[Banked, RunConfig], object]] = {
    "mutual_information": lambda banked, config: by_information(
        banked.model, banked.subject, config.sensitivity, 0
    ),
    "fisher": lambda banked, config: expand(
        banked.model, banked.subject.samples, banked.starts_of_blocks
    ),
    "kl": lambda banked, config: measure(banked.model, banked.subject.samples, banked.starts),
    "gptq": lambda banked, config: deque(
        gather_of(banked, config.calibration.batch_size), maxlen=0
    ),
    "scoring": lambda banked, config: mean_loss(
        banked.model,
        banked.subject.samples.rows,
        banked.subject.samples.pad_id,
        config.evaluate.batch_size,
    ),
}


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the peak memory that torch allocates during the work, above that at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    held = most = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.fixture(scope="module")
def raw(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    lengths = f"data.max_length={LENGTH}; calibration.max_length={LENGTH}"
    changes = f"quantize.group=block; sensitivity.max_positions=512; {lengths}"
    return changed_by(changes, raw_config(tiny_model, tmp_path_factory.mktemp("memory") / "run"))


@pytest.fixture(scope="module")
def inspection(raw: dict[str, Any]) -> Inspection:
    return preflight.inspect(validate_config(raw))


@pytest.fixture(scope="module", params=SHAPES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Banked:
    """Make a bfloat16 decoder, its bank, and samples of full length with a label on every token."""
    folder = tmp_path_factory.mktemp("bank")
    options = {"init": "plain", "embeddings": ("int8", "bf16"), "num_hidden_layers": 2}
    made = banked(folder, "llama", "block", **options, **SHAPES[request.param])
    made.model.to(torch.bfloat16)  # type: ignore[call-arg, arg-type]
    samples = samples_of([LENGTH] * 8, 0, SensitivityConfig().batch_size)
    made = replace(made, subject=replace(made.subject, samples=samples))
    # Opened here, because the profiler would count the mapped files as memory.
    assert made.starts
    assert made.starts_of_blocks
    return made


@pytest.mark.parametrize("method", METHODS)
def test_check_predicts_the_memory(
    raw: dict[str, Any], inspection: Inspection, subject: Banked, method: str
) -> None:
    quantize = QuantizeConfig(
        group="block", formats=LEVELS, embeddings=("int8", "bf16"), budget=BUDGET
    )
    own = layout_of(subject.model.config, quantize, element_bytes=2, lora_rank=8, on_gpu=False)
    inspection = replace(
        inspection,
        shapes=replace(
            inspection.shapes,
            model_config=subject.model.config,
            base=own,
            layouts={"base": own},
        ),
        rows=replace(inspection.rows, examples={}),
    )
    config = validate_config(raw)
    if method == "scoring":
        parts = scoring_memory(config, inspection).parts
        beside = parts["activations"] + parts["logits"]
    else:
        estimate = rounding_memory
        if method != "gptq":
            config = validate_config(with_key(raw, "sensitivity.methods", [method]))
            estimate = sensitivity_memory
        memory = estimate(config, inspection)
        beside = memory.total - memory.parts["weights"]
    # `qpruner.models.cpu` copies the weights of a product to float32.
    copies = 1.0 if has_bfloat16() else 1.25
    assert 0.4 * beside < peak_bytes(lambda: METHODS[method](subject, config)) <= copies * beside


def test_check_predicts_the_memory_of_tuned_rounding(
    raw: dict[str, Any], inspection: Inspection, tiny_model: Path, tmp_path: Path
) -> None:
    banked(tmp_path, num_hidden_layers=2, **SHAPES["many weights"])
    checkpoint = tmp_path / "model"
    load_tokenizer(str(tiny_model)).save_pretrained(checkpoint)
    save_encoded(rows_of([MOST_TOKENS] * 32), tmp_path / "data" / "train")
    plain = bank_source(checkpoint, tmp_path / "tuned bank", dtype="bfloat16", group="block")
    bank = replace(plain, uses_grams=True, inputs="grams", method="scales")
    model = load_dense(str(checkpoint), "bfloat16")
    for grams in gather(model, Samples(rows_of([MOST_TOKENS] * 8), 1, 4)):
        write_grams(bank, grams)
    quantize = {"quantize.bits": None, "quantize.formats": ["q4_0"], "quantize.rounding": "tuned"}
    config = validate_config(with_keys(raw, **quantize, **{"quantize.tuning": {"rows": 32}}))
    layout = layout_of(
        model.config, config.quantize, element_bytes=2, lora_rank=8, on_gpu=False, method="scales"
    )
    plan = layout.smallest().as_dict()
    settings = config.quantize.tuning.model_copy(update={"iterations": 2})
    tuned = TunedPlan(bank, plan, tmp_path / "plan", "digest", tmp_path / "data", settings)
    shapes = replace(
        inspection.shapes, model_config=model.config, base=layout, layouts={"base": layout}
    )
    del model
    expected = tuned_rounding_memory(config, replace(inspection, shapes=shapes)).total
    peak = peak_bytes(lambda: tuned.tune(lambda done, total: None))
    copies = 1.0 if has_bfloat16() else 1.25
    assert 0.4 * expected < peak <= copies * expected


def test_the_disk_of_gram_matrices_is_told_exactly(subject: Banked) -> None:
    quantize = QuantizeConfig(group="block", formats=LEVELS)
    layout = layout_of(subject.model.config, quantize, element_bytes=2, lora_rank=8, on_gpu=False)
    sizes = [sum(gram.nbytes for gram in grams.values()) for grams in gather_of(subject, 4)]
    assert sizes == gram_bytes(layout, subject.model.config)
