"""Records of the stages before the search: base model, pruned model, sensitivities, bank."""

from __future__ import annotations

from typing import Any

from qpruner.runs.records.base import Record, Recorded


class PrepareRecord(Record):
    """The base model as a local or hub checkpoint, and the encoded rows."""

    model_path: str
    converted: bool
    source_bytes: int | None = None
    """Of the .gguf file that the base's weights were expanded from; None where they are as they were given."""
    num_rows: dict[str, int]


class LayerWidths(Recorded):
    """What is kept of one block, as indices into the base model; empty where the whole block went."""

    layer: int
    kept_kv_groups: tuple[int, ...]
    kept_mlp_channels: tuple[int, ...]
    """Where experts are stacked: expert * channels + channel."""
    kept_experts: tuple[int, ...] | None = None
    base_kv_groups: int
    base_mlp_channels: int
    base_experts: int | None = None
    heads_per_group: int
    base_parameters: int
    kept_parameters: int


class PruneRecord(Record):
    """The pruned checkpoint."""

    importance: str
    """Criterion of the units that went: for units of blocks, and for whole blocks where those alone might go."""
    selection: str
    compensation: str
    target: str
    target_rate: float | None
    """Share of all parameters asked for; None when each block's own share was."""
    achieved_rate: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    peak_memory_bytes: int
    """Above the loaded model."""
    memory_counter: str
    dropped_blocks: tuple[int, ...]
    layers: tuple[LayerWidths, ...]
    weights: str = ""
    """Digest of its weight files, which from the same inputs another kind of machine may make otherwise."""

    @property
    def achieved(self) -> str:
        """The achieved rate in words."""
        return f"achieved {self.achieved_rate:.2%}"

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a block of the base model."""
        return [row for layer in self.layers for row in layer.table_rows()]


class MethodScores(Recorded):
    """One sensitivity of every group."""

    unit: str
    source: str
    """What was computed, in words."""
    values: dict[int, tuple[float, ...]]
    """Bits -> predicted rise over the unquantized pruned model, a group; 0 at 16 bits."""
    seconds: float
    """Of the passes; those that several methods share are counted by each of them."""
    details: dict[str, Any]
    """Figures of the method's own: samples and positions, standard errors, what was subtracted."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a group, in the order of `SensitivityRecord.groups`."""
        names = [f"at {bits} bits" for bits in self.values]
        return [dict(zip(names, of_group, strict=True)) for of_group in zip(*self.values.values(), strict=True)]


class SensitivityRecord(Record):
    """How much each group suffers at fewer bits, by every method asked for. The byte budget is not among the inputs."""

    groups: tuple[str, ...]
    methods: dict[str, MethodScores]

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a group, with every method's scores."""
        rows: list[dict[str, Any]] = [{"group": group} for group in self.groups]
        for name, method in self.methods.items():
            for row, scores in zip(rows, method.table_rows(), strict=True):
                row |= {f"{name} {column}": value for column, value in scores.items()}
        return rows


class BankRecord(Record):
    """Packed weights and adapter starts for every (group, bits)."""

    files: dict[str, str]
    """File name -> sha256."""
    bytes: int
    residual_ratio: dict[str, dict[str, float]]
    """bits -> group -> Frobenius norm of W - Q - BA over that of W - Q."""
    group_bytes: dict[str, dict[str, int]] = {}
    """bits -> group -> bytes of its packed weights, for all levels of the search."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row a group."""
        rows: dict[str, dict[str, Any]] = {}
        for told in ("group_bytes", "residual_ratio"):
            for bits, by_group in getattr(self, told).items():
                for group, value in by_group.items():
                    rows.setdefault(group, {"group": group})[f"{told} at {bits} bits"] = value
        return list(rows.values())


def plan_group_bytes(group_bytes: dict[str, dict[str, int]], plan: dict[str, int]) -> int:
    """Sum the bytes of a plan's groups, by `BankRecord.group_bytes`; what is in no group is left out."""
    return sum(group_bytes[f"{bits}"][group] for group, bits in plan.items())
