"""Bad inputs, one a row: each is refused before a weight is loaded.

A row is what to change in a configuration that is otherwise accepted, and what the error must hold: the key, the value
found, the rule it breaks, the remedy.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DEMO_DATA, demo_rows, disk_of, raw_config, with_key

from qpruner.config.load import load_config, validate_config
from qpruner.config.schema import DataSource, RunConfig
from qpruner.data.sources import load_examples, normalized
from qpruner.errors import ConfigError, UserError
from qpruner.models.families import families
from qpruner.pipeline.preflight import inspect
from qpruner.pipeline.preflight_rows import num_cut
from qpruner.pipeline.run import check
from qpruner.plans.plan import PrecisionPlan

QUESTIONS = "package:qpruner/demo/data/questions_{}.jsonl"
INSTRUCTIONS = "package:qpruner/demo/data/instructions.jsonl"
TEST_TASK, SEARCH_TASK = "qpruner_everyday_test", "qpruner_everyday_validation"


@dataclass(frozen=True)
class Scene:
    """What a row may build its bad input from.

    Attributes:
        folder: A folder of the row's own; `{folder}` in what it expects.
        model: The tiny model's folder.
    """

    folder: Path
    model: Path

    def file(self, name: str, content: str | bytes) -> str:
        """Writes a file; returns its path."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def edited_model(self, edit: Callable[[Path], object]) -> dict[str, Any]:
        """The keys of a configuration whose model folder is a copy that `edit` has spoilt."""
        copy = shutil.copytree(self.model, self.folder / "model")
        edit(copy)
        return {"model.source": str(copy)}


Change = dict[str, Any] | Callable[[Scene], dict[str, Any]]


def refused(
    name: str, change: Change, key: str, value: str, rule: str, remedy: str | None = None, **options: Any
) -> Any:
    """A row: the keys to change, and what the message must hold.

    Args:
        name: The row's id.
        change: Dotted keys and their bad values, or a function of the scene that returns them.
        key: Names the setting.
        value: Names what was found.
        rule: Says what it breaks.
        remedy: Says what to do; where the rule says so itself, as a bound does, it is not given.
        options: Passed on to `pytest.param`.
    """
    return pytest.param(change, (key, value, rule, remedy or rule), id=name, **options)


# ---- what is wrong with the configuration alone

