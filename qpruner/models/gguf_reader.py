"""Read GGUF files, for transformers too, several times faster than the gguf package (0.19).

The package cuts every string and number of a vocabulary out of a `numpy.memmap` in a call of its
own: 7 s for the 262,144 tokens of Gemma 3, here 0.6 s (2026-12-02). transformers (5.24) has the map
of tensor names made anew for every module: another 2 s for 30 blocks.
"""

import functools
import sys
from pathlib import Path
from typing import Any

HEAD_BYTES = 12
"""Bytes before the items of an array: their type and their number."""


@functools.cache
def install() -> None:
    """Make the gguf package read arrays at once and keep its maps of names, in this process."""
    import gguf
    import numpy
    from gguf import GGUFValueType

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: numpy.memmap[Any, Any]) -> None:
            self._data = numpy.asarray(mapped) if mapped.mode == "r" else mapped

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """Return a field's bytes, its parts as arrays, its values' positions, and types."""
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            kind_part = self._get(orig_offs, numpy.uint32)
            count_part = self._get(orig_offs + 4, numpy.uint64)
            kind = GGUFValueType(kind_part[0])
            count = int(count_part[0])
            types = [GGUFValueType.ARRAY, kind] if count else [GGUFValueType.ARRAY]
            parts = [kind_part, count_part]
            offset = orig_offs + HEAD_BYTES

            dtype = self.gguf_scalar_to_np.get(kind)
            if dtype:
                values = self._get(offset, dtype, count)
                parts += [*values.reshape(-1, 1)]
                return HEAD_BYTES + values.nbytes, parts, list(range(2, len(parts))), types
            if kind != GGUFValueType.STRING:
                return super()._get_field_parts(orig_offs, raw_type)

            for _ in range(count):
                text = offset + 8
                end = text + int.from_bytes(self.data[offset:text], sys.byteorder)
                parts += [self.data[offset:text].view(numpy.uint64), self.data[text:end]]
                offset = end
            return offset - orig_offs, parts, list(range(3, len(parts), 2)), types

    gguf.GGUFReader = Reader  # type: ignore[misc]
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def read_gguf(file: Path) -> Any:
    """Return a `gguf.GGUFReader` of a file."""
    import gguf

    install()
    return gguf.GGUFReader(file)
