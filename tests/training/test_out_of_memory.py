"""If memory runs out in a command without stages, its message gives a remedy and does not report a
defect."""

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from mixed_models import finished_run
from transformers import LlamaConfig, LlamaForCausalLM

import qpruner.hf  # noqa: F401

WIDTH = 400_000
"""MLP channels of a block with 154 MB of weights."""

PROGRAM = """
import json, re, resource, sys
from pathlib import Path
from qpruner.cli.main import main

def run(*command):
    try:
        main(command)
    except SystemExit as end:
        print(f"exit {end.code}", file=sys.stderr, flush=True)

warm, *commands = json.loads(sys.argv[1])
run(*warm)
size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for more, command in commands:
    resource.setrlimit(resource.RLIMIT_AS, (size + more * 10**6, -1))
    run(*command)
"""


def write_zeros(file: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write a sparse safetensors file of bfloat16 zeros, which needs no disk space."""
    header = {}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end = end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    described = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with file.open("wb") as written:
        written.write(struct.pack("<Q", len(described)) + described)
        written.truncate(8 + len(described) + end)


@pytest.fixture
def wide(tiny_model: Path, tmp_path: Path) -> Path:
    """Write a model of one block with 154 MB of weights.

    It needs 800 MB to process 1000 tokens.
    """
    folder = Path(shutil.copytree(tiny_model, tmp_path / "wide"))
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    config.intermediate_size = WIDTH
    config.max_position_embeddings = 65536
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).state_dict()
    del weights["lm_head.weight"]
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    write_zeros(folder / "model.safetensors", shapes)
    return folder


@pytest.mark.slow
def test_a_command_out_of_memory_names_a_remedy(
    wide: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The system refuses address space when a model is loaded, exported or asked to generate."""
    run = finished_run(tiny_model, tmp_path / "run")
    write_zeros(run / "final" / "adapter_model.safetensors", {"wide": [64, 3 * WIDTH]})
    asked = ["--max-tokens", "2"]
    commands = [
        ["generate", str(tiny_model), "--prompt", "warm", *asked],
        [100, ["generate", str(wide), "--prompt", "what", *asked]],
        [100, ["export", str(run), "--to", "merged"]],
        [600, ["generate", str(wide), "--prompt", "word " * 1000, *asked]],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "defect" not in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    ended = [line[:22] for line in lines if line.startswith(("error:", "exit "))]
    assert ended == ["exit 0", *["error: out of memory (", "exit 1"] * 3], done.stderr
    remedies = [line for line in lines if line.startswith("  remedy: ")]
    assert ["`--which`" in line for line in remedies] == [True, False, True]
    assert all("`CUDA_VISIBLE_DEVICES=`" in line for line in remedies)


MULTIPLIES = """
import os, resource, sys, torch
from qpruner.models.memory import is_out_of_memory
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
ones = lambda size: torch.ones(size, size, dtype=dtype)
ones(512) @ ones(512)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for spare in range(4, 22, 2):
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (taken + spare * 2**20, resource.RLIM_INFINITY))
        try:
            for size in range(600, 4000, 200):
                ones(size) @ ones(size)
        except Exception as error:
            print(is_out_of_memory(error), error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchs_errors_are_known_as_out_of_memory(dtype: str) -> None:
    """They include oneDNN's error of a product in bfloat16.

    Every amount of memory has a process of its own: where memory is short, oneDNN ends the process
    on some processors.
    """
    done = subprocess.run([sys.executable, "-c", MULTIPLIES, dtype], capture_output=True, text=True)
    known = [line for line in done.stdout.splitlines() if line.startswith(("True", "False"))]
    assert len(known) >= 3, done
    assert all(line.startswith("True") for line in known), done
