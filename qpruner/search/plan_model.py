"""What a score is expected to be, given every score so far: a Gaussian process over plans and rungs.

A plan's score is, first of all, a sum over its groups; so the process is a Bayesian linear model of the groups'
effects, whose prior knows what is known of them (sensitivities, bytes, which sublayer of which block a group is), plus
small terms for how groups interact. Rungs are tied as in the intrinsic coregionalization model (Bonilla et al. 2008),
with a correlation that falls with the distance in rungs, so that a trial stopped early informs the last rung.
All hyperparameters have priors and are set to their maximum a posteriori, in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from qpruner.plans.plan import PlanSpace
from qpruner.search.searchers import History, Observation, Prior

JITTER = 1e-8
MIN_VARIANCE = 1e-9
CONSTANT_VARIANCE = 100.0
"""Of a rung's level, in units of the scores' variance: as good as unknown."""
NUM_FITTED = 100
"""Observations that the hyperparameters are fitted to; more cost time and change little."""
NUM_RUNG_PAIRS = 24
"""Trials whose lower rungs are kept once they have a higher one: enough to learn how rungs relate."""


@dataclass(frozen=True)
class Hyperprior:
    """A log-normal belief: the median of a positive quantity, and the standard deviation of its logarithm."""

    median: float
    spread: float


SHARES = {
    "sublayer": Hyperprior(0.1, 1.0),
    "size": Hyperprior(0.05, 1.0),
    "depth": Hyperprior(0.1, 1.0),
    "group": Hyperprior(0.2, 1.0),
    "level": Hyperprior(0.001, 1.5),
    "methods": Hyperprior(0.1, 1.0),
    "sensitive": Hyperprior(0.1, 1.0),
}
"""Variance of the additive terms, as shares of the scores' variance over random plans; see `PlanModel`."""
OTHERS = {
    "pairwise": Hyperprior(0.01, 1.5),
    "local": Hyperprior(0.01, 1.5),
    "reach": Hyperprior(0.2, 0.5),
    "noise": Hyperprior(0.003, 2.0),
    "decorrelation": Hyperprior(0.02, 1.0),
    "mean": Hyperprior(0.7, 0.7),
}
"""The other hyperparameters: variance of the interactions, and the share of groups over which they reach; variance of a
repeat; decay of the rungs' correlation, for each rung apart; scale of the prior mean."""
FREEDOM, NUM_STEPS = 1.0, 10
"""Degrees of freedom of the groups' own effects, and steps of expectation maximization to find their scales."""
AMPLITUDE = Hyperprior(1.2, 0.4)
"""Of the effects at a lower rung against the last."""
OWN = ("group", "sensitive")
"""Parts in which every group has an effect of its own."""


