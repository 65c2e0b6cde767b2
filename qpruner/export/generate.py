"""Load the models of a run or a folder, and let each answer a prompt.

An answer depends on model, prompt and sampling alone: the seed is set anew for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from qpruner.config.schema import ModelConfig
from qpruner.data.encoding import alpaca_prompt
from qpruner.errors import UserError, first_line
from qpruner.hf import load, weights_folder
from qpruner.models.loading import OnWork, check_folder, ignore_progress, load_dense, load_tokenizer
from qpruner.models.memory import raising_out_of_memory
from qpruner.runs.records import PrepareRecord, RunState
from qpruner.runs.run_dir import STATE, RunDir
from qpruner.runs.storage import export_command, run_path

BASE, PRUNED, FINAL = WHICH = ("base", "pruned", "final")
"""The models of a run, in the order in which they are made."""
AGAINST_SHORTAGE = (
    "name fewer models with `--which`, allow fewer `--max-tokens` or shorten the prompt; where a GPU's memory ran out, "
    "set `CUDA_VISIBLE_DEVICES=` to use the machine's"
)
Template = Literal["chat", "alpaca", "none"]
"""The tokenizer's own, none where it has none; that of the fine-tune's instructions (`data.template: alpaca`); none."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 takes the likeliest token every time."""

    max_tokens: int
    temperature: float
    seed: int
    template: Template = "chat"


@dataclass(frozen=True)
class Answer:
    """A model's answer without special tokens, which `num_tokens` counts, and what ended it: the model or its room."""

    text: str
    num_tokens: int
    ended: Literal["end", "length"]


class Generator:
    """A model in memory, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer

    @raising_out_of_memory(AGAINST_SHORTAGE)
    def answer(self, prompt: str, sampling: Sampling) -> Answer:
        """Answer a prompt."""
        ids = self._encoded(prompt, sampling.template).to(self._model.device)
        length = ids.shape[1]
        context = getattr(self._model.config, "max_position_embeddings", None) or length + sampling.max_tokens
        if length >= context:
            raise UserError(f"the prompt has {length} tokens, and the model's context {context}: shorten the prompt")
        # What ends an answer: the tokenizer's end token, and those of the model's generation_config.json.
        own = self._model.generation_config.eos_token_id
        ends = sorted({*(own if isinstance(own, list) else [own]), self._tokenizer.eos_token_id} - {None})
        how: dict[str, Any] = {"temperature": sampling.temperature} if sampling.temperature else {}
        torch.manual_seed(sampling.seed)
        written = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=min(sampling.max_tokens, context - length),
                do_sample=bool(how),
                eos_token_id=ends,
                pad_token_id=self._tokenizer.pad_token_id,
                **how,
            ),
        )
        tokens = written[0, length:].tolist()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, len(tokens), "end" if tokens[-1] in ends else "length")

    def _encoded(self, prompt: str, template: Template) -> torch.Tensor:
        """Return the token ids ``(1, seq)`` of a prompt with its template."""
        has_chat = template == "chat" and self._tokenizer.chat_template
        if has_chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        elif template == "alpaca":
            prompt = alpaca_prompt(prompt)
        # A chat template writes its own special tokens.
        ids: torch.Tensor = self._tokenizer(prompt, add_special_tokens=not has_chat, return_tensors="pt")["input_ids"]
        return ids


@dataclass(frozen=True)
class Source:
    """Where a model is; `dense` is the `model` section of a run, for its dense models."""

    name: str
    folder: Path
    dense: ModelConfig | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on disk, adapter included, which is what they take in memory."""
        places = {self.folder, weights_folder(self.folder)}
        return sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))

    def load(self, on_progress: OnWork = ignore_progress) -> Generator:
        """Load the model."""
        try:
            with raising_out_of_memory(AGAINST_SHORTAGE):
                if self.dense:
                    model = load_dense(str(self.folder), self.dense.dtype, self.dense, on_progress)
                else:
                    model = load(self.folder, on_progress)
                return Generator(model, load_tokenizer(str(self.folder), self.dense))
        except (OSError, ValueError, ImportError) as error:
            remedy = "name a folder that transformers loads, with its tokenizer"
            raise UserError(f"{self.folder} cannot be loaded: {first_line(error)}; {remedy}") from error


def sources(place: str | Path, which: Sequence[str]) -> list[Source]:
    """Find the wanted models of a run (all that are there if `which` is empty), or that of a folder alone."""
    if "://" in str(place) and (command := export_command(run_path(str(place)))):
        raise UserError(
            f"models are loaded from a folder, and this is a URI: `{command}` "
            "brings its final model here, then name FOLDER"
        )
    place = Path(place).expanduser().resolve()
    if (place / STATE).is_file():
        found = _of_run(RunDir(place, create=False), which)
    elif which:
        remedy = "leave it out, or name a run folder"
        raise UserError(f"`--which` chooses among the models of a run, and {place} has no {STATE}: {remedy}")
    elif not place.is_dir():
        raise UserError(f"{place} is no folder: name a run folder, or a model's")
    else:
        found = [Source(place.name, place)]
    for source in found:
        check_folder(weights_folder(source.folder), f"the {source.name} model")
        has_adapter = (source.folder / "adapter_config.json").is_file()
        if has_adapter and not (source.folder / "adapter_model.safetensors").is_file():
            raise UserError(
                f"the {source.name} model: folder {source.folder} has no adapter_model.safetensors beside its "
                "adapter_config.json (pickled adapters are not read; save it anew with peft's save_pretrained)"
            )
    return found


def _of_run(run: RunDir, which: Sequence[str]) -> list[Source]:
    """Find the models that a run's folder has."""
    state, prepared = run.read_state(RunState), run.read_record("prepare", PrepareRecord)
    assert state
    dense = ModelConfig.model_validate(state.config["model"])
    there = {PRUNED: Source(PRUNED, run.stage("prune"), dense), FINAL: Source(FINAL, run.root / FINAL)}
    if prepared:
        there = {BASE: Source(BASE, run.base_model(prepared), dense), **there}
    there = {name: source for name, source in there.items() if (source.folder / "config.json").is_file()}
    wanted = which or list(there) or WHICH
    if missing := [name for name in wanted if name not in there]:
        chosen = f"; `--which {','.join(there)}` is there" if there else ""
        raise UserError(f"{run.root} has no {missing[0]} model (yet): repeat `qpruner run` to make it{chosen}")
    return [there[name] for name in wanted]
