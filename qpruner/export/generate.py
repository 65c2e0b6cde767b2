"""Load the models of a run or of a folder, and generate answers to prompts.

The answers depend on nothing but the model, the prompt, the settings and the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from qpruner.config.schema import ModelConfig, PruneConfig
from qpruner.data.encoding import alpaca_prompt
from qpruner.errors import UserError, first_line
from qpruner.hf import load, weights_folder
from qpruner.models.loading import OnWork, check_folder, ignore_progress, load_dense, load_tokenizer
from qpruner.models.memory import raising_out_of_memory
from qpruner.plans.plan import UNPRUNED
from qpruner.runs.records import PrepareRecord, RunState
from qpruner.runs.run_dir import STATE, RunDir
from qpruner.runs.storage import export_command, run_path
from qpruner.wording import nearest

FINAL = "final"
"""Name of a run's final model; the others have the names of the cuts, `base` is the model before
pruning."""
AGAINST_SHORTAGE = (
    "select fewer models with `--which`, lower `--max-tokens` or shorten the prompt; if a GPU ran "
    "out of memory, set "
    "`CUDA_VISIBLE_DEVICES=` to use the CPU"
)
Template = Literal["chat", "alpaca", "alpaca_short", "none"]
"""Prompt template, as in `data.template`: the tokenizer's chat template if it has one, an Alpaca
template, or none."""


@dataclass(frozen=True)
class Sampling:
    """Settings for generating answers; temperature 0 always takes the most likely token."""

    max_tokens: int
    temperature: float
    seed: int
    template: Template = "chat"


@dataclass(frozen=True)
class Answer:
    """An answer of a model: its text, its length, and what ended it.

    The text leaves out the special tokens that `num_tokens` counts.
    """

    text: str
    num_tokens: int
    ended: Literal["end", "length"]


@dataclass(frozen=True)
class Generator:
    """A loaded model with its tokenizer, which generates answers."""

    model: Any
    tokenizer: Any

    @raising_out_of_memory(AGAINST_SHORTAGE)
    def answer(self, prompt: str, sampling: Sampling) -> Answer:
        """Generate an answer to a prompt; raise `UserError` if it fills the model's context."""
        ids = self._encoded(prompt, sampling.template).to(self.model.device)
        length = ids.shape[1]
        max_tokens = sampling.max_tokens
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context:
            if length >= context:
                raise UserError(
                    f"the prompt has {length} tokens, but the model's context {context}: "
                    "shorten the prompt"
                )
            max_tokens = min(max_tokens, context - length)

        ends = self._end_tokens()
        torch.manual_seed(sampling.seed)
        written = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
                do_sample=sampling.temperature > 0,
                temperature=sampling.temperature or None,
            ),
        )
        tokens = written[0, length:].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, len(tokens), "end" if tokens[-1] in ends else "length")

    def _end_tokens(self) -> list[int]:
        """List the end token of the tokenizer and those in the model's generation_config.json."""
        eos = self.model.generation_config.eos_token_id
        ends = set(eos) if isinstance(eos, list) else {eos}
        ends.add(self.tokenizer.eos_token_id)
        return sorted(ends - {None})

    def _encoded(self, prompt: str, template: Template) -> torch.Tensor:
        """Apply the template to a prompt and return its token ids ``(1, seq)``."""
        has_chat = template == "chat" and self.tokenizer.chat_template
        if has_chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        elif template in ("alpaca", "alpaca_short"):
            prompt = alpaca_prompt(prompt, is_short=template == "alpaca_short")
        # A chat template writes the special tokens itself.
        encoded = self.tokenizer(prompt, add_special_tokens=not has_chat, return_tensors="pt")
        ids: torch.Tensor = encoded["input_ids"]
        return ids


@dataclass(frozen=True)
class Source:
    """The folder of a model.

    `settings` is the section `model` of a run's configuration for its dense models, and None for
    all other models.
    """

    name: str
    folder: Path
    settings: ModelConfig | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights and the adapter on disk, about as many as in memory."""
        places = {self.folder, weights_folder(self.folder)}
        return sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))

    def load(self, on_progress: OnWork = ignore_progress) -> Generator:
        """Load the model and its tokenizer; raise `UserError` if transformers cannot."""
        folder = str(self.folder)
        try:
            with raising_out_of_memory(AGAINST_SHORTAGE):
                if self.settings:
                    model = load_dense(folder, self.settings.dtype, self.settings, on_progress)
                else:
                    model = load(self.folder, on_progress)
                return Generator(model.eval(), load_tokenizer(folder, self.settings))
        except (OSError, ValueError, ImportError) as error:
            remedy = "give a folder with a tokenizer and a model that transformers can load"
            raise UserError(f"{folder} cannot be loaded: {first_line(error)}; {remedy}") from error


def sources(place: str | Path, which: Sequence[str]) -> list[Source]:
    """Find the models of a run that `which` names, or the single model in a folder.

    An empty `which` names all models that the run has made.

    Raises:
        UserError: `place` is no folder with a model, or the run has no model of that name.
    """
    if "://" in str(place):
        command = export_command(run_path(str(place)))
        if command:
            raise UserError(
                f"models are loaded from a folder: download the final model with `{command}`, "
                "then name FOLDER"
            )
    place = Path(place).expanduser().resolve()
    if (place / STATE).is_file():
        models = _of_run(RunDir(place, create=False), which)
    elif which:
        raise UserError(
            f"`--which` selects models of a run, but {place} is not a run folder (no {STATE}): "
            "omit `--which`, or name a run folder"
        )
    elif not place.is_dir():
        raise UserError(f"{place} is not a folder: name a run folder or a model folder")
    else:
        models = [Source(place.name, place)]
    for source in models:
        _check_source(source)
    return models


def _check_source(source: Source) -> None:
    """Raise `UserError` if files of the model are missing."""
    check_folder(weights_folder(source.folder), f"the {source.name} model")
    has_adapter = (source.folder / "adapter_config.json").is_file()
    if has_adapter and not (source.folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"the {source.name} model: {source.folder} has no adapter_model.safetensors "
            "(pickled adapters are not read: save the adapter with peft's save_pretrained)"
        )


def _of_run(run: RunDir, which: Sequence[str]) -> list[Source]:
    """Find the models of a run that `which` names; if it is empty, all that the run has made."""
    state = run.read_state(RunState)
    assert state
    settings = ModelConfig.model_validate(state.config["model"])
    cuts = PruneConfig.model_validate(state.config["prune"]).cuts
    names = list(dict.fromkeys([UNPRUNED, *cuts, FINAL]))
    for name in which:
        if name not in names:
            hint = nearest(name, names, "its models are")
            raise UserError(f"`--which`: a run has no model {name!r}; {hint}")

    folders = {name: run.cut(name) for name in names}
    folders[FINAL] = run.root / FINAL
    prepared = run.read_record("prepare", PrepareRecord)
    if prepared:
        folders[UNPRUNED] = run.base_model(prepared)
    existing = [name for name in names if (folders[name] / "config.json").is_file()]
    selected = which or existing or names
    for name in selected:
        if name not in existing:
            hint = f", or use `--which {','.join(existing)}`" if existing else ""
            raise UserError(
                f"{run.root} has no {name} model (yet): repeat `qpruner run` to make it{hint}"
            )
    return [Source(name, folders[name], None if name == FINAL else settings) for name in selected]
