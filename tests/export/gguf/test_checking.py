"""Files that differ from their checkpoint are refused: other bytes, tokens or predictions; sound
files pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from broken_exports import change_weights
from made_tensors import token_rows
from mixed_models import final_model
from safetensors.torch import load_file, save_file

from qpruner.errors import StageError
from qpruner.export.compare import (
    TOP,
    Predictions,
    compare_served,
    next_log_probabilities,
    of_next_tokens,
)
from qpruner.export.gguf.architectures import llama_cpp_format
from qpruner.export.gguf.checking import check, check_bytes, check_predictions, rounding_inputs
from qpruner.export.gguf.writing import write_adapter, write_gguf
from qpruner.export.recode import dense, recode
from qpruner.hf import load

ROWS = token_rows(4, 64, end=500)
DIVERGED = r"predictions in xllamacpp .* diverge by"
ADAPTER = "adapter_model.safetensors"
Tensors = dict[str, numpy.ndarray]


@pytest.fixture(scope="module")
def final(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A final model whose attention and predictions are sharp, unlike those of a random model."""
    folder = tmp_path_factory.mktemp("checked")
    sharp = shutil.copytree(tiny_model, folder / "sharp")
    weights = sharp / "model.safetensors"
    change_weights(weights, "proj", lambda weight: weight * 8)
    change_weights(weights, "model.norm.weight", lambda weight: weight * 20)
    return final_model(sharp, folder)


@pytest.fixture(scope="module")
def checkpoint(final: Path) -> Path:
    folder = final.parent / "checkpoint"
    recode(final, folder, llama_cpp_format, merge=False)
    write_gguf(folder, folder / "model.gguf", "tiny")
    write_adapter(folder, folder / "adapter.gguf")
    return folder


def damaged(file: Path, target: Path, damage: Callable[[Tensors], None]) -> Path:
    shutil.copy(file, target)
    reader = gguf.GGUFReader(target, "r+")
    damage({each.name: each.data for each in reader.tensors})
    reader.data.flush()
    return target


def flip(tensors: Tensors) -> None:
    tensors[max(tensors)].reshape(-1).view(numpy.uint8)[-1] ^= 1


def shift_the_head(tensors: Tensors) -> None:
    table = tensors["token_embd.weight"]
    table[:] = numpy.roll(table, 1, axis=0)


def restore_the_order_of_q(tensors: Tensors) -> None:
    """As transformers has it, in one block only."""
    q = tensors["blk.1.attn_q.weight"]
    q[:] = q.reshape(4, 32, 2, -1).transpose(0, 2, 1, 3).reshape(q.shape).copy()


def remove_the_adapter(tensors: Tensors) -> None:
    for name, each in tensors.items():
        if name.endswith("lora_b"):
            each[:] = 0


def test_sound_files_pass(checkpoint: Path) -> None:
    told: list[str] = []
    served = check(
        checkpoint,
        checkpoint / "model.gguf",
        checkpoint / "adapter.gguf",
        ROWS,
        lambda what, *_: told.append(what),
    )
    assert served.num_positions == 252
    assert served.agreement > 0.9
    assert abs(served.loss - served.loss_before) < 0.05
    assert served.by.startswith("xllamacpp")
    assert {"reading the file again", "comparing predictions"} <= set(told)


def test_unpacked_weights_are_compared_closely(final: Path, tmp_path: Path) -> None:
    recode(final, tmp_path, dense, merge=True)
    write_gguf(tmp_path, tmp_path / "model.gguf", "tiny")
    served = check_predictions(tmp_path, tmp_path / "model.gguf", None, ROWS)
    assert served.divergence < 1e-3
    assert served.agreement > 0.96


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_a_flipped_bit_on_disk_is_found(name: str, checkpoint: Path, tmp_path: Path) -> None:
    files = {part: checkpoint / f"{part}.gguf" for part in ("model", "adapter")}
    files[name] = damaged(files[name], tmp_path / "damaged.gguf", flip)
    with pytest.raises(StageError, match=r"damaged\.gguf has other bytes"):
        check_bytes(checkpoint, files["model"], files["adapter"])


def test_a_lost_adapter_of_one_layer_is_found(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    adapter = load_file(other / ADAPTER)
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    for side in "AB":
        del adapter[lost.format(side)]
    save_file(adapter, other / ADAPTER)
    write_adapter(other, other / "adapter.gguf")
    model = checkpoint / "model.gguf"
    with pytest.raises(StageError, match=r"no tensor `blk\.1\.ffn_up\.weight\.lora_a`"):
        check(checkpoint, model, other / "adapter.gguf", ROWS)
    with pytest.raises(StageError, match="a tensor that the checkpoint lacks"):
        check(other, model, checkpoint / "adapter.gguf", ROWS)


@pytest.mark.parametrize("damage", [shift_the_head, restore_the_order_of_q])
def test_rows_in_another_order_are_found(
    damage: Callable[[Tensors], None], checkpoint: Path, tmp_path: Path
) -> None:
    """Even if the writer had meant this order, so that no byte differs."""
    file = damaged(checkpoint / "model.gguf", tmp_path / "damaged.gguf", damage)
    with pytest.raises(StageError, match=r"predictions in xllamacpp .* diverge by"):
        check_predictions(checkpoint, file, checkpoint / "adapter.gguf", ROWS)


def test_a_missing_adapter_is_found(checkpoint: Path, tmp_path: Path) -> None:
    empty = damaged(checkpoint / "adapter.gguf", tmp_path / "empty.gguf", remove_the_adapter)
    model = checkpoint / "model.gguf"
    with pytest.raises(StageError, match=DIVERGED):
        check(checkpoint, model, None, ROWS)
    with pytest.raises(StageError, match=DIVERGED):
        check_predictions(checkpoint, model, empty, ROWS)


def test_a_missing_weak_adapter_is_found(checkpoint: Path, tmp_path: Path) -> None:
    """Its effect is smaller than the rounding of inputs in llama.cpp."""
    weak = shutil.copytree(checkpoint, tmp_path / "weak")
    change_weights(weak / ADAPTER, "lora_B", lambda weight: weight * 0.002)
    write_adapter(weak, weak / "adapter.gguf")
    check_predictions(weak, weak / "model.gguf", weak / "adapter.gguf", ROWS)
    empty = damaged(weak / "adapter.gguf", tmp_path / "empty.gguf", remove_the_adapter)
    with pytest.raises(StageError, match="% of its adapter's effect"):
        check_predictions(weak, weak / "model.gguf", empty, ROWS)


def test_other_tokens_are_found(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens |= {"a": tokens["b"], "b": tokens["a"]}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(StageError, match="makes other tokens of"):
        check(other, checkpoint / "model.gguf", checkpoint / "adapter.gguf", ROWS)


def test_another_perplexity_is_found(final: Path) -> None:
    """Of the next tokens alone, which hardly changes the divergence."""
    row = ROWS[0]
    model = torch.nn.Module.float(load(final).eval())
    log_probabilities = next_log_probabilities(model, row)
    likeliest, ids = log_probabilities.topk(TOP)
    actual = of_next_tokens(log_probabilities, row)

    def divergence(actual: torch.Tensor) -> float:
        served = Predictions(ids.numpy(), likeliest.numpy(), actual.numpy())
        return compare_served(final, [row], [served], "a server", rounding_inputs).divergence

    assert divergence(actual) < 1e-3
    with pytest.raises(StageError, match=r"perplexity in a server .* \+2\.\d%, more than 1%"):
        divergence(actual - 0.02)
