"""The Gaussian process of the searcher `gp`, conditioned on the scores so far, in float64.

The correlation of two rungs falls with their distance (intrinsic coregionalization model, Bonilla
et al. 2008), so that a trial stopped early informs the last rung. The hyperparameters are the
maximum a posteriori.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from qpruner.search.plan_model import AMPLITUDE, NUM_FITTED, SHARES, Data, PlanModel

JITTER = 1e-8
MIN_VARIANCE = 1e-9
CONSTANT_VARIANCE = (
    100.0  # of a rung's mean score, in units of the scores' variance: almost uninformative
)
FREEDOM, NUM_STEPS = (
    1.0,
    10,
)  # degrees of freedom of Student's t, and steps of expectation maximization
OWN = ("group", "sensitive")  # parts in which every group has an effect of its own


class Posterior:
    """A `PlanModel` conditioned on scores; its methods predict the last rung, in the unit of the
    score.

    Plans are rows of `SearchSpace`. The `pending` ones ``(p, groups + 1)`` are running. Each counts
    as if its expected score had been observed: the mean stays and the variance falls (kriging
    believer, Ginsbourger et al. 2010). The hyperparameters are those of `fitted`, a posterior of
    the same model and rungs, or else fitted to `data`.
    """

    unit: Tensor
    hyper: Tensor
    _center: Tensor
    _parts: Tensor
    _medians: Tensor

    def __init__(
        self, model: PlanModel, data: Data, pending: Tensor, fitted: Posterior | None = None
    ) -> None:
        self._model, self._data, num = model, data, len(data.scores)
        self._names = [*model.parts, *model.others]
        if fitted is None:
            self._learn()
        else:
            self._center, self.unit = fitted._center, fitted.unit
            self.hyper, self._parts = fitted.hyper, fitted._parts
        self._covariance = self._effect_covariance(self.hyper)
        self._plans = torch.cat([data.plans, pending])
        self._ranks = torch.cat([data.ranks, data.ranks.new_zeros(len(pending))])
        gram = self._between(self._plans, self._ranks, self._plans, self._ranks)
        noise = (self._value("noise") + JITTER) * torch.eye(len(gram), dtype=torch.float64)
        self._factor = torch.linalg.cholesky(gram + noise)
        residual = (data.scores - self._center) / self.unit - self._prior_mean(self.hyper, data)
        # The weight of a pending plan is zero, as its score is the expected one.
        self._weights = torch.zeros(len(self._plans), dtype=torch.float64)
        self._weights[:num] = torch.cholesky_solve(residual[:, None], self._factor[:num, :num])[
            :, 0
        ]

    def _learn(self) -> None:
        """Learn the unit, the hyperparameters and the scales of groups' own effects from the
        scores."""
        model, data, num = self._model, self._data, len(self._data.scores)
        beliefs = [SHARES.get(name.split()[0]) or model.others[name] for name in self._names]
        beliefs += [AMPLITUDE] * max(0, data.num_rungs - 1)
        medians, self._spreads = torch.tensor(beliefs, dtype=torch.float64).T
        self._medians = medians.log()
        # Center and unit are those of the rung with the most scores.
        widest = data.subset(data.ranks == data.ranks.mode().values) if num else data
        self._center = widest.scores.mean() if num else torch.zeros((), dtype=torch.float64)
        self._parts = torch.stack(list(model.parts.values()))
        self.unit = self._score_unit(widest)
        self.hyper = self._fit()
        self._parts = self._stretched()

    def mean(self, plans: Tensor) -> Tensor:
        """Return the expected scores ``(n,)`` of plans ``(n, groups + 1)``."""
        return self.marginals(plans)[0]

    def marginals(self, plans: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean ``(n,)``, whitened covariance with known plans ``(known, n)`` and prior
        variance ``(n,)``."""
        features = self._model.features(plans)
        cross = self._between(self._plans, self._ranks, plans, self._ranks.new_zeros(len(plans)))
        additive = (features @ self._covariance * features).sum(1)
        prior = self._shape(self.hyper, additive, torch.zeros_like(additive))
        prior = prior + CONSTANT_VARIANCE + self._offset(self.hyper)
        mean = self._center + self.unit * (
            features @ self._effect_mean(self.hyper) + self._weights @ cross
        )
        return mean, solve_triangular(self._factor, cross, upper=False), prior

    def gap(self, plans: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance ``(references, n)`` of each plan's score minus the score of each
        reference plan."""
        mean, white, prior = self.marginals(plans)
        mean_at, white_at, prior_at = self.marginals(reference)
        zeros = self._ranks.new_zeros
        shared = self._between(reference, zeros(len(reference)), plans, zeros(len(plans)))
        explained = (white**2).sum(0) + (white_at**2).sum(0)[:, None] - 2 * white_at.T @ white
        variance = prior + prior_at[:, None] - 2 * shared - explained
        return mean - mean_at[:, None], variance.clamp_min(MIN_VARIANCE) * self.unit**2

    @cached_property
    def _effects(self) -> tuple[Tensor, Tensor]:
        """Compute mean ``(effects,)`` and covariance of what each (group, level) adds to the score;
        1 is `unit`."""
        to_target = self._rung_factor(self.hyper, self._ranks.new_zeros(1), self._ranks)[0]
        cross = self._covariance @ self._model.features(self._plans).T * to_target
        white = solve_triangular(self._factor, cross.T, upper=False)
        return self._effect_mean(
            self.hyper
        ) + cross @ self._weights, self._covariance - white.T @ white

    def effects(self, noise: Tensor) -> Tensor:
        """Return effects ``(1 + s, groups, levels)``: the mean, and a sample per row of noise ``(s,
        effects)``."""
        mean, covariance = self._effects
        values, vectors = torch.linalg.eigh(covariance)
        samples = mean + noise @ (vectors * values.clamp_min(0).sqrt()).T
        return self._by_level(torch.cat([mean[None], samples]))

    def slopes(self, plans: Tensor, references: Tensor) -> Tensor:
        """Return how much each level, put into `plans`, lowers the expected improvement: ``(n,
        groups, levels)``.

        ``EI = s (u Phi(u) + phi(u))``, where ``s`` is the standard deviation of the gain over the
        reference plan and ``u`` its mean divided by ``s``. Its derivative, ``-Phi(u)`` by the mean
        score and ``phi(u)`` by ``s``, is here divided by ``Phi(u)``. To first order the plan with
        the least sum of slopes improves at least as much as that in `plans`, as ``s`` is convex in
        the features. Interactions are left out.
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
        of_groups = effects[:, : self._model.num_effects - self._model.num_cuts]
        return (
            pad(of_groups.reshape(-1, self._model.num_groups, self._model.num_levels - 1), (0, 1))
            * self.unit
        )

    def _value(self, name: str, hyper: Tensor | None = None) -> Tensor:
        return (self.hyper if hyper is None else hyper)[self._names.index(name)].exp()

    def _score_unit(self, data: Data) -> Tensor:
        """Return the ratio of the scores' standard deviation to the prior's; 1 if all scores are
        equal."""
        deviation = data.scores - data.scores.mean()
        if len(data.scores) < 2 or not bool(deviation.abs().max() > 0):
            return torch.ones((), dtype=torch.float64)
        features = self._model.features(data.plans)
        features = features - features.mean(0)
        expected = (features @ self._effect_covariance(self._medians) * features).sum()
        expected += ((features @ self._effect_mean(self._medians)) ** 2).sum()
        return ((deviation**2).sum() / expected.clamp_min(1e-12)).sqrt()

    def _fit(self) -> Tensor:
        """Return the logarithms of the hyperparameters with the largest posterior density."""
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
        diagonal = torch.eye(len(data.scores), dtype=torch.float64)
        scores = (data.scores - self._center) / self.unit

        def negative_log_density(vector: np.ndarray) -> tuple[float, np.ndarray]:
            hyper = torch.tensor(vector, requires_grad=True)
            additive = torch.einsum("c,cnm->nm", hyper[: len(grams)].exp(), grams)
            kernel = self._shape(hyper, additive, distance) * self._rung_factor(
                hyper, data.ranks, data.ranks
            )
            noise = self._value("noise", hyper) + JITTER
            factor = torch.linalg.cholesky(
                kernel
                + self._levels(hyper, data.plans, data.ranks, data.plans, data.ranks)
                + noise * diagonal
            )
            residual = scores - self._prior_mean(hyper, data)
            white = solve_triangular(factor, residual[:, None], upper=False)
            belief = ((hyper - self._medians) / self._spreads) ** 2
            total = 0.5 * (white**2).sum() + factor.diagonal().log().sum() + 0.5 * belief.sum()
            total.backward()
            assert hyper.grad is not None
            return float(total.detach()), hyper.grad.numpy()

        start, reach = self._medians.numpy(), 4 * self._spreads.numpy()
        bounds = list(zip(start - reach, start + reach, strict=True))
        options = {"maxfun": 25}
        found = minimize(
            negative_log_density, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        return torch.tensor(found.x)

    def _stretched(self) -> Tensor:
        """Return the covariance parts ``(parts, effects, effects)``, with more variance for groups
        that stand out.

        Normal effects of one variance would smooth outliers away. So each group's own effect has
        Student's t distribution: a normal whose scale expectation maximization finds (Tipping 2001;
        Lange et al. 1989).
        """
        data, levels = self._data, self._model.num_levels - 1
        if len(data.scores) < 2:
            return self._parts
        own = torch.tensor([name.split()[0] in OWN for name in self._model.parts])
        weights, features = self.hyper[: len(own)].exp(), self._model.features(data.plans)
        mine, rest = (
            torch.einsum("c,cde->de", weights[which], self._parts[which]) for which in (own, ~own)
        )
        noise = (self._value("noise") + JITTER) * torch.eye(len(data.scores), dtype=torch.float64)
        residual = (data.scores - self._center) / self.unit - self._prior_mean(self.hyper, data)
        seen = features * self._rung_factor(self.hyper, data.ranks, data.ranks.new_zeros(1))
        distance = self._model.mismatches(data.plans, data.plans)
        rungs = self._rung_factor(self.hyper, data.ranks, data.ranks)
        apart = self._levels(self.hyper, data.plans, data.ranks, data.plans, data.ranks) + noise
        of_groups = self._model.num_groups * levels
        stretch, count = torch.ones_like(mine), self._model.is_free.sum(1).clamp_min(1)
        for _ in range(NUM_STEPS):
            additive = features @ (rest + mine * stretch) @ features.T
            factor = torch.linalg.cholesky(
                self._shape(self.hyper, additive, distance) * rungs + apart
            )
            white = solve_triangular(factor, seen @ (mine * stretch), upper=False)
            mean = white.T @ solve_triangular(factor, residual[:, None], upper=False)[:, 0]
            square = mean**2 + (mine * stretch).diagonal() - (white**2).sum(0)
            ratio = (square / mine.diagonal().clamp_min(1e-300))[:of_groups].reshape(
                -1, levels
            ).sum(1) / count
            scales = ((FREEDOM + ratio) / (FREEDOM + 1)).sqrt().repeat_interleave(levels)
            scales = pad(scales, (0, self._model.num_cuts), value=1.0)
            stretch = torch.outer(scales, scales)
        return torch.where(own[:, None, None], self._parts * stretch, self._parts)

    def _effect_covariance(self, hyper: Tensor) -> Tensor:
        return torch.einsum("c,cde->de", hyper[: len(self._parts)].exp(), self._parts)

    def _effect_mean(self, hyper: Tensor) -> Tensor:
        return self._value("mean", hyper) * self._model.mean

    def _amplitudes(self, hyper: Tensor) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), hyper[len(self._names) :].exp()])

    def _prior_mean(self, hyper: Tensor, data: Data) -> Tensor:
        return (
            self._model.features(data.plans)
            @ self._effect_mean(hyper)
            * self._amplitudes(hyper)[data.ranks]
        )

    def _rung_factor(self, hyper: Tensor, left: Tensor, right: Tensor) -> Tensor:
        amplitudes = self._amplitudes(hyper)
        ranks = torch.arange(len(amplitudes))
        decay = -(ranks[:, None] - ranks).abs() * self._value("decorrelation", hyper)
        return (torch.outer(amplitudes, amplitudes) * torch.exp(decay))[left][:, right]

    def _shape(self, hyper: Tensor, additive: Tensor, distance: Tensor) -> Tensor:
        """Return the kernel within a rung, from its additive part and the share of groups in which
        plans differ.

        The hyperparameter `pairwise` weighs products of two effects, and `local` all else that
        similar plans share.
        """
        pairwise, local, reach = (
            self._value(name, hyper) for name in ("pairwise", "local", "reach")
        )
        total = hyper[: len(self._model.parts)].exp().sum()
        return additive + pairwise * additive**2 / total + local * torch.exp(-distance / reach)

    def _between(self, plans: Tensor, ranks: Tensor, others: Tensor, their_ranks: Tensor) -> Tensor:
        additive = self._model.features(plans) @ self._covariance @ self._model.features(others).T
        kernel = self._shape(self.hyper, additive, self._model.mismatches(plans, others))
        levels = self._levels(self.hyper, plans, ranks, others, their_ranks)
        return kernel * self._rung_factor(self.hyper, ranks, their_ranks) + levels

    def _levels(
        self, hyper: Tensor, plans: Tensor, ranks: Tensor, others: Tensor, their_ranks: Tensor
    ) -> Tensor:
        """Return the kernel of the mean scores of rungs, of which the prior knows almost nothing,
        and of cuts there."""
        same_cut = (plans[:, -1:] == others[:, -1]).to(torch.float64)
        same_rung = (ranks[:, None] == their_ranks).to(torch.float64)
        return same_rung * (CONSTANT_VARIANCE + same_cut * self._offset(hyper))

    def _offset(self, hyper: Tensor) -> Tensor:
        """Return the variance of a cut's own level at each rung; 0 if there is one cut only."""
        return (
            self._value("offset", hyper)
            if "offset" in self._names
            else torch.zeros((), dtype=torch.float64)
        )
