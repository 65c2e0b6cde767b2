"""The prior of the searcher `gp`: the expected score of a plan before any score is known.

A plan's score is a sum over its cut and its groups, so the prior is a Bayesian linear model of
their effects: of the cut from the loss after it, and of groups from their sensitivities, bytes and
block. Groups have the same effects in all cuts. LOG.md tells which further terms made no difference
to searches (2026-12-03). The module `posterior` adds rungs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from qpruner.plans.space import SearchSpace
from qpruner.quantization.formats import format_of
from qpruner.search.searchers import Observation, Prior

NUM_TRIALS = 400
"""Trials that the model is conditioned on, so that the time of a proposal has a limit."""
NUM_FITTED = 100
"""Observations that the hyperparameters are fitted to; more cost time and change little."""
NUM_RUNG_PAIRS = 24
"""Trials of which all rungs are kept, not the latest alone."""

Belief = tuple[float, float]
"""A log-normal prior: its median, and the standard deviation of the logarithm."""
PARTS: dict[str, Belief] = {
    "depth": (0.1, 1.0),
    "group": (0.2, 1.0),
    "level": (0.001, 1.5),
    "cut": (1.0, 2.0),
    "loss": (1.0, 2.0),
}
"""Variances of the parts of `PlanModel`, as shares of the scores' variance over random plans."""
OTHERS: dict[str, Belief] = {
    "noise": (0.003, 2.0),
    "decorrelation": (0.02, 1.0),
    "mean": (0.7, 0.7),
    "offset": (1.0, 2.0),
}
"""The other hyperparameters: the variance of repeated scores, the decay of correlation per rung,
the scale of the prior mean, and the variance of a cut's own level at each rung: one may recover
late."""
AMPLITUDE: Belief = (1.2, 0.4)
"""The size of effects at a lower rung, relative to the last rung."""


