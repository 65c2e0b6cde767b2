"""llama.cpp, called through its library: tokens, logits, adapters, and what a user reads if it
cannot be used."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from peft import LoraConfig, get_peft_model

from qpruner.data.losses import loss_result, mean_loss
from qpruner.errors import StageError, UserError
from qpruner.export.gguf import llama_cpp
from qpruner.export.gguf.llama_cpp import Llama, library_path
from qpruner.export.gguf.writing import write_adapter, write_gguf
from qpruner.hf import load

IDS = [0, 40, 50, 60, 70, 80]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_model, file, "tiny")
    return file


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("adapter") / "adapted"))
    lora = LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(load(tiny_model), lora).save_pretrained(str(folder))
    write_adapter(folder, folder / "adapter.gguf")
    return folder / "adapter.gguf"


def test_one_pass_gives_the_logits_of_all_positions(model: Path) -> None:
    with Llama(model) as llama:
        logits = llama.logits(IDS)
        assert logits.shape == (6, llama.vocab_size) == (6, 512)
        # Each position sees those before it only, and no earlier row.
        assert numpy.abs(llama.logits(IDS[:3]) - logits[:3]).max() < 1e-3
        wanted = llama.logits(IDS, [False, True, False, False, True, False])
        assert numpy.array_equal(wanted, logits[[1, 4]])


def test_a_row_longer_than_a_batch_is_read_whole(model: Path) -> None:
    row = [2 + position % 250 for position in range(600)]
    with Llama(model, context_length=600) as llama:
        logits = llama.logits(row)
        assert logits.shape == (600, 512)
        wanted = llama.logits(row, [position > 590 for position in range(600)])
        assert numpy.allclose(wanted, logits[591:])


def test_generation_takes_the_most_likely_tokens(model: Path) -> None:
    with Llama(model, threads=2) as llama:
        llama.prefill(IDS)
        first = llama.decode(8)
        assert first[0] == int(llama.logits(IDS)[-1].argmax())
        llama.prefill(IDS)
        assert first == llama.decode(8)


def test_the_loss_is_that_of_transformers(
    model: Path, tiny_model: Path, rows: list[dict[str, Any]]
) -> None:
    with Llama(model) as llama:
        found = loss_result(
            *zip(*(llama.loss(row["input_ids"], row["labels"]) for row in rows), strict=True)
        )
    expected = mean_loss(load(tiny_model).float(), rows, pad_id=1, batch_size=4)
    assert found.mean == pytest.approx(expected.mean, abs=1e-3)
    assert found.by_row == pytest.approx(expected.by_row, abs=1e-2)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [path for path in sys.path if not (Path(path) / "xllamacpp").is_dir()]
    monkeypatch.setattr(sys, "path", found)
    monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
    with pytest.raises(
        UserError, match=r"`xllamacpp` is missing: run `pip install \"qpruner\[gguf\]\"`"
    ):
        library_path()


def test_what_is_no_library_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"none\.gguf is not a file"):
        Llama(tmp_path / "none.gguf")
    other = next(library_path().parent.glob("__init__.py"))
    monkeypatch.setattr(llama_cpp, "library_path", lambda: other)
    with pytest.raises(UserError, match=r"__init__\.py is not a library of llama\.cpp"):
        Llama(model)


@pytest.mark.parametrize(
    ("damage", "told"), [("cut", "not within the file bounds"), ("text", "invalid magic")]
)
def test_a_damaged_file_is_refused(damage: str, told: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(model.read_bytes()[:-5000] if damage == "cut" else b"no model")
    with pytest.raises(StageError, match=rf"{told}[\s\S]*remedy"):
        Llama(file)


def test_a_model_is_no_adapter_and_an_adapter_no_model(model: Path, adapter: Path) -> None:
    with pytest.raises(StageError, match=r"cannot load the adapter .*tiny\.gguf"):
        Llama(model, model)
    with pytest.raises(StageError, match=r"cannot load .*adapter\.gguf: .*key not found in model"):
        Llama(adapter)
