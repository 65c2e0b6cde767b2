"""The prior of the searcher `gp`: the expected score of a plan before any score is known.

A plan's score is mostly a sum over its cut and its groups. So the prior is a Bayesian linear model
of their effects: of the cut from the loss after it, and of groups from their sensitivities, bytes,
sublayer and block. Groups have the same effects in all cuts. The module `posterior` adds
interactions and rungs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qpruner.plans.space import SearchSpace
from qpruner.quantization.formats import format_of
from qpruner.search.searchers import Observation, Prior

NUM_FITTED = (
    100  # observations that the hyperparameters are fitted to; more cost time and change little
)
NUM_RUNG_PAIRS = 24  # trials of which all rungs are kept, not the latest alone
SHARES = {
    "sublayer": (0.1, 1.0),
    "size": (0.05, 1.0),
    "depth": (0.1, 1.0),
    "group": (0.2, 1.0),
    "level": (0.001, 1.5),
    "methods": (0.1, 1.0),
    "sensitive": (0.1, 1.0),
    "cut": (1.0, 2.0),
    "loss": (1.0, 2.0),
}
"""Priors of the additive terms' variances, as shares of the scores' variance over random plans of a
cut; see `PlanModel`. All priors here are log-normal: (median, standard deviation of the logarithm).
"""
OTHERS = {
    "pairwise": (0.01, 1.5),
    "local": (0.01, 1.5),
    "reach": (0.2, 0.5),
    "noise": (0.003, 2.0),
    "decorrelation": (0.02, 1.0),
    "mean": (0.7, 0.7),
}
"""Priors of the other hyperparameters: variances of interactions (`pairwise`, `local`); share of
differing groups over which `local` decays; variance of repeated scores; decay of correlation per
rung; scale of the prior mean."""
OF_CUTS = {"offset": (1.0, 2.0)}
"""Prior of the variance of a cut's own level at each rung, if there are several cuts: one may
recover late."""
AMPLITUDE = (1.2, 0.4)  # prior of the size of effects at a lower rung, relative to the last rung


class PlanModel:
    """The prior over effects that a space and its sensitivities imply.

    An effect is the score that a level of a group adds, compared with the highest level that the
    group is offered. It is 0 for that level and for levels that the group is not offered. Unless
    said otherwise it is proportional to the `damage`: the relative squared error of the (group,
    level) as measured (`PlanSpace.damage`), or 4^-bits, minus that of the group's highest level;
    the largest is 1. The covariance of the effects is a sum of these parts:

    - `size`: proportional to the bytes that the smallest level saves;
    - `sublayer`: one effect for all groups of a kind, whose names differ in numbers only (`layers.#.qkv`);
    - `depth`: effects that are similar for groups of a kind in neighbouring blocks, where names have a number;
    - `group`: an independent effect for every group, with one variance for each kind;
    - `sensitive`: the mean of the sensitivities times an independent factor for every group;
    - `level`: an independent effect for every level between a group's lowest and highest;
    - `methods`: one term for each sensitivity, proportional to it;
    - `cut`: an independent effect for every cut, if there are several;
    - `loss`: proportional to the loss after the cut (`SearchSpace.losses`).

    `sublayer`, `depth` and `group` grow with the root of a group's bytes, like a sum over
    independent weights. The mean effect is proportional to the mean of the `priors`, each scaled to
    variance 1; if all are 0, to the bytes saved.
    """

    def __init__(self, whole: SearchSpace, priors: Mapping[str, Prior]) -> None:
        self.space = space = whole.whole
        num_groups, num_levels = len(space.groups), len(space.levels)
        self.num_groups, self.num_levels = num_groups, num_levels
        self.num_cuts = len(whole.cuts) if len(whole.cuts) > 1 else 0
        """Cuts that have an effect: none if there is one only."""
        of_groups = num_groups * (num_levels - 1)
        self.num_effects = of_groups + self.num_cuts
        lower = [set(offered[:-1]) for offered in space.offered]
        self.is_free = torch.tensor(
            [[at in levels for at in range(num_levels - 1)] for levels in lower]
        )
        """Levels ``(groups, levels - 1)`` that have an effect."""
        shares = [1.0 / len(offered) for offered in space.offered]
        self._shares = torch.tensor(shares, dtype=torch.float64)
        # The covariance of the features of plans drawn uniformly.
        eye, free = torch.eye(num_levels - 1, dtype=torch.float64), self.is_free.to(torch.float64)
        drawn = [
            (eye * share - share**2) * torch.outer(row, row)
            for share, row in zip(shares, free, strict=True)
        ]
        blocks = (
            torch.eye(num_groups, dtype=torch.float64)[:, None, :, None]
            * torch.stack(drawn)[:, :, None, :]
        )
        self._feature_covariance = blocks.reshape(of_groups, of_groups)
        unmeasured = [[4.0 ** -format_of(name).bits for name in space.levels]] * num_groups
        error = self._above_reference(space.damage or unmeasured)
        self._damage = error / error.abs().max().clamp_min(1e-300)
        sizes = torch.tensor([_saving(row) for row in space.group_bytes], dtype=torch.float64)
        self._size_effects = self._unit(
            ((sizes / sizes.mean().clamp_min(1e-300))[:, None] * self._damage).reshape(-1)
        )
        methods = [self._method_effects(prior) for prior in priors.values()]
        self._methods = [
            self._unit(effects) for effects in methods if bool(effects.abs().sum() > 0)
        ]
        mean = (
            self._unit(torch.stack(self._methods).mean(0)) if self._methods else self._size_effects
        )
        self.mean = pad(mean, (0, self.num_cuts))
        self.parts = {
            name: pad(part, (0, self.num_cuts) * 2)
            for name, part in self._covariances(sizes).items()
        }
        self.others = OTHERS | (OF_CUTS if self.num_cuts else {})
        for name, part in self._covariances_of_cuts(whole).items():
            self.parts[name] = pad(part, (of_groups, 0) * 2)

    def features(self, plans: Tensor) -> Tensor:
        """Convert rows ``(n, groups + 1)`` to centred one-hot features ``(n, effects)``; 0 without
        effect."""
        levels, cuts = plans[:, :-1, None], plans[:, -1:]
        hot = (levels == torch.arange(self.num_levels - 1)).to(torch.float64) - self._shares[
            :, None
        ]
        of_cuts = (cuts == torch.arange(self.num_cuts)).to(torch.float64) - 1 / max(
            1, self.num_cuts
        )
        return torch.cat([(hot * self.is_free).flatten(1), of_cuts], 1)

    def mismatches(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the share of groups, ``(n, m)``, in which rows ``(n, groups + 1)`` and ``(m,
        groups + 1)`` differ."""
        left, right = left[:, :-1], right[:, :-1]
        agree = torch.zeros(len(left), len(right), dtype=torch.float64)
        for level in range(self.num_levels):
            agree += (left == level).to(torch.float64) @ (right == level).to(torch.float64).T
        return 1.0 - agree / self.num_groups

    def _covariances(self, sizes: Tensor) -> dict[str, Tensor]:
        kinds = [re.sub(r"\d+", "#", name) for name in self.space.groups]
        depths = [re.search(r"\d+", name) for name in self.space.groups]
        if len(set(kinds)) == self.num_groups:
            kinds = [""] * self.num_groups
        same = torch.tensor([[a == b for b in kinds] for a in kinds], dtype=torch.float64)
        scale = torch.outer(sizes.sqrt(), sizes.sqrt()) / sizes.mean().clamp_min(1e-300)
        eye = torch.eye(self.num_groups, dtype=torch.float64)
        by_group = {"sublayer": same * scale}
        numbers = [float(found.group()) for found in depths if found]
        if len(numbers) > 1:
            reach = max(1.0, (max(numbers) - min(numbers)) / 5)
            number = torch.tensor(
                [float(found.group()) if found else 0.0 for found in depths], dtype=torch.float64
            )
            numbered = torch.tensor(
                [1.0 if found else 0.0 for found in depths], dtype=torch.float64
            )
            alike = same * scale * torch.exp(-(number[:, None] - number).abs() / reach)
            by_group["depth"] = alike * torch.outer(numbered, numbered)
        damage = self._damage.reshape(-1)
        pattern = torch.outer(damage, damage)
        parts = {name: self._by_level(part) * pattern for name, part in by_group.items()}
        parts["size"] = torch.outer(self._size_effects, self._size_effects)
        between = torch.tensor(
            [
                [at in offered[1:-1] for at in range(self.num_levels - 1)]
                for offered in self.space.offered
            ]
        )
        if bool(between.any()):
            parts["level"] = torch.diag(between.reshape(-1).to(torch.float64))
        if self._methods:
            effects = torch.stack(self._methods)
            parts["methods"] = effects.T @ effects / len(effects)
            magnitude = effects.abs().mean(0)
            parts["sensitive"] = self._by_level(eye) * torch.outer(magnitude, magnitude)
        parts = {name: self._unit_covariance(part) for name, part in parts.items()}
        alone = self._unit_covariance(self._by_level(eye * scale) * pattern)
        for kind in dict.fromkeys(kinds):
            of_kind = torch.tensor([other == kind for other in kinds]).repeat_interleave(
                self.num_levels - 1
            )
            if bool((alone * of_kind).any()):
                parts[f"group {kind}"] = alone * of_kind
        return parts

    def _covariances_of_cuts(self, space: SearchSpace) -> dict[str, Tensor]:
        if not self.num_cuts:
            return {}
        parts = {"cut": torch.eye(self.num_cuts, dtype=torch.float64) / (1 - 1 / self.num_cuts)}
        if all(cut in space.losses for cut in space.cuts):
            losses = torch.tensor([space.losses[cut] for cut in space.cuts], dtype=torch.float64)
            losses = (losses - losses.mean()) / losses.std(correction=0).clamp_min(1e-300)
            parts["loss"] = torch.outer(losses, losses)
        return parts

    def _by_level(self, matrix: Tensor) -> Tensor:
        """Repeat each entry ``(groups, groups)`` for all levels of both groups: ``(effects,
        effects)``."""
        num_levels = self.num_levels - 1
        return matrix.repeat_interleave(num_levels, 0).repeat_interleave(num_levels, 1)

    def _method_effects(self, prior: Prior) -> Tensor:
        rows = [prior.get(name, [None] * self.num_groups) for name in self.space.levels]
        return self._above_reference(list(zip(*rows, strict=True))).reshape(-1)

    def _above_reference(self, values: Sequence[Sequence[float | None]]) -> Tensor:
        """Subtract from values ``(groups, levels)`` the one of each group's highest level; None
        counts as 0.

        Returns ``(groups, levels - 1)``, with 0 for levels that have no effect.
        """
        known = torch.tensor(
            [[value or 0.0 for value in row] for row in values], dtype=torch.float64
        )
        last = torch.tensor([offered[-1] for offered in self.space.offered])
        above = known[:, :-1] - known.gather(1, last[:, None])
        return above.masked_fill(~self.is_free, 0.0)

    def _unit(self, effects: Tensor) -> Tensor:
        """Scale effects so that their sum in a random plan has variance one."""
        variance = effects @ self._feature_covariance @ effects
        return effects / variance.sqrt() if variance > 0 else effects

    def _unit_covariance(self, part: Tensor) -> Tensor:
        return part / (part * self._feature_covariance).sum().clamp_min(1e-300)


