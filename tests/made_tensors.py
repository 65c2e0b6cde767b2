"""Random tensors that are the same each time, and comparisons of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw a tensor of this shape from the standard normal distribution."""
    return torch.randn(shape, generator=seeded(seed))


def token_rows(count: int, length: int, seed: int = 1, end: int = 400) -> list[list[int]]:
    """Draw rows of token ids, none of them special."""
    return torch.randint(3, end, (count, length), generator=seeded(seed)).tolist()


def same(first: Tensors, second: Tensors) -> bool:
    """Whether two mappings have the same names and equal tensors."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def distance(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the norm of the difference, relative to that of what is expected."""
    difference = tensor.float() - expected.float()
    return float(difference.norm() / expected.float().norm())
