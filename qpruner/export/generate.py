"""Models side by side: which ones a run or a folder has, and what each says to a prompt.

An answer is a function of model, conversation and sampling alone (the seed is set anew for each), so that it does not
matter which models lie in memory together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import TextStreamer

from qpruner.config.schema import ModelConfig
from qpruner.data.encoding import alpaca_prompt
from qpruner.errors import UserError
from qpruner.hf import load, weights_folder
from qpruner.models.loading import OnLoading, check_folder, load_dense, load_tokenizer, untold
from qpruner.models.memory import explaining_shortage, free_bytes, release
from qpruner.runs.records import PrepareRecord, RunState
from qpruner.runs.run_dir import STATE, RunDir
from qpruner.runs.storage import run_path, storage_at

BASE, PRUNED, FINAL = WHICH = ("base", "pruned", "final")
"""The models of a run, in the order they come to be."""
SPARE = 1.25
"""Memory that models have to leave free beside their weights, for activations and caches: a quarter of those."""
AGAINST_SHORTAGE = (
    "name fewer models with `--which`, allow fewer `--max-tokens` or shorten the prompt; where a GPU's memory ran out, "
    "set `CUDA_VISIBLE_DEVICES=` to use the machine's"
)


Template = Literal["chat", "alpaca", "none"]
"""The tokenizer's own, none where it has none; that of the fine-tune's instructions (`data.template: alpaca`), around
the last turn alone; none."""


@dataclass(frozen=True)
class Sampling:
    """How answers are asked for and drawn.

    Attributes:
        max_tokens: Tokens an answer may have.
        temperature: 0 for the likeliest token every time.
        seed: Of the draws.
        template: What is put around a prompt.
    """

    max_tokens: int
    temperature: float
    seed: int
    template: Template = "chat"


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: Without special tokens.
        num_tokens: Special ones included.
        ended: `end`: the model ended it; `length`: it was cut off at the most tokens, or where the context is full.
    """

    text: str
    num_tokens: int
    ended: Literal["end", "length"]


class Talker:
    """A model in memory, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer

    @explaining_shortage(AGAINST_SHORTAGE)
    def answer(self, turns: Sequence[str], sampling: Sampling, on_text: Callable[[str], None]) -> Answer:
        """Say something to a conversation.

        Args:
            turns: The person's and the model's in turn, the person's first and last; without a template the model goes
                on with their lines.
            sampling: How.
            on_text: Told of each piece of text as soon as it is there.

        Raises:
            UserError: If the conversation leaves no room in the model's context.
            OutOfMemory: If it does so in memory.
        """
        prompt = self._encoded(turns, sampling.template).to(self._model.device)
        length = prompt.shape[1]
        context = getattr(self._model.config, "max_position_embeddings", None) or length + sampling.max_tokens
        if length >= context:
            raise UserError(
                f"the conversation has {length} tokens, and the model's context {context}: shorten the prompt, or "
                "begin anew with /reset in `qpruner chat`"
            )
        ends = self._end_tokens()
        how: dict[str, Any] = {"temperature": sampling.temperature} if sampling.temperature else {}
        torch.manual_seed(sampling.seed)
        written = self._model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=min(sampling.max_tokens, context - length),
                do_sample=bool(how),
                eos_token_id=ends,
                pad_token_id=self._tokenizer.pad_token_id,
                **how,
            ),
            streamer=_Stream(self._tokenizer, on_text),
        )
        tokens = written[0, length:].tolist()
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, len(tokens), "end" if tokens[-1] in ends else "length")

    def _encoded(self, turns: Sequence[str], template: Template) -> torch.Tensor:
        """Token ids ``(1, seq)``."""
        if template == "alpaca":
            encoded = self._tokenizer(alpaca_prompt(turns[-1]), return_tensors="pt")
        elif template == "none" or not self._tokenizer.chat_template:
            encoded = self._tokenizer("\n".join(turns), return_tensors="pt")
        else:
            roles = itertools.cycle(("user", "assistant"))
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
            encoded = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        ids: torch.Tensor = encoded["input_ids"]
        return ids

    def _end_tokens(self) -> list[int]:
        """What ends an answer: the tokenizer's end token, and those of the model's own generation_config.json."""
        own = self._model.generation_config.eos_token_id
        found = [*(own if isinstance(own, list) else [own]), self._tokenizer.eos_token_id]
        return sorted({token for token in found if token is not None})


class _Stream(TextStreamer):  # type: ignore[misc]
    """Hands on the text that transformers' `generate` has finished."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


