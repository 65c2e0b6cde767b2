"""Run GGUF files in llama.cpp itself: its library, called through ctypes.

One pass gives the logits of all positions. llama-server has no log-probabilities of a prompt
(llama.cpp's #27174). The library is the extension module of the package `xllamacpp`, which exports
the C API. Structures of parameters grow with every build, so they are opaque: the library fills in
its defaults, and only the first three fields of a context's parameters are set, in their places
since 2024. Tried: xllamacpp 0.2.14 to 2026.10 and node-llama-cpp (llama.cpp 0.5.0).

An assertion in the library ends the process, so `isolation.py` calls it in one of its own, quickly:
without torch.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from scipy.special import log_softmax

from qpruner.errors import StageError, UserError

# most tokens in one call: llama.cpp's own default, and the length of its benchmark's prompt
BATCH = 512
ERROR_LEVEL = 4
INSTALL = 'run `pip install "qpruner[gguf]"`'


class _Parameters(ctypes.Structure):
    """Parameters of a model or context, larger than in any build (200 bytes in October 2026)."""

    _fields_ = [("fields", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    """A `llama_batch`; absent positions and sequences mean: the next positions of sequence 0."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_P = ctypes.c_void_p
_I = ctypes.c_int32
_S = ctypes.c_char_p
_B = ctypes.c_bool
_F = ctypes.POINTER(ctypes.c_float)
# Name: result, arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LOG, _P),
    "llama_model_default_params": (_Parameters,),
    "llama_context_default_params": (_Parameters,),
    "llama_model_load_from_file": (_P, _S, _Parameters),
    "llama_model_get_vocab": (_P, _P),
    "llama_model_free": (None, _P),
    "llama_init_from_model": (_P, _P, _Parameters),
    "llama_free": (None, _P),
    "llama_set_n_threads": (None, _P, _I, _I),
    "llama_adapter_lora_init": (_P, _P, _S),
    "llama_set_adapters_lora": (_I, _P, _P, ctypes.c_size_t, _P),
    "llama_get_memory": (_P, _P),
    "llama_memory_clear": (None, _P, _B),
    "llama_vocab_n_tokens": (_I, _P),
    "llama_tokenize": (_I, _P, _S, _I, _P, _I, _B, _B),
    "llama_decode": (_I, _P, _Batch),
    "llama_get_logits": (_F, _P),
    "ggml_backend_load_all_from_path": (None, _S),
    "llama_version": (_S,),
    "ggml_version": (_S,),
}
# The first is absent where the processor's kernels are built in.
_OPTIONAL = ("ggml_backend_load_all_from_path", "llama_version", "ggml_version")