class PlanModel:
    """The prior over effects that a space and its sensitivities imply.

    An effect is the score that a level of a group adds, compared with the highest level that the
    group is offered. It is 0 for that level and for levels that the group is not offered. The
    effects are followed by those of the cuts, if there are several, and by a constant.

    The mean effect of groups is proportional to the mean of the `priors`, each scaled to variance
    1; if all are 0, to the bytes saved. The covariance of the effects is a sum of these parts:

    - `depth`: effects that are similar for groups of a kind in neighbouring blocks; a kind is a
      name up to its numbers (`layers.#.qkv`);
    - `group`: an independent effect for every group;
    - `level`: an independent effect for every level of every group, if there are several;
    - `cut`: an independent effect for every cut, if there are several;
    - `loss`: proportional to the loss after the cut (`SearchSpace.losses`).

    `depth` and `group` grow with the root of a group's bytes, like a sum over independent weights,
    and with the damage: the relative squared error of the (group, level) as measured
    (`SearchSpace.errors`), or 4^-bits, minus that of the group's highest level; the largest is 1.
    """

    def __init__(self, space: SearchSpace, priors: Mapping[str, Prior]) -> None:
        self.space = space
        self.num_groups = len(space.groups)
        self.num_levels = len(space.levels)
        self.num_cuts = len(space.cuts) if len(space.cuts) > 1 else 0
        """Cuts that have an effect: none if there is one only."""
        of_groups = self.num_groups * (self.num_levels - 1)
        self.num_effects = of_groups + self.num_cuts + 1
        lower = [set(offered[:-1]) for offered in space.offered]
        self.is_free = torch.tensor(
            [[level in levels for level in range(self.num_levels - 1)] for levels in lower]
        )
        """Levels ``(groups, levels - 1)`` that have an effect."""
        shares = [1.0 / len(offered) for offered in space.offered]
        self._shares = torch.tensor(shares, dtype=torch.float64)
        self._feature_covariance = self._covariance_of_features()

        errors: Prior = space.errors or {
            name: [4.0 ** -format_of(name).bits] * self.num_groups for name in space.levels
        }
        error = self._above_reference(errors)
        self._damage = error / error.abs().max().clamp_min(1e-300)
        sizes = torch.tensor([_saving(row) for row in space.table], dtype=torch.float64)
        self._sizes = sizes / sizes.mean().clamp_min(1e-300)

        self.mean = pad(self._mean_of_groups(priors), (0, self.num_cuts + 1))
        """The mean effects ``(effects,)``, without their scale."""
        self.parts: dict[str, Tensor] = {}
        """The covariance ``(effects, effects)`` of each part, without its variance."""
        for name, part in self._parts_of_groups().items():
            self.parts[name] = pad(self._unit_covariance(part), (0, self.num_cuts + 1) * 2)
        for name, part in self._parts_of_cuts().items():
            self.parts[name] = pad(part, (of_groups, 1) * 2)
        self.beliefs = {name: PARTS[name] for name in self.parts} | OTHERS

    def features(self, plans: Tensor) -> Tensor:
        """Convert rows ``(n, groups + 1)`` to features ``(n, effects)``, whose last is 1.

        Those of groups and cuts are one-hot and centred, and 0 where there is no effect.
        """
        has_level = plans[:, :-1, None] == torch.arange(self.num_levels - 1)
        of_groups = (has_level.to(torch.float64) - self._shares[:, None]) * self.is_free
        has_cut = plans[:, -1:] == torch.arange(self.num_cuts)
        of_cuts = has_cut.to(torch.float64) - 1 / max(1, self.num_cuts)
        constant = torch.ones(len(plans), 1, dtype=torch.float64)
        return torch.cat([of_groups.flatten(1), of_cuts, constant], 1)

    def _covariance_of_features(self) -> Tensor:
        """Return the covariance of the features of groups in plans that are drawn uniformly."""
        shares = (self._shares[:, None] * self.is_free).flatten()
        is_same_group = self._by_level(torch.eye(self.num_groups, dtype=torch.float64))
        return torch.diag(shares) - torch.outer(shares, shares) * is_same_group

    def _mean_of_groups(self, priors: Mapping[str, Prior]) -> Tensor:
        predicted = [self._above_reference(prior).flatten() for prior in priors.values()]
        predicted = [self._unit(effects) for effects in predicted if bool(effects.any())]
        if predicted:
            return self._unit(torch.stack(predicted).mean(0))
        return self._unit((self._sizes[:, None] * self._damage).flatten())

    def _parts_of_groups(self) -> dict[str, Tensor]:
        names = self.space.groups
        kinds = [re.sub(r"\d+", "#", name) for name in names]
        if len(set(kinds)) == self.num_groups:
            kinds = [""] * self.num_groups
        same_kind = torch.tensor([[kind == other for other in kinds] for kind in kinds])
        same_group = torch.eye(self.num_groups, dtype=torch.float64)
        by_group = {"group": same_group}
        numbers = torch.tensor([_number(name) for name in names], dtype=torch.float64)
        numbered = numbers[~numbers.isnan()]
        if len(numbered) > 1:
            reach = ((numbered.max() - numbered.min()) / 5).clamp_min(1.0)
            near = torch.exp(-(numbers[:, None] - numbers).abs() / reach)
            by_group["depth"] = (near * same_kind).nan_to_num(0.0)

        scale = torch.outer(self._sizes.sqrt(), self._sizes.sqrt())
        damage = self._damage.flatten()
        pattern = torch.outer(damage, damage)
        parts = {name: self._by_level(part * scale) * pattern for name, part in by_group.items()}
        if self.num_levels > 2:
            parts["level"] = torch.diag(self.is_free.flatten().to(torch.float64))
        return parts

    def _parts_of_cuts(self) -> dict[str, Tensor]:
        if not self.num_cuts:
            return {}
        space = self.space
        parts = {"cut": torch.eye(self.num_cuts, dtype=torch.float64) / (1 - 1 / self.num_cuts)}
        if all(cut in space.losses for cut in space.cuts):
            losses = torch.tensor([space.losses[cut] for cut in space.cuts], dtype=torch.float64)
            losses = (losses - losses.mean()) / losses.std(correction=0).clamp_min(1e-300)
            parts["loss"] = torch.outer(losses, losses)
        return parts

    def _by_level(self, matrix: Tensor) -> Tensor:
        """Repeat each entry of ``(groups, groups)`` for all levels of both groups."""
        num_levels = self.num_levels - 1
        return matrix.repeat_interleave(num_levels, 0).repeat_interleave(num_levels, 1)

    def _above_reference(self, prior: Prior) -> Tensor:
        """Subtract from the values of each group that of its highest level.

        A value that is missing counts as 0. Return ``(groups, levels - 1)``, with 0 for levels that
        have no effect.
        """
        rows = [prior.get(name, [0.0] * self.num_groups) for name in self.space.levels]
        filled = [[value or 0.0 for value in row] for row in rows]
        known = torch.tensor(filled, dtype=torch.float64).T
        last = torch.tensor([offered[-1] for offered in self.space.offered])
        above = known[:, :-1] - known.gather(1, last[:, None])
        return above.masked_fill(~self.is_free, 0.0)

    def _unit(self, effects: Tensor) -> Tensor:
        """Scale effects so that their sum in a random plan has variance one."""
        variance = effects @ self._feature_covariance @ effects
        return effects / variance.sqrt() if variance > 0 else effects

    def _unit_covariance(self, part: Tensor) -> Tensor:
        return part / (part * self._feature_covariance).sum().clamp_min(1e-300)


