"""What every format must do; a new one is tested here without a change."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from qpruner.errors import UserError
from qpruner.quantization.formats import (
    ALIASES,
    DENSE,
    Format,
    GridFormat,
    by_size,
    format_of,
    formats,
)

PACKED = [each for each in formats().values() if each.is_packed]
BY_ROWS = [each for each in PACKED if each.holds_embeddings]
GRIDS = [each for each in PACKED if isinstance(each, GridFormat)]
ROWS = 24
WIDTHS = (512, 192, 130)


def gaussian(columns: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.03


def widths_of(each: Format) -> list[int]:
    if each.missing():
        pytest.skip(str(each.missing()))
    found = [columns for columns in WIDTHS if each.refusal(columns, None) is None]
    assert 512 in found, "a width of real models"
    return found


@pytest.mark.parametrize("each", PACKED, ids=lambda each: each.name)
def test_promised_bytes_are_the_real_ones(each: Format) -> None:
    for columns in widths_of(each):
        tensors = each.pack(gaussian(columns))
        assert tensors.keys() <= {"weight", *each.more_tensors}, "what a saved model keeps"
        real = sum(tensor.nbytes for name, tensor in tensors.items() if name not in each.uncounted)
        assert each.packed_bytes(ROWS, columns, 2) == real, columns


@pytest.mark.parametrize("each", PACKED, ids=lambda each: each.name)
def test_the_error_is_that_of_its_bits(each: Format) -> None:
    for columns in widths_of(each):
        weight = gaussian(columns)
        unpacked = each.unpack(each.pack(weight), columns, torch.float32)
        error = float((unpacked - weight).norm() / weight.norm())
        assert 0.5 * 2**-each.bits < error < 2 * 2**-each.bits, columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("each", PACKED, ids=lambda each: each.name)
def test_half_precision_is_the_rounded_float32(each: Format, dtype: torch.dtype) -> None:
    for columns in widths_of(each):
        tensors = each.pack(gaussian(columns))
        assert torch.equal(
            each.unpack(tensors, columns, dtype),
            each.unpack(tensors, columns, torch.float32).to(dtype),
        )


@pytest.mark.parametrize("each", BY_ROWS, ids=lambda each: each.name)
def test_a_weight_of_16_bits_packs_as_its_float32(each: Format) -> None:
    for columns in widths_of(each):
        weight = gaussian(columns).bfloat16()
        half, full = (
            each.unpack(each.pack(part), columns, torch.float32)
            for part in (weight, weight.float())
        )
        assert torch.equal(half, full)


@pytest.mark.parametrize("each", BY_ROWS, ids=lambda each: each.name)
def test_rows_unpack_alone_as_in_the_whole(each: Format) -> None:
    for columns in widths_of(each):
        packed = each.pack(gaussian(columns))["weight"]
        whole = each.unpack({"weight": packed}, columns, torch.float32)
        for at in ([5, 5, 0], [ROWS - 1], []):
            assert torch.equal(
                each.unpack({"weight": packed[at]}, columns, torch.float32), whole[at]
            )
        assert torch.equal(
            each.unpack({"weight": packed[3:4]}, columns, torch.float32), whole[3:4]
        ), "not copied"
        assert packed.dtype == torch.uint8 and len(packed) == ROWS


@pytest.mark.parametrize("each", BY_ROWS, ids=lambda each: each.name)
def test_weights_of_many_parts_are_whole(each: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    widths_of(each)
    weight = gaussian(512, rows=2 * ROWS)
    whole = each.pack(weight)
    monkeypatch.setattr("qpruner.quantization.formats.format.WEIGHTS_PER_THREAD", 5 * 512)
    assert torch.equal(each.pack(weight)["weight"], whole["weight"])
    unpacked = each.unpack(whole, 512, torch.float32)
    assert torch.equal(unpacked[-ROWS:], each.unpack(each.pack(weight[-ROWS:]), 512, torch.float32))


@pytest.mark.parametrize("each", GRIDS, ids=lambda each: each.name)
def test_a_grid_column_by_column_packs_the_same(each: GridFormat) -> None:
    for columns in widths_of(each)[1:]:
        weight = gaussian(columns)
        edges = [*range(0, columns, each.group_size or columns), columns]
        grids = [each.grid(weight[:, start:end]) for start, end in pairwise(edges)]
        by_column = [
            grid
            for grid, (start, end) in zip(grids, pairwise(edges), strict=True)
            for _ in range(start, end)
        ]
        pairs = list(zip(weight.split(1, dim=1), by_column, strict=True))
        codes = [each.codes(column, *grid) for column, grid in pairs]
        values = [each.values(code, *grid) for code, grid in zip(codes, by_column, strict=True)]
        scales, zeros = (torch.cat(kind, dim=1) for kind in zip(*grids, strict=True))
        packed = each.store(torch.cat(codes, dim=1).to(torch.uint8), scales, zeros)
        assert torch.equal(packed["weight"], each.pack(weight)["weight"])
        assert torch.equal(torch.cat(values, dim=1), each.unpack(packed, columns, torch.float32))


def test_names_letters_and_colours_are_unique() -> None:
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("qpruner.quantization.formats.")
    ]
    made = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, Format)
    }
    assert len(made) == len(formats()), "two formats of one name"
    for kind in ("letter", "colour"):
        assert len({getattr(each, kind) for each in formats().values()}) == len(formats()), kind
    assert all(
        len(each.letter) == 1 and re.fullmatch("#[0-9a-f]{6}", each.colour)
        for each in formats().values()
    )


def test_formats_are_found_by_name_smallest_first() -> None:
    sizes = [each.packed_bytes(4096, 4096, 2) for each in formats().values()]
    assert sizes == sorted(sizes) and list(formats())[-1] == DENSE
    assert by_size((DENSE, "int8", "q8_0", "nf4", "q2_k")) == ("q2_k", "nf4", "int8", "q8_0", DENSE)
    assert {format_of(name).bits for name in ALIASES.values()} == set(ALIASES)
    with pytest.raises(UserError, match=r"there is no format `q4_1`; the formats are .*q4_0"):
        format_of("q4_1")


def test_the_registry_imports_no_torch() -> None:
    read = (
        "import sys; from qpruner.quantization.formats import formats; formats(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
