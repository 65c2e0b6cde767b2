"""Records of a search and of pruning as stages write them; tests change single fields."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from conftest import Raw

from qpruner.data.measures import over_tasks
from qpruner.plans.plan import PrecisionPlan
from qpruner.quantization.formats import format_of
from qpruner.runs.records import (
    SELECTION,
    CutRecord,
    Finalist,
    FineTune,
    LayerWidths,
    PruneRecord,
    RowLosses,
    ScoredRows,
    SearchRecord,
    TaskScore,
    TrialRecord,
)
from qpruner.runs.records.search import is_control
from qpruner.search.roles import rival_of


def made_search(plan: dict[str, str], **changes: Any) -> SearchRecord:
    """Make a search of nine trials by `gp`, in which trial 7 with this plan beat the control of
    trial 2."""
    fields: Raw = {
        "digest": "c" * 16,
        "trials_digest": "1" * 16,
        "searcher": "gp",
        "metric": "loss",
    }
    fields |= {
        "budget_bytes": 101_500_000,
        "seconds": 600.0,
        "search_seconds": 500.0,
        "gpu_seconds": 0.0,
    }
    fields |= {
        "num_trials": 9,
        "num_finished": 6,
        "num_stopped": 2,
        "num_failed": 1,
        "num_reused": 0,
        "resumed": 0,
    }
    fields |= {"best_index": 7}
    finalists = (
        made_finalist(2, "unpruned-knapsack", 2.125),
        made_finalist(7, "gp", 2.0625, plan=plan),
    )
    ended = "all 9 trials were spent (`search.max_trials`)"
    fields |= {"ended": ended, "finalists": finalists} | changes
    winner = next(each for each in fields["finalists"] if each.index == fields["best_index"])
    rival = rival_of(fields["finalists"], winner, fields["metric"])
    return SearchRecord(**{"rival": rival.index if rival else None} | fields)


def made_finalist(
    index: int,
    origin: str,
    loss: float,
    losses: dict[int, tuple[float, ...]] | None = None,
    accuracy: float | None = None,
    accuracy_stderr: float | None = None,
    cut: str = "cut-20",
    plan: dict[str, str] | None = None,
    plan_bytes: int = 100_000_000,
    **changes: Any,
) -> Finalist:
    """Make a finalist with this loss on both of two rows, or with other `losses` by seed and row.

    It is a control if its origin is the name of one.
    """
    fine_tunes = tuple(
        made_fine_tune(
            origin,
            plan or {"layers.0": "nf4", "layers.1": "int8"},
            seed,
            {SELECTION: of_seed},
            cut=cut,
            plan_bytes=plan_bytes,
            accuracy=accuracy,
            accuracy_stderr=accuracy_stderr,
        )
        for seed, of_seed in (losses or {0: (loss, loss)}).items()
    )
    fields = {"control": is_control(origin), "reused": False, **changes}
    return Finalist(index=index, fine_tunes=fine_tunes, **fields)


def made_fine_tune(
    name: str,
    plan: dict[str, str],
    seed: int | None = 0,
    losses: dict[ScoredRows, Sequence[float]] | None = None,
    tasks: Sequence[TaskScore] = (),
    **changes: Any,
) -> FineTune:
    """Make a fine-tune with these losses by row and these scores on tasks."""
    fields: Raw = {
        "digest": "0" * 16,
        "origin": name,
        "cut": "cut-20",
        "plan_bytes": 100_000_000,
        "measured_bytes": 100_000_000,
        "mean_bits": fmean(format_of(level).bits for level in plan.values()),
        "num_parameters": 120_000_000,
        "steps": 40,
        "train_loss": 1.9,
        "peak_memory_bytes": 900_000_000,
        "memory_counter": "rss",
    }
    if tasks:
        mean, stderr = over_tasks([task.correct for task in tasks])
        fields |= {"tasks": tuple(tasks), "accuracy": mean, "accuracy_stderr": stderr}
    by_half = {
        half: RowLosses(mean=fmean(by_row), by_row=tuple(by_row))
        for half, by_row in (losses or {}).items()
    }
    return FineTune(name=name, plan=plan, seed=seed, losses=by_half, **fields | changes)


def made_trial(plan: PrecisionPlan, **fields: Any) -> TrialRecord:
    """Make a finished trial of this plan."""
    known: Raw = {
        "index": 0,
        "digest": "1" * 16,
        "plan": plan.as_dict(),
        "cut": plan.cut,
        "plan_bytes": 100_000_000,
        "mean_bits": 4.0,
        "status": "finished",
    }
    return TrialRecord(**known | fields)


def made_layer(index: int, groups: int, channels: int) -> LayerWidths:
    """Make a block of 4 groups and 200 channels that keeps the first ones of each."""
    base = {
        "base_kv_groups": 4,
        "base_mlp_channels": 200,
        "heads_per_group": 2,
        "base_parameters": 1000,
    }
    kept = {"kept_kv_groups": tuple(range(groups)), "kept_mlp_channels": tuple(range(channels))}
    return LayerWidths(layer=index, kept_parameters=5 * channels, **base, **kept)


def made_cut(*layers: LayerWidths, **changes: Any) -> CutRecord:
    """Make a record of a cut from 150 to 120.24 million parameters."""
    fields: Raw = {
        "digest": "0" * 16,
        "seconds": 1.5,
        "dropped_blocks": (),
        "layers": layers,
    }
    fields |= {"importance": "taylor", "selection": "global", "compensation": "none"}
    fields |= {"target": "target 20.00% of all parameters", "achieved_rate": 0.1984}
    fields |= {"parameters_before": 150_000_000, "parameters_after": 120_240_000}
    fields |= {"bytes_before": 300_000_000, "bytes_after": 240_480_000}
    memory = {"peak_memory_bytes": 0, "memory_counter": "rise of resident memory"}
    effect = {"multiply_adds": 120_000_000, "loss": 2.5}
    return CutRecord(**fields | memory | effect | changes)


def made_prune(*layers: LayerWidths, **changes: Any) -> PruneRecord:
    """Make a record of the base model and one cut of it."""
    cut = made_cut(*layers, **changes)
    kept = {name: getattr(cut, name) for name in ("parameters_before", "bytes_before")}
    whole = {name.replace("before", "after"): size for name, size in kept.items()}
    base = cut.model_copy(
        update={**whole, "target": "no cut", "achieved_rate": 0.0, "dropped_blocks": ()}
    )
    return PruneRecord(
        digest=cut.digest,
        seconds=cut.seconds,
        gpu_seconds=cut.gpu_seconds,
        cuts={"base": base, "cut-20": cut},
    )