@dataclass(frozen=True)
class Source:
    """A model to talk to.

    Attributes:
        name: `base`, `pruned` or `final` of a run; of a folder, its own name.
        folder: Where it is.
        dense: The run's `model` section, for its dense models.
    """

    name: str
    folder: Path
    dense: ModelConfig | None = None

    @property
    def weight_bytes(self) -> int:
        """Of the weights as they lie on disk, adapter included, which is what they take in memory."""
        places = {self.folder, weights_folder(self.folder)}
        return sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))

    def load(self, told: OnLoading = untold) -> Talker:
        """Bring it into memory.

        Args:
            told: Told how many tensors are there.

        Raises:
            UserError: If transformers cannot.
            OutOfMemory: If there is no room for it.
        """
        try:
            with explaining_shortage(AGAINST_SHORTAGE):
                if self.dense:
                    model = load_dense(str(self.folder), self.dense.dtype, self.dense, told)
                else:
                    model = load(self.folder, told)
                return Talker(model, load_tokenizer(str(self.folder), self.dense))
        except (OSError, ValueError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.folder} cannot be loaded: {reason}; name a folder that transformers loads, with its tokenizer"
            ) from error


def sources(place: str | Path, which: Sequence[str]) -> list[Source]:
    """The models of a run, or of a folder alone.

    Args:
        place: A run folder, or that of a model.
        which: Those of a run that are wanted, in this order; all that are there when empty.

    Raises:
        UserError: If one is missing or damaged, or the run is at a URI.
    """
    if "://" in str(place) and (command := storage_at(run_path(str(place))).export_command):
        raise UserError(
            f"models are talked to from a folder, and this is a URI: `{command}` brings its final model here, then "
            "name FOLDER"
        )
    place = Path(place).expanduser().resolve()
    if (place / STATE).is_file():
        found = _of_run(RunDir(place, create=False), which)
    elif which:
        raise UserError(
            f"`--which` chooses among the models of a run, and {place} has no {STATE}: leave it out, or name a run "
            "folder"
        )
    elif not place.is_dir():
        raise UserError(f"{place} is no folder: name a run folder, or a model's")
    else:
        found = [Source(place.name, place)]
    for source in found:
        _check(source)
    return found


def _of_run(run: RunDir, which: Sequence[str]) -> list[Source]:
    state, prepared = run.read_state(RunState), run.read_record("prepare", PrepareRecord)
    assert state
    dense = ModelConfig.model_validate(state.config["model"])
    there = {PRUNED: Source(PRUNED, run.stage("prune"), dense), FINAL: Source(FINAL, run.root / FINAL)}
    if prepared:
        there = {BASE: Source(BASE, run.base_model(prepared), dense), **there}
    there = {name: source for name, source in there.items() if (source.folder / "config.json").is_file()}
    for name in which or there:
        if name not in there:
            chosen = f"; `--which {','.join(there)}` is there" if there else ""
            raise UserError(f"{run.root} has no {name} model (any more): repeat `qpruner run` to make it{chosen}")
    if not there:
        raise UserError(f"{run.root} has no model yet: repeat `qpruner run` until it has one")
    return [there[name] for name in which or there]


def _check(source: Source) -> None:
    """What can be told without reading weights."""
    check_folder(weights_folder(source.folder), f"the {source.name} model")
    settings = source.folder / "adapter_config.json"
    if settings.is_file() and not (source.folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"the {source.name} model: folder {source.folder} has no adapter_model.safetensors beside {settings.name} "
            "(pickled adapters are not read; save it anew with peft's save_pretrained)"
        )


class Shelf:
    """Models in memory: all of them while there is room, else the one that was asked for last.

    Args:
        wanted: Those that will be asked for.
        free: Bytes of memory for them.

    Attributes:
        holds_all: Whether there is room for all.
    """

    def __init__(self, wanted: Sequence[Source], free: int) -> None:
        self._talkers: dict[str, Talker] = {}
        self.holds_all = len(wanted) == 1 or SPARE * sum(source.weight_bytes for source in wanted) <= free

    @classmethod
    def of(cls, wanted: Sequence[Source]) -> Shelf:
        """With the memory that is free now."""
        return cls(wanted, free_bytes())

    def take(self, source: Source, told: OnLoading = untold) -> Talker:
        """The model; where there is no room for all, whoever had another must not keep it."""
        if source.name not in self._talkers:
            if not self.holds_all:
                self._talkers.clear()
                release()
            self._talkers[source.name] = source.load(told)
        return self._talkers[source.name]
