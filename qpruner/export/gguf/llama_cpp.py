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
        *(
            (name, ctypes.c_void_p)
            for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")
        ),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_P, _I, _S, _B, _F = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_char_p,
    ctypes.c_bool,
    ctypes.POINTER(ctypes.c_float),
)
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
}
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    # Absent where the processor's kernels are built in.
    "ggml_backend_load_all_from_path": (None, _S),
    "llama_version": (_S,),
    "ggml_version": (_S,),
}


class _Library:
    """A loaded libllama: its functions, and the last errors in its log."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
            self.functions = {name: getattr(library, name) for name in _FUNCTIONS}
        except (OSError, AttributeError) as error:
            raise UserError(
                f"{path} is not a library of llama.cpp that can be used: {error}; {INSTALL}"
            ) from error
        self.functions |= {
            name: getattr(library, name) for name in _OPTIONAL if hasattr(library, name)
        }
        for name, function in self.functions.items():
            function.restype, *function.argtypes = (_FUNCTIONS | _OPTIONAL)[name]
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
    folders = (spec and spec.submodule_search_locations) or []
    if not (found := [path for folder in folders for path in Path(folder).glob("xllamacpp*.so")]):
        raise UserError(
            "llama.cpp is needed to check GGUF files, and the package `xllamacpp` is missing: "
            f"{INSTALL}"
        )
    return found[0]


def build() -> str:
    """Name the build of llama.cpp: the package, and the versions that the library tells."""
    library, parts = (
        _library(library_path()),
        [f"xllamacpp {importlib.metadata.version('xllamacpp')}"],
    )
    for name in ("llama", "ggml"):
        if f"{name}_version" in library.functions:
            parts.append(f"{name} {library.call(f'{name}_version').decode()}")
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
        self._call, self._next = self._library.call, 0
        for file in (model, adapter):
            if file and not file.is_file():
                raise UserError(f"{file} is not a file: name a GGUF file")
        self._library.errors.clear()
        with ExitStack() as stack:
            parameters = self._call("llama_model_default_params")
            loaded = self._made(
                f"load {model}", "llama_model_load_from_file", bytes(model), parameters
            )
            stack.callback(
                self._call, "llama_model_free", loaded
            )  # the adapter goes with its model
            parameters = self._call("llama_context_default_params")
            parameters.fields[:3] = context_length, BATCH, BATCH
            self._context = self._made(f"run {model}", "llama_init_from_model", loaded, parameters)
            stack.callback(self._call, "llama_free", self._context)
            self._call("llama_set_n_threads", self._context, threads, threads)
            if adapter:
                what = f"load the adapter {adapter}"
                pointer = ctypes.c_void_p(
                    self._made(what, "llama_adapter_lora_init", loaded, bytes(adapter))
                )
                scale = ctypes.c_float(1.0)
                arrays = ctypes.byref(pointer), 1, ctypes.byref(scale)
                self._done(what, "llama_set_adapters_lora", self._context, *arrays)
            self._vocab: int = self._call("llama_model_get_vocab", loaded)
            self.vocab_size: int = self._call("llama_vocab_n_tokens", self._vocab)
            self._resources = stack.pop_all()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _made(self, what: str, name: str, *arguments: Any) -> int:
        """Call a function that returns a pointer."""
        if pointer := self._call(name, *arguments):
            return int(pointer)
        raise self._error(what)

    def _done(self, what: str, name: str, *arguments: Any) -> None:
        """Call a function that returns 0 if it worked."""
        if status := self._call(name, *arguments):
            raise self._error(f"{what} (status {status})")

    def _error(self, what: str) -> StageError:
        reason = "; ".join(self._library.errors) or "it gives no reason"
        return StageError(
            "export",
            f"llama.cpp cannot {what}: {reason}",
            "write the file again: repeat the command",
        )

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        """Tokenize a text with the special tokens that are written in it.

        With `add_special`, the tokens of its begin and end are added.
        """
        encoded = text.encode()
        ids = numpy.empty(len(encoded) + 8, numpy.int32)
        places = (encoded, len(encoded), ids.ctypes.data, len(ids))
        count = self._call("llama_tokenize", self._vocab, *places, add_special, True)
        if count < 0:
            raise self._error(f"tokenize {text[:40]!r}")
        found: list[int] = ids[:count].tolist()
        return found

    def logits(self, ids: Sequence[int], wanted: Any = None) -> numpy.ndarray:
        """Compute the logits of a new sequence, float32 ``(positions, vocabulary)``.

        `wanted` has a flag for each token and selects positions; without it they are computed at
        all.
        """
        self._restart()
        flags = (
            numpy.ones(len(ids), numpy.int8)
            if wanted is None
            else numpy.asarray(wanted, numpy.int8)
        )
        return numpy.concatenate(list(self._passes(ids, flags)))

    def loss(self, ids: Sequence[int], labels: Sequence[int]) -> tuple[float, int]:
        """Return the summed losses of a new sequence in nats, and the number of labelled tokens.

        A token has a label if that is 0 or more.
        """
        next_labels = numpy.append(numpy.asarray(labels)[1:], -1)
        wanted = next_labels >= 0
        found = log_softmax(self.logits(ids, wanted), axis=1)
        losses = -numpy.take_along_axis(found, next_labels[wanted][:, None], 1)
        return float(losses.sum(dtype=numpy.float64)), int(wanted.sum())

    def prefill(self, ids: Sequence[int]) -> None:
        """Read a new sequence."""
        self._restart()
        flags = numpy.zeros(len(ids), numpy.int8)
        flags[-1] = 1
        *_, last = self._passes(ids, flags)
        self._next = int(last[-1].argmax())

    def decode(self, num_tokens: int) -> list[int]:
        """Continue what `prefill` read by the most likely tokens, one at a time."""
        found = list[int]()
        for _ in range(num_tokens):
            found.append(self._next)
            (logits,) = self._passes(found[-1:], numpy.ones(1, numpy.int8))
            self._next = int(logits[0].argmax())
        return found

    def _restart(self) -> None:
        self._call("llama_memory_clear", self._call("llama_get_memory", self._context), True)

    def _passes(self, ids: Sequence[int], flags: numpy.ndarray) -> Iterator[numpy.ndarray]:
        """Append tokens to the sequence, and yield the logits at flagged positions, by batch."""
        tokens = numpy.asarray(ids, numpy.int32)
        for start in range(0, len(ids), BATCH):
            part, asked = (
                tokens[start : start + BATCH],
                numpy.ascontiguousarray(flags[start : start + BATCH]),
            )
            batch = _Batch(len(part), token=part.ctypes.data, logits=asked.ctypes.data)
            self._done(f"read {len(part)} tokens", "llama_decode", self._context, batch)
            if count := int(asked.sum()):
                found = self._call("llama_get_logits", self._context)
                yield numpy.ctypeslib.as_array(found, (count, self.vocab_size)).copy()


def predictions(
    model: Path,
    adapter: Path | None,
    rows: Sequence[Sequence[int]],
    num_likeliest: int,
    threads: int,
) -> Iterator[Any]:
    """Yield the name of the build, then what `compare.Predictions` names for each row."""
    yield build()
    with Llama(model, adapter, threads, max(map(len, rows))) as llama:
        for row in rows:
            found = log_softmax(llama.logits(row)[:-1], axis=1)
            ids = numpy.argpartition(-found, num_likeliest, axis=1)[:, :num_likeliest]
            ids = numpy.take_along_axis(
                ids, numpy.take_along_axis(-found, ids, 1).argsort(axis=1), 1
            )
            actual = numpy.take_along_axis(found, numpy.asarray(row[1:])[:, None], 1)[:, 0]
            yield ids, numpy.take_along_axis(found, ids, 1), actual