# fmt: off
CONFIGURATION = [
    refused("key-unknown", {"outptu": "x"}, "`outptu`", "outptu", "not a known key", "did you mean `output`"),
    refused(
        "key-at-the-wrong-level", {"round_to": 8}, "`round_to`", "round_to", "not a known key",
        "did you mean `prune.round_to`"
    ),
    refused("key-misspelt", {"lora.rnak": 8}, "`lora.rnak`", "rnak", "not a known key", "did you mean `lora.rank`"),
    refused(
        "key-misspelt-deep", {"quantize.budget.bitez": 3}, "`quantize.budget.bitez`", "bitez", "not a known key",
        "did you mean `quantize.budget.bytes`"
    ),
    refused(
        "key-misspelt-in-list", {"data.train.0.spilt": "x"}, "`data.train.0.spilt`", "spilt", "not a known key",
        "did you mean `data.train.0.split`"
    ),
    refused(
        "card-base-folder", {"card.base_model": "./base"}, "`card.base_model`", "'./base'", "must be hub ids",
        "leave out what is on no hub"
    ),
    refused(
        "card-dataset-file", {"card.datasets": ["me/rows", "package:me/rows.jsonl"]}, "`card.datasets`",
        "'package:me/rows.jsonl'", "must be hub ids", "leave out what is on no hub"
    ),
    refused(
        "card-license-text", {"card.license": "Apache 2.0"}, "`card.license`", "'Apache 2.0'",
        "must be the hub's identifier", "such as apache-2.0"
    ),
    refused(
        "key-like-no-other", {"prune.zzzz": 1}, "`prune.zzzz`", "zzzz", "not a known key",
        "aggregation, compensation, depth_importance, depth_share, first_layer, importance, last_layer, layer_rate"
    ),
    refused("section-missing", lambda _: {"model": {}}, "`model.source`", "model.source", "missing", "must be given"),
    refused("string-for-integer", {"lora.rank": "eight"}, "`lora.rank`", "'eight'", "valid integer"),
    refused("fraction-for-integer", {"search.max_trials": 2.5}, "`search.max_trials`", "2.5", "valid integer"),
    refused("boolean-for-integer", {"lora.rank": True}, "`lora.rank`", "True", "not be a boolean"),
    refused("list-for-scalar", {"seed": [1, 2]}, "`seed`", "[1, 2]", "valid integer"),
    refused("mapping-for-list", {"data.train": {"source": "x"}}, "`data.train`", "{'source': 'x'}", "list"),
    refused("string-for-list", {"evaluate.tasks": TEST_TASK}, "`evaluate.tasks`", TEST_TASK, "list"),
    refused("scalar-for-section", {"prune": 3}, "`prune`", "3", "mapping"),
    refused("nothing-for-section", {"lora": None}, "`lora`", "None", "mapping"),
    refused("choice-misspelt", {"prune.importance": "tailor"}, "importance`", "'tailor'", "'taylor', 'magnitude',"),
    refused("no-training-data", {"data.train": []}, "`data.train`", "[]", "at least 1 item"),
    refused("rate-negative", {"prune.rate": -0.1}, "`prune.rate`", "-0.1", "greater than or equal to 0"),
    refused("rate-in-per-cent", {"prune.rate": 20}, "`prune.rate`", "got 20: a share", "so 20 % is 0.2"),
    refused("dropout-in-per-cent", {"lora.dropout": 5.5}, "`lora.dropout`", "got 5.5: a share", "so 5.5 % is 0.055"),
    refused("rate-too-large", {"prune.rate": 0.95}, "`prune.rate`", "0.95", "less than or equal to 0.9"),
    refused("rate-twice", {"prune.layer_rate": 0.25}, "`prune`", "`layer_rate`", "not both", "give `rate` or"),
    refused("rate-missing", {"prune": {"rate": None}}, "`prune`", "neither", "give `rate` or `layer_rate`"),
    refused("layer-rate-1", {"prune": {"layer_rate": 1}}, "`prune.layer_rate`", "got 1", "less than 1"),
    refused("layer-rate-0", {"prune": {"layer_rate": 0}}, "`prune.layer_rate`", "got 0", "greater than 0"),
    refused(
        "layer-rate-of-blocks", {"prune": {"layer_rate": 0.2, "units": ["block", "mlp"]}}, "`layer_rate`", "`units`",
        "units inside blocks", "take `block` out of `units`"
    ),
    refused(
        "layer-rate-global", {"prune": {"layer_rate": 0.2, "selection": "global"}}, "`layer_rate`", "global",
        "needs `selection: per_layer`, its default; got global", "take it out"
    ),
    refused(
        "product-global", {"prune": {"reduction": "product"}}, "`prune`", "`reduction: product`",
        "needs `selection: per_layer`", "such as sum"
    ),
    refused("units-none", {"prune.units": []}, "`prune.units`", "[]", "at least 1 item"),
    refused("units-unknown", {"prune.units": ["heads"]}, "`prune.units.0`", "'heads'", "'attention', 'mlp' or 'exp"),
    refused("units-twice", {"prune.units": ["mlp", "mlp"]}, "`units`", "['mlp', 'mlp']", "names a kind twice", "once"),
    refused(
        "units-expert-and-mlp", {"prune.units": ["expert", "mlp"]}, "`units`", "`expert` or `mlp`", "not both",
        "whole experts go, or channels of every expert"
    ),
    refused(
        "uniform-global", {"prune.uniform": True, "prune.selection": "global"}, "`uniform`", "`uniform`",
        "needs `selection: per_layer`, its default; got global", "take it out"
    ),
    refused("uniform-number", {"prune.uniform": 3}, "`prune.uniform`", "got 3", "valid boolean"),
    refused(
        "depth-share-1", {"prune.depth_share": 1, "prune.units": ["block", "mlp"]}, "`prune.depth_share`", "got 1",
        "less than 1"
    ),
    refused("steps-0", {"prune.steps": 0}, "`prune.steps`", "got 0", "greater than or equal to 1"),
    refused("ridge-0", {"prune.ridge": 0}, "`prune.ridge`", "got 0", "greater than 0"),
    refused("round-to-0", {"prune.round_to": 0}, "`prune.round_to`", "got 0", "greater than or equal to 1"),
    refused("first-layer-negative", {"prune.first_layer": -1}, "first_layer`", "got -1", "greater than or equal to 0"),
    refused("calibration-batch-0", {"calibration.batch_size": 0}, "batch_size`", "got 0", "greater than or equal to 1"),
    refused("calibration-length", {"calibration.max_length": 3}, "max_length`", "got 3", "greater than or equal to 4"),
    refused("bits-unsupported", {"quantize.bits": [3, 8]}, "`quantize.bits.0`", "got 3", "4, 8 or 16"),
    refused("bits-none", {"quantize.bits": []}, "`quantize.bits`", "[]", "at least 1 item"),
    refused("bits-descending", {"quantize.bits": [8, 4]}, "`bits`", "8, 4", "in ascending order"),
    refused("bits-duplicated", {"quantize.bits": [4, 4]}, "`bits`", "4, 4", "must be different", "in ascending order"),
    refused(
        "plan-of-no-sensitivity-measured", {"search.plan": "kl", "sensitivity.methods": ["fisher"]}, "`search.plan`",
        "kl", "not measured", "name it in `sensitivity.methods`, got ['fisher']"
    ),
    refused(
        "plan-of-a-sensitivity-and-one-bit-width", {"search.plan": "kl", "quantize.bits": [4]}, "`search.plan`", "kl",
        "not measured", "two bit-widths or more in `quantize.bits`, got [4]"
    ),
    refused(
        "budget-below-one-bit-width", {"quantize.bits": [4], "quantize.budget": {"bytes": 1000}},
        "`quantize.budget.bytes`", "1000", "is below the pruned model with every group at 4 bits", "raise it"
    ),
    refused(
        "budget-empty", {"quantize.budget": {}}, "`quantize.budget`", "none", "exactly one",
        "fraction, mean_bits, gib, bytes"
    ),
    refused(
        "budget-twice", {"quantize.budget": {"fraction": 0.5, "mean_bits": 5}}, "`quantize.budget`",
        "got fraction, mean_bits: take one out", "exactly one", "fraction, mean_bits, gib, bytes"
    ),
    refused(
        "budget-fraction", {"quantize.budget": {"fraction": 1.5}}, "`quantize.budget.fraction`", "1.5",
        "less than or equal to 1"
    ),
    refused("budget-infinite", {"quantize.budget": {"gib": float("inf")}}, "`quantize.budget.gib`", "inf", "finite"),
    refused("rank-0", {"lora.rank": 0}, "`lora.rank`", "got 0", "greater than or equal to 1"),
    refused("dropout-1", {"lora.dropout": 1}, "`lora.dropout`", "got 1", "less than 1"),
    refused("learning-rate-infinite", {"training.learning_rate": float("inf")}, "learning_rate`", "inf", "finite"),
    refused(
        "workers-0", {"finetune.num_workers": 0}, "`finetune.num_workers`", "got 0", "greater than or equal to 1"
    ),
    refused(
        "batch-not-whole-for-the-workers", {"finetune.num_workers": 2}, "`training.batch_size`", "(2 x 4), got 4",
        "a multiple of `finetune.num_workers` x", "take fewer workers"
    ),
    refused(
        "workers-of-two-gpus",
        {"finetune.num_workers": 2, "training.batch_size": 8, "search.resources_per_trial": {"gpu": 2}},
        "`finetune.num_workers`", "got 2 with `search.resources_per_trial.gpu` 2", "one GPU each", "not both"
    ),
    refused(
        "batch-not-whole", {"training.batch_size": 6}, "`batch_size`", "6 and 4", "a multiple of `micro_batch_size`",
        "take another batch size"
    ),
    refused("first-rung-late", {"search.first_rung": 9}, "`first_rung`", "got 9", "at most `steps` (4)"),
    refused(
        "reduction-factor-1", {"search.reduction_factor": 1}, "`search.reduction_factor`", "got 1",
        "greater than or equal to 2"
    ),
    refused(
        "accuracy-of-nothing", {"search.metric": "accuracy"}, "`metric: accuracy`", "accuracy", "at least one task",
        "`tasks`"
    ),
    refused(
        "accuracy-of-all-questions", {"search.metric": "accuracy", "search.tasks": [SEARCH_TASK]},
        "`metric: accuracy`", "got None", "those after the limit choose the winner", "needs a `limit`"
    ),
    refused(
        "accuracy-of-one-question",
        {"search.metric": "acc", "search.tasks": [SEARCH_TASK], "search.limit": 1}, "`metric: acc`", "got 1",
        "one question has no standard error", "a `limit` of at least 2"
    ),
    refused("trials-0", {"search.max_trials": 0}, "`search.max_trials`", "got 0", "greater than or equal to 1"),
    refused("hours-0", {"search.max_hours": 0}, "`search.max_hours`", "got 0", "greater than 0"),
    refused("gpu-hours-0", {"search.max_gpu_hours": 0}, "`search.max_gpu_hours`", "got 0", "greater than 0"),
    refused(
        "searcher-misspelt", {"search.searcher": "hyperpot"}, "`search.searcher`", "'hyperpot'",
        "'gp', 'hyperopt', 'bayesopt' or 'random'"
    ),
    refused(
        "gpus-and-a-half", {"search.resources_per_trial": {"gpu": 1.5}}, "`gpu`", "got 1.5", "a whole number",
        "a share of one GPU or"
    ),
    refused(
        "gpu-negative", {"search.resources_per_trial": {"gpu": -1}}, "`search.resources_per_trial.gpu`", "got -1",
        "greater than or equal to 0"
    ),
    refused("finetune-both", {"finetune": {"steps": 4, "epochs": 1}}, "`finetune`", "both", "exactly one", "`epochs`"),
    refused("finetune-neither", {"finetune": {}}, "`finetune`", "neither", "exactly one", "`epochs`"),
    refused(
        "task-searched-and-held-out", {"search.tasks": [TEST_TASK]}, "`evaluate.tasks`", TEST_TASK,
        "must not share tasks with `search.tasks`"
    ),
    refused(
        "text-of-questions", {"evaluate.text": [{"source": INSTRUCTIONS}]}, "`text` is running text",
        "got instruction", "give its sources `format: text`"
    ),
    refused("output-unnamed", {"output": ""}, "`output`", "''", "at least 1 character"),
]
# fmt: on

# ---- what cannot be for this model, budget, device or disk