class _Library:
    """A loaded libllama: its functions, and the last errors in its log."""

    def __init__(self, path: Path) -> None:
        self.functions: dict[str, Any] = {}
        try:
            library = ctypes.CDLL(str(path))
            for name, (result, *arguments) in _FUNCTIONS.items():
                if name not in _OPTIONAL or hasattr(library, name):
                    function = getattr(library, name)
                    function.restype = result
                    function.argtypes = arguments
                    self.functions[name] = function
        except (OSError, AttributeError) as error:
            raise UserError(
                f"{path} is not a library of llama.cpp that can be used: {error}; {INSTALL}"
            ) from error
        self.errors = deque[str](maxlen=3)
        self._log = _LOG(self._keep)  # must live as long as the library may call it
        self.call("llama_log_set", self._log, None)
        if "ggml_backend_load_all_from_path" in self.functions:
            self.call("ggml_backend_load_all_from_path", str(path.parent).encode())
        self.call("llama_backend_init")

    def call(self, name: str, *arguments: Any) -> Any:
        return self.functions[name](*arguments)

    def _keep(self, level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL and text.strip():
            self.errors.append(text.decode(errors="replace").strip())


_library = cache(_Library)


def library_path() -> Path:
    """Return the library in the package `xllamacpp`; raise `UserError` if it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in Path(folder).glob("xllamacpp*.so"):
            return path
    raise UserError(
        "llama.cpp is needed to check GGUF files, and the package `xllamacpp` is missing: "
        f"{INSTALL}"
    )


def build() -> str:
    """Name the build of llama.cpp: the package, and the versions that the library tells."""
    library = _library(library_path())
    parts = [f"xllamacpp {importlib.metadata.version('xllamacpp')}"]
    for name in ("llama", "ggml"):
        if f"{name}_version" in library.functions:
            version = library.call(f"{name}_version").decode()
            parts.append(f"{name} {version}")
    return ", ".join(parts)


class Llama:
    """A model in llama.cpp, perhaps with a LoRA adapter, and a context for one sequence.

    The sequence has at most `context_length` tokens. Raise `StageError` if llama.cpp refuses a
    file; the message has llama.cpp's own last errors.
    """

    def __init__(
        self,
        model: Path,
        adapter: Path | None = None,
        threads: int = 1,
        context_length: int = BATCH,
    ) -> None:
        self._library = _library(library_path())
        self._call = self._library.call
        self._next = 0
        for file in (model, adapter):
            if file and not file.is_file():
                raise UserError(f"{file} is not a file: name a GGUF file")
        self._library.errors.clear()

        with ExitStack() as stack:
            parameters = self._call("llama_model_default_params")
            what = f"load {model}"
            loaded = self._made(what, "llama_model_load_from_file", bytes(model), parameters)
            # The adapter goes with its model.
            stack.callback(self._call, "llama_model_free", loaded)

            parameters = self._call("llama_context_default_params")
            parameters.fields[:3] = context_length, BATCH, BATCH
            self._context = self._made(f"run {model}", "llama_init_from_model", loaded, parameters)
            stack.callback(self._call, "llama_free", self._context)
            self._call("llama_set_n_threads", self._context, threads, threads)
            if adapter:
                self._attach(adapter, loaded)

            self._vocab: int = self._call("llama_model_get_vocab", loaded)
            self.vocab_size: int = self._call("llama_vocab_n_tokens", self._vocab)
            self._resources = stack.pop_all()

    def _attach(self, adapter: Path, model: int) -> None:
        what = f"load the adapter {adapter}"
        loaded = self._made(what, "llama_adapter_lora_init", model, bytes(adapter))
        pointer = ctypes.byref(ctypes.c_void_p(loaded))
        scale = ctypes.byref(ctypes.c_float(1.0))
        self._done(what, "llama_set_adapters_lora", self._context, pointer, 1, scale)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _made(self, what: str, name: str, *arguments: Any) -> int:
        """Call a function that returns a pointer."""
        pointer = self._call(name, *arguments)
        if not pointer:
            raise self._error(what)
        return int(pointer)

    def _done(self, what: str, name: str, *arguments: Any) -> None:
        """Call a function that returns 0 if it worked."""
        status = self._call(name, *arguments)
        if status:
            raise self._error(f"{what} (status {status})")

    def _error(self, what: str) -> StageError:
        reason = "; ".join(self._library.errors) or "it gives no reason"
        remedy = "write the file again: repeat the command"
        return StageError("export", f"llama.cpp cannot {what}: {reason}", remedy)

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        """Tokenize a text with the special tokens that are written in it.

        With `add_special`, the tokens of its begin and end are added.
        """
        encoded = text.encode()
        ids = numpy.empty(len(encoded) + 8, numpy.int32)
        parses_special = True
        count = self._call(
            "llama_tokenize",
            self._vocab,
            encoded,
            len(encoded),
            ids.ctypes.data,
            len(ids),
            add_special,
            parses_special,
        )
        if count < 0:
            raise self._error(f"tokenize {text[:40]!r}")
        tokens: list[int] = ids[:count].tolist()
        return tokens

    def logits(self, ids: Sequence[int], wanted: Any = None) -> numpy.ndarray:
        """Compute the logits of a new sequence, float32 ``(positions, vocabulary)``.

        `wanted` has a flag for each token and selects positions; without it they are computed at
        all.
        """
        flags = numpy.ones(len(ids), numpy.int8)
        if wanted is not None:
            flags = numpy.asarray(wanted, numpy.int8)
        self._restart()
        return numpy.concatenate(list(self._passes(ids, flags)))

    def loss(self, ids: Sequence[int], labels: Sequence[int]) -> tuple[float, int]:
        """Return the summed losses of a new sequence in nats, and the number of labelled tokens.

        A token has a label if that is 0 or more.
        """
        next_labels = numpy.append(numpy.asarray(labels)[1:], -1)
        is_labelled = next_labels >= 0
        logits = self.logits(ids, is_labelled)
        losses = -_taken(log_softmax(logits, axis=1), next_labels[is_labelled])
        return float(losses.sum(dtype=numpy.float64)), int(is_labelled.sum())

    def prefill(self, ids: Sequence[int]) -> None:
        """Read a new sequence."""
        self._restart()
        flags = numpy.zeros(len(ids), numpy.int8)
        flags[-1] = 1
        *_, last = self._passes(ids, flags)
        self._next = int(last[-1].argmax())

    def decode(self, num_tokens: int) -> list[int]:
        """Continue what `prefill` read by the most likely tokens, one at a time."""
        tokens = list[int]()
        flags = numpy.ones(1, numpy.int8)
        for _ in range(num_tokens):
            tokens.append(self._next)
            (logits,) = self._passes(tokens[-1:], flags)
            self._next = int(logits[0].argmax())
        return tokens

    def _restart(self) -> None:
        self._call("llama_memory_clear", self._call("llama_get_memory", self._context), True)

    def _passes(self, ids: Sequence[int], flags: numpy.ndarray) -> Iterator[numpy.ndarray]:
        """Append tokens to the sequence, and yield the logits at flagged positions, by batch."""
        tokens = numpy.asarray(ids, numpy.int32)
        for start in range(0, len(ids), BATCH):
            end = start + BATCH
            part = tokens[start:end]
            flags_of_part = numpy.ascontiguousarray(flags[start:end])
            batch = _Batch(len(part), token=part.ctypes.data, logits=flags_of_part.ctypes.data)
            self._done(f"read {len(part)} tokens", "llama_decode", self._context, batch)
            count = int(flags_of_part.sum())
            if count:
                logits = self._call("llama_get_logits", self._context)
                shape = (count, self.vocab_size)
                yield numpy.ctypeslib.as_array(logits, shape).copy()


def predictions(
    model: Path,
    adapter: Path | None,
    rows: Sequence[Sequence[int]],
    num_likeliest: int,
    threads: int,
) -> Iterator[Any]:
    """Yield the name of the build, then what `compare.Predictions` names for each row."""
    yield build()
    longest = max(map(len, rows))
    with Llama(model, adapter, threads, longest) as llama:
        for row in rows:
            log_probabilities = log_softmax(llama.logits(row)[:-1], axis=1)
            ids = _likeliest(log_probabilities, num_likeliest)
            likeliest = numpy.take_along_axis(log_probabilities, ids, 1)
            yield ids, likeliest, _taken(log_probabilities, numpy.asarray(row[1:]))


def _likeliest(log_probabilities: numpy.ndarray, number: int) -> numpy.ndarray:
    """Return the ids ``(positions, number)`` of the likeliest tokens, in order."""
    ids = numpy.argpartition(-log_probabilities, number, axis=1)[:, :number]
    order = numpy.take_along_axis(-log_probabilities, ids, 1).argsort(axis=1)
    return numpy.take_along_axis(ids, order, 1)


def _taken(log_probabilities: numpy.ndarray, ids: numpy.ndarray) -> numpy.ndarray:
    """Take the log-probability of one token at each position."""
    return numpy.take_along_axis(log_probabilities, ids[:, None], 1)[:, 0]
