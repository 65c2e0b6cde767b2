"""What every format must do; a new one is tested here without a change."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from made_tensors import distance, normal

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

PACKED = [packing for packing in formats().values() if packing.is_packed]
BY_ROWS = [packing for packing in PACKED if packing.holds_embeddings]
GRIDS = [packing for packing in PACKED if isinstance(packing, GridFormat)]
ROWS = 24
WIDTHS = (512, 192, 130)


def gaussian(columns: int, rows: int = ROWS) -> torch.Tensor:
    return normal(rows, columns) * 0.03


def named(formats: list[Any]) -> pytest.MarkDecorator:
    """Run a test for each of these formats."""
    return pytest.mark.parametrize("packing", formats, ids=lambda packing: packing.name)


def widths_of(packing: Format) -> list[int]:
    if packing.missing():
        pytest.skip(str(packing.missing()))
    widths = [columns for columns in WIDTHS if packing.refusal(columns, None) is None]
    assert 512 in widths, "a width of real models"
    return widths


@named(PACKED)
def test_promised_bytes_are_the_real_ones(packing: Format) -> None:
    for columns in widths_of(packing):
        tensors = packing.pack(gaussian(columns))
        assert tensors.keys() <= {"weight", *packing.more_tensors}, "what a saved model keeps"
        sizes = [tensors[name].nbytes for name in tensors if name not in packing.uncounted]
        assert packing.packed_bytes(ROWS, columns, 2) == sum(sizes), columns


@named(PACKED)
def test_the_error_is_that_of_its_bits(packing: Format) -> None:
    for columns in widths_of(packing):
        weight = gaussian(columns)
        error = distance(packing.unpack(packing.pack(weight), columns, torch.float32), weight)
        assert 0.5 * 2**-packing.bits < error < 2 * 2**-packing.bits, columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@named(PACKED)
def test_half_precision_is_the_rounded_float32(packing: Format, dtype: torch.dtype) -> None:
    for columns in widths_of(packing):
        tensors = packing.pack(gaussian(columns))
        whole = packing.unpack(tensors, columns, torch.float32)
        assert torch.equal(packing.unpack(tensors, columns, dtype), whole.to(dtype))


@named(BY_ROWS)
def test_a_weight_of_16_bits_packs_as_its_float32(packing: Format) -> None:
    for columns in widths_of(packing):
        weight = gaussian(columns).bfloat16()
        half = packing.unpack(packing.pack(weight), columns, torch.float32)
        full = packing.unpack(packing.pack(weight.float()), columns, torch.float32)
        assert torch.equal(half, full)


@pytest.mark.parametrize("rows", [[5, 5, 0], [ROWS - 1], [], slice(3, 4)], ids=str)
@named(BY_ROWS)
def test_rows_unpack_alone_as_in_the_whole(packing: Format, rows: Any) -> None:
    """Whether they are copied or, as a slice, a view."""
    for columns in widths_of(packing):
        packed = packing.pack(gaussian(columns))["weight"]
        assert packed.dtype == torch.uint8
        assert len(packed) == ROWS
        whole = packing.unpack({"weight": packed}, columns, torch.float32)
        alone = packing.unpack({"weight": packed[rows]}, columns, torch.float32)
        assert torch.equal(alone, whole[rows])


@named(BY_ROWS)
def test_weights_of_many_parts_are_whole(packing: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    widths_of(packing)
    weight = gaussian(512, rows=2 * ROWS)
    whole = packing.pack(weight)
    monkeypatch.setattr("qpruner.quantization.formats.format.WEIGHTS_PER_THREAD", 5 * 512)
    assert torch.equal(packing.pack(weight)["weight"], whole["weight"])
    unpacked = packing.unpack(whole, 512, torch.float32)
    last = packing.unpack(packing.pack(weight[-ROWS:]), 512, torch.float32)
    assert torch.equal(unpacked[-ROWS:], last)


@named(GRIDS)
def test_a_grid_column_by_column_packs_the_same(packing: GridFormat) -> None:
    for columns in widths_of(packing)[1:]:
        weight = gaussian(columns)
        grids = []
        codes = []
        values = []
        for group in weight.split(packing.group_size or columns, dim=1):
            grid = packing.grid(group)
            grids.append(grid)
            for column in group.split(1, dim=1):
                codes.append(packing.codes(column, *grid))
                values.append(packing.values(codes[-1], *grid))
        scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
        packed = packing.store(torch.cat(codes, dim=1).byte(), scales, zeros)
        assert torch.equal(packed["weight"], packing.pack(weight)["weight"])
        assert torch.equal(torch.cat(values, dim=1), packing.unpack(packed, columns, torch.float32))


def test_names_letters_and_colours_are_unique() -> None:
    made = {
        id(value)
        for name, module in sys.modules.items()
        if name.startswith("qpruner.quantization.formats.")
        for value in vars(module).values()
        if isinstance(value, Format)
    }
    assert len(made) == len(formats()), "two formats of one name"
    letters = [packing.letter for packing in formats().values()]
    colours = {packing.colour for packing in formats().values()}
    assert len(set("".join(letters))) == len(letters) == len("".join(letters))
    assert len(colours) == len(made)
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


def test_formats_are_found_by_name_smallest_first() -> None:
    sizes = [packing.packed_bytes(4096, 4096, 2) for packing in formats().values()]
    assert sizes == sorted(sizes)
    assert list(formats())[-1] == DENSE
    assert by_size((DENSE, "int8", "q8_0", "nf4", "q2_k")) == ("q2_k", "nf4", "int8", "q8_0", DENSE)
    assert {format_of(name).bits for name in ALIASES.values()} == set(ALIASES)
    with pytest.raises(UserError, match=r"no format `q4_7`; the formats are .*q4_0"):
        format_of("q4_7")


def test_the_registry_imports_no_torch() -> None:
    read = (
        "import sys; from qpruner.quantization.formats import formats; formats(); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