def _number(name: str) -> float:
    """Return the first number in the name of a group; NaN if it has none."""
    digits = re.search(r"\d+", name)
    return float(digits.group()) if digits else float("nan")


def _saving(sizes: np.ndarray) -> float:
    """Return the bytes that the smallest level of a group saves.

    They are at least a tenth of its bytes, because all its levels may have equal bytes.
    """
    offered = sizes[~np.isnan(sizes)]
    if len(offered) == 1:
        return 0.0
    return max(float(np.ptp(offered)), float(offered.max()) / 10)


@dataclass(frozen=True)
class Data:
    """Observations as tensors."""

    plans: Tensor  # (n, groups + 1): rows of `SearchSpace`
    features: Tensor  # (n, effects): those of the plans
    ranks: Tensor  # (n,): 0 is the last rung, 1 the one below it
    scores: Tensor  # (n,)
    num_rungs: int  # rungs of the search, also those of which there is no score here

    @classmethod
    def of(
        cls, model: PlanModel, observations: Sequence[Observation], steps: Collection[int]
    ) -> Data:
        """Convert observations to tensors; `steps` has the step of every rung."""
        highest_first = sorted(steps, reverse=True)
        rows = [model.space.indices_of(item.plan) for item in observations]
        plans = torch.tensor(rows, dtype=torch.long).reshape(-1, model.num_groups + 1)
        ranks = [highest_first.index(item.step) for item in observations]
        scores = [item.score for item in observations]
        return cls(
            plans=plans,
            features=model.features(plans),
            ranks=torch.tensor(ranks, dtype=torch.long),
            scores=torch.tensor(scores, dtype=torch.float64),
            num_rungs=len(highest_first),
        )

    def subset(self, rows: Tensor) -> Data:
        """Select observations by their positions."""
        return Data(
            plans=self.plans[rows],
            features=self.features[rows],
            ranks=self.ranks[rows],
            scores=self.scores[rows],
            num_rungs=self.num_rungs,
        )


def informative(observations: Sequence[Observation]) -> list[Observation]:
    """Select what the model is conditioned on from all observations, in their order.

    Of every trial it is the latest observation, and of the last `NUM_RUNG_PAIRS` trials that have
    several all of them. If there are more than `NUM_TRIALS` trials, half of those kept are the best
    at the highest steps, and half are the newest others.
    """
    latest = {item.index: item for item in observations}
    kept = set(latest)
    if len(latest) > NUM_TRIALS:
        ranked = sorted(latest.values(), key=lambda item: (-item.step, item.score))
        best = {item.index for item in ranked[: NUM_TRIALS // 2]}
        others = [index for index in latest if index not in best]
        kept = {*best, *others[-(NUM_TRIALS // 2) :]}
    earlier = {item.index for item in observations if item is not latest[item.index]}
    paired = sorted(kept & earlier)[-NUM_RUNG_PAIRS:]

    def is_kept(item: Observation) -> bool:
        if item is latest[item.index]:
            return item.index in kept
        return item.index in paired

    return list(filter(is_kept, observations))
