"""GGUF files are read as the gguf package reads them, in much less time."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter

from qpruner.models.gguf_reader import read_gguf

PLAIN = GGUFReader  # before another test replaces it


def written(file: Path) -> Path:
    """Write a file with fields of every kind, and two tensors."""
    writer = GGUFWriter(file, "llama")
    writer.add_string("tested.name", "naïve 日本語")
    writer.add_float32("tested.scale", 0.5)
    writer.add_bool("tested.flag", True)
    writer.add_array("tested.tokens", ["", "a", "é", "▁the", "日本"])
    writer.add_array("tested.scores", [0.25, -1.5, 3.0])
    writer.add_array("tested.types", [1, -2, 3, 4])
    writer.add_array("tested.flags", [True, False])
    writer.add_tensor("one.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("two.weight", np.ones(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_every_field_and_tensor_is_read_alike(tmp_path: Path) -> None:
    file = written(tmp_path / "tested.gguf")
    plain = PLAIN(file)
    ours = read_gguf(file)
    assert list(plain.fields) == list(ours.fields)
    for key, field in plain.fields.items():
        found = ours.fields[key]
        assert found.data == field.data
        assert found.types == field.types
        assert found.offset == field.offset, key
        assert found.contents() == field.contents(), key
        for part, expected in zip(found.parts, field.parts, strict=True):
            assert part.dtype == expected.dtype
            assert np.array_equal(part, expected), key
    assert ours.fields["tested.tokens"].contents()[3] == "▁the"
    for tensor, expected in zip(ours.tensors, plain.tensors, strict=True):
        assert tensor.name == expected.name
        assert np.array_equal(tensor.data, expected.data)