class PlanModel:
    """The prior over effects that a space and its sensitivities imply.

    An effect is what a group's level adds to the score, against the highest level. Levels are ranked by `damage`, the
    quantization error's variance as 4^-bits, 1 at the lowest and 0 at the highest. The effects' covariance is a sum of

    - `size`: proportional to the bytes that the lowest level saves;
    - `sublayer`: one effect shared by all groups of a kind (`layers.#.qkv`, names with their number left out);
    - `depth`: of groups of a kind, similar in neighbouring blocks, where names have a number;
    - `group`: every group on its own, with a variance of its own for each kind; `sensitive`: the same, with deviations
      as large as the sensitivities' mean; both with heavy tails, see `Posterior`;
    - `level`: every level between lowest and highest on its own;
    - `methods`: proportional to each sensitivity.

    `sublayer`, `depth` and `group` grow with the root of a group's bytes, as a sum over independent weights does.

    Args:
        space: The plans.
        priors: Sensitivities by method. The effects' prior mean is proportional to the mean of those that say
            anything, each scaled to the same variance; without any it is proportional to the bytes saved.
    """

    def __init__(self, space: PlanSpace, priors: Mapping[str, Prior]) -> None:
        self.space = space
        num_groups, num_levels = len(space.groups), len(space.levels)
        self.num_groups, self.num_levels = num_groups, num_levels
        self.num_effects = num_groups * (num_levels - 1)
        top = space.levels[-1]
        error = torch.tensor([4.0**-bits - 4.0**-top for bits in space.levels[:-1]], dtype=torch.float64)
        self._damage = error / error[0]
        bytes_ = torch.tensor(space.group_bytes, dtype=torch.float64)
        sizes = bytes_[:, -1] - bytes_[:, 0]
        self._size_effects = self._unit(self._spread(sizes / sizes.mean()))
        methods = [self._method_effects(prior) for prior in priors.values()]
        self._methods = [self._unit(effects) for effects in methods if bool(effects.abs().sum() > 0)]
        self.mean = self._unit(torch.stack(self._methods).mean(0)) if self._methods else self._size_effects
        self.parts = self._covariances(sizes)

    def features(self, plans: Tensor) -> Tensor:
        """Level indices ``(n, groups)`` as centred indicators ``(n, effects)`` of the levels below the top."""
        below = torch.arange(self.num_levels - 1)
        hot = (plans[:, :, None] == below).to(torch.float64) - 1.0 / self.num_levels
        return hot.reshape(len(plans), self.num_effects)

    def mismatches(self, left: Tensor, right: Tensor) -> Tensor:
        """Share of groups in which plans differ: ``(n, groups)`` and ``(m, groups)`` give ``(n, m)``."""
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
        scale = torch.outer(sizes.sqrt(), sizes.sqrt()) / sizes.mean()
        eye = torch.eye(self.num_groups, dtype=torch.float64)
        by_group = {"sublayer": same * scale}
        if all(depths) and self.num_groups > 1:
            number = torch.tensor([float(found.group()) for found in depths if found], dtype=torch.float64)
            reach = max(1.0, float(number.max() - number.min()) / 5)
            by_group["depth"] = same * scale * torch.exp(-(number[:, None] - number).abs() / reach)
        pattern = torch.outer(self._damage, self._damage)
        parts = {name: torch.kron(part, pattern) for name, part in by_group.items()}
        parts["size"] = torch.outer(self._size_effects, self._size_effects)
        if self.num_levels > 2:
            parts["level"] = torch.kron(eye, torch.diag((torch.arange(self.num_levels - 1) > 0).to(torch.float64)))
        if self._methods:
            effects = torch.stack(self._methods)
            parts["methods"] = effects.T @ effects / len(effects)
            magnitude = effects.abs().mean(0).reshape(self.num_groups, -1)
            parts["sensitive"] = (eye[:, None, :, None] * magnitude[:, :, None, None] * magnitude).reshape(
                self.num_effects, -1
            )
        parts = {name: self._unit_covariance(part) for name, part in parts.items()}
        alone = self._unit_covariance(torch.kron(eye * scale, pattern))
        for kind in dict.fromkeys(kinds):
            of_kind = torch.tensor([other == kind for other in kinds]).repeat_interleave(self.num_levels - 1)
            parts[f"group {kind}"] = alone * of_kind
        return parts

    def _spread(self, by_group: Tensor) -> Tensor:
        return (by_group[:, None] * self._damage).reshape(-1)

    def _method_effects(self, prior: Prior) -> Tensor:
        top = np.asarray(prior.get(self.space.levels[-1], np.zeros(self.num_groups)), dtype=float)
        rises = [np.asarray(prior[bits], dtype=float) - top for bits in self.space.levels[:-1]]
        return torch.tensor(np.stack(rises, axis=1)).reshape(-1)

    @cached_property
    def _feature_covariance(self) -> Tensor:
        """Of the features of plans drawn uniformly."""
        num, share = self.num_levels - 1, 1.0 / self.num_levels
        block = torch.eye(num, dtype=torch.float64) * share - share**2
        return torch.kron(torch.eye(self.num_groups, dtype=torch.float64), block)

    def _unit(self, effects: Tensor) -> Tensor:
        """Scaled so that a random plan's sum of effects has variance one."""
        variance = effects @ self._feature_covariance @ effects
        return effects / variance.sqrt() if variance > 0 else effects

    def _unit_covariance(self, part: Tensor) -> Tensor:
        return part / (part * self._feature_covariance).sum().clamp_min(1e-300)


