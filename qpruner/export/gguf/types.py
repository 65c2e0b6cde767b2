"""Choose a format of llama.cpp for every format that may be in a plan."""

from __future__ import annotations

from qpruner.quantization.formats import DENSE, format_of, formats

ERRORS = {"q2_k": 0.30, "q3_k": 0.14, "q4_0": 0.09, "q4_k": 0.07, "q5_0": 0.045, "q6_k": 0.018, "q8_0": 0.006}
ROWS = 4096  # enough that what NF4 stores once for a weight does not count


def is_llama_cpp(name: str) -> bool:
    """Return True if llama.cpp has this format; unpacked weights are written in their own type."""
    return not format_of(name).is_packed or bool(format_of(name).ggml_type)


def llama_cpp_format(name: str, columns: int) -> str:
    """Return the format itself if llama.cpp has it, else the one of llama.cpp's whose bytes are nearest.

    Of two with equal bytes it is the one with the smaller error; unpacked weights if none takes this many columns.
    """
    if is_llama_cpp(name):
        return name
    size = format_of(name).packed_bytes(ROWS, columns, 2)
    found = [each for each in formats().values() if each.ggml_type and not each.refusal(columns, None)]

    def distance(other: str) -> tuple[int, float]:
        return abs(format_of(other).packed_bytes(ROWS, columns, 2) - size), ERRORS[other]

    return min((each.name for each in found), key=distance, default=DENSE)