def _config_keys(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _second_shard_missing(folder: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": first, "model.embed_tokens.weight": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_not_json(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")  # else no index is read
    (folder / "model.safetensors.index.json").write_text('{"wei')


def _gpt2(folder: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=300, bos_token_id=0, eos_token_id=1).save_pretrained(folder)


BY_WEIGHT = {"prune.importance": "magnitude", "prune.compensation": "none"}
"""What looks at no linear layer."""


def _mixtral(folder: Path) -> None:
    _config_keys(folder, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)


def _gguf(scene: Scene, keep: Callable[[bytes], bytes]) -> dict[str, Any]:
    """A one-block Llama as a .gguf file of which only a part is left."""
    import numpy as np
    from gguf import GGUFWriter

    path = scene.folder / "part.gguf"
    writer = GGUFWriter(path, "llama")
    for name, count in (("block_count", 1), ("context_length", 64), ("embedding_length", 64), ("head_count", 2)):
        getattr(writer, f"add_{name}")(count)
    writer.add_feed_forward_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(100)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(keep(path.read_bytes()))
    return {"model.source": str(path)}


SUPPORTED = ", ".join(families())
WITHOUT_BAYESOPT = pytest.mark.skipif(find_spec("bayes_opt") is not None, reason="the extra is installed")
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is refused on a CPU only")

# fmt: off
MODEL = [
    refused(
        "rate-unreachable", {"prune.rate": 0.6, "prune.first_layer": 1}, "`prune.rate`", "0.6", "at least one unit",
        "lower the rate, widen `prune.first_layer`"
    ),
    refused(
        "layers-outside", {"prune.last_layer": 7}, "`prune.last_layer` 7", "7", "within the model's 2 blocks", "0 to 1"
    ),
    refused(
        "layers-before-first", {"prune.last_layer": -5}, "`prune.last_layer` -5", "-5", "the model's 2 blocks", "0 to 1"
    ),
    refused(
        "layers-reversed", {"prune.first_layer": 1, "prune.last_layer": 0}, "`prune.first_layer` 1",
        "`prune.last_layer` 0", "must be a range", "0 to 1"
    ),
    refused(
        "layers-protected-outside", {"prune.protected_layers": [0, 2]}, "`prune.protected_layers`", "no block 2",
        "the model has 2", "0 to 1"
    ),
    refused(
        "layers-all-protected", {"prune.protected_layers": [0, -1]}, "`prune.protected_layers`", "no block",
        "may be cut", "name fewer"
    ),
    refused(
        "round-to-too-wide", {"prune.round_to": 320}, "`prune.round_to`", "got 320", "at most the 256 MLP channels",
        "no multiple of it would be left"
    ),
    refused(
        "round-to-too-wide-for-layer-rate", {"prune": {"layer_rate": 0.2, "round_to": 320}}, "`prune.round_to`",
        "got 320", "at most the 256 MLP channels", "`prune.layer_rate` is 0.2"
    ),
    refused(
        "layer-rate-leaves-none", {"prune": {"layer_rate": 0.999, "round_to": 1}}, "`prune.layer_rate`", "0.999",
        "would leave 0 of the 2 attention units of block 0, but at least 1 must stay", "make it at most 0.992"
    ),
    refused(
        "round-to-leaves-too-much", {"prune.round_to": 256, "prune.units": ["mlp"]}, "`prune.rate`", "0.2",
        "at most 0 can", "lower the rate"
    ),
    refused(
        "round-to-on-cpu", {"prune.round_to": 32}, "`quantize.bits`", "has 160 columns", "wrongly",
        "`prune.round_to: 64` for MLP channels", marks=ON_CPU
    ),
    refused(
        "round-to-on-cpu-global", {"prune.round_to": 32, "prune.selection": "global", "prune.rate": 0.1},
        "`prune.round_to`", "got 32", "a multiple of 64", "4-bit layers on a CPU", marks=ON_CPU
    ),
    refused(
        "rate-of-attention-alone", {"prune.rate": 0.5, "prune.units": ["attention"]}, "`prune.rate`", "0.5",
        "at least one unit of each kind", "name more `prune.units`"
    ),
    refused(
        "units-that-are-not-there", {"prune.units": ["attention", "expert"]}, "`prune.units`", "expert",
        "no block of this llama model has such units", "leave it out"
    ),
    refused(
        "block-larger-than-the-rate", {"prune.rate": 0.1, "prune.units": ["block"]}, "`prune.rate`", "10.00%",
        "but one block has 42.85%", "raise the rate"
    ),
    refused(
        "block-alone-in-its-range", {"prune.rate": 0.5, "prune.units": ["block"], "prune.first_layer": 1},
        "`prune.units`", "block", "one must stay", "widen `prune.first_layer`"
    ),
    refused(
        "uniform-in-a-range", {"prune.uniform": True, "prune.first_layer": 1}, "`prune.uniform`", "only 1 may be cut",
        "all 2 blocks must be cut alike", "`uniform: false`"
    ),
    refused(
        "uniform-with-biases", {"prune.uniform": True, "prune.compensation": "bias"}, "`prune.compensation`", "llama",
        "no place for output biases", "use least_squares or none"
    ),
    refused(
        "experts-by-activations",
        lambda scene: {**scene.edited_model(_mixtral), "prune.importance": "fluctuation"}, "`prune`",
        "mlp.experts.gate_up_proj", "stacked in one parameter", "taylor, magnitude or random"
    ),
    refused(
        "experts-narrower-than-kernels",
        lambda scene: {**scene.edited_model(_mixtral), **BY_WEIGHT, "prune.round_to": 12}, "`prune.round_to`", "got 12",
        "a multiple of 8", "experts of a mixtral model"
    ),
    refused(
        "budget-bytes", {"quantize.budget": {"bytes": 1000}}, "`quantize.budget.bytes`", "got 1000", "every group at 4",
        "the smallest that works is"
    ),
    refused(
        "budget-gib", {"quantize.budget": {"gib": 1e-6}}, "`quantize.budget.gib`", "1e-06", "every group at 4",
        "the smallest that works is"
    ),
    refused(
        "budget-fraction-none", {"quantize.budget": {"fraction": 0}}, "`quantize.budget.fraction`", "got 0.0",
        "only every group at 4 bits fits", "the smallest that works is"
    ),
    refused(
        "budget-mean-bits-none", {"quantize.budget": {"mean_bits": 4}}, "`quantize.budget.mean_bits`", "got 4.0",
        "only every group at 4 bits fits", "raise it, or prune more"
    ),
    refused(
        "one-confirmation-row", {"data.confirmation.0.limit": 1}, "`data.confirmation`", "at least 2 rows that differ",
        "got 1", "raise its `limit`"
    ),
    refused(
        "budget-fraction-all", {"quantize.budget": {"fraction": 1}}, "`quantize.budget.fraction`", "got 1.0",
        "every group fits at 8 bits", "the largest"
    ),
    refused(
        "budget-bytes-all", {"quantize.budget": {"bytes": 10**9}}, "`quantize.budget.bytes`", "got 1000000000",
        "every group fits at 8 bits", "search the whole front with `search.pareto`"
    ),
    refused(
        "budget-gib-all", {"quantize.budget": {"gib": 1}}, "`quantize.budget.gib`", "got 1.0",
        "every group fits at 8 bits", "lower it"
    ),
    refused(
        "budget-mean-bits-all", {"quantize.budget": {"mean_bits": 8}}, "`quantize.budget.mean_bits`", "got 8.0",
        "every group fits at 8 bits", "the smallest that works is"
    ),
    refused(
        "budget-mean-bits-high", {"quantize.budget": {"mean_bits": 9}}, "`quantize.budget.mean_bits`", "got 9",
        "between the lowest and highest of `quantize.bits`", "4 and 8"
    ),
    refused(
        "budget-mean-bits-low", {"quantize.budget": {"mean_bits": 3}}, "`quantize.budget.mean_bits`", "got 3",
        "between the lowest and highest of `quantize.bits`", "4 and 8"
    ),
    refused(
        "model-missing", lambda scene: {"model.source": str(scene.folder / "none")}, "`model.source`", "{folder}/none",
        "does not exist", "name a model folder"
    ),
    refused(
        "model-on-no-hub", {"model.source": "nobody/no-such-model"}, "`model.source`", "'nobody/no-such-model'",
        "no model config can be read", "see that the hub has this id and is reached from here"
    ),
    refused(
        "model-on-no-hub-or-here", {"model.source": "nobody/no-such-model"}, "`model.source`", "'nobody/no-such-model'",
        "no model config can be read", f"there is none at {Path.cwd() / 'nobody/no-such-model'}"
    ),
    refused(
        "model-relative", {"model.source": "runs/mine/prune"}, "`model.source`", str(Path.cwd() / "runs/mine/prune"),
        "is no hub id", "name a model folder"
    ),
    refused(
        "model-dot-relative", {"model.source": "../mine"}, "`model.source`", str(Path.cwd() / "../mine"),
        "does not exist", "name a model folder"
    ),
    refused(
        "model-in-home", {"model.source": "~/no-such-model"}, "`model.source`", str(Path.home() / "no-such-model"),
        "does not exist", "name a model folder"
    ),
    refused(
        "model-in-nobodys-home", {"model.source": "~no-such-user/m"}, "`model.source`", "~no-such-user/m", "no folder",
        "name a model folder"
    ),
    refused(
        "model-a-file", lambda scene: {"model.source": scene.file("weights.pt", "")}, "`model.source`",
        "{folder}/weights.pt", "is a file", "name a model folder"
    ),
    refused(
        "model-without-config", lambda scene: scene.edited_model(lambda folder: (folder / "config.json").unlink()),
        "`model.source`", "{folder}/model", "no config.json", "name a model folder"
    ),
    refused(
        "model-config-not-json",
        lambda scene: scene.edited_model(lambda folder: (folder / "config.json").write_text('{"model_type": "lla')),
        "`model.source`", "{folder}/model", "not a valid JSON file"
    ),
    refused(
        "model-config-impossible",
        lambda scene: scene.edited_model(lambda folder: _config_keys(folder, num_attention_heads=3)), "`model.source`",
        "{folder}/model", "not a multiple of the number of attention heads (3)"
    ),
    refused(
        "model-pickled", lambda scene: scene.edited_model(_pickled_only), "`model.source`", "{folder}/model",
        "pickled .bin weights are not read", "save_pretrained"
    ),
    refused(
        "model-shard-missing", lambda scene: scene.edited_model(_second_shard_missing), "`model.source`",
        "model-00002-of-00002.safetensors", "lacks", "fetch"
    ),
    refused(
        "model-index-not-json",
        lambda scene: scene.edited_model(_index_not_json),
        "`model.source`", "model.safetensors.index.json", "not valid JSON", "fetch"
    ),
    refused(
        "model-weights-truncated",
        lambda scene: scene.edited_model(lambda folder: os.truncate(folder / "model.safetensors", 20_000)),
        "`model.source`", "{folder}/model/model.safetensors", "truncated", "fetch"
    ),
    refused(
        "model-without-tokenizer",
        lambda scene: scene.edited_model(lambda folder: [path.unlink() for path in folder.glob("tokenizer*")]),
        "`model.source`", "{folder}/model", "tokenizer"
    ),
    refused(
        "model-quantized",
        lambda scene: scene.edited_model(lambda folder: _config_keys(folder, quantization_config={"bits": 4})),
        "`model.source`", "{folder}/model", "already quantized", "give the full-precision checkpoint"
    ),
    refused(
        "model-unsupported", lambda scene: scene.edited_model(_gpt2), "`model.source`", "`gpt2`", "not supported",
        f"supported: {SUPPORTED}"
    ),
    refused(
        "package-not-installed", {"model.source": "package:no_such_package/model.gguf"}, "`model.source`",
        "`no_such_package`", "not installed", "install it"
    ),
    refused(
        "package-without-file", {"model.source": "package:qpruner/demo/model.gguf"}, "`model.source`",
        "`demo/model.gguf`", "package `qpruner` has no file", "name"
    ),
    refused(
        "gguf-missing", lambda scene: {"model.source": str(scene.folder / "none.gguf")}, "`model.source`",
        "{folder}/none.gguf", "does not exist", "name"
    ),
    refused(
        "gguf-not-gguf", lambda scene: {"model.source": scene.file("text.gguf", "hello world")}, "`model.source`",
        "{folder}/text.gguf", "not a GGUF file"
    ),
    refused(
        "gguf-header-truncated", lambda scene: _gguf(scene, lambda whole: whole[:100]), "`model.source`",
        "{folder}/part.gguf", "truncated", "fetch"
    ),
    refused(
        "gguf-weights-truncated", lambda scene: _gguf(scene, lambda whole: whole[:-5000]), "`model.source`",
        "{folder}/part.gguf", "truncated", "fetch"
    ),
    refused(
        "float16-on-cpu", {"model.dtype": "float16"}, "`model.dtype`", "float16", "cannot be trained on a CPU",
        "bfloat16 or float32", marks=ON_CPU
    ),
    refused(
        "output-a-file", lambda scene: {"output": scene.file("taken", "")}, "`output`", "{folder}/taken", "is a file",
        "name a folder"
    ),
    refused(
        "output-below-a-file", lambda scene: {"output": scene.file("taken", "") + "/run"}, "`output`", "{folder}/taken",
        "is a file", "name a folder"
    ),
]
# fmt: on

# ---- what is wrong with data and tasks


def _rows(scene: Scene, name: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"data.train.0.source": scene.file(name, "".join(json.dumps(row) + "\n" for row in rows))}


def _not_json(scene: Scene) -> dict[str, Any]:
    return {"data.train.0.source": scene.file("bad.jsonl", "{not json\n")}


def _rows_of_nothing(scene: Scene) -> dict[str, Any]:
    """Blank lines between paragraphs."""
    text = "\n\n\n\n".join(f"Paragraph {number} of a text." for number in range(3))
    source = {"source": scene.file("text.txt", f"{text}\n"), "format": "text"}
    return {"calibration.data": [source], "calibration.packing": False, "calibration.num_sensitivity_samples": 8}


def _token_ids(content: str | bytes) -> Callable[[Scene], dict[str, Any]]:
    return lambda scene: {"calibration.token_ids": scene.file("ids.json", content)}


def _test_rows_as_a_search_task(scene: Scene) -> dict[str, Any]:
    """A task of another name that asks the held-out questions."""
    demo = shutil.copytree(DEMO_DATA.parent, scene.folder / "demo")
    text = (demo / "tasks" / f"{TEST_TASK}.yaml").read_text()
    (demo / "tasks" / "copy.yaml").write_text(text.replace(f"task: {TEST_TASK}", "task: copy_of_test"))
    return {"search.tasks": ["copy_of_test"], "evaluate.include_path": str(demo / "tasks")}


def _task_of_likelihood(scene: Scene, section: str) -> dict[str, Any]:
    """A task that measures how likely a text is, and no accuracy."""
    demo = shutil.copytree(DEMO_DATA.parent, scene.folder / "demo")
    text = (demo / "tasks" / f"{SEARCH_TASK}.yaml").read_text().replace(f"task: {SEARCH_TASK}", "task: likelihood")
    task = yaml.load(text.replace("!function rows.load", "FUNCTION"), yaml.SafeLoader)
    task |= {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}", "doc_to_text": ""}
    task["metric_list"] = [{"metric": "bits_per_byte"}]
    del task["doc_to_choice"]
    (demo / "tasks" / "likelihood.yaml").write_text(yaml.safe_dump(task).replace("FUNCTION", "!function rows.load"))
    return {f"{section}.tasks": ["likelihood"], "evaluate.include_path": str(demo / "tasks")}


def _task_counted_from_one(scene: Scene) -> dict[str, Any]:
    """A task file that takes the answers' positions for one more than they are."""
    demo = shutil.copytree(DEMO_DATA.parent, scene.folder / "demo")
    task = demo / "tasks" / f"{TEST_TASK}.yaml"
    task.write_text(task.read_text().replace("choices.label.index(answerKey)", "choices.label.index(answerKey) + 1"))
    return {"evaluate.include_path": str(demo / "tasks")}


QUESTION = {"question": "Is water wet?", "choices": {"text": ["no", "yes"], "label": ["A", "B"]}, "answerKey": "B"}
OVERLAP = "must not overlap"
OTHER_ROWS = "take other rows"

# fmt: off
DATA = [
    refused(
        "data-missing", {"data.train.0.source": "/no/such.jsonl"}, "`data.train.0.source`", "/no/such.jsonl",
        "does not exist", "name"
    ),
    refused(
        "data-wrong-extension", lambda scene: {"data.train.0.source": scene.file("rows.xlsx", "PK")},
        "`data.train.0.source`", "{folder}/rows.xlsx", "no data file", ".jsonl, .json, .parquet, .csv, .tsv or .txt"
    ),
    refused(
        "data-wrong-extension-relative", {"data.train.0.source": "rows.xlsx"}, "`data.train.0.source`", "rows.xlsx",
        "no data file", ".jsonl, .json, .parquet, .csv, .tsv or .txt"
    ),
    refused(
        "data-not-json", _not_json,
        "`data.train.0.source`", "{folder}/bad.jsonl", "line 1 is no JSON", "name another"
    ),
    refused(
        "data-empty", lambda scene: {"data.train.0.source": scene.file("empty.jsonl", "")}, "`data.train.0.source`",
        "{folder}/empty.jsonl", "empty", "name another"
    ),
    refused(
        "data-split-unknown", {"data.train.0.split": "trian"}, "`data.train.0.split`", '"trian"', "Unknown split",
        "['train']"
    ),
    refused(
        "data-format-unknown", {"data.train.0.format": "chat"}, "`data.train.0.format`", "'chat'",
        "'instruction', 'multiple_choice' or 'text'"
    ),
    refused(
        "column-missing", lambda scene: _rows(scene, "rows.jsonl", {"q": "?", "choices": ["a"], "answerKey": "A"}),
        "`data.train.0.columns.question`", "question", "no column", "they have q, choices, answerKey"
    ),
    refused(
        "column-mapped-to-nothing", {"data.train.0.columns": {"answer": "solution"}}, "`data.train.0.columns.answer`",
        "solution", "no column", "they have id, question, choices, answerKey"
    ),
    refused(
        "column-unknown", {"data.train.0.columns": {"quetsion": "question"}}, "`data.train.0.columns`", "quetsion",
        "rows of format multiple_choice have the columns question, choices, answer"
    ),
    refused(
        "column-list-for-one", {"data.train.0.columns": {"question": ["question", "topic"]}},
        "`data.train.0.columns.question`", "question, topic", "one column"
    ),
    refused(
        "choices-no-list", {"data.train.0.columns": {"choices": "question"}}, "`data.train.0.columns.choices`",
        "question", "list"
    ),
    refused(
        "answer-no-label", lambda scene: _rows(scene, "rows.jsonl", QUESTION, QUESTION | {"answerKey": "E"}),
        "`data.train.0.columns.answer`", "'E'", "one of the labels A, B", "from 0 to 1"
    ),
    refused(
        "rows-cut-to-nothing", {"data.max_length": 8}, "`data.max_length`", "8", "no row a token to predict",
        "make it longer"
    ),
    refused(
        "chat-without-template", {"data.template": "chat", "data.train.0": {"source": INSTRUCTIONS}},
        "`data.template: chat`", "chat", "needs a tokenizer with a chat template", "use alpaca"
    ),
    refused(
        "calibration-rows", {"calibration.num_sensitivity_samples": 64}, "num_sensitivity_samples`", "64",
        "there are 48", "ask for fewer or give more"
    ),
    refused(
        "calibration-rows-of-importance", {"calibration.num_samples": 64, "calibration.packing": False},
        "`calibration.num_samples`", "64", "there are 48", "ask for fewer or give more"
    ),
    refused(
        "calibration-text-too-short", {"calibration.packing": True, "calibration.num_samples": 4000},
        "`calibration.num_samples`", "4000 samples of 128 tokens", "with a token to predict, since",
        "`calibration.packing: false`, which takes a row for a sample"
    ),
    refused(
        "calibration-text-of-no-sample", {"calibration.packing": True, "calibration.max_length": 10**6},
        "`calibration.num_samples`", "8 samples of 1000000 tokens", "together: make `calibration.max_length` shorter"
    ),
    refused(
        "calibration-rows-of-nothing", _rows_of_nothing, "`calibration.num_samples`", "8 rows",
        "only 3 of the calibration rows have a token to predict within 128 tokens", "ask for fewer, give more rows"
    ),
    refused(
        "sensitivity-rows-of-nothing",
        lambda scene: {"data.train": _rows_of_nothing(scene)["calibration.data"], "calibration.num_samples": 1}
        | {"calibration.max_length": 8, "calibration.num_sensitivity_samples": 8},
        "`calibration.num_sensitivity_samples`", "8 rows", "only 3 of the calibration rows have a token to predict",
        "ask for fewer, give more rows"
    ),
    refused(
        "token-ids-missing", {"calibration.token_ids": "/no/ids.json"}, "`calibration.token_ids`", "/no/ids.json",
        "cannot be read", "No such file"
    ),
    refused(
        "token-ids-a-folder", lambda scene: {"calibration.token_ids": str(scene.folder)}, "`calibration.token_ids`",
        "{folder}", "cannot be read", "directory"
    ),
    refused("token-ids-not-json", _token_ids("[[1, 2"), "`calibration.token_ids`", "ids.json", "cannot be read as"),
    refused("token-ids-not-text", _token_ids(b"\xff\xfe"), "`calibration.token_ids`", "ids.json", "cannot be read"),
    refused("token-ids-empty", _token_ids("[]"), "`calibration.token_ids`", "ids.json", "a list of lists of token ids"),
    refused(
        "token-ids-one-list", _token_ids("[1, 2, 3]"), "`calibration.token_ids`", "ids.json", "a list of lists",
        "such as [["
    ),
    refused(
        "token-ids-mapping", _token_ids('{"ids": [[1, 2]]}'), "`calibration.token_ids`", "ids.json", "a list of lists",
        "such as [["
    ),
    refused(
        "token-ids-beyond", _token_ids("[[1, 2], [3, 512]]"), "`calibration.token_ids`", "sample 1", "has 512",
        "from 0 to 511"
    ),
    refused("token-ids-negative", _token_ids("[[1, -2]]"), "`calibration.token_ids`", "has -2", "from 0 to 511"),
    refused("token-ids-fraction", _token_ids("[[1, 2.0]]"), "`calibration.token_ids`", "has 2.0", "a whole number"),
    refused("token-ids-boolean", _token_ids("[[1, true]]"), "`calibration.token_ids`", "has True", "a whole number"),
    refused("token-ids-text", _token_ids('[["Hello"]]'), "`calibration.token_ids`", "has 'Hello'", "a whole number"),
    refused(
        "token-ids-too-few", _token_ids("[[1, 2], [3]]"), "`calibration.token_ids`", "sample 1", "1 token;",
        "two at least"
    ),
    refused("token-ids-none", _token_ids("[[1, 2], []]"), "`calibration.token_ids`", "sample 1", "0 tokens;"),
    refused(
        "train-in-validation", {"data.validation.0.source": QUESTIONS.format("train")}, "`data.train`",
        "`data.validation` share 16", OVERLAP, OTHER_ROWS
    ),
    refused(
        "train-in-confirmation", {"data.confirmation.0.source": QUESTIONS.format("train")}, "`data.train`",
        "`data.confirmation` share 16", OVERLAP, OTHER_ROWS
    ),
    refused(
        "validation-in-confirmation", {"data.confirmation.0.source": QUESTIONS.format("validation")},
        "`data.validation`", "`data.confirmation` share 16", OVERLAP, OTHER_ROWS
    ),
    refused(
        "train-in-text",
        {"evaluate.text": [{"source": QUESTIONS.format("train"), "format": "text", "columns": {"text": "question"}}]},
        "`data.train`", "`evaluate.text` share", OVERLAP, OTHER_ROWS
    ),
    refused(
        "confirmation-in-text",
        {"evaluate.text": [
            {"source": QUESTIONS.format("confirmation"), "format": "text", "columns": {"text": "question"}}
        ]},
        "`data.confirmation`", "`evaluate.text` share", OVERLAP, OTHER_ROWS
    ),
    refused(
        "test-in-train", {"data.train.0.source": QUESTIONS.format("test")}, "`data.train`", "`evaluate.tasks` share 8",
        OVERLAP, OTHER_ROWS
    ),
    refused(
        "test-in-validation", {"data.validation.0.source": QUESTIONS.format("test")}, "`data.validation`",
        "`evaluate.tasks` share 8", OVERLAP, OTHER_ROWS
    ),
    refused(
        "test-in-calibration",
        {"calibration.data": [{"source": QUESTIONS.format("test"), "format": "multiple_choice"}]}, "`calibration.data`",
        "`evaluate.tasks`", OVERLAP, OTHER_ROWS
    ),
    refused(
        "test-in-search-task", _test_rows_as_a_search_task, "`search.tasks`", "`evaluate.tasks`", OVERLAP, OTHER_ROWS
    ),
    refused(
        "task-unknown", {"evaluate.tasks": ["qpruner_everyday_tset"]}, "`evaluate.tasks`", "`qpruner_everyday_tset`",
        "has no task", f"did you mean {TEST_TASK}"
    ),
    refused(
        "search-task-unknown", {"search.tasks": ["qpruner_everyday_tset"]}, "`search.tasks`", "`qpruner_everyday_tset`",
        "has no task", f"did you mean {TEST_TASK}"
    ),
    refused(
        "task-without-accuracy", lambda scene: _task_of_likelihood(scene, "evaluate"), "`evaluate.tasks`",
        "reports bits_per_byte", "none of acc_norm, acc, exact_match", "name a task that reports an accuracy"
    ),
    refused(
        "task-whose-answer-is-no-choice", _task_counted_from_one, "`evaluate.tasks`: question",
        f"of task `{TEST_TASK}` has the answer 4", "none of its 4 choices", "position from 0 to 3"
    ),
    refused(
        "search-task-without-accuracy", lambda scene: _task_of_likelihood(scene, "search"), "`search.tasks`",
        "reports bits_per_byte", "none of acc_norm, acc, exact_match", "name a task that reports an accuracy"
    ),
    refused(
        "search-metric-unreported", {"search.metric": "acc_norm", "search.tasks": [SEARCH_TASK], "search.limit": 8},
        "`search.metric`", "got acc_norm", f"every task of `search.tasks` reports, got acc_norm, but `{SEARCH_TASK}`",
        "name one that all report, `accuracy` for each task's own"
    ),
    refused(
        "search-metric-unknown", {"search.metric": "f1", "search.tasks": [SEARCH_TASK], "search.limit": 8},
        "`search.metric`", "f1", "'acc_norm', 'acc' or 'exact_match'"
    ),
    refused(
        "search-limit-takes-all", {"search.metric": "accuracy", "search.tasks": [SEARCH_TASK], "search.limit": 500},
        "`search.limit`", "120, got 500", "leave as many questions of every task", "lower it to 60"
    ),
    refused(
        "search-limit-leaves-few", {"search.metric": "accuracy", "search.tasks": [SEARCH_TASK], "search.limit": 61},
        "`search.limit`", "120, got 61", "leave as many questions of every task", "lower it to 60"
    ),
    refused(
        "include-path-missing", {"evaluate.include_path": "/no/tasks"}, "`evaluate.include_path`", "/no/tasks",
        "does not exist", "name"
    ),
    refused(
        "include-path-a-file", {"evaluate.include_path": "package:qpruner/demo/__init__.py"}, "`evaluate.include_path`",
        "demo/__init__.py", "is a file", "name a folder"
    ),
]
# fmt: on


@pytest.fixture
def scene(tmp_path: Path, tiny_model: Path) -> Scene:
    return Scene(tmp_path, tiny_model)


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights while an input is judged fails the test."""
    from transformers import PreTrainedModel

    def refuse(*args: object, **options: object) -> None:
        pytest.fail("weights were loaded before the input was refused")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


def config_of(scene: Scene, change: Change = {}) -> RunConfig:  # noqa: B006 (never changed)
    """The tiny configuration with some keys changed, validated."""
    raw = raw_config(scene.model, scene.folder / "run")
    for key, value in (change(scene) if callable(change) else change).items():
        raw = with_key(raw, key, value)
    return validate_config(raw)


def test_the_configuration_that_the_rows_spoil_is_accepted(scene: Scene) -> None:
    inspection = inspect(config_of(scene))
    assert inspection.budget_bytes > 0
    assert not (scene.folder / "run").exists(), "inspecting leaves nothing behind"


@pytest.mark.parametrize(("change", "said"), [*CONFIGURATION, *MODEL, *DATA])
def test_refused_with_key_value_rule_and_remedy(change: Change, said: tuple[str, ...], scene: Scene) -> None:
    with pytest.raises(UserError) as caught:
        inspect(config_of(scene, change))
    assert caught.value.exit_code == 2
    expected = [part.replace("{folder}", str(scene.folder)) for part in said]
    assert [part for part in expected if part not in str(caught.value)] == [], str(caught.value)
    assert not (scene.folder / "run").exists(), "a refusal leaves nothing behind"


def test_every_problem_is_told_at_once(scene: Scene) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(scene, {"lora.rank": 0, "prune.rate": 2, "prune.rat": 1, "search.first_rung": 9})
    assert len(caught.value.problems) == 4
    assert "4 problems" in str(caught.value)


def test_what_is_wrong_with_model_rows_and_tasks_is_told_at_once(scene: Scene) -> None:
    """Each look takes a person's time, and one at a cluster more."""
    bare = scene.file("bare.jsonl", '{"x": 1}\n')
    change = {
        "model.source": "/no/model",
        "data.train": [{"source": "/no/rows.jsonl"}, {"source": bare}],
        "data.confirmation": [{"source": "/no/others.jsonl"}],
        "evaluate.tasks": ["no_such_task"],
    }
    with pytest.raises(ConfigError) as caught:
        inspect(config_of(scene, change))
    told = ("/no/model", "/no/rows.jsonl", "`data.train.1.columns", "/no/others.jsonl", "`no_such_task`")
    assert len(caught.value.problems) == len(told), caught.value.problems
    assert all(part in problem for part, problem in zip(told, caught.value.problems, strict=True))


def test_the_smallest_budget_that_the_error_names_works(scene: Scene) -> None:
    with pytest.raises(UserError) as caught:
        inspect(config_of(scene, {"quantize.budget": {"bytes": 1}}))
    found = re.search(r"smallest that works is (\d+) bytes \(([\d.]+) GiB\)", str(caught.value))
    assert found, str(caught.value)
    smallest, smallest_gib = int(found[1]), float(found[2])
    inspection = inspect(config_of(scene, {"quantize.budget": {"bytes": smallest}}))
    layout = inspection.pruned
    assert inspection.budget_bytes == smallest
    every = itertools.product((4, 8), repeat=len(layout.groups))
    names = layout.uniform(4).groups
    weights = sorted(layout.plan_bytes(PrecisionPlan(names, bits)) for bits in every)
    assert weights[0] < smallest == weights[1], "the first budget that leaves a choice"
    assert inspect(config_of(scene, {"quantize.budget": {"gib": smallest_gib}})).budget_bytes >= smallest
    with pytest.raises(UserError, match="smallest that works"):
        inspect(config_of(scene, {"quantize.budget": {"bytes": smallest - 1}}))
    with pytest.raises(UserError, match=f"only every group at 4 bits fits, {weights[0]} bytes"):
        inspect(config_of(scene, {"quantize.budget": {"bytes": weights[0]}, "search.pareto": True}))


def test_the_largest_budget_that_the_error_names_works_and_a_front_may_have_it_all(scene: Scene) -> None:
    everything = {"quantize.budget": {"fraction": 1.0}}
    with pytest.raises(UserError) as caught:
        inspect(config_of(scene, everything))
    found = re.search(r"the largest (\d+) bytes \(([\d.]+) GiB\)", str(caught.value))
    assert found, str(caught.value)
    largest, largest_gib = int(found[1]), float(found[2])
    assert inspect(config_of(scene, {"quantize.budget": {"bytes": largest}})).budget_bytes == largest
    assert inspect(config_of(scene, {"quantize.budget": {"gib": largest_gib}})).budget_bytes <= largest
    with pytest.raises(UserError, match="leaves nothing to choose"):
        inspect(config_of(scene, {"quantize.budget": {"bytes": largest + 1}}))
    assert inspect(config_of(scene, everything | {"search.pareto": True})).budget_bytes == largest + 1


def warned(scene: Scene, changed: dict[str, Any], about: str | None = None) -> list[str]:
    """The warnings on something; else all but those of the scene's few rows and questions to score on."""
    found = inspect(config_of(scene, changed)).warnings
    few = (" tokens of ", "over so few")
    return [each for each in found if (about in each if about else not any(part in each for part in few))]


def test_rows_without_a_response_are_a_warning_with_their_number(scene: Scene) -> None:
    """An empty cell, and a row of a file that lacks the column."""
    rows = [{"instruction": f"Say {number}.", "output": "it"} for number in range(40)]
    rows[3], rows[7] = {"instruction": "Explain tea.", "output": " "}, {"instruction": "Explain salt."}
    file = scene.file("empty.jsonl", "\n".join(map(json.dumps, rows)))
    (warning,) = warned(scene, {"data.train": [{"source": file}], "data.max_length": 256}, "have no response")
    assert "2 rows of `data.train` of 40" in warning and "'Explain tea.'" in warning and "leave them out" in warning
    assert warned(scene, {}, "have no response") == []


def test_rows_without_room_for_a_response_are_a_warning(scene: Scene) -> None:
    """Rows that lose their ends alone are none: that is what `data.max_length` is for, and `check` counts them."""
    rows = [{"instruction": "Say it.", "output": "word " * 8} for _ in range(30)]
    rows += [{"instruction": f"Say {number}.", "output": "word " * 300} for number in range(7)]
    cut = scene.file("cut.jsonl", "\n".join(map(json.dumps, rows)))
    rows += [{"instruction": f"Say {number} " * 150, "output": "it"} for number in range(3)]
    lost = scene.file("lost.jsonl", "\n".join(map(json.dumps, rows)))
    at_256 = {"data.train": [{"source": lost}], "data.max_length": 256}
    (warning,) = warned(scene, at_256, "all of their response")
    assert "about 3 of 40 rows of `data.train`" in warning and "`data.max_length` of 256 tokens or more" in warning
    assert warned(scene, at_256 | {"data.max_length": 512}, "all of their response") == []
    assert warned(scene, at_256 | {"data.train": [{"source": cut}], "search.max_trials": 8}) == []
    assert num_cut(load_examples([DataSource(source=cut)], "data.train"), 256) == 7


def test_too_few_tokens_to_score_on_are_a_warning_with_the_numbers(scene: Scene) -> None:
    """Every other confirmation row chooses."""
    validation, confirmation = warned(scene, {}, "tokens of")
    for warning, key, rows in ((validation, "data.validation", 16), (confirmation, "data.confirmation", 8)):
        tokens = re.search(rf"`{key}` .* on about (\d+) tokens of {rows} rows: too few to tell plans apart", warning)
        assert tokens and 0 < int(tokens[1]) < 500, warning
        assert "more rows" in warning and "500 tokens at least" in warning

    def rows_of(*texts: str) -> dict[str, Any]:
        rows = [{"text": f"{number} {text}"} for number, text in enumerate(texts)]
        return {
            "data.validation": [
                {"source": scene.file("rows.jsonl", "\n".join(map(json.dumps, rows))), "format": "text"}
            ]
        }

    for enough in (rows_of(*["word " * 20] * 40), rows_of(*["\u5b57" * 20] * 40)):
        (confirmation,) = warned(scene, enough, "tokens of")
        assert "`data.confirmation`" in confirmation
    validation, _ = warned(scene, rows_of("word " * 10_000) | {"data.max_length": 64}, "tokens of")
    assert "about 64 tokens of 1 row:" in validation, "a row is cut"
    asked = scene.file("asked.jsonl", json.dumps({"instruction": "Say it.", "output": "word " * 1000}))
    cut = {"data.validation": [{"source": asked}], "data.max_length": 250}
    assert "about 209 tokens of 1 row:" in warned(scene, cut, "tokens of")[0], "its prompt takes its share"
    by_accuracy = {"search.metric": "accuracy", "search.tasks": ["qpruner_everyday_validation"], "search.limit": 8}
    assert warned(scene, by_accuracy, "tokens of") == []


def test_too_few_questions_are_a_warning_with_their_standard_error(scene: Scene) -> None:
    """Of the test, and of trials where accuracy is searched; those that a task has where no limit is given."""
    by_accuracy = {"search.metric": "accuracy", "search.tasks": [SEARCH_TASK], "search.limit": 16}
    trials, test = warned(scene, by_accuracy | {"evaluate.limit": 4}, "over so few")
    for warning, said in ((trials, ("16 questions", "0.12", "`search.limit`")), (test, ("4 questions", "0.25"))):
        assert [part for part in said if part not in warning] == [], warning
    assert warned(scene, {"evaluate.limit": 40}, "over so few") == []


def test_trials_that_the_controls_use_up_are_a_warning_with_the_numbers(scene: Scene) -> None:
    few = {"quantize.group": "block", "sensitivity.methods": ["mutual_information", "kl"]}
    assert warned(scene, few | {"search.max_trials": 4}) == []
    (warning,) = warned(scene, few | {"search.max_trials": 3})
    said = ("3 uniform and seed plans", "none of 3 trials", "`search.max_trials`", "`sensitivity.methods`")
    assert [part for part in said if part not in warning] == [], warning


def test_a_confirmation_row_that_comes_again_is_left_out_and_counted(scene: Scene) -> None:
    """Every other row chooses the winner: twice in a row, one would choose and judge."""
    rows = [f"{row} and {row}" for row in ("one", "one", "two", "three", "Two!", "one")]
    file = scene.file("rows.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
    found = inspect(config_of(scene, {"data.confirmation": [{"source": file, "format": "text"}]}))
    assert [row.response for row in found.examples["confirmation"]] == ["one and one", "two and two", "three and three"]
    said = ("3 rows of `data.confirmation` left out", "'one and one'")
    assert [part for part in said if part not in found.warnings[0]] == [], found.warnings


def test_a_question_that_scores_trials_and_chooses_the_winner_is_a_warning(scene: Scene) -> None:
    questions = demo_rows("questions_validation.jsonl")[:4]
    questions[3] = questions[0]
    demo = shutil.copytree(DEMO_DATA.parent, scene.folder / "demo")
    rows = "".join(json.dumps(row) + "\n" for row in questions)
    (demo / "data" / "questions_validation.jsonl").write_text(rows)
    change = {"search.metric": "accuracy", "search.tasks": [SEARCH_TASK], "search.limit": 2}
    warning = inspect(config_of(scene, change | {"evaluate.include_path": str(demo / "tasks")})).warnings[0]
    said = ("`search.tasks` repeat 1 question", normalized(questions[0]["question"]), "`search.limit`")
    assert [part for part in said if part not in warning] == [], warning


# ---- the file itself, and --set


def spoilt(name: str, text: str | bytes, *said: str) -> Any:
    """A row: what is appended to the whole file, or the whole of it if that starts with `=`."""
    return pytest.param(text, said, id=name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        spoilt("key-twice", "seed: 1\nseed: 2\n", "`seed`", "given twice", "line"),
        spoilt("key-twice-nested", "=lora:\n  rank: 4\n  rank: 8\n", "`rank`", "given twice", "line 3"),
        spoilt("syntax", "lora: [1\n", "not valid YAML", "line", "expected ',' or ']'", "see tune_configs/"),
        spoilt(
            "tab",
            "=lora:\n\trank: 1\n",
            "config.yaml, line 2, column 1: a tab",
            "by spaces alone",
            "replace the file's tabs",
        ),
        spoilt("tab-after-key", "=lora:\n  rank:\t1\n", "config.yaml, line 2, column 8: a tab", "by spaces alone"),
        spoilt("list", "=- output\n- model\n", "mapping of sections", "list", "see tune_configs/"),
        spoilt("empty", "=", "mapping of sections"),
        spoilt("binary", b"\xff\xfe\x00", "not valid YAML"),
        spoilt("list-as-key", "? [a]\n: b\n", "not valid YAML", "line", "key"),
        spoilt("python-object", "seed: !!python/object:os.system x\n", "not valid YAML", "python/object"),
    ],
)
def test_refused_file(text: str | bytes, said: tuple[str, ...], scene: Scene) -> None:
    whole = b"" if text[:1] in ("=", b"\xff") else yaml.safe_dump({"output": "runs/x"}).encode()
    path = scene.file("config.yaml", whole + (text.removeprefix("=").encode() if isinstance(text, str) else text))
    with pytest.raises(UserError) as caught:
        load_config(Path(path))
    assert [part for part in (path, *said) if part not in str(caught.value)] == [], str(caught.value)


def test_rows_of_a_task_that_are_no_json_are_refused_with_what_the_reader_says(scene: Scene) -> None:
    """Not only that generating the data set failed."""
    (scene.folder / "tasks").mkdir()
    rows = scene.file("tasks/questions.jsonl", b'{"question": "a"}\n{"question": }\n')
    task = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows}}}
    task |= {"output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}"}
    task |= {"doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]}
    folder = Path(scene.file("tasks/mine.yaml", yaml.safe_dump(task).encode())).parent
    changed = {"evaluate.include_path": str(folder), "evaluate.tasks": ["mine"]}
    with pytest.raises(UserError, match="rows of mine cannot be loaded: JSON parse error"):
        inspect(config_of(scene, changed))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.yaml", r"configuration file .* does not exist.*tune_configs/"),
        (".", "is a folder; give a configuration file"),
    ],
)
def test_refused_file_that_is_none(name: str, said: str, scene: Scene) -> None:
    with pytest.raises(UserError, match=said):
        load_config(scene.folder / name)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        pytest.param("lora.rank", ("section.key=value", "search.max_trials=20", "'lora.rank'"), id="without-equals"),
        pytest.param("=3", ("section.key=value", "'=3'"), id="without-key"),
        pytest.param(
            "model.source.x=3",
            ("model.source.x=3", "`source` is not a section", "`qpruner check --show-config` prints"),
            id="into-a-value",
        ),
        pytest.param("lora.rank=[", ("lora.rank=[", "not valid YAML"), id="not-yaml"),
        pytest.param("lora.rnak=3", ("`lora.rnak`", "did you mean `lora.rank`"), id="misspelt"),
        pytest.param("lora.rank=null", ("`lora.rank`", "None", "valid integer"), id="null"),
        pytest.param(
            "lora.rnak=",
            ("lora.rnak=", "`lora.rnak` is not a known key", "did you mean `lora.rank`?"),
            id="unknown-to-take-out",
        ),
        pytest.param(
            "serach.patience=",
            ("serach.patience=", "`serach` is not a known key", "did you mean `search`?"),
            id="unknown-section-to-take-out",
        ),
        pytest.param(
            "search.max_hours=",
            ("search.max_hours=", "no `search.max_hours` in the file", "its default holds"),
            id="none-to-take-out",
        ),
        pytest.param(
            "data.train.9.limit=3",
            ("data.train.9.limit=3", "no item 9 in a list of 1 item", "from 0"),
            id="no-such-item",
        ),
        pytest.param(
            "data.train.first.limit=3", ("`first` must be the number of an item", "0, 1"), id="item-without-number"
        ),
        pytest.param(
            "finetune.epochs=1",
            ("exactly one", "both", "take one out", "`--set finetune.steps=`"),
            id="steps-and-epochs",
        ),
        pytest.param(
            "quantize.budget.bytes=9", ("exactly one", "bytes", "`--set quantize.budget.fraction=`"), id="second-budget"
        ),
    ],
)
def test_refused_override(override: str, said: tuple[str, ...], scene: Scene) -> None:
    path = scene.file("config.yaml", yaml.safe_dump(raw_config(scene.model, scene.folder / "run")))
    with pytest.raises(UserError) as caught:
        load_config(Path(path), [override])
    assert [part for part in said if part not in str(caught.value)] == [], str(caught.value)