@dataclass(frozen=True)
class Data:
    """Scores as tensors.

    Attributes:
        plans: ``(n, groups)`` level indices.
        ranks: ``(n,)`` rungs below the last: 0 is the target.
        scores: ``(n,)``, as observed.
        num_rungs: How many rungs there are, whether or not any of these scores is from each.
    """

    plans: Tensor
    ranks: Tensor
    scores: Tensor
    num_rungs: int

    @classmethod
    def of(cls, space: PlanSpace, observations: Sequence[Observation], steps: Collection[int]) -> Data:
        """Observations as tensors, where `steps` are those of every rung."""
        steps = sorted(steps, reverse=True)
        return cls(
            torch.tensor([space.indices_of(item.plan) for item in observations], dtype=torch.long).reshape(
                -1, len(space.groups)
            ),
            torch.tensor([steps.index(item.step) for item in observations], dtype=torch.long),
            torch.tensor([item.score for item in observations], dtype=torch.float64),
            len(steps),
        )

    def subset(self, rows: Tensor) -> Data:
        return Data(self.plans[rows], self.ranks[rows], self.scores[rows], self.num_rungs)


def informative(observations: Sequence[Observation]) -> list[Observation]:
    """The latest rung of every trial, and the lower rungs of the latest `NUM_RUNG_PAIRS` trials that have several."""
    latest = {item.index: item.step for item in observations}
    several = sorted({item.index for item in observations if item.step < latest[item.index]})
    kept = set(several[-NUM_RUNG_PAIRS:])
    return [item for item in observations if item.step == latest[item.index] or item.index in kept]


def settled(history: History) -> tuple[Observation, ...]:
    """What hyperparameters are fitted to: everything, until one result more or less changes little.

    From then on it is the rungs of the first so many trials that are over, so many that a fit serves the proposals
    until a tenth more are over. A function of the history alone, as a resumed search proposes what it would have.
    """
    over = [item.index for item in history.last()]
    if len(over) <= NUM_FITTED:
        return history.observations
    number = NUM_FITTED
    while number + number // 10 <= len(over):
        number += number // 10
    kept = set(over[:number])
    return tuple(item for item in history.observations if item.index in kept)