def _saving(sizes: Sequence[int | None]) -> float:
    """Return the bytes that a group's smallest level saves; at least a tenth of all: levels may
    have equal bytes."""
    offered = [size for size in sizes if size is not None]
    return max(max(offered) - min(offered), max(offered) / 10) if len(offered) > 1 else 0.0


@dataclass(frozen=True)
class Data:
    """Observations as tensors."""

    plans: Tensor  # (n, groups + 1): rows of `SearchSpace`
    ranks: Tensor  # (n,): 0 is the last rung, 1 the one below it
    scores: Tensor  # (n,)
    num_rungs: int  # rungs of the search, also those of which there is no score here

    @classmethod
    def of(
        cls, space: SearchSpace, observations: Sequence[Observation], steps: Collection[int]
    ) -> Data:
        """Convert observations to tensors; `steps` has the step of every rung."""
        steps, plans = (
            sorted(steps, reverse=True),
            [space.indices_of(item.plan) for item in observations],
        )
        return cls(
            torch.tensor(plans, dtype=torch.long).reshape(-1, len(space.groups) + 1),
            torch.tensor([steps.index(item.step) for item in observations], dtype=torch.long),
            torch.tensor([item.score for item in observations], dtype=torch.float64),
            len(steps),
        )

    def subset(self, rows: Tensor) -> Data:
        """Select observations by their positions."""
        return Data(self.plans[rows], self.ranks[rows], self.scores[rows], self.num_rungs)


def informative(observations: Sequence[Observation]) -> list[Observation]:
    """Keep the latest observation of every trial, and all of the last `NUM_RUNG_PAIRS` trials that
    have several."""
    latest = {item.index: item.step for item in observations}
    kept = set(
        sorted({item.index for item in observations if item.step < latest[item.index]})[
            -NUM_RUNG_PAIRS:
        ]
    )
    return [item for item in observations if item.step == latest[item.index] or item.index in kept]
