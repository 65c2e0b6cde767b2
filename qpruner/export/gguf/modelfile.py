"""Write the Modelfile with which Ollama takes a GGUF file.

Ollama does not run the chat template in the file, but takes one of its own that is fewer than 100 edits away. So the
Modelfile has a template in Ollama's language wherever one exists that writes the same chats.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str]  # role and content
SYSTEM, USER, ANSWER, AGAIN = "Be\x01brief", "Who\x02is it", "Only\x03me", "What\x04now"
CONTEXT = 4096  # most tokens of context asked for: the memory for more is the user's decision


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
        lines.append("# Ollama's templates cannot say what this model's chat template does: it takes the nearest.")
    return "\n".join(lines) + "\n"


class _Shape(NamedTuple):
    """The texts around what each role says, at the start without a system message, and before an answer."""

    start: str
    around: dict[str, tuple[str, str]]
    ask: str

    def chat(self, turns: Sequence[Turn]) -> str:
        """Write a chat as Ollama does with the template."""
        start = "" if turns[0][0] == "system" else self.start
        return start + "".join(content.join(self.around[role]) for role, content in turns) + self.ask

    def template(self) -> str:
        user, assistant = ("{{ .Content }}".join(self.around[role]) for role in ("user", "assistant"))
        start = self.start
        if "system" in self.around:
            otherwise = f"{{{{ else }}}}{start}" if start else ""
            start = f"{{{{ if .System }}}}{'{{ .System }}'.join(self.around['system'])}{otherwise}{{{{ end }}}}"
        turns = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
        return f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{self.ask}{{{{ .Response }}}}"


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a template in Ollama's language that writes the same chats as the tokenizer's; None: there is none."""
    is_dated = "strftime_now" in str(tokenizer.chat_template)
    shape = _shape(tokenizer) if tokenizer.chat_template and not is_dated else None
    if shape is None:
        return None
    systems = [[], [("system", "Use few words.")]] if "system" in shape.around else [[]]
    answered = [("user", "Is it 1 or 2?"), ("assistant", "It is 2.")]
    chats = [[*system, *answered * count, ("user", "Why?")] for count in (1, 2, 3) for system in systems]
    texts = [_rendered(tokenizer, chat) for chat in chats]
    is_same = texts == [shape.chat(chat) for chat in chats]
    return shape.template() if is_same and not any(sign in text for text in texts for sign in ("{{", '"""')) else None


def _shape(tokenizer: PreTrainedTokenizerBase) -> _Shape | None:
    """Take a rendered chat apart at what is said in it; None: that is not all there, once, in its order."""
    longer = [("user", USER), ("assistant", ANSWER), ("user", AGAIN)]
    several, plain = _rendered(tokenizer, longer), _rendered(tokenizer, longer, asks=False)
    cut = _cut(several, USER, ANSWER, AGAIN)
    if cut is None or not plain or not several.startswith(plain):
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
    around = {"user": (opening, closing)}
    around["assistant"] = to_answer.removeprefix(closing), between.removesuffix(opening)
    system = _cut(_rendered(tokenizer, [("system", SYSTEM), ("user", USER)]), SYSTEM, USER)
    if system and system[1].endswith(opening):  # Gemma's and Mistral's templates put it into a user's turn
        around["system"] = system[0], system[1].removesuffix(opening)
    return _Shape(before.removesuffix(opening), around, ask)


def _cut(text: str, *said: str) -> list[str] | None:
    match = re.fullmatch("(.*?)".join(["", *map(re.escape, said), ""]), text, re.DOTALL)
    return list(match.groups()) if match else None


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Turn], asks: bool = True) -> str:
    """Render a chat without the first token that llama.cpp adds itself; empty if the template refuses the chat."""
    try:
        turns = [{"role": role, "content": content} for role, content in chat]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
    except TemplateError:
        return ""
    begin = tokenizer.bos_token
    adds = begin is not None and tokenizer.bos_token_id in tokenizer("").input_ids
    return text.removeprefix(begin) if adds else text
