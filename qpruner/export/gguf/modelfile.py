"""Write the Modelfile with which Ollama takes a GGUF file.

Ollama does not run the chat template in a GGUF file: it takes the template of its own that is fewer than 100 edits away
(`template/template.go`), or else sends the bare prompt. So the Modelfile has a template in Ollama's language wherever
one exists that writes the same chats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, str]
SYSTEM, USER, ANSWER, AGAIN = "Be\x01brief", "Who\x02is it", "Only\x03me", "What\x04now"
CONTEXT = 4096
"""Most tokens of context asked for: the memory for more is the user's decision."""


def modelfile(
    file: str, adapter: str | None, tokenizer: PreTrainedTokenizerBase, stops: Iterable[int], context_length: int
) -> str:
    """Return the text of a Modelfile for files in the same folder; `stops` are the ids at which generation ends."""
    lines = ["# ollama create NAME -f Modelfile && ollama run NAME", f"FROM ./{file}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    ends = {token for token in (tokenizer.eos_token_id, *stops) if token is not None}
    texts = sorted(tokenizer.convert_ids_to_tokens(sorted(ends)))
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts]
    lines.append(f"PARAMETER num_ctx {min(context_length, CONTEXT)}")
    template = ollama_template(tokenizer)
    if template:
        if "{{ .System }}" not in template:
            lines.append("# A system message is left out: the model's chat template has no place of its own for it.")
        lines.append(f'TEMPLATE """{template}"""')
    elif tokenizer.chat_template:
        lines.append(
            "# Ollama's templates cannot say what this model's chat template does; it takes the nearest it has."
        )
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a template in Ollama's language that writes the same chats as the tokenizer's; None: there is none."""
    # A date is that of the day of the chat.
    if not tokenizer.chat_template or "strftime_now" in str(tokenizer.chat_template):
        return None
    parts = _parts(tokenizer)
    if parts is None or any("{{" in text or '"""' in text for text in parts.texts()):
        return None
    chats = [_chat(count, has_system) for count in (1, 2, 3) for has_system in (False, parts.system is not None)]
    return parts.template() if all(_rendered(tokenizer, chat) == parts.render(chat) for chat in chats) else None


@dataclass(frozen=True)
class _Parts:
    """The texts around what is said, by role; `start` is there without a system message; `ask` precedes an answer."""

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str

    def texts(self) -> Sequence[str]:
        return (self.start, *(self.system or ()), *self.user, *self.assistant, self.ask)

    def template(self) -> str:
        start = self.start
        if self.system:
            otherwise = f"{{{{ else }}}}{self.start}" if self.start else ""
            start = f"{{{{ if .System }}}}{'{{ .System }}'.join(self.system)}{otherwise}{{{{ end }}}}"
        user, assistant = ("{{ .Content }}".join(each) for each in (self.user, self.assistant))
        turns = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
        return f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{self.ask}{{{{ .Response }}}}"

    def render(self, chat: Sequence[Turn]) -> str:
        """Do what Ollama does with the template."""
        system = [turn["content"] for turn in chat if turn["role"] == "system"]
        around = {"user": self.user, "assistant": self.assistant}
        turns = "".join(turn["content"].join(around[turn["role"]]) for turn in chat if turn["role"] in around)
        return (system[0].join(self.system) if system and self.system else self.start) + turns + self.ask


def _parts(tokenizer: PreTrainedTokenizerBase) -> _Parts | None:
    """Take a rendered chat apart at what is said in it; None: that is not all there, once, in its order."""
    user = [{"role": "user", "content": USER}]
    longer = [*user, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": AGAIN}]
    several, plain = _rendered(tokenizer, longer), _rendered(tokenizer, longer, asks=False)
    cut = _cut(several, USER, ANSWER, AGAIN)
    if several is None or plain is None or cut is None or not several.startswith(plain):
        return None
    before, to_answer, between, end = cut
    ask = several[len(plain) :]
    closing = end.removesuffix(ask)
    # An answer ends with the first special token after it, and the newline after that.
    special = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()) or r"\Z"
    found = re.search(rf"({special})\n?", between)
    opening = between[found.end() if found else 0 :]
    if not (before.endswith(opening) and to_answer.startswith(closing)):
        return None
    assistant = (to_answer.removeprefix(closing), between.removesuffix(opening))
    system = _cut(_rendered(tokenizer, [{"role": "system", "content": SYSTEM}, *user]), SYSTEM, USER)
    # Gemma's and Mistral's templates put it into a user's turn.
    around = (system[0], system[1].removesuffix(opening)) if system and system[1].endswith(opening) else None
    return _Parts(before.removesuffix(opening), around, (opening, closing), assistant, ask)


def _cut(text: str | None, *said: str) -> list[str] | None:
    match = re.fullmatch("(.*?)".join(["", *map(re.escape, said), ""]), text, re.DOTALL) if text is not None else None
    return list(match.groups()) if match else None


def _chat(num_answers: int, has_system: bool) -> list[Turn]:
    system = [{"role": "system", "content": "Use few words."}] if has_system else []
    said = [("user", "Is it 1 or 2?"), ("assistant", "It is 2.")] * num_answers
    return [*system, *({"role": role, "content": text} for role, text in said), {"role": "user", "content": "Why?"}]


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Turn], asks: bool = True) -> str | None:
    """Render a chat without the first token that llama.cpp adds itself; None: the template refuses the chat."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=asks)
    except TemplateError:
        return None
    begin = tokenizer.bos_token
    adds = begin is not None and tokenizer.bos_token_id in tokenizer("").input_ids
    return text.removeprefix(begin) if adds else text