def test_a_key_is_taken_out_and_an_item_of_a_list_changed(scene: Scene) -> None:
    raw = raw_config(scene.model, scene.folder / "run")
    for key, value in {"prune.aggregation": "vector", "finetune.random_plans": 1, "calibration.data": None}.items():
        raw = with_key(raw, key, value)
    path = Path(scene.file("config.yaml", yaml.safe_dump(raw)))

    def load(*overrides: str) -> RunConfig:
        return load_config(path, list(overrides))

    assert load("finetune.random_plans=").finetune.random_plans == 3, "the default"
    assert load("prune.rate=", "prune.layer_rate=0.2").prune.rate is None, "null with `layer_rate`"
    assert load("prune.rate=").prune.rate == 0.2, "the default"
    changed = load("data.validation.0.split=train[:3]", "data.train.0.limit=8").data
    assert (changed.validation[0].split, changed.train[0].limit) == ("train[:3]", 8)
    assert changed.train[0].source == raw["data"]["train"][0]["source"], "the item's other keys stay"
    assert load("model.revision=null").model.revision is None


# ---- a disk too small


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of one MiB."""
    with disk_of("1m", tmp_path / "disk") as folder:
        yield folder


def test_a_disk_too_small_is_refused(small_disk: Path, scene: Scene) -> None:
    # Enough trials that their checkpoints alone do not fit.
    config = config_of(scene, {"output": str(small_disk / "run"), "search.max_trials": 50})
    with pytest.raises(UserError) as caught:
        check(config, lambda event: None)
    said = str(caught.value)
    assert [part for part in ("`output`", str(small_disk), "needs about", "make room") if part not in said] == [], said
    amounts = [float(number) for number in re.findall(r"(\d+(?:\.\d+)?) [KMG]i?B", said)]
    assert len(amounts) == 2 and all(amounts), f"both amounts are told in a unit that shows them: {said}"


# ---- the command line

COMMANDS = [
    pytest.param("check", {"lora.rnak": 8}, (), "did you mean `lora.rank`", id="unknown-key"),
    pytest.param("check", {}, ("--set", "lora.rank"), "section.key=value", id="set-without-equals"),
    pytest.param("check", {"quantize.budget": {"bytes": 1}}, (), "the smallest that works is", id="budget"),
    pytest.param("check", lambda scene: scene.edited_model(_gpt2), (), "`gpt2` is not supported", id="architecture"),
    pytest.param("check", _not_json, (), "line 1 is no JSON", id="data-not-json"),
    pytest.param("check", {"search.resources_per_trial": {"gpu": 999}}, (), "ask for less", id="resources"),
    pytest.param("check", {"search.max_gpu_hours": 1}, (), "use `search.max_hours`", id="gpu-hours", marks=ON_CPU),
    pytest.param("check", {}, ("--address", "127.0.0.1:1"), "no Ray cluster answers", id="address"),
    pytest.param("run", lambda scene: {"output": scene.file("taken", "")}, (), "name a folder", id="run-into-a-file"),
    pytest.param("run", {"search.searcher": "bayesopt"}, (), "qpruner[bayesopt]", id="extra", marks=WITHOUT_BAYESOPT),
    pytest.param(
        "check",
        {"finetune.num_workers": 999, "training.batch_size": 999 * 4},
        (),
        "asks for 999 workers",
        id="workers",
    ),
    pytest.param(
        "run",
        {"finetune.num_workers": 999, "training.batch_size": 999 * 4},
        (),
        "ask for fewer, or add machines",
        id="run-workers",
    ),
    pytest.param("run", {"search.resources_per_trial": {"gpu": 999}}, (), "ask for less", id="run-resources"),
]


def command(scene: Scene, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `qpruner` in the row's folder."""
    arguments = (sys.executable, "-m", "qpruner", *arguments)
    return subprocess.run(arguments, cwd=scene.folder, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(("verb", "change", "options", "said"), COMMANDS)
def test_the_command_ends_with_code_2_and_no_traceback(
    verb: str, change: Change, options: tuple[str, ...], said: str, scene: Scene
) -> None:
    raw = raw_config(scene.model, scene.folder / "run")
    for key, value in (change(scene) if callable(change) else change).items():
        raw = with_key(raw, key, value)
    done = command(scene, verb, scene.file("config.yaml", yaml.safe_dump(raw)), "--json", *options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and said in done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "error" and said in told["error"]
    assert not (scene.folder / "run" / "prepare").exists(), "no stage has run"


def test_without_json_the_error_is_on_stderr_alone(scene: Scene) -> None:
    done = command(scene, "check", scene.folder / "none.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: configuration file ")


def test_no_row_of_the_demo_is_shared(scene: Scene) -> None:
    """The overlap rows above mean something only if the demo's own files are disjoint."""
    names = ("train", "validation", "confirmation", "test")
    questions = [{row["question"] for row in demo_rows(f"questions_{name}.jsonl")} for name in names]
    assert sum(map(len, questions)) == len(set().union(*questions))
