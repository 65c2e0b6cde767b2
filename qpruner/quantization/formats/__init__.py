"""Register the number formats; nothing outside this folder knows how a format stores weights."""

import functools
import importlib
import pkgutil
from collections.abc import Callable

from qpruner.errors import UserError
from qpruner.quantization.formats.format import Capability as Capability
from qpruner.quantization.formats.format import Format as Format
from qpruner.quantization.formats.format import GridFormat as GridFormat

DENSE = "bf16"  # the format of unpacked weights, which have the type `model.dtype`
ALIASES = {4: "nf4", 8: "int8", 16: DENSE}  # format for each bit-width of `quantize.bits`
PAPER = (ALIASES[4], ALIASES[8])  # the formats of the QPruner paper

NO_FORMATS = {
    "format",
    "layers",
}  # files of this folder that make no format; `layers` imports torch


@functools.cache
def formats() -> dict[str, Format]:
    """Map each name to its format, from the files of this folder, smallest first."""
    names = {info.name for info in pkgutil.iter_modules(__path__)} - NO_FORMATS
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [
        value for module in modules for value in vars(module).values() if isinstance(value, Format)
    ]
    ordered = sorted(found, key=lambda each: (each.packed_bytes(4096, 4096, 2), each.name))
    return {each.name: each for each in ordered}


def format_of(name: str) -> Format:
    """Return the format with this name; raise `UserError` if there is none."""
    found = formats().get(name)
    if found is None:
        raise UserError(
            f"`quantize.formats`: there is no format `{name}`; "
            f"the formats are {', '.join(formats())}"
        )
    return found


def nearest_format(name: str, columns: int, is_taken: Callable[[Format], bool]) -> str:
    """Return the format itself if it is taken, otherwise the taken format nearest to it in bytes.

    Of two that are equally near, the larger is returned; if none is taken, the dense format.
    """
    wanted, rows = format_of(name), 4096  # what a format stores once for a weight hardly counts
    taken = [
        each for each in formats().values() if is_taken(each) and not each.refusal(columns, None)
    ]
    if not wanted.is_packed or wanted in taken:
        return name
    size = wanted.packed_bytes(rows, columns, 2)
    found = min(
        reversed(taken),
        key=lambda each: abs(each.packed_bytes(rows, columns, 2) - size),
        default=None,
    )
    return found.name if found else DENSE


def by_size(names: tuple[str, ...]) -> tuple[str, ...]:
    """Sort names of formats by the bytes that they take, smallest first.

    Raises:
        UserError: There is no format of such a name.
    """
    order = list(formats())
    return tuple(sorted(names, key=lambda name: order.index(format_of(name).name)))
