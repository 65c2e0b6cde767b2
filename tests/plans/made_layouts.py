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
    shapes = [
        (int(rows), int(columns)) for rows, columns in generator.integers(8, 200, (num_groups, 2))
    ]
    return layout_of(shapes, levels=levels)


def mixed_layout(generator: np.random.Generator) -> Layout:
    """Embeddings of two formats, a head of one, blocks of one, two or three."""
    offered = [
        ("int8", "bf16"),
        LEVELS,
        ("nf4", "int8", "bf16"),
        ("nf4",),
        ("nf4", "bf16"),
        LEVELS,
        ("bf16",),
    ]
    layout = random_layout(generator, len(offered))
    groups = [
        replace(group, formats=formats)
        for group, formats in zip(layout.groups, offered, strict=True)
    ]
    return replace(
        layout,
        groups=(
            replace(groups[0], name="embeddings"),
            *groups[1:-1],
            replace(groups[-1], name="head"),
        ),
    )


# ---- groups with formats of their own
