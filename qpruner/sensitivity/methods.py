"""Score by every method how much each (group, format) raises the loss of the pruned model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from qpruner.config.schema import MEASUREMENT, SensitivityConfig
from qpruner.data.calibration import OnProgress, Samples
from qpruner.plans.plan import Group
from qpruner.quantization.bank import BankSource, Pair, Starts
from qpruner.quantization.formats import by_size, format_of
from qpruner.runs.records import MethodScores
from qpruner.sensitivity import mutual_information
from qpruner.sensitivity.expansion import expand
from qpruner.sensitivity.measurement import measure

Rises = Mapping[Pair, float]  # predicted rise for each pair of a group and a packed format
MEASURED_INSTEAD = {"first_order": "loss", "fisher": "kl", "second_order": "kl"}
"""Method -> the measurement that embeddings and head take instead.

A Taylor expansion of linear layers is blind to them.
"""


@dataclass(frozen=True)
class Subject:
    """Holds the samples, the groups with the formats of each, and the bank of a model."""

    samples: Samples
    groups: tuple[Group, ...]
    bank: BankSource
    on_group: OnProgress = lambda done, total: None
    """Counts the groups that `by_information` has scored after its pass over the samples."""

    @property
    def tables(self) -> Subject:
        """The subject without the blocks' groups: embeddings and head, if they may be packed."""
        tables = [group for group in self.groups if group.is_table and group.packed]
        return replace(self, groups=tuple(tables))

    @property
    def blocks(self) -> Subject:
        """The subject without embeddings and head."""
        blocks = [group for group in self.groups if not group.is_table]
        return replace(self, groups=tuple(blocks))

    @property
    def starts(self) -> Starts:
        """Open the bank to read the initial weights of the groups."""
        return Starts(self.bank, self.groups)


def by_information(
    model: PreTrainedModel, subject: Subject, settings: SensitivityConfig, seed: int
) -> dict[str, MethodScores]:
    """Score all groups by mutual information, estimated from the outputs of one forward pass."""
    started = time.monotonic()
    information = mutual_information.measure(
        model,
        subject.samples,
        group=subject.bank.grouping,
        settings=settings,
        seed=seed,
        on_group=subject.on_group,
    )
    # Embeddings and head count as much as the most informative block.
    nats = {group.name: max(information) for group in subject.groups}
    for group, value in zip(subject.blocks.groups, information, strict=True):
        nats[group.name] = value

    levels = {name for group in subject.groups for name in group.formats}
    sizes = {name: format_of(name).packed_bytes(4096, 4096, 2) for name in levels}
    most = max(sizes.values())
    span = max(1, most - min(sizes.values()))
    rises = {
        (group.name, name): nats[group.name] * ((most - sizes[name]) / span)
        for group in subject.groups
        for name in group.packed
    }
    seconds = time.monotonic() - started
    return _scores({"mutual_information": rises}, subject.groups, seconds, "nats of information")


def by_expansion(
    model: PreTrainedModel, subject: Subject, tables: Mapping[str, Rises]
) -> dict[str, MethodScores]:
    """Score all groups by first order, Fisher and second order.

    `tables` has the rises of embeddings and head.
    """
    started = time.monotonic()
    by_method = expand(model, subject.samples, subject.blocks.starts)
    for method, rises in by_method.items():
        rises.update(tables[MEASURED_INSTEAD[method]])
    return _scores(by_method, subject.groups, time.monotonic() - started)


def by_measurement(model: PreTrainedModel, subject: Subject) -> dict[str, MethodScores]:
    """Score all groups by KL divergence and by change of the loss."""
    started = time.monotonic()
    by_method = measure(model, subject.samples, subject.starts)
    return _scores(by_method, subject.groups, time.monotonic() - started)


def table_rises(scores: Mapping[str, MethodScores], groups: Sequence[Group]) -> Mapping[str, Rises]:
    """Return the rises by `kl` and `loss` of packed embeddings and head from the groups' scores."""
    by_method: dict[str, dict[Pair, float]] = {method: {} for method in MEASUREMENT}
    for method, rises in by_method.items():
        for at, group in enumerate(groups):
            for name in group.packed if group.is_table else ():
                rise = scores[method].values[name][at]
                if rise is not None:
                    rises[group.name, name] = rise
    return by_method


def _scores(
    by_method: Mapping[str, Rises],
    groups: Sequence[Group],
    seconds: float,
    unit: str = "nats per predicted token",
) -> dict[str, MethodScores]:
    """Make one record per method; all share the time `seconds`."""
    return {
        name: MethodScores(unit=unit, values=_by_format(rises, groups), seconds=seconds)
        for name, rises in by_method.items()
    }


def _by_format(rises: Rises, groups: Sequence[Group]) -> dict[str, tuple[float | None, ...]]:
    """Map each format, smallest first, to the rises of all groups.

    A rise is 0 where the format is unpacked, and None where it is not offered.
    """
    levels = by_size({name for group in groups for name in group.formats})

    def rise(group: Group, name: str) -> float | None:
        if name in group.packed:
            return rises[group.name, name]
        return 0.0 if name in group.formats else None

    return {name: tuple(rise(group, name) for group in groups) for name in levels}