class Posterior:
    """A `PlanModel` that has seen scores; everything it says is of the last rung, in the score's unit.

    Args:
        model: The prior.
        data: The scores; at least one.
        pending: ``(p, groups)`` plans in flight: their score is taken to be what is expected of it, so that the
            mean stays and the variance falls (Ginsbourger et al. 2010, the kriging believer).
        fitted: A posterior of the same model and rungs whose hyperparameters are taken over; by default they are
            fitted to `data`.
    """

    unit: Tensor
    hyper: Tensor
    _center: Tensor
    _parts: Tensor

    def __init__(self, model: PlanModel, data: Data, pending: Tensor, fitted: Posterior | None = None) -> None:
        self._model, self._data, num = model, data, len(data.scores)
        self._names = [*model.parts, *OTHERS]
        if fitted is None:
            self._learn()
        else:
            self._center, self.unit = fitted._center, fitted.unit
            self.hyper, self._parts = fitted.hyper, fitted._parts
        self._covariance = self._effect_covariance(self.hyper)
        self._plans = torch.cat([data.plans, pending])
        self._features = model.features(self._plans)
        self._ranks = torch.cat([data.ranks, torch.zeros(len(pending), dtype=torch.long)])
        gram = self._between(self._plans, self._features, self._ranks, self._plans, self._features, self._ranks)
        noise = (self._value("noise") + JITTER) * torch.eye(len(gram), dtype=torch.float64)
        self._factor = torch.linalg.cholesky(gram + noise)
        residual = (data.scores - self._center) / self.unit - self._prior_mean(self.hyper, data)
        # A pending plan's weight is zero: its score is the one expected.
        self._weights = torch.zeros(len(self._plans), dtype=torch.float64)
        self._weights[:num] = torch.cholesky_solve(residual[:, None], self._factor[:num, :num])[:, 0]

    def _learn(self) -> None:
        """All that scores decide besides the posterior itself: unit, hyperparameters, stretched parts."""
        data, num = self._data, len(self._data.scores)
        beliefs = [SHARES.get(name.split()[0]) or OTHERS[name] for name in self._names]
        beliefs += [AMPLITUDE] * max(0, data.num_rungs - 1)
        self._medians = torch.tensor([belief.median for belief in beliefs], dtype=torch.float64).log()
        self._spreads = torch.tensor([belief.spread for belief in beliefs], dtype=torch.float64)
        # The rung with the most scores says where they are and how far they spread.
        widest = data.subset(data.ranks == data.ranks.mode().values) if num else data
        self._center = widest.scores.mean() if num else torch.zeros((), dtype=torch.float64)
        self._parts = torch.stack(list(self._model.parts.values()))
        self.unit = self._score_unit(widest)
        self.hyper = self._fit()
        self._parts = self._stretched()

    @property
    def noise(self) -> float:
        """Standard deviation of a score that is measured again."""
        return float(self._value("noise").sqrt() * self.unit)

    def mean(self, plans: Tensor) -> Tensor:
        """Expected scores of ``(n, groups)`` plans."""
        features = self._model.features(plans)
        return self._expected(features, self._cross(plans, features))

    def marginals(self, plans: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of ``(n, groups)`` plans: mean ``(n,)``, whitened covariance with what is known ``(known, n)``, variance."""
        features = self._model.features(plans)
        cross = self._cross(plans, features)
        additive = (features @ self._covariance * features).sum(1)
        prior = self._shape(self.hyper, additive, torch.zeros_like(additive)) + CONSTANT_VARIANCE
        white = torch.linalg.solve_triangular(self._factor, cross, upper=False)
        return self._expected(features, cross), white, prior

    def _cross(self, plans: Tensor, features: Tensor) -> Tensor:
        ranks = torch.zeros(len(plans), dtype=torch.long)
        return self._between(self._plans, self._features, self._ranks, plans, features, ranks)

    def _expected(self, features: Tensor, cross: Tensor) -> Tensor:
        return self._center + self.unit * (features @ self._effect_mean(self.hyper) + self._weights @ cross)

    def gap(self, plans: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(references, n)`` of how much plans score above each of some reference plans.

        The level of a rung, uncertain as it is, drops out.
        """
        mean, white, prior = self.marginals(plans)
        mean_at, white_at, prior_at = self.marginals(reference)
        zero = torch.zeros(1, dtype=torch.long)
        shared = self._between(
            reference, self._model.features(reference), zero.expand(len(reference)),
            plans, self._model.features(plans), zero.expand(len(plans)),
        )  # fmt: skip
        explained = (white**2).sum(0) + (white_at**2).sum(0)[:, None] - 2 * white_at.T @ white
        variance = prior + prior_at[:, None] - 2 * shared - explained
        return mean - mean_at[:, None], variance.clamp_min(MIN_VARIANCE) * self.unit**2

    @cached_property
    def _effects(self) -> tuple[Tensor, Tensor]:
        """Mean ``(effects,)`` and covariance of the additive part's effects, in units of the scores."""
        cross = self._covariance @ self._features.T * self._to_target()
        white = torch.linalg.solve_triangular(self._factor, cross.T, upper=False)
        return self._effect_mean(self.hyper) + cross @ self._weights, self._covariance - white.T @ white

    def effects(self, noise: Tensor) -> Tensor:
        """Effects ``(1 + s, groups, levels)``: the mean, then a sample for each row of ``(s, effects)`` white noise."""
        mean, covariance = self._effects
        values, vectors = torch.linalg.eigh(covariance)
        samples = mean + noise @ (vectors * values.clamp_min(0).sqrt()).T
        return self._by_level(torch.cat([mean[None], samples]))

    def slopes(self, plans: Tensor, references: Tensor) -> Tensor:
        """How expected improvement falls ``(n, groups, levels)`` with each level of `plans`, to first order.

        For ``u`` the expected gain over the reference by its standard deviation ``s``, ``EI = s (u Phi(u) + phi(u))``
        changes by ``-Phi(u)`` with the mean and by ``phi(u)`` with ``s``. As ``s`` is convex in the features, the plan
        of least summed slope is no worse at the same ratio of the two. Additive part only.

        Args:
            plans: ``(n, groups)``.
            references: ``(n, groups)`` that they are to improve on.
        """
        mean, covariance = self._effects
        moved = self._model.features(plans) - self._model.features(references)
        toward = moved @ covariance
        deviation = (toward * moved).sum(1).clamp_min(MIN_VARIANCE).sqrt()
        gain = -(moved @ mean) / deviation
        log_density = -0.5 * (gain**2 + math.log(2 * math.pi))
        spread = (log_density - torch.special.log_ndtr(gain)).exp() / deviation
        return self._by_level(mean - spread[:, None] * toward)

    def _by_level(self, effects: Tensor) -> Tensor:
        shaped = effects.reshape(-1, self._model.num_groups, self._model.num_levels - 1)
        return torch.nn.functional.pad(shaped, (0, 1)) * self.unit

    def _value(self, name: str) -> Tensor:
        return self.hyper[self._names.index(name)].exp()

    def _score_unit(self, data: Data) -> Tensor:
        """What makes the scores' sample variance the one that the prior expects; 1 where nothing can be told."""
        deviation = data.scores - data.scores.mean()
        if len(data.scores) < 2 or not bool(deviation.abs().max() > 0):
            return torch.ones((), dtype=torch.float64)
        features = self._model.features(data.plans)
        features = features - features.mean(0)
        expected = (features @ self._effect_covariance(self._medians) * features).sum()
        expected += ((features @ self._effect_mean(self._medians)) ** 2).sum()
        return ((deviation**2).sum() / expected.clamp_min(1e-12)).sqrt()

    def _fit(self) -> Tensor:
        """Hyperparameters at the maximum of posterior density, as logarithms."""
        data = self._data
        if len(data.scores) < 2:
            return self._medians
        if len(data.scores) > NUM_FITTED:
            half = NUM_FITTED // 2
            order = data.scores.argsort()
            rest = order[half:][torch.linspace(0, len(order) - half - 1, half).long()]
            data = data.subset(torch.cat([order[:half], rest]))
        features = self._model.features(data.plans)
        grams = torch.stack([features @ part @ features.T for part in self._model.parts.values()])
        distance = self._model.mismatches(data.plans, data.plans)
        same_rung = _levels(data.ranks, data.ranks)
        diagonal = torch.eye(len(data.scores), dtype=torch.float64)
        scores = (data.scores - self._center) / self.unit
        shares = len(self._model.parts)

        def negative_log_density(vector: np.ndarray) -> tuple[float, np.ndarray]:
            hyper = torch.tensor(vector, requires_grad=True)
            additive = torch.einsum("c,cnm->nm", hyper[:shares].exp(), grams)
            kernel = self._shape(hyper, additive, distance) * self._rung_factor(hyper, data.ranks, data.ranks)
            noise = hyper[self._names.index("noise")].exp()
            factor = torch.linalg.cholesky(kernel + same_rung + (noise + JITTER) * diagonal)
            residual = scores - self._prior_mean(hyper, data)
            white = torch.linalg.solve_triangular(factor, residual[:, None], upper=False)
            belief = ((hyper - self._medians) / self._spreads) ** 2
            total = 0.5 * (white**2).sum() + factor.diagonal().log().sum() + 0.5 * belief.sum()
            total.backward()
            assert hyper.grad is not None
            return float(total.detach()), hyper.grad.numpy()

        start = self._medians.numpy()
        bounds = list(zip(start - 4 * self._spreads.numpy(), start + 4 * self._spreads.numpy(), strict=True))
        found = minimize(
            negative_log_density, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxfun": 25}
        )
        return torch.tensor(found.x)

    def _stretched(self) -> Tensor:
        """The parts ``(parts, effects, effects)``, wider for groups whose own effect stands out.

        A few groups matter far more than the rest (outlier channels, the last blocks), which normal effects of one
        variance smooth away. So a group's own effect has Student's t, as a normal of unknown scale; the scales are
        found by expectation maximization (Tipping 2001; of its weights: Lange et al. 1989).
        """
        data, levels = self._data, self._model.num_levels - 1
        if len(data.scores) < 2:
            return self._parts
        own = torch.tensor([name.split()[0] in OWN for name in self._model.parts])
        weights, features = self.hyper[: len(own)].exp(), self._model.features(data.plans)
        mine, rest = (torch.einsum("c,cde->de", weights[which], self._parts[which]) for which in (own, ~own))
        noise = (self._value("noise") + JITTER) * torch.eye(len(data.scores), dtype=torch.float64)
        residual = (data.scores - self._center) / self.unit - self._prior_mean(self.hyper, data)
        seen = features * self._rung_factor(self.hyper, data.ranks, torch.zeros(1, dtype=torch.long))
        distance = self._model.mismatches(data.plans, data.plans)
        rungs, apart = self._rung_factor(self.hyper, data.ranks, data.ranks), _levels(data.ranks, data.ranks) + noise
        stretch = torch.ones_like(mine)
        for _ in range(NUM_STEPS):
            additive = features @ (rest + mine * stretch) @ features.T
            factor = torch.linalg.cholesky(self._shape(self.hyper, additive, distance) * rungs + apart)
            white = torch.linalg.solve_triangular(factor, seen @ (mine * stretch), upper=False)
            mean = white.T @ torch.linalg.solve_triangular(factor, residual[:, None], upper=False)[:, 0]
            square = mean**2 + (mine * stretch).diagonal() - (white**2).sum(0)
            ratio = (square / mine.diagonal().clamp_min(1e-300)).reshape(-1, levels).mean(1)
            scales = ((FREEDOM + ratio) / (FREEDOM + 1)).sqrt().repeat_interleave(levels)
            stretch = torch.outer(scales, scales)
        return torch.where(own[:, None, None], self._parts * stretch, self._parts)

    def _effect_covariance(self, hyper: Tensor) -> Tensor:
        return torch.einsum("c,cde->de", hyper[: len(self._parts)].exp(), self._parts)

    def _effect_mean(self, hyper: Tensor) -> Tensor:
        return hyper[self._names.index("mean")].exp() * self._model.mean

    def _prior_mean(self, hyper: Tensor, data: Data) -> Tensor:
        return self._model.features(data.plans) @ self._effect_mean(hyper) * self._amplitude(hyper, data.ranks)

    def _amplitude(self, hyper: Tensor, ranks: Tensor) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), hyper[len(self._names) :].exp()])[ranks]

    def _rung_factor(self, hyper: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ranks = torch.arange(len(hyper) - len(self._names) + 1)
        amplitudes = self._amplitude(hyper, ranks)
        apart = (ranks[:, None] - ranks).abs()
        table = torch.outer(amplitudes, amplitudes) * torch.exp(
            -apart * hyper[self._names.index("decorrelation")].exp()
        )
        return table[left][:, right]

    def _to_target(self) -> Tensor:
        return self._rung_factor(self.hyper, torch.zeros(1, dtype=torch.long), self._ranks)[0]

    def _shape(self, hyper: Tensor, additive: Tensor, distance: Tensor) -> Tensor:
        """The kernel of one rung, from its additive part and the share of groups that differ.

        `pairwise`: products of the additive terms, so that groups which matter interact; `local`: anything else, as
        alike as the plans are.
        """
        pairwise, local, reach = (hyper[self._names.index(name)].exp() for name in ("pairwise", "local", "reach"))
        total = hyper[: len(self._model.parts)].exp().sum()
        return additive + pairwise * additive**2 / total + local * torch.exp(-distance / reach)

    def _between(
        self,
        plans: Tensor,
        features: Tensor,
        ranks: Tensor,
        others: Tensor,
        their_features: Tensor,
        their_ranks: Tensor,
    ) -> Tensor:
        additive = features @ self._covariance @ their_features.T
        kernel = self._shape(self.hyper, additive, self._model.mismatches(plans, others))
        return kernel * self._rung_factor(self.hyper, ranks, their_ranks) + _levels(ranks, their_ranks)


def _levels(left: Tensor, right: Tensor) -> Tensor:
    """The kernel of the rungs' own levels, which are as good as unknown."""
    return CONSTANT_VARIANCE * (left[:, None] == right).to(torch.float64)
