"""Choose a format of llama.cpp for every format that may be in a plan."""

from __future__ import annotations

from qpruner.quantization.formats import DENSE, format_of, formats

ROWS = 4096  # enough that what a format stores once for a weight does not count


def llama_cpp_format(name: str, columns: int) -> str:
    """Return the format itself if llama.cpp has it, else that of llama.cpp's formats whose bytes are nearest.

    Of two with the same bytes it is the k-quant, whose error is smaller: relative errors on the pruned SmolLM2 (down
    projections, 2026-11-29) are 0.094 for nf4, 0.083 for w4_g32, 0.089 for q4_0 and 0.061 for q4_k; 0.0092 for int8 and
    0.0056 for q8_0; 0.20 for w3 and 0.16 for q3_k; 0.41 for w2_g32 and 0.30 for q2_k. Weights stay unpacked if no
    packed format takes this many columns.
    """
    wanted = format_of(name)
    if wanted.ggml_type or not wanted.is_packed:
        return name
    size = wanted.packed_bytes(ROWS, columns, 2)
    offered = [each for each in formats().values() if each.ggml_type and not each.refusal(columns, None)]
    # Formats come in order of bytes and names, so that q4_k is the last of its size.
    nearest = min(reversed(offered), key=lambda each: abs(each.packed_bytes(ROWS, columns, 2) - size), default=None)
    return nearest.name if nearest else DENSE
