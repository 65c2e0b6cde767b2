"""Register the number formats; nothing outside this folder knows how a format stores weights."""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Literal

from qpruner.errors import UserError
from qpruner.quantization.formats.format import Capability as Capability
from qpruner.quantization.formats.format import Format as Format
from qpruner.quantization.formats.format import GridFormat as GridFormat
from qpruner.quantization.formats.format import ScaledFormat as ScaledFormat

DENSE = "bf16"  # the format of unpacked weights, which have the type `model.dtype`
ALIASES = {4: "nf4", 8: "int8", 16: DENSE}  # format for each bit-width of `quantize.bits`
PAPER = (ALIASES[4], ALIASES[8])  # the formats of the QPruner paper

Method = Literal["adapter", "scales"]
"""What a fine-tune trains: LoRA matrices beside the weights, or the scales that they store."""

NO_FORMATS = {"format", "layers"}
"""Files of this folder that make no format; `layers` imports torch."""


@functools.cache
def formats() -> dict[str, Format]:
    """Map each name to its format, from the files of this folder, smallest first."""
    names = {info.name for info in pkgutil.iter_modules(__path__)} - NO_FORMATS
    all_formats: list[Format] = []
    for name in names:
        module = importlib.import_module(f"{__name__}.{name}")
        all_formats += [value for value in vars(module).values() if isinstance(value, Format)]
    all_formats.sort(key=lambda item: item.order)
    return {item.name: item for item in all_formats}


def format_of(name: str) -> Format:
    """Return the format with this name; raise `UserError` if there is none."""
    if name not in formats():
        raise UserError(
            f"`quantize.formats`: there is no format `{name}`; "
            f"the formats are {', '.join(formats())}"
        )
    return formats()[name]


def nearest_format(name: str, columns: int, is_taken: Callable[[Format], bool]) -> str:
    """Return the format itself if it is taken, otherwise the taken format nearest to it in bytes.

    Of two that are equally near, the larger is returned; if none is taken, the dense format.
    """
    wanted = format_of(name)
    taken = [
        item for item in formats().values() if is_taken(item) and not item.refusal(columns, None)
    ]
    if not wanted.is_packed or wanted in taken:
        return name
    if not taken:
        return DENSE

    def size(item: Format) -> int:
        # With many rows, what a format stores once for a weight hardly counts.
        return item.packed_bytes(4096, columns, 2)

    nearest = min(reversed(taken), key=lambda item: abs(size(item) - size(wanted)))
    return nearest.name


def by_size(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names of formats by the bytes that they take, smallest first.

    Raises:
        UserError: There is no format of such a name.
    """
    return tuple(sorted(names, key=lambda name: format_of(name).order))


def trained_by(method: Method, formats: Iterable[str]) -> Method:
    """Return the method that trains a plan with these formats: adapters if it stores no scales."""
    has_scales = any(isinstance(format_of(name), ScaledFormat) for name in formats)
    return method if has_scales else "adapter"
