"""Layouts of small models, for the tests of plans and of their spaces."""

from dataclasses import replace

import numpy as np

from qpruner.plans.plan import Group, Layout, LinearShape

LEVELS = ("nf4", "int8")


def layout_of(
    shapes: list[tuple[int, int]],
    rest: int = 1000,
    levels: tuple[str, ...] = LEVELS,
    cut: str = "cut-20",
) -> Layout:
    groups = tuple(
        Group(f"layers.{index}", (LinearShape(f"model.layers.{index}", *shape),), levels)
        for index, shape in enumerate(shapes)
    )
    return Layout(
        groups=groups,
        ungrouped_bytes=rest,
        adapter_bytes=rest // 2,
        element_bytes=2,
        num_parameters=rest + sum(group.num_weights for group in groups),
        multiply_adds=sum(group.num_weights for group in groups),
        cut=cut,
    )


def random_layout(
    generator: np.random.Generator, num_groups: int, levels: tuple[str, ...] = LEVELS
) -> Layout:
    shapes = generator.integers(8, 200, (num_groups, 2)).tolist()
    return layout_of([(rows, columns) for rows, columns in shapes], levels=levels)


def mixed_layout(generator: np.random.Generator) -> Layout:
    """Embeddings of two formats, a head of one, blocks of one, two or three."""
    offered = ["int8 bf16", "nf4 int8", "nf4 int8 bf16", "nf4", "nf4 bf16", "nf4 int8", "bf16"]
    layout = random_layout(generator, len(offered))
    names = ["embeddings", *(group.name for group in layout.groups[1:-1]), "head"]
    groups = [
        replace(group, name=name, formats=tuple(formats.split()))
        for group, name, formats in zip(layout.groups, names, offered, strict=True)
    ]
    return replace(layout, groups=tuple(groups))


def any_layout(generator: np.random.Generator, levels: tuple[str, ...]) -> Layout:
    """Groups of random sizes with these levels, or else with levels of their own."""
    return random_layout(generator, 5, levels) if levels else mixed_layout(generator)


# ---- groups with formats of their own
